"""Who this process is among all processes of a run, and the few collectives on embeddings that a step needs.

S sequences of the whole step, D width, W ranks.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.files import passing_errno
from pipeline.runtime.launch import find_place

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process's place; `device` is where its tensors live."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_ranks(local_rank: int | None = None) -> Ranks:
    """Place of this process, from whatever launcher started it (launch.py); the environment then has it too.

    Raises:
        ValueError: the launch would split into several runs, or a rank of a GPU machine has no GPU of its own.
    """
    for name, value in find_place().items():
        os.environ.setdefault(name, value)
    local = int(os.environ.setdefault("LOCAL_RANK", str(local_rank or 0)))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        if local >= (visible := torch.cuda.device_count()):
            raise ValueError(
                f"LOCAL_RANK={local}, but this process sees {visible} GPUs: start one rank a GPU, and let each see all "
                "GPUs of its node (sbatch --gpus-per-node, not --gpus-per-task)"
            )
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local, device)


def share_cores(ranks: Ranks) -> int:
    """On CPU, give each process of a machine its share of the cores (unless OMP_NUM_THREADS says); returns it."""
    if ranks.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // on_this_machine))
    return torch.get_num_threads()


def gather_embeddings(local_SD: Tensor, sequences_of_rank: Sequence[np.ndarray], ranks: Ranks) -> Tensor:
    """All sequences' embeddings on every rank, in the order of the step.

    Args:
        local_SD: this rank's, in the order of sequences_of_rank[rank].
        sequences_of_rank: for each rank the sequence numbers it encoded; together a permutation of 0 .. S - 1.
    """
    longest = max(len(s) for s in sequences_of_rank)
    padded = local_SD.new_zeros(longest, local_SD.shape[1])
    padded[: len(local_SD)] = local_SD
    parts = [padded]
    if ranks.world_size > 1:
        parts = [torch.empty_like(padded) for _ in range(ranks.world_size)]
        dist.all_gather(parts, padded)
    order = torch.from_numpy(np.concatenate(sequences_of_rank)).to(local_SD.device)
    in_rank_order = torch.cat([part[: len(s)] for part, s in zip(parts, sequences_of_rank, strict=True)])
    return torch.empty_like(in_rank_order).index_copy_(0, order, in_rank_order)


def sum_over_ranks(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum over all ranks, on every rank (in place)."""
    if ranks.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_values(value: float, ranks: Ranks) -> list[float]:
    """One number of every rank, on every rank."""
    mine = torch.tensor([value], dtype=torch.float64, device=ranks.device)
    parts = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    if ranks.world_size > 1:
        dist.all_gather(parts, mine)
    else:
        parts = [mine]
    return [float(part) for part in parts]


def from_first(value: Value, ranks: Ranks) -> Value:
    """The first rank's value, on every rank."""
    box = [value]
    if ranks.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def by_first(work: Callable[[], Value], ranks: Ranks) -> Value:
    """Run `work` on the first rank alone: its value on every rank, and its ValueError or OSError too, so none waits."""
    result: Value | None = together(lambda: work() if ranks.is_first else None, ranks)
    return from_first(result, ranks)  # type: ignore[return-value]


def together(work: Callable[[], Value], ranks: Ranks) -> Value:
    """Run `work` on every rank; if it raises ValueError or OSError on one, all raise its message: none waits, and
    whichever rank speaks first, or is ended first by the launcher, the reason is told.

    Raises:
        OSError: a file system is away for the rank that failed; `errno` says how.
        ValueError: anything else.
    """
    result, fault = None, ("", 0)
    try:
        result = work()
    except (ValueError, OSError) as error:
        fault = str(error) or type(error).__name__, passing_errno(error)
    faults = [fault]
    if ranks.world_size > 1:
        faults = [fault] * ranks.world_size
        dist.all_gather_object(faults, fault)
    for rank, (text, number) in enumerate(faults):
        if text:
            said = text if rank == ranks.rank else f"rank {rank}: {text}"
            away = OSError(said)
            away.errno = number
            raise away if number else ValueError(said)
    return result  # type: ignore[return-value]
