"""Embeddings of a corpus larger than memory: one .npy file, filled block by block by any number of processes.

Beside the file `<out>` stands the folder `<out>.blocks`, which the processes share:

settings.json        what decides the embeddings: model, type, width, texts a block
embeddings.partial   the file to be; it takes its name when every block is in it
000000, 000001, ...  one a block: locked by the process that encodes it, and holding its texts' sha256 once it is done

A process that ends in whatever way frees its locks, so another one, or the next call, takes its blocks. The processes
may run on several machines, over a file system that has locks.

N texts, D width.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from pipeline.files import sync, take_lock, write_text
from pipeline.inference.corpus_file import BLOCK_TEXTS
from pipeline.inference.embedder import FewShotEmbedder
from pipeline.inference.fingerprint import fingerprint
from pipeline.inference.prompting import log_changes

log = logging.getLogger(__name__)

PARTIAL, SETTINGS, LOCK = "embeddings.partial", "settings.json", "lock"


def encode_corpus(
    embedder: FewShotEmbedder,
    texts: Iterable[str],
    out: Path,
    dtype: Literal["float32", "float16"] = "float32",
    block_texts: int = BLOCK_TEXTS,
) -> np.ndarray:
    """Embed passages into the .npy file `out`; called again, or by several processes at once, it goes on.

    Killed at any moment and called again, it ends with the bytes of an undisturbed call on the same kind of device.

    Args:
        texts: N passages, read once or more and a block at a time; several processes need an iterable that begins anew.
        block_texts: passages that are encoded, and made safe on disk, together.

    Returns:
        The memory-mapped embeddings [N, D] of `dtype`, L2-normalised, in the order of `texts`.

    Raises:
        ValueError: what was begun there is of other texts, another model or type, or has lost its embeddings; a text
            that is none; embeddings that are not finite.
    """
    if block_texts < 1 or dtype not in ("float32", "float16"):
        raise ValueError(f"block_texts={block_texts} must be 1 or more, dtype={dtype!r} float32 or float16")
    if embedder.place[1] > 1:
        raise ValueError(f"place={embedder.place}: processes share a corpus by its blocks; give an embedder of its own")
    work = blocks_folder(out)
    record = {"model": fingerprint(embedder), "dtype": dtype, "width": embedder.width, "block_texts": block_texts}
    _open_folder(out, work, record)
    quiet = dataclasses.replace(embedder, show_progress=False)
    total = len(texts) if isinstance(texts, Sized) else None
    missing: list[int] | None = None
    num_encoded, all_changes = 0, Counter[str]()
    interval = 0.2 if sys.stderr.isatty() else 30.0  # not on a terminal: a line now and then
    options: dict[str, Any] = {"unit": "text", "mininterval": interval, "disable": not embedder.show_progress}
    with tqdm(total=total, desc="encode corpus", **options) as bar:
        while missing is None or missing:
            if missing is not None and iter(texts) is texts:
                raise ValueError(f"blocks {missing[:8]} of {out} were left by another process, and texts has been read")
            bar.reset()
            digests: list[str] = []
            num_texts = 0
            for block in _blocks(texts, block_texts):
                digests.append(_digest(block))
                changes = _fill_block(quiet, out, len(digests) - 1, block, digests[-1], record)
                if changes is not None:
                    num_encoded += len(block)
                    all_changes += changes
                num_texts += len(block)
                bar.update(len(block))
            missing = _wait_for_others(work, digests)
    _finish(out, work, len(digests), num_texts, record)
    if digests and not num_encoded:
        log.info("%s: every block was done before", out)
    log_changes(all_changes, num_encoded, "passages that this process encoded")
    return np.load(out, mmap_mode="r")


def require_texts(out: Path, texts: Iterable[str]) -> None:
    """Read all of `texts`; ValueError unless they are those whose embeddings the finished file `out` holds."""
    work = blocks_folder(out)
    record = json.loads((work / SETTINGS).read_text(encoding="utf-8"))
    num_texts = 0
    for number, block in enumerate(_blocks(texts, record["block_texts"])):
        _require_digest(work / f"{number:06d}", _digest(block))
        num_texts += len(block)
    if num_texts != (held := len(np.load(out, mmap_mode="r"))):
        raise ValueError(f"{out} holds {held} embeddings for {num_texts} texts; give the corpus that it was made from")


def blocks_folder(out: Path) -> Path:
    """The folder of marks and locks beside a file of embeddings."""
    return out.with_name(f"{out.name}.blocks")


def count_done(out: Path) -> int:
    """Blocks that are done."""
    return sum(path.stat().st_size > 0 for path in blocks_folder(out).glob("[0-9]*"))


def _open_folder(out: Path, work: Path, record: dict[str, Any]) -> None:
    """Make or take up the folder of blocks; ValueError where it belongs to another model, type or size of blocks."""
    if out.exists() and not work.is_dir():
        raise ValueError(
            f"{out} exists without {work.name}/, which tells what it holds; remove it or name another file"
        )
    work.mkdir(parents=True, exist_ok=True)
    lock = take_lock(work / LOCK, wait=True)
    assert lock is not None
    with lock:
        if not (work / SETTINGS).is_file():
            write_text(work / SETTINGS, json.dumps(record, indent=1) + "\n")
        found = json.loads((work / SETTINGS).read_text(encoding="utf-8"))
        if not out.exists() and not (work / PARTIAL).exists():
            if any(_read_mark(path) for path in work.glob("[0-9]*")):
                _require_rows(out, work, 1)
            (work / PARTIAL).touch()
    differing = [name for name in record if found.get(name) != record[name]]
    if odd := [f"{name} {found.get(name)!r} there, {record[name]!r} now" for name in differing]:
        raise ValueError(f"{out} was begun otherwise: {'; '.join(odd)}; go on as before, or remove it and {work.name}/")


def _fill_block(
    embedder: FewShotEmbedder, out: Path, number: int, block: list[str], digest: str, record: dict[str, Any]
) -> Counter[str] | None:
    """Encode a block; returns what was changed in its texts, None where it is done or another process has it."""
    work = blocks_folder(out)
    path = work / f"{number:06d}"
    _require_digest(path, digest)
    first_byte = len(_header(0, record)) + number * record["block_texts"] * _row_bytes(record)
    if _read_mark(path):
        _require_rows(out, work, first_byte + len(block) * _row_bytes(record))
        return None
    if (mark := take_lock(path)) is None:
        return None
    with mark:
        if _read_mark(path):  # done between the look and the lock
            _require_digest(path, digest)
            return None
        if out.exists():
            raise ValueError(f"{out} is finished, and the texts go on after it; remove it and {work.name}/")
        rows_ND, changes = embedder.encode_counted(block)
        if not np.isfinite(rows_ND).all():
            raise ValueError(f"block {number} of {out}: embeddings are not finite; the model's weights are damaged")
        rows_ND = rows_ND.astype(record["dtype"])
        with (work / PARTIAL).open("r+b") as file:
            file.seek(first_byte)
            file.write(rows_ND.tobytes())
            file.flush()
            os.fsync(file.fileno())
        mark.truncate(0)  # a mark that was cut off
        mark.write(digest)
        mark.flush()
        os.fsync(mark.fileno())
    sync(work)
    return changes


def _require_rows(out: Path, work: Path, end: int) -> None:
    """ValueError where the file of embeddings has fewer than `end` bytes, all of which the marks say are in it."""
    size = 0
    for path in (work / PARTIAL, out):  # in this order: another process may rename the first to the second meanwhile
        # Opened, not only looked at: a file system over a network then asks for the size anew.
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
    if size < end:
        raise ValueError(
            f"{work}/ marks blocks as done whose embeddings are lost: neither {out.name} nor {PARTIAL} holds them; "
            f"remove {work}/ (and {out.name}, if it is there) to encode the corpus anew"
        )


def _wait_for_others(work: Path, digests: Sequence[str]) -> list[int]:
    """The blocks that no process has and none has done, once all other processes have let go of theirs."""
    missing = []
    for number, digest in enumerate(digests):
        path = work / f"{number:06d}"
        if not _read_mark(path):
            lock = take_lock(path, wait=True)
            assert lock is not None
            lock.close()
        _require_digest(path, digest)
        if not _read_mark(path):
            missing.append(number)
    return missing


def _finish(out: Path, work: Path, num_blocks: int, num_texts: int, record: dict[str, Any]) -> None:
    """Give the file its header and its name; ValueError where blocks of more texts than there are now are done."""
    later = [path.name for path in work.glob("[0-9]*") if int(path.name) >= num_blocks and _read_mark(path)]
    if later:
        raise ValueError(f"{work} holds {len(later)} blocks more than the {num_texts} texts; remove it and {out.name}")
    lock = take_lock(work / LOCK, wait=True)
    assert lock is not None
    with lock:
        if out.exists():
            return
        header = _header(num_texts, record)
        with (work / PARTIAL).open("r+b") as file:
            file.write(header)
            file.truncate(len(header) + num_texts * _row_bytes(record))
            file.flush()
            os.fsync(file.fileno())
        os.replace(work / PARTIAL, out)
        sync(out.parent)
    log.info("%s: %d embeddings of width %d", out, num_texts, record["width"])


def _header(num_texts: int, record: dict[str, Any]) -> bytes:
    """The first bytes of the .npy file: as many for any number of texts."""
    buffer = io.BytesIO()
    form = {"descr": np.dtype(record["dtype"]).str, "fortran_order": False, "shape": (num_texts, record["width"])}
    np.lib.format.write_array_header_1_0(buffer, form)
    return buffer.getvalue()


def _row_bytes(record: dict[str, Any]) -> int:
    """Bytes of one embedding."""
    return int(record["width"]) * np.dtype(record["dtype"]).itemsize


def _blocks(texts: Iterable[str], block_texts: int) -> Iterator[list[str]]:
    """Lists of `block_texts` texts, the last one shorter; ValueError for one that is no text."""
    iterator, start = iter(texts), 0
    while block := list(islice(iterator, block_texts)):
        for i, text in enumerate(block, start):
            if not isinstance(text, str):
                raise ValueError(f"texts[{i}]={text!r:.40} is not a text; remove it or make it a string")
        start += len(block)
        yield block


def _digest(block: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in block:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _read_mark(path: Path) -> str:
    """The hash in a block's file; "" while it is not done."""
    mark = path.read_text(encoding="utf-8") if path.is_file() else ""
    return mark if len(mark) == hashlib.sha256().digest_size * 2 else ""


def _require_digest(path: Path, digest: str) -> None:
    if (mark := _read_mark(path)) and mark != digest:
        raise ValueError(
            f"{path}: block {int(path.name)} was encoded from other texts (sha256 {mark[:12]}, now {digest[:12]}); "
            f"give the same corpus in the same order, or remove {path.parent.name}/"
        )
