"""The pairs of a reranker's step: each query of a plan with each candidate of its group, as packed chunks.

Texts come from the token store and are tokenised here, while the step before computes: one store serves embedders and
rerankers, and no piece of it is stored under two templates.

C pairs of the step (the plan's candidates), S pairs of a chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.packing import pack_chunk
from pipeline.data.pairs import ComposedPair, PairTokenizer, compose_pair, tokenize_pair_pieces
from pipeline.data.permutation import mix_key
from pipeline.datatypes import BatchPlan, PairChunk

if TYPE_CHECKING:
    from pipeline.data.store import TokenStore
    from pipeline.settings import Settings

# What is asked of a task type's pairs where the recipe names nothing (the paper's prompts, appendix D). The paper
# trains on retrieval alone; of its questions these are the nearest for the others.
RELATIONS = {
    "normal": "q-p",
    "only_1neg": "q-p",
    "symmetric_sts": "p-p",
    "symmetric_class": "q-p",  # B is a label
    "symmetric_clustering": "p-p",
}
RATIOS = (1, 2, 4, 8)
_WIDTH = 201  # purpose of a key; others stand in sampling.py and schedule.py


def choose_relations(store: TokenStore, settings: Settings) -> dict[str, str]:
    """Dataset -> what is asked of its pairs: what its entry of the recipe says, else what its task type does."""
    asked = {d.name: d.relation for d in settings.data.datasets}
    return {table.name: asked.get(table.entry) or RELATIONS[table.task_type] for table in store.datasets}


def draw_width(seed: int, step: int, merge_layers: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The width of a step, a function of seed and step: layers behind which passages are merged, and the ratio.

    The ratio is one of RATIOS. The paper says no more of a strategy than that one is drawn a step, and evaluates with
    ratio 2 at the first of its layers alone: each layer is one of the step's with probability 1/2, so that every choice
    that a call may make was trained. Ratio 1 merges nowhere.
    """
    draw = np.random.default_rng(mix_key(seed, _WIDTH, step))
    ratio = int(draw.choice(RATIOS))
    chosen = draw.random(len(merge_layers)) < 0.5
    if ratio == 1 or not merge_layers:
        return (), 1
    if not chosen.any():  # would be ratio 1 by another name
        chosen[draw.integers(len(merge_layers))] = True
    return tuple(layer for layer, is_one in zip(merge_layers, chosen.tolist(), strict=True) if is_one), ratio


def list_widths(merge_layers: Sequence[int]) -> list[tuple[tuple[int, ...], int, float]]:
    """Everything that `draw_width` may draw, each with its probability."""
    n, share = len(merge_layers), 1 / len(RATIOS)
    if not n:
        return [((), 1, 1.0)]
    sets = [layers for k in range(1, n + 1) for layers in itertools.combinations(merge_layers, k)]
    # None at all, with probability 2 ** -n, becomes any one.
    chance = [0.5**n * (1 + (1 / n if len(layers) == 1 else 0)) for layers in sets]
    merged = [(layers, ratio, share * p) for ratio in RATIOS[1:] for layers, p in zip(sets, chance, strict=True)]
    return [((), 1, share), *merged]


def compose_pairs(
    store: TokenStore, pt: PairTokenizer, plan: BatchPlan, relation: str, max_pair_tokens: int
) -> list[ComposedPair]:
    """All pairs of the step in the order of the plan's candidates; a text that stands in several is tokenised once.

    Args:
        relation: of the template's prompts.
        max_pair_tokens: limit of a whole pair, BOS and prompt counted.

    Raises:
        ValueError: as `compose_pair`.
    """
    query_C = np.repeat(plan.query_text_B, np.diff(plan.group_offsets)).tolist()
    passage_C = plan.passage_text_P[plan.candidate_C].tolist()
    queries, passages = (_pieces(store, pt, ids, kind) for ids, kind in ((query_C, "query"), (passage_C, "passage")))
    prompt_ids = tokenize_pair_pieces(pt, [pt.template.prompt(relation)], "prompt")[0]
    return [
        compose_pair(pt, queries[q], passages[p], prompt_ids, max_pair_tokens)
        for q, p in zip(query_C, passage_C, strict=True)
    ]


def pair_parts(pairs: Sequence[ComposedPair]) -> np.ndarray:
    """Tokens of each pair before its passage, of the passage, and behind it: int64 [C, 3]."""
    return np.array([(p.start, p.stop - p.start, len(p.ids) - p.stop) for p in pairs], dtype=np.int64).reshape(-1, 3)


def _pieces(store: TokenStore, pt: PairTokenizer, text_ids: Sequence[int], kind: str) -> dict[int, list[int]]:
    distinct = list(dict.fromkeys(text_ids))
    return dict(zip(distinct, tokenize_pair_pieces(pt, [store.text(i) for i in distinct], kind), strict=True))


def pack_pairs(sequence_S: np.ndarray, pairs: Sequence[ComposedPair]) -> PairChunk:
    """`pack_chunk` of pairs `sequence_S` of the step's `pairs`, with their passages."""
    own = [pairs[s] for s in sequence_S.tolist()]
    spans = [(pair.start, pair.stop) for pair in own] or [(0, 0)]
    return PairChunk(**vars(pack_chunk(sequence_S, [pair.ids for pair in own])), passage_S2=np.array(spans))
