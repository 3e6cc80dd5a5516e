"""Rerank what a retriever found, and show both side by side: score by mteb's metrics, arithmetic and seconds.

The retriever ranks each task once. Its first passages (--top) are scored by the reranker at every setting, each
distinct pair once; the others stay below them in the retriever's order. reranking.json keeps a record of each ranking,
written as soon as it is scored; one of the same models, task and setting is replaced.
"""

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.loading import load_retriever
from pipeline.evaluation.sides import SIDES
from pipeline.evaluation.tasks import load_retrieval_task
from pipeline.files import exit_code

if TYPE_CHECKING:
    from pipeline.evaluation.jobs import Job

NO_RUN = Path("runs/evaluation")  # of rerankers that belong to no run
EPILOG = """examples:
  python pipeline/evaluate_reranker.py --reranker runs/reranker_gemma2 --retriever bm25 --task tasks/a
  python pipeline/evaluate_reranker.py --reranker runs/x --retriever runs/embedder --task tasks/a --task tasks/b \\
      --setting full --setting light --setting exit=18 --setting exit=18,layers=6+12,ratio=4
  python pipeline/evaluate_reranker.py --reranker BAAI/bge-reranker-v2.5-gemma2-lightweight --top 200 \\
      --retriever BAAI/bge-en-icl --template bge_en_icl --task NFCorpus

a task is a folder of type retrieval or reranking (pipeline/evaluation/tasks.py), or one of mteb's by name. A setting
is full; light, the paper's compressed one (exit 25 of 42, 2 tokens to one behind the first merge layer) scaled to the
model's depth; or any of exit=K (score after K layers), layers=I+J (merge passage tokens behind these) and ratio=R (so
many become one), without layers behind all of the model's own. Retriever and reranker are on the device at once. Timed
are the retriever's search, and the scoring of pairs at each setting; loading, tokenizing of pairs and metrics are not.
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse itself exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reranker", required=True, metavar="NAME", help="a run, a reranker's folder, or a hub name")
    parser.add_argument(
        "--retriever",
        required=True,
        metavar="NAME",
        help="bm25; a run or an exported embedder; a published embedder with its --template; or a model of "
        "sentence-transformers",
    )
    parser.add_argument(
        "--template", help="prompt template of a published --retriever (bge_en_icl for BAAI/bge-en-icl)"
    )
    parser.add_argument(
        "--num-examples",
        type=int,
        default=0,
        help="of a folder's examples.jsonl in the retriever's prompts (default: 0, zero-shot)",
    )
    parser.add_argument("--task", action="append", required=True, help="folder or mteb's name; may stand repeatedly")
    parser.add_argument("--data-root", type=Path, help="folder with local copies of public data under their hub names")
    parser.add_argument("--top", type=int, default=100, help="passages of a query to rerank (default: 100)")
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="TEXT",
        help="depth and width of the reranker; may stand repeatedly (default: full and light)",
    )
    parser.add_argument(
        "--relation",
        default="q-p",
        help="what is asked of a pair: q-p (default), q-q (the paper's for CQADupstack and Quora), p-p, arguana",
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder of reranking.json (default: the reranker's run, else {NO_RUN})"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Rerank, score and write; returns 0, or 2 with one line for what the user can mend."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    logging.getLogger("bm25s").propagate = False  # it tells of every index, and sets its level on import
    try:
        if importlib.util.find_spec("mteb") is None:
            raise ValueError("mteb, which scores, is not installed; pip install bge-icl-train[eval]")
        evaluate(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


def evaluate(args: argparse.Namespace) -> None:
    """Rank and rerank every task; prints a table and writes reranking.json."""
    # Loading these takes seconds; wrong arguments should not have to wait for it.
    import datasets
    import transformers

    from pipeline.evaluation.jobs import require_distinct_names
    from pipeline.evaluation.reranking import RETRIEVER, rerank_job
    from pipeline.evaluation.reranking_records import add_row, read_rows, reranking_table
    from pipeline.inference.loading import find_model
    from pipeline.inference.reduction import FULL, LIGHT, resolve_settings
    from pipeline.inference.reranker import LightweightReranker
    from pipeline.inference.reranker_files import fingerprint_reranker

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.top < 1:
        raise ValueError(f"--top {args.top} leaves nothing to rerank; take 1 or more")
    path = (args.out or (Path(args.reranker) if is_run(args.reranker) else NO_RUN)) / "reranking.json"
    read_rows(path)  # a damaged file is refused before the work, and not after it
    jobs = [make_job(args, name) for name in dict.fromkeys(args.task)]
    require_distinct_names(jobs)
    folder = find_model(args.reranker)
    settings = resolve_settings(folder, args.setting or (FULL, LIGHT), "--setting")
    reranker = LightweightReranker(args.reranker)
    reductions = {name: reranker.read_setting(name) for name in settings}
    reranker.description.template.prompt(args.relation)  # an unknown relation is refused here
    names = {"reranker": args.reranker, "fingerprint": fingerprint_reranker(folder)}
    retriever = load_retriever(args.retriever, args.template)
    if args.num_examples and retriever.embedder is None:
        raise ValueError(f"--num-examples {args.num_examples}: {retriever.label} knows no examples; leave it out")
    rows = []
    for job in jobs:
        print(f"{job.task}: {job.about}", flush=True)
        for row in rerank_job(retriever, reranker, job, reductions, args.top, args.relation):
            rows.append(names | row)
            add_row(path, rows[-1])
            print(f"{job.task}: {row['setting']} done in {row['seconds']:.1f} s", flush=True)
            if row["setting"] == RETRIEVER:
                tell_gaps(row)
    print(reranking_table(rows))
    print(f"records: {path}")


def is_run(name: str) -> bool:
    """Whether this is the folder of a run, and not a model's own."""
    return (Path(name) / "model").is_dir()


def make_job(args: argparse.Namespace, name: str) -> "Job":
    """The job of a folder or of a public task; ValueError for one that has no passages to rank."""
    from pipeline.evaluation.jobs import local_job, public_job

    if args.num_examples < 0:
        raise ValueError(f"--num-examples {args.num_examples} must be 0 (zero-shot) or more")
    if Path(name).exists() or "/" in name:
        modes = ("few_shot",) if args.num_examples else ()
        return local_job(load_retrieval_task(name), modes, args.num_examples, SIDES[0])
    if args.num_examples:
        raise ValueError(f"--num-examples {args.num_examples}: {name} is no folder with examples; leave it out")
    job = public_job(name, None, SIDES[0], args.data_root, None)
    if job.kind not in ("retrieval", "reranking"):
        raise ValueError(f"task {name} is of type {job.kind}; reranked are retrieval and reranking")
    return job


def tell_gaps(row: dict[str, Any]) -> None:
    """Say what the retriever left to chance."""
    about = f"{row['task']}: {row['retriever']}"
    if row["queries_unmatched"]:
        print(f"{about} found nothing for {row['queries_unmatched']} of {row['queries']} queries")
    if row["candidates_unranked"]:
        print(f"{about} left out {row['candidates_unranked']} given candidates; they stand below all others, by a hash")


if __name__ == "__main__":
    raise SystemExit(main())
