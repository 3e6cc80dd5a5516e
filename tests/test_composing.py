"""Composing: pieces end to end within the limits, and lengths that are the lengths of the ids."""

from typing import Any

import numpy as np
import pytest
from fake_store import INSTRUCT, QUERY, RESPONSE, TOKENS, make_settings, make_store, plain_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import cut_piece, sample_rows

from pipeline.data.composing import (
    Limits,
    compose_passage,
    compose_query,
    compose_wrapped,
    plan_lengths,
    sequence_ids,
)
from pipeline.data.sampling import make_schedule, plan_step
from pipeline.data.tokenizing import load_tokenizer, tokenize_pieces
from pipeline.datatypes import TASK_TYPES
from pipeline.prompts import get_template, render_passage, render_query

LIMITS = Limits(20, 16, 12, 10, 60)
WIDE = Limits(1000, 1000, 1000, 1000, 10_000)
TASK = (INSTRUCT, 50, 6)


def query(n: int) -> tuple[int, ...]:
    return (QUERY, *range(100, 100 + n), 6)


def response(n: int) -> tuple[int, ...]:
    return (RESPONSE, *range(300, 300 + n), 7, 7)


def test_layout_without_limits() -> None:
    ids, dropped = compose_query(
        TOKENS, WIDE, TASK, query(2), [(TASK, query(1), response(1)), ((), query(3), response(2))]
    )
    expected = [1, *TASK, *query(1), *response(1), *query(3), *response(2), *TASK, *query(2), 5, 2]
    assert ids.tolist() == expected and ids.dtype == np.int64 and dropped == 0
    assert compose_query(TOKENS, WIDE, (), query(2))[0].tolist() == [1, *query(2), 5, 2]
    assert compose_passage(TOKENS, WIDE, [100, 101]).tolist() == [1, 100, 101, 2]
    assert compose_wrapped(TOKENS, WIDE, TASK, query(2)).tolist() == [1, *TASK, *query(2), 5, 2]


def test_long_pieces_are_cut_and_keep_their_separator() -> None:
    ids, _ = compose_query(TOKENS, LIMITS, TASK, query(50))
    assert len(ids) == 20 and ids.tolist() == [1, *TASK, *query(50)[:13], 6, 5, 2]
    exact, _ = compose_query(TOKENS, LIMITS, TASK, query(12))
    assert len(exact) == 20 and exact.tolist() == [1, *TASK, *query(12), 5, 2]
    assert compose_passage(TOKENS, LIMITS, range(100, 150)).tolist() == [1, *range(100, 114), 2]
    wrapped = compose_wrapped(TOKENS, LIMITS, TASK, query(50))
    assert len(wrapped) == 16 and wrapped.tolist() == [1, *TASK, *query(50)[:9], 6, 5, 2]
    ids, _ = compose_query(TOKENS, LIMITS, TASK, query(1), [(TASK, query(50), response(50))])
    example = [*TASK, *query(50)[:8], 6, *response(50)[:8], 7, 7]
    assert len(example) == 12 + 10 and ids.tolist() == [1, *example, *TASK, *query(1), 5, 2]


def test_cuts_equal_those_of_the_tokenizer() -> None:
    for n in range(30):
        expected = [1, *cut_piece(range(100, 100 + n), 14, ()), 2]
        assert compose_passage(TOKENS, LIMITS, range(100, 100 + n)).tolist() == expected
        expected = [1, *TASK, *cut_piece(query(n), 14, TOKENS.query_tail), 5, 2]
        assert compose_query(TOKENS, LIMITS, TASK, query(n))[0].tolist() == expected


def test_whole_examples_are_dropped_from_the_left() -> None:
    examples = [(TASK, query(n), response(n)) for n in (1, 5, 2)]
    sizes = [3 + n + 2 + n + 3 for n in (1, 5, 2)]
    alone = 1 + 3 + 4 + 2  # bos, task, query(2), end and eos
    for limit in range(alone, alone + sum(sizes) + 2):
        ids, dropped = compose_query(TOKENS, Limits(20, 16, 12, 10, limit), TASK, query(2), examples)
        kept = next(k for k in (3, 2, 1, 0) if alone + sum(sizes[3 - k :]) <= limit)
        parts = [x for example in examples[3 - kept :] for piece in example for x in piece]
        assert dropped == 3 - kept
        assert ids.tolist() == [1, *parts, *TASK, *query(2), 5, 2]


def test_an_example_that_fits_further_left_does_not_jump_the_queue() -> None:
    examples = [(TASK, query(0), response(0)), (TASK, query(5), response(5))]
    ids, dropped = compose_query(TOKENS, Limits(20, 16, 12, 10, 24), TASK, query(2), examples)
    assert dropped == 2 and len(ids) == 10


def test_no_room_for_text_is_an_error() -> None:
    long_task = (INSTRUCT, *range(200, 217), 6)
    with pytest.raises(ValueError, match=r"max_query_tokens leaves no room.*instruction of 19 tokens"):
        compose_query(TOKENS, LIMITS, long_task, query(2))
    with pytest.raises(ValueError, match=r"max_example_query_tokens leaves no room"):
        compose_query(TOKENS, LIMITS, TASK, query(2), [(long_task, query(1), response(1))])
    with pytest.raises(ValueError, match=r"max_example_passage_tokens leaves no room"):
        compose_query(TOKENS, Limits(20, 16, 12, 2, 60), TASK, query(2), [(TASK, query(1), response(1))])
    with pytest.raises(ValueError, match=r"max_passage_tokens leaves no room"):
        compose_wrapped(TOKENS, LIMITS, long_task, query(2))
    with pytest.raises(ValueError, match=r"max_passage_tokens leaves no room"):
        compose_passage(TOKENS, Limits(20, 2, 12, 10, 60), [100])


pieces = st.integers(0, 30)


@settings(max_examples=100, deadline=None)
@given(pieces, st.lists(st.tuples(pieces, pieces), max_size=6), st.integers(24, 90))
def test_limits_always_hold_and_the_query_always_ends(n: int, halves: list[tuple[int, int]], limit: int) -> None:
    limits = Limits(20, 16, 12, 10, limit)
    examples = [(TASK, query(q), response(r)) for q, r in halves]
    ids, dropped = compose_query(TOKENS, limits, TASK, query(n), examples)
    alone, _ = compose_query(TOKENS, limits, TASK, query(n))
    assert len(alone) <= 20 and len(ids) <= limit
    assert ids[0] == 1 and ids[1:][len(ids) - len(alone) :].tolist() == alone[1:].tolist()
    assert (ids == RESPONSE).sum() == len(examples) - dropped + 1  # query_end is the same marker


def long_rows(num_rows: int) -> list[dict[str, Any]]:
    """Rows on both sides of every limit of the test settings."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(num_rows):
        words = [" ".join(f"w{j}" for j in range(n)) for n in rng.integers(0, 18, 4)]
        instruction = ("", "find", "find more of it")[i % 3]
        rows.append(
            {"query": f"q{i} {words[0]}", "pos": [f"p{i % 20} {words[1]}"], "neg": [f"n{i} {words[2]}", "n"]}
            | {"category": f"c{i % 5} {words[3]}", "instruction": instruction}
        )
    return rows


@pytest.mark.parametrize("task_type", TASK_TYPES)
@pytest.mark.parametrize("mode", ["in_batch", "filler"])
def test_planned_lengths_are_the_lengths_of_the_ids(task_type: str, mode: str) -> None:
    store = make_store({"d": (task_type, long_rows(60))})
    schedule = make_schedule(store, make_settings(store, mode=mode, max_prompt_tokens=60))
    at_limit = set()
    for step in range(4):
        plan = plan_step(store, schedule, step)
        lengths = plan_lengths(store, schedule.limits, plan)
        ids = [sequence_ids(store, schedule.limits, plan, s) for s in range(plan.num_sequences)]
        assert lengths.tolist() == [len(i) for i in ids] and lengths.dtype == np.int64
        assert max(lengths[: plan.num_queries]) <= 60 and max(lengths[plan.num_queries :]) <= 16
        at_limit |= set(lengths.tolist())
        assert all(i[0] == 1 and i[-1] == 2 for i in ids)
    assert 16 in at_limit, "the data must reach the limits, or this test shows little"


def test_sequences_of_a_plan_are_the_texts_that_it_names() -> None:
    for task_type in TASK_TYPES:
        rows = [row | {"category": f"label{i % 3}"} for i, row in enumerate(plain_rows(40, 3))]
        store = make_store({"d": (task_type, rows)})
        wide = {k: 1000 for k in ("max_query_tokens", "max_passage_tokens", "max_example_query_tokens")}
        wide |= {"max_example_passage_tokens": 1000, "max_prompt_tokens": 10_000}
        schedule = make_schedule(store, make_settings(store, **wide))
        plan = plan_step(store, schedule, 0)
        words = {int(p[1]): t for p, t in zip(store.pieces["query"], store.texts, strict=True)}
        for b, r in enumerate(plan.row_B.tolist()):
            ids = sequence_ids(store, schedule.limits, plan, b).tolist()
            shown = plan.example_row_E[plan.example_offsets[b] : plan.example_offsets[b + 1]].tolist()
            queries = [words[ids[i + 1]] for i in range(len(ids)) if ids[i] == QUERY]
            assert queries == [rows[e]["query"] for e in shown] + [rows[r]["query"]]
            assert ids.count(RESPONSE) == len(shown) + 1 and ids.count(INSTRUCT) == len(shown) + 1
        for p, text in enumerate(plan.passage_text_P.tolist()):
            ids = sequence_ids(store, schedule.limits, plan, plan.num_queries + p).tolist()
            wrapped = task_type in ("symmetric_sts", "symmetric_clustering")
            body = store.piece(text, "query" if wrapped else "passage").tolist()
            head, end = ([*store.instruction_pieces[0]], [5]) if wrapped else ([], [])
            assert ids == [1, *head, *body, *end, 2]


def test_filler_keeps_the_length_and_the_query_but_no_content() -> None:
    store = make_store({"d": ("normal", plain_rows(40, 1))})
    real, filler = (make_schedule(store, make_settings(store, mode=mode)) for mode in ("in_batch", "filler"))
    plan, blank = plan_step(store, real, 0), plan_step(store, filler, 0)
    with_examples = 0
    for b in range(plan.num_queries):
        first, second = sequence_ids(store, real.limits, plan, b), sequence_ids(store, filler.limits, blank, b)
        alone, _ = compose_query(
            TOKENS, real.limits, store.instruction_pieces[0], store.piece(int(plan.query_text_B[b]), "query")
        )
        num_filler = len(first) - len(alone)
        with_examples += num_filler > 0
        assert len(first) == len(second)
        assert second.tolist() == [1, *[7] * num_filler, *alone[1:].tolist()]
    assert with_examples > 3


@pytest.mark.parametrize("template_name", ["bge_en_icl", "instruct_query", "bge_en_icl_passage_prompt"])
@pytest.mark.parametrize("folder", ["smollm2_tokenizer_dir", "mistral_tokenizer_dir", "qwen_style_tokenizer_dir"])
def test_composed_ids_are_those_of_the_rendered_text(
    folder: str, template_name: str, request: pytest.FixtureRequest
) -> None:
    template = get_template(template_name)
    pt = load_tokenizer(request.getfixturevalue(folder), template)
    rows = [row for name in ("squad_newwiki", "banking77", "snli") for row in sample_rows(name, 6)]
    texts = [(row["prompt"], row["query"], row["pos"][0]) for row in rows]
    instruct, queries, responses = (
        tokenize_pieces(pt, [row[i] for row in texts], kind) for i, kind in enumerate(("instruct", "query", "response"))
    )
    passages = tokenize_pieces(pt, [row[2] for row in texts], "passage")

    def whole(text: str) -> list[int]:
        ids = pt.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*pt.tokens.bos, *ids, *pt.tokens.eos]

    # A tokenizer that begins each text with a space begins the instruction piece with it, also inside a prompt; a
    # marker in front leaves no place for one.
    space_inside = folder == "mistral_tokenizer_dir" and not template.markers
    for i in range(3, len(rows)):
        pieces = [(instruct[j], queries[j], responses[j]) for j in range(i - 3, i)]
        ids, dropped = compose_query(pt.tokens, WIDE, instruct[i], queries[i], pieces)
        assert dropped == 0
        if not space_inside:
            assert ids.tolist() == whole(render_query(template, *texts[i][:2], texts[i - 3 : i]))
        wrapped = compose_wrapped(pt.tokens, WIDE, instruct[i], queries[i]).tolist()
        assert wrapped == whole(render_query(template, *texts[i][:2]))
        assert compose_passage(pt.tokens, WIDE, passages[i]).tolist() == whole(render_passage(template, texts[i][2]))
