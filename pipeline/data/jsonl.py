"""Lines of .jsonl files, plain or compressed, in blocks of whole lines.

A plain file is cut into byte ranges that any process can read. A compressed one has one reader, which hands out the
lines themselves.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from pipeline.data.raw import MAX_LINE_BYTES

_HEAD_BYTES = 1 << 20
_ZSTD_INPUT_BYTES = 1 << 14  # small, because all that comes of it is in memory at once
_ZSTD_MAX_WINDOW = 1 << 31  # what `zstd --long=31` writes


def read_lines(path: str, start: int, stop: int) -> bytes:
    """The lines that start in bytes start .. stop - 1 of a plain file."""
    with open(path, "rb") as file:
        begin = start
        if begin > 0:
            file.seek(begin - 1)
            skipped = file.readline(stop - begin + 1)
            if not skipped.endswith(b"\n"):
                return b""  # the whole range lies inside one line
            begin += len(skipped) - 1
        if begin >= stop:
            return b""
        data = file.read(stop - begin)
        return data if data.endswith(b"\n") else data + file.readline(MAX_LINE_BYTES + 1)


def compressed_blocks(path: str, kind: str, block_bytes: int) -> Iterator[bytes]:
    """Whole lines, at least `block_bytes` of them (but the last), of a "gzip" or "zstd" file, in order.

    Raises:
        ValueError: the file is cut off or damaged.
    """
    try:
        with _open_compressed(path, kind) as stream:
            while data := stream.read(block_bytes):
                if not data.endswith(b"\n"):
                    data += stream.readline(MAX_LINE_BYTES + 1)
                    rest = data
                    while rest and not rest.endswith(b"\n"):  # of a line too long to be kept
                        rest = stream.readline(1 << 20)
                yield data
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole {kind} file: {error}; copy or compress it again") from error


def read_head(path: str, kind: str) -> list[bytes]:
    """Lines at the start of a file, for a look at them: those within the first MiB."""
    with open(path, "rb") if kind == "jsonl" else _open_compressed(path, kind) as stream:
        try:
            data = stream.read(_HEAD_BYTES)
        except (EOFError, OSError, zlib.error):
            return []  # whoever reads the whole file says what is wrong with it
    lines = split_lines(data.removeprefix(b"\xef\xbb\xbf")) if data else []
    return lines if len(data) < _HEAD_BYTES else lines[:-1]


def split_lines(data: bytes) -> list[bytes]:
    """Lines without their newline; a newline at the end does not begin another line."""
    lines = data.split(b"\n")
    return lines[:-1] if not lines[-1] else lines


def _open_compressed(path: str, kind: str) -> io.BufferedIOBase:
    if kind == "gzip":
        return gzip.open(path, "rb")
    return io.BufferedReader(_ZstdFile(open(path, "rb")), 1 << 20)


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of all frames of a file. The package's own reader takes a cut-off frame for the end."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._inside_frame = False
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            data = self._input or self._file.read(_ZSTD_INPUT_BYTES)
            if not data:
                if self._inside_frame:
                    raise EOFError("it ends inside a frame")
                return 0
            self._decompress(data)
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self, data: bytes) -> None:
        try:
            self._output = memoryview(self._frame.decompress(data))
        except self._error as error:
            raise OSError(str(error)) from error
        self._inside_frame = not self._frame.eof
        self._input = b""
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = self._decompressor.decompressobj()

    def close(self) -> None:
        self._file.close()
        super().close()
