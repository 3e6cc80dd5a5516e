"""Train a few-shot embedder: `deepspeed pipeline/train.py --config RECIPE [key.sub=value ...]`.

The run folder (run.output_dir) gets settings.yaml, metrics.jsonl, checkpoints/, loss.png and model/ (adapter, marker
rows, tokenizer, template, limits, examples). Started again with the same recipe, a run goes on from its newest
checkpoint.
"""

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.files import exit_code
from pipeline.inference.gate import GATE_FILE
from pipeline.inference.saving import save_model
from pipeline.runtime.attempt import write_end
from pipeline.runtime.engine import read_state, start_distributed, stop_distributed
from pipeline.runtime.ranks import Ranks, by_first, read_ranks, share_cores
from pipeline.runtime.runlog import plot_losses, set_up_logging
from pipeline.runtime.watch import (
    NOT_FINITE,
    STOPPED,
    StopRequested,
    end_alone,
    leave,
    mark,
    start_watch,
    stop_watching_signals,
)
from pipeline.settings import load_settings
from pipeline.training.evaluating import embed_gate_texts
from pipeline.training.run import Run, set_up
from pipeline.training.steps import resume, train_steps

log = logging.getLogger("train")


def train(run: Run) -> None:
    """From the newest checkpoint to the finished model.

    Raises:
        StopRequested: someone asked for it, or the job's time ends; what is done is saved.
        FloatingPointError: several steps in a row were not finite.
    """
    out, ranks = run.out, run.ranks
    # The next step is planned and packed while this one computes.
    with ThreadPoolExecutor(1) as loader:
        state = train_steps(run, resume(run), loader)
    mark(run.watch, "writing the model")
    trainable = read_state(run.engine, moments=False)

    def write() -> None:
        base = run.fingerprints["model.name"]
        save_model(out / "model", run.encoder, trainable, run.tokenizer, run.settings, run.store, base)
        plot_losses(out / "metrics.jsonl", out / "loss.png")

    by_first(write, ranks)
    gate_ND = embed_gate_texts(run)
    by_first(lambda: np.save(out / "model" / GATE_FILE, gate_ND), ranks)
    write_end(ranks, 0, state.step, "done")
    if ranks.is_first:
        tokens, without = f"{state.tokens_seen:,}", state.step - state.updates
        log.info("done: %d steps (%d without an update), %s tokens", state.step, without, tokens)
        log.info("model in %s", out / "model")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  deepspeed --num_accelerators 2 pipeline/train.py --config examples/quickstart/recipe.yaml
  deepspeed --num_gpus 8 pipeline/train.py --config recipes/bge_en_icl_public.yaml run.chunk_tokens=32768
  python pipeline/train.py --config examples/quickstart/recipe.yaml run.deepspeed=ds_configs/zero1.json   (one process)
The store must exist: python pipeline/preprocess.py --config RECIPE. What a step holds: pipeline/plan_run.py.
exit codes: 0 done; 1 a fault that may pass (a file system that is away); 2 something to mend, said in one line;
  75 stopped on request (SIGTERM, SIGUSR1, Ctrl-C, end of the SLURM job) and saved; 76 a rank was lost or stood still;
  77 losses or gradients are not finite. After 1, 75 and 76 the same command goes on.""",
    )
    parser.add_argument("--config", required=True, help="recipe YAML; pipeline/settings.py documents every key")
    parser.add_argument("--local_rank", type=int, default=None, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the recipe's")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        ranks = read_ranks(arguments.local_rank)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    set_up_logging(ranks)
    watch, code = None, 0
    try:
        settings = load_settings(arguments.config, arguments.overrides)
        share_cores(ranks)
        start_distributed(ranks, settings.run.max_stall_seconds)
        watch = start_watch(ranks, settings.run.max_stall_seconds)
        with contextlib.ExitStack() as held:
            train(set_up(settings, ranks, watch, held))
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


if __name__ == "__main__":
    leave(main())
