"""Depth and width of a reranker at use (arXiv 2409.15700v1, appendix D), as they are asked for, chosen and named.

full                          all layers, and no tokens are merged
light                         the paper's compressed setting, scaled to the model's depth
exit=18,layers=6+12,ratio=2   any of these: score after so many layers (else all), and behind these (else those that the
                              model is meant for) make so many neighbouring passage tokens one (else none)
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.inference.reranker_files import read_exits, read_reranker
from pipeline.model.reranker import LIGHT_RATIO, check_reduction, scale_exit

FULL, LIGHT = "full", "light"
_KEYS = {"exit": "exit_layer", "layers": "compress_layers", "ratio": "compress_ratio"}


class Reduction(NamedTuple):
    """What changes nothing is left out: there is a ratio above 1 where there are layers, and only there."""

    exit_layer: int  # score after so many layers
    compress_layers: tuple[int, ...]  # below the exit, rising
    compress_ratio: int  # so many neighbouring passage tokens become one


def choose_reduction(
    exits: Sequence[int],
    own_layers: Sequence[int],
    exit_layer: int | None = None,
    compress_layers: Sequence[int] | None = None,
    compress_ratio: int = 1,
) -> Reduction:
    """The reduction of the arguments of `LightweightReranker.score`, their defaults filled in.

    Args:
        exits: all that the model has, rising; the last is its whole depth.
        own_layers: that it is meant to merge behind.

    Raises:
        ValueError: a depth or width that the model has not.
    """
    exit_layer = exits[-1] if exit_layer is None else exit_layer
    layers = own_layers if compress_layers is None else compress_layers
    merges = layers if compress_ratio != 1 else ()
    check_reduction(exits, exit_layer, merges, compress_ratio)
    if compress_ratio > 1 and not merges:
        raise ValueError(f"compress_ratio={compress_ratio}, but compress_layers is empty; name a layer, or ratio 1")
    merges = tuple(sorted({layer for layer in merges if layer < exit_layer}))
    return Reduction(exit_layer, merges, compress_ratio if merges else 1)


def read_setting(text: str, exits: Sequence[int], own_layers: Sequence[int]) -> Reduction:
    """What a text asks of a model; `exits` and `own_layers` as of `choose_reduction`.

    Raises:
        ValueError: it is not of the form above, names layers that nothing is merged at, or what the model has not.
    """
    if text == LIGHT:
        first = own_layers[:1]
        return choose_reduction(exits, own_layers, scale_exit(exits[-1], exits[0]), first, LIGHT_RATIO if first else 1)
    found: dict[str, Any] = {}
    for part in text.split(",") if text != FULL else ():
        key, _, value = part.partition("=")
        wanted = r"\d+(\+\d+)*" if key == "layers" else r"-?\d+"
        if _KEYS.get(key, key) in found or key not in _KEYS or not re.fullmatch(wanted, value):
            raise ValueError(
                f"{part!r} is not understood; write {FULL}, {LIGHT}, or any of exit=18, layers=6+12 and ratio=2, each "
                "once, with commas between them"
            )
        found[_KEYS[key]] = tuple(map(int, value.split("+"))) if key == "layers" else int(value)
    if "compress_layers" in found and found.get("compress_ratio", 1) == 1:
        raise ValueError("without a ratio above 1 nothing is merged at layers; add ratio=2, say")
    return choose_reduction(exits, own_layers, **found)


def name_setting(reduction: Reduction, depth: int) -> str:
    """The one text by which records know it: `full`, or as `exit=18,layers=6+12,ratio=2`."""
    exit_layer, layers, ratio = reduction
    if ratio == 1:
        return FULL if exit_layer == depth else f"exit={exit_layer}"
    return f"exit={exit_layer},layers={'+'.join(map(str, layers))},ratio={ratio}"


def resolve_settings(folder: Path, texts: Sequence[str], option: str) -> list[str]:
    """The names of what texts ask of a folder's reranker, whose weights are not read.

    Args:
        option: that gave the texts, for messages.

    Raises:
        ValueError: as `read_setting`; as `read_reranker`.
    """
    description, _ = read_reranker(folder)
    exits, names = read_exits(folder, description), []
    for text in texts:
        try:
            names.append(name_setting(read_setting(text, exits, description.compress_layers), exits[-1]))
        except ValueError as error:
            raise ValueError(f"{option} {text}: {error}") from error
    return names
