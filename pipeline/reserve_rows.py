"""Set rows aside: an evaluation set and in-context examples out of one's own data, and training rows without them.

Reads the token store of a recipe and writes

  DIR/train/<dataset>.jsonl   the rows left for training
  DIR/eval/<dataset>/         a task as evaluate_embedder.py reads it: N dev queries with their positives, the corpus of
                              all distinct passages of the dataset, M examples for few-shot prompts
  DIR/recipe.yaml             the recipe over DIR/train; preprocess it next
  DIR/reserve.json            counts and seed

No query or positive of a reserved row is query or positive of a training row, in any dataset, nor of a row reserved for
the other purpose or from another dataset: datasets take turns in the order of the store. Texts count as the same after
NFKC, case folding and collapsing of whitespace. Rows linked by such texts are reserved together where they fit, rows
with few links first, so that little is lost; what cannot stay in training and is not reserved is dropped and counted.
It is an error if less than half of the rows of any dataset would be left for training.
Negatives take no part in this: a reserved positive may stay the negative of a training row.

Dev queries are retrieval queries, so only datasets of type normal and only_1neg give any; rows of the other types are
never reserved.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.derived import (
    choose_datasets,
    kept_rows,
    new_folder,
    rows_file,
    write_recipe,
    write_rows,
)
from pipeline.data.eval_folder import write_eval_folder
from pipeline.data.normalizing import store_keys
from pipeline.data.reserving import Reserved, find_links, reserve_all
from pipeline.data.store import DatasetTable, TokenStore, open_store
from pipeline.data.summary import align
from pipeline.datatypes import RULES
from pipeline.files import write_text
from pipeline.settings import load_settings

EPILOG = """examples:
  python pipeline/reserve_rows.py --config recipe.yaml --out split --reserve-dev 200 --reserve-examples 8
  python pipeline/preprocess.py --config split/recipe.yaml
  python pipeline/evaluate_embedder.py --run runs/mine --task split/eval/my_data
"""
WHY_SKIPPED = (
    "the evaluation scores retrieval, where a query's positives are the only right answers; in the symmetric types "
    "other rows of the same class or meaning are right too, and rows whose positives are a few labels cannot be kept "
    "apart"
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line of this entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="the recipe whose token store is read")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to create")
    parser.add_argument("--reserve-dev", required=True, type=int, metavar="N", help="dev queries of each dataset")
    parser.add_argument("--reserve-examples", type=int, default=8, metavar="M", help="examples of each (default: 8)")
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="NAME", help="only from this dataset; may stand repeatedly"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other rows (default: 0)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Reserve rows; exit code 2 and one message for what the user can mend."""
    args = parse_arguments(argv)
    try:
        reserve_rows(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def reserve_rows(args: argparse.Namespace) -> None:
    """Choose rows of every dataset, then write evaluation folders and what is left for training."""
    for name, value, least in (("dev", args.reserve_dev, 1), ("examples", args.reserve_examples, 0)):
        if value < least:
            raise ValueError(f"--reserve-{name} {value} must be at least {least}")
    settings = load_settings(args.config, args.overrides)
    store = open_store(settings.data.store)
    chosen = choose_sources(store, args.dataset)
    with new_folder(args.out) as folder:
        (folder / "train").mkdir()
        keys_U = store_keys(store, bars=True)
        links = [find_links(table, keys_U) for table in store.datasets]
        names = [table.name for table in store.datasets]
        reserved = reserve_all(names, links, chosen, args.reserve_dev, args.reserve_examples, args.seed)
        counts = {
            table.name: write_split(folder, store, table, keys_U, found)
            for table, found in zip(store.datasets, reserved, strict=True)
        }
        asked = {"reserve_dev": args.reserve_dev, "reserve_examples": args.reserve_examples, "seed": args.seed}
        write_text(folder / "reserve.json", json.dumps(asked | {"datasets": counts}, indent=1) + "\n")
        written = {table.name: f"train/{rows_file(table.name)}" for table in store.datasets}
        write_recipe(settings, store, folder / "recipe.yaml", args.out, written)
    print("\n".join(report_lines(store, counts)))
    print(f"wrote {args.out}; next: python pipeline/preprocess.py --config {args.out / 'recipe.yaml'}")


def write_split(
    folder: Path, store: TokenStore, table: DatasetTable, keys_U: np.ndarray, found: Reserved
) -> dict[str, Any]:
    """Write a dataset's training rows and, where rows of it are reserved, its evaluation folder; returns the counts."""
    counts: dict[str, Any] = {
        "rows": table.num_rows,
        "train": write_rows(folder / "train" / rows_file(table.name), kept_rows(store, table, found.train_N)),
        "dev_rows": int(found.dev_N.sum()),
        "example_rows": int(found.example_N.sum()),
        "dropped": int(found.dropped_N.sum()),
        "dropped_for_others": int(found.dropped_for_others_N.sum()),
    }
    if found.dev_N.any():
        task = folder / "eval" / rows_file(table.name).removesuffix(".jsonl")
        counts["eval"] = asdict(write_eval_folder(task, store, table, keys_U, found.dev_N, found.example_N))
    return counts


def choose_sources(store: TokenStore, names: Sequence[str]) -> tuple[int, ...]:
    """Datasets to reserve from; ValueError where one is named that cannot give dev queries, or none can."""
    asked = choose_datasets(store, names)
    fit = tuple(i for i in asked if not RULES[store.datasets[i].task_type].symmetric)
    for i in asked:
        table = store.datasets[i]
        if i not in fit and (names or not fit):
            raise ValueError(
                f"nothing can be reserved from dataset {table.name!r} of type {table.task_type}: {WHY_SKIPPED}"
            )
    return fit


def report_lines(store: TokenStore, counts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What became of the rows of every dataset, and why where something is unusual."""
    table = [["dataset", "rows", "train", "dev rows", "example rows", "dropped", "for others", "queries", "corpus"]]
    notes = []
    for dataset in store.datasets:
        d = counts[dataset.name]
        made = d.get("eval")
        keys = ("rows", "train", "dev_rows", "example_rows", "dropped", "dropped_for_others")
        sizes = [f"{made['queries']:,}", f"{made['passages']:,}"] if made else ["-", "-"]
        table.append([dataset.name, *(f"{d[key]:,}" for key in keys), *sizes])
        if made and made["passages_like_queries"]:
            notes.append(
                f"{dataset.name}: {made['passages_like_queries']:,} passages left out of the corpus, they equal a query"
            )
        if made and made["other_instructions"]:
            notes.append(
                f"{dataset.name}: {made['other_instructions']:,} dev rows have another instruction than the task's"
            )
    skipped = [dataset.name for dataset in store.datasets if RULES[dataset.task_type].symmetric]
    if skipped:
        notes.append(f"nothing reserved from {', '.join(skipped)}: {WHY_SKIPPED}")
    legend = (
        "dropped: shares a query or positive with a reserved row of its own dataset; for others: with one of another "
        "dataset; corpus: distinct passages of the dataset"
    )
    return [align(table, num_left=1), legend, *notes]


if __name__ == "__main__":
    raise SystemExit(main())
