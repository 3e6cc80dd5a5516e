"""Stage C of preprocessing: the rows of one dataset with texts as ids, in length buckets, as one table.

N rows of the dataset, H text uses (positives or negatives of all rows), U texts of the store.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.composing import Limits
from pipeline.data.pieces import KINDS
from pipeline.data.store import hashes_as_numpy, read_batch
from pipeline.data.tokenizing import PromptTokens
from pipeline.data.units import write_batches
from pipeline.datatypes import RULES

HISTOGRAM_EDGES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class TextIndex:
    """What stage C needs to know of every text: rows are resolved and measured without reading a text."""

    hash_U: np.ndarray  # S16, rising: the place is the text's id
    uncut_U: dict[str, np.ndarray]  # int32 per kind


@dataclass(frozen=True)
class Ragged:
    """values[offsets[n] : offsets[n + 1]] belong to row n."""

    offsets: np.ndarray
    values: np.ndarray
    scores: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Rows:
    """Rows of one dataset in the order of the raw file."""

    query_N: np.ndarray
    instruction_N: np.ndarray
    category_N: np.ndarray
    line_N: np.ndarray
    pos: Ragged
    neg: Ragged


@dataclass(frozen=True)
class Measures:
    """Token counts with all that goes around a text, within and before the limits."""

    tokens: PromptTokens
    limits: Limits
    uncut_U: dict[str, np.ndarray]
    instruction_lengths: np.ndarray  # int64, by instruction

    def query(self, text: np.ndarray, instruction: np.ndarray) -> np.ndarray:
        """Zero-shot query or wrapped passage, uncut."""
        around = len(self.tokens.bos) + len(self.tokens.query_end) + len(self.tokens.eos)
        return self.uncut_U["query"][text].astype(np.int64) + self.instruction_lengths[instruction] + around

    def passage(self, text: np.ndarray) -> np.ndarray:
        """Plain passage, uncut."""
        return self.uncut_U["passage"][text].astype(np.int64) + len(self.tokens.bos) + len(self.tokens.eos)


def load_text_index(shard_files: Sequence[Path]) -> TextIndex:
    """Hashes and lengths of all texts: 28 bytes a text."""
    batches = [read_batch(path) for path in shard_files]
    hashes = np.concatenate([hashes_as_numpy(batch.column("hash")) for batch in batches])
    uncut = {kind: np.concatenate([b.column(f"{kind}_uncut").to_numpy() for b in batches]) for kind in KINDS}
    return TextIndex(hashes, uncut)


def load_rows(
    unit_bases: Sequence[str], reports: Sequence[dict[str, Any]], index: TextIndex, instructions: dict[str, int]
) -> Rows:
    """The dataset's rows with text ids; new instructions are added to `instructions` in the order they appear."""
    parts: dict[str, list[np.ndarray]] = {}
    first_line = 0
    for base, report in zip(unit_bases, reports, strict=True):
        reader = pa.ipc.open_file(pa.memory_map(f"{base}.texts.arrow"))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        hashes = np.concatenate([hashes_as_numpy(batch.column("hash")) for batch in batches])
        ids = np.searchsorted(index.hash_U, hashes)
        assert np.array_equal(index.hash_U[ids], hashes), "every text of a unit is in a shard"
        ids = np.append(ids, -1)  # place -1: no text
        of = np.array([instructions.setdefault(text, len(instructions)) for text in report["instructions"]], np.int32)
        batch = read_batch(Path(f"{base}.rows.arrow"))
        columns = {
            "query": ids[batch.column("query").to_numpy()],
            "instruction": of[batch.column("instruction").to_numpy()] if batch.num_rows else np.empty(0, np.int32),
            "category": ids[batch.column("category").to_numpy()],
            "line": batch.column("line").to_numpy() + first_line,
        }
        for name in ("pos", "neg"):
            columns[f"{name}_count"] = np.diff(batch.column(name).offsets.to_numpy())
            columns[name] = ids[batch.column(name).values.to_numpy()]
            columns[f"{name}_score"] = batch.column(f"{name}_score").values.to_numpy()
        for name, values in columns.items():
            parts.setdefault(name, []).append(values)
        first_line += report["num_lines"]
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    pos, neg = (Ragged(_offsets(whole[f"{n}_count"]), whole[n], whole[f"{n}_score"]) for n in ("pos", "neg"))
    return Rows(whole["query"], whole["instruction"], whole["category"], whole["line"], pos, neg)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def length_keys(rows: Rows, task_type: str, measures: Measures, group_size: int) -> np.ndarray:
    """int32 [N]: zero-shot query + longest positive + expected negatives (their mean times how many are drawn)."""
    query = np.minimum(measures.query(rows.query_N, rows.instruction_N), measures.limits.max_query_tokens)
    pos_H, neg_H = (_passage_lengths(side, rows.instruction_N, task_type, measures)[1] for side in (rows.pos, rows.neg))
    longest = np.maximum.reduceat(pos_H, rows.pos.offsets[:-1])
    sums = _offsets(neg_H)[rows.neg.offsets]
    counts = rows.neg.counts
    drawn = np.minimum(counts, group_size - 1)
    expected = -(-np.diff(sums) * drawn // np.maximum(counts, 1))
    return (query + longest + expected).astype(np.int32)


def _passage_lengths(
    side: Ragged, instruction_N: np.ndarray, task_type: str, measures: Measures
) -> tuple[np.ndarray, np.ndarray]:
    """(uncut, cut) tokens of every positive or negative, int64 [H]."""
    if RULES[task_type].wrap_passages:
        uncut = measures.query(side.values, np.repeat(instruction_N, side.counts))
    else:
        uncut = measures.passage(side.values)
    return uncut, np.minimum(uncut, measures.limits.max_passage_tokens)


def count_uses(rows: Rows, task_type: str, measures: Measures) -> tuple[dict[str, int], dict[str, list[int]]]:
    """(counts, histograms) of a dataset: how texts are used, and what is cut in which use, by distinct texts."""
    limits, instruction = measures.limits, rows.instruction_N
    query = measures.query(rows.query_N, instruction)
    example_query = measures.uncut_U["query"][rows.query_N] + measures.instruction_lengths[instruction]
    response_text = rows.category_N if task_type == "symmetric_clustering" else rows.pos.values
    response_text = np.unique(response_text)
    uses = np.concatenate([rows.query_N, rows.pos.values, rows.neg.values])
    # A wrapped passage has another length with another instruction.
    sides = [(side, _passage_lengths(side, instruction, task_type, measures)[0]) for side in (rows.pos, rows.neg)]
    passage_text = np.concatenate([side.values for side, _ in sides])
    passage_length = np.concatenate([lengths for _, lengths in sides])
    query_cut = np.minimum(query, limits.max_query_tokens)
    passage_cut = np.minimum(passage_length, limits.max_passage_tokens)
    counts = {
        "rows": len(rows.query_N),
        "text_uses": len(uses),
        "distinct_texts": len(np.unique(uses)),
        "queries_cut": len(np.unique(rows.query_N[query > limits.max_query_tokens])),
        "passages_cut": len(np.unique(passage_text[passage_length > limits.max_passage_tokens])),
        "example_queries_cut": len(np.unique(rows.query_N[example_query > limits.max_example_query_tokens])),
        "example_responses_cut": int(
            np.sum(measures.uncut_U["response"][response_text] > limits.max_example_passage_tokens)
        ),
        "tokens": int(query_cut.sum() + passage_cut.sum()),
    }
    histograms = {"query": histogram(query_cut, HISTOGRAM_EDGES), "passage": histogram(passage_cut, HISTOGRAM_EDGES)}
    return counts, histograms


def histogram(lengths: np.ndarray, edges: Sequence[int]) -> list[int]:
    """How many lengths lie up to each edge (above the one before), and above the last."""
    return np.bincount(np.searchsorted(edges, lengths), minlength=len(edges) + 1).tolist()


def write_table(path: Path, rows: Rows, length_N: np.ndarray, edges: Sequence[int], scored: bool) -> tuple[int, ...]:
    """Write the rows, stable within each length bucket; returns the bucket offsets."""
    bucket_N = np.searchsorted(edges, length_N)
    order = np.argsort(bucket_N, kind="stable")
    columns = {
        "query_text": rows.query_N[order],
        "instruction": rows.instruction_N[order],
        "category_text": rows.category_N[order],
        "length": length_N[order],
        "source_line": rows.line_N[order],
    }
    arrays = {name: pa.array(values) for name, values in columns.items()}
    for name, side in (("pos", rows.pos), ("neg", rows.neg)):
        counts = side.counts[order]
        offsets = _offsets(counts)
        take = np.arange(offsets[-1]) + np.repeat(side.offsets[:-1][order] - offsets[:-1], counts)
        arrays[f"{name}_text"] = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(side.values[take]))
        if scored:
            arrays[f"{name}_score"] = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(side.scores[take]))
    batch = pa.RecordBatch.from_arrays(list(arrays.values()), list(arrays))
    write_batches(path, [batch], batch.schema)
    return tuple(_offsets(np.bincount(bucket_N, minlength=len(edges) + 1)).tolist())
