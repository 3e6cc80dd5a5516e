"""Keyed permutations are bijections; a pass over a dataset visits every row exactly once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.bucketing import batch_rows, make_layout, merge_small_buckets
from pipeline.data.permutation import mix_key, permute


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers())
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    image = permute(np.arange(n), n, mix_key(key))
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permutation_of_one_index_equals_that_of_all() -> None:
    whole = permute(np.arange(1000), 1000, mix_key(5))
    assert [int(permute(np.array([i]), 1000, mix_key(5))[0]) for i in (0, 17, 999)] == whole[[0, 17, 999]].tolist()
    assert permute(np.arange(12).reshape(3, 4), 1000, mix_key(5)).tolist() == whole[:12].reshape(3, 4).tolist()


def test_permutation_needs_no_table_at_huge_sizes() -> None:
    n = 10**12 + 7
    image = permute(np.arange(5000), n, mix_key(1))
    assert len(np.unique(image)) == 5000 and image.min() >= 0 and image.max() < n
    assert abs(image.mean() / n - 0.5) < 0.02


def test_every_place_of_a_small_permutation_is_about_equally_likely() -> None:
    counts = np.zeros((5, 5), dtype=int)
    orders = set()
    for key in range(3000):
        image = permute(np.arange(5), 5, mix_key(key))
        counts[np.arange(5), image] += 1
        orders.add(tuple(image.tolist()))
    assert len(orders) == 120
    assert counts.min() > 480 and counts.max() < 720  # 600 each, sigma 22


def test_neighbours_scatter_and_keys_differ() -> None:
    image = permute(np.arange(100_000), 100_000, mix_key(3))
    assert abs(np.corrcoef(np.arange(100_000), image)[0, 1]) < 0.02
    assert (image == permute(np.arange(100_000), 100_000, mix_key(4))).mean() < 0.001
    assert len({mix_key(), mix_key(0), mix_key(0, 0), mix_key(1, 2), mix_key(2, 1), mix_key(-1)}) == 6


@pytest.mark.parametrize(
    ("sizes", "min_rows", "merged"),
    [
        ([40, 40], 40, [40, 40]),
        ([10, 40, 40], 40, [50, 40]),
        ([40, 10, 40], 40, [40, 50]),
        ([40, 40, 10], 40, [40, 50]),
        ([0, 5, 0], 40, [5]),
        ([40, 0, 0, 40], 40, [40, 40]),
    ],
)
def test_small_buckets_join_a_neighbour(sizes: list[int], min_rows: int, merged: list[int]) -> None:
    starts = merge_small_buckets(np.concatenate([[0], np.cumsum(sizes)]), min_rows)
    assert starts[0] == 0 and np.diff(starts).tolist() == merged


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=5).filter(any),
    st.integers(1, 20),
    st.booleans(),
    st.integers(0, 3),
)
def test_a_pass_visits_every_row_once(sizes: list[int], batch_size: int, use_buckets: bool, pass_number: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    layout = make_layout(offsets, batch_size, use_buckets)
    n, seen = int(offsets[-1]), []
    assert layout.num_batches == -(-n // batch_size) or (use_buckets and layout.num_batches >= -(-n // batch_size))
    for m in range(layout.num_batches):
        rows, revisited = batch_rows(layout, pass_number * layout.num_batches + m, mix_key(9))
        assert len(rows) == min(batch_size, n) == len(np.unique(rows)), "full, without duplicates"
        seen += rows[: len(rows) - revisited].tolist()
    assert sorted(seen) == list(range(n))


def test_full_batches_stay_inside_their_bucket() -> None:
    layout = make_layout(np.array([0, 43, 90, 133]), 10, use_buckets=True)
    assert layout.full_batches == (4, 4, 4) and layout.num_mixed == 2
    mixed = 0
    for m in range(layout.num_batches):
        rows, _ = batch_rows(layout, m, mix_key(0))
        buckets = np.unique(np.searchsorted([43, 90, 133], rows, side="right"))
        mixed += len(buckets) > 1
    assert mixed == 2


def test_passes_differ_and_are_reproducible() -> None:
    layout = make_layout(np.array([0, 100]), 10, use_buckets=True)
    first = [batch_rows(layout, v, mix_key(0))[0].tolist() for v in range(20)]
    assert first == [batch_rows(layout, v, mix_key(0))[0].tolist() for v in range(20)]
    assert not {tuple(sorted(b)) for b in first[:10]} & {tuple(sorted(b)) for b in first[10:]}
    assert first[0] != batch_rows(layout, 0, mix_key(1))[0].tolist()


def test_buckets_take_turns_in_random_order() -> None:
    layout = make_layout(np.array([0, 500, 1000]), 10, use_buckets=True)
    first_half = [int(batch_rows(layout, v, mix_key(0))[0][0]) < 500 for v in range(50)]
    assert 15 <= sum(first_half) <= 35


def test_short_last_batch_is_counted() -> None:
    layout = make_layout(np.array([0, 25]), 10, use_buckets=False)
    revisits = [batch_rows(layout, v, mix_key(0))[1] for v in range(3)]
    assert sorted(revisits) == [0, 0, 5]
    rows, revisited = batch_rows(make_layout(np.array([0, 4]), 10, True), 7, mix_key(0))
    assert sorted(rows.tolist()) == [0, 1, 2, 3] and revisited == 0
