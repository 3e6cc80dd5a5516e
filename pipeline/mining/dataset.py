"""One dataset from the store to rows with mined negatives: embed, search, judge, write. Each stage can be resumed."""

import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.derived import rows_file, write_rows
from pipeline.data.raw_rows import raw_row
from pipeline.data.store import DatasetTable, TokenStore
from pipeline.datatypes import RULES
from pipeline.files import safe_name, write_text
from pipeline.mining.block_store import Scored, StoredBlocks, fill_blocks
from pipeline.mining.blocks import Index, MinedBlock, MiningInput, load_block, mine_block, save_block
from pipeline.mining.corpus import Queries, corpus_texts, distinct_queries, find_copies, relate
from pipeline.mining.folder import progress_bar
from pipeline.mining.models import Judge, TextModel, embed_texts
from pipeline.mining.options import BM25, MiningOptions
from pipeline.mining.report import Report, dataset_report, plot_scores
from pipeline.mining.search import DenseIndex, index_words

log = logging.getLogger(__name__)

BLOCK_ROWS = 16384


@dataclass(frozen=True)
class MiningRun:
    """What all datasets of a run share. The loaders are called only where something is left to do."""

    store: TokenStore
    out: Path
    options: MiningOptions
    embedder: str
    wraps_passages: bool  # passages of types that are wrapped in training are encoded as queries are
    load_encoder: Callable[[], TextModel]
    load_teacher: Callable[[], Judge] | None
    shard_texts: int
    bars: bool
    block_rows: int = BLOCK_ROWS


def mine_dataset(run: MiningRun, table: DatasetTable, relation: str) -> Report:
    """Mine one dataset, or read what was mined before: writes its rows, plot and report, returns the report.

    Args:
        relation: what a teacher that is a reranker is asked of the pairs.

    Raises:
        ValueError: its passages are wrapped with more than one instruction, no text holds a word (BM25), or a model
            returns what is not finite.
    """
    name = safe_name(table.name)
    rows_path, report_path = run.out / rows_file(table.name), run.out / "work/reports" / f"{name}.json"
    if not (rows_path.is_file() and report_path.is_file()):
        source = _prepare(run, table, relation)
        paths = _mine_blocks(run, source)
        light = [_without_texts(load_block(path)) for path in paths]
        report_path.parent.mkdir(parents=True, exist_ok=True)
        plot_scores(run.out / f"scores-{name}.png", table.name, light)
        write_text(report_path, json.dumps(dataset_report(source, light), indent=1, ensure_ascii=False) + "\n")
        write_rows(rows_path, (mined_row(run, table, *found) for found in _mined_rows(paths)))
    shutil.rmtree(run.out / "work/rows" / name, ignore_errors=True)
    return dict(json.loads(report_path.read_text(encoding="utf-8")))


def finished_reports(out: Path, store: TokenStore) -> list[Report]:
    """Reports of all datasets mined into `out`, in the order of the store."""
    done = [safe_name(table.name) for table in store.datasets if (out / rows_file(table.name)).is_file()]
    return [json.loads((out / "work/reports" / f"{name}.json").read_text(encoding="utf-8")) for name in done]


def _prepare(run: MiningRun, table: DatasetTable, relation: str) -> MiningInput:
    """The corpus, relations and search indexes of a dataset; embeds what is not embedded yet."""
    store, options = run.store, run.options
    pooled = options.corpus == "type"
    tables = [t for t in store.datasets if t is table or (pooled and t.task_type == table.task_type)]
    corpus_C = corpus_texts(tables)
    if options.last_rank > len(corpus_C):
        log.info(
            "%s: the window of ranks %d-%d reaches past its corpus of %d texts",
            *(table.name, options.first_rank, options.last_rank, len(corpus_C)),
        )
    queries = distinct_queries(table, store.num_texts)
    passages, neighbours = _indexes(run, table, queries, corpus_C)
    return MiningInput(
        table=table,
        queries=queries,
        corpus_C=corpus_C,
        passages=passages,
        neighbours=neighbours,
        relations=relate(tables, corpus_C, store.num_texts),
        copies=find_copies(store, np.union1d(corpus_C, queries.text_Q)),
        teacher=functools.partial(run.load_teacher(), relation) if run.load_teacher is not None else None,
        options=options,
    )


def _indexes(run: MiningRun, table: DatasetTable, queries: Queries, corpus_C: np.ndarray) -> tuple[Index, Index | None]:
    """(passages for queries, queries for queries where neighbours are asked for)."""
    wants_neighbours = run.options.num_nearest > 0
    if run.embedder == BM25:
        log.info("%s: index the words of %d passages and %d queries", table.name, len(corpus_C), len(queries.text_Q))
        corpus, texts = _texts(run.store, corpus_C), _texts(run.store, queries.text_Q)
        return index_words(corpus, texts), index_words(texts, texts) if wants_neighbours else None
    query_embeddings = _embed_queries(run, table, queries)
    passage_embeddings = _embed_passages(run, table, corpus_C)
    passages = DenseIndex(query_embeddings, passage_embeddings, run.shard_texts)
    neighbours = DenseIndex(query_embeddings, query_embeddings, run.shard_texts)
    return passages, neighbours if wants_neighbours else None


def _embed_queries(run: MiningRun, table: DatasetTable, queries: Queries) -> StoredBlocks:
    name, form_Q = f"queries-{safe_name(table.name)}", queries.instruction_Q + 1  # queries stand by instruction
    return _embed(run, name, queries.text_Q, form_Q, f"{table.name}: embed queries")


def _embed_passages(run: MiningRun, table: DatasetTable, corpus_C: np.ndarray) -> StoredBlocks:
    form = _passage_form(run, table)
    # A corpus of several datasets is embedded once, unless each embeds it with an instruction of its own.
    shared = run.options.corpus == "type" and form == 0
    name = f"type-{table.task_type}" if shared else f"{run.options.corpus}-of-{safe_name(table.name)}"
    form_C = np.full(len(corpus_C), form)
    return _embed(run, f"passages-{name}", corpus_C, form_C, f"{table.name}: embed passages")


def _embed(run: MiningRun, name: str, text_N: np.ndarray, form_N: np.ndarray, title: str) -> StoredBlocks:
    def compute(part: slice) -> Scored:
        return embed_texts(run.load_encoder(), run.store, text_N[part], form_N[part])

    return fill_blocks(run.out / "work/embeddings" / name, len(text_N), compute, title, run.bars)


def _passage_form(run: MiningRun, table: DatasetTable) -> int:
    """How passages are embedded, as in training: 0 plain, i + 1 wrapped like queries with instruction i."""
    if not RULES[table.task_type].wrap_passages:
        return 0
    found = np.unique(table.instruction_N)
    if len(found) > 1 and run.wraps_passages:
        raise ValueError(
            f"dataset {table.name!r} ({table.task_type}) has {len(found)} instructions; its passages are embedded with "
            "one: split the dataset by instruction, or mine it with bm25 or a sentence-transformers model"
        )
    return int(found[0]) + 1


def _texts(store: TokenStore, text_ids: np.ndarray) -> list[str]:
    return [store.text(i) for i in text_ids.tolist()]


def _mine_blocks(run: MiningRun, source: MiningInput) -> list[Path]:
    """Mine the blocks of rows that are not there yet; the paths of all."""
    folder, num_rows = run.out / "work/rows" / safe_name(source.table.name), source.table.num_rows
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_rows, run.block_rows)
    paths = [folder / f"{start:012d}.npz" for start in starts]
    with progress_bar(num_rows, f"{source.table.name}: mine", "row", run.bars) as bar:
        for start, path in zip(starts, paths, strict=True):
            stop = min(start + run.block_rows, num_rows)
            if not path.is_file():
                save_block(path, mine_block(source, start, stop))
            bar.update(stop - start)
    return paths


def _without_texts(block: MinedBlock) -> MinedBlock:
    """A block without what only the rows need: the report holds those of all blocks at once."""
    none = np.empty(0, dtype=np.int64)
    return replace(block, negative_text_G=none, nearest_row_M=none)


def _mined_rows(paths: list[Path]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(row, text ids of its mined negatives, its nearest rows) of all blocks in order."""
    row = 0
    for path in paths:
        block = load_block(path)
        for b in range(len(block.positive_rank_B)):
            negatives = block.negative_text_G[block.negative_offsets[b] : block.negative_offsets[b + 1]]
            yield row, negatives, block.nearest_row_M[block.nearest_offsets[b] : block.nearest_offsets[b + 1]]
            row += 1


def mined_row(
    run: MiningRun, table: DatasetTable, row: int, negatives: np.ndarray, nearest: np.ndarray
) -> dict[str, Any]:
    """A row in the raw form with its mined negatives, and `nearest`: 1-based lines of this file, best first.

    Teacher scores of the old negatives go: the new ones have none, and a row has scores for all its texts or none.
    """
    raw = raw_row(run.store, table, row)
    raw.pop("pos_scores", None)
    raw.pop("neg_scores", None)
    raw["neg"] = (raw["neg"] if run.options.keep_negatives else []) + _texts(run.store, negatives)
    if run.options.num_nearest:
        raw["nearest"] = (nearest + 1).tolist()
    return raw
