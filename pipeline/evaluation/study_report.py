"""Tables and plots of studies: means over draws, with their spread."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.evaluation.studies import Record
from pipeline.evaluation.study_arms import EXPLAINED, ZERO
from pipeline.files import write_atomic, write_text

Summary = dict[tuple[str, str], tuple[float, float | None]]  # (arm, task) -> (mean, standard deviation)
TITLES = {
    "shots": "Score against the number of examples",
    "content": "Content or length",
    "labels": "Labels or the list of labels",
    "choice": "Choice and order",
}


def summarize(records: Sequence[Record], field: str = "value") -> Summary:
    """Mean and sample standard deviation over the distinct draws of each arm and task; None: there is one draw."""
    groups: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        groups.setdefault((record["arm"], record["task"]), {})[record["key"]] = record[field]
    return {
        name: (statistics.mean(draws.values()), statistics.stdev(draws.values()) if len(draws) > 1 else None)
        for name, draws in groups.items()
    }


def table(records: Sequence[Record], field: str = "value", digits: int = 4) -> list[str]:
    """Markdown: a row for each arm, a column for each task, mean +- standard deviation."""
    summary = summarize(records, field)
    arms, tasks = (list(dict.fromkeys(record[name] for record in records)) for name in ("arm", "task"))
    metrics = {record["task"]: record["metric"] for record in records}
    lines = ["| examples | " + " | ".join(f"{task} ({metrics[task]})" for task in tasks) + " |"]
    lines.append("|---" * (len(tasks) + 1) + "|")
    for arm in arms:
        cells = [_cell(summary[arm, task], digits) if (arm, task) in summary else "" for task in tasks]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def write_studies(out: Path, found: Mapping[str, Sequence[Record]], notes: Sequence[str]) -> Path:
    """Write DIR/studies.md and a plot for each study; returns the path of the former.

    Args:
        found: study -> its records of all tasks.
        notes: lines that say how the studies were made and what is missing.
    """
    any_record = next(record for records in found.values() for record in records)
    lines = ["# What in-context examples do", "", *(f"- {note}" for note in notes)]
    lines += [f"- {task}: {about}" for task, about in _tasks(found).items()]
    lines += [f"- {', '.join(f'{name} {number}' for name, number in any_record['versions'].items())}"]
    lines += ["", "Cells: mean +- sample standard deviation over distinct draws of examples; one number: one draw."]
    for study, records in found.items():
        plot(out / f"{study}.png", study, records)
        lines += ["", f"## {TITLES[study]}", "", *table(records), "", *_explained(study, records)]
        if study in ("shots", "content"):
            lines += ["Tokens of the examples in the prompt:", "", *table(records, "example_tokens", 1), ""]
        lines += [f"![{TITLES[study]}]({study}.png)", "", *(f"- {note}" for note in _model_notes(records))]
    write_text(out / "studies.md", "\n".join(lines).rstrip() + "\n")
    return out / "studies.md"


def plot(path: Path, study: str, records: Sequence[Record]) -> None:
    """One panel: scores by number of examples, or by arm the difference to zero-shot; bars are standard deviations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summary = summarize(records)
    arms, tasks = (list(dict.fromkeys(record[name] for record in records)) for name in ("arm", "task"))
    shown = arms if study == "shots" else [arm for arm in arms if arm != ZERO]
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for number, task in enumerate(tasks):
        zero = 0.0 if study == "shots" else summary[ZERO, task][0]
        mine = [(place, *summary[arm, task]) for place, arm in enumerate(shown) if (arm, task) in summary]
        aside = (0.1 if study == "shots" else 0.5) * ((number + 0.5) / len(tasks) - 0.5)
        style = "o-" if study == "shots" else "o"
        axis.errorbar(
            [place + aside for place, _, _ in mine],
            [mean - zero for _, mean, _ in mine],
            yerr=[math.nan if spread is None else spread for _, _, spread in mine],
            fmt=style,
            markersize=5,
            capsize=3,
            linewidth=1.3,
            label=f"{task} ({_metric(records, task)})",
        )
    axis.set_xticks(range(len(shown)), ["0" if arm == ZERO else arm.replace(" ", "\n") for arm in shown], fontsize=8)
    if study == "shots":
        axis.set(xlabel="examples in the prompt", ylabel="score")
    else:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(ylabel="score minus zero-shot")
    axis.grid(alpha=0.3, axis="y")
    axis.set_title(TITLES[study], fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None}))
    plt.close(figure)


def length_notes(records: Sequence[Record]) -> list[str]:
    """Where the arms of the content study are not of one length: tasks and the largest difference in tokens."""
    by_draw: dict[tuple[str, int], list[int]] = {}
    for record in records:
        if record["draw"] is not None:
            by_draw.setdefault((record["task"], record["draw"]), []).append(record["example_tokens"])
    worst: dict[str, int] = {}
    for (task, _), lengths in by_draw.items():
        worst[task] = max(worst.get(task, 0), max(lengths) - min(lengths))
    return [f"{task}: lengths differ by up to {number} tokens" for task, number in worst.items() if number]


def _cell(value: tuple[float, float | None], digits: int) -> str:
    mean, spread = value
    assert math.isfinite(mean)
    return f"{mean:.{digits}f}" + ("" if spread is None else f" +- {spread:.{digits}f}")


def _metric(records: Sequence[Record], task: str) -> str:
    return next(str(record["metric"]) for record in records if record["task"] == task)


def _tasks(found: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    return {r["task"]: f"{r['kind']}, {r['texts']}; {r['instruction']}" for records in found.values() for r in records}


def _explained(study: str, records: Sequence[Record]) -> list[str]:
    """What the arms are, as far as they are there."""
    k = max(record["num_examples"] for record in records)
    there = {record["arm"].split(",")[0] for record in records}
    lines = [f"- **{arm}**: {text.replace('{k}', str(k))}" for arm, text in EXPLAINED[study].items() if arm in there]
    return [*lines, ""] if lines else []


def _model_notes(records: Sequence[Record]) -> list[str]:
    """What was cut, left out or too long: task, arms, note."""
    said: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for note in record["notes"]:
            said.setdefault((record["task"], note), []).append(record["arm"])
    return [f"{task} ({'; '.join(dict.fromkeys(arms))}): {note}" for (task, note), arms in said.items()]
