"""BEIR folders as training rows: a judged query, its relevant passages, and those judged not relevant as negatives.

corpus.jsonl        {"_id", "title", "text"} a line
queries.jsonl       {"_id", "text"} a line
qrels/<split>.tsv   query-id, corpus-id, grade under a header line
"""

import json
import logging
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from pipeline.files import read_judgements

log = logging.getLogger(__name__)

CORPUS, QUERIES = "corpus.jsonl", "queries.jsonl"
FAULT = "fault"  # key of a row that cannot be made, with the reason


def is_beir(folder: Path) -> bool:
    return (folder / CORPUS).is_file() and (folder / QUERIES).is_file()


def beir_files(folder: Path, split: str, where: str) -> list[Path]:
    """Judgements, corpus and queries; ValueError naming the splits there are."""
    splits = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
    wanted = split or "train"
    if wanted not in splits:
        there = ", ".join(splits) or "none (no qrels/*.tsv)"
        raise ValueError(f"{where}: this BEIR folder has no split {wanted!r}; there are: {there}; set split")
    return [folder / "qrels" / f"{wanted}.tsv", folder / CORPUS, folder / QUERIES]


def beir_rows(qrels: Path, corpus: Path, queries: Path) -> Iterator[dict[str, Any]]:
    """A row for every judged query in the order of the judgements, or {"fault": reason, "query": its id}.

    Only the texts that judgements refer to are held in memory.

    Raises:
        ValueError: a line of the judgements is none; names file and line.
    """
    grades = read_grades(qrels)
    wanted = {passage for judged in grades.values() for passage in judged}
    passages = read_texts(corpus, wanted, with_title=True)
    query_texts = read_texts(queries, grades, with_title=False)
    for query, judged in grades.items():
        missing = [passage for passage in judged if passage not in passages]
        if query not in query_texts:
            yield {FAULT: f"query-id {query!r} is not in {queries.name}", "query": query}
        elif missing:
            more = f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""
            yield {FAULT: f"corpus-id {missing[0]!r} is not in {corpus.name}{more}", "query": query}
        else:
            pos = [passages[passage] for passage, grade in judged.items() if grade > 0]
            neg = [passages[passage] for passage, grade in judged.items() if grade <= 0]
            yield {"query": query_texts[query], "pos": pos, "neg": neg}


def read_grades(qrels: Path) -> dict[str, dict[str, int]]:
    """Query id -> corpus id -> grade. Of a pair judged twice the last grade counts, as in evaluation."""
    grades: dict[str, dict[str, int]] = {}
    for _, query, passage, grade in read_judgements(qrels):
        grades.setdefault(query, {})[passage] = grade
    return grades


def read_texts(path: Path, wanted: Container[str], with_title: bool) -> dict[str, str]:
    """Text of the wanted ids, behind its title or without it.

    A line that is no text is not found by its id; how many there are is said.
    """
    texts: dict[str, str] = {}
    num_bad = 0
    with path.open("rb") as file:
        for raw in file:
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                num_bad += 1
                continue
            identity, title, text = (
                (row.get("_id"), row.get("title") or "", row.get("text")) if isinstance(row, dict) else (None, "", None)
            )
            if not isinstance(identity, (str, int)) or not isinstance(title, str) or not isinstance(text, str):
                num_bad += 1
            elif str(identity) in wanted:
                texts[str(identity)] = join_title(title, text) if with_title else text
    if num_bad:
        log.warning("%s: %d lines are no texts with an _id; rows that need them are quarantined", path, num_bad)
    return texts


def join_title(title: str, text: str) -> str:
    """Title and text of a passage as in evaluation."""
    return f"{title} {text}".strip()
