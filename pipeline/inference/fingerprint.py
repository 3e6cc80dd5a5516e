"""What a model is, as one number: results computed with it can be kept under that."""

import dataclasses
import hashlib
import json
from typing import Any

import torch

from pipeline.inference.embedder import FewShotEmbedder

_SLICE = 1 << 24  # numbers that leave the device at once


def fingerprint(embedder: FewShotEmbedder) -> str:
    """sha256 over all that decides an embedding beside the text, 64 hex digits.

    That is every weight as it was loaded (base, adapter, marker rows: name, type, shape and bytes, in order of names),
    the decoder's configuration, pooling, the direction of attention, template, limits, tokenizer and dimension. Where
    the files lie and what they are called does not count, nor do device, kernels and chunk size, which change the last
    bits only. An adapter and the whole model that it was merged into are two models. Reads every weight once: seconds
    to a minute for a model of 7B.

    Raises:
        ValueError: the weights are spread over ranks, so this process cannot see them.
    """
    encoder = embedder.encoder
    digest = hashlib.sha256(json.dumps(_settings(embedder), sort_keys=True, default=str).encode())
    # Buffers too: under LoRA the table of embeddings is one.
    tensors = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    for name, tensor in sorted(tensors.items()):
        if tensor.numel() == 0:
            raise ValueError(f"{name} is empty here: its values are spread over ranks; save the model and load it")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        _add_values(digest, tensor.detach())
    return digest.hexdigest()


def _settings(embedder: FewShotEmbedder) -> dict[str, Any]:
    """What is no tensor."""
    encoder, pt = embedder.encoder, embedder.tokenizer
    # A name with an underscore in front says where the model came from or what runs it.
    config = {key: value for key, value in encoder.decoder.config.to_dict().items() if not key.startswith("_")}
    config.pop("transformers_version", None)
    return {
        "config": config,
        # Of LoRA alpha / rank, of attention the factor of its scores.
        "scaling": {name: m.scaling for name, m in encoder.named_modules() if hasattr(m, "scaling")},
        "pooling": encoder.pooling,
        "causal": encoder.causal,
        "template": dataclasses.asdict(pt.template),
        "tokens": dataclasses.asdict(pt.tokens),
        "tokenizer": pt.fingerprint,
        "limits": dataclasses.asdict(embedder.limits),
        "dim": embedder.dim,
    }


def _add_values(digest: Any, tensor: torch.Tensor) -> None:
    flat = tensor.contiguous().view(-1)
    for start in range(0, len(flat), _SLICE):
        digest.update(flat[start : start + _SLICE].cpu().view(torch.uint8).numpy())
