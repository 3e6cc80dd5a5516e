"""The estimate as text."""

from dataclasses import replace

from pipeline.planning.advice import alternatives, recommend, warnings
from pipeline.planning.cases import Workload
from pipeline.planning.estimate import USABLE, Case, Cluster, Memory, largest_chunk, plan_cost, plan_memory
from pipeline.settings import Settings

GIB = 2**30


def estimate_report(case: Case, workload: Workload, settings: Settings) -> str:
    """Everything that is printed; each block begins with a line of its own."""
    blocks = [
        _head(case, settings),
        _step_lines(case, workload),
        _memory_lines(plan_memory(case), case.cluster, "adapters and heads" if case.shape.exits else "adapters"),
        _time_lines(case, workload),
        _choices(case),
    ]
    notes = [f"note: {line}" for line in warnings(case, settings)]
    better = recommend(case)
    blocks.append([*notes, *([f"try: {better}"] if better else [])])
    return "\n\n".join("\n".join(block) for block in blocks)


def _head(case: Case, settings: Settings) -> list[str]:
    shape, cluster, world = case.shape, case.cluster, case.cluster.world_size
    params = (sum(shape.frozen) + shape.table) / 1e9
    exits = f"{shape.exits} exits, " if shape.exits else ""
    return [
        f"ESTIMATE for {settings.model.name}: {shape.layers} layers, {exits}{params:.2f} B parameters, "
        f"{sum(shape.trained) / 1e6:.1f} M trained, {settings.model.dtype}, {_sharding_name(case)}",
        f"on {cluster.nodes} node{'s' * (cluster.nodes > 1)} x {cluster.gpus_per_node} GPU{'s' * (world > 1)} of "
        f"{cluster.gpu_gib:g} GiB, {USABLE:.0%} of it usable; links {cluster.gpu_link * 8e-9:,.0f} Gbit/s a GPU, "
        f"{cluster.node_link * 8e-9:,.0f} Gbit/s a node",
        f"assumed: arithmetic at {cluster.utilisation:.0%} of {cluster.flops / 1e12:,.0f} TFLOP/s. Nothing was run.",
    ]


def _sharding_name(case: Case) -> str:
    name = f"ZeRO-{case.sharding.stage}"
    if case.sharding.node_copy > 1:
        name += f" with hpZ over {case.sharding.node_copy} ranks"
    return name


def _step_lines(case: Case, workload: Workload) -> list[str]:
    load, cost, unit = case.load, plan_cost(case), "pairs" if case.shape.exits else "sequences"
    fields = [
        ("lengths", workload.source),
        ("step", f"{load.queries} queries, {load.sequences:,.0f} {unit}, {load.tokens:,.0f} tokens, padding 0"),
        ("chunks", f"{cost.chunks} a rank of at most {case.chunk_tokens} tokens, {cost.forwards} forward passes"),
    ]
    if load.layer_work is not None:
        share = load.layer_work.tokens / load.tokens
        fields.append(("widths", f"a layer reads {share:.0%} of the tokens, in the mean over layers and drawn widths"))
    if workload.steps_per_epoch is not None:
        epoch = workload.steps_per_epoch
        fields.append(("epoch", f"{epoch:,} steps, {epoch * load.tokens / 1e6:,.1f} M tokens"))
    fields.append(("run", "steps not known: state --steps" if workload.steps is None else f"{workload.steps:,} steps"))
    return [f"{name:<10} {value}" for name, value in fields]


def _memory_lines(memory: Memory, cluster: Cluster, trained: str) -> list[str]:
    """`trained`: what the parts called adapters are of."""

    def lines(parts: dict[str, float]) -> list[str]:
        named = {name.replace("adapters", trained): value for name, value in parts.items()}
        return [f"  {name:<40} {value / GIB:8.2f}" for name, value in named.items() if value]

    table = [f"{'memory of a rank, GiB':<42} {memory.peak / GIB:8.2f}  of {USABLE * cluster.gpu_gib:.1f} usable"]
    table += ["always", *lines(memory.always)]
    for name, parts in memory.moments.items():
        decides = "  <- the peak" if name == memory.moment else ""
        table.append(f"{f'at {name}':<42} {sum(parts.values()) / GIB:8.2f}{decides}")
        table += lines(parts) if decides else []
    return [*table, "host memory of a node", *lines(memory.host)]


def _time_lines(case: Case, workload: Workload) -> list[str]:
    cost, world = plan_cost(case), case.cluster.world_size
    hidden, exposed = cost.seconds
    lines = [
        f"arithmetic {cost.flop / 1e15:,.1f} PFLOP a step, {cost.compute_seconds:.1f} s",
        f"gathering  {cost.gather_bytes / 1e9:,.0f} GB to each rank a step, {cost.gather_seconds:.1f} s",
        f"a step     {hidden:.1f} s if all gathering is hidden behind arithmetic, {exposed:.1f} s if none is",
    ]
    if workload.steps is not None:
        hours = [workload.steps * seconds / 3600 for seconds in (hidden, exposed)]
        lines.append(f"the run    {_range(*hours)} h, {_range(*(h * world for h in hours))} GPU-hours")
    return lines


def _range(low: float, high: float) -> str:
    text = [f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in (low, high)]
    return text[0] if text[0] == text[1] else f"{text[0]} to {text[1]}"


def _choices(case: Case) -> list[str]:
    """One line a choice: peak with the recipe's chunks, the largest chunks that fit, a step with those."""
    head = f"{'largest run.chunk_tokens that fits':<34} {'GiB as set':>10} {'chunk_tokens':>13} {'s a step':>13}"
    lines = [head]
    for name, other in alternatives(case).items():
        largest = largest_chunk(other)
        line = f"  {name:<32} {plan_memory(other).peak / GIB:10.1f} "
        if largest is None:
            lines.append(f"{line}{'none':>13}")
            continue
        hidden, exposed = plan_cost(replace(other, chunk_tokens=largest)).seconds
        lines.append(f"{line}{largest:>13,} {_range(hidden, exposed):>13}")
    return lines
