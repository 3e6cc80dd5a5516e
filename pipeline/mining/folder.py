"""The folder of a run that mines or scores: its lock, and the record by which a later run knows whether it may go on.

settings.json        what decides the results: models, store, options
<dataset>.jsonl      rows with mined negatives, or with scores
recipe.yaml; of mining report.md, report.json and scores-<dataset>.png; of scoring scores.json
work/                embeddings, kept for mining with other rules; unfinished rows and scores
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from pipeline.files import file_sha256, locked, write_text

RECORD = "settings.json"
RESULTS = ("*.jsonl", "recipe.yaml", "report.md", "report.json", "scores-*.png", "scores.json")
_SHOWN = 8

Record = dict[str, Any]


def progress_bar(total: int, title: str, unit: str, shown: bool) -> "tqdm[NoReturn]":
    """A bar; not on a terminal (a batch job's log) a line now and then."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=title, disable=not shown, mininterval=interval, unit=unit)


def folder_digest(folder: Path) -> str:
    """One sha256 over names and bytes of a model's files: a retrained model is another one, a copied one is the same.

    Names that begin with a dot are left out: `hf download` keeps the times of its downloads there.
    """
    lines = [
        f"{path.relative_to(folder).as_posix()} {file_sha256(path)}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Hold `out` for this process.

    Raises:
        ValueError: it holds anything but results of mining or scoring, or another process holds it.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    strange = [path for path in out.iterdir() if path.name != "work"] if out.is_dir() else []
    if strange and not (out / RECORD).is_file():
        raise ValueError(f"--out {out} is not empty and holds no results of this command; name another folder")
    with locked(out / "work/lock", f"another process writes to {out}; wait for it to end, or set another --out"):
        yield


def prepare_folder(out: Path, new: Record, overwrite: bool) -> None:
    """Make `out` ready for a run with this record: a new folder, one to go on in, or one to clear.

    Args:
        new: what decides the results. What decides embeddings stands under "embeddings": other rules need no new ones.

    Raises:
        ValueError: the folder holds results with another record; shows what differs. With `overwrite` results are
            cleared; embeddings stay if their part of the record is the same.
    """
    file, found = out / RECORD, _holds_results(out)
    old = read_record(file, set(new)) if file.is_file() else {}
    if old and found and not overwrite and (differing := _differences(old, new)):
        raise ValueError(
            f"{out} holds results that were made otherwise:\n"
            + "\n".join(differing)
            + "\n(batch size, device and versions decide a model's last bits.) Go on as before, give --overwrite to "
            "start anew, or set another --out"
        )
    if overwrite or old != new:  # without a record, whatever lies in work/ is of no known origin
        _clear(out, keep_embeddings=bool(old) and old.get("embeddings") == new.get("embeddings"))
    for path in (*out.glob("*.tmp"), *out.glob("work/**/*.tmp")):  # of killed runs: the lock is ours
        path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(new, indent=1, ensure_ascii=False) + "\n")


def _holds_results(out: Path) -> bool:
    """Whether anything was computed here: a run that failed before it began leaves a record alone."""
    return any(out.glob("*.jsonl")) or any(path.is_file() for path in out.glob("work/*/**/*"))


def read_record(file: Path, parts: set[str]) -> Record:
    """A JSON object with these parts; ValueError if the file is none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); name another --out") from error
    if not isinstance(record, dict) or set(record) != parts:
        raise ValueError(f"{file} was not written by this command; name another --out")
    return record


def _differences(old: Record, new: Record) -> list[str]:
    before, after = _flat(old), _flat(new)
    names = [name for name in dict.fromkeys([*after, *before]) if before.get(name) != after.get(name)]
    shown = [f"  {n}: there {before.get(n, 'nothing')}, now {after.get(n, 'nothing')}" for n in names[:_SHOWN]]
    return shown + ([f"  and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else [])


def _flat(tree: Record, prefix: str = "") -> Record:
    flat: Record = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _clear(out: Path, keep_embeddings: bool) -> None:
    """Remove all results but the record, which the new one replaces: an interrupted clearing is repeated."""
    for folder in out.glob("work/*"):
        if folder.is_dir() and not (keep_embeddings and folder.name == "embeddings"):
            shutil.rmtree(folder)
    for path in (path for pattern in RESULTS for path in out.glob(pattern)):
        path.unlink()
