"""Which kind of model a folder holds, and what decides its numbers: all that is known before it is loaded."""

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pipeline.inference.description import DESCRIPTION_FILE, PUBLISHED_RERANKER, RERANKER_FILE
from pipeline.mining.block_store import BLOCK_ITEMS
from pipeline.mining.folder import Record, folder_digest

Kind = Literal["cross_encoder", "reranker", "sentence_transformer", "embedder"]
READS_PAIRS: tuple[Kind, ...] = ("cross_encoder", "reranker")
PACKS_TOKENS: tuple[Kind, ...] = ("reranker", "embedder")  # in place of batches of a fixed size
BATCH_SIZE = 32


def model_folder(path: Path) -> Path:
    """The folder that holds the model: of a run its model/ folder."""
    return path / "model" if any((path / "model" / n).is_file() for n in (DESCRIPTION_FILE, RERANKER_FILE)) else path


def find_kind(path: Path, option: str) -> Kind:
    """What kind of model a folder holds; ValueError (naming the option) where none is recognised or can be loaded."""
    if not path.is_dir():
        hint = f"hf download {path} --local-dir FOLDER, then {option} FOLDER"
        raise ValueError(f"{option} {path}: no such folder; a model of the hub is fetched first: {hint}")
    if (model_folder(path) / DESCRIPTION_FILE).is_file():
        return "embedder"
    config = _read_json(path / "config.json")
    if (model_folder(path) / RERANKER_FILE).is_file() or config.get("model_type") == PUBLISHED_RERANKER:
        return "reranker"
    saved_as = _read_json(path / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    architectures = config.get("architectures") or [""]
    is_cross_encoder = saved_as == "CrossEncoder" or architectures[0].endswith("ForSequenceClassification")
    if not is_cross_encoder and not ((path / "modules.json").is_file() and saved_as == "SentenceTransformer"):
        raise ValueError(
            f"{option} {path} holds neither a cross-encoder (config.json with a ...ForSequenceClassification model), "
            "nor a SentenceTransformer (modules.json), nor an embedder or a reranker of this project (a run's folder), "
            f"nor the published reranker (config.json with model_type {PUBLISHED_RERANKER})"
        )
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError("sentence-transformers is not installed; pip install 'bge-icl-train[mining]'")
    return "cross_encoder" if is_cross_encoder else "sentence_transformer"


def find_setting(path: Path, kind: Kind, text: str | None) -> str | None:
    """The name of the depth and width that --teacher-setting asks of a reranker (None: full); None of other kinds.

    Raises:
        ValueError: a text for another kind, or one that asks what the reranker has not; its weights are not read.
    """
    if kind != "reranker":
        if text is not None:
            raise ValueError(f"--teacher-setting {text} is for rerankers; --teacher {path} is run whole: leave it out")
        return None
    from pipeline.inference.reduction import FULL, resolve_settings

    return resolve_settings(model_folder(path), [text or FULL], "--teacher-setting")[0]


def model_record(path: Path, kind: Kind, batch_size: int | None, setting: str | None = None) -> Record:
    """What decides a model's numbers to the last bit: its files, how they are run (`setting`: of `find_setting`)."""
    import torch

    record: Record = {
        "sha256": folder_digest(model_folder(path)),
        "batch_size": None if kind in PACKS_TOKENS else batch_size or BATCH_SIZE,
        "block_items": BLOCK_ITEMS,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    if kind == "reranker":
        record["setting"] = setting
    ours = kind in PACKS_TOKENS
    packages = ("torch", "transformers") if ours else ("torch", "transformers", "sentence-transformers")
    return record | {package: version(package) for package in packages}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return tree if isinstance(tree, dict) else {}
