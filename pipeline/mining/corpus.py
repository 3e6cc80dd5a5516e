"""What a dataset's queries search, and what its rows say about which texts belong together.

N rows, Q distinct queries, C texts of the corpus, U texts of the store. A place is an index into the corpus, whose
texts stand in the order of their ids: ties that are broken by place are broken by text id.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.store import DatasetTable, TokenStore


@dataclass(frozen=True)
class Queries:
    """The distinct queries of a dataset, by instruction and text id; rows with the same one share its search."""

    text_Q: np.ndarray  # int64 text ids
    instruction_Q: np.ndarray  # int64, index into the store's instructions
    query_N: np.ndarray  # int64, the query of each row
    row_N: np.ndarray  # int64, rows by query
    row_offsets: np.ndarray  # int64, Q + 1: rows of query q are row_N[row_offsets[q] : row_offsets[q + 1]]
    most_alike: int  # most queries that share a text (with other instructions)

    def rows_of(self, query: int) -> np.ndarray:
        """Rows with this query, rising: int64."""
        return self.row_N[self.row_offsets[query] : self.row_offsets[query + 1]]


@dataclass(frozen=True)
class Relations:
    """Pairs of texts that rows put together, as sorted int64 keys `first * U + second`; 8 bytes a pair."""

    num_texts: int  # U
    answers: np.ndarray  # query -> positive
    together: np.ndarray  # query or positive -> any other of the same row
    categories: np.ndarray  # query or positive -> category of the row

    def holds(self, keys: np.ndarray, first: int, second: np.ndarray) -> np.ndarray:
        """Whether `keys` has (first, second), for an array of second ones: bool."""
        return _contains(keys, first * self.num_texts + second)

    def in_category(self, text: np.ndarray, category: int) -> np.ndarray:
        """Whether any row of this category holds the text: bool, in the shape of `text`."""
        return _contains(self.categories, text * self.num_texts + category)


@dataclass(frozen=True)
class Copies:
    """Hashes of the words of texts: what differs in case, punctuation, width or spaces only has the same one."""

    text_V: np.ndarray  # int64 text ids, rising
    key_V: np.ndarray  # uint64

    def keys(self, text: np.ndarray) -> np.ndarray:
        """uint64 hashes of these texts."""
        return self.key_V[np.searchsorted(self.text_V, text)]


def distinct_queries(table: DatasetTable, num_texts: int) -> Queries:
    """The (instruction, query text) pairs of a dataset."""
    key_N = np.asarray(table.instruction_N, dtype=np.int64) * num_texts + table.query_text_N
    key_Q, query_N = np.unique(key_N, return_inverse=True)
    instruction_Q, text_Q = np.divmod(key_Q, num_texts)
    query_N = query_N.reshape(-1)
    row_N = np.argsort(query_N, kind="stable")
    row_offsets = np.searchsorted(query_N[row_N], np.arange(len(key_Q) + 1))
    most_alike = int(np.unique(text_Q, return_counts=True)[1].max())
    return Queries(text_Q, instruction_Q, query_N, row_N, row_offsets, most_alike)


def corpus_texts(tables: Sequence[DatasetTable]) -> np.ndarray:
    """Text ids of the distinct positives and negatives of these datasets: int64 [C], rising."""
    return np.unique(np.concatenate([ids for table in tables for ids in (table.pos_text, table.neg_text)]))


def relate(tables: Sequence[DatasetTable], corpus_C: np.ndarray, num_texts: int) -> Relations:
    """The pairs of these datasets' rows whose second text is in the corpus. A row of P positives gives P (P + 1)."""
    answers, together, categories = [], [], []
    for table in tables:
        count_N = np.diff(table.pos_offsets)
        query_E = np.repeat(table.query_text_N, count_N)
        answers.append(query_E * num_texts + table.pos_text)
        first, second = _pairs_of_rows(table)
        wanted = (first != second) & _contains(corpus_C, second)
        together.append(first[wanted] * num_texts + second[wanted])
        category_E = np.repeat(table.category_text_N, count_N)
        categories.append(_key(table.query_text_N, table.category_text_N, num_texts))
        categories.append(_key(table.pos_text, category_E, num_texts))
    return Relations(num_texts, *(np.unique(np.concatenate(keys)) for keys in (answers, together, categories)))


def _key(text: np.ndarray, category: np.ndarray, num_texts: int) -> np.ndarray:
    known = category >= 0
    return text[known] * num_texts + category[known]


def _pairs_of_rows(table: DatasetTable) -> tuple[np.ndarray, np.ndarray]:
    """All ordered pairs of texts (query and positives) of each row, with itself too: (first [F], second [F])."""
    size_N = np.diff(table.pos_offsets) + 1
    start_N = np.concatenate([[0], np.cumsum(size_N)])
    member_M = np.insert(table.pos_text, table.pos_offsets[:-1], table.query_text_N)
    size_M = np.repeat(size_N, size_N)
    first_F = np.repeat(np.arange(len(member_M)), size_M)
    pair_start_M = np.cumsum(size_M) - size_M
    within_F = np.arange(len(first_F)) - np.repeat(pair_start_M, size_M)
    second_F = np.repeat(np.repeat(start_N[:-1], size_N), size_M) + within_F
    return member_M[first_F], member_M[second_F]


def find_copies(store: TokenStore, text_V: np.ndarray) -> Copies:
    """Hashes of the words of these texts; int64 ids in rising order."""
    key_V = np.fromiter((_hash(words_of(store.text(i))) for i in text_V.tolist()), dtype=np.uint64, count=len(text_V))
    return Copies(text_V, key_V)


def words_of(text: str) -> str:
    """Words of a text in Unicode's compatible form, without case; a text without words stays as it is."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", plain)) or plain


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def _contains(rising: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether each value stands in the rising array: bool, in the shape of `values`."""
    if len(rising) == 0:
        return np.zeros(np.shape(values), dtype=bool)
    place = np.minimum(np.searchsorted(rising, values), len(rising) - 1)
    return np.asarray(rising[place] == values)
