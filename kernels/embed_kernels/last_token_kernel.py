"""Triton: last-token gather and L2 normalisation in one pass, forward and backward. Twin: reference.gather_last_token.

Forward reads S rows of the packed hidden states and nothing else; backward writes S rows into a zeroed [T, D] gradient.
T packed tokens, S sequences, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 8


@triton.jit
def forward_kernel(hidden, last, out, norm, D, stride_t, eps, BLOCK_D: tl.constexpr):
    s = tl.program_id(0)
    t = tl.load(last + s).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(hidden + t * stride_t + d, mask=d < D, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, axis=0))
    tl.store(out + s.to(tl.int64) * D + d, x / tl.maximum(length, tl.cast(eps, tl.float32)), mask=d < D)
    tl.store(norm + s, length)


@triton.jit
def backward_kernel(grad_out, out, norm, last, grad_hidden, D, eps, BLOCK_D: tl.constexpr):
    s = tl.program_id(0)
    t = tl.load(last + s).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row = s.to(tl.int64) * D + d
    dy = tl.load(grad_out + row, mask=d < D, other=0.0).to(tl.float32)
    y = tl.load(out + row, mask=d < D, other=0.0)
    length = tl.load(norm + s)
    floor = tl.cast(eps, tl.float32)
    # A row shorter than eps was divided by the constant eps: nothing is projected out there.
    along = tl.where(length > floor, tl.sum(y * dy, axis=0), 0.0)
    dx = (dy - y * along) / tl.maximum(length, floor)
    tl.store(grad_hidden + t * D + d, dx.to(grad_hidden.dtype.element_ty), mask=d < D)


@torch.library.custom_op("embed_kernels::last_token", mutates_args=())
def last_token(hidden_TD: Tensor, last_token_S: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """embeddings_SD in fp32 and the length of each row before normalisation."""
    assert last_token_S.is_contiguous(), "the caller makes it contiguous"
    hidden_TD = hidden_TD if hidden_TD.stride(1) == 1 else hidden_TD.contiguous()
    S, D = len(last_token_S), hidden_TD.shape[1]
    out_SD = torch.empty(S, D, device=hidden_TD.device, dtype=torch.float32)
    norm_S = torch.empty(S, device=hidden_TD.device, dtype=torch.float32)
    if S:
        forward_kernel[(S,)](
            hidden_TD,
            last_token_S,
            out_SD,
            norm_S,
            D,
            hidden_TD.stride(0),
            eps,
            BLOCK_D=triton.next_power_of_2(D),
            num_warps=NUM_WARPS,
        )
    return out_SD, norm_S


@last_token.register_fake
def _(hidden_TD: Tensor, last_token_S: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out_SD = hidden_TD.new_empty(last_token_S.shape[0], hidden_TD.shape[1], dtype=torch.float32)
    return out_SD, hidden_TD.new_empty(last_token_S.shape[0], dtype=torch.float32)


@torch.library.custom_op("embed_kernels::last_token_backward", mutates_args=())
def last_token_backward(
    grad_SD: Tensor,
    out_SD: Tensor,
    norm_S: Tensor,
    last_token_S: Tensor,
    num_tokens: int,
    dtype: torch.dtype,
    eps: float,
) -> Tensor:
    """The gradient of the hidden states: zero but for the last tokens' rows."""
    S, D = out_SD.shape
    grad_TD = torch.zeros(num_tokens, D, device=out_SD.device, dtype=dtype)
    if S:
        backward_kernel[(S,)](
            grad_SD.contiguous(),
            out_SD,
            norm_S,
            last_token_S,
            grad_TD,
            D,
            eps,
            BLOCK_D=triton.next_power_of_2(D),
            num_warps=NUM_WARPS,
        )
    return grad_TD


@last_token_backward.register_fake
def _(
    grad_SD: Tensor,
    out_SD: Tensor,
    norm_S: Tensor,
    last_token_S: Tensor,
    num_tokens: int,
    dtype: torch.dtype,
    eps: float,
) -> Tensor:
    return out_SD.new_empty(num_tokens, out_SD.shape[1], dtype=dtype)


def _save(ctx, inputs, output) -> None:
    hidden_TD, last_token_S, ctx.eps = inputs
    ctx.save_for_backward(*output, last_token_S)
    ctx.mark_non_differentiable(output[1])
    ctx.num_tokens, ctx.dtype = hidden_TD.shape[0], hidden_TD.dtype


def _backward(ctx, grad_SD: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    out_SD, norm_S, last_token_S = ctx.saved_tensors
    return last_token_backward(grad_SD, out_SD, norm_S, last_token_S, ctx.num_tokens, ctx.dtype, ctx.eps), None, None


last_token.register_autograd(_backward, setup_context=_save)
