"""Files that are complete or absent, their checksums, and locks."""

import fcntl
import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    # No other process writes to this name, not even one that a killed run has left behind.
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    write(temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, complete or absent."""
    write_atomic(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold the lock file `path` for this process; the lock goes with the process, however it ends.

    Raises:
        ValueError: another process holds it (`message`), or the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(message) from error
        except OSError as error:
            raise ValueError(
                f"{path} cannot be locked ({error.strerror}): its file system has no locks (Lustre has them when it is "
                "mounted with -o flock); use a folder on another one"
            ) from error
        yield
