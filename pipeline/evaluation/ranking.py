"""Rankings of queries without judgements, for leaderboards that score elsewhere.

Q queries, B texts of a block, D width, K depth.
"""

import numpy as np

from pipeline.evaluation.runner import Encode
from pipeline.evaluation.sides import carried
from pipeline.evaluation.tasks import RetrievalTask
from pipeline.mining.search import top_of_shard

BLOCK = 50_000  # texts whose embeddings are held at once


def rank(
    task: RetrievalTask, encode: Encode, sides: str, depth: int = 1000, block: int = BLOCK
) -> dict[str, dict[str, float]]:
    """Query id -> passage id -> cosine, the best `depth` of each query, best first."""
    query_QD = encode(list(task.queries.values()), carried(sides, task.kind, is_document=False))
    ids, texts = list(task.corpus), list(task.corpus.values())
    depth = min(depth, len(ids))
    place_QK = np.full((len(query_QD), depth), -1, dtype=np.int64)
    score_QK = np.full((len(query_QD), depth), -np.inf, dtype=np.float32)
    for start in range(0, len(texts), block):
        text_BD = encode(texts[start : start + block], carried(sides, task.kind, is_document=True))
        place, score = top_of_shard(query_QD, text_BD, min(depth, len(text_BD)), score_QK[:, -1])
        place = np.where(place < 0, -1, place + start)
        place_QK, score_QK = _merge(np.hstack([place_QK, place]), np.hstack([score_QK, score]), depth)
    return {
        query: {ids[p]: float(s) for p, s in zip(places, scores, strict=True) if p >= 0}
        for query, places, scores in zip(task.queries, place_QK.tolist(), score_QK.tolist(), strict=True)
    }


def _merge(place: np.ndarray, score: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    score = np.where(place < 0, -np.inf, score)
    order = np.lexsort((place, -score), axis=-1)[:, :depth]
    return np.take_along_axis(place, order, axis=1), np.take_along_axis(score, order, axis=1)
