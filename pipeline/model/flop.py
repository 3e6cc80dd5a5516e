"""Arithmetic of a step, by formula: what the planner foresees and what a run's log counts; and of a reranker's pair.

2 FLOP a weight and token (arXiv 2204.02311, appendix B). Per token, with N frozen and n LoRA weights in the
projections: forward 2(N + n); backward 2N + 4n, as frozen weights get no gradient of their own (4N where every weight
trains); a second forward for every chunk but those whose graph is kept (gradient caching, arXiv 2101.06983); one more
where activations are recomputed (but for a last layer that is cut). Past its attention a last layer that is cut counts
last tokens only (last_layer.py).
Attention, per sequence of L tokens and layer: 4 L^2 Q forward (Q the queries' width), half of it if causal, 2.5 times
that backward (arXiv 2307.08691, section 4.1).

Two shares of a card's peak, as that appendix names them: hardware FLOP utilisation (HFU) counts all that is executed,
what is done twice included; model FLOP utilisation (MFU) counts what one forward and one backward pass need, here 4NT
for T tokens (6NT where every weight trains), without attention.

C pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.model.shapes import ModelShape

# Dense bf16 peaks, FLOP a second, from the makers' data sheets; the first name that the card's name holds.
PEAKS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 80GB HBM3": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
}


@dataclass(frozen=True)
class Work:
    """What the encoder reads in a step, all ranks together. `squares`: sum of squared lengths."""

    tokens: float
    squares: float
    sequences: float


@dataclass(frozen=True)
class StepFlop:
    """Of a step, all ranks together. `executed` counts for HFU, `model` (4NT) for MFU."""

    executed: float
    model: float


def forward_flop(shape: ModelShape, work: Work, causal: bool) -> tuple[float, float, float]:
    """(projections, LoRA, attention) of one forward pass over the tokens of a step."""
    projections = lora = 0.0
    for m in shape.matrices:
        in_mlp = m.name in ("gate_proj", "up_proj", "down_proj")
        last = work.sequences if in_mlp and shape.last_rows_only else work.tokens
        rows = (shape.layers - 1) * work.tokens + last
        projections += 2 * m.numel * rows
        lora += 2 * shape.lora_rank * (m.inputs + m.outputs) * rows
    attention = shape.layers * 4 * work.squares * shape.query_width * (0.5 if causal else 1.0)
    return projections, lora, attention


def executed_flop(shape: ModelShape, work: Work, causal: bool, forwards: float, recomputed: bool) -> float:
    """All arithmetic of a step. `forwards`: forward passes over its tokens, 1 to 2 (what is recomputed not counted)."""
    projections, lora, attention = forward_flop(shape, work, causal)
    forward = projections + lora + attention
    backward = (2 if shape.full else 1) * projections + 2 * lora + 2.5 * attention
    again = 0.0
    if recomputed:
        # The last layer is not recomputed where it goes on with last tokens; the others see all of them.
        whole = Work(work.tokens, work.squares, work.tokens)
        share = (shape.layers - 1) / shape.layers if shape.last_rows_only else 1.0
        again = share * sum(forward_flop(shape, whole, causal))
    return forward * forwards + backward + again


def pair_flop(
    shape: ModelShape,
    parts: tuple[int, int, int],
    exit_layer: int,
    compress_layers: Sequence[int] = (),
    compress_ratio: int = 1,
    causal: bool = True,
) -> float:
    """All arithmetic of a reranker's forward pass over one pair (merging.py), adapters and one head included.

    Args:
        parts: tokens of the query, the passage and the prompt, each with what the template adds; only those of the
            passage become fewer.
        exit_layer, compress_layers, compress_ratio: as `Reranker.plan` takes them.
        causal: counts half of the attention matrix; False: all of it, as plain matrix products compute it.
    """
    query, passage, prompt = parts
    merges = sorted({layer for layer in compress_layers if layer < exit_layer})
    total = 2.0 * shape.width
    for start, stop in zip([0, *merges], [*merges, exit_layer], strict=True):
        if start > 0:
            passage = -(-passage // compress_ratio)
        tokens = query + passage + prompt
        level = replace(shape, layers=stop - start, last_rows_only=False)
        total += sum(forward_flop(level, Work(tokens, tokens**2, 1), causal))
    return total


def layer_work(parts_C3: np.ndarray, depth: int, compress_layers: Sequence[int], compress_ratio: int) -> Work:
    """What a layer reads of pairs whose passages are merged, in the mean over `depth` layers.

    Arithmetic is linear in it: `forward_flop` of it is `pair_flop` of all pairs, but for the heads (2 E D a pair).

    Args:
        parts_C3: of C pairs, as of `pair_flop`.
        compress_layers, compress_ratio: as of `pair_flop`.
    """
    others_C, passage_C = parts_C3[:, 0] + parts_C3[:, 2], parts_C3[:, 1]
    merges, tokens, squares = sorted(set(compress_layers)), 0.0, 0.0
    for start, stop in zip([0, *merges], [*merges, depth], strict=True):
        if start > 0:
            passage_C = -(-passage_C // compress_ratio)
        length_C = (others_C + passage_C).astype(np.float64)
        tokens += (stop - start) / depth * float(length_C.sum())
        squares += (stop - start) / depth * float((length_C**2).sum())
    return Work(tokens, squares, len(parts_C3))


def model_flop(shape: ModelShape, work: Work) -> float:
    """4NT, or 6NT where every weight trains: the arithmetic that MFU counts."""
    weights = shape.layers * sum(m.numel for m in shape.matrices)
    return (6 if shape.full else 4) * weights * work.tokens


def peak_flops(card: str) -> float | None:
    """Peak of a card by the name that its driver gives; None where it is not known, or the card is shared (MIG)."""
    if "MIG" in card:
        return None
    return next((peak for name, peak in PEAKS.items() if name in card), None)
