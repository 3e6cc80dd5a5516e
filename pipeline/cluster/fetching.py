"""A recipe's model, tokenizer and data sets of the hub as folders on this machine, for nodes that have no network.

FOLDER/models/<owner>/<name>@<commit>        weights in one form, config, tokenizer
FOLDER/tokenizers/<owner>/<name>@<commit>    the same without weights, where preprocess.tokenizer is another one
FOLDER/datasets/<owner>/<name>/<config>-<split>@<commit>   what load_dataset reads, as save_to_disk writes it
FOLDER/fetched.json                          for each of them its commit, its files with sizes, checksums of the hub's
FOLDER/.cache                                raw files of data sets, while they are made; removed in the end
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.cluster.hub import HubFile, explained, fetch_files, read_listing, require_space
from pipeline.files import safe_name, write_text
from pipeline.settings import HUB_PREFIX, DatasetSettings, Settings

RECORD = "fetched.json"
PARTS = ("model", "tokenizer", "data")
FOLDERS = {"model": "models", "tokenizer": "tokenizers", "data": "datasets"}


@dataclass(frozen=True)
class Wanted:
    """Something that a recipe names by its name on the hub."""

    part: str  # model, tokenizer or data
    setting: str  # for messages
    name: str
    revision: str  # a branch, a tag or a commit; "": the repository's main branch
    config: str = ""  # of data
    split: str = ""

    @property
    def key(self) -> str:
        """How fetched.json names it."""
        name = f"{self.name}@{self.revision}" if self.revision else self.name
        return " ".join(word for word in (self.part, name, self.config, self.split) if word)


@dataclass(frozen=True)
class Fetched:
    """What was fetched for a Wanted."""

    commit: str
    folder: str  # relative to FOLDER
    files: Mapping[str, int]  # those of the folder, with their bytes
    hub_files: Mapping[str, Mapping[str, Any]]  # those fetched: bytes, and sha256 where the hub tells it
    left_out: Mapping[str, int] = field(default_factory=dict)  # those that were not, with their bytes
    rows: int | None = None  # of data

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


def list_wanted(settings: Settings, revisions: Mapping[str, str]) -> tuple[Wanted, ...]:
    """What the recipe names on the hub.

    Raises:
        ValueError: `revisions` has a name that the recipe does not have on the hub.
    """
    found = []
    if not is_local(settings.model.name):
        found.append(Wanted("model", "model.name", settings.model.name, ""))
    tokenizer = settings.preprocess.tokenizer
    if tokenizer not in ("", settings.model.name) and not is_local(tokenizer):
        found.append(Wanted("tokenizer", "preprocess.tokenizer", tokenizer, ""))
    found += [_wanted_data(dataset) for dataset in settings.data.datasets if dataset.path.startswith(HUB_PREFIX)]
    names = dict.fromkeys(wanted.name for wanted in found)
    for name in revisions:
        if name not in names:
            there = ", ".join(names) or "nothing"
            raise ValueError(f"--revision {name}={revisions[name]}: of the hub, the recipe names {there}")
    return tuple(_at(wanted, revisions) for wanted in found)


def _at(wanted: Wanted, revisions: Mapping[str, str]) -> Wanted:
    return replace(wanted, revision=revisions.get(wanted.name, wanted.revision))


def _wanted_data(dataset: DatasetSettings) -> Wanted:
    name, _, revision = dataset.path.removeprefix(HUB_PREFIX).partition("@")
    return Wanted("data", f"data.datasets {dataset.name!r}", name, revision, dataset.config, dataset.split)


def is_local(name: str) -> bool:
    """Whether a model or tokenizer is a folder; settings.py made its path absolute."""
    return name.startswith("/")


def read_record(root: Path) -> dict[str, Fetched]:
    """What FOLDER/fetched.json tells; nothing where there is none. ValueError where it is damaged."""
    path = root / RECORD
    if not path.is_file():
        return {}
    try:
        return {key: Fetched(**entry) for key, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and what is there is checked anew") from error


def write_record(root: Path, record: Mapping[str, Fetched]) -> None:
    write_text(root / RECORD, json.dumps({key: asdict(entry) for key, entry in record.items()}, indent=1) + "\n")


def is_whole(root: Path, entry: Fetched | None) -> bool:
    """Whether all of it is there, by names and sizes: checksums were compared when it came."""
    return entry is not None and all(_size(root / entry.folder / name) == n for name, n in entry.files.items())


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def fetch(wanted: Wanted, root: Path) -> Fetched:
    """Bring it into FOLDER; what an interrupted call left is used.

    Raises:
        ValueError: the name, the revision, a split or the network is not there, or the disk is full; says what helps.
    """
    with explained(f"{wanted.setting}={wanted.name}", wanted.revision, root):
        return _fetch_data(wanted, root) if wanted.part == "data" else _fetch_model(wanted, root)


def _fetch_model(wanted: Wanted, root: Path) -> Fetched:
    from pipeline.model.base import weight_files

    commit, listing = read_listing(wanted.name, wanted.revision, "model")
    chosen = choose_files(listing, wanted.part == "model")
    folder = root / FOLDERS[wanted.part] / f"{wanted.name}@{commit[:12]}"
    fetch_files(wanted.name, "model", commit, chosen, folder, root)
    if wanted.part == "model" and not weight_files(folder):
        raise ValueError(
            f"{wanted.setting}={wanted.name} has no weights that transformers loads (model*.safetensors or "
            f"pytorch_model*.bin); there are: {', '.join(sorted(listing)[:12])}"
        )
    return Fetched(
        commit=commit,
        folder=str(folder.relative_to(root)),
        files={file.name: file.num_bytes for file in chosen},
        hub_files=_as_record(chosen),
        left_out={name: file.num_bytes for name, file in listing.items() if file not in chosen},
    )


def _as_record(files: Sequence[HubFile]) -> dict[str, dict[str, Any]]:
    return {f.name: {"bytes": f.num_bytes} | ({"sha256": f.sha256} if f.sha256 else {}) for f in files}


def choose_files(listing: Mapping[str, HubFile], with_weights: bool) -> list[HubFile]:
    """Config, tokenizer and, if asked for, weights: once, though many repositories hold them in several forms."""
    small = re.compile(r"[^/]+\.(json|jinja|model|txt|md|tiktoken)|LICENSE|NOTICE|\d+_\w+/config\.json")
    chosen = [file for name, file in listing.items() if small.fullmatch(name)]
    forms = (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin")
    weights = [[file for name, file in listing.items() if re.fullmatch(form, name)] for form in forms]
    return chosen + next((some for some in weights if some), []) * with_weights


def _fetch_data(wanted: Wanted, root: Path) -> Fetched:
    """The rows that `hf://` reads at this commit, as a folder of save_to_disk."""
    from datasets import load_dataset, load_dataset_builder

    commit, listing = read_listing(wanted.name, wanted.revision, "dataset")
    cache = str(root / ".cache" / "datasets")
    config = wanted.config or None
    builder = load_dataset_builder(wanted.name, config, revision=commit, cache_dir=cache)
    urls = [str(url) for some in (builder.config.data_files or {}).values() for url in some]
    files = [listing[name] for url in urls if (name := url.partition(f"@{commit}/")[2]) in listing]
    require_space(root, 3 * sum(file.num_bytes for file in files))  # raw, prepared and saved
    # All at once, with a bar, and compared with the hub's checksums; load_dataset finds them in the cache.
    fetch_files(wanted.name, "dataset", commit, files, None, root)
    rows = load_dataset(wanted.name, config, split=wanted.split, revision=commit, cache_dir=cache)
    name = safe_name("-".join(word for word in (wanted.config, wanted.split) if word))
    folder = root / FOLDERS["data"] / wanted.name / f"{name}@{commit[:12]}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    rows.save_to_disk(str(partial))
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was cut off, or with a file missing
    partial.rename(folder)
    saved = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Fetched(
        commit=commit,
        folder=str(folder.relative_to(root)),
        files=saved,
        hub_files=_as_record(files),
        rows=len(rows),
    )


def localize(settings: Settings, folders: Mapping[str, str], revisions: Mapping[str, str]) -> Settings:
    """The settings with folders of this machine instead of names of the hub.

    Args:
        folders: Wanted.key -> folder, of what is fetched.
    """

    def folder_of(part: str, name: str) -> str:
        return folders.get(_at(Wanted(part, "", name, ""), revisions).key, name)

    def local(dataset: DatasetSettings) -> DatasetSettings:
        folder = ""
        if dataset.path.startswith(HUB_PREFIX):
            folder = folders.get(_at(_wanted_data(dataset), revisions).key, "")
        return replace(dataset, path=folder, config="", split="", streaming=False) if folder else dataset

    name, tokenizer = settings.model.name, settings.preprocess.tokenizer
    # Under the model's name too: its folder holds both.
    tokenizer = folder_of("model" if tokenizer == name else "tokenizer", tokenizer)
    return replace(
        settings,
        model=replace(settings.model, name=folder_of("model", name)),
        preprocess=replace(settings.preprocess, tokenizer=tokenizer),
        data=replace(settings.data, datasets=tuple(local(dataset) for dataset in settings.data.datasets)),
    )
