"""Preprocessing speed against the raw speed of the `tokenizers` library on the same cores, in one run.

The input is made from real rows: words of each text are shuffled in place of the originals, so that texts are distinct
and as hard to tokenize as real ones. Measured: bytes of distinct text a second, (a) from JSONL to the fsynced store
with `pipeline/preprocess.py`, (b) by `encode_batch` alone, each distinct text once, nothing stored.
"""

import argparse
import gzip
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
EPILOG = """examples:
  python benchmarks/preprocess_rate.py --raw examples/quickstart/data --tokenizer runs/quickstart/base_model
  python benchmarks/preprocess_rate.py --raw data/train --tokenizer runs/quickstart/base_model --megabytes 40
"""
TARGET = 0.8


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of the .jsonl and .jsonl.gz files of a folder that have no scores."""
    rows = []
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            rows += [row for row in map(json.loads, lines) if isinstance(row.get("pos"), list)]
    if not rows:
        raise ValueError(f"--raw {folder}: no rows found there")
    return rows


def perturbed_rows(rows: Sequence[dict[str, Any]], num_bytes: int, seed: int) -> Iterator[bytes]:
    """Lines of new rows of type normal until `num_bytes` are reached; every text is new."""
    generator, written = random.Random(seed), 0

    def change(text: str) -> str:
        words = text.split(" ")
        generator.shuffle(words)
        return " ".join([*words, str(generator.randrange(10**9))])

    while written < num_bytes:
        row = generator.choice(rows)
        negatives = [change(text) for text in row["neg"][:7]]
        new = {"query": change(row["query"]), "pos": [change(row["pos"][0])], "neg": negatives}
        line = json.dumps(new | {"prompt": row.get("prompt", "")}, ensure_ascii=False).encode() + b"\n"
        written += len(line)
        yield line


def write_input(folder: Path, rows: Sequence[dict[str, Any]], num_bytes: int, tokenizer: str) -> Path:
    """Write raw.jsonl and a recipe; returns the recipe."""
    with (folder / "raw.jsonl").open("wb") as file:
        file.writelines(perturbed_rows(rows, num_bytes, seed=0))
    data = {"root": str(folder), "store": str(folder / "store"), "datasets": [{"name": "raw", "path": "raw.jsonl"}]}
    run = {"output_dir": str(folder / "run"), "deepspeed": str(REPOSITORY / "ds_configs/zero3.json")}
    tree = {"model": {"name": tokenizer}, "data": data, "run": run}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder / "recipe.yaml"


def time_preprocessing(recipe: Path, processes: int) -> tuple[float, float]:
    """(wall seconds, CPU seconds of all processes) of the command, start-up included."""
    command = [sys.executable, str(REPOSITORY / "pipeline/preprocess.py"), "--config", str(recipe)]
    start, cpu = time.perf_counter(), _children_seconds()
    subprocess.run([*command, "--processes", str(processes)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, _children_seconds() - cpu


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def distinct_texts(path: Path) -> list[str]:
    """Distinct texts of a raw file."""
    texts: dict[str, None] = {}
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            texts |= dict.fromkeys([row["query"], *row["pos"], *row["neg"]])
    return list(texts)


def time_raw(tokenizer: Path, texts: Sequence[str], fast: bool) -> tuple[float, float]:
    """(wall seconds, CPU seconds) of the library alone, in batches of 1,000 texts on RAYON_NUM_THREADS threads."""
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    encode = raw.encode_batch_fast if fast else raw.encode_batch
    start, cpu = time.perf_counter(), time.process_time()
    for i in range(0, len(texts), 1000):
        encode(list(texts[i : i + 1000]), add_special_tokens=False)
    return time.perf_counter() - start, time.process_time() - cpu


def measure(raw: Path, tokenizer: Path, megabytes: int, processes: int) -> dict[str, Any]:
    """One run of everything."""
    os.environ |= {"RAYON_NUM_THREADS": str(processes), "TOKENIZERS_PARALLELISM": "true"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = write_input(folder, read_rows(raw), megabytes * 1_000_000, str(tokenizer.resolve()))
        wall, cpu = time_preprocessing(recipe, processes)
        texts = distinct_texts(folder / "raw.jsonl")
    megabytes_of_text = sum(len(text.encode()) for text in texts) / 1e6
    raw_wall, raw_cpu = time_raw(tokenizer, texts, fast=False)
    fast_wall, fast_cpu = time_raw(tokenizer, texts, fast=True)
    return {
        "processes": processes,
        "texts": len(texts),
        "megabytes_of_distinct_text": megabytes_of_text,
        "preprocess_mb_per_s": megabytes_of_text / wall,
        "raw_encode_batch_mb_per_s": megabytes_of_text / raw_wall,
        "raw_encode_batch_fast_mb_per_s": megabytes_of_text / fast_wall,
        # CPU seconds do not suffer from what else runs on the machine.
        "cpu_seconds": {"preprocess": cpu, "encode_batch": raw_cpu, "encode_batch_fast": fast_cpu},
        "ratio": raw_wall / wall,
        "ratio_to_fast": fast_wall / wall,
        "ratio_by_cpu_seconds": raw_cpu / cpu,
        "target": TARGET,
        "holds": raw_wall / wall >= TARGET,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measurement as JSON; exit code 1 where the target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raw", type=Path, required=True, help="folder with raw .jsonl(.gz) files to draw from")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer.json")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the raw file (default %(default)s)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    args = parser.parse_args(argv)
    try:
        result = measure(args.raw, args.tokenizer, args.megabytes, args.processes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
