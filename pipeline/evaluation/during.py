"""Scores while training: a log of its own in the run folder, and which model was the best."""

import json
from pathlib import Path
from statistics import mean

from pipeline.evaluation.runner import score_modes
from pipeline.evaluation.tasks import RetrievalTask
from pipeline.files import write_text
from pipeline.inference.embedder import FewShotEmbedder

LOG = "evaluation.jsonl"


def score_task(embedder: FewShotEmbedder, task: RetrievalTask, num_examples: int) -> dict[str, float]:
    """`task/mode` -> the task's metric; few-shot where the task has examples and num_examples is not 0."""
    shots = num_examples if task.examples else 0
    modes = ("zero_shot", "few_shot") if shots else ("zero_shot",)
    return {f"{task.name}/{mode}": value for mode, value in score_modes(embedder, task, modes, shots).items()}


def record_scores(folder: Path, step: int, scores: dict[str, float]) -> bool:
    """Add a line to the log; whether these are the best so far, by the mean of the few-shot scores (else of all).

    Lines of this step and later ones, which a run that went on from a checkpoint does again, give way; those of other
    tasks or modes are not compared.
    """
    shown = [value for name, value in scores.items() if name.endswith("/few_shot")] or list(scores.values())
    path = folder / LOG
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    lines = [line for line in lines if line["step"] < step]
    best = all(mean(shown) > line["mean"] for line in lines if line["scores"].keys() == scores.keys())
    lines.append({"step": step, "mean": mean(shown), "best": best, "scores": scores})
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return best
