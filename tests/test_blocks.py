"""Files of every format in blocks: each row once, in order, whatever the block size; damage and change are named."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import blocks, jsonl
from pipeline.data.blocks import Block, RawFile, RawRow, add_checksum, file_state, iter_blocks, read_rows
from pipeline.data.finding import SUFFIXES
from pipeline.settings import ColumnSettings

COLUMNS = ColumnSettings()
SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"  # of zstd: what seekable files end with
ROWS = [
    {"query": f"q {i}", "pos": [f"p {i}"] * (i % 3 + 1), "neg": [f"n {j}" for j in range(i % 5)]} for i in range(90)
]


def raw_file(path: Path, columns: ColumnSettings = COLUMNS) -> RawFile:
    kind = next((kind for suffix, kind in SUFFIXES.items() if path.name.endswith(suffix)), "arrow")
    return RawFile(kind, str(path), path.name, (add_checksum(file_state(path)),), columns)  # type: ignore[arg-type]


def rows_of(file: RawFile, block_bytes: int) -> list[RawRow]:
    return [row for block in iter_blocks(file, block_bytes) for row in read_rows(block)]


def write_jsonl(path: Path, data: bytes) -> Path:
    if path.name.endswith(".gz"):
        half = len(data) // 2
        data = gzip.compress(data[:half]) + gzip.compress(data[half:])
    elif path.name.endswith(".zst"):
        third = len(data) // 3
        frames = [data[:third], b"", data[third : 2 * third], data[2 * third :]]
        packed = [zstandard.ZstdCompressor(write_checksum=True).compress(frame) for frame in frames]
        data = SKIPPABLE_FRAME.join(packed) + SKIPPABLE_FRAME
    path.write_bytes(data)
    return path


def write_table(path: Path, rows: list[dict[str, Any]], row_group: int = 32) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=row_group)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=row_group)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet", "rows.arrow"])
@pytest.mark.parametrize("block_bytes", [1, 100, 700, 1 << 20])
def test_every_format_gives_every_row_once_in_order(tmp_path: Path, name: str, block_bytes: int) -> None:
    path = tmp_path / name
    if ".jsonl" in name:
        write_jsonl(path, b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    else:
        write_table(path, ROWS)
    file = raw_file(path)
    assert [row.values for row in rows_of(file, block_bytes)] == ROWS
    cut = list(iter_blocks(file, block_bytes))
    assert [b.stop for b in cut[:-1]] == [b.start for b in cut[1:]] and cut[0].start == 0
    assert all((block.data is not None) == name.endswith((".gz", ".zst")) for block in cut)
    if block_bytes == 700:
        assert len(cut) > 5, "more than one block a row group"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.binary(max_size=12)
        | st.just(b"\xef\xbb\xbf")
        | st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=4),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["query", "pos", "x"]), inner),
            max_leaves=4,
        ).map(lambda value: json.dumps(value).encode()),
        max_size=30,
    ),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    block_bytes=st.integers(1, 60),
    cut=st.integers(0, 20),
)
def test_any_bytes_are_the_same_rows_for_any_block_size(
    tmp_path: Path, lines: list[bytes], newline: bytes, block_bytes: int, cut: int
) -> None:
    data = newline.join(lines)
    data = data[: max(len(data) - cut, 0)]
    wanted = data.split(b"\n")  # the obvious twin
    wanted = wanted if wanted[-1] else wanted[:-1]
    wanted[:1] = [line.removeprefix(b"\xef\xbb\xbf") for line in wanted[:1]]
    for name in ("any.jsonl", "any.jsonl.gz", "any.jsonl.zst"):
        path = write_jsonl(tmp_path / name, data)
        found = rows_of(raw_file(path), block_bytes)
        assert [row.shown for row in found] == wanted
        assert all((row.values is None) == (not row.shown.strip()) for row in found)
        assert all(isinstance(row.values, (dict, str, type(None))) for row in found)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"query": st.none() | st.text(max_size=30), "pos": st.none() | st.lists(st.text(max_size=9), max_size=9)}
        ),
        min_size=1,
        max_size=40,
    ),
    row_group=st.integers(1, 40),
    block_bytes=st.integers(1, 2000),
)
def test_any_table_is_the_same_rows_for_any_block_size(
    tmp_path: Path, rows: list[dict[str, Any]], row_group: int, block_bytes: int
) -> None:
    for name in ("any.parquet", "any.arrow"):
        path = write_table(tmp_path / name, rows, row_group)
        assert [row.values for row in rows_of(raw_file(path), block_bytes)] == rows


def test_a_long_line_is_one_row_and_blocks_inside_it_are_empty(tmp_path: Path) -> None:
    text = "x" * 50_000_000
    path = tmp_path / "long.jsonl"
    path.write_text(f'{{"a": 1}}\n{{"query": "{text}"}}\n{{"b": 2}}\n')
    file = raw_file(path)
    counts = [sum(1 for _ in read_rows(block)) for block in iter_blocks(file)]
    assert counts == [2, 0, 0, 0, 0, 1]
    values = [row.values for row in rows_of(file, 8 << 20)]
    assert values == [{"a": 1}, {"query": text}, {"b": 2}]


@pytest.mark.parametrize("name", ["endless.jsonl", "endless.jsonl.gz", "endless.jsonl.zst"])
@pytest.mark.parametrize("block_bytes", [7, 64, 1000, 1 << 20])
def test_a_line_over_the_bound_is_one_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block_bytes: int
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 300)
    monkeypatch.setattr("pipeline.data.raw.MAX_LINE_BYTES", 300)
    lines = [b'{"a": 1}', b'"' + b"x" * 298 + b'"', b"y" * 301, b"z" * 5000, b'{"b": 2}']
    path = write_jsonl(tmp_path / name, b"\n".join(lines))
    found = [row.values for row in rows_of(raw_file(path), block_bytes)]
    too_long = "a line of more than 0 MiB"
    assert found == [{"a": 1}, "not an object but a string", too_long, too_long, {"b": 2}]


def test_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"b": "\xef\xbb\xbf"}\r\n'
    for name in ("marked.jsonl", "marked.jsonl.gz", "marked.jsonl.zst"):
        file = raw_file(write_jsonl(tmp_path / name, data))
        assert [row.values for row in rows_of(file, 5)] == [{"a": 1}, None, {"b": "\ufeff"}]


def test_long_windows_of_zstd_are_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=30, enable_ldm=True)
    path = tmp_path / "far.jsonl.zst"
    line = json.dumps(ROWS[0]).encode() + b"\n"
    with zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(compression_params=parameters)) as stream:
        stream.write(line)
    assert [row.values for row in rows_of(raw_file(path), 1 << 20)] == ROWS[:1]


def cut_off(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("name", "what"),
    [("c.jsonl.gz", "gzip"), ("c.jsonl.zst", "zstd"), ("c.parquet", "Parquet"), ("c.arrow", "Arrow")],
)
@pytest.mark.parametrize("damage", [lambda p: cut_off(p, 0.4), lambda p: cut_off(p, 0.99), lambda p: cut_off(p, 0.02)])
def test_files_that_are_cut_off_are_named(tmp_path: Path, name: str, what: str, damage: Callable[[Path], None]) -> None:
    path = tmp_path / name
    if "jsonl" in name:
        write_jsonl(path, os.urandom(20_000))
    else:
        write_table(path, ROWS)
    damage(path)
    with pytest.raises(ValueError, match=f"{name} is not a whole {what} file: .*; copy"):
        rows_of(raw_file(path), 1000)


def test_an_arrow_file_cut_off_between_batches_is_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "c.arrow", ROWS)
    path.write_bytes(path.read_bytes()[:-8])
    assert pa.ipc.open_stream(path.read_bytes()).read_all().num_rows == len(ROWS), "the format itself sees no fault"
    with pytest.raises(ValueError, match=r"c\.arrow is not a whole Arrow file: its end is missing"):
        rows_of(raw_file(path), 1000)


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst", "d.parquet"])
def test_damage_inside_a_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = json.dumps([os.urandom(9).hex() for _ in range(3000)]).encode()
    if "jsonl" in name:
        write_jsonl(path, data)
    else:
        pq.write_table(pa.table({"query": json.loads(data)}), path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a whole"):
        rows_of(raw_file(path), 1000)


def test_text_that_is_not_utf8_costs_its_row_only(tmp_path: Path) -> None:
    good = [b"first", b"third"]
    texts = pa.array([good[0], b"\xff\xfe", good[1]], pa.binary()).cast(pa.large_binary())
    texts = pa.Array.from_buffers(pa.large_string(), 3, texts.buffers())
    table = pa.table({"query": texts, "pos": ["p"] * 3})
    pq.write_table(table, tmp_path / "bad.parquet")
    with pa.OSFile(str(tmp_path / "bad.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("bad.parquet", "bad.arrow"):
        found = [row.values for row in rows_of(raw_file(tmp_path / name), 1 << 20)]
        assert found == [{"query": "first", "pos": "p"}, "not UTF-8", {"query": "third", "pos": "p"}]


def test_only_the_needed_columns_of_a_table_are_read(tmp_path: Path) -> None:
    rows = [row | {"picture": b"\x00" * 100, "n_1": "a", "n_2": None} for row in ROWS]
    for name in ("wide.parquet", "wide.arrow"):
        file = raw_file(write_table(tmp_path / name, rows), ColumnSettings(neg=("n_*",)))
        found = [row.values for row in rows_of(file, 1000)]
        assert found == [{k: row[k] for k in ("query", "pos", "n_1", "n_2")} for row in rows]


def test_row_groups_of_any_size_are_covered_with_few_decodings(tmp_path: Path) -> None:
    path = write_table(tmp_path / "large.parquet", ROWS * 50, row_group=4000)
    cut = list(iter_blocks(raw_file(path), 10))
    assert len(cut) == 2 * 16 and sum(b.stop - b.start for b in cut) == len(ROWS) * 50
    path = write_table(tmp_path / "small.parquet", ROWS, row_group=1)
    assert len(list(iter_blocks(raw_file(path), 1 << 20))) == 1


# Files that change.


@pytest.mark.parametrize("name", ["w.jsonl", "w.jsonl.gz", "w.jsonl.zst", "w.parquet", "w.arrow"])
def test_a_file_that_changes_after_its_checksum_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    def write(rows: list[dict[str, Any]]) -> None:
        if "jsonl" in name:
            write_jsonl(path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        else:
            write_table(path, rows)

    write(ROWS)
    file = raw_file(path)
    cut = list(iter_blocks(file, 500))
    write(ROWS[:-1])
    message = f"{name} changed while it was being read; run again"
    with pytest.raises(ValueError, match=message):
        list(iter_blocks(file, 500))
    if cut[0].data is None:
        with pytest.raises(ValueError, match=message):
            list(read_rows(cut[0]))


def test_a_change_of_equal_size_and_one_during_the_reading_are_seen(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", b'{"a": 1}\n{"a": 2}\n')
    file = raw_file(path)
    block = next(iter_blocks(file))
    rows = read_rows(block)
    next(rows)
    path.write_bytes(b'{"a": 1}\n{"a": 3}\n')
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="changed while it was being read"):
        list(rows)
    packed = raw_file(write_jsonl(tmp_path / "t.jsonl.gz", b'{"a": 1}\n' * 9))
    cut = iter_blocks(packed, 10)
    next(cut)
    os.utime(tmp_path / "t.jsonl.gz", ns=(1, 1))
    with pytest.raises(ValueError, match="changed while it was being read"):
        list(cut)


def test_a_file_that_changes_during_its_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", b"{}\n")
    state = file_state(path)
    monkeypatch.setattr(blocks, "file_sha256", lambda p: p.write_bytes(b"{}\n{}\n") and "digest")
    with pytest.raises(ValueError, match="changed while it was being read"):
        add_checksum(state)


def test_blocks_travel_between_processes(tmp_path: Path) -> None:
    import pickle

    path = write_table(tmp_path / "p.parquet", ROWS * 20)
    cut = list(iter_blocks(raw_file(path), 2000))
    assert all(len(pickle.dumps(block)) < 1000 for block in cut)
    again: list[Block] = pickle.loads(pickle.dumps(cut))
    assert [row.values for block in again for row in read_rows(block)] == ROWS * 20
