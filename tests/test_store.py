"""A store read back against the raw rows and direct tokenisation; damage and mismatch are refused."""

import dataclasses
import json
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from samples import TYPES, cut_piece, tiny_rows

from pipeline.data.pieces import KINDS
from pipeline.data.store import (
    DatasetTable,
    TokenStore,
    dump_manifest,
    open_store,
    read_manifest,
    require_match,
    verify_shards,
)
from pipeline.data.tokenizing import PromptTokenizer, load_tokenizer, tokenize_pieces
from pipeline.prompts import get_template
from pipeline.settings import Settings, load_settings

WRAPPED = ("symmetric_sts", "symmetric_clustering")


@pytest.fixture(scope="module")
def store(tiny_store: tuple[Path, Path]) -> TokenStore:
    return open_store(tiny_store[1])


@lru_cache
def settings_of(recipe: Path) -> Settings:
    return load_settings(recipe)


@lru_cache
def tokenizer_of(recipe: Path) -> PromptTokenizer:
    settings = settings_of(recipe)
    return load_tokenizer(settings.tokenizer_name, get_template(settings.preprocess.template))


def rows_by_line(store: TokenStore, table: DatasetTable) -> dict[int, dict]:
    """The rows of a table as raw rows, by their line in the raw file: the obvious twin of the arrays."""
    rows = {}
    for n in range(table.num_rows):
        pos = slice(table.pos_offsets[n], table.pos_offsets[n + 1])
        neg = slice(table.neg_offsets[n], table.neg_offsets[n + 1])
        rows[int(table.source_line_N[n])] = {
            "query": store.text(int(table.query_text_N[n])),
            "pos": [store.text(i) for i in table.pos_text[pos].tolist()],
            "neg": [store.text(i) for i in table.neg_text[neg].tolist()],
            "prompt": store.instructions[table.instruction_N[n]],
            "category": store.text(int(c)) if (c := table.category_text_N[n]) >= 0 else None,
            "pos_scores": None if table.pos_score is None else table.pos_score[pos].tolist(),
            "neg_scores": None if table.neg_score is None else table.neg_score[neg].tolist(),
        }
    return rows


def test_store_holds_the_raw_rows(store: TokenStore) -> None:
    assert len(store.shards) >= 3, "the test wants several shards"
    raw = tiny_rows(40)
    assert [(table.name, table.task_type) for table in store.datasets] == list(TYPES.items())
    for table in store.datasets:
        found = rows_by_line(store, table)
        assert sorted(found) == list(range(1, 41))
        for line, row in enumerate(raw[table.name], 1):
            for key in ("pos", "neg"):
                assert found[line][key] == [text.strip() for text in row[key]]
            assert found[line]["query"] == row["query"].strip() and found[line]["prompt"] == row["prompt"].strip()
            wanted = row["category"] if table.name == "topics" else None
            assert found[line]["category"] == wanted


def test_scores_are_nan_where_a_row_has_none(store: TokenStore) -> None:
    for table in store.datasets:
        if table.name != "similarity":
            assert table.pos_score is None and table.neg_score is None
            continue
        found, raw = rows_by_line(store, table), tiny_rows(40)["similarity"]
        for line, row in enumerate(raw, 1):
            for key, texts in (("pos_scores", "pos"), ("neg_scores", "neg")):
                wanted = row.get(key) or [float("nan")] * len(row[texts])
                np.testing.assert_array_equal(np.float32(found[line][key]), np.float32(wanted))


def test_pieces_are_the_direct_tokenisation_cut(store: TokenStore, tiny_store: tuple[Path, Path]) -> None:
    pt, num_cut = tokenizer_of(tiny_store[0]), 0
    tokens = pt.tokens
    # Widest uses of the recipe: 64 and 96 with their surroundings; 48 for an example's query, 64 for its response.
    limits = {"query": (96 - 2, tokens.query_tail), "response": (64, tokens.response_tail), "passage": (96 - 1, ())}
    wanted_kinds = kinds_by_definition(store)
    assert {kind for kinds in wanted_kinds.values() for kind in kinds} == set(KINDS)
    for text_id in range(store.num_texts):
        for kind in KINDS:
            if kind not in wanted_kinds[text_id]:
                with pytest.raises(AssertionError, match="not stored"):
                    store.piece(text_id, kind)
                continue
            direct = tokenize_pieces(pt, [store.text(text_id)], kind)[0]
            piece = store.piece(text_id, kind)
            assert piece.tolist() == cut_piece(direct, *limits[kind]) and piece.dtype == np.int32
            assert store.uncut_length(text_id, kind) == len(direct)
            num_cut += len(direct) > limits[kind][0]
    assert num_cut > 10, "the test wants texts that are cut"


def kinds_by_definition(store: TokenStore) -> dict[int, set[str]]:
    """Which pieces training asks for, from the rows."""
    kinds: dict[int, set[str]] = {i: set() for i in range(store.num_texts)}
    for table in store.datasets:
        clustering, passage = table.task_type == WRAPPED[1], "query" if table.task_type in WRAPPED else "passage"
        for ids, kind in (
            (table.query_text_N, "query"),
            (table.pos_text, passage),
            (table.neg_text, passage),
            (table.category_text_N if clustering else table.pos_text, "response"),
        ):
            for text_id in ids.tolist():
                kinds[text_id].add(kind)
    return kinds


def test_texts_are_distinct(store: TokenStore) -> None:
    texts = [store.text(i) for i in range(store.num_texts)]
    assert len(set(texts)) == len(texts) == store.manifest.counts["distinct_texts"]
    with pytest.raises(IndexError):
        store.text(store.num_texts)


def test_piece_lengths_are_the_lengths_of_pieces(store: TokenStore) -> None:
    for table in store.datasets:
        ids = table.query_text_N[::-1].repeat(2)
        assert store.piece_lengths(ids, "query").tolist() == [len(store.piece(i, "query")) for i in ids.tolist()]
    assert store.piece_lengths(np.empty(0, dtype=np.int64), "query").shape == (0,)
    with pytest.raises(AssertionError, match="not stored as passage"):
        store.piece_lengths(store.datasets[4].category_text_N, "passage")


def test_instructions(store: TokenStore, tiny_store: tuple[Path, Path]) -> None:
    direct = tokenize_pieces(tokenizer_of(tiny_store[0]), store.instructions, "instruct")
    assert [ids.tolist() for ids in store.instruction_pieces] == direct


def test_length_keys_and_buckets(store: TokenStore) -> None:
    """Lengths one row at a time, from the definition."""
    p = store.manifest.limits
    around = len(store.manifest.tokens.query_end) + 1  # EOS; no BOS here
    for table, entry in zip(store.datasets, store.manifest.datasets, strict=True):
        drawn_at_most = entry.group_size - 1
        assert entry.group_size == (2 if table.task_type == "only_1neg" else 3)

        def query(text_id: int, n: int, limit: int, table: DatasetTable = table) -> int:
            instruct = store.instruction_pieces[table.instruction_N[n]]
            return min(len(store.piece(text_id, "query")) + len(instruct) + around, limit)

        def passage(text_id: int, n: int, table: DatasetTable = table) -> int:
            if table.task_type in WRAPPED:
                return query(text_id, n, p["max_passage_tokens"])
            return min(len(store.piece(text_id, "passage")) + 1, p["max_passage_tokens"])

        for n in range(table.num_rows):
            pos = [passage(i, n) for i in table.pos_text[table.pos_offsets[n] : table.pos_offsets[n + 1]].tolist()]
            neg = [passage(i, n) for i in table.neg_text[table.neg_offsets[n] : table.neg_offsets[n + 1]].tolist()]
            expected = -(-sum(neg) * min(len(neg), drawn_at_most) // len(neg)) if neg else 0
            wanted = query(int(table.query_text_N[n]), n, p["max_query_tokens"]) + max(pos) + expected
            assert table.length_N[n] == wanted
        bounds = [0, *store.manifest.bucket_edges, 1 << 30]
        assert table.bucket_offsets[0] == 0 and table.bucket_offsets[-1] == table.num_rows
        for j in range(len(bounds) - 1):
            bucket = slice(table.bucket_offsets[j], table.bucket_offsets[j + 1])
            assert np.all((bounds[j] < table.length_N[bucket]) & (table.length_N[bucket] <= bounds[j + 1]))
            assert np.all(np.diff(table.source_line_N[bucket]) > 0), "the order of the raw file is kept in a bucket"
    assert any(np.count_nonzero(np.diff(table.bucket_offsets)) > 1 for table in store.datasets)


def test_histograms_count_every_row(store: TokenStore) -> None:
    for table, entry in zip(store.datasets, store.manifest.datasets, strict=True):
        edges = [0, *store.manifest.histogram_edges, 1 << 30]
        assert entry.histograms["row"] == np.histogram(table.length_N - 1, edges)[0].tolist()
        assert sum(entry.histograms["query"]) == table.num_rows
        assert sum(entry.histograms["passage"]) == len(table.pos_text) + len(table.neg_text)


# Damage.


@pytest.fixture
def copy(tiny_store: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store[1], tmp_path / "copy"))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["texts-00001.arrow", "rows-topics.safetensors", "quarantine.jsonl"])
def test_damaged_files_are_refused(copy: Path, name: str) -> None:
    file = copy / name
    if name == "quarantine.jsonl":
        file.write_text("{}\n")
        message = f"{name} has 3 bytes"
    else:
        flip_byte(file)
        message = f"{name} has sha256 .* the manifest says"
    with pytest.raises(ValueError, match=message):
        open_store(copy)
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        open_store(copy, verify=False)


def test_ranks_share_the_verification(copy: Path) -> None:
    files = [file.name for file in read_manifest(copy).files]
    flip_byte(copy / files[4])
    open_store(copy, verify=False)
    refused = []
    for rank in range(3):
        try:
            verify_shards(copy, rank, 3)
        except ValueError as error:
            assert files[4] in str(error)
            refused.append(rank)
    assert refused == [1]


def test_damaged_or_missing_manifest_is_refused(copy: Path) -> None:
    file = copy / "manifest.json"
    text = file.read_text()
    file.write_text(text.replace('"max_query_tokens": 64', '"max_query_tokens": 65'))
    with pytest.raises(ValueError, match="its checksum does not fit"):
        open_store(copy)
    file.write_text(text[:1000])
    with pytest.raises(ValueError, match="is not a manifest"):
        open_store(copy)
    file.write_text(json.dumps(json.loads(text) | {"format_version": 0}))
    with pytest.raises(ValueError, match="has format 0"):
        open_store(copy)
    file.unlink()
    with pytest.raises(ValueError, match="is not a finished token store"):
        open_store(copy)
    with pytest.raises(ValueError, match="does not exist"):
        open_store(copy / "nothing")


def test_manifest_survives_json(store: TokenStore) -> None:
    assert dump_manifest(read_manifest(store.path)) == (store.path / "manifest.json").read_text(encoding="utf-8")


# Another tokenizer, template or limit.


def test_matching_settings_are_accepted(store: TokenStore, tiny_store: tuple[Path, Path]) -> None:
    recipe = tiny_store[0]
    require_match(store, settings_of(recipe), tokenizer_of(recipe).fingerprint)
    require_match(store, load_settings(recipe, ["batch.queries=4", "optim.lr=1e-3"]), store.manifest.fingerprint)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preprocess.max_query_tokens=65", "preprocess.max_query_tokens: store 64, recipe 65"),
        ("preprocess.max_passage_tokens=95", "preprocess.max_passage_tokens: store 96, recipe 95"),
        ("preprocess.max_example_query_tokens=47", "max_example_query_tokens: store 48, recipe 47"),
        ("preprocess.max_example_passage_tokens=63", "max_example_passage_tokens: store 64, recipe 63"),
        ("preprocess.max_prompt_tokens=255", "max_prompt_tokens: store 256, recipe 255"),
        ("preprocess.bucket_edges=[7]", "preprocess.bucket_edges: store .*, recipe .7,"),
        ("preprocess.template=instruct_query", "template: store bge_en_icl-.*, recipe instruct_query-"),
    ],
)
def test_other_settings_are_refused(
    store: TokenStore, tiny_store: tuple[Path, Path], override: str, message: str
) -> None:
    settings = load_settings(tiny_store[0], [override])
    with pytest.raises(ValueError, match=f"(?s){message}.*--overwrite"):
        require_match(store, settings, store.manifest.fingerprint)


def test_another_instruction_is_refused(store: TokenStore, tiny_store: tuple[Path, Path]) -> None:
    settings = settings_of(tiny_store[0])
    datasets = tuple(dataclasses.replace(d, instruction="Something else.") for d in settings.data.datasets)
    changed = dataclasses.replace(settings, data=dataclasses.replace(settings.data, datasets=datasets))
    with pytest.raises(ValueError, match="instruction of dataset .*: store .*, recipe Something else"):
        require_match(store, changed, store.manifest.fingerprint)


def test_another_tokenizer_is_refused(store: TokenStore, tiny_store: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="tokenizer fingerprint: store .*, recipe abc"):
        require_match(store, settings_of(tiny_store[0]), "abc")
