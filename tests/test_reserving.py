"""Reserved rows: disjoint from training by text, small loss, deterministic, and a folder that the evaluation reads."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_store import make_store
from hypothesis import given
from hypothesis import strategies as st
from samples import write_recipe

from pipeline.data.eval_folder import write_eval_folder
from pipeline.data.normalizing import normalize_text, store_keys, text_key
from pipeline.data.reserving import Links, Reserved, count_links, find_links, group_of, linked_to, reserve_all
from pipeline.data.store import open_store
from pipeline.evaluation.tasks import load_task
from pipeline.preprocess import main as preprocess
from pipeline.reserve_rows import main
from pipeline.settings import load_settings

# Normalisation.


def test_texts_that_count_as_the_same() -> None:
    same = ["Straße  nach\u00a0Ulm", " STRASSE NACH ULM ", "strasse\tnach\nulm", "ｓｔｒａｓｓｅ nach ulm"]
    assert {normalize_text(text) for text in same} == {"strasse nach ulm"}
    assert len({text_key(text) for text in same}) == 1
    assert normalize_text("e\u0301") == normalize_text("É") == "\u00e9"
    assert normalize_text("\u0390") == "\u0390", "case folding alone takes it apart"
    assert len({text_key(text) for text in ("a b", "ab", "a.b", "á b", "")}) == 5


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert 0 <= text_key(text) < 2**64


def test_keys_of_a_store_are_those_of_its_texts(tiny_store: tuple[Path, Path]) -> None:
    store = open_store(tiny_store[1])
    assert len(store.shards) > 1
    assert store_keys(store, bars=False).tolist() == [text_key(store.text(i)) for i in range(store.num_texts)]


# Choice of rows.


def links_of(rows: list[dict[str, Any]]) -> Links:
    store = make_store({"d": ("normal", [{"neg": [], **row} for row in rows])})
    keys_U = np.array([text_key(text) for text in store.texts], dtype=np.uint64)
    return find_links(store.datasets[0], keys_U)


def reserve_one(links: Links, num_dev: int, num_examples: int, seed: int) -> Reserved:
    return reserve_all(["d"], [links], {0}, num_dev, num_examples, seed)[0]


def row_texts(row: dict[str, Any]) -> set[str]:
    return {normalize_text(text) for text in (row["query"], *row["pos"])}


def check_disjoint(*datasets: tuple[list[dict[str, Any]], Reserved]) -> None:
    """By comparing all texts: none of one use or reserved from one dataset in another, nothing dropped without need."""
    texts: dict[tuple[str, int], set[str]] = {}
    num_uses = []
    for i, (rows, found) in enumerate(datasets):
        for use, rows_N in (("dev", found.dev_N), ("example", found.example_N), ("train", found.train_N)):
            texts[use, i] = set().union(*[row_texts(rows[n]) for n in np.flatnonzero(rows_N)])
        uses = (found.dev_N, found.example_N, found.train_N, found.dropped_N, found.dropped_for_others_N)
        num_uses += np.sum(uses, axis=0).tolist()
    assert set(num_uses) == {1}
    for (use, i), (other, j) in itertools.combinations(texts, 2):
        if not use == other == "train":
            assert not texts[use, i] & texts[other, j], (use, i, other, j)
    reserved = [texts["dev", i] | texts["example", i] for i in range(len(datasets))]
    for i, (rows, found) in enumerate(datasets):
        same_query: dict[str, set[str]] = {}
        for row in rows:
            same_query.setdefault(normalize_text(row["query"]), set()).update(row_texts(row))
        others = set().union(*reserved[:i], *reserved[i + 1 :])
        for row, own, for_others in zip(rows, found.dropped_N, found.dropped_for_others_N, strict=True):
            linked = same_query[normalize_text(row["query"])]
            assert not own or linked & reserved[i]
            assert not for_others or (linked & others and not own)


def count_queries(rows: list[dict[str, Any]], rows_N: np.ndarray) -> int:
    return len({normalize_text(rows[n]["query"]) for n in np.flatnonzero(rows_N)})


def random_rows(rng: random.Random, num_rows: int, num_positives: int) -> list[dict[str, Any]]:
    """Rows whose positives repeat; some queries repeat in another case; some queries are positives elsewhere."""
    rows = []
    for i in range(num_rows):
        positives = [f"P{rng.randrange(num_positives)}" for _ in range(rng.choice((1, 1, 1, 2)))]
        query = rng.choice(
            (f"q {i}", f"q {i}", f"q {i}", f"Q  {rng.randrange(num_rows)}", f"p{rng.randrange(num_positives)}")
        )
        rows.append({"query": query, "pos": positives})
    return rows


@pytest.mark.parametrize("num_positives", [8, 40, 100, 1000])
def test_no_text_stands_in_two_uses(num_positives: int) -> None:
    fits = 0
    for seed in range(25):
        rows = random_rows(random.Random(seed), 120, num_positives)
        try:
            found = reserve_one(links_of(rows), 10, 4, seed)
        except ValueError as error:
            assert "rows of dataset" in str(error) or "share no text" in str(error)
            continue
        fits += 1
        assert (count_queries(rows, found.dev_N), count_queries(rows, found.example_N)) == (10, 4)
        check_disjoint((rows, found))
    assert fits >= 20 or num_positives < 40


@pytest.mark.parametrize("num_positives", [60, 300])
def test_no_text_stands_in_two_uses_of_two_datasets(num_positives: int) -> None:
    fits = 0
    for seed in range(25):
        rng = random.Random(seed)
        a, b = random_rows(rng, 120, num_positives), random_rows(rng, 120, num_positives)
        b[:40] = a[:40]
        try:
            found = reserve_all(["a", "b"], [links_of(a), links_of(b)], {0, 1}, 8, 8, seed)
        except ValueError as error:
            assert "rows of dataset" in str(error) or "share no text" in str(error)
            continue
        fits += 1
        for rows, r in zip((a, b), found, strict=True):
            assert (count_queries(rows, r.dev_N), count_queries(rows, r.example_N)) == (8, 8)
        check_disjoint((a, found[0]), (b, found[1]))
    assert fits >= (20 if num_positives == 300 else 1)


def test_a_dataset_within_another_gives_nothing_twice() -> None:
    """All of the small one's queries stand in the large one: what the large one reserved is not free there."""
    large = [{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(40)]
    links = [links_of(large), links_of(large[:20])]
    found = reserve_all(["large", "small"], links, {0, 1}, 4, 2, 0)
    check_disjoint((large, found[0]), (large[:20], found[1]))
    assert [(r.dev_N.sum(), r.example_N.sum()) for r in found] == [(4, 2)] * 2
    taken_N = found[0].dev_N | found[0].example_N
    assert (found[1].dropped_for_others_N == taken_N[:20]).all()
    mostly_taken = [large[n] for n in np.flatnonzero(taken_N)] + [{"query": "alone", "pos": ["alone too"]}]
    with pytest.raises(ValueError, match="only 1 of 7 queries share no text with what is reserved already"):
        reserve_all(["large", "small"], [links[0], links_of(mostly_taken)], {0, 1}, 4, 2, 0)


def test_whole_groups_cost_nothing() -> None:
    # 30 paragraphs with four questions each.
    rows = [{"query": f"q{i}", "pos": [f"p{i // 4}"]} for i in range(120)]
    found = reserve_one(links_of(rows), 20, 8, 0)
    assert (found.dev_N.sum(), found.example_N.sum(), found.dropped_N.sum()) == (20, 8, 0)
    check_disjoint((rows, found))


def test_a_large_group_gives_rows_with_few_links() -> None:
    # One chain: row i shares a positive with row i + 1. A middle row costs two, an end one.
    rows = [{"query": f"q{i}", "pos": [f"p{i}", f"p{i + 1}"]} for i in range(50)]
    found = reserve_one(links_of(rows), 2, 0, 0)
    assert np.flatnonzero(found.dev_N).tolist() == [0, 49]
    assert np.flatnonzero(found.dropped_N).tolist() == [1, 48]


def test_variety_comes_first() -> None:
    # A group of 15 fits 20 dev queries, but single rows come first as long as there are any.
    rows = [{"query": f"a{i}", "pos": ["shared"]} for i in range(15)]
    rows += [{"query": f"b{i}", "pos": [f"p{i}"]} for i in range(100)]
    for seed in range(5):
        assert not reserve_one(links_of(rows), 20, 0, seed).dev_N[:15].any()


def test_seeds_choose_differently_and_repeat() -> None:
    links = links_of([{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(200)])
    chosen = [np.flatnonzero(reserve_one(links, 20, 0, seed).dev_N).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    counts = np.zeros(200)
    for seed in range(200):
        counts += reserve_one(links, 20, 0, seed).dev_N
    assert counts.min() > 5 and counts.max() < 45, "each row is reserved in about a tenth of the draws"


def test_links_against_all_pairs() -> None:
    rows = random_rows(random.Random(3), 60, 50)
    links = links_of(rows)
    texts = [set(links.text_K[links.query_K == q].tolist()) for q in range(links.num_queries)]
    free_Q = np.arange(links.num_queries) % 5 > 0
    free = np.flatnonzero(free_Q).tolist()
    # Groups by spreading a label until nothing changes.
    label = list(range(links.num_queries))
    while True:
        new = [
            min([label[b] for b in free if a in free and texts[a] & texts[b]] or [label[a]]) for a in range(len(label))
        ]
        if new == label:
            break
        label = new
    group_Q = group_of(links, free_Q)
    for a in range(links.num_queries):
        for b in range(links.num_queries):
            assert (group_Q[a] == group_Q[b]) == (label[a] == label[b])
    for a in free:
        assert count_links(links, free_Q)[a] == sum(len(texts[a] & texts[b]) for b in free if b != a)
    chosen_Q = np.arange(links.num_queries) < 4
    wanted = [any(texts[a] & texts[b] for b in range(4)) for a in range(links.num_queries)]
    assert linked_to(links, chosen_Q).tolist() == wanted


@pytest.mark.parametrize(
    ("num_rows", "num_positives", "num_dev", "num_examples", "message"),
    [
        (20, 20, 15, 5, "that is 20 queries, the dataset has 20 distinct ones"),
        (
            60,
            3,
            5,
            0,
            "would leave 0 of 60 rows of dataset 'labels' for training, less than 50%: 5 rows reserved; 55 rows",
        ),
        (60, 3, 5, 2, "only 0 of 60 queries share no text with what is reserved already"),
        (
            40,
            40,
            25,
            0,
            "would leave 15 of 40 rows of dataset 'labels' for training, less than 50%: 25 rows reserved; ask",
        ),
    ],
)
def test_more_than_the_dataset_allows(
    num_rows: int, num_positives: int, num_dev: int, num_examples: int, message: str
) -> None:
    rows = [{"query": f"q{i}", "pos": [f"p{i % num_positives}"]} for i in range(num_rows)]
    with pytest.raises(ValueError, match="--reserve-dev .*'labels'") as caught:
        reserve_all(["labels"], [links_of(rows)], {0}, num_dev, num_examples, 0)
    assert message in str(caught.value)


# The entry.


@pytest.fixture(scope="module")
def recipe(smollm2_tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("reserve"), smollm2_tokenizer_dir, 60)
    assert preprocess(["--config", str(path), "--processes", "1"]) == 0
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def raw_rows_of(recipe: Path, name: str) -> list[dict[str, Any]]:
    return lines_of(recipe.parent / "raw" / f"{name}.jsonl")


def test_the_split_is_disjoint_and_the_task_is_right(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "split"
    arguments = ["--config", str(recipe), "--out", str(out), "--reserve-dev", "10", "--reserve-examples", "4"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "reserve.json").read_text())["datasets"]
    assert sorted(path.name for path in (out / "eval").iterdir()) == ["entailment", "retrieval"]
    train = [row for path in (out / "train").iterdir() for row in lines_of(path)]
    train_texts = set().union(*[row_texts(row) for row in train])
    for name in ("retrieval", "entailment"):
        raw = raw_rows_of(recipe, name)
        task = load_task(out / "eval" / name)
        assert (task.name, task.metric, task.num_unjudged) == (name, "ndcg_at_10", 0)
        assert (len(task.queries), len(task.examples)) == (10, 4)
        positives: dict[str, set[str]] = {}
        for row in raw:
            positives.setdefault(normalize_text(row["query"]), set()).update(map(normalize_text, row["pos"]))
        for query, text in task.queries.items():
            found = {normalize_text(task.corpus[passage]) for passage in task.relevant[query]}
            assert found == positives[normalize_text(text)]
            assert not {normalize_text(text), *found} & train_texts
        dev_texts = {normalize_text(text) for text in task.queries.values()}.union(
            *map(positives.get, map(normalize_text, task.queries.values()))
        )
        for query, response in task.examples:
            assert normalize_text(response) in positives[normalize_text(query)]
            assert not {normalize_text(query), normalize_text(response)} & (train_texts | dev_texts)
        passages = {normalize_text(text) for row in raw for text in row["pos"] + row["neg"]}
        assert {normalize_text(text) for text in task.corpus.values()} == passages
        assert len(task.corpus) == len(passages) == report[name]["eval"]["passages"]
        assert task.instruction == raw[0]["prompt"]
    for name, d in report.items():
        assert d["rows"] == d["train"] + d["dev_rows"] + d["example_rows"] + d["dropped"] + d["dropped_for_others"]
        assert d["train"] == len(lines_of(out / "train" / f"{name}.jsonl"))
    # "similarity" holds half of the rows of "entailment" once more: those that were reserved there must go here.
    assert report["similarity"]["dropped_for_others"] > 0
    assert "nothing reserved from similarity, emotion, topics: the evaluation scores retrieval" in printed


def test_a_folder_of_rows_with_shared_texts(tmp_path: Path) -> None:
    rows = [
        {"query": "Same", "pos": ["a"], "neg": ["A ", "x"], "instruction": "one"},
        {"query": "same ", "pos": ["b"], "neg": ["other"], "instruction": "two"},
        {"query": "other", "pos": ["c", "d"], "neg": ["SAME"], "instruction": "two"},
        {"query": "shown", "pos": ["e", "f"], "neg": ["x"], "instruction": "two"},
    ]
    store = make_store({"d": ("normal", rows)})
    keys_U = np.array([text_key(text) for text in store.texts], dtype=np.uint64)
    dev_N, example_N = np.array([True, True, True, False]), np.array([False, False, False, True])
    found = write_eval_folder(tmp_path / "d", store, store.datasets[0], keys_U, dev_N, example_N)
    task = load_task(tmp_path / "d")
    assert list(task.queries.values()) == ["Same", "other"], "one query in its first form"
    assert sorted(task.corpus.values()) == ["a", "b", "c", "d", "e", "f", "x"], "no dev query, no passage twice"
    relevant = {task.queries[q]: {task.corpus[d] for d in judged} for q, judged in task.relevant.items()}
    assert relevant == {"Same": {"a", "b"}, "other": {"c", "d"}}
    assert task.examples == (("shown", "e"),)
    assert task.instruction == "two" and found.other_instructions == 1
    assert (found.queries, found.passages, found.judgements, found.passages_like_queries) == (2, 7, 4, 2)


def test_a_query_that_answers_another_stays_in_the_corpus(tmp_path: Path) -> None:
    rows = [{"query": "a", "pos": ["b"], "neg": []}, {"query": "b", "pos": ["c"], "neg": []}]
    store = make_store({"d": ("normal", rows)})
    keys_U = np.array([text_key(text) for text in store.texts], dtype=np.uint64)
    write_eval_folder(tmp_path / "d", store, store.datasets[0], keys_U, np.array([True, True]), np.zeros(2, bool))
    assert sorted(load_task(tmp_path / "d").corpus.values()) == ["b", "c"]


@pytest.mark.parametrize(("num_alone", "fits"), [(3, False), (4, True), (40, True)])
def test_a_dataset_that_others_empty_is_an_error(num_alone: int, fits: bool) -> None:
    """Four of its rows stand in the first dataset, where they are reserved: half of them at least must stay."""
    first = [{"query": f"q{i}", "pos": ["p"]} for i in range(4)] + [{"query": f"r{i}", "pos": ["s"]} for i in range(9)]
    second = [{"query": "other", "pos": ["p"]}] * 4 + [{"query": f"x{i}", "pos": [f"y{i}"]} for i in range(num_alone)]
    links = [links_of(first), links_of(second)]
    if fits:
        found = reserve_all(["a", "b"], links, {0}, 4, 0, 0)
        check_disjoint((first, found[0]), (second, found[1]))
        assert (found[1].dropped_for_others_N.sum(), found[1].train_N.sum()) == (4, num_alone)
    else:
        message = (
            "would leave 3 of 7 rows of dataset 'b' for training, less than 50%: 4 rows dropped because they share "
            "one with reserved rows of other datasets; ask for fewer, reserve from other datasets"
        )
        with pytest.raises(ValueError, match=message):
            reserve_all(["a", "b"], links, {0}, 4, 0, 0)


def test_the_written_recipe_preprocesses_what_is_left(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "split"
    assert main(["--config", str(recipe), "--out", str(out), "--reserve-dev", "5"]) == 0
    assert preprocess(["--config", str(out / "recipe.yaml"), "--processes", "1"]) == 0
    store = open_store(load_settings(out / "recipe.yaml").data.store)
    report = json.loads((out / "reserve.json").read_text())["datasets"]
    assert {t.name: t.num_rows for t in store.datasets} == {name: d["train"] for name, d in report.items()}


def test_the_same_command_gives_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        arguments = ["--config", str(recipe), "--out", str(tmp_path / out), "--reserve-dev", "5", "--seed", "3"]
        assert main([*arguments, "--dataset", "retrieval"]) == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 12
    for file in files:
        if file.name != "recipe.yaml":  # which names the folder
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    report = json.loads((tmp_path / "a/reserve.json").read_text())["datasets"]
    assert report["retrieval"]["dev_rows"] == 5 and report["entailment"]["dev_rows"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reserve-dev", "0"], "--reserve-dev 0 must be at least 1"),
        (["--reserve-dev", "5", "--reserve-examples", "-1"], "--reserve-examples -1 must be at least 0"),
        (["--reserve-dev", "5", "--dataset", "emotion"], "from dataset 'emotion' of type symmetric_class"),
        (["--reserve-dev", "5", "--dataset", "nq"], "--dataset nq: the store"),
        (["--reserve-dev", "500"], "--reserve-dev 500 and --reserve-examples 8 of dataset"),
    ],
)
def test_user_errors(
    arguments: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(recipe), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_with_content_is_not_touched(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("x")
    assert main(["--config", str(recipe), "--out", str(tmp_path), "--reserve-dev", "5"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
