"""What checkpoints take on disk: asked by submit on the login node, and once more by the check of a job's nodes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.settings import RunSettings

if TYPE_CHECKING:
    from pipeline.model.shapes import ModelShape  # needs torch


def checkpoint_bytes(shape: ModelShape) -> int:
    """Of one checkpoint: weight and both moments of each trained number, fp32."""
    return 12 * sum((*shape.frozen, shape.table) if shape.full else shape.trained)


def disk_need(run: RunSettings, checkpoint: int) -> tuple[int, int]:
    """(checkpoints to come, bytes that these and the model take) where one checkpoint takes so many bytes."""
    there = len(list(Path(run.output_dir, "checkpoints").glob("step-*")))
    # One more than is kept: the oldest goes when the newest is whole. Those that lie there have their place.
    coming = max(1, run.keep_last + 1 - there)
    return coming, coming * checkpoint + checkpoint // 3  # the model: weights without moments
