"""Triton: similarity matrix and log-sum-exp without ever storing a logit. Twin: reference.similarity.

Forward: one program a tile of [rows, passages] multiplies, masks and reduces it to a maximum and a sum per row; a
second kernel merges the tiles in a fixed order and takes the dot products of the own groups. Backward: the same tile
once more gives dL/d(q.p), in the inputs' type, for a bounded chunk of passages; two GEMMs turn it into gradients.
Nothing is added atomically: equal inputs give equal bits. Logits live in registers only, in fp32 and base 2.

B rows, P distinct passages, C own candidates of all rows (ragged, cut by group_offsets), D width.
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FINISH_WARPS = 8
FINISH_TILES = 1024  # merged at a time: more would not fit the registers
MAX_TILES = 65535  # of passages: the second axis of a launch
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tile:
    """Rows x passages of one program, the width of one multiplication, and how it is launched."""

    rows: int
    passages: int
    width: int
    num_warps: int = 8
    num_stages: int = 4


# Chosen by shape and type alone, never by timing, so that a run repeats bit for bit.
SMALL = Tile(128, 128, 64)
LARGE = Tile(128, 256, 64, num_stages=3)  # fewer bytes from L2 for each multiplication
FP32 = Tile(64, 64, 16, num_warps=8, num_stages=3)  # exact products, no tensor cores
TINY = Tile(16, 32, 16)  # the interpreter's time goes with elements


def choose_tile(num_rows: int, num_passages: int, dtype: torch.dtype) -> Tile:
    """The tile for a problem; forward and backward must use the same."""
    if INTERPRETED:
        return TINY
    if dtype == torch.float32:
        return FP32
    return LARGE if num_rows >= 2048 and num_passages >= 8192 else SMALL


@triton.jit
def _multiply(
    query, passage, row0, col0, D, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr
):
    """q.p of one tile, fp32. Loads beyond the edges give zeros."""
    scores = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for d in range(0, D, WIDTH):
        q = query.load([row0, d])
        p = passage.load([col0, d])
        if UPCAST:  # in the interpreter, which cannot multiply bf16
            q = q.to(tl.float32)
            p = p.to(tl.float32)
        scores = tl.dot(q, p.T, scores, input_precision="ieee")
    return scores


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Left and right half: what follows the multiplication then needs registers for a part of the tile at a time."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def _parts(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Parts of at most 64 columns, from left to right."""
    left, right = _halves(tile, ROWS, COLS)
    if COLS <= 128:
        return left, right
    else:
        a, b = _halves(left, ROWS, COLS // 2)
        c, d = _halves(right, ROWS, COLS // 2)
        return a, b, c, d


@triton.jit
def _masked_logits(
    scores, rows, cols, B, P, scale, candidate, group_offsets, max_group, copies,
    exclude_B, exclude_P, require_B, require_P, threshold,
):  # fmt: skip
    """Base-2 logits of a tile, copies of a passage folded in as log2; -inf where a pair takes no part.

    The whole own group is left out: copies of its passages in other groups are few and `finish_kernel` adds them.
    """
    row_in = rows < B
    col_in = cols < P
    times = tl.load(copies + cols, mask=col_in, other=0)
    keep = (times > 0)[None, :] & row_in[:, None]
    if exclude_B is not None:
        exclude = tl.load(exclude_B + rows, mask=row_in, other=0)
        keep = keep & (exclude[:, None] != tl.load(exclude_P + cols, mask=col_in, other=0)[None, :])
    if require_B is not None:
        require = tl.load(require_B + rows, mask=row_in, other=0)
        keep = keep & (require[:, None] == tl.load(require_P + cols, mask=col_in, other=0)[None, :])
    if threshold is not None:
        # Written so that NaN stays: a broken embedding must not look like a row with nothing left.
        keep = keep & ~(scores > tl.load(threshold + rows, mask=row_in, other=0.0)[:, None])
    logits = scores * (scale * LOG2_E) + tl.log2(tl.maximum(times, 1).to(tl.float32))[None, :]
    logits = tl.where(keep, logits, float("-inf"))
    first = tl.load(group_offsets + rows, mask=row_in, other=0)
    size = tl.load(group_offsets + rows + 1, mask=row_in, other=0) - first
    for g in tl.range(0, max_group, num_stages=1):
        own = tl.load(candidate + first + g, mask=g < size, other=-1)
        logits = tl.where(own[:, None] == cols[None, :], float("-inf"), logits)
    return logits


# Sizes that change from step to step must not compile a kernel each.
@triton.jit(do_not_specialize=["B", "P", "D", "max_group"])
def lse_kernel(
    query, passage, part_max, part_sum, scale_ptr, candidate, group_offsets, copies,
    exclude_B, exclude_P, require_B, require_P, threshold, B, P, D, max_group,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exp2 of one tile, for each of its rows: part_max, part_sum [tiles of passages, B]."""
    row0 = tl.program_id(0) * ROWS
    tile = tl.program_id(1)
    col0 = tile * COLS
    scale = tl.load(scale_ptr)
    scores = _multiply(query, passage, row0, col0, D, ROWS, COLS, WIDTH, UPCAST)
    parts = _parts(scores, ROWS, COLS)
    PART: tl.constexpr = parts[0].shape[1]
    rows = row0 + tl.arange(0, ROWS)
    maximum = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for i in tl.static_range(COLS // PART):
        cols = col0 + i * PART + tl.arange(0, PART)
        logits = _masked_logits(
            parts[i], rows, cols, B, P, scale, candidate, group_offsets, max_group, copies,
            exclude_B, exclude_P, require_B, require_P, threshold,
        )  # fmt: skip
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp2(maximum - shift) + tl.sum(tl.exp2(logits - shift[:, None]), axis=1)
        maximum = new_maximum
    place = tile.to(tl.int64) * B + rows
    tl.store(part_max + place, maximum, mask=rows < B)
    tl.store(part_sum + place, total, mask=rows < B)


@triton.jit(do_not_specialize=["B", "num_tiles", "max_group"])
def finish_kernel(
    query, passage, part_max, part_sum, scale_ptr, candidate, group_offsets, copies,
    exclude_B, exclude_P, require_B, require_P, threshold, logits, own_times, lse, lse2,
    B, D, stride_q, stride_p, num_tiles, max_group, BLOCK_TILES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row: the logits of its own group, and the tiles merged in their order.

    A passage of the own group may have copies in other groups. own_times [C] says how many take part, at the passage's
    first place in the group.
    """
    b = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr)
    maximum = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    for start in range(0, num_tiles, BLOCK_TILES):
        tiles = start + tl.arange(0, BLOCK_TILES).to(tl.int64)
        parts = tl.load(part_max + tiles * B + b, mask=tiles < num_tiles, other=float("-inf"))
        sums = tl.load(part_sum + tiles * B + b, mask=tiles < num_tiles, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(parts, axis=0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp2(maximum - shift) + tl.sum(sums * tl.exp2(parts - shift), axis=0)
        maximum = new_maximum
    d = tl.arange(0, BLOCK_D)
    q = tl.load(query + b * stride_q + d, mask=d < D, other=0.0).to(tl.float32)
    first = tl.load(group_offsets + b)
    size = tl.load(group_offsets + b + 1) - first
    for g in tl.range(0, max_group, num_stages=1):
        inside = g < size
        own = tl.load(candidate + first + g, mask=inside, other=0)
        p = tl.load(passage + own.to(tl.int64) * stride_p + d, mask=(d < D) & inside, other=0.0).to(tl.float32)
        score = tl.sum(q * p, axis=0)
        times = tl.load(copies + own, mask=inside, other=0)
        for other_g in tl.range(0, max_group, num_stages=1):
            same = tl.load(candidate + first + other_g, mask=other_g < size, other=-1) == own
            # At its first place a passage stands for all of its places.
            times = tl.where(same & (other_g < g), 0, times - same.to(tl.int32))
        if exclude_B is not None:
            times = tl.where(tl.load(exclude_B + b) == tl.load(exclude_P + own, mask=inside, other=0), 0, times)
        if require_B is not None:
            times = tl.where(tl.load(require_B + b) == tl.load(require_P + own, mask=inside, other=0), times, 0)
        if threshold is not None:
            times = tl.where(score > tl.load(threshold + b), 0, times)
        times = tl.where(inside, tl.maximum(times, 0), 0)
        tl.store(logits + first + g, score * scale, mask=inside)
        tl.store(own_times + first + g, times, mask=inside)
        logit = score * (scale * LOG2_E)
        new_maximum = tl.where(times > 0, tl.maximum(maximum, logit), maximum)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        added = tl.where(times > 0, times.to(tl.float32) * tl.exp2(logit - shift), 0.0)
        total = total * tl.exp2(maximum - shift) + added
        maximum = new_maximum
    base2 = tl.where(total == 0, float("-inf"), maximum + tl.log2(tl.where(total == 0, 1.0, total)))
    tl.store(lse2 + b, base2)
    tl.store(lse + b, base2 / LOG2_E)


@triton.jit
def _score_gradient(
    scores, rows, cols, B, P, scale, candidate, group_offsets, max_group, copies,
    exclude_B, exclude_P, require_B, require_P, threshold, logits, own_times, lse2, grad_lse, grad_logits,
):  # fmt: skip
    """dL/d(q.p) of a tile: shares of the rest's softmax, and what arrives at the own group's logits."""
    row_in = rows < B
    base2 = tl.load(lse2 + rows, mask=row_in, other=0.0)
    arriving = tl.load(grad_lse + rows, mask=row_in, other=0.0)
    masked = _masked_logits(
        scores, rows, cols, B, P, scale, candidate, group_offsets, max_group, copies,
        exclude_B, exclude_P, require_B, require_P, threshold,
    )  # fmt: skip
    # A row without any rest may be handed any gradient, NaN too; it passes none on.
    gradient = tl.where(masked == float("-inf"), 0.0, tl.exp2(masked - base2[:, None]) * arriving[:, None])
    first = tl.load(group_offsets + rows, mask=row_in, other=0)
    size = tl.load(group_offsets + rows + 1, mask=row_in, other=0) - first
    for g in tl.range(0, max_group, num_stages=1):
        inside = g < size
        own = tl.load(candidate + first + g, mask=inside, other=-1)
        times = tl.load(own_times + first + g, mask=inside, other=0).to(tl.float32)
        logit = tl.load(logits + first + g, mask=inside, other=0.0) * LOG2_E
        share = tl.where(times > 0, times * tl.exp2(logit - base2) * arriving, 0.0)
        share += tl.load(grad_logits + first + g, mask=inside, other=0.0)
        gradient += tl.where(own[:, None] == cols[None, :], share[:, None], 0.0)
    return gradient * scale


@triton.jit
def _round_bf16(x):
    """To the nearest bf16, as the hardware stores it; the interpreter alone would cut off."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["col_start", "B", "P", "D", "max_group"])
def gradient_kernel(
    query, passage, out, scale_ptr, candidate, group_offsets, copies,
    exclude_B, exclude_P, require_B, require_P, threshold, logits, own_times, lse2, grad_lse, grad_logits,
    col_start, B, P, D, max_group,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dL/d(q.p) [B, passages of one chunk] in the type of `out`; the chunk begins at passage `col_start`."""
    row0 = tl.program_id(0) * ROWS
    out0 = tl.program_id(1) * COLS
    col0 = col_start + out0
    scale = tl.load(scale_ptr)
    scores = _multiply(query, passage, row0, col0, D, ROWS, COLS, WIDTH, UPCAST)
    parts = _parts(scores, ROWS, COLS)
    PART: tl.constexpr = parts[0].shape[1]
    rows = row0 + tl.arange(0, ROWS)
    for i in tl.static_range(COLS // PART):
        cols = col0 + i * PART + tl.arange(0, PART)
        gradient = _score_gradient(
            parts[i], rows, cols, B, P, scale, candidate, group_offsets, max_group, copies,
            exclude_B, exclude_P, require_B, require_P, threshold, logits, own_times, lse2, grad_lse, grad_logits,
        )  # fmt: skip
        if UPCAST:
            gradient = _round_bf16(gradient)
        out.store([row0, out0 + i * PART], gradient.to(out.dtype))


# Operators.


@torch.library.custom_op("embed_kernels::similarity", mutates_args=())
def similarity(
    query_BD: Tensor,
    passage_PD: Tensor,
    candidate_C: Tensor,
    group_offsets: Tensor,
    max_group: int,
    scale: Tensor,
    copies_P: Tensor,
    exclude_B: Tensor | None,
    exclude_P: Tensor | None,
    require_B: Tensor | None,
    require_P: Tensor | None,
    threshold_B: Tensor | None,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits_C and rest_lse_B; for backward the latter in base 2, and own_times_C. fp32, but for the last (int32)."""
    B, D = query_BD.shape
    P = passage_PD.shape[0]
    logits_C = torch.empty(len(candidate_C), device=query_BD.device, dtype=torch.float32)
    own_times_C = torch.empty(len(candidate_C), device=query_BD.device, dtype=torch.int32)
    lse_B, lse2_B = (torch.empty(B, device=query_BD.device, dtype=torch.float32) for _ in range(2))
    if not B:
        return logits_C, lse_B, lse2_B, own_times_C
    _require_contiguous(candidate_C, group_offsets, copies_P, exclude_B, exclude_P, require_B, require_P, threshold_B)
    query_BD, passage_PD = _aligned(query_BD), _aligned(passage_PD)
    tile = choose_tile(B, P, query_BD.dtype)
    num_tiles = triton.cdiv(P, tile.passages)
    if num_tiles > MAX_TILES:
        raise ValueError(f"{P} passages are more than {MAX_TILES} tiles of {tile.passages}; compare them in parts")
    part_max, part_sum = (torch.empty(num_tiles, B, device=query_BD.device, dtype=torch.float32) for _ in range(2))
    if num_tiles:
        lse_kernel[triton.cdiv(B, tile.rows), num_tiles](
            TensorDescriptor.from_tensor(query_BD, [tile.rows, tile.width]),
            TensorDescriptor.from_tensor(passage_PD, [tile.passages, tile.width]),
            part_max, part_sum, scale, candidate_C, group_offsets, copies_P,
            exclude_B, exclude_P, require_B, require_P, threshold_B, B, P, D, max_group,
            ROWS=tile.rows, COLS=tile.passages, WIDTH=tile.width, UPCAST=_must_upcast(query_BD),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    finish_kernel[(B,)](
        query_BD, passage_PD, part_max, part_sum, scale, candidate_C, group_offsets, copies_P,
        exclude_B, exclude_P, require_B, require_P, threshold_B, logits_C, own_times_C, lse_B, lse2_B,
        B, D, query_BD.stride(0), passage_PD.stride(0), num_tiles, max_group,
        BLOCK_TILES=min(triton.next_power_of_2(max(num_tiles, 1)), FINISH_TILES), BLOCK_D=triton.next_power_of_2(D),
        num_warps=FINISH_WARPS,
    )  # fmt: skip
    return logits_C, lse_B, lse2_B, own_times_C


@similarity.register_fake
def _(query_BD, passage_PD, candidate_C, *rest):
    lse_B, lse2_B = (query_BD.new_empty(query_BD.shape[0], dtype=torch.float32) for _ in range(2))
    logits_C, own_times_C = (query_BD.new_empty(candidate_C.shape[0], dtype=t) for t in (torch.float32, torch.int32))
    return logits_C, lse_B, lse2_B, own_times_C


@torch.library.custom_op("embed_kernels::similarity_backward", mutates_args=())
def similarity_backward(
    grad_logits_C: Tensor,
    grad_lse_B: Tensor,
    logits_C: Tensor,
    lse2_B: Tensor,
    own_times_C: Tensor,
    query_BD: Tensor,
    passage_PD: Tensor,
    candidate_C: Tensor,
    group_offsets: Tensor,
    max_group: int,
    scale: Tensor,
    copies_P: Tensor,
    exclude_B: Tensor | None,
    exclude_P: Tensor | None,
    require_B: Tensor | None,
    require_P: Tensor | None,
    threshold_B: Tensor | None,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and passages, in their types."""
    (B, D), P = query_BD.shape, passage_PD.shape[0]
    grad_passage_PD = torch.empty_like(passage_PD, memory_format=torch.contiguous_format)
    if not B or not P:
        return torch.zeros_like(query_BD), grad_passage_PD.zero_()
    query, passage = _aligned(query_BD), _aligned(passage_PD)
    tile = choose_tile(B, P, query.dtype)
    chunk = max(workspace_bytes // (B * query.element_size()) // tile.passages, 1) * tile.passages
    chunk = min(chunk, triton.cdiv(P, tile.passages) * tile.passages)
    workspace = torch.empty(B, chunk, device=query.device, dtype=query.dtype)
    grad_query_BD: Tensor | None = None
    for start in range(0, P, chunk):
        stop = min(start + chunk, P)
        gradient_kernel[triton.cdiv(B, tile.rows), triton.cdiv(stop - start, tile.passages)](
            TensorDescriptor.from_tensor(query, [tile.rows, tile.width]),
            TensorDescriptor.from_tensor(passage, [tile.passages, tile.width]),
            TensorDescriptor.from_tensor(workspace, [tile.rows, min(tile.passages // 2, 64)]),
            scale, candidate_C, group_offsets, copies_P,
            exclude_B, exclude_P, require_B, require_P, threshold_B, logits_C, own_times_C,
            lse2_B, grad_lse_B, grad_logits_C, start, B, P, D, max_group,
            ROWS=tile.rows, COLS=tile.passages, WIDTH=tile.width, UPCAST=_must_upcast(query),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        gradient_BP = workspace[:, : stop - start]
        grad_passage_PD[start:stop] = _matmul(gradient_BP.T, query_BD, query_BD.dtype)
        share_BD = _matmul(gradient_BP, passage_PD[start:stop], query_BD.dtype if chunk >= P else torch.float32)
        grad_query_BD = share_BD if grad_query_BD is None else grad_query_BD.add_(share_BD)
    assert grad_query_BD is not None
    return grad_query_BD.to(query_BD.dtype), grad_passage_PD


@similarity_backward.register_fake
def _(grad_logits_C, grad_lse_B, logits_C, lse2_B, own_times_C, query_BD, passage_PD, *rest):
    contiguous = torch.contiguous_format
    return torch.empty_like(query_BD, memory_format=contiguous), torch.empty_like(passage_PD, memory_format=contiguous)


def _save(ctx, inputs, output) -> None:
    query_BD, passage_PD, candidate_C, group_offsets, ctx.max_group, *rest, ctx.workspace_bytes = inputs
    logits_C, _, lse2_B, own_times_C = output
    ctx.mark_non_differentiable(lse2_B, own_times_C)
    ctx.save_for_backward(logits_C, lse2_B, own_times_C, query_BD, passage_PD, candidate_C, group_offsets, *rest)


def _backward(ctx, grad_logits_C: Tensor, grad_lse_B: Tensor, *_):
    *outputs, query_BD, passage_PD, candidate_C, group_offsets, scale = ctx.saved_tensors[:8]
    grad_query_BD, grad_passage_PD = similarity_backward(
        grad_logits_C.contiguous(), grad_lse_B.contiguous(), *outputs, query_BD, passage_PD, candidate_C, group_offsets,
        ctx.max_group, scale, *ctx.saved_tensors[8:], ctx.workspace_bytes,
    )  # fmt: skip
    grad_scale = None
    if ctx.needs_input_grad[5]:
        # Logits are scale * (q.p), and dL/dq is scale * (sum of dL/dlogit * p): their product has it.
        grad_scale = (grad_query_BD.float() * query_BD.float()).sum() / scale
    return grad_query_BD, grad_passage_PD, None, None, None, grad_scale, *[None] * 7


similarity.register_autograd(_backward, setup_context=_save)


def _aligned(rows: Tensor) -> Tensor:
    """Contiguous rows that begin at multiples of 16 bytes, as the hardware's bulk copies need them."""
    padding = -rows.shape[1] % (16 // rows.element_size())
    rows = torch.nn.functional.pad(rows, (0, padding)) if padding else rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def _require_contiguous(*vectors: Tensor | None) -> None:
    """Kernels read vectors by their first address alone."""
    assert all(vector is None or vector.is_contiguous() for vector in vectors), "the caller makes them contiguous"


def _must_upcast(tensor: Tensor) -> bool:
    return INTERPRETED and tensor.dtype == torch.bfloat16


def _matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, summed in fp32, in `dtype`."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return (left.to(dtype) @ right.to(dtype)).to(dtype)
