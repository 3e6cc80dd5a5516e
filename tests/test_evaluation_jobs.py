"""Scores are kept under what decides them: nothing is computed twice, nothing is taken for something else."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_evaluation import BOTH, ROOT, WORDS, encode_words, write_lines, write_recipe, write_task

from pipeline import evaluate_embedder
from pipeline.evaluation.report import read_scores
from pipeline.evaluation.tasks import load_retrieval_task
from pipeline.files import take_lock

ENTRY = ROOT / "pipeline/evaluate_embedder.py"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("jobs"))


def evaluate(recipe: Path, scores: Path, *arguments: str, task: str = "words") -> int:
    options = ["--config", str(recipe), "--task", str(recipe.parent / task), "--scores", str(scores)]
    return evaluate_embedder.main([*options, "--num-examples", "2", *arguments])


def details(scores: Path) -> dict[str, dict]:
    """Mode -> how the score came about."""
    return {s.mode: json.loads((scores.parent / "evaluation" / s.details).read_text()) for s in read_scores(scores)}


def test_how_a_score_came_about_stands_beside_it(recipe: Path, tmp_path: Path) -> None:
    assert evaluate(recipe, tmp_path / "scores.json", "preprocess.max_passage_tokens=5") == 0
    found = details(tmp_path / "scores.json")
    zero, few = (found[mode] for mode in BOTH)
    assert zero["examples"] == [] and zero["prompt_of_first_query"].startswith("<instruct>Find the word.\n<query>where")
    assert few["examples"] == [{"query": "where is zinc", "response": "zinc"}, {"query": "x", "response": "y"}]
    assert few["prompt_of_first_query"].startswith("<instruct>Find the word.\n<query>where is zinc\n<response>zinc\n\n")
    assert few["instruction"] == "Find the word." and few["sides"] == "released" and few["normalized"]
    assert any(re.fullmatch(r"\d+ of 12 passages .* 5 tokens and were cut", note) for note in zero["notes"])
    assert {"mteb", "torch"} <= few["versions"].keys() and re.fullmatch("[0-9a-f]{64}", few["fingerprint"])
    assert few["scores"]["test"][0]["ndcg_at_10"] == few["value"]
    assert not (tmp_path / "evaluation/embeddings").exists() or not any((tmp_path / "evaluation/embeddings").iterdir())


def test_what_is_scored_is_not_scored_again(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = tmp_path / "scores.json"
    assert evaluate(recipe, scores, "--modes", "zero_shot") == 0
    value = read_scores(scores)[0].value
    from pipeline.evaluation import jobs

    scored = []
    whole = jobs._score
    monkeypatch.setattr(jobs, "_score", lambda *job: scored.append(job[2]) or whole(*job))
    scores.unlink()
    assert evaluate(recipe, scores) == 0
    assert scored == ["few_shot"]
    assert f"words zero_shot: {value:.4f}, as scored on" in caplog.text
    assert [s.value for s in read_scores(scores) if s.mode == "zero_shot"] == [value]
    # Another label is the same model; other weights, limits, sides, texts or examples are not.
    assert evaluate(recipe, scores, "--label", "same") == 0
    assert scored == ["few_shot"]
    assert evaluate(recipe, scores, "preprocess.max_passage_tokens=9", "--modes", "zero_shot") == 0
    assert evaluate(recipe, scores, "--sides", "trained", "--modes", "zero_shot") == 0
    assert evaluate(recipe, scores, "--num-examples", "1", "--modes", "few_shot") == 0
    other = write_task(tmp_path / "tasks" / "words")
    lines = (other / "corpus.jsonl").read_text().splitlines()
    (other / "corpus.jsonl").write_text("\n".join([*lines[:-1], json.dumps({"_id": "d11", "text": "lake"})]))
    assert evaluate(recipe, scores, "--modes", "zero_shot", task=str(other)) == 0
    monkeypatch.setattr(jobs, "PROTOCOL", 0)
    assert evaluate(recipe, scores, "--modes", "few_shot") == 0
    assert scored == ["few_shot", "zero_shot", "zero_shot", "few_shot", "zero_shot", "few_shot"]


def test_a_damaged_record_is_named(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = tmp_path / "scores.json"
    assert evaluate(recipe, scores, "--modes", "zero_shot") == 0
    record = next((tmp_path / "evaluation").glob("*.json"))
    record.write_text('{"value": ')
    assert evaluate(recipe, scores, "--modes", "zero_shot") == 2
    assert f"{record} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_embeddings_without_examples_are_made_once(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from pipeline.evaluation.memory import collect_notes, remembered

    # Notes are whole whatever another part of the program lets through to the screen.
    caplog.set_level("WARNING", logger="pipeline.inference")

    def never() -> np.ndarray:
        raise AssertionError("is there already")

    def encode() -> np.ndarray:
        logging.getLogger("pipeline.inference.embedder").info("1 of 2 passages were cut")
        return encode_words(texts, "bare")

    texts, memory = ["ash", "bay"], tmp_path if kind == "folder" else {}
    made = remembered(memory, "bare", texts, encode)
    with collect_notes() as notes:
        np.testing.assert_array_equal(remembered(memory, "bare", texts, never), made)
    assert notes == ["1 of 2 passages were cut"], "what was cut is said again"
    for carry, others in (("instruction", texts), ("bare", texts[::-1]), ("bare", ["ash"]), ("bare", ["ashbay"])):
        with pytest.raises(AssertionError, match="is there already"):
            remembered(memory, carry, others, never)


def test_notes_of_shared_passages_stand_beside_both_scores(recipe: Path, tmp_path: Path) -> None:
    assert evaluate(recipe, tmp_path / "scores.json", "preprocess.max_passage_tokens=5") == 0
    for record in details(tmp_path / "scores.json").values():
        assert any("passages" in note and "cut" in note for note in record["notes"]), record["mode"]


def test_another_model_of_the_same_label_takes_its_place(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores = tmp_path / "scores.json"
    assert evaluate(recipe, scores) == 0
    old = {s.fingerprint for s in read_scores(scores)}
    assert evaluate(recipe, scores, "preprocess.max_passage_tokens=9", "--modes", "zero_shot") == 0
    found = read_scores(scores)
    assert [s.mode for s in found] == ["zero_shot"] and {s.fingerprint for s in found}.isdisjoint(old)
    assert "1 older scores labelled before are another model's" in caplog.text


def test_a_task_that_another_process_is_at_is_waited_for(recipe: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    assert evaluate(recipe, scores, "--modes", "zero_shot") == 0
    (lock,) = (tmp_path / "evaluation/locks").iterdir()
    scores.unlink()
    command = [sys.executable, str(ENTRY), "--config", str(recipe), "--task", str(recipe.parent / "words")]
    command += ["--modes", "zero_shot", "--scores", str(scores)]
    held = take_lock(lock)
    assert held is not None
    with (
        held,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        ) as waiting,
    ):
        assert waiting.stdout is not None
        line = next(line for line in waiting.stdout if "another process" in line)
        assert line == "words: another process scores it; waiting\n" and not scores.exists()
        held.close()
        waiting.stdout.read()
    assert waiting.returncode == 0 and len(read_scores(scores)) == 1


def test_names_are_no_paths(recipe: Path, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "words")
    header = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(header | {"name": "../org/words"}))
    assert evaluate(recipe, tmp_path / "out/scores.json", "--modes", "zero_shot", task=str(folder)) == 0
    assert read_scores(tmp_path / "out/scores.json")[0].task == "../org/words"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "words"]


def test_two_tasks_of_one_name(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(recipe, tmp_path / "scores.json", "--task", str(write_task(tmp_path / "other"))) == 2
    assert "two tasks are named words" in capsys.readouterr().err


def test_where_nothing_is_scored_that_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_task(tmp_path / "labels")
    (folder / "task.json").write_text('{"name": "labels", "type": "clustering", "instruction": ""}')
    write_lines(folder / "test.jsonl", [{"text": word, "label": i % 2} for i, word in enumerate(WORDS)])
    options = ["--baseline", "bm25", "--task", str(folder), "--scores", str(tmp_path / "scores.json")]
    assert evaluate_embedder.main(options) == 2
    assert "nothing was scored" in capsys.readouterr().err


def test_any_error_of_a_task_lets_the_others_go_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.evaluation import jobs

    whole = jobs._score

    def score(model, job, mode, memory):
        if job.task == "words":
            raise ZeroDivisionError("by mteb")
        return whole(model, job, mode, memory)

    monkeypatch.setattr(jobs, "_score", score)
    other = write_task(tmp_path / "other")
    header = json.loads((other / "task.json").read_text())
    (other / "task.json").write_text(json.dumps(header | {"name": "other"}))
    options = ["--modes", "zero_shot", "--task", str(other)]
    assert evaluate(recipe, tmp_path / "scores.json", *options) == 1
    error = capsys.readouterr().err
    assert "error: words: by mteb" in error and "ZeroDivisionError" in error
    assert [s.task for s in read_scores(tmp_path / "scores.json")] == ["other"]


@pytest.mark.parametrize(
    ("name", "instruction"),
    [("BuiltBenchReranking", "Given a query, retrieve relevant entity descriptions for buildings"), ("STS15", None)],
)
def test_mteb_s_own_instruction_is_taken_where_the_paper_has_none(name: str, instruction: str | None) -> None:
    import mteb

    from pipeline.evaluation.jobs import public_job

    job = public_job(name, None, "released", None, None)
    prompt = mteb.get_task(name).metadata.prompt
    assert job.instruction == (prompt["query"] if instruction else "Retrieve semantically similar text.")


def test_a_local_copy_is_known_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    from pipeline.evaluation.jobs import public_job

    row = {"sentence1": "a", "sentence2": "b", "score": 1.0}
    roots = [
        make_sts(tmp_path / name, "mteb/sts15-sts", row | {"score": score})
        for name, score in (("a", 1.0), ("b", 1.0), ("c", 2.0))
    ]
    data = [public_job("STS15", None, "released", root, None).data for root in roots]
    assert data[0] == data[1] != data[2] and str(tmp_path) not in data[0]
    assert data[0] != public_job("STS15", None, "released", None, None).data


def test_one_failing_task_does_not_end_the_others(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = tmp_path / "scores.json"
    missing = ["--task", "SICK-R", "--data-root", str(make_sts(tmp_path, "mteb/sickr-sts", {"sentence1": "a"}))]
    assert evaluate(recipe, scores, *missing, "--modes", "zero_shot") == 1
    captured = capsys.readouterr()
    assert "error: SICK-R: " in captured.err and "1 of 2 tasks failed: SICK-R" in captured.err
    assert [s.task for s in read_scores(scores)] == ["words"]


def make_sts(folder: Path, name: str, *rows: dict) -> Path:
    (folder / "data" / name).mkdir(parents=True)
    write_lines(folder / "data" / name / "test.jsonl", list(rows))
    return folder / "data"


def test_a_task_of_mteb_by_name_on_a_local_copy_of_its_data(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = [
        {"sentence1": f"{a} {b}", "sentence2": f"{b} lake", "score": float(i)}
        for i, (a, b) in enumerate(zip(WORDS, WORDS[1:], strict=False))
    ]
    root = make_sts(tmp_path, "mteb/sts15-sts", *pairs)
    (tmp_path / "examples" / "MTEB").mkdir(parents=True)
    (tmp_path / "examples/MTEB/STS15.json").write_text(json.dumps([{"query": "ash", "response": "ash"}]))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = ["--config", str(recipe), "--task", "STS15", "--data-root", str(root)]
    options += ["--scores", str(tmp_path / "s.json")]
    assert evaluate_embedder.main([*options, "--examples-root", str(tmp_path / "examples")]) == 0
    out = capsys.readouterr().out
    assert "paper public few-shot" in out
    found = details(tmp_path / "s.json")
    assert found["few_shot"]["instruction"] == "Retrieve semantically similar text."
    assert found["few_shot"]["examples"] == [{"query": "ash", "response": "ash"}]
    assert len(found) == 2 and "mteb/sts15-sts@" in found["zero_shot"]["data"]
    # Without examples there is no few_shot to speak of.
    assert evaluate_embedder.main([*options, "--label", "other"]) == 0
    assert "STS15: no examples are known, few_shot is left out" in caplog.text
    assert [(s.model, s.mode) for s in read_scores(tmp_path / "s.json")][-1] == ("other", "zero_shot")


def test_processes_share_the_tasks(recipe: Path, tmp_path: Path) -> None:
    tasks = []
    for number in range(3):
        folder = write_task(tmp_path / f"words{number}")
        header = json.loads((folder / "task.json").read_text())
        (folder / "task.json").write_text(json.dumps(header | {"name": f"words{number}"}))
        tasks += ["--task", str(folder)]
    command = [sys.executable, str(ENTRY), "--config", str(recipe), *tasks, "--num-examples", "2", "--processes", "2"]
    command += ["--scores", str(tmp_path / "scores.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert len(read_scores(tmp_path / "scores.json")) == 6
    # Everything was scored once, by the processes; the first one only read what they had found.
    assert len(re.findall(r"zero_shot: 0\.\d+, as scored on", result.stdout)) >= 3
    records = [json.loads(path.read_text()) for path in (tmp_path / "evaluation").glob("*.json")]
    assert sorted((r["task"], r["mode"]) for r in records) == sorted((f"words{n}", m) for n in range(3) for m in BOTH)


def test_bm25_ranks_and_only_ranks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = write_task(tmp_path / "labels")
    (texts / "task.json").write_text('{"name": "labels", "type": "clustering", "instruction": ""}')
    write_lines(texts / "test.jsonl", [{"text": word, "label": i % 2} for i, word in enumerate(WORDS)])
    passages = write_task(tmp_path / "words")
    corpus = [json.loads(line)["text"] for line in (passages / "corpus.jsonl").read_text().splitlines()]
    write_lines(passages / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(corpus)])
    qrels = "".join(f"q{i}\td{i}\t1\n" for i in range(len(corpus)))
    (passages / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    options = ["--baseline", "bm25", "--task", str(passages), "--task", str(texts)]
    assert evaluate_embedder.main([*options, "--scores", str(tmp_path / "scores.json")]) == 0
    assert "labels: bm25 cannot score a task of type clustering; left out" in caplog.text
    (score,) = read_scores(tmp_path / "scores.json")
    assert (score.model, score.mode, score.task) == ("bm25", "zero_shot", "words") and score.value == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "Nonsense"], "task Nonsense is neither a folder nor a task of mteb"),
        (["--task", "BUCC.v2"], "task BUCC.v2 is of mteb's type BitextMining; evaluated are Retrieval"),
        (["--benchmark", "none"], "--benchmark none is not evaluated here; known are MTEB(eng, v1)"),
        ([], "nothing to score: name a --task or a --benchmark"),
        (["--task", "STS15", "--examples-root", "nowhere"], "nowhere/MTEB/STS15.json: no examples for task 'STS15'"),
    ],
)
def test_entry_errors(recipe: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_embedder.main(["--config", str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_baseline_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_task(tmp_path / "words")
    assert evaluate_embedder.main(["--baseline", str(tmp_path / "none"), "--task", str(task)]) == 2
    assert "sentence-transformers cannot load it" in capsys.readouterr().err


def write_air_bench(folder: Path, split: str) -> Path:
    """The words as a dataset of AIR-Bench."""
    words = write_task(folder / "words")
    place = folder / "qa_law_en" / "AIR-Bench_24.05" / "default"
    place.mkdir(parents=True)
    for source, name in (("corpus", "corpus"), ("queries", f"{split}_queries")):
        rows = [json.loads(line) for line in (words / f"{source}.jsonl").read_text().splitlines()]
        write_lines(place / f"{name}.jsonl", [{"id": row["_id"], "text": row["text"]} for row in rows])
    lines = [line.split("\t") for line in (words / "qrels/test.tsv").read_text().splitlines()[1:]]
    qrels = [{"qid": query, "docid": passage, "relevance": int(grade)} for query, passage, grade in lines]
    if split == "dev":
        write_lines(place / "dev_qrels.jsonl", qrels)
    return place


def test_air_bench_is_scored_by_its_dev_split(recipe: Path, tmp_path: Path) -> None:
    place = write_air_bench(tmp_path, "dev")
    scores = tmp_path / "scores.json"
    assert evaluate(recipe, scores, "--modes", "zero_shot", task=str(place)) == 0
    found = read_scores(scores)
    assert [(s.task, s.metric, s.kind) for s in found] == [("qa_law_en", "ndcg_at_10", "retrieval")]
    same = ["--task", str(tmp_path / "words"), "--modes", "zero_shot", "--scores", str(tmp_path / "other.json")]
    # The same texts behind the same instruction have the same score.
    header = json.loads((tmp_path / "words/task.json").read_text())
    instruction = "Given a question, retrieve passages that answer the question."
    (tmp_path / "words/task.json").write_text(json.dumps(header | {"instruction": instruction}))
    (tmp_path / "words/examples.jsonl").unlink()
    assert evaluate_embedder.main(["--config", str(recipe), *same]) == 0
    assert read_scores(tmp_path / "other.json")[0].value == found[0].value


def test_air_bench_s_test_queries_are_ranked(recipe: Path, tmp_path: Path) -> None:
    place = write_air_bench(tmp_path, "test")
    options = ["--config", str(recipe), "--task", str(place), "--rankings", str(tmp_path / "rankings")]
    assert evaluate_embedder.main(options) == 0
    (file,) = (tmp_path / "rankings").rglob("*.json")
    record = json.loads(file.read_text())
    assert record["model_name"] == "before-zero_shot" and len(record["search_results"]) == 7
    assert all(len(scores) == 12 for scores in record["search_results"].values())


@pytest.mark.parametrize(("depth", "block"), [(3, 5), (12, 12), (50, 1), (1, 4)])
def test_ranks_are_those_of_the_whole_matrix(tmp_path: Path, depth: int, block: int) -> None:
    from pipeline.evaluation.ranking import rank

    task = load_retrieval_task(write_task(tmp_path / "words"))
    found = rank(task, encode_words, "released", depth, block)
    score_QP = encode_words(list(task.queries.values()), "") @ encode_words(list(task.corpus.values()), "").T
    passages = list(task.corpus)
    for query, row in zip(task.queries, score_QP, strict=True):
        best = np.argsort(-row, kind="stable")[:depth]
        assert list(found[query]) == [passages[p] for p in best]
        np.testing.assert_allclose(list(found[query].values()), row[best], atol=1e-6)
