"""Preprocessing as an MPI job, with a real mpiexec: the bytes of one process; a lost or failing rank ends it."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import REPOSITORY, environment
from samples import file_digests

from pipeline.data import parallel

MPIEXEC = Path(sys.executable).parent / "mpiexec"
PREPROCESS = REPOSITORY / "pipeline" / "preprocess.py"

pytestmark = pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec: pip install 'bge-icl-train[mpi]'")


def command(recipe: Path, num_ranks: int) -> list[str]:
    return [str(MPIEXEC), "-n", str(num_ranks), sys.executable, str(PREPROCESS), "--config", str(recipe)]


def run(recipe: Path, num_ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    whole = [*command(recipe, num_ranks), *arguments]
    return subprocess.run(whole, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def truth(tiny_training: Path) -> dict[str, str]:
    """Checksums of the store that one process builds."""
    single = [sys.executable, str(PREPROCESS), "--config", str(tiny_training), "--processes", "1"]
    subprocess.run(single, env=environment(), check=True, capture_output=True, timeout=300)
    store = tiny_training.parent / "store"
    digests = file_digests(store)
    shutil.rmtree(store)
    return digests


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_any_number_of_ranks_gives_the_bytes_of_one_process(
    tiny_training: Path, truth: dict[str, str], num_ranks: int
) -> None:
    result = run(tiny_training, num_ranks)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("rows in 120 = stored 120 + quarantined 0") == 1, "the first rank alone speaks"
    store = tiny_training.parent / "store"
    assert file_digests(store) == truth
    if num_ranks == 3:
        assert "up to date" in run(tiny_training, num_ranks).stdout
    shutil.rmtree(store)


def test_what_one_rank_finds_ends_all_with_its_message(tiny_training: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_training.parent, tmp_path / "copy"))
    (folder / "data" / "normal.jsonl").write_text("no row\n" * 50)
    result = run(folder / "recipe.yaml", 3)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1, result.stderr
    assert "50 of 50 rows are bad" in errors[0] and "Traceback" not in result.stderr
    assert not (folder / "store").exists()


def test_a_killed_rank_ends_the_job_and_the_next_run_completes(tiny_training: Path, truth: dict[str, str]) -> None:
    store = tiny_training.parent / "store"
    job = subprocess.Popen(command(tiny_training, 3), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    work = store.with_name("store.partial")
    deadline = time.monotonic() + 120
    while not any(work.glob("units-*/*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    ranks = [pid for pid in descendants(job.pid) if str(PREPROCESS) in command_line(pid)]
    ranks = [pid for pid in ranks if "mpiexec" not in command_line(pid) and "hydra" not in command_line(pid)]
    assert len(ranks) == 3
    os.kill(random.Random(0).choice(ranks), signal.SIGKILL)
    assert job.wait(timeout=60) != 0
    assert not store.exists() and any(work.glob("units-*/*.json")), "killed between the first unit and the end"
    again = run(tiny_training, 2)
    assert again.returncode == 0 and "going on with the interrupted build" in again.stderr
    assert file_digests(store) == truth
    shutil.rmtree(store)


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [found for child in children for found in (child, *descendants(child))]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_without_mpi_nothing_of_it_is_loaded() -> None:
    code = "import sys; from pipeline.data.parallel import serve_first_rank as s; print(s(), 'mpi4py' in sys.modules)"
    variables = {name: value for name, value in environment().items() if not name.startswith(("PM", "OMPI", "SLURM"))}
    result = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["False", "False"], result.stderr


def test_ranks_that_cannot_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="srun started 4 tasks that cannot find each other; use srun --mpi=pmi2"):
        parallel.mpi_size()
