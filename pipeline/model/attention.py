"""Packed (padding-free) attention for any decoder of transformers, through its `AttentionInterface`.

Sequences stand end to end in one row of T tokens; `cu_seqlens` tells where each begins. A kernel is chosen once, by
name, and the choice is logged; asking for one that is not there is an error, never a fallback.
H heads, T packed tokens, K head width.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pipeline.model.prefix import Prefix, attend_prefix, attend_rows, merge

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Call:
    """What a layer asks for beside its tensors: sequence i holds tokens cu_seqlens[i] to cu_seqlens[i + 1]."""

    cu_seqlens: Tensor  # int32, one more than sequences
    max_seqlen: int
    scale: float
    causal: bool
    window: int | None  # tokens that a token sees to its left (and right, if not causal), itself not counted
    softcap: float | None  # of the scores, None: none


Attend = Callable[[Tensor, Tensor, Tensor, _Call], Tensor]  # query, key, value [T, H, K] -> [T, H, K]
AttendLse = Callable[[Tensor, Tensor, Tensor, _Call], tuple[Tensor, Tensor]]  # and the log-sum-exp [T, H]


def register_packed_attention(kernel: str, causal: bool, device_type: str, dtype: str, softcap: float | None) -> str:
    """Make a packed attention known to transformers; returns the name for `attn_implementation`.

    Args:
        kernel: "auto", "flash_attn", "torch_varlen" or "sdpa" (one call a sequence; works everywhere).
        dtype: "bf16" or "fp32"; the fused kernels take bf16 only.
        softcap: of the model's attention scores (Gemma 2), None where it has none; torch's kernel cannot do it.

    Raises:
        ValueError: the kernel asked for cannot run here.
    """
    chosen = _choose_kernel(kernel, device_type, dtype, softcap)
    # transformers runs checks of its own on names that contain "sdpa" or "flash"; these kernels are not its own.
    label, attend, attend_lse = {
        "flash_attn": ("fa", _flash_attn, _flash_attn_lse),
        "torch_varlen": ("varlen", _torch_varlen, _torch_varlen_lse),
        "sdpa": ("per_sequence", _sdpa, _sdpa_lse),
    }[chosen]
    name = f"packed_{label}_{'causal' if causal else 'bidirectional'}"
    AttentionInterface.register(name, functools.partial(_packed_attention, attend, attend_lse, causal))
    AttentionMaskInterface.register(name, _no_mask)
    log.info("attention kernel: %s (asked for: %s), %s", chosen, kernel, "causal" if causal else "bidirectional")
    return name


def _choose_kernel(kernel: str, device_type: str, dtype: str, softcap: float | None) -> str:
    faults = {"flash_attn": "", "torch_varlen": "", "sdpa": ""}
    if importlib.util.find_spec("flash_attn") is None:
        faults["flash_attn"] = "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    if softcap:
        faults["torch_varlen"] = "it has no soft cap of attention scores, which this model needs"
    for fused in ("flash_attn", "torch_varlen"):
        if device_type != "cuda":
            faults[fused] = "there is no CUDA device"
        elif dtype != "bf16":
            faults[fused] = f"model.dtype={dtype}, and it takes bf16 only"
    if kernel == "auto":
        kernel = next(name for name, fault in faults.items() if not fault)
    if kernel == "torch_varlen" and _torch_version() < (2, 12):
        log.info("torch %s: keys and values are kept once a query head, which takes more memory", torch.__version__)
    if faults[kernel]:
        raise ValueError(f"model.attention_kernel={kernel} cannot run: {faults[kernel]}; auto takes one that can")
    return kernel


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Packed attention takes its borders from cu_seqlens: no mask tensor is ever built."""
    return None


def _packed_attention(
    attend: Attend,
    attend_lse: AttendLse,
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
    prefix: Prefix | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: query [1, H, T, K], key, value with fewer heads; gives [1, T, H, K]."""
    assert attention_mask is None and query.shape[0] == 1, "packed attention takes one packed row and no mask"
    assert not dropout, "load_encoder refuses attention dropout"
    if kwargs.get("s_aux") is not None:
        raise ValueError("the model has attention sinks, which packed attention does not know")
    # Both sides of a window count the token itself in transformers: `sliding_window` tokens in all.
    longest = max_length_q + (prefix.length if prefix is not None and prefix.is_full else 0)
    window = sliding_window - 1 if sliding_window is not None and sliding_window < longest else None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    call = _Call(cu_seq_lens_q, max_length_q, scale, causal, window, softcap)
    query_THK, key_TGK, value_TGK = (x[0].transpose(0, 1) for x in (query, key, value))
    layer: Any = getattr(module, "layer_idx", None)
    if prefix is None or not prefix.is_full:
        out = attend(query_THK, key_TGK, value_TGK, call)
        if prefix is not None:
            prefix.add(layer, key_TGK, value_TGK)
        return out[None], None
    assert causal and window is None and not softcap, "why_no_prefix comes first"
    own, own_lse = attend_lse(query_THK, key_TGK, value_TGK, call)
    shared, shared_lse = attend_prefix(query_THK, prefix.keys[layer], prefix.values[layer], scale)
    return merge(own, own_lse, shared, shared_lse)[None], None


def _flash_attn(query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, call: _Call) -> Tensor:
    return _call_flash_attn(query_THK, key_THK, value_THK, call)


def _flash_attn_lse(query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    out, lse_HT, _ = _call_flash_attn(query_THK, key_THK, value_THK, call, return_attn_probs=True)
    assert lse_HT.shape == query_THK.shape[1::-1], "flash-attn before 2.7 gives another form"
    return out, lse_HT.transpose(0, 1)


def _call_flash_attn(query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, call: _Call, **options: Any) -> Any:
    from flash_attn import flash_attn_varlen_func

    sides = (-1, -1) if call.window is None else (call.window, 0 if call.causal else call.window)
    return flash_attn_varlen_func(
        query_THK,
        key_THK,
        value_THK,
        call.cu_seqlens,
        call.cu_seqlens,
        call.max_seqlen,
        call.max_seqlen,
        softmax_scale=call.scale,
        causal=call.causal,
        window_size=sides,
        softcap=call.softcap or 0.0,
        **options,
    )


def _torch_varlen(query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, call: _Call) -> Tensor:
    out = _call_torch_varlen(query_THK, key_THK, value_THK, call)
    assert isinstance(out, Tensor)
    return out


def _torch_varlen_lse(query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.varlen import AuxRequest

    out, lse_HT = _call_torch_varlen(query_THK, key_THK, value_THK, call, return_aux=AuxRequest(lse=True))
    # torch's documentation says [T, H]; its operator says, and gives, [H, T].
    assert lse_HT.shape == query_THK.shape[1::-1], tuple(lse_HT.shape)
    return out, lse_HT.transpose(0, 1)


def _call_torch_varlen(query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, call: _Call, **options: Any) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    assert not call.softcap, "_choose_kernel does not give a model with a soft cap to this kernel"
    left = -1 if call.window is None else call.window
    groups = query_THK.shape[1] // key_THK.shape[1]
    if groups > 1 and _torch_version() < (2, 12):  # torch 2.11 wants as many heads of keys as of queries
        key_THK, value_THK = (x.repeat_interleave(groups, dim=1) for x in (key_THK, value_THK))
    elif groups > 1:
        options["enable_gqa"] = True
    return varlen_attn(
        query_THK,
        key_THK,
        value_THK,
        call.cu_seqlens,
        call.cu_seqlens,
        call.max_seqlen,
        call.max_seqlen,
        scale=call.scale,
        window_size=(left, 0 if call.causal else left),
        **options,
    )


def _sdpa_lse(query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    groups = query_THK.shape[1] // key_THK.shape[1]
    if groups > 1:
        key_THK, value_THK = (x.repeat_interleave(groups, dim=1) for x in (key_THK, value_THK))
    parts = [x.transpose(0, 1)[None].split(call.cu_seqlens.diff().tolist(), 2) for x in (query_THK, key_THK, value_THK)]
    found = [attend_rows(q, k, v, call.scale, causal=True) for q, k, v in zip(*parts, strict=True)]
    out, lse = (torch.cat([pair[i] for pair in found], dim=2)[0].transpose(0, 1) for i in (0, 1))
    return out, lse


def _sdpa(query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, call: _Call) -> Tensor:
    """One attention call a sequence: the slow, obvious path, and the only one on CPU."""
    groups = query_THK.shape[1] // key_THK.shape[1]
    if groups > 1:
        key_THK, value_THK = (x.repeat_interleave(groups, dim=1) for x in (key_THK, value_THK))
    # [1, H, T, K]: torch's fast CPU attention is taken for four dimensions only.
    query, key, value = (x.transpose(0, 1)[None] for x in (query_THK, key_THK, value_THK))
    lengths = call.cu_seqlens.diff().tolist()
    outs = []
    # Split, not sliced: the gradient of a slice is a tensor of all T tokens, and there would be one a sequence.
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        if call.softcap:
            outs.append(_soft_capped(q, k, v, call.scale, call.causal, call.window, call.softcap))
            continue
        mask = None if call.window is None else _allowed(q.shape[2], call.causal, call.window, q.device)
        outs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=call.causal and mask is None, scale=call.scale
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
