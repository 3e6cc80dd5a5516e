"""Which rows of a dataset are set aside for evaluation, so that training never sees a text of theirs.

Rows with the same query are one query. Two queries are linked where a text that stands as query or positive of one also
stands as query or positive of the other (`normalizing.text_key`); linked queries, over any number of steps, are a
group. A whole group is reserved where one fits; then nothing is lost. Where all groups are too large, single queries
with few links are reserved and what is linked to them is dropped.

N rows, Q queries, K (query, text) pairs, G groups.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.data.permutation import mix_key, permute
from pipeline.data.store import DatasetTable

SMALL_GROUP = 10  # first come groups of at most one tenth of what is wanted: an evaluation set needs variety
MIN_TRAIN_SHARE = 0.5


@dataclass(frozen=True)
class Links:
    """Queries of a dataset and the texts that stand as query or positive in their rows."""

    query_N: np.ndarray  # int64, the query of each row, 0 .. num_queries - 1
    num_queries: int
    query_K: np.ndarray  # int64, sorted
    text_K: np.ndarray  # uint64 keys; (query, text) pairs are distinct


@dataclass(frozen=True)
class Reserved:
    """Rows by what becomes of them, bool [N] each, none in two."""

    dev_N: np.ndarray
    example_N: np.ndarray
    dropped_N: np.ndarray  # they share a text with a row that is reserved


def find_links(table: DatasetTable, keys_U: np.ndarray) -> Links:
    """Queries and texts of a dataset; keys_U are the store's `store_keys`."""
    query_key_N = keys_U[table.query_text_N]
    _, query_N = np.unique(query_key_N, return_inverse=True)
    row_of_pos = np.repeat(np.arange(table.num_rows), np.diff(table.pos_offsets))
    pairs = np.empty(table.num_rows + len(row_of_pos), dtype=[("query", np.int64), ("text", np.uint64)])
    pairs["query"] = np.concatenate([query_N, query_N[row_of_pos]])
    pairs["text"] = np.concatenate([query_key_N, keys_U[table.pos_text]])
    pairs = np.unique(pairs)
    return Links(query_N, int(query_N.max()) + 1 if len(query_N) else 0, pairs["query"], pairs["text"])


def reserve(name: str, links: Links, num_dev: int, num_examples: int, seed: int) -> Reserved:
    """Choose dev queries, then examples among the queries that share no text with them.

    Args:
        name: of the dataset, for messages.
        num_dev: distinct queries; all rows of a chosen query are reserved.
        num_examples: distinct queries, linked neither to training rows nor to dev queries.
        seed: names the keyed permutation that the choice follows.

    Raises:
        ValueError: the dataset has too few queries, or too little of it would be left for training.
    """
    asked = f"--reserve-dev {num_dev} and --reserve-examples {num_examples} of dataset {name!r}"
    remedy = "ask for fewer, or leave this dataset out with --dataset"
    if num_dev + num_examples >= links.num_queries:
        raise ValueError(
            f"{asked}: that is {num_dev + num_examples:,} queries, the dataset has {links.num_queries:,} distinct "
            f"ones and training needs some; {remedy}"
        )
    rank_Q = permute(np.arange(links.num_queries), links.num_queries, mix_key(seed))
    free_Q = np.ones(links.num_queries, dtype=bool)
    chosen = []
    for wanted, what in ((num_dev, "dev queries"), (num_examples, "examples")):
        if wanted > free_Q.sum():
            raise ValueError(
                f"{asked}: {what}: {wanted:,} wanted, but only {int(free_Q.sum()):,} queries share no text with the "
                f"dev queries; {remedy}"
            )
        chosen_Q = choose_queries(links, free_Q, wanted, rank_Q)
        free_Q &= ~chosen_Q & ~linked_to(links, chosen_Q)
        chosen.append(chosen_Q)
    dev_N, example_N = (chosen_Q[links.query_N] for chosen_Q in chosen)
    dropped_N = ~(dev_N | example_N | free_Q[links.query_N])
    left = int(free_Q[links.query_N].sum())
    if left < MIN_TRAIN_SHARE * len(dev_N):
        raise ValueError(
            f"{asked}: {int(dev_N.sum()):,} + {int(example_N.sum()):,} rows would be reserved and "
            f"{int(dropped_N.sum()):,} more dropped, because they share a query or positive with those; that leaves "
            f"{left:,} of {len(dev_N):,} rows for training; {remedy}"
        )
    return Reserved(dev_N, example_N, dropped_N)


def choose_queries(links: Links, free_Q: np.ndarray, wanted: int, rank_Q: np.ndarray) -> np.ndarray:
    """`wanted` of the free queries, bool [Q]: whole groups in the order of their first rank, then single queries."""
    chosen_Q = np.zeros(links.num_queries, dtype=bool)
    group_Q = group_of(links, free_Q)
    ordered = np.argsort(np.where(free_Q, rank_Q, np.iinfo(np.int64).max), kind="stable")[: int(free_Q.sum())]
    group_G, first_G, size_G = np.unique(group_Q[ordered], return_index=True, return_counts=True)
    by_rank = np.argsort(first_G, kind="stable")
    left = wanted
    for largest in (max(1, wanted // SMALL_GROUP), wanted):
        taken = []
        for g in by_rank[size_G[by_rank] <= largest].tolist():
            if left == 0:
                break
            if size_G[g] <= left:
                taken.append(group_G[g])
                left -= int(size_G[g])
        chosen_Q |= free_Q & np.isin(group_Q, taken)
        by_rank = by_rank[~np.isin(group_G[by_rank], taken)]
    if left:
        rest = ordered[~chosen_Q[ordered]]
        num_links_Q = count_links(links, free_Q)
        chosen_Q[rest[np.argsort(num_links_Q[rest], kind="stable")[:left]]] = True
    return chosen_Q


def group_of(links: Links, free_Q: np.ndarray) -> np.ndarray:
    """int64 [Q]: number of the group of each query, where only free queries link; union-find over shared texts."""
    parent = list(range(links.num_queries))

    def root(query: int) -> int:
        while parent[query] != query:
            parent[query] = parent[parent[query]]
            query = parent[query]
        return query

    here = free_Q[links.query_K]
    query_K, text_K = links.query_K[here], links.text_K[here]
    order = np.argsort(text_K, kind="stable")
    query_K, text_K = query_K[order], text_K[order]
    same = np.flatnonzero(text_K[1:] == text_K[:-1])
    for a, b in zip(query_K[same].tolist(), query_K[same + 1].tolist(), strict=True):
        parent[root(a)] = root(b)
    return np.array([root(query) for query in range(links.num_queries)], dtype=np.int64)


def count_links(links: Links, free_Q: np.ndarray) -> np.ndarray:
    """int64 [Q]: other free queries at each text of a query, added up (one that shares two texts counts twice)."""
    here = free_Q[links.query_K]
    _, place, count = np.unique(links.text_K[here], return_inverse=True, return_counts=True)
    return np.bincount(links.query_K[here], weights=count[place] - 1, minlength=links.num_queries).astype(np.int64)


def linked_to(links: Links, chosen_Q: np.ndarray) -> np.ndarray:
    """bool [Q]: shares a text with a chosen query (which every chosen query does)."""
    chosen_texts = np.unique(links.text_K[chosen_Q[links.query_K]])
    linked_Q = np.zeros(links.num_queries, dtype=bool)
    linked_Q[links.query_K[np.isin(links.text_K, chosen_texts)]] = True
    return linked_Q


def texts_of(links: Links, rows_N: np.ndarray) -> np.ndarray:
    """Distinct uint64 keys of the queries and positives of these rows (bool [N])."""
    wanted_Q = np.zeros(links.num_queries, dtype=bool)
    wanted_Q[links.query_N[rows_N]] = True
    return np.unique(links.text_K[wanted_Q[links.query_K]])


def rows_with(links: Links, texts: np.ndarray) -> np.ndarray:
    """bool [N]: the row's query, in any of its rows, has one of these texts as query or positive."""
    found_Q = np.zeros(links.num_queries, dtype=bool)
    found_Q[links.query_K[np.isin(links.text_K, texts)]] = True
    return found_Q[links.query_N]
