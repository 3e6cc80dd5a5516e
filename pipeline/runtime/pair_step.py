"""One global step of a reranker: from the pairs of its plan to gradients in the parameters, over all ranks.

A group's pairs may lie in different chunks and on different ranks: scores are gathered, and every rank computes the
loss of its rows (step.py).

T packed tokens, S pairs, C pairs of the step (the plan's candidates), E exits.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.packing import deal
from pipeline.data.pair_steps import compose_pairs, draw_width, pack_pairs, pair_parts
from pipeline.data.pairs import PairTokenizer
from pipeline.data.store import TokenStore
from pipeline.datatypes import BatchPlan, PairChunk
from pipeline.model.flop import layer_work
from pipeline.model.reranker import scale_layers
from pipeline.model.reranker_loss import reranker_loss
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.step import StepInputs, StepResult, rows_of_rank, run_passes
from pipeline.runtime.targets import loss_targets
from pipeline.runtime.watch import Watch
from pipeline.settings import Settings


def prepare_pair_step(
    store: TokenStore, pt: PairTokenizer, plan: BatchPlan, relation: str, depth: int, settings: Settings, ranks: Ranks
) -> StepInputs:
    """Compose the plan's pairs, deal them to the ranks by tokens, pack this rank's chunks, cut out its rows.

    Args:
        relation: what is asked of the dataset's pairs.
        depth: layers of the model, whose merge layers the step's width is drawn from.
    """
    pairs = compose_pairs(store, pt, plan, relation, settings.preprocess.max_pair_tokens)
    length_C = np.array([len(pair.ids) for pair in pairs], dtype=np.int64)
    dealt = deal(length_C, ranks.world_size, settings.run.chunk_tokens)
    chunks = [pack_pairs(sequence_S, pairs) for sequence_S in dealt[ranks.rank]]
    rows = rows_of_rank(plan, ranks)
    width = draw_width(settings.run.seed, plan.step, scale_layers(depth)[1])
    return StepInputs(
        plan=plan,
        chunks=chunks,
        sequences_of_rank=[np.concatenate(chunks_of_rank) for chunks_of_rank in dealt],
        targets=loss_targets(plan, rows, ranks.device, False),
        rows=rows,
        num_tokens=int(length_C.sum()),
        num_squares=int((length_C**2).sum()),
        num_chunks=len(chunks),
        num_negatives_shown=0,
        layer_work=layer_work(pair_parts(pairs), depth, *width),
        compress_layers=width[0],
        compress_ratio=width[1],
        num_queries_cut=sum(pair.query_was_cut for pair in pairs),
        num_passages_cut=sum(pair.passage_was_cut for pair in pairs),
    )


def score_chunk(engine: Any, chunk: PairChunk, layers: tuple[int, ...], ratio: int, device: torch.device) -> Tensor:
    """One forward pass of the engine around a reranker, at all its exits: scores_SE, fp32."""
    route = engine.module.plan(chunk.cu_seqlens, chunk.passage_S2, None, layers, ratio)
    scores_SE: Tensor = engine(torch.from_numpy(chunk.input_ids_T).to(device), route.to(device))
    return scores_SE


def run_pair_step(
    engine: Any, inputs: StepInputs, settings: Settings, ranks: Ranks, watch: Watch | None = None
) -> StepResult:
    """Forward and backward of a reranker's global step, as `run_passes`."""
    first, last = (int(inputs.plan.group_offsets[b]) for b in (inputs.rows.start, inputs.rows.stop))

    def forward(chunk: PairChunk) -> Tensor:
        return score_chunk(engine, chunk, inputs.compress_layers, inputs.compress_ratio, ranks.device)

    def share_of_loss(all_CE: Tensor) -> tuple[Tensor, None]:
        return reranker_loss(all_CE[first:last], inputs.targets, settings.loss), None

    return run_passes(engine, inputs, forward, share_of_loss, settings.run, ranks, watch)
