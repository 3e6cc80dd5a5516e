"""Score an embedder zero-shot and few-shot on local folders and public tasks, by mteb's metrics.

Scores go to scores.json in the run's folder, where an entry for the same model, mode, task and metric is replaced, and
report.md shows them side by side. evaluation/ beside it tells how each score came about: prompts, examples, what was
cut, versions. What it holds is not computed again, so a command that was cut off goes on when it is given again, and
the same command may run on several machines at once.
"""

import argparse
import importlib.util
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.evaluation import loading
from pipeline.evaluation.air_bench import is_place, load_air_bench, parse_place, write_ranking
from pipeline.evaluation.loading import read_settings
from pipeline.evaluation.report import add_scores, read_scores, write_report
from pipeline.evaluation.sides import SIDES
from pipeline.evaluation.table import MODES, Score, score_table
from pipeline.evaluation.tasks import LocalTask, load_task
from pipeline.files import exit_code
from pipeline.inference.workers import start_workers, stop_workers
from pipeline.settings import Settings, load_settings

if TYPE_CHECKING:
    from pipeline.evaluation.jobs import Job, Model

LOCAL_EXAMPLES = 3
NO_RUN = Path("runs/evaluation")  # of scores that belong to no run
EPILOG = """examples:
  python pipeline/evaluate_embedder.py --config examples/quickstart/recipe.yaml --task examples/quickstart/eval/xquad_en
  python pipeline/evaluate_embedder.py --run runs/quickstart --task examples/quickstart/eval/xquad_en
  python pipeline/evaluate_embedder.py --run runs/x --task tasks/a --task tasks/b --modes few_shot --num-examples 5
  python pipeline/evaluate_embedder.py --run runs/x --benchmark "MTEB(eng, v1)" --processes 8
  python pipeline/evaluate_embedder.py --baseline bm25 --task tasks/a --scores runs/x/scores.json

a task is the name of a task of mteb, a dataset of AIR-Bench (qa_law_en/AIR-Bench_24.05/default), or a folder with
task.json and, by its type (pipeline/evaluation/tasks.py), for retrieval corpus.jsonl, queries.jsonl and qrels/test.tsv
(BEIR's form); few_shot takes {"query", "response"} a line from examples.jsonl. Public tasks have the paper's
instruction; their examples are named by --examples-root
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse itself exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, metavar="FOLDER", help="folder of a finished run")
    model.add_argument("--config", type=Path, metavar="RECIPE", help="recipe whose untrained base model is scored")
    model.add_argument("--model", metavar="NAME", help="an exported or published embedder: folder or hub name")
    model.add_argument("--baseline", metavar="NAME", help="bm25, or a model of sentence-transformers: no prompts")
    parser.add_argument("--template", help="prompt template of a published --model (bge_en_icl for BAAI/bge-en-icl)")
    parser.add_argument("--task", action="append", default=[], help="folder or mteb's name; may stand repeatedly")
    parser.add_argument("--benchmark", help='all tasks of a benchmark of mteb: "MTEB(eng, v1)", "MTEB(eng, v2)", ...')
    parser.add_argument(
        "--data-root", type=Path, help="folder with local copies of public data under their hub names (no network)"
    )
    parser.add_argument(
        "--examples-root",
        type=Path,
        help="folder of examples for public tasks: MTEB/<task>.json (lists of {query, response}) and AIR-Bench/; the "
        "paper's are in FlagEmbedding's research/llm_dense_retriever/examples/bge-en-icl",
    )
    parser.add_argument(
        "--num-examples",
        type=int,
        help=f"in-context examples of few_shot (default: {LOCAL_EXAMPLES} of a folder's, all of a public task's)",
    )
    parser.add_argument("--modes", default=",".join(MODES), help="zero_shot, few_shot or both with a comma (default)")
    parser.add_argument(
        "--sides",
        choices=SIDES,
        default=SIDES[0],
        help="which texts carry the prompt: as in the released evaluation (default) or as in training",
    )
    parser.add_argument(
        "--label", help="name in the tables (default: after for --run, before for --config, else its own)"
    )
    parser.add_argument(
        "--scores", type=Path, help=f"file to add to (default: scores.json in the run's folder, else in {NO_RUN})"
    )
    parser.add_argument(
        "--rankings",
        type=Path,
        metavar="FOLDER",
        help="rank AIR-Bench's test queries for its leaderboard instead",
    )
    parser.add_argument("--chunk-tokens", type=int, help="token budget of a forward pass (default: by device)")
    parser.add_argument("--processes", type=int, default=1, help="share the tasks among so many, one a GPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, model.dtype=fp32 say")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns 0, 1 if some of several tasks failed, or 2 with one line for what the user can mend."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    try:
        modes = parse_modes(args.modes)
        settings = read_settings(args.run, args.config, args.overrides)
        names = task_names(args)
        if args.processes > 1 and args.rankings:
            raise ValueError("--rankings goes with one process; give each dataset a command of its own")
        if args.processes > 1:
            share(sys.argv[1:] if argv is None else argv, args.processes)
        return evaluate(args, settings, names, modes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)


def parse_modes(text: str) -> tuple[str, ...]:
    """The modes of a comma-separated list, in its order; ValueError on an unknown one."""
    modes = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"--modes {text}: {mode!r} is unknown; known: {', '.join(MODES)}")
    return modes


def task_names(args: argparse.Namespace) -> list[str]:
    """Folders and names of tasks, each once."""
    if importlib.util.find_spec("mteb") is None:
        raise ValueError("mteb, which scores, is not installed; pip install bge-icl-train[eval]")
    names = list(args.task)
    if args.benchmark:
        from pipeline.evaluation.mteb_tasks import benchmark_tasks

        names += benchmark_tasks(args.benchmark)
    if not names:
        raise ValueError("nothing to score: name a --task or a --benchmark")
    return list(dict.fromkeys(names))


def share(command: Sequence[str], processes: int) -> None:
    """Run the same command so many times at once; each takes tasks that no other one has. Their scores stay in
    evaluation/, from where this process takes them; what none of them could score it tries again, and says why."""
    workers = start_workers(Path(__file__), command, processes)
    try:
        for worker in workers:
            worker.wait()
    finally:
        stop_workers(workers)


def evaluate(args: argparse.Namespace, settings: Settings | None, names: Sequence[str], modes: Sequence[str]) -> int:
    """Score every task in every mode; prints table and report path, writes scores.json and report.md."""
    # Loading these takes seconds; wrong arguments should not have to wait for it.
    import datasets
    import transformers

    from pipeline.evaluation.jobs import require_distinct_names

    folder = args.run or (Path(settings.run.output_dir) if settings else NO_RUN)
    path = args.scores or folder / "scores.json"
    read_scores(path)  # a damaged file is refused before the work, and not after it
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.rankings:
        return write_rankings(args, names, modes, load_model(args, settings))
    failed: list[str] = []
    jobs = []
    for name in names:
        try:
            jobs.append(make_job(args, name, modes))
        except (ValueError, OSError) as error:
            if len(names) == 1:
                raise
            failed.append(say_failed(name, error))
    require_distinct_names(jobs)
    model = load_model(args, settings)
    scores, unscored = score_jobs(model, jobs, modes, path.parent / "evaluation", args.worker)
    failed += unscored
    if args.worker:
        return 0
    if not scores:
        raise ValueError("nothing was scored: see above what was left out")
    everything = add_scores(path, scores)
    print(score_table(everything))
    if settings is None and (path.parent / "settings.yaml").is_file():
        settings = load_settings(path.parent / "settings.yaml")
    report = write_report(path.parent, settings, everything, describe_examples(model, jobs, modes))
    print(f"scores: {path}\nreport: {report}")
    if failed:
        print(f"error: {len(failed)} of {len(names)} tasks failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def score_jobs(
    model: "Model", jobs: Sequence["Job"], modes: Sequence[str], folder: Path, is_worker: bool
) -> tuple[list[Score], list[str]]:
    """(scores, tasks that failed). Tasks that another process is at are passed over, and waited for at the end except
    by workers."""
    from pipeline.evaluation.jobs import run_job

    scores: list[Score] = []
    busy: list[Job] = []
    failed: list[str] = []
    for todo, wait in ((jobs, False), (busy, True)):
        for job in () if wait and is_worker else todo:
            print(f"{job.task}: {'another process scores it; waiting' if wait else job.about}", flush=True)
            if model.embedder and job.some_query and job.examples and not wait:
                show_prompt(model, job)
            start = time.monotonic()
            try:
                found = run_job(model, job, modes, folder, wait)
            except Exception as error:  # mteb and its data raise errors of many kinds: the other tasks go on
                if len(jobs) == 1:
                    raise
                failed.append(say_failed(job.task, error))
                continue
            if found is None:
                busy.append(job)
                continue
            scores += found
            print(f"{job.task}: done in {time.monotonic() - start:.0f} s", flush=True)
    return scores, failed


def say_failed(task: str, error: Exception) -> str:
    """Name a failed task, with where it failed unless a user can mend it; returns the task."""
    print(f"error: {task}: {error}", file=sys.stderr, flush=True)
    if not isinstance(error, (ValueError, OSError)):
        traceback.print_exception(error)
    return task


def make_job(args: argparse.Namespace, name: str, modes: Sequence[str]) -> "Job":
    """The job of a folder or of a public task."""
    from pipeline.evaluation.jobs import local_job, public_job

    if not Path(name).exists() and "/" not in name:
        return public_job(name, args.num_examples, args.sides, args.data_root, args.examples_root)
    num_examples = LOCAL_EXAMPLES if args.num_examples is None else args.num_examples
    task: LocalTask
    if is_place(name):
        task = load_air_bench(name, "dev", air_bench_examples(args))
        num_examples = len(task.examples[: args.num_examples])
    else:
        task = load_task(name)
    if args.baseline is not None or (is_place(name) and not task.examples):
        modes = ("zero_shot",)
    return local_job(task, modes, num_examples, args.sides)


def air_bench_examples(args: argparse.Namespace) -> Path | None:
    """The folder of AIR-Bench's examples."""
    return args.examples_root / "AIR-Bench" if args.examples_root else None


def write_rankings(args: argparse.Namespace, names: Sequence[str], modes: Sequence[str], model: "Model") -> int:
    """Rank the test queries of AIR-Bench, whose judgements are not public, into files that its leaderboard takes."""
    from tempfile import TemporaryDirectory

    from pipeline.evaluation.ranking import rank
    from pipeline.evaluation.runner import prompted

    if model.embedder is None:
        raise ValueError("--rankings needs an embedder, not a baseline")
    for name in names:
        task = load_air_bench(name, "test", air_bench_examples(args))
        with TemporaryDirectory() as memory:
            for mode in modes:
                examples = task.examples[: args.num_examples] if mode == "few_shot" else ()
                if mode == "few_shot" and not examples:
                    print(f"{task.name}: no examples are known, few_shot is left out")
                    continue
                encode = prompted(model.embedder, task.kind, task.instruction, examples, args.sides, Path(memory))
                rankings = rank(task, encode, args.sides)
                path = write_ranking(args.rankings, parse_place(name), "test", f"{model.label}-{mode}", rankings)
                print(f"{task.name} {mode}: {len(rankings)} queries ranked: {path}", flush=True)
    return 0


def load_model(args: argparse.Namespace, settings: Settings | None) -> "Model":
    """What is scored, from the one of four arguments that names it."""
    from pipeline.evaluation.baselines import load_baseline
    from pipeline.evaluation.jobs import Model

    if args.baseline:
        baseline, digest = load_baseline(args.baseline)
        return Model(args.label or Path(args.baseline).name, digest, None, baseline)
    return loading.load_model(settings, args.run, args.model, args.template, args.chunk_tokens, args.label)


def show_prompt(model: "Model", job: "Job") -> None:
    """Print the few-shot prompt of the task's first query exactly as the model gets it."""
    assert model.embedder is not None
    logging.getLogger("pipeline").setLevel(logging.WARNING)  # what is cut is counted when all queries are encoded
    ids = model.embedder.compose_queries([job.some_query], job.instruction, job.examples)[0]
    logging.getLogger("pipeline").setLevel(logging.INFO)
    print(f"few-shot prompt of the first query ({len(ids)} tokens), as the model sees it:")
    print("\n".join(f"    {line}" for line in model.embedder.render(ids).split("\n")), flush=True)


def describe_examples(model: "Model", jobs: Sequence["Job"], modes: Sequence[str]) -> list[str]:
    """Notes of the report: what few_shot means there."""
    if model.embedder is None or "few_shot" not in modes:
        return []
    counts = sorted({len(job.examples) for job in jobs if job.examples})
    numbers = " or ".join(map(str, counts))
    return [f"{model.label}: few_shot with the first {numbers} examples of each task"] if counts else []


if __name__ == "__main__":
    raise SystemExit(main())
