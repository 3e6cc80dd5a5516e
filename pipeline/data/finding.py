"""What the entries of a recipe mean: from a path, a glob or a hub name to datasets and their files."""

import glob
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.data.beir import beir_files, is_beir
from pipeline.data.blocks import Kind, RawFile, file_state
from pipeline.data.columnar import arrow_columns, parquet_columns
from pipeline.data.hub import hub_files, is_saved, saved_files
from pipeline.data.jsonl import read_head
from pipeline.data.raw import find_columns, parse_line, require_columns
from pipeline.data.sources import Source
from pipeline.settings import HUB_PREFIX, ColumnSettings, DatasetSettings, Settings

log = logging.getLogger(__name__)

SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "gzip",
    ".json.gz": "gzip",
    ".jsonl.zst": "zstd",
    ".json.zst": "zstd",
    ".parquet": "parquet",
}
NO_IN_BATCH = "no_in_batch_neg"  # how FlagEmbedding marks files and folders by name
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")  # how Hugging Face names the files of one dataset


def find_sources(settings: Settings) -> list[Source]:
    """The datasets that the recipe's entries mean, with the state of their files but without checksums.

    Raises:
        ValueError: nothing is there, a file is empty or of an unknown form, a column does not exist, or a setting
            makes no sense for what is there.
    """
    found = [source for dataset in settings.data.datasets for source in _find(Path(settings.data.root), dataset)]
    names = [source.dataset.name for source in found]
    for name in names:
        if names.count(name) > 1:
            places = ", ".join(source.place for source in found if source.dataset.name == name)
            raise ValueError(f"data.datasets: two datasets would be named {name!r}: {places}; rename one of them")
    return found


def _find(root: Path, dataset: DatasetSettings) -> list[Source]:
    path = root / dataset.path
    where = f"dataset {dataset.name!r}: {path}"
    if dataset.path.startswith(HUB_PREFIX):
        return [_on_hub(dataset, f"dataset {dataset.name!r}: {dataset.path}")]
    if path.is_dir() and (is_beir(path) or is_saved(path)):
        return [_whole_folder(path, dataset, where)]
    if dataset.split:
        raise ValueError(
            f"{where}: split={dataset.split!r} is for folders of save_to_disk, BEIR folders and hub names; leave it out"
        )
    if path.is_dir():
        base, paths = path, list(path.iterdir())
    elif glob.has_magic(dataset.path) and not path.exists():
        parts = Path(dataset.path).parts
        base = root.joinpath(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        paths = [root / found for found in glob.glob(dataset.path, root_dir=root, recursive=True)]
    else:
        return [_single_file(path, dataset, where)]
    names = {path: path.relative_to(base).as_posix() for path in paths}
    return _by_name(base, _data_files(names, where), dataset, where)


def _by_name(base: Path, names: dict[Path, str], dataset: DatasetSettings, where: str) -> list[Source]:
    """The datasets of a folder or glob."""
    if dataset.merge_files:
        groups = {dataset.name: list(names)}
    else:
        groups = {f"{dataset.name}/{stem}": some for stem, some in _group_shards(names, where).items()}
    return [
        Source(
            dataset=replace(dataset, name=name),
            entry=dataset.name,
            no_in_batch_neg=_marked(base.name) or all(_any_marked(names[path]) for path in some),
            place=str(some[0] if len(some) == 1 else base),
            files=tuple(_raw_file(path, names[path], dataset, where) for path in some),
        )
        for name, some in groups.items()
    ]


def _single_file(path: Path, dataset: DatasetSettings, where: str) -> Source:
    if not path.is_file():
        raise ValueError(f"{where}: no such file; check data.root and the dataset's path")
    if dataset.merge_files:
        raise ValueError(f"{where}: merge_files is for folders and globs, and this is one file; leave it out")
    if _kind(path) is None:
        known = ", ".join(SUFFIXES)
        raise ValueError(
            f"{where}: files of this form are not read, only {known}; convert it to one row of JSON a line"
        )
    file = _raw_file(path, path.name, dataset, f"dataset {dataset.name!r}")
    return Source(dataset, dataset.name, _marked(_stem(path.name)), str(path), (file,))


def _whole_folder(path: Path, dataset: DatasetSettings, where: str) -> Source:
    """A BEIR folder or a folder of save_to_disk."""
    if dataset.merge_files:
        raise ValueError(f"{where}: merge_files is for folders of data files; this is one dataset: leave it out")
    name = path.name
    if is_beir(path):
        if dataset.columns != ColumnSettings():
            raise ValueError(f"{where}: the columns of a BEIR folder are fixed; leave columns out")
        parts = tuple(file_state(p) for p in beir_files(path, dataset.split, where))
        files: tuple[RawFile, ...] = (RawFile("beir", str(path), name, parts, dataset.columns),)
    else:
        files = _arrow_files(saved_files(path, dataset.split, where), name, dataset, where)
    return Source(dataset, dataset.name, _marked(name), str(path), files)


def _on_hub(dataset: DatasetSettings, where: str) -> Source:
    name = dataset.path.removeprefix(HUB_PREFIX)
    if dataset.streaming:
        file = RawFile("hub", dataset.path, name, (), dataset.columns, dataset.config, dataset.split)
        return Source(dataset, dataset.name, False, dataset.path, (file,))
    paths = hub_files(dataset.path, dataset.config, dataset.split, where)
    return Source(dataset, dataset.name, False, dataset.path, _arrow_files(paths, name, dataset, where))


def _arrow_files(paths: Sequence[Path], name: str, dataset: DatasetSettings, where: str) -> tuple[RawFile, ...]:
    if not paths:
        raise ValueError(f"{where}: the dataset has no rows")
    for path in paths:
        require_columns(dataset.columns, arrow_columns(str(path)), where)
    return tuple(
        RawFile("arrow", str(path), f"{name}/{path.name}", (file_state(path),), dataset.columns) for path in paths
    )


def _raw_file(path: Path, name: str, dataset: DatasetSettings, where: str) -> RawFile:
    """A data file, after a look at its size and its columns."""
    kind = _kind(path)
    assert kind is not None
    state = file_state(path)
    if state.num_bytes == 0:
        raise ValueError(f"{where}: {path}: the file is empty")
    if kind == "parquet":
        require_columns(dataset.columns, parquet_columns(str(path)), f"dataset {dataset.name!r}: {path}")
    else:
        _look_at_head(path, kind, dataset)
    return RawFile(kind, str(path), name, (state,), dataset.columns)


def _look_at_head(path: Path, kind: Kind, dataset: DatasetSettings) -> None:
    """Query and positives must be found in the first rows; a column that comes later is looked for at the end."""
    where = f"dataset {dataset.name!r}: {path}"
    needed = ColumnSettings(query=dataset.columns.query, pos=dataset.columns.pos)
    lines = [line for line in read_head(str(path), kind) if line.strip()]
    present: dict[str, None] = {}
    for line in lines:
        if isinstance(row := parse_line(line), dict):
            present |= dict.fromkeys(row)
            found = find_columns(needed, tuple(present))
            if found["query"] and found["pos"]:
                return
    if present:
        require_columns(needed, list(present), where)
    elif lines and lines[0].lstrip().startswith(b"["):
        raise ValueError(f"{where}: holds one JSON list, not one row a line; write it again as JSON lines")


def _kind(path: Path) -> Kind | None:
    return next((kind for suffix, kind in SUFFIXES.items() if path.name.endswith(suffix)), None)


def _stem(name: str) -> str:
    """A file's name without the suffix of its form and the number of its shard."""
    return _SHARD.sub("", _without_suffix(name))


def _without_suffix(name: str) -> str:
    return name.removesuffix(max((s for s in SUFFIXES if name.endswith(s)), key=len, default=""))


def _marked(stem: str) -> bool:
    return stem.endswith(NO_IN_BATCH)


def _any_marked(relative: str) -> bool:
    path = Path(relative)
    return _marked(_stem(path.name)) or any(_marked(part) for part in path.parts[:-1])


def _data_files(names: Mapping[Path, str], where: str) -> dict[Path, str]:
    """Those that are data files, in order of their names; the others are named in the log."""
    files = {path for path in names if path.is_file() and not path.name.startswith(".") and _kind(path)}
    if not files:
        raise ValueError(f"{where}: no data file is there ({', '.join(SUFFIXES)}); check data.root and the path")
    if skipped := sorted(name for path, name in names.items() if path not in files):
        log.info("%s: not data files, left out: %s", where, ", ".join(skipped))
    return {path: names[path] for path in sorted(files, key=lambda path: names[path])}


def _group_shards(names: Mapping[Path, str], where: str) -> dict[str, list[Path]]:
    """Files by stem: one each, but for the shards of one dataset, which must all be there."""
    groups: dict[str, list[Path]] = {}
    for path, name in names.items():
        groups.setdefault(_stem(name), []).append(path)
    for stem, some in groups.items():
        numbers = [_SHARD.search(_without_suffix(path.name)) for path in some]
        if len(some) > 1 and not all(numbers):
            raise ValueError(
                f"{where}: {', '.join(path.name for path in some)} differ in their suffix alone; rename one"
            )
        wanted = {int(n[2]) for n in numbers if n}
        if any(len(some) != count for count in wanted):
            raise ValueError(
                f"{where}: {len(some)} of the {max(wanted)} shards of {stem!r} are there; copy all of them"
            )
    return groups
