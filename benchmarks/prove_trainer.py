"""The topic trainer of prove.py: runs that no kill harms, costs that do not grow with the batch, memory at start."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

from peers import NO_ENVIRONMENT
from preprocess_scale import descendants
from proving import REPOSITORY, RUN, WORK, Row, call, free_port, launch_worker, make_random_model, row, training_files
from proving import write_recipe as write_random_recipe

KILLS, STEPS = 50, 300
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # small steps: threads would mostly wait for each other
TRAIN = REPOSITORY / "pipeline" / "train.py"
SHORT = {
    "max_query_tokens": 64,
    "max_passage_tokens": 64,
    "max_example_query_tokens": 48,
    "max_example_passage_tokens": 48,
    "max_prompt_tokens": 256,
}


def prove_trainer(data: Path, only: str = "") -> list[Row]:
    make_random_model()
    files = training_files(data)
    one = [next((file for file in files if file.name.startswith("squad")), files[0])]
    recipe = write_random_recipe("trainer", data, one, SHORT, {"group_size": 2, "examples": {"max_examples": 2}})
    # What counts CPU seconds comes first: the kills bear other work on the machine.
    parts: dict[str, Callable[[], list[Row]]] = {
        "growth": lambda: growth(recipe),
        "kept_graphs": lambda: kept_graphs(recipe),
        "loading": loading,
        "peers": peers,
        "planner": lambda: planner(data),
        "waiting": waiting,
        "kills": lambda: kills(recipe),
        "not_here": not_here,
    }
    if only and only not in parts:
        raise SystemExit(f"error: --only {only} must be one of {', '.join(parts)}")
    return [r for name, part in parts.items() if only in ("", name) for r in part()]


def run_command(recipe: Path, out: Path) -> list[str]:
    """A small run with dropout and several chunks a step that saves after each of them."""
    overrides = ["batch.queries=16", "batch.symmetric_queries=16", "run.chunk_tokens=512", "model.lora.dropout=0.1"]
    overrides += [f"optim.max_steps={STEPS}", "run.save_every=1", f"run.keep_last={STEPS}", f"run.output_dir={out}"]
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", free_port()]
    return [*launcher, str(TRAIN), "--config", str(recipe), *overrides]


def digests(out: Path) -> dict[str, str]:
    """sha256 of weights and moments of every complete checkpoint, by its name."""
    found = {}
    for folder in sorted((out / "checkpoints").glob("step-*")):
        parts = [(folder / name).read_bytes() for name in ("weights.safetensors", "moments.safetensors")]
        found[folder.name] = hashlib.sha256(b"".join(parts)).hexdigest()
    return found


def kills(recipe: Path) -> list[Row]:
    """One run is killed again and again; every checkpoint it ever leaves is compared with the undisturbed run's."""
    whole, out = WORK / "run_whole", WORK / "run_killed"
    for folder in (whole, out):
        shutil.rmtree(folder, ignore_errors=True)
    call(run_command(recipe, whole), ONE_THREAD)
    truth, rng = digests(whole), random.Random(0)
    kinds, wrong, finished, codes = Counter[str](), set[str](), 0, Counter[int]()
    while sum(kinds.values()) < KILLS:
        kind = rng.choice(["kill -9 of one rank", "kill -9 of all", "SIGTERM to all", "SIGUSR1 to one rank"])
        caught, code = killed(run_command(recipe, out), kind, rng)
        wrong |= {name for name, value in digests(out).items() if truth[name] != value}
        if caught:
            kinds[kind] += 1
            codes[code] += 1
        else:
            finished += 1
            shutil.rmtree(out)
    call(run_command(recipe, out), ONE_THREAD)
    last = digests(out)
    wrong |= {name for name, value in last.items() if truth[name] != value}
    shown = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
    return [
        row(
            f"a run of {STEPS} steps on 2 ranks (ZeRO-3, dropout, several chunks a step, saved after each), "
            f"killed {KILLS} times at random moments and started again",
            "every checkpoint of it equals the undisturbed run's, weights and moments, bit for bit",
            f"{shown}; {len(wrong)} checkpoints differ; it came to its end {finished + 1} times; exit codes "
            + ", ".join(f"{count} x {code}" for code, count in sorted(codes.items())),
            not wrong and max(last) == max(truth),
        )
    ]


def killed(command: list[str], kind: str, rng: random.Random) -> tuple[bool, int]:
    """Start the run and end it at a random moment; (whether that was before its own end, its exit code)."""
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    variables = os.environ | {"PATH": path, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | ONE_THREAD
    job = subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(rng.uniform(6.0, 22.0))
    ranks = [pid for pid in descendants(job.pid) if is_rank(pid)]
    caught = job.poll() is None and bool(ranks)
    number = {"S": signal.SIGKILL, "T": signal.SIGTERM, "U": signal.SIGUSR1}
    sent = number["S"] if "-9" in kind else number["T"] if "TERM" in kind else number["U"]
    for pid in ranks if "all" in kind else rng.sample(ranks, min(1, len(ranks))):
        try:
            os.kill(pid, sent)
        except ProcessLookupError:
            caught = False
    return caught, job.wait()


def is_rank(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return str(TRAIN).encode() in words and any(word.startswith(b"--local_rank") for word in words)


def growth(recipe: Path) -> list[Row]:
    """CPU seconds a real token and peak memory of a step at one chunk budget, plotted.

    The same arithmetic again costs more only for what else the machine does (half as much again was seen, in spells
    shorter than a step), so a step's own cost is the sum of its parts, each the least of its rounds; the median of
    whole rounds stands beside it.
    """
    # The budget is small, so that already the smallest batch has many chunks: one of them needs no second pass.
    steps = launch_worker(recipe, "growth", "run.chunk_tokens=512")
    batches, chunks = [step["queries"] for step in steps], [step["chunks"] // step["steps"] for step in steps]
    times, medians, peaks = [], [], []
    for step in steps:
        batch = step["queries"]
        ms_a_token = 1000 / step["real_tokens"]
        rounds = [ms_a_token * sum(map(sum, ranks)) for ranks in zip(*step["part_seconds"], strict=True)]
        least = sum(min(part) for rank in step["part_seconds"] for part in zip(*rank, strict=True))
        times.append(ms_a_token * least)
        medians.append(median(rounds))
        sizes = (f"batch.queries={batch}", f"batch.symmetric_queries={batch}", "run.chunk_tokens=512")
        alone = launch_worker(recipe, "cached", *sizes)[0]
        peaks.append(alone["peak_mib"] - alone["embeddings_mib"])
        print(f"  batch {batch}: {times[-1]:.3f} ms a token; whole rounds {' '.join(f'{r:.3f}' for r in rounds)}")
    plot_growth(batches, times, peaks, REPOSITORY / "runs" / "prove" / "cost_growth.png")
    claim = f"batch {batches[0]} to {batches[-1]} at a fixed chunk budget ({chunks[0]} to {chunks[-1]} "
    claim += f"chunks a rank), parts' least of {len(rounds)} rounds: "
    rows = []
    for name, values, unit in (("CPU seconds a real token", times, "ms"), ("peak memory above start-up", peaks, "MiB")):
        spread = max(values) / min(values)
        text = " -> ".join(f"{value:.3g}" for value in values) + f" {unit} ({spread:.2f} x)"
        if values is times:
            text += f"; medians {' -> '.join(f'{value:.3g}' for value in medians)}"
        rows.append(row(claim + name, "flat within 10 %", text, spread <= 1.10))
    return rows


def plot_growth(batches: list[int], times: list[float], peaks: list[float], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, values, label in zip(axes, (times, peaks), ("CPU ms a token", "peak MiB"), strict=True):
        axis.plot(batches, values, marker="o")
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 1.2 * max(values))
        axis.set_xlabel("queries a step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def kept_graphs(recipe: Path) -> list[Row]:
    """The same step with one graph kept and with all, ZeRO-1."""
    zero1 = f"run.deepspeed={REPOSITORY / 'ds_configs' / 'zero1.json'}"
    common = ("batch.queries=64", "batch.symmetric_queries=64", "run.chunk_tokens=2048", zero1)
    one, every = (launch_worker(recipe, "cached", *common, f"run.keep_graphs={k}")[0] for k in (1, 99))
    ratio = every["cpu_seconds"] / one["cpu_seconds"]
    return [
        row(
            f"all {one['chunks']} chunks of a step keep their graphs (ZeRO-1), against one",
            "same loss, less time, more memory",
            f"CPU {every['cpu_seconds']:.1f} against {one['cpu_seconds']:.1f} s ({ratio:.2f} x), peak "
            f"{every['peak_mib']:.0f} against {one['peak_mib']:.0f} MiB, {every['passes']} against {one['passes']} "
            "passes",
            ratio < 1 and abs(every["loss"] - one["loss"]) <= 1e-5 * abs(one["loss"]),
        )
    ]


def loading() -> list[Row]:
    out = WORK / "load_memory.json"
    call([sys.executable, "benchmarks/load_memory.py", "--out", str(out)])
    r = json.loads(out.read_text())
    whole, sharded = (r[how]["anonymous_bytes"] / r["model_bytes"] for how in ("whole", "sharded"))
    return [
        row(
            f"host memory while {r['ranks']} ranks load a model of {r['model_bytes'] / 1e6:.0f} MB under ZeRO-3, all "
            "ranks together, adapters and optimizer included",
            "at most 1.5 x the model",
            f"{sharded:.2f} x ({whole:.2f} x when every rank loads it whole); mapped pages of the weight files, which "
            f"the kernel may take back: {r['sharded']['mapped_bytes'] / r['model_bytes']:.2f} x",
            sharded <= 1.5,
        )
    ]


def peers() -> list[Row]:
    """Beside other trainers, each in an environment of its own; finished environments are used again."""
    out = WORK / "peers.json"
    out.unlink(missing_ok=True)
    call([sys.executable, "benchmarks/peers.py", "--out", str(out)], accepted=(0, NO_ENVIRONMENT))
    if not out.is_file():
        reason = "not shown: their environments could not be made (pip needs a network once)"
        return [row("CPU seconds and memory of a step beside other trainers", "see README", reason, None)]
    claims: list[Row] = json.loads(out.read_text())["claims"]
    return claims


def planner(data: Path) -> list[Row]:
    out = REPOSITORY / "runs" / "prove" / "plan_check.json"
    out.unlink(missing_ok=True)
    call([sys.executable, "benchmarks/plan_check.py", "--data", str(data)], accepted=(0, 1))
    cases = json.loads(out.read_text())
    errors = {c["case"]: c["planned"]["peak"] / c["measured"]["peak"] - 1 for c in cases}
    worst = max(errors, key=lambda case: abs(errors[case]))
    return [
        row(
            f"planned against measured peak memory of a rank: {len(errors)} runs over three shapes, ZeRO 0 to 3, "
            "activations kept and recomputed",
            "within 15 %",
            f"{min(errors.values()):+.1%} to {max(errors.values()):+.1%}; the worst: {worst}",
            abs(errors[worst]) <= 0.15,
        )
    ]


def waiting() -> list[Row]:
    """How long the quickstart's training waited for data; its steps have a real model and tokens enough."""
    claim = "share of training time spent waiting for the next step's plan and chunks (make demo, 2 ranks on CPU)"
    if not (RUN / "metrics.jsonl").is_file():
        return [row(claim, "at most 1 %", "not shown: run make demo first", None)]
    steps = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    waits = [step["seconds_of"]["data"] for step in steps]
    seconds = sum(step["seconds"] for step in steps)
    shown = f"{sum(waits) / seconds:.2%} of {seconds:.0f} s in {len(steps)} steps, {waits[0]:.2f} s of it for the first"
    return [row(claim, "at most 1 %", shown, sum(waits) <= 0.01 * seconds)]


def not_here() -> list[Row]:
    return [row("a Mistral-7B-shaped LoRA step on one card", "see the planner", "needs a GPU", None)]
