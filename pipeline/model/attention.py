"""Packed (padding-free) attention for any decoder of transformers, through its `AttentionInterface`.

Sequences stand end to end in one row of T tokens; `cu_seqlens` tells where each begins. A kernel is chosen once, by
name, and the choice is logged; asking for one that is not there is an error, never a fallback.
H heads, T packed tokens, K head width.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

log = logging.getLogger(__name__)

Attend = Callable[..., Tensor]


def register_packed_attention(kernel: str, causal: bool, device_type: str) -> str:
    """Make a packed attention known to transformers; returns the name for `attn_implementation`.

    Args:
        kernel: "auto", "flash_attn", "torch_varlen" or "sdpa" (one call a sequence; works everywhere).

    Raises:
        ValueError: the kernel asked for cannot run here.
    """
    chosen = _choose_kernel(kernel, device_type)
    # transformers runs checks of its own on names that contain "sdpa" or "flash"; these kernels are not its own.
    label, attend = {
        "flash_attn": ("fa", _flash_attn),
        "torch_varlen": ("varlen", _torch_varlen),
        "sdpa": ("per_sequence", _sdpa),
    }[chosen]
    name = f"packed_{label}_{'causal' if causal else 'bidirectional'}"
    AttentionInterface.register(name, functools.partial(_packed_attention, attend, causal))
    AttentionMaskInterface.register(name, _no_mask)
    log.info("attention kernel: %s (asked for: %s), %s", chosen, kernel, "causal" if causal else "bidirectional")
    return name


def _choose_kernel(kernel: str, device_type: str) -> str:
    has_flash = importlib.util.find_spec("flash_attn") is not None
    has_varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    on_gpu = device_type == "cuda"
    if kernel == "auto":
        return ("flash_attn" if has_flash else "torch_varlen" if has_varlen else "sdpa") if on_gpu else "sdpa"
    if kernel == "flash_attn" and not (has_flash and on_gpu):
        missing = (
            "flash-attn is not installed (pip install bge-icl-train[gpu])" if on_gpu else "there is no CUDA device"
        )
        raise ValueError(f"model.attention_kernel=flash_attn cannot run: {missing}; use auto to let it be chosen")
    if kernel == "torch_varlen" and not (has_varlen and on_gpu):
        missing = f"torch {torch.__version__} lacks it (2.10 has it)" if on_gpu else "there is no CUDA device"
        raise ValueError(f"model.attention_kernel=torch_varlen cannot run: {missing}; use auto to let it be chosen")
    return kernel


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Packed attention takes its borders from cu_seqlens: no mask tensor is ever built."""
    return None


def _packed_attention(
    attend: Attend,
    causal: bool,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: query [1, H, T, K], key, value with fewer heads; gives [1, T, H, K]."""
    assert attention_mask is None and query.shape[0] == 1, "packed attention takes one packed row and no mask"
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} is not supported; set attention_dropout to 0 in the model's config"
        )
    # Both sides of a window count the token itself in transformers: `sliding_window` tokens in all.
    window = sliding_window - 1 if sliding_window is not None and sliding_window < max_length_q else None
    out = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens_q,
        max_length_q,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        causal=causal,
        window=window,
        softcap=softcap,
    )
    return out[None], None


def _flash_attn(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    sides = (-1, -1) if window is None else (window, 0 if causal else window)
    return flash_attn_varlen_func(
        query_THK,
        key_THK,
        value_THK,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        softmax_scale=scale,
        causal=causal,
        window_size=sides,
        softcap=softcap or 0.0,
    )


def _torch_varlen(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if softcap:
        raise ValueError("torch's varlen attention has no soft cap (Gemma 2 needs one); use flash_attn or sdpa")
    left = -1 if window is None else window
    out = varlen_attn(
        query_THK,
        key_THK,
        value_THK,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scale,
        window_size=(left, 0 if causal else left),
        enable_gqa=query_THK.shape[1] != key_THK.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def _sdpa(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One attention call a sequence: the slow, obvious path, and the only one on CPU."""
    groups = query_THK.shape[1] // key_THK.shape[1]
    if groups > 1:
        key_THK, value_THK = (x.repeat_interleave(groups, dim=1) for x in (key_THK, value_THK))
    # [1, H, T, K]: torch's fast CPU attention is taken for four dimensions only.
    query, key, value = (x.transpose(0, 1)[None] for x in (query_THK, key_THK, value_THK))
    edges = cu_seqlens.tolist()
    outs = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        if softcap:
            outs.append(_soft_capped(q, k, v, scale, causal, window, softcap))
            continue
        mask = None if window is None else _allowed(end - start, causal, window, q.device)
        outs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale
            )
        )
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def _allowed(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Boolean [length, length]: which key each query may see."""
    position = torch.arange(length, device=device)
    back = position[:, None] - position[None, :]
    allowed = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    return allowed if window is None else allowed & (back.abs() <= window)


def _soft_capped(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None, softcap: float
) -> Tensor:
    """Gemma 2: scores pass through softcap * tanh(scores / softcap) before the mask, which SDPA cannot do."""
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    scores = scores.masked_fill(~_allowed(q.shape[2], causal, window, q.device), float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
