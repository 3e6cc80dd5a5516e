"""Scores as a table, plain or in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.evaluation.public import find_paper_scores

MODES = ("zero_shot", "few_shot")
DIFFERENCE = "gain"
Task = tuple[str, str]  # (name, metric)


@dataclass(frozen=True)
class Score:
    """One number: `model` is before or after training (or any label), `mode` is zero_shot or few_shot."""

    model: str
    mode: str
    task: str
    metric: str
    value: float
    kind: str = ""  # type of the task
    novelty: str = ""  # trained-on, same family or unseen, where it is known what the model was trained on
    sides: str = ""  # which texts carried prompts
    fingerprint: str = ""  # of the model's content
    details: str = ""  # file in evaluation/ that tells how the score came about

    @property
    def name(self) -> tuple[str, str, str, str]:
        """What a file of scores holds once."""
        return self.model, self.mode, self.task, self.metric


def score_rows(scores: Sequence[Score]) -> list[list[str]]:
    """A row for each task and metric, heading first; for each model zero-shot, few-shot and what examples gain.

    Where there are several tasks, rows with means follow: over all of them, over those of each novelty and of each
    type. Public tasks have the paper's scores beside them (arXiv 2409.15700, tables 8 and 9).
    """
    tasks: list[Task] = list(dict.fromkeys((score.task, score.metric) for score in scores))
    columns = _columns(scores) | _paper_columns(tasks)
    novelty = _agreed_novelty(scores)
    kind = {(s.task, s.metric): s.kind for s in scores if s.kind}
    rows = [["task", "metric", *(["novelty"] if novelty else []), *columns]]
    for task in tasks:
        marks = [novelty.get(task, "")] if novelty else []
        rows.append([*task, *marks, *(_mean(name, column, [task]) for name, column in columns.items())])
    groups = {"all": tasks}
    for mark in (novelty, kind):
        groups |= {group: [task for task in tasks if mark.get(task) == group] for group in sorted(set(mark.values()))}
    for group, members in groups.items():
        means = [_mean(name, column, members) for name, column in columns.items()]
        if len(tasks) > 1 and any(means) and (group == "all" or 1 < len(members) < len(tasks)):
            rows.append([f"mean of {len(members)}: {group}", "", *([""] if novelty else []), *means])
    return rows


def score_table(scores: Sequence[Score]) -> str:
    """The scores as aligned plain text."""
    return plain_table(score_rows(scores))


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, heading first, as aligned text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(scores: Sequence[Score]) -> list[str]:
    """The scores as lines of Markdown."""
    rows = score_rows(scores)
    heading, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return [heading, "|---" * len(rows[0]) + "|", *lines]


def _columns(scores: Sequence[Score]) -> dict[str, dict[Task, float]]:
    """Heading -> task -> value."""
    columns: dict[str, dict[Task, float]] = {}
    for model in dict.fromkeys(score.model for score in scores):
        found = {
            mode: {(s.task, s.metric): s.value for s in scores if (s.model, s.mode) == (model, mode)} for mode in MODES
        }
        columns |= {f"{model} {mode.replace('_', '-')}": found[mode] for mode in MODES if found[mode]}
        zero, few = (found[mode] for mode in MODES)
        if zero and few:
            sides = {s.name: s.sides for s in scores}
            asked = {task: {sides.get((model, mode, *task)) for mode in MODES} for task in few if task in zero}
            alike = [task for task, found in asked.items() if len(found) == 1]
            columns[f"{model} {DIFFERENCE}"] = {task: few[task] - zero[task] for task in alike}
    return columns


def _agreed_novelty(scores: Sequence[Score]) -> dict[Task, str]:
    """Task -> its mark, where all models that have one have the same."""
    marks: dict[Task, set[str]] = {}
    for s in scores:
        if s.novelty:
            marks.setdefault((s.task, s.metric), set()).add(s.novelty)
    return {task: next(iter(found)) for task, found in marks.items() if len(found) == 1}


def _paper_columns(tasks: Sequence[Task]) -> dict[str, dict[Task, float]]:
    """The paper's scores of these tasks, 0..1 as all others here."""
    columns: dict[str, dict[Task, float]] = {}
    for task in tasks:
        for name, points in find_paper_scores(task[0]).items():
            columns.setdefault(f"paper {name.replace('_', '-')}", {})[task] = points / 100
    return columns


def _mean(name: str, column: dict[Task, float], tasks: Sequence[Task]) -> str:
    """Empty unless every task has a value: a mean over fewer tasks would be compared with one over all."""
    if any(task not in column for task in tasks):
        return ""
    mean = sum(column[task] for task in tasks) / len(tasks)
    return f"{mean:+.4f}" if name.endswith(DIFFERENCE) else f"{mean:.4f}"
