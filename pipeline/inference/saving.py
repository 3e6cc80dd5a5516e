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
import shutil
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
from pipeline.files import sync
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
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name.removeprefix("decoder."): parts["weight"] for name, parts in trainable.items()}
    markers = {name: value for name, value in weights.items() if name.endswith("marker_rows")}
    others = {name: value for name, value in weights.items() if name not in markers}
    assert len(markers) <= 1
    if isinstance(encoder.decoder, PeftModel):
        adapters = get_peft_model_state_dict(encoder.decoder, state_dict=others)
        save_file(adapters, partial / "adapter_model.safetensors")
        config = dataclasses.replace(encoder.decoder.peft_config["default"], inference_mode=True)
        config.base_model_name_or_path = settings.model.name
        config.save_pretrained(str(partial))
    else:
        decoder: Any = encoder.decoder
        # Under the names that the model has without MarkerEmbedding around its table.
        names = {name: name.replace("embed_tokens.base.", "embed_tokens.") for name in others}
        whole = {names[name]: value.to(decoder.dtype) for name, value in others.items()}
        save_file(whole, partial / "model.safetensors", metadata={"format": "pt"})
        decoder.config.save_pretrained(str(partial))
    for value in markers.values():
        save_file({"marker_rows": value}, partial / MARKERS_FILE)
    tokenizer.tokenizer.save_pretrained(str(partial))
    _write_json(partial / DESCRIPTION_FILE, _description(tokenizer, settings, store, base_fingerprint))
    examples = {table.name: _examples(store, table) for table in store.datasets}
    _write_json(partial / "examples.json", examples)
    for path in (*partial.iterdir(), partial):
        sync(path)
    # The old one leaves in one step too, so that a folder of this name is always whole.
    replaced = folder.with_name(f".replaced-{folder.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
