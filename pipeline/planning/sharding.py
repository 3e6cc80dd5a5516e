"""What a DeepSpeed JSON says about memory and traffic, and what it leaves of the weights on one rank.

Keys and defaults are DeepSpeed's (runtime/zero/config.py; https://www.deepspeed.ai/docs/config-json/). ZeRO: arXiv
1910.02054, section 5; hpZ: arXiv 2306.10209, section 3.2. N trained parameters, W ranks, e bytes of a weight.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.model.shapes import ModelShape


@dataclass(frozen=True)
class Sharding:
    """The part of the JSON that counts; sizes in elements."""

    stage: int
    overlap: bool
    contiguous_gradients: bool
    reduce_bucket: int
    prefetch_bucket: int
    persistence_threshold: int
    max_live: int
    max_reuse_distance: int
    node_copy: int  # ranks that share a second copy of the weights (hpZ); 1: there is none
    offload_optimizer: bool
    offload_weights: bool


def read_sharding(config: dict[str, Any]) -> Sharding:
    """From a DeepSpeed JSON's contents; ValueError for a number that is none."""
    zero = config.get("zero_optimization", {})

    def number(key: str, default: float) -> int:
        value = zero.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"run.deepspeed: zero_optimization.{key}={value!r} must be a number")
        return int(value)

    def offloads(key: str) -> bool:
        return (zero.get(key) or {}).get("device", "none") != "none"

    stage = number("stage", 0)
    return Sharding(
        stage=stage,
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        contiguous_gradients=bool(zero.get("contiguous_gradients", True)),
        reduce_bucket=number("reduce_bucket_size", 5e8),
        prefetch_bucket=number("stage3_prefetch_bucket_size", 5e7),
        persistence_threshold=number("stage3_param_persistence_threshold", 1e5),
        max_live=number("stage3_max_live_parameters", 1e9),
        max_reuse_distance=number("stage3_max_reuse_distance", 1e9),
        node_copy=max(1, number("zero_hpz_partition_size", 1)),
        offload_optimizer=offloads("offload_optimizer"),
        offload_weights=stage == 3 and offloads("offload_param"),
    )


def gathered_numel(shape: ModelShape, sharding: Sharding) -> int:
    """Elements that a ZeRO-3 pass gathers: all parameters above the persistence threshold."""
    if sharding.stage < 3:
        return 0
    return sum(n for n in (*shape.frozen, *shape.trained) if n > sharding.persistence_threshold)


def weight_parts(shape: ModelShape, sharding: Sharding, world_size: int, element: int) -> dict[str, float]:
    """Bytes of weights on one rank while it works, by part.

    ZeRO-3 keeps a W-th of every parameter (with hpZ another copy over `node_copy` ranks), parameters up to the
    persistence threshold whole besides, and of the others what it has gathered. With prefetching that is
    stage3_max_live_parameters and the matrix at hand, whatever the reuse distance: prefetching runs ahead through the
    recorded pass until then, and what it found there is not released (measured, DeepSpeed 0.19). Without, it is
    what the pass uses again within the reuse distance, half of it before the turn and half after. The matrix and the
    prefetch bucket that are on their way lie in a buffer besides.
    """
    frozen, trained = sum(shape.frozen), sum(shape.trained)
    parts = {"embedding table": float(shape.table * element)}
    if sharding.stage < 3:
        return parts | {"frozen weights": float(frozen * element), "adapters": float(trained * element)}
    small = sharding.persistence_threshold
    on_card = 0 if sharding.offload_weights else element
    copies = 1 / world_size + (1 / sharding.node_copy if sharding.node_copy > 1 else 0)
    parts["frozen weights, sharded"] = frozen * copies * on_card
    parts["adapters, sharded"] = trained * copies * on_card
    if world_size == 1 and not sharding.offload_weights:
        return parts  # a shard is the whole: nothing is gathered or copied
    parts["frozen weights, small ones whole"] = float(sum(n for n in shape.frozen if n <= small) * element)
    parts["adapters, small ones whole"] = float(sum(n for n in shape.trained if n <= small) * element)
    large = gathered_numel(shape, sharding)
    at_hand = max((n for n in shape.frozen if n > small), default=0)
    live = sharding.max_live if sharding.prefetch_bucket else sharding.max_reuse_distance // 2
    coming = at_hand + sharding.prefetch_bucket
    parts["gathered weights"] = float((min(large, live + at_hand) + min(large, coming)) * element)
    return parts


def optimizer_parts(shape: ModelShape, sharding: Sharding, world_size: int, element: int) -> tuple[float, float, float]:
    """Bytes a rank: (fp32 masters, two fp32 moments, ZeRO-3's own gradient partition and bucket).

    ZeRO 1 to 3 keep a W-th; they have fp32 masters even where the weights are fp32, ZeRO 0 then has none.
    """
    trained = sum(shape.trained)
    share = trained / world_size if sharding.stage else float(trained)
    masters = 0.0 if sharding.stage == 0 and element == 4 else 4 * share
    buffers = 0.0
    if sharding.stage == 3:
        buffers = element * (share + (sharding.reduce_bucket if sharding.contiguous_gradients else 0))
    return masters, 8 * share, buffers


def gradient_bytes(shape: ModelShape, sharding: Sharding, element: int) -> float:
    """While chunks go backward: each trained parameter's gradient, whole on every rank; in bf16 also its fp32 sum over
    the chunks of a step (pipeline/runtime/engine.py; a step of one chunk needs none and is not told apart here).
    """
    sums = 4 if element == 2 and sharding.stage > 0 else 0
    return float(sum(shape.trained) * (element + sums))


def reduction_bytes(shape: ModelShape, sharding: Sharding, world_size: int, element: int) -> float:
    """Reduction and optimizer step: buckets of ZeRO 1 and 2 (fp32 in ZeRO 1, two with overlap), this rank's gradient
    in fp32 and two temporaries of Adam of that size.
    """
    trained = sum(shape.trained)
    share = trained / world_size if sharding.stage else trained
    buckets = 0
    if sharding.stage in (1, 2) and sharding.contiguous_gradients:
        buckets = sharding.reduce_bucket * (4 if sharding.stage == 1 else element) * (2 if sharding.overlap else 1)
    step = 0 if sharding.offload_optimizer else 3 * 4 * share
    return float(buckets + step)
