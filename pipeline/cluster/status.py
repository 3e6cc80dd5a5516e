"""Where a run stands: from its folder, on any node, also while it runs, without disturbing it.

Whether it goes on now is asked of squeue where there is one; else it is judged by how long ago the run wrote anything.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.job_states import GONE, OVER, RUNNING, QueuedJob, ask_slurm
from pipeline.cluster.run_folder import (
    Attempt,
    Checkpoint,
    Progress,
    is_trained,
    newest_checkpoint,
    rank_logs,
    read_attempts,
    read_mtime,
    read_progress,
    read_scores,
    submitted_jobs,
)

QUIET_STEPS, QUIET_SECONDS = 10, 600  # a run that wrote nothing for longer than both may have ended
SHOWN_ATTEMPTS = 8


@dataclass(frozen=True)
class RunStatus:
    """All that is known about a run."""

    run: str
    state: str  # done, running, waiting, silent, ended, not started
    progress: Progress | None
    checkpoint: Checkpoint | None
    attempts: tuple[Attempt, ...]  # oldest first
    jobs: tuple[QueuedJob, ...]
    no_slurm: str  # why SLURM's word on the jobs is missing
    silent_seconds: float | None  # since the run wrote anything
    scores: dict[str, float]  # "label mode" -> mean over its tasks
    num_tasks: int  # in scores.json
    has_model: bool

    @property
    def restarts(self) -> int:
        """Starts of training after the first."""
        return max(0, sum(attempt.stage == "train" for attempt in self.attempts) - 1)


def read_status(run: Path) -> RunStatus:
    """Read a run's folder.

    Raises:
        ValueError: there is no such folder, or it is no run's.
        OSError: a file cannot be read.
    """
    require_run(run)
    attempts, progress = read_attempts(run), read_progress(run / "metrics.jsonl")
    jobs, no_slurm = ask_slurm([*submitted_jobs(run), *(attempt.job for attempt in attempts)])
    silent = seconds_silent(run, attempts)
    scores, num_tasks = read_scores(run / "scores.json")
    has_model = is_trained(run)
    return RunStatus(
        run=str(run),
        state=find_state(progress, attempts, jobs, silent, has_model),
        progress=progress,
        checkpoint=newest_checkpoint(run / "checkpoints"),
        attempts=attempts,
        jobs=jobs,
        no_slurm=no_slurm,
        silent_seconds=silent,
        scores=scores,
        num_tasks=num_tasks,
        has_model=has_model,
    )


def require_run(run: Path) -> None:
    """ValueError if this is not a folder that a run or `bge-icl submit` has begun."""
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder; name a run's folder (run.output_dir of its recipe)")
    signs = ("metrics.jsonl", "settings.yaml", "attempts", "jobs", "checkpoints", "lock")
    if not any((run / sign).exists() for sign in signs):
        raise ValueError(f"{run} is not a run's folder: none of {', '.join(signs)} is there; see run.output_dir")


def find_state(
    progress: Progress | None,
    attempts: Sequence[Attempt],
    jobs: Sequence[QueuedJob],
    silent: float | None,
    has_model: bool,
) -> str:
    """done, running, waiting (in the queue), silent (perhaps ended without a word), ended or not started."""
    states = {job.state for job in jobs}
    if states & set(RUNNING):
        return "running"
    if states - set(OVER):
        return "waiting"
    last = attempts[-1] if attempts else None
    trained = has_model and progress is not None and progress.step >= progress.total_steps
    if trained and unfinished(attempts) is None:
        return "done"
    if last is not None and last.is_final:
        return "ended"
    if silent is None:
        return "ended" if jobs else "not started"
    if states - {GONE}:  # a job that SLURM does not know may be another cluster's
        return "ended"
    usual = progress.step_seconds if progress is not None else 0.0
    return "running" if silent < max(QUIET_STEPS * usual, QUIET_SECONDS) else "silent"


def unfinished(attempts: Sequence[Attempt]) -> Attempt | None:
    """Of the newest stage's attempts the one that ended otherwise than done; of an array any of its tasks."""
    if not attempts:
        return None
    job = attempts[-1].job.partition("_")[0]
    newest = {attempt.job: attempt for attempt in attempts if attempt.job.partition("_")[0] == job}
    return next((some for some in newest.values() if some.is_final and not some.verdict.startswith("done")), None)


def seconds_silent(run: Path, attempts: Sequence[Attempt]) -> float | None:
    """How long ago the run wrote anything; None where it has written nothing yet."""
    paths = [run / "metrics.jsonl", run / "evaluation.jsonl", run / "checkpoints"]
    if attempts:
        folder = run / "attempts" / attempts[-1].name
        paths += [folder, *rank_logs(folder).values()]
    times = [moment for path in paths if (moment := read_mtime(path)) is not None]
    return max(0.0, time.time() - max(times)) if times else None


# The status as text.


def describe(status: RunStatus) -> str:
    """What a person wants to know, in some lines."""
    lines = [_line("run", status.run), _line("state", _state(status))]
    lines += _progress_lines(status)
    if status.checkpoint is not None:
        behind = status.progress.step - status.checkpoint.step if status.progress is not None else 0
        since = f", {behind} steps ago" if behind > 0 else ""
        age = spoken(time.time() - status.checkpoint.written)
        lines.append(_line("checkpoint", f"{status.checkpoint.name}{since}, {age} old"))
    elif status.progress is not None:
        lines.append(_line("checkpoint", "none yet"))
    if status.attempts:
        count = len(status.attempts)
        lines.append(_line("attempts", f"{count}; restarts of training: {status.restarts}"))
        if count > SHOWN_ATTEMPTS:
            lines.append(f"  {count - SHOWN_ATTEMPTS} older ones: {status.run}/attempts")
        lines += [f"  {_attempt(attempt)}" for attempt in status.attempts[-SHOWN_ATTEMPTS:]]
    if status.jobs:
        lines.append(_line("jobs", "as SLURM has them"))
        lines += [f"  {job.id:<10} {job.name:<22} {job.state:<10} {job.detail}".rstrip() for job in status.jobs]
    if status.scores:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in status.scores.items())
        lines.append(_line("scores", f"means over {status.num_tasks} task(s): {shown}; {status.run}/report.md"))
    if status.has_model:
        lines.append(_line("model", f"{status.run}/model"))
    return "\n".join(lines)


def _line(name: str, text: str) -> str:
    return f"{name:<11}{text}"


def _state(status: RunStatus) -> str:
    last = status.attempts[-1] if status.attempts else None
    wrote = f"last written {spoken(status.silent_seconds)} ago" if status.silent_seconds is not None else ""
    doubt = f" ({status.no_slurm}: judged by its files)" if status.no_slurm else ""
    if status.state == "running":
        return f"running, {wrote}{doubt}" if wrote else "running"
    if status.state == "waiting":
        return "waiting in the queue" + (f"; the last attempt: {last.verdict}" if last and last.verdict else "")
    if status.state == "silent":
        return f"{wrote}: it has ended without a word, or stands still{doubt}; see --logs"
    if status.state == "ended" and last is not None:
        last = unfinished(status.attempts) or last
        return f"ended: {last.stage}: {last.verdict or last.reason or 'without a word'}"
    if status.state == "ended":
        return f"ended without a word: do the nodes see {status.run}? scontrol show job says more"
    return status.state


def _progress_lines(status: RunStatus) -> list[str]:
    progress = status.progress
    if progress is None:
        return [_line("step", "none done yet")]
    share = f" ({progress.step / progress.total_steps:.1%})" if progress.total_steps else ""
    loss = "not finite" if progress.loss is None else f"{progress.loss:.4f}"
    mean = f" (mean of {progress.counted}: {progress.mean_loss:.4f})" if progress.mean_loss is not None else ""
    rate = (
        f"{progress.step_seconds:.2f} s a step, {progress.queries_per_second:.1f} queries/s, "
        f"{progress.tokens_per_second:,.0f} tokens/s (median of {progress.counted})"
    )
    lines = [
        _line("step", f"{progress.step:,} of {progress.total_steps:,}{share}, epoch {progress.epoch}"),
        _line("loss", f"{loss}{mean}, {progress.dataset}"),
        _line("rate", rate),
    ]
    if progress.seconds_left:
        left = f"{spoken(progress.seconds_left)} of steps"
        if status.state == "running":
            left += (
                f", until about {time.strftime('%a %d %b %H:%M', time.localtime(time.time() + progress.seconds_left))}"
            )
        lines.append(_line("ETA", left))
    if progress.damaged_lines:
        lines.append(_line("warning", f"{progress.damaged_lines} lines of metrics.jsonl cannot be read"))
    return lines


def _attempt(attempt: Attempt) -> str:
    """One line: what it began with, what it came to."""
    began = time.strftime("%d %b %H:%M", time.localtime(attempt.started))
    steps = ""
    if attempt.stage == "train":
        steps = f", steps {'?' if attempt.before is None else attempt.before}"
        steps += f" to {attempt.steps}" if attempt.steps is not None else ""
    nodes = f" on {len(attempt.nodes)} node(s)" if attempt.nodes else ""
    end = attempt.verdict or (
        f"exit code {attempt.code}: {attempt.reason}" if attempt.code is not None else "no end yet"
    )
    return f"{attempt.name:<12} {attempt.stage} {began}{nodes}{steps}: {end}"


def spoken(seconds: float) -> str:
    """A duration in its two largest units: `2d03h`, `1h05m`, `3m20s`, `12s`."""
    whole = max(0, round(seconds))
    for unit, name, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit:
            return f"{whole // unit}{name}{whole % unit // smaller:02d}{small}"
    return f"{whole}s"
