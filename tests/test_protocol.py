"""What a job script decides, case by case: slurm/protocol.sh with stand-ins for srun and scontrol.

The real ones are in tests/test_slurm.py, where each case would take a start of Python on a cluster.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import REPOSITORY

SRUN = r"""#!/usr/bin/env bash
# The first task of a step alone, on this machine; srun's own exit code is $SRUN_CODE where that is set.
echo "$*" >>"$STEPS"
while [[ $1 == -* ]]; do shift; done
SLURM_PROCID=0 setsid "$@" &
task=$!
trap 'kill -KILL -- -$task' TERM  # so does srun
trap 'kill -USR1 -- -$task' USR1
wait $task; code=$?
while kill -0 $task 2>/dev/null; do wait $task; code=$?; done
exit ${SRUN_CODE:-$code}
"""
PYTHON = r"""#!/usr/bin/env bash
# The check of the nodes, which finds what $REPORT holds; the copy of a store.
case "$*" in
  *--copy-store*) echo /scratch/store-1 >"$BGE_ICL_ATTEMPT/node_store" ;;
  *check_nodes.py*) if [ -e "$REPORT" ]; then cat "$REPORT" >"$BGE_ICL_ATTEMPT/preflight.txt"; fi ;;
esac
"""
SCONTROL = r"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case $1 in
  requeue) kill -TERM $PPID ;;  # SLURM ends the script of a job that it requeues
  show)
    if [ "$2" = job ]; then echo "JobId=7 ExcNodeList=n9 NumNodes=2-2"; elif [ "$3" = "n[1-2]" ]; then printf 'n1\nn2\n'
    else tr , '\n' <<<"$3"; fi ;;
esac
"""
SCRIPT = """
source slurm/protocol.sh
if [ -n "${SLOW:-}" ]; then touch "$(dirname "$1")/slow"; sleep 2; fi
set -uo pipefail
TASKS=(--ntasks=2)
begin --run "$1"
$2
"""
RANKS = 'run_ranks bash -c "$WORK"; decide'
TASK = 'run_task bash -c "$WORK"'


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder of job 7, whose environment is that of a first start on two nodes."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}
    variables |= {"SLURM_JOB_END_TIME": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    variables |= {name.upper(): str(tmp_path / name) for name in ("calls", "steps", "report")}
    variables |= {"BGE_ICL_CONTAINER": "", "BGE_ICL_WRAP": ""}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "run"


def start(job: Path, commands: str, work: str = "", restart: int = 0, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"WORK": work, "SLURM_RESTART_COUNT": str(restart)} | variables
    script = SCRIPT.replace("$2", commands)
    return subprocess.Popen(
        ["bash", "-c", script, "job", str(job)], cwd=REPOSITORY, env=environment, stdout=-1, stderr=-1, text=True
    )


def run(job: Path, commands: str, work: str = "", restart: int = 0, **variables: str) -> tuple[int, str]:
    """(exit code, verdict) of a start of the job."""
    process = start(job, commands, work, restart, **variables)
    said = process.communicate(timeout=30)
    verdict = job / "attempts" / f"7.{restart}" / "verdict"
    assert verdict.exists(), said
    return process.returncode, verdict.read_text().strip()


def end(code: int, steps: int | str, reason: str) -> str:
    """What a run writes at its end."""
    return f'echo "{code} {steps} {reason}" >"$BGE_ICL_ATTEMPT/end"; '


def requeues(job: Path) -> int:
    calls = job.parent / "calls"
    return calls.read_text().splitlines().count("requeue 7") if calls.exists() else 0


@pytest.mark.parametrize(
    ("work", "code", "verdict"),
    [
        ("exit 0", 0, "done"),
        ("exit 2", 2, "failed: see the error above"),
        ("exit 3", 143, "requeued: ended with 3 (srun: 3)"),
        ("kill -9 $PPID", 143, "requeued: ended with - (srun: 137)"),
    ],
)
def test_work_ends_by_its_own_code(job: Path, work: str, code: int, verdict: str) -> None:
    assert run(job, TASK, work) == (code, verdict)
    assert requeues(job) == verdict.startswith("requeued")


def test_the_code_of_srun_is_not_trusted(job: Path) -> None:
    assert run(job, TASK, "kill -9 $PPID", SRUN_CODE="0")[1] == "requeued: ended with - (srun: 0)"
    assert run(job, TASK, "exit 0", 1, SRUN_CODE="143") == (0, "done")


def test_work_that_always_meets_its_time_limit_ends(job: Path) -> None:
    for restart in range(24):
        folder = job / "attempts" / f"7.{restart}"
        folder.mkdir(parents=True)
        (folder / "verdict").write_text("requeued: at its time limit\n")
    for restart, verdict in ((23, "requeued: at its time limit\n"), (24, "gave up: at its time limit, as 24 starts")):
        process = start(job, TASK, 'echo >"$BGE_ICL_ATTEMPT/here"; sleep 60 & wait', restart)
        wait_for(job / f"attempts/7.{restart}/here")
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=30)
        assert (job / f"attempts/7.{restart}/verdict").read_text().startswith(verdict)


def test_failures_are_counted_and_preemptions_are_not(job: Path) -> None:
    for restart in range(4):  # SLURM's own requeues
        folder = job / "attempts" / f"7.{restart}"
        folder.mkdir(parents=True)
        (folder / "verdict").write_text(
            "stopped: by SLURM or its user; it goes on from there when it comes back, or is submitted again\n"
        )
    for restart in range(4, 7):
        assert run(job, TASK, "exit 3", restart)[1].startswith("requeued: ended with 3")
    code, verdict = run(job, TASK, "exit 3", 7)
    assert code == 1 and verdict.startswith("gave up: ended with 3 (srun: 3), as 3 starts before")


@pytest.mark.parametrize(
    ("number", "code", "verdict"),
    [
        (signal.SIGUSR1, 143, "requeued: at its time limit"),
        (
            signal.SIGTERM,
            143,
            "stopped: by SLURM or its user; it goes on from there when it comes back, or is submitted again",
        ),
    ],
)
def test_work_that_is_stopped(job: Path, number: signal.Signals, code: int, verdict: str) -> None:
    process = start(job, TASK, 'echo at work >"$BGE_ICL_ATTEMPT/here"; sleep 60 & wait')
    wait_for(job / "attempts/7.0/here")
    process.send_signal(number)
    process.communicate(timeout=30)
    assert (job / "attempts/7.0/verdict").read_text().strip() == verdict and process.returncode == code
    assert not (job / "attempts/7.0/end").exists()


def test_a_signal_while_the_environment_is_made_is_kept(job: Path) -> None:
    process = start(job, TASK, "sleep 60 & wait", SLOW="1")
    wait_for(job.parent / "slow")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert (job / "attempts/7.0/verdict").read_text() == "requeued: at its time limit\n"


@pytest.mark.parametrize(
    ("work", "code", "verdict"),
    [
        (end(0, 5, "done"), 0, "done: 5 steps"),
        (end(0, 5, "done") + "exit 143", 0, "done: 5 steps"),
        (end(2, "-", "no such store"), 2, "failed: no such store"),
        (end(77, 3, "nan"), 77, "failed: nan"),
        (end(75, 3, "SIGUSR1"), 143, "requeued: SIGUSR1; 0 steps are saved"),
        (end(1, "-", "stale file handle"), 143, "requeued: stale file handle; 0 steps are saved"),
        ("exit 0", 143, "requeued: srun ended with 0, and the first rank said nothing; 0 steps are saved"),
    ],
)
def test_a_run_ends_by_what_it_wrote(job: Path, work: str, code: int, verdict: str) -> None:
    assert run(job, RANKS, work) == (code, verdict)
    assert requeues(job) == verdict.startswith("requeued")


def test_a_run_that_is_told_of_its_time_limit_says_so(job: Path) -> None:
    for restart, number, told in ((0, signal.SIGUSR1, True), (1, signal.SIGTERM, False)):
        work = 'trap "" TERM; echo >"$BGE_ICL_ATTEMPT/ready"; sleep 3; echo "75 3 SIGUSR1" >"$BGE_ICL_ATTEMPT/end"'
        process = start(job, RANKS, f"trap : USR1; {work}", restart)
        wait_for(job / f"attempts/7.{restart}/ready")
        process.send_signal(number)
        process.communicate(timeout=30)
        verdict = (job / f"attempts/7.{restart}/verdict").read_text()
        assert ("told to stop before its time limit: SIGUSR1" in verdict) == told, verdict
        assert verdict.startswith("requeued" if told else "stopped: by SLURM or its user (SIGUSR1")


def test_starts_that_gain_nothing_end(job: Path) -> None:
    for restart, steps in enumerate((0, 1, 1)):
        (job / "checkpoints" / f"step-{steps:06d}").mkdir(parents=True, exist_ok=True)
        assert run(job, RANKS, end(76, "-", "rank 1 is lost"), restart)[0] == 143
    assert run(job, RANKS, end(76, "-", "rank 1 is lost"), 3) == (
        1,
        "gave up: 3 starts gained no step beyond 1 (rank 1 is lost); mend the cause and submit again",
    )


@pytest.mark.parametrize(
    ("others", "code", "verdict"),
    [
        ("n1 n2 n3 n9", 1, "requeued: without n2, which the check found bad"),
        ("n1 n2 n9", 2, "failed: the check found n2 bad, and without n9,n2 partition main has 1 nodes for 2"),
    ],
)
def test_bad_nodes_are_left_out_while_enough_are_left(
    job: Path, others: str, code: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_PARTITION", "main")
    sinfo = job.parent / "sinfo"
    sinfo.write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' {others}\n")
    sinfo.chmod(0o755)
    assert run(job, "come_back_without n2") == (code, verdict)
    updated = "update JobId=7 ExcNodeList=n9,n2" in (job.parent / "calls").read_text()
    assert updated == verdict.startswith("requeued")


CHECK = "check_nodes train recipe.yaml; echo it goes on"
MISSING = "  error: rank 1 on n2 does not answer"


@pytest.mark.parametrize(
    ("nodes", "unreached", "report", "blamed"),
    [
        (3, ("n2", "n3"), "", "n1 answers nobody"),  # its python does not start, say
        (3, ("n2", "n3"), MISSING, "n1 answers nobody"),  # it judged, but from behind a cut cable
        (3, ("n2",), MISSING, "n3 from the report"),
        (2, ("n2",), "", "n1 answers nobody"),
        (2, ("n2",), MISSING, ""),  # both live: either may be cut off
        (2, (), MISSING, "n3 from the report"),
        (2, ("n1",), "", ""),
    ],
)
def test_who_is_blamed(
    job: Path, nodes: int, unreached: tuple[str, ...], report: str, blamed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))
    words = [f'touch "$ATTEMPT/unreached.{node}"' for node in unreached]
    words += [f'echo "{report}" >"$ATTEMPT/preflight.txt"; echo "n3 from the report" >"$ATTEMPT/bad_nodes"'] * bool(
        report
    )
    start(job, "; ".join([*words, "blame_first_node"])).communicate(timeout=30)
    bad = job / "attempts/7.0/bad_nodes"
    assert (bad.read_text().strip() if bad.exists() else "") == blamed


@pytest.mark.parametrize(
    ("report", "code", "verdict"),
    [
        ("  error: rank 1 on n2: disk: full", 2, "failed: the check of the nodes: rank 1 on n2: disk: full"),
        (
            "  away: rank 1 on n2: token store: Stale file handle",
            143,
            "requeued: the check of the nodes came to no verdict",
        ),
        ("", 143, "requeued: the check of the nodes came to no verdict"),
    ],
)
def test_a_check_that_does_not_end_well(job: Path, report: str, code: int, verdict: str) -> None:
    (job.parent / "report").write_text(report + "\n")
    assert run(job, CHECK) == (code, verdict)


def test_a_check_without_verdict_is_tried_again_and_the_code_of_srun_not_trusted(job: Path) -> None:
    for restart in range(3):
        assert run(job, CHECK, "", restart, SRUN_CODE="0")[1].startswith("requeued: the check")
    assert run(job, CHECK, "", 3)[1].startswith(
        "gave up: the check of the nodes came to no verdict, as 3 starts before"
    )


def test_a_check_that_ends_well_lets_the_job_go_on(job: Path) -> None:
    (job.parent / "report").write_text("  all is well after 1.0 s\n")
    out, _ = start(job, CHECK, "", 0, SRUN_CODE="1").communicate(timeout=30)
    assert "it goes on" in out


def test_a_store_is_copied_on_every_node_however_long_it_takes(job: Path) -> None:
    (job.parent / "report").write_text("  all is well after 1.0 s\n")
    script = (REPOSITORY / "slurm/train.sbatch").read_text()
    body = script[script.index("check_nodes train") : script.index("run_ranks")]
    shown = 'echo "trains on $*"'
    out, _ = start(job, f"set -- recipe.yaml\n{body}\n{shown}", "", 0, BGE_ICL_NODE_STORE="/scratch").communicate(
        timeout=30
    )
    assert "trains on recipe.yaml data.store=/scratch/store-1" in out
    (copying,) = [line for line in (job.parent / "steps").read_text().splitlines() if "--copy-store" in line]
    assert copying.endswith("check_nodes.py --copy-store /scratch --config recipe.yaml")
    assert copying.split(" python ")[0].split()[-3:] == ["--ntasks-per-node=1", "--ntasks=2", "--wait=0"]


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < limit, f"no {path}"
        time.sleep(0.05)


def test_the_environment_names_the_virtual_environment_by_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "real" / "bin").mkdir(parents=True)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / ".venv").symlink_to(tmp_path / "real")
    command = f"source {REPOSITORY}/slurm/env.sh; echo $PATH"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path / "copy", capture_output=True, text=True, check=True)
    assert done.stdout.split(":")[0] == str(tmp_path / "real" / "bin")
