"""Studies of in-context examples: altered examples against their definitions, arms, scores against twins, the entry."""

import json
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluation import EXAMPLES, write_lines, write_recipe, write_task
from test_evaluation_types import LABELS, TEXTS, rows_of, write

from pipeline import study_examples
from pipeline.data.tokenizing import load_tokenizer, tokenize_pieces
from pipeline.evaluation import study_arms
from pipeline.evaluation.altered_examples import (
    add_noise,
    as_filler,
    labels_only,
    opaque_labels,
    permute_labels,
    shuffle_responses,
    words_of,
    wrong_responses,
)
from pipeline.evaluation.sampling import sample_task
from pipeline.evaluation.study_arms import Arm, choice_arms, content_arms, draw_examples, label_arms, shots_arms
from pipeline.evaluation.tasks import RetrievalTask, load_task
from pipeline.inference.choosing import Order, choose_bm25, choose_nearest
from pipeline.inference.prompting import Example
from pipeline.prompts import get_template

SHOWN: list[Example] = [
    ("Where can I find a Mastercard ATM?", "atm support"),
    ("who did internet2 partner with", "Internet2 is a not-for-profit United States consortium; it (in 2006) grew."),
    ("  spaces   and\ttabs ", "x"),
    ("Grüße aus Köln, naïve café", "São Paulo -- 12.5 %"),
]
FOREIGN = ("cocoa", "Compulsory voting increases representation", "The death penalty irreversible")


def simple_count(text: str, half: str) -> int:
    """A token a word or mark."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.fixture(params=["smollm2", "mistral", "qwen_style"])
def count(request: pytest.FixtureRequest) -> Callable[[str, str], int]:
    """Tokens of a half as a prompt of this tokenizer holds it."""
    pt = load_tokenizer(request.getfixturevalue(f"{request.param}_tokenizer_dir"), get_template("bge_en_icl"))
    return lambda text, half: len(tokenize_pieces(pt, [text], half)[0])


# Altered examples.


@pytest.mark.parametrize("responses", ["abcd", "aabc", "aabb", "aabbcc", "ab", "aaabbb", "aaabbcdd"])
def test_shuffled_responses_are_the_same_and_nobody_s_own(responses: str) -> None:
    examples = [(f"q{i}", response) for i, response in enumerate(responses)]
    seen = set()
    for seed in range(20):
        shuffled = shuffle_responses(examples, random.Random(seed))
        assert [query for query, _ in shuffled] == [query for query, _ in examples]
        assert Counter(r for _, r in shuffled) == Counter(responses)
        assert all(new != old for (_, new), (_, old) in zip(shuffled, examples, strict=True))
        assert shuffled == shuffle_responses(examples, random.Random(seed))
        seen.add("".join(r for _, r in shuffled))
    assert len(seen) > 1 or responses in ("ab", "aabb", "aaabbb"), "where there is a choice, the seed chooses"


@pytest.mark.parametrize("responses", ["a", "aab", "aaa"])
def test_a_shuffle_that_must_leave_an_example_as_it_is(responses: str) -> None:
    with pytest.raises(ValueError, match=f"{responses.count('a')} of {len(responses)} examples have the same response"):
        shuffle_responses([("q", response) for response in responses], random.Random(0))


@pytest.mark.parametrize("labels", ["ab", "aab", "abca", "abcdef"])
def test_permuted_labels_are_the_same_list_wrongly_mapped(labels: str) -> None:
    examples = [(f"q{i}", label) for i, label in enumerate(labels)]
    for seed in range(20):
        permuted = permute_labels(examples, random.Random(seed))
        pairs = {(old, new) for (_, old), (_, new) in zip(examples, permuted, strict=True)}
        assert {new for _, new in pairs} == set(labels) and len(pairs) == len(set(labels)), "one to one"
        assert all(old != new for old, new in pairs)
        assert [q for q, _ in permuted] == [q for q, _ in examples]
        assert permuted == permute_labels(examples, random.Random(seed))
    with pytest.raises(ValueError, match="2 examples show only the label"):
        permute_labels([("a", "x"), ("b", "x")], random.Random(0))


def test_opaque_labels_keep_what_is_equal_and_nothing_else() -> None:
    examples = [("1", "tree"), ("2", "water"), ("3", "tree")]
    assert opaque_labels(examples) == [("1", "class A"), ("2", "class B"), ("3", "class A")]
    many = opaque_labels([("q", str(i)) for i in range(703)])
    assert len({label for _, label in many}) == 703
    assert [many[i][1] for i in (25, 26, 702)] == ["class Z", "class AA", "class AAA"]


def lengths(examples: list[Example], count: Callable[[str, str], int]) -> list[tuple[int, int]]:
    return [(count(query, "query"), count(response, "response")) for query, response in examples]


def test_filler_has_the_length_and_no_content(count: Callable[[str, str], int]) -> None:
    filler = as_filler(SHOWN, count)
    assert lengths(filler, count) == lengths(SHOWN, count)
    assert not {w.strip(".") for w in words_of(filler)} & {w.strip(".") for w in words_of(SHOWN)} - {"", "x"}
    assert all(query.strip() and response.strip() for query, response in filler)
    only = labels_only(SHOWN, count)
    assert only == [(query, response) for (query, _), (_, response) in zip(filler, SHOWN, strict=True)]


def test_wrong_responses_are_of_other_tasks_and_as_long(count: Callable[[str, str], int]) -> None:
    wrong = wrong_responses(SHOWN, FOREIGN, random.Random(1), count)
    assert lengths(wrong, count) == lengths(SHOWN, count)
    assert [query for query, _ in wrong] == [query for query, _ in SHOWN]
    known = {word for text in FOREIGN for word in text.split()} | {""}
    assert {word.strip(".") for _, response in wrong for word in response.split()} <= known
    assert wrong == wrong_responses(SHOWN, FOREIGN, random.Random(1), count)
    assert wrong != wrong_responses(SHOWN, FOREIGN, random.Random(3), count)
    with pytest.raises(ValueError, match="name a second --task"):
        wrong_responses(SHOWN, (), random.Random(0), count)


def test_noise_keeps_the_length(count: Callable[[str, str], int]) -> None:
    noisy = add_noise(SHOWN, words_of(SHOWN), random.Random(0), count)
    for (query, response), (old_query, old_response) in zip(lengths(noisy, count), lengths(SHOWN, count), strict=True):
        assert response == old_response
        assert query == old_query or "\t" in SHOWN[2][0], "white space of another kind is other tokens"
        assert query <= old_query


def test_noise_replaces_half_of_the_words() -> None:
    pool = [f"w{i}" for i in range(10)]
    examples = [(" ".join(pool[:n]), " ".join(pool[: n + 1])) for n in range(1, 8)]
    for seed in range(10):
        noisy = add_noise(examples, pool, random.Random(seed), simple_count)
        for old, new in zip(words_texts(examples), words_texts(noisy), strict=True):
            assert len(old) == len(new) and set(new) <= set(pool)
            assert sum(a != b for a, b in zip(old, new, strict=True)) == -(-len(old) // 2)
        assert noisy == add_noise(examples, pool, random.Random(seed), simple_count)
    with pytest.raises(ValueError, match="two different words"):
        add_noise(examples, ["w", "w"], random.Random(0), simple_count)


def words_texts(examples: list[Example]) -> list[list[str]]:
    return [text.split() for example in examples for text in example]


# Samples of a task.


def make_labels(folder: Path, kind: str = "classification") -> Path:
    """Nine test texts of three labels, and examples of four."""
    write(folder, kind, rows_of(kind))
    if kind == "classification":
        write_lines(folder / "train.jsonl", rows_of(kind)[::2])
    shown = [("oak", "tree"), ("sea", "water"), ("fern glen", "leaf"), ("jade isle", "stone")]
    write_lines(folder / "examples.jsonl", [{"query": q, "response": r} for q, r in shown])
    return folder


def test_a_sample_of_queries_keeps_the_corpus(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path / "words"))
    assert isinstance(task, RetrievalTask)
    assert sample_task(task, None) is task and sample_task(task, 6) == sample_task(task, 99) == task
    few = sample_task(task, 4)
    assert isinstance(few, RetrievalTask)
    assert few == sample_task(task, 4) != sample_task(task, 4, seed=1)
    assert len(few.queries) == 4 and few.corpus == task.corpus
    assert few.queries.items() <= task.queries.items() and few.relevant.items() <= task.relevant.items()
    assert few.relevant.keys() == few.queries.keys() and sorted(few.queries) == list(few.queries)
    with pytest.raises(ValueError, match="--max-texts 0 must be 1 or more"):
        sample_task(task, 0)


def test_a_sample_of_reranking_keeps_what_its_queries_rank(tmp_path: Path) -> None:
    task = load_task(write(tmp_path / "r", "reranking", rows_of("reranking")))
    few = sample_task(task, 1)
    assert isinstance(few, RetrievalTask) and few.candidates is not None
    (identity,) = few.queries
    assert list(few.corpus) == few.candidates[identity] and len(few.corpus) < len(task.corpus)  # type: ignore[union-attr]


def test_a_sample_of_labelled_texts_has_their_shares(tmp_path: Path) -> None:
    rows = [{"text": f"{i}", "label": "abb"[i % 3]} for i in range(90)]
    write(tmp_path / "c", "clustering", rows)
    task = load_task(tmp_path / "c")
    for number in (3, 30, 31, 89):
        kept = sample_task(task, number).test  # type: ignore[union-attr]
        assert len(kept) == number
        assert abs(Counter(row["label"] for row in kept)["a"] - number / 3) < 1
        assert [int(row["text"]) for row in kept] == sorted({int(row["text"]) for row in kept})
    labelled = load_task(make_labels(tmp_path / "labels"))
    assert sample_task(labelled, 3).train == labelled.train  # type: ignore[union-attr]


# Arms.


def test_draws_begin_with_the_smaller_ones() -> None:
    pool = [(f"q{i}", f"r{i}") for i in range(8)]
    assert draw_examples(pool, 3, 0) == tuple(pool[:3])
    for draw in range(1, 5):
        whole = draw_examples(pool, 8, draw)
        assert sorted(whole) == pool and whole != tuple(pool)
        assert all(draw_examples(pool, n, draw) == whole[:n] for n in range(9))
    assert len({draw_examples(pool, 8, draw) for draw in range(5)}) == 5
    many = [(f"q{i}", "r") for i in range(200)]
    assert all(draw_examples(many, 20, draw) == draw_examples(many, 100, draw)[:20] for draw in range(1, 9))


def test_the_arms_of_one_draw_alter_the_same_examples(tmp_path: Path) -> None:
    task = load_task(make_labels(tmp_path / "labels"))
    other = load_task(write_task(tmp_path / "words"))
    arms, missing = content_arms(task, [other], 3, 2, simple_count)
    arms += label_arms(task, 3, 2, simple_count)[0]
    assert not missing
    found = {(arm.name, arm.draw): arm.examples for arm in arms}
    names = ("true", "shuffled", "wrong", "noisy", "filler", "permuted", "opaque", "labels only")
    assert set(found) == {(name, draw) for name in names for draw in (0, 1)}
    for draw in (0, 1):
        true = found["true", draw]
        assert true == draw_examples(task.examples, 3, draw)
        for name in ("shuffled", "wrong", "permuted", "opaque"):
            assert [q for q, _ in found[name, draw]] == [q for q, _ in true] and found[name, draw] != true
        assert set(words_of(found["wrong", draw])) & {"zinc", "y"}
    assert [(a.num_examples, a.draw, len(a.examples)) for a in shots_arms(task, 2, 2)] == [
        (1, 0, 1),
        (1, 1, 1),
        (2, 0, 2),
        (2, 1, 2),
    ]


def test_what_cannot_be_made_is_told(tmp_path: Path) -> None:
    task = replace(load_task(write_task(tmp_path / "words")), examples=(("a", "x"), ("b", "x"), ("c", "y")))
    arms, missing = content_arms(task, [], 3, 2, simple_count)
    assert {arm.name for arm in arms} == {"true", "noisy", "filler"}
    assert len(missing) == 2
    assert missing[0].startswith("words: 2 of 2 draws have no shuffled arm: 2 of 3 examples have the same response")
    assert missing[1].startswith("words: 2 of 2 draws have no wrong arm: wrong responses are taken from other tasks")


def test_choices_take_labelled_texts_too_but_no_test_text(tmp_path: Path) -> None:
    folder = make_labels(tmp_path / "labels")
    train = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    write_lines(folder / "train.jsonl", [*train, {"text": "isle lake", "label": "water"}])
    task = load_task(folder)
    arms = choice_arms(task, 4, 12)
    names = [
        "first",
        "random",
        *(f"{by}, {o}" for by in ("nearest", "bm25") for o in ("nearest last", "nearest first", "random order")),
    ]
    assert list(dict.fromkeys(arm.name for arm in arms)) == names
    assert arms[0].examples == task.examples
    shown = {example for arm in arms if arm.name == "random" for example in arm.examples}
    assert shown == {*task.examples, ("isle lake", "water")}
    assert len(study_arms.pool_of(task)) == 4 + 9 + 1


# Scores.


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("studies"))
    make_labels(path.parent / "labels")
    return path


def load(recipe: Path) -> Any:
    from pipeline.evaluation.loading import load_model, read_settings

    return load_model(read_settings(None, recipe, []))


def test_a_measurement_is_the_evaluation_s_own(recipe: Path, tmp_path: Path) -> None:
    from pipeline.evaluation.runner import score_modes
    from pipeline.evaluation.studies import measure

    model = load(recipe)
    for folder, sides in (("words", "released"), ("labels", "trained")):
        task = load_task(recipe.parent / folder)
        wanted = score_modes(model.embedder, task, ("zero_shot", "few_shot"), 2, sides)
        zero = measure(model, task, sides, Arm("zero-shot", 0), tmp_path / folder)
        few = measure(model, task, sides, shots_arms(task, 2, 1)[1], tmp_path / folder)
        assert (zero["value"], few["value"]) == (wanted["zero_shot"], wanted["few_shot"])
        prompts = [r["prompt_of_first_query"] for r in (zero, few)]
        assert [prompt.count("<query>") for prompt in prompts] == [1, 3]
        added = [len(model.embedder.tokenizer.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        assert few["example_tokens"] == added[1] - added[0] and zero["example_tokens"] == 0


@pytest.mark.parametrize(("by", "order"), [("nearest", "nearest_last"), ("bm25", "nearest_first"), ("bm25", "random")])
def test_examples_of_each_text_s_own_are_those_of_one_text_at_a_time(
    recipe: Path, tmp_path: Path, by: str, order: Order
) -> None:
    from pipeline.evaluation.runner import score_local
    from pipeline.evaluation.studies import measure

    model, task = load(recipe), load_task(recipe.parent / "words")
    task = replace(task, examples=(*EXAMPLES, ("where is elm", "elm"), ("lake ash", "lake"), ("bay", "jade hill")))
    arm = Arm("each", 2, 3 if order == "random" else None, by=by, order=order)
    seen: list[tuple[str, tuple[Example, ...]]] = []

    def embed(texts: Sequence[str]) -> np.ndarray:
        return model.embedder.encode_queries(texts, task.instruction)

    def slow(texts: list[str], carry: str) -> np.ndarray:
        if carry == "bare":
            return model.embedder.encode_passages(texts)
        if by == "nearest":
            shown = choose_nearest(task.examples, texts, 2, embed, order)
        else:
            shown = choose_bm25(task.examples, texts, 2, order, seed=3)
        seen.extend((text, tuple(examples)) for text, examples in zip(texts, shown, strict=True))
        return np.stack([model.embedder.encode_queries([t], task.instruction, s)[0] for t, s in seen])

    wanted = score_local(task, slow)
    record = measure(model, task, "released", arm, tmp_path)
    assert record["value"] == pytest.approx(wanted, abs=1e-6)
    assert len({shown for _, shown in seen}) > 1, "a test on one set of examples would see nothing"
    prompt = "".join(f"<instruct>Find the word.\n<query>{q}\n<response>{r}\n\n" for q, r in seen[0][1])
    assert seen[0][0] == task.some_query and record["prompt_of_first_query"].startswith(prompt)


def test_the_key_holds_what_decides(recipe: Path) -> None:
    from pipeline.evaluation.studies import key_of

    model, task = load(recipe), load_task(recipe.parent / "words")
    arm = Arm("a", 2, 0, EXAMPLES)
    key = key_of(model, task, "released", arm)
    assert key == key_of(model, task, "released", Arm("other name", 2, 5, EXAMPLES))
    near, drawn = Arm("a", 2, None, by="nearest"), Arm("a", 2, 1, by="nearest", order="random")
    others = [
        key_of(replace(model, fingerprint="x"), task, "released", arm),
        key_of(model, sample_task(task, 3), "released", arm),
        key_of(model, replace(task, instruction="Other."), "released", arm),
        key_of(model, task, "trained", arm),
        key_of(model, task, "released", replace(arm, examples=EXAMPLES[::-1])),
        key_of(model, task, "released", near),
        key_of(model, replace(task, examples=EXAMPLES[::-1]), "released", near),
        key_of(model, task, "released", replace(near, num_examples=1)),
        key_of(model, task, "released", replace(near, by="bm25")),
        key_of(model, task, "released", replace(near, order="nearest_first")),
        key_of(model, task, "released", drawn),
        key_of(model, task, "released", replace(drawn, draw=2)),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_means_are_over_distinct_draws() -> None:
    from pipeline.evaluation.study_report import summarize, table

    values = {"k1": 0.1, "k2": 0.4, "k3": 0.7}
    records = [{"arm": "true", "task": "t", "metric": "m", "key": k, "value": v} for k, v in values.items()]
    zero = {"arm": "zero-shot", "task": "t", "metric": "m", "key": "z", "value": 0.5}
    found = summarize([zero, *records, records[1] | {"draw": 4}])
    assert found["zero-shot", "t"] == (0.5, None)
    mean, spread = found["true", "t"]
    assert (mean, spread) == (pytest.approx(0.4), pytest.approx(statistics.stdev(values.values())))
    assert table([zero, *records])[2:] == ["| zero-shot | 0.5000 |", "| true | 0.4000 +- 0.3000 |"]


# The entry.


def run(recipe: Path, out: Path, study: str, *more: str, tasks: tuple[str, ...] = ("words", "labels")) -> int:
    named = [part for task in tasks for part in ("--task", str(recipe.parent / task))]
    return study_examples.main(["--config", str(recipe), *named, "--study", study, "--out", str(out), *more])


def test_the_entry_measures_all_and_goes_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.image import imread

    from pipeline.evaluation import studies

    options = ("--num-examples", "2", "--seeds", "2", "--max-texts", "6", "--max-shots", "2")
    whole = studies.measure
    made: list[str] = []

    def stop_early(*arguments: Any) -> dict[str, Any]:
        if len(made) == 5:
            raise OSError("cut off")
        made.append(arguments[3].name)
        return whole(*arguments)

    monkeypatch.setattr(studies, "measure", stop_early)
    assert run(recipe, tmp_path, "all", *options) == 2
    before = json.loads((tmp_path / "shots.json").read_text())
    assert len(before) >= 4 and not (tmp_path / "studies.md").exists()
    monkeypatch.setattr(studies, "measure", lambda *a: made.append(a[3].name) or whole(*a))
    assert run(recipe, tmp_path, "all", *options) == 0
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in study_arms.STUDIES}
    keys = {record["key"] for name in records for record in records[name]}
    assert len(made) == len(keys), "each number is made once, whatever study it stands in"
    values = {record["key"]: record["value"] for record in before}
    assert all(values.get(record["key"], record["value"]) == record["value"] for record in records["shots"])
    assert {record["task"] for record in records["labels"]} == {"classification"}
    text = (tmp_path / "studies.md").read_text()
    assert "words: no study of labels, its type is retrieval" in text
    assert (
        "a fixed sample of at most 6 test texts of each task" in text
        and "classification: classification, 6 texts" in text
    )
    zero = next(r["value"] for r in records["shots"] if r["task"] == "words" and r["arm"] == "zero-shot")
    assert f"| zero-shot | {zero:.4f} |" in text
    for name in study_arms.STUDIES:
        picture = imread(tmp_path / f"{name}.png")
        assert f"]({name}.png)" in text and picture.shape[0] > 300 and picture[..., :3].std() > 0.05
    # The arms of a draw are as long as the true examples, in tokens that the model gets.
    by_draw: dict[tuple[str, int], set[int]] = {}
    for record in records["content"]:
        if record["draw"] is not None:
            by_draw.setdefault((record["task"], record["draw"]), set()).add(record["example_tokens"])
    assert len(by_draw) == 4 and all(len(found) == 1 and min(found) > 10 for found in by_draw.values())
    made.clear()
    assert run(recipe, tmp_path, "content", *options) == 0
    assert made == []


@pytest.mark.parametrize(
    ("study", "options", "message"),
    [
        ("length", [], "--study length is unknown; known: shots, content, labels, choice, all"),
        ("labels", ["--num-examples", "2"], "--study labels: task words is of type retrieval, which has no labels"),
        ("shots", ["--max-shots", "3"], "--max-shots 3: task words has 2 in examples.jsonl; set 1 to 2"),
        ("content", [], "--num-examples 3: task words has 2 in examples.jsonl; set 1 to 2"),
        ("choice", ["--num-examples", "0"], "--num-examples 0: task words has 2"),
        ("shots", ["--max-shots", "0"], "--max-shots 0: task words has 2"),
        ("shots", ["--seeds", "0"], "--seeds 0 must be 1 or more"),
        ("shots", ["--max-texts", "0"], "--max-texts 0 must be 1 or more"),
    ],
)
def test_entry_errors(
    recipe: Path, tmp_path: Path, study: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, tmp_path, study, *options) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_more_entry_errors(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = write_task(tmp_path / "words")
    assert run(recipe, tmp_path, "shots", "--max-shots", "1", tasks=("words", str(copy))) == 2
    assert "two tasks are named 'words'" in capsys.readouterr().err
    (copy / "examples.jsonl").unlink()
    assert run(recipe, tmp_path, "shots", tasks=(str(copy),)) == 2
    assert "task words has no examples to study" in capsys.readouterr().err
    (tmp_path / "shots.json").write_text('[{"key": 1}]')
    assert run(recipe, tmp_path, "shots", "--max-shots", "1", tasks=("words",)) == 2
    assert "shots.json is damaged ('value'); remove it" in capsys.readouterr().err
