"""All tasks of a job meet once, with deadlines: who does not come is named instead of waited for."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.cluster.node_checks import FirstTaskLost, Found
from pipeline.runtime.launch import expand_counts
from pipeline.runtime.ranks import Ranks, read_ranks

MIB = 1 << 20
ROUNDS = 5


def take_place() -> Ranks:
    """This task's place. One that has no GPU of its own is no error here: it comes, and tells."""
    try:
        return read_ranks()
    except ValueError:
        if "RANK" not in os.environ:
            raise
        rank, world_size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return Ranks(rank, world_size, local, torch.device("cpu"))


def open_meeting(ranks: Ranks, patience: float) -> dist.TCPStore:
    """The store in which the tasks leave what they found; the first task holds it.

    Raises:
        FirstTaskLost: it cannot be reached within `patience` seconds.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=patience)
    try:
        return dist.TCPStore(host, port, None, ranks.is_first, limit, wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        raise FirstTaskLost(
            f"{host}:{port}, where the first task waits, cannot be reached from {os.uname().nodename} within "
            f"{patience:.0f} s ({str(error).splitlines()[0]}); see BGE_ICL_INTERFACE in slurm/env.sh"
        ) from error


def tell(store: dist.TCPStore, found: Found) -> None:
    """Leave what this task found."""
    store.set(f"found {found.rank}", json.dumps(asdict(found)))


def collect(store: dist.TCPStore, ranks: Ranks, patience: float) -> tuple[list[Found], dict[int, str]]:
    """(what the tasks found, rank -> host of those that did not answer within `patience` seconds)."""
    found, missing, end = [], {}, time.monotonic() + patience
    hosts = hosts_of_ranks()
    for rank in range(ranks.world_size):
        try:
            store.wait([f"found {rank}"], timedelta(seconds=max(0.1, end - time.monotonic())))
        except (dist.DistError, RuntimeError):
            missing[rank] = hosts.get(rank, "a node that is not known")
            continue
        record = json.loads(store.get(f"found {rank}"))
        found.append(Found(**record | {"faults": tuple(record["faults"])}))
    return found, missing


def hosts_of_ranks(variables: Mapping[str, str] = os.environ) -> dict[int, str]:
    """Rank -> host, by what the job's script and SLURM say of the step; empty where they say nothing."""
    folder, counts = variables.get("BGE_ICL_ATTEMPT"), variables.get("SLURM_STEP_TASKS_PER_NODE")
    if not folder or not counts or not (Path(folder) / "nodes").is_file():
        return {}
    names = (Path(folder) / "nodes").read_text(encoding="utf-8").split()
    hosts = [name for name, count in zip(names, expand_counts(counts), strict=False) for _ in range(count)]
    return dict(enumerate(hosts))


def announce(store: dist.TCPStore, ranks: Ranks, name: str, value: str, patience: float) -> str:
    """The first task's value under this name, on every task; FirstTaskLost where it does not come.

    The first task leaves last: what the others read lies with it.
    """
    if ranks.is_first:
        store.set(name, value)
    try:
        store.wait([name], timedelta(seconds=patience))
        text = store.get(name).decode()
        store.add(f"{name} read", 1)
        end = time.monotonic() + 5
        while ranks.is_first and store.add(f"{name} read", 0) < ranks.world_size and time.monotonic() < end:
            time.sleep(0.02)
        return text
    except (dist.DistError, RuntimeError) as error:
        raise FirstTaskLost(
            f"the first task said nothing for {patience:.0f} s: it has ended or stands still"
        ) from error


def measure_all_reduce(store: dist.TCPStore, ranks: Ranks, patience: float) -> str:
    """Sum a tensor over all ranks, check the sum, and tell the bandwidth.

    Bus bandwidth: 2 (W - 1) / W of the bytes over the time, which for a ring is what each link carries.

    Raises:
        ValueError: the sum is wrong, or does not come within `patience` seconds.
    """
    on_gpu = ranks.device.type == "cuda"
    size = 64 * MIB if on_gpu else 4 * MIB
    if on_gpu:
        torch.cuda.set_device(ranks.device)
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("ranks", store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=patience),
        )
        best, world = float("inf"), ranks.world_size
        for _ in range(ROUNDS):
            tensor = torch.full((size // 4,), float(ranks.rank + 1), device=ranks.device)
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(tensor)
            total = float(tensor.max()), float(tensor.min())  # waits for the GPU
            best = min(best, time.perf_counter() - started)
            if total != (world * (world + 1) / 2,) * 2:
                raise ValueError(f"all-reduce over {world} ranks gives {total}, not {world * (world + 1) / 2}")
    except (dist.DistError, RuntimeError) as error:
        raise ValueError(f"all-reduce over {ranks.world_size} ranks fails: {str(error).splitlines()[0]}") from error
    dist.destroy_process_group()
    bandwidth = 2 * (world - 1) / world * size / best
    return f"{world} ranks, right; {size // MIB} MiB in {1e3 * best:.1f} ms, {bandwidth / 1e9:.2f} GB/s a rank"
