"""Evaluation tasks from local folders: task.json, examples.jsonl and the files of the task's type.

task.json       {"name", "type", "instruction", "metric"}; the metric may be left out
examples.jsonl  {"query", "response"} a line: in-context examples, none of them a test query

type                 files, JSON objects a line
retrieval            corpus.jsonl {"_id", "title", "text"}, queries.jsonl {"_id", "text"} and, in BEIR's form,
                     qrels/test.tsv: query-id, corpus-id, score under a header line
reranking            test.jsonl {"query", "positive": [texts], "negative": [texts]}
classification       train.jsonl (what a logistic regression learns from) and test.jsonl {"text", "label"}
clustering           test.jsonl {"text", "label"}
sts                  test.jsonl {"sentence1", "sentence2", "score"}
pair_classification  test.jsonl {"sentence1", "sentence2", "label": 0 or 1}
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import read_json_lines, read_judgements

QRELS = "qrels/test.tsv"
RANKED = r"(ndcg|map|mrr|recall|precision|hit_rate)_at_(1|3|5|10|20|100|1000)"  # as mteb names them
# Metrics by type, the first one the default: (pattern of task.json, what each alias is called by mteb).
METRICS: dict[str, tuple[str, str, dict[str, str]]] = {
    "retrieval": ("ndcg_at_10", RANKED, {}),
    "reranking": ("map", f"map|{RANKED}", {"map": "map_at_1000"}),
    "classification": ("accuracy", "accuracy|f1|f1_weighted", {}),
    "clustering": ("v_measure", "v_measure", {}),
    "sts": ("spearman", "spearman|pearson", {"spearman": "cosine_spearman", "pearson": "cosine_pearson"}),
    "pair_classification": ("ap", "ap|f1|accuracy", {"ap": "max_ap", "f1": "max_f1", "accuracy": "max_accuracy"}),
}
FILES = {
    "retrieval": ("corpus.jsonl", "queries.jsonl", QRELS),
    "classification": ("train.jsonl", "test.jsonl"),
}
COLUMNS = {
    "classification": ("text", "label"),
    "clustering": ("text", "label"),
    "sts": ("sentence1", "sentence2", "score"),
    "pair_classification": ("sentence1", "sentence2", "label"),
}


@dataclass(frozen=True)
class RetrievalTask:
    """A retrieval test, or with candidates a reranking test. Only queries with a relevant passage are kept; the others
    are counted."""

    name: str
    instruction: str
    metric: str
    examples: tuple[tuple[str, str], ...]  # (query, response)
    corpus: dict[str, str]  # id -> title and text
    queries: dict[str, str]  # id -> text
    relevant: dict[str, dict[str, int]]  # query id -> corpus id -> grade
    num_unjudged: int  # queries left out because no passage is relevant to them
    candidates: dict[str, list[str]] | None = None  # reranking: query id -> corpus ids to be ranked

    @property
    def kind(self) -> str:
        """The type of task.json."""
        return "retrieval" if self.candidates is None else "reranking"

    @property
    def some_query(self) -> str:
        """One text of the test that gets the prompt."""
        return next(iter(self.queries.values()))

    def describe(self) -> str:
        """Counts, in words."""
        left_out = f", {self.num_unjudged} without a relevant passage left out" if self.num_unjudged else ""
        return f"{len(self.queries)} queries{left_out}, {len(self.corpus)} passages"


@dataclass(frozen=True)
class TextTask:
    """A test of labelled texts or of pairs of texts."""

    name: str
    kind: str  # classification, clustering, sts or pair_classification
    instruction: str
    metric: str
    examples: tuple[tuple[str, str], ...]  # (query, response)
    test: tuple[dict[str, Any], ...]  # rows with the columns of its kind
    train: tuple[dict[str, Any], ...] = ()  # classification: the pool

    @property
    def some_query(self) -> str:
        """One text of the test that gets the prompt."""
        return str(self.test[0][COLUMNS[self.kind][0]])

    def describe(self) -> str:
        """Counts, in words."""
        pool = f", {len(self.train)} to learn from" if self.train else ""
        return f"{len(self.test)} {'pairs' if 'sentence1' in COLUMNS[self.kind] else 'texts'}{pool}"


LocalTask = RetrievalTask | TextTask


def load_task(folder: str | Path) -> LocalTask:
    """Read a task folder of any type; ValueError names the file and line of what is wrong in it."""
    folder = Path(folder)
    header = read_task_header(folder)
    kind = header.pop("type")
    examples = _read_examples(folder / "examples.jsonl")
    if kind == "retrieval":
        return _read_retrieval(folder, header, examples)
    if kind == "reranking":
        return _read_reranking(folder / "test.jsonl", header, examples)
    train = _read_rows(folder / "train.jsonl", kind) if kind == "classification" else ()
    test = _read_rows(folder / "test.jsonl", kind)
    unknown = {row["label"] for row in test} - {row["label"] for row in train} if train else set()
    if unknown:
        raise ValueError(f"{folder}: train.jsonl has no text of {len(unknown)} labels of test.jsonl: {min(unknown)!r}")
    return TextTask(**header, kind=kind, examples=examples, test=test, train=train)


def read_task_header(folder: Path) -> dict[str, Any]:
    """task.json of a folder that holds all files of its type, unread; ValueError where it does not."""
    if not folder.is_dir():
        raise ValueError(f"task {folder}: no such folder")
    if not (folder / "task.json").is_file():
        raise ValueError(f"{folder} is not a task folder: task.json is missing")
    header = _read_header(folder / "task.json")
    needed = FILES.get(header["type"], ("test.jsonl",))
    for name in needed:
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} is not a {header['type']} task: {name} is missing; it needs {', '.join(needed)}"
            )
    return header


def load_retrieval_task(folder: str | Path) -> RetrievalTask:
    """Read a folder of type retrieval or reranking; ValueError for another type."""
    task = load_task(folder)
    if not isinstance(task, RetrievalTask):
        raise ValueError(f"{folder}: type={task.kind!r} has no queries and passages; take a retrieval task")
    return task


def mteb_metric(task: LocalTask) -> str:
    """The task's metric under mteb's name."""
    aliases = METRICS[task.kind][2]
    return aliases.get(task.metric, task.metric)


def content_digest(task: LocalTask) -> str:
    """sha256 of everything that a score depends on but prompts: texts, labels, judgements."""
    digest = hashlib.sha256(f"{task.kind} {task.metric}".encode())
    if isinstance(task, RetrievalTask):
        parts: list[Any] = [task.corpus, task.queries, task.relevant, task.candidates or {}]
    else:
        parts = [dict(enumerate(task.test)), dict(enumerate(task.train))]
    for part in parts:
        digest.update(f"\n{len(part)}".encode())
        for key, value in part.items():  # piece by piece: a corpus may be as large as half of the memory
            digest.update(f"\n{json.dumps([key, value])}".encode())
    return digest.hexdigest()


def _read_header(path: Path) -> dict[str, str]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} must hold one JSON object")
    kind = header.get("type")
    if not isinstance(kind, str) or kind not in METRICS:
        raise ValueError(f"{path}: type={kind!r} cannot be evaluated; known: {', '.join(METRICS)}")
    default, pattern, _ = METRICS[kind]
    header.setdefault("metric", default)
    if not re.fullmatch(pattern, str(header["metric"])):
        known = "ndcg_at_10, recall_at_100, mrr_at_10" if RANKED in pattern else pattern.replace("|", ", ")
        raise ValueError(f"{path}: unknown metric {header['metric']!r} of type {kind}; for example {known}")
    for key in ("name", "instruction"):
        if not isinstance(header.get(key), str):
            raise ValueError(f"{path}: {key}={header.get(key)!r} must be a text")
    return {key: header[key] for key in ("name", "type", "instruction", "metric")}


def _read_retrieval(folder: Path, header: dict[str, str], examples: tuple[tuple[str, str], ...]) -> RetrievalTask:
    corpus = {i: join_title(title, text) for i, title, text in _read_texts(folder / "corpus.jsonl", may_be_empty=True)}
    queries = {i: text for i, _, text in _read_texts(folder / "queries.jsonl", may_be_empty=False)}
    relevant = _read_qrels(folder / QRELS, queries, corpus)
    judged = {i: text for i, text in queries.items() if i in relevant}
    if not judged:
        raise ValueError(f"{folder}: no query has a relevant passage in {QRELS}")
    return RetrievalTask(
        **header,
        examples=examples,
        corpus=corpus,
        queries=judged,
        relevant=relevant,
        num_unjudged=len(queries) - len(judged),
        candidates=None,
    )


def _read_reranking(path: Path, header: dict[str, str], examples: tuple[tuple[str, str], ...]) -> RetrievalTask:
    """Each query has candidates of its own; like mteb, queries without a positive or a negative are left out."""
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    relevant: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    left_out = 0
    for number, (place, row) in enumerate(_lines(path)):
        query, positive, negative = row.get("query"), row.get("positive"), row.get("negative")
        if not _is_text(query) or not all(isinstance(x, list) and all(map(_is_text, x)) for x in (positive, negative)):
            raise ValueError(f"{place} must have a query and lists of texts, positive and negative: {str(row)[:80]}")
        if not positive or not negative:
            left_out += 1
            continue
        texts = {f"q{number}-{i}": text for i, text in enumerate([*positive, *negative])}
        corpus |= texts
        queries[f"q{number}"] = str(query)
        candidates[f"q{number}"] = list(texts)
        relevant[f"q{number}"] = {i: int(n < len(positive)) for n, i in enumerate(texts)}
    if not queries:
        raise ValueError(f"{path}: no query has both a positive and a negative")
    return RetrievalTask(
        **header,
        examples=examples,
        corpus=corpus,
        queries=queries,
        relevant=relevant,
        num_unjudged=left_out,
        candidates=candidates,
    )


def _read_rows(path: Path, kind: str) -> tuple[dict[str, Any], ...]:
    """The rows of a file with the columns of its kind; other columns are passed over."""
    *texts, value = COLUMNS[kind]
    rows = []
    for place, row in _lines(path):
        if not all(_is_text(row.get(column)) for column in texts):
            raise ValueError(f"{place} must have a text as {' and as '.join(texts)}, got {str(row)[:80]}")
        rows.append({column: row[column] for column in texts} | {value: _value(place, kind, value, row.get(value))})
    if not rows:
        raise ValueError(f"{path} is empty")
    if "sentence1" in texts and len({row[value] for row in rows}) == 1:
        raise ValueError(f"{path}: {value} is the same in all rows, so that nothing can be scored")
    return tuple(rows)


def _value(place: str, kind: str, name: str, given: Any) -> float | int | str:
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if kind == "sts":
        if not is_number or not math.isfinite(given):
            raise ValueError(f"{place}: {name}={given!r} must be a number")
        return float(given)
    if kind == "pair_classification":
        if given not in (0, 1):
            raise ValueError(f"{place}: {name}={given!r} must be 0 or 1")
        return int(given)
    if not (_is_text(given) or is_number):
        raise ValueError(f"{place}: {name}={given!r} must be a text or a number")
    return str(given)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) of every line; ValueError for half a character, which no table of texts can hold."""
    for place, row in read_json_lines(path):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place} holds half a character (a lone surrogate): {error}") from error
        yield place, row


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _read_texts(path: Path, may_be_empty: bool) -> list[tuple[str, str, str]]:
    """(id, title, text) of every line; ids must be distinct."""
    rows, seen = [], set()
    for place, row in _lines(path):
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
        if grades.setdefault(query, {}).setdefault(passage, grade) != grade:
            raise ValueError(f"{place}: {query!r} and {passage!r} were judged {grades[query][passage]} before")
    return {query: row for query, row in grades.items() if max(row.values()) > 0}


def _read_examples(path: Path) -> tuple[tuple[str, str], ...]:
    """The task's examples in file order; none where the file is missing."""
    examples = []
    for place, row in _lines(path) if path.is_file() else ():
        query, response = row.get("query"), row.get("response")
        if not isinstance(query, str) or not isinstance(response, str) or not query.strip() or not response.strip():
            raise ValueError(f"{place} must have a query and a response, got {str(row)[:80]}")
        examples.append((query, response))
    return tuple(examples)


def join_title(title: str, text: str) -> str:
    """Title and text of a passage as mteb joins them."""
    return f"{title} {text}".strip()
