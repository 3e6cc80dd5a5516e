"""The logs of all ranks of an attempt as one: by time where lines tell it, each with its rank in front.

Stages without ranks (preprocess, evaluate) write to their job's log: then that is shown.

Only lines of the logger begin with a time of day. Lines between two of them belong to the one before; what ends a log
(a traceback, say) to the moment when it was last written.
"""

import heapq
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.run_folder import Attempt, entries, rank_logs, read_mtime

MAX_LOG_BYTES = 8 << 20  # of each log, its end
FIRST_LINES = 10  # of each rank, that a follower shows of what was there before
ERROR = re.compile(r"error: |Error: |Error$")
_CLOCK = re.compile(r"(?:\[rank \d+\] )?([01]\d|2[0-3]):([0-5]\d):([0-5]\d) ")
_DAY, _SKEW = 86400, 3600  # seconds; the clocks of nodes and of the file system may differ

Logs = Mapping[str, Path]  # label -> log, in order: rank 0, rank 1, ...
Stamped = tuple[float, int, int, str]  # time, number of the log, number of the line, text


def logs_of(run: Path, attempt: Attempt) -> Logs:
    """The logs of an attempt's ranks; of a stage without ranks its job's."""
    logs = rank_logs(run / "attempts" / attempt.name)
    ending = f"{attempt.stage}-{attempt.job.replace('_', '-')}.log"
    own = {f"job {attempt.job}": path for path in entries(run / "attempts") if path.name.endswith(ending)}
    return {f"rank {rank}": path for rank, path in logs.items()} or own


def merged_lines(logs: Logs) -> Iterator[str]:
    """All logs' lines in order of time."""
    stamped = [_stamp(name, number, path) for number, (name, path) in enumerate(logs.items())]
    yield from (text for _, _, _, text in heapq.merge(*stamped))


def _stamp(name: str, number: int, path: Path) -> list[Stamped]:
    """The lines of a log with their times, which never fall."""
    lines, left_out = read_end(path)
    times = _times([_clock(line) for line in lines], read_mtime(path) or 0.0)
    if left_out:
        lines, times = [f"({left_out:,} bytes before this: {path})", *lines], [times[0] if times else 0.0, *times]
    return [(times[i], number, i, label(name, line)) for i, line in enumerate(lines)]


def _times(clocks: list[int | None], written: float) -> list[float]:
    """Moments of lines, by the times of day that some of them tell and the moment when the last one was written."""
    # They tell no date: so from the last line backwards.
    times, at = [written] * len(clocks), written
    for number in reversed(range(len(clocks))):
        clock = clocks[number]
        if clock is not None:
            at -= (_second_of_day(at) - clock + _SKEW) % _DAY - _SKEW
        times[number] = at
    timed = [number for number, clock in enumerate(clocks) if clock is not None]
    for number in range(1, len(times)):
        if timed and timed[0] < number < timed[-1] and clocks[number] is None:
            times[number] = times[number - 1]
        times[number] = max(times[number], times[number - 1])
    return times


def _clock(line: str) -> int | None:
    """Second of the day that a line of the logger begins with."""
    found = _CLOCK.match(line)
    return int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3]) if found else None


def _second_of_day(moment: float) -> float:
    local = time.localtime(moment)
    return local.tm_hour * 3600 + local.tm_min * 60 + local.tm_sec + moment % 1


def label(name: str, line: str) -> str:
    """A line with its rank in front, once: the trainer's later ranks write it themselves."""
    return line if line.startswith(f"[{name}] ") else f"[{name}] {line}"


def first_errors(logs: Logs, most: int = 16) -> list[str]:
    """The first line of each log that names an error, with its file and number."""
    found = []
    for path in logs.values():
        lines, left_out = read_end(path)
        number = next((number for number, line in enumerate(lines, start=1) if ERROR.search(line)), None)
        if number is not None:
            found.append(f"{path.name}{'' if left_out else f':{number}'}: {lines[number - 1].strip()}")
    return found[:most] + ([f"and in {len(found) - most} logs more"] if len(found) > most else [])


def read_end(path: Path) -> tuple[list[str], int]:
    """(lines of the end of a log, be the last one half, number of bytes before them)."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, 2) - MAX_LOG_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return [], 0
    if start:
        start += len(lines.pop(0)) + 1
    if lines and not lines[-1]:
        del lines[-1]
    return [_text(line) for line in lines], start


def _text(line: bytes) -> str:
    # A progress bar writes over its line again and again: what stands there in the end counts.
    return line.decode("utf-8", errors="replace").rstrip("\r").rpartition("\r")[2]


# Following logs that grow.


@dataclass(frozen=True)
class Place:
    """How far a log has been shown."""

    offset: int
    half: bytes  # a line whose end is not written yet


Places = dict[str, Place]  # of each log, by its label


def new_lines(logs: Logs, places: Places) -> tuple[list[str], Places]:
    """(what was written since `places`, log by log and in whole lines; the new places).

    A log that is not in `places` begins with its last FIRST_LINES lines.
    """
    shown: list[str] = []
    now = dict(places)
    for name, path in logs.items():
        place = places.get(name)
        size = _size(path)
        if place is not None and size < place.offset:
            shown.append(label(name, f"({path.name} was begun anew)"))
            place = Place(0, b"")
        start = max(0, size - MAX_LOG_BYTES) if place is None else place.offset
        data = _read_from(path, start)
        *lines, half = ((place.half if place else b"") + data).split(b"\n")
        now[name] = Place(start + len(data), half)
        if place is None and len(lines) > FIRST_LINES:
            shown.append(label(name, f"(more before this: {path})"))
            lines = lines[-FIRST_LINES:]
        shown += [label(name, _text(line)) for line in lines]
    return shown, now


def rest_of(places: Places) -> list[str]:
    """The half lines that nobody ends any more."""
    return [label(name, _text(place.half)) for name, place in places.items() if place.half]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read_from(path: Path, start: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read()
    except FileNotFoundError:
        return b""
