"""A reranker's run: its model and engine before the first step, its model saved after the last.

Store, plans, checkpoints and the loop are those of an embedder's run (run.py, steps.py).
"""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.data.pair_steps import choose_relations, pack_pairs
from pipeline.data.pairs import PairTokenizer, compose_pair, load_pair_tokenizer, tokenize_pair_pieces
from pipeline.data.sampling import plan_step
from pipeline.inference.gate import GATE_FILE
from pipeline.inference.reranker_files import RerankerDescription, save_reranker
from pipeline.inference.reranker_gate import gate_scores
from pipeline.model.encoder import require_rows
from pipeline.model.merging import Route
from pipeline.model.reranker import Reranker, load_reranker, scale_layers, yes_token
from pipeline.prompts import BGE_RERANKER
from pipeline.runtime.engine import gathered, read_state, sharded_loading
from pipeline.runtime.guards import require_alike
from pipeline.runtime.pair_step import prepare_pair_step, run_pair_step, score_chunk
from pipeline.runtime.ranks import Ranks, by_first, together
from pipeline.runtime.step import StepInputs
from pipeline.runtime.watch import Watch, mark
from pipeline.settings import Settings
from pipeline.training.run import Run, countable_shape, read_inputs, require_alike_start, start_engine

log = logging.getLogger("train")


@dataclass(frozen=True)
class RerankerRun(Run):
    """The run of a reranker."""

    pairs: PairTokenizer
    reranker: Reranker


def set_up_reranker(settings: Settings, ranks: Ranks, watch: Watch, held: contextlib.ExitStack) -> RerankerRun:
    """Data, model and engine of one rank; ValueErrors for what a user can mend. `held` keeps the run folder's lock."""
    require_alike_start(settings, ranks)
    pairs = together(lambda: load_pair_tokenizer(settings.tokenizer_name, BGE_RERANKER), ranks)
    require_alike({"tokenizer of pairs": pairs.fingerprint}, ranks)
    own = {"pair template": BGE_RERANKER.version, "tokenizer of pairs": pairs.fingerprint}
    inputs = read_inputs(settings, ranks, watch, held, own)
    relations = list(choose_relations(inputs.store, settings).values())
    require_room(pairs, relations, settings.preprocess.max_pair_tokens)

    mark(watch, "the loading of the model")
    yes_id = together(lambda: yes_token(pairs.encoder.tokenizer), ranks)
    with sharded_loading(settings.run.deepspeed, settings.optim, settings.model.dtype):
        reranker = load_reranker(settings.model, yes_id, None, ranks.device.type, gathered)
    require_rows(reranker, pairs.largest_id)
    require_context(reranker, settings)
    engine = start_engine(reranker, settings, ranks)
    log.info(
        "exits %d to %d, merges behind layers %s",
        reranker.heads.first_exit,
        reranker.depth,
        ", ".join(map(str, scale_layers(reranker.depth)[1])) or "none",
    )

    def prepare(step: int) -> StepInputs:
        plan = plan_step(inputs.store, inputs.schedule, step)
        return prepare_pair_step(inputs.store, pairs, plan, relations[plan.dataset], reranker.depth, settings, ranks)

    return RerankerRun(
        **vars(inputs),
        engine=engine,
        shape=countable_shape(settings.model),
        prepare=prepare,
        run_step=lambda step_inputs: run_pair_step(engine, step_inputs, settings, ranks, watch),
        forward_nothing=lambda: score_chunk(engine, pack_pairs(np.zeros(0, dtype=np.int64), []), (), 1, ranks.device),
        pairs=pairs,
        reranker=reranker,
    )


def require_room(pairs: PairTokenizer, relations: Sequence[str], max_pair_tokens: int) -> None:
    """ValueError for an unknown relation, or a limit that leaves no room for a passage beside its prompt."""
    for relation in sorted(set(relations)):
        prompt_ids = tokenize_pair_pieces(pairs, [pairs.template.prompt(relation)], "prompt")[0]
        compose_pair(pairs, [0], [0], prompt_ids, max_pair_tokens)


def require_context(reranker: Reranker, settings: Settings) -> None:
    """ValueError where the decoder reads fewer tokens than a pair may have."""
    context, limit = reranker.context, settings.preprocess.max_pair_tokens
    if context is not None and context < limit:
        raise ValueError(f"preprocess.max_pair_tokens={limit}, but {settings.model.name} reads {context}; lower it")


def save(run: RerankerRun, folder: Path) -> None:
    """Write the finished reranker, and what the engine makes of the export gate's pairs, all ranks together."""
    settings, reranker, pairs = run.settings, run.reranker, run.pairs
    trainable = read_state(run.engine, moments=False)
    description = RerankerDescription(
        model=settings.model,
        template=pairs.template,
        max_pair_tokens=settings.preprocess.max_pair_tokens,
        first_exit=reranker.heads.first_exit,
        compress_layers=scale_layers(reranker.depth)[1],
        bos=pairs.bos,
        fingerprint=pairs.fingerprint,
        base_fingerprint=run.fingerprints["model.name"],
    )

    def write() -> None:
        weights = {name: parts["weight"] for name, parts in trainable.items()}
        save_reranker(folder, reranker, weights, pairs, description)

    by_first(write, run.ranks)
    gate_WNE = score_gate_pairs(run, description)
    by_first(lambda: np.save(folder / GATE_FILE, gate_WNE), run.ranks)


def score_gate_pairs(run: RerankerRun, description: RerankerDescription) -> np.ndarray:
    """On every rank: the truth that an export is compared with. All exits in each pass, as ZeRO-3 has seen them."""
    run.engine.eval()

    def score(input_ids_T: Tensor, route: Route) -> Tensor:
        mark(run.watch, "the pairs of the export gate")
        scores_SE: Tensor = run.engine(input_ids_T, route)
        return scores_SE

    ranks = run.ranks
    place, chunk_tokens = (ranks.rank, ranks.world_size), run.settings.run.chunk_tokens
    return gate_scores(run.reranker, score, run.pairs, description, ranks.device, chunk_tokens, place)
