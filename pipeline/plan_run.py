"""Show what a training run will do, without running it: `python pipeline/plan_run.py --config RECIPE --step 17`.

Prints the schedule of all datasets and the plan of one step: rows, examples, candidates, distinct passages, chunks.
Plans are a pure function of the step, so any step can be shown at once. Needs the token store, no model and no GPU.
With --estimate it prints what the run will need (memory of a rank by part, chunks, time, GPU-hours) from the recipe,
its DeepSpeed JSON and the model's config.json; formulas in pipeline/planning/. Without a store, state mean lengths.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.composing import plan_lengths
from pipeline.data.packing import deal
from pipeline.data.sampling import Schedule, check_world_size, make_schedule, plan_step, share_saved
from pipeline.data.shown import count_shown
from pipeline.data.store import TokenStore, open_store, require_match
from pipeline.datatypes import RULES, BatchPlan
from pipeline.model.shapes import read_shape
from pipeline.planning.cases import make_case, sampled_workload, stated_workload
from pipeline.planning.flags import add_flags, check_flags, read_cluster
from pipeline.planning.report import estimate_report
from pipeline.planning.sharding import read_sharding
from pipeline.prompts import Template, get_template, render_query
from pipeline.runtime.sharding_json import read_deepspeed_json, require_exact
from pipeline.settings import Settings, load_settings

SHOWN_ROWS = 16
SHOWN_CHARACTERS = 100


def schedule_table(schedule: Schedule) -> str:
    """One line a dataset: type, rows, batch size, group, negatives, batches a pass, steps an epoch."""
    head = ["dataset", "type", "rows", "batch", "group", "in-batch", "buckets", "batches/pass", "steps/epoch"]
    table = [head]
    for d in schedule.datasets:
        layout = d.layout
        numbers = [layout.num_rows, d.num_queries, d.group_size, "yes" if d.in_batch_negatives else "no"]
        numbers += [len(layout.full_batches), layout.num_batches, d.steps_per_epoch]
        table.append([d.name, d.task_type, *map(str, numbers)])
    examples = schedule.examples
    end = f"{schedule.steps_per_epoch} steps an epoch; examples: {examples.mode}, up to {examples.max_examples} a query"
    return "\n".join([*_align(table, num_left=2), end])


def step_report(store: TokenStore, schedule: Schedule, plan: BatchPlan, world_size: int, chunk_tokens: int) -> str:
    """The plan of one step in numbers: rows, examples, candidates, passages, chunks of every rank."""
    dataset = store.datasets[plan.dataset]
    counts_B = np.diff(plan.example_offsets)
    histogram = "  ".join(f"{k}: {n}" for k, n in enumerate(np.bincount(counts_B)))
    line_B = dataset.source_line_N[plan.row_B].tolist()
    more = f" ... ({len(line_B) - SHOWN_ROWS} more)" if len(line_B) > SHOWN_ROWS else ""
    group_B = np.diff(plan.group_offsets)
    fields = [
        ("step", f"{plan.step} (epoch {plan.epoch}, {plan.step % schedule.steps_per_epoch} inside it)"),
        ("dataset", f"{dataset.name} ({plan.task_type})"),
        ("queries", f"{plan.num_queries}, of them seen a second time in this pass: {plan.num_rows_revisited}"),
        ("source lines", ", ".join(map(str, line_B[:SHOWN_ROWS])) + more),
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
    report = [f"{name:<20} {value}" for name, value in fields]
    return "\n".join([*report, *_chunk_lines(store, schedule, plan, world_size, chunk_tokens)])


def _chunk_lines(
    store: TokenStore, schedule: Schedule, plan: BatchPlan, world_size: int, chunk_tokens: int
) -> list[str]:
    length_S = plan_lengths(store, schedule.limits, plan)
    ranks = deal(length_S, world_size, chunk_tokens)
    total, in_queries = int(length_S.sum()), int(length_S[: plan.num_queries].sum())
    lines = [
        f"{'tokens':<20} {total} ({in_queries} in queries, {total - in_queries} in passages), padding 0",
        f"{'chunks':<20} {len(ranks[0])} a rank, at most {chunk_tokens} tokens each",
    ]
    for rank, chunks in enumerate(ranks):
        tokens = [int(length_S[chunk].sum()) for chunk in chunks]
        sizes = ", ".join(f"{t} ({len(chunk)} sequences)" for t, chunk in zip(tokens, chunks, strict=True))
        lines.append(f"  {f'rank {rank}':<18} {sum(tokens)} tokens: {sizes}")
    return lines


def query_report(store: TokenStore, schedule: Schedule, plan: BatchPlan, b: int, template: Template) -> str:
    """One query of a step: where it comes from, its prompt as text, its candidates with teacher scores."""
    if not 0 <= b < plan.num_queries:
        raise ValueError(f"--query {b} is not in step {plan.step}: it has queries 0 to {plan.num_queries - 1}")
    dataset = store.datasets[plan.dataset]
    part = slice(int(plan.example_offsets[b]), int(plan.example_offsets[b + 1]))
    shown_lines = dataset.source_line_N[plan.example_row_E[part]].tolist()
    length = int(plan_lengths(store, schedule.limits, plan)[b])
    lines = [
        f"{'query':<20} {b}: source line {int(dataset.source_line_N[plan.row_B[b]])} of {dataset.name}",
        f"{'examples':<20} " + (f"source lines {', '.join(map(str, shown_lines))}" if shown_lines else "none"),
        f"{'tokens':<20} {length}, BOS and EOS included",
        "prompt, before texts over a limit are cut:",
        _indent(_prompt(store, plan, b, template)),
        "candidates (score of the teacher, text):",
    ]
    for c in range(int(plan.group_offsets[b]), int(plan.group_offsets[b + 1])):
        passage = plan.candidate_C[c]
        score = plan.teacher_score_C[c]
        role = "positive" if c == plan.group_offsets[b] else "negative"
        text = " ".join(store.text(int(plan.passage_text_P[passage])).split())[:SHOWN_CHARACTERS]
        lines.append(f"  {role}  {'-' if np.isnan(score) else f'{score:.4g}':>8}  {text}")
    if RULES[plan.task_type].wrap_passages:
        lines.append("candidates take the form of a query, with the instruction of their row and without examples")
    return "\n".join(lines)


def _prompt(store: TokenStore, plan: BatchPlan, b: int, template: Template) -> str:
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


def _indent(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def _align(table: list[list[str]], num_left: int) -> list[str]:
    """Rows of a table as lines: the first columns to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(x.ljust(w) if i < num_left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python pipeline/plan_run.py --config examples/quickstart/recipe.yaml
  python pipeline/plan_run.py --config examples/quickstart/recipe.yaml --step 17 --query 3
  python pipeline/plan_run.py --config recipes/bge_en_icl_public.yaml --step 7000 --world-size 64 run.chunk_tokens=32768
  python pipeline/plan_run.py --config recipes/bge_en_icl_public.yaml --estimate --nodes 4 --gpu-memory 80
  python pipeline/plan_run.py --config recipes/bge_en_icl_public.yaml --estimate --query-tokens 500 --passage-tokens 180
The store must exist (python pipeline/preprocess.py --config RECIPE), but for an estimate from stated lengths.""",
    )
    parser.add_argument("--config", required=True, help="recipe YAML; pipeline/settings.py documents every key")
    parser.add_argument("--step", type=int, help="show this global step (0 is the first)")
    parser.add_argument("--query", type=int, help="show this query of the step (0 is the first), with its prompt")
    parser.add_argument("--world-size", type=int, help="deal the step to so many ranks (default 1)")
    add_flags(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the recipe's")
    return parser.parse_intermixed_args(argv)


def _check(arguments: argparse.Namespace) -> None:
    """ValueError for a value out of range and for flags that say nothing together."""
    for name, least in (("step", 0), ("query", 0), ("world_size", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    check_flags(arguments)
    if arguments.estimate and (arguments.step is not None or arguments.world_size is not None):
        raise ValueError("--estimate is of the whole run on --nodes x --gpus-per-node: leave out --step, --world-size")
    if arguments.query is not None and arguments.step is None:
        raise ValueError(f"--query {arguments.query} needs --step: say which step's query to show")


def _open(settings: Settings) -> tuple[TokenStore, Schedule]:
    store = open_store(settings.data.store, verify=False)
    # Training compares the tokenizer too; a plan needs none.
    require_match(store, settings, store.manifest.fingerprint)
    return store, make_schedule(store, settings)


def estimate_run(settings: Settings, arguments: argparse.Namespace) -> str:
    """The estimate that the flags ask for, as text."""
    if settings.model.trained == "full":
        raise ValueError("model.trained=full is not estimated: the formulas are those of LoRA; set it to lora")
    require_exact(settings.run.deepspeed, settings.run.keep_graphs)
    sharding = read_sharding(read_deepspeed_json(settings.run.deepspeed))
    if arguments.query_tokens is not None:
        # Whether the model knows them already is not known without its tokenizer; three rows are nothing.
        markers = len(get_template(settings.preprocess.template).markers)
        workload = stated_workload(settings, arguments.query_tokens, arguments.passage_tokens, arguments.steps)
    else:
        if not Path(settings.data.store).exists():
            raise ValueError(
                f"data.store={settings.data.store} does not exist: preprocess first, or state mean lengths with "
                "--query-tokens and --passage-tokens"
            )
        store, schedule = _open(settings)
        markers = sum(1 for subtokens in store.manifest.tokens.marker_subtokens if subtokens)
        workload = sampled_workload(store, schedule, settings)
    shape, cluster = read_shape(settings.model, markers), read_cluster(arguments)
    return estimate_report(make_case(settings, shape, sharding, cluster, workload.load), workload, settings)


def run(arguments: argparse.Namespace) -> None:
    """Print what the arguments ask for; user errors are ValueErrors."""
    _check(arguments)
    settings = load_settings(arguments.config, arguments.overrides)
    if arguments.estimate:
        print(estimate_run(settings, arguments))
        return
    store, schedule = _open(settings)
    world_size = arguments.world_size or 1
    check_world_size(schedule, world_size)
    print(schedule_table(schedule))
    if arguments.step is None:
        return
    plan = plan_step(store, schedule, arguments.step)
    print("\n" + step_report(store, schedule, plan, world_size, settings.run.chunk_tokens))
    if arguments.query is not None:
        template = get_template(settings.preprocess.template)
        print("\n" + query_report(store, schedule, plan, arguments.query, template))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
