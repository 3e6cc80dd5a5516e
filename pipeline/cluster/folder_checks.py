"""Checks of the run folder: free, of this recipe, with room for checkpoints, where all nodes see it."""

import os
import shutil
from pathlib import Path

from pipeline.cluster.disk import disk_need
from pipeline.cluster.facts import Facts
from pipeline.cluster.findings import NOTE, OK, UNCHECKED, Finding
from pipeline.cluster.options import require_one_line
from pipeline.cluster.run_folder import is_trained
from pipeline.cluster.wording import count, join_words
from pipeline.files import file_sha256, take_lock
from pipeline.settings import flatten, load_settings

SHOWN_CHANGES = 3
LOCAL_FOLDERS = ("/tmp/", "/var/tmp/", "/dev/shm/")  # of each node its own


def check_run_folder(facts: Facts) -> list[Finding]:
    """The run folder can be written, is free, and is not another recipe's."""
    run, settings = facts.run, facts.settings
    for name, path in (("run.output_dir", str(run)), ("data.store", settings.data.store)):
        require_one_line(name, path)
    if found := [character for character in "%\\" if character in str(run)]:
        raise ValueError(
            f"run.output_dir={run}: SLURM reads a {found[0]} in the name of a log as a sign of its own; name another"
            " folder"
        )
    if run.exists() and not run.is_dir():
        raise ValueError(f"run.output_dir={run} is a file; name a folder")
    there = next(path for path in (run, *run.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"run.output_dir={run}: {there} cannot be written by this user; name another folder")
    lock = run / "lock"
    if lock.exists():
        held = take_lock(lock)
        if held is None:
            raise ValueError(f"a running process writes to run.output_dir={run}; wait for it, or name another folder")
        held.close()
    state = "is new" if there != run else "is free"
    return [Finding(OK, "run folder", f"{run} {state}"), *_require_same_recipe(facts)]


def _require_same_recipe(facts: Facts) -> list[Finding]:
    """ValueError where the newest checkpoint, or the finished model, is of other settings or of another store; a note
    where only a start was, of which nothing is left.
    """
    started = facts.run / "settings.yaml"
    if facts.newest is None and not started.is_file():
        return []
    from pipeline.runtime.checkpoint import MAY_CHANGE, require_same_run  # torch: only where there is something

    if facts.newest is not None and (facts.newest / "state.json").is_file():
        manifest = Path(facts.settings.data.store) / "manifest.json"
        inputs = {"data.store": file_sha256(manifest)} if manifest.is_file() else {}
        require_same_run(facts.newest, facts.settings, inputs)
    elif started.is_file():
        before, now = flatten(load_settings(started)), flatten(facts.settings)
        changed = [key for key in before if key not in MAY_CHANGE and now[key] != before[key]]
        if changed and (facts.newest is not None or is_trained(facts.run)):
            raise ValueError(
                f"run.output_dir={facts.run} belongs to another recipe: {started} has {changed[0]}="
                f"{before[changed[0]]!r}, this one {now[changed[0]]!r}; undo that, or use another run.output_dir"
            )
        if changed:
            some = ", ".join(f"{key}: {before[key]!r} -> {now[key]!r}" for key in changed[:SHOWN_CHANGES])
            more = f" and {len(changed) - SHOWN_CHANGES} more" if len(changed) > SHOWN_CHANGES else ""
            text = f"was started with other settings ({some}{more}) and has no checkpoint: training begins anew"
            return [Finding(NOTE, "run folder", text)]
    return []


def check_resume(facts: Facts) -> list[Finding]:
    """Where training will go on."""
    if facts.newest is None:
        return [Finding(OK, "resume", "there is no checkpoint: training starts at step 0")]
    text = f"training goes on after step {facts.done_steps:,}: {facts.newest} (its checksums are read then)"
    if facts.total_steps is not None and facts.done_steps >= facts.total_steps:
        text = f"all {facts.total_steps:,} steps are done ({facts.newest}): the job would only write the model again"
    return [Finding(OK if facts.done_steps else NOTE, "resume", text)]


def check_disk(facts: Facts) -> list[Finding]:
    """Room for the checkpoints to come and the model."""
    saving = facts.saving
    there = next(path for path in (facts.run, *facts.run.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if saving is None:
        return [Finding(UNCHECKED, "disk", f"{free / 1e9:,.1f} GB free; a checkpoint's size: {facts.no_saving}")]
    coming, need = disk_need(facts.settings.run, saving.num_bytes)
    parts = f"{count(coming, 'more checkpoint')} of {saving.num_bytes / 1e9:,.3f} GB ({saving.source}) and the model"
    if free < need:
        raise ValueError(f"{there} has {free / 1e9:,.1f} GB free, and {parts} need {need / 1e9:,.1f}; free some")
    return [Finding(OK, "disk", f"{parts}, {free / 1e9:,.1f} GB free")]


def check_places(facts: Facts) -> list[Finding]:
    """A note where every node has a folder of its own under a name that all must share."""
    paths = (str(facts.run), facts.settings.data.store, facts.settings.model.name)
    local = [path for path in paths if any(f"{path}/".startswith(folder) for folder in LOCAL_FOLDERS)]
    if not local:
        return []
    text = f"{join_words(local)}: folders below {', '.join(LOCAL_FOLDERS)} are mostly each node's own"
    return [Finding(NOTE, "shared", f"{text}; jobs need what all nodes share")]
