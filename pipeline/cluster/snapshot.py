"""What a submission leaves in the run folder, so that editing the checkout cannot change a job that waits.

RUN/jobs/<time>-<commit>/
    code/            pipeline, kernels, ds_configs, slurm, pyproject.toml, setup.py
    recipe.yaml      the settings with all overrides; run.deepspeed names the file beside it
    deepspeed.json
    commit.txt       of the checkout; changes.diff: what differed from it
    train.sh ...     the job texts
    submitted.json   ids, log files and options, once there are any
"""

import difflib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.cluster.job_text import Job
from pipeline.settings import Settings, dump_settings

ROOT = Path(__file__).resolve().parents[2]
CODE = ("pipeline", "kernels", "ds_configs", "slurm", "pyproject.toml", "setup.py")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
UNKNOWN = "unknown"


def read_bodies(stages: Sequence[str]) -> dict[str, str]:
    """Stage -> text of its job script; ValueError where the code is no checkout."""
    files = {stage: ROOT / "slurm" / f"{stage}.sbatch" for stage in stages}
    for file in files.values():
        if not file.is_file():
            raise ValueError(f"{file} does not exist: submit from a checkout of the repository, not from a wheel")
    return {stage: file.read_text(encoding="utf-8") for stage, file in files.items()}


def read_commit() -> tuple[str, str]:
    """(commit, what differs from it as a diff, files that git does not know by name) of the checkout."""
    top = _git("rev-parse", "--show-toplevel").strip()
    # A copy of the code below another checkout is not of that one's commit.
    if not top or Path(top) != ROOT:
        return UNKNOWN, ""
    new = _git("ls-files", "--others", "--exclude-standard", "--", *CODE).splitlines()
    notes = "".join(f"# not in git, in the copy: {name}\n" for name in new)
    return _git("rev-parse", "HEAD").strip() or UNKNOWN, _git("diff", "HEAD") + notes


def _git(*arguments: str) -> str:
    """git's answer about the checkout, or nothing."""
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


def write_snapshot(folder: Path, settings: Settings, jobs: Sequence[Job], commit: str, changes: str) -> None:
    """Fill a new `folder`; OSError where it cannot be written, and then nothing of it is left."""
    folder.mkdir(parents=True)
    try:
        for name in CODE:
            source, copy = ROOT / name, folder / "code" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copy, ignore=LEFT_OUT)
            else:
                shutil.copy2(source, copy)
        if (ROOT / ".venv").is_dir():  # slurm/env.sh looks for it in its working directory
            os.symlink((ROOT / ".venv").resolve(), folder / "code" / ".venv")
        sharding = folder / "deepspeed.json"
        shutil.copyfile(settings.run.deepspeed, sharding)
        resolved = replace(settings, run=replace(settings.run, deepspeed=str(sharding)))
        (folder / "recipe.yaml").write_text(dump_settings(resolved), encoding="utf-8")
        (folder / "commit.txt").write_text(commit + "\n", encoding="utf-8")
        (folder / "changes.diff").write_text(changes, encoding="utf-8")
        for job in jobs:
            script_of(folder, job.stage).write_text(job.text, encoding="utf-8")
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def script_of(folder: Path, stage: str) -> Path:
    """Where a stage's job text lies."""
    return folder / f"{stage}.sh"


def submissions(run: Path) -> list[Path]:
    """Folders of what was submitted, oldest first."""
    return sorted(path.parent for path in run.glob("jobs/*/submitted.json"))


def difference(run: Path, folder: Path, job: Job) -> str:
    """What differs from the text that was submitted last for this stage; empty: nothing, or there was none."""
    texts = [script_of(before, job.stage) for before in submissions(run)]
    last = next((text for text in reversed(texts) if text.is_file()), None)
    if last is None:
        return ""
    # Each submission has a folder of its own: that is no difference.
    before = last.read_text(encoding="utf-8").replace(str(last.parent), "FOLDER").splitlines()
    now = job.text.replace(str(folder), "FOLDER").splitlines()
    return "\n".join(difflib.unified_diff(before, now, str(last), f"{job.stage}.sh now", lineterm="", n=1))
