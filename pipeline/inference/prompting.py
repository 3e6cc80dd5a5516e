"""Texts to token ids of whole sequences, by the template and limits of a model. What is changed on the way is logged.

N texts.
"""

import dataclasses
import logging
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.composing import ExampleIds, Ids, Limits, compose_passage, compose_query, compose_start
from pipeline.data.tokenizing import PromptTokenizer, tokenize_pieces

log = logging.getLogger(__name__)

Example = tuple[str, str]  # (query, response)

_HALVED = "hold half a character (a lone surrogate), now U+FFFD"
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer takes


@dataclass(frozen=True)
class Prompt:
    """A query with all that goes around it."""

    ids: np.ndarray  # int64
    start: int  # tokens before the query's own text, which other prompts with these examples share; 0: no examples
    num_dropped: int  # examples


def compose_prompts(
    pt: PromptTokenizer,
    limits: Limits,
    texts: Sequence[str],
    instruction: str,
    examples_of: Sequence[Sequence[Example]],
    drop_examples: bool,
    context: int | None,
) -> list[Prompt]:
    """The whole prompt of each query.

    Args:
        texts: N queries.
        examples_of: N lists of (query, response), leftmost first.
        drop_examples: drop whole examples from the left until the prompt has the length that the model was trained for.
        context: tokens that the model can read; None: it has no such limit.

    Raises:
        ValueError: a text or example that is none, or a prompt longer than `context`.
    """
    texts = check_texts(texts, "queries")
    instruct, shots_of = _tokenize_shots(pt, limits, instruction, examples_of)
    tokens, pieces = pt.tokens, tokenize_pieces(pt, texts, "query")
    around = len(tokens.bos) + len(instruct) + len(tokens.query_end) + len(tokens.eos)
    _log_cut("queries", [len(piece) + around for piece in pieces], limits.max_query_tokens)
    used = limits if drop_examples else dataclasses.replace(limits, max_prompt_tokens=sys.maxsize)
    prompts = []
    for piece, shots in zip(pieces, shots_of, strict=True):
        ids, num_dropped = compose_query(tokens, used, instruct, piece, shots)
        kept = shots[num_dropped:]
        prompts.append(Prompt(ids, len(compose_start(tokens, used, instruct, kept)) if kept else 0, num_dropped))
    _check_lengths(prompts, limits.max_prompt_tokens, context)
    return prompts


def compose_passages(
    pt: PromptTokenizer, limits: Limits, texts: Sequence[str], context: int | None
) -> tuple[list[np.ndarray], Counter[str]]:
    """Token ids of each passage, int64, and what was changed, for `log_changes`; ValueError for a text that is none."""
    texts, changes = _clean(texts, "passages")
    pieces = tokenize_pieces(pt, texts, "passage")
    around = len(pt.tokens.bos) + len(pt.tokens.eos)
    changes += _count_cut([len(piece) + around for piece in pieces], limits.max_passage_tokens)
    composed = [compose_passage(pt.tokens, limits, piece) for piece in pieces]
    _require_context("passages", [len(ids) for ids in composed], context, "cut the passages")
    return composed, changes


def log_changes(changes: Mapping[str, int], total: int, what: str) -> None:
    """A line for each thing that was changed: `3 of 7 passages are empty`."""
    for change, number in changes.items():
        log.log(logging.WARNING if change == _HALVED else logging.INFO, "%d of %d %s %s", number, total, what, change)


def check_texts(texts: Sequence[str], what: str) -> list[str]:
    """The texts, every lone surrogate replaced by U+FFFD; counts those and empty texts.

    Raises:
        ValueError: not a list, or one that holds something that is no text.
    """
    clean, changes = _clean(texts, what)
    log_changes(changes, len(clean), what)
    return clean


def _clean(texts: Sequence[str], what: str) -> tuple[list[str], Counter[str]]:
    """`check_texts` without a word in the log: (texts, what was found -> how many)."""
    if isinstance(texts, str):
        raise ValueError(f"{what}={texts[:40]!r} is one text; give a list of texts")
    if not isinstance(texts, Sequence):  # a generator would be empty at the second look
        raise ValueError(f"{what} is a {type(texts).__name__}; give a list of texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{what}[{i}]={text!r:.40} is not a text; remove it or make it a string")
    clean = [text if text.isascii() else _SURROGATE.sub("\ufffd", text) for text in texts]
    num_halved = sum(new != old for new, old in zip(clean, texts, strict=True))
    num_empty = sum(not text.strip() for text in clean)
    return clean, +Counter({_HALVED: num_halved, "are empty": num_empty})  # +: without those that are 0


def check_examples(examples: Sequence[Example]) -> tuple[Example, ...]:
    """The examples as tuples; ValueError for one that is not a query and a response."""
    for i, example in enumerate(examples):
        whole = isinstance(example, (tuple, list)) and len(example) == 2
        if not whole or not all(isinstance(text, str) and text.strip() for text in example):
            raise ValueError(f"examples[{i}]={example!r:.80} must be a query and a response, neither of them empty")
    return tuple((query, response) for query, response in examples)


def _tokenize_shots(
    pt: PromptTokenizer, limits: Limits, instruction: str, examples_of: Sequence[Sequence[Example]]
) -> tuple[Ids, list[tuple[ExampleIds, ...]]]:
    """Pieces of the instruction and of each query's examples; each distinct example is tokenized once."""
    checked = {id(examples): check_examples(examples) for examples in examples_of}
    examples_of = [checked[id(examples)] for examples in examples_of]
    distinct = list(dict.fromkeys(example for examples in checked.values() for example in examples))
    instruct = tokenize_pieces(pt, check_texts([instruction], "instruction"), "instruct")[0] if instruction else []
    queries = tokenize_pieces(pt, check_texts([query for query, _ in distinct], "example queries"), "query")
    responses = tokenize_pieces(pt, check_texts([r for _, r in distinct], "example responses"), "response")
    _log_cut("example queries", [len(instruct) + len(q) for q in queries], limits.max_example_query_tokens)
    _log_cut("example responses", [len(r) for r in responses], limits.max_example_passage_tokens)
    halves = zip(distinct, queries, responses, strict=True)
    shots = {example: (instruct, query, response) for example, query, response in halves}
    return instruct, [tuple(shots[example] for example in examples) for examples in examples_of]


def _check_lengths(prompts: Sequence[Prompt], trained: int, context: int | None) -> None:
    """Count prompts that lost examples or are longer than trained; ValueError for those longer than the context."""
    lengths = [len(prompt.ids) for prompt in prompts]
    _require_context("prompts", lengths, context, "give fewer or shorter examples, or drop_examples=True")
    if num_short := sum(prompt.num_dropped > 0 for prompt in prompts):
        num_dropped = sum(prompt.num_dropped for prompt in prompts)
        log.info(
            "%d of %d prompts lost examples, %d in all, to stay within %d tokens",
            num_short,
            len(prompts),
            num_dropped,
            trained,
        )
    if num_long := sum(length > trained for length in lengths):
        log.warning(
            "%d of %d prompts are longer than the %d tokens that the model was trained with (the longest: %d); give "
            "fewer or shorter examples, or drop_examples=True",
            num_long,
            len(prompts),
            trained,
            max(lengths),
        )


def _require_context(what: str, lengths: Sequence[int], context: int | None, remedy: str) -> None:
    if context is not None and (num_long := sum(length > context for length in lengths)):
        raise ValueError(
            f"{num_long} of {len(lengths)} {what} are longer than the {context} tokens that the model can read "
            f"(max_position_embeddings; the longest: {max(lengths)}); {remedy}"
        )


def _log_cut(what: str, lengths: Sequence[int], limit: int) -> None:
    log_changes(_count_cut(lengths, limit), len(lengths), what)


def _count_cut(lengths: Sequence[int], limit: int) -> Counter[str]:
    return +Counter({f"are longer than {limit} tokens and were cut": sum(length > limit for length in lengths)})
