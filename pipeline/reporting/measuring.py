"""Everything that a report shows of a store, measured: numbers here, HTML elsewhere."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.data.eval_texts import EvaluationTexts, folder_texts
from pipeline.data.parallel import run_tasks
from pipeline.data.sampling import Schedule
from pipeline.data.schedule import DatasetSchedule
from pipeline.data.store import DatasetEntry, DatasetTable, TokenStore
from pipeline.prompts import Template
from pipeline.reporting.overlap import (
    Overlap,
    TrainingTexts,
    find_overlap,
    share_of_queries_seen,
    training_stride,
    training_texts,
)
from pipeline.reporting.plans import PlanSample, ShownPrompt, sample_plans, sample_prompts, sample_steps
from pipeline.reporting.rows import TeacherScores, count_sizes, teacher_scores
from pipeline.reporting.texts import DatasetTexts, blocks, dataset_texts, shared_texts, use_stride

Task = TypeVar("Task")
Result = TypeVar("Result")

SHOWN_BAD_ROWS = 8


@dataclass(frozen=True)
class MeasuredDataset:
    """One dataset: what the manifest says, and what was counted."""

    entry: DatasetEntry
    table: DatasetTable
    schedule: DatasetSchedule
    texts: DatasetTexts
    instructions: tuple[tuple[int, int], ...]  # (index into the store's instructions, rows), most used first
    positives: np.ndarray  # int64: rows with 0, 1, 2, ... positives
    negatives: np.ndarray
    teacher: TeacherScores | None
    plans: PlanSample
    prompts: tuple[ShownPrompt, ...]  # none where no step of the dataset was found


@dataclass(frozen=True)
class MeasuredEvaluation:
    """Overlap of one evaluation set with each dataset."""

    texts: EvaluationTexts
    overlaps: tuple[Overlap, ...]  # in the order of the datasets
    share_of_queries_seen: float


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    store: TokenStore
    schedule: Schedule
    template: Template
    datasets: tuple[MeasuredDataset, ...]
    text_stride: int  # every n-th text was counted
    shared_queries: np.ndarray  # int64 [D, D]
    shared_positives: np.ndarray
    evaluations: tuple[MeasuredEvaluation, ...]
    training: tuple[TrainingTexts, ...]  # of each dataset; none without evaluations
    overlap_stride: int  # of the counted texts every n-th was compared with the evaluations
    bad_reasons: tuple[tuple[str, int], ...]  # of quarantined rows, most frequent first
    bad_rows: tuple[dict[str, Any], ...]  # the first of them


def measure(
    store: TokenStore, schedule: Schedule, template: Template, evaluation_folders: Sequence[Path], bars: bool
) -> Report:
    """Measure a store under a recipe's schedule; ValueError for an evaluation folder that cannot be read."""
    read = _each(lambda folder: folder_texts(folder, "--eval"), evaluation_folders, "read evaluation sets", bars)
    evaluations = [texts for sets in read for texts in sets]
    stride = use_stride(store)
    steps = sample_steps(schedule)

    def dataset(d: int) -> MeasuredDataset:
        table = store.datasets[d]
        return MeasuredDataset(
            entry=store.manifest.datasets[d],
            table=table,
            schedule=schedule.datasets[d],
            texts=dataset_texts(table, stride),
            instructions=_instructions(table),
            positives=count_sizes(table.pos_offsets),
            negatives=count_sizes(table.neg_offsets),
            teacher=teacher_scores(table),
            plans=sample_plans(store, schedule, steps[d]),
            prompts=tuple(sample_prompts(store, schedule, steps[d][0])) if steps[d] else (),
        )

    datasets = _each(dataset, range(len(store.datasets)), "count rows, texts and plans", bars)
    texts = [d.texts for d in datasets]
    overlap_stride, training = training_stride(texts), list[TrainingTexts]()
    if evaluations:
        training = _each(lambda t: training_texts(store, t, overlap_stride), texts, "normalize training texts", bars)
    bad_reasons, bad_rows = read_quarantine(store.path / "quarantine.jsonl")
    return Report(
        store=store,
        schedule=schedule,
        template=template,
        datasets=tuple(datasets),
        text_stride=stride,
        shared_queries=shared_texts([t.query for t in texts]),
        shared_positives=shared_texts([t.positive for t in texts]),
        evaluations=tuple(
            MeasuredEvaluation(e, tuple(find_overlap(t, e) for t in training), share_of_queries_seen(training, e))
            for e in evaluations
        ),
        training=tuple(training),
        overlap_stride=overlap_stride,
        bad_reasons=bad_reasons,
        bad_rows=bad_rows,
    )


def _instructions(table: DatasetTable) -> tuple[tuple[int, int], ...]:
    """How many rows have each instruction."""
    count: Counter[int] = Counter()
    for block in blocks(table.instruction_N):
        index, rows = np.unique(block, return_counts=True)
        count.update(dict(zip(index.tolist(), rows.tolist(), strict=True)))
    return tuple(count.most_common())


def _each(function: Callable[[Task], Result], tasks: Iterable[Task], title: str, bars: bool) -> list[Result]:
    """Results of all tasks, in this process, with a progress bar."""
    tasks = list(tasks)
    return run_tasks(None, function, tasks, title, bars and bool(tasks), len(tasks))


def read_quarantine(path: Path) -> tuple[tuple[tuple[str, int], ...], tuple[dict[str, Any], ...]]:
    """(reasons with their counts, most frequent first; the first rows) of a quarantine file."""
    reasons: Counter[str] = Counter()
    first: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            reasons[row["reason"]] += 1
            if len(first) < SHOWN_BAD_ROWS:
                first.append(row)
    return tuple(reasons.most_common()), tuple(first)
