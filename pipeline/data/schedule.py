"""What a run draws from each dataset: batch sizes, steps and their checks.

A schedule holds a few numbers a dataset and nothing that grows with rows or with ranks: 100 M rows cost no table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.bucketing import PassLayout, make_layout
from pipeline.data.composing import Limits, example_lengths, query_lengths
from pipeline.data.permutation import mix_key, permute
from pipeline.datatypes import RULES, TaskRule
from pipeline.settings import DatasetSettings, ExampleSettings, Settings

if TYPE_CHECKING:
    from pipeline.data.store import DatasetTable, TokenStore

MINE = "python pipeline/mine_negatives.py --config RECIPE.yaml --embedder MODEL --out DIR"
NUM_FIXED_EXAMPLES = 3  # the paper's ablation: three a task, the same for every query

_FIXED = 101  # purpose of a key; those of the steps stand in sampling.py
_BLOCK_ROWS = 1 << 18


@dataclass(frozen=True)
class DatasetSchedule:
    """One dataset in a run."""

    name: str
    task_type: str
    layout: PassLayout
    group_size: int
    in_batch_negatives: bool
    steps_per_epoch: int
    fixed_rows: tuple[int, ...]  # examples of mode `fixed`

    @property
    def rule(self) -> TaskRule:
        return RULES[self.task_type]

    @property
    def num_queries(self) -> int:
        """Rows of every batch."""
        return min(self.layout.batch_size, self.layout.num_rows)


@dataclass(frozen=True)
class Schedule:
    """All that `plan_step` needs beside the store; datasets in the store's order."""

    datasets: tuple[DatasetSchedule, ...]
    seed: int
    limits: Limits
    examples: ExampleSettings
    fill_groups: bool
    distinct_passages: bool = True  # False: every copy is read, as in pairs, and in the twin that tests compare with

    @property
    def steps_per_epoch(self) -> int:
        return sum(d.steps_per_epoch for d in self.datasets)


def make_schedule(store: TokenStore, settings: Settings) -> Schedule:
    """Lay out every dataset of the recipe in batches and share out the steps of an epoch.

    Raises:
        ValueError: datasets of recipe and store differ, a task type differs, a dataset cannot give the examples that
            the recipe asks for, or an instruction or example cannot fit the limits; each names dataset and numbers.
    """
    wanted = _match_datasets(store, settings)
    limits, batch = Limits.from_settings(settings.preprocess), settings.batch
    _require_instructions_fit(store, limits, with_examples=batch.examples.asked_for)
    layouts = []
    for table in store.datasets:
        size = batch.symmetric_queries if RULES[table.task_type].symmetric else batch.queries
        layouts.append(make_layout(table.bucket_offsets, size, batch.use_buckets))
    steps = share_steps([layout.num_batches for layout in layouts], batch.mix_temperature)
    datasets = []
    for d, (table, layout) in enumerate(zip(store.datasets, layouts, strict=True)):
        dataset = _dataset_schedule(table, wanted[table.name], settings, layout, steps[d])
        if batch.examples.asked_for:
            _require_examples(store, table, dataset, batch.examples, limits)
        datasets.append(dataset)
    return Schedule(
        datasets=tuple(datasets),
        seed=settings.run.seed,
        limits=limits,
        examples=batch.examples,
        fill_groups=batch.fill_groups,
        # A reranker reads every candidate with its query: a passage that stands in two groups is two pairs.
        distinct_passages=settings.model.kind == "embedder",
    )


def share_steps(batches: list[int], temperature: float) -> list[int]:
    """Steps per epoch of each dataset: in all as many as there are batches, shared by batches ** temperature.

    Temperature 1 visits every row once an epoch, 0 gives all datasets the same number of steps. Largest remainders
    (ties by place) get what rounding leaves; no dataset gets less than one step.
    """
    if temperature < 0:
        raise ValueError(f"batch.mix_temperature={temperature} must be 0 or more (1: by size, 0: all datasets alike)")
    if temperature == 1.0:
        return list(batches)
    total, weights = sum(batches), np.array(batches, dtype=np.float64) ** temperature
    share = total * weights / weights.sum()
    steps = np.maximum(np.floor(share).astype(np.int64), 1)
    remainder_order = np.argsort(-(share - np.floor(share)), kind="stable")
    for i in range(max(0, total - int(steps.sum()))):
        steps[remainder_order[i % len(steps)]] += 1
    while steps.sum() > total:  # the minimum of one step took from the others
        steps[int(steps.argmax())] -= 1
    return [int(s) for s in steps]


def check_world_size(schedule: Schedule, world_size: int) -> None:
    """Ranks share the rows of a full batch evenly; ValueError names dataset, batch size and world size otherwise.

    The one short batch of a dataset with fewer rows than a batch is exempt: its ranks get a row more or less.
    """
    for dataset in schedule.datasets:
        size = dataset.layout.batch_size
        if size % world_size:
            name = "batch.symmetric_queries" if dataset.rule.symmetric else "batch.queries"
            raise ValueError(
                f"dataset {dataset.name!r}: {name}={size} is not divisible by the world size {world_size}; make it a "
                f"multiple of {world_size} or change the number of ranks"
            )


def _match_datasets(store: TokenStore, settings: Settings) -> dict[str, DatasetSettings]:
    """The recipe's entry for every dataset of the store. Raw files are not looked for: training may not have them."""
    entries = {d.name: d for d in settings.data.datasets}
    stored = {table.entry for table in store.datasets}
    rebuild = "run preprocessing with this recipe, or name the store that belongs to it in data.store"
    if not entries or set(entries) != stored:
        raise ValueError(
            f"data.datasets and the store {store.path} differ: only in the recipe {sorted(set(entries) - stored)}, "
            f"only in the store {sorted(stored - set(entries))}; {rebuild}"
        )
    wanted = {}
    for table in store.datasets:
        entry = entries[table.entry]
        if entry.type and entry.type != table.task_type:
            raise ValueError(
                f"dataset {table.name!r} is of type {entry.type!r} in the recipe and {table.task_type!r} in the store "
                f"{store.path}; {rebuild}"
            )
        if table.no_in_batch_neg and entry.in_batch_negatives is None:
            entry = replace(entry, in_batch_negatives=False)
        wanted[table.name] = entry
    return wanted


def _dataset_schedule(
    table: DatasetTable, wanted: DatasetSettings, settings: Settings, layout: PassLayout, steps: int
) -> DatasetSchedule:
    rule = RULES[table.task_type]
    group_size = wanted.group_size or rule.group_size or settings.batch.group_size
    in_batch = rule.in_batch_negatives if wanted.in_batch_negatives is None else wanted.in_batch_negatives
    if settings.model.kind == "reranker":
        in_batch = False
        if group_size == 1:
            raise ValueError(
                f"dataset {table.name!r} has group_size=1: a reranker learns from the negatives of its group alone; "
                "raise it"
            )
    elif group_size == 1 and not in_batch:
        raise ValueError(
            f"dataset {table.name!r} ({table.task_type}) has group size 1 and no in-batch negatives: its loss is "
            "always 0; raise its group_size or set its in_batch_negatives"
        )
    return DatasetSchedule(
        name=table.name,
        task_type=table.task_type,
        layout=layout,
        group_size=group_size,
        in_batch_negatives=in_batch,
        steps_per_epoch=steps,
        fixed_rows=_fixed_rows(table, settings) if settings.batch.examples.mode == "fixed" else (),
    )


def _fixed_rows(table: DatasetTable, settings: Settings) -> tuple[int, ...]:
    """Rows of the dataset's fixed examples: keyed by the seed, different query texts."""
    count = min(NUM_FIXED_EXAMPLES, settings.batch.examples.max_examples)
    key = mix_key(settings.run.seed, _FIXED, *table.name.encode())
    chosen: dict[int, int] = {}
    for row in permute(np.arange(min(table.num_rows, 256)), table.num_rows, key).tolist():
        has_response = RULES[table.task_type].response == "positive" or table.category_text_N[row] >= 0
        if len(chosen) < count and has_response:
            chosen.setdefault(int(table.query_text_N[row]), row)
    return tuple(chosen.values())


def _require_instructions_fit(store: TokenStore, limits: Limits, with_examples: bool) -> None:
    """Every instruction must leave room for text in each place where it stands."""
    tokens = store.manifest.tokens
    overhead = len(tokens.bos) + len(tokens.query_end) + len(tokens.eos)
    room = {"max_query_tokens": limits.max_query_tokens - overhead}
    if any(RULES[table.task_type].wrap_passages for table in store.datasets):
        room["max_passage_tokens"] = limits.max_passage_tokens - overhead
    if with_examples:
        room["max_example_query_tokens"] = limits.max_example_query_tokens
    name = min(room, key=lambda n: room[n])
    for text, piece in zip(store.instructions, store.instruction_pieces, strict=True):
        if len(piece) + len(tokens.query_tail) >= room[name]:
            raise ValueError(
                f"the instruction {text[:80]!r} has {len(piece)} tokens with its markers, which leaves no room for a "
                f"query in preprocess.{name}={getattr(limits, name)}; raise it or shorten the instruction"
            )


def _require_examples(
    store: TokenStore, table: DatasetTable, dataset: DatasetSchedule, examples: ExampleSettings, limits: Limits
) -> None:
    """Examples must exist and one must fit, or a few-shot run would be a zero-shot run in disguise."""
    remedy = "leave the dataset out, or set batch.examples.mode=none"
    if table.num_rows < 2:
        raise ValueError(f"dataset {table.name!r} has one row, so no other row can be its example; {remedy}")
    if examples.mode in ("in_batch", "filler") and dataset.num_queries < 2:
        raise ValueError(f"dataset {table.name!r} has batches of one query, so none can show another; {remedy}")
    if examples.mode == "nearest":
        _require_nearest(table)
    # Most datasets show in their first block that something fits.
    query_min, example_min, infinite = 1 << 60, 1 << 60, 1 << 60
    for start in range(0, table.num_rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, table.num_rows)
        query, instruction = table.query_text_N[start:stop], table.instruction_N[start:stop]
        query_min = min(query_min, int(query_lengths(store, limits, query, instruction).min()))
        example_min = min(example_min, _shortest_example(store, table, dataset.rule, limits, start, stop, infinite))
        if query_min + example_min <= limits.max_prompt_tokens:
            return
    if example_min == infinite:
        raise ValueError(f"no row of dataset {table.name!r} has a category, so none can be an example; {remedy}")
    raise ValueError(
        f"no example can fit in dataset {table.name!r}: its shortest example has {example_min} tokens, its shortest "
        f"query {query_min}, preprocess.max_prompt_tokens={limits.max_prompt_tokens}; raise the limit, or set "
        "batch.examples.mode=none"
    )


def _require_nearest(table: DatasetTable) -> None:
    if table.nearest_row is None or len(table.nearest_row) == 0:
        raise ValueError(
            f"dataset {table.name!r} has no neighbours for batch.examples.mode=nearest: no row names any in `nearest`. "
            f"{MINE} finds them; preprocess the rows that it writes, or set another mode"
        )


def _shortest_example(
    store: TokenStore, table: DatasetTable, rule: TaskRule, limits: Limits, start: int, stop: int, default: int
) -> int:
    """Least tokens of an example made of rows start .. stop - 1; `default` if none of them can be one."""
    if rule.response == "category":
        response = table.category_text_N[start:stop]
        row = start + np.flatnonzero(response >= 0)
        response = response[response >= 0]
    else:
        row = np.repeat(np.arange(start, stop), np.diff(table.pos_offsets[start : stop + 1]))
        response = table.pos_text[table.pos_offsets[start] : table.pos_offsets[stop]]
    if len(row) == 0:
        return default
    return int(example_lengths(store, limits, table.query_text_N[row], response, table.instruction_N[row]).min())
