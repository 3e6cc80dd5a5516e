"""A base model's files, told from those of others without reading all of them."""

import hashlib
from pathlib import Path

SAMPLES, SAMPLE_BYTES = 256, 4096  # of a weight file: one every 20 MB of a file of 5 GB


def fingerprint_base(name: str) -> str:
    """Of a base model, a folder or a hub name: its config.json, and sizes and samples of its weight files, which cost
    little and change with any retraining, merge or conversion (a single changed number may go unseen).
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:  # the weights, which are needed next, come with it where they are not in the cache
            folder = Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"model.name={name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    digest = hashlib.sha256()
    if (folder / "config.json").is_file():
        digest.update((folder / "config.json").read_bytes())
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for i in range(SAMPLES):
                opened.seek(size * i // SAMPLES)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()
