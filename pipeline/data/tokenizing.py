"""From a tokenizer and a template to token ids: the only user of a tokenizer in training and preprocessing."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from pipeline.data.pieces import PieceEncoder, encode_pieces, make_encoder, plain_tokenizer, suffix_ids
from pipeline.prompts import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class PromptTokens:
    """Ids that are the same in every prompt of one tokenizer and template; the manifest keeps them."""

    bos: tuple[int, ...]  # () where the model was trained without BOS
    eos: tuple[int, ...]  # exactly one
    query_end: tuple[int, ...]
    query_tail: tuple[int, ...]  # the separator put back when a query piece is cut
    response_tail: tuple[int, ...]
    passage_tail: tuple[int, ...]  # () unless the template gives passages a prompt of their own
    marker_ids: tuple[int, ...]  # of template.markers, in order
    marker_subtokens: tuple[tuple[int, ...], ...]  # per marker: () if the tokenizer already had it


@dataclass(frozen=True)
class PromptTokenizer:
    """A tokenizer with the markers of a template, ready for pieces."""

    tokenizer: "PreTrainedTokenizerFast"  # saves and decodes; pieces come from `encoder`
    template: Template
    tokens: PromptTokens
    fingerprint: str  # sha256 over the fast tokenizer with its markers, BOS and EOS
    encoder: PieceEncoder
    largest_id: int  # that a text or marker known to the model can become; new markers come after
    serialized: str  # the fast tokenizer as JSON: what preprocessing processes load


def load_tokenizer(name: str, template: Template) -> PromptTokenizer:
    """Load a tokenizer (a folder or a hub name) and add the markers that it lacks.

    Raises:
        ValueError: no such tokenizer, no fast one, no EOS, or one that the template cannot be used with.
    """
    tokenizer = load_fast(name)
    if tokenizer.eos_token is None:
        raise ValueError(f"tokenizer {name!r} has no EOS token, whose embedding is the text's; set eos_token in it")
    bos = bos_ids(tokenizer, name)
    before = plain_tokenizer(tokenizer.backend_tokenizer.to_str())
    new = [marker for marker in template.markers if before.token_to_id(marker) is None]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(template.markers)}, replace_extra_special_tokens=False
    )
    subtokens = [before.encode(m, add_special_tokens=False).ids if m in new else [] for m in template.markers]
    serialized = serialize(tokenizer)
    encoder = make_encoder(serialized, template)
    tokens = PromptTokens(
        bos=bos,
        eos=(int(tokenizer.eos_token_id),),
        query_end=tuple(encode_pieces(encoder.tokenizer, encoder.rules["query_end"], [""])[0][0]),
        query_tail=suffix_ids(encoder, "query"),
        response_tail=suffix_ids(encoder, "response"),
        passage_tail=suffix_ids(encoder, "passage"),
        marker_ids=tuple(int(tokenizer.convert_tokens_to_ids(marker)) for marker in template.markers),
        marker_subtokens=tuple(tuple(ids) for ids in subtokens),
    )
    digest = hashlib.sha256(serialized.encode() + json.dumps([tokens.bos, tokens.eos]).encode())
    vocabulary = tokenizer.get_vocab()
    largest_id = max(i for token, i in vocabulary.items() if token not in new)
    return PromptTokenizer(tokenizer, template, tokens, digest.hexdigest(), encoder, largest_id, serialized)


def load_fast(name: str) -> Any:
    """A fast tokenizer of transformers as it is (a folder or a hub name); ValueError where there is none."""
    from transformers import AutoTokenizer

    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(f"tokenizer {name}: no such folder; check model.name or preprocess.tokenizer")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(":")
        remedy = "name its folder or hub name in preprocess.tokenizer (default: model.name)"
        raise ValueError(f"tokenizer {name!r} cannot be loaded: {reason}; {remedy}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name!r} has no fast version; convert it and save it with tokenizer.json")
    return tokenizer


def serialize(tokenizer: Any) -> str:
    """The fast tokenizer as JSON, without truncation and padding: those belong to a call, not to the tokenizer."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy.to_str()


def bos_ids(tokenizer: Any, name: str) -> tuple[int, ...]:
    """BOS where the model was trained with one: as the tokenizer's configuration says, else by what it does.

    Asking the loaded tokenizer is not enough. transformers 5 ignores `add_bos_token` of a configuration beside a
    tokenizer.json, and LLaMA's and Mistral's tokenizers come out without BOS. All models of that family (SentencePiece
    with byte fallback) were trained with BOS, but for those whose configuration denies it.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if tokenizer.bos_token is None:
        return ()
    bos = (int(tokenizer.bos_token_id),)
    configured = get_tokenizer_config(name).get("add_bos_token")
    if isinstance(configured, bool):
        return bos if configured else ()
    if tuple(tokenizer("a")["input_ids"][:1]) == bos:
        return bos
    return bos if json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("byte_fallback") else ()


def tokenize_pieces(pt: PromptTokenizer, texts: Sequence[str], kind: str) -> list[list[int]]:
    """Ids of pieces with the literals around them, without BOS and EOS, uncut.

    Special tokens that stand in a text (markers, EOS) are read as plain text.

    Args:
        kind: "instruct", "query", "response" or "passage". An empty instruction is an empty piece.
    """
    if kind not in ("instruct", "query", "response", "passage"):
        raise ValueError(f"kind={kind!r} must be one of instruct, query, response, passage")
    pieces, _ = encode_pieces(pt.encoder.tokenizer, pt.encoder.rules[kind], texts)
    if kind == "instruct":
        pieces = [piece if text else [] for piece, text in zip(pieces, texts, strict=True)]
    return pieces


def tokens_to_json(tokens: PromptTokens) -> dict[str, Any]:
    """Plain lists for the manifest."""
    return json.loads(json.dumps(asdict(tokens)))


def tokens_from_json(tree: dict[str, Any]) -> PromptTokens:
    """The inverse of `tokens_to_json`; ValueError names a missing or malformed field."""
    try:
        fields = {k: tuple(int(i) for i in v) for k, v in tree.items() if k != "marker_subtokens"}
        return PromptTokens(**fields, marker_subtokens=tuple(tuple(map(int, v)) for v in tree["marker_subtokens"]))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"the manifest's prompt tokens are malformed: {error}") from error
