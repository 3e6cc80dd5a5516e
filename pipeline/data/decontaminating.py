"""Which training rows share a text with an evaluation set.

N rows.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from pipeline.data.eval_texts import EvaluationTexts
from pipeline.data.normalizing import is_among
from pipeline.data.store import DatasetTable
from pipeline.datatypes import RULES

REASONS = ("query", "positive", "positive in corpus", "query in corpus")
CORPUS_REASONS = REASONS[2:]
KINDS = ("corpus", "pool")
SHOWN = 3


@dataclass(frozen=True)
class Matches:
    """Rows of one dataset that share a text with one evaluation set, bool [N] each; a row may stand in several."""

    query_N: np.ndarray  # the row's query is one of the evaluation's
    positive_N: np.ndarray  # a positive is one of the evaluation's queries
    positive_in_corpus_N: np.ndarray  # a positive stands in the evaluation's corpus
    query_in_corpus_N: np.ndarray  # the row's query does
    negatives_in_corpus: int  # negatives of all rows; these rows are kept
    symmetric: bool  # query and positive are alike: one in the corpus tells as much as the other
    shown: dict[str, tuple[int, ...]]  # reason -> ids of the first distinct texts that matched

    @property
    def by_reason(self) -> dict[str, np.ndarray]:
        found = (self.query_N, self.positive_N, self.positive_in_corpus_N, self.query_in_corpus_N)
        return dict(zip(REASONS, found, strict=True))


def find_matches(table: DatasetTable, keys_U: np.ndarray, evaluation: EvaluationTexts) -> Matches:
    """Compare a dataset with an evaluation set; keys_U are the store's `store_keys`."""
    is_query = is_among(keys_U[table.query_text_N], evaluation.queries)
    query_in_corpus = is_among(keys_U[table.query_text_N], evaluation.corpus)
    positive_keys = keys_U[table.pos_text]
    is_positive = is_among(positive_keys, evaluation.queries)
    positive_in_corpus = is_among(positive_keys, evaluation.corpus)
    texts = (
        table.query_text_N[is_query],
        table.pos_text[is_positive],
        table.pos_text[positive_in_corpus],
        table.query_text_N[query_in_corpus],
    )
    return Matches(
        query_N=is_query,
        positive_N=_any(is_positive, table.pos_offsets),
        positive_in_corpus_N=_any(positive_in_corpus, table.pos_offsets),
        query_in_corpus_N=query_in_corpus,
        negatives_in_corpus=int(is_among(keys_U[table.neg_text], evaluation.corpus).sum()),
        symmetric=RULES[table.task_type].symmetric,
        shown={reason: _first_distinct(found) for reason, found in zip(REASONS, texts, strict=True)},
    )


def contaminating(matches: Matches, evaluation: EvaluationTexts, keep: Collection[str]) -> tuple[str, ...]:
    """Reasons for which rows go; `keep` may name "corpus" and "pool", which are only counted.

    A query in the corpus is no reason where queries and passages differ: the row says nothing on what answers a test
    query.
    """
    if evaluation.is_pool and "pool" in keep:
        return ()
    reasons = REASONS if matches.symmetric else REASONS[:3]
    return tuple(reason for reason in reasons if not (reason in CORPUS_REASONS and "corpus" in keep))


def contaminated(matches: Matches, evaluation: EvaluationTexts, keep: Collection[str]) -> np.ndarray:
    """bool [N]: rows that are to be dropped or marked."""
    found_N = np.zeros_like(matches.query_N)
    for reason in contaminating(matches, evaluation, keep):
        found_N |= matches.by_reason[reason]
    return found_N


def _first_distinct(texts: np.ndarray) -> tuple[int, ...]:
    """The first SHOWN distinct of these text ids, in their order."""
    _, first = np.unique(texts, return_index=True)
    return tuple(texts[np.sort(first)[:SHOWN]].tolist())


def _any(hits: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Whether any of a row's texts is a hit: bool [N]."""
    before = np.concatenate([[0], np.cumsum(hits)])
    found_N: np.ndarray = before[offsets[1:]] > before[offsets[:-1]]
    return found_N
