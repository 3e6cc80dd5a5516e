"""Which rows of a dataset are set aside for evaluation, so that training never sees a text of theirs.

Rows with the same query are one query. Two queries are linked where a text that stands as query or positive of one also
stands as query or positive of the other (`normalizing.text_key`); linked queries, over any number of steps, are a
group. A whole group is reserved where one fits; then nothing is lost. Where all groups are too large, single queries
with few links are reserved and what is linked to them is dropped.

Datasets take their turns: what shares a text with rows that an earlier one reserved is not reserved again. In the end
every dataset loses the rows that share a text with what the others reserved.

N rows, Q queries, K (query, text) pairs, G groups.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.data.normalizing import is_among
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
    dropped_N: np.ndarray  # they share a text with a reserved row of their own dataset
    dropped_for_others_N: np.ndarray  # ... of another dataset

    @property
    def train_N(self) -> np.ndarray:
        gone_N: np.ndarray = self.dev_N | self.example_N | self.dropped_N | self.dropped_for_others_N
        return ~gone_N


def find_links(table: DatasetTable, keys_U: np.ndarray) -> Links:
    """Queries and texts of a dataset; keys_U are the store's `store_keys`."""
    query_key_N = keys_U[table.query_text_N]
    _, query_N = np.unique(query_key_N, return_inverse=True)
    row_of_pos = np.repeat(np.arange(table.num_rows), np.diff(table.pos_offsets))
    query_K = np.concatenate([query_N, query_N[row_of_pos]])
    text_K = np.concatenate([query_key_N, keys_U[table.pos_text]])
    order = np.lexsort((text_K, query_K))
    query_K, text_K = query_K[order], text_K[order]
    first_K = np.ones(len(order), dtype=bool)
    first_K[1:] = (query_K[1:] != query_K[:-1]) | (text_K[1:] != text_K[:-1])
    return Links(query_N, int(query_N.max()) + 1 if len(query_N) else 0, query_K[first_K], text_K[first_K])


def reserve_all(
    names: Sequence[str], links: Sequence[Links], chosen: Collection[int], num_dev: int, num_examples: int, seed: int
) -> tuple[Reserved, ...]:
    """Reserve rows of the chosen datasets, one after the other, and drop from every dataset what shares a text.

    Args:
        names: of all datasets, for messages.
        links: of all datasets.
        chosen: indices of the datasets that rows are reserved from.

    Raises:
        ValueError: a dataset has too few queries, or less than MIN_TRAIN_SHARE of its rows would be left for training.
    """
    own: list[Reserved] = []
    texts = [np.empty(0, dtype=np.uint64)] * len(links)  # of the reserved rows of each dataset
    for i, name in enumerate(names):
        if i in chosen:
            own.append(reserve(name, links[i], num_dev, num_examples, seed, np.unique(np.concatenate(texts))))
            texts[i] = texts_of(links[i], own[i].dev_N | own[i].example_N)
        else:
            own.append(Reserved(*(np.zeros(len(links[i].query_N), dtype=bool) for _ in range(4))))
    found = []
    for i, name in enumerate(names):
        others = np.unique(np.concatenate([*texts[:i], *texts[i + 1 :], np.empty(0, dtype=np.uint64)]))
        shares_N = rows_with(links[i], others)
        assert not (shares_N & (own[i].dev_N | own[i].example_N)).any()
        found.append(replace(own[i], dropped_for_others_N=shares_N & ~own[i].dropped_N))
        _require_enough(name, found[i], num_dev, num_examples)
    return tuple(found)


def _require_enough(name: str, found: Reserved, num_dev: int, num_examples: int) -> None:
    left, whole = int(found.train_N.sum()), len(found.train_N)
    if left >= MIN_TRAIN_SHARE * whole:
        return
    gone = {
        "reserved": found.dev_N | found.example_N,
        "dropped because they share a query or positive with reserved rows of this dataset": found.dropped_N,
        "dropped because they share one with reserved rows of other datasets": found.dropped_for_others_N,
    }
    counted = "; ".join(f"{int(rows_N.sum()):,} rows {what}" for what, rows_N in gone.items() if rows_N.any())
    raise ValueError(
        f"--reserve-dev {num_dev} and --reserve-examples {num_examples} would leave {left:,} of {whole:,} rows of "
        f"dataset {name!r} for training, less than {MIN_TRAIN_SHARE:.0%}: {counted}; ask for fewer, reserve from "
        "other datasets with --dataset, or take this one out of the recipe"
    )


def reserve(name: str, links: Links, num_dev: int, num_examples: int, seed: int, taken: np.ndarray) -> Reserved:
    """Choose dev queries of one dataset, then examples among the queries that share no text with them.

    Args:
        name: of the dataset, for messages.
        num_dev: distinct queries; all rows of a chosen query are reserved.
        num_examples: distinct queries, linked neither to training rows nor to dev queries.
        seed: names the keyed permutation that the choice follows.
        taken: sorted uint64 keys of texts that other datasets reserved: no query with one of them is chosen.

    Raises:
        ValueError: the dataset has too few queries.
    """
    asked = f"--reserve-dev {num_dev} and --reserve-examples {num_examples} of dataset {name!r}"
    remedy = "ask for fewer, or name other datasets with --dataset"
    if num_dev + num_examples >= links.num_queries:
        raise ValueError(
            f"{asked}: that is {num_dev + num_examples:,} queries, the dataset has {links.num_queries:,} distinct "
            f"ones and training needs some; {remedy}"
        )
    rank_Q = permute(np.arange(links.num_queries), links.num_queries, mix_key(seed))
    free_Q = ~queries_with(links, taken)
    linked_Q = np.zeros(links.num_queries, dtype=bool)
    chosen = []
    for wanted, what in ((num_dev, "dev queries"), (num_examples, "examples")):
        if wanted > free_Q.sum():
            raise ValueError(
                f"{asked}: {what}: {wanted:,} wanted, but only {int(free_Q.sum()):,} of {links.num_queries:,} queries "
                f"share no text with what is reserved already, here or in another dataset; {remedy}"
            )
        chosen_Q = choose_queries(links, free_Q, wanted, rank_Q)
        linked_Q |= linked_to(links, chosen_Q)
        free_Q &= ~linked_Q
        chosen.append(chosen_Q)
    dev_N, example_N = (chosen_Q[links.query_N] for chosen_Q in chosen)
    dropped_N = linked_Q[links.query_N] & ~(dev_N | example_N)
    return Reserved(dev_N, example_N, dropped_N, np.zeros_like(dropped_N))


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
        for g in by_rank[size_G[by_rank] <= largest]:  # no list of them: there may be as many as rows
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
    """int [Q]: number of the group of each query, where only free queries link over shared texts."""
    here = free_Q[links.query_K]
    query_K, text_K = links.query_K[here], links.text_K[here]
    order = np.argsort(text_K, kind="stable")
    query_K, text_K = query_K[order], text_K[order]
    same = np.flatnonzero(text_K[1:] == text_K[:-1])
    edges = (np.ones(len(same), dtype=bool), (query_K[same], query_K[same + 1]))
    graph = coo_array(edges, shape=(links.num_queries, links.num_queries))
    group_Q: np.ndarray = connected_components(graph, directed=False)[1]
    return group_Q


def count_links(links: Links, free_Q: np.ndarray) -> np.ndarray:
    """int64 [Q]: other free queries at each text of a query, added up (one that shares two texts counts twice)."""
    here = free_Q[links.query_K]
    _, place, count = np.unique(links.text_K[here], return_inverse=True, return_counts=True)
    return np.bincount(links.query_K[here], weights=count[place] - 1, minlength=links.num_queries).astype(np.int64)


def linked_to(links: Links, chosen_Q: np.ndarray) -> np.ndarray:
    """bool [Q]: shares a text with a chosen query (which every chosen query does)."""
    return queries_with(links, np.unique(links.text_K[chosen_Q[links.query_K]]))


def queries_with(links: Links, texts: np.ndarray) -> np.ndarray:
    """bool [Q]: the query, in any of its rows, has one of these texts (sorted keys) as query or positive."""
    found_Q = np.zeros(links.num_queries, dtype=bool)
    found_Q[links.query_K[is_among(links.text_K, texts)]] = True
    return found_Q


def texts_of(links: Links, rows_N: np.ndarray) -> np.ndarray:
    """Sorted distinct uint64 keys of the queries and positives of these rows (bool [N])."""
    wanted_Q = np.zeros(links.num_queries, dtype=bool)
    wanted_Q[links.query_N[rows_N]] = True
    return np.unique(links.text_K[wanted_Q[links.query_K]])


def rows_with(links: Links, texts: np.ndarray) -> np.ndarray:
    """bool [N]: rows of the `queries_with` these texts."""
    return queries_with(links, texts)[links.query_N]
