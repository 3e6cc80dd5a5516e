"""Score an embedder zero-shot and few-shot on local retrieval tasks, by mteb's metrics.

The model is a finished run (--run) or the untrained base model of a recipe (--config). Scores go to scores.json in the
run's folder, where an entry for the same model, mode, task and metric is replaced, and report.md shows them side by
side.
"""

import argparse
import importlib.util
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.evaluation.report import Score, add_scores, score_table, write_report
from pipeline.evaluation.tasks import RetrievalTask, load_task
from pipeline.settings import Settings, load_settings

if TYPE_CHECKING:
    from pipeline.inference.embedder import FewShotEmbedder

MODES = ("zero_shot", "few_shot")
EPILOG = """examples:
  python pipeline/evaluate_embedder.py --config examples/quickstart/recipe.yaml --task examples/quickstart/eval/xquad_en
  python pipeline/evaluate_embedder.py --run runs/quickstart --task examples/quickstart/eval/xquad_en
  python pipeline/evaluate_embedder.py --run runs/x --task tasks/a --task tasks/b --modes few_shot --num-examples 5

a task is a folder with task.json, corpus.jsonl, queries.jsonl, qrels/test.tsv (BEIR's form) and, for few_shot,
examples.jsonl with {"query", "response"} a line
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse itself exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, metavar="FOLDER", help="folder of a finished run")
    model.add_argument("--config", type=Path, metavar="RECIPE", help="recipe whose untrained base model is scored")
    parser.add_argument("--task", type=Path, action="append", required=True, help="task folder; may stand repeatedly")
    parser.add_argument("--num-examples", type=int, default=3, help="in-context examples of few_shot (default: 3)")
    parser.add_argument("--modes", default=",".join(MODES), help="zero_shot, few_shot or both with a comma (default)")
    parser.add_argument("--label", help="name of the model (default: after for --run, before for --config)")
    parser.add_argument("--scores", type=Path, help="file to add to (default: scores.json in the run's folder)")
    parser.add_argument("--chunk-tokens", type=int, help="token budget of a forward pass (default: by device)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, model.dtype=fp32 say")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns 0, or 2 with one line for what the user can mend."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    try:
        modes = parse_modes(args.modes)
        settings = read_settings(args.run, args.config, args.overrides)
        tasks = [load_task(folder) for folder in args.task]
        evaluate(args, settings, tasks, modes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_modes(text: str) -> tuple[str, ...]:
    """The modes of a comma-separated list, in its order; ValueError on an unknown one."""
    modes = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"--modes {text}: {mode!r} is unknown; known: {', '.join(MODES)}")
    return modes


def read_settings(run: Path | None, config: Path | None, overrides: Sequence[str]) -> Settings:
    """Settings of the run or recipe; ValueError where the folder is not a run or overrides cannot apply."""
    if config is not None:
        return load_settings(config, overrides)
    assert run is not None
    if overrides:
        raise ValueError(f"{' '.join(overrides)}: a trained model keeps its settings; overrides go with --config")
    if not (run / "settings.yaml").is_file():
        raise ValueError(f"--run {run} is not the folder of a run: settings.yaml is missing")
    return load_settings(run / "settings.yaml")


def evaluate(
    args: argparse.Namespace, settings: Settings, tasks: Sequence[RetrievalTask], modes: Sequence[str]
) -> None:
    """Score every task in every mode; prints table and report path, writes scores.json and report.md."""
    if importlib.util.find_spec("mteb") is None:
        raise ValueError("mteb, which scores, is not installed; pip install bge-icl-train[eval]")
    # Loading these takes seconds; wrong arguments should not have to wait for it.
    import datasets
    import transformers

    from pipeline.evaluation.runner import choose_examples, score_modes
    from pipeline.inference.embedder import load_base_embedder, load_embedder

    folder = args.run or Path(settings.run.output_dir)
    label = args.label or ("after" if args.run else "before")
    path = args.scores or folder / "scores.json"
    if "few_shot" in modes:
        for task in tasks:
            choose_examples(task, args.num_examples)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.run:
        embedder = load_embedder(args.run, args.chunk_tokens)
    else:
        embedder = load_base_embedder(settings, args.chunk_tokens)
    scores: list[Score] = []
    for task in tasks:
        left_out = f", {task.num_unjudged} without a relevant passage left out" if task.num_unjudged else ""
        print(f"{task.name}: {len(task.queries)} queries{left_out}, {len(task.corpus)} passages", flush=True)
        if "few_shot" in modes:
            show_prompt(embedder, task, args.num_examples)
        start = time.monotonic()
        values = score_modes(embedder, task, modes, args.num_examples)
        print(f"{task.name}: scored in {time.monotonic() - start:.0f} s", flush=True)
        scores += [Score(label, mode, task.name, task.metric, value) for mode, value in values.items()]
    everything = add_scores(path, scores)
    print(score_table(everything))
    note = f"{label}: few_shot with the first {args.num_examples} examples of each task's examples.jsonl"
    report = write_report(path.parent, settings, everything, [note] if "few_shot" in modes else [])
    print(f"scores: {path}\nreport: {report}")


def show_prompt(embedder: "FewShotEmbedder", task: RetrievalTask, num_examples: int) -> None:
    """Print the few-shot prompt of the task's first query exactly as the model gets it."""
    query = next(iter(task.queries.values()))
    logging.getLogger("pipeline").setLevel(logging.WARNING)  # what is cut is counted when all queries are encoded
    ids = embedder.compose_queries([query], task.instruction, task.examples[:num_examples])[0]
    logging.getLogger("pipeline").setLevel(logging.INFO)
    print(f"few-shot prompt of the first query ({len(ids)} tokens), as the model sees it:")
    print("\n".join(f"    {line}" for line in embedder.render(ids).split("\n")), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
