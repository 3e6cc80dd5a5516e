"""Rankings are exact: equal to brute force for any shard size, with ties broken by place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.mining import search
from pipeline.mining.block_store import StoredBlocks, fill_blocks
from pipeline.mining.corpus import _pairs_of_rows, words_of
from pipeline.mining.options import limit_below
from pipeline.mining.rules import draw_with_teacher
from pipeline.mining.search import DenseIndex, exact_scores, index_words, top_of_shard

NO_PAIRS = np.empty(0, dtype=np.int64)


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def stored(folder: Path, vectors: np.ndarray, block_texts: int = 10) -> StoredBlocks:
    is_cut = np.arange(len(vectors)) % 7 == 2
    return fill_blocks(folder, len(vectors), lambda part: (vectors[part], is_cut[part]), "", False, block_texts)


def brute_force(query_D: np.ndarray, text_CD: np.ndarray, depth: int) -> tuple[list[int], list[np.float32]]:
    scores = [np.float32(np.sum(query_D.astype(np.float64) * t.astype(np.float64))) for t in text_CD]
    order = sorted(range(len(scores)), key=lambda c: (-scores[c], c))[:depth]
    return order, [scores[c] for c in order]


@pytest.mark.parametrize("shard_texts", [1, 7, 64, 1000])
def test_ranking_is_brute_force_for_any_shard_size(tmp_path: Path, shard_texts: int) -> None:
    rng = np.random.default_rng(0)
    texts = unit(rng, 300, 24)
    texts[rng.integers(0, 300, 200)] = texts[rng.integers(0, 300, 200)]  # many equal ones
    queries = np.concatenate([unit(rng, 20, 24), texts[:5]])
    index = DenseIndex(stored(tmp_path / "q", queries), stored(tmp_path / "t", texts), shard_texts)
    query_B = np.array([3, 24, 0, 20, 11])
    offsets, places = np.array([0, 2, 2, 3, 7, 8]), rng.integers(0, 300, 8)
    ranking, pair_score_E = index.search(query_B, 50, offsets, places)
    for b, q in enumerate(query_B):
        order, scores = brute_force(queries[q], texts, 50)
        assert ranking.place_BK[b].tolist() == order and ranking.score_BK[b].tolist() == scores
        for e in range(offsets[b], offsets[b + 1]):
            assert pair_score_E[e] == brute_force(queries[q], texts[places[e]][None], 1)[1][0]


def test_more_equal_texts_than_the_slack_are_searched_deeper(monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    rng = np.random.default_rng(1)
    texts = unit(rng, 500, 16)
    texts[50:450] = texts[50]
    queries = np.concatenate([texts[50:51], unit(rng, 3, 16)])
    fetched: list[tuple[int, int]] = []
    real = faiss.knn
    monkeypatch.setattr(faiss, "knn", lambda q, x, k, metric: fetched.append((len(q), k)) or real(q, x, k, metric))
    place_BK, score_BK = top_of_shard(queries, texts, 20, np.full(4, -np.inf))
    for b, query in enumerate(queries):
        order, scores = brute_force(query, texts, 20)
        assert place_BK[b].tolist() == order and score_BK[b].tolist() == scores
    assert place_BK[0].tolist() == list(range(50, 70))
    assert fetched[0] == (4, 84) and fetched[-1][0] < 4 and fetched[-1][1] == 500, "only those with ties go deeper"


def test_exact_scores_do_not_depend_on_what_stands_beside() -> None:
    rng = np.random.default_rng(2)
    queries, texts = unit(rng, 1200, 385), unit(rng, 1200, 385)
    together = exact_scores(queries, texts)
    for start, stop in ((0, 1), (17, 18), (1000, 1200), (3, 8)):
        assert np.array_equal(exact_scores(queries[start:stop], texts[start:stop]), together[start:stop])
    assert together[5] == brute_force(queries[5], texts[5:6], 1)[1][0]


def test_only_what_can_still_enter_is_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    texts, queries = unit(rng, 2000, 16), unit(rng, 10, 16)
    index = DenseIndex(stored(tmp_path / "q", queries), stored(tmp_path / "t", texts, 100), 200)
    scored: list[int] = []
    real = search.exact_scores
    monkeypatch.setattr(search, "exact_scores", lambda q, t: scored.append(len(q)) or real(q, t))
    ranking, _ = index.search(np.arange(10), 20, np.zeros(11, dtype=np.int64), NO_PAIRS)
    for b in range(10):
        assert ranking.place_BK[b].tolist() == brute_force(queries[b], texts, 20)[0]
    assert scored[0] == 10 * 84 and sum(scored) < 10 * 84 + 10 * 20 * 9


def test_ranking_ends_with_the_corpus(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(3), 6, 8)
    index = DenseIndex(stored(tmp_path / "q", vectors), stored(tmp_path / "t", vectors), 4)
    ranking, _ = index.search(np.array([2]), 9, np.zeros(2, dtype=np.int64), NO_PAIRS)
    assert sorted(ranking.place_BK[0, :6].tolist()) == list(range(6)) and ranking.place_BK[0, 0] == 2
    assert (ranking.place_BK[0, 6:] == -1).all() and np.isneginf(ranking.score_BK[0, 6:]).all()


def test_embeddings_are_read_and_taken_across_blocks(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(4), 47, 5)
    embeddings = stored(tmp_path, vectors)
    assert len(list(tmp_path.iterdir())) == 5 and embeddings.width == 5 and embeddings.count_cut() == 7
    for start, stop in ((0, 47), (3, 4), (9, 11), (10, 20), (40, 47), (8, 39)):
        assert np.array_equal(embeddings.read(start, stop), vectors[start:stop])
    index = np.random.default_rng(5).integers(0, 47, 100)
    assert np.array_equal(embeddings.take(index), vectors[index])
    assert embeddings.take(NO_PAIRS).shape == (0, 5)


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        fill_blocks(tmp_path, 3, lambda part: (np.full((3, 2), np.nan, dtype=np.float32), np.zeros(3)), "", False)
    assert not list(tmp_path.iterdir())


def test_words_ranking_is_lucenes_formula_with_ties_by_place() -> None:
    texts = ["river stone river", "amber cloud", "stone amber", "amber stone", "the of", "river river river cloud"] * 3
    queries = ["river", "amber stone", "the", "unknown words", "stone stone"]
    index = index_words(texts, queries)
    places = np.array([0, 4])
    words = [[w for w in text.split() if w not in ("the", "of")] for text in texts]
    mean = np.mean([len(w) for w in words])

    def bm25(query: str, text: list[str]) -> float:
        total = 0.0
        for word in query.split():
            found = sum(word in other for other in words)
            tf = text.count(word)
            idf = np.log(1 + (len(words) - found + 0.5) / (found + 0.5))
            total += idf * tf / (tf + 1.5 * (0.25 + 0.75 * len(text) / mean)) if tf else 0.0
        return total

    for b, query in enumerate(queries):
        ranking, pair_score_E = index.search(np.array([b]), 5, np.array([0, 2]), places)
        scores = [round(bm25(query, text), 5) for text in words]
        order = sorted((c for c in range(len(texts)) if scores[c] > 0), key=lambda c: (-scores[c], c))[:5]
        assert [p for p in ranking.place_BK[0].tolist() if p >= 0] == order
        assert np.allclose(ranking.score_BK[0, : len(order)], [scores[c] for c in order], atol=2e-5)
        assert np.allclose(pair_score_E, [scores[p] for p in places], atol=2e-5)
    assert (ranking.place_BK[0, : len(order)] >= 0).all() and len(order) == 5


def test_texts_without_words_are_an_error() -> None:
    with pytest.raises(ValueError, match="no text holds a word"):
        index_words(["?", "the"], ["river"])


def test_copies_differ_in_form_only() -> None:
    same = ("What is  BERT?", "what is bert", "WHAT, is “Bert”…", "ｗｈａｔ is bert")
    assert len({words_of(text) for text in same}) == 1
    assert len({words_of(text) for text in ("what is bert", "what was bert", "?!", "...", "")}) == 5


def test_ratio_goes_below_negative_scores() -> None:
    assert limit_below(0.8, 0.95) == pytest.approx(0.76) and limit_below(-0.8, 0.95) == pytest.approx(-0.84)
    assert limit_below(0.3, 1.0) == 0.3


def test_pairs_of_rows_are_all_pairs(tmp_path: Path) -> None:
    class Table:
        query_text_N = np.array([9, 8, 7])
        pos_offsets = np.array([0, 1, 4, 6])
        pos_text = np.array([1, 2, 3, 4, 5, 6])

    first, second = _pairs_of_rows(Table())  # type: ignore[arg-type]
    rows = [[9, 1], [8, 2, 3, 4], [7, 5, 6]]
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(a, b) for row in rows for a in row for b in row]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=12, unique=True), min_size=1, max_size=6), st.integers(1, 4))
def test_drawing_with_a_teacher_equals_asking_it_about_all(lists: list[list[int]], wanted: int) -> None:
    limit = [0.4 + 0.1 * r for r in range(len(lists))]

    def value(row: int, text: int) -> float:
        return float(np.random.default_rng([row, text]).random())

    def score(pairs: list[tuple[int, int]]) -> Any:
        return np.array([value(*pair) for pair in pairs])

    chosen, seen, removed = draw_with_teacher([np.array(x, dtype=np.int64) for x in lists], wanted, limit, score)
    for r, texts in enumerate(lists):
        assert chosen[r].tolist() == [t for t in texts if value(r, t) <= limit[r]][:wanted]
    assert seen - removed == sum(map(len, chosen)) and seen <= sum(map(len, lists))
