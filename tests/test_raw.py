"""The rules of a row, and the columns that it is read from."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import parse_row

from pipeline.data import raw
from pipeline.data.raw import RowRules, check_row, require_columns
from pipeline.datatypes import RawRecord
from pipeline.settings import ColumnSettings

GOOD = {"query": "q", "pos": ["p"], "neg": ["n", "m"]}


def parse(**changes: object) -> RawRecord | str:
    return parse_row(json.dumps(GOOD | changes).encode())


def test_valid_row_is_stripped_and_complete() -> None:
    row = {"query": " q\n", "pos": ["p "], "neg": ["\tn"], "pos_scores": [1], "neg_scores": [0.5], "prompt": " do "}
    assert parse_row(json.dumps(row).encode()) == RawRecord("q", ("p",), ("n",), (1.0,), (0.5,), "do", None, "normal")


def test_type_and_instruction_of_the_dataset() -> None:
    line = json.dumps(GOOD).encode()
    record = parse_row(line, RowRules("only_1neg", " default "))
    assert isinstance(record, RawRecord) and (record.type, record.instruction) == ("only_1neg", "default")
    record = parse_row(json.dumps(GOOD | {"prompt": "own", "type": "symmetric_sts"}).encode(), RowRules("", "default"))
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
        ({"pos": 3}, "pos is not a list but a number"),
        ({"neg": False}, "neg is not a list but true or false"),
        ({"pos": ["p", None]}, "pos holds null instead of a string"),
        ({"pos": ["p", " "]}, "an empty text in pos"),
        ({"neg": {"a": 1}}, "neg is not a list but an object"),
        ({"neg": [["n"]]}, "neg holds a list instead of a string"),
        ({"neg": [""]}, "an empty text in neg"),
        ({"pos_scores": [1.0]}, "neg_scores is missing where the other scores are given"),
        ({"neg_scores": [1.0, 2.0]}, "pos_scores is missing where the other scores are given"),
        ({"pos_scores": [1.0], "neg_scores": [1.0]}, "neg_scores holds 1 values for 2 texts"),
        ({"pos_scores": "1", "neg_scores": [1.0, 2]}, "pos_scores holds a string for 1 texts"),
        ({"pos_scores": [1.0], "neg_scores": 2.0}, "neg_scores holds 1 values for 2 texts"),
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
    found = parse_row(json.dumps(GOOD | {"type": "normal"}).encode(), RowRules("symmetric_sts"))
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


# Columns.


def mapped(row: dict[str, object], **columns: tuple[str, ...] | None) -> RawRecord | str:
    return check_row(row, RowRules(columns=ColumnSettings(**columns)))


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"anchor": "q", "positive": "p", "negative": "n"}, {"pos": ("positive",), "neg": ("negative",)}),
        ({"anchor": "q", "positive": ["p"], "negative": ["n"]}, {"pos": ("positive",), "neg": ("negative",)}),
        ({"anchor": "q", "pos": ["p"], "neg": "n"}, {}),
        ({"anchor": "q", "neg": ["n"], "answer": "p", "pos": ["not read"]}, {"pos": ("answer",)}),
        ({"anchor": "q", "pos": "p", "neg": "n", "prompt": 3, "type": "bridge"}, {"prompt": None, "type": None}),
    ],
)
def test_columns_of_other_trainers(row: dict[str, object], columns: dict[str, tuple[str, ...]]) -> None:
    assert mapped(row, query=("anchor",), **columns) == RawRecord("q", ("p",), ("n",), None, None, "", None, "normal")


def test_several_columns_join_without_nulls_in_the_order_of_the_recipe() -> None:
    row = {"query": "q", "pos": "p", "n_2": "b", "n_1": ["a", "c"], "n_3": None, "s_1": 0.5, "s_2": 1, "s": 2.0}
    found = mapped(row, neg=("n_1", "n_2", "n_3"))
    assert isinstance(found, RawRecord) and found.neg == ("a", "c", "b")
    found = mapped(row, neg=("n_2", "n_*"), neg_scores=("s_*", "s"), pos_scores=("s_2",))
    assert isinstance(found, RawRecord) and found.neg == ("b", "a", "c")
    assert (found.pos_scores, found.neg_scores) == ((1.0,), (0.5, 1.0, 2.0))
    assert mapped({"query": "q", "p_1": None, "p_2": None}, pos=("p_1", "p_2")).startswith("no positive")
    assert mapped({"query": "q", "p_1": "p", "p_2": ""}, pos=("p_1", "p_2")) == "an empty text in pos"


SHAPES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)
NAMES = st.sampled_from(["query", "pos", "neg", "pos_scores", "neg_scores", "type", "category", "prompt", "a", "b_1"])
SOME_NAMES = st.none() | st.lists(NAMES | st.sampled_from(["b_*", "*"]), max_size=2).map(tuple)


@given(
    row=st.dictionaries(NAMES, SHAPES | st.just("t") | st.just(["t"])),
    columns=st.fixed_dictionaries({name: SOME_NAMES for name in ("query", "pos", "neg", "neg_scores", "type")}),
)
def test_any_shape_is_a_row_or_a_reason(row: dict[str, object], columns: dict[str, tuple[str, ...] | None]) -> None:
    for found in (mapped(row, **columns), check_row(row, RowRules())):
        assert isinstance(found, (RawRecord, str)) and found
        if isinstance(found, RawRecord):
            assert all(isinstance(text, str) and text for text in (found.query, *found.pos, *found.neg))


def test_a_star_is_the_only_sign_with_a_meaning() -> None:
    row = {"query": "q", "p[0]": "p", "p0": "other"}
    found = mapped(row, pos=("p[0]*",))
    assert isinstance(found, RawRecord) and found.pos == ("p",)


def test_columns_that_do_not_exist_are_named_with_those_there_are() -> None:
    there = ["anchor", "positive", "negative_1"]
    good = ColumnSettings(query=("anchor",), pos=("positive",), neg=("negative_*",))
    require_columns(good, there, "here")
    for columns, message in (
        (ColumnSettings(query=("anchor",), pos=("positiv",)), "columns.pos names 'positiv', which does not exist"),
        (ColumnSettings(query=("anchor",), pos=("positive",), neg=("neg_*",)), "columns.neg names 'neg_.'"),
        (ColumnSettings(pos=("positive",)), "no column 'query'; name the one to read as columns.query"),
    ):
        with pytest.raises(ValueError, match=f"here: {message}.*there are: anchor, positive, negative_1"):
            require_columns(columns, there, "here")


def test_a_line_without_end_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "MAX_LINE_BYTES", 1 << 20)
    assert parse_row(b'{"query": "' + b"x" * (1 << 20)) == "a line of more than 1 MiB"


def test_many_negatives_a_long_text_and_control_characters() -> None:
    row = {"query": "a\0b", "pos": ["word " * 1_000_000], "neg": [f"n{i}" for i in range(10_000)]}
    record = parse_row(json.dumps(row).encode())
    assert isinstance(record, RawRecord) and record.query == "a\0b" and len(record.neg) == 10_000
    assert len(record.pos[0]) == 5_000_000 - 1
    assert parse_row(b'{"query": "a\x00b", "pos": ["p"]}') == "not JSON"
    assert parse_row('{"query": "é", "pos": ["p"]}'.encode("utf-16")) == "not UTF-8"
    assert parse_row('{"query": "é", "pos": ["p"]}'.encode("latin-1")) == "not UTF-8"


def test_a_text_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "MAX_TEXT_CHARS", 100)
    fine, long = "x" * 100, "x" * 101
    assert not isinstance(parse_row(json.dumps({"query": fine, "pos": [fine], "neg": [fine]}).encode()), str)
    assert parse_row(json.dumps({"query": long, "pos": ["p"]}).encode()) == "query of more than 100 characters"
    for field in ("pos", "neg"):
        row = {"query": "q", "pos": ["p"], field: ["a", long]}
        assert parse_row(json.dumps(row).encode()) == f"a text of more than 100 characters in {field}"
