"""How long a step, a chunk and a checkpoint take: measured where the run has steps, else by the planner's formulas.

Planning needs torch, so it is imported where it is called: `submit --help` and plain errors come at once.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cluster.disk import checkpoint_bytes
from pipeline.cluster.options import Options
from pipeline.cluster.run_folder import read_attempts, read_steps
from pipeline.cluster.wording import format_time
from pipeline.prompts import get_template
from pipeline.runtime.sharding_json import read_deepspeed_json
from pipeline.settings import Settings, load_settings

if TYPE_CHECKING:
    from pipeline.data.sampling import Schedule
    from pipeline.data.store import TokenStore
    from pipeline.model.shapes import ModelShape
    from pipeline.planning.cases import Workload
    from pipeline.planning.estimate import Case

LEAD = 300  # seconds
SLACK = 30  # seconds: the job script looks once a second, srun passes the signal on, ranks agree, the requeue is sent
FIRST_STEPS = 2  # of an attempt: slow (allocation, compilation)
ENOUGH_STEPS = 3


@dataclass(frozen=True)
class Pace:
    """Seconds of a mean step, and of one chunk: what a rank does between two looks at its signals."""

    step: float
    chunk: float
    source: str


@dataclass(frozen=True)
class Saving:
    """What a checkpoint takes: bytes, and seconds at the stated bandwidth."""

    num_bytes: int
    seconds: float
    source: str


def measured_pace(run: Path, world_size: int, settings: Settings) -> Pace | None:
    """Of the last attempt on so many ranks and with the same chunks; None where there is none with enough steps."""
    (rows, _), before = read_steps(run / "metrics.jsonl"), run / "settings.yaml"
    if not rows or not before.is_file() or load_settings(before).run.chunk_tokens != settings.run.chunk_tokens:
        return None
    last = math.inf
    for attempt in reversed(read_attempts(run)):
        if attempt.stage != "train" or attempt.before is None:
            continue
        mine = [row for row in rows if attempt.before + FIRST_STEPS <= row["step"] < last]
        if attempt.ranks == world_size and len(mine) >= ENOUGH_STEPS:
            step = statistics.median(row["seconds"] for row in mine)
            chunk = statistics.median(row["seconds"] / max(1, row["chunks"]) for row in mine)
            return Pace(step, chunk, f"median of {len(mine)} steps of attempt {attempt.name}")
        last = min(last, attempt.before)
    return None


def estimated_case(
    settings: Settings,
    options: Options,
    arguments: argparse.Namespace,
    store: TokenStore | None,
    schedule: Schedule | None,
) -> tuple[Case, Workload]:
    """What the planner reckons with, on the fewest nodes that the job may get; ValueError says why there is none."""
    if not options.gpus_per_node:
        raise ValueError("the formulas are those of GPUs")
    if settings.model.trained == "full":
        raise ValueError("model.trained=full: the formulas are those of LoRA")
    if arguments.query_tokens is None and schedule is None:
        raise ValueError("there is no token store yet: state --query-tokens and --passage-tokens")
    shape = model_shape(settings, store)
    from pipeline.planning.cases import make_case
    from pipeline.planning.flags import check_flags, read_cluster, read_workload
    from pipeline.planning.sharding import read_sharding

    hardware = {"nodes": options.nodes[0], "gpus_per_node": options.gpus_per_node, "estimate": True}
    flags = argparse.Namespace(**vars(arguments) | hardware)
    check_flags(flags)
    workload = read_workload(flags, settings, shape.layers, store, schedule)
    sharding = read_sharding(read_deepspeed_json(settings.run.deepspeed))
    return make_case(settings, shape, sharding, read_cluster(flags), workload.load), workload


def estimated_pace(case: Case) -> Pace:
    """With no gathering hidden behind arithmetic: the longer of the planner's two times."""
    from pipeline.planning.estimate import plan_cost

    cost = plan_cost(case)
    step = cost.seconds[1]
    share = f"arithmetic at {case.cluster.utilisation:.0%} of {case.cluster.flops / 1e12:,.0f} TFLOP/s"
    return Pace(step, step / cost.chunks, f"estimated, {share}, no traffic hidden")


def model_shape(settings: Settings, store: TokenStore | None) -> ModelShape:
    """ValueError where the model's config.json cannot be read, or is of no known form. Nothing is downloaded."""
    if not has_config(settings.model.name):
        raise ValueError(f"model.name={settings.model.name} has no config.json here; bge-icl fetch brings it")
    if settings.model.kind == "reranker":
        from pipeline.model.reranker import read_reranker_shape

        return read_reranker_shape(settings.model)
    from pipeline.model.shapes import read_shape

    # Whether the model knows the template's markers already is known to the store only; three rows are nothing.
    markers = len(get_template(settings.preprocess.template).markers)
    if store is not None:
        markers = sum(1 for subtokens in store.manifest.tokens.marker_subtokens if subtokens)
    return read_shape(settings.model, markers)


def has_config(model: str) -> bool:
    """Whether config.json lies in the model's folder, or for a name in the hub's cache."""
    if model.startswith("/"):
        return (Path(model) / "config.json").is_file()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json"), str)


def saving_of(newest: Path | None, settings: Settings, store: TokenStore | None, options: Options) -> Saving:
    """Of the newest checkpoint, or where there is none by the model's shape. ValueError: it is not known."""
    if newest is not None:
        num_bytes, source = sum(file.stat().st_size for file in newest.iterdir() if file.is_file()), newest.name
    else:
        num_bytes, source = checkpoint_bytes(model_shape(settings, store)), "12 bytes of each trained number"
    return Saving(num_bytes, num_bytes / (options.storage_mb_per_s * 1e6), source)


def least_lead(pace: Pace, saving: Saving) -> int:
    """Seconds that a run needs from the signal to the end of its job."""
    return math.ceil(pace.chunk + saving.seconds + SLACK)


def choose_lead(options: Options, limit: float, pace: Pace | None, saving: Saving | None) -> int:
    """--lead; by default LEAD, or twice what it takes, and at most half of the time limit."""
    if options.lead is not None:
        return options.lead
    wanted = 2 * least_lead(pace, saving) if pace and saving else 0
    return int(min(max(LEAD, wanted), limit / 2))


def require_lead(lead: int, limit: float, pace: Pace | None, saving: Saving | None) -> str:
    """How the lead compares with what it is for; ValueError where it is too short, or as long as the job."""
    if lead >= limit:
        raise ValueError(
            f"--lead {lead} s is as long as --time {format_time(limit)}: the job would be told to stop at its start; "
            "lower --lead or raise --time"
        )
    if not pace or not saving:
        return f"{lead} s before the time limit"
    least = least_lead(pace, saving)
    parts = f"{pace.chunk:.1f} s a chunk + {saving.seconds:.1f} s a checkpoint + {SLACK} s"
    if lead < least:
        remedy = f"--lead {2 * least}" if 2 * least < limit / 2 else f"a longer --time and --lead {2 * least}"
        raise ValueError(
            f"the signal comes {lead} s before the time limit, and stopping takes {least} s ({parts}): what is done "
            f"since the last checkpoint would be lost; give {remedy}, or lower run.chunk_tokens"
        )
    return f"{lead} s before the time limit; stopping takes {least} s ({parts})"


def require_time(
    limit: float, lead: int, pace: Pace, saving: Saving | None, steps_left: int | None, save_every: int, gpus: int
) -> str:
    """Hours, GPU-hours and requeues; ValueError where a start would not come from one checkpoint to the next."""
    save = saving.seconds if saving else 0.0
    usable, interval = limit - lead, save_every * pace.step + save
    if steps_left is not None:
        interval = min(interval, steps_left * pace.step + save)
    if usable < interval:
        fitting = int((usable - save) / pace.step)
        remedy = f"run.save_every={fitting}" if fitting > 0 else "more nodes"
        raise ValueError(
            f"--time {format_time(limit)}, less {lead} s for stopping, is shorter than one checkpoint interval: "
            f"run.save_every={save_every} steps of {pace.step:.1f} s and {save:.1f} s for saving are "
            f"{format_time(interval)}; give --time {format_time(2 * interval + lead)} or more, or {remedy}"
        )
    text = f"a step {pace.step:.2f} s ({pace.source})"
    if steps_left is None:
        return f"{text}; steps of the run not known"
    total = steps_left * pace.step + steps_left / save_every * save
    starts = max(1, math.ceil(total / usable))
    again = "no requeue" if starts == 1 else f"{starts - 1} requeue{'s' * (starts > 2)}"
    hours = f" ({total * gpus / 3600:,.0f} GPU-hours)" if gpus else ""
    return (
        f"{text}; {steps_left:,} steps left: {format_time(total)}{hours} in all, {format_time(limit)} a start: "
        f"{again} expected (loading and evaluation not counted)"
    )
