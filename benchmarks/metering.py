"""CPU seconds and memory of this process, and the record of a measured run.

Standard library only: scripts that run in another trainer's environment import it, too.
"""

import importlib.metadata
import json
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Moment = tuple[float, float, float]  # CPU seconds, wall seconds, CPU seconds of the whole machine


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory_mib(field: str) -> float:
    """VmRSS or VmHWM (the peak since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine_busy_seconds() -> float:
    """CPU seconds of all processes of this machine since it started."""
    user, nice, system, _idle, _waiting, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(rest[:2])) / os.sysconf("SC_CLK_TCK")


def reset_peak() -> float:
    """Forget the peak; returns what the process holds now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mib("VmRSS")


def moment() -> Moment:
    return cpu_seconds(), time.perf_counter(), machine_busy_seconds()


def write_record(
    out: str,
    start_mib: float,
    moments: Sequence[Moment],
    losses: Sequence[float],
    tokens: Sequence[tuple[int, int]],
    packages: Sequence[str],
) -> None:
    """One trainer's run as JSON: a value a step.

    Args:
        start_mib: what the process held after start-up, as `reset_peak` gave it.
        moments: before the first step, and after each.
        tokens: (real, with padding) that the encoder saw in each step; passes over them are not counted.
        packages: whose versions to note.
    """
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    assert len(moments) == len(losses) + 1 == len(tokens) + 1, (len(moments), len(losses), len(tokens))
    assert not children, f"CPU seconds are those of one process, but it has children: {children}"
    peak = memory_mib("VmHWM")
    whole = [after - before for before, after in zip(moments[0], moments[-1], strict=True)]
    record: dict[str, Any] = {
        "cpu_seconds": [after[0] - before[0] for before, after in zip(moments[:-1], moments[1:], strict=True)],
        "wall_seconds": [after[1] - before[1] for before, after in zip(moments[:-1], moments[1:], strict=True)],
        "cores_busy_elsewhere": (whole[2] - whole[0]) / whole[1],
        "losses": list(losses),
        "real_tokens": [real for real, _ in tokens],
        "padded_tokens": [padded for _, padded in tokens],
        "start_mib": start_mib,
        "peak_mib": peak,
        "peak_above_start_mib": peak - start_mib,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    Path(out).write_text(json.dumps(record, indent=2) + "\n")
