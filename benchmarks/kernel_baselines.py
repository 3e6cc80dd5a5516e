"""InfoNCE as trainers compute it today, without a kernel of ours: (query_BD, passage_PD) -> loss.

B rows, P passages, D width; row b's positive is passage b * GROUP. Nothing here waits for the device, so that each
can be captured in a CUDA graph.
"""

from typing import Any

import torch
from kernel_data import GROUP
from torch import Tensor

SCALE = 50.0  # temperature 0.02


def positives(query_BD: Tensor) -> Tensor:
    return torch.arange(len(query_BD), device=query_BD.device) * GROUP


def product_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with an fp32 result; on a GPU bf16 operands stay bf16."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()


def eager_bf16(query_BD: Tensor, passage_PD: Tensor) -> Tensor:
    """As FlagEmbedding: product and division by the temperature in bf16, softmax in fp32."""
    scores_BP = query_BD @ passage_PD.T / (1 / SCALE)
    return torch.nn.functional.cross_entropy(scores_BP, positives(query_BD))


class _Logits(torch.autograd.Function):
    """fp32 product; torch.mm with out_dtype has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, query_BD: Tensor, passage_PD: Tensor) -> Tensor:
        ctx.save_for_backward(query_BD, passage_PD)
        return product_fp32(query_BD, passage_PD.T)

    @staticmethod
    def backward(ctx: Any, gradient_BP: Tensor) -> tuple[Tensor, Tensor]:
        query_BD, passage_PD = ctx.saved_tensors
        gradient_BP = gradient_BP.to(query_BD.dtype)
        return gradient_BP @ passage_PD, gradient_BP.T @ query_BD


def eager_fp32(query_BD: Tensor, passage_PD: Tensor) -> Tensor:
    """All logits in fp32."""
    return torch.nn.functional.cross_entropy(_Logits.apply(query_BD, passage_PD) * SCALE, positives(query_BD))


class _Chunked(torch.autograd.Function):
    CHUNK = 8192

    @staticmethod
    def forward(ctx: Any, query_BD: Tensor, passage_PD: Tensor) -> Tensor:
        parts = [
            torch.logsumexp(product_fp32(query_BD, part.T) * SCALE, 1) for part in passage_PD.split(_Chunked.CHUNK)
        ]
        lse_B = torch.logsumexp(torch.stack(parts), 0)
        ctx.save_for_backward(query_BD, passage_PD, lse_B)
        own_B = (query_BD.float() * passage_PD[positives(query_BD)].float()).sum(1) * SCALE
        return (lse_B - own_B).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        query_BD, passage_PD, lse_B = ctx.saved_tensors
        factor = gradient * SCALE / len(query_BD)
        dq, dc = torch.zeros_like(query_BD, dtype=torch.float32), torch.empty_like(passage_PD)
        for start in range(0, len(passage_PD), _Chunked.CHUNK):
            part = passage_PD[start : start + _Chunked.CHUNK]
            shares = torch.exp(product_fp32(query_BD, part.T) * SCALE - lse_B[:, None])
            place_B = positives(query_BD) - start
            here_B = (place_B >= 0) & (place_B < len(part))
            shares.scatter_add_(1, place_B.clamp(0, len(part) - 1)[:, None], -here_B.float()[:, None])
            shares = (shares * factor).to(query_BD.dtype)
            dc[start : start + len(part)] = shares.T @ query_BD
            dq += product_fp32(shares, part)
        return dq.to(query_BD.dtype), dc


def chunked(query_BD: Tensor, passage_PD: Tensor) -> Tensor:
    """A loop over chunks of passages, fp32 logits, recomputed in backward: no matrix of rows x passages."""
    return _Chunked.apply(query_BD, passage_PD)


def cut_cross_entropy(query_BD: Tensor, passage_PD: Tensor) -> Tensor:
    """The package of that name."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(query_BD * SCALE, passage_PD, positives(query_BD))
