"""Rankings before and after a reranker: against scoring pairs one by one, what keeps its place, what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from mteb.models import ModelMeta
from test_embedder import base, trained  # noqa: F401
from test_evaluation import WORDS, dcg, write_lines, write_task
from test_evaluation_types import rows_of
from test_evaluation_types import write as write_typed
from test_lightweight_reranker import own  # noqa: F401
from test_scoring import sentence_transformer  # noqa: F401

from pipeline import evaluate_embedder, evaluate_reranker
from pipeline.evaluation.baselines import load_baseline
from pipeline.evaluation.jobs import Job, Model, local_job
from pipeline.evaluation.mteb_tasks import as_mteb
from pipeline.evaluation.report import read_scores
from pipeline.evaluation.reranking import Found, reorder, rerank_job
from pipeline.evaluation.tasks import RetrievalTask, load_retrieval_task, load_task
from pipeline.inference.embedder import load_embedder
from pipeline.inference.reduction import Reduction
from pipeline.inference.reranker import LightweightReranker
from pipeline.model.flop import pair_flop
from pipeline.model.shapes import read_shape
from pipeline.settings import LoraSettings

TOP = 5
WHOLE = Reduction(1, (), 1)  # of the Oracle below
LIGHT = "exit=3,layers=1,ratio=2"


@pytest.fixture(scope="module")
def reranker(own) -> LightweightReranker:  # noqa: F811
    return LightweightReranker(own[0], show_progress=False)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return write_task(tmp_path / "words")


@pytest.fixture
def command(own, words: Path, tmp_path: Path) -> Callable[..., int]:  # noqa: F811
    def run(*arguments: str, retriever: str = "bm25", task: Path = words) -> int:
        options = ["--reranker", str(own[0]), "--retriever", retriever, "--task", str(task), "--out", str(tmp_path)]
        return evaluate_reranker.main([*options, *arguments])

    return run


def records(folder: Path) -> dict[str, dict]:
    return {row["setting"]: row for row in json.loads((folder / "reranking.json").read_text())}


def bm25_order(task: RetrievalTask) -> dict[str, list[str]]:
    """Query id -> all passages: falling scores, equal ones by falling id."""
    made, model = as_mteb(task, "released"), load_baseline("bm25")[0]
    split = made.dataset["default"]["test"]
    known = {"task_metadata": made.metadata, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {}}
    model.index(split["corpus"], **known)
    found = model.search(split["queries"], top_k=len(task.corpus), **known)
    return {query: sorted(scores, key=lambda i: (scores[i], i), reverse=True) for query, scores in found.items()}


def slow_value(
    task: RetrievalTask, order: dict[str, list[str]], metric: Callable[[list[int], list[int]], float]
) -> float:
    values = []
    for query, ids in order.items():
        grades = task.relevant[query]
        values.append(metric([grades.get(i, 0) for i in ids], sorted(grades.values(), reverse=True)))
    return float(np.mean(values))


def ndcg_at_10(gains: list[int], best: list[int]) -> float:
    return dcg(gains[:10]) / dcg(best[:10])


def average_precision(gains: list[int], best: list[int]) -> float:
    hits = [rank for rank, gain in enumerate(gains, 1) if gain > 0]
    return sum(n / rank for n, rank in enumerate(hits, 1)) / sum(gain > 0 for gain in best)


def slow_rerank(task: RetrievalTask, order: dict[str, list[str]], reranker: LightweightReranker, *how: Any) -> dict:
    """Each query's first TOP by scores of one pair at a time."""
    found = {}
    for query, ids in order.items():
        scores = {i: reranker.score([(task.queries[query], task.corpus[i])], *how)[0] for i in ids[:TOP]}
        found[query] = sorted(scores, key=lambda i: -scores[i]) + ids[TOP:]
    return found


def test_scores_are_those_of_pairs_one_by_one(command, words, reranker, tmp_path, capsys):
    settings = ["--setting", "full", "--setting", LIGHT, "--setting", "exit=2"]
    assert command(*settings, "--top", str(TOP)) == 0
    task, found = load_retrieval_task(words), records(tmp_path)
    order = bm25_order(task)
    assert list(found) == ["retriever", "full", LIGHT, "exit=2"]
    wanted = {"retriever": slow_value(task, order, ndcg_at_10)}
    for name, how in (("full", ()), (LIGHT, (3, (1,), 2)), ("exit=2", (2,))):
        wanted[name] = slow_value(task, slow_rerank(task, order, reranker, *how), ndcg_at_10)
    assert len({round(value, 6) for value in wanted.values()}) == 4, "settings that agree would hide a mix-up"
    for name, value in wanted.items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-5)
        assert found[name]["gain"] == pytest.approx(value - wanted["retriever"], abs=1e-5)
    shown = capsys.readouterr().out
    for name in ("full", LIGHT):
        value, gain, pairs = f"{wanted[name]:.4f}", f"{wanted[name] - wanted['retriever']:+.4f}", 6 * TOP
        assert re.search(rf"words +ndcg_at_10 +{re.escape(name)} +{value} +{re.escape(gain)} +{pairs} ", shown)


def test_candidates_of_a_reranking_task_ranked_by_an_embedder_with_examples(
    command,
    trained,  # noqa: F811
    reranker,
    tmp_path,
):
    folder = write_typed(tmp_path / "typed", "reranking", rows_of("reranking"))
    options = ["--num-examples", "2", "--relation", "q-q", "--top", "3", "--setting", "full"]
    assert command(*options, retriever=str(trained[0]), task=folder) == 0
    task, found, embedder = load_task(folder), records(tmp_path), load_embedder(trained[0], show_progress=False)
    assert isinstance(task, RetrievalTask) and task.candidates is not None
    before, after = {}, {}
    for query, ids in task.candidates.items():
        texts = [task.queries[query], *(task.corpus[i] for i in ids)]  # all carry the examples, as in the evaluation
        vectors = embedder.encode_queries(texts, task.instruction, task.examples)
        cosines = dict(zip(ids, (vectors[1:] @ vectors[0]).tolist(), strict=True))
        before[query] = sorted(ids, key=lambda i: -cosines[i])
        pairs = [(task.queries[query], task.corpus[i]) for i in before[query][:3]]
        scores = dict(zip(before[query], reranker.score(pairs, relation="q-q").tolist(), strict=False))
        after[query] = sorted(scores, key=lambda i: -scores[i]) + before[query][3:]
    assert found["retriever"]["value"] == pytest.approx(slow_value(task, before, average_precision), abs=1e-5)
    assert found["full"]["value"] == pytest.approx(slow_value(task, after, average_precision), abs=1e-5)
    assert before != after
    assert (found["full"]["relation"], found["full"]["retriever_examples"]) == ("q-q", 2)
    assert found["full"]["pairs"] == 6 and found["full"]["candidates_unranked"] == 0


def test_records_hold_what_a_ranking_depends_on(command, words, own, reranker, tmp_path):  # noqa: F811
    assert command("--top", "4") == 0
    full, light = (records(tmp_path)[name] for name in ("full", "exit=2,layers=1,ratio=2"))  # 25 of 42 layers; 4 here
    composed = reranker.compose([(q, p) for q, p in _first_pairs(load_retrieval_task(words), 4)], "q-p")
    shape = replace(read_shape(replace(reranker.description.model, lora=LoraSettings(rank=2)), 0), last_rows_only=False)

    def flop(*how: Any) -> float:
        parts = [(pair.start, pair.stop - pair.start, len(pair.ids) - pair.stop) for pair in composed]
        return sum(pair_flop(shape, one, *how) for one in parts) / 6

    names = ("exit_layer", "compress_layers", "compress_ratio", "depth")
    assert [light[name] for name in names] == [2, [1], 2, 4] and [full[name] for name in names] == [4, [], 1, 4]
    assert full["flop_per_query"] == pytest.approx(flop(4)) and full["flop_saved"] == 0
    assert light["flop_per_query"] == pytest.approx(flop(2, (1,), 2))
    assert light["flop_saved"] == pytest.approx(1 - flop(2, (1,), 2) / flop(4))
    assert full["tokens_per_pair"] == pytest.approx(np.mean([len(pair.ids) for pair in composed]))
    assert (full["pairs"], full["pairs_cut"], full["top"], full["queries"]) == (24, 0, 4, 6)
    assert full["retriever"] == "bm25" and full["reranker"] == str(own[0]) and full["device"] == "cpu"
    assert re.fullmatch("[0-9a-f]{64}", full["fingerprint"]) and {"mteb", "torch"} <= full["versions"].keys()
    # The same again takes its place, by whatever text it was asked; another --top stands beside it.
    assert command("--top", "4", "--setting", "exit=4", "--setting", "light", "--setting", "exit=2,ratio=2") == 0
    assert command("--top", "3", "--setting", "full") == 0
    rows = json.loads((tmp_path / "reranking.json").read_text())
    assert sorted((row["setting"], row["top"]) for row in rows if row["setting"] == "full") == [
        ("full", 3),
        ("full", 4),
    ]
    assert len(rows) == 5


def _first_pairs(task: RetrievalTask, top: int) -> list[tuple[str, str]]:
    return [(task.queries[q], task.corpus[i]) for q, ids in bm25_order(task).items() for i in ids[:top]]


def test_records_go_into_the_reranker_s_run(own, words, tmp_path, monkeypatch):  # noqa: F811
    run = shutil.copytree(own[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for folder in (run, run / "model"):
        options = ["--reranker", str(folder), "--retriever", "bm25", "--task", str(words), "--setting", "exit=2"]
        assert evaluate_reranker.main(options) == 0
    assert records(run).keys() == records(tmp_path / "runs/evaluation").keys() == {"retriever", "exit=2"}


def test_the_retriever_s_score_is_that_of_evaluation(command, words, sentence_transformer, tmp_path):  # noqa: F811
    for name in ("bm25", str(sentence_transformer)):
        assert command("--setting", "exit=2", retriever=name) == 0
        options = ["--baseline", name, "--task", str(words), "--scores", str(tmp_path / "scores.json")]
        assert evaluate_embedder.main(options) == 0
    rows = json.loads((tmp_path / "reranking.json").read_text())
    found = {row["retriever_fingerprint"]: row["value"] for row in rows if row["setting"] == "retriever"}
    assert found == {score.fingerprint: score.value for score in read_scores(tmp_path / "scores.json")}
    assert len(set(found.values())) == 2


class Oracle:
    """Knows which pairs are relevant."""

    device, model = SimpleNamespace(type="cpu"), SimpleNamespace(depth=1)

    def __init__(self, task: RetrievalTask, sign: int) -> None:
        self._grades = {
            (text, task.corpus[i]): sign * grade
            for query, text in task.queries.items()
            for i, grade in task.relevant[query].items()
        }
        self.asked: list[tuple[str, str]] = []

    def compose(self, pairs: list[tuple[str, str]], relation: str) -> list[SimpleNamespace]:
        self.asked = pairs
        return [SimpleNamespace(pair=pair, ids=[0], query_was_cut=False, passage_was_cut=False) for pair in pairs]

    def score_composed(self, composed: list[SimpleNamespace], reduction: Any) -> np.ndarray:
        return np.array([self._grades.get(one.pair, 0) for one in composed], dtype=np.float32)

    def count_flop(self, composed: list[SimpleNamespace], reduction: Any) -> float:
        return float(len(composed))

    def read_setting(self, text: str) -> Reduction:
        return WHOLE


def values(job: Job, oracle: Any, top: int, model: Model | None = None) -> list[float]:
    """[of the retriever, of the reranker]."""
    model = model or Model("bm25", "f", None, load_baseline("bm25")[0])
    return [row["value"] for row in rerank_job(model, oracle, job, {"full": WHOLE}, top, "q-p")]


def test_a_reranker_that_knows_gets_everything_right(words):
    task = load_retrieval_task(words)
    before, after = values(local_job(task, (), 0, "released"), Oracle(task, 1), len(task.corpus))
    assert before < 0.99 and after == 1.0


def test_what_is_below_the_first_keeps_its_place(words):
    found = Found({"q": "?"}, {"q": ["a", "b", "c", "d", "e"]}, {"a": "A", "b": "B", "c": "C"}, 0, 0)
    scores = {("?", "A"): 1.0, ("?", "B"): 1.0, ("?", "C"): 2.0}
    assert reorder(found, scores, 3) == {"q": ["c", "a", "b", "d", "e"]}, "of equal ones the retriever's first is first"
    # The worst of all rerankers: what mteb's own reranking would lose below the first six is still found.
    for metric, is_worse in (("recall_at_10", False), ("ndcg_at_10", True)):
        task = replace(load_retrieval_task(words), metric=metric)
        before, after = values(local_job(task, (), 0, "released"), Oracle(task, -1), 6)
        assert (after < before) == is_worse and (after == before) != is_worse and before > 0.5


class Given:
    """A retriever that returns what it was given; mteb asks for a class."""

    def __init__(self, results: dict[str, dict[str, float]]) -> None:
        self.mteb_model_meta = ModelMeta.create_empty({"name": "local/given", "revision": "local"})
        self.results = results

    def index(self, corpus: Any, **kwargs: Any) -> None:
        pass

    def search(self, queries: Any, **kwargs: Any) -> dict[str, dict[str, float]]:
        return {query: dict(scores) for query, scores in self.results.items()}


def test_candidates_that_the_retriever_left_out_are_reranked_too(tmp_path):
    task = load_retrieval_task(write_typed(tmp_path / "typed", "reranking", rows_of("reranking")))
    assert task.candidates is not None
    first, second = task.candidates  # of the first query two passages are relevant, of the second one
    given = {first: {"q0-4": 1.0, "q0-3": 1.0 + 1e-9}, second: {}}
    model, oracle = Model("given", "g", None, Given(given)), Oracle(task, 1)
    job = local_job(task, (), 0, "released")
    rows = list(rerank_job(model, oracle, job, {"full": WHOLE}, 10, "q-p"))
    assert [row["value"] for row in rows] == [0.0, 1.0]
    assert (rows[1]["candidates_unranked"], rows[1]["queries_unmatched"], rows[1]["pairs"]) == (6, 1, 8)
    # To mteb the two scores are one, and then the higher id is first; what has none follows, in no telling order.
    asked = [task.corpus[i] for i in ("q0-4", "q0-3")]
    assert [passage for _, passage in oracle.asked[:2]] == asked
    left_out = [passage for query, passage in oracle.asked if query == task.queries[first]][2:]
    assert sorted(left_out) == ["ash", "ash bay", "kelp"] and left_out[:2] != ["ash bay", "ash"]


def test_pairs_that_stand_twice_are_scored_once(words):
    lines = (words / "corpus.jsonl").read_text().splitlines()
    twin = json.loads(lines[0]) | {"_id": "twin"}
    (words / "corpus.jsonl").write_text("\n".join([*lines, json.dumps(twin)]))
    task = load_retrieval_task(words)
    oracle = Oracle(task, 1)
    rows = list(
        rerank_job(
            Model("b", "f", None, load_baseline("bm25")[0]),
            oracle,
            local_job(task, (), 0, "released"),
            {"full": WHOLE},
            100,
            "q-p",
        )
    )
    assert len(set(oracle.asked)) == len(oracle.asked) == rows[1]["pairs"] == 6 * 12


def test_nothing_found_and_empty_passages_are_told(command, words, tmp_path, capsys, caplog):
    lines = (words / "corpus.jsonl").read_text().splitlines()
    (words / "corpus.jsonl").write_text("\n".join([*lines, json.dumps({"_id": "none", "text": ""})]))
    queries = (words / "queries.jsonl").read_text().splitlines()
    unknown = json.dumps({"_id": "q0", "text": "zzz yyy"})
    (words / "queries.jsonl").write_text("\n".join([unknown, *queries[1:]]))
    assert command("--setting", "exit=2") == 0
    assert "words: bm25 found nothing for 1 of 6 queries" in capsys.readouterr().out
    assert any("passages are empty" in note for note in records(tmp_path)["exit=2"]["notes"])
    assert records(tmp_path)["exit=2"]["pairs"] == 6 * 13


def test_a_public_task_on_a_local_copy_leaves_out_the_query_itself(command, tmp_path):
    """ArguAna, whose queries stand in its corpus: mteb takes them out of a ranking."""
    root = tmp_path / "copies/mteb/arguana"
    root.mkdir(parents=True)
    texts = {f"{word}{i}": f"{word} {WORDS[i - 1]}" for i, word in enumerate(WORDS)}
    write_lines(root / "corpus.jsonl", [{"_id": i, "title": "T", "text": text} for i, text in texts.items()])
    write_lines(root / "queries.jsonl", [{"_id": i, "text": text} for i, text in list(texts.items())[:3]])
    qrels = [{"query-id": i, "corpus-id": j, "score": 1} for i, j in zip(texts, list(texts)[1:4], strict=False)]
    write_lines(root / "qrels.jsonl", qrels)
    parts = {"corpus": ("corpus", "corpus"), "queries": ("queries", "queries"), "default": ("test", "qrels")}
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{file}.jsonl"}]}
        for name, (split, file) in parts.items()
    ]
    (root / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    options = ["--data-root", str(tmp_path / "copies"), "--setting", "exit=2", "--relation", "arguana"]
    assert command(*options, task=Path("ArguAna")) == 0
    found = records(tmp_path)
    assert found["exit=2"]["pairs"] == 3 * 11 and found["exit=2"]["metric"] == "ndcg_at_10"
    assert 0 < found["retriever"]["value"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--setting", "full", "--setting", "depth=3"], "--setting depth=3: 'depth=3' is not understood; write full"),
        (["--setting", "exit=5"], "--setting exit=5: exit_layer=5 is none of the layers 2 to 4"),
        (["--top", "0"], "--top 0 leaves nothing to rerank"),
        (["--relation", "a-b"], "relation='a-b' is unknown"),
        (["--num-examples", "1"], "--num-examples 1: bm25 knows no examples"),
        (["--num-examples", "-1"], "--num-examples -1 must be 0"),
        (["--num-examples", "3"], "--num-examples 3: task words has 2 in examples.jsonl"),
        (["--task", "STS15"], "task STS15 is of type sts; reranked are retrieval and reranking"),
        (["--task", "nowhere/words"], "task nowhere/words: no such folder"),
    ],
)
def test_what_cannot_be_asked(command, arguments, message, capsys):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and error.splitlines()[-1].startswith("error: ")


def test_models_and_tasks_that_do_not_fit(command, own, words, trained, tmp_path, capsys):  # noqa: F811
    def error(status: int) -> str:
        assert status == 2
        return capsys.readouterr().err.splitlines()[-1]

    embedder = ["--reranker", str(trained[0]), "--retriever", "bm25", "--task", str(words)]
    assert "is an embedder (embedder.json), not a reranker" in error(evaluate_reranker.main(embedder))
    assert "is neither a trained embedder" in error(command(retriever=str(own[0])))
    assert "--retriever no/where: sentence-transformers cannot" in error(
        command(retriever=str(tmp_path / "no/where"))
    ).replace(f"{tmp_path}/", "")
    labels = write_typed(tmp_path / "labels", "clustering", rows_of("clustering"))
    assert "type='clustering' has no queries and passages" in error(command(task=labels))
    again = shutil.copytree(words, tmp_path / "again")
    assert "two tasks are named words" in error(command("--task", str(again)))
    (words / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    assert "no query has a relevant passage" in error(command())
    (tmp_path / "reranking.json").write_text('[{"task": "words"}]')
    assert "reranking.json is not a list of rankings" in error(command())
