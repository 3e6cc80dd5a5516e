"""What the rows of a dataset hold: positives and negatives a row, teacher scores.

N rows, R rows with scores among those looked at, C texts of their groups one after another.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.data.store import DatasetTable
from pipeline.data.teacher_groups import group_entropy, group_scores, ragged_places

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
    mean_entropy: (
        float  # of the softmax at loss.teacher_temperature=1 over a row's first positive and all its negatives
    )
    mean_uniform: float  # what it would be if the teacher told nothing: the mean of log(texts of the group)


def teacher_scores(table: DatasetTable, max_rows: int = MAX_SCORED_ROWS) -> TeacherScores | None:
    """Range and spread of a dataset's teacher scores; None where no row looked at has any."""
    if table.pos_score is None or table.neg_score is None:
        return None
    row = np.arange(table.num_rows)
    if table.num_rows > max_rows:
        row = np.linspace(0, table.num_rows - 1, max_rows).astype(np.int64)
    row_R = row[~np.isnan(table.pos_score[table.pos_offsets[row]])]
    if len(row_R) == 0:
        return None
    score_C, offsets = group_scores(table, table.pos_score, table.neg_score, row_R)
    every = np.concatenate([table.pos_score[ragged_places(table.pos_offsets, row_R)], score_C])
    return TeacherScores(
        num_rows=len(row),
        num_scored=len(row_R),
        lowest=float(every.min()),
        highest=float(every.max()),
        mean_entropy=float(group_entropy(score_C, offsets, 1.0).mean()),
        mean_uniform=float(np.log(np.diff(offsets)).mean()),
    )
