"""Talking to SLURM: which partitions there are, which jobs it knows, whether it would take one; submit, take back.

Only sinfo, squeue, sbatch, scancel and srun are asked: sacct does not answer on every site.
"""

import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.cluster.findings import ERROR, NOTE, OK, UNCHECKED, Finding, tried
from pipeline.cluster.job_states import OVER, ask_slurm
from pipeline.cluster.job_text import Job
from pipeline.cluster.options import FROM_ENVIRONMENT, Options
from pipeline.cluster.run_folder import read_attempts, submitted_jobs
from pipeline.cluster.wording import count, format_time, join_words, parse_time

TOOLS = ("sbatch", "squeue", "sinfo", "scancel")
AWAY = ("drain", "down", "fail", "maint", "reserved", "unknown")  # how sinfo's states of such nodes begin
NOT_NOW = "Requested node configuration is not available"  # that no node has, or that all nodes that have it are away
SECONDS = 120  # that a busy controller may take to answer


@dataclass(frozen=True)
class Partition:
    """What sinfo says of one."""

    limit: float  # seconds
    nodes: int
    cpus: int  # of the largest node
    is_default: bool
    away: int  # nodes that take no jobs now


def check_cluster(options: Options, jobs: Sequence[Job], run: Path, dry: bool) -> list[Finding]:
    """What SLURM itself says of the jobs, and of others that belong to the run folder. `dry`: SLURM may be missing."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        what = "partition, limits, account, other jobs of this run, expected start"
        if not dry:
            what = "submit from a login node of a SLURM cluster (module load slurm?); --dry-run shows jobs without it"
        return [Finding(UNCHECKED if dry else ERROR, "slurm", f"{missing[0]} is not on the PATH: {what}")]
    try:
        partitions = read_partitions()
    except ValueError as error:  # a machine with the tools alone, or a controller that is away: nobody would answer
        return [Finding(UNCHECKED if dry else ERROR, "slurm", f"SLURM does not answer: {error}")]
    findings = tried("jobs", lambda: require_free(run))
    findings += check_partitions(partitions, options, [job.stage for job in jobs])
    findings += tried("container", lambda: check_container(options)) if options.container else []
    for job in jobs:
        away = sum(
            partitions[name].away for name in partitions_of(partitions, options, job.stage) if name in partitions
        )
        findings += tried(job.stage, partial(try_job, job, away))
    defaults = [f"SBATCH_{name.upper()}" for name in FROM_ENVIRONMENT]
    if unused := sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in defaults):
        text = f"{', '.join(unused)} of the environment: not used, job texts hold every option; --sbatch adds some"
        findings.append(Finding(NOTE, "slurm", text))
    return findings


def check_partitions(known: Mapping[str, Partition], options: Options, stages: Sequence[str]) -> list[Finding]:
    """The partitions exist, have so many nodes of that size, and do not end jobs before the jobs' own time limits."""
    together = [stage for stage in stages if stage not in options.partitions]
    groups = [together] if together else []
    groups += [[stage] for stage in stages if stage in options.partitions]
    return [found for some in groups for found in tried("partition", partial(check_partition, known, options, some))]


def check_partition(known: Mapping[str, Partition], options: Options, stages: Sequence[str]) -> str:
    """What the partition of these stages, which share it, has to offer; ValueError where that is too little."""
    named = options.places_of(stages[0]).get("partition", "")
    names = partitions_of(known, options, stages[0])
    option = f"--{stages[0]}-partition" if stages[0] in options.partitions else "--partition"
    if not names:
        raise ValueError(f"--partition is not given and there is no default one; known: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name!r} does not exist; known: {', '.join(known)}")
    asked, some = ",".join(names), [known[name] for name in names]
    limit, nodes, cpus = (max(getattr(one, name) for one in some) for name in ("limit", "nodes", "cpus"))
    for stage in stages:
        flag = "--time" if stage == "train" else f"--{stage}-time"
        if parse_time(flag, options.time[stage]) > limit:
            raise ValueError(
                f"{flag} {options.time[stage]} is above the limit of partition {asked}, {format_time(limit)}; lower "
                "it: a job that is not done by then comes back by itself"
            )
    if "train" in stages and options.nodes[0] > nodes:
        raise ValueError(f"--nodes {options.nodes[0]}: partition {asked} has {nodes}; ask for fewer, or name another")
    if "train" in stages and (wanted := options.tasks_per_node * options.cpus_per_task) > cpus:
        raise ValueError(
            f"{options.tasks_per_node} tasks a node with --cpus-per-task {options.cpus_per_task} are {wanted} cores, "
            f"and the largest node of partition {asked} has {cpus}; lower one of them"
        )
    what = f"{asked}{'' if named else ' (the default)'} for {join_words(stages)}"
    return f"{what}: {nodes} nodes, up to {cpus} cores each, time limit {format_time(limit)}"


def partitions_of(known: Mapping[str, Partition], options: Options, stage: str) -> list[str]:
    """Names of the partitions that a stage may run in; none where none is named and there is no default."""
    named = options.places_of(stage).get("partition", "")
    return named.split(",") if named else [name for name in known if known[name].is_default][:1]


def read_partitions() -> dict[str, Partition]:
    """Name -> what sinfo says of a partition, which has a line for each kind and state of nodes."""
    found: dict[str, Partition] = {}
    for line in _ask("sinfo", "--noheader", "--all", "--exact", "--format=%P|%l|%D|%c|%T").splitlines():
        name, limit, nodes, cpus, state = line.strip().split("|")
        unlimited = limit.lower() in ("infinite", "n/a", "unlimited")
        seconds = math.inf if unlimited else parse_time("sinfo's limit", limit)
        before = found.get(name.rstrip("*"))
        found[name.rstrip("*")] = Partition(
            seconds,
            int(nodes) + (before.nodes if before else 0),
            max(int(cpus.rstrip("+")), before.cpus if before else 0),
            name.endswith("*"),
            int(nodes) * state.startswith(AWAY) + (before.away if before else 0),
        )
    return found


def require_free(run: Path) -> list[Finding]:
    """ValueError where a job that belongs to the run folder waits or runs."""
    found, unknown = ask_slurm([*submitted_jobs(run), *(attempt.job for attempt in read_attempts(run))])
    if unknown:
        return [Finding(UNCHECKED, "jobs", f"whether jobs of {run} wait or run: {unknown}")]
    if active := {job.id: job.state for job in found if job.state not in OVER}:
        jobs = ", ".join(f"{id} ({state.lower()})" for id, state in active.items())
        raise ValueError(
            f"run.output_dir={run} is in use by job {jobs}: wait for it (bge-icl status {run}), scancel it, or name "
            "another run.output_dir"
        )
    return [Finding(OK, "jobs", f"no job of {run} waits or runs")]


def check_container(options: Options) -> str:
    """The options of a container are known to this srun: they are of a plugin, pyxis."""
    option = options.container.split("=")[0].split()[0]
    if shutil.which("srun") is not None and option not in _ask("srun", "--help"):
        raise ValueError(
            f"--container: this srun has no {option} (no pyxis here?); use --wrap 'apptainer exec --nv IMAGE'"
        )
    return options.container


def try_job(job: Job, away: int) -> list[Finding]:
    """What sbatch --test-only says of a job: when it would start; ValueError where it would not be taken.

    It refuses a job that has to wait for nodes that are drained or down, too, which sbatch itself takes.
    """
    result = _run(("sbatch", "--test-only"), job.text)
    if result.returncode and away and NOT_NOW in result.stderr:
        where = f"{count(away, 'node')} of the partition drained or down"
        text = (
            f"sbatch --test-only: not now, with {where}; the job waits for them, for ever if none is what it asks for"
        )
        return [Finding(NOTE, job.stage, text)]
    if result.returncode:
        own = ("--job-name", "--output", "--chdir", "--signal", "--requeue", "--open-mode", "--kill-on-invalid-dep")
        options = [line.removeprefix("#SBATCH ") for line in job.text.splitlines() if line.startswith("#SBATCH ")]
        asked = " ".join(option for option in options if not option.startswith(own))
        raise ValueError(f"sbatch --test-only refuses the {job.stage} job ({asked}): {_message(result)}")
    return [Finding(OK, job.stage, f"sbatch --test-only: {_message(result)}")]


def submit(script: Path, after: str) -> tuple[str, list[str]]:
    """(job id, command line) of a job that was submitted, to run when job `after`, if there is one, ended well."""
    command = ["sbatch", "--parsable", *([f"--dependency=afterok:{after}"] if after else []), str(script)]
    result = _run(command)
    if result.returncode:
        raise ValueError(f"{' '.join(command)} failed: {_message(result)}")
    return result.stdout.strip().splitlines()[-1].split(";")[0], command


def cancel(ids: Sequence[str]) -> str:
    """Take jobs back; what became of that, in words."""
    result = _run(("scancel", *ids))
    jobs = " ".join(ids)
    return f"scancel {jobs} failed ({_message(result)}): do it by hand" if result.returncode else f"{jobs} taken back"


def _ask(*command: str) -> str:
    """A tool's output; ValueError where it fails."""
    result = _run(command)
    if result.returncode:
        raise ValueError(f"{command[0]} failed: {_message(result)}")
    return result.stdout


def _run(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Without SBATCH_*, which would have the last word over what the job text says and what was checked."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")}
    try:
        return subprocess.run(
            command, input=text, capture_output=True, text=True, errors="replace", env=environment, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        remedy = "look with squeue whether it took the job" if command[0] == "sbatch" else "try again when it does"
        raise ValueError(f"{command[0]} has had no answer of the controller for {SECONDS} s; {remedy}") from None


def _message(result: subprocess.CompletedProcess[str]) -> str:
    """What a tool says, on one line."""
    lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
    return "; ".join(re.sub(r"^\w+: (error: |fatal: )?", "", line) for line in lines) or "without a word"
