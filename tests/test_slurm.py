"""Jobs on a real SLURM cluster of virtual nodes: the chain of stages, requeue, loss of a node, launchers, bad input.

For `make test-slurm`; `make test` leaves it out. Most of the time goes into starting Python on two cores, so everything
begins at once and each test waits for its part. The chain has nodes 1 to 3 (two and a spare), all else has 4 to 6.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launching import launch, require_success, run_python
from slurm_cluster import (
    Cluster,
    answer,
    attempts_of,
    cluster,
    control,
    declare_down,
    fell,
    hide,
    left_over,
    mend,
    nodes_of,
    run,
    steps_done,
    submit,
    tail,
    wait_for_line,
    wait_job,
    wait_until,
)
from test_evaluation import write_lines, write_task
from tiny_run import make_tiny_run

pytestmark = pytest.mark.slurm

STEPS = 24
START = 150  # seconds that the start of a job may take on two cores, with everything else beside it
TRAINING = [
    "model.lora.dropout=0.1",
    "run.chunk_tokens=300",
    "run.save_every=1",
    f"run.keep_last={STEPS}",
    f"optim.max_steps={STEPS}",
]
CHAIN_NODES, OTHER_NODES = "node[1-3]", "node[4-6]"


@dataclass(frozen=True)
class Site:
    """A cluster and what is submitted to it."""

    cluster: Cluster
    folder: Path
    recipe: Path
    tasks: tuple[Path, ...]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("slurm")
    recipe = make_tiny_run(folder)
    tasks = []
    for name in ("words", "more_words"):
        tasks.append(write_task(folder / name))
        description = json.loads((tasks[-1] / "task.json").read_text())
        (tasks[-1] / "task.json").write_text(json.dumps(description | {"name": name}))
        write_lines(tasks[-1] / "examples.jsonl", [{"query": f"where is {n}", "response": n} for n in ("x", "y", "z")])
    with cluster(folder / "testbed", 6) as running:
        yield Site(running, folder, recipe, tuple(tasks))


@pytest.fixture(scope="module")
def parts(site: Site) -> Iterator[dict[str, Future[Any]]]:
    """Everything that takes long, three at a time in this order."""
    with ThreadPoolExecutor(3) as pool:
        found: dict[str, Future[Any]] = {"chain": pool.submit(run_chain, site), "alone": pool.submit(run_alone, site)}
        found["launches"] = pool.submit(run_launches, site)
        found["by hand"] = pool.submit(run_by_hand, site, found["alone"])
        found["refused"] = pool.submit(run_refused, site)
        yield found
        pool.shutdown(cancel_futures=True)


def submit_chain(site: Site, *options: str, out: str = "run") -> subprocess.CompletedProcess[str]:
    """`bge-icl submit` for two nodes with one rank each."""
    command = [sys.executable, "pipeline/submit_job.py", "--config", str(site.recipe), "--nodes", "2"]
    command += ["--gpus-per-node", "0", "--tasks-per-node", "1", "--time", "20", "--preprocess-tasks", "2"]
    command += [f"--exclude={OTHER_NODES}", *options, *TRAINING, f"run.output_dir={site.folder / out}"]
    return run(site.cluster, *command)


def wait_for_steps(out: Path, attempt: Path, more: int) -> int:
    """Wait until an attempt has done so many steps of its own; returns the steps of the run before it."""
    wait_until(lambda: (attempt / "ready").exists(), START, lambda: f"{attempt.name} is not ready: {log_of(out)}")
    before = int((attempt / "ready").read_text())
    wait_until(lambda: steps_done(out) >= before + more, 60, lambda: f"{attempt.name} takes no steps: {log_of(out)}")
    assert steps_done(out) < STEPS - 3, "the run must be caught in the middle"
    return before


def log_of(out: Path) -> str:
    """What the newest attempts of a run said, for messages."""
    logs = sorted([*out.glob("attempts/*/*"), *out.glob("attempts/*.log")], key=lambda path: path.stat().st_mtime)[-8:]
    return "".join(f"\n--- {path}\n{tail(path, 1500)}" for path in logs if path.is_file() and path.name != "env.txt")


# The chain, and the same run without SLURM.


def run_chain(site: Site) -> dict[str, Any]:
    """Submit with one command; in mid-training requeue the job, and then end one of its nodes.

    The one without the job's script: with the other SLURM takes 14 s longer (`make prove-slurm` has both).
    """
    told, out = submit_chain(site, *(f"--task={task}" for task in site.tasks)), site.folder / "run"
    require_success(told)
    jobs = json.loads(next(out.glob("jobs/*/submitted.json")).read_text())["jobs"]
    first, second, third = (out / "attempts" / f"{jobs['train']}.{restart}" for restart in range(3))

    wait_for_steps(out, first, 3)
    answer(site.cluster, "scontrol", "requeue", jobs["train"])
    intruder = submit_chain(site)  # while the job waits, and the processors have time
    requeued_at = wait_for_steps(out, second, 3)

    lost = nodes_of(second)[1]
    fell(site.cluster, lost)
    declare_down(site.cluster, lost)
    lost_at = wait_for_steps(out, third, 0)
    mend(site.cluster, lost)
    trained = wait_job(site.cluster, jobs["train"], START)
    evaluated = wait_job(site.cluster, jobs["evaluate"], START)
    status = answer(site.cluster, sys.executable, "pipeline/job_status.py", out)
    return {
        "jobs": jobs,
        "told": told.stdout,
        "intruder": intruder,
        "resumed at": (requeued_at, lost_at),
        "lost": lost,
        "states": [job["JobState"] for job in (*trained, *evaluated)],
        "status": status,
    }


def run_alone(site: Site) -> Path:
    """The same run on two ranks of this machine."""
    out, store = site.folder / "alone", f"data.store={site.folder / 'store_alone'}"
    require_success(run_python("pipeline/preprocess.py", ["--config", str(site.recipe), "--processes", "1", store]))
    overrides = [*TRAINING, store, f"run.output_dir={out}"]
    require_success(launch("pipeline/train.py", ["--config", str(site.recipe), *overrides], 2))
    return out


def test_a_chain_of_jobs_ends_with_scores(site: Site, parts: dict[str, Future[Any]]) -> None:
    chain, out = parts["chain"].result(), site.folder / "run"
    assert list(chain["jobs"]) == ["preprocess", "train", "evaluate"]
    assert chain["states"] == ["COMPLETED"] * 3, log_of(out)
    for job in chain["jobs"].values():
        assert job in chain["told"]
    scores = json.loads((out / "scores.json").read_text())
    assert {(s["task"], s["mode"]) for s in scores} == {
        (name, mode) for name in ("words", "more_words") for mode in ("zero_shot", "few_shot")
    }
    assert (out / "model" / "embedder.json").is_file()
    assert "done" in chain["status"] and f"{STEPS}" in chain["status"]


def test_a_requeued_job_and_a_lost_node_change_no_bit(site: Site, parts: dict[str, Future[Any]]) -> None:
    chain, out, alone = parts["chain"].result(), site.folder / "run", parts["alone"].result()
    first, second, third = attempts = attempts_of(out, chain["jobs"]["train"])
    assert 3 <= chain["resumed at"][0] < chain["resumed at"][1] < STEPS
    for attempt in (first, second):
        assert (attempt / "verdict").read_text().startswith("stopped: by SLURM or its user")
    assert (third / "verdict").read_text() == f"done: {STEPS} steps\n"
    assert chain["lost"] in nodes_of(second) and chain["lost"] not in nodes_of(third)
    for attempt in attempts:
        assert (attempt / "rank-0.log").is_file() and (attempt / "rank-1.log").is_file()
        assert "all is well" in (attempt / "preflight.txt").read_text()
    assert read_losses(out) == read_losses(alone) and len(read_losses(out)) == STEPS
    for name in ("weights.safetensors", "moments.safetensors"):
        last = Path("checkpoints") / f"step-{STEPS:06d}" / name
        assert (out / last).read_bytes() == (alone / last).read_bytes(), name


def read_losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


# By hand, with a node that cannot read the token store.


def run_by_hand(site: Site, alone: Future[Path]) -> tuple[Path, str]:
    """sbatch slurm/train.sbatch on two of three nodes, of which the first finds an empty folder where the store is.

    Returns:
        the run folder and the job, which is ended when it has begun again on other nodes.
    """
    alone.result()
    store = site.folder / "store_alone"
    hide(site.cluster, 4, store)
    out = site.folder / "by_hand"
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
    options += [f"--exclude={CHAIN_NODES}", f"--output={out}.log"]
    command = ["slurm/train.sbatch", site.recipe, f"data.store={store}", f"run.output_dir={out}"]
    job = submit(site.cluster, *options, *command, variables={"BGE_ICL_EXCLUDE": "1"})
    wait_for_line(out / "attempts" / f"{job}.1" / "nodes", "node", START)
    answer(site.cluster, "scancel", job)
    wait_job(site.cluster, job, START)
    return out, job


def test_a_node_that_cannot_read_the_store_is_named_and_left_out(site: Site, parts: dict[str, Future[Any]]) -> None:
    out, job = parts["by hand"].result()
    first, second = attempts_of(out, job)
    assert nodes_of(first)[0] == 4, "the test is about that node"
    (blame,) = (first / "bad_nodes").read_text().splitlines()
    assert blame.startswith("node4 token store: ") and str(site.folder / "store_alone") in blame
    assert (first / "verdict").read_text() == "requeued: without node4, which the check found bad\n"
    assert "error: rank 0 on node4: token store: " in Path(f"{out}.log").read_text()
    assert not (first / "rank-0.log").exists(), "the ranks were not started"
    assert nodes_of(second) == [5, 6], "neither the bad node nor those that the job excluded from the beginning"


# Launchers.


def run_launches(site: Site) -> dict[str, subprocess.CompletedProcess[str]]:
    """Entries under launchers that start two processes on two nodes; srun --mpi=pmi2 has started the chain's."""
    two = ["--nodes=2", "--ntasks=2", f"--exclude={CHAIN_NODES}"]
    preprocess = [sys.executable, "pipeline/preprocess.py", "--config", site.recipe]
    train = [sys.executable, "pipeline/train.py", "--config", site.recipe, "optim.max_steps=2"]
    store = f"data.store={site.folder / 'store_mpiexec'}"

    def start(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(site.cluster, *command, variables=variables, seconds=START)

    return {
        "mpiexec": start("salloc", *two, "mpiexec", "-n", "2", *preprocess, store),
        "no mpi": start("srun", *two, *preprocess, f"data.store={site.folder / 'store_none'}"),
        "srun": start("srun", *two, *train, store, f"run.output_dir={site.folder / 'srun'}"),
        "split": start(
            "srun", *two, *train, f"run.output_dir={site.folder / 'split'}", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"
        ),
    }


def test_mpi_launchers_start_preprocessing(site: Site, parts: dict[str, Future[Any]]) -> None:
    launches, job = parts["launches"].result(), parts["chain"].result()["jobs"]["preprocess"]
    require_success(launches["mpiexec"])
    assert "with 2 ranks" in launches["mpiexec"].stdout
    (log,) = (site.folder / "run" / "attempts").glob(f"*-preprocess-{job}.log")
    assert "with 2 ranks" in log.read_text()
    for path in (site.folder / "store").iterdir():
        assert path.read_bytes() == (site.folder / "store_mpiexec" / path.name).read_bytes(), path.name
    assert launches["no mpi"].returncode == 2 and "use srun --mpi=pmi2" in launches["no mpi"].stderr
    assert not (site.folder / "store_none").exists()


def test_plain_srun_starts_one_run_of_all_ranks(site: Site, parts: dict[str, Future[Any]]) -> None:
    started = parts["launches"].result()["srun"]
    require_success(started)
    assert "ZeRO-3, 2 ranks" in started.stdout and started.stdout.count("done: 2 steps") == 1
    assert steps_done(site.folder / "srun") == 2


def test_a_launch_that_would_split_is_an_error(site: Site, parts: dict[str, Future[Any]]) -> None:
    split = parts["launches"].result()["split"]
    assert split.returncode == 2, split.stderr[-3000:]
    assert "srun started 2 tasks, but WORLD_SIZE=1 (RANK=0)" in split.stderr
    assert not (site.folder / "split").exists()


# Bad input that only a cluster can refuse. A wrong account is refused only where a database holds the accounts; what
# `bge-icl submit` makes of that answer is tested with a stand-in for sbatch.


def run_refused(site: Site) -> dict[str, subprocess.CompletedProcess[str]]:
    """Chains that this cluster cannot run."""
    return {option: submit_chain(site, option, out="refused") for option in ("--partition=nowhere", "--nodes=7")}


@pytest.mark.parametrize(("option", "words"), [("--partition=nowhere", ["nowhere"]), ("--nodes=7", ["7", "6"])])
def test_what_the_cluster_has_not_is_refused_before_anything_is_queued(
    site: Site, parts: dict[str, Future[Any]], option: str, words: list[str]
) -> None:
    told = parts["refused"].result()[option]
    assert told.returncode == 2, told.stdout
    (line,) = told.stderr.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not list((site.folder / "refused").glob("jobs/*/submitted.json"))


def test_a_run_folder_in_use_is_refused(site: Site, parts: dict[str, Future[Any]]) -> None:
    chain = parts["chain"].result()
    refused = chain["intruder"]
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert str(site.folder / "run") in refused.stderr and chain["jobs"]["train"] in refused.stderr
    assert len(list((site.folder / "run").glob("jobs/*/submitted.json"))) == 1


# The cluster itself.


def test_a_cluster_ends_with_its_owner(tmp_path: Path) -> None:
    owner = subprocess.Popen(["sleep", "600"])
    try:
        control("up", tmp_path / "testbed", "1", str(owner.pid))
        assert left_over(tmp_path / "testbed")
    finally:
        owner.kill()
        owner.wait()
    wait_until(lambda: not left_over(tmp_path / "testbed"), 10, lambda: f"{left_over(tmp_path / 'testbed')} is left")
