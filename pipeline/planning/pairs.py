"""What a reranker's run works on: pairs, each candidate with its query, and what its steps' widths leave of them.

C pairs of a step (the plan's candidates).
"""

import numpy as np
from tqdm import tqdm

from pipeline.data.pair_steps import choose_relations, compose_pairs, list_widths, pair_parts
from pipeline.data.pairs import QUERY_SHARE, load_pair_tokenizer
from pipeline.data.sampling import Schedule
from pipeline.data.store import TokenStore
from pipeline.model.flop import Work, layer_work
from pipeline.model.reranker import scale_layers
from pipeline.planning.cases import Workload, count_steps, mean_load, sample_plans
from pipeline.planning.estimate import Load
from pipeline.prompts import BGE_RERANKER
from pipeline.settings import Settings

PROMPT_TOKENS = 12  # of a stated pair: the paper's question for retrieval and BOS


def sampled_pairs(store: TokenStore, schedule: Schedule, settings: Settings, depth: int) -> Workload:
    """Pairs of steps spread evenly over the first epoch, tokenized as training will.

    Args:
        depth: layers of the model, by which it merges.

    Raises:
        ValueError: there is no tokenizer, or a limit leaves no room for a passage.
    """
    pt = load_pair_tokenizer(settings.tokenizer_name, BGE_RERANKER)
    relations, limit = list(choose_relations(store, settings).values()), settings.preprocess.max_pair_tokens
    plans, parts = sample_plans(store, schedule), []
    for plan in tqdm(plans, desc="tokenize pairs", unit="step", leave=False, delay=2):
        parts.append(pair_parts(compose_pairs(store, pt, plan, relations[plan.dataset], limit)))
    works = [expected_work(parts_C3, depth) for parts_C3 in parts]
    mean = Work(*(float(np.mean([getattr(w, name) for w in works])) for name in ("tokens", "squares", "sequences")))
    load = mean_load(plans, [parts_C3.sum(1) for parts_C3 in parts], limit, mean)
    per_epoch = schedule.steps_per_epoch
    source = f"{len(plans)} of {per_epoch:,} steps of the store, their pairs tokenized"
    return Workload(load, count_steps(settings, per_epoch), per_epoch, source)


def stated_pairs(settings: Settings, query_tokens: int, passage_tokens: int, steps: int | None, depth: int) -> Workload:
    """Full groups of pairs as long as stated; ValueError for means above the limit."""
    limit, batch = settings.preprocess.max_pair_tokens, settings.batch
    room = limit * QUERY_SHARE[0] // QUERY_SHARE[1]
    for flag, value, most in (
        ("--query-tokens", query_tokens, room),
        ("--passage-tokens", passage_tokens, limit - query_tokens - PROMPT_TOKENS),
    ):
        if not 0 < value <= most:
            raise ValueError(
                f"{flag} {value}: preprocess.max_pair_tokens={limit}, {PROMPT_TOKENS} of them prompt and BOS, leaves 1 "
                f"to {max(1, most)}"
            )
    pairs, tokens = batch.queries * batch.group_size, query_tokens + passage_tokens + PROMPT_TOKENS
    one = expected_work(np.array([[query_tokens, passage_tokens, PROMPT_TOKENS]]), depth)
    load = Load(
        tokens=float(pairs * tokens),
        squares=float(pairs * tokens**2),
        queries=batch.queries,
        sequences=float(pairs),
        largest=pairs * tokens,
        most_sequences=pairs,
        longest=limit,
        layer_work=Work(pairs * one.tokens, pairs * one.squares, pairs),
    )
    source = f"stated means and {PROMPT_TOKENS} tokens of prompt and BOS, no store"
    return Workload(load, settings.optim.max_steps or steps, None, source)


def expected_work(parts_C3: np.ndarray, depth: int) -> Work:
    """What a layer reads of pairs, in the mean over layers and over all widths that a step may draw."""
    tokens = squares = 0.0
    for layers, ratio, chance in list_widths(scale_layers(depth)[1]):
        work = layer_work(parts_C3, depth, layers, ratio)
        tokens, squares = tokens + chance * work.tokens, squares + chance * work.squares
    return Work(tokens, squares, len(parts_C3))
