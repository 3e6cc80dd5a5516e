"""Locks that compilations at run time leave."""

import os
from pathlib import Path

import pytest

from pipeline.runtime import extensions
from pipeline.runtime.extensions import remove_stale_locks


@pytest.mark.parametrize("depth", ["", "py311_cpu"])
def test_a_lock_that_nobody_holds_is_removed(tmp_path: Path, depth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if depth:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setattr(extensions, "get_default_build_root", lambda: str(tmp_path))
    else:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    left, held, new = (tmp_path / depth / name / "lock" for name in ("left", "held", "new"))
    for lock in (left, held, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
    for lock in (left, held):
        os.utime(lock, (0, 0))
    with held.open():
        assert remove_stale_locks() == [left]
    assert [lock.exists() for lock in (left, held, new)] == [False, True, True]
    assert remove_stale_locks() == [held]
