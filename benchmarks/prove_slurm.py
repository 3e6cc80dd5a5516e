"""The topic slurm of prove.py: jobs on a real cluster of virtual nodes, disturbed in every way that jobs are disturbed,
come back by themselves and end with the weights of a run that nobody disturbed.
"""

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from prove_trainer import ONE_THREAD, SHORT, STEPS, digests, run_command
from proving import REPOSITORY, WORK, Row, call, make_random_model, row, training_files
from proving import write_recipe as write_random_recipe

sys.path.append(str(REPOSITORY / "tests"))
from slurm_cluster import (
    Cluster,
    answer,
    cluster,
    control,
    fell,
    kill_rank,
    mend,
    nodes_of,
    ranks_of,
    steps_done,
    submit,
    tail,
    wait_idle,
    wait_job,
    wait_until,
)

# What a start takes on this cluster (6 s that SLURM lets a requeued job wait, check of the nodes, imports, loading) and
# what SLURM takes to notice that a node is dead (10 s), with room for a machine that is at other work too.
BOUND = 90.0  # seconds from a disturbance to the first new step
STEP_SECONDS = 3.0  # at most: with a checkpoint, beside other work
COUNTS = {
    "time limit": 1,
    "scontrol requeue": 3,
    "preempted": 2,
    "scancel --batch --signal=USR1": 2,
    "scancel --signal=TERM": 3,
    "scancel --batch --signal=TERM, submitted again": 2,
    "kill -9 of a rank": 3,
    "a node without power": 2,
    "kill -9 of a slurmd": 2,
}


@dataclass(frozen=True)
class Place:
    """Where runs are disturbed."""

    cluster: Cluster
    recipe: Path


@dataclass(frozen=True)
class Recovery:
    """What came of a disturbance, in seconds after it."""

    event: str
    ranks_gone: float  # the last rank of the disturbed attempt has ended
    new_step: float | None  # None: the run came to its end without another start


def prove_slurm(data: Path) -> list[Row]:
    make_random_model()
    files = training_files(data)
    one = [next((file for file in files if file.name.startswith("squad")), files[0])]
    recipe = write_random_recipe("slurm", data, one, SHORT, {"group_size": 2, "examples": {"max_examples": 2}})
    whole = WORK / "run_whole"
    shutil.rmtree(whole, ignore_errors=True)
    call(run_command(recipe, whole), ONE_THREAD)
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder) / "testbed", 3) as running:
        recoveries, runs, fault = disturb(Place(running, recipe))
    return judge(recoveries, runs, fault, digests(whole))


def disturb(place: Place) -> tuple[list[Recovery], list[Path], str]:
    """(what came of each disturbance, the run folders, what did not come within its time)."""
    rng = random.Random(0)
    events = [event for event, count in COUNTS.items() for _ in range(count)]
    rng.shuffle(events)
    recoveries: list[Recovery] = []
    runs: list[Path] = []
    try:
        while len(recoveries) < len(events):
            runs.append(WORK / f"run_slurm_{len(runs)}")
            shutil.rmtree(runs[-1], ignore_errors=True)
            log(runs[-1]).unlink(missing_ok=True)
            disturb_run(place, runs[-1], events, recoveries, rng)
    except AssertionError as error:
        return recoveries, runs, f"; {(*events, 'the last steps')[len(recoveries)]}: {error}"
    return recoveries, runs, ""


def disturb_run(place: Place, out: Path, events: list[str], recoveries: list[Recovery], rng: random.Random) -> None:
    """One run from its first to its last step, disturbed every so many steps by the events that have not been yet."""
    job = submit_run(place, out)
    attempt = wait_for_attempt(out, job, set(), lambda: False)
    while len(recoveries) < len(events) and attempt is not None:
        event = events[len(recoveries)]
        goal = int((attempt / "ready").read_text()) + rng.randint(4, 30)
        if goal > STEPS - 40:
            break
        wait_for_step(out, attempt, goal)
        job, attempt, recovery = disturb_once(place, out, job, attempt, event, rng)
        recoveries.append(recovery)
        again = "came to its end" if recovery.new_step is None else f"first new step after {recovery.new_step:.1f} s"
        print(f"  {event}: ranks gone after {recovery.ranks_gone:.1f} s, {again}", flush=True)
    (ended,) = wait_job(place.cluster, job, BOUND + STEP_SECONDS * STEPS)
    assert ended["JobState"] == "COMPLETED", f"job {job} is {ended['JobState']}: {tail(log(out))}"


def disturb_once(
    place: Place, out: Path, job: str, attempt: Path, event: str, rng: random.Random
) -> tuple[str, Path | None, Recovery]:
    """Disturb a run and wait until it has taken a step, or ended; (its job, its attempt if it goes on, what came)."""
    ranks, known = ranks_of(job), set((out / "attempts").iterdir())
    assert len(ranks) == 2, f"ranks {ranks} of job {job}, whose run should be in its middle: {tail(log(out))}"
    started = time.time()
    job, repair = EVENTS[event](place, out, job, attempt, rng)
    if event == "time limit":  # when SLURM gave the signal, within a second
        started = (attempt / "end").stat().st_mtime
    wait_until(lambda: not any(alive(pid) for pid in ranks.values()), BOUND, lambda: f"ranks {ranks} are still there")
    gone = time.time() - started
    found = wait_for_attempt(out, job, known, lambda: is_done(attempt))
    if found is None:
        repair()
        return job, None, Recovery(event, gone, None)
    first = int((found / "ready").read_text()) + 1
    wait_for_step(out, found, first)
    recovery = Recovery(event, gone, time.time() - started)
    repair()
    return job, found, recovery


def submit_run(place: Place, out: Path) -> str:
    """slurm/train.sbatch by hand, in the partition whose jobs may be preempted; the run is that of `run_command`."""
    command = run_command(place.recipe, out)
    words = command[command.index("--config") + 1 :]
    own = ["--partition=low", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    own += ["--time=60", f"--output={log(out)}"]
    return submit(place.cluster, *own, "slurm/train.sbatch", *words, variables=ONE_THREAD)


def log(out: Path) -> Path:
    """What the job script of a run says."""
    return out.with_name(f"{out.name}.log")


def wait_for_attempt(out: Path, job: str, known: set[Path], ended: Callable[[], bool]) -> Path | None:
    """Wait for a start of the run that heeds signals, other than those known; None if the run has ended instead."""
    found: list[Path] = []

    def ready() -> bool:
        found[:] = [path.parent for path in (out / "attempts").glob("*/ready") if path.parent not in known]
        return bool(found) or ended()

    wait_until(ready, BOUND, lambda: f"job {job} does not start again: {tail(log(out))}")
    return found[0] if found else None


def wait_for_step(out: Path, attempt: Path, steps: int) -> None:
    """Wait until so many steps are done, or the attempt has ended by itself."""

    def done() -> bool:
        return steps_done(out) >= steps or (attempt / "end").exists()

    wait_until(done, BOUND, lambda: f"no step {steps}: {tail(log(out))}")


def is_done(attempt: Path) -> bool:
    """Whether an attempt ended with the run's last step."""
    verdict = attempt / "verdict"
    return verdict.exists() and verdict.read_text().startswith("done")


def alive(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


# The disturbances. Each returns the job that goes on and what to mend afterwards.

Disturbed = tuple[str, Callable[[], None]]


def nothing() -> None:
    pass


def reach_limit(place: Place, out: Path, job: str, attempt: Path, rng: random.Random) -> Disturbed:
    """A limit so near that it is time for the signal, which SLURM gives when it looks, each half minute."""
    answer(place.cluster, "scontrol", "update", f"JobId={job}", "TimeLimit=3")
    wait_until(lambda: (attempt / "end").exists(), BOUND, lambda: f"no signal before the limit: {tail(log(out))}")
    wait_job(place.cluster, job, BOUND, frozenset({"PENDING"}))
    answer(place.cluster, "scontrol", "update", f"JobId={job}", "TimeLimit=60")
    return job, nothing


def requeue(place: Place, out: Path, job: str, attempt: Path, rng: random.Random) -> Disturbed:
    answer(place.cluster, "scontrol", "requeue", job)
    return job, nothing


def preempt(place: Place, out: Path, job: str, attempt: Path, rng: random.Random) -> Disturbed:
    """A job of higher priority wants all nodes for a second."""
    options = ["--partition=main", f"--nodes={place.cluster.num_nodes}", "--exclusive", "--output=/dev/null"]
    submit(place.cluster, *options, "--wrap=sleep 1")
    return job, nothing


def signal_job(*options: str) -> Callable[[Place, Path, str, Path, random.Random], Disturbed]:
    def scancel(place: Place, out: Path, job: str, attempt: Path, rng: random.Random) -> Disturbed:
        answer(place.cluster, "scancel", *options, job)
        return job, nothing

    return scancel


def stop_and_submit_again(place: Place, out: Path, job: str, attempt: Path, rng: random.Random) -> Disturbed:
    answer(place.cluster, "scancel", "--batch", "--signal=TERM", job)
    wait_job(place.cluster, job, BOUND)
    verdict = (attempt / "verdict").read_text()
    assert verdict.startswith("stopped: by SLURM or its user"), verdict
    return submit_run(place, out), nothing


def kill_one(place: Place, out: Path, job: str, attempt: Path, rng: random.Random) -> Disturbed:
    kill_rank(job, rng.randint(0, 1))
    return job, nothing


def fell_node(place: Place, out: Path, job: str, attempt: Path, rng: random.Random) -> Disturbed:
    """Of either node, the one with the job's script too; SLURM finds out by itself."""
    node = rng.choice(nodes_of(attempt))
    fell(place.cluster, node)
    return job, lambda: mend(place.cluster, node)


def kill_slurmd(place: Place, out: Path, job: str, attempt: Path, rng: random.Random) -> Disturbed:
    node = rng.choice(nodes_of(attempt))
    control("kill-slurmd", place.cluster.folder, str(node))

    def repair() -> None:
        control("start-slurmd", place.cluster.folder, str(node))
        wait_idle(place.cluster, node)

    return job, repair


EVENTS = {
    "time limit": reach_limit,
    "scontrol requeue": requeue,
    "preempted": preempt,
    "scancel --batch --signal=USR1": signal_job("--batch", "--signal=USR1"),
    "scancel --signal=TERM": signal_job("--signal=TERM"),
    "scancel --batch --signal=TERM, submitted again": stop_and_submit_again,
    "kill -9 of a rank": kill_one,
    "a node without power": fell_node,
    "kill -9 of a slurmd": kill_slurmd,
}


# What it comes to.


def judge(recoveries: list[Recovery], runs: list[Path], fault: str, truth: dict[str, str]) -> list[Row]:
    wrong, last = [], max(truth)
    for out in runs:
        found = digests(out)
        wrong += [f"{out.name}/{name}" for name, value in found.items() if truth[name] != value]
        wrong += [] if last in found else [f"{out.name} has no {last}"]
    kinds = Counter(recovery.event for recovery in recoveries)
    shown = ", ".join(f"{count} x {event}" for event, count in kinds.items())
    rows = [
        row(
            f"runs of {STEPS} steps on 2 nodes of a SLURM cluster with 3 (ZeRO-3, dropout, saved after each step), "
            f"disturbed {sum(COUNTS.values())} times at random moments",
            "every checkpoint equals that of the run without SLURM, weights and moments, bit for bit; each run comes "
            "to its end",
            f"{shown}; {len(runs)} runs; {len(wrong)} checkpoints differ or are missing {' '.join(wrong[:4])}{fault}",
            not wrong and not fault and len(recoveries) == sum(COUNTS.values()),
        )
    ]
    for event in COUNTS:
        rows += recovery_rows(event, [recovery for recovery in recoveries if recovery.event == event])
    return rows


def recovery_rows(event: str, found: list[Recovery]) -> list[Row]:
    """How long the recovery from one kind of disturbance took."""
    if not found:
        return [row(f"{event}: recovery", f"at most {BOUND:.0f} s", "did not come to it", False)]
    steps = [recovery.new_step for recovery in found if recovery.new_step is not None]
    texts = [f"last rank gone after at most {max(recovery.ranks_gone for recovery in found):.1f} s"]
    if steps:
        texts.append(f"first new step after {median(steps):.1f} s (median of {len(steps)}), at most {max(steps):.1f} s")
    if len(steps) < len(found):
        texts.append(f"{len(found) - len(steps)} times the run came to its end without another start")
    return [row(f"{event}: recovery", f"at most {BOUND:.0f} s", "; ".join(texts), max(steps, default=0) <= BOUND)]
