"""Train a few-shot embedder: `deepspeed pipeline/train.py --config RECIPE [key.sub=value ...]`.

The run folder (run.output_dir) gets settings.yaml, metrics.jsonl, checkpoints/, loss.png and model/ (adapter, marker
rows, tokenizer, template, limits, examples). Started again with the same recipe, a run goes on from its newest
checkpoint.
"""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.inference.gate import GATE_FILE
from pipeline.inference.saving import save_model
from pipeline.runtime.engine import read_state
from pipeline.runtime.ranks import Ranks, by_first
from pipeline.runtime.runlog import plot_losses
from pipeline.runtime.watch import Watch, leave, mark
from pipeline.settings import Settings
from pipeline.training.command import parse_arguments, run_command
from pipeline.training.evaluating import embed_gate_texts
from pipeline.training.run import set_up
from pipeline.training.steps import finish, resume, train_steps

EPILOG = """examples:
  deepspeed --num_accelerators 2 pipeline/train.py --config examples/quickstart/recipe.yaml
  deepspeed --num_gpus 8 pipeline/train.py --config recipes/bge_en_icl_public.yaml run.chunk_tokens=32768
  python pipeline/train.py --config examples/quickstart/recipe.yaml run.deepspeed=ds_configs/zero1.json   (one process)
The store must exist: python pipeline/preprocess.py --config RECIPE. What a step holds: pipeline/plan_run.py."""


def train(settings: Settings, ranks: Ranks, watch: Watch, held: contextlib.ExitStack) -> None:
    """From the newest checkpoint to the finished model.

    Raises:
        StopRequested: someone asked for it, or the job's time ends; what is done is saved.
        FloatingPointError: several steps in a row were not finite.
    """
    run = set_up(settings, ranks, watch, held)
    out = run.out
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
    finish(run, state)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(parse_arguments(__doc__, EPILOG, argv), "embedder", train)


if __name__ == "__main__":
    leave(main())
