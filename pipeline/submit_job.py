"""Submit a run to SLURM: preprocess -> train -> evaluate as one chain of jobs, after all checks that can be made.

A reranker's recipe (model.kind) makes a chain of preprocess -> train: `bge-icl rerank` evaluates it afterwards.
`--dry-run` shows the checks, the plan and each job text, and changes nothing. Otherwise the run folder gets a copy of
code, recipe and DeepSpeed JSON (jobs/<time>-<commit>/), so that editing the checkout cannot change a job that waits. A
job that is preempted, reaches its time limit or loses a node comes back by itself and goes on where it was.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.cluster.checks import check_run
from pipeline.cluster.facts import Facts, find_facts
from pipeline.cluster.findings import error_line, table, tried
from pipeline.cluster.job_text import Job, make_jobs
from pipeline.cluster.options import add_flags, read_options
from pipeline.cluster.sbatch import cancel, check_cluster, submit
from pipeline.cluster.snapshot import difference, read_bodies, read_commit, script_of, write_snapshot
from pipeline.cluster.wording import count
from pipeline.files import locked, write_text
from pipeline.settings import load_settings


def run(arguments: argparse.Namespace) -> None:
    """Check, show, submit; user errors are ValueErrors."""
    settings = load_settings(arguments.config, arguments.overrides)
    options = read_options(arguments, os.environ)
    facts = find_facts(settings, options, arguments)
    commit, changes = read_commit()
    folder = facts.run / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{commit[:7]}"
    origin = " ".join(
        [arguments.config, *arguments.overrides, f"(commit {commit[:7]}{' with changes' * bool(changes)})"]
    )
    bodies = read_bodies(facts.stages)
    jobs = make_jobs(
        facts.stages, bodies, options, facts.run, folder, facts.tasks, facts.lead, origin, settings.model.kind
    )

    print(head(facts, folder, origin))
    findings = check_run(facts)
    findings += tried("slurm", lambda: check_cluster(options, jobs, facts.run, arguments.dry_run))
    print(f"checks\n{table(findings)}", flush=True)
    if arguments.dry_run:
        for i, job in enumerate(jobs):
            print(f"\n{show(facts.run, folder, job, jobs[i - 1].stage if i else '')}")
    if error := error_line(findings):
        raise ValueError(error)
    if arguments.dry_run:
        print("dry run: nothing was written or submitted")
        return
    (facts.run / "jobs").mkdir(parents=True, exist_ok=True)
    with locked(facts.run / "jobs" / "lock", f"another submit is at work on {facts.run}; wait for it"):
        write_snapshot(folder, settings, jobs, commit, changes)
        (facts.run / "attempts").mkdir(exist_ok=True)  # without it a job fails without any log
        record = {"recipe": arguments.config, "overrides": arguments.overrides, "commit": commit, "lead": facts.lead}
        ids = submit_chain(jobs, folder, record | {"options": dataclasses.asdict(options)})
    print(follow(facts.run, folder, jobs, ids))


def submit_chain(jobs: Sequence[Job], folder: Path, record: dict[str, object]) -> list[str]:
    """Submit each job to run after the one before it; submitted.json knows at any moment which ones there are.

    Raises:
        ValueError: sbatch refused one; those before it are taken back.
    """
    ids: list[str] = []
    commands: list[list[str]] = []
    for job in jobs:
        try:
            id, command = submit(script_of(folder, job.stage), ids[-1] if ids else "")
        except ValueError as error:
            done = f"; of the jobs before it: {cancel(ids)}" if ids else "; no other job is queued"
            raise ValueError(f"{error}{done}") from None
        ids, commands = [*ids, id], [*commands, command]
        stages = [job.stage for job in jobs[: len(ids)]]
        known = {"jobs": dict(zip(stages, ids, strict=True)), "sbatch": dict(zip(stages, commands, strict=True))}
        known |= {"logs": {job.stage: log_of(job, id) for job, id in zip(jobs, ids, strict=False)}}
        write_text(folder / "submitted.json", json.dumps(known | record, indent=1) + "\n")
    return ids


def head(facts: Facts, folder: Path, origin: str) -> str:
    """What is to be submitted."""
    options, (least, most) = facts.options, facts.options.nodes
    nodes = count(least, "node") if least == most else f"{least}-{most} nodes"
    ranks = count(options.tasks_per_node, "GPU" if options.gpus_per_node else "task")
    details = {
        "preprocess": f"{count(options.preprocess_tasks, 'task')}, {options.time['preprocess']}",
        "train": f"{nodes} x {ranks}, {options.time['train']} a start",
        "evaluate": f"{count(len(facts.tasks), 'task')}, {options.time['evaluate']} each",
    }
    chain = " -> ".join(f"{stage} ({details[stage]})" for stage in facts.stages)
    lines = [f"submit     {origin}", f"run folder {facts.run}", f"stages     {chain}", f"copy       {folder}"]
    if "train" in facts.stages and "evaluate" not in facts.stages:
        why = "no --task, no evaluation.tasks, or not among --stages"
        if facts.settings.model.kind == "reranker":
            why = "bge-icl rerank scores a reranker, behind a retriever that you name"
        lines.append(f"           nothing is evaluated afterwards: {why}")
    return "\n".join(lines) + "\n"


def show(run: Path, folder: Path, job: Job, after: str) -> str:
    """A job's command line, text, and what differs from the one that was submitted last."""
    dependency = f"--dependency=afterok:<id of {after}> " if after else ""
    parts = [f"==== sbatch --parsable {dependency}{script_of(folder, job.stage)}", job.text.rstrip()]
    if changed := difference(run, folder, job):
        parts.append(f"==== {job.stage}: what differs from the text that was submitted last\n{changed}")
    return "\n".join(parts)


def log_of(job: Job, id: str) -> str:
    """The log's path; of an array with a * for the number of the task."""
    return job.log.replace("%j", id).replace("%A-%a", f"{id}-*")


def follow(run: Path, folder: Path, jobs: Sequence[Job], ids: Sequence[str]) -> str:
    """Ids and logs, and the commands to see how things go."""
    logs = [log_of(job, id) for job, id in zip(jobs, ids, strict=True)]
    lines = [f"{job.stage:<10} job {id}  log {log}" for job, id, log in zip(jobs, ids, logs, strict=True)]
    commands = [["bge-icl", "status", str(run), "--follow"], ["tail", "-F", logs[0]]]
    commands += [["squeue", "-j", ",".join(ids)], ["scancel", *ids]]
    lines += [f"code and job texts: {folder}", "to follow, and to take the jobs back:"]
    return "\n".join(["", *lines, *(f"  {shlex.join(command)}" for command in commands)])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  bge-icl submit --config recipes/bge_en_icl_full.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --dry-run
  bge-icl submit --config r.yaml --nodes 4 --gpus-per-node h200:8 --time 2-00 --partition gpu --account me --task eval/a
  bge-icl submit --config r.yaml --nodes 2-4 --gpus-per-node 8 --time 12:00:00 --exclude-bad-nodes optim.lr=2e-4
  bge-icl submit --config r.yaml --nodes 2 --gpus-per-node 0 --tasks-per-node 1 --time 60 --stages train
  bge-icl submit --config r.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --wrap "apptainer exec --nv /data/bge.sif"
  bge-icl submit --config recipes/reranker_gemma2.yaml --nodes 1 --gpus-per-node 8 --time 24:00:00 --dry-run
Submitting once more after a job has ended goes on from the newest checkpoint. What differs between sites (modules,
environment, interface) stands in slurm/env.sh.""",
    )
    parser.add_argument("--config", required=True, help="recipe YAML; pipeline/settings.py documents every key")
    parser.add_argument("--dry-run", action="store_true", help="show checks, plan and job texts; change nothing")
    add_flags(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the recipe's")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
