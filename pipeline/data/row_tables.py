"""Stage C of preprocessing: rows that refer to texts by id, in length buckets, one table a dataset.

    measure_unit   the rows of one unit with text ids and lengths, sorted by bucket
    join_units     the rows of a dataset's units, one unit after the other inside each bucket: the table

Neither holds more than the rows of one unit, and one byte a text of the store.

N rows, H text uses (positives or negatives of all rows), U distinct texts: all of one unit.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.columns import open_columns, write_columns
from pipeline.data.composing import Limits
from pipeline.data.pieces import KINDS
from pipeline.data.store import hashes_as_numpy, read_batch
from pipeline.data.tokenizing import PromptTokens
from pipeline.datatypes import RULES
from pipeline.files import file_sha256, write_text

HISTOGRAM_EDGES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

# What a dataset does with a text: bits of one byte.
_USED, _QUERY_CUT, _PASSAGE_CUT, _EXAMPLE_QUERY_CUT, _EXAMPLE_RESPONSE_CUT = (1 << i for i in range(5))
_COUNTED = {
    "distinct_texts": _USED,
    "queries_cut": _QUERY_CUT,
    "passages_cut": _PASSAGE_CUT,
    "example_queries_cut": _EXAMPLE_QUERY_CUT,
    "example_responses_cut": _EXAMPLE_RESPONSE_CUT,
}


@dataclass(frozen=True)
class TextShards:
    """Stage B's files: text ids count through them in order."""

    files: tuple[str, ...]
    starts: tuple[int, ...]  # first text id of each file, and the number of texts


@dataclass(frozen=True)
class Ragged:
    """values[offsets[n] : offsets[n + 1]] belong to row n."""

    offsets: np.ndarray
    values: np.ndarray
    scores: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Rows:
    """Rows of one unit in the order of the raw file; texts by place in the unit, -1: none."""

    query_N: np.ndarray
    instruction_N: np.ndarray
    category_N: np.ndarray
    line_N: np.ndarray
    pos: Ragged
    neg: Ragged
    nearest: Ragged | None  # lines of the raw file; None: no row of the dataset names any


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


@dataclass(frozen=True)
class MeasureTask:
    """What one process needs to measure one unit."""

    unit: str  # path of its files without their endings
    target: str  # the same of the files written
    first_line: int  # lines of the source before the unit
    instructions: tuple[int, ...]  # the unit's instructions as ids of the store
    task_type: str
    group_size: int
    shards: TextShards
    edges: tuple[int, ...]
    tokens: PromptTokens
    limits: Limits
    instruction_lengths: tuple[int, ...]  # by id of the store
    with_nearest: bool  # whether any row of the dataset names its nearest rows


def measure_unit(task: MeasureTask) -> dict[str, Any]:
    """Write the unit's rows sorted by bucket (stable), then its report; returns the report."""
    id_U, uncut_U = _locate_texts(task.unit, task.shards)
    rows = _read_rows(task)
    measures = Measures(task.tokens, task.limits, uncut_U, np.array(task.instruction_lengths, dtype=np.int64))
    length_N = length_keys(rows, task.task_type, measures, task.group_size)
    counts, histograms, flags_U = count_uses(rows, task.task_type, measures)
    histograms["row"] = histogram(length_N, HISTOGRAM_EDGES)
    bucket_N = np.searchsorted(task.edges, length_N)
    order = np.argsort(bucket_N, kind="stable")
    num_buckets = len(task.edges) + 1
    id_U = np.append(id_U, -1)  # place -1: no text
    columns = {
        "query_text": id_U[rows.query_N[order]],
        "instruction": rows.instruction_N[order],
        "category_text": id_U[rows.category_N[order]],
        "length": length_N[order],
        "source_line": rows.line_N[order],
        "text": id_U[:-1],
        "flags": flags_U,
    }
    report = {"counts": counts, "histograms": histograms, "rows": np.bincount(bucket_N, minlength=num_buckets).tolist()}
    for name, side in (("pos", rows.pos), ("neg", rows.neg), ("nearest", rows.nearest)):
        if side is None:
            continue
        count_N = side.counts[order]
        offsets = _offsets(count_N)
        take = np.arange(offsets[-1]) + np.repeat(side.offsets[:-1][order] - offsets[:-1], count_N)
        columns[f"{name}_count"] = count_N
        if side.scores is None:
            columns[f"{name}_line"] = side.values[take]
        else:
            columns[f"{name}_text"] = id_U[side.values[take]]
            columns[f"{name}_score"] = side.scores[take]
        report[name] = np.diff(offsets[_offsets(np.array(report["rows"]))]).tolist()
    shapes = {name: (values.dtype.name, len(values)) for name, values in columns.items()}
    write_columns(Path(f"{task.target}.rows"), shapes, ((name, 0, values) for name, values in columns.items()))
    write_text(Path(f"{task.target}.json"), json.dumps(report))
    return report


def _locate_texts(unit: str, shards: TextShards) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Text id and token counts per kind of the unit's texts; only one shard is open at a time."""
    reader = pa.ipc.open_file(pa.memory_map(f"{unit}.texts.arrow"))
    ids, uncut = [np.empty(0, dtype=np.int64)], {kind: [np.empty(0, dtype=np.int32)] for kind in KINDS}
    for partition in range(reader.num_record_batches):
        hashes = hashes_as_numpy(reader.get_batch(partition).column("hash"))
        if len(hashes) == 0:
            continue
        shard = read_batch(Path(shards.files[partition]))
        known = hashes_as_numpy(shard.column("hash"))
        place = np.searchsorted(known, hashes)
        assert np.array_equal(known[place], hashes), "every text of a unit is in a shard"
        ids.append(shards.starts[partition] + place)
        for kind in KINDS:
            uncut[kind].append(shard.column(f"{kind}_uncut").to_numpy()[place])
    return np.concatenate(ids), {kind: np.concatenate(parts) for kind, parts in uncut.items()}


def _read_rows(task: MeasureTask) -> Rows:
    batch = read_batch(Path(f"{task.unit}.rows.arrow"))
    instruction = np.array(task.instructions, dtype=np.int32)

    nearest = batch.column("nearest")

    def ragged(name: str) -> Ragged:
        column = batch.column(name)
        scores = batch.column(f"{name}_score").values.to_numpy()
        return Ragged(column.offsets.to_numpy(), column.values.to_numpy(), scores)

    return Rows(
        query_N=batch.column("query").to_numpy(),
        instruction_N=instruction[batch.column("instruction").to_numpy()] if batch.num_rows else instruction[:0],
        category_N=batch.column("category").to_numpy(),
        line_N=batch.column("line").to_numpy() + task.first_line,
        pos=ragged("pos"),
        neg=ragged("neg"),
        nearest=Ragged(nearest.offsets.to_numpy(), nearest.values.to_numpy()) if task.with_nearest else None,
    )


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def length_keys(rows: Rows, task_type: str, measures: Measures, group_size: int) -> np.ndarray:
    """int32 [N]: zero-shot query + longest positive + expected negatives (their mean times how many are drawn)."""
    query = np.minimum(measures.query(rows.query_N, rows.instruction_N), measures.limits.max_query_tokens)
    pos_H, neg_H = (_passage_lengths(side, rows.instruction_N, task_type, measures)[1] for side in (rows.pos, rows.neg))
    longest = np.maximum.reduceat(pos_H, rows.pos.offsets[:-1]) if len(query) else query
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


def count_uses(
    rows: Rows, task_type: str, measures: Measures
) -> tuple[dict[str, int], dict[str, list[int]], np.ndarray]:
    """How the unit uses texts: (counts of uses, histograms of cut lengths, uint8 [U] what happens to which text)."""
    limits, instruction = measures.limits, rows.instruction_N
    query = measures.query(rows.query_N, instruction)
    example_query = measures.uncut_U["query"][rows.query_N] + measures.instruction_lengths[instruction]
    response_text = rows.category_N if task_type == "symmetric_clustering" else rows.pos.values
    flags_U = np.zeros(len(measures.uncut_U["query"]), dtype=np.uint8)
    flags_U[rows.query_N] |= _USED
    flags_U[rows.query_N[query > limits.max_query_tokens]] |= _QUERY_CUT
    flags_U[rows.query_N[example_query > limits.max_example_query_tokens]] |= _EXAMPLE_QUERY_CUT
    responses_cut = measures.uncut_U["response"][response_text] > limits.max_example_passage_tokens
    flags_U[response_text[responses_cut]] |= _EXAMPLE_RESPONSE_CUT
    query_cut = np.minimum(query, limits.max_query_tokens)
    tokens, passage_histogram = int(query_cut.sum()), np.zeros(len(HISTOGRAM_EDGES) + 1, dtype=np.int64)
    for side in (rows.pos, rows.neg):
        uncut, cut = _passage_lengths(side, instruction, task_type, measures)
        flags_U[side.values] |= _USED
        flags_U[side.values[uncut > limits.max_passage_tokens]] |= _PASSAGE_CUT
        tokens += int(cut.sum())
        passage_histogram += histogram(cut, HISTOGRAM_EDGES)
    num_uses = len(rows.query_N) + len(rows.pos.values) + len(rows.neg.values)
    counts = {"rows": len(rows.query_N), "text_uses": num_uses, "tokens": tokens}
    histograms = {"query": histogram(query_cut, HISTOGRAM_EDGES), "passage": passage_histogram.tolist()}
    return counts, histograms, flags_U


def histogram(lengths: np.ndarray, edges: Sequence[int]) -> list[int]:
    """How many lengths lie up to each edge (above the one before), and above the last."""
    return np.bincount(np.searchsorted(edges, lengths), minlength=len(edges) + 1).tolist()


@dataclass(frozen=True)
class JoinTask:
    """What one process needs to write the table of one dataset."""

    units: tuple[str, ...]  # what measure_unit wrote, without endings, in the order of the source
    target: str
    report: str  # written last: the table is done
    num_texts: int  # of the store
    scored: bool  # whether any row of the dataset has teacher scores
    with_nearest: bool
    num_lines: int  # of the source


def join_units(task: JoinTask) -> dict[str, Any]:
    """Write the table of one dataset, then its report; returns the report."""
    reports = [json.loads(Path(f"{unit}.json").read_text(encoding="utf-8")) for unit in task.units]
    # [unit, bucket]: where the unit's rows, positives and negatives of a bucket begin in the table.
    parts = ("rows", "pos", "neg", "nearest") if task.with_nearest else ("rows", "pos", "neg")
    starts = {name: _starts(np.array([report[name] for report in reports])) for name in parts}
    totals = {name: int(np.sum([report[name] for report in reports])) for name in starts}
    columns = {
        "query_text": ("int64", totals["rows"]),
        "category_text": ("int64", totals["rows"]),
        "source_line": ("int64", totals["rows"]),
        "instruction": ("int32", totals["rows"]),
        "length": ("int32", totals["rows"]),
    }
    for name in ("pos", "neg"):
        columns |= {f"{name}_offsets": ("int64", totals["rows"] + 1), f"{name}_text": ("int64", totals[name])}
        if task.scored:
            columns[f"{name}_score"] = ("float32", totals[name])
    if task.with_nearest:
        columns |= {"nearest_offsets": ("int64", totals["rows"] + 1), "nearest_row": ("int64", totals["nearest"])}
    flags = np.zeros(task.num_texts, dtype=np.uint8)
    # Neighbours are named by line, and where a line went is known when all units are written.
    row_of_line = np.full(task.num_lines + 1 if task.with_nearest else 0, -1, dtype=np.int64)

    def pieces() -> Iterator[tuple[str, int, np.ndarray]]:
        for name in parts[1:]:
            yield f"{name}_offsets", totals["rows"], np.array([totals[name]])
        for unit, base in enumerate(task.units):
            found = open_columns(Path(f"{base}.rows"))
            flags[found["text"]] |= found["flags"]
            place = {name: starts[name][unit].tolist() for name in starts}
            for column, start, values in _unit_pieces(found, reports[unit], place, columns):
                yield column, start, values
                if column == "source_line" and task.with_nearest:
                    row_of_line[values] = np.arange(start, start + len(values))
        if task.with_nearest:
            for unit, base in enumerate(task.units):
                line = open_columns(Path(f"{base}.rows"))["nearest_line"]
                edges = _offsets(np.array(reports[unit]["nearest"])).tolist()
                for start, (a, b) in zip(starts["nearest"][unit].tolist(), pairwise(edges), strict=True):
                    yield "nearest_row", start, _rows_of_lines(row_of_line, line[a:b])

    target = Path(task.target)
    write_columns(target, columns, pieces())
    bucket_rows = np.sum([report["rows"] for report in reports], axis=0)
    counts = dict(sum((Counter(report["counts"]) for report in reports), Counter[str]()))
    counts |= {name: int(np.count_nonzero(flags & bit)) for name, bit in _COUNTED.items()}
    names = reports[0]["histograms"]
    report = {
        "num_rows": totals["rows"],
        "num_bytes": target.stat().st_size,
        "sha256": file_sha256(target),
        "counts": counts,
        "histograms": {name: np.sum([r["histograms"][name] for r in reports], axis=0).tolist() for name in names},
        "bucket_offsets": _offsets(bucket_rows).tolist(),
    }
    write_text(Path(task.report), json.dumps(report))
    return report


def _rows_of_lines(row_of_line: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Rows of the table that these lines became; ValueError for a line that became none."""
    there = line < len(row_of_line)
    rows = np.where(there, row_of_line[np.where(there, line, 0)], -1)
    if (rows < 0).any():
        raise ValueError(
            f"`nearest` names line {int(line[np.argmax(rows < 0)])} of its file, which is no row of the store; lines "
            "have moved since mining wrote them: mine again"
        )
    return rows


def _starts(count: np.ndarray) -> np.ndarray:
    """Where the part of each [unit, bucket] begins: bucket after bucket, and inside a bucket unit after unit."""
    by_bucket = count.T.reshape(-1)
    return (np.cumsum(by_bucket) - by_bucket).reshape(count.shape[::-1]).T


def _unit_pieces(
    found: dict[str, np.ndarray], report: dict[str, Any], place: dict[str, list[int]], columns: dict[str, Any]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """What one unit gives to each column, bucket by bucket; `place`: where its part of each bucket begins."""
    edges = {name: _offsets(np.array(report[name])).tolist() for name in place}
    for j, (a, b) in enumerate(pairwise(edges["rows"])):
        if a == b:
            continue
        for name in ("query_text", "category_text", "source_line", "instruction", "length"):
            yield name, place["rows"][j], found[name][a:b]
        for name in [name for name in place if name != "rows"]:
            part = slice(edges[name][j], edges[name][j + 1])
            yield f"{name}_offsets", place["rows"][j], place[name][j] + _offsets(found[f"{name}_count"][a:b])[:-1]
            for column in (f"{name}_text", f"{name}_score"):
                if column in columns:
                    yield column, place[name][j], found[column][part]
