"""Which files make an embedder: folders that training or an export wrote, and published models (a folder or the hub).

Of a run                its model/ or best_model/: adapter and marker rows, or every weight, beside embedder.json
Of an export            adapter/ (the same) and merged/ (every weight, beside embedder.json)
Published by others     a whole model of transformers, without embedder.json: its template must be named
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import nn

from pipeline.data.composing import Limits
from pipeline.data.tokenizing import PromptTokenizer, load_tokenizer
from pipeline.inference.description import DESCRIPTION_FILE, EmbedderDescription, read_description
from pipeline.model.base import fingerprint_base
from pipeline.model.encoder import Encoder, load_adapter, load_encoder, load_markers, require_rows
from pipeline.prompts import TEMPLATES, get_template
from pipeline.settings import ModelSettings, PreprocessSettings

log = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Weights in one form only, and what a tokenizer can consist of.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def find_model(path: str | Path) -> Path:
    """The folder with a model's files: of a run its model/, of a hub name (`owner/name`) the one in the hub's cache.

    What is not in the cache is fetched, unless HF_HUB_OFFLINE=1.

    Raises:
        ValueError: no such folder, and no such model on the hub or in its cache.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder / "model" if (folder / "model").is_dir() else folder
    if not _HUB_NAME.fullmatch(str(path)):
        raise ValueError(f"{folder}: no such folder; name a run, its model/, an export, or a model of the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # of its HTTP library, which is not an OSError with every version

    try:
        return Path(snapshot_download(str(path), allow_patterns=_HUB_FILES))
    except (OSError, ValueError, HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path}: no such folder, and not to be had from the hub ({reason}); check the name, or fetch it where "
            f"there is a network: hf download {path}"
        ) from error


def read_model(folder: Path, template: str | None) -> tuple[EmbedderDescription, PromptTokenizer]:
    """Everything beside the weights.

    Args:
        template: of a published model the name of its template; its limits are the paper's (section 4.1).

    Raises:
        ValueError: the folder holds no embedder, it needs a template or has another one, its files do not belong
            together, or they are damaged.
    """
    if (folder / DESCRIPTION_FILE).is_file():
        return _read_trained(folder, template)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a trained embedder: {DESCRIPTION_FILE} is missing; nor is it a whole model")
    if template is None:
        raise ValueError(
            f"{folder} is not a trained embedder: {DESCRIPTION_FILE} is missing; if it is a published one, name the "
            f"template that it was trained with: template=... ({', '.join(sorted(TEMPLATES))})"
        )
    return _read_published(folder, template)


def _read_trained(folder: Path, template: str | None) -> tuple[EmbedderDescription, PromptTokenizer]:
    description = read_description(folder)
    if template not in (None, description.template.name):
        raise ValueError(
            f"template={template!r}, but {folder} was trained with {description.template.name!r}; leave it out"
        )
    # The saved tokenizer holds the markers already; which of them have trained rows is known from the saved tokens.
    tokenizer = load_tokenizer(str(folder), description.template)
    if description.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{folder}: the tokenizer files have fingerprint {tokenizer.fingerprint[:12]}, the model was trained with "
            f"{description.fingerprint[:12]}; restore the files that training wrote"
        )
    as_saved = dataclasses.replace(tokenizer.tokens, marker_subtokens=description.tokens.marker_subtokens)
    if as_saved != description.tokens:
        raise ValueError(
            f"{folder}/{DESCRIPTION_FILE}: prompt_tokens are not those of its template; restore what training wrote"
        )
    return description, dataclasses.replace(tokenizer, tokens=description.tokens)


def _read_published(folder: Path, name: str) -> tuple[EmbedderDescription, PromptTokenizer]:
    template = get_template(name)
    tokenizer = load_tokenizer(str(folder), template)
    unknown = [m for m, parts in zip(template.markers, tokenizer.tokens.marker_subtokens, strict=True) if parts]
    if unknown:
        raise ValueError(
            f"template={name!r}, but the tokenizer of {folder} has no {', '.join(unknown)}: the model was not trained "
            "with it; name its own template, or take a base model through a recipe"
        )
    model = ModelSettings(name=str(folder), dtype=saved_dtype(folder, read_config(folder)), trained="full")
    limits = Limits.from_settings(PreprocessSettings())
    return EmbedderDescription(model, template, limits, tokenizer.tokens, tokenizer.fingerprint), tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """A published model's config.json; ValueError where it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} cannot be read (it is no JSON object); fetch it again")
    return config


def saved_dtype(folder: Path, config: Mapping[str, Any]) -> Literal["bf16", "fp32"]:
    """The type that a published model's weights are loaded in: the one that they were saved in, where we know it."""
    saved_as = config.get("dtype", config.get("torch_dtype"))
    if saved_as == "float16":
        log.warning("%s was saved in float16, and is loaded in bfloat16", folder)
    return "bf16" if saved_as in ("float16", "bfloat16") else "fp32"


def load_weights(folder: Path, description: EmbedderDescription, pt: PromptTokenizer, device: torch.device) -> Encoder:
    """The encoder of a folder that `read_model` read, for inference.

    Raises:
        ValueError: weights are missing, damaged, or of another base model.
    """
    model, tokens = description.model, description.tokens
    if model.trained == "lora":
        require_base(folder / DESCRIPTION_FILE, model.name, description.base_fingerprint)
    encoder = load_encoder(model, tokens.marker_ids, tokens.marker_subtokens, device.type)
    if not any(tokens.marker_subtokens):  # else the template's markers come after the table's rows
        require_rows(encoder, pt.largest_id)
    load_markers(encoder, folder)
    if model.trained == "lora":
        load_adapter(encoder, folder)
    else:
        require_all_weights(folder, encoder.decoder)
    return encoder.to(device).eval()


def require_base(description: Path, name: str, fingerprint: str) -> None:
    """ValueError where the base model that a description file names is not there, or not the one trained on."""
    folder, remedy = description.parent, f"set base_model in {description} to where it is"
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(f"{folder} needs its base model, and {name} is no folder here; {remedy}")
    if not fingerprint:
        log.warning("%s says nothing of its base's weights; taken unchecked: %s", folder, name)
    elif fingerprint_base(name) != fingerprint:
        raise ValueError(f"{folder} was trained on other weights than those of {name} now; {remedy}")


def require_all_weights(folder: Path, decoder: nn.Module) -> None:
    """ValueError where the folder's files lack weights: transformers would draw them at random, with a warning."""
    stored = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            stored |= set(opened.keys())
    names = {name.replace("embed_tokens.base.", "embed_tokens.") for name in decoder.state_dict()}
    missing = sorted(n for n in names if not {n, f"model.{n}"} & stored and not n.endswith("marker_rows"))
    if stored and missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights ({missing[0]}, ...); was it copied in part?")
