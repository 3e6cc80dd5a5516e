"""Stage B of preprocessing: the distinct texts of one hash partition of all units, tokenised, as one shard."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from pipeline.data.pieces import KINDS, EdgeCache, PieceEncoder, PieceRule, derive_pieces, encode_pieces
from pipeline.data.store import hashes_as_numpy
from pipeline.data.units import hash_column, write_batches
from pipeline.files import file_sha256, write_text

# The kind that is tokenised in full where a text needs several; the others are derived from it.
_BASE_ORDER = ("passage", "query", "response")
_BATCH_TEXTS = 1024


@dataclass(frozen=True)
class Width:
    """The widest limit of any use of a kind of piece, and the separator put back after a cut."""

    limit: int
    tail: tuple[int, ...]


@dataclass(frozen=True)
class ShardTask:
    """What one process needs to build one shard."""

    unit_files: tuple[str, ...]
    partition: int
    encoder_file: str
    widths: dict[str, Width]
    target: str
    report: str  # written last: the shard is done


def save_encoder(encoder: PieceEncoder, path: Path) -> None:
    """Write what `load_encoder` reads: processes need no transformers, which takes seconds to import."""
    rules = {name: asdict(rule) for name, rule in encoder.rules.items()}
    tree = {"space": encoder.space, "rules": rules, "tokenizer": encoder.tokenizer.to_str()}
    write_text(path, json.dumps(tree, ensure_ascii=False))


@lru_cache(maxsize=1)
def load_encoder(path: str) -> PieceEncoder:
    """Read an encoder once a process."""
    tree = json.loads(Path(path).read_text(encoding="utf-8"))
    rules = {name: _rule_from_json(rule) for name, rule in tree["rules"].items()}
    tokenizer = Tokenizer.from_str(tree["tokenizer"])
    tokenizer.encode_special_tokens = True
    return PieceEncoder(tokenizer, rules, tree["space"])


def _rule_from_json(tree: dict[str, Any]) -> PieceRule:
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in tree.items()}
    return PieceRule(**fields)


def build_shard(task: ShardTask) -> dict[str, Any]:
    """Write one shard (complete or absent), then its report; returns the report."""
    hashes, kinds, texts = _merge(task.unit_files, task.partition)
    encoder, cache, counts = load_encoder(task.encoder_file), EdgeCache(), Counter[str]()
    flat: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    uncut = {kind: np.zeros(len(texts), dtype=np.int32) for kind in KINDS}
    for start in range(0, len(texts), _BATCH_TEXTS):
        part = slice(start, start + _BATCH_TEXTS)
        some = texts[part].to_pylist()
        pieces, num_failed = _pieces_by_kind(encoder, some, kinds[part], cache)
        counts["without_context"] += num_failed
        for kind, width in task.widths.items():
            uncut[kind][part] = lengths = [len(ids) for ids in pieces[kind]]
            if max(lengths) > width.limit:
                keep, tail = width.limit - len(width.tail), list(width.tail)
                pieces[kind] = [ids[:keep] + tail if len(ids) > width.limit else ids for ids in pieces[kind]]
            flat[kind].append(np.fromiter(chain.from_iterable(pieces[kind]), dtype=np.int32))
    columns: dict[str, pa.Array] = {"hash": hash_column(hashes), "text": texts}
    for i, kind in enumerate(KINDS):
        needed = (kinds >> i) & 1 == 1
        _require_ids(kind, needed & (uncut[kind] == 0), texts)
        counts[f"{kind}_cut"] = int(np.sum(uncut[kind] > task.widths[kind].limit))
        values = np.concatenate([np.empty(0, dtype=np.int32), *flat[kind]])
        counts["tokens"] += len(values)
        lengths_n = np.minimum(uncut[kind], task.widths[kind].limit)
        offsets = np.concatenate([[0], np.cumsum(lengths_n, dtype=np.int64)])
        columns[f"{kind}_ids"] = _nullable_lists(offsets, values, needed)
        columns[f"{kind}_uncut"] = pa.array(uncut[kind])
    batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
    write_batches(Path(task.target), [batch], batch.schema)
    target = Path(task.target)
    report = {"num_texts": len(texts), "num_bytes": target.stat().st_size, "sha256": file_sha256(target)}
    report["counts"] = dict(counts)
    write_text(Path(task.report), json.dumps(report))
    return report


def _nullable_lists(offsets: np.ndarray, values: np.ndarray, present: np.ndarray) -> pa.Array:
    """Lists that are null where not `present` (their offsets are equal there)."""
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values), mask=pa.array(~present))


def _merge(unit_files: Sequence[str], partition: int) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """(hashes, kinds, texts) of one partition over all units: distinct, sorted by hash, kinds joined."""
    hashes, kinds, texts = [], [], []
    for name in unit_files:
        batch = pa.ipc.open_file(pa.memory_map(name)).get_batch(partition)
        hashes.append(hashes_as_numpy(batch.column("hash")))
        kinds.append(batch.column("kinds").to_numpy())
        texts.append(batch.column("text"))
    hash_n = np.concatenate(hashes)
    order = np.argsort(hash_n, kind="stable")
    hash_n = hash_n[order]
    first = np.flatnonzero(np.append(True, hash_n[1:] != hash_n[:-1])[: len(hash_n)])
    joined = np.concatenate(kinds)[order]
    if len(first):
        joined = np.bitwise_or.reduceat(joined, first)
    return hash_n[first], joined, pa.concat_arrays(texts).take(pa.array(order[first]))


def _pieces_by_kind(
    encoder: PieceEncoder, texts: Sequence[str], kinds: np.ndarray, cache: EdgeCache
) -> tuple[dict[str, list[list[int]]], int]:
    """Uncut pieces of every kind ([] where a text does not need it), and how many lost their context."""
    pieces: dict[str, list[list[int]]] = {kind: [[] for _ in texts] for kind in KINDS}
    total_failed, base_of = 0, np.full(len(texts), -1)
    for number, base in enumerate(_BASE_ORDER):
        bit = 1 << KINDS.index(base)
        chosen = np.flatnonzero((base_of < 0) & (kinds & bit > 0))
        base_of[chosen] = number
        some = [texts[i] for i in chosen.tolist()]
        if not some:
            continue
        found, num_failed = encode_pieces(encoder.tokenizer, encoder.rules[base], some)
        total_failed += num_failed
        for i, ids in zip(chosen.tolist(), found, strict=True):
            pieces[base][i] = ids
        for kind in _BASE_ORDER[number + 1 :]:
            also = chosen[kinds[chosen] & (1 << KINDS.index(kind)) > 0].tolist()
            base_ids = [pieces[base][i] for i in also]
            found, num_failed = derive_pieces(encoder, base, kind, [texts[i] for i in also], base_ids, cache)
            total_failed += num_failed
            for i, ids in zip(also, found, strict=True):
                pieces[kind][i] = ids
    return pieces, total_failed


def _require_ids(kind: str, empty: np.ndarray, texts: pa.Array) -> None:
    if empty.any():
        text = texts[int(np.flatnonzero(empty)[0])].as_py()
        raise ValueError(
            f"{int(empty.sum())} texts have no token at all as a {kind}, the first is {text[:80]!r}: this tokenizer "
            "drops their characters; remove their rows from the raw data"
        )
