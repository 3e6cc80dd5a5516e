"""Train a lightweight reranker: `deepspeed pipeline/train_reranker.py --config RECIPE [key.sub=value ...]`.

A pair's score at every depth, and at widths that are drawn anew for every step (arXiv 2409.15700v1, appendix D). The
run folder (run.output_dir) gets settings.yaml, metrics.jsonl, checkpoints/, loss.png and model/ (adapter, heads,
tokenizer, template, limit). Started again with the same recipe, a run goes on from its newest checkpoint.
"""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.runtime.ranks import Ranks, by_first
from pipeline.runtime.runlog import plot_losses
from pipeline.runtime.watch import Watch, leave, mark
from pipeline.settings import Settings
from pipeline.training.command import parse_arguments, run_command
from pipeline.training.reranking import save, set_up_reranker
from pipeline.training.steps import finish, resume, train_steps

EPILOG = """examples:
  deepspeed --num_gpus 8 pipeline/train_reranker.py --config recipes/reranker_gemma2.yaml
  python pipeline/train_reranker.py --config examples/quickstart/reranker.yaml run.deepspeed=ds_configs/zero1.json
The store must exist: python pipeline/preprocess.py --config RECIPE; an embedder's with this tokenizer will do."""


def train(settings: Settings, ranks: Ranks, watch: Watch, held: contextlib.ExitStack) -> None:
    """From the newest checkpoint to the finished reranker; raises as an embedder's training does."""
    run = set_up_reranker(settings, ranks, watch, held)
    # Pairs of the next step are tokenized and packed while this one computes.
    with ThreadPoolExecutor(1) as loader:
        state = train_steps(run, resume(run), loader)
    mark(watch, "writing the model")
    save(run, run.out / "model")
    by_first(lambda: plot_losses(run.out / "metrics.jsonl", run.out / "loss.png"), ranks)
    finish(run, state)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(parse_arguments(__doc__, EPILOG, argv), "reranker", train)


if __name__ == "__main__":
    leave(main())
