"""Drop training rows whose texts stand in an evaluation set.

Reads the token store of a recipe and writes DIR/<dataset>.jsonl without those rows, DIR/recipe.yaml, which
preprocesses them, and DIR/decontaminate.json with all counts. A row goes if its query or a positive is one of the
evaluation's queries (for tasks without a search: one of their texts), or if a positive stands in the evaluation's
corpus. In the symmetric types, where both sides are alike, a row goes, too, if its query stands in the corpus; in the
others it is counted and kept. Texts count as the same after NFKC, case folding and collapsing of whitespace; what was
rewritten is not found.

A negative that stands in the corpus is counted and its row kept: all that it can teach about the test is that this
passage does not answer a training query. Two kinds of matches can be kept, too, but are always counted:

  --keep corpus   texts in the corpus: where training and test search the same passages (MS MARCO, Wikipedia), most
                  training rows have one
  --keep pool     texts of train.jsonl, the labelled pool of a classification or clustering task: often the public train
                  split, on which embedders are commonly trained. Of an mteb task only the evaluation splits are read

Only hashes of the evaluation's texts are held in memory.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.decontaminating import KINDS, REASONS, Matches, contaminated, contaminating, find_matches
from pipeline.data.derived import (
    kept_rows,
    new_folder,
    rows_file,
    write_recipe,
    write_rows,
)
from pipeline.data.eval_texts import EvaluationTexts, folder_texts, mteb_texts
from pipeline.data.normalizing import store_keys
from pipeline.data.store import DatasetTable, TokenStore, open_store
from pipeline.files import write_text
from pipeline.settings import load_settings

SHOWN_CHARACTERS = 90
EPILOG = """examples:
  python pipeline/decontaminate.py --config recipe.yaml --out clean --decontaminate eval/squad_test eval/banking_test
  python pipeline/decontaminate.py --config recipe.yaml --out clean --decontaminate-mteb NFCorpus STS15
  python pipeline/decontaminate.py --config recipe.yaml --out marked --decontaminate eval/*/ --mark
  python pipeline/decontaminate.py --config recipe.yaml --out clean --decontaminate eval/*/ --keep corpus pool
  python pipeline/preprocess.py --config clean/recipe.yaml

a folder may hold queries.jsonl and corpus.jsonl (text, title), test.jsonl (query, text, sentence1, sentence2; positive
and negative are its corpus), train.jsonl (the pool of a classification task, counted as a set of its own)
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line of this entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="the recipe whose token store is read")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to create")
    parser.add_argument(
        "--decontaminate",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="evaluation folders",
    )
    parser.add_argument(
        "--decontaminate-mteb", nargs="+", action="extend", default=[], metavar="TASK", help="names of mteb tasks"
    )
    parser.add_argument("--mark", action="store_true", help='keep all rows, with a list "contaminated" where found')
    parser.add_argument(
        "--keep", nargs="+", action="extend", default=[], choices=KINDS, help="kinds of matches that are only counted"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings on top of the recipe; they stand before the lists"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Decontaminate a store's rows; exit code 2 and one message for what the user can mend."""
    args = parse_arguments(argv)
    try:
        decontaminate(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def decontaminate(args: argparse.Namespace) -> None:
    """Compare every dataset with every evaluation set and write the rows that remain."""
    if not args.decontaminate and not args.decontaminate_mteb:
        raise ValueError("name at least one evaluation set with --decontaminate FOLDER or --decontaminate-mteb TASK")
    settings = load_settings(args.config, args.overrides)
    store = open_store(settings.data.store)
    evaluations = [texts for folder in args.decontaminate for texts in folder_texts(folder)]
    evaluations += [texts for name in args.decontaminate_mteb for texts in load_mteb_texts(name)]
    names = [e.name for e in evaluations]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two evaluation sets are named {', '.join(repeated)}; rename a folder or leave one out")
    for e in evaluations:
        empty = f"; {e.without_text:,} lines hold no text" if e.without_text else ""
        print(f"{e.name}: {len(e.queries):,} distinct queries, {len(e.corpus):,} distinct passages{empty}", flush=True)
    keys_U = store_keys(store, bars=True)
    matches = [{e.name: find_matches(table, keys_U, e) for e in evaluations} for table in store.datasets]
    found = [{e.name: contaminated(by_set[e.name], e, args.keep) for e in evaluations} for by_set in matches]
    bad = [np.logical_or.reduce(list(by_set.values())) for by_set in found]
    report = {table.name: count(table, m, bad_N) for table, m, bad_N in zip(store.datasets, matches, bad, strict=True)}
    for table, by_set in zip(store.datasets, matches, strict=True):
        print("\n".join(dataset_lines(store, table, report[table.name], by_set, evaluations, args.keep)), flush=True)
    emptied = [table.name for table, bad_N in zip(store.datasets, bad, strict=True) if bad_N.all()]
    if emptied and not args.mark:
        raise ValueError(
            f"all rows of {', '.join(emptied)} would be dropped; take such a dataset out of the recipe, or see "
            "--keep and --mark"
        )
    with new_folder(args.out) as folder:
        for i, table in enumerate(store.datasets):
            marked = marked_rows(store, table, matches[i], found[i])
            write_rows(folder / rows_file(table.name), marked if args.mark else kept_rows(store, table, ~bad[i]))
        read = {
            e.name: {"queries": len(e.queries), "passages": len(e.corpus), "lines without text": e.without_text}
            for e in evaluations
        }
        whole = {"mark": args.mark, "keep": args.keep, "evaluations": read, "datasets": report}
        write_text(folder / "decontaminate.json", json.dumps(whole, indent=1) + "\n")
        written = {table.name: rows_file(table.name) for table in store.datasets}
        write_recipe(settings, store, folder / "recipe.yaml", args.out, written)
    num_rows, num_bad = (sum(d[key] for d in report.values()) for key in ("rows", "contaminated"))
    print(f"{'marked' if args.mark else 'dropped'} {num_bad:,} of {num_rows:,} rows")
    print(f"wrote {args.out}; next: python pipeline/preprocess.py --config {args.out / 'recipe.yaml'}")


def load_mteb_texts(name: str) -> list[EvaluationTexts]:
    """The texts of an mteb task by its name, or of all tasks that an aggregate (CQADupstackRetrieval) stands for.

    Raises:
        ValueError: the name is unknown, or the data cannot be fetched.
    """
    if importlib.util.find_spec("mteb") is None:
        raise ValueError("mteb is not installed; pip install 'bge-icl-train[eval]'")
    import mteb

    try:
        task = mteb.get_task(name)
    except KeyError as error:
        raise ValueError(f"--decontaminate-mteb {name}: {error.args[0]}") from error
    tasks = getattr(task, "tasks", [task])
    for one in tasks:
        try:
            one.load_data()
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"--decontaminate-mteb {name}: its data cannot be fetched ({reason}); run once where the hub can be "
                "reached, with HF_HOME on storage that this machine shares"
            ) from error
    return [mteb_texts(one) for one in tasks]


def count(table: DatasetTable, matches: Mapping[str, Matches], bad_N: np.ndarray) -> dict[str, Any]:
    """Counts of one dataset as decontaminate.json keeps them."""
    sets = {
        name: {reason: int(found_N.sum()) for reason, found_N in m.by_reason.items()}
        | {"negatives in corpus, kept": m.negatives_in_corpus}
        for name, m in matches.items()
    }
    return {"rows": table.num_rows, "contaminated": int(bad_N.sum()), "sets": sets}


def dataset_lines(
    store: TokenStore,
    table: DatasetTable,
    counts: Mapping[str, Any],
    matches: Mapping[str, Matches],
    evaluations: Sequence[EvaluationTexts],
    keep: Collection[str],
) -> list[str]:
    """One line a dataset, one an evaluation set with matches, and the first texts that matched."""
    lines = [f"{table.name}: {counts['contaminated']:,} of {counts['rows']:,} rows contaminated"]
    for e in evaluations:
        numbers = []
        reasons = contaminating(matches[e.name], e, keep)
        for reason, number in counts["sets"][e.name].items():
            if number:
                numbers.append(f"{reason}{', kept' if reason in REASONS and reason not in reasons else ''} {number:,}")
        if numbers:
            lines.append(f"  {e.name}: " + "; ".join(numbers))
        for reason, texts in matches[e.name].shown.items():
            lines += [f"    {reason}: {store.text(text)[:SHOWN_CHARACTERS]!r}" for text in texts]
    return lines


def marked_rows(
    store: TokenStore, table: DatasetTable, matches: Mapping[str, Matches], found: Mapping[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """All rows; those found in an evaluation set say which and why."""
    for n, row in enumerate(kept_rows(store, table, np.ones(table.num_rows, dtype=bool))):
        marks = [
            f"{name}: {reason}"
            for name, m in matches.items()
            if found[name][n]
            for reason, found_N in m.by_reason.items()
            if found_N[n]
        ]
        yield row | ({"contaminated": marks} if marks else {})


if __name__ == "__main__":
    raise SystemExit(main())
