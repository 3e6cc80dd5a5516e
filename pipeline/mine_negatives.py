"""Mine hard negatives for the rows of a token store, and the nearest rows of each row.

Every query searches the positives and negatives of its dataset, by an embedder or by BM25. From a window of ranks, what
may answer the query after all is removed by rules that the report counts one by one, and negatives are drawn from the
rest. DIR then holds one raw file a dataset (line i + 1 is row i of the store) for a next recipe with data.root=DIR, and
report.md. An interrupted run goes on where it stopped; the result is the same bytes.
"""

import argparse
import functools
import importlib.util
import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from pipeline.data.derived import choose_datasets, rows_file, write_recipe
from pipeline.data.pair_steps import choose_relations
from pipeline.data.store import MANIFEST, DatasetTable, TokenStore, open_store
from pipeline.files import file_sha256
from pipeline.mining.folder import Record, own_folder, prepare_folder
from pipeline.mining.options import BM25, SHARD_TEXTS, MiningOptions, check_options
from pipeline.settings import Settings, load_settings

EPILOG = """examples:
  python pipeline/mine_negatives.py --config recipe.yaml --embedder runs/first --out mined
  python pipeline/mine_negatives.py --config recipe.yaml --embedder bm25 --out mined-bm25 --dataset nq --dataset fever
  python pipeline/mine_negatives.py --config recipe.yaml --embedder models/e5 --out mined --window 30-100 --margin 0.1
  python pipeline/mine_negatives.py --config recipe.yaml --embedder models/e5 --out mined --teacher models/cross-encoder
  python pipeline/mine_negatives.py --config recipe.yaml --embedder runs/first --out mined --teacher runs/reranker \\
      --teacher-setting light

an embedder is a run (or its model/ folder), the folder of a sentence-transformers model, or bm25
a teacher is the folder of a sentence-transformers cross-encoder, or a reranker: a run (or its model/ folder), or
BAAI/bge-reranker-v2.5-gemma2-lightweight as a folder; it is asked the recipe's `relation`, or what suits the task type.
Its --teacher-setting is full; light, the paper's compressed one scaled to its depth (exit 25 of 42, 2 passage tokens to
one behind the first merge layer); or any of exit=K (score after K layers), layers=I+J (merge behind these) and ratio=R
(so many become one), without layers behind all of the model's own
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line of this entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = MiningOptions()
    add, add_switch = parser.add_argument, functools.partial(parser.add_argument, action="store_true")
    add_count = functools.partial(parser.add_argument, type=int, metavar="N")
    add_limit = functools.partial(parser.add_argument, type=float, metavar="X")
    add("--config", required=True, metavar="RECIPE.yaml", help="the recipe whose token store is mined")
    add("--embedder", required=True, metavar="MODEL", help="a run, a sentence-transformers folder, or bm25")
    add("--out", required=True, type=Path, metavar="DIR", help="new folder, or one of the same mining to go on in")
    add("--dataset", action="append", metavar="NAME", help="only this one; may stand repeatedly (default: all)")
    add("--window", default="10-200", metavar="FIRST-LAST", help="ranks that candidates come from (%(default)s)")
    add_count("--num-negatives", default=default.num_negatives, help="negatives a row (%(default)s)")
    add_limit("--max-score", help="remove candidates that score above this")
    add_limit("--margin", help="remove candidates above the positive's score less this")
    ratio_help = "remove candidates above this share of the positive's score, or none (0.95; none for bm25)"
    add("--max-ratio", metavar="X", help=ratio_help)
    teacher_help = "cross-encoder or reranker: remove candidates above --teacher-ratio of the positive's score"
    add("--teacher", metavar="FOLDER", help=teacher_help)
    add_limit("--teacher-ratio", default=default.teacher_ratio, help="(%(default)s)")
    setting_help = "depth and width of a reranker as teacher: full, light, or as exit=18,layers=6+12,ratio=2 (full)"
    add("--teacher-setting", metavar="TEXT", help=setting_help)
    corpus_help = "search the texts of the row's dataset, or of all datasets of its type (%(default)s)"
    add("--corpus", choices=("dataset", "type"), default=default.corpus, help=corpus_help)
    add_switch("--keep-negatives", help="add to the rows' negatives instead of replacing them")
    add_count("--nearest", default=default.num_nearest, help="nearest rows to store, 0 for none (%(default)s)")
    add_count("--seed", default=default.seed, help="of the drawing (%(default)s)")
    add_count("--shard-texts", default=SHARD_TEXTS, help="embeddings searched at a time: memory (%(default)s)")
    add_count("--batch-size", default=64, help="texts of a forward pass of sentence-transformers (%(default)s)")
    add_switch("--overwrite", help="replace what was mined with other options or another embedder")
    add("overrides", nargs="*", metavar="key=value", help="settings on top of the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Mine a recipe's datasets; exit code 2 and one message for what the user can mend."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    logging.getLogger("pipeline.inference").setLevel(logging.WARNING)  # what it cuts is counted and told here, once
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets a level of its own
    try:
        options = read_options(args)
        settings = load_settings(args.config, args.overrides)
        require_search(args.embedder)
        store = open_store(settings.data.store)
        tables = [store.datasets[d] for d in choose_datasets(store, args.dataset or ())]
        with own_folder(args.out):
            mine(args, options, settings, store, tables)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def read_options(args: argparse.Namespace) -> MiningOptions:
    """The options of the command line, checked."""
    window = re.fullmatch(r"(\d+)-(\d+)", args.window.strip())
    if window is None:
        raise ValueError(f"--window {args.window} must be two ranks, for example 10-200")
    ratio = args.max_ratio
    if ratio is None:
        # BM25's score of a positive can be 0, which no candidate would pass.
        ratio = "none" if args.embedder == BM25 else "0.95"
    try:
        max_ratio = None if ratio == "none" else float(ratio)
    except ValueError as error:
        raise ValueError(f"--max-ratio {ratio} must be a number, or none") from error
    options = MiningOptions(
        first_rank=int(window[1]),
        last_rank=int(window[2]),
        num_negatives=args.num_negatives,
        max_score=args.max_score,
        margin=args.margin,
        max_ratio=max_ratio,
        teacher=args.teacher,
        teacher_setting=args.teacher_setting,
        teacher_ratio=args.teacher_ratio,
        corpus=args.corpus,
        keep_negatives=args.keep_negatives,
        num_nearest=args.nearest,
        seed=args.seed,
    )
    check_options(options, args.embedder)
    for name, value in (("--shard-texts", args.shard_texts), ("--batch-size", args.batch_size)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    return options


def require_search(embedder: str) -> None:
    """ValueError if the package that searches is not installed."""
    package = "bm25s" if embedder == BM25 else "faiss"
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is not installed; pip install 'bge-icl-train[mining]'")


def mining_record(
    args: argparse.Namespace, options: MiningOptions, store: TokenStore, relations: Mapping[str, str]
) -> Record:
    """What decides the results: embeddings, and the options by which negatives are chosen."""
    from pipeline.mining.kinds import find_kind, model_record

    def record(path: Path, option: str) -> Record:
        return model_record(path, find_kind(path, option), args.batch_size, options.teacher_setting)

    words = args.embedder == BM25
    embedder = {BM25: version("bm25s")} if words else record(Path(args.embedder), "--embedder")
    chosen = asdict(options)
    del chosen["teacher_setting"]  # stands with its teacher
    if options.teacher is not None:
        chosen["teacher"] = record(Path(options.teacher), "--teacher")
        if find_kind(Path(options.teacher), "--teacher") == "reranker":
            chosen["relations"] = relations
    return {"embeddings": {"embedder": embedder, "store": file_sha256(store.path / MANIFEST)}, "options": chosen}


def mine(
    args: argparse.Namespace,
    options: MiningOptions,
    settings: Settings,
    store: TokenStore,
    tables: Sequence[DatasetTable],
) -> None:
    """Mine the datasets one by one, then write report and recipe over all that the folder holds."""
    # Loading these takes a second or more; wrong arguments should not have to wait for it.
    from pipeline.mining.dataset import MiningRun, finished_reports, mine_dataset
    from pipeline.mining.kinds import READS_PAIRS, find_kind, find_setting
    from pipeline.mining.models import load_judge, load_text_model
    from pipeline.mining.report import summary_table, write_reports

    start, embedder, teacher = time.monotonic(), Path(args.embedder), Path(options.teacher or "")
    kind = BM25 if args.embedder == BM25 else find_kind(embedder, "--embedder")
    if kind in READS_PAIRS:
        raise ValueError(
            f"--embedder {embedder} holds a {kind.replace('_', '-')}, which gives no embeddings; it can be --teacher"
        )
    if options.teacher is not None:
        if (found := find_kind(teacher, "--teacher")) not in READS_PAIRS:
            raise ValueError(
                f"--teacher {teacher} holds a {found}; candidates are judged by a cross-encoder or reranker"
            )
        options = replace(options, teacher_setting=find_setting(teacher, found, options.teacher_setting))
    relations = choose_relations(store, settings)
    prepare_folder(args.out, mining_record(args, options, store, relations), args.overwrite)
    run = MiningRun(
        store=store,
        out=args.out,
        options=options,
        embedder=args.embedder,
        wraps_passages=kind == "embedder",
        load_encoder=functools.cache(lambda: load_text_model(embedder, "--embedder", args.batch_size)),
        load_teacher=functools.cache(lambda: load_judge(teacher, store, args.batch_size, options.teacher_setting))
        if options.teacher is not None
        else None,
        shard_texts=args.shard_texts,
        bars=True,
    )
    for table in tables:
        begun = time.monotonic()
        report = mine_dataset(run, table, relations[table.name])
        few = report["rows_with_too_few"]
        print(
            f"{table.name}: {report['negatives']:,} negatives for {report['rows']:,} rows, "
            f"{few:,} rows with fewer than {options.num_negatives}, {time.monotonic() - begun:.1f} s",
            flush=True,
        )
    reports = finished_reports(args.out, store)
    write_reports(args.out, Path(args.embedder).resolve().name, reports)
    print("\n".join(summary_table(reports)))
    written = {report["dataset"]: rows_file(report["dataset"]) for report in reports}
    recipe = args.out / "recipe.yaml"
    lacking = write_recipe(settings, store, recipe, args.out, written)
    if lacking:
        print(f"{recipe} leaves out {', '.join(lacking)}: not mined, while others of the same entry are")
    print(f"wrote {args.out} in {time.monotonic() - start:.1f} s; {args.out}/report.md tells more")
    if kind != BM25:
        print(f"{args.out}/work/embeddings serves other rules without a new forward pass; delete it if you need none")
    print(f"next: python pipeline/preprocess.py --config {recipe}")


if __name__ == "__main__":
    raise SystemExit(main())
