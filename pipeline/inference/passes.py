"""Sequences of token ids through the encoder, packed: chunks within a token budget, halved where memory runs out.

S sequences of a chunk, N of a call, D width.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.data.packing import pack_chunk
from pipeline.datatypes import PackedChunk

log = logging.getLogger(__name__)

Forward = Callable[[PackedChunk], torch.Tensor]  # embeddings_SD of a chunk


def encode_sequences(
    ids: Sequence[np.ndarray],
    forward: Forward,
    chunk_tokens: int,
    place: tuple[int, int] = (0, 1),
    prefix_length: int = 0,
    done: Callable[[int], Any] = lambda number: None,
) -> np.ndarray:
    """Encode composed sequences longest first, so that a chunk holds like lengths and memory peaks at once.

    Args:
        ids: N sequences of token ids, int64; N is at least 1.
        chunk_tokens: token budget of a forward pass; a longer sequence has one of its own.
        place: (this rank, number of ranks); each rank encodes its share and gets all embeddings.
        prefix_length: tokens that stand before every sequence and are encoded already.
        done: is told after each pass how many sequences it encoded.

    Returns:
        float32 [N, D] in the order of `ids`.

    Raises:
        ValueError: a single sequence does not fit in memory, or an embedding is not finite.
    """
    order = sorted(range(len(ids)), key=lambda s: (-len(ids[s]), s))
    chunks = make_chunks(order, [len(i) for i in ids], chunk_tokens)
    rank, num_ranks = place
    # Equally many passes a rank, which ZeRO-3 needs: the last round repeats chunks where there are too few.
    mine = [min(first + rank, len(chunks) - 1) for first in range(0, len(chunks), num_ranks)]
    found: dict[int, np.ndarray] = {}
    num_halved = 0
    for number in mine:
        # A rank that halves a chunk would make more passes than the others, and wait for them forever.
        found[number], halved = _encode_chunk(ids, chunks[number], forward, num_ranks == 1, prefix_length)
        num_halved += halved
        done(len(chunks[number]))
    if num_halved:
        log.warning("memory ran out %d times; the chunks were halved (chunk_tokens=%d)", num_halved, chunk_tokens)
    if num_ranks > 1:
        everyone: list[Any] = [None] * num_ranks
        torch.distributed.all_gather_object(everyone, found)
        found = {number: rows for part in everyone for number, rows in part.items()}
    sorted_ND = np.concatenate([found[number] for number in range(len(chunks))])
    if num_bad := int((~np.isfinite(sorted_ND).all(axis=1)).sum()):
        raise ValueError(f"{num_bad} of {len(ids)} embeddings are not finite: the model's weights are damaged")
    embeddings_ND = np.empty_like(sorted_ND)
    embeddings_ND[order] = sorted_ND
    return embeddings_ND


def make_chunks(order: Sequence[int], lengths: Sequence[int], chunk_tokens: int) -> list[list[int]]:
    """Consecutive sequences of `order` in chunks of at most `chunk_tokens` tokens; a longer one stands alone."""
    chunks: list[list[int]] = []
    room = 0
    for s in order:
        if lengths[s] > room:
            chunks.append([])
            room = chunk_tokens
        chunks[-1].append(s)
        room -= lengths[s]
    return chunks


def _encode_chunk(
    ids: Sequence[np.ndarray], sequence_S: list[int], forward: Forward, may_halve: bool, prefix_length: int
) -> tuple[np.ndarray, int]:
    """(float32 [S, D], how often it was halved)."""
    waiting, rows, num_halved = [sequence_S], [], 0
    while waiting:
        part = waiting.pop()
        chunk = pack_chunk(np.array(part), [ids[s] for s in part])
        embeddings_SD = run_pass(chunk, forward, may_halve, prefix_length)
        if embeddings_SD is None:
            half = len(part) // 2
            waiting += [part[half:], part[:half]]
            num_halved += 1
        else:
            rows.append(embeddings_SD)
    return np.concatenate(rows), num_halved


def run_pass(chunk: PackedChunk, forward: Forward, may_halve: bool, prefix_length: int = 0) -> np.ndarray | None:
    """float32 [S, D] of a chunk; None where memory ran out and the chunk can be halved.

    Raises:
        ValueError: memory ran out with one sequence.
    """
    try:
        return forward(chunk).float().cpu().numpy()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        if len(chunk.sequence_S) == 1:
            behind = f" behind a prefix of {prefix_length}" if prefix_length else ""
            raise ValueError(
                f"a sequence of {chunk.num_tokens} tokens{behind} does not fit in memory; give fewer or shorter "
                "examples, or a device with more memory"
            ) from error
        if not may_halve:
            raise
    # Here and not in the handler: the error held on to the tensors of the pass that failed.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device is full; a CPU says so in words only."""
    words = ("not enough memory", "DefaultCPUAllocator")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
