"""Tasks of every type: read, scored against slow twins, with the prompts that their sides say."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluation import BOTH, EXAMPLES, RecordingEmbedder, embed_words, encode_words, write_lines

from pipeline.evaluation.sides import SIDES
from pipeline.evaluation.tasks import content_digest, load_task

TEXTS = ("ash bay", "ash", "bay ash ash", "kelp", "kelp lake", "lake kelp kelp", "elm", "elm fern", "fern elm elm")
LABELS = [label for label in ("tree", "water", "leaf") for _ in range(3)]


def write(folder: Path, kind: str, rows: list[dict[str, Any]], **header: str) -> Path:
    folder.mkdir(parents=True)
    task = {"name": kind, "type": kind, "instruction": "Find the word."} | header
    (folder / "task.json").write_text(json.dumps(task))
    write_lines(folder / "test.jsonl", rows)
    write_lines(folder / "examples.jsonl", [{"query": q, "response": r} for q, r in EXAMPLES])
    return folder


def rows_of(kind: str) -> list[dict[str, Any]]:
    if kind == "reranking":
        rows = [{"query": "ash", "positive": ["ash bay", "ash"], "negative": ["kelp", "bay ash lake", "elm"]}]
        return [*rows, {"query": "lake elm", "positive": ["fern elm"], "negative": ["lake", "kelp"]}]
    if kind in ("sts", "pair_classification"):
        pairs = [("ash bay", "bay ash ash"), ("kelp", "elm"), ("lake kelp", "kelp elm"), ("fern", "fern elm")]
        values = (4.5, 2.5, 2.0, 3.5) if kind == "sts" else (1, 0, 0, 1)
        name = "score" if kind == "sts" else "label"
        return [{"sentence1": a, "sentence2": b, name: v} for (a, b), v in zip(pairs, values, strict=True)]
    return [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Path]:
    def make_folder(kind: str) -> Path:
        folder = write(tmp_path / kind, kind, rows_of(kind))
        if kind == "classification":
            write_lines(folder / "train.jsonl", rows_of(kind))
        return folder

    return make_folder


def cosine(one: str, other: str) -> float:
    return float(embed_words([one])[0] @ embed_words([other])[0])


def test_reranking_ranks_each_query_s_own_candidates(make: Callable[[str], Path]) -> None:
    from pipeline.evaluation.runner import score_local

    def average_precision(row: dict[str, Any]) -> float:
        candidates = [*row["positive"], *row["negative"]]
        ranked = sorted(candidates, key=lambda text: -cosine(row["query"], text))
        hits = [rank for rank, text in enumerate(ranked, 1) if text in row["positive"]]
        return sum(n / rank for n, rank in enumerate(hits, 1)) / len(hits)

    wanted = np.mean([average_precision(row) for row in rows_of("reranking")])
    assert 0.3 < wanted < 0.99
    assert score_local(load_task(make("reranking")), encode_words) == pytest.approx(wanted, abs=1e-5)


def test_sts_is_the_rank_correlation_of_cosines(make: Callable[[str], Path]) -> None:
    from pipeline.evaluation.runner import score_local

    rows = rows_of("sts")
    ranks = [
        np.argsort(np.argsort(values))
        for values in ([cosine(row["sentence1"], row["sentence2"]) for row in rows], [row["score"] for row in rows])
    ]
    wanted = np.corrcoef(*ranks)[0, 1]
    assert wanted < 0.99
    assert score_local(load_task(make("sts")), encode_words) == pytest.approx(wanted, abs=1e-5)


def test_pair_classification_is_the_average_precision_of_cosines(make: Callable[[str], Path]) -> None:
    from pipeline.evaluation.runner import score_local

    rows = sorted(rows_of("pair_classification"), key=lambda row: -cosine(row["sentence1"], row["sentence2"]))
    hits = [rank for rank, row in enumerate(rows, 1) if row["label"]]
    wanted = sum(n / rank for n, rank in enumerate(hits, 1)) / len(hits)
    assert score_local(load_task(make("pair_classification")), encode_words) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", ["classification", "clustering"])
def test_labels_of_separate_texts_are_found_and_shuffled_ones_are_not(make: Callable[[str], Path], kind: str) -> None:
    from pipeline.evaluation.runner import score_local

    folder, rows = make(kind), 4 * rows_of(kind)
    write_lines(folder / "test.jsonl", rows)
    good = score_local(load_task(folder), encode_words)
    write_lines(folder / "test.jsonl", [row | {"label": LABELS[i * 4 % 9]} for i, row in enumerate(rows)])
    assert good > 0.9 > 0.6 > score_local(load_task(folder), encode_words)


CARRIED = {
    ("released", "reranking"): ([(2, (), True), (7, (), True), (2, EXAMPLES, True), (7, EXAMPLES, True)], []),
    ("trained", "reranking"): ([(2, (), True), (2, EXAMPLES, True)], [(7, True)]),
    ("released", "sts"): ([(4, (), True), (4, (), True), (4, EXAMPLES, True), (4, EXAMPLES, True)], []),
    ("trained", "sts"): ([(4, (), True), (4, (), True), (4, EXAMPLES, True)], []),
    ("released", "classification"): ([(9, (), False), (9, EXAMPLES, False), (9, EXAMPLES, False)], []),
    ("trained", "classification"): ([(9, (), True), (9, EXAMPLES, True), (9, EXAMPLES, True)], []),
    ("released", "clustering"): ([(9, (), True), (9, EXAMPLES, True)], []),
    ("trained", "clustering"): ([(9, (), True), (9, EXAMPLES, True)], []),
}


@pytest.mark.parametrize(("sides", "kind"), CARRIED)
def test_sides_say_which_texts_carry_what(make: Callable[[str], Path], sides: str, kind: str) -> None:
    from pipeline.evaluation.runner import score_modes

    embedder = RecordingEmbedder()
    score_modes(embedder, load_task(make(kind)), BOTH, 2, sides)  # type: ignore[arg-type]
    queries, passages = CARRIED[sides, kind]
    assert [(count, examples, normal) for count, _, examples, normal in embedder.queries] == queries
    assert embedder.passages == passages
    assert {instruction for _, instruction, _, _ in embedder.queries} == {"Find the word."}


def test_sides_are_known_for_every_type() -> None:
    from pipeline.evaluation.mteb_tasks import TYPES
    from pipeline.evaluation.sides import KINDS, carried
    from pipeline.evaluation.tasks import METRICS

    assert set(METRICS) < set(KINDS) == set(TYPES.values())
    assert all(carried(sides, kind, is_document) for sides in SIDES for kind in KINDS for is_document in (False, True))


PAIR = {"sentence1": "a", "sentence2": "b"}


@pytest.mark.parametrize(
    ("kind", "file", "row", "message"),
    [
        ("sts", "test.jsonl", PAIR | {"score": "5"}, "test.jsonl:1: score='5' must be a number"),
        ("sts", "test.jsonl", {"sentence1": "a", "score": 5}, "test.jsonl:1 must have a text as sentence1 and as sent"),
        ("pair_classification", "test.jsonl", PAIR | {"label": 2}, "test.jsonl:1: label=2 must be 0 or 1"),
        ("sts", "test.jsonl", PAIR | {"score": float("nan")}, "test.jsonl:1: score=nan must be a number"),
        ("sts", "test.jsonl", PAIR | {"score": 5}, "test.jsonl: score is the same in all rows"),
        ("clustering", "test.jsonl", {"text": " ", "label": "x"}, "test.jsonl:1 must have a text as text"),
        ("clustering", "test.jsonl", {"text": "a", "label": None}, "test.jsonl:1: label=None must be a text or a num"),
        ("classification", "test.jsonl", {"text": "a", "label": "new"}, "has no text of 1 labels of test.jsonl: 'new'"),
        ("reranking", "test.jsonl", {"query": "a", "positive": "b"}, "test.jsonl:1 must have a query and lists of"),
        ("reranking", "test.jsonl", {"query": "a", "positive": ["b"], "negative": []}, "no query has both a positive"),
        ("classification", "train.jsonl", None, "train.jsonl is missing; it needs train.jsonl, test.jsonl"),
        ("clustering", "test.jsonl", None, "test.jsonl is missing"),
    ],
)
def test_faults_name_file_and_line(
    make: Callable[[str], Path], kind: str, file: str, row: dict[str, Any] | None, message: str
) -> None:
    folder = make(kind)
    if row is None:
        (folder / file).unlink()
    else:
        write_lines(folder / file, [row])
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task(folder)


def test_queries_without_candidates_on_both_sides_are_counted(make: Callable[[str], Path]) -> None:
    folder = make("reranking")
    write_lines(folder / "test.jsonl", [*rows_of("reranking"), {"query": "a", "positive": [], "negative": ["b"]}])
    assert load_task(folder).describe() == "2 queries, 1 without a relevant passage left out, 8 passages"


def test_the_content_decides_the_digest(make: Callable[[str], Path]) -> None:
    folder = make("sts")
    digest = content_digest(load_task(folder))
    (folder / "examples.jsonl").unlink()
    assert content_digest(load_task(folder)) == digest, "prompts are no part of it"
    write_lines(folder / "test.jsonl", [row | {"score": 5 - row["score"]} for row in rows_of("sts")])
    assert content_digest(load_task(folder)) != digest
