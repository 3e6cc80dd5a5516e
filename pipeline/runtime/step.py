"""One global step: from its plan to gradients in the parameters, over all ranks.

T packed tokens, S sequences of the step (queries, then distinct passages), B rows, P distinct passages, C candidates,
D width, W ranks.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.composing import Limits, plan_lengths, sequence_ids
from pipeline.data.packing import deal, pack_chunk
from pipeline.data.shown import count_shown
from pipeline.data.store import TokenStore
from pipeline.datatypes import BatchPlan, PackedChunk
from pipeline.model.flop import Work
from pipeline.model.grad_cache import two_pass_step
from pipeline.model.loss import LossTargets, contrastive_loss, count_filtered
from pipeline.runtime.engine import one_reduction, take_step
from pipeline.runtime.ranks import Ranks, gather_embeddings, gather_values, sum_over_ranks
from pipeline.runtime.targets import loss_targets
from pipeline.runtime.watch import Watch, pass_boundary
from pipeline.settings import RunSettings, Settings

PHASES = ("pass_1", "loss", "pass_2", "reduce")
FAULTS = ("", "gradient", "embeddings")


@dataclass(frozen=True)
class StepInputs:
    """What one rank needs for one step; the numbers are those of the whole step."""

    plan: BatchPlan
    chunks: Sequence[PackedChunk]
    sequences_of_rank: list[np.ndarray]
    targets: LossTargets
    rows: slice
    num_tokens: int
    num_squares: int  # sum of squared lengths
    num_chunks: int
    num_negatives_shown: int
    # Of a reranker's step, whose sequences are pairs: what a layer reads in the mean over layers, where passages are
    # merged, and how many of the pairs were cut.
    layer_work: Work | None = None
    compress_layers: tuple[int, ...] = ()
    compress_ratio: int = 1
    num_queries_cut: int = 0
    num_passages_cut: int = 0


@dataclass(frozen=True)
class StepResult:
    """loss: mean over all rows of the step. num_passes: forward passes of one rank over all its chunks.

    num_filtered: candidates of all rows left out as suspected false negatives; 0 where the filter is off.
    """

    loss: float
    num_passes: int
    num_filtered: int
    fault: str  # what is not finite, and on which rank; empty: nothing
    seconds: dict[str, float]  # of pass_1, loss (with the exchange of embeddings), pass_2, reduce (over the ranks)


def prepare_step(
    store: TokenStore, limits: Limits, plan: BatchPlan, ranks: Ranks, chunk_tokens: int, mask_shown: bool
) -> StepInputs:
    """Deal the plan's sequences to the ranks, pack this rank's chunks, cut out its rows of the loss."""
    length_S = plan_lengths(store, limits, plan)
    dealt = deal(length_S, ranks.world_size, chunk_tokens)
    chunks = [
        pack_chunk(sequence_S, [sequence_ids(store, limits, plan, int(s)) for s in sequence_S])
        for sequence_S in dealt[ranks.rank]
    ]
    rows = rows_of_rank(plan, ranks)
    return StepInputs(
        plan=plan,
        chunks=chunks,
        sequences_of_rank=[np.concatenate(chunks_of_rank) for chunks_of_rank in dealt],
        targets=loss_targets(plan, rows, ranks.device, mask_shown),
        rows=rows,
        num_tokens=int(length_S.sum()),
        num_squares=int((length_S.astype(np.int64) ** 2).sum()),
        num_chunks=len(chunks),
        num_negatives_shown=count_shown(plan) if mask_shown else 0,
    )


def rows_of_rank(plan: BatchPlan, ranks: Ranks) -> slice:
    """The rows whose loss this rank computes."""
    edges = np.linspace(0, plan.num_queries, ranks.world_size + 1).round().astype(int)
    return slice(int(edges[ranks.rank]), int(edges[ranks.rank + 1]))


def encode_chunk(encoder: Any, chunk: PackedChunk, device: torch.device) -> Tensor:
    """One forward pass of the encoder (or the engine around it) over a packed chunk: embeddings_SD."""
    return encoder(
        torch.from_numpy(chunk.input_ids_T).to(device),
        torch.from_numpy(chunk.position_ids_T).to(device),
        torch.from_numpy(chunk.cu_seqlens).to(device),
        chunk.max_seqlen,
    )


def run_step(
    engine: Any, inputs: StepInputs, settings: Settings, ranks: Ranks, watch: Watch | None = None
) -> StepResult:
    """Forward and backward of an embedder's global step, as `run_passes`."""

    def share_of_loss(all_SD: Tensor) -> tuple[Tensor, Tensor | None]:
        query_BD, passage_PD = all_SD[inputs.rows], all_SD[inputs.plan.num_queries :]
        # Embeddings stay fp32: the loss is a millionth of a step's arithmetic, and bf16 costs 0.3 % of the gradient.
        share = contrastive_loss(query_BD, passage_PD, inputs.targets, settings.loss, settings.model.embed_kernels)
        if not settings.loss.filters_negatives:
            return share, None
        return share, count_filtered(query_BD, passage_PD, inputs.targets, settings.loss)

    def forward(chunk: PackedChunk) -> Tensor:
        return encode_chunk(engine, chunk, ranks.device)

    return run_passes(engine, inputs, forward, share_of_loss, settings.run, ranks, watch)


def run_passes(
    engine: Any,
    inputs: StepInputs,
    forward: Callable[[Any], Tensor],
    share_of_loss: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    run: RunSettings,
    ranks: Ranks,
    watch: Watch | None = None,
) -> StepResult:
    """Forward and backward of one global step: afterwards the engine holds the gradient and may step.

    Before every chunk the ranks pass a boundary of the watch, if there is one, where a stop can be asked for.

    Dropout differs between ranks, chunks and steps and is a function of (seed, step, rank, chunk) alone, so a step
    that is replayed after a restart makes the same draws.

    Args:
        forward: a chunk -> a row for each of its sequences: embeddings or scores.
        share_of_loss: the rows of all sequences of the step -> this rank's share of the loss (shares add up), and how
            many of its candidates were filtered (None: the filter is off).
    """
    plan, num_encoded, local_is_finite = inputs.plan, 0, torch.tensor(True)
    num_filtered = torch.zeros((), dtype=torch.int64, device=ranks.device)
    moments = [moment(ranks.device)]

    def encode(chunk: PackedChunk) -> Tensor:
        nonlocal num_encoded
        if watch is not None:
            place = f"forward pass {num_encoded + 1} over {inputs.num_chunks} chunks"
            pass_boundary(watch, f"step {plan.step}, {place}")
        num_encoded += 1
        return forward(chunk)

    def embedding_gradients(cached: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        real = [e for e, chunk in zip(cached, inputs.chunks, strict=True) if chunk.sequence_S[0] >= 0]
        nonlocal local_is_finite
        moments.append(moment(ranks.device))
        local_SD = torch.cat(real) if real else cached[0][:0]
        local_is_finite = local_SD.isfinite().all()
        all_SD = gather_embeddings(local_SD, inputs.sequences_of_rank, ranks).requires_grad_()
        share, mine = share_of_loss(all_SD)
        if mine is not None:
            num_filtered.copy_(sum_over_ranks(mine, ranks))
        share.backward()
        assert all_SD.grad is not None
        # DeepSpeed averages gradients over the ranks; the loss is one mean over all rows, so undo that here.
        gradient_SD = sum_over_ranks(all_SD.grad, ranks) * ranks.world_size
        gradients = [
            gradient_SD[torch.from_numpy(chunk.sequence_S).to(ranks.device)]
            if chunk.sequence_S[0] >= 0
            else torch.zeros_like(embeddings)
            for chunk, embeddings in zip(inputs.chunks, cached, strict=True)
        ]
        total = sum_over_ranks(share.detach(), ranks)
        moments.append(moment(ranks.device))
        return total, gradients

    assert run.keep_graphs == 1 or engine.zero_optimization_stage() < 3, "require_exact comes first"
    with one_reduction(engine, ranks, watch) as backward:
        result = two_pass_step(
            inputs.chunks,
            [chunk_seed(run.seed, plan.step, ranks.rank, i) for i in range(len(inputs.chunks))],
            encode,
            embedding_gradients,
            backward,
            run.keep_graphs,
        )
        moments.append(moment(ranks.device))
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.parameters() if p.grad is not None])
    # A bad embedding on one rank makes every rank's gradient bad: only the rank where it began is named.
    level_W = gather_values(2 if not local_is_finite else 0 if norm.isfinite() else 1, ranks)
    worst = int(max(level_W))
    bad = ", ".join(str(rank) for rank, level in enumerate(level_W) if level == worst)
    moments.append(moment(ranks.device))
    return StepResult(
        loss=float(result.loss),
        num_passes=result.num_passes,
        num_filtered=int(num_filtered),
        fault=f"the {FAULTS[worst]} of rank {bad}" if worst else "",
        seconds={name: stop - start for name, start, stop in zip(PHASES, moments[:-1], moments[1:], strict=True)},
    )


def moment(device: torch.device) -> float:
    """Now, when the GPU has done what it was given: four waits a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def chunk_seed(seed: int, step: int, rank: int, chunk: int) -> int:
    """Seed of a chunk's dropout."""
    return int(np.random.SeedSequence((seed, step, rank, chunk)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def make_optimizer_state(engine: Any, forward: Callable[[], Tensor], ranks: Ranks) -> None:
    """One optimizer step that changes nothing to keep: it makes the moments exist, so that they can be set.

    Args:
        forward: one forward pass over a chunk of `pack_chunk` without sequences.
    """
    with one_reduction(engine, ranks) as backward:
        rows_SD = forward()
        backward(rows_SD, torch.zeros_like(rows_SD), True)
    take_step(engine, 0.0)


def no_sequences() -> PackedChunk:
    """The chunk of one dummy token."""
    return pack_chunk(np.zeros(0, dtype=np.int64), [])
