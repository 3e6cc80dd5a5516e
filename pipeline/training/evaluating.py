"""Scores of the model in training, on all ranks; the best model is kept."""

import logging
import time
from collections.abc import Callable

import numpy as np

from pipeline.data.composing import Limits
from pipeline.evaluation.during import is_best, is_scored, record_scores, score_task
from pipeline.inference.embedder import FewShotEmbedder
from pipeline.inference.gate import gate_embeddings
from pipeline.inference.saving import save_model
from pipeline.runtime.checkpoint import TrainState
from pipeline.runtime.engine import read_state
from pipeline.runtime.ranks import by_first
from pipeline.runtime.watch import mark, pass_boundary
from pipeline.training.run import EmbedderRun, Run

log = logging.getLogger("train")


def is_due(run: Run, step: int) -> bool:
    """Whether the model is to be evaluated when `step` steps are done."""
    every = run.settings.evaluation.every
    return bool(every and step and (step == run.total_steps or step % every == 0))


def must_make_up(run: Run, step: int) -> bool:
    """Whether the evaluation after `step` steps was due, and cut off by the end of the process."""
    return is_due(run, step) and not by_first(lambda: is_scored(run.out, step), run.ranks)


def embed_gate_texts(run: EmbedderRun) -> np.ndarray:
    """What the engine makes of the export gate's texts, on every rank: the truth that an export is compared with."""
    run.engine.eval()
    return gate_embeddings(_embedder(run, lambda: mark(run.watch, "the texts of the export gate")))


def _embedder(run: EmbedderRun, before_pass: Callable[[], None]) -> FewShotEmbedder:
    """The engine as an embedder, all ranks together; a new one for each state of the weights."""
    return FewShotEmbedder(
        encoder=run.engine,
        tokenizer=run.tokenizer,
        limits=Limits.from_settings(run.settings.preprocess),
        device=run.ranks.device,
        chunk_tokens=run.settings.run.chunk_tokens,
        show_progress=False,
        place=(run.ranks.rank, run.ranks.world_size),
        before_pass=before_pass,
    )


def evaluate(run: EmbedderRun, state: TrainState) -> float:
    """Score the model as it is on the recipe's tasks, all ranks together; the best one stands in best_model/. Returns
    the seconds.

    Raises:
        StopRequested: as in a step, before any forward pass.
    """
    started, ranks, settings = time.perf_counter(), run.ranks, run.settings
    place = f"an evaluation after {state.step} steps"
    embedder = _embedder(run, lambda: pass_boundary(run.watch, place))
    run.engine.eval()
    scores: dict[str, float] = {}
    for task in run.tasks:
        mark(run.watch, f"evaluating on {task.name} after {state.step} steps")
        scores |= score_task(embedder, task, settings.evaluation.num_examples)
    run.engine.train()
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    best = by_first(lambda: state.updates > 0 and is_best(run.out, state.step, scores), ranks)
    took = f"{time.perf_counter() - started:.0f} s{'; the best so far' if best else ''}"
    log.info("after %d steps: %s (%s)", state.step, shown, took)
    if best:
        mark(run.watch, "writing the best model")
        trainable, folder = read_state(run.engine, moments=False), run.out / "best_model"
        base = run.fingerprints["model.name"]
        by_first(lambda: save_model(folder, run.encoder, trainable, run.tokenizer, settings, run.store, base), ranks)
    # The line comes last: what it says is there.
    by_first(lambda: record_scores(run.out, state.step, scores, best), ranks)
    return time.perf_counter() - started
