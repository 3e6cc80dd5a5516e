"""What training will make of a store, seen in a sample of its plans: examples that fit, passages saved, prompts.

B queries of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.data.composing import passage_lengths, plan_lengths
from pipeline.data.sampling import Schedule, locate_step, plan_step, share_saved
from pipeline.data.store import TokenStore
from pipeline.datatypes import BatchPlan

PLANS_PER_DATASET = 16
MAX_STEPS_SEARCHED = 20_000  # for steps of every dataset; steps come shuffled, so the first ones are a random sample
SHOWN_CANDIDATES = 8
_NO_LIMIT = 1 << 40


@dataclass(frozen=True)
class ExampleFit:
    """Queries for which k examples were found, and how many of those queries can show all k."""

    k: int
    num_queries: int
    num_all_fit: int


@dataclass(frozen=True)
class PlanSample:
    """Sums over the sampled plans of one dataset."""

    num_plans: int
    num_queries: int
    num_candidates: int
    num_passages: int  # distinct ones: what is encoded
    saved: tuple[float, ...]  # share_saved of each plan
    num_asked: int  # examples drawn by the recipe's rule = shown + dropped + missing
    num_shown: int
    num_dropped: int  # over the prompt limit
    num_missing: int  # no further row could be shown
    fits: tuple[ExampleFit, ...]  # k = 1, 2, ... as far as asked for


def sample_steps(schedule: Schedule, per_dataset: int = PLANS_PER_DATASET) -> list[list[int]]:
    """The first steps of the first epoch in which each dataset is trained, up to `per_dataset` of them."""
    steps: list[list[int]] = [[] for _ in schedule.datasets]
    open_places = sum(min(per_dataset, d.steps_per_epoch) for d in schedule.datasets)
    for step in range(min(schedule.steps_per_epoch, MAX_STEPS_SEARCHED)):
        if open_places == 0:
            break
        _, dataset, _ = locate_step(schedule, step)
        if len(steps[dataset]) < per_dataset:
            steps[dataset].append(step)
            open_places -= 1
    return steps


def sample_plans(store: TokenStore, schedule: Schedule, steps: Sequence[int]) -> PlanSample:
    """Plan these steps (of one dataset) and add up what they hold."""
    # The same draws without a prompt limit: how many examples a query had before any was dropped.
    unlimited = replace(schedule, limits=replace(schedule.limits, max_prompt_tokens=_NO_LIMIT))
    plans = [plan_step(store, schedule, step) for step in steps]
    found = [np.diff(plan_step(store, unlimited, step).example_offsets) for step in steps]
    found_B = np.concatenate([np.empty(0, np.int64), *found])
    shown_B = np.concatenate([np.empty(0, np.int64), *(np.diff(plan.example_offsets) for plan in plans)])
    largest = schedule.examples.max_examples if schedule.examples.asked_for else 0
    fits = [
        ExampleFit(k, int((found_B == k).sum()), int(((found_B == k) & (shown_B == k)).sum()))
        for k in range(1, largest + 1)
    ]
    num_dropped, num_missing = sum(p.num_examples_dropped for p in plans), sum(p.num_examples_missing for p in plans)
    return PlanSample(
        num_plans=len(plans),
        num_queries=sum(plan.num_queries for plan in plans),
        num_candidates=sum(len(plan.candidate_C) for plan in plans),
        num_passages=sum(plan.num_passages for plan in plans),
        saved=tuple(share_saved(plan) for plan in plans),
        num_asked=int(shown_B.sum()) + num_dropped + num_missing,
        num_shown=int(shown_B.sum()),
        num_dropped=num_dropped,
        num_missing=num_missing,
        fits=tuple(fits),
    )


# Prompts to read.


@dataclass(frozen=True)
class ShownText:
    """A text of a prompt, and its tokens before cutting against the limit that they count for."""

    text: str
    num_uncut: int
    limit: int

    @property
    def is_cut(self) -> bool:
        return self.num_uncut > self.limit


@dataclass(frozen=True)
class ShownExample:
    """One in-context example; an empty instruction is left out of the prompt."""

    instruction: str
    query: ShownText
    response: ShownText


@dataclass(frozen=True)
class ShownCandidate:
    """A passage that a query is compared with."""

    is_positive: bool
    score: float | None  # of the teacher
    instruction: str | None  # None: a plain passage, else wrapped like a query with this instruction
    passage: ShownText
    num_tokens: int  # as encoded


@dataclass(frozen=True)
class ShownPrompt:
    """One query of a plan with all that belongs to it."""

    step: int
    source_line: int
    num_tokens: int  # of the prompt as encoded, BOS and EOS included
    filler: bool  # examples are blank lines of the same length
    instruction: str
    query: ShownText
    examples: tuple[ShownExample, ...]
    candidates: tuple[ShownCandidate, ...]
    num_more_candidates: int


def sample_prompts(store: TokenStore, schedule: Schedule, step: int) -> list[ShownPrompt]:
    """Up to three queries of a step: the first with most examples, the first with one, the first with none."""
    plan = plan_step(store, schedule, step)
    length_S = plan_lengths(store, schedule.limits, plan)
    count_B = np.diff(plan.example_offsets)
    wanted = dict.fromkeys((int(count_B.max()), 1, 0))
    return [
        shown_prompt(store, schedule, plan, int(np.argmax(count_B == k)), int(length_S[np.argmax(count_B == k)]))
        for k in wanted
        if (count_B == k).any()
    ]


def shown_prompt(store: TokenStore, schedule: Schedule, plan: BatchPlan, b: int, num_tokens: int) -> ShownPrompt:
    """Query b of a plan; `num_tokens` is the length of its prompt."""
    limits = schedule.limits
    candidates = range(int(plan.group_offsets[b]), int(plan.group_offsets[b + 1]))
    instruction = int(plan.instruction_B[b])
    return ShownPrompt(
        step=plan.step,
        source_line=int(store.datasets[plan.dataset].source_line_N[plan.row_B[b]]),
        num_tokens=num_tokens,
        filler=plan.filler,
        instruction=store.instructions[instruction],
        query=_wrapped(store, int(plan.query_text_B[b]), instruction, limits.max_query_tokens),
        examples=tuple(
            _example(store, schedule, plan, e)
            for e in range(int(plan.example_offsets[b]), int(plan.example_offsets[b + 1]))
        ),
        candidates=tuple(
            _candidate(store, schedule, plan, c, is_positive=c == candidates.start)
            for c in candidates[:SHOWN_CANDIDATES]
        ),
        num_more_candidates=max(0, len(candidates) - SHOWN_CANDIDATES),
    )


def _wrapped(store: TokenStore, text: int, instruction: int, limit: int) -> ShownText:
    """A query or wrapped passage, with instruction, query end, BOS and EOS."""
    tokens = store.manifest.tokens
    around = len(tokens.bos) + len(tokens.query_end) + len(tokens.eos) + len(store.instruction_pieces[instruction])
    return ShownText(store.text(text), store.uncut_length(text, "query") + around, limit)


def _example(store: TokenStore, schedule: Schedule, plan: BatchPlan, e: int) -> ShownExample:
    limits, instruction = schedule.limits, int(plan.example_instruction_E[e])
    query, response = int(plan.example_query_E[e]), int(plan.example_response_E[e])
    num_query = store.uncut_length(query, "query") + len(store.instruction_pieces[instruction])
    return ShownExample(
        instruction=store.instructions[instruction],
        query=ShownText(store.text(query), num_query, limits.max_example_query_tokens),
        response=ShownText(
            store.text(response), store.uncut_length(response, "response"), limits.max_example_passage_tokens
        ),
    )


def _candidate(store: TokenStore, schedule: Schedule, plan: BatchPlan, c: int, is_positive: bool) -> ShownCandidate:
    limits, tokens, p = schedule.limits, store.manifest.tokens, plan.candidate_C[c]
    text, instruction = int(plan.passage_text_P[p]), int(plan.passage_instruction_P[p])
    if instruction < 0:
        num_uncut = store.uncut_length(text, "passage") + len(tokens.bos) + len(tokens.eos)
        passage = ShownText(store.text(text), num_uncut, limits.max_passage_tokens)
    else:
        passage = _wrapped(store, text, instruction, limits.max_passage_tokens)
    score = float(plan.teacher_score_C[c])
    place = np.array([p])
    return ShownCandidate(
        is_positive=is_positive,
        score=None if np.isnan(score) else score,
        instruction=None if instruction < 0 else store.instructions[instruction],
        passage=passage,
        num_tokens=int(
            passage_lengths(store, limits, plan.passage_text_P[place], plan.passage_instruction_P[place])[0]
        ),
    )
