"""Locks and exit codes that a job on a cluster depends on."""

import errno
import threading
from pathlib import Path

import pytest
import torch

from pipeline import files
from pipeline.files import exit_code, lease_patience, locked, take_lock
from pipeline.runtime.ranks import Ranks, together


def test_a_job_that_came_back_waits_for_the_lock_of_a_lost_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = take_lock(tmp_path / "lock")
    assert lost is not None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert lease_patience() == 300
    timer = threading.Timer(1.5, lost.close)
    timer.start()
    with locked(tmp_path / "lock", "held", lease_patience()):
        assert take_lock(tmp_path / "lock") is None
    assert "lock is held; waiting up to 300 s" in capsys.readouterr().out

    with (
        locked(tmp_path / "lock", "held"),
        pytest.raises(ValueError, match="held"),
        locked(tmp_path / "lock", "held", patience=1.0),
    ):
        pass


@pytest.mark.parametrize("restarts", [None, "0"])
def test_others_do_not_wait_for_a_lock(tmp_path: Path, restarts: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert lease_patience() == 0
    monkeypatch.setattr(files.time, "sleep", lambda _: pytest.fail("waits"))
    with locked(tmp_path / "lock", ""), pytest.raises(ValueError, match="held"), locked(tmp_path / "lock", "held"):
        pass


def test_a_file_system_that_is_away_is_not_one_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, "refused")

        monkeypatch.setattr(files.fcntl, "flock", flock)

    refuse(errno.ENOLCK)
    with pytest.raises(ValueError, match="its file system has no locks"):
        take_lock(tmp_path / "lock")
    refuse(errno.ESTALE)
    with pytest.raises(OSError, match="refused"):
        take_lock(tmp_path / "lock")


def test_what_is_away_for_one_rank_is_away_for_all() -> None:
    def read() -> None:
        try:
            raise OSError(errno.ESTALE, "Stale file handle", "/data/store")
        except OSError as error:
            raise ValueError("the store cannot be read") from error

    alone = Ranks(0, 1, 0, torch.device("cpu"))
    with pytest.raises(OSError, match="^the store cannot be read$") as told:
        together(read, alone)
    assert told.value.errno == errno.ESTALE and exit_code(told.value) == 1
    with pytest.raises(ValueError, match="wrong") as told_of_fault:
        together(lambda: (_ for _ in ()).throw(ValueError("wrong")), alone)
    assert exit_code(told_of_fault.value) == 2


def test_exit_codes() -> None:
    assert [exit_code(OSError(number, "")) for number in (errno.ESTALE, errno.EIO, errno.ENOTCONN)] == [1, 1, 1]
    mended_by_hand = [ValueError("x"), FileNotFoundError(errno.ENOENT, "x"), OSError(errno.ENOSPC, "x"), OSError("x")]
    assert [exit_code(error) for error in mended_by_hand] == [2, 2, 2, 2]
