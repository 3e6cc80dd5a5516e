"""Embeddings of texts in blocks on disk: each block is a file, complete or absent, and read through a memory map.

N texts, D width. Blocks have a fixed size: a model's last bits can depend on which texts share a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import write_atomic
from pipeline.inference.description import DESCRIPTION_FILE
from pipeline.mining.folder import progress_bar

BLOCK_TEXTS = 4096


@dataclass(frozen=True)
class TextEncoder:
    """A model as two functions; both return float32 [N, D] of unit length."""

    queries: Callable[[Sequence[str], str], np.ndarray]  # texts, their instruction
    passages: Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of N texts as blocks of a folder."""

    folder: Path
    num_texts: int
    block_texts: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Embeddings start .. stop - 1 in memory: float32 [stop - start, D]."""
        first, last = start // self.block_texts, (stop - 1) // self.block_texts
        parts = [_open_block(self.folder, b) for b in range(first, last + 1)]
        offset = first * self.block_texts
        parts[-1] = parts[-1][: stop - last * self.block_texts]
        parts[0] = parts[0][start - offset :]
        return np.concatenate(parts)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Embeddings of these texts: float32 [len(index), D]."""
        block, within = np.divmod(index, self.block_texts)
        order = np.argsort(block, kind="stable")
        edges = np.flatnonzero(np.diff(block[order], prepend=-1, append=-1))
        taken = np.empty((len(index), self.width), dtype=np.float32)
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            here = order[start:stop]
            taken[here] = _open_block(self.folder, int(block[here[0]]))[within[here]]
        return taken

    @property
    def width(self) -> int:
        return int(_open_block(self.folder, 0).shape[1])


def is_own_model(folder: Path) -> bool:
    """Whether the folder is a run of this project or its model/ folder."""
    return (folder / DESCRIPTION_FILE).is_file() or (folder / "model" / DESCRIPTION_FILE).is_file()


def model_folder(embedder: str) -> Path:
    """The folder that holds the files of a model; ValueError if there is none."""
    folder = Path(embedder)
    remedy = "give a run, the folder of a sentence-transformers model (`hf download` fetches one), or bm25"
    if not folder.is_dir():
        raise ValueError(f"--embedder {embedder}: no such folder; {remedy}")
    if (folder / "model" / DESCRIPTION_FILE).is_file():
        return folder / "model"
    if not any((folder / name).is_file() for name in (DESCRIPTION_FILE, "modules.json", "config.json")):
        raise ValueError(f"--embedder {embedder} holds no model: neither {DESCRIPTION_FILE} nor modules.json; {remedy}")
    return folder


def load_text_encoder(folder: Path, batch_size: int) -> TextEncoder:
    """The model of `model_folder`: a run's model zero-shot with its own template, any other as it is described there.

    Args:
        batch_size: texts of one forward pass of a sentence-transformers model; ours packs by tokens.
    """
    quiet_transformers()
    if is_own_model(folder):
        from pipeline.inference.embedder import load_embedder

        own = load_embedder(folder, show_progress=False)
        return TextEncoder(lambda texts, instruction: own.encode_queries(texts, instruction), own.encode_passages)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder))
    how: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False, "normalize_embeddings": True}
    # Its own prompts for queries and documents, where its folder names any; instructions of rows are not its language.
    return TextEncoder(
        lambda texts, instruction: np.asarray(model.encode_query(list(texts), **how), dtype=np.float32),
        lambda texts: np.asarray(model.encode_document(list(texts), **how), dtype=np.float32),
    )


def quiet_transformers() -> None:
    """No bars and tables while weights are loaded: they would stand between the bars of mining."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def embed(
    folder: Path,
    num_texts: int,
    encode: Callable[[range], np.ndarray],
    title: str,
    bars: bool,
    block_texts: int = BLOCK_TEXTS,
) -> Embeddings:
    """Embed N texts into `folder`; blocks that are there already stay.

    Args:
        encode: embeddings of texts start .. stop - 1, float32 [n, D].

    Raises:
        ValueError: an embedding is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar(num_texts, title, "text", bars) as bar:
        for start in range(0, num_texts, block_texts):
            block = range(start, min(start + block_texts, num_texts))
            path = _block_path(folder, start // block_texts)
            if not path.is_file():
                embeddings_ND = np.ascontiguousarray(encode(block), dtype=np.float32)
                assert len(embeddings_ND) == len(block)
                if not np.isfinite(embeddings_ND).all():
                    raise ValueError("the embedder returns numbers that are not finite; its weights are damaged")
                write_atomic(path, lambda temporary, rows=embeddings_ND: _save(temporary, rows))  # type: ignore[misc]
            bar.update(len(block))
    return Embeddings(folder, num_texts, block_texts)


def _save(path: Path, rows: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, rows)


def _block_path(folder: Path, number: int) -> Path:
    return folder / f"block-{number:06d}.npy"


def _open_block(folder: Path, number: int) -> np.ndarray:
    return np.load(_block_path(folder, number), mmap_mode="r")
