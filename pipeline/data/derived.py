"""What tools that read a token store write: raw rows, one file a dataset, and a recipe over them for preprocessing."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.data.store import TokenStore
from pipeline.files import sync, write_atomic, write_text
from pipeline.settings import Settings, dump_settings


def rows_file(name: str) -> str:
    """File name of a dataset's rows."""
    return re.sub(r"[^\w.-]", "_", name) + ".jsonl"


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSONL, complete or absent; returns how many."""
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, write)
    return count


def write_recipe(settings: Settings, path: Path, folder: Path, written: Mapping[str, str]) -> None:
    """Write a recipe whose data are the files that a tool wrote, with the token store beside them.

    Args:
        path: where the recipe is written.
        folder: where tool's output lies in the end; the store goes to `folder`/store.
        written: dataset name -> file under `folder`; a dataset that is not named here keeps its raw file.
    """
    folder, root = folder.resolve(), Path(settings.data.root)
    datasets = tuple(replace(d, path=written.get(d.name, str(root / d.path))) for d in settings.data.datasets)
    data = replace(settings.data, root=str(folder), store=str(folder / "store"), datasets=datasets)
    write_text(path, dump_settings(replace(settings, data=data)))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well: complete or absent.

    Raises:
        ValueError: `path` is there already and not an empty folder.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--out {path} is there already; remove it or choose another")
    path = path.resolve()
    temporary = path.with_name(path.name + ".unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(path.parent)


def choose_datasets(store: TokenStore, names: Sequence[str]) -> tuple[int, ...]:
    """Indices of the datasets that --dataset names, in the store's order; all of them where none is named."""
    known = [table.name for table in store.datasets]
    for name in names:
        if name not in known:
            raise ValueError(f"--dataset {name}: the store {store.path} holds {', '.join(known)}")
    return tuple(i for i, name in enumerate(known) if not names or name in names)
