"""Show where a run stands: `python pipeline/job_status.py RUN`, while it runs or after, on any node.

Reads the run's folder only, and asks squeue and scontrol where there are any: steps done, rate, time left, loss, newest
checkpoint, attempts (starts of its jobs) and what became of them, jobs, scores.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.cluster.job_states import OVER
from pipeline.cluster.rank_logs import Places, first_errors, logs_of, merged_lines, new_lines, rest_of
from pipeline.cluster.run_folder import Attempt, read_attempts
from pipeline.cluster.status import describe, read_status, require_run

POLL_SECONDS = 0.5
ASK_SECONDS = 10.0  # SLURM is asked no more often
IDLE_SECONDS = 60.0  # ranks that wrote nothing for so long may have ended without a word


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python pipeline/job_status.py runs/mine
  python pipeline/job_status.py runs/mine --logs | less      all ranks' logs of the newest attempt, [rank 3] in front
  python pipeline/job_status.py runs/mine --follow           go on showing them, until the run ends
  python pipeline/job_status.py runs/mine --json             the same for programs
  python pipeline/job_status.py --where --config recipe.yaml run.output_dir=runs/other    prints the run's folder
state: done; running; waiting (in the queue); ended (its last attempt says why); silent (nothing written for long: ended
  without a word, or hanging); not started.
exit codes: 0, whatever the state; 2 for what is no run's folder.""",
    )
    parser.add_argument("run", nargs="?", help="run folder (run.output_dir)")
    parser.add_argument("--logs", action="store_true", help="print all ranks' logs of an attempt as one, by time")
    parser.add_argument("--follow", action="store_true", help="print what the ranks write from now on (Ctrl-C leaves)")
    parser.add_argument("--attempt", help="with --logs: this one (JOB.RESTART) instead of the newest with logs")
    parser.add_argument("--json", action="store_true", help="print the status as JSON; times in seconds")
    parser.add_argument("--where", action="store_true", help="print the absolute run.output_dir of --config")
    parser.add_argument("--config", help="with --where: recipe YAML")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="with --where: over the recipe's")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.where and arguments.run is not None:
        arguments.overrides.insert(0, arguments.run)  # there is no RUN then
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """ValueError for arguments that say nothing together."""
    if arguments.where != (arguments.config is not None):
        raise ValueError("--where and --config RECIPE belong together: name both, or a run's folder")
    if arguments.where and (arguments.logs or arguments.follow or arguments.json or arguments.attempt):
        raise ValueError("--where prints a folder and nothing else: leave out --logs, --follow, --json and --attempt")
    if not arguments.where and arguments.run is None:
        raise ValueError("name a run's folder: job_status.py RUN")
    if not arguments.where and arguments.overrides:
        raise ValueError(f"{arguments.overrides[0]!r} goes with --where --config; a run's folder takes no settings")
    if arguments.json and (arguments.logs or arguments.follow):
        raise ValueError("--json is the status: leave out --logs and --follow")
    if arguments.attempt and not arguments.logs:
        raise ValueError(f"--attempt {arguments.attempt} goes with --logs")


def where(recipe: str, overrides: Sequence[str]) -> str:
    """The absolute run folder of a recipe."""
    from pipeline.settings import load_settings  # the status itself needs no settings

    return load_settings(recipe, overrides).run.output_dir


def status_json(run: Path) -> str:
    """The status as a JSON object; the fields are those of RunStatus in pipeline/cluster/status.py."""
    status = read_status(run)
    return json.dumps(dataclasses.asdict(status) | {"restarts": status.restarts}, indent=1)


def choose_attempt(run: Path, name: str | None) -> Attempt:
    """An attempt that has logs: this one, or the newest.

    Raises:
        ValueError: there is none.
    """
    require_run(run)
    attempts = {attempt.name: attempt for attempt in read_attempts(run) if logs_of(run, attempt)}
    if not attempts:
        raise ValueError(f"{run} has no logs; jobs of slurm/*.sbatch write them to {run}/attempts")
    if name is not None and name not in attempts:
        raise ValueError(f"--attempt {name}: no such attempt with logs; there are: {', '.join(attempts)}")
    return attempts[name or list(attempts)[-1]]


def show_logs(run: Path, attempt: Attempt) -> None:
    """All lines of an attempt, and at the end, where the eye is, the first error of each rank."""
    logs = logs_of(run, attempt)
    for line in merged_lines(logs):
        print(line)
    errors = first_errors(logs)
    verdict = attempt.verdict or "no end yet"
    print(f"--- attempt {attempt.name}, {len(logs)} logs: {verdict}{'; first errors:' if errors else ''}")
    print_all(errors)


def follow(run: Path) -> None:
    """Print what the ranks of the newest attempt write, and of those that come after it, until the run ends."""
    require_run(run)
    shown: Attempt | None = None
    places = Places()
    asked = heard = -IDLE_SECONDS
    waiting = ""
    while True:
        attempts = read_attempts(run)
        newest = attempts[-1] if attempts else None
        if newest is not None and (shown is None or newest.name != shown.name):
            if shown is not None:
                lines, places = new_lines(logs_of(run, shown), places)
                print_all([*lines, *rest_of(places)])
            print_all([f"--- attempt {newest.name} ({newest.stage})"])
            shown, places, heard = newest, Places(), time.monotonic()
        if newest is not None:
            lines, places = new_lines(logs_of(run, newest), places)
            print_all(lines)
            heard = time.monotonic() if lines else heard
        now, has_ended = time.monotonic(), newest is None or bool(newest.verdict)
        if (has_ended and now - asked > ASK_SECONDS) or now - max(asked, heard) > IDLE_SECONDS:
            asked, status = now, read_status(run)
            if status.state not in ("running", "waiting") and status.attempts == attempts:
                print_all([*rest_of(places), "---", describe(status)])
                return
            queue = "; ".join(f"{job.id} {job.state}: {job.detail}" for job in status.jobs if job.state not in OVER)
            if status.state == "waiting" and queue != waiting:
                print_all([f"--- waiting: {queue}"])
                waiting = queue
        time.sleep(POLL_SECONDS)


def print_all(lines: Sequence[str]) -> None:
    if lines:
        print("\n".join(lines), flush=True)


def run_command(arguments: argparse.Namespace) -> None:
    """Print what the arguments ask for; user errors are ValueErrors."""
    check(arguments)
    if arguments.where:
        print(where(arguments.config, arguments.overrides))
        return
    run = Path(arguments.run)
    if arguments.follow:
        follow(run)
    elif arguments.logs:
        show_logs(run, choose_attempt(run, arguments.attempt))
    else:
        print(status_json(run) if arguments.json else describe(read_status(run)))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        run_command(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
