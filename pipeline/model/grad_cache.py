"""The two-pass step: batches of any size at the memory of one chunk, with the exact gradient (Gao et al. 2021).

1. Encode every chunk without a graph, but the last with one. 2. Loss on the embeddings, gradient per embedding. 3. Push
the last chunk's gradients through the graph that it kept; encode each other chunk again, with a graph, and push its
gradients through. So never more than one graph is alive (ZeRO-3 allows no more: a second one would be silently wrong),
and a step of one chunk makes one pass.
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
    """loss: this rank's share (add up over the ranks). num_passes: forward passes over each chunk but the last."""

    loss: Tensor
    num_passes: int


def two_pass_step(
    chunks: Sequence[Chunk],
    chunk_seeds: Sequence[int],
    encode: Callable[[Chunk], Tensor],
    embedding_gradients: Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]],
    backward: Callable[[Tensor, Tensor, bool], None],
) -> TwoPassResult:
    """Accumulate the step's gradient in the parameters of `encode`.

    Args:
        chunks: this rank's chunks; every rank must have the same number (ZeRO-3 gathers weights collectively).
        encode: chunk -> embeddings_SD.
        embedding_gradients: embeddings of this rank's chunks, without graph -> (loss, gradient of each); talks to the
            other ranks.
        backward: (embeddings with graph, their gradient, is this the last call) -> None.
    """
    assert len(chunks) == len(chunk_seeds) > 0

    def encode_seeded(i: int) -> Tensor:
        torch.manual_seed(chunk_seeds[i])
        return encode(chunks[i])

    *first, last = range(len(chunks))
    with torch.no_grad():
        cached = [encode_seeded(i) for i in first]
    kept = encode_seeded(last)
    loss, gradients = embedding_gradients([*cached, kept.detach()])
    del cached
    backward(kept, gradients[last], not first)
    del kept
    for i in first:
        backward(encode_seeded(i), gradients[i], i == first[-1])
    return TwoPassResult(loss, num_passes=2 if first else 1)
