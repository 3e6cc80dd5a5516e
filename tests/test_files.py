"""Locks and exit codes that a job on a cluster depends on."""

import errno
import threading
from pathlib import Path

import pytest

from pipeline import files
from pipeline.files import exit_code, locked, take_lock


def test_a_job_that_came_back_waits_for_the_lock_of_a_lost_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = take_lock(tmp_path / "lock")
    assert lost is not None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    timer = threading.Timer(1.5, lost.close)
    timer.start()
    with locked(tmp_path / "lock", "held"):
        assert take_lock(tmp_path / "lock") is None
    assert "lock is held; waiting up to 300 s" in capsys.readouterr().out

    with locked(tmp_path / "lock", "held"):
        monkeypatch.setattr(files, "LEASE_SECONDS", 1.0)
        with pytest.raises(ValueError, match="held"), locked(tmp_path / "lock", "held"):
            pass


@pytest.mark.parametrize("restarts", [None, "0"])
def test_others_do_not_wait_for_a_lock(tmp_path: Path, restarts: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    monkeypatch.setattr(files.time, "sleep", lambda _: pytest.fail("waits"))
    with locked(tmp_path / "lock", ""), pytest.raises(ValueError, match="held"), locked(tmp_path / "lock", "held"):
        pass


def test_exit_codes() -> None:
    assert [exit_code(OSError(number, "")) for number in (errno.ESTALE, errno.EIO, errno.ENOTCONN)] == [1, 1, 1]
    mended_by_hand = [ValueError("x"), FileNotFoundError(errno.ENOENT, "x"), OSError(errno.ENOSPC, "x"), OSError("x")]
    assert [exit_code(error) for error in mended_by_hand] == [2, 2, 2, 2]
