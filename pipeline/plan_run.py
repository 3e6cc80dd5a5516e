"""Show what a training run will do, without running it: `python pipeline/plan_run.py --config RECIPE --step 17`.

Prints the schedule of all datasets and the plan of one step: rows, examples, candidates, distinct passages, chunks.
Plans are a pure function of the step, so any step can be shown at once. Needs the token store, no model and no GPU;
for a reranker, whose pairs are tokenized here, also the tokenizer and the model's config.json.
With --estimate it prints what the run will need (memory of a rank by part, chunks, time, GPU-hours) from the recipe,
its DeepSpeed JSON and the model's config.json; formulas in pipeline/planning/. Without a store, state mean lengths.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.sampling import Schedule, check_world_size, make_schedule, plan_step
from pipeline.data.store import TokenStore, open_store, require_match
from pipeline.model.reranker import read_reranker_shape
from pipeline.model.shapes import read_shape
from pipeline.planning.cases import make_case
from pipeline.planning.flags import add_flags, check_flags, read_cluster, read_workload
from pipeline.planning.pair_report import pair_query_report, pair_step_report
from pipeline.planning.report import estimate_report
from pipeline.planning.sharding import read_sharding
from pipeline.planning.step_report import query_report, step_report
from pipeline.prompts import get_template
from pipeline.runtime.sharding_json import read_deepspeed_json, require_exact
from pipeline.settings import Settings, load_settings


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
  python pipeline/plan_run.py --config recipes/reranker_gemma2.yaml --estimate --query-tokens 20 --passage-tokens 200
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
    # Whether the model knows them already is not known without its tokenizer; three rows are nothing.
    markers, store, schedule = len(get_template(settings.preprocess.template).markers), None, None
    if arguments.query_tokens is None:
        if not Path(settings.data.store).exists():
            raise ValueError(
                f"data.store={settings.data.store} does not exist: preprocess first, or state mean lengths with "
                "--query-tokens and --passage-tokens"
            )
        store, schedule = _open(settings)
        markers = sum(1 for subtokens in store.manifest.tokens.marker_subtokens if subtokens)
    reranks = settings.model.kind == "reranker"
    shape = read_reranker_shape(settings.model) if reranks else read_shape(settings.model, markers)
    workload, cluster = read_workload(arguments, settings, shape.layers, store, schedule), read_cluster(arguments)
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
    if settings.model.kind == "reranker":
        depth = read_reranker_shape(settings.model).layers
        print("\n" + pair_step_report(store, schedule, plan, settings, depth, world_size))
        if arguments.query is not None:
            print("\n" + pair_query_report(store, plan, settings, arguments.query))
        return
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
