"""A cross-encoder that reads query and passage together and judges whether a candidate answers after all."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.data.store import TokenStore
from pipeline.mining.embedding import quiet_transformers


def require_teacher(folder: str) -> None:
    """ValueError if the folder holds no model."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"--teacher {folder} holds no model (config.json); give the folder of a cross-encoder")


def load_teacher(folder: str, store: TokenStore, batch_size: int) -> Callable[[list[tuple[int, int]]], np.ndarray]:
    """Scores of (query, passage) pairs of text ids, float32, by a sentence-transformers CrossEncoder.

    Raises:
        ValueError: the model gives more than one score a pair, or one that is not finite.
    """
    quiet_transformers()
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(folder)
    if model.num_labels != 1:
        raise ValueError(f"--teacher {folder} gives {model.num_labels} scores a pair; a teacher gives one (a reranker)")

    def score(pairs: list[tuple[int, int]]) -> np.ndarray:
        texts = [(store.text(query), store.text(passage)) for query, passage in pairs]
        values = np.asarray(model.predict(texts, batch_size=batch_size, show_progress_bar=False), dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"--teacher {folder} gives scores that are not finite; its weights are damaged")
        return values

    return score
