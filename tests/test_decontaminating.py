"""Decontamination: texts of every kind of evaluation set, matches against a slow twin, the entry as a whole."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_store import make_store
from samples import write_recipe

from pipeline.data import normalizing
from pipeline.data.decontaminating import contaminated, find_matches
from pipeline.data.eval_texts import EvaluationTexts, folder_texts, mteb_texts
from pipeline.data.normalizing import is_among, normalize_text, text_key
from pipeline.data.store import open_store
from pipeline.datatypes import RULES
from pipeline.decontaminate import load_mteb_texts, main
from pipeline.preprocess import main as preprocess
from pipeline.settings import load_settings


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def keys(*texts: str) -> list[int]:
    return sorted({text_key(text) for text in texts})


def evaluation(name: str, queries: Sequence[str], corpus: Sequence[str] = ()) -> EvaluationTexts:
    return EvaluationTexts(name, np.array(keys(*queries), np.uint64), np.array(keys(*corpus), np.uint64))


# What is read.


def test_a_retrieval_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "e/queries.jsonl", [{"_id": "1", "text": "Who?"}, {"_id": "2", "text": "who? "}])
    write_lines(
        tmp_path / "e/corpus.jsonl", [{"_id": "1", "title": "Me", "text": "It was me"}, {"_id": "2", "text": ""}]
    )
    write_lines(tmp_path / "e/examples.jsonl", [{"query": "example", "response": "response"}])
    (found,) = folder_texts(tmp_path / "e")
    assert found.name == "e"
    assert found.queries.tolist() == keys("who?")
    assert found.corpus.tolist() == keys("it was me", "me it was me"), "with and without the title; no examples"
    assert found.queries.dtype == found.corpus.dtype == np.uint64


@pytest.mark.parametrize(
    ("row", "queries", "corpus"),
    [
        ({"text": "A", "label": "L"}, ["a"], []),
        ({"sentence1": "A", "sentence2": "B", "score": 2.0}, ["a", "b"], []),
        ({"query": "A", "positive": ["B"], "negative": ["C", "D"]}, ["a"], ["b", "c", "d"]),
        ({"sentences": ["A", "B"], "labels": ["L", "M"]}, ["a", "b"], []),
    ],
)
def test_other_folders(row: dict, queries: list[str], corpus: list[str], tmp_path: Path) -> None:
    write_lines(tmp_path / "e/test.jsonl", [row])
    (found,) = folder_texts(tmp_path / "e")
    assert (found.queries.tolist(), found.corpus.tolist()) == (keys(*queries), keys(*corpus))


def test_a_pool_is_a_set_of_its_own(tmp_path: Path) -> None:
    write_lines(tmp_path / "e/test.jsonl", [{"text": "a", "label": "l"}])
    write_lines(tmp_path / "e/train.jsonl", [{"text": "b", "label": "l"}])
    found = folder_texts(tmp_path / "e")
    wanted = [("e", keys("a"), False), ("e/train", keys("b"), True)]
    assert [(e.name, e.queries.tolist(), e.is_pool) for e in found] == wanted


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (None, "", "no such folder"),
        ("task.json", "{}", "is not an evaluation folder: it holds none of queries.jsonl"),
        ("test.jsonl", "{", "test.jsonl:1 is not a line of JSON"),
        ("test.jsonl", "[]", "test.jsonl:1 must be a JSON object, got list"),
        ("test.jsonl", "[" * 100_000, "test.jsonl:1 is not a line of JSON: maximum recursion"),
        ("queries.jsonl", '{"text": " "}', "queries.jsonl:1 holds no text in text: "),
        ("test.jsonl", '{"label": "x"}', "test.jsonl:1 holds no text in query, text"),
    ],
)
def test_folders_that_cannot_be_read(file: str | None, line: str, message: str, tmp_path: Path) -> None:
    if file:
        (tmp_path / "e").mkdir()
        (tmp_path / "e" / file).write_text(line)
    with pytest.raises(ValueError, match="e") as caught:
        folder_texts(tmp_path / "e")
    assert message in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e/queries.jsonl").write_bytes(b'\xef\xbb\xbf{"_id": "1", "text": "A"}\n\n{"_id": "2", "text": "B"}')
    (found,) = folder_texts(tmp_path / "e")
    assert found.queries.tolist() == keys("a", "b")


def test_passages_without_text_are_counted(tmp_path: Path) -> None:
    from datasets import Dataset

    passages = [{"_id": "1", "contents": "A"}, {"_id": "2", "text": " "}, {"_id": "3", "text": "B"}]
    passages += [{"_id": "4", "title": "C", "text": None}, {"_id": "5", "text": 5}]
    write_lines(tmp_path / "e/corpus.jsonl", passages)
    (found,) = folder_texts(tmp_path / "e")
    assert (found.corpus.tolist(), found.without_text) == (keys("b", "c"), 4)
    write_lines(tmp_path / "all/corpus.jsonl", passages[:1])
    (found,) = folder_texts(tmp_path / "all")
    assert (found.corpus.tolist(), found.without_text) == ([], 1), "a folder of another form is not passed over"
    split = {"queries": [{"id": "1", "text": "A"}, {"id": "2", "text": None}], "corpus": passages}
    assert mteb_texts(stub_task({"test": split})).without_text == 5
    rows = [{"query": "A", "positive": ["B"]}, {"query": None, "positive": []}, {"query": "", "positive": ["C"]}]
    assert mteb_texts(stub_task({"test": Dataset.from_list(rows)})).without_text == 1


def stub_task(dataset: Any, **attributes: Any) -> SimpleNamespace:
    """What `mteb_texts` uses of a loaded task."""
    return SimpleNamespace(metadata=SimpleNamespace(name="Stub"), eval_splits=["test"], dataset=dataset, **attributes)


def test_texts_of_mteb_tasks() -> None:
    from datasets import Dataset

    rows = {"queries": [{"id": "1", "text": "A"}], "corpus": [{"id": "d", "title": "T", "text": "B"}]}
    split = {"queries": Dataset.from_list(rows["queries"]), "corpus": Dataset.from_list(rows["corpus"])}
    retrieval = mteb_texts(stub_task({"default": {"test": split, "dev": {"queries": [{"text": "no"}], "corpus": []}}}))
    assert retrieval.name == "Stub"
    assert (retrieval.queries.tolist(), retrieval.corpus.tolist()) == (keys("a"), keys("b", "t b"))

    classes = {
        "train": Dataset.from_list([{"text": "no", "label": 1}]),
        "test": Dataset.from_list([{"text": "A", "label": 0}]),
    }
    assert mteb_texts(stub_task(classes, input_column_name="text")).queries.tolist() == keys("a")
    named = {
        "en": {"test": Dataset.from_list([{"utterance": "A", "label": "l"}])},
        "de": {"test": Dataset.from_list([{"utterance": "B", "label": "l"}])},
    }
    assert mteb_texts(stub_task(named, input_column_name="utterance")).queries.tolist() == keys("a", "b")
    clusters = {"test": Dataset.from_list([{"sentences": ["A", "B"], "labels": ["l", "m"]}])}
    assert mteb_texts(stub_task(clusters)).queries.tolist() == keys("a", "b")
    pairs = {"test": Dataset.from_list([{"sentence1": ["A"], "sentence2": ["B"], "labels": [1]}])}
    assert mteb_texts(stub_task(pairs)).queries.tolist() == keys("a", "b")
    ranked = {"test": Dataset.from_list([{"query": "A", "positive": ["B"], "negative": ["C"]}])}
    found = mteb_texts(stub_task(ranked))
    assert (found.queries.tolist(), found.corpus.tolist()) == (keys("a"), keys("b", "c"))
    with pytest.raises(ValueError, match="Stub: no texts found in its splits .*'picture'"):
        mteb_texts(stub_task({"test": Dataset.from_list([{"picture": "x", "label": 1}])}))


def test_an_mteb_task_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import mteb

    with pytest.raises(ValueError, match="--decontaminate-mteb NFCorpu: .*Did you mean: 'NFCorpus'"):
        load_mteb_texts("NFCorpu")

    class Offline:
        def load_data(self) -> None:
            # What `datasets` and `requests` raise without a network is an OSError.
            raise ConnectionError("no route\nmore")

    monkeypatch.setattr(mteb, "get_task", lambda name: Offline())
    with pytest.raises(ValueError, match=r"STS15: its data cannot be fetched \(no route\)"):
        load_mteb_texts("STS15")


def test_real_mteb_tasks_name_their_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of the library with data put in, as its loaders would leave it."""
    import mteb
    from datasets import Dataset

    data = {
        "STS15": {"test": Dataset.from_list([{"sentence1": "A", "sentence2": "B", "score": 1.0}])},
        "Banking77Classification": {"test": Dataset.from_list([{"text": "C", "label": 3}])},
        "TwentyNewsgroupsClustering": {"test": Dataset.from_list([{"sentences": ["D", "E"], "labels": ["x", "y"]}])},
        "CQADupstackGamingRetrieval": {
            "default": {
                "test": {
                    "queries": Dataset.from_list([{"id": "q", "text": "F"}]),
                    "corpus": Dataset.from_list([{"id": "d", "text": "G", "title": ""}]),
                    "relevant_docs": {"q": {"d": 1}},
                    "top_ranked": None,
                }
            }
        },
    }
    monkeypatch.setattr(mteb.AbsTask, "load_data", lambda task: setattr(task, "dataset", data[task.metadata.name]))
    monkeypatch.setattr(mteb.abstasks.AbsTaskRetrieval, "load_data", mteb.AbsTask.load_data)
    found = [texts for name in data for texts in load_mteb_texts(name)]
    assert [e.name for e in found] == list(data)
    assert [e.queries.tolist() for e in found] == [keys("a", "b"), keys("c"), keys("d", "e"), keys("f")]
    assert found[-1].corpus.tolist() == keys("g")
    aggregate = mteb.get_task("CQADupstackRetrieval")
    data |= {task.metadata.name: data["CQADupstackGamingRetrieval"] for task in aggregate.tasks}
    assert [e.name for e in load_mteb_texts("CQADupstackRetrieval")] == [t.metadata.name for t in aggregate.tasks]


# What matches.


@pytest.mark.parametrize("cached", [0, 1 << 18])
def test_keys_among_others(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalizing, "_BLOCK", 70)
    monkeypatch.setattr(normalizing, "_CACHED", cached)
    rng = np.random.default_rng(0)
    for num_keys, num_others in ((0, 5), (5, 0), (300, 40), (7, 1)):
        own, others = (rng.integers(0, 60, size, dtype=np.uint64) for size in (num_keys, num_others))
        own[:2] = others[:1] = 2**64 - 1
        assert is_among(own, np.unique(others)).tolist() == [key in set(others.tolist()) for key in own.tolist()]


ROWS = [
    {"query": "Clean", "pos": ["p"], "neg": ["A passage"]},
    {"query": "EVAL  query", "pos": ["p"], "neg": ["n", "a passage"]},
    {"query": "x", "pos": ["p", "eval query"], "neg": []},
    {"query": "y", "pos": ["a passage"], "neg": ["n"]},
    {"query": "a passage", "pos": ["q"], "neg": ["eval query"]},
]


@pytest.mark.parametrize("task_type", RULES)
def test_matches_against_all_pairs(task_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalizing, "_BLOCK", 2)
    store = make_store({"d": (task_type, ROWS)})
    keys_U = np.array([text_key(text) for text in store.texts], np.uint64)
    queries, corpus = ["eval query", "other"], ["A Passage", "b"]
    wanted = evaluation("e", queries, corpus)
    found = find_matches(store.datasets[0], keys_U, wanted)
    for n, row in enumerate(ROWS):
        assert found.query_N[n] == (normalize_text(row["query"]) in map(normalize_text, queries))
        assert found.query_in_corpus_N[n] == (normalize_text(row["query"]) in map(normalize_text, corpus))
        positives = set(map(normalize_text, row["pos"]))
        assert found.positive_N[n] == bool(positives & set(map(normalize_text, queries)))
        assert found.positive_in_corpus_N[n] == bool(positives & set(map(normalize_text, corpus)))
    assert found.negatives_in_corpus == 2
    # Row 4: its query is a passage of the evaluation, which tells something only where both sides are alike.
    dropped = [1, 2, 3, 4] if task_type.startswith("symmetric") else [1, 2, 3]
    for keep, gone in (([], dropped), (["pool"], dropped), (["corpus"], [1, 2]), (["corpus", "pool"], [1, 2])):
        assert np.flatnonzero(contaminated(found, wanted, keep)).tolist() == gone
    pool = dataclasses.replace(wanted, is_pool=True)
    assert contaminated(found, pool, []).sum() == len(dropped) and contaminated(found, pool, ["pool"]).sum() == 0
    shown = {reason: [store.text(i) for i in ids] for reason, ids in found.shown.items()}
    assert shown == {
        "query": ["EVAL  query"],
        "positive": ["eval query"],
        "positive in corpus": ["a passage"],
        "query in corpus": ["a passage"],
    }


def test_the_first_distinct_texts_are_shown() -> None:
    rows = [{"query": text, "pos": ["p"], "neg": []} for text in ("d", "a", "D ", "d", "c", "b")]
    store = make_store({"d": ("normal", rows)})
    keys_U = np.array([text_key(text) for text in store.texts], np.uint64)
    found = find_matches(store.datasets[0], keys_U, evaluation("e", ["a", "b", "c", "d"]))
    assert [store.text(i) for i in found.shown["query"]] == ["d", "a", "D "]


# The entry.


@pytest.fixture(scope="module")
def recipe(smollm2_tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("decontaminate"), smollm2_tokenizer_dir, 30)
    assert preprocess(["--config", str(path), "--processes", "1"]) == 0
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def evaluations(recipe: Path) -> tuple[Path, Path]:
    """(retrieval folder, classification folder) that hold texts of some training rows, written otherwise."""
    retrieval = lines_of(recipe.parent / "raw/retrieval.jsonl")
    emotion = lines_of(recipe.parent / "raw/emotion.jsonl")
    folder = recipe.parent / "eval"
    write_lines(
        folder / "search/queries.jsonl",
        [{"_id": "1", "text": retrieval[0]["query"].upper()}, {"_id": "2", "text": "z"}],
    )
    negative = next(t for t in retrieval[1]["neg"] if all(t not in row["pos"] for row in retrieval))
    passages = [retrieval[3]["pos"][0].replace(" ", "  "), negative, "a passage"]
    write_lines(folder / "search/corpus.jsonl", [{"_id": str(i), "text": t} for i, t in enumerate(passages)])
    write_lines(folder / "classes/test.jsonl", [{"text": f" {emotion[5]['query']} ", "label": "x"}])
    return folder / "search", folder / "classes"


def expected(recipe: Path, name: str, queries: set[str], corpus: set[str]) -> list[str]:
    """Queries of the raw rows that must stay, by the rule written out."""
    kept = []
    for row in lines_of(recipe.parent / f"raw/{name}.jsonl"):
        positives = set(map(normalize_text, row["pos"]))
        if normalize_text(row["query"]) not in queries and not positives & (queries | corpus):
            kept.append(row["query"].strip())
    return sorted(kept)


def texts_in(folder: Path) -> tuple[set[str], set[str]]:
    def read(name: str) -> set[str]:
        return {normalize_text(r["text"]) for r in lines_of(folder / name)} if (folder / name).is_file() else set()

    return read("queries.jsonl") | read("test.jsonl"), read("corpus.jsonl")


def test_contaminated_rows_are_dropped(
    recipe: Path, evaluations: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clean"
    arguments = ["--config", str(recipe), "--out", str(out), "--decontaminate", *map(str, evaluations)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    queries, corpus = (set.union(*sets) for sets in zip(*map(texts_in, evaluations), strict=True))
    report = json.loads((out / "decontaminate.json").read_text())["datasets"]
    for name in ("retrieval", "emotion", "entailment"):
        kept = expected(recipe, name, queries, corpus)
        assert sorted(row["query"] for row in lines_of(out / f"{name}.jsonl")) == kept
        assert report[name]["contaminated"] == 30 - len(kept)
    assert report["retrieval"]["contaminated"] >= 2 and report["emotion"]["contaminated"] == 1
    search = report["retrieval"]["sets"]["search"]
    assert search["query"] == 1 and search["positive in corpus"] >= 1 and search["negatives in corpus, kept"] >= 1
    assert report["emotion"]["sets"]["classes"]["query"] == 1
    assert (
        "    query: " in printed and f"dropped {sum(d['contaminated'] for d in report.values())} of 150 rows" in printed
    )
    assert preprocess(["--config", str(out / "recipe.yaml"), "--processes", "1"]) == 0
    store = open_store(load_settings(out / "recipe.yaml").data.store)
    assert {t.name: t.num_rows for t in store.datasets} == {n: d["rows"] - d["contaminated"] for n, d in report.items()}


def test_marked_rows_stay(recipe: Path, evaluations: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["--config", str(recipe), "--out", str(tmp_path / "out"), "--mark", "--decontaminate"]
    assert main([*arguments, *map(str, evaluations)]) == 0
    rows = lines_of(tmp_path / "out/retrieval.jsonl")
    first = lines_of(recipe.parent / "raw/retrieval.jsonl")[0]["query"]
    assert len(rows) == 30
    assert next(row for row in rows if row["query"] == first)["contaminated"][0] == "search: query"
    report = json.loads((tmp_path / "out/decontaminate.json").read_text())["datasets"]
    assert sum("contaminated" in row for row in rows) == report["retrieval"]["contaminated"] < 30
    assert preprocess(["--config", str(tmp_path / "out/recipe.yaml"), "--processes", "1"]) == 0


def test_corpus_matches_can_stay(
    recipe: Path, evaluations: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(recipe), "--out", str(tmp_path / "out"), "--keep", "corpus", "--decontaminate"]
    assert main([*arguments, str(evaluations[0])]) == 0
    queries, _ = texts_in(evaluations[0])
    kept = [row["query"] for row in lines_of(tmp_path / "out/retrieval.jsonl")]
    assert sorted(kept) == expected(recipe, "retrieval", queries, set())
    report = json.loads((tmp_path / "out/decontaminate.json").read_text())["datasets"]
    number = report["retrieval"]["sets"]["search"]["positive in corpus"]
    assert number >= 1 and f"positive in corpus, kept {number}" in capsys.readouterr().out


def test_a_dataset_that_is_all_test_is_an_error(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = lines_of(recipe.parent / "raw/retrieval.jsonl")
    write_lines(tmp_path / "e/test.jsonl", [{"text": row["query"]} for row in rows])
    out = tmp_path / "out"
    assert main(["--config", str(recipe), "--out", str(out), "--decontaminate", str(tmp_path / "e")]) == 2
    assert "all rows of retrieval would be dropped" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one evaluation set"),
        (["--decontaminate", __file__], "is a file; give the folders of evaluation sets alone"),
        (["--decontaminate", "nowhere"], "--decontaminate nowhere: no such folder"),
        (["--decontaminate", "data.store=x"], "no such folder; settings stand before --decontaminate"),
        (["--decontaminate-mteb", "NoSuchTask"], "--decontaminate-mteb NoSuchTask: "),
        (["--decontaminate", "{twice}", "{twice}"], "two evaluation sets are named twice"),
    ],
)
def test_user_errors(
    arguments: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "twice/test.jsonl", [{"text": "a"}])
    filled = [argument.format(twice=tmp_path / "twice") for argument in arguments]
    assert main(["--config", str(recipe), "--out", str(tmp_path / "out"), *filled]) == 2
    assert message in capsys.readouterr().err


def test_queries_in_the_corpus_are_counted_or_dropped(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A passage of the evaluation that is the query of a symmetric row and of one that is not."""
    texts = {name: lines_of(recipe.parent / f"raw/{name}.jsonl")[2]["query"] for name in ("similarity", "retrieval")}
    passages = [*({"_id": name, "text": text} for name, text in texts.items()), {"_id": "x", "body": "x"}]
    write_lines(tmp_path / "e/corpus.jsonl", passages)
    arguments = ["--config", str(recipe), "--out", str(tmp_path / "out"), "--decontaminate", str(tmp_path / "e")]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "out/decontaminate.json").read_text())
    assert found["evaluations"] == {"e": {"queries": 0, "passages": 2, "lines without text": 1}}
    report = found["datasets"]
    for name, text in texts.items():
        rows = [row["query"].strip() for row in lines_of(recipe.parent / f"raw/{name}.jsonl")]
        assert report[name]["sets"]["e"]["query in corpus"] == rows.count(text.strip()) >= 1
        left = [row["query"] for row in lines_of(tmp_path / f"out/{name}.jsonl")]
        assert (text.strip() in left) == (name == "retrieval")
    printed = capsys.readouterr().out
    assert "e: 0 distinct queries, 2 distinct passages; 1 lines hold no text" in printed
    assert "query in corpus, kept 1" in printed and "query in corpus 1" in printed
