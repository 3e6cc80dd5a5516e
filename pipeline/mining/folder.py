"""The folder of a mining run: its lock, and the record by which a later run knows whether it may go on.

settings.json        what decides the results: embedder, store, options
<dataset>.jsonl      rows with mined negatives
report.md, report.json, scores-<dataset>.png
work/                embeddings, kept for runs with other rules; unfinished rows
"""

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from pipeline.data.store import MANIFEST
from pipeline.files import file_sha256, write_text
from pipeline.mining.options import BM25, MiningOptions

RECORD = "settings.json"
_SHOWN = 8

Record = dict[str, Any]


def progress_bar(total: int, title: str, unit: str, shown: bool) -> "tqdm[NoReturn]":
    """A bar; not on a terminal (a batch job's log) a line now and then."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=title, disable=not shown, mininterval=interval, unit=unit)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process, however it ends."""
    (out / "work").mkdir(parents=True, exist_ok=True)
    with (out / "work/lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process is mining in {out}; wait for it to end") from error
        yield


def model_identity(folder: str | Path) -> dict[str, str]:
    """sha256 of every file of a model, by name: a changed model is found out, a copied one is the same."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def embedding_record(model: Path | None, store: Path) -> Record:
    """What decides every embedding: the model's files (None: BM25) and the store."""
    return {"embedder": model_identity(model) if model is not None else BM25, "store": file_sha256(store / MANIFEST)}


def option_record(options: MiningOptions) -> Record:
    """The options as plain values; a teacher as the content of its files."""
    record: Record = asdict(options)
    if options.teacher is not None:
        record["teacher"] = model_identity(options.teacher)
    return record


def require_own_folder(out: Path) -> None:
    """ValueError if `out` holds anything but results of mining."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    strange = [path for path in out.iterdir() if path.name != "work"] if out.is_dir() else []
    if strange and not (out / RECORD).is_file():
        raise ValueError(f"--out {out} is not empty and holds no results of mining; name another folder")


def prepare_folder(out: Path, embeddings: Record, options: Record, overwrite: bool) -> None:
    """Make `out` ready for a run with these records: a new folder, one to go on in, or one to clear.

    Args:
        embeddings: what decides every embedding; kept apart, so that other rules need no new embeddings.
        options: what decides the negatives beside them.

    Raises:
        ValueError: the folder holds the results of another embedder, store or options; shows what differs. With
            `overwrite` such results are cleared; embeddings stay if their record is the same.
    """
    new = {"embeddings": embeddings, "options": options}
    file = out / RECORD
    if file.is_file():
        old = _read(file)
        differing = _differences(old, new)
        if differing and not overwrite:
            raise ValueError(
                f"{out} holds negatives that were mined otherwise:\n"
                + "\n".join(differing)
                + "\ngive --overwrite to mine anew, or set another --out"
            )
        if overwrite:
            _clear(out, keep_embeddings=old.get("embeddings") == embeddings)
    else:
        _clear(out, keep_embeddings=False)  # whatever lies in work/ is of no known origin
    write_text(file, json.dumps(new, indent=1, ensure_ascii=False) + "\n")


def _read(file: Path) -> Record:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); name another --out") from error
    if not isinstance(record, dict) or not {"embeddings", "options"} <= set(record):
        raise ValueError(f"{file} is not a record of mining; name another --out")
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
    """Remove what mining wrote except its record, which the new one replaces: an interrupted clearing is repeated."""
    if not keep_embeddings:
        shutil.rmtree(out / "work/embeddings", ignore_errors=True)
    shutil.rmtree(out / "work/rows", ignore_errors=True)
    single = (out / name for name in ("report.md", "report.json", "recipe.yaml"))
    for path in (*out.glob("*.jsonl"), *out.glob("scores-*.png"), *single):
        path.unlink(missing_ok=True)
