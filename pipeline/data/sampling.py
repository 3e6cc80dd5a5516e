"""The plan of a step: its rows, examples and passages, as a pure function of (store, schedule, step).

No hidden state, so resume needs the step number only, step 7,000 prints without the first 6,999, and a plan is the
same whatever the number of ranks. Every random draw has a key of its own: a run without examples sees the same rows,
positives and negatives as the run with examples that it is compared with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.bucketing import batch_rows
from pipeline.data.composing import example_lengths, query_lengths
from pipeline.data.examples import (
    Pairs,
    draw_entries,
    make_pairs,
    show_fixed,
    show_from_batch,
    show_from_dataset,
    show_nearest,
)
from pipeline.data.permutation import mix_key, permute
from pipeline.data.schedule import (
    NUM_FIXED_EXAMPLES,
    DatasetSchedule,
    Schedule,
    check_world_size,
    make_schedule,
)
from pipeline.datatypes import BatchPlan

if TYPE_CHECKING:
    from pipeline.data.store import DatasetTable, TokenStore

__all__ = ["Schedule", "check_world_size", "locate_step", "make_schedule", "plan_step", "share_saved"]

# Purposes of keys.
_ORDER, _ROWS, _POSITIVES, _NEGATIVES, _EXAMPLES = range(1, 6)


def plan_step(store: TokenStore, schedule: Schedule, step: int) -> BatchPlan:
    """Plan global step `step` (0, 1, ...); epoch = step // schedule.steps_per_epoch."""
    epoch, d, visit = locate_step(schedule, step)
    table, dataset = store.datasets[d], schedule.datasets[d]
    row_B, num_revisited = batch_rows(dataset.layout, visit, mix_key(schedule.seed, _ROWS, d))
    entry_B = draw_entries(table, row_B, _generator(schedule, _POSITIVES, step))
    batch = make_pairs(table, dataset.rule, row_B, entry_B)
    negatives = _draw_negatives(table, row_B, dataset.group_size - 1, schedule, step)
    group_offsets, text_C, score_C, num_repeated = _candidates(table, entry_B, *negatives)
    passages = _passages(schedule, dataset, batch, group_offsets, text_C)
    offsets, shown, num_missing = _examples(table, schedule, dataset, batch, step)
    plan = BatchPlan(
        step=step,
        epoch=epoch,
        dataset=d,
        task_type=dataset.task_type,
        in_batch_negatives=dataset.in_batch_negatives,
        row_B=batch.row,
        query_text_B=batch.query,
        instruction_B=batch.instruction,
        example_offsets=offsets,
        example_row_E=shown.row,
        example_query_E=shown.query,
        example_response_E=shown.response,
        example_instruction_E=shown.instruction,
        group_offsets=group_offsets,
        candidate_C=passages[0],
        teacher_score_C=score_C,
        passage_text_P=passages[1],
        passage_instruction_P=passages[2],
        num_rows_revisited=num_revisited,
        num_candidates_repeated=num_repeated,
        num_examples_dropped=0,
        num_examples_missing=num_missing,
        filler=schedule.examples.mode == "filler",
    )
    return _drop_examples(store, schedule, plan)


def locate_step(schedule: Schedule, step: int) -> tuple[int, int, int]:
    """(epoch, dataset, number of this visit to the dataset since the start of training)."""
    assert step >= 0
    steps = np.cumsum([d.steps_per_epoch for d in schedule.datasets])
    epoch, place = divmod(step, int(steps[-1]))
    slot = int(permute(np.array([place]), int(steps[-1]), mix_key(schedule.seed, _ORDER, epoch))[0])
    d = int(np.searchsorted(steps, slot, side="right"))
    per_epoch = schedule.datasets[d].steps_per_epoch
    return epoch, d, epoch * per_epoch + slot - int(steps[d] - per_epoch)


def share_saved(plan: BatchPlan) -> float:
    """Share of the step's candidates that need no encoding of their own, because another row holds the same passage."""
    return 1.0 - plan.num_passages / len(plan.candidate_C)


def _generator(schedule: Schedule, purpose: int, step: int) -> np.random.Generator:
    return np.random.default_rng(mix_key(schedule.seed, purpose, step))


def _draw_negatives(
    table: DatasetTable, row_B: np.ndarray, wanted: int, schedule: Schedule, step: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Negatives without replacement: (places in the table's negatives [B, G], which of them count [B, G], repeats).

    A row with fewer than `wanted` gives all it has; filling groups repeats them in turn, but none stays none.
    """
    start_B = np.asarray(table.neg_offsets[row_B], dtype=np.int64)
    count_B = np.asarray(table.neg_offsets[row_B + 1], dtype=np.int64) - start_B
    rng = _generator(schedule, _NEGATIVES, step)
    choice_BG = np.empty((len(row_B), wanted), dtype=np.int64)
    for g in range(wanted):
        # Floyd's sampling: one draw a place, a draw already taken stands for the new last place.
        last_B = count_B - wanted + g
        drawn_B = rng.integers(0, np.maximum(last_B, 0) + 1)
        taken_B = (choice_BG[:, :g] == drawn_B[:, None]).any(axis=1)
        choice_BG[:, g] = np.where(taken_B, last_B, drawn_B)
    place_G = np.arange(wanted)
    short_BG = np.broadcast_to((count_B < wanted)[:, None], choice_BG.shape)
    counted_BG = place_G < count_B[:, None]
    num_repeated = 0
    if schedule.fill_groups:
        num_repeated = int((~counted_BG[count_B > 0]).sum())
        counted_BG = np.broadcast_to((count_B > 0)[:, None], choice_BG.shape)
    in_turn_BG = place_G % np.maximum(count_B, 1)[:, None]
    return start_B[:, None] + np.where(short_BG, in_turn_BG, choice_BG), counted_BG, num_repeated


def _candidates(
    table: DatasetTable, entry_B: np.ndarray, place_BG: np.ndarray, counted_BG: np.ndarray, num_repeated: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Positive first, then negatives, ragged: (group_offsets [B + 1], text ids [C], teacher scores [C], repeats)."""
    in_group = np.concatenate([np.ones((len(entry_B), 1), dtype=bool), counted_BG], axis=1)
    offsets = np.concatenate([[0], np.cumsum(in_group.sum(axis=1))]).astype(np.int64)
    text = np.full(in_group.shape, -1, dtype=np.int64)
    score = np.full(in_group.shape, np.nan, dtype=np.float32)
    text[:, 0] = table.pos_text[entry_B]
    text[:, 1:][counted_BG] = table.neg_text[place_BG[counted_BG]]
    if table.pos_score is not None:
        score[:, 0] = table.pos_score[entry_B]
    if table.neg_score is not None:
        score[:, 1:][counted_BG] = table.neg_score[place_BG[counted_BG]]
    return offsets, text[in_group], score[in_group], num_repeated


def _passages(
    schedule: Schedule, dataset: DatasetSchedule, batch: Pairs, group_offsets: np.ndarray, text_C: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Passages to encode, in order of first use: (candidate_C, passage_text_P, passage_instruction_P)."""
    instruction_C = np.full(len(text_C), -1, dtype=np.int32)
    if dataset.rule.wrap_passages:
        instruction_C = np.repeat(batch.instruction, np.diff(group_offsets))
    if not schedule.distinct_passages:
        return np.arange(len(text_C), dtype=np.int64), text_C, instruction_C
    key_C = text_C * (int(instruction_C.max()) + 2) + instruction_C + 1
    _, first, inverse = np.unique(key_C, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place[inverse.reshape(-1)].astype(np.int64), text_C[first[order]], instruction_C[first[order]]


def _examples(
    table: DatasetTable, schedule: Schedule, dataset: DatasetSchedule, batch: Pairs, step: int
) -> tuple[np.ndarray, Pairs, int]:
    """Examples before the prompt limit: (example_offsets [B + 1], pairs [E], how many were asked for and not found)."""
    settings, rule = schedule.examples, dataset.rule
    if not settings.asked_for:
        return np.zeros(len(batch.row) + 1, dtype=np.int64), batch.take(np.arange(0)), 0
    if settings.mode == "fixed":
        row = np.array(dataset.fixed_rows, dtype=np.int64)
        offsets, shown = show_fixed(rule, batch, make_pairs(table, rule, row, table.pos_offsets[row]))
        wanted = len(batch.row) * min(NUM_FIXED_EXAMPLES, settings.max_examples)
        return offsets, shown, wanted - len(shown.row)
    rng = _generator(schedule, _EXAMPLES, step)
    wanted_B = rng.integers(0, settings.max_examples + 1, len(batch.row))
    if settings.mode == "pool":
        offsets, shown = show_from_dataset(table, rule, batch, wanted_B, rng)
    elif settings.mode == "nearest":
        offsets, shown = show_nearest(table, rule, batch, wanted_B, rng)
    else:
        offsets, shown = show_from_batch(rule, batch, wanted_B, rng)
    return offsets, shown, int(wanted_B.sum()) - len(shown.row)


def _drop_examples(store: TokenStore, schedule: Schedule, plan: BatchPlan) -> BatchPlan:
    """The plan without the examples, leftmost first, that do not fit the prompt limit beside the query."""
    if len(plan.example_row_E) == 0:
        return plan
    limits, offsets = schedule.limits, plan.example_offsets
    length_E = example_lengths(store, limits, plan.example_query_E, plan.example_response_E, plan.example_instruction_E)
    room_B = limits.max_prompt_tokens - query_lengths(store, limits, plan.query_text_B, plan.instruction_B)
    before = np.concatenate([[0], np.cumsum(length_E)])
    query_E = np.repeat(np.arange(plan.num_queries), np.diff(offsets))
    # An example stays if it and all to its right fit.
    keep_E = before[offsets[query_E + 1]] - before[:-1] <= room_B[query_E]
    kept_B = np.bincount(query_E[keep_E], minlength=plan.num_queries)
    return replace(
        plan,
        example_offsets=np.concatenate([[0], np.cumsum(kept_B)]).astype(np.int64),
        example_row_E=plan.example_row_E[keep_E],
        example_query_E=plan.example_query_E[keep_E],
        example_response_E=plan.example_response_E[keep_E],
        example_instruction_E=plan.example_instruction_E[keep_E],
        num_examples_dropped=int((~keep_E).sum()),
    )
