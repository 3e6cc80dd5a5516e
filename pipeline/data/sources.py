"""Raw files of a recipe, and the identity of the store that they make."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.store import FORMAT_VERSION, MANIFEST, Manifest, limits_dict, open_store, read_manifest
from pipeline.data.tokenizing import PromptTokenizer
from pipeline.datatypes import RULES
from pipeline.settings import DatasetSettings, Settings


@dataclass(frozen=True)
class Source:
    """One raw file and the dataset it belongs to."""

    dataset: DatasetSettings
    path: Path
    num_bytes: int
    sha256: str

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest keeps: no folder, so a store is the same wherever the raw file lay."""
        return {"name": self.path.name, "bytes": self.num_bytes, "sha256": self.sha256}


def find_source(settings: Settings, dataset: DatasetSettings) -> Path:
    """The raw file of a dataset; ValueError if it is not there, empty or of an unknown form."""
    path = Path(settings.data.root) / dataset.path
    where = f"dataset {dataset.name!r}: {path}"
    if not path.is_file():
        raise ValueError(f"{where}: no such file; check data.root and the dataset's path")
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")):
        raise ValueError(f"{where}: only .jsonl and .jsonl.gz files are read; convert it to one row of JSON a line")
    if path.stat().st_size == 0:
        raise ValueError(f"{where}: the file is empty")
    return path


def raw_identity(sources: Sequence[Source], block_bytes: int, partition_bytes: int) -> dict[str, Any]:
    """What decides every byte of the units: raw files and how their rows are read."""
    identity: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "layout": [block_bytes, partition_bytes],
        "datasets": [source.dataset.name for source in sources],
    }
    for source in sources:
        name = f"datasets.{source.dataset.name}"
        identity[f"{name}.type"] = source.dataset.type
        identity[f"{name}.instruction"] = source.dataset.instruction
        identity[f"{name}.file"] = source.path.name
        identity[f"{name}.sha256"] = source.sha256
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
