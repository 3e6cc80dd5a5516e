"""Scores while training: a log of its own in the run folder, and which model was the best."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from pipeline.evaluation.tasks import LocalTask
from pipeline.files import write_text
from pipeline.inference.embedder import FewShotEmbedder

LOG = "evaluation.jsonl"


def score_task(embedder: FewShotEmbedder, task: LocalTask, num_examples: int) -> dict[str, float]:
    """`task/mode` -> the task's metric; few-shot where the task has examples and num_examples is not 0."""
    from pipeline.evaluation.runner import score_modes  # mteb takes seconds to load

    shots = num_examples if task.examples else 0
    modes = ("zero_shot", "few_shot") if shots else ("zero_shot",)
    return {f"{task.name}/{mode}": value for mode, value in score_modes(embedder, task, modes, shots).items()}


def is_scored(folder: Path, step: int) -> bool:
    """Whether the log has scores of the model after `step` steps."""
    return any(line["step"] == step for line in _read(folder))


def is_best(folder: Path, step: int, scores: dict[str, float]) -> bool:
    """Whether these are the best so far, by the mean of the few-shot scores (else of all).

    Steps from this one on, which a run that went on from a checkpoint does again, do not count; nor do scores of other
    tasks or modes.
    """
    alike = [line for line in _read(folder) if line["step"] < step and line["scores"].keys() == scores.keys()]
    return all(_mean(scores) > line["mean"] for line in alike)


def record_scores(folder: Path, step: int, scores: dict[str, float], best: bool) -> None:
    """Add a line to the log, in place of those of this step and later ones."""
    lines = [line for line in _read(folder) if line["step"] < step]
    lines.append({"step": step, "mean": _mean(scores), "best": best, "scores": scores})
    write_text(folder / LOG, "".join(json.dumps(line) + "\n" for line in lines))


def _mean(scores: dict[str, float]) -> float:
    return mean([value for name, value in scores.items() if name.endswith("/few_shot")] or scores.values())


def _read(folder: Path) -> list[dict[str, Any]]:
    path = folder / LOG
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
