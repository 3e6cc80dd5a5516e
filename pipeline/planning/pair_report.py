"""What a step of a reranker's run holds, as text: the whole step, and one of its queries with its pairs.

C pairs of the step (the plan's candidates).
"""

import numpy as np

from pipeline.data.pair_steps import choose_relations, compose_pairs, draw_width, pair_parts
from pipeline.data.pairs import ComposedPair, load_pair_tokenizer
from pipeline.data.sampling import Schedule
from pipeline.data.store import TokenStore
from pipeline.datatypes import BatchPlan
from pipeline.model.flop import layer_work
from pipeline.model.reranker import scale_layers
from pipeline.planning.step_report import candidate_line, chunk_lines, field_lines, indent, require_query, row_fields
from pipeline.prompts import BGE_RERANKER, render_pair
from pipeline.settings import Settings


def read_pairs(store: TokenStore, plan: BatchPlan, settings: Settings) -> tuple[str, list[ComposedPair]]:
    """(what is asked of them, the pairs of the step), tokenized as training will; ValueError as `compose_pairs`."""
    pt = load_pair_tokenizer(settings.tokenizer_name, BGE_RERANKER)
    relation = choose_relations(store, settings)[store.datasets[plan.dataset].name]
    return relation, compose_pairs(store, pt, plan, relation, settings.preprocess.max_pair_tokens)


def pair_step_report(
    store: TokenStore, schedule: Schedule, plan: BatchPlan, settings: Settings, depth: int, world_size: int
) -> str:
    """The plan of one step in numbers: rows, pairs, the width that it draws, chunks of every rank."""
    relation, pairs = read_pairs(store, plan, settings)
    parts_C3, group_B = pair_parts(pairs), np.diff(plan.group_offsets)
    length_C, width = parts_C3.sum(1), draw_width(settings.run.seed, plan.step, scale_layers(depth)[1])
    layers, ratio = width
    share = layer_work(parts_C3, depth, *width).tokens / length_C.sum()
    merged = f"passages {ratio} to 1 behind layers {', '.join(map(str, layers))}" if layers else "nothing is merged"
    cut = [sum(getattr(pair, f"{name}_was_cut") for pair in pairs) for name in ("query", "passage")]
    fields = [
        *row_fields(store, schedule, plan),
        ("pairs", f"{len(pairs)}, {group_B.min()} to {group_B.max()} a query"),
        ("question", f"{relation}: {BGE_RERANKER.prompt(relation)}"),
        (
            "pairs cut",
            f"{cut[0]} with a query cut, {cut[1]} with a passage cut, to {settings.preprocess.max_pair_tokens}",
        ),
        ("negatives repeated", str(plan.num_candidates_repeated)),
        ("width", f"{merged}; a layer reads {share:.0%} of the tokens, in the mean over layers"),
        ("tokens", f"{length_C.sum()}, padding 0"),
    ]
    return "\n".join([*field_lines(fields), *chunk_lines(length_C, world_size, settings.run.chunk_tokens, "pairs")])


def pair_query_report(store: TokenStore, plan: BatchPlan, settings: Settings, b: int) -> str:
    """One query of a step: where it comes from, its first pair as text, its candidates with teacher scores."""
    require_query(plan, b)
    relation, pairs = read_pairs(store, plan, settings)
    dataset, first = store.datasets[plan.dataset], int(plan.group_offsets[b])
    positive = store.text(int(plan.passage_text_P[plan.candidate_C[first]]))
    query, prompt = store.text(int(plan.query_text_B[b])), BGE_RERANKER.prompt(relation)
    lines = [
        f"{'query':<20} {b}: source line {int(dataset.source_line_N[plan.row_B[b]])} of {dataset.name}",
        "its pair with the positive, before texts over a limit are cut:",
        indent(render_pair(BGE_RERANKER, query, positive, prompt)),
        "candidates (tokens of the pair, score of the teacher, text):",
    ]
    for c in range(first, int(plan.group_offsets[b + 1])):
        lines.append(f"  {len(pairs[c].ids):>5}  {candidate_line(store, plan, b, c)}")
    return "\n".join(lines)
