"""What one task of a job finds on its node, and what all of them together say about the nodes.

A fault on some nodes is those nodes' fault; one that all have is the recipe's or the site's, and no node is bad for it.
"""

import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.disk import checkpoint_bytes, disk_need
from pipeline.cluster.pace import model_shape
from pipeline.cluster.run_folder import holds_embedder
from pipeline.files import passing_errno
from pipeline.settings import Settings

GIB = 1 << 30
READ_BYTES = 4 * GIB  # by a task: seconds
MAX_CLOCK_SECONDS = 5.0


class FirstTaskLost(ValueError):
    """The task that is to judge cannot be reached, or has ended before it did."""


@dataclass(frozen=True)
class Found:
    """What one task found."""

    rank: int
    host: str
    facts: Mapping[str, str]  # must be the same on every node
    notes: Mapping[str, str]  # worth showing
    faults: tuple[str, ...]
    may_pass: bool  # all faults are of a file system that is away
    clock: float


def look_around(stage: str, settings: Settings, rank: int, world_size: int) -> Found:
    """Everything that a task can check alone; what is wrong is in `faults`, nothing is raised for it."""
    facts: dict[str, str] = {}
    notes: dict[str, str] = {}
    faults: list[str] = []
    errors: list[Exception] = []

    def attempt(name: str, check: Callable[[], None]) -> None:
        try:
            check()
        # CUDA raises RuntimeErrors, a missing library ImportErrors: all are this node's, and must be told.
        except Exception as error:
            errors.append(error)
            faults.append(f"{name}: {' '.join(str(error).split()) or type(error).__name__}")

    def versions() -> None:
        from pipeline.runtime.guards import code_versions

        facts.update(code_versions())
        notes["python"] = sys.executable

    def tokenizer() -> None:
        from pipeline.data.tokenizing import load_tokenizer
        from pipeline.prompts import get_template

        facts["tokenizer"] = load_tokenizer(
            settings.tokenizer_name, get_template(settings.preprocess.template)
        ).fingerprint[:12]

    attempt("versions", versions)
    if stage == "preprocess":
        attempt("raw data", lambda: check_raw(settings, notes))
        attempt("tokenizer", tokenizer)
        attempt("disk", lambda: require_space(Path(settings.data.store).parent, GIB, notes))
    if stage == "train":
        attempt("token store", lambda: check_store(settings, rank, world_size, facts, notes))
        attempt("tokenizer", tokenizer)
        attempt("base model", lambda: check_base(settings, facts))
        attempt("disk", lambda: require_space(Path(settings.run.output_dir), training_bytes(settings), notes))
    if stage == "evaluate":
        attempt("model", lambda: require_model(Path(settings.run.output_dir)))
    if stage != "preprocess":
        attempt("GPU", lambda: check_gpu(notes))
    may_pass = all(passing_errno(error) for error in errors)
    return Found(rank, node_name(), facts, notes, tuple(faults), may_pass, time.time())


def node_name() -> str:
    """This node as SLURM calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_raw(settings: Settings, notes: dict[str, str]) -> None:
    """Look for the raw data as preprocessing does; ValueError where some of it is not here."""
    from pipeline.data.finding import find_sources

    notes["raw data"] = f"{len(find_sources(settings))} sources"


def check_store(settings: Settings, rank: int, world_size: int, facts: dict[str, str], notes: dict[str, str]) -> None:
    """Open the token store as training does, and read this task's share of its files; of a large one training does."""
    from pipeline.data.store import open_store, verify_shards
    from pipeline.files import file_sha256

    store = open_store(settings.data.store, verify=False)
    share = sum(file.num_bytes for file in store.manifest.files[rank::world_size])
    if share <= READ_BYTES:
        verify_shards(settings.data.store, rank, world_size)
    facts["token store"] = file_sha256(store.path / "manifest.json")[:12]
    checked = "checksums right" if share <= READ_BYTES else "checksums left to training: they take a while"
    notes["token store"] = f"{settings.data.store}: {len(store.manifest.files)} files, {checked}"


def check_base(settings: Settings, facts: dict[str, str]) -> None:
    from pipeline.model.base import fingerprint_base

    facts["base model"] = fingerprint_base(settings.model.name)[:12]


def require_model(run: Path) -> None:
    """ValueError where a run has no trained model."""
    if not holds_embedder(run):
        raise ValueError(f"{run} holds no trained model: model/embedder.json is missing")


def training_bytes(settings: Settings) -> int:
    """What training will write; 1 GiB where the model's shape is not known."""
    try:
        shape = model_shape(settings, store=None)
    except ValueError:
        return GIB
    return disk_need(settings.run, checkpoint_bytes(shape))[1]


def require_space(folder: Path, needed: int, notes: dict[str, str]) -> None:
    """ValueError where a folder cannot be written to, or its disk has less than `needed` bytes left."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to")
    free = shutil.disk_usage(folder).free
    notes["disk"] = f"{free / GIB:.1f} GiB free under {folder}, {needed / GIB:.1f} GiB needed"
    if free < needed:
        raise ValueError(f"{notes['disk']}; free some, or for checkpoints lower run.keep_last")


def check_gpu(notes: dict[str, str]) -> None:
    """ValueError where this task's GPU is not there, not free, or computes wrongly."""
    import torch

    given, local = os.environ.get("SLURM_GPUS_ON_NODE"), int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        if given:
            raise ValueError(
                f"SLURM gave {given} GPUs, and torch {torch.__version__} sees none: driver, or a CPU build"
            )
        notes["GPUs"] = "none asked for: CPU"
        return
    if local >= (visible := torch.cuda.device_count()):
        raise ValueError(f"task {local} of this node has no GPU: {visible} are visible; ask for one a task")
    free, total = torch.cuda.mem_get_info(local)
    name = torch.cuda.get_device_name(local)
    notes["GPUs"] = f"{name}, {total / GIB:.0f} GiB"
    if free < 0.9 * total:
        raise ValueError(
            f"{name} number {local}: {free / GIB:.1f} of {total / GIB:.1f} GiB are free; who else is there?"
        )
    ones = torch.ones(1024, 1024, device=torch.device("cuda", local))
    if not bool(((ones @ ones) == 1024).all()):
        raise ValueError(f"{name} number {local} computes wrongly")


def judge(found: Sequence[Found], missing: Mapping[int, str]) -> tuple[list[str], dict[str, str]]:
    """(lines that name what is wrong, bad nodes with the reason).

    Args:
        found: of the tasks that answered.
        missing: rank -> host of those that did not.
    """
    blamed: dict[str, str] = {host: "does not answer" for host in missing.values()}
    lines = [f"rank {rank} on {host} does not answer" for rank, host in sorted(missing.items())]
    for task in found:
        for fault in task.faults:
            lines.append(f"rank {task.rank} on {task.host}: {fault}")
            blamed.setdefault(task.host, fault)
    for name in sorted({name for task in found for name in task.facts}):
        having = [task for task in found if name in task.facts]  # of the others a fault tells
        counts = Counter(task.facts[name] for task in having).most_common()
        common, is_tie = counts[0][0], len(counts) > 1 and counts[0][1] == counts[1][1]
        for task in having:
            if task.facts[name] != common:
                fault = f"{name} is {task.facts[name]}, elsewhere {common}"
                lines.append(f"rank {task.rank} on {task.host}: {fault}")
                if not is_tie:  # one against one: which of them is right is not known
                    blamed.setdefault(task.host, fault)
    hosts = {task.host for task in found} | set(missing.values())
    return lines, {} if blamed.keys() == hosts else blamed


def describe(found: Sequence[Found]) -> list[str]:
    """What is the same everywhere, what was found, and how far the clocks are apart."""
    facts: dict[str, str] = {}
    for task in found:
        facts |= dict(task.facts)
    lines = [f"  {'the same':<13} {', '.join(f'{name} {value}' for name, value in facts.items())}"]
    for name in sorted({name for task in found for name in task.notes}):
        counts = Counter(task.notes[name] for task in found if name in task.notes)
        # Free space differs by the moment it is asked for: one line of it is enough.
        shown = counts.most_common(1 if name == "disk" else 4)
        lines.append(f"  {name:<13} {'; '.join(f'{n} x {text}' if name == 'GPUs' else text for text, n in shown)}")
    clocks = [task.clock for task in found]
    if (apart := max(clocks) - min(clocks)) > MAX_CLOCK_SECONDS:
        lines.append(f"  {'clocks':<13} {apart:.0f} s apart, or a node was that slow: times in logs do not compare")
    return lines
