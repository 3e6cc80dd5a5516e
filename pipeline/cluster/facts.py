"""What is known of a run before it is submitted: store, schedule, checkpoint, pace; and of each why it is not known."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cluster.options import Options, choose_stages
from pipeline.cluster.pace import (
    Pace,
    Saving,
    choose_lead,
    estimated_case,
    estimated_pace,
    measured_pace,
    saving_of,
)
from pipeline.cluster.run_folder import newest_checkpoint
from pipeline.cluster.wording import parse_time
from pipeline.data.schedule import make_schedule
from pipeline.data.store import open_store, require_match
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.data.sampling import Schedule
    from pipeline.data.store import TokenStore
    from pipeline.planning.cases import Workload
    from pipeline.planning.estimate import Case


@dataclass(frozen=True)
class Facts:
    """Of a run; each `no_...` says why the value beside it is None."""

    settings: Settings
    options: Options
    stages: tuple[str, ...]
    tasks: tuple[str, ...]  # to evaluate on: folders, or names of mteb's
    has_store: bool
    store: TokenStore | None
    no_store: str
    schedule: Schedule | None
    newest: Path | None  # checkpoint; what is in it was not read
    done_steps: int
    case: Case | None
    workload: Workload | None
    no_case: str
    pace: Pace | None
    saving: Saving | None
    no_saving: str
    lead: int  # seconds

    @property
    def run(self) -> Path:
        return Path(self.settings.run.output_dir)

    @property
    def limit(self) -> float:
        """Seconds of one start of training."""
        return parse_time("--time", self.options.time["train"])

    @property
    def total_steps(self) -> int | None:
        optim = self.settings.optim
        if optim.max_steps is None and self.schedule is not None:
            return math.ceil(optim.epochs * self.schedule.steps_per_epoch)
        return optim.max_steps or (self.workload.steps if self.workload else None)


def find_facts(settings: Settings, options: Options, arguments: argparse.Namespace) -> Facts:
    """ValueError for stages that make no sense; everything else that is wrong is for the checks."""
    run = Path(settings.run.output_dir)
    if settings.model.kind == "reranker":
        _require_no_evaluation(arguments)
    tasks = tuple(_resolved(task) for task in arguments.task or settings.evaluation.tasks)
    has_store = _is_there(Path(settings.data.store))
    stages = choose_stages(arguments.stages, has_store, len(tasks))
    store, schedule, no_store = _open(settings) if has_store else (None, None, "there is no token store yet")
    found = newest_checkpoint(run / "checkpoints")
    newest = run / "checkpoints" / found.name if found else None

    case, workload, no_case = None, None, ""
    try:
        case, workload = estimated_case(settings, options, arguments, store, schedule)
    except ValueError as error:
        no_case = str(error)
    pace = measured_pace(run, options.world_sizes[0], settings) or (estimated_pace(case) if case else None)
    saving, no_saving = None, ""
    try:
        saving = saving_of(newest, settings, store, options)
    except ValueError as error:
        no_saving = str(error)
    return Facts(
        settings=settings,
        options=options,
        stages=stages,
        tasks=tasks,
        has_store=has_store,
        store=store,
        no_store=no_store,
        schedule=schedule,
        newest=newest,
        done_steps=found.step if found else 0,
        case=case,
        workload=workload,
        no_case=no_case,
        pace=pace,
        saving=saving,
        no_saving=no_saving,
        lead=choose_lead(options, parse_time("--time", options.time["train"]), pace, saving),
    )


def _require_no_evaluation(arguments: argparse.Namespace) -> None:
    """A chain knows neither the retriever nor the settings that `bge-icl rerank` scores a reranker with."""
    asked = {"--task": arguments.task, "--stages": "evaluate" in (arguments.stages or "")}
    if flags := [flag for flag, is_asked in asked.items() if is_asked]:
        raise ValueError(
            f"{flags[0]} asks for an evaluation, which a chain has none of for model.kind=reranker: leave it out; "
            "bge-icl rerank scores the trained one, behind a retriever that you name"
        )


def _open(settings: Settings) -> tuple[TokenStore | None, Schedule | None, str]:
    """Store and schedule, or why the recipe cannot be trained on that store."""
    try:
        store = open_store(settings.data.store, verify=False)
        # Training compares the tokenizer too.
        require_match(store, settings, store.manifest.fingerprint)
        return store, make_schedule(store, settings), ""
    except (ValueError, OSError) as error:
        return None, None, str(error)


def _is_there(store: Path) -> bool:
    """Whether something lies where the store belongs: an empty folder is none, and preprocessing fills it."""
    return store.exists() and not (store.is_dir() and not any(store.iterdir()))


def _resolved(task: str) -> str:
    """A folder's absolute path: jobs run elsewhere. Names of mteb's stay as they are."""
    return str(Path(task).resolve()) if Path(task).exists() or "/" in task or task.startswith(".") else task
