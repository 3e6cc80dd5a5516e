"""Which files make a reranker: the folder that `save_reranker` writes, and the published model's layout.

Trained here   adapter_config.json, adapter_model.safetensors (PEFT's own form), heads.safetensors, tokenizer files, and
               reranker.json: base model, depth, template, limit, exits
Exported       merged/: the same with the decoder's whole weights (config.json, model*.safetensors) for adapters
Published      BAAI/bge-reranker-v2.5-gemma2-lightweight: a whole Gemma 2 under a model type of its own, whose LM head
               is a list of single rows, lm_head.I.linear_head.weight for exit start_layer + I

FlagEmbedding's gemma_model.py gives the I-th of the exits that a call asks for the I-th row of that list, so a call
for one exit reads the first exit's row at any depth. Here every exit has its own row, as in FlagEmbedding's older
layer-wise model; scores at a single exit differ from FlagEmbedding's as far as those rows do.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma2Config

from pipeline.data.pairs import PairTokenizer, load_pair_tokenizer
from pipeline.files import file_sha256, replaced_folder
from pipeline.inference.description import DESCRIPTION_FILE, PUBLISHED_RERANKER, RERANKER_FILE
from pipeline.inference.loading import read_config, require_all_weights, require_base, saved_dtype
from pipeline.inference.saving import save_adapter, write_json
from pipeline.model.base import read_row
from pipeline.model.encoder import load_adapter, load_decoder
from pipeline.model.reranker import FIRST_EXIT, Reranker
from pipeline.prompts import BGE_RERANKER, PairTemplate
from pipeline.settings import ModelSettings

HEADS_FILE = "heads.safetensors"
MAX_PAIR_TOKENS = 512  # the official code's default


@dataclasses.dataclass(frozen=True)
class RerankerDescription:
    """Everything beside weights and tokenizer files."""

    model: ModelSettings  # the decoder: base model, or the folder itself where it holds every weight
    template: PairTemplate
    max_pair_tokens: int  # of a whole pair, BOS and prompt counted
    first_exit: int
    compress_layers: tuple[int, ...]  # taken where a call names none
    bos: tuple[int, ...]  # ids that every pair begins with
    fingerprint: str  # of the tokenizer and BOS
    base_fingerprint: str = ""  # of the base model's files, where the folder holds adapters


def save_reranker(
    folder: Path,
    reranker: Reranker,
    weights: Mapping[str, Tensor],
    tokenizer: PairTokenizer,
    description: RerankerDescription,
) -> None:
    """Write `folder` (replacing it).

    Args:
        reranker: with adapters around its decoder.
        weights: of all that trains, whole and fp32, under the names that `reranker` has for it.
        description: of the base model (`model.name`) and of how pairs were composed.
    """
    assert isinstance(reranker.decoder, PeftModel), "a reranker is trained by adapters"
    belong = (description.template, description.bos, description.fingerprint)
    assert belong == (tokenizer.template, tokenizer.bos, tokenizer.fingerprint)
    adapters = {n.removeprefix("decoder."): w for n, w in weights.items() if n.startswith("decoder.")}
    with replaced_folder(folder) as partial:
        save_adapter(partial, reranker.decoder, adapters, description.model.name)
        save_file({"weight_HD": weights["heads.weight_HD"].contiguous()}, partial / HEADS_FILE)
        tokenizer.tokenizer.save_pretrained(str(partial))
        tree = {
            "base_model": description.model.name,
            "base_fingerprint": description.base_fingerprint,
            "num_layers": description.model.num_layers,
            "dtype": description.model.dtype,
            "template": dataclasses.asdict(description.template),
            "template_version": description.template.version,
            "bos": description.bos,
            "tokenizer_fingerprint": description.fingerprint,
            "max_pair_tokens": description.max_pair_tokens,
            "first_exit": description.first_exit,
            "compress_layers": description.compress_layers,
        }
        write_json(partial / RERANKER_FILE, tree)


def read_reranker(folder: Path) -> tuple[RerankerDescription, PairTokenizer]:
    """Everything beside the weights.

    Raises:
        ValueError: the folder holds an embedder or no model that is known, its files do not belong together, or they
            are damaged.
    """
    if (folder / RERANKER_FILE).is_file():
        description = _read_description(folder)
        tokenizer = load_pair_tokenizer(str(folder), description.template, description.bos)
        if tokenizer.fingerprint != description.fingerprint:
            raise ValueError(
                f"{folder}: the tokenizer files have fingerprint {tokenizer.fingerprint[:12]}, the model was trained "
                f"with {description.fingerprint[:12]}; restore the files that training wrote"
            )
        return description, tokenizer
    if (folder / DESCRIPTION_FILE).is_file():
        raise ValueError(f"{folder} is an embedder ({DESCRIPTION_FILE}), not a reranker; load_embedder takes it")
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    if config.get("model_type") != PUBLISHED_RERANKER:
        raise ValueError(
            f"{folder} is no reranker: {RERANKER_FILE} is missing, and it has not the layout of "
            f"BAAI/bge-reranker-v2.5-gemma2-lightweight (model_type {PUBLISHED_RERANKER!r} in config.json)"
        )
    return _describe_published(folder, config)


def fingerprint_reranker(folder: Path) -> str:
    """sha256 over names and contents of a reranker's files; of a base model elsewhere reranker.json has its own."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return hashlib.sha256(repr([(file.name, file_sha256(file)) for file in files]).encode()).hexdigest()


def load_reranker_weights(folder: Path, description: RerankerDescription, device: torch.device) -> Reranker:
    """The reranker of a folder that `read_reranker` read, for inference.

    Raises:
        ValueError: weights are missing, damaged, or of another base model.
    """
    model = description.model
    if model.trained == "full" and (folder / RERANKER_FILE).is_file():
        decoder = load_decoder(model, device_type=device.type)
        require_all_weights(folder, decoder)
        reranker = Reranker(decoder, _read_heads(folder / HEADS_FILE), description.first_exit)
    elif model.trained == "full":
        config = _gemma_config(read_config(folder))
        decoder = load_decoder(model, device_type=device.type, config=config)
        require_all_weights(folder, decoder)
        number = config.num_hidden_layers - description.first_exit + 1
        rows = [read_row(model.name, (f"lm_head.{i}.linear_head.weight",), 0) for i in range(number)]
        reranker = Reranker(decoder, torch.stack(rows).float(), description.first_exit)
    else:
        require_base(folder / RERANKER_FILE, model.name, description.base_fingerprint)
        heads_HD = _read_heads(folder / HEADS_FILE)
        reranker = Reranker(load_decoder(model, device_type=device.type), heads_HD, description.first_exit)
        load_adapter(reranker, folder)
    return reranker.to(device).eval()


def read_exits(folder: Path, description: RerankerDescription) -> range:
    """Layers that a folder's reranker can be scored at, the last its whole depth; ValueError for damaged files."""
    if (folder / RERANKER_FILE).is_file():
        last = description.first_exit + len(_read_heads(folder / HEADS_FILE)) - 1
    else:
        last = _gemma_config(read_config(folder)).num_hidden_layers
    return range(description.first_exit, last + 1)


def _read_heads(file: Path) -> Tensor:
    try:
        return load_file(file)["weight_HD"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}); was the folder copied in part?") from error


def _read_description(folder: Path) -> RerankerDescription:
    path = folder / RERANKER_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        template = dict(tree["template"])
        template["prompts"] = tuple((relation, prompt) for relation, prompt in template["prompts"])
        trained = tree.get("trained", "lora")  # written by an export that merges
        name = str(path.parent) if trained == "full" else tree["base_model"]
        description = RerankerDescription(
            model=ModelSettings(name=name, num_layers=tree["num_layers"], dtype=tree["dtype"], trained=trained),
            template=PairTemplate(**template),
            max_pair_tokens=int(tree["max_pair_tokens"]),
            first_exit=int(tree["first_exit"]),
            compress_layers=tuple(int(layer) for layer in tree["compress_layers"]),
            bos=tuple(int(i) for i in tree["bos"]),
            fingerprint=tree["tokenizer_fingerprint"],
            base_fingerprint=tree["base_fingerprint"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); it was written by another version or damaged") from error
    if description.template.version != tree.get("template_version"):
        raise ValueError(f"{path}: the template is not the one of template_version; was the file edited?")
    return description


def _describe_published(folder: Path, config: Mapping[str, Any]) -> tuple[RerankerDescription, PairTokenizer]:
    tokenizer = load_pair_tokenizer(str(folder), BGE_RERANKER)
    for name, usual in (("layer_wise", True), ("layer_sep", 1)):
        if config.get(name) != usual:
            raise ValueError(
                f"{folder / 'config.json'} has {name}={config.get(name)!r}; a head for each layer is needed "
                f"({name}={usual!r})"
            )
    description = RerankerDescription(
        model=ModelSettings(name=str(folder), dtype=saved_dtype(folder, config), trained="full"),
        template=BGE_RERANKER,
        max_pair_tokens=MAX_PAIR_TOKENS,
        first_exit=int(config.get("start_layer", FIRST_EXIT)),
        compress_layers=(FIRST_EXIT,),
        bos=tokenizer.bos,
        fingerprint=tokenizer.fingerprint,
    )
    return description, tokenizer


def _gemma_config(config: Mapping[str, Any]) -> Gemma2Config:
    """The published configuration without what only its own code reads."""
    own = ("model_type", "architectures", "auto_map", "start_layer", "layer_sep", "layer_wise")
    return Gemma2Config(**{name: value for name, value in config.items() if name not in own})
