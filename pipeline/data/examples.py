"""Which rows a query shows as in-context examples (paper, section 3.2).

A query shows k other (query, response) pairs, k uniform in 0 .. max_examples. Never shown are the row itself, a row
with the same query text, and, for the types that exclude them, rows that hold the query's own positive on either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.permutation import permute
from pipeline.data.schedule import TaskRule

if TYPE_CHECKING:
    from pipeline.data.store import DatasetTable

_SCAN_ROWS = 4096  # of a dataset, where random tries found too few rows that may be shown


@dataclass(frozen=True)
class Pairs:
    """Rows with one drawn positive each, as arrays of one shape: what queries are and what they can show."""

    row: np.ndarray  # int64 row numbers inside the dataset
    query: np.ndarray  # int64 text ids
    positive: np.ndarray  # int64 text ids
    response: np.ndarray  # int64 text ids, -1: cannot be shown
    instruction: np.ndarray  # int32

    def take(self, index: np.ndarray) -> Pairs:
        """The pairs at these places, in the shape of `index`."""
        parts = (self.row, self.query, self.positive, self.response, self.instruction)
        return Pairs(*(part[index] for part in parts))


def make_pairs(table: DatasetTable, rule: TaskRule, row_N: np.ndarray, entry_N: np.ndarray) -> Pairs:
    """Pairs of these rows, each with the positive at `entry_N` of the table's positives."""
    positive = np.asarray(table.pos_text[entry_N], dtype=np.int64)
    response = table.category_text_N[row_N] if rule.response == "category" else positive
    return Pairs(
        row=row_N,
        query=np.asarray(table.query_text_N[row_N], dtype=np.int64),
        positive=positive,
        response=np.asarray(response, dtype=np.int64),
        instruction=np.asarray(table.instruction_N[row_N], dtype=np.int32),
    )


def draw_entries(table: DatasetTable, row_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One positive of each row, uniformly: places in the table's positives, int64 [N]."""
    start = table.pos_offsets[row_N]
    return start + rng.integers(0, table.pos_offsets[row_N + 1] - start)


def may_show(rule: TaskRule, own: Pairs, shown: Pairs) -> np.ndarray:
    """Whether query `own` may show pair `shown`; shapes broadcast, bool. The row itself has its own query text."""
    allowed = (shown.query != own.query) & (shown.response >= 0)
    if rule.exclude_same_positive:
        # A reverse pair carries the answer on its query side.
        allowed &= (shown.positive != own.positive) & (shown.query != own.positive)
    return allowed


def show_from_batch(
    rule: TaskRule, batch: Pairs, wanted_B: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, Pairs]:
    """Examples from the other rows of the global batch: (example_offsets [B + 1], pairs [E])."""
    num_rows = len(batch.row)
    drawn_BM = rng.integers(0, num_rows, (num_rows, _tries(wanted_B)))
    chosen_BM = _first_allowed(rule, batch, batch.take(drawn_BM), wanted_B)
    short = np.flatnonzero(chosen_BM.sum(axis=1) < wanted_B)
    exact = {b: _exact_draw(rule, batch, b, batch, int(wanted_B[b]), rng) for b in short.tolist()}
    offsets, source = _gather(chosen_BM, drawn_BM, exact)
    return offsets, batch.take(source)


def show_from_dataset(
    table: DatasetTable, rule: TaskRule, batch: Pairs, wanted_B: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, Pairs]:
    """Examples from anywhere in the dataset: (example_offsets [B + 1], pairs [E])."""
    row_BM = rng.integers(0, table.num_rows, (len(batch.row), _tries(wanted_B)))
    row_R = row_BM.reshape(-1)
    pool = make_pairs(table, rule, row_R, draw_entries(table, row_R, rng))
    place_BM = np.arange(row_BM.size).reshape(row_BM.shape)
    chosen_BM = _first_allowed(rule, batch, pool.take(place_BM), wanted_B)
    short = np.flatnonzero(chosen_BM.sum(axis=1) < wanted_B)
    if len(short) == 0:
        offsets, source = _gather(chosen_BM, place_BM, {})
        return offsets, pool.take(source)
    # All rows of a small dataset, a random part of a large one.
    scan = np.arange(min(_SCAN_ROWS, table.num_rows))
    scan = permute(scan, table.num_rows, int(rng.integers(1 << 62)))
    rest = make_pairs(table, rule, scan, draw_entries(table, scan, rng))
    exact = {b: row_R.size + _exact_draw(rule, batch, b, rest, int(wanted_B[b]), rng) for b in short.tolist()}
    offsets, source = _gather(chosen_BM, place_BM, exact)
    return offsets, _concatenate(pool, rest).take(source)


def show_nearest(
    table: DatasetTable, rule: TaskRule, batch: Pairs, wanted_B: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, Pairs]:
    """The nearest rows that mining stored and the query may show: (example_offsets [B + 1], pairs [E]).

    Examples like the query are what RARe trains with (arXiv 2410.20088). The nearest stands last, beside the query:
    the prompt limit drops examples from the left, so what is dropped is what is least like the query.
    """
    assert table.nearest_offsets is not None and table.nearest_row is not None
    start_B = np.asarray(table.nearest_offsets[batch.row], dtype=np.int64)
    count_B = np.asarray(table.nearest_offsets[batch.row + 1], dtype=np.int64) - start_B
    within_BM = np.arange(int(count_B.max(initial=0)))[None, :] < count_B[:, None]
    # Farthest first: column m counts from the end of each query's list.
    place_BM = np.where(within_BM, start_B[:, None] + count_B[:, None] - 1 - np.arange(within_BM.shape[1]), 0)
    row_R = np.asarray(table.nearest_row[place_BM[within_BM]], dtype=np.int64)
    pool = make_pairs(table, rule, row_R, draw_entries(table, row_R, rng))
    source_BM = np.zeros(within_BM.shape, dtype=np.int64)
    source_BM[within_BM] = np.arange(len(row_R))
    allowed_BM = np.zeros(within_BM.shape, dtype=bool)
    query_R = np.repeat(np.arange(len(batch.row)), count_B)
    allowed_BM[within_BM] = may_show(rule, batch.take(query_R), pool)
    nearer_BM = np.cumsum(allowed_BM[:, ::-1], axis=1)[:, ::-1]
    chosen_BM = allowed_BM & (nearer_BM <= wanted_B[:, None])
    offsets, source = _gather(chosen_BM, source_BM, {})
    return offsets, pool.take(source)


def show_fixed(rule: TaskRule, batch: Pairs, fixed: Pairs) -> tuple[np.ndarray, Pairs]:
    """The same examples for every query, without those that it may not see: (example_offsets [B + 1], pairs [E])."""
    allowed_BF = may_show(rule, _column(batch), fixed)
    _, place = np.nonzero(allowed_BF)
    return _offsets(allowed_BF.sum(axis=1)), fixed.take(place)


def _tries(wanted_B: np.ndarray) -> int:
    return 2 * int(wanted_B.max(initial=0)) + 6


def _column(pairs: Pairs) -> Pairs:
    return pairs.take(np.arange(len(pairs.row))[:, None])


def _first_allowed(rule: TaskRule, batch: Pairs, shown_BM: Pairs, wanted_B: np.ndarray) -> np.ndarray:
    """Mask [B, M] of the first `wanted_B` pairs of each query that may be shown and are not shown already.

    The first k different ones of independent uniform draws are a uniform draw without replacement.
    """
    allowed_BM = may_show(rule, _column(batch), shown_BM)
    row_BM = shown_BM.row
    for m in range(1, row_BM.shape[1]):
        allowed_BM[:, m] &= ~(row_BM[:, :m] == row_BM[:, m : m + 1]).any(axis=1)
    return allowed_BM & (np.cumsum(allowed_BM, axis=1) <= wanted_B[:, None])


def _exact_draw(rule: TaskRule, batch: Pairs, b: int, pool: Pairs, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Places in the pool of up to `wanted` pairs that query b may show, by looking at every one."""
    allowed = np.flatnonzero(may_show(rule, batch.take(np.array(b)), pool))
    return rng.permutation(allowed)[:wanted]


def _gather(
    chosen_BM: np.ndarray, source_BM: np.ndarray, exact: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(offsets [B + 1], sources [E]): the chosen ones of each query, or what `exact` holds for it."""
    if not exact:
        return _offsets(chosen_BM.sum(axis=1)), source_BM[chosen_BM]
    rows = [exact[b] if b in exact else source_BM[b][chosen_BM[b]] for b in range(len(source_BM))]
    return _offsets(np.array([len(row) for row in rows])), np.concatenate(rows)


def _offsets(count_B: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(count_B)]).astype(np.int64)


def _concatenate(first: Pairs, second: Pairs) -> Pairs:
    return Pairs(*(np.concatenate([a, b]) for a, b in zip(vars(first).values(), vars(second).values(), strict=True)))
