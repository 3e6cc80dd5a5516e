"""The model's shape from its config.json alone: no weights are read, and nothing else is downloaded.

D width, H heads, K head width, F width of the MLP, V rows of the embedding table.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.model.last_layer import FAMILIES as KNOWN
from pipeline.settings import ModelSettings

# Families whose layers were compared with the formulas; LLaMA's are taken for others, and the report says so.
BIASED = ("qwen2",)  # biases on query, key and value
HEAD_NORMS = ("qwen3", "gemma3_text")  # a norm on each head of query and key
FOUR_NORMS = ("gemma2", "gemma3_text")


@dataclass(frozen=True)
class Matrix:
    """One projection of a layer; LoRA adds rank x (rows + columns)."""

    name: str
    inputs: int
    outputs: int

    @property
    def numel(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """What memory and time depend on. `markers` are new marker tokens, whose rows train. `full`: all weights train, and
    `frozen` and `trained`, which are LoRA's, say nothing.
    """

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocabulary: int
    lora_rank: int
    markers: int
    capped: bool  # soft cap of attention scores: a matrix of length x length a head is kept
    last_rows_only: bool  # the last layer goes on with last tokens (pipeline/model/last_layer.py)
    full: bool = False
    exits: int = 0  # of a reranker: a row that trains for each

    @property
    def query_width(self) -> int:
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The seven projections of one layer."""
        d, q, kv, f = self.width, self.query_width, self.kv_width, self.mlp_width
        return (
            Matrix("q_proj", d, q),
            Matrix("k_proj", d, kv),
            Matrix("v_proj", d, kv),
            Matrix("o_proj", q, d),
            Matrix("gate_proj", d, f),
            Matrix("up_proj", d, f),
            Matrix("down_proj", f, d),
        )

    @property
    def norms(self) -> int:
        """Norms of the width in a layer."""
        return 4 if self.family in FOUR_NORMS else 2

    @property
    def vectors(self) -> tuple[int, ...]:
        """Sizes of a layer's frozen vectors: norms and biases."""
        sizes = [self.width] * self.norms
        if self.family in HEAD_NORMS:
            sizes += [self.head_width] * 2
        if self.family in BIASED:
            sizes += [self.query_width, self.kv_width, self.kv_width]
        return tuple(sizes)

    @property
    def frozen(self) -> tuple[int, ...]:
        """Sizes of all frozen parameters; the embedding table is none of them: it is a buffer, whole on every rank."""
        layer = (*(m.numel for m in self.matrices), *self.vectors)
        return (*layer * self.layers, self.width)

    @property
    def trained(self) -> tuple[int, ...]:
        """Sizes of all parameters that train: LoRA's A and B, marker rows, a reranker's heads."""
        layer = tuple(self.lora_rank * n for m in self.matrices for n in (m.inputs, m.outputs))
        rows = [number * self.width for number in (self.markers, self.exits) if number]
        return (*layer * self.layers, *rows)

    @property
    def table(self) -> int:
        return self.vocabulary * self.width


def read_shape(model: ModelSettings, num_markers: int) -> ModelShape:
    """Shape of `model.name` with its LoRA and `model.num_layers`; ValueError where there is no such config."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(model.name)
    except OSError as error:
        raise ValueError(
            f"model.name={model.name!r}: its config.json cannot be read: {str(error).splitlines()[0]}; a folder that "
            "holds config.json will do"
        ) from error
    if not hasattr(config, "intermediate_size") or not hasattr(config, "num_attention_heads"):
        raise ValueError(f"model.name={model.name!r}: {config.model_type!r} is not a decoder of LLaMA's kind")
    layers = model.num_layers or config.num_hidden_layers
    if layers > config.num_hidden_layers:
        raise ValueError(f"model.num_layers={layers}, but the model has {config.num_hidden_layers} layers")
    return shape_of(
        config,
        layers,
        lora_rank=model.lora.rank if model.trained == "lora" else 0,
        markers=num_markers,
        last_rows_only=model.pooling == "last" and config.model_type in KNOWN,
        full=model.trained == "full",
    )


def shape_of(
    config: Any, layers: int, lora_rank: int, markers: int = 0, last_rows_only: bool = False, full: bool = False
) -> ModelShape:
    """Shape of a decoder by its configuration (of transformers) and what stands in no configuration."""
    return ModelShape(
        family=config.model_type,
        layers=layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        mlp_width=config.intermediate_size,
        vocabulary=config.vocab_size,
        lora_rank=lora_rank,
        markers=markers,
        capped=bool(getattr(config, "attn_logit_softcapping", None)),
        last_rows_only=last_rows_only,
        full=full,
    )
