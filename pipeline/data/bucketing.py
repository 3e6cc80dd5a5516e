"""Batches of one dataset: which rows stand in batch m of pass p, computed and never stored.

A pass visits every row exactly once: full batches inside each length bucket, then the buckets' leftovers together as
mixed batches. Only where the last mixed batch is short do rows come a second time, to keep the batch size.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.data.permutation import mix_key, permute

MIN_BATCHES_PER_BUCKET = 4

# Names of the independent shuffles that one key gives.
_IN_BUCKET, _LEFTOVERS, _REVISITS, _BATCH_ORDER = range(4)


@dataclass(frozen=True)
class PassLayout:
    """How one dataset falls into batches: the same in every pass, whatever the shuffle."""

    num_rows: int
    batch_size: int  # all batches have it, but for a dataset with fewer rows: that one has one short batch
    starts: tuple[int, ...]  # bucket j holds rows starts[j] : starts[j + 1]
    full_batches: tuple[int, ...]  # per bucket
    num_batches: int

    @property
    def num_mixed(self) -> int:
        return self.num_batches - sum(self.full_batches)


def merge_small_buckets(offsets: np.ndarray, min_rows: int) -> tuple[int, ...]:
    """Bucket offsets after joining each bucket with fewer rows than `min_rows` to the next one, the last to its
    predecessor. At least one bucket remains, however small.
    """
    starts, end = [0], int(offsets[-1])
    for stop in [int(x) for x in offsets[1:-1]]:
        if stop - starts[-1] >= min_rows:
            starts.append(stop)
    if len(starts) > 1 and end - starts[-1] < min_rows:
        starts.pop()
    return (*starts, end)


def make_layout(bucket_offsets: np.ndarray, batch_size: int, use_buckets: bool) -> PassLayout:
    """Lay out a dataset with rows 0 .. bucket_offsets[-1] - 1 in batches."""
    num_rows = int(bucket_offsets[-1])
    assert num_rows >= 1 and batch_size >= 1
    min_rows = MIN_BATCHES_PER_BUCKET * batch_size
    starts = merge_small_buckets(bucket_offsets, min_rows) if use_buckets else (0, num_rows)
    sizes = [stop - start for start, stop in zip(starts[:-1], starts[1:], strict=True)]
    full = tuple(size // batch_size for size in sizes)
    leftovers = num_rows - sum(full) * batch_size
    num_batches = sum(full) + -(-leftovers // batch_size)
    return PassLayout(num_rows, batch_size, starts, full, num_batches)


def batch_rows(layout: PassLayout, visit: int, key: int) -> tuple[np.ndarray, int]:
    """Rows of the dataset's batch number `visit`, counted over all passes from the start of training.

    Args:
        visit: pass = visit // num_batches; inside a pass batches come in shuffled order.
        key: names the dataset's shuffles.

    Returns:
        int64 row numbers, all different, and how many of them are seen a second time in the pass.
    """
    pass_number, position = divmod(visit, layout.num_batches)
    pass_key = mix_key(key, pass_number)
    order_key = mix_key(pass_key, _BATCH_ORDER)
    batch = int(permute(np.array([position]), layout.num_batches, order_key)[0])
    slot = np.arange(layout.batch_size, dtype=np.int64)
    for j, num_full in enumerate(layout.full_batches):
        if batch < num_full:
            return _bucket_rows(layout, j, batch * layout.batch_size + slot, pass_key), 0
        batch -= num_full
    rows = _mixed_rows(layout, batch * layout.batch_size + slot, pass_key)
    return _top_up(layout, rows, pass_key)


def _bucket_rows(layout: PassLayout, j: int, index: np.ndarray, pass_key: int) -> np.ndarray:
    size = layout.starts[j + 1] - layout.starts[j]
    return layout.starts[j] + permute(index, size, mix_key(pass_key, _IN_BUCKET, j))


def _mixed_rows(layout: PassLayout, index: np.ndarray, pass_key: int) -> np.ndarray:
    """Rows at these places of the shuffled leftovers of all buckets (places past the last are left out)."""
    sizes = np.diff(np.array(layout.starts, dtype=np.int64))
    used = np.array(layout.full_batches, dtype=np.int64) * layout.batch_size
    ends = np.cumsum(sizes - used)
    index = index[index < ends[-1]]
    index = permute(index, int(ends[-1]), mix_key(pass_key, _LEFTOVERS))
    bucket = np.searchsorted(ends, index, side="right")
    within = index - (ends - (sizes - used))[bucket] + used[bucket]
    rows = np.empty(len(index), dtype=np.int64)
    for j in np.unique(bucket).tolist():
        rows[bucket == j] = _bucket_rows(layout, j, within[bucket == j], pass_key)
    return rows


def _top_up(layout: PassLayout, rows: np.ndarray, pass_key: int) -> tuple[np.ndarray, int]:
    """Fill a short batch with other rows of the dataset, as far as it has any."""
    missing = min(layout.batch_size, layout.num_rows) - len(rows)
    if missing == 0:
        return rows, 0
    # As many rows as a whole batch hold enough that are not in it yet.
    others = np.arange(min(layout.batch_size, layout.num_rows))
    others = permute(others, layout.num_rows, mix_key(pass_key, _REVISITS))
    others = others[~np.isin(others, rows)][:missing]
    return np.concatenate([rows, others]), missing
