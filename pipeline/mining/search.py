"""Exact rankings, the same for any shard and batch size: by embeddings (faiss) or by words (bm25s).

B queries of a block, K ranks, C texts of the corpus, E (query, text) pairs to be scored, D width. A ranking goes by
falling score and, at equal scores, by place in the corpus.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.mining.block_store import StoredBlocks

_SLACK = 64  # places fetched beyond those asked for, so that rounding in the search rarely needs a second look
_RESCORE_BYTES = 32 << 20


@dataclass(frozen=True)
class Ranking:
    """The best K texts of each query; -1 and -inf where the ranking ends before."""

    place_BK: np.ndarray  # int64
    score_BK: np.ndarray  # float32


@dataclass(frozen=True)
class DenseIndex:
    """Queries and texts as embeddings; their score is the inner product."""

    queries: StoredBlocks
    texts: StoredBlocks
    shard_texts: int

    def search(
        self, query_B: np.ndarray, depth: int, pair_offsets: np.ndarray, pair_place: np.ndarray
    ) -> tuple[Ranking, np.ndarray]:
        """(ranking of each query, float32 [E] scores of the pairs (query b, pair_place[pair_offsets[b] : ...]))."""
        query_BD = self.queries.take(query_B)
        place_BK = np.full((len(query_B), depth), -1, dtype=np.int64)
        score_BK = np.full((len(query_B), depth), -np.inf, dtype=np.float32)
        for start in range(0, self.texts.num_items, self.shard_texts):
            shard_CD = self.texts.read(start, min(start + self.shard_texts, self.texts.num_items))
            place, score = top_of_shard(query_BD, shard_CD, depth, score_BK[:, -1])
            place_BK, score_BK = _best(
                np.concatenate([place_BK, np.where(place >= 0, place + start, -1)], axis=1),
                np.concatenate([score_BK, score], axis=1),
                depth,
            )
        query_E = np.repeat(np.arange(len(query_B)), np.diff(pair_offsets))
        pair_score_E = np.empty(len(query_E), dtype=np.float32)
        for part in _parts(len(query_E), query_BD.shape[1]):
            pair_score_E[part] = exact_scores(query_BD[query_E[part]], self.texts.take(pair_place[part]))
        return Ranking(place_BK, score_BK), pair_score_E


def exact_scores(query_ED: np.ndarray, text_ED: np.ndarray) -> np.ndarray:
    """Inner products of pairs, float32 [E]: summed in fp64 in an order that depends on D alone, then rounded once."""
    return (query_ED.astype(np.float64) * text_ED).sum(axis=-1).astype(np.float32)


def top_of_shard(
    query_BD: np.ndarray, shard_CD: np.ndarray, depth: int, floor_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best `depth` texts of a shard by exact score: (place in the shard [B, depth], score [B, depth]).

    The search multiplies in fp32, with a rounding that depends on the sizes of its matrices. So it only proposes:
    more than is asked for is fetched, scored again, and kept where nothing beyond it can score as high. Queries with
    too many texts of nearly the same score are searched again, deeper.

    Args:
        floor_B: the lowest score that still counts (-inf: all do); what lies below is left out as place -1.
    """
    import faiss

    num_texts, width = shard_CD.shape
    error = (width + 2) * 2.0**-24  # of the fp32 sum and its rounding, for vectors of unit length
    place_BK = np.full((len(query_BD), depth), -1, dtype=np.int64)
    score_BK = np.full((len(query_BD), depth), -np.inf, dtype=np.float32)
    todo, fetch = np.arange(len(query_BD)), min(depth + _SLACK, num_texts)
    while len(todo):
        proposed, place = faiss.knn(query_BD[todo], shard_CD, fetch, metric=faiss.METRIC_INNER_PRODUCT)
        # After the first shards few proposals can still enter the ranking: the others need no second look.
        counts = proposed + error >= floor_B[todo, None]
        score = _score_again(query_BD[todo], shard_CD, place, counts)
        place, score = _best(np.where(counts, place, -1), score, depth)
        beyond = proposed[:, -1] + error  # no text that was not fetched scores higher
        sure = (fetch == num_texts) | (beyond < floor_B[todo])
        if depth <= fetch:
            sure |= score[:, -1] > beyond
        width_found = place.shape[1]
        place_BK[todo[sure], :width_found], score_BK[todo[sure], :width_found] = place[sure], score[sure]
        todo, fetch = todo[~sure], min(2 * fetch, num_texts)
    return place_BK, score_BK


def _score_again(query_BD: np.ndarray, shard_CD: np.ndarray, place_BK: np.ndarray, counts_BK: np.ndarray) -> np.ndarray:
    """Exact scores where they count, -inf elsewhere: float32 [B, K]."""
    score_BK = np.full(place_BK.shape, -np.inf, dtype=np.float32)
    query_E, k_E = np.nonzero(counts_BK)
    for part in _parts(len(query_E), query_BD.shape[1]):
        place = place_BK[query_E[part], k_E[part]]
        score_BK[query_E[part], k_E[part]] = exact_scores(query_BD[query_E[part]], shard_CD[place])
    return score_BK


def _best(place: np.ndarray, score: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `depth` of each row by falling score, then rising place."""
    order = np.lexsort((place, -score), axis=-1)[:, :depth]
    return np.take_along_axis(place, order, axis=1), np.take_along_axis(score, order, axis=1)


def _parts(count: int, numbers_each: int) -> list[slice]:
    """Slices of `count` items whose fp64 numbers fit the rescoring budget."""
    step = max(1, _RESCORE_BYTES // (8 * max(numbers_each, 1)))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@dataclass(frozen=True)
class WordIndex:
    """BM25 over words; see `index_words` for its memory."""

    bm25: Any  # bm25s.BM25
    num_texts: int
    query_words: list[list[str]]  # of every query

    def search(
        self, query_B: np.ndarray, depth: int, pair_offsets: np.ndarray, pair_place: np.ndarray
    ) -> tuple[Ranking, np.ndarray]:
        """As in DenseIndex; the ranking ends where texts share no word with the query."""
        place_BK = np.full((len(query_B), depth), -1, dtype=np.int64)
        score_BK = np.full((len(query_B), depth), -np.inf, dtype=np.float32)
        pair_score_E = np.empty(len(pair_place), dtype=np.float32)
        for b, query in enumerate(query_B.tolist()):
            score_C = self._scores(self.query_words[query])
            pairs = slice(int(pair_offsets[b]), int(pair_offsets[b + 1]))
            pair_score_E[pairs] = score_C[pair_place[pairs]]
            place = _top_places(score_C, depth)
            place_BK[b, : len(place)], score_BK[b, : len(place)] = place, score_C[place]
        return Ranking(place_BK, score_BK), pair_score_E

    def _scores(self, words: list[str]) -> np.ndarray:
        ids = self.bm25.get_tokens_ids(words)
        if not ids:
            return np.zeros(self.num_texts, dtype=np.float32)
        return np.asarray(self.bm25.get_scores_from_ids(ids))


def index_words(texts: list[str], queries: list[str]) -> WordIndex:
    """BM25 index of the texts (Lucene's formula, k1 1.5, b 0.75, English stop words, words of two letters or more).

    bm25s takes idf and mean length from the texts that it is given, so shards would rank by other numbers than the
    whole: there is one index. It needs 8 bytes for each distinct word of each text, and about 24 for each word while it
    is built beside the texts themselves: 0.3 GB in all for 200,000 texts of 60 words.

    Raises:
        ValueError: no text holds a word.
    """
    import bm25s

    words = bm25s.tokenize(texts, stopwords="en", show_progress=False)
    if not words.vocab:
        raise ValueError("no text holds a word that BM25 could rank by; mine with an embedder")
    bm25 = bm25s.BM25(backend="numpy")
    bm25.index(words, show_progress=False)
    query_words = bm25s.tokenize(queries, stopwords="en", return_ids=False, show_progress=False)
    return WordIndex(bm25, len(texts), query_words)


def _top_places(score_C: np.ndarray, depth: int) -> np.ndarray:
    """Places of the best `depth` scores above 0, by falling score, then rising place."""
    found = np.flatnonzero(score_C > 0)
    if len(found) > depth:
        last = np.partition(score_C[found], -depth)[-depth]
        above, equal = found[score_C[found] > last], found[score_C[found] == last]
        found = np.sort(np.concatenate([above, equal[: depth - len(above)]]))
    return found[np.argsort(-score_C[found], kind="stable")]
