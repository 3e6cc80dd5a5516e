"""The check of a job's nodes: what is wrong is named, and the node with it, within a bounded time."""

import re
import shutil
import time
from pathlib import Path

import pytest
from launching import REPOSITORY, launch_ranks
from tiny_run import make_tiny_run

from pipeline.check_nodes import main
from pipeline.cluster import node_checks
from pipeline.cluster.meeting import hosts_of_ranks
from pipeline.cluster.node_checks import (
    Found,
    describe,
    judge,
    look_around,
    require_space,
    training_bytes,
)
from pipeline.data.store import open_store
from pipeline.preprocess import main as preprocess
from pipeline.settings import load_settings

SCRIPT = REPOSITORY / "pipeline" / "check_nodes.py"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = make_tiny_run(tmp_path_factory.mktemp("tiny"))
    assert preprocess(["--config", str(recipe), "--processes", "1"]) == 0
    return recipe


def found(rank: int, *faults: str, host: str = "", **facts: str) -> Found:
    return Found(rank, host or f"n{rank // 2}", facts, {"GPUs": "a card"}, faults, False, 100.0 + 10 * rank)


def test_a_fault_of_some_nodes_is_theirs() -> None:
    lines, bad = judge([found(0, code="a"), found(1, code="a"), found(2, "disk: full", code="a")], {3: "n7"})
    assert bad == {"n7": "does not answer", "n1": "disk: full"}
    assert lines == ["rank 3 on n7 does not answer", "rank 2 on n1: disk: full"]


def test_a_fault_of_all_nodes_is_no_node_s() -> None:
    lines, bad = judge([found(0, "disk: full"), found(2, "disk: full")], {})
    assert len(lines) == 2 and bad == {}


def test_other_versions_are_named() -> None:
    same = [found(i, code="a", torch="2.13") for i in range(5)]
    assert judge(same, {}) == ([], {})
    lines, bad = judge([*same, found(6, code="b", torch="2.13")], {})
    assert lines == ["rank 6 on n3: code is b, elsewhere a"] and bad == {"n3": "code is b, elsewhere a"}


def test_of_two_that_differ_nobody_is_blamed() -> None:
    lines, bad = judge([found(0, code="a"), found(1, code="a"), found(2, code="b"), found(3, code="b")], {})
    assert len(lines) == 2 and bad == {}


def test_any_error_of_a_check_is_told(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(notes: dict[str, str]) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error\nencountered")

    monkeypatch.setattr(node_checks, "check_gpu", broken)
    faults = look_around("train", load_settings(recipe), 0, 1).faults
    assert faults == ("GPU: CUDA error: uncorrectable ECC error encountered",)


def test_checkpoints_that_lie_there_need_no_more_space(recipe: Path, tmp_path: Path) -> None:
    settings = load_settings(recipe, [f"run.output_dir={tmp_path}"])
    before = training_bytes(settings)
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    assert training_bytes(settings) == before * 16 // 40


def test_what_was_found_is_shown() -> None:
    text = "\n".join(describe([found(0, code="a"), found(1, code="a")]))
    assert "code a" in text and "2 x a card" in text and "clocks        10 s apart" in text


def test_hosts_of_ranks(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("a\nb\nc\n")
    said = {"BGE_ICL_ATTEMPT": str(tmp_path), "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    assert hosts_of_ranks(said) == {0: "a", 1: "a", 2: "b", 3: "b", 4: "c"}
    assert hosts_of_ranks({}) == {}


def test_disk_space(tmp_path: Path, recipe: Path) -> None:
    settings = load_settings(recipe)
    # Two layers of seven projections of rank 4 and three marker rows of 64 numbers; three checkpoints and the model.
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    trained = 2 * sum(4 * (a + b) for a, b in shapes) + 3 * 64
    assert training_bytes(settings) == trained * (3 * 12 + 4)
    require_space(tmp_path, 1, {})
    with pytest.raises(ValueError, match=r"GiB free under .*, 1048576.0 GiB needed; free some, or for checkpoints"):
        require_space(tmp_path, 1 << 50, {})


def test_a_gpu_that_slurm_gave_and_torch_does_not_see(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    faults = look_around("train", load_settings(recipe), 0, 1).faults
    assert len(faults) == 1 and "GPU: SLURM gave 2 GPUs, and torch" in faults[0]


def test_two_tasks_that_are_well(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BGE_ICL_ATTEMPT", str(tmp_path))
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    tasks = launch_ranks(SCRIPT, ["--for", "train", "--config", str(recipe)], 2)
    outputs = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    shown = outputs[0][0]
    assert "check of the nodes for train: 2 tasks on 1 nodes" in shown and "checksums right" in shown
    assert "all-reduce    2 ranks, right; 4 MiB in" in shown and "all is well after" in shown
    assert (tmp_path / "preflight.txt").read_text() == shown and not (tmp_path / "bad_nodes").exists()


def test_a_damaged_store_and_a_task_that_does_not_come(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(recipe)
    broken = tmp_path / "store"
    shutil.copytree(settings.data.store, broken)
    shard = max(broken.rglob("*.arrow"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    monkeypatch.setenv("BGE_ICL_ATTEMPT", str(tmp_path))
    command = ["--for", "train", "--config", str(recipe), "--patience", "10", f"data.store={broken}"]
    started = time.monotonic()
    first, second, third = launch_ranks(SCRIPT, command, 3)
    third.kill()
    outputs = [task.communicate(timeout=120) for task in (first, second, third)]
    assert first.returncode == second.returncode == 2 and time.monotonic() - started < 60
    assert "error: rank 2 on a node that is not known does not answer" in outputs[0][1]
    assert "it is damaged, rebuild it" in outputs[0][1]


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("train", "data.store=nowhere", "token store: .*nowhere"),
        ("train", "model.name=./nowhere", "base model: .*nowhere"),
        ("preprocess", "data.root=nowhere", "raw data: .*nowhere"),
        ("evaluate", "run.output_dir=nowhere", "model: .*nowhere holds no trained model"),
    ],
)
def test_what_a_task_finds_wrong(
    recipe: Path, stage: str, change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    faults = look_around(stage, load_settings(recipe, [change]), 0, 1).faults
    assert any(re.match(message, fault) for fault in faults), faults
    assert look_around(stage, load_settings(recipe), 0, 1).faults == () or stage == "evaluate"


def test_a_store_is_copied_whole_and_once(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    monkeypatch.setenv("BGE_ICL_ATTEMPT", str(tmp_path))
    command = ["--copy-store", str(disk), "--config", str(recipe)]
    assert main(command) == 0
    (copy,) = disk.glob("store-*[0-9a-f]")
    assert (tmp_path / "node_store").read_text() == f"{copy}\n"
    assert open_store(copy, verify=True).manifest == open_store(load_settings(recipe).data.store).manifest
    written = copy.stat().st_mtime_ns
    assert main(command) == 0 and copy.stat().st_mtime_ns == written

    (copy / "manifest.json").write_text("{}")
    disk.joinpath(f"{copy.name}.partial").mkdir()  # of a job that was killed
    assert main(command) == 0 and open_store(copy, verify=True).manifest
    assert sorted(path.name for path in disk.iterdir()) == [copy.name, f"{copy.name}.lock"]

    assert main([*command, f"data.store={tmp_path}"]) == 2


def test_the_first_task_is_missed_by_the_others(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BGE_ICL_ATTEMPT", str(tmp_path))
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    first, second = launch_ranks(SCRIPT, ["--for", "train", "--config", str(recipe), "--patience", "5"], 2)
    first.kill()
    _, said = second.communicate(timeout=120)
    first.communicate(timeout=20)
    assert second.returncode == 2 and "error: " in said
    assert [path.name for path in tmp_path.iterdir()] == ["unreached.n7"]
