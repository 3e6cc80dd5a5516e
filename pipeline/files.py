"""Files: complete or absent, their names, checksums, locks, lines of JSON and of judgements."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# A file system, or the way to it, that is away for a while.
PASSING = {errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EREMOTEIO}
# After which file systems free the locks of a node that is gone: NFSv4 after 90, Lustre after 100.
LEASE_SECONDS = 300.0


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
    # No other process writes to this name, not even one that a killed run has left behind.
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    write(temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, complete or absent."""
    write_atomic(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def passing_errno(error: BaseException | None) -> int:
    """The number of PASSING that an error, or one that it was raised from, has; 0 where there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in PASSING:
            return error.errno
        error = error.__cause__
    return 0


def exit_code(error: Exception) -> int:
    """2 for what someone has to mend; 1 for a file system that is away, which may be back when the job comes back."""
    return 1 if passing_errno(error) else 2


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes the name `folder` when all of it is on disk.

    The old one leaves in one step too, so that a folder of this name is always whole.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in (*partial.iterdir(), partial):
        sync(path)
    replaced = folder.with_name(f".replaced-{folder.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def take_lock(path: Path, wait: bool = False) -> IO[str] | None:
    """The file `path`, open and locked for this process; None where another one holds it and this is not to `wait`.

    Closing it frees the lock, and so does the end of the process, however it comes.

    Raises:
        ValueError: the file system has no locks.
        OSError: it cannot be asked.
    """
    lock = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        lock.close()
        return None
    except OSError as error:
        lock.close()
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise ValueError(
            f"{path} cannot be locked ({error.strerror}): its file system has no locks (Lustre has them when it is "
            "mounted with -o flock); use a folder on another one"
        ) from error
    return lock


@contextmanager
def locked(path: Path, message: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` for this process; the lock goes with the process, however it ends.

    Args:
        message: of the error where another process holds it.
        patience: seconds to wait for it.

    Raises:
        ValueError: another process holds it, or the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, end = take_lock(path), time.monotonic() + patience
    if lock is None and patience:
        print(f"{path} is held; waiting up to {patience:.0f} s for it", flush=True)
    while lock is None and time.monotonic() < end:
        time.sleep(1)
        lock = take_lock(path)
    if lock is None:
        raise ValueError(message)
    with lock:
        yield


def lease_patience() -> float:
    """How long to wait for a lock of a run: of a node that a job of SLURM has lost, file systems keep locks so long."""
    return LEASE_SECONDS if int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0 else 0.0


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


def read_judgements(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """(`file:line`, query id, corpus id, grade) of every line of BEIR's qrels, with or without a header line.

    Raises:
        ValueError: a line is no judgement; names file and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            cells = [cell.strip() for cell in line.decode("utf-8-sig", errors="replace").split("\t")]
            if not line.strip() or (number == 1 and not _is_numeric(cells[-1])):
                continue
            # A grade in digits of another script, or with a point, is not what evaluation tools read.
            if len(cells) != 3 or not re.fullmatch("-?[0-9]+", cells[2]) or "\ufffd" in cells[0] + cells[1]:
                raise ValueError(
                    f"{path}:{number} must be `query-id<TAB>corpus-id<TAB>whole number` in UTF-8, got {cells!r:.80}"
                )
            yield f"{path}:{number}", cells[0], cells[1], int(cells[2])


def _is_numeric(text: str) -> bool:
    """Whether a cell is meant as a number, be it one that is no grade: then its line is no header."""
    try:
        float(text)
    except ValueError:
        return text.isnumeric()
    return True
