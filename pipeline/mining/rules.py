"""Which candidates of a row may be its negatives, and which of those are drawn.

K candidates of one row (the ranks of the window), P positives of the row. Each candidate that goes is counted under the
first rule of REASONS that it breaks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.permutation import mix_key
from pipeline.mining.corpus import Copies, Relations
from pipeline.mining.options import MiningOptions, limit_below

REASONS = {
    "positive": "a positive of the row itself",
    "copy": "the query or a positive again, but for case, punctuation or spaces",
    "same_query": "a positive of another row with the same query",
    "same_positive": "a text of another row that has one of this row's positives, or has it as its query",
    "same_category": "a text of a row of the same category",
    "present": "among the row's negatives already",
    "max_score": "scores above --max-score",
    "margin": "scores above the positive's score less --margin",
    "max_ratio": "scores above --max-ratio of the positive's score",
}
KEPT = -1


def active_rules(options: MiningOptions, has_categories: bool) -> list[str]:
    """The rules of REASONS that can remove anything here."""
    on = {
        "same_category": has_categories,
        "present": options.keep_negatives,
        "max_score": options.max_score is not None,
        "margin": options.margin is not None,
        "max_ratio": options.max_ratio is not None,
    }
    return [name for name in REASONS if on.get(name, True)]


@dataclass(frozen=True)
class RowTexts:
    """Text ids of one row."""

    query: int
    positive_P: np.ndarray  # int64
    category: int  # -1: none
    kept_negatives: np.ndarray  # int64; empty where the old negatives are replaced


def judge(
    row: RowTexts,
    text_K: np.ndarray,
    score_K: np.ndarray,
    positive_score: float,
    relations: Relations,
    copies: Copies,
    options: MiningOptions,
) -> np.ndarray:
    """The reason why each candidate goes, as an index into REASONS, or KEPT: int64 [K].

    Args:
        positive_score: lowest score of the row's positives. All of them answer the query, so a text that scores as
            high as the lowest may answer it too; the highest would let through what outscores a true answer.
    """
    own = np.array([row.query, *row.positive_P.tolist()])
    broken = {
        "positive": np.isin(text_K, row.positive_P),
        "copy": np.isin(copies.keys(text_K), copies.keys(own)),
        "same_query": relations.holds(relations.answers, row.query, text_K),
        "same_positive": np.any([relations.holds(relations.together, t, text_K) for t in own.tolist()], axis=0),
    }
    if row.category >= 0:
        broken["same_category"] = relations.in_category(text_K, row.category)
    if len(row.kept_negatives):
        broken["present"] = np.isin(text_K, row.kept_negatives)
    if options.max_score is not None:
        broken["max_score"] = score_K > options.max_score
    if options.margin is not None:
        broken["margin"] = score_K > positive_score - options.margin
    if options.max_ratio is not None:
        broken["max_ratio"] = score_K > limit_below(positive_score, options.max_ratio)
    reason_K = np.full(len(text_K), KEPT, dtype=np.int64)
    for number, name in reversed(list(enumerate(REASONS))):
        if name in broken:
            reason_K[broken[name]] = number
    return reason_K


def drawing_order(row: int, dataset: str, num_kept: int, seed: int) -> np.ndarray:
    """The order in which the kept candidates of a row (by text id) are drawn: a permutation, keyed by the row alone."""
    return np.random.default_rng(mix_key(seed, row, *dataset.encode())).permutation(num_kept)


def draw_with_teacher(
    order: Sequence[np.ndarray],
    wanted: int,
    limit: Sequence[float],
    score: Callable[[list[tuple[int, int]]], np.ndarray],
) -> tuple[list[np.ndarray], int, int]:
    """Draw the candidates of rows in their order, without those that the teacher scores too high.

    The teacher sees only as many as it takes to find `wanted` of a row: the same negatives as if it saw all.

    Args:
        order: candidates of each row as text ids, in the order of drawing.
        limit: the highest score that a candidate of each row may have.
        score: the teacher, for (row, text id) pairs.

    Returns:
        chosen text ids of each row in drawing order; how many candidates were seen, and how many of them removed.
    """
    chosen: list[list[int]] = [[] for _ in order]
    place, seen, removed = [0] * len(order), 0, 0
    while True:
        pairs: list[tuple[int, int]] = []
        for r, texts in enumerate(order):
            stop = min(place[r] + wanted - len(chosen[r]), len(texts))
            pairs += [(r, text) for text in texts[place[r] : stop].tolist()]
            place[r] = stop
        if not pairs:
            return [np.array(texts, dtype=np.int64) for texts in chosen], seen, removed
        for (r, text), value in zip(pairs, score(pairs).tolist(), strict=True):
            seen += 1
            if value > limit[r]:
                removed += 1
            else:
                chosen[r].append(text)
