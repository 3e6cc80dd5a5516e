"""Let a teacher score the rows of a token store, for distillation.

Writes DIR/<dataset>.jsonl (line i + 1 is row i of the store, with pos_scores and neg_scores), DIR/scores.json (teacher,
scale, counts, statistics) and DIR/recipe.yaml, which preprocesses the scored rows. The teacher is a folder with

  a sentence-transformers cross-encoder   its raw logits (or, with --sigmoid, 0..1); it sees query and passage alone
  a reranker of this project, or          the logit of "Yes" (or, with --sigmoid, 0..1); it is asked the `relation` of
  BAAI/bge-reranker-v2.5-gemma2-          the recipe's dataset, or what suits its task type; --teacher-setting
  lightweight                             makes it cheaper
  a SentenceTransformer                   the cosine, with the model's own prompts
  an embedder of this project             the cosine, with the rows' instructions and no examples

A distinct (query, passage) pair is scored once, an embedder reads each distinct text once. An interrupted run goes on
where it stopped and ends with the same bytes; what they depend on is recorded in DIR/settings.json, and a run that
differs in it is refused.

Training distils softmax(scores / loss.teacher_temperature) over a row's candidates. Scores that lie far apart make that
one-hot, scores that lie close together make it uniform; neither teaches anything. So the mean entropy over the rows'
groups is shown, as a share of log(group size), for several temperatures, with a warning where the recipe's is no use.
"""

import argparse
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.derived import choose_datasets, rows_file, write_recipe, write_rows
from pipeline.data.pair_steps import choose_relations
from pipeline.data.store import MANIFEST, TokenStore, open_store
from pipeline.data.summary import align
from pipeline.files import file_sha256, safe_name, write_text
from pipeline.mining.block_store import BLOCK_ITEMS
from pipeline.mining.folder import Record, own_folder, prepare_folder, read_record
from pipeline.mining.kinds import PACKS_TOKENS, READS_PAIRS, Kind, find_kind, find_setting, model_record
from pipeline.mining.models import PairModel, TextModel, load_model
from pipeline.mining.scoring import TEMPERATURES, describe, score_dataset, scored_rows
from pipeline.settings import load_settings

ONE_HOT, UNIFORM = 0.05, 0.98  # entropy shares below and above which a group teaches next to nothing
REPORT = "scores.json"
EPILOG = """examples:
  python pipeline/score_rows.py --config recipe.yaml --teacher models/bge-reranker-v2-m3 --out scored
  python pipeline/score_rows.py --config recipe.yaml --teacher runs/first --out scored --dataset squad_newwiki
  python pipeline/score_rows.py --config recipe.yaml --teacher runs/reranker --out scored
  python pipeline/score_rows.py --config recipe.yaml --teacher bge-light --out light --teacher-setting light
  python pipeline/preprocess.py --config scored/recipe.yaml

a reranker's --teacher-setting is full; light, the paper's compressed one scaled to its depth (exit 25 of 42, 2 passage
tokens to one behind the first merge layer); or any of exit=K (score after K layers), layers=I+J (merge behind these)
and ratio=R (so many become one), without layers behind all of the model's own
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line of this entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="the recipe whose token store is read")
    parser.add_argument("--teacher", required=True, type=Path, metavar="FOLDER", help="model or run that gives scores")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the scored rows")
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="NAME", help="only this dataset; may stand repeatedly"
    )
    parser.add_argument("--sigmoid", action="store_true", help="squash a cross-encoder's or reranker's logits to 0..1")
    setting_help = "depth and width of a reranker: full (default), light, or as exit=18,layers=6+12,ratio=2"
    parser.add_argument("--teacher-setting", metavar="TEXT", help=setting_help)
    parser.add_argument("--batch-size", type=int, help="of a sentence-transformers model (default: 32)")
    parser.add_argument("--overwrite", action="store_true", help="replace what was scored otherwise")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Score a store's rows; exit code 2 and one message for what the user can mend."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        with own_folder(args.out):
            score_rows(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def score_rows(args: argparse.Namespace, block_items: int = BLOCK_ITEMS) -> None:
    """Score the chosen datasets one after the other; what is finished in --out is kept."""
    settings = load_settings(args.config, args.overrides)
    store = open_store(settings.data.store)
    chosen = choose_datasets(store, args.dataset)
    kind = find_kind(args.teacher, "--teacher")
    check_options(args, kind)
    setting = find_setting(args.teacher, kind, args.teacher_setting)
    relations = choose_relations(store, settings)
    print(f"teacher: {args.teacher} ({kind.replace('_', ' ')})", flush=True)
    record: Record = {
        "store": file_sha256(store.path / MANIFEST),
        "teacher": model_record(args.teacher, kind, args.batch_size, setting) | {"block_items": block_items},
        "sigmoid": args.sigmoid,
    }
    report: Record = {"kind": kind, "scale": None, "max_tokens": None, "datasets": {}}
    if kind == "reranker":
        record |= {"relations": relations}
        report |= {"setting": setting, "relations": relations}
    prepare_folder(args.out, {"scores": record}, args.overwrite)
    report_path = args.out / REPORT
    if report_path.is_file():
        report = read_record(report_path, set(report))
    finished = {name for name in report["datasets"] if (args.out / rows_file(name)).is_file()}
    teacher: PairModel | TextModel | None = None
    for table in (store.datasets[i] for i in chosen):
        work = args.out / "work/scores" / safe_name(table.name)
        if table.name in finished:
            shutil.rmtree(work, ignore_errors=True)  # a run may have been killed just before it did this
            print(f"{table.name}: up to date")
            continue
        teacher = teacher or load_model(args.teacher, "--teacher", args.batch_size, args.sigmoid, setting)
        start = time.monotonic()
        scores = score_dataset(store, table, relations[table.name], teacher, work, True, block_items)
        write_rows(args.out / rows_file(table.name), scored_rows(store, table, scores))
        report |= {"scale": teacher.scale, "max_tokens": teacher.max_tokens}
        report["datasets"][table.name] = describe(table, scores)
        write_text(report_path, json.dumps(report, indent=1) + "\n")
        shutil.rmtree(work)
        print(f"{table.name}: scored in {time.monotonic() - start:.0f} s", flush=True)
    written = {name: rows_file(name) for name in report["datasets"] if (args.out / rows_file(name)).is_file()}
    recipe = args.out / "recipe.yaml"
    lacking = write_recipe(settings, store, recipe, args.out, written)
    print(score_table(store, report))
    for warning in judge(report["datasets"], settings.loss.teacher_temperature):
        print(warning)
    if lacking:
        print(f"{recipe} leaves out {', '.join(lacking)}: not scored, while others of the same entry are")
    print(f"wrote {args.out}; next: python pipeline/preprocess.py --config {recipe}")


def check_options(args: argparse.Namespace, kind: Kind) -> None:
    """ValueError for an option that does not fit the teacher."""
    if args.sigmoid and kind not in READS_PAIRS:
        raise ValueError(
            f"--sigmoid is for cross-encoders and rerankers; {args.teacher} is an embedder, whose scores are cosines"
        )
    if args.batch_size is not None and kind in PACKS_TOKENS:
        raise ValueError(f"--batch-size is for sentence-transformers models; this {kind} packs by tokens: leave it out")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")


def score_table(store: TokenStore, report: Mapping[str, Any]) -> str:
    """Counts and range of the scores, then the entropy shares, one line a dataset."""
    heads = ["dataset", "rows", "no negatives", "candidates", "read", "cut", "min", "mean", "max", "positive first"]
    counts, shares = [heads], [["entropy share at loss.teacher_temperature =", *map(str, TEMPERATURES)]]
    for name, d in report["datasets"].items():
        numbers = [f"{d[key]:,}" for key in ("rows", "rows_without_negatives", "candidates", "scored", "truncated")]
        spread = ["-" if d[key] is None else f"{d[key]:.3f}" for key in ("min", "mean", "max")]
        first = "-" if d["positive_first"] is None else f"{d['positive_first']:.1%}"
        counts.append([name, *numbers, *spread, first])
        if d["entropy"]:
            shares.append([name, *(f"{d['entropy'][str(t)]:.3f}" for t in TEMPERATURES)])
    unit = "pairs" if report["kind"] in READS_PAIRS else "texts"
    limit = report["max_tokens"]
    limits = ", ".join(f"{side} {n}" for side, n in limit.items()) if isinstance(limit, dict) else f"pair {limit}"
    note = f"scale: {report['scale']}; read: distinct {unit}; cut: longer than the teacher's limit (tokens: {limits})"
    if report["kind"] == "reranker":
        asked = ", ".join(f"{name} {report['relations'][name]}" for name in report["datasets"])
        note += f"\nsetting: {report['setting']}; asked: {asked}"
    return "\n".join([align(counts, num_left=1), note, align(shares, num_left=1)])


def judge(datasets: Mapping[str, Mapping[str, Any]], temperature: float) -> list[str]:
    """A warning for every dataset whose scores teach next to nothing at this loss.teacher_temperature.

    The entropy is that of the nearest temperature looked at; the remedy is the one that is farthest from both ends.
    """
    nearest = min(TEMPERATURES, key=lambda t: abs(math.log(t / temperature)))
    warnings = []
    for name, d in datasets.items():
        if not d["entropy"]:
            warnings.append(f"warning: {name}: no row has negatives, so there is nothing to distil")
            continue
        share = d["entropy"][str(nearest)]
        if ONE_HOT <= share <= UNIFORM:
            continue
        best = min(TEMPERATURES, key=lambda t: abs(d["entropy"][str(t)] - 0.5))
        is_sharp = share < ONE_HOT
        found = "almost one-hot" if is_sharp else "almost uniform"
        effect = "repeats the label" if is_sharp else "pulls positive and negatives together"
        warnings.append(
            f"warning: {name}: at temperature {nearest:g} the teacher's distribution is {found} (entropy {share:.1%} "
            f"of uniform): distillation {effect}. With loss.teacher_temperature={best:g} it would be "
            f"{d['entropy'][str(best)]:.1%}"
        )
    return warnings


if __name__ == "__main__":
    raise SystemExit(main())
