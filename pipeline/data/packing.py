"""Dealing the sequences of a step to ranks and chunks, and packing a chunk without padding.

Under ZeRO-3 every forward pass gathers parameters from all ranks, so ranks with unequal chunk counts hang: `deal`
gives every rank the same number of chunks. Who encodes a sequence says nothing about who computes its row of the loss.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from pipeline.datatypes import PackedChunk


def deal(length_S: np.ndarray, world_size: int, chunk_tokens: int) -> list[list[np.ndarray]]:
    """Deal sequences into equally many chunks a rank, none above the token budget, token totals even over the ranks.

    Longest first into the least loaded chunk; with the fewest chunks that the total allows, one more a rank until
    nothing overflows. Deterministic: equal lengths go by number, equal loads by chunk number.

    Args:
        length_S: tokens of every sequence of the step, each at least 1.
        world_size: number of ranks W.
        chunk_tokens: token budget of a chunk.

    Returns:
        `[rank][chunk]` -> int64 sequence numbers, rising; empty where there are fewer sequences than chunks. Chunk c
        has about the same load on every rank, so that ranks in lockstep wait little.

    Raises:
        ValueError: a sequence longer than the budget, or a world size below 1.
    """
    length_S = np.asarray(length_S, dtype=np.int64)
    if world_size < 1:
        raise ValueError(f"world size {world_size} must be at least 1")
    if len(length_S) and length_S.max() > chunk_tokens:
        s = int(length_S.argmax())
        raise ValueError(
            f"sequence {s} has {int(length_S[s])} tokens, more than run.chunk_tokens={chunk_tokens}; raise it"
        )
    assert len(length_S) == 0 or length_S.min() >= 1
    num_chunks = max(1, -(-int(length_S.sum()) // (world_size * chunk_tokens)))
    while True:
        # With one bin a sequence nothing can overflow, so this ends.
        bins, loads = _longest_first(length_S, num_chunks * world_size)
        if max(loads) <= chunk_tokens:
            return _snake(bins, loads, world_size)
        num_chunks += 1


def _longest_first(length_S: np.ndarray, num_bins: int) -> tuple[list[list[int]], list[int]]:
    """Sequences into bins, longest first, each into the least loaded bin; returns members and loads."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]  # sorted, hence a valid heap
    lengths = length_S.tolist()
    for s in np.argsort(-length_S, kind="stable").tolist():
        load, b = heap[0]
        bins[b].append(s)
        heapq.heapreplace(heap, (load + lengths[s], b))
    loads = [0] * num_bins
    for load, b in heap:
        loads[b] = load
    return bins, loads


def _snake(bins: list[list[int]], loads: list[int], world_size: int) -> list[list[np.ndarray]]:
    """Bins to ranks, heaviest first, forth and back over the ranks: even totals and even rounds."""
    ranks: list[list[np.ndarray]] = [[] for _ in range(world_size)]
    order = sorted(range(len(bins)), key=lambda b: (-loads[b], b))
    for i, b in enumerate(order):
        round_number, place = divmod(i, world_size)
        rank = place if round_number % 2 == 0 else world_size - 1 - place
        ranks[rank].append(np.array(sorted(bins[b]), dtype=np.int64))
    return ranks


def pack_chunk(sequence_S: np.ndarray, ids: Sequence[np.ndarray]) -> PackedChunk:
    """Put sequences end to end: one row of T real tokens, positions restarting at 0, no padding.

    Args:
        sequence_S: numbers of the sequences within the step; empty gives the chunk of one dummy token.
        ids: token ids of each, in the same order, at least one token each.
    """
    assert len(sequence_S) == len(ids)
    if len(ids) == 0:
        sequence_S, ids = np.array([-1]), [np.array([0])]
    length_S = np.array([len(i) for i in ids], dtype=np.int64)
    assert length_S.min() >= 1
    cu_seqlens = np.zeros(len(ids) + 1, dtype=np.int32)
    np.cumsum(length_S, out=cu_seqlens[1:])
    return PackedChunk(
        input_ids_T=np.concatenate(ids).astype(np.int64),
        position_ids_T=np.arange(int(cu_seqlens[-1]), dtype=np.int64) - np.repeat(cu_seqlens[:-1], length_S),
        cu_seqlens=cu_seqlens,
        sequence_S=np.asarray(sequence_S, dtype=np.int64),
        max_seqlen=int(length_S.max()),
    )
