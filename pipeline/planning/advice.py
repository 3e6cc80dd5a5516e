"""What the settings switch off, make pointless or leave unused, and which other settings would be faster.

Each check speaks once, in the words of settings and files that a user can change.
"""

from dataclasses import replace

from pipeline.model.shapes import KNOWN
from pipeline.planning.estimate import USABLE, Case, fits, largest_chunk, plan_cost, plan_memory
from pipeline.settings import Settings

NOTABLE = 0.1  # share of the arithmetic's time from which traffic, or of a card from which a buffer, is worth a line


def alternatives(case: Case) -> dict[str, Case]:
    """The same run under other sharding and checkpointing; the run itself is `as set`."""
    plain = replace(case.sharding, stage=1, node_copy=1, offload_weights=False, offload_optimizer=False)
    shardings = {"zero1": plain, "zero3": replace(case.sharding, stage=3, node_copy=1, offload_weights=False)}
    if case.cluster.nodes > 1 and case.cluster.gpus_per_node > 1:
        shardings["zero3_hpz"] = replace(shardings["zero3"], node_copy=case.cluster.gpus_per_node)
    cases = {"as set": case}
    for name, sharding in shardings.items():
        for checkpointing in (False, True):
            kernels = replace(case.kernels, checkpointing=checkpointing, keeps_inputs=sharding.stage == 3)
            label = f"{name}, activations {'recomputed' if checkpointing else 'kept'}"
            cases[label] = replace(case, sharding=sharding, kernels=kernels)
    return cases


def recommend(case: Case) -> str | None:
    """ZeRO-1 or hpZ by name of its file, where it fits with this chunk size and gathering costs a notable time."""
    cost = plan_cost(case)
    if case.sharding.stage < 3 or cost.gather_seconds <= NOTABLE * cost.compute_seconds:
        return None
    share = cost.gather_seconds / cost.compute_seconds
    for file, name in (("zero1", "zero1"), ("zero3_hpz", "zero3_hpz")):
        kept = "recomputed" if case.kernels.checkpointing else "kept"
        other = alternatives(case).get(f"{name}, activations {kept}")
        if other is None or other.sharding == case.sharding or not fits(other):
            continue
        if plan_cost(other).gather_seconds < cost.gather_seconds:
            return (
                f"run.deepspeed=ds_configs/{file}.json: gathering takes {share:.0%} of the arithmetic's time, and with "
                f"it {plan_cost(other).gather_seconds:.1f} s a step instead of {cost.gather_seconds:.1f} s, in "
                f"{plan_memory(other).peak / 2**30:.1f} GiB"
            )
    return None


def warnings(case: Case, settings: Settings) -> list[str]:
    """One line for each thing that a user should know before the run."""
    return [*_about_memory(case), *_about_sharding(case), *_about_batch(case, settings), *_about_model(case, settings)]


def _about_memory(case: Case) -> list[str]:
    found, capacity = [], USABLE * case.cluster.gpu_gib
    other = replace(case, kernels=replace(case.kernels, checkpointing=not case.kernels.checkpointing))
    if not fits(case):
        need, largest = plan_memory(case).peak / 2**30, largest_chunk(case)
        remedy = "no run.chunk_tokens would do"
        if largest:
            remedy = f"lower run.chunk_tokens to {largest}"
        if case.graphs > 1 and fits(replace(case, graphs=1)):
            remedy = f"lower run.keep_graphs={case.graphs}: with 1 it fits"
        if not case.kernels.checkpointing and fits(other):
            remedy += ", or set model.activation_checkpointing=true, with which it fits"
        found.append(f"does not fit: {need:.1f} GiB of {capacity:.1f} usable; {remedy}")
    elif case.kernels.checkpointing and fits(other):
        less = 1 - plan_cost(other).flop / plan_cost(case).flop
        found.append(
            f"model.activation_checkpointing is not needed at this run.chunk_tokens: without it {less:.0%} less "
            f"arithmetic, {plan_memory(other).peak / 2**30:.1f} GiB"
        )
    s, element = case.sharding, case.kernels.element
    copies = 2 if s.stage == 2 and s.overlap else 1
    bucket = s.reduce_bucket * (4 if s.stage == 1 else element) * copies
    trained = sum(case.shape.trained)
    if s.stage and s.contiguous_gradients and s.reduce_bucket > trained and bucket > NOTABLE / 4 * capacity * 2**30:
        found.append(
            f"reduce_bucket_size={s.reduce_bucket} is more than the {trained:,} trained parameters and costs "
            f"{bucket / 2**30:.1f} GiB; name a smaller one in the DeepSpeed JSON"
        )
    return found


def _about_sharding(case: Case) -> list[str]:
    s, world, found = case.sharding, case.cluster.world_size, []
    if world == 1 and s.stage:
        found.append(f"ZeRO-{s.stage} on one GPU shards nothing; ds_configs/zero0.json is the same without its work")
    if s.node_copy > 1 and (world % s.node_copy or s.node_copy > case.cluster.gpus_per_node):
        found.append(
            f"zero_hpz_partition_size={s.node_copy} should divide the {case.cluster.gpus_per_node} GPUs of a node: "
            "its copies would cross nodes"
        )
    if s.offload_optimizer:
        saved = 12 * sum(case.shape.trained) / max(1, world if s.stage else 1) / 2**30
        found.append(
            f"offload_optimizer saves {saved:.2f} GiB a rank (LoRA trains little) and moves gradients and weights "
            "over the host's bus in every step"
        )
    if s.offload_weights:
        found.append("offload_param: every pass copies the shards from host memory; that time is not counted here")
    return found


def _about_batch(case: Case, settings: Settings) -> list[str]:
    world, found = case.cluster.world_size, []
    sizes = {"batch.queries": settings.batch.queries}
    if any(d.type.startswith("symmetric") for d in settings.data.datasets):
        sizes["batch.symmetric_queries"] = settings.batch.symmetric_queries
    for name, size in sizes.items():
        if size % world:
            found.append(f"{name}={size} is not divisible by {world} ranks: training will refuse it")
    chunk = min(case.chunk_tokens, case.load.tokens / world)
    if chunk < case.chunk_tokens:
        found.append(
            f"a step has {chunk:,.0f} tokens a rank, less than run.chunk_tokens={case.chunk_tokens}: one chunk, and "
            "a larger budget changes nothing"
        )
    if case.chunk_tokens < case.load.longest:
        found.append(
            f"run.chunk_tokens={case.chunk_tokens} is below the longest sequence, {case.load.longest} tokens: "
            "training will refuse it"
        )
    return found


def _about_model(case: Case, settings: Settings) -> list[str]:
    found = []
    if settings.model.dtype == "fp32":
        found.append("model.dtype=fp32: fused attention and tensor cores want bf16; the FLOP rate stated is theirs")
    elif settings.model.attention_kernel == "sdpa":
        found.append("model.attention_kernel=sdpa makes one call a sequence; auto takes a fused kernel on a GPU")
    if case.shape.family not in KNOWN:
        found.append(f"{case.shape.family} layers are counted as LLaMA's, the last one for all tokens")
    if case.shape.capped:
        found.append("attention scores are soft-capped: matrices of length x length a head are not counted")
    return found
