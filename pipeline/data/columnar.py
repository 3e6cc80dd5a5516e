"""Rows of Parquet files and of the Arrow files that Hugging Face datasets consist of, by ranges of row numbers.

Only the columns that the recipe needs are read, and a few thousand rows at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.raw import find_columns
from pipeline.settings import ColumnSettings

# Parquet cannot start inside a row group without decoding it from its start, so a large one is cut into few parts.
_MAX_PARTS = 16
_BATCH_BYTES = 1 << 20
_MAX_BATCH_ROWS = 4096
_ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"

Range = tuple[int, int]  # rows start .. stop - 1


def needed_columns(columns: ColumnSettings, present: Sequence[str]) -> list[str]:
    """The columns of a source that fields are read from, in the order of the source."""
    wanted = {name for names in find_columns(columns, tuple(present)).values() for name in names}
    return [name for name in present if name in wanted]


# Parquet.


@contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    try:
        # Buffered: a column of a row group is read in pieces and not as a whole.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole Parquet file: {error}; copy or write it again") from error


def parquet_columns(path: str) -> list[str]:
    """Names of the top-level columns."""
    with _parquet(path) as file:
        return list(file.schema_arrow.names)


def parquet_ranges(path: str, block_bytes: int) -> list[Range]:
    """Row ranges of about `block_bytes`: some small row groups, or a part of a large one."""
    ranges: list[Range] = []
    with _parquet(path) as file:
        start = stop = size = 0
        for i in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(i)
            num_rows, num_bytes = group.num_rows, group.total_byte_size
            parts = min(-(-num_bytes // block_bytes), _MAX_PARTS, num_rows)
            if size and size + num_bytes > block_bytes:
                ranges.append((start, stop))
                start, size = stop, 0
            if parts > 1:
                edges = [stop + num_rows * part // parts for part in range(parts + 1)]
                ranges += zip(edges[:-1], edges[1:], strict=True)
                start = edges[-1]
            elif num_rows:
                size += max(num_bytes, 1)
            stop += num_rows
        if size:
            ranges.append((start, stop))
    return ranges


def parquet_rows(path: str, start: int, stop: int, columns: ColumnSettings) -> Iterator[dict[str, Any] | str]:
    """Rows start .. stop - 1; a row whose values cannot be read is the reason instead."""
    with _parquet(path) as file:
        names = needed_columns(columns, file.schema_arrow.names)
        first = 0
        for i in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(i)
            first, at = first + group.num_rows, first
            if first <= start or at >= stop:
                continue
            batch_rows = _batch_rows(group.total_byte_size, group.num_rows)
            for batch in file.iter_batches(batch_rows, row_groups=[i], columns=names, use_threads=False):
                low, high = max(start - at, 0), min(stop - at, batch.num_rows)
                if low < high:
                    yield from _as_rows(batch.slice(low, high - low), names)
                at += batch.num_rows
                if at >= stop:
                    break


def _batch_rows(num_bytes: int, num_rows: int) -> int:
    return min(max(_BATCH_BYTES * num_rows // max(num_bytes, 1), 1), _MAX_BATCH_ROWS)


# Arrow files of Hugging Face datasets.


@contextmanager
def _arrow(path: str) -> Iterator[pa.Table]:
    """The memory-mapped table of an Arrow stream file."""
    try:
        with pa.memory_map(path) as file:
            # A file cut off between two batches would just be shorter.
            if file.read_at(len(_ARROW_END), max(file.size() - len(_ARROW_END), 0)) != _ARROW_END:
                raise ValueError(f"{path} is not a whole Arrow file: its end is missing; copy or save it again")
            yield pa.ipc.open_stream(file).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole Arrow file: {error}; copy or save it again") from error


def arrow_columns(path: str) -> list[str]:
    """Names of the columns."""
    with _arrow(path) as table:
        return list(table.column_names)


def arrow_ranges(path: str, block_bytes: int) -> list[Range]:
    """Row ranges of about `block_bytes`."""
    with _arrow(path) as table:
        step = max(block_bytes * table.num_rows // max(table.nbytes, 1), 1)
        return [(start, min(start + step, table.num_rows)) for start in range(0, table.num_rows, step)]


def arrow_rows(path: str, start: int, stop: int, columns: ColumnSettings) -> Iterator[dict[str, Any] | str]:
    """Rows start .. stop - 1; a row whose values cannot be read is the reason instead."""
    with _arrow(path) as table:
        names = needed_columns(columns, table.column_names)
        part = table.select(names).slice(start, stop - start)
        batch_rows = _batch_rows(part.nbytes, part.num_rows)
        for batch in part.to_batches(max_chunksize=batch_rows):
            yield from _as_rows(batch, names)


def packed_rows(data: bytes) -> Iterator[dict[str, Any] | str]:
    """Rows of an Arrow stream in memory, as `pack_table` makes it."""
    for batch in pa.ipc.open_stream(data):
        yield from _as_rows(batch, batch.schema.names)


def pack_table(table: pa.Table) -> bytes:
    """A table as the bytes of an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _as_rows(batch: pa.RecordBatch, names: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    if not names:
        yield from ({} for _ in range(batch.num_rows))
        return
    try:
        rows: list[dict[str, Any] | str] = batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date that Python does not know
        rows = [_as_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
    yield from rows


def _as_row(batch: pa.RecordBatch) -> dict[str, Any] | str:
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, OverflowError) as error:
        return f"a value that cannot be read: {str(error)[:80]}"
    return row
