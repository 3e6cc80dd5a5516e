"""Texts of evaluation sets as hashes: what training rows are compared with. No text is kept.

A folder may hold queries.jsonl and corpus.jsonl (BEIR's form), test.jsonl, train.jsonl (the labelled pool of a
classification or clustering task). examples.jsonl is not read: examples are training material.
"""

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.normalizing import text_key

QUERY_FIELDS = ("query", "text", "sentence1", "sentence2", "sentences", "sentence")
CORPUS_FIELDS = ("positive", "negative")
FILES = ("queries.jsonl", "corpus.jsonl", "test.jsonl", "train.jsonl")


@dataclass(frozen=True)
class EvaluationTexts:
    """One evaluation set: sorted distinct `text_key`s, uint64."""

    name: str
    queries: np.ndarray  # queries, and texts that are classified, clustered or compared
    corpus: np.ndarray  # passages that are searched or ranked
    is_pool: bool = False  # labelled texts that a classifier learns from, not the test itself


def folder_texts(folder: Path, option: str = "--decontaminate") -> list[EvaluationTexts]:
    """The texts of an evaluation folder; a pool (train.jsonl) comes as a set of its own.

    Args:
        option: that named the folder, for messages.

    Raises:
        ValueError: the folder is none, or a line of it is not JSON or holds no text.
    """
    if not folder.is_dir():
        hint = f"; settings stand before {option}" if "=" in folder.name else ""
        raise ValueError(f"{option} {folder}: no such folder{hint}")
    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(f"{option} {folder} is not an evaluation folder: it holds none of {', '.join(FILES)}")
    name = folder.resolve().name
    queries, corpus, pool = array("Q"), array("Q"), array("Q")
    for place, row in _json_lines(folder / "queries.jsonl"):
        queries.extend(_keys(place, row, ("text",)))
    for place, row in _json_lines(folder / "corpus.jsonl"):
        corpus.extend(_passage_keys(place, row))
    for place, row in _json_lines(folder / "test.jsonl"):
        queries.extend(_keys(place, row, QUERY_FIELDS))
        corpus.extend(_keys(place, row, CORPUS_FIELDS, required=False))
    found = [_texts(name, queries, corpus)] if queries or corpus else []
    for place, row in _json_lines(folder / "train.jsonl"):
        pool.extend(_keys(place, row, QUERY_FIELDS))
    return [*found, _texts(f"{name}/train", pool, array("Q"), is_pool=True)] if pool else found


def mteb_texts(task: Any) -> EvaluationTexts:
    """The texts of the evaluation splits of a loaded mteb task, without its train split.

    `task.dataset` is a split -> rows mapping, or subset -> split -> rows; rows of retrieval and reranking are a mapping
    with `queries` and `corpus`.

    Raises:
        ValueError: no column with texts is known.
    """
    queries, corpus, seen = array("Q"), array("Q"), set[str]()
    name = task.metadata.name
    columns = {*QUERY_FIELDS, *_own_columns(task)}
    for rows in _eval_rows(task):
        if "queries" in _names(rows) and "corpus" in _names(rows):
            for number, row in enumerate(rows["queries"]):
                queries.extend(_keys(f"{name}: query {number}", row, ("text",), required=False))
            for number, row in enumerate(rows["corpus"]):
                corpus.extend(_passage_keys(f"{name}: passage {number}", row))
            continue
        seen.update(_names(rows))
        for number, row in enumerate(rows):
            place = f"{name}: row {number}"
            queries.extend(_keys(place, row, tuple(columns & set(row)), required=False))
            corpus.extend(_keys(place, row, tuple({*CORPUS_FIELDS, "docs"} & set(row)), required=False))
    if not queries:
        raise ValueError(
            f"--decontaminate-mteb {name}: no texts found in its splits {task.eval_splits} ({sorted(seen)})"
        )
    return _texts(name, queries, corpus)


def _eval_rows(task: Any) -> Iterator[Any]:
    """Rows of every evaluation split, whether or not subsets stand above the splits."""
    dataset = task.dataset
    for split in task.eval_splits:
        if split in dataset:
            yield dataset[split]
        else:
            yield from (splits[split] for splits in dataset.values() if split in splits)


def _names(rows: Any) -> set[str]:
    """Columns of a data set, or keys of a mapping."""
    return set(getattr(rows, "column_names", None) or rows)


def _own_columns(task: Any) -> set[str]:
    """Columns that the task names as its input, where it does not use the usual names."""
    found = set()
    for attribute in ("input_column_name", "input1_column_name", "input2_column_name", "text_column_name"):
        if isinstance(value := getattr(task, attribute, None), str):
            found.add(value)
    found.update(value for value in getattr(task, "column_names", ()) if isinstance(value, str))
    return found


def _texts(name: str, queries: "array[int]", corpus: "array[int]", is_pool: bool = False) -> EvaluationTexts:
    distinct = [np.unique(np.frombuffer(keys, dtype=np.uint64)) for keys in (queries, corpus)]
    return EvaluationTexts(name, distinct[0], distinct[1], is_pool)


def _passage_keys(place: str, row: dict[str, Any]) -> list[int]:
    """A passage alone and behind its title: training data may hold either."""
    found = _keys(place, row, ("text",), required=False)
    if title := row.get("title"):
        found.append(text_key(f"{title} {row.get('text') or ''}"))
    return found


def _keys(place: str, row: dict[str, Any], fields: Iterable[str], required: bool = True) -> list[int]:
    """Keys of all texts in these fields, each a text or a list of texts; blank ones are none."""
    found = []
    for field in fields:
        value = row.get(field)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.strip():
                found.append(text_key(text))
    if required and not found:
        raise ValueError(f"{place} holds no text in {', '.join(fields)}: {str(row)[:80]}")
    return found


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) of every line that is not blank; nothing where there is no such file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not a line of JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number} must be a JSON object, got {type(row).__name__}")
            yield f"{path}:{number}", row
