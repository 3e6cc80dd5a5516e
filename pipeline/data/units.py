"""Stage A of preprocessing: one block of raw rows becomes one unit, its rows and its distinct texts.

<unit>.texts.arrow   hash, kinds, text; sorted by hash, one record batch per hash partition
<unit>.rows.arrow    one batch of rows that refer to the unit's texts by their place
<unit>.json          counts, types, instructions, quarantine; written last: the unit is done
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.blocks import Block, read_rows
from pipeline.data.pieces import KINDS
from pipeline.data.raw import RowRules, check_row, find_columns
from pipeline.datatypes import RawRecord
from pipeline.files import write_atomic, write_text
from pipeline.settings import ColumnSettings

QUERY, RESPONSE, PASSAGE = (1 << i for i in range(len(KINDS)))
_START_CHARS = 200
_SHOWN_COLUMNS = 30
_OWN_NAMES = ColumnSettings()


@dataclass(frozen=True)
class UnitTask:
    """What one process needs to build one unit."""

    folder: str
    name: str
    file: int  # which file of the dataset
    block: Block
    rules: RowRules
    num_partitions: int


@dataclass
class _Rows:
    """Columns of the rows of a unit while they grow; texts by place in `texts`."""

    texts: dict[str, int] = field(default_factory=dict)
    kinds: array = field(default_factory=lambda: array("B"))
    instructions: dict[str, int] = field(default_factory=dict)
    query: list[int] = field(default_factory=list)
    instruction: list[int] = field(default_factory=list)
    category: list[int] = field(default_factory=list)
    line: list[int] = field(default_factory=list)
    pos_count: list[int] = field(default_factory=list)
    neg_count: list[int] = field(default_factory=list)
    pos: list[int] = field(default_factory=list)
    neg: list[int] = field(default_factory=list)
    pos_score: list[float] = field(default_factory=list)
    neg_score: list[float] = field(default_factory=list)
    nearest_count: list[int] = field(default_factory=list)
    nearest: list[int] = field(default_factory=list)

    def place(self, text: str, kind: int) -> int:
        i = self.texts.setdefault(text, len(self.kinds))
        if i == len(self.kinds):
            self.kinds.append(kind)
        else:
            self.kinds[i] |= kind
        return i


def passage_kinds(task_type: str) -> tuple[int, int]:
    """Bits of (positive, negative): how training reads them, and a positive as the response of an example."""
    if task_type == "symmetric_sts":
        return QUERY | RESPONSE, QUERY
    if task_type == "symmetric_clustering":  # its examples show the category
        return QUERY, QUERY
    return PASSAGE | RESPONSE, PASSAGE


def build_unit(task: UnitTask) -> dict[str, Any]:
    """Write the files of a unit (each complete or absent) and return its report."""
    rows, types, scored = _Rows(), Counter[str](), False
    quarantine: list[dict[str, Any]] = []
    columns: dict[str, None] = {}  # of the first row
    read: set[str] = set()  # columns that fields were read from
    number = num_blank = 0
    for number, row in enumerate(read_rows(task.block), 1):
        if row.values is None:
            num_blank += 1
            continue
        record: RawRecord | str
        if isinstance(row.values, str):
            record = row.values
        else:
            columns = columns or dict.fromkeys(list(row.values)[:_SHOWN_COLUMNS])
            if task.rules.columns != _OWN_NAMES:
                read.update(*find_columns(task.rules.columns, tuple(row.values)).values())
            record = check_row(row.values, task.rules, row.escaped)
        if isinstance(record, str):
            quarantine.append({"line": number, "reason": record, "start": _start_of(row.shown)})
            continue
        _add_row(rows, record, number)
        types[record.type] += 1
        scored = scored or record.pos_scores is not None
    base = Path(task.folder) / task.name
    place = _write_texts(base.with_name(f"{task.name}.texts.arrow"), rows, task.num_partitions)
    _write_rows(base.with_name(f"{task.name}.rows.arrow"), rows, place)
    report = {
        "file": task.file,
        "range": [task.block.start, task.block.stop],
        "num_lines": number,
        "num_blank": num_blank,
        "num_rows": len(rows.query),
        "types": dict(sorted(types.items())),
        "scored": scored,
        "nearest": bool(rows.nearest),
        "instructions": list(rows.instructions),
        "columns": list(columns),
        "columns_read": sorted(read),
        "quarantine": quarantine,
    }
    write_text(base.with_name(f"{task.name}.json"), json.dumps(report))
    return report


def _start_of(shown: Any) -> str:
    """The start of a bad row for people to recognise it."""
    if isinstance(shown, bytes):
        return shown[: 4 * _START_CHARS].decode("utf-8", errors="replace").strip()[:_START_CHARS]
    return str(shown)[:_START_CHARS]


def _add_row(rows: _Rows, record: RawRecord, number: int) -> None:
    pos_kind, neg_kind = passage_kinds(record.type)
    rows.query.append(rows.place(record.query, QUERY))
    rows.instruction.append(rows.instructions.setdefault(record.instruction, len(rows.instructions)))
    rows.category.append(-1 if record.category is None else rows.place(record.category, RESPONSE))
    rows.line.append(number)
    rows.pos_count.append(len(record.pos))
    rows.neg_count.append(len(record.neg))
    rows.pos.extend([rows.place(text, pos_kind) for text in record.pos])
    rows.neg.extend([rows.place(text, neg_kind) for text in record.neg])
    rows.nearest_count.append(len(record.nearest))
    rows.nearest.extend(record.nearest)
    nan = float("nan")
    rows.pos_score.extend([nan] * len(record.pos) if record.pos_scores is None else record.pos_scores)
    rows.neg_score.extend([nan] * len(record.neg) if record.neg_scores is None else record.neg_scores)


def _write_texts(path: Path, rows: _Rows, num_partitions: int) -> np.ndarray:
    """Write the distinct texts sorted by hash; returns the place of each text in the file, int64."""
    encoded = [text.encode() for text in rows.texts]
    hashes = np.frombuffer(b"".join([hashlib.blake2b(e, digest_size=16).digest() for e in encoded]), dtype="S16")
    order = np.argsort(hashes, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    hashes = hashes[order]
    texts = pa.array(encoded, pa.large_binary()).cast(pa.large_string()).take(pa.array(order))
    kinds = pa.array(np.frombuffer(rows.kinds, dtype=np.uint8)[order] if len(order) else np.empty(0, np.uint8))
    table = pa.RecordBatch.from_arrays([hash_column(hashes), kinds, texts], ["hash", "kinds", "text"])
    edges = np.searchsorted(partition_of(hashes, num_partitions), np.arange(num_partitions + 1))
    write_batches(path, (table.slice(a, b - a) for a, b in pairwise(edges.tolist())), table.schema)
    return place


def partition_of(hashes: np.ndarray, num_partitions: int) -> np.ndarray:
    """Partition of each hash (S16), rising with the hash: sorted partitions one after another are sorted."""
    head = np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 16)[:, :4].copy().view(">u4")[:, 0]
    return (head.astype(np.uint64) * np.uint64(num_partitions)) >> np.uint64(32)


def hash_column(hashes: np.ndarray) -> pa.Array:
    """S16 as an Arrow column of 16 bytes."""
    return pa.Array.from_buffers(pa.binary(16), len(hashes), [None, pa.py_buffer(np.ascontiguousarray(hashes))])


def _write_rows(path: Path, rows: _Rows, place: np.ndarray) -> None:
    def ragged(counts: list[int], values: np.ndarray) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.int64))])
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))

    def places(indices: list[int]) -> np.ndarray:
        return place[np.array(indices, dtype=np.int64)]

    category = np.array(rows.category, dtype=np.int64)
    category = np.where(category < 0, -1, np.append(place, -1)[category])
    columns = {
        "query": pa.array(places(rows.query)),
        "instruction": pa.array(rows.instruction, pa.int32()),
        "category": pa.array(category),
        "line": pa.array(rows.line, pa.int64()),
        "pos": ragged(rows.pos_count, places(rows.pos)),
        "neg": ragged(rows.neg_count, places(rows.neg)),
        "pos_score": ragged(rows.pos_count, np.array(rows.pos_score, dtype=np.float32)),
        "neg_score": ragged(rows.neg_count, np.array(rows.neg_score, dtype=np.float32)),
        "nearest": ragged(rows.nearest_count, np.array(rows.nearest, dtype=np.int64)),
    }
    batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
    write_batches(path, [batch], batch.schema)


def write_batches(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write an Arrow IPC file under its final name only when all of it is on disk."""

    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    write_atomic(path, write)
