"""Plans: pure, complete, the same for every world size; examples and candidates as the type table says."""

import tracemalloc
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_store import make_settings, make_store, plain_rows

from pipeline.data import sampling
from pipeline.data.composing import plan_lengths
from pipeline.data.packing import deal
from pipeline.data.sampling import check_world_size, locate_step, make_schedule, plan_step, share_saved
from pipeline.data.schedule import share_steps
from pipeline.datatypes import RULES, TASK_TYPES, BatchPlan
from pipeline.settings import DatasetSettings


def same(first: BatchPlan, second: BatchPlan, skip: tuple[str, ...] = ()) -> bool:
    pairs = [(getattr(first, f.name), getattr(second, f.name)) for f in fields(BatchPlan) if f.name not in skip]
    return all(np.array_equal(a, b, equal_nan=isinstance(a, np.ndarray) and a.dtype.kind == "f") for a, b in pairs)


def mixed_store() -> Any:
    return make_store(
        {
            "qa": ("normal", plain_rows(50, 3, "qa")),
            "nli": ("only_1neg", plain_rows(21, 3, "nli")),
            "sts": ("symmetric_sts", plain_rows(14, 2, "sts")),
            "tiny": ("symmetric_class", plain_rows(3, 5, "tiny")),
        }
    )


def examples_of(plan: BatchPlan, b: int) -> slice:
    return slice(int(plan.example_offsets[b]), int(plan.example_offsets[b + 1]))


def group_of(plan: BatchPlan, b: int) -> np.ndarray:
    """Text ids of row b's candidates."""
    group = slice(int(plan.group_offsets[b]), int(plan.group_offsets[b + 1]))
    return plan.passage_text_P[plan.candidate_C[group]]


# --- purity ---


def test_plans_out_of_order_equal_plans_in_order() -> None:
    store = mixed_store()
    schedule = make_schedule(store, make_settings(store))
    num_steps = 3 * schedule.steps_per_epoch
    in_order = [plan_step(store, schedule, step) for step in range(num_steps)]
    for step in np.random.default_rng(0).permutation(num_steps).tolist():
        fresh = make_schedule(store, make_settings(store))
        assert same(plan_step(store, fresh, step), in_order[step])
    assert [p.step for p in in_order] == list(range(num_steps))
    assert [p.epoch for p in in_order] == [s // schedule.steps_per_epoch for s in range(num_steps)]


def test_another_seed_gives_other_rows_and_examples() -> None:
    store = make_store({"qa": ("normal", plain_rows(500))})
    first, second = (plan_step(store, make_schedule(store, make_settings(store, seed=s)), 0) for s in (0, 1))
    assert set(first.row_B.tolist()) != set(second.row_B.tolist())
    assert not np.array_equal(first.example_offsets, second.example_offsets)


def test_no_global_random_state_is_read_or_touched() -> None:
    store = mixed_store()
    schedule = make_schedule(store, make_settings(store))
    np.random.seed(1)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    first = plan_step(store, schedule, 3)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]
    np.random.seed(2)
    assert same(first, plan_step(store, schedule, 3))


def test_plan_is_the_same_for_every_world_size() -> None:
    """Nothing of a plan depends on ranks; dealing gives each of its sequences to exactly one rank."""
    store = mixed_store()
    settings = make_settings(store)
    schedule = make_schedule(store, settings)
    for step in range(0, schedule.steps_per_epoch, 3):
        for world_size in (1, 2, 3, 4):
            plan = plan_step(store, schedule, step)
            ranks = deal(plan_lengths(store, schedule.limits, plan), world_size, 200)
            dealt = np.concatenate([chunk for rank in ranks for chunk in rank])
            assert sorted(dealt.tolist()) == list(range(plan.num_sequences))


def test_types_and_shapes_of_a_plan_do_not_change_with_its_content() -> None:
    int32 = {"instruction_B", "example_instruction_E", "passage_instruction_P"}
    store = mixed_store()
    for mode in ("in_batch", "pool", "fixed", "none"):
        for distinct in (True, False):
            schedule = make_schedule(store, make_settings(store, mode=mode))
            schedule = replace(schedule, distinct_passages=distinct)
            for step in range(schedule.steps_per_epoch):
                plan = plan_step(store, schedule, step)
                sizes = {"B": plan.num_queries, "E": int(plan.example_offsets[-1]), "P": plan.num_passages}
                sizes["C"] = int(plan.group_offsets[-1])
                for f in fields(BatchPlan):
                    value = getattr(plan, f.name)
                    if not isinstance(value, np.ndarray):
                        assert type(value) in (int, bool, str), f.name
                        continue
                    dtype = "float32" if f.name == "teacher_score_C" else "int32" if f.name in int32 else "int64"
                    assert value.dtype == dtype, f.name
                    assert len(value) == sizes.get(f.name[-1], plan.num_queries + 1), f.name


# --- schedule ---


def test_every_row_is_visited_once_a_pass_and_every_dataset_every_epoch() -> None:
    for use_buckets in (True, False):
        store = make_store(
            {"qa": ("normal", plain_rows(90, 1, "qa")), "nli": ("only_1neg", plain_rows(21, 1, "nli"))}, buckets=[40]
        )
        schedule = make_schedule(store, make_settings(store, use_buckets=use_buckets))
        for epoch in range(2):
            seen: dict[int, list[int]] = {0: [], 1: []}
            for step in range(schedule.steps_per_epoch):
                plan = plan_step(store, schedule, epoch * schedule.steps_per_epoch + step)
                assert len(np.unique(plan.row_B)) == 8
                seen[plan.dataset] += plan.row_B[: 8 - plan.num_rows_revisited].tolist()
            assert sorted(seen[0]) == list(range(90)) and sorted(seen[1]) == list(range(21))


def test_order_of_datasets_differs_between_epochs() -> None:
    store = mixed_store()
    schedule = make_schedule(store, make_settings(store))
    n = schedule.steps_per_epoch
    orders = [[locate_step(schedule, epoch * n + i)[1] for i in range(n)] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_epochs_group_rows_anew_and_continue_unfinished_passes() -> None:
    store = make_store({"a": ("normal", plain_rows(64, 1, "a")), "b": ("normal", plain_rows(16, 1, "b"))})
    settings = make_settings(store, mix_temperature=0.0)
    schedule = make_schedule(store, settings)
    assert [d.steps_per_epoch for d in schedule.datasets] == [5, 5]
    n = schedule.steps_per_epoch
    plans = [plan_step(store, schedule, step) for step in range(8 * n)]
    batches = {tuple(sorted(p.row_B.tolist())) for p in plans if p.dataset == 0}
    assert len(batches) == 40, "no batch comes back"
    rows = np.bincount(np.concatenate([p.row_B for p in plans if p.dataset == 0]))
    assert rows.tolist() == [5] * 64, "8 epochs of 5 steps are 5 whole passes of 8 batches"


@pytest.mark.parametrize(
    ("batches", "temperature", "steps"),
    [
        ([90, 9, 1], 1.0, [90, 9, 1]),
        ([90, 9, 1], 0.0, [34, 33, 33]),
        ([81, 9], 0.5, [68, 22]),  # 90 * 9 / 12 = 67.5, 22.5
        ([1000, 1, 1], 2.0, [1000, 1, 1]),
        ([1, 1], 0.3, [1, 1]),
    ],
)
def test_steps_are_shared_by_temperature(batches: list[int], temperature: float, steps: list[int]) -> None:
    assert share_steps(batches, temperature) == steps


def test_steps_always_add_up_and_none_is_dropped() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        batches = rng.integers(1, rng.integers(2, 3000), rng.integers(1, 12)).tolist()
        steps = share_steps(batches, float(rng.uniform(0, 3)))
        assert sum(steps) == sum(batches) and min(steps) >= 1
    with pytest.raises(ValueError, match=r"batch.mix_temperature=-1"):
        share_steps([3], -1)


def test_temperature_visits_small_datasets_more_often_and_passes_stay_whole() -> None:
    store = make_store({"big": ("normal", plain_rows(160, 1, "big")), "small": ("normal", plain_rows(20, 1, "small"))})
    schedule = make_schedule(store, make_settings(store, mix_temperature=0.0))
    assert [d.steps_per_epoch for d in schedule.datasets] == [12, 11]
    rows = np.zeros(20, dtype=int)
    for step in range(schedule.steps_per_epoch):
        plan = plan_step(store, schedule, step)
        if plan.dataset == 1:
            rows[plan.row_B[: 8 - plan.num_rows_revisited]] += 1
    assert rows.min() >= 3 and rows.max() - rows.min() <= 1


def test_short_dataset_gives_one_batch_of_all_its_rows() -> None:
    store = mixed_store()
    schedule = make_schedule(store, make_settings(store))
    tiny = schedule.datasets[3]
    assert (tiny.steps_per_epoch, tiny.num_queries) == (1, 3)
    plans = [plan_step(store, schedule, step) for step in range(schedule.steps_per_epoch)]
    (plan,) = [p for p in plans if p.dataset == 3]
    assert sorted(plan.row_B.tolist()) == [0, 1, 2] and plan.num_rows_revisited == 0


# --- the type table ---


@pytest.mark.parametrize(
    ("task_type", "queries", "group", "in_batch", "wrapped"),
    [
        ("normal", 8, 4, True, False),
        ("only_1neg", 8, 2, True, False),
        ("symmetric_sts", 4, 4, False, True),
        ("symmetric_class", 4, 4, False, False),
        ("symmetric_clustering", 4, 4, False, True),
    ],
)
def test_type_table(task_type: str, queries: int, group: int, in_batch: bool, wrapped: bool) -> None:
    rows = [row | {"category": f"c{i % 3}", "instruction": "sort"} for i, row in enumerate(plain_rows(30, 6))]
    store = make_store({"d": (task_type, rows)})
    plan = plan_step(store, make_schedule(store, make_settings(store)), 0)
    assert set(RULES) == set(TASK_TYPES)
    assert plan.num_queries == queries and plan.in_batch_negatives is in_batch and plan.task_type == task_type
    assert np.diff(plan.group_offsets).tolist() == [group] * queries
    assert (plan.passage_instruction_P == (0 if wrapped else -1)).all()
    for b in range(queries):
        row = rows[plan.row_B[b]]
        texts = [store.text(t) for t in group_of(plan, b)]
        assert texts[0] == row["pos"][0] and len(set(texts[1:])) == group - 1 and set(texts[1:]) <= set(row["neg"])
        for e in range(*examples_of(plan, b).indices(10**6)):
            shown = rows[plan.example_row_E[e]]
            response = shown["category"] if task_type == "symmetric_clustering" else shown["pos"][0]
            assert store.text(plan.example_query_E[e]) == shown["query"]
            assert store.text(plan.example_response_E[e]) == response
    assert plan.example_offsets[-1] > 0


def test_dataset_settings_override_the_type_table() -> None:
    store = make_store({"d": ("symmetric_sts", plain_rows(30, 6))})
    wanted = DatasetSettings(name="d", path="d.jsonl", in_batch_negatives=True, group_size=7)
    plan = plan_step(store, make_schedule(store, make_settings(store, datasets=(wanted,))), 0)
    assert plan.in_batch_negatives and np.diff(plan.group_offsets).tolist() == [7] * 4


def test_groups_are_ragged_and_filled_only_on_request() -> None:
    rows = [row | {"neg": row["neg"][: i % 4]} for i, row in enumerate(plain_rows(8, 3))]
    store = make_store({"d": ("normal", rows)})
    plan = plan_step(store, make_schedule(store, make_settings(store, group_size=4)), 0)
    assert np.diff(plan.group_offsets).tolist() == [1 + len(rows[r]["neg"]) for r in plan.row_B]
    assert plan.num_candidates_repeated == 0
    filled = plan_step(store, make_schedule(store, make_settings(store, group_size=4, fill_groups=True)), 0)
    expected = [4 if rows[r]["neg"] else 1 for r in filled.row_B]
    assert np.diff(filled.group_offsets).tolist() == expected
    assert filled.num_candidates_repeated == 2 * (2 + 1)
    for b, r in enumerate(filled.row_B):
        assert {store.text(t) for t in group_of(filled, b)[1:]} == set(rows[r]["neg"])


def test_negatives_are_a_uniform_draw_without_replacement() -> None:
    store = make_store({"d": ("normal", plain_rows(8, 5))})
    schedule = make_schedule(store, make_settings(store, group_size=3))
    counts: dict[str, int] = {}
    for step in range(400):
        plan = plan_step(store, schedule, step)
        for b in range(8):
            drawn = group_of(plan, b)[1:]
            assert len(set(drawn.tolist())) == 2
            for t in drawn:
                place = store.text(t).split()[0].rsplit("-", 1)[1]
                counts[place] = counts.get(place, 0) + 1
    assert len(counts) == 5
    assert all(abs(c - 1280) < 120 for c in counts.values())  # sigma 28


def test_several_positives_one_drawn_a_visit_with_its_score() -> None:
    rows = plain_rows(8, 2)
    for i, row in enumerate(rows):
        row["pos"] = [f"a{i}", f"b{i}", f"c{i}"]
        if i % 2:
            row |= {"pos_scores": [1.0, 2.0, 3.0], "neg_scores": [-1.0, -2.0]}
    store = make_store({"d": ("normal", rows)})
    schedule = make_schedule(store, make_settings(store))
    drawn = set()
    for step in range(30):
        plan = plan_step(store, schedule, step)
        for b, r in enumerate(plan.row_B.tolist()):
            scores = plan.teacher_score_C[plan.group_offsets[b] : plan.group_offsets[b + 1]]
            texts = [store.text(t) for t in group_of(plan, b)]
            drawn.add(texts[0])
            if r % 2 == 0:
                assert np.isnan(scores).all()
                continue
            known = dict(zip(rows[r]["pos"] + rows[r]["neg"], [1.0, 2.0, 3.0, -1.0, -2.0], strict=True))
            assert scores.tolist() == [known[t] for t in texts]
    assert drawn == {f"{x}{i}" for x in "abc" for i in range(8)}
    unscored = make_store({"d": ("normal", plain_rows(8))})
    plan = plan_step(unscored, make_schedule(unscored, make_settings(unscored)), 0)
    assert np.isnan(plan.teacher_score_C).all() and plan.teacher_score_C.dtype == np.float32


# --- distinct passages ---


def shared_store(task_type: str) -> Any:
    rows = [
        {"query": f"q{i}", "pos": [f"label {i % 3}"], "neg": [f"label {(i + j) % 3}" for j in (1, 2)], "category": "c"}
        | {"instruction": f"sort {i % 2}"}
        for i in range(24)
    ]
    return make_store({"d": (task_type, rows)})


@pytest.mark.parametrize("task_type", ["normal", "symmetric_class", "symmetric_sts", "symmetric_clustering"])
def test_distinct_passages_hold_the_same_candidates_as_the_repeated_twin(task_type: str) -> None:
    store = shared_store(task_type)
    schedule = make_schedule(store, make_settings(store))
    once, twin = (plan_step(store, replace(schedule, distinct_passages=d), 1) for d in (True, False))
    assert same(once, twin, skip=("candidate_C", "passage_text_P", "passage_instruction_P"))
    for name in ("passage_text_P", "passage_instruction_P"):
        assert np.array_equal(getattr(once, name)[once.candidate_C], getattr(twin, name)[twin.candidate_C])
    keys = list(zip(once.passage_text_P.tolist(), once.passage_instruction_P.tolist(), strict=True))
    assert len(set(keys)) == len(keys)
    assert len(keys) == (6 if RULES[task_type].wrap_passages else 3), "wrapped passages differ by instruction"
    assert once.candidate_C[0] == 0 and share_saved(twin) == 0
    assert share_saved(once) == 1 - len(keys) / (3 * once.num_queries)


# --- examples ---


def test_number_of_examples_is_about_uniform() -> None:
    store = make_store({"d": ("normal", plain_rows(640, 1))})
    schedule = make_schedule(store, make_settings(store, queries=64))
    counts = np.zeros(6, dtype=int)
    for step in range(30):
        plan = plan_step(store, schedule, step)
        assert plan.num_examples_dropped == plan.num_examples_missing == 0
        counts += np.bincount(np.diff(plan.example_offsets), minlength=6)
    assert counts.sum() == 1920 and counts.min() > 250 and counts.max() < 390  # 320 each, sigma 16


def test_in_batch_examples_come_from_the_global_batch_without_the_row_itself_or_copies() -> None:
    store = make_store({"d": ("normal", plain_rows(64, 1))})
    schedule = make_schedule(store, make_settings(store))
    shown_places = set()
    for step in range(schedule.steps_per_epoch):
        plan = plan_step(store, schedule, step)
        for b, row in enumerate(plan.row_B.tolist()):
            shown = plan.example_row_E[examples_of(plan, b)].tolist()
            assert set(shown) <= set(plan.row_B.tolist()) - {row}
            assert len(set(shown)) == len(shown)
            shown_places |= {plan.row_B.tolist().index(s) for s in shown}
    assert shown_places == set(range(8))


@pytest.mark.parametrize("mode", ["in_batch", "pool", "nearest", "fixed", "filler"])
@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_exclusions(mode: str, task_type: str) -> None:
    """Twice the same query, reverse pairs, and positives shared by many rows."""
    rows = []
    for i in range(12):
        rows.append({"query": f"q{i // 2}", "pos": [f"p{i % 3}"], "neg": ["n"], "category": f"c{i % 3}"})
        rows.append({"query": f"p{i % 3}", "pos": [f"q{i // 2}"], "neg": ["n"], "category": f"c{i % 3}"})
    for i, row in enumerate(rows):
        row["nearest"] = [j + 1 for j in range(i - 8, i + 8) if j != i and 0 <= j < len(rows)]
    store = make_store({"d": (task_type, rows)})
    schedule = make_schedule(store, make_settings(store, mode=mode))
    same_positive_shown = 0
    for step in range(40):
        plan = plan_step(store, schedule, step)
        for b, r in enumerate(plan.row_B.tolist()):
            own = rows[r]
            for e in plan.example_row_E[examples_of(plan, b)].tolist():
                assert e != r and rows[e]["query"] != own["query"]
                same_positive_shown += rows[e]["pos"] == own["pos"]
                if RULES[task_type].exclude_same_positive:
                    assert rows[e]["pos"] != own["pos"] and rows[e]["query"] != own["pos"][0]
    kept = task_type in ("symmetric_class", "symmetric_clustering")
    assert (same_positive_shown > 0) == kept


def test_what_a_small_batch_cannot_show_is_counted() -> None:
    store = make_store({"d": ("normal", plain_rows(3, 1))})
    schedule = make_schedule(store, make_settings(store, queries=3, max_examples=9))
    missing = 0
    for step in range(20):
        plan = plan_step(store, schedule, step)
        sizes = np.diff(plan.example_offsets)
        assert sizes.max() <= 2
        for b in range(3):
            assert len(set(plan.example_row_E[examples_of(plan, b)].tolist())) == sizes[b]
        missing += plan.num_examples_missing
    assert missing > 0


def test_rows_hard_to_serve_still_get_every_pair_that_they_may_show() -> None:
    """Nearly all rows share one positive: random tries fail, the exact draw must find the few others."""
    rows = [{"query": f"q{i}", "pos": ["common"], "neg": ["n"]} for i in range(61)]
    rows += [{"query": f"r{i}", "pos": [f"rare{i}"], "neg": ["n"]} for i in range(3)]
    store = make_store({"d": ("normal", rows)})
    for mode in ("in_batch", "pool"):
        schedule = make_schedule(store, make_settings(store, queries=64, mode=mode))
        plan = plan_step(store, schedule, 0)
        sizes = np.diff(plan.example_offsets)
        common = plan.row_B < 61
        assert sizes[common].max() == 3 and plan.num_examples_missing > 0
        for b in np.flatnonzero(common).tolist():
            shown = plan.example_row_E[examples_of(plan, b)].tolist()
            assert set(shown) <= {61, 62, 63} and len(set(shown)) == len(shown)
        drawn = {int(n) for n in sizes[common]}
        assert drawn == {0, 1, 2, 3}


def test_pool_examples_come_from_the_whole_dataset() -> None:
    store = make_store({"d": ("normal", plain_rows(400, 1))})
    plan = plan_step(store, make_schedule(store, make_settings(store, mode="pool", queries=40)), 0)
    outside = ~np.isin(plan.example_row_E, plan.row_B)
    assert outside.mean() > 0.7 and len(plan.example_row_E) > 40


def nearest_rows() -> list[dict[str, Any]]:
    """Rows with ragged random lists of neighbours, few texts and several positives: much that may not be shown."""
    rng = np.random.default_rng(0)
    rows = plain_rows(60, 1)
    for i, row in enumerate(rows):
        row["query"] = f"q{i % 50}"
        row["pos"] = [f"p{p}" for p in rng.choice(25, rng.integers(1, 4), replace=False)]
        row["nearest"] = (1 + rng.permutation(np.delete(np.arange(60), i))[: rng.integers(0, 9)]).tolist()
    return rows


@pytest.mark.parametrize("task_type", ["normal", "symmetric_class"])
def test_nearest_examples_are_those_of_the_slow_twin(task_type: str) -> None:
    rows = nearest_rows()
    store = make_store({"d": (task_type, rows)})
    schedule = make_schedule(store, make_settings(store, mode="nearest"))
    shown_positives, missing, shorter = set(), 0, 0
    for step in range(4 * schedule.steps_per_epoch):
        plan = plan_step(store, schedule, step)
        wanted_B = sampling._generator(schedule, sampling._EXAMPLES, step).integers(0, 6, plan.num_queries)
        for b, r in enumerate(plan.row_B.tolist()):
            part = examples_of(plan, b)
            shown = plan.example_row_E[part].tolist()
            responses = [store.text(t) for t in plan.example_response_E[part].tolist()]
            assert all(response in rows[e]["pos"] for e, response in zip(shown, responses, strict=True))
            own = store.text(group_of(plan, b)[0])
            # What is drawn of a row with several positives decides whether the query may show it.
            sure = [e - 1 for e in rows[r]["nearest"] if rows[e - 1]["query"] != rows[r]["query"]]
            maybe = list(sure)
            if RULES[task_type].exclude_same_positive:
                maybe = [e for e in sure if rows[e]["pos"] != [own]]
                sure = [e for e in sure if own not in rows[e]["pos"]]
                assert own not in responses
            assert shown == [e for e in reversed(maybe) if e in shown], "the nearest stands last"
            skipped = [e for e in maybe[: maybe.index(shown[0])] if e not in shown] if shown else []
            assert not set(skipped) & set(sure), "no row that may be shown is passed over for a farther one"
            wanted = int(wanted_B[b])
            assert len(shown) <= wanted and (len(shown) == wanted or len(shown) >= len(sure))
            missing += wanted - len(shown)
            shorter += len(shown) < wanted
            shown_positives |= set(zip(shown, responses, strict=True))
        assert plan.num_examples_missing == missing
        missing = 0
    assert shorter > 0 and len(shown_positives) > len({row for row, _ in shown_positives}), "positives are drawn"


def test_nearest_examples_that_do_not_fit_go_farthest_first() -> None:
    rows = plain_rows(20, 1)
    for i, row in enumerate(rows):
        row["nearest"] = [1 + (i + j) % 20 for j in range(1, 8)]
    store = make_store({"d": ("normal", rows)})
    settings = make_settings(store, mode="nearest", max_prompt_tokens=50)
    schedule, dropped = make_schedule(store, settings), 0
    for step in range(6):
        plan = plan_step(store, schedule, step)
        dropped += plan.num_examples_dropped
        for b, r in enumerate(plan.row_B.tolist()):
            shown = plan.example_row_E[examples_of(plan, b)].tolist()
            assert shown == [(r + j) % 20 for j in range(len(shown), 0, -1)]
    assert dropped > 0


def test_fixed_examples_are_the_same_for_every_query_and_step() -> None:
    store = make_store({"d": ("normal", plain_rows(40, 1))})
    schedule = make_schedule(store, make_settings(store, mode="fixed"))
    fixed = schedule.datasets[0].fixed_rows
    assert len(set(fixed)) == 3
    met = 0
    for step in range(schedule.steps_per_epoch):
        plan = plan_step(store, schedule, step)
        for b, row in enumerate(plan.row_B.tolist()):
            met += row in fixed
            assert plan.example_row_E[examples_of(plan, b)].tolist() == [f for f in fixed if f != row]
        assert plan.num_examples_missing == int(np.isin(plan.row_B, fixed).sum())
    assert met == 3
    other = make_schedule(store, make_settings(store, mode="fixed", seed=5))
    assert set(other.datasets[0].fixed_rows) != set(fixed)
    assert len(make_schedule(store, make_settings(store, "fixed", max_examples=2)).datasets[0].fixed_rows) == 2


def test_fixed_examples_have_different_queries() -> None:
    rows = [{"query": f"q{i // 10}", "pos": [f"p{i}"], "neg": ["n"]} for i in range(40)]
    store = make_store({"d": ("normal", rows)})
    for seed in range(20):
        fixed = make_schedule(store, make_settings(store, mode="fixed", seed=seed)).datasets[0].fixed_rows
        assert len({rows[r]["query"] for r in fixed}) == 3


def test_examples_off_leaves_rows_and_candidates_as_they_were() -> None:
    store = mixed_store()
    skip = tuple(f.name for f in fields(BatchPlan) if "example" in f.name or f.name == "filler")
    for step in range(6):
        plans = [
            plan_step(store, make_schedule(store, make_settings(store, mode=mode, max_examples=k)), step)
            for mode, k in (("in_batch", 5), ("none", 5), ("in_batch", 0), ("pool", 5), ("fixed", 5))
        ]
        assert all(same(plans[0], plan, skip=skip) for plan in plans[1:])
        assert plans[1].example_offsets[-1] == plans[2].example_offsets[-1] == 0


def test_filler_has_the_examples_of_in_batch_and_says_so() -> None:
    store = mixed_store()
    real, filler = (
        plan_step(store, make_schedule(store, make_settings(store, mode=m)), 2) for m in ("in_batch", "filler")
    )
    assert same(real, filler, skip=("filler",)) and filler.filler and not real.filler


def test_examples_are_dropped_from_the_left_in_the_plan() -> None:
    store = make_store({"d": ("normal", plain_rows(80, 1))})
    wide = make_schedule(store, make_settings(store))
    tight = make_schedule(store, make_settings(store, max_prompt_tokens=50))
    dropped = 0
    for step in range(10):
        full, cut = plan_step(store, wide, step), plan_step(store, tight, step)
        lengths = plan_lengths(store, tight.limits, cut)
        assert lengths[: cut.num_queries].max() <= 50
        total = 0
        for b in range(cut.num_queries):
            before = full.example_row_E[examples_of(full, b)].tolist()
            after = cut.example_row_E[examples_of(cut, b)].tolist()
            assert after == before[len(before) - len(after) :]
            total += len(before) - len(after)
            if len(after) < len(before):  # one more would not have fitted
                one = replace_examples(full, b, len(after) + 1)
                assert plan_lengths(store, wide.limits, one)[b] > 50
        assert cut.num_examples_dropped == total
        dropped += total
    assert dropped > 0


def replace_examples(plan: BatchPlan, b: int, keep: int) -> BatchPlan:
    """The plan in which only row b has examples: its last `keep`."""
    part = slice(int(plan.example_offsets[b + 1]) - keep, int(plan.example_offsets[b + 1]))
    names = ("example_row_E", "example_query_E", "example_response_E", "example_instruction_E")
    offsets = np.where(np.arange(plan.num_queries + 1) > b, keep, 0)
    return replace(plan, example_offsets=offsets, **{name: getattr(plan, name)[part] for name in names})


# --- user faults ---


def test_world_size_must_divide_every_batch() -> None:
    store = mixed_store()
    schedule = make_schedule(store, make_settings(store))
    for world_size in (1, 2, 4):  # the 3 rows of `tiny` are one short batch: exempt
        check_world_size(schedule, world_size)
    with pytest.raises(ValueError, match=r"'qa': batch.queries=8 is not divisible by the world size 3"):
        check_world_size(schedule, 3)
    with pytest.raises(ValueError, match=r"'sts': batch.symmetric_queries=4 is not divisible by the world size 8"):
        check_world_size(schedule, 8)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (plain_rows(1), {}, r"dataset 'd' has one row"),
        (plain_rows(9), {"queries": 1}, r"dataset 'd' has batches of one query"),
        (plain_rows(9), {"max_prompt_tokens": 18}, r"no example can fit in dataset 'd'.*example has 10 .*query 9.*=18"),
        (
            plain_rows(9),
            {"max_example_query_tokens": 4},
            r"instruction 'find' has 3 tokens.*max_example_query_tokens=4",
        ),
        (plain_rows(9), {"max_query_tokens": 7}, r"instruction 'find'.*max_query_tokens=7"),
        (plain_rows(9), {"mix_temperature": -2.0}, r"batch.mix_temperature=-2.0"),
        (
            plain_rows(9),
            {"datasets": (DatasetSettings(name="e", path="e"),)},
            r"only in the recipe \['e'\], only in the store \['d'\]",
        ),
        (
            plain_rows(9),
            {"datasets": (DatasetSettings(name="d", path="d", type="only_1neg"),)},
            r"'d' is of type 'only_1neg' in the recipe and 'normal' in the store",
        ),
        (
            plain_rows(9),
            {"datasets": (DatasetSettings(name="d", path="d", in_batch_negatives=False, group_size=1),)},
            r"'d'.*group size 1 and no in-batch negatives",
        ),
    ],
)
def test_user_faults_are_named(rows: list[dict[str, Any]], changes: dict[str, Any], message: str) -> None:
    store = make_store({"d": ("normal", rows)})
    with pytest.raises(ValueError, match=message):
        make_schedule(store, make_settings(store, **changes))


def test_faults_of_examples_are_none_without_examples() -> None:
    store = make_store({"d": ("normal", plain_rows(1))})
    plan = plan_step(store, make_schedule(store, make_settings(store, "none", max_example_query_tokens=1)), 5)
    assert plan.num_queries == 1 and plan.example_offsets.tolist() == [0, 0]


@pytest.mark.parametrize("lists", [{}, {"nearest": []}])
def test_nearest_without_neighbours_names_the_command_that_finds_them(lists: dict[str, Any]) -> None:
    store = make_store({"d": ("normal", [row | lists for row in plain_rows(9)])})
    with pytest.raises(ValueError, match=r"'d' has no neighbours.*=nearest.*mine_negatives.py"):
        make_schedule(store, make_settings(store, mode="nearest"))
    assert make_schedule(store, make_settings(store)).steps_per_epoch == 2


def test_clustering_rows_without_category_are_not_shown() -> None:
    rows = [row | ({"category": "c"} if i % 2 else {}) for i, row in enumerate(plain_rows(40, 2))]
    store = make_store({"d": ("symmetric_clustering", rows)})
    schedule = make_schedule(store, make_settings(store, symmetric_queries=20))
    plans = [plan_step(store, schedule, step) for step in range(2)]
    shown = np.concatenate([plan.example_row_E for plan in plans])
    assert len(shown) > 20 and (shown % 2 == 1).all()
    bare = make_store({"d": ("symmetric_clustering", plain_rows(10))})
    with pytest.raises(ValueError, match=r"no row of dataset 'd' has a category"):
        make_schedule(bare, make_settings(bare))


# --- size ---


class Formula:
    """A column of any length, element i = scale * i + start, that counts the elements read."""

    def __init__(self, scale: int, start: int = 0) -> None:
        self.scale, self.start, self.num_read = scale, start, 0

    def __getitem__(self, index: Any) -> np.ndarray:
        index = np.arange(index.start, index.stop) if isinstance(index, slice) else np.asarray(index)
        self.num_read += index.size
        return self.scale * index + self.start


def test_hundred_million_rows_cost_no_table() -> None:
    """Starting reads one block of rows, a step a few rows for each of its queries, and neither holds a table."""
    n = 100_000_000
    columns = {
        "query_text_N": Formula(1),
        "instruction_N": Formula(0),
        "category_text_N": Formula(0, -1),
        "pos_offsets": Formula(1),
        "pos_text": Formula(1, n),
        "neg_offsets": Formula(7),
        "neg_text": Formula(1, 2 * n),
    }
    small = make_store({"d": ("normal", plain_rows(2))})
    table = SimpleNamespace(**vars(small.datasets[0]) | columns | {"num_rows": n})
    table.bucket_offsets = np.array([0, n // 3, n // 2, n], dtype=np.int64)
    store = SimpleNamespace(**vars(small) | {"datasets": (table,)})
    store.piece_lengths = lambda text_ids, kind: 5 + text_ids % 7
    tracemalloc.start()
    schedule = make_schedule(store, make_settings(store, queries=512, group_size=8))
    read_at_start = sum(column.num_read for column in columns.values())
    plans = [plan_step(store, schedule, step) for step in (0, 190_000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    read_in_steps = sum(column.num_read for column in columns.values()) - read_at_start
    assert schedule.steps_per_epoch == -(-n // 512)
    assert [len(np.unique(plan.row_B)) for plan in plans] == [512, 512]
    assert plans[1].num_passages == 512 * 8 and len(plans[1].example_row_E) > 1000
    assert read_at_start < 2_000_000 and read_in_steps < 100_000 and peak < 60_000_000
