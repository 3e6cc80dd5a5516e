"""Bytes that the forward and backward pass of one packed chunk keeps, by formula.

Per token and layer, e bytes an element (2 bf16, 4 fp32), r the rank of LoRA, D, Q, KV, F the widths of model, queries,
keys and MLP, H heads. The graph of a layer keeps what its backward needs (the method of arXiv 2205.05198, section 4;
the frozen projections need no input, LoRA's A does):

    two norms (four in Gemma 2 and 3)  4D + 4 each: their input in fp32 and its scale
    inputs of q, k, v and of gate, up  De each: one tensor for all that read it
    attention                          fused: Qe + 2 KVe + Qe + 4H: query, keys, values, output (which is o_proj's
                                       input), log-sum-exp. One call a sequence: 3Qe (keys and values repeated for all
                                       heads), outputs by sequence Qe, o_proj's input Qe, 4H
    gate, its activation, up, product  4Fe
    LoRA                               7re: what each A gives its B; with dropout each A's own input and mask besides

A norm on heads (Qwen 3, Gemma 3) keeps its input in fp32: 4(Q + KV) + 4(heads). Rotations keep 2Ke once for all layers.
The last layer keeps norm, attention and four LoRA branches for all tokens, and norm and MLP for last tokens alone
(pipeline/model/last_layer.py). Activation checkpointing keeps De a layer (its input), the last layer as it is, and one
layer's graph at a time. What lives for moments only, found by following which tensors are alive (benchmarks/
plan_check.py measures it): without a graph 4D + 4F (at MLP) or 3D + attention; backward through an MLP 2F + D (in bf16
2D), through the last layer's attention 2Q + 2KV (one call a sequence: 3Q, keys and values being repeated for all
heads) or through its norm three fp32 tensors, 12D bytes.
A reranker (merging.py) keeps rotations for every layer, as it picks them anew behind a merge; the rows of its exits,
which are taken along through all layers above; and last norm and heads for those rows alone. A step that merges
nothing, one in four, decides: where passages become shorter less is kept.
Scores of Gemma 2 (soft cap) and masks of windows shorter than a text are not counted: they grow with length squared.
"""

from dataclasses import dataclass

from pipeline.model.shapes import HEAD_NORMS, ModelShape


@dataclass(frozen=True)
class Kernels:
    """How a layer runs. `element`: bytes. `keeps_inputs`: frozen projections keep theirs, as DeepSpeed's own linear of
    ZeRO-3 does; it matters with dropout only, since LoRA's A otherwise keeps the same tensor.
    """

    element: int
    fused: bool  # packed attention in one call; False: one call a sequence (CPU, fp32)
    dropout: bool
    checkpointing: bool
    keeps_inputs: bool = False
    mask_element: int = 1  # bytes of dropout's mask: 1 on a GPU, an element on CPU


@dataclass(frozen=True)
class ChunkMemory:
    """Bytes of one chunk: its graph, what backward adds to the graphs at its peak, and a pass without a graph."""

    graph: float
    backward: float
    no_graph: float


def _norm(width: int) -> int:
    return 4 * width + 4


def _attention_bytes(shape: ModelShape, k: Kernels) -> float:
    """Of one token: what attention and the four LoRA branches around it keep, its norm and their input included."""
    q, kv, e = shape.query_width, shape.kv_width, k.element
    kept = _norm(shape.width) + 4 * shape.heads + 4 * shape.lora_rank * e
    kept += (2 * q + 2 * kv if k.fused else 4 * q) * e
    if k.keeps_inputs or not k.dropout:  # with dropout every A reads a tensor of its own
        kept += (shape.width + (0 if k.fused else q)) * e
    if shape.family in HEAD_NORMS:
        kept += 4 * (q + kv) + 4 * (shape.heads + shape.kv_heads)
    if shape.norms == 4:
        kept += _norm(shape.width)
    return kept + _dropout_bytes(shape, k, ("q_proj", "k_proj", "v_proj", "o_proj"))


def _mlp_bytes(shape: ModelShape, k: Kernels) -> float:
    """Of one token: norm, MLP and its three LoRA branches."""
    kept = _norm(shape.width) + (3 * shape.mlp_width + 3 * shape.lora_rank) * k.element
    if k.keeps_inputs or not k.dropout:
        kept += (shape.width + shape.mlp_width) * k.element
    if shape.norms == 4:
        kept += _norm(shape.width)
    return kept + _dropout_bytes(shape, k, ("gate_proj", "up_proj", "down_proj"))


def _dropout_bytes(shape: ModelShape, k: Kernels, names: tuple[str, ...]) -> float:
    """Each A then reads an input of its own, and the mask is kept."""
    inputs = sum(m.inputs for m in shape.matrices if m.name in names)
    return inputs * (k.element + k.mask_element) if k.dropout else 0


def chunk_memory(shape: ModelShape, k: Kernels, tokens: int, sequences: int) -> ChunkMemory:
    """Peak bytes of a chunk of so many tokens and sequences, weights and gradients aside."""
    d, q, kv, f, e = shape.width, shape.query_width, shape.kv_width, shape.mlp_width, k.element
    layer = tokens * (_attention_bytes(shape, k) + _mlp_bytes(shape, k))
    rotations, rows = (shape.layers, sequences * shape.exits) if shape.exits else (1, sequences)
    once = tokens * (2 * shape.head_width * rotations + shape.markers) * e + rows * (_norm(d) + 8 * d)
    mlp_passing = tokens * (2 * f + (2 if e == 2 else 1) * d) * e
    normed = max(d, q) if shape.family in HEAD_NORMS else d
    attention_passing = tokens * max((2 * q + 2 * kv if k.fused else 3 * q) * e, 12 * normed)
    if shape.last_rows_only:
        last = tokens * _attention_bytes(shape, k) + sequences * _mlp_bytes(shape, k)
    elif shape.exits:
        last = layer
        once += sequences * shape.exits * (shape.exits - 1) // 2 * d * e  # rows taken along from exit to exit
    else:
        last = layer
        once += tokens * _norm(d)  # the last norm sees all tokens
    whole = shape.layers - 1
    if k.checkpointing:
        graph = once + whole * tokens * d * e + (last if shape.last_rows_only else tokens * d * e)
        at_last = attention_passing if shape.last_rows_only else layer + mlp_passing
        in_layer = layer + mlp_passing - (last if shape.last_rows_only else 0) if whole else 0
        backward = max(at_last, in_layer)
    else:
        graph = once + whole * layer + last
        backward = max(attention_passing, mlp_passing - (last if shape.last_rows_only and whole else 0))
    attention_alone = (3 * d + q + 2 * kv + (2.5 * q if k.fused else 4 * q)) * e
    no_graph = tokens * (max((4 * d + 4 * f) * e, attention_alone) + 2 * shape.head_width * e)
    return ChunkMemory(graph, backward, no_graph)
