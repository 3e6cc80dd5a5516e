"""The text of a job: its #SBATCH lines, its variables, its arguments, and the body of slurm/<stage>.sbatch."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.options import Options
from pipeline.cluster.wording import parse_time
from pipeline.files import safe_name
from pipeline.settings import ENTRIES

PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=:;,./@%[]&")


@dataclass(frozen=True)
class Job:
    """One stage as it is submitted."""

    stage: str
    text: str
    log: str  # path with SLURM's patterns in it, %j the job's id
    array: int = 0  # tasks of an array; 0: it is none


def make_jobs(
    stages: Sequence[str],
    bodies: dict[str, str],
    options: Options,
    run: Path,
    folder: Path,
    tasks: Sequence[str],
    lead: int,
    origin: str,
    kind: str,
) -> list[Job]:
    """The jobs of the stages.

    Args:
        bodies: stage -> text of slurm/<stage>.sbatch.
        folder: of this submission: code/ and recipe.yaml lie there.
        lead: seconds from the signal to the time limit of training.
        origin: what it was made from, in words, for the head of each text.
        kind: what is trained (model.kind).
    """
    arguments = {stage: [str(folder / "recipe.yaml")] for stage in ("preprocess", "train")}
    arguments["evaluate"] = [str(run), *tasks]
    jobs = []
    for stage in stages:
        array = len(tasks) if stage == "evaluate" else 0
        name = f"{safe_name(run.name)}-{stage}"
        pattern = f"{name}-%A-%a.log" if array else f"{name}-%j.log"
        log = str(run / "attempts" / pattern)
        lines = [
            "#!/usr/bin/env bash",
            f"# bge-icl submit: {stage} of {' '.join(origin.split())}",
            "# It runs the copy of the code beside it: later edits of the checkout do not reach it.",
            *(f"#SBATCH {_quoted(line)}" for line in _sbatch_lines(stage, options, name, log, folder, array, lead)),
            "",
            *_variables(stage, options, run, kind),
            f"set -- {shlex.join(arguments[stage])}",
            "",
            body_of(bodies[stage]),
        ]
        jobs.append(Job(stage, "\n".join(lines), log, array))
    return jobs


def body_of(script: str) -> str:
    """A job script from its first command on: its comments and #SBATCH lines stand together above."""
    lines = script.splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    return "\n".join(lines[first:]) + "\n"


def _sbatch_lines(stage: str, options: Options, name: str, log: str, folder: Path, array: int, lead: int) -> list[str]:
    """Options of sbatch for a stage, one each."""
    lines = [f"--job-name={name}", *_shape(stage, options), f"--time={options.time[stage]}"]
    lines += [f"--{place}={value}" for place, value in options.places_of(stage).items()]
    if array:
        lines.append(f"--array=0-{array - 1}")
    if stage != "train":  # nothing has to be saved: what is finished is kept as it is
        lead = int(min(60, parse_time(f"--{stage}-time", options.time[stage]) / 2))
    lines += [f"--signal=B:USR1@{lead}", "--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes"]
    return [*lines, f"--chdir={folder / 'code'}", f"--output={log}", *options.extra]


def _shape(stage: str, options: Options) -> list[str]:
    """Nodes, tasks, cores and GPUs."""
    # The type is that of training's nodes; another partition may have others.
    kind = f"{options.gpu_type}:" if options.gpu_type and stage not in options.partitions else ""
    if stage == "preprocess":
        cpus = options.cpus_per_task if options.preprocess_tasks == 1 else 1
        return [f"--ntasks={options.preprocess_tasks}", f"--cpus-per-task={cpus}"]
    if stage == "evaluate":
        gpus = [f"--gpus-per-node={kind}1"] if options.gpus_per_node else []
        return ["--nodes=1", "--ntasks=1", *gpus, f"--cpus-per-task={options.cpus_per_task}"]
    least, most = options.nodes
    lines = [f"--nodes={least if least == most else f'{least}-{most}'}", f"--ntasks-per-node={options.tasks_per_node}"]
    if options.gpus_per_node:
        lines.append(f"--gpus-per-node={kind}{options.gpus_per_node}")
    return [*lines, f"--cpus-per-task={options.cpus_per_task}"]


def _variables(stage: str, options: Options, run: Path, kind: str) -> list[str]:
    """What the body reads; what is left out is for slurm/env.sh to say."""
    values = {"BGE_ICL_RUN": str(run), "BGE_ICL_MAX_STUCK": str(options.max_stuck)}
    values["BGE_ICL_EXCLUDE"] = str(int(options.exclude_bad_nodes))
    values |= {"BGE_ICL_CONTAINER": options.container} if options.container else {}
    values |= {"BGE_ICL_WRAP": options.wrap} if options.wrap else {}
    if stage == "evaluate" and options.evaluate_options:
        values["BGE_ICL_EVALUATE"] = options.evaluate_options
    if stage == "train" and kind != "embedder":  # whose entry the body has
        values["BGE_ICL_ENTRY"] = ENTRIES[kind]
    if stage == "train" and options.nodes[0] < options.nodes[1]:
        values["BGE_ICL_MIN_NODES"] = str(options.nodes[0])
    values |= {} if options.gpus_per_node else {"DS_ACCELERATOR": "cpu"}
    return [f"export {name}={shlex.quote(value)}" for name, value in values.items()]


def _quoted(line: str) -> str:
    """An option as sbatch reads it back from a #SBATCH line: spaces end a word there and # ends the line, quotes join,
    and a backslash takes the next character as it is, inside quotes too.
    """
    name, separator, value = line.partition("=")
    if set(value) <= PLAIN:
        return line
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{separator}"{escaped}"'
