"""One block of rows: searched, judged, drawn. A block is a file of arrays, complete or absent.

B rows of the block, K ranks, E positives of all its rows, G mined negatives of all its rows, M neighbours of all its
rows (ragged: `*_offsets` cut them).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.data.store import DatasetTable
from pipeline.files import write_atomic
from pipeline.mining.corpus import Copies, Queries, Relations
from pipeline.mining.options import MiningOptions, limit_below
from pipeline.mining.rules import KEPT, REASONS, RowTexts, draw_with_teacher, drawing_order, judge
from pipeline.mining.search import DenseIndex, Ranking, WordIndex

SHOWN_RANKS = (1, 10, 50, 100)  # whose scores the report shows

Index = DenseIndex | WordIndex
# (query, passage) text ids -> float32 [N], and bool [N]: longer than the teacher reads
Teacher = Callable[[Sequence[tuple[int, int]]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class MiningInput:
    """All that the rows of a dataset are mined from."""

    table: DatasetTable
    queries: Queries
    corpus_C: np.ndarray  # int64 text ids, rising
    passages: Index
    neighbours: Index | None  # queries among themselves; None: no neighbours asked for
    relations: Relations
    copies: Copies
    teacher: Teacher | None
    options: MiningOptions


@dataclass(frozen=True)
class MinedBlock:
    """What was found for rows start .. start + B - 1."""

    negative_offsets: np.ndarray  # int64, B + 1
    negative_text_G: np.ndarray  # int64 text ids, hardest first
    negative_score_G: np.ndarray  # float32
    positive_score_B: np.ndarray  # float32, the lowest of the row's positives
    positive_rank_B: np.ndarray  # int64, the best of the row's positives; 0: beyond the search
    rank_score_BR: np.ndarray  # float32, at SHOWN_RANKS; NaN where the ranking ends before
    num_candidates_B: np.ndarray  # int64, texts in the window
    removed_R: np.ndarray  # int64, candidates by REASONS
    teacher_counts: np.ndarray  # int64 [3], candidates that the teacher saw and removed; pairs that it cut
    nearest_offsets: np.ndarray  # int64, B + 1
    nearest_row_M: np.ndarray  # int64, row numbers, best first
    nearest_score_B: np.ndarray  # float32, of the best neighbour; NaN: none


def save_block(path: Path, block: MinedBlock) -> None:
    """Write a block, complete or absent."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **asdict(block))

    write_atomic(path, write)


def load_block(path: Path) -> MinedBlock:
    """Read a block."""
    with np.load(path) as arrays:
        return MinedBlock(**arrays)


def mine_block(source: MiningInput, start: int, stop: int) -> MinedBlock:
    """Mine negatives and neighbours for rows start .. stop - 1 of a dataset."""
    table, options, row_B = source.table, source.options, np.arange(start, stop)
    pair_offsets = table.pos_offsets[start : stop + 1] - table.pos_offsets[start]
    positive_E = table.pos_text[table.pos_offsets[start] : table.pos_offsets[stop]]
    place_E = np.searchsorted(source.corpus_C, positive_E)
    query_B = source.queries.query_N[start:stop]
    # One more than the depth: the query's own text, if the corpus holds it, takes no rank.
    depth = options.search_depth
    ranking, positive_score_E = source.passages.search(query_B, depth + 1, pair_offsets, place_E)
    ranking = _without_own(ranking, source.corpus_C, table.query_text_N[start:stop])
    positive_score_B = np.minimum.reduceat(positive_score_E, pair_offsets[:-1])
    kept, removed_R, num_candidates_B = _judge_rows(source, row_B, ranking, positive_score_B)
    chosen, teacher_counts = _draw(source, row_B, kept)
    negatives = [_hardest_first(texts, *kept[b]) for b, texts in enumerate(chosen)]
    nearest, nearest_score_B = _neighbours(source, row_B)
    return MinedBlock(
        negative_offsets=_offsets([len(texts) for texts, _ in negatives]),
        negative_text_G=np.concatenate([texts for texts, _ in negatives]),
        negative_score_G=np.concatenate([scores for _, scores in negatives]),
        positive_score_B=positive_score_B,
        positive_rank_B=_best_ranks(ranking, place_E, pair_offsets),
        rank_score_BR=_scores_at(ranking, SHOWN_RANKS),
        num_candidates_B=num_candidates_B,
        removed_R=removed_R,
        teacher_counts=teacher_counts,
        nearest_offsets=_offsets([len(rows) for rows in nearest]),
        nearest_row_M=np.concatenate(nearest),
        nearest_score_B=nearest_score_B,
    )


def _without_own(ranking: Ranking, corpus_C: np.ndarray, query_text_B: np.ndarray) -> Ranking:
    """The ranking, one shorter, without each query's own text."""
    is_own_BK = _text_of(corpus_C, ranking.place_BK) == query_text_B[:, None]
    order = np.argsort(is_own_BK, axis=1, kind="stable")[:, :-1]
    place_BK = np.take_along_axis(ranking.place_BK, order, axis=1)
    return Ranking(place_BK, np.take_along_axis(ranking.score_BK, order, axis=1))


def _text_of(corpus_C: np.ndarray, place: np.ndarray) -> np.ndarray:
    return np.where(place >= 0, corpus_C[place], -1)


Candidates = tuple[np.ndarray, np.ndarray]  # text ids, rising; scores


def _judge_rows(
    source: MiningInput, row_B: np.ndarray, ranking: Ranking, positive_score_B: np.ndarray
) -> tuple[list[Candidates], np.ndarray, np.ndarray]:
    """(kept candidates of each row, candidates removed by reason, candidates of each row)."""
    options = source.options
    window = slice(options.first_rank - 1, options.last_rank)
    text_BK = _text_of(source.corpus_C, ranking.place_BK[:, window])
    kept, removed_R = [], np.zeros(len(REASONS), dtype=np.int64)
    for b, row in enumerate(row_B.tolist()):
        text_K = text_BK[b][text_BK[b] >= 0]
        score_K = ranking.score_BK[b, window][: len(text_K)]
        reason_K = judge(
            _row_texts(source.table, row, options.keep_negatives),
            text_K,
            score_K,
            float(positive_score_B[b]),
            source.relations,
            source.copies,
            options,
        )
        removed_R += np.bincount(reason_K[reason_K != KEPT], minlength=len(REASONS))
        text_K, score_K = text_K[reason_K == KEPT], score_K[reason_K == KEPT]
        by_id = np.argsort(text_K)
        kept.append((text_K[by_id], score_K[by_id]))
    return kept, removed_R, (text_BK >= 0).sum(axis=1)


def _row_texts(table: DatasetTable, row: int, keep_negatives: bool) -> RowTexts:
    pos = slice(int(table.pos_offsets[row]), int(table.pos_offsets[row + 1]))
    neg = slice(int(table.neg_offsets[row]), int(table.neg_offsets[row + 1])) if keep_negatives else slice(0, 0)
    query, category = int(table.query_text_N[row]), int(table.category_text_N[row])
    return RowTexts(query, table.pos_text[pos], category, table.neg_text[neg])


def _draw(source: MiningInput, row_B: np.ndarray, kept: Sequence[Candidates]) -> tuple[list[np.ndarray], np.ndarray]:
    """(text ids of the chosen negatives of each row, `teacher_counts`)."""
    table, options = source.table, source.options
    order = [
        texts[drawing_order(row, table.name, len(texts), options.seed)]
        for row, (texts, _) in zip(row_B.tolist(), kept, strict=True)
    ]
    if source.teacher is None:
        return [texts[: options.num_negatives] for texts in order], np.zeros(3, dtype=np.int64)
    teacher, query_B, cuts = source.teacher, table.query_text_N[row_B], []

    def score(pairs: list[tuple[int, int]]) -> np.ndarray:
        scores_N, cut_N = teacher(pairs)
        cuts.append(int(cut_N.sum()))
        return scores_N

    offsets = table.pos_offsets[row_B[0] : row_B[-1] + 2]
    query_E = np.repeat(query_B, np.diff(offsets))
    positive_E = table.pos_text[offsets[0] : offsets[-1]]
    score_E = score(list(zip(query_E.tolist(), positive_E.tolist(), strict=True)))
    lowest_B = np.minimum.reduceat(score_E, offsets[:-1] - offsets[0])
    limit = [limit_below(score, options.teacher_ratio) for score in lowest_B.tolist()]
    chosen, seen, removed = draw_with_teacher(
        order, options.num_negatives, limit, lambda pairs: score([(int(query_B[b]), text) for b, text in pairs])
    )
    return chosen, np.array([seen, removed, sum(cuts)], dtype=np.int64)


def _hardest_first(chosen: np.ndarray, text_K: np.ndarray, score_K: np.ndarray) -> Candidates:
    """Chosen texts with their scores, by falling score, then rising id; `text_K` is rising."""
    chosen = np.sort(chosen)
    score = score_K[np.searchsorted(text_K, chosen)]
    order = np.argsort(-score, kind="stable")
    return chosen[order], score[order]


def _best_ranks(ranking: Ranking, place_E: np.ndarray, pair_offsets: np.ndarray) -> np.ndarray:
    """Rank of the best positive of each row, 0 if the search did not reach it: int64 [B]."""
    rank_B = np.zeros(len(pair_offsets) - 1, dtype=np.int64)
    for b, place_K in enumerate(ranking.place_BK):
        found = np.flatnonzero(np.isin(place_K, place_E[pair_offsets[b] : pair_offsets[b + 1]]))
        if len(found):
            rank_B[b] = found[0] + 1
    return rank_B


def _scores_at(ranking: Ranking, ranks: Sequence[int]) -> np.ndarray:
    column = ranking.score_BK[:, np.array(ranks) - 1]
    return np.where(np.isneginf(column), np.nan, column).astype(np.float32)


def _neighbours(source: MiningInput, row_B: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """(nearest rows of each row, best first; score of the best): other rows, with other query texts."""
    wanted, queries = source.options.num_nearest, source.queries
    best_B = np.full(len(row_B), np.nan, dtype=np.float32)
    if source.neighbours is None:
        return [np.empty(0, dtype=np.int64) for _ in row_B], best_B
    query_B, of_B = np.unique(queries.query_N[row_B], return_inverse=True)
    no_pairs = np.zeros(len(query_B) + 1, dtype=np.int64)
    # Every query stands for one row or more, so `wanted` of them are enough.
    ranking, _ = source.neighbours.search(query_B, wanted + queries.most_alike, no_pairs, np.empty(0, dtype=np.int64))
    nearest = []
    for b, of in enumerate(of_B.reshape(-1).tolist()):
        place_K = ranking.place_BK[of]
        other = (place_K >= 0) & (queries.text_Q[place_K] != queries.text_Q[query_B[of]])
        rows = [queries.rows_of(q) for q in place_K[other][:wanted].tolist()]
        nearest.append(np.concatenate([*rows, np.empty(0, dtype=np.int64)])[:wanted])
        if rows:
            best_B[b] = ranking.score_BK[of][other][0]
    return nearest, best_B


def _offsets(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
