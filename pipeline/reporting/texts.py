"""How often texts are used: repeats inside a dataset, and texts that datasets share.

K distinct texts of one side of a dataset, D datasets. Text ids of a store count through texts sorted by hash, so
"every n-th id" is a random sample of texts that is the same for every dataset and side: whatever is counted of such a
text is counted in full, and no share is biased by the sampling.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.store import DatasetTable, TokenStore

MAX_USES = 1 << 24  # text uses counted one by one; of a store with more every n-th text
BLOCK = 1 << 22
# Uses of one text, from and to: how the distribution of repeats is shown.
REPEAT_CLASSES = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 32), (33, 256), (257, None))


@dataclass(frozen=True)
class TextUses:
    """The texts of one side of a dataset and how many places of its rows hold each."""

    text_K: np.ndarray  # int64 text ids, rising
    count_K: np.ndarray  # int64

    @property
    def num_texts(self) -> int:
        return len(self.text_K)

    @property
    def num_uses(self) -> int:
        return int(self.count_K.sum())

    @property
    def share_repeated(self) -> float:
        """Share of uses that refer to a text which another use has already."""
        return 1 - self.num_texts / self.num_uses if self.num_uses else 0.0

    def class_shares(self) -> list[float]:
        """Of all uses, the share whose text is used as often as each of REPEAT_CLASSES says."""
        total = max(self.num_uses, 1)
        return [
            float(self.count_K[(self.count_K >= low) & (self.count_K <= (high or self.num_uses))].sum()) / total
            for low, high in REPEAT_CLASSES
        ]

    def most_used(self, count: int) -> list[tuple[int, int]]:
        """(text id, uses) of the texts with most uses, those used once left out; ties by id."""
        order = np.lexsort((self.text_K, -self.count_K))[:count]
        return [(int(self.text_K[k]), int(self.count_K[k])) for k in order if self.count_K[k] > 1]


@dataclass(frozen=True)
class DatasetTexts:
    """Uses of texts in one dataset, by side."""

    query: TextUses
    positive: TextUses
    negative: TextUses
    num_passages: int  # distinct texts among positives and negatives together
    num_responses: int  # distinct texts that a row can show as the response of an example


def use_stride(store: TokenStore) -> int:
    """n, where every n-th text is counted: 1 (all of them) up to MAX_USES uses."""
    total = sum(len(t.query_text_N) + len(t.pos_text) + len(t.neg_text) for t in store.datasets)
    return max(1, -(-total // MAX_USES))


def dataset_texts(table: DatasetTable, stride: int) -> DatasetTexts:
    """Count the uses of every stride-th text of a dataset."""
    query, positive, negative = (
        count_uses(ids, stride) for ids in (table.query_text_N, table.pos_text, table.neg_text)
    )
    responses = positive
    if table.task_type == "symmetric_clustering":
        responses = count_uses(table.category_text_N, stride)
    passages = np.union1d(positive.text_K, negative.text_K)
    return DatasetTexts(query, positive, negative, len(passages), responses.num_texts)


def count_uses(ids: np.ndarray, stride: int) -> TextUses:
    """Distinct ids and their counts, of those that `stride` divides; ids below 0 are no text."""
    kept = [block[(block >= 0) & (block % stride == 0)] for block in blocks(ids)]
    text_K, count_K = np.unique(np.concatenate([np.empty(0, np.int64), *kept]), return_counts=True)
    return TextUses(text_K, count_K.astype(np.int64))


def blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of a long array, read one after another."""
    for start in range(0, len(values), BLOCK):
        yield np.asarray(values[start : start + BLOCK])


def shared_texts(sides: Sequence[TextUses]) -> np.ndarray:
    """int64 [D, D]: texts that two datasets both have; on the diagonal all texts of one."""
    text, num_datasets = np.unique(np.concatenate([side.text_K for side in sides]), return_counts=True)
    several = text[num_datasets > 1]
    shared_DD = np.zeros((len(sides), len(sides)), dtype=np.int64)
    for block in blocks(several):
        member = np.stack([np.isin(block, side.text_K, assume_unique=True) for side in sides]).astype(np.float64)
        shared_DD += (member @ member.T).astype(np.int64)
    np.fill_diagonal(shared_DD, [side.num_texts for side in sides])
    return shared_DD
