"""The `model/` folder of a run: all that is needed, beside the base model, to embed as in training.

adapter_config.json, adapter_model.safetensors   PEFT's own form (keys of the decoder)
config.json, model.safetensors                   instead of them where every weight was trained
markers.safetensors                              trained rows of the template's new markers, if it has any
tokenizer files                                  with the markers added
embedder.json                                    base model, layers, attention, pooling, template, limits, widths, tasks
examples.json                                    a few (query, response) pairs of every training set
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from pipeline.data.composing import Limits
from pipeline.data.store import DatasetTable, TokenStore
from pipeline.data.tokenizing import PromptTokenizer
from pipeline.datatypes import RULES
from pipeline.files import replaced_folder
from pipeline.inference.description import DESCRIPTION_FILE
from pipeline.model.encoder import MARKERS_FILE, Encoder
from pipeline.settings import Settings

log = logging.getLogger(__name__)

EXAMPLES_PER_DATASET = 8
_SLICE = 1 << 20  # rows counted at once


def save_model(
    folder: Path,
    encoder: Encoder,
    trainable: dict[str, dict[str, Tensor]],
    tokenizer: PromptTokenizer,
    settings: Settings,
    store: TokenStore,
    base_fingerprint: str,
) -> None:
    """Write `folder` (replacing it) from whole fp32 weights, as `read_state` gives them.

    Args:
        base_fingerprint: of the base model when it was loaded (`fingerprint_base`); what its name stands for on the hub
            may have changed since.
    """
    weights = {name.removeprefix("decoder."): parts["weight"] for name, parts in trainable.items()}
    markers = {name: value for name, value in weights.items() if name.endswith("marker_rows")}
    others = {name: value for name, value in weights.items() if name not in markers}
    assert len(markers) <= 1
    with replaced_folder(folder) as partial:
        if isinstance(encoder.decoder, PeftModel):
            save_adapter(partial, encoder.decoder, others, settings.model.name)
        else:
            _save_whole(partial, encoder.decoder, others)
        for value in markers.values():
            save_file({"marker_rows": value}, partial / MARKERS_FILE)
        tokenizer.tokenizer.save_pretrained(str(partial))
        write_json(partial / DESCRIPTION_FILE, _description(tokenizer, settings, store, base_fingerprint))
        examples = {table.name: _examples(store, table) for table in store.datasets}
        write_json(partial / "examples.json", examples)


def save_adapter(folder: Path, decoder: PeftModel, weights: dict[str, Tensor], base_model: str) -> None:
    """PEFT's two files from whole weights, under the names that they have in `decoder`."""
    save_file(get_peft_model_state_dict(decoder, state_dict=weights), folder / "adapter_model.safetensors")
    config = dataclasses.replace(decoder.peft_config["default"], inference_mode=True)
    config.base_model_name_or_path = base_model
    config.save_pretrained(str(folder))


def _save_whole(folder: Path, decoder: Any, weights: dict[str, Tensor]) -> None:
    """Every weight, under the names that the model has without MarkerEmbedding around its table."""
    names = {name: name.replace("embed_tokens.base.", "embed_tokens.") for name in weights}
    whole = {names[name]: value.to(decoder.dtype) for name, value in weights.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    decoder.config.save_pretrained(str(folder))


def _description(
    tokenizer: PromptTokenizer, settings: Settings, store: TokenStore, base_fingerprint: str
) -> dict[str, Any]:
    """What an embedder must know besides weights, in the form that `read_description` reads."""
    model = settings.model
    return {
        "base_model": model.name,
        "base_fingerprint": base_fingerprint if model.trained == "lora" else "",
        "trained": model.trained,
        "num_layers": model.num_layers,
        "attention": model.attention,
        "pooling": model.pooling,
        "dtype": model.dtype,
        "template": dataclasses.asdict(tokenizer.template),
        "template_version": tokenizer.template.version,
        "prompt_tokens": dataclasses.asdict(tokenizer.tokens),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "limits": dataclasses.asdict(Limits.from_settings(settings.preprocess)),
        "matryoshka_dims": settings.loss.matryoshka_dims,
        "tasks": {table.name: _instruction(store, table) for table in store.datasets},
    }


def _instruction(store: TokenStore, table: DatasetTable) -> str:
    """The dataset's instruction; the most frequent one where rows have their own, which is logged."""
    counts = np.zeros(len(store.instructions), dtype=np.int64)
    for start in range(0, table.num_rows, _SLICE):
        counts += np.bincount(table.instruction_N[start : start + _SLICE], minlength=len(counts))
    best = int(counts.argmax())
    if (num_used := int((counts > 0).sum())) > 1:
        share = counts[best] / table.num_rows
        log.info("%s has %d instructions; its task is the one of %.0f %% of rows", table.name, num_used, 100 * share)
    return store.instructions[best]


def _examples(store: TokenStore, table: DatasetTable) -> list[dict[str, str]]:
    """Spread evenly over the dataset's rows."""
    count = min(EXAMPLES_PER_DATASET, table.num_rows)
    examples = []
    for row in range(0, table.num_rows, max(1, table.num_rows // count)):
        response = int(table.pos_text[table.pos_offsets[row]])
        if RULES[table.task_type].response == "category":
            response = int(table.category_text_N[row])
        examples.append(
            {
                "instruction": store.instructions[table.instruction_N[row]],
                "query": store.text(int(table.query_text_N[row])),
                "response": store.text(response),
            }
        )
    return examples[:count]


def write_json(path: Path, value: Any) -> None:
    """A JSON file that people can read, UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
