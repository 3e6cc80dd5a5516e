"""Pairs for a reranker: pieces joined are the whole text tokenised, what is merged is the passage, limits hold."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizing import HARD

from pipeline.data.pairs import PairTokenizer, compose_pair, load_pair_tokenizer, tokenize_pair_pieces
from pipeline.prompts import BGE_RERANKER, render_pair

PROMPTS = [prompt for _, prompt in BGE_RERANKER.prompts]
TOKENIZERS = ("smollm2", "mistral", "qwen_style")


@pytest.fixture(scope="session")
def load(smollm2_tokenizer_dir, mistral_tokenizer_dir, qwen_style_tokenizer_dir):
    folders = dict(
        zip(TOKENIZERS, (smollm2_tokenizer_dir, mistral_tokenizer_dir, qwen_style_tokenizer_dir), strict=True)
    )
    loaded = {name: load_pair_tokenizer(folder, BGE_RERANKER) for name, folder in folders.items()}
    return loaded.__getitem__


def compose(pt: PairTokenizer, query: str, passage: str, prompt: str, limit: int = 10_000):
    kinds = {"query": query, "passage": passage, "prompt": prompt}
    return compose_pair(pt, *(tokenize_pair_pieces(pt, [text], kind)[0] for kind, text in kinds.items()), limit)


def check_pair(pt: PairTokenizer, query: str, passage: str, prompt: str) -> None:
    text, passage_start = render_pair(BGE_RERANKER, query, passage, prompt), len(f"A: {query}\n")
    whole = pt.encoder.tokenizer.encode(text)
    pair = compose(pt, query, passage, prompt)
    assert pair.ids.tolist() == [*pt.bos, *whole.ids] and not pair.query_was_cut and not pair.passage_was_cut
    # By the characters that tokens stand for: nothing of the query or the prompt is merged, all of the passage is.
    offsets = whole.offsets[pair.start - len(pt.bos) - 1 : pair.stop - len(pt.bos)]
    assert offsets[0][1] <= passage_start <= offsets[1][0]
    assert passage_start + len(f"B: {passage}") <= offsets[-1][1] <= passage_start + len(f"B: {passage}\n")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_joined_are_the_whole_pair(name, prompt, load):
    for i, text in enumerate(HARD):
        check_pair(load(name), HARD[i - 1], text, prompt)


@given(query=st.text(max_size=30), passage=st.text(max_size=60))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_pair(name, load, query, passage):
    pt = load(name)
    pair = compose(pt, query, passage, PROMPTS[0])
    assert len(pt.bos) < pair.start < pair.stop < len(pair.ids)


def test_a_separator_that_is_one_token_with_the_passages_end_is_merged(load):
    """Qwen's kind of tokenizer joins a full stop and the newline; others leave the newline to the prompt."""
    pairs = {name: compose(load(name), "Is it?", "It is.", PROMPTS[0]) for name in TOKENIZERS}
    last = {name: load(name).tokenizer.decode(pair.ids[pair.stop - 1 : pair.stop]) for name, pair in pairs.items()}
    assert last == {"smollm2": ".", "mistral": ".", "qwen_style": ".\n"}
    pair, decode = pairs["smollm2"], load("smollm2").tokenizer.decode
    parts = [decode(part) for part in np.split(pair.ids, [pair.start, pair.stop])]
    assert parts == ["A: Is it?\n", "B: It is.", "\n" + PROMPTS[0]]


def test_a_long_pair_loses_passage_and_at_most_a_query_beyond_three_quarters(load):
    pt, prompt = load("mistral"), PROMPTS[0]
    long = "river stone cloud amber violin engine market planet copper garden " * 40
    whole = compose(pt, "What is it?", long, prompt)
    num_prompt = len(tokenize_pair_pieces(pt, [prompt], "prompt")[0])
    cut = compose(pt, "What is it?", long, prompt, 60)
    assert len(cut.ids) == 60 and cut.passage_was_cut and not cut.query_was_cut
    assert cut.start == whole.start and cut.ids[: cut.stop].tolist() == whole.ids[: cut.stop].tolist()
    assert cut.ids[cut.stop :].tolist() == whole.ids[whole.stop :].tolist()  # separator and prompt
    both = compose(pt, long, long, prompt, 60)
    assert len(both.ids) == 60 and both.start == 45 and both.query_was_cut and both.passage_was_cut
    assert both.ids[44] == pt.query_tail[0] and both.stop - both.start == 60 - 45 - num_prompt - len(pt.passage_tail)
    short = compose(pt, long, "x", prompt, 400)
    assert short.start == 300 and short.query_was_cut and not short.passage_was_cut
    exact = compose(pt, "What is it?", long, prompt, len(whole.ids))
    assert not exact.passage_was_cut and exact.ids.tolist() == whole.ids.tolist()
    with pytest.raises(ValueError, match="max_pair_tokens=50 leaves no room for a passage beside a query of 37 tokens"):
        compose(pt, "What is it?", "x", prompt, 50)


def test_a_template_of_one_letter_more_has_another_version():
    changed = dataclasses.replace(BGE_RERANKER, query="A : {}\n")
    assert changed.version != BGE_RERANKER.version and BGE_RERANKER.version.startswith("bge_reranker-")
    assert BGE_RERANKER.prompt("q-q") == "Predict whether queries A and B are asking the same thing."
    with pytest.raises(ValueError, match="relation='a-b' is unknown; known relations: q-p, q-q, p-p, arguana"):
        BGE_RERANKER.prompt("a-b")
