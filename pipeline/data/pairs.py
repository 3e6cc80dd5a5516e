"""Token ids of the pairs that a reranker scores: tokenising the pieces of a pair, and joining them within its limit.

    bos query passage prompt

Pieces are tokenised with the separator that follows them (pieces.py). The separator behind a passage is no part of what
a reranker merges, unless the tokenizer makes one token of it and the passage's end.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.composing import Ids
from pipeline.data.pieces import PieceEncoder, encode_pieces, make_pair_encoder, suffix_ids
from pipeline.data.tokenizing import bos_ids, load_fast, serialize
from pipeline.prompts import PairTemplate

QUERY_SHARE = (3, 4)  # of a pair's limit, at most (FlagEmbedding's lightweight reranker)


@dataclass(frozen=True)
class PairTokenizer:
    """A tokenizer and a template, ready for pieces of pairs."""

    tokenizer: Any  # of transformers: saves and decodes; pieces come from `encoder`
    template: PairTemplate
    bos: tuple[int, ...]  # () where the model was trained without BOS
    query_tail: tuple[int, ...]  # the separator put back when a piece is cut
    passage_tail: tuple[int, ...]
    encoder: PieceEncoder
    fingerprint: str  # sha256 over the fast tokenizer and BOS
    largest_id: int  # that a text can become


@dataclass(frozen=True)
class ComposedPair:
    """One pair: what a reranker merges is ids[start:stop]."""

    ids: np.ndarray  # int64
    start: int
    stop: int
    query_was_cut: bool
    passage_was_cut: bool


def load_pair_tokenizer(name: str, template: PairTemplate, bos: tuple[int, ...] | None = None) -> PairTokenizer:
    """Load a tokenizer (a folder or a hub name); ValueError where there is no fast one.

    Args:
        bos: what pairs begin with, where that is known: transformers 5 saves a tokenizer without the setting that tells
            whether it wants one. None: found out.
    """
    tokenizer = load_fast(name)
    bos = bos_ids(tokenizer, name) if bos is None else bos
    serialized = serialize(tokenizer)
    encoder = make_pair_encoder(serialized, template)
    return PairTokenizer(
        tokenizer=tokenizer,
        template=template,
        bos=bos,
        query_tail=suffix_ids(encoder, "query"),
        passage_tail=suffix_ids(encoder, "passage"),
        encoder=encoder,
        fingerprint=hashlib.sha256(serialized.encode() + json.dumps(bos).encode()).hexdigest(),
        largest_id=max(tokenizer.get_vocab().values()),
    )


def tokenize_pair_pieces(pt: PairTokenizer, texts: Sequence[str], kind: str) -> list[list[int]]:
    """Ids of pieces with the literals around them, uncut; special tokens in a text are read as plain text.

    Args:
        kind: "query", "passage" or "prompt".
    """
    return encode_pieces(pt.encoder.tokenizer, pt.encoder.rules[kind], texts)[0]


def compose_pair(
    pt: PairTokenizer, query_ids: Ids, passage_ids: Ids, prompt_ids: Ids, max_pair_tokens: int
) -> ComposedPair:
    """Join the pieces of a pair; where they are too many tokens, the passage is cut.

    Args:
        max_pair_tokens: limit of the whole pair, BOS and prompt counted; BOS and query get at most 3/4 of it.

    Raises:
        ValueError: the limit leaves no room for a passage.
    """
    query_limit = max_pair_tokens * QUERY_SHARE[0] // QUERY_SHARE[1]
    least = len(pt.passage_tail) + 1
    if max_pair_tokens - query_limit - len(prompt_ids) < least or query_limit <= len(pt.bos) + len(pt.query_tail):
        raise ValueError(
            f"max_pair_tokens={max_pair_tokens} leaves no room for a passage beside a query of {query_limit} tokens "
            f"and a prompt of {len(prompt_ids)}; raise it"
        )
    query = _cut(query_ids, query_limit - len(pt.bos), pt.query_tail)
    room = max_pair_tokens - len(pt.bos) - len(query) - len(prompt_ids)
    passage = _cut(passage_ids, room, pt.passage_tail)
    start = len(pt.bos) + len(query)
    has_tail = tuple(passage[len(passage) - len(pt.passage_tail) :]) == pt.passage_tail
    return ComposedPair(
        ids=np.array([*pt.bos, *query, *passage, *prompt_ids], dtype=np.int64),
        start=start,
        stop=start + len(passage) - (len(pt.passage_tail) if has_tail else 0),
        query_was_cut=len(query) < len(query_ids),
        passage_was_cut=len(passage) < len(passage_ids),
    )


def _cut(ids: Ids, limit: int, tail: tuple[int, ...]) -> list[int]:
    """`ids`, or its start followed by the separator that the next piece needs, together `limit` tokens."""
    return list(ids) if len(ids) <= limit else [*ids[: limit - len(tail)], *tail]
