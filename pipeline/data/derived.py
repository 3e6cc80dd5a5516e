"""What tools that read a token store write: raw rows, one file a dataset, and a recipe over them for preprocessing."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.raw_rows import raw_row
from pipeline.data.store import DatasetTable, TokenStore
from pipeline.files import safe_name, sync, write_atomic, write_text
from pipeline.settings import HUB_PREFIX, DatasetSettings, Settings, dump_settings


def rows_file(dataset: str) -> str:
    """File name of a dataset's rows."""
    return safe_name(dataset) + ".jsonl"


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSONL into a folder that is there, complete or absent; returns how many."""
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1

    write_atomic(path, write)
    return count


def kept_rows(store: TokenStore, table: DatasetTable, kept_N: np.ndarray) -> Iterator[dict[str, Any]]:
    """The rows of a dataset that are kept (bool [N]), in the raw form and in their order.

    `nearest` names lines of the file that these rows make; neighbours that are not kept leave it.
    """
    line_N = np.cumsum(kept_N) * kept_N
    for n in np.flatnonzero(kept_N).tolist():
        row = raw_row(store, table, n)
        if table.nearest_offsets is not None and table.nearest_row is not None:
            lines = line_N[table.nearest_row[table.nearest_offsets[n] : table.nearest_offsets[n + 1]]]
            row["nearest"] = lines[lines > 0].tolist()
        yield row


def write_recipe(
    settings: Settings, store: TokenStore, path: Path, folder: Path, written: Mapping[str, str]
) -> tuple[str, ...]:
    """Write a recipe whose data are the files that a tool wrote, with the token store beside them.

    Every written dataset becomes an entry of its own. An entry of which nothing was written keeps its raw files.

    Args:
        path: where the recipe is written.
        folder: where the tool's output lies in the end; the store goes to `folder`/store.
        written: dataset name -> file under `folder`.

    Returns:
        Names of datasets that the recipe lacks: others of their entry (a folder of files) were written, they were not.
    """
    folder, root = folder.resolve(), Path(settings.data.root)
    entries: list[DatasetSettings] = []
    lacking: list[str] = []
    for entry in settings.data.datasets:
        tables = [table for table in store.datasets if table.entry == entry.name]
        done = [table for table in tables if table.name in written]
        if done:
            entries += [_entry(entry, table, written[table.name]) for table in done]
            lacking += [table.name for table in tables if table.name not in written]
        else:
            on_hub = entry.path.startswith(HUB_PREFIX)
            entries.append(entry if on_hub else replace(entry, path=str(root / entry.path)))
    data = replace(settings.data, root=str(folder), store=str(folder / "store"), datasets=tuple(entries))
    write_text(path, dump_settings(replace(settings, data=data)))
    return tuple(lacking)


def _entry(entry: DatasetSettings, table: DatasetTable, path: str) -> DatasetSettings:
    """An entry for a file in the raw form: how the source was read no longer matters, how it is trained does."""
    # The old file's name may have said so; the new file's name need not.
    in_batch = False if entry.in_batch_negatives is None and table.no_in_batch_neg else entry.in_batch_negatives
    return DatasetSettings(
        name=table.name,
        path=path,
        type=entry.type,
        instruction=entry.instruction,
        in_batch_negatives=in_batch,
        group_size=entry.group_size,
        relation=entry.relation,
    )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well: complete or absent.

    Each call has a temporary folder of its own, `path`.unfinished-*, so runs with the same `path` never mix. One that
    a killed run left may be removed.

    Raises:
        ValueError: `path` is there already and not an empty folder, or appeared before the block ended.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--out {path} is there already; remove it or choose another")
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=path.parent, prefix=path.name + ".unfinished-"))
    temporary = own / path.name  # inside, because mkdtemp's folder is for its owner alone
    try:
        temporary.mkdir()
        yield temporary
        try:
            os.replace(temporary, path)  # which takes the place of nothing or of an empty folder
        except OSError as error:
            if not path.exists():
                raise
            raise ValueError(
                f"--out {path} appeared while its rows were written here: another run has the same --out? Nothing of "
                "this one is kept; choose another"
            ) from error
    finally:
        shutil.rmtree(own, ignore_errors=True)
    sync(path.parent)


def choose_datasets(store: TokenStore, names: Sequence[str]) -> tuple[int, ...]:
    """Indices of the datasets that --dataset names, in the store's order; all of them where none is named.

    Raises:
        ValueError: there is no dataset and no entry of that name.
    """
    known = [table.name for table in store.datasets]
    for name in names:
        if name not in known and not any(name == table.entry for table in store.datasets):
            raise ValueError(f"--dataset {name}: the store {store.path} holds {', '.join(known)}")
    return tuple(i for i, t in enumerate(store.datasets) if not names or t.name in names or t.entry in names)
