"""Reserved rows as a retrieval task in the form that the evaluation reads (BEIR's): what a company's own data lacks.

N rows, P passages.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.derived import write_rows
from pipeline.data.store import DatasetTable, TokenStore
from pipeline.files import write_text


@dataclass(frozen=True)
class FolderCounts:
    """What an evaluation folder holds, and what was left out of it."""

    queries: int
    passages: int
    judgements: int
    examples: int
    passages_like_queries: int  # left out of the corpus: the text of a dev query, which would find itself
    other_instructions: int  # dev rows whose own instruction is not the task's


def write_eval_folder(
    folder: Path, store: TokenStore, table: DatasetTable, keys_U: np.ndarray, dev_N: np.ndarray, example_N: np.ndarray
) -> FolderCounts:
    """Write task.json, corpus.jsonl, queries.jsonl, qrels/test.tsv and examples.jsonl.

    Args:
        keys_U: `store_keys` of the store; texts of equal keys are one query, or one passage.
        dev_N: bool [N], rows that become test queries with their positives as the relevant passages.
        example_N: bool [N], rows that become in-context examples: (query, first positive).
    """
    dev_rows = np.flatnonzero(dev_N)
    positives = {n: table.pos_text[table.pos_offsets[n] : table.pos_offsets[n + 1]] for n in dev_rows.tolist()}
    query_ids: dict[int, str] = {}
    query_lines, relevant = [], dict[tuple[str, int], None]()
    for n in dev_rows.tolist():
        text = int(table.query_text_N[n])
        key = int(keys_U[text])
        if key not in query_ids:
            query_ids[key] = f"q{len(query_ids)}"
            query_lines.append({"_id": query_ids[key], "text": store.text(text)})
        relevant |= {(query_ids[key], int(keys_U[i])): None for i in positives[n].tolist()}
    text_P, like_queries = _corpus(table, keys_U, set(query_ids), {key for _, key in relevant})
    passage_ids = {int(keys_U[text]): f"d{i}" for i, text in enumerate(text_P.tolist())}
    qrels = [f"{query}\t{passage_ids[key]}\t1\n" for query, key in relevant]
    examples = _examples(store, table, keys_U, example_N)
    instruction, others = _instruction(store, table, dev_rows)
    task = {"name": table.name, "type": "retrieval", "instruction": instruction, "metric": "ndcg_at_10"}

    (folder / "qrels").mkdir(parents=True)
    corpus = ({"_id": f"d{i}", "title": "", "text": store.text(text)} for i, text in enumerate(text_P.tolist()))
    write_rows(folder / "corpus.jsonl", corpus)
    write_rows(folder / "queries.jsonl", query_lines)
    write_text(folder / "qrels/test.tsv", "query-id\tcorpus-id\tscore\n" + "".join(qrels))
    write_rows(folder / "examples.jsonl", examples)
    write_text(folder / "task.json", json.dumps(task, indent=1, ensure_ascii=False) + "\n")
    return FolderCounts(len(query_ids), len(text_P), len(qrels), len(examples), like_queries, others)


def _corpus(
    table: DatasetTable, keys_U: np.ndarray, query_keys: set[int], relevant_keys: set[int]
) -> tuple[np.ndarray, int]:
    """int64 [P] text ids of the dataset's distinct passages, and how many were left out for being a dev query."""
    text_P = np.unique(np.concatenate([table.pos_text, table.neg_text]))
    _, first = np.unique(keys_U[text_P], return_index=True)
    text_P = text_P[np.sort(first)]
    alone = np.array(sorted(query_keys - relevant_keys), dtype=np.uint64)
    is_query_P = np.isin(keys_U[text_P], alone)
    return text_P[~is_query_P], int(is_query_P.sum())


def _examples(
    store: TokenStore, table: DatasetTable, keys_U: np.ndarray, example_N: np.ndarray
) -> list[dict[str, str]]:
    """One example a distinct query, in the order of their hashes: in the order of rows, the first k would be short."""
    found: dict[int, dict[str, str]] = {}
    for n in np.flatnonzero(example_N).tolist():
        text, positive = int(table.query_text_N[n]), int(table.pos_text[table.pos_offsets[n]])
        found.setdefault(int(keys_U[text]), {"query": store.text(text), "response": store.text(positive)})
    return [found[key] for key in sorted(found)]


def _instruction(store: TokenStore, table: DatasetTable, dev_rows: np.ndarray) -> tuple[str, int]:
    """The most frequent instruction of the dev rows, and how many rows have another one."""
    counts = Counter(table.instruction_N[dev_rows].tolist())
    index, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return store.instructions[index], len(dev_rows) - count
