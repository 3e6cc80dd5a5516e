"""Examples chosen for queries, against slow twins; examples of each query's own, against one query at a time."""

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from test_embedder import EXAMPLES, INSTRUCTION, QUERIES, base, base_embedder  # noqa: F401
from tiny_run import WORDS

from pipeline.inference import choosing
from pipeline.inference.choosing import choose_bm25, choose_fixed, choose_nearest, choose_random
from pipeline.inference.prompting import Example
from pipeline.inference.similarity import similarity

RNG = random.Random(0)
POOL: list[Example] = [(" ".join(RNG.sample(WORDS, 3)), f"answer {i}") for i in range(40)]
ASKED = [" ".join(RNG.sample(WORDS, 4)) for _ in range(11)]
ASKED[3] = f"  {POOL[7][0].upper()}\n"
ORDERS = ("nearest_last", "nearest_first", "random")


def embed(texts: Sequence[str]) -> np.ndarray:
    """A count of each word, so that many cosines are equal."""
    return np.array([[text.casefold().split().count(word) for word in WORDS] for text in texts], dtype=np.float32)


def slow_nearest(query: str, k: int) -> list[Example]:
    """All examples but the query's own, sorted by cosine; equal ones stay in the pool's order."""
    others = [example for example in POOL if example[0].strip().casefold() != query.strip().casefold()]

    def cosine(example: Example) -> float:
        a, b = embed([query, example[0]]).astype(np.float64)
        return round(float(a @ b / np.sqrt((a @ a) * (b @ b))), 6)

    return sorted(others, key=lambda example: -cosine(example))[:k]


@pytest.mark.parametrize("k", [0, 1, 3, 40])
def test_nearest_is_the_slow_twin(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_BLOCK", 4)
    chosen = choose_nearest(POOL, ASKED, k, embed, "nearest_first")
    assert chosen == [slow_nearest(query, k) for query in ASKED]
    assert choose_nearest(POOL, ASKED, k, embed) == [examples[::-1] for examples in chosen], "the nearest last"
    drawn = choose_nearest(POOL, ASKED, k, embed, "random", seed=1)
    assert [sorted(examples) for examples in drawn] == [sorted(examples) for examples in chosen]
    assert drawn == choose_nearest(POOL, ASKED, k, embed, "random", seed=1)
    assert k < 3 or drawn != chosen and drawn != choose_nearest(POOL, ASKED, k, embed, "random", seed=2)


def test_bm25_ranks_by_words() -> None:
    pool = [("amber violin", "1"), ("the river", "2"), ("river river stone", "3"), ("amber", "4"), ("engine", "5")]
    chosen = choose_bm25(pool, ["the amber", "stone river", "unknown", ""], 2, "nearest_first")
    assert chosen[0] == [pool[3], pool[0]], "the shorter text first; a stop word counts nothing"
    assert chosen[1] == [pool[2], pool[1]]
    assert chosen[2] == chosen[3] == pool[:2], "no word in common: the pool's order"
    assert choose_bm25(pool, ["stone river"], 2)[0] == [pool[1], pool[2]]


def test_bm25_agrees_with_the_formula() -> None:
    """Lucene's BM25 (k1 1.5, b 0.75) written out."""
    words = [query.split() for query, _ in POOL]
    mean = sum(map(len, words)) / len(words)

    def score(query: str, text: list[str]) -> float:
        total = 0.0
        for word in query.casefold().split():
            num_with, count = sum(word in other for other in words), text.count(word)
            idf = np.log(1 + (len(words) - num_with + 0.5) / (num_with + 0.5))
            total += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(text) / mean))
        return round(float(total), 4)

    chosen = choose_bm25(POOL, ASKED, 5, "nearest_first")
    for query, examples in zip(ASKED, chosen, strict=True):
        own = query.strip().casefold()
        scores = sorted((score(query, text) for text in words if " ".join(text) != own), reverse=True)[:5]
        assert [score(query, text.split()) for text, _ in examples] == scores


@pytest.mark.parametrize("order", ORDERS)
def test_a_query_never_gets_itself(order: choosing.Order, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipeline.inference")
    pool = [*POOL, (POOL[7][0].title() + " ", "again")]
    for choose in (lambda: choose_nearest(pool, ASKED, 41, embed, order), lambda: choose_bm25(pool, ASKED, 41, order)):
        chosen = choose()
        assert [len(examples) for examples in chosen] == [39 if i == 3 else 41 for i in range(11)]
        assert "1 of 11 queries stand in the pool themselves" in caplog.text
        assert "1 of 11 queries get fewer than 41 examples" in caplog.text
        caplog.clear()
    fixed, drawn = choose_fixed(pool, 39, ASKED), choose_random(pool, 39, 5, ASKED)
    assert fixed == [*POOL[:7], *POOL[8:]] and sorted(drawn) == sorted(fixed) and drawn != fixed
    assert "2 of 41 examples of the pool are queries themselves" in caplog.text


def test_the_same_examples_for_all() -> None:
    assert choose_fixed(POOL, 3) == POOL[:3]
    drawn = choose_random(POOL, 5, seed=3)
    assert drawn == choose_random(POOL, 5, seed=3) != choose_random(POOL, 5, seed=4)
    assert len(set(drawn)) == 5


def test_errors_of_choosing() -> None:
    for choose in (choose_fixed, lambda pool, k: choose_random(pool, k, 0)):
        for k in (41, -1):
            with pytest.raises(ValueError, match=f"k={k} examples, but the pool has 40; set 0 to 40"):
                choose(POOL, k)
    for choose in (lambda *a: choose_nearest(*a[:3], embed, *a[3:]), choose_bm25):
        with pytest.raises(ValueError, match="k=-1 must be 0 or more"):
            choose(POOL, ASKED, -1)
        with pytest.raises(ValueError, match="order='best' must be one of"):
            choose(POOL, ASKED, 1, "best")
        with pytest.raises(ValueError, match=r"queries\[0\]=None is not a text"):
            choose(POOL, [None], 1)
    with pytest.raises(ValueError, match=r"examples\[0\]=\('a',\) must be a query and a response"):
        choose_fixed([("a",)], 1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="none of the pool's 1 queries holds a word"):
        choose_bm25([("?", "a")], ASKED, 1)
    with pytest.raises(ValueError, match="not finite"):
        choose_nearest(POOL, ASKED, 1, lambda texts: embed(texts) * np.float32("nan"))
    assert choose_nearest([], ["a"], 2, embed) == [[]] and choose_nearest(POOL, [], 2, embed) == []


# Examples of each query's own.


def test_examples_of_each_query_are_one_query_at_a_time(base: Path) -> None:  # noqa: F811
    embedder = base_embedder(base)
    lists = [EXAMPLES, [], EXAMPLES[:1], EXAMPLES, EXAMPLES[::-1], EXAMPLES[:1], list(EXAMPLES), POOL[:1]]
    texts = (QUERIES * 2)[: len(lists)]
    for options in ({}, {"normalize": False}):
        got_ND = embedder.encode_queries_each(texts, INSTRUCTION, lists, **options)
        for text, examples, got_D in zip(texts, lists, got_ND, strict=True):
            wanted_D = embedder.encode_queries([text], INSTRUCTION, examples, **options)[0]
            np.testing.assert_allclose(got_D, wanted_D, atol=1e-6 if not options else 1e-5)
    assert embedder.encode_queries_each([], INSTRUCTION, []).shape == (0, 64)
    with pytest.raises(ValueError, match="examples_of has 1 lists for 2 texts"):
        embedder.encode_queries_each(["a", "b"], INSTRUCTION, [[]])


def test_each_prefix_that_is_shared_is_encoded_once(base: Path) -> None:  # noqa: F811
    embedder = base_embedder(base, chunk_tokens=4000)
    sizes: list[int] = []
    embedder.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    lists = [POOL[i % 6 : i % 6 + 2] for i in range(12)] + [POOL[20 + i : 22 + i] for i in range(4)]
    texts = [f"{QUERIES[0]} {i}" for i in range(len(lists))]
    embedder.encode_queries_each(texts, INSTRUCTION, lists)
    whole = [len(embedder.compose_queries([t], INSTRUCTION, e)[0]) for t, e in zip(texts, lists, strict=True)]
    assert len(sizes) == 1 + 2 * 6, "one chunk of prompts that share nothing; six prefixes, each before two queries"
    assert sizes[0] == sum(whole[12:]) and sum(sizes) < sum(whole)


# Cosines.


def test_similarity_is_torchs_cosine() -> None:
    rng = np.random.default_rng(0)
    queries_QD, passages_PD = (rng.normal(size=(n, 5)).astype(np.float32) * 3 for n in (3, 4))
    got_QP = similarity(queries_QD, passages_PD)
    wanted = torch.cosine_similarity(torch.tensor(queries_QD)[:, None], torch.tensor(passages_PD)[None], dim=2)
    assert got_QP.dtype == np.float32 and got_QP.shape == (3, 4)
    np.testing.assert_allclose(got_QP, wanted, atol=1e-6)
    assert similarity(queries_QD.astype(np.float16), passages_PD).dtype == np.float32
    assert (similarity(queries_QD * 0, passages_PD) == 0).all() and similarity(queries_QD[:0], passages_PD).shape == (
        0,
        4,
    )
    with pytest.raises(ValueError, match="queries_QD has width 5, passages_PD 4; embed both with one model"):
        similarity(queries_QD, passages_PD[:, :4])
    with pytest.raises(ValueError, match=r"queries_QD has shape \(5,\)"):
        similarity(queries_QD[0], passages_PD)
