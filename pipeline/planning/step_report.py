"""What a step of an embedder's run holds, as text: the whole step, and one of its queries."""

from collections.abc import Sequence

import numpy as np

from pipeline.data.composing import plan_lengths
from pipeline.data.packing import deal
from pipeline.data.sampling import Schedule, share_saved
from pipeline.data.shown import count_shown
from pipeline.data.store import TokenStore
from pipeline.datatypes import RULES, BatchPlan
from pipeline.prompts import Template, render_query

SHOWN_ROWS = 16
SHOWN_CHARACTERS = 100


def step_report(store: TokenStore, schedule: Schedule, plan: BatchPlan, world_size: int, chunk_tokens: int) -> str:
    """The plan of one step in numbers: rows, examples, candidates, passages, chunks of every rank."""
    counts_B = np.diff(plan.example_offsets)
    histogram = "  ".join(f"{k}: {n}" for k, n in enumerate(np.bincount(counts_B)))
    group_B = np.diff(plan.group_offsets)
    fields = [
        *row_fields(store, schedule, plan),
        ("examples per query", f"{histogram}  (mean {counts_B.mean():.2f})"),
        ("examples left out", f"{plan.num_examples_dropped} over the limit, {plan.num_examples_missing} not found"),
        ("candidates", f"{group_B.sum()}, {group_B.min()} to {group_B.max()} a row"),
        ("in-batch negatives", "yes" if plan.in_batch_negatives else "no"),
        ("shown in-batch", f"{count_shown(plan)} negatives that their query's examples show"),
        ("negatives repeated", str(plan.num_candidates_repeated)),
        ("passages to encode", f"{plan.num_passages} ({share_saved(plan):.1%} of the candidates saved)"),
    ]
    if plan.filler:
        fields.append(("filler", "yes: examples keep their length, not their content"))
    length_S = plan_lengths(store, schedule.limits, plan)
    total, in_queries = int(length_S.sum()), int(length_S[: plan.num_queries].sum())
    fields.append(("tokens", f"{total} ({in_queries} in queries, {total - in_queries} in passages), padding 0"))
    return "\n".join([*field_lines(fields), *chunk_lines(length_S, world_size, chunk_tokens, "sequences")])


def row_fields(store: TokenStore, schedule: Schedule, plan: BatchPlan) -> list[tuple[str, str]]:
    """Which rows a step has, whatever is trained."""
    dataset = store.datasets[plan.dataset]
    line_B = dataset.source_line_N[plan.row_B].tolist()
    more = f" ... ({len(line_B) - SHOWN_ROWS} more)" if len(line_B) > SHOWN_ROWS else ""
    return [
        ("step", f"{plan.step} (epoch {plan.epoch}, {plan.step % schedule.steps_per_epoch} inside it)"),
        ("dataset", f"{dataset.name} ({plan.task_type})"),
        ("queries", f"{plan.num_queries}, of them seen a second time in this pass: {plan.num_rows_revisited}"),
        ("source lines", ", ".join(map(str, line_B[:SHOWN_ROWS])) + more),
    ]


def field_lines(fields: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name:<20} {value}" for name, value in fields]


def chunk_lines(length_S: np.ndarray, world_size: int, chunk_tokens: int, unit: str) -> list[str]:
    """How the sequences of a step are dealt; `unit`: what they are."""
    ranks = deal(length_S, world_size, chunk_tokens)
    lines = [f"{'chunks':<20} {len(ranks[0])} a rank, at most {chunk_tokens} tokens each"]
    for rank, chunks in enumerate(ranks):
        tokens = [int(length_S[chunk].sum()) for chunk in chunks]
        sizes = ", ".join(f"{t} ({len(chunk)} {unit})" for t, chunk in zip(tokens, chunks, strict=True))
        lines.append(f"  {f'rank {rank}':<18} {sum(tokens)} tokens: {sizes}")
    return lines


def query_report(store: TokenStore, schedule: Schedule, plan: BatchPlan, b: int, template: Template) -> str:
    """One query of a step: where it comes from, its prompt as text, its candidates with teacher scores."""
    require_query(plan, b)
    dataset = store.datasets[plan.dataset]
    part = slice(int(plan.example_offsets[b]), int(plan.example_offsets[b + 1]))
    shown_lines = dataset.source_line_N[plan.example_row_E[part]].tolist()
    length = int(plan_lengths(store, schedule.limits, plan)[b])
    lines = [
        f"{'query':<20} {b}: source line {int(dataset.source_line_N[plan.row_B[b]])} of {dataset.name}",
        f"{'examples':<20} " + (f"source lines {', '.join(map(str, shown_lines))}" if shown_lines else "none"),
        f"{'tokens':<20} {length}, BOS and EOS included",
        "prompt, before texts over a limit are cut:",
        indent(render_prompt(store, plan, b, template)),
        "candidates (score of the teacher, text):",
    ]
    for c in range(int(plan.group_offsets[b]), int(plan.group_offsets[b + 1])):
        lines.append(f"  {candidate_line(store, plan, b, c)}")
    if RULES[plan.task_type].wrap_passages:
        lines.append("candidates take the form of a query, with the instruction of their row and without examples")
    return "\n".join(lines)


def require_query(plan: BatchPlan, b: int) -> None:
    """ValueError for a query that the step does not have."""
    if not 0 <= b < plan.num_queries:
        raise ValueError(f"--query {b} is not in step {plan.step}: it has queries 0 to {plan.num_queries - 1}")


def candidate_line(store: TokenStore, plan: BatchPlan, b: int, c: int) -> str:
    """Candidate `c` of query `b`: its role, the teacher's score, its text."""
    score, passage = plan.teacher_score_C[c], plan.candidate_C[c]
    role = "positive" if c == plan.group_offsets[b] else "negative"
    text = " ".join(store.text(int(plan.passage_text_P[passage])).split())[:SHOWN_CHARACTERS]
    return f"{role}  {'-' if np.isnan(score) else f'{score:.4g}':>8}  {text}"


def render_prompt(store: TokenStore, plan: BatchPlan, b: int, template: Template) -> str:
    """The prompt as text; filler stands as a note, since it has no text."""
    first, last = int(plan.example_offsets[b]), int(plan.example_offsets[b + 1])
    examples = [
        (
            store.instructions[plan.example_instruction_E[e]],
            store.text(int(plan.example_query_E[e])),
            store.text(int(plan.example_response_E[e])),
        )
        for e in range(first, last)
    ]
    note = f"[{len(examples)} examples as blank lines of the same length]\n" if plan.filler and examples else ""
    instruction, query = store.instructions[plan.instruction_B[b]], store.text(int(plan.query_text_B[b]))
    return note + render_query(template, instruction, query, () if plan.filler else examples)


def indent(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.split("\n"))
