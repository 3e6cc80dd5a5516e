"""A command run several times at once on this machine, one process a GPU."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def visible_gpus() -> list[str]:
    """Names of this machine's GPUs for CUDA_VISIBLE_DEVICES."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [named[i] if i < len(named) and named[i] else str(i) for i in range(torch.cuda.device_count())]


def start_workers(entry: Path, command: Sequence[str], processes: int) -> list[subprocess.Popen[bytes]]:
    """The same command in processes of their own, each alone (`--processes 1 --worker`) and with its share of cores."""
    cores, gpus = len(os.sched_getaffinity(0)), visible_gpus()
    workers = []
    for i in range(processes):
        env = {"OMP_NUM_THREADS": str(max(1, cores // processes)), **os.environ}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
        # The last of two equal options counts.
        again = [sys.executable, str(entry.resolve()), *command, "--processes", "1", "--worker"]
        workers.append(subprocess.Popen(again, env=env))
    return workers


def stop_workers(workers: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """End those that still run; returns all exit codes."""
    for worker in workers:
        worker.terminate()
    return [worker.wait() for worker in workers]
