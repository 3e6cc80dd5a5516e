"""Rows of a store back in the raw form: what tools that add to rows (negatives, scores) write."""

from typing import Any

import numpy as np

from pipeline.data.store import DatasetTable, TokenStore


def raw_row(store: TokenStore, table: DatasetTable, row: int) -> dict[str, Any]:
    """Row number `row` of a dataset in FlagEmbedding's form, with whole texts (as read: stripped, not cut).

    Every row names its type, and its instruction as `prompt` if it has one, so a file of them needs no settings.
    """
    pos = slice(int(table.pos_offsets[row]), int(table.pos_offsets[row + 1]))
    neg = slice(int(table.neg_offsets[row]), int(table.neg_offsets[row + 1]))
    raw: dict[str, Any] = {
        "query": store.text(int(table.query_text_N[row])),
        "pos": [store.text(i) for i in table.pos_text[pos].tolist()],
        "neg": [store.text(i) for i in table.neg_text[neg].tolist()],
        "type": table.task_type,
    }
    if table.pos_score is not None and table.neg_score is not None and not np.isnan(table.pos_score[pos]).any():
        raw["pos_scores"] = table.pos_score[pos].tolist()
        raw["neg_scores"] = table.neg_score[neg].tolist()
    if instruction := store.instructions[int(table.instruction_N[row])]:
        raw["prompt"] = instruction
    if (category := int(table.category_text_N[row])) >= 0:
        raw["category"] = store.text(category)
    return raw
