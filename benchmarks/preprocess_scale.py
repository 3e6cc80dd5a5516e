"""Preprocessing of a source larger than anyone wants in memory: peak memory of a process, speed, bytes on disk.

The source is generated: short rows (a query, a positive, a negative) of words that the tokenizer knows. Queries are
all different; passages are drawn from a pool a quarter as large as the rows, so texts repeat as in real data.
Afterwards the store is opened, a step is planned and texts are read at random places.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.data.sampling import make_schedule, plan_step
from pipeline.data.store import open_store
from pipeline.settings import load_settings

REPOSITORY = Path(__file__).resolve().parents[1]
EPILOG = """examples:
  python benchmarks/preprocess_scale.py --tokenizer runs/quickstart/base_model --rows 200000
  python benchmarks/preprocess_scale.py --tokenizer runs/quickstart/base_model --rows 20000000 --work /scratch/scale
"""
BLOCK_ROWS = 50_000
QUERY_WORDS, PASSAGE_WORDS = 4, 6


def block_of_rows(task: tuple[int, int, int, tuple[str, ...]]) -> bytes:
    """Lines of rows start .. stop - 1 of a source of `total` rows; a pure function of its arguments."""
    start, stop, total, words = task
    rng = np.random.default_rng(start)
    query = rng.integers(0, len(words), (stop - start, QUERY_WORDS)).tolist()
    passage = rng.integers(0, max(total // 4, 2), (stop - start, 2)).tolist()
    lines = []
    for i, (picked, (pos, neg)) in enumerate(zip(query, passage, strict=True), start):
        text = " ".join([words[w] for w in picked])
        lines.append(
            f'{{"query": "{text} {i}", "pos": ["{passage_text(pos, words)}"], "neg": ["{passage_text(neg, words)}"]}}\n'
        )
    return "".join(lines).encode()


def passage_text(number: int, words: Sequence[str]) -> str:
    """Passage `number` of the pool."""
    state, picked = number * 2_654_435_761 + 12_345, []
    for _ in range(PASSAGE_WORDS):
        state = (state * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407) % (1 << 64)
        picked.append(words[(state >> 33) % len(words)])
    return f"{' '.join(picked)} {number}"


def write_source(path: Path, num_rows: int, words: tuple[str, ...], processes: int) -> None:
    """Write the source, if it is not there already."""
    starts = range(0, num_rows, BLOCK_ROWS)
    tasks = ((start, min(start + BLOCK_ROWS, num_rows), num_rows, words) for start in starts)
    temporary = path.with_suffix(".tmp")
    with multiprocessing.get_context("spawn").Pool(processes) as pool, temporary.open("wb") as file:
        for block in pool.imap(block_of_rows, tasks):
            file.write(block)
    temporary.rename(path)


def known_words(tokenizer: Path) -> tuple[str, ...]:
    """Plain words of the vocabulary, in order of their ids."""
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = [token[1:] for token, _ in sorted(vocabulary.items(), key=lambda item: item[1]) if token[0] in "Ġ▁"]
    return tuple(word for word in words if word.isascii() and word.isalpha() and len(word) > 2)[:20_000]


def folder_bytes(folder: Path) -> int:
    """Bytes on disk of everything in a folder; files may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(Path(parent) / name).st_size
            except FileNotFoundError:
                continue
    return total


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def watch(pid: int, folders: Sequence[Path], peaks: dict[str, float], stop: threading.Event) -> None:
    """Until told to stop: the largest memory of any process of the command, and the bytes of the folders."""
    for tick in itertools.count():
        for process in [pid, *descendants(pid)]:
            try:
                lines = Path(f"/proc/{process}/status").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM", "RssAnon"))}
            for name, value in found.items():
                peaks[name] = max(peaks.get(name, 0.0), int(value) / 1024)
        if tick % 20 == 0:
            peaks["folder_bytes"] = max(peaks.get("folder_bytes", 0), sum(folder_bytes(f) for f in folders))
        if stop.wait(0.25):
            return


def preprocess(recipe: Path, processes: int, store: Path) -> dict[str, float]:
    """Run the command; seconds and peaks."""
    command = [sys.executable, str(REPOSITORY / "pipeline/preprocess.py"), "--config", str(recipe)]
    peaks: dict[str, float] = {}
    stop, start = threading.Event(), time.perf_counter()
    process = subprocess.Popen([*command, "--processes", str(processes)], stdout=subprocess.DEVNULL)
    watched = (store, store.with_name(store.name + ".partial"))
    watcher = threading.Thread(target=watch, args=(process.pid, watched, peaks, stop))
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    if code != 0:
        raise ValueError(f"{' '.join(command)} failed with exit code {code}")
    return {"seconds": seconds, **peaks}


def use_store(recipe: Path) -> dict[str, float]:
    """Seconds to open the store, to plan the first step, and to read one text at a random place."""
    settings = load_settings(recipe)
    times = {}
    start = time.perf_counter()
    store = open_store(settings.data.store, verify=False)
    times["open_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    schedule = make_schedule(store, settings)
    plan_step(store, schedule, 0)
    times["first_plan_seconds"] = time.perf_counter() - start
    rng = random.Random(0)
    ids = [rng.randrange(store.num_texts) for _ in range(10_000)]
    start = time.perf_counter()
    assert all(store.text(i) for i in ids)
    times["random_text_seconds"] = (time.perf_counter() - start) / len(ids)
    return times


def measure(work: Path, tokenizer: Path, num_rows: int, processes: int) -> dict[str, Any]:
    """One run of everything in a folder of its own."""
    work.mkdir(parents=True, exist_ok=True)
    raw, store = work / f"raw-{num_rows}.jsonl", work / "store"
    for leftover in (store, store.with_name(store.name + ".partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    if not raw.exists():
        write_source(raw, num_rows, known_words(tokenizer), processes)
    data = {"root": str(work), "store": str(store), "datasets": [{"name": "raw", "path": raw.name}]}
    run = {"output_dir": str(work / "run"), "deepspeed": str(REPOSITORY / "ds_configs/zero3.json")}
    tree = {"model": {"name": str(tokenizer.resolve())}, "data": data, "run": run}
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    found = preprocess(recipe, processes, store)
    manifest = json.loads((store / "manifest.json").read_text(encoding="utf-8"))
    return {
        "rows": num_rows,
        "processes": processes,
        "distinct_texts": manifest["counts"]["distinct_texts"],
        "stored_tokens": manifest["counts"]["tokens"],
        "seconds": found["seconds"],
        "rows_per_second": num_rows / found["seconds"],
        "peak_mib_of_a_process": found["VmHWM"],
        "peak_anonymous_mib_of_a_process": found["RssAnon"],  # without mapped files
        "input_bytes": raw.stat().st_size,
        "store_bytes": folder_bytes(store),
        "peak_bytes_while_building": found["folder_bytes"],
        **use_store(recipe),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer.json")
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("runs/prove/scale"), help="needs ten times the input")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    args = parser.parse_args(argv)
    try:
        result = measure(args.work, args.tokenizer, args.rows, args.processes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
