"""AIR-Bench's folders as tasks, and rankings in its leaderboard's form."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.evaluation.air_bench import (
    AirBenchPlace,
    find_air_bench_examples,
    load_air_bench,
    parse_place,
    write_ranking,
)

CORPUS = [{"id": "d0", "text": "one"}, {"id": "d1", "text": "two"}, {"id": "d2", "text": ""}]
QUERIES = [{"id": "q0", "text": "which?"}, {"id": "q1", "text": "what?"}, {"id": "q2", "text": "who?"}]
QRELS = [
    {"qid": "q0", "docid": "d1", "relevance": 1},
    {"qid": "q0", "docid": "d0", "relevance": 0},
    {"qid": "q1", "docid": "d0", "relevance": 0},
]
LAW = AirBenchPlace("AIR-Bench_24.05", "qa", "law", "en", "default")


def write_lines(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset with its judgements in their own repository, and a test split without any."""
    path = tmp_path / "qa_law_en/AIR-Bench_24.05/default"
    write_lines(path / "corpus.jsonl", CORPUS)
    write_lines(path / "dev_queries.jsonl", QUERIES)
    write_lines(path / "test_queries.jsonl", [{"id": "q7", "text": "where?"}])
    write_lines(tmp_path / "qrels-qa_law_en-dev/AIR-Bench_24.05/default/dev_qrels.jsonl", QRELS)
    return path


def test_a_dev_split_is_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        task = load_air_bench(folder)
    assert (task.name, task.metric, task.examples) == ("qa_law_en", "ndcg_at_10", ())
    assert task.instruction == "Given a question, retrieve passages that answer the question."
    assert task.corpus == {"d0": "one", "d1": "two", "d2": ""}
    assert task.queries == {"q0": "which?"}
    assert task.relevant == {"q0": {"d1": 1, "d0": 0}}
    assert task.num_unjudged == 2
    assert "2 of 3 queries have no relevant passage" in caplog.text


def test_judgements_beside_the_queries_come_first(folder: Path) -> None:
    write_lines(folder / "dev_qrels.jsonl", [{"qid": "q1", "docid": "d0", "relevance": 2}])
    assert load_air_bench(folder).relevant == {"q1": {"d0": 2}}


def test_a_relative_path_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load_air_bench(".").queries == {"q0": "which?"}


def test_numbers_may_be_ids(folder: Path) -> None:
    write_lines(folder / "corpus.jsonl", [{"id": 0, "text": "one"}])
    write_lines(folder / "dev_queries.jsonl", [{"id": 5, "text": "which?"}])
    write_lines(folder / "dev_qrels.jsonl", [{"qid": 5, "docid": 0, "relevance": 1}])
    assert load_air_bench(folder).relevant == {"5": {"0": 1}}


def test_a_test_split_without_judgements_keeps_all_queries(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        task = load_air_bench(folder, split="test")
    assert (task.queries, task.relevant, task.num_unjudged) == ({"q7": "where?"}, {}, 0)
    assert "without judgements: it can be ranked, not scored" in caplog.text


def test_long_documents(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "long-doc_healthcare_en/AIR-Bench_24.05/pubmed_100K-200K_1"
    other.parent.mkdir(parents=True)
    folder.rename(other)
    write_lines(other / "dev_qrels.jsonl", QRELS)
    task = load_air_bench(other)
    assert (task.name, task.metric) == ("long-doc_healthcare_en_pubmed_100K-200K_1", "recall_at_10")


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("qa_law_en/AIR-Bench_24.04/default", "qa/law.jsonl"),
        (
            "long-doc_healthcare_en/AIR-Bench_24.05/pubmed_100K-200K_1",
            "long-doc/healthcare-pubmed_100k-200k_1.jsonl",
        ),
    ],
)
def test_examples(tmp_path: Path, dataset: str, file: str) -> None:
    write_lines(tmp_path / file, [{"query": "a", "pos": "b"}, {"query": "c", "pos": "d"}])
    assert find_air_bench_examples(parse_place(dataset), tmp_path) == (("a", "b"), ("c", "d"))


def test_examples_go_into_the_task(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"qa/law.jsonl: no examples for qa_law_en; the paper's are at https"):
        load_air_bench(folder, examples=tmp_path)
    write_lines(tmp_path / "qa/law.jsonl", [{"query": "a", "pos": "b"}])
    assert load_air_bench(folder, examples=tmp_path).examples == (("a", "b"),)
    write_lines(tmp_path / "qa/law.jsonl", [{"query": "a", "pos": "b"}, {"query": "a", "pos": ""}])
    with pytest.raises(ValueError, match=r"law.jsonl:2 must have a text for query and for pos"):
        load_air_bench(folder, examples=tmp_path)


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("corpus.jsonl", [], r"corpus.jsonl is empty"),
        ("corpus.jsonl", [*CORPUS, ["d3"]], r"corpus.jsonl:4 must be a JSON object"),
        ("corpus.jsonl", [*CORPUS, {"id": "d3"}], r"corpus.jsonl:4 must have an id and a text"),
        ("corpus.jsonl", [*CORPUS, CORPUS[0]], r"corpus.jsonl:4: id='d0' stands twice"),
        ("dev_queries.jsonl", [{"id": "q0", "text": " "}], r"dev_queries.jsonl:1: the text of id='q0' is empty"),
        ("dev_qrels.jsonl", [QRELS[0], {"qid": "q0", "docid": "d1"}], r"dev_qrels.jsonl:2 must have qid, docid and a"),
        ("dev_qrels.jsonl", [{"qid": "q0", "docid": "d1", "relevance": True}], r"dev_qrels.jsonl:1 must have qid"),
        ("dev_qrels.jsonl", [{"qid": "q9", "docid": "d1", "relevance": 1}], r":1 names 'q9', which the queries of"),
        ("dev_qrels.jsonl", [{"qid": "q0", "docid": "d9", "relevance": 1}], r":1 names 'd9', which the corpus of"),
        ("dev_qrels.jsonl", [QRELS[0], QRELS[0] | {"relevance": 0}], r":2: 'q0' and 'd1' were judged 1 before"),
        ("dev_qrels.jsonl", [QRELS[1]], r"no query of dev_queries.jsonl has a relevant passage"),
    ],
)
def test_bad_lines_are_named(folder: Path, file: str, rows: list[object], message: str) -> None:
    write_lines(folder / file, rows)
    with pytest.raises(ValueError, match=message):
        load_air_bench(folder)


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split='train' is none of AIR-Bench"):
        load_air_bench(folder, split="train")
    (tmp_path / "qrels-qa_law_en-dev/AIR-Bench_24.05/default/dev_qrels.jsonl").unlink()
    with pytest.raises(ValueError, match="no judgements: neither dev_qrels.jsonl is there nor .*qrels-qa_law_en-dev"):
        load_air_bench(folder)
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(ValueError, match="corpus.jsonl is missing"):
        load_air_bench(folder)


@pytest.mark.parametrize(
    "path",
    ["law", "law_en/AIR-Bench_24.05/default", "web_law_en/AIR-Bench_24.05/default", "qa_law_en/24.05/default"],
)
def test_other_folders_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is not a dataset folder of AIR-Bench"):
        parse_place(path)


def test_a_ranking_is_written(tmp_path: Path) -> None:
    rankings = {"q0": {"d0": 0.25, "d1": 0.75, "d2": 0.25}}
    path = write_ranking(tmp_path, LAW, "test", "my-model", rankings)
    assert path == tmp_path / "my-model/NoReranker/qa/law/en_default_test.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written["search_results"]["q0"].items()) == [("d1", 0.75), ("d0", 0.25), ("d2", 0.25)]
    # What evaluator.py of the benchmark compares before it scores a file.
    assert {key: value for key, value in written.items() if key != "search_results"} == {
        "model_name": "my-model",
        "reranker_name": "NoReranker",
        "benchmark_version": "AIR-Bench_24.05",
        "task_type": "qa",
        "domain": "law",
        "language": "en",
        "dataset_name": "default",
        "split": "test",
    }


def test_the_first_version_names_no_split(tmp_path: Path) -> None:
    place = AirBenchPlace("AIR-Bench_24.04", "qa", "law", "en", "default")
    assert write_ranking(tmp_path, place, "test", "m", {"q0": {"d0": 1.0}}).name == "en_default.json"


@pytest.mark.parametrize(
    ("split", "model", "rankings", "message"),
    [
        ("test", "my/model", {"q0": {"d0": 1.0}}, "take one without a slash"),
        ("test", "", {"q0": {"d0": 1.0}}, "take one without a slash"),
        ("train", "m", {"q0": {"d0": 1.0}}, "split='train' is none of AIR-Bench"),
        ("test", "m", {}, "no passage is ranked for all queries"),
        ("test", "m", {"q0": {"d0": 1.0}, "q1": {}}, "no passage is ranked for q1"),
        ("test", "m", {"q0": {"d0": float("nan")}}, "a score of query 'q0' is not finite"),
    ],
)
def test_bad_rankings_are_refused(tmp_path: Path, split: str, model: str, rankings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_ranking(tmp_path, LAW, split, model, rankings)
    assert not list(tmp_path.rglob("*.json"))
