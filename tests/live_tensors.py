"""The obvious way to know what a pass keeps: follow every tensor from birth to death. Slow; the planner's truth."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages born while it is active: alive now, and at most. `known` storages are not counted."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.sizes, self.alive, self.peak = known, {}, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes and key not in self.known:
                    self.sizes[key] = storage.nbytes()
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._died, key)
        self.peak = max(self.peak, self.alive)
        return out

    def _died(self, key: int) -> None:
        self.alive -= self.sizes.pop(key, 0)


def storages(tensors: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def measure_passes(encoder: torch.nn.Module, encode: Callable[[], torch.Tensor]) -> dict[str, int]:
    """Bytes: `graph` (what autograd saves), `peak` of forward and backward, `no_graph` (peak without a graph)."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    known = storages([*encoder.parameters(), *encoder.buffers(), *(p.grad for p in trained)])
    with torch.no_grad(), LiveTensors(known) as without:
        encode()
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with LiveTensors(known) as alive:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            embeddings_SD = encode()
        graph = sum(saved.values())  # before backward recomputes anything
        embeddings_SD.backward(torch.ones_like(embeddings_SD))
    return {"graph": graph, "peak": alive.peak, "no_graph": without.peak}


class FusedAttention(torch.autograd.Function):
    """Keeps and returns what fused attention does, and computes nothing: query, keys, values, output, log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        out = torch.zeros(query.shape, dtype=query.dtype)
        ctx.save_for_backward(query, key, value, out, torch.zeros(query.shape[1], query.shape[0]))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors[:3])
