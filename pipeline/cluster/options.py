"""What `submit` is told of the cluster: flags, and their checks one by one."""

import argparse
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.cluster.wording import parse_time

STAGES = ("preprocess", "train", "evaluate")
PLACES = {
    "partition": "partition of the nodes",
    "account": "account that pays",
    "qos": "quality of service",
    "constraint": "features that the nodes must have",
    "exclude": "nodes to leave out, SLURM's notation: gpu-[03,07]",
}
# What sbatch takes from SBATCH_PARTITION and so on, over what the job text says: here it is the flag's default.
FROM_ENVIRONMENT = ("partition", "account", "qos", "constraint")
# Flags of the planner that say something here: the hardware, and lengths where there is no store yet.
ESTIMATE = {
    "gpu_memory": (float, "memory of a GPU, GiB"),
    "link_gbps": (float, "network of one node, Gbit/s one way, all its cards together"),
    "gpu_link_gbps": (float, "link of a GPU to the others of its node, Gbit/s one way"),
    "gpu_tflops": (float, "dense bf16 peak of a GPU, TFLOP/s"),
    "utilisation": (float, "share of that peak that all executed arithmetic reaches, 0 to 1"),
    "query_tokens": (int, "mean tokens of a query with its examples, where there is no store yet"),
    "passage_tokens": (int, "mean tokens of a passage, with --query-tokens"),
    "steps": (int, "steps of the run, with --query-tokens"),
}
# Options of sbatch that the job text has already: naming them once more would contradict what was checked.
OWN = {
    "--array": "it has one task for each --task",
    "--chdir": "jobs run in the copy of the code in the run folder",
    "--cpus-per-task": "use --cpus-per-task",
    "--dependency": "the stages follow each other; with other jobs: scontrol update",
    "--gpus": "use --gpus-per-node",
    "--gpus-per-node": "use --gpus-per-node",
    "--gpus-per-task": "each rank must see all GPUs of its node; use --gpus-per-node",
    "--job-name": "it is the run folder's name",
    "--nodes": "use --nodes",
    "--ntasks": "use --nodes with --gpus-per-node or --tasks-per-node",
    "--ntasks-per-node": "use --gpus-per-node or --tasks-per-node",
    "--no-requeue": "a job must be able to come back",
    "--open-mode": "a job that comes back appends to its log",
    "--output": "logs go to attempts/ in the run folder",
    "--signal": "use --lead",
    "--time": "use --time",
    **{f"--{name}": f"use --{name}" for name in PLACES},
}
SHORT = {"-a": "--array", "-A": "--account", "-c": "--cpus-per-task", "-C": "--constraint", "-d": "--dependency"}
SHORT |= {"-D": "--chdir", "-G": "--gpus", "-J": "--job-name", "-n": "--ntasks", "-N": "--nodes", "-o": "--output"}
SHORT |= {"-p": "--partition", "-q": "--qos", "-t": "--time", "-x": "--exclude"}
IMAGES = (".sif", ".sqsh", ".img")  # files of containers


@dataclass(frozen=True)
class Options:
    """The cluster's side of a chain of jobs."""

    nodes: tuple[int, int]  # fewest and most; alike where the number is fixed
    gpus_per_node: int  # 0: a cluster without GPUs
    gpu_type: str  # "": any
    tasks_per_node: int  # ranks of a node: one a GPU
    cpus_per_task: int
    time: dict[str, str]  # of each stage, as SLURM writes times
    places: dict[str, str]  # those of PLACES that are named
    partitions: dict[str, str]  # of stages that have one of their own
    container: str
    wrap: str
    extra: tuple[str, ...]  # other options of sbatch
    exclude_bad_nodes: bool
    max_stuck: int
    lead: int | None  # seconds from the signal to the time limit; None: by the size of chunks and checkpoints
    preprocess_tasks: int
    evaluate_options: str  # of pipeline/evaluate_embedder.py
    storage_mb_per_s: float

    @property
    def world_sizes(self) -> range:
        """Ranks of training, for each number of nodes that the job may get."""
        least, most = self.nodes
        return range(least * self.tasks_per_node, most * self.tasks_per_node + 1, self.tasks_per_node)

    def places_of(self, stage: str) -> dict[str, str]:
        """Of a partition of its own only the account is known: all else was said of the nodes of training."""
        if stage not in self.partitions:
            return self.places
        account = {name: value for name, value in self.places.items() if name == "account"}
        return {"partition": self.partitions[stage], **account}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags but --config, --dry-run and the overrides."""
    nodes = parser.add_argument_group("nodes of the training job")
    nodes.add_argument("--nodes", required=True, metavar="N|MIN-MAX", help="machines; any count of a range must do")
    nodes.add_argument(
        "--gpus-per-node",
        required=True,
        metavar="[TYPE:]G",
        help="GPUs, hence ranks, of a machine; 0 on a cluster without",
    )
    nodes.add_argument("--tasks-per-node", type=int, metavar="K", help="ranks of a machine without GPUs")
    nodes.add_argument("--cpus-per-task", type=int, metavar="C", help="cores of a rank (default 8; without GPUs 1)")
    nodes.add_argument("--time", required=True, help="limit of one start of training: 24:00:00, 2-12, 90 (minutes)")
    for name, text in PLACES.items():
        default = f" (default: SBATCH_{name.upper()} of the environment)" if name in FROM_ENVIRONMENT else ""
        nodes.add_argument(f"--{name}", help=text + default)
    nodes.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other option of sbatch: mail-type=FAIL"
    )
    stages = parser.add_argument_group("stages")
    stages.add_argument(
        "--stages", help="of preprocess,train,evaluate (default: all that there is something to do for)"
    )
    stages.add_argument(
        "--task", action="append", metavar="FOLDER", help="to evaluate on; repeatable (default: evaluation.tasks)"
    )
    stages.add_argument(
        "--evaluate-options",
        metavar="OPTIONS",
        help="of bge-icl evaluate: --evaluate-options='--num-examples 2' (default: the environment's BGE_ICL_EVALUATE)",
    )
    stages.add_argument("--preprocess-tasks", type=int, default=8, metavar="N", help="processes, one core each (8)")
    stages.add_argument("--preprocess-time", default="04:00:00", metavar="TIME", help="(default 04:00:00)")
    stages.add_argument("--evaluate-time", default="04:00:00", metavar="TIME", help="(default 04:00:00)")
    for stage in ("preprocess", "evaluate"):
        stages.add_argument(
            f"--{stage}-partition",
            default="",
            metavar="NAME",
            help="a partition of its own: --account goes along; --qos, --constraint, --exclude and the GPUs' type do "
            "not, they are of training's (default: the same places as training)",
        )
    coming_back = parser.add_argument_group("coming back")
    coming_back.add_argument("--exclude-bad-nodes", action="store_true", help="requeue without nodes found bad")
    coming_back.add_argument(
        "--max-stuck", type=int, default=3, metavar="N", help="starts that gain no step, before the job gives up (3)"
    )
    coming_back.add_argument(
        "--lead",
        type=int,
        metavar="SECONDS",
        help="signal so long before the time limit (default: 300, or what it takes)",
    )
    container = parser.add_argument_group("container")
    container.add_argument(
        "--container", default="", metavar="OPTIONS", help="of srun: --container='--container-image=/images/x.sqsh'"
    )
    container.add_argument(
        "--wrap", default="", metavar="COMMAND", help="before python: 'apptainer exec --nv /images/x.sif'"
    )
    estimate = parser.add_argument_group("estimate", "defaults: those of bge-icl plan --estimate")
    for name, (kind, text) in ESTIMATE.items():
        estimate.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N", help=text)
    estimate.add_argument(
        "--storage-mb-per-s",
        type=float,
        default=200.0,
        metavar="N",
        help="to the run folder, MB/s, checksums counted (200)",
    )


def read_options(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Options:
    """The flags as values; ValueError for one that makes no sense by itself or beside another."""
    nodes = parse_nodes(arguments.nodes)
    gpu_type, gpus = _parse_gpus(arguments.gpus_per_node)
    tasks = arguments.tasks_per_node
    if gpus == 0 and tasks is None:
        raise ValueError("--gpus-per-node 0 needs --tasks-per-node: the ranks of a machine without GPUs")
    if gpus and tasks not in (None, gpus):
        raise ValueError(f"--tasks-per-node {tasks}: with --gpus-per-node {gpus} there is one rank a GPU; leave it out")
    cpus = (8 if gpus else 1) if arguments.cpus_per_task is None else arguments.cpus_per_task
    numbers = {"tasks-per-node": tasks or gpus, "cpus-per-task": cpus, "max-stuck": arguments.max_stuck}
    numbers |= {"preprocess-tasks": arguments.preprocess_tasks, "storage-mb-per-s": arguments.storage_mb_per_s}
    numbers |= {"lead": 1 if arguments.lead is None else arguments.lead}
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} {value} must be above 0")
    time = {"train": arguments.time}
    time |= {"preprocess": arguments.preprocess_time, "evaluate": arguments.evaluate_time}
    for stage, text in time.items():
        parse_time("--time" if stage == "train" else f"--{stage}-time", text)
    known = {name: environment.get(f"SBATCH_{name.upper()}", "") for name in FROM_ENVIRONMENT}
    found = {name: getattr(arguments, name) or known.get(name, "") for name in PLACES}
    partitions = {"preprocess": arguments.preprocess_partition, "evaluate": arguments.evaluate_partition}
    options = Options(
        nodes=nodes,
        gpus_per_node=gpus,
        gpu_type=gpu_type,
        tasks_per_node=tasks or gpus,
        cpus_per_task=cpus,
        time={stage: time[stage] for stage in STAGES},
        places={name: value for name, value in found.items() if value},
        partitions={stage: name for stage, name in partitions.items() if name},
        container=arguments.container,
        wrap=arguments.wrap,
        extra=tuple(_extra(text) for text in arguments.sbatch),
        exclude_bad_nodes=arguments.exclude_bad_nodes,
        max_stuck=arguments.max_stuck,
        lead=arguments.lead,
        preprocess_tasks=arguments.preprocess_tasks,
        evaluate_options=arguments.evaluate_options or environment.get("BGE_ICL_EVALUATE", ""),
        storage_mb_per_s=arguments.storage_mb_per_s,
    )
    lines = {"--container": options.container, "--wrap": options.wrap, "--evaluate-options": options.evaluate_options}
    lines |= {f"--{name}": value for name, value in options.places.items()}
    lines |= {f"--{stage}-partition": name for stage, name in options.partitions.items()}
    for flag, value in lines.items():
        require_one_line(flag, value)
    for flag in ("--container", "--wrap", "--evaluate-options"):
        require_absolute(flag, lines[flag])
    return options


def require_one_line(name: str, value: str) -> None:
    """ValueError for a line break or another control character: it would end a line of the job text."""
    if any(ord(character) < 32 for character in value):
        raise ValueError(f"{name}={value!r} holds a control character, which a job text cannot hold; leave it out")


def require_absolute(flag: str, words: str) -> None:
    """ValueError for a relative path among the words: jobs run elsewhere, and would look for it there."""
    for path in re.split(r"[\s=:,]+", words):  # also in NAME=PATH and in mounts, FROM:TO,FROM:TO
        is_dotted = path.startswith(("./", "../"))
        looks_like_path = not path.startswith("/") and ("/" in path or path.endswith(IMAGES))
        if is_dotted or (looks_like_path and os.path.exists(path)):
            raise ValueError(
                f"{flag} {words!r}: {path} is relative to this folder, and jobs run in the copy of the code in the run "
                f"folder; write {os.path.abspath(path)}"
            )


def parse_nodes(text: str) -> tuple[int, int]:
    """(fewest, most) of `4` or `2-4`; ValueError otherwise."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < least <= most:
        raise ValueError(f"--nodes {text!r} must be a number, or a range such as 2-4")
    return least, most


def _parse_gpus(text: str) -> tuple[str, int]:
    """(type, number) of `8` or `h200:8`."""
    kind, _, number = text.rpartition(":")
    if not re.fullmatch(r"\d+", number) or not re.fullmatch(r"[\w.-]*", kind):
        raise ValueError(f"--gpus-per-node {text!r} must be a number, or type:number such as h200:8")
    return kind, int(number)


def _extra(text: str) -> str:
    """An option of sbatch with its dashes; ValueError for one that the job text has by itself."""
    option = text if text.startswith("-") else f"--{text}"
    name = re.split(r"[=\s]", option, maxsplit=1)[0]
    name = name if name.startswith("--") else SHORT.get(name[:2], name)
    if name in OWN:
        raise ValueError(f"--sbatch {text!r}: submit sets {name} itself; {OWN[name]}")
    require_one_line("--sbatch", option)
    return option


def choose_stages(asked: str | None, has_store: bool, num_tasks: int) -> tuple[str, ...]:
    """Stages in their order: those asked for, or all that there is something to do for."""
    if asked is None:
        needed = {"preprocess": not has_store, "train": True, "evaluate": num_tasks > 0}
        return tuple(stage for stage in STAGES if needed[stage])
    names = [name.strip() for name in asked.split(",")]
    if unknown := [name for name in names if name not in STAGES]:
        raise ValueError(f"--stages {asked}: {unknown[0]!r} is unknown; known: {', '.join(STAGES)}")
    if "evaluate" in names and not num_tasks:
        raise ValueError(f"--stages {asked}: there is nothing to evaluate on; name folders with --task")
    return tuple(stage for stage in STAGES if stage in names)
