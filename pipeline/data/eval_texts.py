"""Texts of evaluation sets as hashes: what training rows are compared with. No text is kept.

A folder may hold queries.jsonl and corpus.jsonl (BEIR's form), test.jsonl, train.jsonl (the labelled pool of a
classification or clustering task). examples.jsonl is not read: examples are training material.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from pipeline.data.normalizing import text_key
from pipeline.files import read_json_lines

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
    without_text: int = 0  # passages and rows in which no text was found: nothing can be compared with them


def folder_texts(folder: Path, option: str = "--decontaminate") -> list[EvaluationTexts]:
    """The texts of an evaluation folder; a pool (train.jsonl) comes as a set of its own.

    Args:
        option: that named the folder, for messages.

    Raises:
        ValueError: the folder is none, a line of it is not JSON, or a query holds no text.
    """
    if folder.is_file():
        raise ValueError(f"{option} {folder} is a file; give the folders of evaluation sets alone (eval/*/)")
    if not folder.is_dir():
        hint = f"; settings stand before {option}" if "=" in folder.name else ""
        raise ValueError(f"{option} {folder}: no such folder{hint}")
    there = [name for name in FILES if (folder / name).is_file()]
    if not there:
        raise ValueError(f"{option} {folder} is not an evaluation folder: it holds none of {', '.join(FILES)}")
    queries, corpus, pool, without_text = array("Q"), array("Q"), array("Q"), 0
    for file in there:
        for place, row in read_json_lines(folder / file):
            if file == "corpus.jsonl":
                without_text += not _is_text(row.get("text"))
                corpus.extend(_passage_keys(row))
                continue
            fields = ("text",) if file == "queries.jsonl" else QUERY_FIELDS
            found = _keys(row, fields)
            if not found:
                raise ValueError(f"{place} holds no text in {', '.join(fields)}: {str(row)[:80]}")
            (pool if file == "train.jsonl" else queries).extend(found)
            if file == "test.jsonl":
                corpus.extend(_keys(row, CORPUS_FIELDS))
    name = folder.resolve().name
    sets = [_texts(name, queries, corpus, without_text=without_text)] if queries or corpus or without_text else []
    return [*sets, _texts(f"{name}/train", pool, array("Q"), is_pool=True)] if pool else sets


def mteb_texts(task: Any) -> EvaluationTexts:
    """The texts of the evaluation splits of a loaded mteb task, without its train split.

    `task.dataset` is a split -> rows mapping, or subset -> split -> rows; rows of retrieval and reranking are a mapping
    with `queries` and `corpus`.

    Raises:
        ValueError: no column with texts is known.
    """
    queries, corpus, seen, without_text = array("Q"), array("Q"), set[str](), 0
    name = task.metadata.name
    columns = {*QUERY_FIELDS, *_own_columns(task)}
    for rows in _eval_rows(task):
        if "queries" in _names(rows) and "corpus" in _names(rows):
            for row in rows["queries"]:
                found = _keys(row, ("text",))
                without_text += not found
                queries.extend(found)
            for row in rows["corpus"]:
                without_text += not _is_text(row.get("text"))
                corpus.extend(_passage_keys(row))
            continue
        seen.update(_names(rows))
        for row in rows:
            found = _keys(row, columns)
            passages = _keys(row, (*CORPUS_FIELDS, "docs"))
            without_text += not found and not passages
            queries.extend(found)
            corpus.extend(passages)
    if not queries:
        raise ValueError(
            f"--decontaminate-mteb {name}: no texts found in its splits {task.eval_splits} ({sorted(seen)})"
        )
    return _texts(name, queries, corpus, without_text=without_text)


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


def _texts(
    name: str, queries: "array[int]", corpus: "array[int]", is_pool: bool = False, without_text: int = 0
) -> EvaluationTexts:
    distinct = [np.unique(np.frombuffer(keys, dtype=np.uint64)) for keys in (queries, corpus)]
    return EvaluationTexts(name, distinct[0], distinct[1], is_pool, without_text)


def _passage_keys(row: Mapping[str, Any]) -> list[int]:
    """A passage alone and behind its title: training data may hold either."""
    found = _keys(row, ("text",))
    if title := row.get("title"):
        found.append(text_key(f"{title} {row.get('text') or ''}"))
    return found


def _keys(row: Mapping[str, Any], fields: Iterable[str]) -> list[int]:
    """Keys of all texts in these fields, each a text or a list of texts; blank ones are none."""
    found = []
    for field in fields:
        value = row.get(field)
        found += [text_key(text) for text in (value if isinstance(value, list) else [value]) if _is_text(text)]
    return found


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())
