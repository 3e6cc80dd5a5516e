"""What the rows of a dataset hold: positives and negatives a row, teacher scores.

N rows, R rows with scores among those looked at, G texts of their groups (positive and negatives) one after another.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.data.store import DatasetTable

MAX_SCORED_ROWS = 1_000_000  # of a larger dataset so many rows are looked at, evenly spaced
BLOCK = 1 << 22


def count_sizes(offsets: np.ndarray) -> np.ndarray:
    """int64, by size 0, 1, 2, ...: how many rows of a ragged column have it."""
    total = np.zeros(1, dtype=np.int64)
    for start in range(0, len(offsets) - 1, BLOCK):
        part = np.bincount(np.diff(offsets[start : start + BLOCK + 1]))
        if len(part) > len(total):
            total = np.pad(total, (0, len(part) - len(total)))
        total[: len(part)] += part
    return total


def median_size(count: np.ndarray) -> int:
    """The (lower) median of sizes counted by `count_sizes`."""
    return int(np.searchsorted(np.cumsum(count), (int(count.sum()) + 1) // 2))


@dataclass(frozen=True)
class TeacherScores:
    """Teacher scores of a dataset; entropies in nats."""

    num_rows: int  # rows looked at
    num_scored: int  # of them with scores
    lowest: float
    highest: float
    mean_entropy: float  # of the softmax at temperature 1 over a row's first positive and all its negatives
    mean_uniform: float  # what it would be if the teacher told nothing: the mean of log(texts of the group)


def teacher_scores(table: DatasetTable, max_rows: int = MAX_SCORED_ROWS) -> TeacherScores | None:
    """Range and spread of a dataset's teacher scores; None where no row looked at has any."""
    if table.pos_score is None or table.neg_score is None:
        return None
    row = np.arange(table.num_rows)
    if table.num_rows > max_rows:
        row = np.linspace(0, table.num_rows - 1, max_rows).astype(np.int64)
    first = np.asarray(table.pos_score[table.pos_offsets[row]], dtype=np.float64)
    row_R, positive_R = row[~np.isnan(first)], first[~np.isnan(first)]
    if len(row_R) == 0:
        return None
    negative_place = _ragged_places(table.neg_offsets, row_R)
    size_R = 1 + np.asarray(table.neg_offsets[row_R + 1] - table.neg_offsets[row_R])
    start_R = np.concatenate([[0], np.cumsum(size_R)[:-1]])
    score_G = np.empty(int(size_R.sum()))
    is_positive_G = np.zeros(len(score_G), dtype=bool)
    is_positive_G[start_R] = True
    score_G[is_positive_G] = positive_R
    score_G[~is_positive_G] = table.neg_score[negative_place]
    entropy_R = _entropies(score_G, start_R, size_R)
    every = np.concatenate([table.pos_score[_ragged_places(table.pos_offsets, row_R)], score_G])
    return TeacherScores(
        num_rows=len(row),
        num_scored=len(row_R),
        lowest=float(every.min()),
        highest=float(every.max()),
        mean_entropy=float(entropy_R.mean()),
        mean_uniform=float(np.log(size_R).mean()),
    )


def _ragged_places(offsets: np.ndarray, row_R: np.ndarray) -> np.ndarray:
    """Places of all values of these rows, row after row."""
    start = np.asarray(offsets[row_R], dtype=np.int64)
    count = np.asarray(offsets[row_R + 1], dtype=np.int64) - start
    before = np.concatenate([[0], np.cumsum(count)])
    return np.arange(before[-1]) + np.repeat(start - before[:-1], count)


def _entropies(score_G: np.ndarray, start_R: np.ndarray, size_R: np.ndarray) -> np.ndarray:
    """Entropy of the softmax over each group."""
    shifted_G = score_G - np.repeat(np.maximum.reduceat(score_G, start_R), size_R)
    weight_G = np.exp(shifted_G)
    sum_R = np.add.reduceat(weight_G, start_R)
    mean_shifted_R = np.add.reduceat(weight_G * shifted_G, start_R) / sum_R
    return np.log(sum_R) - mean_shifted_R
