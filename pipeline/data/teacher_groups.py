"""Groups that training distils: a row's first positive and all its negatives, with the teacher's scores.

R rows, one group each; C candidates of all groups, one after another.
"""

import numpy as np

from pipeline.data.store import DatasetTable


def group_scores(
    table: DatasetTable, pos_score: np.ndarray, neg_score: np.ndarray, row_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [C] scores, positive first in each group; int64 [R + 1] offsets of the groups).

    Args:
        pos_score: of the whole table, parallel to its pos_text; neg_score likewise.
        row_R: rows whose groups are wanted.
    """
    negative_place = ragged_places(table.neg_offsets, row_R)
    size_R = 1 + table.neg_offsets[row_R + 1] - table.neg_offsets[row_R]
    offsets = np.concatenate([[0], np.cumsum(size_R)]).astype(np.int64)
    score_C = np.empty(int(offsets[-1]), dtype=np.float64)
    is_positive_C = np.zeros(len(score_C), dtype=bool)
    is_positive_C[offsets[:-1]] = True
    score_C[is_positive_C] = pos_score[table.pos_offsets[row_R]]
    score_C[~is_positive_C] = neg_score[negative_place]
    return score_C, offsets


def ragged_places(offsets: np.ndarray, row_R: np.ndarray) -> np.ndarray:
    """Places of all values of these rows of a ragged column, row after row: int64."""
    start_R = np.asarray(offsets[row_R], dtype=np.int64)
    count_R = np.asarray(offsets[row_R + 1], dtype=np.int64) - start_R
    before = np.concatenate([[0], np.cumsum(count_R)])
    return np.arange(before[-1]) + np.repeat(start_R - before[:-1], count_R)


def group_entropy(score_C: np.ndarray, offsets: np.ndarray, temperature: float) -> np.ndarray:
    """Entropy in nats of softmax(scores / temperature) of each group: [R]. Groups are not empty."""
    starts, size_R = offsets[:-1], np.diff(offsets)
    logit_C = score_C / temperature
    logit_C = logit_C - np.repeat(np.maximum.reduceat(logit_C, starts), size_R)
    weight_C = np.exp(logit_C)
    total_R = np.add.reduceat(weight_C, starts)
    return np.log(total_R) - np.add.reduceat(weight_C * logit_C, starts) / total_R
