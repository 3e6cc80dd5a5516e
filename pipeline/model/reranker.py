"""A causal decoder as a reranker whose depth and width are chosen at use (arXiv 2409.15700v1, appendix D).

A pair is read as `A: {query}`, `B: {passage}` and a prompt; its score is the logit of "Yes" at the last token. A linear
head for each of the upper layers, started from the LM head's row of "Yes", makes any of them an exit; exit k means that
the first k layers ran. Below, passage tokens can be merged (merging.py).

T packed tokens, S pairs, E exits, H heads, D width.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from torch import Tensor, nn

from pipeline.model.base import read_row
from pipeline.model.encoder import Gathered, load_decoder
from pipeline.model.merging import Route, follow_routes, plan_route
from pipeline.model.shapes import ModelShape, read_shape, shape_of
from pipeline.settings import ModelSettings

FIRST_EXIT, MERGE_LAYERS, PAPER_DEPTH = 8, (8, 16, 24, 32, 40), 42  # the paper's, of Gemma 2 9B
LIGHT_EXIT, LIGHT_RATIO = 25, 2  # its compressed setting, which merges behind the first of MERGE_LAYERS
_TABLES = ("model.embed_tokens.weight", "embed_tokens.weight")


class ExitHeads(nn.Module):
    """A row for each exit from `first_exit` to the decoder's whole depth. Products are taken in fp32."""

    def __init__(self, weight_HD: Tensor, first_exit: int) -> None:
        super().__init__()
        self.first_exit = first_exit
        self.weight_HD = nn.Parameter(weight_HD)

    def forward(self, hidden_ESD: Tensor, exits: Sequence[int]) -> Tensor:
        rows = torch.tensor([k - self.first_exit for k in exits], device=hidden_ESD.device)
        return torch.einsum("esd,ed->se", hidden_ESD.float(), self.weight_HD[rows].float())


class Reranker(nn.Module):
    """A decoder (a transformers model, or a PEFT model around one) and its heads, which always train.

    Heads read what the decoder's final norm makes of a layer's output. A soft cap that the model puts on its logits
    (Gemma 2) is put on scores too.
    """

    def __init__(self, decoder: nn.Module, weight_HD: Tensor, first_exit: int = FIRST_EXIT) -> None:
        """Heads as they are in `weight_HD`, fp32, the last for the whole depth; ValueError where they are not that."""
        super().__init__()
        base: Any = decoder.get_base_model() if isinstance(decoder, PeftModel) else decoder
        self.depth: int = base.config.num_hidden_layers
        _require_exit("first_exit", first_exit, 1, self.depth)
        if weight_HD.shape != (self.depth - first_exit + 1, base.config.hidden_size):
            raise ValueError(
                f"heads {tuple(weight_HD.shape)} do not fit a decoder of {self.depth} layers of width "
                f"{base.config.hidden_size} with first_exit={first_exit}; take the base model that they were made for"
            )
        self.decoder = decoder
        self.heads = ExitHeads(weight_HD, first_exit)
        self.context: int | None = getattr(base.config, "max_position_embeddings", None)  # tokens that it reads
        self.softcap: float | None = getattr(base.config, "final_logit_softcapping", None)
        follow_routes(base.layers)

    @property
    def exits(self) -> tuple[int, ...]:
        """All layers that can be exits."""
        return tuple(range(self.heads.first_exit, self.depth + 1))

    @property
    def shape(self) -> ModelShape:
        """What its arithmetic depends on (flop.py)."""
        decoder: Any = self.decoder
        adapters = getattr(decoder, "peft_config", {})
        return shape_of(decoder.config, self.depth, adapters["default"].r if adapters else 0)

    def plan(
        self,
        cu_seqlens: np.ndarray,
        passage_S2: np.ndarray,
        exits: Sequence[int] | None = None,
        compress_layers: Sequence[int] = (),
        compress_ratio: int = 1,
    ) -> Route:
        """The route of packed pairs, on the CPU; arguments as of `plan_route`.

        Args:
            exits: layers to score at; None: all that have a head.

        Raises:
            ValueError: as `check_reduction`.
        """
        exits = self.exits if exits is None else exits
        for k in exits:
            check_reduction(self.exits, k, compress_layers, compress_ratio)
        return plan_route(cu_seqlens, passage_S2, exits, compress_layers, compress_ratio)

    def forward(self, input_ids_T: Tensor, route: Route) -> Tensor:
        """scores_SE, fp32: of every pair at every exit of the route, in rising order of exits.

        Args:
            input_ids_T: int64, pairs end to end; `route` (of `plan`, on the same device) tells where each begins.
        """
        level = route.levels[0]
        with _only_first_layers(self.decoder, route.exits[-1]):
            hidden: Tensor = self.decoder(
                input_ids=input_ids_T[None],
                position_ids=level.position_ids_U[None],
                attention_mask=None,
                use_cache=False,
                cu_seq_lens_q=level.cu_seqlens,
                cu_seq_lens_k=level.cu_seqlens,
                max_length_q=level.max_seqlen,
                max_length_k=level.max_seqlen,
                route=route,
            ).last_hidden_state
        scores_SE = self.heads(hidden[0].unflatten(0, (len(route.exits), -1)), route.exits)
        return scores_SE if self.softcap is None else self.softcap * torch.tanh(scores_SE / self.softcap)


@contextlib.contextmanager
def _only_first_layers(decoder: Any, number: int) -> Iterator[None]:
    """Inside, a call of the decoder ends after `number` layers: transformers goes by the configuration."""
    config = decoder.config
    whole = config.num_hidden_layers
    config.num_hidden_layers = number
    try:
        yield
    finally:
        config.num_hidden_layers = whole


def check_reduction(exits: Sequence[int], exit_layer: int, compress_layers: Sequence[int], compress_ratio: int) -> None:
    """ValueError for an exit without a head, a layer to compress at that is none, or a ratio below 1.

    A layer at or above the exit may be named, as in the published model's examples: it changes nothing.

    Args:
        exits: all that the model has, rising; the last is its whole depth.
    """
    _require_exit("exit_layer", exit_layer, exits[0], exits[-1])
    for layer in compress_layers:
        if not 1 <= layer < exits[-1]:
            raise ValueError(
                f"compress_layers={list(compress_layers)}: {layer} is none of the layers 1 to {exits[-1] - 1} "
                "behind which another one follows"
            )
    if compress_ratio < 1:
        raise ValueError(f"compress_ratio={compress_ratio} must be 1 (no tokens are merged) or more")


def _require_exit(name: str, layer: int, lowest: int, depth: int) -> None:
    if not lowest <= layer <= depth:
        raise ValueError(f"{name}={layer} is none of the layers {lowest} to {depth} of this model")


def load_reranker(
    model: ModelSettings,
    yes_id: int,
    first_exit: int | None = None,
    device_type: str = "cpu",
    gathered: Gathered = lambda _: nullcontext(),
) -> Reranker:
    """An untrained reranker from a base model: a frozen decoder and a head a layer, each the row of "Yes".

    Args:
        yes_id: of `yes_token`.
        first_exit: None: as deep as the paper's is in its model.
        device_type, gathered: as of `load_decoder`.

    Raises:
        ValueError: as `load_decoder`; a model that attends both ways, has too few layers, or no LM head.
    """
    if model.attention != "causal":
        raise ValueError(f"model.attention={model.attention}: a reranker predicts its next token; set it to causal")
    decoder: Any = load_decoder(model, (), (), device_type, gathered)
    depth = decoder.config.num_hidden_layers
    first_exit = scale_layers(depth)[0] if first_exit is None else first_exit
    _require_exit("first_exit", first_exit, 1, depth)
    # From the files, not from the model: of the LM head, which can be as large as the table, one row is wanted.
    tied = decoder.config.tie_word_embeddings
    row_D = read_row(model.name, _TABLES if tied else ("lm_head.weight",), yes_id).float()
    return Reranker(decoder, row_D.repeat(depth - first_exit + 1, 1), first_exit)


def read_reranker_shape(model: ModelSettings) -> ModelShape:
    """Shape of the reranker that `load_reranker` makes, from its config.json alone; ValueError as of `read_shape`."""
    shape = read_shape(model, num_markers=0)
    return replace(shape, last_rows_only=False, exits=shape.layers - scale_layers(shape.layers)[0] + 1)


def scale_layers(depth: int) -> tuple[int, tuple[int, ...]]:
    """(first exit, layers to merge at) of a model of this depth: as far up as in the paper's."""
    scaled = [round(layer * depth / PAPER_DEPTH) for layer in (FIRST_EXIT, *MERGE_LAYERS)]
    return max(1, scaled[0]), tuple(sorted({layer for layer in scaled[1:] if 1 <= layer < depth}))


def scale_exit(depth: int, first_exit: int) -> int:
    """The layer at which the paper's compressed model is read, scaled to a model of this depth."""
    return max(first_exit, round(LIGHT_EXIT * depth / PAPER_DEPTH))


def yes_token(tokenizer: Tokenizer) -> int:
    """Id of "Yes", whose logit is the score; ValueError where that is not one token."""
    ids = tokenizer.encode("Yes", add_special_tokens=False).ids
    if len(ids) != 1:
        raise ValueError(
            f'the tokenizer makes {len(ids)} tokens of "Yes", and a score is the logit of one; take another base model'
        )
    return int(ids[0])
