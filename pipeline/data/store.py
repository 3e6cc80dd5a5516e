"""The token store: each distinct text tokenised once, rows that refer to texts by id, and a manifest.

    manifest.json          what the store is made of and for; checksums of all other files
    texts-00000.arrow ...  hash, text and pieces; text ids count through the shards in order
    rows-<dataset>.safetensors   rows of one dataset as columns of numbers, contiguous by length bucket
    quarantine.jsonl       rows that could not be used: {file, line, reason, start}

Text files are Arrow IPC with one record batch each. All are read through memory maps: opening a store reads no rows.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.columns import open_columns
from pipeline.data.pieces import KINDS
from pipeline.data.tokenizing import PromptTokens, tokens_from_json, tokens_to_json
from pipeline.files import file_sha256
from pipeline.prompts import get_template
from pipeline.settings import PreprocessSettings, Settings

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
REBUILD = "python pipeline/preprocess.py --config RECIPE.yaml --overwrite"
LIMIT_NAMES = (
    "max_query_tokens",
    "max_passage_tokens",
    "max_example_query_tokens",
    "max_example_passage_tokens",
    "max_prompt_tokens",
)


@dataclass(frozen=True)
class StoredFile:
    """One file of the store besides the manifest."""

    name: str
    num_items: int  # texts, rows or quarantined rows
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetEntry:
    """What the manifest says about one dataset."""

    name: str
    task_type: str
    # files: name (without the folder of the machine), bytes and sha256 of each raw file; name, bytes and sha256 of all
    # together; entry: name of the recipe's entry; no_in_batch_neg: a file or folder is named so.
    source: dict[str, Any]
    instruction: str  # of rows without their own
    group_size: int  # that the length key reckons with
    counts: dict[str, int]
    histograms: dict[str, list[int]]  # over the manifest's histogram_edges: query, passage, row
    bucket_offsets: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The identity of a store. Equal inputs give equal manifests, whatever the machine and number of processes."""

    format_version: int
    identity: dict[str, Any]  # of the inputs: settings that matter, tokenizer, raw files
    tokenizer_name: str
    fingerprint: str
    template_name: str
    template_version: str
    limits: dict[str, int]
    bucket_edges: tuple[int, ...]
    histogram_edges: tuple[int, ...]
    tokens: PromptTokens
    instructions: tuple[str, ...]
    instruction_ids: tuple[tuple[int, ...], ...]
    datasets: tuple[DatasetEntry, ...]
    counts: dict[str, int]
    text_files: tuple[StoredFile, ...]
    row_files: tuple[StoredFile, ...]
    other_files: tuple[StoredFile, ...]

    @property
    def files(self) -> tuple[StoredFile, ...]:
        return (*self.text_files, *self.row_files, *self.other_files)


@dataclass(frozen=True)
class DatasetTable:
    """Rows of one dataset as views of the mapped file; N rows, contiguous by length bucket."""

    name: str
    task_type: str
    num_rows: int
    query_text_N: np.ndarray  # int64 text ids
    instruction_N: np.ndarray  # int32, index into the store's instructions
    category_text_N: np.ndarray  # int64 text ids, -1: none
    pos_offsets: np.ndarray  # int64, N + 1: positives of row n are pos_text[pos_offsets[n] : pos_offsets[n + 1]]
    pos_text: np.ndarray  # int64
    pos_score: np.ndarray | None  # float32; None: no row of the dataset has scores; NaN: this row has none
    neg_offsets: np.ndarray  # int64, N + 1
    neg_text: np.ndarray  # int64
    neg_score: np.ndarray | None
    length_N: np.ndarray  # int32: zero-shot query + longest positive + expected negatives, in tokens
    bucket_offsets: np.ndarray  # int64: bucket j holds rows bucket_offsets[j] : bucket_offsets[j + 1]
    source_line_N: np.ndarray  # int64, 1-based line (or row) counted through the raw files in order
    entry: str  # the recipe's entry that it comes from: of a folder many datasets come
    no_in_batch_neg: bool  # the name of a raw file or folder says that its rows are no negatives for each other
    # Found by mining, best first: those of row n are nearest_row[nearest_offsets[n] : nearest_offsets[n + 1]].
    nearest_offsets: np.ndarray | None  # int64, N + 1; None: the raw rows name no neighbours
    nearest_row: np.ndarray | None  # int64, row numbers inside the dataset


@dataclass(frozen=True)
class TextShard:
    """One mapped text file: per kind the offsets (n + 1) and values of its pieces; a kind not needed is empty."""

    texts: pa.Array
    hashes: np.ndarray  # S16
    offsets: dict[str, np.ndarray]  # int64
    values: dict[str, np.ndarray]  # int32
    uncut: dict[str, np.ndarray]  # int32, tokens before cutting to the widest limit


@dataclass(frozen=True)
class TokenStore:
    """An opened store."""

    path: Path
    manifest: Manifest
    datasets: tuple[DatasetTable, ...]
    shards: tuple[TextShard, ...]
    shard_starts: np.ndarray  # int64, shards + 1: first text id of each shard

    @property
    def num_texts(self) -> int:
        return int(self.shard_starts[-1])

    @property
    def instructions(self) -> tuple[str, ...]:
        return self.manifest.instructions

    @cached_property
    def instruction_pieces(self) -> tuple[np.ndarray, ...]:
        """int32 ids of the instruct pieces; of "" an empty array."""
        return tuple(np.array(ids, dtype=np.int32) for ids in self.manifest.instruction_ids)

    def piece(self, text_id: int, kind: str) -> np.ndarray:
        """int32 ids of a text as "query", "response" or "passage", literals included, cut to the widest limit."""
        shard, i = self._locate(text_id)
        offsets = shard.offsets[kind]
        ids = shard.values[kind][offsets[i] : offsets[i + 1]]
        assert len(ids), f"text {text_id} is not stored as {kind}"
        return ids

    def piece_lengths(self, text_ids: np.ndarray, kind: str) -> np.ndarray:
        """int64 lengths of the stored pieces of these texts."""
        text_ids = np.asarray(text_ids, dtype=np.int64)
        lengths = np.empty(len(text_ids), dtype=np.int64)
        order = np.argsort(text_ids, kind="stable")
        edges = np.searchsorted(text_ids[order], self.shard_starts)
        for s in np.flatnonzero(np.diff(edges)).tolist():
            here = order[edges[s] : edges[s + 1]]
            index, offsets = text_ids[here] - self.shard_starts[s], self.shards[s].offsets[kind]
            lengths[here] = offsets[index + 1] - offsets[index]
        assert lengths.all(), f"a text is not stored as {kind}"
        return lengths

    def uncut_length(self, text_id: int, kind: str) -> int:
        """Tokens of a piece before it was cut to the widest limit of its uses."""
        shard, i = self._locate(text_id)
        return int(shard.uncut[kind][i])

    def text(self, text_id: int) -> str:
        """The text itself."""
        shard, i = self._locate(text_id)
        return str(shard.texts[i].as_py())

    def _locate(self, text_id: int) -> tuple[TextShard, int]:
        if not 0 <= text_id < self.num_texts:
            raise IndexError(f"text id {text_id} is not in 0..{self.num_texts - 1}")
        s = int(np.searchsorted(self.shard_starts, text_id, side="right")) - 1
        return self.shards[s], int(text_id - self.shard_starts[s])


def open_store(path: str | Path, verify: bool = True) -> TokenStore:
    """Open a finished store.

    Args:
        verify: read every file and compare its checksum. Where many ranks open one store, each passes False and
            calls `verify_shards` for its share.

    Raises:
        ValueError: there is no store, it is incomplete, or a file does not have the recorded bytes.
    """
    path = Path(path)
    manifest = read_manifest(path)
    _check_files(path, manifest.files, read_all=verify)
    shards = tuple(_open_shard(path / file.name) for file in manifest.text_files)
    datasets = tuple(
        open_table(path / file.name, entry) for file, entry in zip(manifest.row_files, manifest.datasets, strict=True)
    )
    starts = np.cumsum([0, *[file.num_items for file in manifest.text_files]], dtype=np.int64)
    return TokenStore(path, manifest, datasets, shards, starts)


def verify_shards(path: str | Path, rank: int, world_size: int) -> None:
    """Compare the checksums of every world_size-th file, starting with number `rank`; ValueError names a bad one."""
    _check_files(Path(path), read_manifest(Path(path)).files[rank::world_size], read_all=True)


def _check_files(path: Path, files: Sequence[StoredFile], read_all: bool) -> None:
    for file in files:
        full = path / file.name
        if not full.is_file():
            raise ValueError(f"token store {path}: {file.name} is missing; rebuild it: {REBUILD}")
        size = full.stat().st_size
        if size != file.num_bytes:
            raise ValueError(
                f"token store {path}: {file.name} has {size} bytes, the manifest says {file.num_bytes}; "
                f"it is damaged, rebuild it: {REBUILD}"
            )
        if read_all and (found := file_sha256(full)) != file.sha256:
            raise ValueError(
                f"token store {path}: {file.name} has sha256 {found[:16]}..., the manifest says "
                f"{file.sha256[:16]}...; it is damaged, rebuild it: {REBUILD}"
            )


def require_match(store: TokenStore, settings: Settings, fingerprint: str) -> None:
    """Refuse a store made with another tokenizer, template, limit, bucket edge or instruction.

    Raises:
        ValueError: shows both values and the remedy.
    """
    manifest, wanted = store.manifest, settings.preprocess
    pairs: dict[str, tuple[object, object]] = {
        "tokenizer fingerprint": (manifest.fingerprint, fingerprint),
        "template": (manifest.template_version, get_template(wanted.template).version),
    }
    pairs |= {f"preprocess.{name}": (manifest.limits[name], getattr(wanted, name)) for name in LIMIT_NAMES}
    pairs["preprocess.bucket_edges"] = (tuple(manifest.bucket_edges), tuple(wanted.bucket_edges))
    instructions = {d.name: d.instruction for d in settings.data.datasets}
    pairs |= {
        f"instruction of dataset {d.name}": (d.instruction, instructions[d.source["entry"]])
        for d in manifest.datasets
        if d.source["entry"] in instructions
    }
    differing = [f"  {name}: store {a}, recipe {b}" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise ValueError(
            f"the token store {store.path} was made with other settings:\n"
            + "\n".join(differing)
            + f"\nrebuild it: {REBUILD}"
        )


def limits_dict(settings: PreprocessSettings) -> dict[str, int]:
    """The five limits by name."""
    return {name: getattr(settings, name) for name in LIMIT_NAMES}


# The manifest on disk.


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as JSON with a checksum of its own."""
    tree = asdict(manifest) | {"tokens": tokens_to_json(manifest.tokens)}
    return json.dumps({"checksum": _checksum(tree), **tree}, indent=1, ensure_ascii=False) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Read `path`/manifest.json; ValueError if it is missing, damaged or of another format."""
    file = path / MANIFEST
    if not file.is_file():
        what = "has no manifest.json: it is not a finished token store" if path.is_dir() else "does not exist"
        raise ValueError(f"token store {path} {what}; build it: python pipeline/preprocess.py --config RECIPE.yaml")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        checksum = tree.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is not a manifest: {error}; rebuild the store: {REBUILD}") from error
    if tree.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format {tree.get('format_version')}, this version reads {FORMAT_VERSION}; rebuild: {REBUILD}"
        )
    if checksum != _checksum(tree) or set(tree) != {field.name for field in fields(Manifest)}:
        raise ValueError(f"{file} is damaged: its checksum does not fit its content; rebuild the store: {REBUILD}")
    tree["tokens"] = tokens_from_json(tree["tokens"])
    for name in ("text_files", "row_files", "other_files"):
        tree[name] = tuple(StoredFile(**item) for item in tree[name])
    for item in tree["datasets"]:
        item["bucket_offsets"] = tuple(item["bucket_offsets"])
    tree["datasets"] = tuple(DatasetEntry(**item) for item in tree["datasets"])
    for name in ("bucket_edges", "histogram_edges", "instructions"):
        tree[name] = tuple(tree[name])
    tree["instruction_ids"] = tuple(tuple(ids) for ids in tree["instruction_ids"])
    return Manifest(**tree)


def _checksum(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


# Arrow columns as numpy views.


def read_batch(path: Path) -> pa.RecordBatch:
    """The one record batch of an Arrow IPC file, memory-mapped; ValueError if it is not such a file."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1:
            raise ValueError(f"{path} holds {reader.num_record_batches} record batches instead of one; rebuild it")
        return reader.get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Arrow file: {error}; rebuild the store: {REBUILD}") from error


def _open_shard(path: Path) -> TextShard:
    batch = read_batch(path)
    offsets, values, uncut = {}, {}, {}
    for kind in KINDS:
        column = batch.column(f"{kind}_ids")
        offsets[kind] = column.offsets.to_numpy()
        values[kind] = column.values.to_numpy()
        uncut[kind] = batch.column(f"{kind}_uncut").to_numpy()
    return TextShard(batch.column("text"), hashes_as_numpy(batch.column("hash")), offsets, values, uncut)


def hashes_as_numpy(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    """A column of 16-byte hashes as S16, without copying."""
    raw = np.frombuffer(column.buffers()[1], dtype="S16") if len(column) else np.empty(0, dtype="S16")
    return raw[column.offset : column.offset + len(column)]


def open_table(path: Path, entry: DatasetEntry) -> DatasetTable:
    """The rows of one dataset as views of the mapped file; ValueError if it is not such a file."""
    try:
        columns = open_columns(path)
        return DatasetTable(
            name=entry.name,
            task_type=entry.task_type,
            num_rows=len(columns["query_text"]),
            query_text_N=columns["query_text"],
            instruction_N=columns["instruction"],
            category_text_N=columns["category_text"],
            pos_offsets=columns["pos_offsets"],
            pos_text=columns["pos_text"],
            pos_score=columns.get("pos_score"),
            neg_offsets=columns["neg_offsets"],
            neg_text=columns["neg_text"],
            neg_score=columns.get("neg_score"),
            length_N=columns["length"],
            bucket_offsets=np.array(entry.bucket_offsets, dtype=np.int64),
            source_line_N=columns["source_line"],
            entry=entry.source["entry"],
            no_in_batch_neg=entry.source["no_in_batch_neg"],
            nearest_offsets=columns.get("nearest_offsets"),
            nearest_row=columns.get("nearest_row"),
        )
    except (ValueError, KeyError) as error:
        raise ValueError(f"{error}; rebuild the store: {REBUILD}") from error
