"""A base model's files, told from those of others, and single rows of them, without reading all of them.

D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor  # nobody who only looks at files should wait for it

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


def read_row(name: str, tensors: Sequence[str], row: int) -> Tensor:
    """One row [D] of the first of `tensors` that the weight files of a base model hold.

    Raises:
        ValueError: the model is not to be had, a file is damaged, or none holds such a tensor with so many rows.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(name)
    if not folder.is_dir():
        folder = _hub_folder(name)
    for file in (f for f in weight_files(folder) if f.suffix == ".safetensors"):
        try:
            with safe_open(file, framework="pt") as weights:
                for tensor in (name for name in tensors if name in set(weights.keys())):
                    if row < weights.get_slice(tensor).get_shape()[0]:
                        return weights.get_slice(tensor)[row]
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); fetch it again") from error
    raise ValueError(
        f"model.name={name!r} holds no {' or '.join(tensors)} with a row {row} in safetensors files; name a whole "
        "causal model, not a bare decoder, saved as safetensors"
    )


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
