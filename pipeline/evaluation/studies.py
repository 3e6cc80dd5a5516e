"""Measurements of a study: one score for each arm, kept in a file as soon as it is there.

Each record of DIR/<study>.json tells how its number came about and has a key made of everything that decides it. What
stands there under the same key, in any study's file of the folder, is not computed again.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline.evaluation.jobs import PACKAGES, PROTOCOL, Model, digest
from pipeline.evaluation.memory import collect_notes
from pipeline.evaluation.runner import Encode, prompted, score_local
from pipeline.evaluation.sides import EXAMPLES, INSTRUCTION, is_normalized
from pipeline.evaluation.study_arms import STUDIES, Arm, choose_each, pool_of
from pipeline.evaluation.tasks import LocalTask, content_digest
from pipeline.files import write_text
from pipeline.inference.embedder import Example, FewShotEmbedder

Record = dict[str, Any]
log = logging.getLogger(__name__)


def run_arms(
    model: Model, task: LocalTask, sides: str, plan: Mapping[str, Sequence[Arm]], out: Path
) -> dict[str, list[Record]]:
    """The records of a task's arms, by study; what is not there yet is measured and written at once.

    Args:
        plan: study -> its arms.
        out: folder of the studies' files.

    Raises:
        ValueError: a file there is damaged, or the model gives what cannot be scored.
    """
    found: dict[str, list[Record]] = {study: [] for study in plan}
    said: set[str] = set()
    todo = [(study, arm) for study, arms in plan.items() for arm in arms]
    with TemporaryDirectory() as memory:
        for number, (study, arm) in enumerate(todo, start=1):
            key = key_of(model, task, sides, arm)
            known = {record["key"]: record for name in STUDIES for record in read_records(out, name)}
            old = known.get(key)
            record = old or measure(model, task, sides, arm, Path(memory))
            record = record | {"key": key, "arm": arm.name, "draw": arm.draw}
            add_record(out, study, record)
            found[study].append(record)
            how = "measured before" if old else f"{record['seconds']:.0f} s"
            draw = "" if arm.draw is None else f" draw {arm.draw}"
            log.info(
                "[%d/%d] %s %s %s%s: %.4f (%s)",
                number,
                len(todo),
                task.name,
                study,
                arm.name,
                draw,
                record["value"],
                how,
            )
            for note in [note for note in record["notes"] if note not in said]:
                log.info("    %s", note)
                said.add(note)
    return found


def measure(model: Model, task: LocalTask, sides: str, arm: Arm, memory: Path) -> Record:
    """The task's metric with the examples of the arm, and all that it depends on.

    Args:
        memory: folder of embeddings without examples, of this model and task.
    """
    assert model.embedder is not None, "a baseline has no prompts to study"
    embedder = replace(model.embedder, show_progress=False)
    started = time.monotonic()
    with collect_notes(quiet=True) as notes:
        encode = prompted(embedder, task.kind, task.instruction, arm.examples, sides, memory)
        if arm.by:
            encode = _each(embedder, task, arm, sides, encode)
        value = score_local(task, encode, sides)
    with collect_notes(quiet=True):  # counted above
        shown = _first_examples(task, arm, encode)
        ids = embedder.compose_queries([task.some_query], task.instruction, shown)[0]
        bare = embedder.compose_queries([task.some_query], task.instruction)[0]
    return {
        "value": value,
        "task": task.name,
        "kind": task.kind,
        "metric": task.metric,
        "texts": task.describe(),
        "num_examples": arm.num_examples,
        "chosen_by": f"{arm.by} of {len(pool_of(task))}, {arm.order}" if arm.by else "",
        "examples": [] if arm.by else [{"query": query, "response": response} for query, response in arm.examples],
        "example_tokens": len(ids) - len(bare),  # as the model gets them; with chosen_by: before the first text
        "instruction": task.instruction,
        "prompt_of_first_query": embedder.render(ids),
        "sides": sides,
        "normalized": is_normalized(sides, task.kind),
        "notes": notes,  # what was cut or left out, and how often
        "model": model.label,
        "fingerprint": model.fingerprint,
        "versions": {name: version(name) for name in PACKAGES},
        "seconds": time.monotonic() - started,
        "date": time.strftime("%Y-%m-%d"),
    }


def key_of(model: Model, task: LocalTask, sides: str, arm: Arm) -> str:
    """sha256 of all that decides the score; names of arms and studies are no part of it."""
    chosen: Any = arm.examples
    if arm.by:
        draw = arm.draw if arm.order == "random" else None
        chosen = [arm.by, arm.order, draw, arm.num_examples, pool_of(task)]
    decides = [model.fingerprint, task.name, content_digest(task), task.metric, sides, task.instruction, chosen]
    return digest(*decides, version("mteb"), PROTOCOL)


def read_records(out: Path, study: str) -> list[Record]:
    """The records of a study's file, none where there is no file; ValueError if it is damaged."""
    path = out / f"{study}.json"
    if not path.is_file():
        return []
    try:
        records: list[Record] = json.loads(path.read_text(encoding="utf-8"))
        for record in records:
            float(record["value"]), str(record["key"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the study is measured again") from error
    return records


def add_record(out: Path, study: str, record: Record) -> None:
    """Put a record into the study's file, in place of one for the same key, arm and draw."""

    def name(record: Record) -> tuple[Any, ...]:
        return record["key"], record["arm"], record["draw"]

    others = [other for other in read_records(out, study) if name(other) != name(record)]
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps([*others, record], indent=1, ensure_ascii=False, default=float)
    write_text(out / f"{study}.json", text + "\n")


def _each(embedder: FewShotEmbedder, task: LocalTask, arm: Arm, sides: str, plain: Encode) -> Encode:
    """As `plain`, but that every text has examples of its own."""
    pool = pool_of(task)

    def encode(texts: list[str], carry: str) -> np.ndarray:
        if carry != EXAMPLES:
            return plain(texts, carry)
        examples_of = choose_each(arm, pool, texts, lambda part: plain(list(part), INSTRUCTION))
        normalize = is_normalized(sides, task.kind)
        return embedder.encode_queries_each(texts, task.instruction, examples_of, normalize=normalize)

    return encode


def _first_examples(task: LocalTask, arm: Arm, encode: Encode) -> Sequence[Example]:
    """What stands before the task's first text."""
    if not arm.by:
        return arm.examples
    return choose_each(arm, pool_of(task), [task.some_query], lambda part: encode(list(part), INSTRUCTION))[0]
