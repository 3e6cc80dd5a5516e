import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.raw import Block, iter_blocks, parse_row, read_block, split_lines
from pipeline.datatypes import RawRecord

GOOD = {"query": "q", "pos": ["p"], "neg": ["n", "m"]}


def parse(**changes: object) -> RawRecord | str:
    return parse_row(json.dumps(GOOD | changes).encode())


@given(
    lines=st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b" ")), min_size=1, max_size=30),
    block_bytes=st.integers(1, 40),
    newline_at_end=st.booleans(),
)
def test_blocks_hold_every_line_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block_bytes: int, newline_at_end: bool
) -> None:
    data = b"\n".join(lines) + (b"\n" if newline_at_end else b"")
    plain = tmp_path_factory.getbasetemp() / "blocks.jsonl"
    plain.write_bytes(data)
    packed = plain.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(data))
    for path in (plain, packed):
        found = [line for block in iter_blocks(path, block_bytes) for line in split_lines(read_block(block))]
        assert found == split_lines(data)


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"query": "q"}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match="cut.jsonl.gz is not a whole gzip file"):
        list(iter_blocks(path))


def test_block_that_starts_inside_a_long_line_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"x" * 100 + b"\nyy\n")
    assert read_block(Block(str(path), 10, 20)) == b""
    assert read_block(Block(str(path), 0, 10)) == b"x" * 100 + b"\n"


def test_valid_row_is_stripped_and_complete() -> None:
    row = {"query": " q\n", "pos": ["p "], "neg": ["\tn"], "pos_scores": [1], "neg_scores": [0.5], "prompt": " do "}
    assert parse_row(json.dumps(row).encode()) == RawRecord("q", ("p",), ("n",), (1.0,), (0.5,), "do", None, "normal")


def test_type_and_instruction_of_the_dataset() -> None:
    line = json.dumps(GOOD).encode()
    record = parse_row(line, "only_1neg", " default ")
    assert isinstance(record, RawRecord) and (record.type, record.instruction) == ("only_1neg", "default")
    record = parse_row(json.dumps(GOOD | {"prompt": "own", "type": "symmetric_sts"}).encode(), "", "default")
    assert isinstance(record, RawRecord) and (record.type, record.instruction) == ("symmetric_sts", "own")
    assert parse(prompt=None, neg=None, pos_scores=None) == RawRecord("q", ("p",), (), None, None, "", None, "normal")


def test_category_is_kept_for_clustering_only() -> None:
    kept, dropped = parse(type="symmetric_clustering", category=" c "), parse(type="symmetric_class", category="c")
    assert isinstance(kept, RawRecord) and kept.category == "c"
    assert isinstance(dropped, RawRecord) and dropped.category is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"query": "\xff"}', "not UTF-8"),
        (b'["a"]', "not an object but a list"),
        (b"3", "not an object but a number"),
    ],
)
def test_lines_that_are_no_rows(line: bytes, reason: str) -> None:
    assert parse_row(line) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query": None}, "no query"),
        ({"query": 3}, "query is not a string but a number"),
        ({"query": " \n"}, "empty query"),
        ({"pos": None}, "no positive (pos is missing or empty)"),
        ({"pos": []}, "no positive (pos is missing or empty)"),
        ({"pos": "p"}, "pos is not a list but a string"),
        ({"pos": ["p", None]}, "pos holds null instead of a string"),
        ({"pos": ["p", " "]}, "an empty text in pos"),
        ({"neg": {"a": 1}}, "neg is not a list but an object"),
        ({"neg": [["n"]]}, "neg holds a list instead of a string"),
        ({"neg": [""]}, "an empty text in neg"),
        ({"pos_scores": [1.0]}, "neg_scores is missing where the other scores are given"),
        ({"neg_scores": [1.0, 2.0]}, "pos_scores is missing where the other scores are given"),
        ({"pos_scores": [1.0], "neg_scores": [1.0]}, "neg_scores holds 1 values for 2 texts"),
        ({"pos_scores": 1.0, "neg_scores": [1.0, 2]}, "pos_scores holds a number for 1 texts"),
        ({"pos_scores": ["1"], "neg_scores": [1, 2]}, "pos_scores holds something that is not a number"),
        ({"pos_scores": [True], "neg_scores": [1, 2]}, "pos_scores holds something that is not a number"),
        ({"pos_scores": [float("nan")], "neg_scores": [1, 2]}, "pos_scores holds a number that is not finite"),
        ({"pos_scores": [float("inf")], "neg_scores": [1, 2]}, "pos_scores holds a number that is not finite"),
        ({"pos_scores": [10**400], "neg_scores": [1, 2]}, "pos_scores holds a number that is not finite"),
        ({"type": "other"}, "unknown type 'other'"),
        ({"type": ["normal"]}, "unknown type"),
        ({"type": "symmetric_clustering"}, "no category"),
        ({"type": "symmetric_clustering", "category": 4}, "category is not a string but a number"),
        ({"prompt": 3}, "prompt is not a string but a number"),
        ({"query": "a \ud800 b"}, "a lone surrogate"),
        ({"neg": ["ok", "\udfff"]}, "a lone surrogate"),
    ],
)
def test_bad_rows_are_named(changes: dict[str, object], reason: str) -> None:
    found = parse(**changes)
    assert isinstance(found, str) and found.startswith(reason)


def test_row_type_that_contradicts_the_dataset() -> None:
    found = parse_row(json.dumps(GOOD | {"type": "normal"}).encode(), "symmetric_sts")
    assert found == "type 'normal' contradicts the dataset's type 'symmetric_sts'"


def test_scores_without_negatives_and_real_pairs_are_fine() -> None:
    record = parse(neg=[], pos_scores=[0.25], query="an emoji \U0001f600 as a pair \\ud83d")
    assert isinstance(record, RawRecord) and record.pos_scores == (0.25,) and record.neg_scores == ()


@given(st.binary(max_size=200) | st.text(max_size=60).map(lambda t: json.dumps(GOOD | {"query": t}).encode()))
def test_any_line_is_a_row_or_a_reason(line: bytes) -> None:
    found = parse_row(line)
    assert isinstance(found, (RawRecord, str)) and found
    if isinstance(found, RawRecord):
        assert found.query == found.query.strip() != "" and found.query.encode()


def test_scores_that_are_all_null_are_no_scores() -> None:
    """As the released training data has them in some sets."""
    row = {"query": "q", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [None], "neg_scores": [None, None]}
    parsed = parse_row(json.dumps(row).encode())
    assert isinstance(parsed, RawRecord) and parsed.pos_scores is None and parsed.neg_scores is None
    assert parse_row(json.dumps(row | {"neg_scores": [0.5, None]}).encode()) == (
        "pos_scores holds something that is not a number"
    )
