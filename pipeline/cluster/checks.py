"""Checks of a run before it is submitted that need no SLURM; each says what it found, or why the run cannot be."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline.cluster.facts import Facts
from pipeline.cluster.findings import NOTE, OK, UNCHECKED, Finding, tried
from pipeline.cluster.folder_checks import check_disk, check_places, check_resume, check_run_folder
from pipeline.cluster.options import require_one_line
from pipeline.cluster.pace import has_config, require_lead, require_time
from pipeline.cluster.run_folder import holds_embedder
from pipeline.cluster.wording import count, join_words
from pipeline.data.finding import find_sources
from pipeline.datatypes import RULES
from pipeline.evaluation.tasks import read_task_header
from pipeline.files import read_json_lines
from pipeline.model.base import weight_files
from pipeline.runtime.sharding_json import read_deepspeed_json, require_exact, zero_stage
from pipeline.settings import HUB_PREFIX

TASK_EXAMPLES = 3  # what pipeline/evaluate_embedder.py takes of a folder's unless told otherwise
GIB = 2**30


def check_run(facts: Facts) -> list[Finding]:
    """All checks that the stages ask for, in the order in which a job would meet what they look at."""
    checks: dict[str, Callable[[Facts], Sequence[Finding] | str]]
    checks = {"store": check_store, "model": check_model, "run folder": check_run_folder, "shared": check_places}
    if "train" in facts.stages:
        checks = {"ranks": check_ranks, "sharding": check_sharding, **checks, "resume": check_resume}
        checks |= {"memory": check_memory, "time": check_time, "signal": check_lead, "disk": check_disk}
    if "evaluate" in facts.stages:
        checks["tasks"] = check_tasks
    return [finding for name, check in checks.items() for finding in tried(name, partial(check, facts))]


def check_ranks(facts: Facts) -> list[Finding]:
    """Every number of ranks that the job may get must share the rows of a batch evenly."""
    options, sizes, found = facts.options, _batch_sizes(facts), []
    for nodes, world in zip(range(options.nodes[0], options.nodes[1] + 1), options.world_sizes, strict=True):
        unit = "GPU" if options.gpus_per_node else "task"
        ranks = f"{count(nodes, 'node')} x {count(options.tasks_per_node, unit)} = {count(world, 'rank')}"
        odd = {name: size for name, size in sizes.items() if size % world}
        if odd:
            uneven = join_words([f"{name}={size}" for name, size in odd.items()])
            raise ValueError(f"{ranks} do not divide {uneven}: {_even_counts(facts, sizes, world)}")
        found.append("; ".join([ranks, *(f"{name}={size} is {size // world} a rank" for name, size in sizes.items())]))
    return [Finding(OK, "ranks", text) for text in found]


def _batch_sizes(facts: Facts) -> dict[str, int]:
    """Those that the run's datasets have: of the store where there is one, else of the recipe."""
    batch, datasets = facts.settings.batch, facts.settings.data.datasets
    if facts.store is not None:
        kinds = {RULES[table.task_type].symmetric for table in facts.store.datasets}
    elif datasets and all(d.type for d in datasets):
        kinds = {RULES[d.type].symmetric for d in datasets}
    else:
        kinds = {False, True}
    sizes = {"batch.queries": batch.queries} if False in kinds else {}
    return sizes | ({"batch.symmetric_queries": batch.symmetric_queries} if True in kinds else {})


def _even_counts(facts: Facts, sizes: dict[str, int], world: int) -> str:
    """The remedy: nearest numbers of nodes, or of ranks, that divide every batch size."""
    common, per_node = math.gcd(*sizes.values()), facts.options.tasks_per_node
    nodes = [n for n in range(1, common // per_node + 1) if common % (n * per_node) == 0]
    if nodes:
        near = f"with {count(per_node, 'rank')} a node, {join_words(_nearest(nodes, world / per_node))} nodes"
    else:
        near = f"{join_words(_nearest([n for n in range(1, common + 1) if common % n == 0], world))} ranks"
    return f"{near} would do; or make each a multiple of {world}"


def _nearest(counts: list[int], wanted: float) -> list[int]:
    below, above = [n for n in counts if n < wanted], [n for n in counts if n > wanted]
    return below[-1:] + above[:1]


def check_sharding(facts: Facts) -> str:
    """The DeepSpeed JSON can be read, and gives exact gradients."""
    run = facts.settings.run
    require_exact(run.deepspeed, run.keep_graphs)
    return f"ZeRO-{zero_stage(read_deepspeed_json(run.deepspeed))} ({run.deepspeed})"


def check_store(facts: Facts) -> list[Finding]:
    """The store is this recipe's, or preprocessing will make it from files that are there."""
    path = facts.settings.data.store
    if facts.has_store:
        if facts.no_store:
            raise ValueError(facts.no_store)
        assert facts.store is not None and facts.schedule is not None
        steps, asked = facts.schedule.steps_per_epoch, "preprocess" in facts.stages
        needed = "preprocess will find it up to date" if asked else "no preprocess stage is needed"
        text = f"{path}: {len(facts.store.datasets)} datasets, {steps:,} steps an epoch, this recipe's; {needed}"
        warm_up, total = facts.settings.optim.warmup_steps, facts.total_steps or steps
        late = Finding(NOTE, "store", f"optim.warmup_steps={warm_up}, but the run has {total} steps")
        return [Finding(OK, "store", text), *([late] if warm_up >= total else [])]
    if "preprocess" not in facts.stages:
        raise ValueError(
            f"data.store={path} does not exist, and preprocess is not among --stages {','.join(facts.stages)}: add it, "
            "or name a finished store"
        )
    data = facts.settings.data
    on_hub = tuple(d for d in data.datasets if d.path.startswith(HUB_PREFIX))
    local = replace(data, datasets=tuple(d for d in data.datasets if d not in on_hub))
    sources = find_sources(replace(facts.settings, data=local))
    found = [Finding(OK, "store", f"{path}: preprocess makes it from {len(sources)} datasets of {data.root}")]
    if on_hub:
        names = join_words([d.name for d in on_hub])
        text = f"raw rows of {names} are on the hub: compute nodes need them in its cache, or a network"
        found.append(Finding(UNCHECKED, "store", text))
    return [*found]


def check_model(facts: Facts) -> list[Finding]:
    """A folder holds a whole model; a hub name lies in the cache."""
    name = facts.settings.model.name
    if not name.startswith("/"):
        if has_config(name):
            return [Finding(OK, "model", f"{name}, in the hub's cache; jobs must see the same HF_HOME")]
        text = f"{name} is not in this machine's hub cache; jobs have no network: bge-icl fetch brings it"
        return [Finding(NOTE, "model", text)]
    if not has_config(name):
        raise ValueError(f"model.name={name} holds no config.json; bge-icl fetch brings a model into a folder")
    if not weight_files(Path(name)):
        raise ValueError(f"model.name={name} holds no weights (model.safetensors, pytorch_model.bin); fetch them")
    return [Finding(OK, "model", name)]


def check_tasks(facts: Facts) -> list[Finding]:
    """Evaluation tasks are folders with task.json; there is a model to score."""
    if "train" not in facts.stages and not holds_embedder(facts.run):
        raise ValueError(f"{facts.run} holds no trained model, so there is nothing to evaluate; add train to --stages")
    found = []
    for task in facts.tasks:
        require_one_line("--task", task)
        if not task.startswith("/"):
            text = f"{task}: a name of mteb's; its data must be in the nodes' cache, or BGE_ICL_EVALUATE name copies"
            found.append(Finding(UNCHECKED, "tasks", text))
        elif not (Path(task) / "task.json").is_file():
            raise ValueError(f"--task {task}: no folder with task.json; README, Evaluation, says what it holds")
        else:
            read_task_header(Path(task))
            found.append(Finding(OK, "tasks", f"{task}, {_require_task_examples(Path(task), facts)}"))
    return found


def _require_task_examples(task: Path, facts: Facts) -> str:
    """ValueError where the task has fewer examples than few_shot will want: that would show after training only."""
    options, file = facts.options.evaluate_options, task / "examples.jsonl"
    number = re.search(r"--num-examples[= ]+(\d+)", options)
    wanted = int(number[1]) if number else TASK_EXAMPLES
    with_examples = not re.search(r"--modes[= ]+zero_shot(\s|$)", options)
    there = sum(1 for _ in read_json_lines(file)) if file.is_file() else 0
    if with_examples and 0 < there < wanted:
        raise ValueError(
            f"--task {task} has {there} in examples.jsonl, and few_shot takes {wanted}: give --evaluate-options="
            f"'--num-examples {there}', or add some"
        )
    return f"zero-shot and with {wanted} examples" if with_examples and there else "zero-shot"


def check_memory(facts: Facts) -> list[Finding]:
    """The planner's estimate of a GPU's memory, and what else it has to say."""
    case = facts.case
    if case is None or facts.workload is None:
        return [Finding(UNCHECKED, "memory", f"not estimated: {facts.no_case}")]
    from pipeline.planning.advice import warnings
    from pipeline.planning.estimate import USABLE, plan_cost, plan_memory

    memory, card = plan_memory(case), case.cluster.gpu_gib
    need, host = memory.peak / GIB, sum(memory.host.values()) / GIB
    notes = warnings(case, facts.settings)
    if need > card:
        raise ValueError(f"the run {next(note for note in notes if note.startswith('does not fit'))}")
    load, cost, nodes = case.load, plan_cost(case), case.cluster.nodes
    unit = "pairs" if case.shape.exits else "sequences"
    step = f"{load.queries} queries, {load.sequences:,.0f} {unit}, {load.tokens:,.0f} tokens, {cost.chunks} chunks"
    epochs = "" if facts.schedule is None else f"; {facts.schedule.steps_per_epoch:,} steps an epoch"
    text = f"{need:.1f} GiB of {USABLE * card:.1f} usable on a GPU, {host:.1f} GiB of a node's own; estimated for "
    text += count(nodes, "node")
    return [
        Finding(OK, "step", f"{step} a rank of at most {case.chunk_tokens} tokens ({facts.workload.source}){epochs}"),
        Finding(OK, "memory", text),
        *(Finding(NOTE, "memory", note) for note in notes),
    ]


def check_time(facts: Facts) -> list[Finding]:
    """A start comes at least from one checkpoint to the next."""
    if facts.pace is None:
        return [Finding(UNCHECKED, "time", f"seconds of a step are not known: {facts.no_case}")]
    left = None if facts.total_steps is None else max(0, facts.total_steps - facts.done_steps)
    save_every = facts.settings.run.save_every
    gpus = facts.options.nodes[0] * facts.options.gpus_per_node
    text = require_time(facts.limit, facts.lead, facts.pace, facts.saving, left, save_every, gpus)
    return [Finding(OK, "time", text)]


def check_lead(facts: Facts) -> list[Finding]:
    """The signal before the time limit leaves room for one chunk and one checkpoint."""
    text = require_lead(facts.lead, facts.limit, facts.pace, facts.saving)
    if facts.pace is None or facts.saving is None:
        reason = facts.no_saving if facts.saving is None else f"seconds of a chunk: {facts.no_case}"
        return [Finding(UNCHECKED, "signal", f"{text}; whether that is enough is not known: {reason}")]
    return [Finding(OK, "signal", text)]
