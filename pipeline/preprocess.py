"""Turn raw rows into a token store: distinct texts tokenized once, rows in length buckets, a manifest.

Raw rows have FlagEmbedding's form: query, pos[], neg[], and optionally pos_scores, neg_scores, prompt, type, category.
They are read from .jsonl (also .gz and .zst) and .parquet files, folders and globs of them (each file a dataset),
folders of Hugging Face's save_to_disk, hub names (hf://owner/name) and BEIR folders; `columns` of a dataset maps other
names. Rows that cannot be used are left out and listed in quarantine.jsonl with the reason. An interrupted run goes on
where it stopped; the result is the same bytes for any number of processes.

On many nodes the same command runs as an MPI job: the first rank hands out the work, the others do it, one core each.
The store's folder must then be on a file system that all nodes see.
"""

import argparse
import errno
import logging
import os
import sys
import time
from collections.abc import Sequence

from pipeline.data.building import build_store
from pipeline.data.parallel import INTERRUPTED, mpi_size, open_pool, serve_first_rank
from pipeline.data.summary import summarize
from pipeline.files import exit_code
from pipeline.settings import load_settings

EPILOG = """examples:
  python pipeline/preprocess.py --config examples/quickstart/recipe.yaml
  python pipeline/preprocess.py --config recipe.yaml --processes 16
  python pipeline/preprocess.py --config recipe.yaml preprocess.max_passage_tokens=256 data.store=/data/store-256
  python pipeline/preprocess.py --config recipe.yaml "data.datasets=[{name: nq, path: nq.parquet}]"
  python pipeline/preprocess.py --config recipe.yaml --overwrite      replace a store made with other settings
  mpiexec -n 65 python pipeline/preprocess.py --config recipe.yaml    64 ranks work, one hands out
  srun --mpi=pmi2 --ntasks=257 python pipeline/preprocess.py --config recipe.yaml
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line of this entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="the recipe: data, tokenizer, limits")
    parser.add_argument(
        "--processes",
        type=int,
        default=available_cores(),
        help="of this machine; default: all cores (%(default)s); an MPI job has its ranks instead",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the store if there is one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the recipe")
    return parser.parse_intermixed_args(argv)


def available_cores() -> int:
    """Cores this process may use: under a scheduler fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    """Preprocess a recipe's data; exit code 2 and one message for what the user can mend, 1 for what may pass."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    start = time.monotonic()
    try:
        if serve_first_rank():
            return 0
        workers = f"{size} ranks" if (size := mpi_size()) > 1 else f"{args.processes} processes"
        with open_pool(args.processes) as pool:
            settings = load_settings(args.config, args.overrides)
            manifest, built = build_store(settings, pool, args.overwrite, bars=True)
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        remedy = ", where data.store lies; free some and run the same command, which goes on" if full else ""
        print(f"error: {error}{remedy}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    if not built:
        print(f"{settings.data.store}: up to date ({manifest.counts['rows']:,} rows)")
        return 0
    print(summarize(manifest))
    print(f"wrote {settings.data.store} in {time.monotonic() - start:.1f} s with {workers}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
