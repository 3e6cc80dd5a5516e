"""Training texts that stand in evaluation sets too, by normalised text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.eval_texts import EvaluationTexts
from pipeline.data.normalizing import text_key
from pipeline.data.store import TokenStore
from pipeline.reporting.texts import DatasetTexts

MAX_TEXTS = 2_000_000  # training texts normalised; of more, every n-th distinct text of each dataset and side
SHOWN_TEXTS = 3


@dataclass(frozen=True)
class TrainingTexts:
    """`text_key`s of a dataset: one a distinct text, in the order of the ids."""

    query_ids: np.ndarray
    queries: np.ndarray  # uint64
    positive_ids: np.ndarray
    positives: np.ndarray


@dataclass(frozen=True)
class Overlap:
    """Training texts of one dataset among the texts of one evaluation set, counted by distinct training text."""

    queries_in_queries: int
    queries_in_corpus: int
    positives_in_queries: int
    positives_in_corpus: int
    shown: tuple[int, ...]  # ids of the first few such texts

    @property
    def any(self) -> bool:
        return bool(self.shown)


def training_stride(texts: Sequence[DatasetTexts]) -> int:
    """n, where every n-th distinct text of each dataset and side is normalised: 1 up to MAX_TEXTS texts."""
    return max(1, -(-sum(t.query.num_texts + t.positive.num_texts for t in texts) // MAX_TEXTS))


def training_texts(store: TokenStore, texts: DatasetTexts, stride: int) -> TrainingTexts:
    """Keys of every stride-th distinct query and positive of a dataset."""
    query_ids, positive_ids = texts.query.text_K[::stride], texts.positive.text_K[::stride]
    queries, positives = (
        np.fromiter((text_key(store.text(i)) for i in ids.tolist()), dtype=np.uint64, count=len(ids))
        for ids in (query_ids, positive_ids)
    )
    return TrainingTexts(query_ids, queries, positive_ids, positives)


def find_overlap(training: TrainingTexts, evaluation: EvaluationTexts) -> Overlap:
    """Count a dataset's texts that stand in an evaluation set."""
    pairs = [
        (ids, np.isin(keys, known))
        for ids, keys in ((training.query_ids, training.queries), (training.positive_ids, training.positives))
        for known in (evaluation.queries, evaluation.corpus)
    ]
    shown = dict.fromkeys(i for ids, found in pairs for i in ids[np.flatnonzero(found)[:SHOWN_TEXTS]].tolist())
    counts = [int(found.sum()) for _, found in pairs]
    return Overlap(counts[0], counts[1], counts[2], counts[3], tuple(shown)[:SHOWN_TEXTS])


def share_of_queries_seen(training: Sequence[TrainingTexts], evaluation: EvaluationTexts) -> float:
    """Share of the evaluation's distinct queries that are a query or a positive of any dataset."""
    if not len(evaluation.queries):
        return 0.0
    seen = np.zeros(len(evaluation.queries), dtype=bool)
    for texts in training:
        seen |= np.isin(evaluation.queries, texts.queries) | np.isin(evaluation.queries, texts.positives)
    return float(seen.mean())
