"""Checks before and between steps: ranks started alike, time left in the job, losses out of the ordinary."""

import dataclasses
import hashlib
import importlib.util
import math
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from pipeline.datatypes import BatchPlan
from pipeline.runtime.ranks import Ranks


def require_alike(facts: Mapping[str, str], ranks: Ranks) -> None:
    """ValueError, naming the odd ranks, unless every rank has the same value of every fact (code, settings, data)."""
    if ranks.world_size == 1:
        return
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, (socket.gethostname(), dict(facts)))
    for name in facts:
        values = [found[name] for _, found in everyone]
        common, _ = Counter(values).most_common(1)[0]
        odd = [rank for rank, value in enumerate(values) if value != common]
        if odd:
            who = ", ".join(f"rank {rank} on {everyone[rank][0]}" for rank in odd[:8])
            raise ValueError(
                f"{who}{' and more' if len(odd) > 8 else ''}: {name} {values[odd[0]]} where the other ranks have "
                f"{common}; start every rank with the same command on the same files"
            )


def too_late(recent: Sequence[float], save_seconds: float) -> str:
    """Why to stop before the job's time is over (SLURM tells it), or nothing: room for two steps and two savings."""
    end = os.environ.get("SLURM_JOB_END_TIME")
    if end is None or not recent:
        return ""
    left = float(end) - time.time()
    needed = 2 * max(recent) + 2 * save_seconds + 10
    return f"the job ends in {left:.0f} s, and a step and saving may take {needed:.0f} s" if left < needed else ""


def is_spike(losses: list[float], loss: float) -> bool:
    """Whether a loss stands far above the last ones of its dataset (which it then joins): 3 times their median."""
    spike = len(losses) >= 10 and loss > 3 * float(np.median(losses))
    losses[:] = [*losses[-19:], loss] if math.isfinite(loss) else losses
    return spike


def code_versions() -> dict[str, str]:
    """What must be the same on every node: this code, and the libraries whose arithmetic or layout it relies on."""
    kernels = importlib.util.find_spec("embed_kernels")
    assert kernels is not None and kernels.origin is not None, "it is part of this project"
    folders = (Path(__file__).resolve().parents[1], Path(kernels.origin).resolve().parent)
    own = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in own)).hexdigest()[:16]
    versions = {f"version of {name}": version(name) for name in ("torch", "deepspeed", "transformers", "peft")}
    return {"code": digest, "python": platform.python_version(), **versions}


def digest_plan(plan: BatchPlan) -> str:
    """One hash over everything that a plan says."""
    return hashlib.sha256(repr([getattr(plan, f.name) for f in dataclasses.fields(plan)]).encode()).hexdigest()[:16]
