"""Named columns of numbers in one file of the safetensors format: written piece by piece, read through a memory map.

A table of any length is written in the memory of one piece, and opened without reading a row.
"""

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path

import numpy as np

from pipeline.files import write_atomic

_NAMES = {"int64": "I64", "int32": "I32", "float32": "F32", "uint8": "U8"}
_DTYPES = {name: np.dtype(dtype) for dtype, name in _NAMES.items()}
_ALIGNMENT = 8


def write_columns(
    path: Path, columns: Mapping[str, tuple[str, int]], pieces: Iterable[tuple[str, int, np.ndarray]]
) -> None:
    """Write a file of columns, complete or absent.

    Args:
        columns: name -> (dtype: int64, int32, float32 or uint8; number of values).
        pieces: (name, first place, values), in any order; together they fill every column exactly.
    """
    # Wide types first: every column then begins at a multiple of its item size.
    order = sorted(columns, key=lambda name: -np.dtype(columns[name][0]).itemsize)
    sizes = {name: columns[name][1] * np.dtype(columns[name][0]).itemsize for name in order}
    stops = dict(zip(order, accumulate(sizes.values()), strict=True))
    header = json.dumps(
        {
            name: {
                "dtype": _NAMES[columns[name][0]],
                "shape": [columns[name][1]],
                "data_offsets": [stops[name] - sizes[name], stops[name]],
            }
            for name in order
        }
    ).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    data_start = 8 + len(header)

    def write(temporary: Path) -> None:
        missing = {name: length for name, (_, length) in columns.items()}
        with temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.flush()
            os.ftruncate(file.fileno(), data_start + sum(sizes.values()))
            for name, place, values in pieces:
                dtype = np.dtype(columns[name][0])
                data = memoryview(np.asarray(values, dtype=dtype).tobytes())
                offset = data_start + stops[name] - sizes[name] + place * dtype.itemsize
                while len(data):  # a write may be short: at 2 GiB, say
                    written = os.pwrite(file.fileno(), data, offset)
                    data, offset = data[written:], offset + written
                missing[name] -= len(values)
        assert not any(missing.values()), f"columns of {path} are not filled exactly: {missing}"

    write_atomic(path, write)


def open_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns of a file as read-only views of its memory map; ValueError if it is not such a file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_length = int.from_bytes(file.read(8), "little")
            if not 0 < header_length <= size - 8:
                raise ValueError("no header")
            tree = json.loads(file.read(header_length))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        columns, start = {}, 8 + header_length
        for name, entry in tree.items():
            dtype, (begin, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
            columns[name] = np.frombuffer(mapped, dtype, (end - begin) // dtype.itemsize, start + begin)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a readable table: {error}") from error
    return columns
