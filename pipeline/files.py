"""Files: complete or absent, their names, checksums and lines of JSON."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def safe_name(dataset: str) -> str:
    """A dataset's name as part of a file name."""
    return re.sub(r"[^\w.-]", "_", dataset)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes as hex digits."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb") as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file, which takes the name `path` only when all of it is on disk."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, complete or absent."""
    write_atomic(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) of every line of a UTF-8 file that is not blank; a byte order mark is passed over.

    Raises:
        ValueError: a line is not a JSON object; names file and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number} is not a line of JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number} must be a JSON object, got {type(row).__name__}")
            yield f"{path}:{number}", row
