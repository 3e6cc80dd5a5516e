"""Rankings of queries without judgements, for leaderboards that score elsewhere.

Q queries, B texts of a block, D width, K depth.
"""

import importlib.util

import numpy as np

from pipeline.evaluation.runner import Encode
from pipeline.evaluation.sides import carried
from pipeline.evaluation.tasks import RetrievalTask

BLOCK = 50_000  # texts whose embeddings are held at once


def rank(
    task: RetrievalTask, encode: Encode, sides: str, depth: int = 1000, block: int = BLOCK
) -> dict[str, dict[str, float]]:
    """Query id -> passage id -> cosine, the best `depth` of each query, best first; ValueError without faiss."""
    if importlib.util.find_spec("faiss") is None:
        raise ValueError("--rankings needs faiss; pip install bge-icl-train[mining]")
    import faiss

    query_QD = encode(list(task.queries.values()), carried(sides, task.kind, is_document=False))
    ids, texts = list(task.corpus), list(task.corpus.values())
    depth = min(depth, len(ids))
    place_QK = np.full((len(query_QD), depth), -1, dtype=np.int64)
    score_QK = np.full((len(query_QD), depth), -np.inf, dtype=np.float32)
    for start in range(0, len(texts), block):
        text_BD = encode(texts[start : start + block], carried(sides, task.kind, is_document=True))
        score, place = faiss.knn(query_QD, text_BD, min(depth, len(text_BD)), metric=faiss.METRIC_INNER_PRODUCT)
        place_QK, score_QK = _best(np.hstack([place_QK, place + start]), np.hstack([score_QK, score]), depth)
    return {
        query: {ids[p]: float(s) for p, s in zip(places, scores, strict=True) if p >= 0}
        for query, places, scores in zip(task.queries, place_QK.tolist(), score_QK.tolist(), strict=True)
    }


def _best(place: np.ndarray, score: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `depth` of each row by falling score, then rising place."""
    order = np.lexsort((place, -score), axis=-1)[:, :depth]
    return np.take_along_axis(place, order, axis=1), np.take_along_axis(score, order, axis=1)
