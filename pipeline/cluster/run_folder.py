"""The files of a run's folder, read while the run writes them: any may be missing, empty, or end in half a line.

What cannot be read is left out; damaged lines of metrics.jsonl are counted.
"""

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAIL_BYTES = 1 << 18  # of metrics.jsonl: some hundred steps
RECENT_STEPS = 20


@dataclass(frozen=True)
class Progress:
    """The end of metrics.jsonl; rates are medians of the last `counted` steps."""

    step: int  # steps done
    total_steps: int
    epoch: int
    dataset: str  # of the last step
    loss: float | None  # of the last step; None: it was not finite
    mean_loss: float | None
    step_seconds: float
    queries_per_second: float
    tokens_per_second: float
    counted: int
    seconds_left: float  # of the steps alone, without evaluations and checkpoints
    damaged_lines: int


@dataclass(frozen=True)
class Attempt:
    """One start of a job; None and "": not known (yet)."""

    name: str  # <job id>.<restart>
    stage: str  # preprocess, train or evaluate
    started: float  # seconds since 1970
    nodes: tuple[str, ...]
    ranks: int  # that have a log
    before: int | None  # steps in the newest checkpoint at the start
    code: int | None  # the trainer's exit code
    steps: int | None  # done at the end
    reason: str
    verdict: str  # one line, which begins with done, requeued, gave up, failed or stopped

    @property
    def job(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def is_final(self) -> bool:
        """Whether its script has ended without asking for another attempt."""
        return bool(self.verdict) and not self.verdict.startswith("requeued")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    name: str
    step: int
    written: float  # seconds since 1970


# metrics.jsonl, checkpoints, scores.


def read_progress(metrics: Path) -> Progress | None:
    """The end of metrics.jsonl; None where no step is done."""
    rows, damaged_lines = read_steps(metrics)
    if not rows:
        return None
    last, recent = rows[-1], rows[-RECENT_STEPS:]
    losses = [float(row["loss"]) for row in recent if _is_number(row.get("loss"))]
    step, total, seconds = last["step"] + 1, last["total_steps"], _median(recent, "seconds")
    return Progress(
        step=step,
        total_steps=total,
        epoch=int(last.get("epoch") or 0),
        dataset=str(last.get("dataset", "")),
        loss=float(last["loss"]) if _is_number(last.get("loss")) else None,
        mean_loss=statistics.fmean(losses) if losses else None,
        step_seconds=seconds,
        queries_per_second=_median(recent, "queries_per_second"),
        tokens_per_second=_median(recent, "tokens_per_second"),
        counted=len(recent),
        seconds_left=seconds * max(0, total - step),
        damaged_lines=damaged_lines,
    )


def read_steps(metrics: Path) -> tuple[list[dict[str, Any]], int]:
    """(the last steps in metrics.jsonl, the number of lines between them that are none)."""
    lines = whole_lines(metrics)
    rows = [row for line in lines if _is_step(row := _object(line))]
    return rows, len(lines) - len(rows)


def _object(line: str) -> dict[str, Any]:
    """A line of JSON, or an empty mapping where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _is_step(row: dict[str, Any]) -> bool:
    counts = ("step", "total_steps", "chunks")
    return all(type(row.get(name)) is int for name in counts) and _is_number(row.get("seconds"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _median(rows: Iterable[dict[str, Any]], name: str) -> float:
    values = [float(row[name]) for row in rows if _is_number(row.get(name))]
    return statistics.median(values) if values else 0.0


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete one: it is renamed to its name when all of it is on disk."""
    steps = {path: int(path.name[5:]) for path in entries(folder) if re.fullmatch(r"step-\d+", path.name)}
    if not steps:
        return None
    path = max(steps, key=lambda path: steps[path])
    return Checkpoint(path.name, steps[path], read_mtime(path / "state.json") or read_mtime(path) or 0.0)


def read_scores(path: Path) -> tuple[dict[str, float], int]:
    """("label mode" -> mean over its tasks, number of tasks); nothing where there is no file, or a damaged one."""
    values: dict[str, list[float]] = {}
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        for score in scores:
            values.setdefault(f"{score['model']} {score['mode']}", []).append(float(score["value"]))
        return {name: statistics.fmean(some) for name, some in values.items()}, len({s["task"] for s in scores})
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return {}, 0


def is_trained(run: Path) -> bool:
    """Whether training has ended well: model/ is renamed to its name when all of it is on disk."""
    return holds_embedder(run) or (run / "model" / "reranker.json").is_file()


def holds_embedder(run: Path) -> bool:
    """Whether there is a finished embedder, which tasks can be scored with."""
    return (run / "model" / "embedder.json").is_file()


# attempts/ and jobs/.


def read_attempts(run: Path) -> tuple[Attempt, ...]:
    """All starts of the run's jobs, oldest first."""
    folders = [path for path in entries(run / "attempts") if re.fullmatch(r"\d+(_\d+)?\.\d+", path.name)]

    def order(attempt: Attempt) -> tuple[float, list[int]]:
        # By time: job ids begin anew where a cluster is set up again.
        return attempt.started, [int(number) for number in re.findall(r"\d+", attempt.name)]

    return tuple(sorted((_read_attempt(folder) for folder in folders), key=order))


def _read_attempt(folder: Path) -> Attempt:
    end = re.fullmatch(r"(-?\d+|-) (\d+|-) ?(.*)", _first_line(folder / "end"))
    code, steps, reason = end.groups() if end else ("-", "-", "")
    before = _first_line(folder / "before")
    return Attempt(
        name=folder.name,
        stage=_stage(folder),
        started=read_mtime(folder / "before") or read_mtime(folder) or 0.0,
        nodes=tuple(whole_lines(folder / "nodes")),
        ranks=len(rank_logs(folder)),
        before=int(before) if before.isdecimal() else None,
        code=None if code == "-" else int(code),
        steps=None if steps == "-" else int(steps),
        reason=reason,
        verdict=_first_line(folder / "verdict"),
    )


def _stage(folder: Path) -> str:
    """What an attempt is for: by the report of its preflight, else by its job's name."""
    if found := re.match(r"check of the nodes for (\w+):", _first_line(folder / "preflight.txt")):
        return found[1]
    named = "".join(line for line in whole_lines(folder / "env.txt") if line.startswith("SLURM_JOB_NAME="))
    return next((stage for stage in ("preprocess", "evaluate") if stage in named), "train")


def rank_logs(attempt: Path) -> dict[int, Path]:
    """Rank -> its log, in order of ranks."""
    found = {path: re.fullmatch(r"rank-(\d+)\.log", path.name) for path in entries(attempt)}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def submitted_jobs(run: Path) -> list[str]:
    """Ids of the jobs that `bge-icl submit` has queued for the run, in the order of submissions."""
    ids: list[str] = []
    for folder in entries(run / "jobs"):
        try:
            record = json.loads((folder / "submitted.json").read_text(encoding="utf-8"))
            ids += [str(job) for job in record["jobs"].values() if re.fullmatch(r"\d+", str(job))]
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not submitted (a dry run), or not yet
    return ids


# Files.


def whole_lines(path: Path, num_bytes: int = TAIL_BYTES) -> list[str]:
    """The lines that are whole among a file's last bytes; none where there is no file."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, 2) - num_bytes)
            file.seek(start)
            lines = file.read().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [line.decode("utf-8", errors="replace") for line in lines[bool(start) : -1]]


def _first_line(path: Path) -> str:
    lines = whole_lines(path)
    return lines[0].strip() if lines else ""


def entries(folder: Path) -> list[Path]:
    """What is in a folder, in order of names; nothing where there is none."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_mtime(path: Path) -> float | None:
    """When a file was last written, in seconds since 1970; None where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None
