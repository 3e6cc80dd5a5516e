"""Embeddings that several modes share, with what was logged when they were made; in memory or in a folder.

N texts, D width.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pipeline.files import write_atomic, write_text

Memory = Path | dict[str, tuple[np.ndarray, list[str]]]
_EMBEDDER_LOG = logging.getLogger("pipeline.inference")


def remembered(memory: Memory, carry: str, texts: Sequence[str], encode: Callable[[], np.ndarray]) -> np.ndarray:
    """Embeddings [N, D] of these texts with what they carry: from the memory, or made and put there.

    What was logged when they were made (texts that were cut) is logged again when they are taken.
    """
    digest = hashlib.sha256(carry.encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    key = digest.hexdigest()
    known = _take(memory, key)
    if known is None:
        with collect_notes() as notes:
            block_ND = encode()
        _put(memory, key, block_ND, notes)
        return block_ND
    block_ND, notes = known
    for note in notes:
        _EMBEDDER_LOG.info("%s", note)
    return block_ND


@contextmanager
def collect_notes(quiet: bool = False) -> Iterator[list[str]]:
    """What the embedder logs meanwhile: each message once, with how often it came; `quiet` keeps it from the screen."""
    counts: dict[str, int] = {}
    notes: list[str] = []
    level, spread, shown = _EMBEDDER_LOG.level, _EMBEDDER_LOG.propagate, _EMBEDDER_LOG.getEffectiveLevel()

    def note(record: logging.LogRecord) -> None:
        text = record.getMessage()
        counts[text] = counts.get(text, 0) + 1
        # Whatever is shown elsewhere, nothing is left out here; so what is shown goes on from here.
        if spread and not quiet and record.levelno >= shown and _EMBEDDER_LOG.parent:
            _EMBEDDER_LOG.parent.handle(record)

    handler = logging.Handler(logging.INFO)
    handler.emit = note  # type: ignore[method-assign]
    _EMBEDDER_LOG.addHandler(handler)
    _EMBEDDER_LOG.propagate = False
    _EMBEDDER_LOG.setLevel(logging.INFO)
    try:
        yield notes
    finally:
        _EMBEDDER_LOG.setLevel(level)
        _EMBEDDER_LOG.propagate = spread
        _EMBEDDER_LOG.removeHandler(handler)
        notes += [text if count == 1 else f"{text} ({count} times)" for text, count in counts.items()]


def _take(memory: Memory, key: str) -> tuple[np.ndarray, list[str]] | None:
    if isinstance(memory, dict):
        return memory.get(key)
    path = memory / f"{key}.npy"
    if not path.is_file():
        return None
    return np.load(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def _put(memory: Memory, key: str, block_ND: np.ndarray, notes: list[str]) -> None:
    if isinstance(memory, dict):
        memory[key] = block_ND, notes
        return
    memory.mkdir(parents=True, exist_ok=True)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, block_ND)

    # The array comes last: where it is, the notes are.
    write_text(memory / f"{key}.json", json.dumps(notes))
    write_atomic(memory / f"{key}.npy", save)
