"""Which examples of a pool stand before a query: the same for all queries, or for each those that are nearest to it.

A query never gets itself: examples with its text (case and white space at the ends aside) are left out, and counted.

Q queries, P examples of the pool, D width.
"""

import logging
import random
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from pipeline.inference.prompting import Example, check_examples, check_texts
from pipeline.inference.similarity import similarity

log = logging.getLogger(__name__)

Order = Literal["nearest_last", "nearest_first", "random"]
Embed = Callable[[Sequence[str]], np.ndarray]  # N texts -> [N, D]

_BLOCK = 1024  # queries compared with the pool at once


def choose_fixed(pool: Sequence[Example], k: int, queries: Sequence[str] = ()) -> list[Example]:
    """The first k examples of the pool: the same for all queries.

    Args:
        queries: texts whose own examples are left out.

    Raises:
        ValueError: the pool has fewer than k.
    """
    return _left(pool, k, queries)[:k]


def choose_random(pool: Sequence[Example], k: int, seed: int, queries: Sequence[str] = ()) -> list[Example]:
    """k different examples, drawn once and the same for all queries; `queries` and errors as in `choose_fixed`."""
    return random.Random(seed).sample(_left(pool, k, queries), k)


def choose_nearest(
    pool: Sequence[Example],
    queries: Sequence[str],
    k: int,
    embed: Embed,
    order: Order = "nearest_last",
    seed: int = 0,
) -> list[list[Example]]:
    """For each query the k examples whose queries are nearest by cosine (RARe, arXiv 2410.20088, section 3).

    Args:
        embed: embeds query texts, e.g. `lambda texts: embedder.encode_queries(texts, instruction)`.
        order: "nearest_last" puts the nearest example beside the query; "random" shuffles by `seed`.

    Returns:
        Q lists of k examples, or of all that are not the query itself where these are fewer.
    """
    pool, queries = check_examples(pool), check_texts(queries, "queries")
    _require(k, order)
    if not pool or not queries:
        return _choose(pool, queries, k, order, seed, lambda part: np.zeros((len(part), len(pool))))
    pool_PD = embed([query for query, _ in pool])
    return _choose(pool, queries, k, order, seed, lambda part: similarity(embed(part), pool_PD))


def choose_bm25(
    pool: Sequence[Example], queries: Sequence[str], k: int, order: Order = "nearest_last", seed: int = 0
) -> list[list[Example]]:
    """As `choose_nearest` by BM25 over the words of the queries (Lucene's formula, English stop words).

    Examples that share no word with the query follow in the pool's order; queries that get some are counted.

    Raises:
        ValueError: no query of the pool holds a word.
    """
    import bm25s

    pool, queries = check_examples(pool), check_texts(queries, "queries")
    _require(k, order)
    words = bm25s.tokenize([query for query, _ in pool], stopwords="en", show_progress=False)
    if not words.vocab:
        raise ValueError(f"none of the pool's {len(pool)} queries holds a word that BM25 could rank by; choose_nearest")
    index = bm25s.BM25(backend="numpy")
    index.index(words, show_progress=False)

    def score(part: Sequence[str]) -> np.ndarray:
        words = bm25s.tokenize(list(part), stopwords="en", return_ids=False, show_progress=False)
        ids = [index.get_tokens_ids(query) for query in words]
        zero_P = np.zeros(len(pool), dtype=np.float32)
        return np.stack([index.get_scores_from_ids(known) if known else zero_P for known in ids])

    return _choose(pool, queries, k, order, seed, score)


def _choose(
    pool: Sequence[Example],
    queries: Sequence[str],
    k: int,
    order: Order,
    seed: int,
    score: Callable[[Sequence[str]], np.ndarray],
) -> list[list[Example]]:
    """The best k of the pool by `score` (texts -> [Q, P]) for each query; equal scores go by place in the pool.

    Raises:
        ValueError: a score is not finite.
    """
    own: dict[str, list[int]] = {}
    for place, (query, _) in enumerate(pool):
        own.setdefault(_key(query), []).append(place)
    rng = random.Random(seed)
    chosen: list[list[Example]] = []
    num_own = num_zero = 0
    for start in range(0, len(queries), _BLOCK):
        part = queries[start : start + _BLOCK]
        scores_QP = score(part)
        if not np.isfinite(scores_QP).all():
            raise ValueError("the embeddings of pool and queries are not finite; the model's weights are damaged")
        for query, score_P in zip(part, scores_QP, strict=True):
            itself = own.get(_key(query), [])
            num_own += bool(itself)
            best = _best(score_P, itself, k)
            num_zero += bool(len(best)) and float(score_P[best[-1]]) == 0
            if order == "nearest_last":
                best.reverse()
            elif order == "random":
                rng.shuffle(best)
            chosen.append([pool[place] for place in best])
    if num_own:
        log.info("%d of %d queries stand in the pool themselves and do not get themselves", num_own, len(queries))
    if num_zero:
        log.info("%d of %d queries get examples of score 0", num_zero, len(queries))
    if num_short := sum(len(examples) < k for examples in chosen):
        log.warning("%d of %d queries get fewer than %d examples: the pool has no more", num_short, len(queries), k)
    return chosen


def _best(score_P: np.ndarray, left_out: list[int], k: int) -> list[int]:
    """Places of the k best scores, best first, then in the pool's order."""
    score_P = np.array(score_P, dtype=np.float64)
    score_P[left_out] = -np.inf
    found = np.flatnonzero(score_P > -np.inf)
    if 0 < k < len(found):
        least = np.partition(score_P[found], -k)[-k]
        found = found[score_P[found] >= least]
    return found[np.argsort(-score_P[found], kind="stable")][:k].tolist()


def _left(pool: Sequence[Example], k: int, queries: Sequence[str]) -> list[Example]:
    """The pool without the queries' own examples, which are counted; ValueError where fewer than k are left."""
    keys = {_key(query) for query in queries}
    left = [example for example in check_examples(pool) if _key(example[0]) not in keys]
    if num_own := len(pool) - len(left):
        log.info("%d of %d examples of the pool are queries themselves and left out", num_own, len(pool))
    if not 0 <= k <= len(left):
        raise ValueError(f"k={k} examples, but the pool has {len(left)}; set 0 to {len(left)}, or give a larger pool")
    return left


def _require(k: int, order: str) -> None:
    if k < 0:
        raise ValueError(f"k={k} must be 0 or more")
    if order not in ("nearest_last", "nearest_first", "random"):
        raise ValueError(f"order={order!r} must be one of nearest_last, nearest_first, random")


def _key(text: str) -> str:
    return text.strip().casefold()
