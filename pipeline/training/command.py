"""The command around a training run, the same for every kind of model: arguments, process group, how a run ends."""

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence

from pipeline.files import exit_code
from pipeline.runtime.attempt import write_end
from pipeline.runtime.engine import start_distributed, stop_distributed
from pipeline.runtime.ranks import Ranks, read_ranks, share_cores
from pipeline.runtime.runlog import set_up_logging
from pipeline.runtime.watch import (
    NOT_FINITE,
    STOPPED,
    StopRequested,
    Watch,
    end_alone,
    start_watch,
    stop_watching_signals,
)
from pipeline.settings import ENTRIES, Settings, load_settings

log = logging.getLogger("train")

EXIT_CODES = """\
exit codes: 0 done; 1 a fault that may pass (a file system that is away); 2 something to mend, said in one line;
  75 stopped on request (SIGTERM, SIGUSR1, Ctrl-C, end of the SLURM job) and saved; 76 a rank was lost or stood still;
  77 losses or gradients are not finite. After 1, 75 and 76 the same command goes on."""

Work = Callable[[Settings, Ranks, Watch, contextlib.ExitStack], None]


def parse_arguments(description: str | None, epilog: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{epilog}\n{EXIT_CODES}",
    )
    parser.add_argument("--config", required=True, help="recipe YAML; pipeline/settings.py documents every key")
    parser.add_argument("--local_rank", type=int, default=None, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the recipe's")
    return parser.parse_intermixed_args(argv)


def run_command(arguments: argparse.Namespace, kind: str, work: Work) -> int:
    """`work` with everything that a rank needs; returns the exit code. The stack holds the run folder's lock.

    Args:
        kind: what `work` trains (model.kind); a recipe of another is refused.
    """
    try:
        ranks = read_ranks(arguments.local_rank)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    set_up_logging(ranks)
    watch, code = None, 0
    try:
        settings = load_settings(arguments.config, arguments.overrides)
        if settings.model.kind != kind:
            other = settings.model.kind
            raise ValueError(f"model.kind={other}, and {ENTRIES[kind]} trains the {kind}s: start {ENTRIES[other]}")
        share_cores(ranks)
        start_distributed(ranks, settings.run.max_stall_seconds)
        watch = start_watch(ranks, settings.run.max_stall_seconds)
        with contextlib.ExitStack() as held:
            work(settings, ranks, watch, held)
    except StopRequested as stop:
        log.info("stopped by %s; the same command goes on from there", stop)
        code = STOPPED
    except FloatingPointError as error:
        code = report(error, ranks, NOT_FINITE)
    except (ValueError, OSError) as error:
        return report(error, ranks, exit_code(error))
    except Exception as error:
        if watch is None or ranks.world_size == 1:
            raise
        # Leaving in order would wait for the others, who wait for this rank, or are gone.
        end_alone(error, ranks, watch)
    stop_distributed()
    return code


def report(error: Exception, ranks: Ranks, code: int) -> int:
    """Say what is wrong; a user's fault shows on every rank alike, so the others give the first one time to say it."""
    stop_watching_signals()
    write_end(ranks, code, None, str(error))
    time.sleep(0 if ranks.is_first else 3)
    print(f"{'' if ranks.is_first else f'[rank {ranks.rank}] '}error: {error}", file=sys.stderr, flush=True)
    return code
