"""The two-pass step: batches of any size at the memory of one chunk, with the exact gradient (Gao et al. 2021).

1. Encode every chunk without a graph, but the last `keep_graphs` with one. 2. Loss on the embeddings, gradient per
embedding. 3. Push the gradients of these last chunks through the graphs that they kept; encode each other chunk again,
with a graph, and push its gradients through. So a step makes one pass more for each chunk that kept no graph, and
memory holds `keep_graphs` graphs. ZeRO-3 allows one: a second one alive would be silently wrong.
Dropout is replayed: a chunk's random state is a function of its seed, set before both of its forward passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")


@dataclass(frozen=True)
class TwoPassResult:
    """loss: this rank's share (add up over the ranks). num_passes: forward passes over all chunks together."""

    loss: Tensor
    num_passes: int


def two_pass_step(
    chunks: Sequence[Chunk],
    chunk_seeds: Sequence[int],
    encode: Callable[[Chunk], Tensor],
    embedding_gradients: Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]],
    backward: Callable[[Tensor, Tensor, bool], None],
    keep_graphs: int = 1,
) -> TwoPassResult:
    """Accumulate the step's gradient in the parameters of `encode`.

    Args:
        chunks: this rank's chunks; every rank must have the same number (ZeRO-3 gathers weights collectively).
        encode: chunk -> embeddings_SD.
        embedding_gradients: embeddings of this rank's chunks, without graph -> (loss, gradient of each); talks to the
            other ranks.
        backward: (embeddings with graph, their gradient, is this the last call) -> None.
        keep_graphs: graphs alive at a time, at least 1.
    """
    assert len(chunks) == len(chunk_seeds) > 0 and keep_graphs > 0

    def encode_seeded(i: int) -> Tensor:
        torch.manual_seed(chunk_seeds[i])
        return encode(chunks[i])

    num_twice = max(len(chunks) - keep_graphs, 0)
    with torch.no_grad():
        cached = [encode_seeded(i) for i in range(num_twice)]
    kept = [encode_seeded(i) for i in range(num_twice, len(chunks))]
    loss, gradients = embedding_gradients([*cached, *(embeddings.detach() for embeddings in kept)])
    del cached
    while kept:  # the newest first; each graph goes with its turn
        i = num_twice + len(kept) - 1
        backward(kept.pop(), gradients[i], not num_twice and not kept)
    for i in range(num_twice):
        backward(encode_seeded(i), gradients[i], i == num_twice - 1)
    return TwoPassResult(loss, num_passes=len(chunks) + num_twice)
