"""Pieces joined must be the whole prompt tokenised, for every kind of tokenizer and template."""

import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from samples import installed_file, sample_texts
from tokenizers import Tokenizer

from pipeline.data.pieces import KINDS, derive_pieces, encode_pieces, plain_tokenizer
from pipeline.data.tokenizing import (
    PromptTokenizer,
    load_tokenizer,
    tokenize_pieces,
    tokens_from_json,
    tokens_to_json,
)
from pipeline.prompts import TEMPLATES, render_passage, render_query

TOKENIZERS = ("smollm2", "mistral", "qwen_style")
HARD = [
    "ends with a colon:",
    'and "quotes".',
    "a  double   space",
    "tab\tand\nnewline\n\ninside .\n x",
    "1234 567",
    "x",
    "(",
    "日本語のテキスト。",
    "emoji 😀 👩‍👩‍👧 end😀",
    "it's we'll I'D 's",
    "Query: Response: Instruct:",
    "a \u00a0 b\u3000c",
    "e\u0301 \u0301x",
    "\u200bzero width\u200b",
    "trailing dots ...",
    "-- --",
    "\u0000 nul",
]
Load = Callable[[str, str], PromptTokenizer]


@lru_cache
def loaded(folder: str, template: str) -> PromptTokenizer:
    return load_tokenizer(folder, TEMPLATES[template])


@pytest.fixture(scope="session")
def load(smollm2_tokenizer_dir: str, mistral_tokenizer_dir: str, qwen_style_tokenizer_dir: str) -> Load:
    folders = {
        "smollm2": smollm2_tokenizer_dir,
        "mistral": mistral_tokenizer_dir,
        "qwen_style": qwen_style_tokenizer_dir,
    }
    return lambda name, template: loaded(folders[name], template)


def whole_ids(pt: PromptTokenizer, texts: list[str]) -> list[list[int]]:
    """The obvious twin: the tokenizer itself on the whole prompt, markers read as special tokens."""
    return [e.ids for e in parsing_tokenizer(pt.serialized).encode_batch(texts, add_special_tokens=False)]


@lru_cache
def parsing_tokenizer(serialized: str) -> Tokenizer:
    tokenizer = plain_tokenizer(serialized)
    tokenizer.encode_special_tokens = False
    return tokenizer


@lru_cache
def parsing_specials(serialized: str) -> tuple[str, ...]:
    return tuple(token["content"] for token in json.loads(serialized)["added_tokens"] if token["special"])


def joined(pt: PromptTokenizer, instruction: str, query: str, examples: list[tuple[str, str, str]]) -> list[int]:
    ids: list[int] = []
    for example in examples:
        for text, kind in zip(example, ("instruct", "query", "response"), strict=True):
            ids += tokenize_pieces(pt, [text], kind)[0]
    ids += tokenize_pieces(pt, [instruction], "instruct")[0] + tokenize_pieces(pt, [query], "query")[0]
    return ids + list(pt.tokens.query_end)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_joined_are_the_whole_prompt(load: Load, name: str, template: str) -> None:
    pt = load(name, template)
    texts = HARD + sample_texts(12)
    # A tokenizer that puts a space before the first word of a text puts one before every piece that stands first.
    space = " " if name == "mistral" and template == "instruct_query" else ""
    wanted, found = [], []
    for i, text in enumerate(texts):
        other = texts[i - 1]
        head = render_query(pt.template, "Do: this.", other).removesuffix(pt.template.query_end)
        example = head + pt.template.response.replace("{}", text)
        wanted.append(example + space + render_query(pt.template, text, other))
        found.append(joined(pt, text, other, [("Do: this.", other, text)]))
        wanted.append(render_passage(pt.template, text))
        found.append(tokenize_pieces(pt, [text], "passage")[0])
    for text, ids, whole in zip(wanted, found, whole_ids(pt, wanted), strict=True):
        assert ids == whole, text


@pytest.mark.parametrize("name", ["smollm2", "qwen_style"])
def test_a_prompt_without_instruction(load: Load, name: str) -> None:
    for template in TEMPLATES:
        pt = load(name, template)
        assert joined(pt, "", "What?", []) == whole_ids(pt, [render_query(pt.template, "", "What?")])[0]


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(min_size=1).map(str.strip).filter(bool), min_size=1, max_size=4))
def test_pieces_of_any_text_joined_are_the_whole_prompt(load: Load, name: str, template: str, texts: list[str]) -> None:
    pt = load(name, template)
    # As part of a whole prompt they would be read as the special tokens; as a piece they are text (tested below).
    assume(not any(special in text for special in parsing_specials(pt.serialized) for text in texts))
    query = [render_query(pt.template, "Do it", text) for text in texts]
    for text, whole in zip(texts, whole_ids(pt, query), strict=True):
        assert joined(pt, "Do it", text, []) == whole


# Derived pieces: the fast path against tokenising the text again.


def assert_derived_equal_direct(pt: PromptTokenizer, texts: list[str]) -> None:
    cache: dict = {}
    for base in KINDS:
        base_ids, failed = encode_pieces(pt.encoder.tokenizer, pt.encoder.rules[base], texts)
        assert failed == 0
        for kind in KINDS:
            derived, _ = derive_pieces(pt.encoder, base, kind, texts, base_ids, cache)
            direct = tokenize_pieces(pt, texts, kind)
            for text, fast, slow in zip(texts, derived, direct, strict=True):
                assert fast == slow, (base, kind, text)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_derived_pieces_of_real_texts_equal_tokenising_them(load: Load, name: str, template: str) -> None:
    assert_derived_equal_direct(load(name, template), HARD + sample_texts(40))


def test_real_texts_are_derived_not_tokenised_again(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    pt, texts = load("qwen_style", "bge_en_icl"), [text for text in sample_texts(40) if " " in text]
    base_ids, _ = encode_pieces(pt.encoder.tokenizer, pt.encoder.rules["passage"], texts)
    again: list[str] = []

    def record(tokenizer: object, rule: object, some: list[str]) -> tuple[list[list[int]], int]:
        again.extend(some)
        return encode_pieces(tokenizer, rule, some)  # type: ignore[arg-type]

    monkeypatch.setattr("pipeline.data.pieces.encode_pieces", record)
    derive_pieces(pt.encoder, "passage", "response", texts, base_ids, {})
    assert len(set(again) & set(texts)) <= 0.02 * len(texts)


def test_pieces_that_do_not_end_as_their_text_are_tokenised_in_full(load: Load) -> None:
    pt, texts = load("smollm2", "instruct_query"), ["one two three", "four five six"]
    base_ids = tokenize_pieces(pt, texts, "passage")
    direct = tokenize_pieces(pt, texts, "response")
    for wrong in ([7, *base_ids[0][1:]], [*base_ids[0][:-1], 7], base_ids[0][:1], []):
        assert derive_pieces(pt.encoder, "passage", "response", texts, [wrong, base_ids[1]], {})[0] == direct


WORDS = st.sampled_from(["a", "it's", "12", "end.", '."', "(x)", "日本", "é", ":", "\u200b", "'ll", "\n", "\t", "--"])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.lists(WORDS, min_size=1).map(lambda w: " ".join(w).strip()).filter(bool), min_size=1))
def test_derived_pieces_of_any_words_equal_tokenising_them(load: Load, name: str, texts: list[str]) -> None:
    for template in ("bge_en_icl", "instruct_query"):
        assert_derived_equal_direct(load(name, template), texts)


# Constants of a tokenizer and template.


def test_bos_only_where_the_model_was_trained_with_one(load: Load) -> None:
    assert load("mistral", "bge_en_icl").tokens.bos == (1,)
    assert load("smollm2", "bge_en_icl").tokens.bos == ()
    assert load("qwen_style", "bge_en_icl").tokens.bos == ()


@pytest.mark.parametrize(
    ("name", "configured", "bos"), [("mistral", False, ()), ("mistral", True, (1,)), ("qwen_style", True, (1,))]
)
def test_configuration_decides_on_bos(
    load: Load, tmp_path: Path, name: str, configured: bool, bos: tuple[int, ...]
) -> None:
    shutil.copytree(load(name, "bge_en_icl").tokenizer.name_or_path, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": configured, "bos_token": config["bos_token"] or "<|im_start|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path), TEMPLATES["bge_en_icl"]).tokens.bos == bos


def test_mistral_ids_are_those_of_sentencepiece(load: Load) -> None:
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(installed_file("mistral-common", "tokenizer.model.v1")))
    texts = [text for text in HARD if "\u0000" not in text] + sample_texts(20)
    assert tokenize_pieces(load("mistral", "bge_en_icl"), texts, "passage") == [reference.encode(t) for t in texts]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_markers_are_new_special_tokens_with_start_values(load: Load, name: str) -> None:
    tokens = load(name, "bge_en_icl").tokens
    assert len(set(tokens.marker_ids)) == 3 and tokens.query_end == tokens.marker_ids[2:]
    assert all(len(ids) >= 2 and max(ids) < min(tokens.marker_ids) for ids in tokens.marker_subtokens)
    assert load(name, "instruct_query").tokens.marker_ids == ()
    assert load(name, "instruct_query").fingerprint != load(name, "bge_en_icl").fingerprint


@pytest.mark.parametrize("name", TOKENIZERS)
def test_saved_tokenizer_is_recognised(load: Load, name: str, tmp_path: Path) -> None:
    pt = load(name, "bge_en_icl")
    pt.tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path), pt.template)
    assert again.fingerprint == pt.fingerprint and again.tokens.bos == pt.tokens.bos
    assert again.tokens.marker_subtokens == ((), (), ())  # it has the markers now


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_in_a_text_stay_text(load: Load, name: str, template: str) -> None:
    pt = load(name, template)
    forged = "a <query>b</s> <response> <|im_end|><instruct> <|endoftext|> <s>c"
    special = set(pt.tokens.marker_ids) | set(pt.tokens.eos) | set(pt.tokens.bos)
    for kind in ("instruct", *KINDS):
        ids = tokenize_pieces(pt, [forged], kind)[0]
        own = len(pt.encoder.rules[kind].head_ids)
        assert not special & set(ids[own:]) and pt.tokenizer.decode(ids).count("<query>") == 1 + (
            own and kind == "query"
        )


def test_tails_end_the_pieces(load: Load) -> None:
    for name in TOKENIZERS:
        for template in TEMPLATES:
            pt = load(name, template)
            for kind, tail in (
                ("query", pt.tokens.query_tail),
                ("response", pt.tokens.response_tail),
                ("passage", pt.tokens.passage_tail),
            ):
                ids = tokenize_pieces(pt, ["word"], kind)[0]
                assert tuple(ids[len(ids) - len(tail) :]) == tail
                assert bool(tail) == (kind != "passage" or template.endswith("passage_prompt"))


def test_prompt_tokens_survive_json(load: Load) -> None:
    tokens = load("mistral", "bge_en_icl").tokens
    assert tokens_from_json(tokens_to_json(tokens)) == tokens
    with pytest.raises(ValueError, match="malformed"):
        tokens_from_json({"bos": [1]})


def test_user_errors(load: Load, tmp_path: Path, qwen_style_tokenizer_dir: str) -> None:
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path), TEMPLATES["bge_en_icl"])
    with pytest.raises(ValueError, match="kind='document' must be one of"):
        tokenize_pieces(load("smollm2", "bge_en_icl"), ["x"], "document")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen_style_tokenizer_dir)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ValueError, match="has no EOS token"):
        load_tokenizer(str(tmp_path / "no_eos"), TEMPLATES["bge_en_icl"])
