"""From settings, DeepSpeed's JSON and a store (or stated lengths) to the case that is estimated.

S sequences of a step (queries, then distinct passages).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.composing import plan_lengths
from pipeline.data.sampling import Schedule, plan_step
from pipeline.data.store import TokenStore
from pipeline.datatypes import BatchPlan
from pipeline.model.flop import Work
from pipeline.model.shapes import ModelShape
from pipeline.planning.activations import Kernels
from pipeline.planning.estimate import Case, Cluster, Load
from pipeline.planning.sharding import Sharding
from pipeline.settings import PreprocessSettings, Settings

SAMPLED_STEPS = 16
ELEMENT = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Workload:
    """What the run works on: one step, how many of them, and where that is known from."""

    load: Load
    steps: int | None  # of the whole run; None: not known
    steps_per_epoch: int | None
    source: str


def sampled_workload(store: TokenStore, schedule: Schedule, settings: Settings) -> Workload:
    """Lengths of steps spread evenly over the first epoch: those that training will have, not of a model of them."""
    plans, per_epoch = sample_plans(store, schedule), schedule.steps_per_epoch
    load = mean_load(plans, [plan_lengths(store, schedule.limits, plan) for plan in plans], _longest(settings))
    return Workload(
        load, count_steps(settings, per_epoch), per_epoch, f"{len(plans)} of {per_epoch:,} steps of the store"
    )


def sample_plans(store: TokenStore, schedule: Schedule) -> list[BatchPlan]:
    """Plans of SAMPLED_STEPS steps, spread evenly over the first epoch; of all where it has fewer."""
    per_epoch = schedule.steps_per_epoch
    steps = sorted({int(s) for s in np.linspace(0, per_epoch - 1, min(SAMPLED_STEPS, per_epoch)).round()})
    return [plan_step(store, schedule, step) for step in steps]


def count_steps(settings: Settings, steps_per_epoch: int) -> int:
    """Of the whole run."""
    return settings.optim.max_steps or math.ceil(settings.optim.epochs * steps_per_epoch)


def mean_load(
    plans: Sequence[BatchPlan], lengths: Sequence[np.ndarray], longest: int, layer_work: Work | None = None
) -> Load:
    """The load of a step by the lengths of the sequences of some."""
    return Load(
        tokens=float(np.mean([length_S.sum() for length_S in lengths])),
        squares=float(np.mean([(length_S.astype(np.float64) ** 2).sum() for length_S in lengths])),
        queries=max(plan.num_queries for plan in plans),
        sequences=float(np.mean([len(length_S) for length_S in lengths])),
        largest=max(int(length_S.sum()) for length_S in lengths),
        most_sequences=max(len(length_S) for length_S in lengths),
        longest=longest,
        layer_work=layer_work,
    )


def stated_workload(settings: Settings, query_tokens: int, passage_tokens: int, steps: int | None) -> Workload:
    """Full batches of sequences as long as stated, no passage twice; ValueError for means above the limits."""
    p, batch = settings.preprocess, settings.batch
    longest_query = longest_sequence(p, batch.examples.asked_for)
    for flag, value, limit in (
        ("--query-tokens", query_tokens, longest_query),
        ("--passage-tokens", passage_tokens, p.max_passage_tokens),
    ):
        if not 0 < value <= limit:
            raise ValueError(f"{flag} {value}: a mean of sequences that the recipe limits to {limit} tokens")
    queries, passages = batch.queries, batch.queries * batch.group_size
    tokens = queries * query_tokens + passages * passage_tokens
    load = Load(
        tokens=float(tokens),
        squares=float(queries * query_tokens**2 + passages * passage_tokens**2),
        queries=queries,
        sequences=float(queries + passages),
        largest=tokens,
        most_sequences=queries + passages,
        longest=_longest(settings),
    )
    return Workload(load, settings.optim.max_steps or steps, None, "stated means, no store")


def longest_sequence(p: PreprocessSettings, with_examples: bool) -> int:
    """Tokens of the longest query that the limits allow."""
    return p.max_prompt_tokens if with_examples else p.max_query_tokens


def _longest(settings: Settings) -> int:
    """Tokens of the longest sequence that may come, which every chunk must hold."""
    p = settings.preprocess
    return max(longest_sequence(p, settings.batch.examples.asked_for), p.max_passage_tokens)


def make_case(settings: Settings, shape: ModelShape, sharding: Sharding, cluster: Cluster, load: Load) -> Case:
    """The case of a run on GPUs."""
    model = settings.model
    return Case(
        shape=shape,
        sharding=sharding,
        kernels=Kernels(
            element=ELEMENT[model.dtype],
            fused=model.dtype == "bf16" and model.attention_kernel != "sdpa",
            dropout=model.lora.dropout > 0,
            checkpointing=model.activation_checkpointing,
            keeps_inputs=sharding.stage == 3,
        ),
        cluster=cluster,
        load=load,
        chunk_tokens=settings.run.chunk_tokens,
        causal=model.attention == "causal",
        fused_loss=model.embed_kernels != "torch",
        graphs=settings.run.keep_graphs,
    )
