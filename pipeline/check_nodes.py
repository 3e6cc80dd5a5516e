"""Check the nodes of a job before its work: `srun python pipeline/check_nodes.py --for train --config RECIPE`.

Run with the tasks that the work will have. Each looks around on its node (versions of code and libraries, token store,
tokenizer, base model, disk, GPU); then all of them meet, the first one compares what they found, and they sum a tensor
over all ranks. Takes seconds, and who does not answer is named. Exit code 2: something is wrong, in one line each; the
nodes at fault, if not all are, stand in bad_nodes of the attempt's folder, from where the job script takes them.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.cluster.node_checks import (
    GIB,
    FirstTaskLost,
    describe,
    judge,
    look_around,
    node_name,
    require_space,
)
from pipeline.cluster.options import STAGES
from pipeline.files import exit_code, file_sha256, take_lock
from pipeline.settings import Settings, load_settings

PATIENCE = 300.0  # seconds that the slowest node may need: a first import of torch over a busy network


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python pipeline/check_nodes.py --for train --config recipe.yaml
  python pipeline/check_nodes.py --for preprocess --config recipe.yaml     (this machine alone)""",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--for", dest="stage", choices=STAGES, help="the work to come")
    what.add_argument(
        "--copy-store", type=Path, metavar="FOLDER", help="copy the token store into a folder of this node's own disk"
    )
    parser.add_argument("--config", required=True, help="recipe YAML; pipeline/settings.py documents every key")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds to wait for a task (%(default).0f)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the recipe's")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        settings = load_settings(arguments.config, arguments.overrides)
    except (ValueError, OSError) as error:
        if os.environ.get("SLURM_PROCID", "0") == "0" and exit_code(error) == 2:
            report([f"  error: {error}"])  # a verdict: the job need not come back for it
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if arguments.copy_store:
            try:
                copy = copy_store(Path(settings.data.store), arguments.copy_store)
            except (ValueError, OSError) as error:
                raise ValueError(f"{node_name()}: {error}") from error
            if os.environ.get("SLURM_PROCID", "0") == "0":
                leave_word("node_store", f"{copy}\n")
            return 0
        return check(arguments.stage, settings, arguments.patience)
    except FirstTaskLost as error:
        leave_word(f"unreached.{node_name()}", f"{error}\n")
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(stage: str, settings: Settings, patience: float) -> int:
    """Look around, meet, compare; 0 if all is well on every node, else 2."""
    # Late: a wrong command line should not have to wait for torch.
    from pipeline.cluster.meeting import announce, collect, measure_all_reduce, open_meeting, take_place, tell

    started = time.monotonic()
    ranks = take_place()
    store = open_meeting(ranks, patience)
    tell(store, look_around(stage, settings, ranks.rank, ranks.world_size))
    verdict = ""
    if ranks.is_first:
        found, missing = collect(store, ranks, patience)
        lines, bad_nodes = judge(found, missing)
        verdict = "bad" if lines else "good"
        nodes = len({task.host for task in found} | set(missing.values()))
        report([f"check of the nodes for {stage}: {ranks.world_size} tasks on {nodes} nodes", *describe(found)])
        of_tasks = [task for task in found if task.faults]
        only_faults = len(lines) == sum(len(task.faults) for task in of_tasks)
        blame(lines, bad_nodes, may_pass=only_faults and all(task.may_pass for task in of_tasks))
    good = announce(store, ranks, "verdict", verdict, 2 * patience) == "good"
    if good and stage == "train" and ranks.world_size > 1:
        speed = measure_all_reduce(store, ranks, patience)
        if ranks.is_first:
            report([f"  {'all-reduce':<13} {speed}"])
        announce(store, ranks, "all-reduce", "done", patience)
    if good and ranks.is_first:
        report([f"  all is well after {time.monotonic() - started:.1f} s"])
    return 0 if good else 2


def report(lines: Sequence[str]) -> None:
    """Print lines, and add them to preflight.txt of the attempt."""
    text = "".join(line + "\n" for line in lines)
    print(text, end="", flush=True)
    if folder := os.environ.get("BGE_ICL_ATTEMPT"):
        with (Path(folder) / "preflight.txt").open("a", encoding="utf-8") as file:
            file.write(text)


def blame(lines: Sequence[str], bad_nodes: dict[str, str], may_pass: bool) -> None:
    """Say what is wrong, and leave the names of bad nodes for the job script; what may pass does not end a job."""
    for line in lines:
        print(f"error: {line}", file=sys.stderr, flush=True)
    if lines:
        report([f"  {'away' if may_pass else 'error'}: {line}" for line in lines])
    if bad_nodes:
        bad = ",".join(bad_nodes)
        report([f"  the other nodes are well: leave out {bad} (sbatch --exclude; submit --exclude-bad-nodes)"])
        leave_word("bad_nodes", "".join(f"{host} {reason}\n" for host, reason in bad_nodes.items()))


def leave_word(name: str, text: str) -> None:
    """Write a file of the attempt's folder, for the job script."""
    if folder := os.environ.get("BGE_ICL_ATTEMPT"):
        (Path(folder) / name).write_text(text, encoding="utf-8")


def copy_store(source: Path, folder: Path) -> Path:
    """The copy of a token store below `folder`; whole and with the right checksums, or not at all.

    It is named by what is in it: a job that comes back finds it, and so does another job of the same store.
    """
    from pipeline.data.store import open_store

    def is_whole(store: Path) -> bool:
        try:
            open_store(store, verify=True)
        except (ValueError, OSError):
            return False
        return True

    started = time.monotonic()
    target = folder / f"store-{file_sha256(source / 'manifest.json')[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / f"{target.name}.lock", wait=True)
    assert lock is not None, "waited for"
    with lock:
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a job that was killed: the lock is ours
        if not is_whole(target):
            shutil.rmtree(target, ignore_errors=True)
            needed = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
            require_space(folder, needed + GIB, {})
            shutil.copytree(source, partial)
            open_store(partial, verify=True)
            partial.rename(target)
    print(f"{node_name()}: token store at {target}, in {time.monotonic() - started:.1f} s", flush=True)
    return target


if __name__ == "__main__":
    code = main()
    if "torch" in sys.modules:
        from pipeline.runtime.watch import leave

        leave(code)
    raise SystemExit(code)
