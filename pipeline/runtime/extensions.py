"""What a killed compilation leaves: DeepSpeed builds extensions on first use, and torch guards them by locks."""

import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

STALE_SECONDS = 60  # before that a lock may be that of a process that this one cannot see: a container's


def remove_stale_locks() -> list[Path]:
    """Remove locks that nobody holds, and return them; torch would wait for them for ever, and say nothing.

    Torch creates the file `lock` beside an extension, holds it open while it compiles, and removes it in the end.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]  # the default root has a folder a version of Python between
    stale = [lock for lock in locks if _age(lock) > STALE_SECONDS and not _is_open(lock)]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _age(path: Path) -> float:
    """Seconds since a file was made; 0 where it is gone meanwhile."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_open(path: Path) -> bool:
    """Whether a process of this user holds a file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.samefile(path):
                return True
        except OSError:  # ended or closed meanwhile, or another user's
            continue
    return False
