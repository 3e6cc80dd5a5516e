"""Flags of the estimate: the hardware, and lengths where there is no store."""

import argparse
import math

from pipeline.data.sampling import Schedule
from pipeline.data.store import TokenStore
from pipeline.planning.cases import Workload, sampled_workload, stated_workload
from pipeline.planning.estimate import Cluster
from pipeline.planning.pairs import sampled_pairs, stated_pairs
from pipeline.settings import Settings

# Flag of the estimate: default, help.
HARDWARE = {
    "nodes": (1, "machines"),
    "gpus_per_node": (8, "GPUs, hence ranks, of a machine"),
    "gpu_memory": (80.0, "memory of a GPU, GiB"),
    "link_gbps": (400.0, "network of one node, Gbit/s one way, all its cards together"),
    "gpu_link_gbps": (3600.0, "link of a GPU to the others of its node, Gbit/s one way (3600: NVLink 4)"),
    "gpu_tflops": (989.0, "dense bf16 peak of a GPU, TFLOP/s (989: H100 and H200 SXM)"),
    "utilisation": (0.4, "share of that peak that all executed arithmetic reaches: an assumption, 0 to 1"),
}
LENGTHS = {
    "query_tokens": "mean tokens of a query with its examples, or in a reranker's pair; with --passage-tokens no store "
    "is read",
    "passage_tokens": "mean tokens of a passage",
    "steps": "steps of the run, where no store and no optim.max_steps says it",
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--estimate and what it reads. Defaults are filled in by read_cluster: a flag that is not given is None."""
    group = parser.add_argument_group("estimate")
    group.add_argument("--estimate", action="store_true", help="print memory, chunks, time and GPU-hours of the run")
    for name, (default, text) in HARDWARE.items():
        group.add_argument(_flag(name), type=type(default), metavar="N", help=f"{text} (default {default:g})")
    for name, text in LENGTHS.items():
        group.add_argument(_flag(name), type=int, metavar="N", help=text)


def check_flags(arguments: argparse.Namespace) -> None:
    """ValueError for a value out of range and for flags that say nothing together."""
    given = [name for name in (*HARDWARE, *LENGTHS) if getattr(arguments, name) is not None]
    for name in given:
        value = getattr(arguments, name)
        if not 0 < value < math.inf or (name == "utilisation" and value > 1):
            raise ValueError(f"{_flag(name)} {value} must be above 0{' and at most 1' * (name == 'utilisation')}")
    if given and not arguments.estimate:
        raise ValueError(f"{_flag(given[0])} says something about an estimate only: add --estimate")
    if (arguments.query_tokens is None) != (arguments.passage_tokens is None):
        raise ValueError("--query-tokens and --passage-tokens go together: state both, or neither to read the store")
    if arguments.steps is not None and arguments.query_tokens is None:
        raise ValueError("--steps is for stated lengths: a store says how many there are; or set optim.max_steps")


def read_cluster(arguments: argparse.Namespace) -> Cluster:
    """The hardware that the flags describe; Gbit/s become bytes a second."""
    given = {name: getattr(arguments, name) for name in HARDWARE}
    value = {name: HARDWARE[name][0] if number is None else number for name, number in given.items()}
    return Cluster(
        nodes=int(value["nodes"]),
        gpus_per_node=int(value["gpus_per_node"]),
        gpu_gib=value["gpu_memory"],
        gpu_link=value["gpu_link_gbps"] * 1e9 / 8,
        node_link=value["link_gbps"] * 1e9 / 8,
        flops=value["gpu_tflops"] * 1e12,
        utilisation=value["utilisation"],
    )


def read_workload(
    arguments: argparse.Namespace, settings: Settings, depth: int, store: TokenStore | None, schedule: Schedule | None
) -> Workload:
    """What the run works on: by stated lengths where there are any, else by the store.

    Args:
        depth: layers of the model.
        store, schedule: may be None where lengths are stated.
    """
    reranks, stated = settings.model.kind == "reranker", (arguments.query_tokens, arguments.passage_tokens)
    if arguments.query_tokens is not None:
        if reranks:
            return stated_pairs(settings, *stated, arguments.steps, depth)
        return stated_workload(settings, *stated, arguments.steps)
    assert store is not None and schedule is not None, "without a store the flags state lengths"
    return sampled_pairs(store, schedule, settings, depth) if reranks else sampled_workload(store, schedule, settings)
