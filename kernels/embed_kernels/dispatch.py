"""The public calls: each takes the Triton kernel or its plain PyTorch twin, and says once which.

T packed tokens, S sequences, B rows, P distinct passages, C own candidates of all rows (ragged), D width.
"""

import functools
import importlib.util
import logging
import os
from typing import Literal

import torch
from torch import Tensor

from embed_kernels import reference

log = logging.getLogger(__name__)

Impl = Literal["auto", "triton", "torch"]


def gather_last_token(hidden_TD: Tensor, last_token_S: Tensor, eps: float = 1e-12, impl: Impl = "auto") -> Tensor:
    """L2-normalised hidden state of each sequence's last token (arXiv 2409.15700, section 3.1: the [EOS] state).

    Args:
        hidden_TD: packed hidden states of any floating type.
        last_token_S: int64 index of each sequence's last token; all different, each below T (on a GPU neither is
            checked: that would wait for the device).
        eps: rows shorter than this are divided by it instead, as torch.nn.functional.normalize does.
        impl: "triton" raises where it cannot run; "auto" takes it where it can, else "torch".

    Returns:
        embeddings_SD in fp32 (fp64 for fp64 input), each row of length 1.
    """
    _require_shape("hidden_TD", hidden_TD, (None, None), hidden_TD.device)
    _require_shape("last_token_S", last_token_S, (None,), hidden_TD.device)
    _require_range("last_token_S", last_token_S, len(hidden_TD))
    if _choose(impl, hidden_TD.device, hidden_TD.dtype, "last-token gather") == "torch":
        return reference.gather_last_token(hidden_TD, last_token_S, eps)
    from embed_kernels.last_token_kernel import last_token

    return last_token(hidden_TD, last_token_S.contiguous(), eps)[0]


def similarity(
    query_BD: Tensor,
    passage_PD: Tensor,
    candidate_C: Tensor,
    group_offsets: Tensor,
    scale: float | Tensor,
    copies_P: Tensor | None,
    *,
    exclude_keys: tuple[Tensor, Tensor] | None = None,
    require_keys: tuple[Tensor, Tensor] | None = None,
    threshold_B: Tensor | None = None,
    max_group: int | None = None,
    impl: Impl = "auto",
    workspace_bytes: int = 256 << 20,
) -> tuple[Tensor, Tensor]:
    """Own-group logits, and the log-sum-exp over everybody else's candidates: all that contrastive losses need.

    A passage that several rows hold as a candidate is one row of `passage_PD` but counts once per copy, as if it had
    been repeated: a copy outside the row's own group adds exp(logit) once. The rows may be one rank's slice of the
    batch; the passages are the whole step's, so no offsets are needed.

    Args:
        query_BD, passage_PD: embeddings of one type. fp32 is multiplied exactly (backward as
            torch.set_float32_matmul_precision says); bf16 and fp16 use tensor cores. Logits and sums are fp32 in every
            case (fp64 for fp64, which only "torch" takes).
        candidate_C, group_offsets: the rows' own candidates as indices into the passages; row b holds those from
            group_offsets[b] to group_offsets[b + 1] (B + 1 of them). These, copies and keys are int32, which take half
            the registers. Their values are checked on the CPU only: on a GPU that would wait for the device.
        scale: 1 / temperature, not 0; a tensor of no dimensions may be learned.
        copies_P: over all rows of all ranks, how many candidates are a copy of passage p; None where in-batch and
            cross-device candidates take no part, which makes the second result -inf (and leaves PyTorch the work).
        exclude_keys: (key_B, key_P): passages whose key equals the row's take no part in the second result.
            With text ids as keys these are the duplicates of the row's positive.
        require_keys: (key_B, key_P): only passages whose key equals the row's take part (one task, one language).
        threshold_B: passages more similar (before scaling) than this take no part: suspected false negatives.
        max_group: length of the longest group or more, where the caller knows it (less is wrong, and checked on the CPU
            only); otherwise it is read from the device.
        impl: "triton" raises where it cannot run; "auto" takes it where it can, else "torch".
        workspace_bytes: bound on the one matrix of rows x passages that backward holds, chunk by chunk ("triton").

    Returns:
        logits_C (scaled similarities of the own groups) and rest_lse_B (natural log; -inf where nothing is left).
    """
    _require_shapes(query_BD, passage_PD, candidate_C, group_offsets, copies_P, exclude_keys, require_keys)
    if threshold_B is not None:
        _require_shape("threshold_B", threshold_B, (len(query_BD),), query_BD.device)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"scale has shape {tuple(scale.shape)}, must be one number")
    if query_BD.dtype != passage_PD.dtype:
        raise ValueError(f"queries are {query_BD.dtype}, passages {passage_PD.dtype}; convert one of them")
    for name, integers in _integers(candidate_C, group_offsets, copies_P, exclude_keys, require_keys).items():
        if integers.dtype != torch.int32:
            raise ValueError(f"{name} is {integers.dtype}, must be int32: count from 0 and convert it")
    chosen = _choose(impl, query_BD.device, query_BD.dtype, "similarity")
    # Without a rest there is no matrix to fuse: one dot product a candidate.
    if chosen == "torch" or copies_P is None:
        return reference.similarity(
            query_BD, passage_PD, candidate_C, group_offsets, scale, copies_P, exclude_keys, require_keys, threshold_B
        )
    from embed_kernels.similarity_kernel import similarity as operator

    if max_group is None or (query_BD.device.type == "cpu" and not torch.compiler.is_compiling()):
        longest = int(group_offsets.diff().max()) if len(query_BD) else 0
        if max_group is not None and max_group < longest:
            raise ValueError(f"max_group={max_group} is less than the longest group, {longest}")
        max_group = longest
    if isinstance(scale, Tensor):
        scale = scale.to(query_BD.device, torch.float32)
    else:  # filled on the device: a copy from the host would wait for it
        scale = torch.full((), scale, device=query_BD.device, dtype=torch.float32)
    exclude, require = (
        tuple(key.contiguous() for key in keys) if keys else (None, None) for keys in (exclude_keys, require_keys)
    )
    logits_C, lse_B, *_ = operator(
        query_BD,
        passage_PD,
        candidate_C.contiguous(),
        group_offsets.contiguous(),
        max_group,
        scale,
        copies_P.contiguous(),
        *exclude,
        *require,
        None if threshold_B is None else threshold_B.float().contiguous(),
        workspace_bytes,
    )
    return logits_C, lse_B


def _require_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    """ValueError unless the tensor has this shape (None: any length) and lies on this device."""
    wanted = tuple("any" if size is None else size for size in shape)
    if tensor.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {wanted}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {device}")


def _require_range(name: str, indices: Tensor, size: int) -> None:
    """ValueError for an index out of range, where looking costs nothing."""
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= size:
            raise ValueError(f"{name} holds {low if low < 0 else high}, must lie in 0..{size - 1}")


def _require_shapes(
    query_BD: Tensor,
    passage_PD: Tensor,
    candidate_C: Tensor,
    group_offsets: Tensor,
    copies_P: Tensor | None,
    exclude_keys: tuple[Tensor, Tensor] | None,
    require_keys: tuple[Tensor, Tensor] | None,
) -> None:
    device = query_BD.device
    _require_shape("query_BD", query_BD, (None, None), device)
    B, D = query_BD.shape
    _require_shape("passage_PD", passage_PD, (None, D), device)
    P = len(passage_PD)
    _require_shape("candidate_C", candidate_C, (None,), device)
    _require_shape("group_offsets", group_offsets, (B + 1,), device)
    if copies_P is not None:
        _require_shape("copies_P", copies_P, (P,), device)
    for name, keys in (("exclude_keys", exclude_keys), ("require_keys", require_keys)):
        if keys is not None:
            _require_shape(f"{name}[0]", keys[0], (B,), device)
            _require_shape(f"{name}[1]", keys[1], (P,), device)
    _require_range("candidate_C", candidate_C, P)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        rising = bool((group_offsets.diff() >= 0).all())
        if int(group_offsets[0]) != 0 or int(group_offsets[-1]) != len(candidate_C) or not rising:
            raise ValueError(f"group_offsets must rise from 0 to the number of candidates, {len(candidate_C)}")


def _integers(
    candidate_C: Tensor,
    group_offsets: Tensor,
    copies_P: Tensor | None,
    exclude_keys: tuple[Tensor, Tensor] | None,
    require_keys: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    found = {"candidate_C": candidate_C, "group_offsets": group_offsets}
    found |= {} if copies_P is None else {"copies_P": copies_P}
    for name, keys in (("exclude_keys", exclude_keys), ("require_keys", require_keys)):
        found |= {f"{name}[{i}]": key for i, key in enumerate(keys or ())}
    return found


def gather_similarity(
    hidden_TD: Tensor,
    last_token_S: Tensor,
    candidate_C: Tensor,
    group_offsets: Tensor,
    scale: float | Tensor,
    copies_P: Tensor | None,
    *,
    exclude_keys: tuple[Tensor, Tensor] | None = None,
    require_keys: tuple[Tensor, Tensor] | None = None,
    threshold_B: Tensor | None = None,
    max_group: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """From packed hidden states to `similarity`'s two results, for a step whose sequences stand in one chunk.

    The first len(group_offsets) - 1 sequences are the queries, the others the passages. A step of several chunks
    gathers once a chunk and compares once a batch: it calls the two parts.
    """
    embeddings_SD = gather_last_token(hidden_TD, last_token_S, impl=impl)
    num_queries = len(group_offsets) - 1
    if num_queries > len(embeddings_SD):
        raise ValueError(f"group_offsets names {num_queries} queries, last_token_S {len(embeddings_SD)} sequences")
    return similarity(
        embeddings_SD[:num_queries],
        embeddings_SD[num_queries:],
        candidate_C,
        group_offsets,
        scale,
        copies_P,
        exclude_keys=exclude_keys,
        require_keys=require_keys,
        threshold_B=threshold_B,
        max_group=max_group,
        impl=impl,
    )


def require_impl(impl: Impl, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError if the calls could not run as asked for: what a program checks before hours of other work."""
    _require(impl, _triton_fault(device, dtype))


@torch.compiler.assume_constant_result
def _choose(impl: str, device: torch.device, dtype: torch.dtype, what: str) -> str:
    """ "triton" or "torch"."""
    return _choose_once(impl, device, dtype, what)


@functools.cache
def _choose_once(impl: str, device: torch.device, dtype: torch.dtype, what: str) -> str:
    """Cached, so each choice is logged once."""
    fault = _triton_fault(device, dtype)
    _require(impl, fault)
    chosen = impl if impl != "auto" else "torch" if fault or device.type == "cpu" else "triton"
    log.info("%s kernel: %s (asked for: %s%s)", what, chosen, impl, f"; triton: {fault}" if fault else "")
    return chosen


def _require(impl: str, fault: str) -> None:
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl={impl!r} must be auto, triton or torch")
    if impl == "triton" and fault:
        raise ValueError(f"impl='triton' cannot run: {fault}; auto takes what can")


def _triton_fault(device: torch.device, dtype: torch.dtype) -> str:
    """Why the Triton kernels cannot run, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with torch's CUDA builds; pip install triton)"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it has no {dtype}"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "the tensors are on the CPU (TRITON_INTERPRET=1 runs it there, slowly)"
        from embed_kernels.similarity_kernel import INTERPRETED

        return "" if INTERPRETED else "TRITON_INTERPRET=1 was set after Triton had been imported"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"{device} is not an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "the GPU is older than Hopper (sm_90), whose bulk copies it uses"
    return ""
