"""embedder.json of a trained model's folder, read back: inference composes the prompts of training or refuses."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.composing import Limits
from pipeline.data.tokenizing import PromptTokens
from pipeline.prompts import Template
from pipeline.settings import ModelSettings

DESCRIPTION_FILE = "embedder.json"
RERANKER_FILE, PUBLISHED_RERANKER = "reranker.json", "cost_wise_gemma"  # of reranker_files.py; a model type


@dataclass(frozen=True)
class EmbedderDescription:
    """Everything beside weights and tokenizer files."""

    model: ModelSettings  # the decoder: name (the folder itself, if it holds every weight), depth, attention, ...
    template: Template
    limits: Limits
    tokens: PromptTokens
    fingerprint: str  # of the tokenizer with markers
    matryoshka_dims: tuple[int, ...] = ()  # widths below the full one that were trained
    base_fingerprint: str = ""  # of the base model's files, where the folder holds adapters
    tasks: Mapping[str, str] = field(default_factory=dict)  # training set -> its instruction


def read_description(folder: str | Path) -> EmbedderDescription:
    """Read `folder`/embedder.json; ValueError if it is missing or not of the form that training writes."""
    path = Path(folder) / DESCRIPTION_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not a trained embedder: {DESCRIPTION_FILE} is missing")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        description = EmbedderDescription(
            model=ModelSettings(
                name=str(folder) if tree.get("trained") == "full" else tree["base_model"],
                trained=tree.get("trained", "lora"),
                num_layers=tree["num_layers"],
                attention=tree["attention"],
                pooling=tree["pooling"],
                dtype=tree["dtype"],
            ),
            template=Template(**_tuples(tree["template"])),
            limits=_limits(tree["limits"]),
            tokens=PromptTokens(**_tuples(tree["prompt_tokens"])),
            fingerprint=tree["tokenizer_fingerprint"],
            matryoshka_dims=tuple(tree.get("matryoshka_dims", ())),  # folders from before it was written have none
            base_fingerprint=tree.get("base_fingerprint", ""),
            tasks=dict(tree.get("tasks", {})),
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it was written by another version or damaged") from error
    if description.template.version != tree.get("template_version"):
        raise ValueError(f"{path}: the template is not the one of template_version; was the file edited?")
    return description


def _limits(tree: dict[str, Any]) -> Limits:
    limits = {f.name: tree[f.name] for f in dataclasses.fields(Limits)}
    for name, value in limits.items():
        if type(value) is not int or value < 1:
            raise TypeError(f"limits.{name}={value!r} is no number of tokens")
    return Limits(**limits)


def _tuples(tree: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples they were, at every depth."""
    return {key: _tuple(value) for key, value in tree.items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list) else value
