"""Token ids of one sequence from the pieces of the store: the only place that joins pieces and applies limits.

    query            bos [examples: instruct query response]* instruct query query_end eos
    passage          bos passage eos
    wrapped passage  bos instruct query query_end eos        (a passage in the form of a query, without examples)

Training, inference and plans all count with the same limits, so a plan's lengths are the lengths of what is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.datatypes import BatchPlan
from pipeline.settings import PreprocessSettings

if TYPE_CHECKING:
    from pipeline.data.store import TokenStore
    from pipeline.data.tokenizing import PromptTokens

Ids = Sequence[int] | np.ndarray
ExampleIds = tuple[Ids, Ids, Ids]


@dataclass(frozen=True)
class Limits:
    """Limits in tokens, each counting everything of its sequence (paper, section 4.1: 512, 512, 256, 256, 2048)."""

    max_query_tokens: int  # zero-shot query with BOS, instruction, end and EOS
    max_passage_tokens: int  # passage or wrapped passage with all that goes around it
    max_example_query_tokens: int  # instruction and query of an example
    max_example_passage_tokens: int  # response of an example
    max_prompt_tokens: int  # examples and query together

    @classmethod
    def from_settings(cls, settings: PreprocessSettings) -> Limits:
        """The limits of a recipe."""
        return cls(
            max_query_tokens=settings.max_query_tokens,
            max_passage_tokens=settings.max_passage_tokens,
            max_example_query_tokens=settings.max_example_query_tokens,
            max_example_passage_tokens=settings.max_example_passage_tokens,
            max_prompt_tokens=settings.max_prompt_tokens,
        )


def compose_query(
    tokens: PromptTokens, limits: Limits, instruct_ids: Ids, query_ids: Ids, examples: Sequence[ExampleIds] = ()
) -> tuple[np.ndarray, int]:
    """Compose a query; whole examples are dropped from the left until the prompt fits, the query's end never.

    Args:
        instruct_ids, query_ids: pieces with their literals; an empty instruction is an empty piece.
        examples: (instruct, query, response) pieces, leftmost first.

    Returns:
        int64 ids, and how many examples were dropped.

    Raises:
        ValueError: the instruction leaves no room for text within the limit of a query or of an example's query.
    """
    last = _wrapped(tokens, limits.max_query_tokens, "max_query_tokens", instruct_ids, query_ids)
    halves = [_example(tokens, limits, *example) for example in examples]
    room, first = limits.max_prompt_tokens - len(tokens.bos) - len(last), len(halves)
    while first > 0 and len(halves[first - 1]) <= room:
        first -= 1
        room -= len(halves[first])
    return _join([tokens.bos, *halves[first:], last]), first


def compose_start(
    tokens: PromptTokens, limits: Limits, instruct_ids: Ids, examples: Sequence[ExampleIds]
) -> np.ndarray:
    """What every query behind these examples begins with, up to its own text: int64 ids."""
    return _join([tokens.bos, *(_example(tokens, limits, *example) for example in examples), instruct_ids])


def compose_passage(tokens: PromptTokens, limits: Limits, passage_ids: Ids) -> np.ndarray:
    """Compose a plain passage: int64 ids, at most max_passage_tokens."""
    room = limits.max_passage_tokens - len(tokens.bos) - len(tokens.eos)
    _require_room(room, tokens.passage_tail, "max_passage_tokens", 0)
    return _join([tokens.bos, *_cut(passage_ids, room, tokens.passage_tail), tokens.eos])


def compose_wrapped(tokens: PromptTokens, limits: Limits, instruct_ids: Ids, query_ids: Ids) -> np.ndarray:
    """Compose a passage in the form of a query without examples: int64 ids, at most max_passage_tokens."""
    limit = limits.max_passage_tokens
    return _join([tokens.bos, _wrapped(tokens, limit, "max_passage_tokens", instruct_ids, query_ids)])


def _wrapped(tokens: PromptTokens, limit: int, name: str, instruct_ids: Ids, query_ids: Ids) -> np.ndarray:
    """Instruct, query, end and EOS within `limit` tokens, BOS counted but not included."""
    room = limit - _query_overhead(tokens) - len(instruct_ids)
    _require_room(room, tokens.query_tail, name, len(instruct_ids))
    return _join([instruct_ids, *_cut(query_ids, room, tokens.query_tail), tokens.query_end, tokens.eos])


def _example(tokens: PromptTokens, limits: Limits, instruct: Ids, query: Ids, response: Ids) -> np.ndarray:
    room, response_room = limits.max_example_query_tokens - len(instruct), limits.max_example_passage_tokens
    _require_room(room, tokens.query_tail, "max_example_query_tokens", len(instruct))
    _require_room(response_room, tokens.response_tail, "max_example_passage_tokens", 0)
    query_parts = _cut(query, room, tokens.query_tail)
    return _join([instruct, *query_parts, *_cut(response, response_room, tokens.response_tail)])


def _cut(ids: Ids, limit: int, tail: Sequence[int]) -> list[Ids]:
    """`ids`, or its start followed by the separator that the next piece needs, together `limit` tokens."""
    return [ids] if len(ids) <= limit else [ids[: limit - len(tail)], tail]


def _join(parts: Sequence[Ids]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def _query_overhead(tokens: PromptTokens) -> int:
    return len(tokens.bos) + len(tokens.query_end) + len(tokens.eos)


def _require_room(room: int, tail: Sequence[int], name: str, instruct_length: int) -> None:
    if room <= len(tail):
        raise ValueError(
            f"preprocess.{name} leaves no room for text: of its tokens {room} remain after an instruction of "
            f"{instruct_length} tokens and what the template adds; raise it or shorten the instruction"
        )


# Lengths, from the store's piece lengths alone.


def query_lengths(store: TokenStore, limits: Limits, text_B: np.ndarray, instruction_B: np.ndarray) -> np.ndarray:
    """Tokens of zero-shot queries, int64 [B]."""
    return _wrapped_lengths(store, limits.max_query_tokens, text_B, instruction_B)


def passage_lengths(store: TokenStore, limits: Limits, text_P: np.ndarray, instruction_P: np.ndarray) -> np.ndarray:
    """Tokens of passages, int64 [P]; instruction -1 is a plain passage, else wrapped with that instruction."""
    tokens, length_P = store.manifest.tokens, np.empty(len(text_P), dtype=np.int64)
    plain_P = instruction_P < 0
    piece = store.piece_lengths(text_P[plain_P], "passage")
    length_P[plain_P] = np.minimum(piece + len(tokens.bos) + len(tokens.eos), limits.max_passage_tokens)
    text, instruction = text_P[~plain_P], instruction_P[~plain_P]
    length_P[~plain_P] = _wrapped_lengths(store, limits.max_passage_tokens, text, instruction)
    return length_P


def example_lengths(
    store: TokenStore, limits: Limits, query_E: np.ndarray, response_E: np.ndarray, instruction_E: np.ndarray
) -> np.ndarray:
    """Tokens that one example each adds to a prompt, int64 [E]."""
    query = store.piece_lengths(query_E, "query") + instruction_lengths(store, instruction_E)
    response = store.piece_lengths(response_E, "response")
    query = np.minimum(query, limits.max_example_query_tokens)
    return query + np.minimum(response, limits.max_example_passage_tokens)


def instruction_lengths(store: TokenStore, instruction_N: np.ndarray) -> np.ndarray:
    """Tokens of the instruction pieces, int64 [N]."""
    distinct, inverse = np.unique(instruction_N, return_inverse=True)
    lengths = [len(store.instruction_pieces[i]) for i in distinct.tolist()]
    return np.array(lengths, dtype=np.int64)[inverse.reshape(-1)]


def _wrapped_lengths(store: TokenStore, limit: int, text: np.ndarray, instruction: np.ndarray) -> np.ndarray:
    length = store.piece_lengths(text, "query") + instruction_lengths(store, instruction)
    return np.minimum(length + _query_overhead(store.manifest.tokens), limit)


def plan_lengths(store: TokenStore, limits: Limits, plan: BatchPlan) -> np.ndarray:
    """Tokens of every sequence of the step, int64 [S]: queries with their examples first, then distinct passages."""
    example_E = example_lengths(
        store, limits, plan.example_query_E, plan.example_response_E, plan.example_instruction_E
    )
    cumulative = np.concatenate([[0], np.cumsum(example_E)])
    examples_B = cumulative[plan.example_offsets[1:]] - cumulative[plan.example_offsets[:-1]]
    queries_B = query_lengths(store, limits, plan.query_text_B, plan.instruction_B) + examples_B
    return np.concatenate([queries_B, passage_lengths(store, limits, plan.passage_text_P, plan.passage_instruction_P)])


def sequence_ids(store: TokenStore, limits: Limits, plan: BatchPlan, s: int) -> np.ndarray:
    """Token ids of sequence `s` of the step, int64: a query with its examples, or a distinct passage."""
    tokens, p = store.manifest.tokens, s - plan.num_queries
    if p >= 0:
        text, instruction = int(plan.passage_text_P[p]), int(plan.passage_instruction_P[p])
        if instruction < 0:
            return compose_passage(tokens, limits, store.piece(text, "passage"))
        return compose_wrapped(tokens, limits, store.instruction_pieces[instruction], store.piece(text, "query"))
    query = store.piece(int(plan.query_text_B[s]), "query")
    examples = [
        (
            store.instruction_pieces[plan.example_instruction_E[e]],
            store.piece(int(plan.example_query_E[e]), "query"),
            store.piece(int(plan.example_response_E[e]), "response"),
        )
        for e in range(int(plan.example_offsets[s]), int(plan.example_offsets[s + 1]))
    ]
    instruct = store.instruction_pieces[plan.instruction_B[s]]
    ids, num_dropped = compose_query(tokens, limits, instruct, query, examples)
    assert num_dropped == 0, "a plan holds only examples that fit"
    return _blank_examples(tokens, limits, ids, instruct, query) if plan.filler else ids


def _blank_examples(tokens: PromptTokens, limits: Limits, ids: np.ndarray, instruct: Ids, query: Ids) -> np.ndarray:
    """The same prompt with every example token replaced by the blank line that ends an example, over and over."""
    last, _ = compose_query(tokens, limits, instruct, query)
    start, num_filler = len(tokens.bos), len(ids) - len(last)
    blank = tokens.response_tail or tokens.query_end
    ids[start : start + num_filler] = np.resize(np.array(blank, dtype=np.int64), num_filler)
    return ids
