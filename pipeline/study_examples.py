"""What in-context examples do: scores of a model on tasks, with examples that differ in one thing.

  shots    the number of examples, 0 to 8
  content  true examples beside shuffled, wrong, noisy and empty ones of the same length, and beside none
  labels   classification and clustering: true labels beside permuted and opaque ones
  choice   the first ones, random ones, and for each query its nearest ones by embedding or BM25, in three orders

Writes DIR/<study>.json (how every number came about), DIR/<study>.png and DIR/studies.md. What DIR holds already is not
measured again, so a command that was cut off goes on when it is given again.
"""

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.evaluation.loading import load_model, read_settings
from pipeline.evaluation.sides import SIDES
from pipeline.evaluation.tasks import LocalTask, load_task
from pipeline.files import locked
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.evaluation.jobs import Model
    from pipeline.evaluation.study_arms import Arm

MAX_SHOTS = 8
EPILOG = """examples:
  python pipeline/study_examples.py --run runs/quickstart --task examples/quickstart/eval/xquad_en \\
      --study shots --max-texts 100 --out runs/quickstart/studies
  python pipeline/study_examples.py --run runs/x --task tasks/a --task tasks/b --study all --out runs/x/studies

A task is a folder with task.json, examples.jsonl and its texts (pipeline/evaluation/tasks.py). Wrong examples are
made of the other tasks' responses, so the content study wants two tasks or more. Each draw takes other examples of the
task: draw 0 the first ones, as evaluation does.
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse itself exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, metavar="FOLDER", help="folder of a finished run")
    model.add_argument("--config", type=Path, metavar="RECIPE", help="recipe whose untrained base model is studied")
    model.add_argument("--model", metavar="NAME", help="an exported or published embedder: folder or hub name")
    parser.add_argument("--template", help="prompt template of a published --model (bge_en_icl for BAAI/bge-en-icl)")
    parser.add_argument("--task", action="append", required=True, metavar="FOLDER", help="may stand repeatedly")
    parser.add_argument("--study", required=True, metavar="NAME", help="shots, content, labels, choice or all")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to, or to go on in")
    parser.add_argument(
        "--max-shots", type=int, help=f"of the study shots (default: what the task holds, at most {MAX_SHOTS})"
    )
    parser.add_argument("--num-examples", type=int, default=3, help="of the other studies (default: 3)")
    parser.add_argument("--seeds", type=int, default=3, help="draws where there is chance (default: 3)")
    parser.add_argument(
        "--max-texts", type=int, help="score a fixed sample of so many test texts, pairs or queries (default: all)"
    )
    parser.add_argument(
        "--sides",
        choices=SIDES,
        default=SIDES[0],
        help="which texts carry the prompt: as in the released evaluation (default) or as in training",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, model.dtype=fp32 say")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, draw and write; returns 0, or 2 with one line for what the user can mend."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    logging.getLogger("bm25s").propagate = False  # it tells of every index, and sets its level on import
    try:
        if importlib.util.find_spec("mteb") is None:
            raise ValueError("mteb, which scores, is not installed; pip install bge-icl-train[eval]")
        study(args, read_settings(args.run, args.config, args.overrides))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def study(args: argparse.Namespace, settings: Settings | None) -> None:
    """All arms of all studies and tasks, then tables and plots."""
    # Loading these takes seconds; wrong arguments should not have to wait for it.
    import datasets
    import transformers

    from pipeline.evaluation.studies import Record, run_arms
    from pipeline.evaluation.study_report import length_notes, write_studies

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tasks = read_tasks(args)
    studies = choose_studies(args, tasks)
    model = load_model(settings, args.run, args.model, args.template)
    found: dict[str, list[Record]] = {name: [] for name in studies}
    missing: list[str] = []
    with locked(args.out / "lock", f"--out {args.out}: another process writes there"):
        for task in tasks:
            print(f"{task.name}: {task.describe()}", flush=True)
            plan, left_out = make_plan(args, studies, model, task, tasks)
            missing += left_out
            for name, records in run_arms(model, task, args.sides, plan, args.out).items():
                found[name] += records
        missing += length_notes(found.get("content", []))
        for line in missing:
            print(f"note: {line}")
        path = write_studies(args.out, found, [*describe(args, model), *missing])
    print(f"report: {path}")


def read_tasks(args: argparse.Namespace) -> list[LocalTask]:
    """The tasks, cut to --max-texts; ValueError where two have one name."""
    from pipeline.evaluation.sampling import sample_task

    tasks = [sample_task(load_task(folder), args.max_texts) for folder in dict.fromkeys(args.task)]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two tasks are named {name!r}; change the name in one task.json")
    return tasks


def choose_studies(args: argparse.Namespace, tasks: Sequence[LocalTask]) -> tuple[str, ...]:
    """The studies asked for; ValueError for an unknown one, or a task that cannot be studied so."""
    from pipeline.evaluation.study_arms import LABELLED, STUDIES, check_study

    if args.study not in (*STUDIES, "all"):
        raise ValueError(f"--study {args.study} is unknown; known: {', '.join(STUDIES)}, all")
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds} must be 1 or more")
    chosen: tuple[str, ...] = STUDIES if args.study == "all" else (args.study,)
    for task in tasks:
        for name in chosen:
            if args.study != "all" or name != "labels" or task.kind in LABELLED:
                check_study(name, task, args.max_shots, args.num_examples)
    if args.study == "all" and not any(task.kind in LABELLED for task in tasks):
        chosen = tuple(name for name in chosen if name != "labels")
    return chosen


def make_plan(
    args: argparse.Namespace, studies: Sequence[str], model: "Model", task: LocalTask, tasks: Sequence[LocalTask]
) -> tuple[dict[str, list["Arm"]], list[str]]:
    """(study -> arms of this task, zero-shot first; what is missing and why)."""
    from pipeline.evaluation.study_arms import LABELLED, ZERO, Arm, choice_arms, content_arms, label_arms, shots_arms
    from pipeline.inference.lengths import count_tokens

    embedder, k = model.embedder, args.num_examples
    assert embedder is not None

    def count(text: str, half: str) -> int:
        return count_tokens(embedder, text, half)

    plan: dict[str, list[Arm]] = {}
    missing: list[str] = []
    for name in studies:
        left_out: list[str] = []
        if name == "shots":
            most = min(MAX_SHOTS, len(task.examples)) if args.max_shots is None else args.max_shots
            arms = shots_arms(task, most, args.seeds)
        elif name == "content":
            others = [other for other in tasks if other.name != task.name]
            arms, left_out = content_arms(task, others, k, args.seeds, count)
        elif name == "labels":
            if task.kind not in LABELLED:
                missing.append(f"{task.name}: no study of labels, its type is {task.kind}")
                continue
            arms, left_out = label_arms(task, k, args.seeds, count)
        else:
            arms = choice_arms(task, k, args.seeds)
        plan[name] = [Arm(ZERO, 0), *arms]
        missing += left_out
    return plan, missing


def describe(args: argparse.Namespace, model: "Model") -> list[str]:
    """How the studies were made, in lines."""
    sample = "" if args.max_texts is None else f"; a fixed sample of at most {args.max_texts} test texts of each task"
    return [
        f"model: {args.run or args.model or args.config} ({model.label}), fingerprint {model.fingerprint[:16]}",
        f"{args.seeds} draws of examples, {args.num_examples} examples but in the study of their number{sample}",
        f"sides: {args.sides} (which texts carry the prompt)",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
