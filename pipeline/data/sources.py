"""Raw files of a recipe: the datasets that its entries mean, and the identity of the store that they make."""

import glob
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.beir import beir_files, is_beir
from pipeline.data.blocks import FileState, Kind, RawFile, file_state
from pipeline.data.columnar import arrow_columns, parquet_columns
from pipeline.data.hub import hub_files, is_saved, saved_files
from pipeline.data.jsonl import read_head
from pipeline.data.raw import RowRules, find_columns, parse_line, require_columns
from pipeline.data.store import FORMAT_VERSION, MANIFEST, Manifest, limits_dict, open_store, read_manifest
from pipeline.data.tokenizing import PromptTokenizer
from pipeline.datatypes import RULES
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


@dataclass(frozen=True)
class Source:
    """One dataset of the store: its files in order, and the entry of the recipe that it comes from."""

    dataset: DatasetSettings  # the entry under the dataset's own name
    entry: str  # name of the entry
    no_in_batch_neg: bool  # a name says that rows are no negatives for each other
    place: str  # for messages
    files: tuple[RawFile, ...]

    @property
    def rules(self) -> RowRules:
        return RowRules(self.dataset.type, self.dataset.instruction, self.dataset.columns)

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest keeps: all that training needs to find the entry, and no folder of this machine."""
        files: list[dict[str, Any]] = []
        for file in self.files:
            files += [
                {"name": _part_name(file, part), "bytes": part.num_bytes, "sha256": part.sha256} for part in file.parts
            ] or [{"name": file.name, "bytes": 0, "sha256": ""}]  # streamed: its commit stands in the name
        return {"entry": self.entry, "no_in_batch_neg": self.no_in_batch_neg, "files": files}


def _part_name(file: RawFile, part: FileState) -> str:
    return file.name if len(file.parts) == 1 else f"{file.name}/{Path(part.path).name}"


# From entries to files.


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
        base, paths = path, _data_files(sorted(path.iterdir()), where)
    elif glob.has_magic(dataset.path) and not path.exists():
        base = Path(*path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))])
        paths = _data_files(sorted(Path(p) for p in glob.glob(str(path), recursive=True)), where)
    else:
        return [_single_file(path, dataset, where)]
    relative = {path: path.relative_to(base).as_posix() for path in paths}
    if dataset.merge_files:
        groups = {dataset.name: paths}
    else:
        groups = {f"{dataset.name}/{stem}": some for stem, some in _group_shards(relative, where).items()}
    return [
        Source(
            dataset=replace(dataset, name=name),
            entry=dataset.name,
            no_in_batch_neg=_marked(base.name) or all(_any_marked(relative[path]) for path in some),
            place=str(base / (relative[some[0]] if len(some) == 1 else dataset.path)),
            files=tuple(_raw_file(path, relative[path], dataset, where) for path in some),
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
    suffix = max((s for s in SUFFIXES if name.endswith(s)), key=len, default="")
    return _SHARD.sub("", name.removesuffix(suffix))


def _marked(stem: str) -> bool:
    return stem.endswith(NO_IN_BATCH)


def _any_marked(relative: str) -> bool:
    path = Path(relative)
    return _marked(_stem(path.name)) or any(_marked(part) for part in path.parts[:-1])


def _data_files(paths: Sequence[Path], where: str) -> list[Path]:
    """Those that are data files; the others are named in the log."""
    files = [path for path in paths if path.is_file() and not path.name.startswith(".") and _kind(path)]
    if not files:
        raise ValueError(f"{where}: no data file is there ({', '.join(SUFFIXES)}); check data.root and the path")
    if skipped := [path.name for path in paths if path not in files]:
        log.info("%s: not data files, left out: %s", where, ", ".join(skipped))
    return files


def _group_shards(names: Mapping[Path, str], where: str) -> dict[str, list[Path]]:
    """Files by stem: one each, but for the shards of one dataset, which must all be there."""
    groups: dict[str, list[Path]] = {}
    for path, name in names.items():
        groups.setdefault(_stem(name), []).append(path)
    for stem, some in groups.items():
        numbers = [_SHARD.search(path.name.split(".")[0]) for path in some]
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


# Identity.


def with_checksums(sources: Sequence[Source], states: Mapping[str, FileState]) -> tuple[Source, ...]:
    """Sources with the states that hold the checksums; ValueError if rows would stand twice in the mix."""
    whole = tuple(
        replace(s, files=tuple(replace(f, parts=tuple(states[part.path] for part in f.parts)) for f in s.files))
        for s in sources
    )
    seen: dict[Any, tuple[str, str]] = {}
    for source in whole:
        for file in source.files:
            # The same rows read by other columns are other rows.
            key = (tuple(part.sha256 for part in file.parts) or (file.path, file.config, file.split), file.columns)
            shown = (source.dataset.name, file.path)
            if key in seen:
                other, path = seen[key]
                raise ValueError(
                    f"data.datasets: {path} of dataset {other!r} and {file.path} of dataset {source.dataset.name!r} "
                    "hold the same bytes; every row would be trained twice: leave one out"
                )
            seen[key] = shown
    return whole


def raw_identity(sources: Sequence[Source], block_bytes: int, partition_bytes: int) -> dict[str, Any]:
    """What decides every byte of the units: raw files and how their rows are read."""
    identity: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "layout": [block_bytes, partition_bytes],
        "datasets": [source.dataset.name for source in sources],
    }
    for source in sources:
        name = f"datasets.{source.dataset.name}"
        identity[f"{name}.entry"] = source.entry
        identity[f"{name}.type"] = source.dataset.type
        identity[f"{name}.instruction"] = source.dataset.instruction
        identity[f"{name}.columns"] = {
            key: None if names is None else list(names)
            for key, names in asdict(source.dataset.columns).items()
            if names != ()
        }
        identity[f"{name}.no_in_batch_neg"] = source.no_in_batch_neg
        identity[f"{name}.files"] = [
            [_part_name(file, part), part.sha256] for file in source.files for part in file.parts
        ] or [[file.name, file.config, file.split] for file in source.files]
    return identity


def full_identity(
    raw: dict[str, Any], settings: Settings, sources: Sequence[Source], pt: PromptTokenizer
) -> dict[str, Any]:
    """What decides every byte of the store, as a flat mapping that is easy to compare."""
    identity: dict[str, Any] = {"tokenizer": pt.fingerprint, "template": pt.template.version}
    identity |= {f"preprocess.{name}": value for name, value in limits_dict(settings.preprocess).items()}
    identity["preprocess.bucket_edges"] = list(settings.preprocess.bucket_edges)
    for source in sources:
        group_size = group_size_of(settings, source.dataset, source.dataset.type)
        identity[f"datasets.{source.dataset.name}.group_size"] = group_size
    return raw | identity


def group_size_of(settings: Settings, dataset: DatasetSettings, task_type: str) -> int:
    """Positive and negatives of a row in training, at most: what the length key reckons with."""
    rule = RULES.get(task_type)  # a type that only the rows tell is not known here
    return dataset.group_size or (rule and rule.group_size) or settings.batch.group_size


def require_up_to_date(store: Path, identity: dict[str, Any]) -> Manifest:
    """The manifest of a store that is there already; ValueError tells what differs from the recipe."""
    open_store(store, verify=False)
    manifest = read_manifest(store)
    old = manifest.identity
    differing = [
        f"  {key}: store {old.get(key, 'nothing')}, now {identity.get(key, 'nothing')}"
        for key in dict.fromkeys([*identity, *old])
        if old.get(key) != identity.get(key)
    ]
    if differing:
        raise ValueError(
            f"the token store {store} exists and was made from something else:\n"
            + "\n".join(differing)
            + "\ngive --overwrite to replace it, or set another data.store"
        )
    return manifest


def is_empty(store: Path) -> bool:
    """Whether the path is a folder with nothing in it: as good as none."""
    return store.is_dir() and not any(store.iterdir())


def require_store(store: Path) -> None:
    """What stands at data.store is compared with the recipe or replaced only if it is a token store."""
    if not (store / MANIFEST).is_file():
        raise ValueError(f"data.store={store} is not a token store and is not replaced; set another data.store")
