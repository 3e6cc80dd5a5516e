"""A causal decoder as an embedder: packed forward, last token, L2 (arXiv 2409.15700, section 3.1); LoRA on top.

T packed tokens, S sequences, D width, M marker tokens.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from embed_kernels import Impl, gather_last_token, require_impl
from pipeline.model.attention import register_packed_attention
from pipeline.model.last_layer import keep_last_rows
from pipeline.model.prefix import Prefix
from pipeline.settings import LoraSettings, ModelSettings

log = logging.getLogger(__name__)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MARKERS_FILE = "markers.safetensors"
Gathered = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]


class MarkerEmbedding(nn.Module):
    """The decoder's input embedding with trainable rows for the template's new marker tokens.

    The table itself is neither resized nor trained. A marker's row is picked by a one-hot product, not by indexing:
    its gradient is then deterministic, and the parameter works under every ZeRO stage (PEFT's
    `trainable_token_indices` needs CUDA under ZeRO-3).
    """

    marker_ids_M: Tensor

    def __init__(self, base: nn.Module, marker_ids: tuple[int, ...], start_rows_MD: Tensor) -> None:
        super().__init__()
        self.base = base
        self.marker_rows = nn.Parameter(start_rows_MD)
        self.register_buffer("marker_ids_M", torch.tensor(marker_ids, dtype=torch.int64), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        is_marker = input_ids[..., None] == self.marker_ids_M
        known = torch.where(is_marker.any(-1), torch.zeros_like(input_ids), input_ids)
        one_hot = is_marker.to(self.marker_rows.dtype)
        rows = one_hot @ self.marker_rows
        return torch.where(is_marker.any(-1, keepdim=True), rows, self.base(known).to(rows.dtype))


class HasDecoder(Protocol):
    """An Encoder, or whatever else a decoder's adapters are trained in."""

    decoder: nn.Module

    def modules(self) -> Iterator[nn.Module]: ...


class Encoder(nn.Module):
    """A decoder and a pooling; the decoder is a transformers model, or a PEFT model around one."""

    def __init__(self, decoder: nn.Module, pooling: str, kernels: Impl = "auto", causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.decoder = decoder
        self.kernels = kernels
        self.pooling = pooling
        self.gives_last_rows = pooling == "last" and keep_last_rows(decoder)

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        config: Any = self.decoder.config
        return int(config.hidden_size)

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        prefix: Prefix | None = None,
        normalize: bool = True,
    ) -> Tensor:
        """embeddings_SD, fp32, L2-normalised, for the S sequences that `cu_seqlens` (int32, S + 1) cuts out.

        `prefix` stands before every sequence, whose position ids then begin at its length. One that is not full yet is
        filled: the call's only sequence is the prefix. See `why_no_prefix`. Without `normalize` (never in training)
        embeddings are the pooled hidden states as they are.
        """
        options: dict[str, Any] = {} if prefix is None else {"prefix": prefix}
        hidden = self.decoder(
            input_ids=input_ids_T[None],
            position_ids=position_ids_T[None],
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen,
            max_length_k=max_seqlen,
            **options,
        ).last_hidden_state[0]  # [T, D], or [S, D] where the last layer gives only what is read
        if prefix is not None:
            prefix.is_full = True
        if self.pooling == "mean":
            mean_SD = _mean_pool(hidden, cu_seqlens)
            return torch.nn.functional.normalize(mean_SD) if normalize else mean_SD
        last_S = cu_seqlens[1:].long() - 1
        if self.gives_last_rows:
            last_S = torch.arange(len(last_S), device=hidden.device)
        if not normalize:
            return hidden[last_S].float()
        return gather_last_token(hidden, last_S, impl=self.kernels)


def why_no_prefix(encoder: Any, longest: int) -> str:
    """Why sequences of up to `longest` tokens cannot share the keys and values of a prefix; "" where they can."""
    config = encoder.decoder.config
    if not encoder.causal:
        return "the model attends both ways: what follows a prefix changes it"
    if encoder.pooling != "last":
        return f"{encoder.pooling} pooling reads the prefix's own outputs"
    if getattr(config, "attn_logit_softcapping", None):
        return "the model caps attention scores"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest and getattr(config, "use_sliding_window", True):
        return f"prompts of {longest} tokens are longer than the model's window of {window}"
    return ""


def _mean_pool(hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over all tokens of a sequence (the paper's ablation, table 5): fp32 [S, D]."""
    lengths_S = cu_seqlens.diff().long()
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths_S), device=hidden_TD.device), lengths_S)
    sums_SD = torch.zeros(len(lengths_S), hidden_TD.shape[1], device=hidden_TD.device)
    sums_SD = sums_SD.index_add(0, sequence_T, hidden_TD.float())
    return sums_SD / lengths_S[:, None]


def load_encoder(
    model: ModelSettings,
    marker_ids: tuple[int, ...],
    marker_subtokens: tuple[tuple[int, ...], ...],
    device_type: str = "cpu",
    gathered: Gathered = lambda _: nullcontext(),
) -> Encoder:
    """The base decoder of `load_decoder` with the recipe's pooling.

    Raises:
        ValueError: as `load_decoder`, or a kernel of the embeddings that cannot run here.
    """
    require_impl(model.embed_kernels, torch.device(device_type), torch.float32)
    decoder = load_decoder(model, marker_ids, marker_subtokens, device_type, gathered)
    return Encoder(decoder, model.pooling, model.embed_kernels, model.attention == "causal")


def load_decoder(
    model: ModelSettings,
    marker_ids: tuple[int, ...] = (),
    marker_subtokens: tuple[tuple[int, ...], ...] = (),
    device_type: str = "cpu",
    gathered: Gathered = lambda _: nullcontext(),
    config: PretrainedConfig | None = None,
) -> nn.Module:
    """The base decoder in `model.dtype`, with rows for markers that its tokenizer did not have; nothing trains yet.

    Args:
        marker_ids, marker_subtokens: as in the store's prompt tokens. A marker with sub-tokens is new to the model and
            starts from the mean of their rows; one without was there before and is left alone.
        gathered: context in which parameters that came sharded are whole.
        config: in place of the one that lies beside the weights, where transformers does not know that one's type.

    Raises:
        ValueError: no such model, more layers asked for than it has, or an attention kernel that cannot run here.
    """
    try:
        config = config or AutoConfig.from_pretrained(model.name)
        if model.num_layers is not None:
            _keep_first_layers(config, model.num_layers)
        softcap = getattr(config, "attn_logit_softcapping", None)
        causal = model.attention == "causal"
        attention = register_packed_attention(model.attention_kernel, causal, device_type, model.dtype, softcap)
        _require_packable(config)
        decoder = AutoModel.from_pretrained(
            model.name, config=config, dtype=DTYPES[model.dtype], attn_implementation=attention
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model.name={model.name!r} cannot be loaded: {reason}") from error
    decoder.requires_grad_(False)
    table: Any = decoder.get_input_embeddings()
    new = [i for i, subtokens in enumerate(marker_subtokens) if subtokens]
    with gathered([table.weight]), torch.no_grad():
        if model.trained == "lora":
            _keep_whole(table)
        # Through the module, not its weight: Gemma's scales what it looks up.
        place = table.weight.device  # of a sharded table: the GPU, while the rest is still on the CPU
        start = [table(torch.tensor(marker_subtokens[i], device=place)).float().mean(0) for i in new]
    if new:
        rows_MD = torch.stack(start).to(DTYPES[model.dtype])
        decoder.set_input_embeddings(MarkerEmbedding(table, tuple(marker_ids[i] for i in new), rows_MD))
    if model.activation_checkpointing:
        # The reentrant form re-runs a layer as one autograd node, which ZeRO-3's gather hooks need.
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        decoder.enable_input_require_grads()
    return decoder


def _require_packable(config: PretrainedConfig) -> None:
    """ValueError for a decoder that would not, or not only, see what packed attention gives it."""
    kind = AutoModel._model_mapping.get(type(config), None)
    fault = ""
    if not getattr(kind, "_supports_attention_backend", False):
        fault = "its attention is not exchangeable in transformers"
    elif "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        fault = "it attends within chunks of its own"
    elif dropout := getattr(config, "attention_dropout", 0.0):
        fault = f"attention dropout {dropout} is not supported; set attention_dropout to 0 in its config.json"
    if fault:
        raise ValueError(f"model type {config.model_type!r} cannot be packed: {fault}")


def require_rows(encoder: nn.Module, largest_id: int) -> None:
    """ValueError where the tokenizer can emit an id that the embedding table has no row for."""
    tables = [m for m in encoder.modules() if isinstance(m, nn.Embedding)]
    rows = max(table.num_embeddings for table in tables)
    if largest_id >= rows:
        raise ValueError(
            f"the tokenizer emits ids up to {largest_id}, the model's embedding table has {rows} rows; they do not "
            "belong together: set preprocess.tokenizer to the tokenizer of model.name"
        )


def _keep_whole(embedding: nn.Module) -> None:
    """Turn the frozen table into a buffer, which ZeRO-3 leaves whole on every rank.

    As a parameter it would be gathered in full for every chunk to look up a few rows: 262 MB each time for Mistral-7B,
    more than half of all traffic for a small model.
    """
    weight = embedding.get_parameter("weight").detach().clone()  # a sharded one is whole for a moment only
    del embedding._parameters["weight"]
    embedding.register_buffer("weight", weight, persistent=False)


def _keep_first_layers(config: PretrainedConfig, num_layers: int) -> None:
    if num_layers > config.num_hidden_layers:
        raise ValueError(f"model.num_layers={num_layers}, but the model has {config.num_hidden_layers} layers")
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]


def choose_trained(encoder: HasDecoder, model: ModelSettings) -> None:
    """What trains, as the recipe says: every weight, or adapters (fresh ones, or those of `model.adapter`)."""
    if model.trained == "full":
        encoder.decoder.requires_grad_(True)
        return
    add_lora(encoder, model.lora)
    if model.adapter:
        continue_adapter(encoder, Path(model.adapter), model)


def add_lora(encoder: HasDecoder, lora: LoraSettings) -> None:
    """Fresh adapters on the seven projections; they and the marker rows are all that trains.

    Raises:
        ValueError: the decoder has no modules of these names; adapters on some of them would be another method.
    """
    found = {name.rsplit(".", 1)[-1] for name, _ in encoder.decoder.named_modules()}
    if missing := [name for name in PROJECTIONS if name not in found]:
        raise ValueError(
            f"the model has no modules {', '.join(missing)}: LoRA needs a decoder with the projections "
            f"{', '.join(PROJECTIONS)} (LLaMA, Mistral, Qwen, Gemma)"
        )
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(PROJECTIONS), bias="none"
    )
    encoder.decoder = get_peft_model(encoder.decoder, config)
    for module in encoder.modules():
        if isinstance(module, MarkerEmbedding):
            module.marker_rows.requires_grad_(True)


def continue_adapter(encoder: HasDecoder, folder: Path, model: ModelSettings) -> None:
    """Weights of an adapter, and its marker rows if it has any, in place of the fresh ones that `add_lora` made.

    Raises:
        ValueError: no adapter there, or one of another rank, alpha, base or set of modules than the recipe's.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"model.adapter={folder} holds no adapter_config.json; name a run's model/ folder, or PEFT's")
    _require_adapter(folder)
    saved = LoraConfig.from_pretrained(str(folder))
    for name, wanted, found in (("rank", model.lora.rank, saved.r), ("alpha", model.lora.alpha, saved.lora_alpha)):
        if wanted != found:
            raise ValueError(f"model.adapter={folder} has {name} {found}; set model.lora.{name}={found}, not {wanted}")
    odd = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none", "use_dora": False}
    for name, usual in odd.items():
        if (value := getattr(saved, name)) != usual:
            raise ValueError(f"model.adapter={folder} has {name}={value!r}, which is not trained here; merge it first")
    if Path(saved.base_model_name_or_path or "").name != Path(model.name).name:
        log.warning("model.adapter %s was trained on %s, not %s", folder, saved.base_model_name_or_path, model.name)
    try:
        report: Any = set_peft_model_state_dict(encoder.decoder, load_peft_weights(str(folder), device="cpu"))
    except RuntimeError as error:
        raise ValueError(f"model.adapter={folder} does not fit {model.name}: {str(error).splitlines()[-1]}") from error
    missing = [name for name in report.missing_keys if "lora_" in name]
    if others := [*missing, *report.unexpected_keys]:
        raise ValueError(f"model.adapter={folder} adapts other modules than {', '.join(PROJECTIONS)}: {others[0]}, ...")
    if (folder / MARKERS_FILE).is_file():
        load_markers(encoder, folder)
    elif any(isinstance(module, MarkerEmbedding) for module in encoder.modules()):
        log.info("model.adapter %s has no %s: the template's markers start anew", folder, MARKERS_FILE)


def _require_adapter(folder: Path) -> None:
    """ValueError naming the file of an adapter's folder that is missing or damaged."""
    config, weights, markers = (folder / n for n in ("adapter_config.json", "adapter_model.safetensors", MARKERS_FILE))
    if not weights.is_file() and not weights.with_suffix(".bin").is_file():
        raise ValueError(f"{weights} is missing; was the folder copied in part?")
    for file in (config, weights, markers):
        try:
            if file == config:
                json.loads(file.read_text(encoding="utf-8"))
            elif file.is_file():
                with safe_open(file, framework="pt"):
                    pass
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{file} is damaged ({error}); copy it again") from error


def load_markers(encoder: HasDecoder, folder: Path) -> None:
    """Marker rows of a saved `model/` folder, where the template has markers of its own."""
    markers = [module for module in encoder.modules() if isinstance(module, MarkerEmbedding)]
    if bool(markers) != (folder / MARKERS_FILE).is_file():
        raise ValueError(f"{folder / MARKERS_FILE} and the template's markers disagree; was the folder copied in part?")
    for module in markers:
        try:
            rows_MD = load_file(folder / MARKERS_FILE)["marker_rows"]
        except SafetensorError as error:
            raise ValueError(f"{folder / MARKERS_FILE} is damaged ({error}); copy it again") from error
        if rows_MD.shape != module.marker_rows.shape:
            raise ValueError(
                f"{folder / MARKERS_FILE} holds {tuple(rows_MD.shape)} rows, the template needs "
                f"{tuple(module.marker_rows.shape)}; use the template and the model that it was trained with"
            )
        module.marker_rows.data.copy_(rows_MD)


def load_adapter(encoder: HasDecoder, folder: Path) -> None:
    """Adapters of a saved `model/` folder onto a base encoder, for inference.

    Raises:
        ValueError: no adapter there, a damaged one, or one of another base.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no adapter_config.json: not the model/ folder of a finished run")
    _require_adapter(folder)
    try:
        encoder.decoder = PeftModel.from_pretrained(encoder.decoder, folder)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{folder} is an adapter of another base model than the one it names: {reason}") from error
    # PEFT leaves what the file lacks as it was made, with a warning.
    needed, found = set(get_peft_model_state_dict(encoder.decoder)), set(load_peft_weights(str(folder), device="cpu"))
    if odd := sorted(needed ^ found):
        what = "lacks" if odd[0] in needed else "adapts what its base model has not:"
        raise ValueError(f"{folder} {what} {odd[0]} ({len(odd)} in all); was it trained on another base model?")


def trainable_parameters(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, in a fixed order, of all that trains."""
    return {name: p for name, p in encoder.named_parameters() if p.requires_grad}
