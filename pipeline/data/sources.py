"""The raw files of a recipe by dataset, and the identity of the store that they make."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.blocks import FileState, RawFile, iter_blocks
from pipeline.data.raw import RowRules
from pipeline.data.store import FORMAT_VERSION, MANIFEST, Manifest, limits_dict, open_store, read_manifest
from pipeline.data.tokenizing import PromptTokenizer
from pipeline.datatypes import RULES
from pipeline.settings import DatasetSettings, Settings


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
        digests = [file["sha256"] for file in files]
        return {
            "name": files[0]["name"] if len(files) == 1 else f"{len(files)} files",
            "bytes": sum(file["bytes"] for file in files),
            "sha256": digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
            "files": files,
            "entry": self.entry,
            "no_in_batch_neg": self.no_in_batch_neg,
        }


def _part_name(file: RawFile, part: FileState) -> str:
    return file.name if len(file.parts) == 1 else f"{file.name}/{Path(part.path).name}"


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
            if key in seen and any(iter_blocks(file)):  # empty files may be alike
                other, path = seen[key]
                raise ValueError(
                    f"data.datasets: {path} of dataset {other!r} and {file.path} of dataset {source.dataset.name!r} "
                    "hold the same bytes; every row would be trained twice: leave one out"
                )
            seen[key] = shown
    return whole


def raw_identity(sources: Sequence[Source], block_bytes: int, num_partitions: int) -> dict[str, Any]:
    """What decides every byte of the units: raw files and how their rows are read."""
    identity: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "layout": [block_bytes, num_partitions],
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
