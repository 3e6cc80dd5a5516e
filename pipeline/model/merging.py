"""Passages shortened inside a decoder, and its scores read at several depths (arXiv 2409.15700v1, appendix D).

At chosen layers each `ratio` neighbouring passage tokens of a pair become their mean, and position ids count anew. All
of that follows from lengths alone, so a `Route` is made before a call and handed down to the layers as a keyword;
hooks on the layers carry it out, and the layers' code stays that of transformers. Behind a layer that is an exit the
rows of the last tokens are taken along at the end of the packed row, past every later layer, so that the decoder's
final norm sees them and nothing has to be kept outside of the call.

T packed tokens, U packed tokens after a merge, S pairs, E exits, R ratio, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Level:
    """The packed tokens that layers see from one merge to the next; the first level's are those of the input."""

    layer: int  # layers that ran before it
    cu_seqlens: Tensor  # int32 [S + 1]
    max_seqlen: int
    position_ids_U: Tensor  # int64
    place_U: Tensor  # int64, the input token of the same pair and position: what depends on positions is picked there
    member_UR: Tensor  # int64, tokens of the level before that a token is made of; repeated where there are fewer
    share_UR: Tensor  # fp32, the share of each, 0 for what is repeated

    @property
    def num_tokens(self) -> int:
        return len(self.position_ids_U)

    def to(self, device: torch.device) -> "Level":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in tensors.items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class Route:
    """What one call asks of the decoder: levels, first the input's, and exits in rising order."""

    levels: tuple[Level, ...]
    exits: tuple[int, ...]

    def levels_at(self, layer: int) -> tuple[Level, Level]:
        """(the level whose tokens come to a layer, the level that it works on): two where the layer merges."""
        reached = [level for level in self.levels if level.layer <= layer]
        coming = reached[-2] if len(reached) > 1 and reached[-1].layer == layer else reached[-1]
        return coming, reached[-1]

    def to(self, device: torch.device) -> "Route":
        return Route(tuple(level.to(device) for level in self.levels), self.exits)


def plan_route(
    cu_seqlens: np.ndarray,
    passage_S2: np.ndarray,
    exits: Sequence[int],
    compress_layers: Sequence[int] = (),
    ratio: int = 1,
) -> Route:
    """Where every token stands in every layer.

    Args:
        cu_seqlens: int32, S + 1: pair s is tokens cu_seqlens[s] : cu_seqlens[s + 1].
        passage_S2: first token of each pair's passage and the one after its last, counted from the pair's first.
            A passage may be empty; a token must follow it.
        exits: after how many layers scores are read.
        compress_layers: after how many layers passages are merged; those at or above the last exit change nothing.
        ratio: passage tokens that become one; what is left over at the end of a passage becomes one too.
    """
    length_S, (start_S, stop_S) = np.diff(cu_seqlens).astype(np.int64), passage_S2.T.astype(np.int64)
    assert ((start_S >= 0) & (start_S <= stop_S) & (stop_S < length_S)).all(), "a pair ends with its prompt"
    begin_S = np.asarray(cu_seqlens[:-1], dtype=np.int64)
    levels = [_level(0, length_S, begin_S, *_means(length_S, start_S, start_S, 1), begin_S)]
    for layer in sorted(set(compress_layers)) if ratio > 1 else ():
        before_S = levels[-1].cu_seqlens[:-1].numpy().astype(np.int64)
        means = _means(length_S, start_S, stop_S, ratio)
        kept_S = -(-(stop_S - start_S) // ratio)
        length_S, stop_S = length_S - (stop_S - start_S) + kept_S, start_S + kept_S
        levels.append(_level(layer, length_S, before_S, *means, begin_S))
    return Route(tuple(levels), tuple(sorted(set(exits))))


def _means(length_S: np.ndarray, start_S: np.ndarray, stop_S: np.ndarray, ratio: int) -> tuple[np.ndarray, np.ndarray]:
    """For each token after a merge the first token, counted within its pair, that it is made of, and how many."""
    num_S = stop_S - start_S
    kept_S = -(-num_S // ratio)
    new_S = length_S - num_S + kept_S
    position_U = _positions(new_S)
    start_U, stop_U, kept_U, num_U = (np.repeat(x, new_S) for x in (start_S, stop_S, kept_S, num_S))
    rank_U = position_U - start_U  # of a token among the passage's
    inside_U = (rank_U >= 0) & (rank_U < kept_U)
    behind_U = rank_U >= kept_U
    first_U = np.where(inside_U, start_U + rank_U * ratio, position_U + np.where(behind_U, num_U - kept_U, 0))
    return first_U, np.where(inside_U, np.minimum(ratio, stop_U - first_U), 1)


def _level(
    layer: int,
    length_S: np.ndarray,
    before_S: np.ndarray,
    first_U: np.ndarray,
    count_U: np.ndarray,
    input_S: np.ndarray,
) -> Level:
    """A level of pairs of these lengths. `before_S`, `input_S`: where each begins in the level before and the input."""
    position_U, rank_R = _positions(length_S), np.arange(count_U.max(initial=1))
    member_UR = np.repeat(before_S, length_S)[:, None] + first_U[:, None] + np.minimum(rank_R, count_U[:, None] - 1)
    return Level(
        layer=layer,
        cu_seqlens=torch.from_numpy(np.concatenate([[0], length_S.cumsum()]).astype(np.int32)),
        max_seqlen=int(length_S.max()),
        position_ids_U=torch.from_numpy(position_U),
        place_U=torch.from_numpy(np.repeat(input_S, length_S) + position_U),
        member_UR=torch.from_numpy(member_UR),
        share_UR=torch.from_numpy(((rank_R < count_U[:, None]) / count_U[:, None]).astype(np.float32)),
    )


def _positions(length_S: np.ndarray) -> np.ndarray:
    """0, 1, ... for every pair, end to end."""
    return np.arange(length_S.sum()) - np.repeat(length_S.cumsum() - length_S, length_S)


def follow_routes(layers: nn.ModuleList) -> None:
    """Let a decoder's layers do what a keyword `route` asks for; calls without one are as before.

    The decoder then gives hidden states [1, E S, D]: the last tokens of all pairs at the first exit, then at the next.
    The caller must stop it after the last exit.
    """
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(_enter(i), with_kwargs=True)
        layer.register_forward_hook(_leave(i), with_kwargs=True)


def _enter(i: int) -> Any:
    """Hook before layer i: merges where the route says so, and gives the layer what belongs to its level.

    Transformers computes positions and lengths once a call, so every layer above a merge is given others. Nothing is
    kept here between calls: where activations are recomputed the same happens again, or has happened already,
    whichever side of the checkpoint the version of transformers runs hooks on.
    """

    def enter_layer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        route: Route | None = kwargs.get("route")
        if route is None:
            return None
        assert i < route.exits[-1], "the decoder runs layers above the last exit"
        coming, level = route.levels_at(i)
        hidden, *rest = args
        tokens, taken = hidden.split([coming.num_tokens, hidden.shape[1] - coming.num_tokens], dim=1)
        if coming is not level:
            tokens = merge_tokens(tokens[0], level)[None]
        own: dict[str, Any] = {
            "cu_seq_lens_q": level.cu_seqlens,
            "cu_seq_lens_k": level.cu_seqlens,
            "max_length_q": level.max_seqlen,
            "max_length_k": level.max_seqlen,
            "position_ids": level.position_ids_U[None],
            "position_embeddings": tuple(x[:, level.place_U] for x in kwargs["position_embeddings"]),
        }
        return (tokens, *rest), {**kwargs, **own, "taken": taken}

    return enter_layer


def _leave(i: int) -> Any:
    """Hook behind layer i: rows taken along go on behind the tokens; after the last exit there is nothing else."""

    def leave_layer(module: nn.Module, args: Any, kwargs: dict[str, Any], hidden: Tensor) -> Tensor | None:
        route: Route | None = kwargs.get("route")
        if route is None:
            return None
        taken: Tensor = kwargs["taken"]
        if i + 1 in route.exits:
            level = route.levels_at(i)[1]
            taken = torch.cat([taken, hidden[:, level.cu_seqlens[1:].long() - 1]], dim=1)
        if i + 1 == route.exits[-1]:
            return taken
        return torch.cat([hidden, taken], dim=1) if taken.shape[1] else hidden

    return leave_layer


def merge_tokens(hidden_TD: Tensor, level: Level) -> Tensor:
    """[U, D]: means of the tokens of the level before, taken in fp32.

    Gathered, not scattered: on a GPU sums of scattered rows have no fixed order.
    """
    mean_UD = (hidden_TD[level.member_UR].float() * level.share_UR[..., None]).sum(1)
    return mean_UD.to(hidden_TD.dtype)
