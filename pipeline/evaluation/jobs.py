"""One task, in one mode, by one model: scored, or read back where the same was scored before.

Beside each score stands how it came about: a JSON file under a key made of everything that decides the score. The key
holds the model's content, never its folder's name; so a run that was cut off goes on, and any number of processes that
share the folder share the work.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from mteb.abstasks import AbsTask

from pipeline.evaluation.baselines import can_score
from pipeline.evaluation.memory import collect_notes
from pipeline.evaluation.mteb_tasks import as_mteb, data_revision, public_task
from pipeline.evaluation.novelty import mark_novelty
from pipeline.evaluation.public import find_examples, find_instruction
from pipeline.evaluation.runner import choose_examples, encoder_of, prompted, score_mteb
from pipeline.evaluation.sides import BARE, is_normalized
from pipeline.evaluation.table import Score
from pipeline.evaluation.tasks import LocalTask, content_digest
from pipeline.files import safe_name, take_lock, write_text
from pipeline.inference.embedder import Example, FewShotEmbedder

PROTOCOL = 2  # raised whenever this project scores the same task in another way: older scores are not taken then
PACKAGES = ("mteb", "torch", "transformers", "numpy", "scikit-learn")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A task with all that its scores depend on beside the model."""

    task: str
    kind: str  # as in sides.py
    metric: str
    instruction: str
    examples: tuple[Example, ...]  # of few_shot; none: few_shot is left out
    sides: str
    data: str  # digest of a folder's content, or name and revision of public data
    make: Callable[[], AbsTask]
    some_query: str  # "" where the data is not loaded yet
    about: str


@dataclass(frozen=True)
class Model:
    """What is scored: an embedder with prompts, or a baseline that mteb knows how to call."""

    label: str
    fingerprint: str
    embedder: FewShotEmbedder | None
    baseline: Any = None
    datasets: tuple[str, ...] | None = None  # names of what it was trained on; None: not known


def local_job(task: LocalTask, modes: Sequence[str], num_examples: int, sides: str) -> Job:
    """The job of a local folder; ValueError where few_shot is asked for and it has too few examples."""
    return Job(
        task=task.name,
        kind=task.kind,
        metric=task.metric,
        instruction=task.instruction,
        examples=choose_examples(task, num_examples) if "few_shot" in modes else (),
        sides=sides,
        data=content_digest(task),
        make=lambda: as_mteb(task, sides),
        some_query=task.some_query,
        about=task.describe(),
    )


def public_job(
    name: str, num_examples: int | None, sides: str, data_root: Path | None, examples_root: Path | None
) -> Job:
    """The job of a task of mteb, with the paper's instruction (else mteb's own).

    Args:
        num_examples: the first so many of the examples; None: all of them.
        examples_root: folder with MTEB/<task>.json; None: few_shot is left out.

    Raises:
        ValueError: mteb has no such task, or the folder no examples for it.
    """
    task, kind = public_task(name, sides, data_root)
    instruction = find_instruction(name)
    if instruction is None:
        given = task.metadata.prompt
        instruction = (given.get("query") if isinstance(given, dict) else given) or task.abstask_prompt
        log.info("%s: the paper has no instruction; mteb's is taken: %s", name, instruction)
    return Job(
        task=name,
        kind=kind,
        metric=task.metadata.main_score,
        instruction=instruction,
        examples=find_examples(name, examples_root / "MTEB")[:num_examples] if examples_root else (),
        sides=sides,
        data=data_revision(task, data_root),
        make=lambda: public_task(name, sides, data_root)[0],
        some_query="",
        about=f"{kind}, mteb's",
    )


def require_distinct_names(jobs: Sequence[Job]) -> None:
    """ValueError where two tasks have one name, under which scores are kept."""
    names = [job.task for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two tasks are named {', '.join(twice)}; give them names of their own in task.json")


def run_job(model: Model, job: Job, modes: Sequence[str], folder: Path, wait: bool = False) -> list[Score] | None:
    """The job's scores, in each mode that applies to it; what is not there yet is computed and stored.

    Returns:
        None where another process is at this job and this one is not to `wait` for it.
    """
    if model.baseline is not None and not can_score(model.baseline, job.kind):
        log.info("%s: %s cannot score a task of type %s; left out", job.task, model.label, job.kind)
        return []
    # The lock's file outlives the work: removing it would let two processes hold one of the same name each.
    name = f"{safe_name(job.task)}-{digest(model.fingerprint, job.data, job.sides)[:16]}"
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / "locks" / name, wait)
    if lock is None:
        return None
    memory, scores = folder / "embeddings" / name, []
    with lock:
        for mode in _modes(model, job, modes):
            path = folder / f"{safe_name(job.task)}-{mode}-{_key(model, job, mode)[:16]}.json"
            if path.is_file():
                record = _read(path)
                log.info("%s %s: %.4f, as scored on %s (%s)", job.task, mode, record["value"], record["date"], path)
            else:
                record = _score(model, job, mode, memory)
                write_text(path, json.dumps(record, indent=1, default=float) + "\n")
            novelty = "" if model.datasets is None else mark_novelty(job.task, job.kind, model.datasets)
            scores.append(
                Score(
                    model=model.label,
                    mode=mode,
                    task=job.task,
                    metric=job.metric,
                    value=record["value"],
                    kind=job.kind,
                    novelty=novelty,
                    sides=job.sides,
                    fingerprint=model.fingerprint,
                    details=path.name,
                )
            )
        shutil.rmtree(memory, ignore_errors=True)
    return scores


def _modes(model: Model, job: Job, modes: Sequence[str]) -> list[str]:
    """Baselines have no prompts, and some public tasks no examples."""
    if model.embedder is None:
        return ["zero_shot"]
    if "few_shot" in modes and not job.examples:
        log.info("%s: no examples are known, few_shot is left out", job.task)
    return [mode for mode in modes if mode == "zero_shot" or job.examples]


def _score(model: Model, job: Job, mode: str, memory: Path) -> dict[str, Any]:
    started = time.monotonic()
    examples = job.examples if mode == "few_shot" else ()
    scorer = model.baseline
    first: list[str] = []  # text with a prompt
    with collect_notes() as notes:
        if model.embedder is not None:
            encode = prompted(model.embedder, job.kind, job.instruction, examples, job.sides, memory)

            def encode_noting(texts: list[str], carry: str) -> np.ndarray:
                first.extend(texts[: carry != BARE and not first])
                return encode(texts, carry)

            scorer = encoder_of(encode_noting, job.kind, job.sides)
        value, scores = score_mteb(scorer, job.make())
    prompt = ""
    if model.embedder is not None and first:
        with collect_notes(quiet=True):  # counted above
            (ids,) = model.embedder.compose_queries(first, job.instruction, examples)
        prompt = model.embedder.render(ids)
    return {
        "value": value,
        "mode": mode,
        **{name: given for name, given in vars(job).items() if name not in ("make", "some_query", "examples")},
        "examples": [{"query": query, "response": response} for query, response in examples],
        "prompt_of_first_query": prompt,
        "normalized": is_normalized(job.sides, job.kind),
        "notes": notes,  # what was cut or dropped, and how often
        "model": model.label,
        "fingerprint": model.fingerprint,
        "versions": {name: version(name) for name in PACKAGES},
        "seconds": time.monotonic() - started,
        "date": time.strftime("%Y-%m-%d"),
        "scores": scores,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        float(record["value"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the task is scored again") from error
    return record


def _key(model: Model, job: Job, mode: str) -> str:
    examples = job.examples if mode == "few_shot" else ()
    decides = [model.fingerprint, job.task, job.data, job.metric, mode, job.sides, job.instruction, examples]
    return digest(*decides, version("mteb"), PROTOCOL)


def digest(*parts: Any) -> str:
    """sha256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
