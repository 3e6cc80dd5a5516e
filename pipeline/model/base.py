"""A base model's files, told from those of others without reading all of them."""

import hashlib
import json
from pathlib import Path

SAMPLES, SAMPLE_BYTES = 256, 4096  # of a weight file: one every 20 MB of a file of 5 GB


def fingerprint_base(name: str) -> str:
    """Of a base model, a folder or a hub name: its config.json, and sizes and samples of its weight files, which cost
    little and change with any retraining, merge or conversion (a single changed number may go unseen).

    Raises:
        ValueError: the model is not to be had, or files that its index names are missing.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _hub_folder(name)
    digest = hashlib.sha256()
    if (folder / "config.json").is_file():
        digest.update((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for i in range(SAMPLES):
                opened.seek(size * i // SAMPLES)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files whose weights transformers loads, in order of names; others beside them are not counted.

    Some repositories hold the same weights once more in another form, consolidated.safetensors say, which is in the
    hub's cache or not by the way that the model came there.

    Raises:
        ValueError: the index is damaged, or files that it names are missing.
    """
    for whole in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = whole.with_name(f"{whole.name}.index.json")
        if whole.is_file():
            return [whole]
        if not index.is_file():
            continue
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}); fetch it again") from error
        files = sorted(folder / name for name in names)
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{folder} lacks {len(missing)} files that {index.name} names ({missing[0]}); fetch them")
        return files
    return []


def _hub_folder(name: str) -> Path:
    """Where the hub's cache has a model; its weights, which are needed next, come with it where they are not there."""
    from huggingface_hub import snapshot_download

    try:
        for form in ("*.safetensors", "pytorch_model*.bin"):  # the second where there is none of the first
            patterns = ["config.json", form, f"{form}.index.json"]
            folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns="consolidated*"))
            if weight_files(folder):
                break
    except (OSError, ValueError) as error:
        raise ValueError(f"model.name={name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return folder
