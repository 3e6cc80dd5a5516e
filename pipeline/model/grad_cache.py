"""The two-pass step: batches of any size at the memory of one chunk, with the exact gradient (Gao et al. 2021).

1. Encode every chunk without a graph. 2. Loss on the embeddings, gradient per embedding. 3. Encode each chunk again,
with a graph, and push its cached gradients through. A step of one chunk keeps its graph and makes one pass.
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
    """loss: this rank's share (add up over the ranks). num_passes: forward passes made over each chunk."""

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
        backward: (embeddings with graph, their gradient, is this the last chunk) -> None.
    """
    assert len(chunks) == len(chunk_seeds) > 0
    if len(chunks) == 1:
        torch.manual_seed(chunk_seeds[0])
        embeddings_SD = encode(chunks[0])
        loss, gradients = embedding_gradients([embeddings_SD.detach()])
        backward(embeddings_SD, gradients[0], True)
        return TwoPassResult(loss, num_passes=1)
    cached = []
    with torch.no_grad():
        for chunk, seed in zip(chunks, chunk_seeds, strict=True):
            torch.manual_seed(seed)
            cached.append(encode(chunk))
    loss, gradients = embedding_gradients(cached)
    del cached
    for i, (chunk, seed) in enumerate(zip(chunks, chunk_seeds, strict=True)):
        torch.manual_seed(seed)
        backward(encode(chunk), gradients[i], i == len(chunks) - 1)
    return TwoPassResult(loss, num_passes=2)
