"""Raw files of every format in blocks of rows.

Blocks have a size of their own, whatever the number of processes, so everything made from them is the same on any
machine. A block is a small description that any process can read, unless its file is a stream (gzip, zstd, BEIR, hub):
then one reader goes through the file in order and its blocks carry their rows with them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.data.beir import FAULT, beir_rows
from pipeline.data.columnar import arrow_ranges, arrow_rows, packed_rows, parquet_ranges, parquet_rows
from pipeline.data.hub import hub_tables
from pipeline.data.jsonl import compressed_blocks, read_lines, split_lines
from pipeline.data.raw import parse_line
from pipeline.files import file_sha256
from pipeline.settings import ColumnSettings

BLOCK_BYTES = 8 << 20

Kind = Literal["jsonl", "gzip", "zstd", "parquet", "arrow", "beir", "hub"]
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class FileState:
    """A file on disk when its checksum was taken."""

    path: str
    num_bytes: int
    mtime_ns: int
    sha256: str = ""


@dataclass(frozen=True)
class RawFile:
    """What is read in one go: a file, the three files of a BEIR folder, or a name on the hub without any."""

    kind: Kind
    path: str
    name: str  # in messages, quarantine and manifest: no folder of this machine
    parts: tuple[FileState, ...]
    columns: ColumnSettings
    config: str = ""  # of a hub name
    split: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


@dataclass(frozen=True)
class Block:
    """Rows of one file.

    start, stop: of a .jsonl file the lines that start in these bytes; of Parquet and Arrow files row numbers; of a
    stream decompressed bytes or row numbers, told apart by nobody.
    """

    path: str
    kind: Kind
    start: int
    stop: int
    num_bytes: int  # of the file, when its checksum was taken
    mtime_ns: int
    columns: ColumnSettings
    data: bytes | None = None  # the rows themselves, of a stream


class RawRow(NamedTuple):
    """One row before any rule is applied."""

    values: dict[str, Any] | str | None  # or the reason why there are none; None: a blank line
    shown: Any  # what quarantine shows of it: a line, or the values
    escaped: bool  # JSON with \\u escapes


def file_state(path: Path) -> FileState:
    """A file as it is now, without its checksum."""
    stat = path.stat()
    return FileState(str(path), stat.st_size, stat.st_mtime_ns)


def add_checksum(state: FileState) -> FileState:
    """The state with the checksum of the file; ValueError if the file is no longer in that state."""
    digest = file_sha256(Path(state.path))
    _require_unchanged(state.path, state.num_bytes, state.mtime_ns)
    return replace(state, sha256=digest)


def _require_all_unchanged(file: RawFile) -> None:
    for part in file.parts:
        _require_unchanged(part.path, part.num_bytes, part.mtime_ns)


def _require_unchanged(path: str, num_bytes: int, mtime_ns: int) -> None:
    stat = Path(path).stat()
    if (stat.st_size, stat.st_mtime_ns) != (num_bytes, mtime_ns):
        raise ValueError(f"{path} changed while it was being read; run again when nothing writes to it")


def iter_blocks(file: RawFile, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Cut a file into blocks.

    Raises:
        ValueError: the file is damaged, or has changed since its checksum was taken.
    """
    _require_all_unchanged(file)
    size, mtime_ns = (file.parts[0].num_bytes, file.parts[0].mtime_ns) if file.parts else (0, 0)
    for start, stop, data in _cut(file, block_bytes):
        if data is not None:  # the others are checked by who reads them
            _require_all_unchanged(file)
        yield Block(file.path, file.kind, start, stop, size, mtime_ns, file.columns, data)
    _require_all_unchanged(file)


def _cut(file: RawFile, block_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    path, at = file.path, 0
    if file.kind == "jsonl":
        for start in range(0, file.num_bytes, block_bytes):
            yield start, min(start + block_bytes, file.num_bytes), None
    elif file.kind in ("parquet", "arrow"):
        for start, stop in (parquet_ranges if file.kind == "parquet" else arrow_ranges)(path, block_bytes):
            yield start, stop, None
    elif file.kind == "hub":
        for count, data in hub_tables(path, file.config, file.split, file.columns, block_bytes, path):
            yield at, at + count, data
            at += count
    else:
        lines = (
            _beir_blocks(file, block_bytes) if file.kind == "beir" else compressed_blocks(path, file.kind, block_bytes)
        )
        for data in lines:
            yield at, at + len(data), data
            at += len(data)


def _beir_blocks(file: RawFile, block_bytes: int) -> Iterator[bytes]:
    """Rows of a BEIR folder as lines of JSON."""
    lines: list[bytes] = []
    size = 0
    for row in beir_rows(*(Path(part.path) for part in file.parts)):
        lines.append(json.dumps(row).encode() + b"\n")
        size += len(lines[-1])
        if size >= block_bytes:
            yield b"".join(lines)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def read_rows(block: Block) -> Iterator[RawRow]:
    """The rows of a block in order, blank lines too.

    Raises:
        ValueError: the file is damaged, or has changed since its checksum was taken.
    """
    if block.data is None:
        _require_unchanged(block.path, block.num_bytes, block.mtime_ns)
    if block.kind in ("parquet", "arrow", "hub"):
        for values in _table_rows(block):
            yield RawRow(values, values, False)
    else:
        data = read_lines(block.path, block.start, block.stop) if block.data is None else block.data
        lines = split_lines(data)
        if block.start == 0 and lines:
            lines[0] = lines[0].removeprefix(_BOM)
        for line in lines:
            found = parse_line(line) if line.strip() else None
            if block.kind == "beir" and isinstance(found, dict):
                found = found.get(FAULT, found)
            yield RawRow(found, line, b"\\u" in line)
    if block.data is None:
        _require_unchanged(block.path, block.num_bytes, block.mtime_ns)


def _table_rows(block: Block) -> Iterator[dict[str, Any] | str]:
    if block.data is not None:
        return packed_rows(block.data)
    read = parquet_rows if block.kind == "parquet" else arrow_rows
    return read(block.path, block.start, block.stop, block.columns)
