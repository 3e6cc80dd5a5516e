"""A real SLURM cluster of virtual nodes (slurm_cluster.sh): start it, submit to it, watch its jobs, break its nodes.

Nothing here sleeps for a fixed time: everything waits for a state or a line, with a deadline after which it fails.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launching import REPOSITORY, environment

# Compiled for the tests without SLURM already; a node's own folder is empty, and the compiler takes half a minute.
DEFAULT_EXTENSIONS = Path.home() / f".cache/torch_extensions/py{sys.version_info.major}{sys.version_info.minor}_cpu"
EXTENSIONS = os.environ.get("TORCH_EXTENSIONS_DIR") or str(DEFAULT_EXTENSIONS)
SCRIPT = Path(__file__).with_name("slurm_cluster.sh")
OVER = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"})


@dataclass(frozen=True)
class Cluster:
    """A running cluster; nodes are numbered from 1 and named node1, node2, ..."""

    folder: Path
    num_nodes: int


@contextmanager
def cluster(folder: Path, num_nodes: int) -> Iterator[Cluster]:
    """Start a cluster in `folder`, and end it whatever happens; its logs stay beside it, in `<folder>-log`.

    Raises:
        AssertionError: it does not start (the message says why), or something of it is left at the end.
    """
    control("up", folder, str(num_nodes), str(os.getpid()))
    try:
        yield Cluster(folder, num_nodes)
    finally:
        shutil.copytree(folder / "log", folder.with_name(folder.name + "-log"), dirs_exist_ok=True)
        control("down", folder)
    wait_until(lambda: not left_over(folder), 10, lambda: f"left of the cluster: {left_over(folder)}")


def control(command: str, folder: Path, *arguments: str) -> None:
    """One command of slurm_cluster.sh; AssertionError with what it said where it fails."""
    done = subprocess.run(["bash", SCRIPT, command, folder, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"slurm_cluster.sh {command}: {done.stderr.strip()}"


def left_over(folder: Path) -> list[str]:
    """Processes, mounts and files that tell of a cluster."""
    found = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words and int(process.name) != os.getpid():
            found.append(f"process {process.name}: {words[:200]!r}")
    return [*found, *([str(folder)] if folder.exists() else [])]


def run(
    cluster: Cluster,
    *command: str | Path,
    variables: Mapping[str, str] | None = None,
    seconds: float = 60,
    cwd: Path = REPOSITORY,
) -> subprocess.CompletedProcess[str]:
    """Run a command as on the login node; both outputs are in the result."""
    return subprocess.run(
        ["bash", SCRIPT, "in", cluster.folder, *command],
        cwd=cwd,
        env=environment() | {"BGE_ICL_EXTENSIONS_DIR": EXTENSIONS} | dict(variables or {}),
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def answer(cluster: Cluster, *command: str | Path, **options: Mapping[str, str] | Path) -> str:
    """What a command on the login node prints; AssertionError where it fails."""
    done = run(cluster, *command, **options)  # type: ignore[arg-type]
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout.strip()


def submit(cluster: Cluster, *arguments: str | Path, **options: Mapping[str, str] | Path) -> str:
    """`sbatch arguments`; returns the job's id."""
    return answer(cluster, "sbatch", "--parsable", *arguments, **options)


def show_job(cluster: Cluster, job: str) -> list[dict[str, str]]:
    """The fields of `scontrol show job`, of each task of an array (sacct needs a database, and there is none)."""
    lines = answer(cluster, "scontrol", "show", "job", "-o", job).splitlines()
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]


def wait_job(cluster: Cluster, job: str, seconds: float, states: frozenset[str] = OVER) -> list[dict[str, str]]:
    """Wait until a job, or every task of an array, is in one of the states; returns its fields."""
    shown: list[dict[str, str]] = []

    def arrived() -> bool:
        shown[:] = show_job(cluster, job)
        return all(task["JobState"] in states for task in shown)

    def complaint() -> str:
        return f"job {job}: {[(task['JobState'], task['Reason']) for task in shown]}, not {sorted(states)}"

    wait_until(arrived, seconds, complaint)
    return shown


def wait_for_line(path: Path, words: str, seconds: float) -> str:
    """Wait for a line with these words (a regular expression) in a file, and return it."""
    found: list[str] = []

    def seen() -> bool:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        found[:] = [line for line in lines if re.search(words, line)]
        return bool(found)

    wait_until(seen, seconds, lambda: f"no line {words!r} in {path}: {tail(path)}")
    return found[0]


def wait_until(holds: Callable[[], bool], seconds: float, complaint: Callable[[], str]) -> None:
    """Wait until something holds; AssertionError with the complaint after so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{complaint()}, after {seconds:g} s"
        time.sleep(0.1)


def tail(path: Path, num_characters: int = 3000) -> str:
    """The end of a file, for messages."""
    return path.read_text(errors="replace")[-num_characters:] if path.exists() else f"there is no {path}"


def steps_done(run_folder: Path) -> int:
    """Steps that metrics.jsonl tells of."""
    path = run_folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def ranks_of(job: str, script: str = "pipeline/train.py") -> dict[int, int]:
    """Rank -> process id, as this machine sees it, of a job's tasks that run a script."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = dict(re.findall(rb"(SLURM_\w+)=([^\0]*)", (process / "environ").read_bytes()))
        except OSError:
            continue
        # The shell in front of a rank and srun carry the script among their words too.
        if script.encode() in words[1:4] and variables.get(b"SLURM_JOB_ID") == job.encode():
            found[int(variables[b"SLURM_PROCID"])] = int(process.name)
    return found


def kill_rank(job: str, rank: int) -> None:
    """kill -9 of one rank."""
    os.kill(ranks_of(job)[rank], signal.SIGKILL)


def nodes_of(attempt: Path) -> list[int]:
    """Numbers of the nodes that an attempt was given, in order."""
    return [int(name.removeprefix("node")) for name in (attempt / "nodes").read_text().split()]


def attempts_of(run_folder: Path, job: str) -> list[Path]:
    """Folders of a job's starts, the first one first."""
    folders = (run_folder / "attempts").glob(f"{job}.*")
    return sorted(folders, key=lambda folder: int(folder.name.rpartition(".")[2]))


def hide(cluster: Cluster, node: int, folder: Path) -> None:
    """Let one node find an empty folder where the others find this one."""
    control("at", cluster.folder, str(node), "mount", "-t", "tmpfs", "none", str(folder))


def fell(cluster: Cluster, node: int) -> None:
    """Power loss of a node. SLURM notices by itself after SlurmdTimeout."""
    control("kill-node", cluster.folder, str(node))


def declare_down(cluster: Cluster, node: int) -> None:
    """Tell SLURM that a node is down, which it would find out by itself."""
    answer(cluster, "scontrol", "update", f"NodeName=node{node}", "State=DOWN", "Reason=test")


def mend(cluster: Cluster, node: int) -> None:
    """Power on; returns when SLURM uses the node again."""
    control("start-node", cluster.folder, str(node))
    wait_idle(cluster, node)


def wait_idle(cluster: Cluster, node: int) -> None:
    """Wait until SLURM gives a node to jobs."""

    def state() -> str:
        return answer(cluster, "sinfo", "-h", "-p", "main", "-n", f"node{node}", "-o", "%T")

    wait_until(lambda: state() in ("idle", "mixed", "allocated"), 60, lambda: f"node{node} is {state()}")


def queue(cluster: Cluster) -> Sequence[str]:
    """Ids of the jobs that are not over."""
    return answer(cluster, "squeue", "-h", "-o", "%A").split()
