"""Evaluation tasks from local folders in BEIR's form.

task.json       {"name", "type": "retrieval", "instruction", "metric": "ndcg_at_10"}
corpus.jsonl    {"_id", "title", "text"} a line
queries.jsonl   {"_id", "text"} a line
qrels/test.tsv  query-id, corpus-id, score under a header line
examples.jsonl  {"query", "response"} a line: in-context examples, none of them a test query
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import read_json_lines, read_judgements

QRELS = "qrels/test.tsv"
METRIC = r"(ndcg|map|mrr|recall|precision|hit_rate)_at_\d+"  # as mteb names them
NEEDED = ("task.json", "corpus.jsonl", "queries.jsonl", QRELS)


@dataclass(frozen=True)
class RetrievalTask:
    """A retrieval test. Only queries with a relevant passage are kept; the others are counted."""

    name: str
    instruction: str
    metric: str
    examples: tuple[tuple[str, str], ...]  # (query, response)
    corpus: dict[str, str]  # id -> title and text
    queries: dict[str, str]  # id -> text
    relevant: dict[str, dict[str, int]]  # query id -> corpus id -> grade
    num_unjudged: int  # queries left out because no passage is relevant to them


def load_task(folder: str | Path) -> RetrievalTask:
    """Read a task folder; ValueError names the file and line of what is wrong in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"task {folder}: no such folder")
    if not (folder / "task.json").is_file():
        raise ValueError(f"{folder} is not a task folder: task.json is missing")
    header = _read_header(folder / "task.json")
    for name in NEEDED:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a retrieval task: {name} is missing; it needs {', '.join(NEEDED)}")
    corpus = {i: _join(title, text) for i, title, text in _read_texts(folder / "corpus.jsonl", may_be_empty=True)}
    queries = {i: text for i, _, text in _read_texts(folder / "queries.jsonl", may_be_empty=False)}
    relevant = _read_qrels(folder / QRELS, queries, corpus)
    judged = {i: text for i, text in queries.items() if i in relevant}
    if not judged:
        raise ValueError(f"{folder}: no query has a relevant passage in {QRELS}")
    return RetrievalTask(
        name=header["name"],
        instruction=header["instruction"],
        metric=header["metric"],
        examples=_read_examples(folder / "examples.jsonl"),
        corpus=corpus,
        queries=judged,
        relevant=relevant,
        num_unjudged=len(queries) - len(judged),
    )


def _read_header(path: Path) -> dict[str, str]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} must hold one JSON object")
    if header.get("type") != "retrieval":
        raise ValueError(f"{path}: type={header.get('type')!r} cannot be evaluated; supported now: 'retrieval'")
    header.setdefault("metric", "ndcg_at_10")
    if not re.fullmatch(METRIC, str(header["metric"])):
        raise ValueError(
            f"{path}: unknown metric {header['metric']!r}; for example ndcg_at_10, recall_at_100, mrr_at_10"
        )
    for key in ("name", "instruction", "metric"):
        if not isinstance(header.get(key), str):
            raise ValueError(f"{path}: {key}={header.get(key)!r} must be a text")
    return header


def _read_texts(path: Path, may_be_empty: bool) -> list[tuple[str, str, str]]:
    """(id, title, text) of every line; ids must be distinct."""
    rows, seen = [], set()
    for place, row in read_json_lines(path):
        identity, title, text = row.get("_id"), row.get("title") or "", row.get("text")
        if not isinstance(identity, (str, int)) or not isinstance(title, str) or not isinstance(text, str):
            raise ValueError(f"{place} must have an _id and a text, got {str(row)[:80]}")
        if not text.strip() and not may_be_empty:
            raise ValueError(f"{place}: the text of _id={identity!r} is empty")
        if str(identity) in seen:
            raise ValueError(f"{place}: _id={identity!r} stands twice")
        seen.add(str(identity))
        rows.append((str(identity), title, text))
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def _read_qrels(path: Path, queries: dict[str, str], corpus: dict[str, str]) -> dict[str, dict[str, int]]:
    """Query id -> corpus id -> grade, for queries with at least one grade above 0."""
    grades: dict[str, dict[str, int]] = {}
    for place, query, passage, grade in read_judgements(path):
        for identity, known, file in ((query, queries, "queries.jsonl"), (passage, corpus, "corpus.jsonl")):
            if identity not in known:
                raise ValueError(f"{place} names {identity!r}, which {file} does not hold")
        grades.setdefault(query, {})[passage] = grade
    return {query: row for query, row in grades.items() if max(row.values()) > 0}


def _read_examples(path: Path) -> tuple[tuple[str, str], ...]:
    """The task's examples in file order; none where the file is missing."""
    examples = []
    for place, row in read_json_lines(path) if path.is_file() else ():
        query, response = row.get("query"), row.get("response")
        if not isinstance(query, str) or not isinstance(response, str) or not query.strip() or not response.strip():
            raise ValueError(f"{place} must have a query and a response, got {str(row)[:80]}")
        examples.append((query, response))
    return tuple(examples)


def _join(title: str, text: str) -> str:
    """Title and text of a passage as mteb joins them."""
    return f"{title} {text}".strip()
