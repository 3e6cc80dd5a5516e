"""Which training rows share a text with an evaluation set.

N rows.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from pipeline.data.eval_texts import EvaluationTexts
from pipeline.data.store import DatasetTable

REASONS = ("query", "positive", "positive in corpus")
KINDS = ("corpus", "pool")
SHOWN = 3


@dataclass(frozen=True)
class Matches:
    """Rows of one dataset that share a text with one evaluation set, bool [N] each; a row may stand in several."""

    query_N: np.ndarray  # the row's query is one of the evaluation's
    positive_N: np.ndarray  # a positive is one of the evaluation's queries
    corpus_N: np.ndarray  # a positive stands in the evaluation's corpus
    negatives_in_corpus: int  # negatives of all rows; these rows are kept
    shown: dict[str, tuple[int, ...]]  # reason -> ids of the first distinct texts that matched

    @property
    def by_reason(self) -> dict[str, np.ndarray]:
        return dict(zip(REASONS, (self.query_N, self.positive_N, self.corpus_N), strict=True))


def find_matches(table: DatasetTable, keys_U: np.ndarray, evaluation: EvaluationTexts) -> Matches:
    """Compare a dataset with an evaluation set; keys_U are the store's `store_keys`."""
    is_query_N = np.isin(keys_U[table.query_text_N], evaluation.queries)
    positive_keys = keys_U[table.pos_text]
    is_positive = np.isin(positive_keys, evaluation.queries)
    in_corpus = np.isin(positive_keys, evaluation.corpus)
    texts = (table.query_text_N[is_query_N], table.pos_text[is_positive], table.pos_text[in_corpus])
    return Matches(
        query_N=is_query_N,
        positive_N=_any(is_positive, table.pos_offsets),
        corpus_N=_any(in_corpus, table.pos_offsets),
        negatives_in_corpus=int(np.isin(keys_U[table.neg_text], evaluation.corpus).sum()),
        shown={
            reason: tuple(dict.fromkeys(found.tolist()))[:SHOWN] for reason, found in zip(REASONS, texts, strict=True)
        },
    )


def contaminated(matches: Matches, evaluation: EvaluationTexts, keep: Collection[str]) -> np.ndarray:
    """bool [N]: rows that are to be dropped or marked; `keep` may name "corpus" and "pool", which are only counted."""
    if evaluation.is_pool and "pool" in keep:
        return np.zeros_like(matches.query_N)
    found_N = matches.query_N | matches.positive_N
    return found_N if "corpus" in keep else found_N | matches.corpus_N


def _any(hits: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Whether any of a row's texts is a hit: bool [N]."""
    before = np.concatenate([[0], np.cumsum(hits)])
    found_N: np.ndarray = before[offsets[1:]] > before[offsets[:-1]]
    return found_N
