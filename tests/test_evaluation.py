"""Task folders, scores by mteb against a slow twin, scores.json and report.md, and the entry as a whole."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_run import make_tiny_model

from pipeline import evaluate_embedder
from pipeline.evaluation.report import add_scores, read_scores, write_report
from pipeline.evaluation.table import Score, score_table
from pipeline.evaluation.tasks import RetrievalTask, load_retrieval_task, load_task
from pipeline.settings import LossSettings, Settings, dump_settings

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("ash", "bay", "cliff", "delta", "elm", "fern", "glen", "hill", "isle", "jade", "kelp", "lake")
EXAMPLES = (("where is zinc", "zinc"), ("x", "y"))


def write_task(folder: Path) -> Path:
    """Twelve passages of two words, six judged queries, one query without a relevant passage, two examples."""
    (folder / "qrels").mkdir(parents=True)
    passages = [f"{word} {WORDS[(i * 5 + 3) % 12]}" for i, word in enumerate(WORDS)]
    task = {"name": "words", "type": "retrieval", "instruction": "Find the word.", "metric": "ndcg_at_10"}
    (folder / "task.json").write_text(json.dumps(task))
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(passages)])
    queries = [{"_id": f"q{i}", "text": f"where is {WORDS[i]} {WORDS[-i]}"} for i in range(7)]
    write_lines(folder / "queries.jsonl", queries)
    qrels = [f"q{i}\td{i}\t2\nq{i}\td{11 - i}\t1\nq{i}\td{(i + 4) % 12}\t0" for i in range(6)]
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(qrels) + "\n")
    write_lines(folder / "examples.jsonl", [{"query": q, "response": r} for q, r in EXAMPLES])
    return folder


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_task(tmp_path / "words")


def test_a_task_is_read(folder: Path) -> None:
    task = load_retrieval_task(folder)
    assert (task.name, task.instruction, task.metric) == ("words", "Find the word.", "ndcg_at_10")
    assert list(task.queries) == [f"q{i}" for i in range(6)]
    assert task.num_unjudged == 1
    assert task.relevant["q1"] == {"d1": 2, "d10": 1, "d5": 0}
    assert task.corpus["d0"] == "ash delta"
    assert task.examples == EXAMPLES


def test_title_and_text_are_joined(folder: Path) -> None:
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    lines[0] = json.dumps({"_id": "d0", "title": "Stones", "text": "ash"})
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    assert load_retrieval_task(folder).corpus["d0"] == "Stones ash"


def test_a_task_without_examples(folder: Path) -> None:
    (folder / "examples.jsonl").unlink()
    assert load_task(folder).examples == ()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("task.json", None, "is not a task folder: task.json is missing"),
        ("task.json", "{", "task.json is not valid JSON"),
        (
            "task.json",
            '{"type": "poem", "name": "a", "instruction": ""}',
            "type='poem' cannot be evaluated; known: retr",
        ),
        (
            "task.json",
            '{"type": "sts", "name": "a", "instruction": "", "metric": "f1"}',
            "unknown metric 'f1' of type sts",
        ),
        ("task.json", '{"type": "retrieval", "name": "a"}', "instruction=None must be a text"),
        ("task.json", '{"type": ["retrieval"], "name": "a"}', "type=['retrieval'] cannot be evaluated"),
        ("task.json", '{"type": "retrieval", "name": "a", "metric": "ndcg_at_7"}', "unknown metric 'ndcg_at_7'"),
        ("queries.jsonl", '{"_id": "q0", "text": "\\ud83d"}\n', "queries.jsonl:1 holds half a character"),
        ("corpus.jsonl", None, "corpus.jsonl is missing"),
        ("queries.jsonl", None, "queries.jsonl is missing"),
        ("qrels/test.tsv", None, "qrels/test.tsv is missing"),
        ("corpus.jsonl", '{"_id": "a", "text": "b"}\n{"_id"\n', "corpus.jsonl:2 is not a line of JSON"),
        ("corpus.jsonl", "[1]\n", "corpus.jsonl:1 must be a JSON object, got list"),
        ("corpus.jsonl", '{"_id": "a"}\n', "corpus.jsonl:1 must have an _id and a text"),
        ("corpus.jsonl", '{"_id": "a", "text": "b"}\n{"_id": "a", "text": "c"}\n', "corpus.jsonl:2: _id='a' stands"),
        ("corpus.jsonl", "", "corpus.jsonl is empty"),
        ("queries.jsonl", '{"_id": "q0", "text": " "}\n', "queries.jsonl:1: the text of _id='q0' is empty"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td99\t1\n", "test.tsv:2 names 'd99', which corpus.jsonl"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq99\td0\t1\n", "test.tsv:2 names 'q99', which queries.jsonl"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0 d0 1\n", "test.tsv:2 must be"),
        ("qrels/test.tsv", "q0\td0\t1.0\nq1\td1\t1\n", "test.tsv:1 must be"),
        ("corpus.jsonl", "[" * 100_000, "corpus.jsonl:1 is not a line of JSON: maximum recursion"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\t0\n", "no query has a relevant passage"),
        ("examples.jsonl", '{"query": "a"}\n', "examples.jsonl:1 must have a query and a response"),
    ],
)
def test_faults_name_file_and_line(folder: Path, file: str, text: str | None, message: str) -> None:
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task(folder)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_task(tmp_path / "none")


# Scores.


def embed_words(texts: Sequence[str]) -> np.ndarray:
    """Bags of words, blurred so that no two cosines are equal."""
    vocabulary = np.random.default_rng(0).normal(size=(len(WORDS) + 1, 16))
    rows = []
    for text in texts:
        words = [WORDS.index(word) if word in WORDS else len(WORDS) for word in text.split()]
        rows.append(vocabulary[words].sum(0))
    embeddings = np.array(rows, dtype=np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def ndcg_at_10(task: RetrievalTask) -> float:
    """The slow twin: linear gain over log2 of the rank, as trec_eval."""
    values = []
    passages = list(task.corpus)
    passage_PD = embed_words(list(task.corpus.values()))
    for identity, text in task.queries.items():
        ranking = np.argsort(-(passage_PD @ embed_words([text])[0]))[:10]
        gains = [task.relevant[identity].get(passages[p], 0) for p in ranking]
        best = sorted(task.relevant[identity].values(), reverse=True)[:10]
        values.append(dcg(gains) / dcg(best))
    return sum(values) / len(values)


def dcg(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))


def encode_words(texts: list[str], carry: str) -> np.ndarray:
    return embed_words(texts)


def test_the_score_is_that_of_the_slow_twin(folder: Path) -> None:
    from pipeline.evaluation.runner import score_local

    task = load_retrieval_task(folder)
    wanted = ndcg_at_10(task)
    assert 0.2 < wanted < 0.98, "a test on a perfect ranking would see little"
    assert score_local(task, encode_words) == pytest.approx(wanted, abs=1e-5)


def test_a_misspelt_metric_is_found_on_reading(folder: Path) -> None:
    header = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(header | {"metric": "ndcg_at_ten"}))
    with pytest.raises(ValueError, match="task.json: unknown metric 'ndcg_at_ten' of type retrieval"):
        load_task(folder)


def test_a_metric_that_mteb_does_not_compute(folder: Path) -> None:
    from pipeline.evaluation.runner import score_local

    task = replace(load_retrieval_task(folder), metric="ndcg_at_11")
    with pytest.raises(ValueError, match="mteb has no metric 'ndcg_at_11' for tasks of type Retrieval"):
        score_local(task, encode_words)


def test_embeddings_that_are_not_finite_are_refused(folder: Path) -> None:
    from pipeline.evaluation.runner import score_local

    with pytest.raises(ValueError, match="not finite"):
        score_local(load_task(folder), lambda texts, carry: embed_words(texts) * np.nan)


def test_examples_are_the_first_ones_and_enough(folder: Path) -> None:
    from pipeline.evaluation.runner import choose_examples

    task = load_task(folder)
    assert choose_examples(task, 1) == task.examples[:1]
    with pytest.raises(ValueError, match="--num-examples 3: task words has 2"):
        choose_examples(task, 3)
    with pytest.raises(ValueError, match="--num-examples 0 leaves few_shot without examples"):
        choose_examples(task, 0)


class RecordingEmbedder:
    """Stands for an embedder; remembers what it was asked."""

    def __init__(self) -> None:
        self.queries: list[tuple[int, str, tuple, bool]] = []
        self.passages: list[tuple[int, bool]] = []

    def encode_queries(
        self, texts: Sequence[str], instruction: str, examples: Sequence = (), normalize: bool = True
    ) -> np.ndarray:
        self.queries.append((len(texts), instruction, tuple(examples), normalize))
        return embed_words(texts)

    def encode_passages(self, texts: Sequence[str], normalize: bool = True) -> np.ndarray:
        self.passages.append((len(texts), normalize))
        return embed_words(texts)


BOTH = ("zero_shot", "few_shot")


def test_modes_differ_in_examples_only_and_share_passages(folder: Path) -> None:
    from pipeline.evaluation.runner import score_modes

    task, embedder = load_retrieval_task(folder), RecordingEmbedder()
    scores = score_modes(embedder, task, BOTH, 2)  # type: ignore[arg-type]
    wanted = [(6, task.instruction, (), True), (6, task.instruction, task.examples, True)]
    assert embedder.queries == wanted
    assert embedder.passages == [(len(task.corpus), True)]
    assert list(scores) == ["zero_shot", "few_shot"]
    assert scores["zero_shot"] == scores["few_shot"] == pytest.approx(ndcg_at_10(task), abs=1e-5)


# scores.json and report.md.

BEFORE = Score("before", "zero_shot", "words", "ndcg_at_10", 0.25)


def test_scores_are_added_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run/scores.json"
    add_scores(path, [BEFORE, replace(BEFORE, mode="few_shot")])
    assert add_scores(path, [replace(BEFORE, value=0.5), replace(BEFORE, model="after")]) == read_scores(path)
    found = [(s["model"], s["mode"], s["value"]) for s in json.loads(path.read_text())]
    assert found == [("before", "few_shot", 0.25), ("before", "zero_shot", 0.5), ("after", "zero_shot", 0.25)]
    keys = ["model", "mode", "task", "metric", "value", "kind", "novelty", "sides", "fingerprint", "details"]
    assert list(json.loads(path.read_text())[0]) == keys


def test_scores_from_before_fingerprints_are_kept(tmp_path: Path) -> None:
    add_scores(tmp_path / "scores.json", [BEFORE])
    new = replace(BEFORE, task="other", fingerprint="f")
    assert add_scores(tmp_path / "scores.json", [new]) == [BEFORE, new]
    assert add_scores(tmp_path / "scores.json", [replace(new, fingerprint="g")])[1:] == [replace(new, fingerprint="g")]


def test_a_damaged_scores_file(tmp_path: Path) -> None:
    for damaged in (b'[{"model": "x"}]', b"[{", b"\xff\xfe"):
        (tmp_path / "scores.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"scores\.json is not a list of scores"):
            add_scores(tmp_path / "scores.json", [BEFORE])


def test_the_table() -> None:
    lines = score_table([BEFORE]).splitlines()
    assert lines[0].split() == ["task", "metric", "before", "zero-shot"]
    assert lines[2].split() == ["words", "ndcg_at_10", "0.2500"]


def test_means_stand_below_several_tasks_and_only_where_every_task_has_a_score() -> None:
    def score(model: str, mode: str, task: str, value: float, kind: str, novelty: str) -> Score:
        return Score(model, mode, task, "m", value, kind, novelty)

    tasks = [("a", "sts", "unseen"), ("b", "sts", "trained-on"), ("c", "retrieval", "unseen")]
    scores = [
        score("x", mode, *t[:1], 0.1 * n + (mode == "few_shot") * 0.2 * n, *t[1:])
        for n, t in enumerate(tasks)
        for mode in BOTH
    ]
    scores += [score("y", "zero_shot", "a", 0.5, "sts", "")]
    rows = [re.split(r" {2,}", line) for line in score_table(scores).splitlines()]
    assert rows[0] == ["task", "metric", "novelty", "x zero-shot", "x few-shot", "x gain", "y zero-shot"]
    assert rows[2:] == [
        ["a", "m", "unseen", "0.0000", "0.0000", "+0.0000", "0.5000"],
        ["b", "m", "trained-on", "0.1000", "0.3000", "+0.2000"],
        ["c", "m", "unseen", "0.2000", "0.6000", "+0.4000"],
        ["mean of 3: all", "0.1000", "0.3000", "+0.2000"],
        ["mean of 2: unseen", "0.1000", "0.3000", "+0.2000"],
        ["mean of 2: sts", "0.0500", "0.1500", "+0.1000"],
    ]


def test_marks_of_models_that_differ_are_not_shown_for_all() -> None:
    marks = [Score(model, "zero_shot", "a", "m", 0.5, novelty=mark) for model, mark in (("x", "unseen"), ("y", "seen"))]
    assert "unseen" not in score_table(marks) and "unseen" in score_table(marks[:1])


def test_scores_of_other_sides_have_no_gain() -> None:
    scores = [
        Score("x", mode, "a", "m", 0.5, sides=sides) for mode, sides in zip(BOTH, ("released", "trained"), strict=True)
    ]
    assert score_table(scores).splitlines()[2].split() == ["a", "m", "0.5000", "0.5000"]


def test_the_paper_stands_beside_public_tasks() -> None:
    lines = score_table([Score("x", "zero_shot", "ArguAna", "ndcg_at_10", 0.5)]).splitlines()
    assert "paper public few-shot" in lines[0]
    assert lines[2].split()[-2:] == ["0.5581", "0.5541"]


def test_the_report(tmp_path: Path) -> None:
    scores = [BEFORE, replace(BEFORE, model="after", value=0.75), replace(BEFORE, model="after", mode="few_shot")]
    (tmp_path / "loss.png").touch()
    text = write_report(tmp_path, Settings(), scores, ["a note"]).read_text()
    assert "| task | metric | before zero-shot | after zero-shot | after few-shot | after gain |" in text
    assert "| words | ndcg_at_10 | 0.2500 | 0.7500 | 0.2500 | -0.5000 |" in text
    assert "- a note" in text
    assert "![loss](loss.png)" in text
    assert "torch 2." in text
    assert "| loss | temperature 0.02 |" in text
    options = replace(Settings(), loss=LossSettings(filter_ratio=0.95, mask_shown=True, matryoshka_dims=(64, 256)))
    text_with_options = write_report(tmp_path, options, scores, []).read_text()
    wanted = "| loss | temperature 0.02, filter_ratio 0.95, mask_shown True, matryoshka_dims [64, 256] |"
    assert wanted in text_with_options
    assert "settings.yaml" not in text, "no link to a file that is not there"


# The entry.


def write_recipe(folder: Path) -> Path:
    """A recipe with a tiny model and the task."""
    make_tiny_model(folder / "model", [*WORDS, "where is the word", "Find the word."])
    write_task(folder / "words")
    tree = {
        "model": {"name": "./model", "dtype": "fp32"},
        "preprocess": {"max_query_tokens": 64, "max_prompt_tokens": 300, "max_passage_tokens": 64},
        "data": {"root": ".", "store": "store"},
        "run": {"output_dir": "run", "deepspeed": "zero0.json", "chunk_tokens": 300},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("entry"))


def test_the_entry_scores_a_base_model(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(recipe), "--task", str(recipe.parent / "words"), "--num-examples", "2"]
    assert evaluate_embedder.main(arguments) == 0
    out = capsys.readouterr().out
    scores = read_scores(recipe.parent / "run/scores.json")
    assert [(s.model, s.mode, s.task) for s in scores] == [("before", m, "words") for m in ("zero_shot", "few_shot")]
    assert all(0 <= s.value <= 1 for s in scores)
    assert score_table(scores) in out
    assert "6 queries, 1 without a relevant passage left out, 12 passages" in out
    assert "    <instruct>Find the word.\n    <query>where is zinc\n    <response>zinc\n    \n" in out
    assert "    <response><|end|>" in out
    assert (recipe.parent / "run/report.md").is_file()
    assert evaluate_embedder.main([*arguments, "--modes", "zero_shot", "--label", "other"]) == 0
    assert [s.model for s in read_scores(recipe.parent / "run/scores.json")] == ["before", "before", "other"]


def test_entry_errors(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--task", str(recipe.parent / "words")]
    empty = tmp_path / "run"
    empty.mkdir()
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(recipe, unfinished / "settings.yaml")
    cases = {
        ("--config", str(recipe), "--task", str(tmp_path / "none")): "no such folder",
        ("--config", str(recipe), *task, "--modes", "one_shot"): "'one_shot' is unknown; known: zero_shot, few_shot",
        ("--config", str(recipe), *task, "--num-examples", "3"): "task words has 2 in examples.jsonl",
        ("--config", str(recipe), *task, "--num-examples", "2", "model.name=./nowhere"): "nowhere",
        ("--config", str(recipe), *task, "--num-examples", "2", "--chunk-tokens", "100"): "longest sequence, 300",
        ("--run", str(empty), *task): "is not the folder of a run: settings.yaml is missing",
        ("--run", str(unfinished), *task, "--num-examples", "2"): "embedder.json is missing",
        ("--run", str(unfinished), *task, "model.dtype=fp32"): "a trained model keeps its settings",
    }
    for arguments, message in cases.items():
        assert evaluate_embedder.main(arguments) == 2, arguments
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err, err


def test_model_or_recipe_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate_embedder.main(["--task", "x"])
    assert stop.value.code == 2
    assert "--run --config" in capsys.readouterr().err


def test_settings_of_a_run_are_read(recipe: Path, tmp_path: Path) -> None:
    settings = evaluate_embedder.read_settings(None, recipe, [])
    (tmp_path / "settings.yaml").write_text(dump_settings(settings))
    assert evaluate_embedder.read_settings(tmp_path, None, []) == settings
