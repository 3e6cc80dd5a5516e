"""Cosines of queries and passages.

Q queries, P passages, D width.
"""

import numpy as np


def similarity(queries_QD: np.ndarray, passages_PD: np.ndarray) -> np.ndarray:
    """Cosine of every query with every passage: float32 [Q, P].

    Args:
        queries_QD, passages_PD: embeddings, of length 1 or not; a vector of zeros has cosine 0 with all others.

    Raises:
        ValueError: not two matrices of the same width.
    """
    for name, given in (("queries_QD", queries_QD), ("passages_PD", passages_PD)):
        if given.ndim != 2:
            raise ValueError(f"{name} has shape {given.shape}; it must be one embedding a row")
    if queries_QD.shape[1] != passages_PD.shape[1]:
        raise ValueError(
            f"queries_QD has width {queries_QD.shape[1]}, passages_PD {passages_PD.shape[1]}; embed both with one "
            "model and one dim"
        )
    return _unit(queries_QD) @ _unit(passages_PD).T


def _unit(rows_ND: np.ndarray) -> np.ndarray:
    rows_ND = np.asarray(rows_ND, dtype=np.float32)
    return rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-12)
