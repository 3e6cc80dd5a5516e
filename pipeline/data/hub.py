"""Hugging Face datasets: folders of save_to_disk and names on the hub."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.columnar import needed_columns, pack_table
from pipeline.data.raw import require_columns
from pipeline.settings import HUB_PREFIX, ColumnSettings

_BATCH_ROWS = 256


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    names = ("dataset_info.json", "state.json")
    return (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in names)


def saved_files(folder: Path, split: str, where: str) -> list[Path]:
    """The Arrow files of a saved dataset, or of one split of a saved DatasetDict, in the order of its rows."""
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(folder), keep_in_memory=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{where}: not a whole folder of save_to_disk: {error}; copy or save it again") from error
    if isinstance(found, DatasetDict):
        return _arrow_files(_pick(found, split, where), where)
    assert isinstance(found, Dataset)
    if split:
        raise ValueError(f"{where}: this folder is one dataset without splits; leave split={split!r} out")
    return _arrow_files(found, where)


def hub_files(path: str, config: str, split: str, where: str) -> list[Path]:
    """Fetch a dataset of the hub into the local cache; returns its Arrow files there, in the order of its rows."""
    return _arrow_files(_load(path, config, split, False, where), where)


def hub_tables(
    path: str, config: str, split: str, columns: ColumnSettings, block_bytes: int, where: str
) -> Iterator[tuple[int, bytes]]:
    """(rows, Arrow stream) of a dataset of the hub that is read once, in order, without being stored."""
    import pyarrow as pa

    tables: list[pa.Table] = []
    size = 0
    for table in _batches(_load(path, config, split, True, where), where):
        require_columns(columns, table.column_names, where)
        tables.append(table.select(needed_columns(columns, table.column_names)))
        size += tables[-1].nbytes
        if size >= block_bytes:
            yield sum(t.num_rows for t in tables), pack_table(pa.concat_tables(tables, promote_options="default"))
            tables, size = [], 0
    if tables:
        yield sum(t.num_rows for t in tables), pack_table(pa.concat_tables(tables, promote_options="default"))


def _batches(stream: Any, where: str) -> Iterator[Any]:
    """Arrow tables of a streamed dataset; ValueError when reading fails on the way."""
    batches, num_rows = stream.with_format("arrow").iter(batch_size=_BATCH_ROWS), 0
    while True:
        try:
            table = next(batches, None)
        except _faults() as error:
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{where}: reading stopped behind row {num_rows:,}: {reason}; run the command again, or leave "
                "streaming out to fetch all of it first"
            ) from error
        if table is None:
            return
        num_rows += table.num_rows
        yield table


def _faults() -> tuple[type[Exception], ...]:
    """What `datasets` raises when the hub or the network fails."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # of its HTTP library, which is not an OSError with every version

    return OSError, ValueError, RuntimeError, TimeoutError, asyncio.TimeoutError, HTTPError, DatasetsError


def _load(path: str, config: str, split: str, streaming: bool, where: str) -> Any:
    from datasets import load_dataset

    name, _, revision = path.removeprefix(HUB_PREFIX).partition("@")
    try:
        return load_dataset(name, config or None, split=split, revision=revision or None, streaming=streaming)
    except _faults() as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ValueError(
            f"{where}: {error}{cause}; check name, config and split, or fetch it where the hub can be reached and "
            "save it with save_to_disk"
        ) from error


def _pick(found: Any, split: str, where: str) -> Any:
    if split not in found:
        given = f"no split {split!r}" if split else "several splits"
        raise ValueError(f"{where}: this folder has {given}; there are: {', '.join(found)}; set split to one of them")
    return found[split]


def _arrow_files(dataset: Any, where: str) -> list[Path]:
    """The files that hold exactly the rows of the dataset."""
    from datasets import Dataset

    files = [Path(item["filename"]) for item in dataset.cache_files]
    whole = sum(len(Dataset.from_file(str(file))) for file in files)
    if dataset._indices is not None or whole != len(dataset):
        raise ValueError(f"{where}: a part of a split cannot be read; name the whole split, or save the part")
    return files
