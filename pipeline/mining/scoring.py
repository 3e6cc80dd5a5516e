"""Teacher scores for all rows of a token store's dataset, in blocks that survive a kill.

N rows, C candidates (all positives, then all negatives), I items that the teacher reads (distinct pairs or texts), D
width, G groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.derived import kept_rows
from pipeline.data.store import DatasetTable, TokenStore
from pipeline.data.teacher_groups import group_entropy, group_scores
from pipeline.datatypes import RULES
from pipeline.mining.block_store import Scored, fill_blocks
from pipeline.mining.folder import progress_bar
from pipeline.mining.models import PairModel, TextModel, embed_texts

COSINES_AT_ONCE = 8192
TEMPERATURES = (0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)  # of which loss.teacher_temperature may be one


@dataclass(frozen=True)
class Scores:
    """Scores of one dataset, parallel to the table's pos_text and neg_text, float32."""

    pos_score: np.ndarray
    neg_score: np.ndarray
    num_items: int  # distinct pairs (cross-encoder, reranker) or distinct texts (embedder) that the teacher read
    num_cut: int  # of them longer than the teacher's maximum length


def score_dataset(
    store: TokenStore,
    table: DatasetTable,
    relation: str,
    teacher: PairModel | TextModel,
    work: Path,
    bars: bool,
    block_items: int,
) -> Scores:
    """Score every (query, positive) and (query, negative) of a dataset.

    Args:
        relation: what a teacher that is a reranker is asked of the pairs.
        work: folder for finished blocks; blocks found there are not computed again.
        bars: show progress.
        block_items: pairs or texts of one block.

    Raises:
        ValueError: the teacher gives what is not finite.
    """
    num_pos_N, num_neg_N = np.diff(table.pos_offsets), np.diff(table.neg_offsets)
    row_C = np.concatenate([np.repeat(np.arange(table.num_rows), num_N) for num_N in (num_pos_N, num_neg_N)])
    passage_C = np.concatenate([table.pos_text, table.neg_text])
    if isinstance(teacher, PairModel):
        found = _score_pairs(store, table, relation, row_C, passage_C, teacher, work, bars, block_items)
    else:
        found = _score_cosines(store, table, row_C, passage_C, teacher, work, bars, block_items)
    score_C, num_items, num_cut = found
    split = len(table.pos_text)
    return Scores(score_C[:split], score_C[split:], num_items, num_cut)


def _score_pairs(
    store: TokenStore,
    table: DatasetTable,
    relation: str,
    row_C: np.ndarray,
    passage_C: np.ndarray,
    teacher: PairModel,
    work: Path,
    bars: bool,
    block_items: int,
) -> tuple[np.ndarray, int, int]:
    """float32 [C], distinct pairs, cut pairs: the teacher reads each distinct (query, passage) once."""
    key_I, item_C = np.unique(table.query_text_N[row_C] * store.num_texts + passage_C, return_inverse=True)

    def compute(part: slice) -> Scored:
        query_I, passage_I = (ids.tolist() for ids in np.divmod(key_I[part], store.num_texts))
        return teacher.score([store.text(i) for i in query_I], [store.text(i) for i in passage_I], relation)

    values = fill_blocks(work, len(key_I), compute, f"{table.name}: pairs", bars, block_items)
    return values.read(0, len(key_I))[item_C, 0], len(key_I), values.count_cut()


def _score_cosines(
    store: TokenStore,
    table: DatasetTable,
    row_C: np.ndarray,
    passage_C: np.ndarray,
    teacher: TextModel,
    work: Path,
    bars: bool,
    block_items: int,
) -> tuple[np.ndarray, int, int]:
    """float32 [C], distinct texts, cut texts: each is embedded once per form, whatever the number of its pairs.

    A text's form: 0 as a passage, i + 1 as a query with instruction i. Where training wraps passages like queries
    (symmetric types), so does this.
    """
    form_N = table.instruction_N.astype(np.int64) + 1 if teacher.uses_instruction else np.ones(table.num_rows, np.int64)
    passage_form_C = form_N[row_C] if RULES[table.task_type].wrap_passages else np.zeros(len(row_C), np.int64)
    query_key_N = form_N * store.num_texts + table.query_text_N
    passage_key_C = passage_form_C * store.num_texts + passage_C
    key_I = np.unique(np.concatenate([query_key_N, passage_key_C]))
    query_C, passage_C = np.searchsorted(key_I, query_key_N)[row_C], np.searchsorted(key_I, passage_key_C)

    def compute(part: slice) -> Scored:
        form_I, text_I = np.divmod(key_I[part], store.num_texts)
        return embed_texts(teacher, store, text_I, form_I)

    values = fill_blocks(work, len(key_I), compute, f"{table.name}: texts", bars, block_items)
    score_C = np.empty(len(row_C), dtype=np.float32)
    with progress_bar(len(row_C), f"{table.name}: cosines", "pair", bars) as bar:
        for start in range(0, len(row_C), COSINES_AT_ONCE):
            part = slice(start, min(start + COSINES_AT_ONCE, len(row_C)))
            score_C[part] = np.einsum("cd,cd->c", values.take(query_C[part]), values.take(passage_C[part]))
            bar.update(part.stop - part.start)
    return score_C, len(key_I), values.count_cut()


def scored_rows(store: TokenStore, table: DatasetTable, scores: Scores) -> Iterator[dict[str, Any]]:
    """All rows of the table in their order, in the raw form, with the teacher's scores in place of any they had."""
    for row, raw in enumerate(kept_rows(store, table, np.ones(table.num_rows, dtype=bool))):
        pos = scores.pos_score[table.pos_offsets[row] : table.pos_offsets[row + 1]]
        neg = scores.neg_score[table.neg_offsets[row] : table.neg_offsets[row + 1]]
        # Over str, a float32 keeps its short form: 0.1 instead of 0.10000000149011612.
        found = {"pos_scores": [float(str(v)) for v in pos], "neg_scores": [float(str(v)) for v in neg]}
        yield raw | found


# What the scores are like.


def describe(table: DatasetTable, scores: Scores) -> dict[str, Any]:
    """Counts and statistics of a dataset's scores, as scores.json keeps them.

    A row's group is its first positive and all its negatives; rows without negatives have none and are counted. The
    entropy is that of softmax(scores / temperature) as a share of log(group size): 0 is one-hot, 1 is uniform.
    """
    score_C = np.concatenate([scores.pos_score, scores.neg_score])
    with_negatives = np.flatnonzero(np.diff(table.neg_offsets))
    group_score_C, offsets = group_scores(table, scores.pos_score, scores.neg_score, with_negatives)
    found: dict[str, Any] = {
        "rows": table.num_rows,
        "rows_without_negatives": table.num_rows - len(with_negatives),
        "candidates": len(score_C),
        "scored": scores.num_items,
        "truncated": scores.num_cut,
        "min": float(score_C.min()) if len(score_C) else None,
        "mean": float(score_C.mean(dtype=np.float64)) if len(score_C) else None,
        "max": float(score_C.max()) if len(score_C) else None,
        "positive_first": None,
        "entropy": None,
    }
    if len(with_negatives):
        is_positive_C = np.zeros(len(group_score_C), dtype=bool)
        is_positive_C[offsets[:-1]] = True
        best_negative_G = np.maximum.reduceat(np.where(is_positive_C, -np.inf, group_score_C), offsets[:-1])
        found["positive_first"] = float((group_score_C[is_positive_C] > best_negative_G).mean())
        log_size_G = np.log(np.diff(offsets))
        found["entropy"] = {
            str(t): float((group_entropy(group_score_C, offsets, t) / log_size_G).mean()) for t in TEMPERATURES
        }
    return found
