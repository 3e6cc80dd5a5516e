"""Each launcher's variables give each process its rank; a launch that would split into several runs is an error."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY, environment, require_success
from tiny_run import make_tiny_run

from pipeline.preprocess import main as preprocess
from pipeline.runtime import ranks as ranks_module
from pipeline.runtime.launch import expand_counts, find_place, first_host, slurm_place
from pipeline.runtime.ranks import read_ranks

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_NODELIST": "gpu-[07-08,11]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PMI", "OMPI_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            monkeypatch.delenv(name)


def test_a_task_of_srun() -> None:
    place = slurm_place(STEP)
    assert place["MASTER_ADDR"] == "gpu-07" and place["MASTER_PORT"] == str(20000 + (4711 * 8 + 3) % 20000)
    assert [place[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["17", "20", "1", "4"]


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("a,b[1-2]", "a"), ("gpu[3,5-9]", "gpu3"), ("r[01-04]n,x", "r01n"), ("h-1-2.site", "h-1-2.site")],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_counts_of_tasks() -> None:
    assert expand_counts("8") == [8] and expand_counts("8(x3),4,2(x2)") == [8, 8, 8, 4, 2, 2]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_NTASKS": "8"}, "SLURM_NTASKS=8, but this is a single process: .*; put srun in front"),
        (
            STEP | {"RANK": "0", "WORLD_SIZE": "1"},
            r"srun started 20 tasks, but WORLD_SIZE=1 \(RANK=0\): the tasks would be separate runs in one folder",
        ),
        (STEP | {"RANK": "0"}, "srun started 20 tasks, but WORLD_SIZE=1"),
    ],
)
def test_what_would_split_is_an_error(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        find_place()


def test_what_other_launchers_set_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # torchrun, one a node under srun.
    for name, value in (STEP | {"SLURM_STEP_NUM_TASKS": "4", "RANK": "9", "WORLD_SIZE": "32"}).items():
        monkeypatch.setenv(name, value)
    assert find_place() == {}


def test_a_rank_without_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ranks_module.torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="LOCAL_RANK=3, but this process sees 1 GPUs: .* not --gpus-per-task"):
        read_ranks()


@pytest.mark.skipif(shutil.which("mpiexec", path=environment()["PATH"]) is None, reason="no mpiexec")
def test_mpiexec_starts_one_run_of_all_ranks(tmp_path: Path) -> None:
    recipe = make_tiny_run(tmp_path)
    assert preprocess(["--config", str(recipe), "--processes", "1"]) == 0
    result = subprocess.run(
        ["mpiexec", "-n", "2", sys.executable, "pipeline/train.py", "--config", str(recipe), "optim.max_steps=1"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    require_success(result)
    assert "ZeRO-3, 2 ranks" in result.stdout and (tmp_path / "run/model/embedder.json").is_file()


def test_mpi_ranks_without_their_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    # What mpiexec of one MPI sets, with no such rank there: each process would be a world of one.
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    code = "import sys; sys.path.insert(0, '.'); from pipeline.train import main; sys.exit(main(['--config', 'x']))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "4 ranks were started, but MPI sees 1" in result.stderr, result.stderr
