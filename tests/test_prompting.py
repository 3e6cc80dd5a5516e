"""Tasks by name, limits at inference, and texts that are none: nothing is dropped or changed without a count."""

import dataclasses
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_embedder import EXAMPLES, INSTRUCTION, QUERIES, base, base_embedder, slow_embedding  # noqa: F401

from pipeline.inference import saving
from pipeline.inference.embedder import FewShotEmbedder


@pytest.fixture(scope="module")
def embedder(base: Path) -> FewShotEmbedder:  # noqa: F811
    return dataclasses.replace(base_embedder(base), tasks={"words": INSTRUCTION, "nothing": ""})


@pytest.fixture
def reports(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="pipeline.inference")
    return caplog


# Tasks by name.


def test_a_task_stands_for_its_instruction(embedder: FewShotEmbedder) -> None:
    for task, instruction in embedder.tasks.items():
        by_name_ND = embedder.encode_queries(QUERIES, task=task, examples=EXAMPLES)
        np.testing.assert_array_equal(by_name_ND, embedder.encode_queries(QUERIES, instruction, EXAMPLES))


def test_one_of_instruction_and_task(embedder: FewShotEmbedder) -> None:
    with pytest.raises(ValueError, match="task='wrods' is unknown to the model; known: nothing, words; or give instr"):
        embedder.encode_queries(QUERIES, task="wrods")
    with pytest.raises(ValueError, match="task='a' is unknown to the model; known: none"):
        dataclasses.replace(embedder, tasks={}).encode_queries(QUERIES, task="a")
    for given in ({}, {"task": "words", "instruction": ""}):
        with pytest.raises(ValueError, match="give one of them"):
            embedder.encode_queries(QUERIES, **given)  # type: ignore[arg-type]


def test_the_task_of_a_dataset_is_its_most_frequent_instruction(
    reports: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_SLICE", 2)
    store = SimpleNamespace(instructions=("", "Do a.", "Do b."))
    table = SimpleNamespace(name="set", num_rows=5, instruction_N=np.array([1, 2, 2, 1, 2], dtype=np.int32))
    assert saving._instruction(store, table) == "Do b."  # type: ignore[arg-type]
    assert "set has 2 instructions; its task is the one of 60 % of rows" in reports.text
    reports.clear()
    table.instruction_N[:] = 1
    assert saving._instruction(store, table) == "Do a."  # type: ignore[arg-type]
    assert reports.text == ""


# Limits.


def test_a_prompt_longer_than_trained_is_whole_and_said(base: Path, reports: pytest.LogCaptureFixture) -> None:  # noqa: F811
    short, wide, shots = base_embedder(base, max_prompt_tokens=100), base_embedder(base), EXAMPLES * 2
    lengths = [len(ids) for ids in wide.compose_queries(QUERIES, INSTRUCTION, shots)]
    got_ND = short.encode_queries(QUERIES, INSTRUCTION, shots)
    np.testing.assert_allclose(got_ND, wide.encode_queries(QUERIES, INSTRUCTION, shots), atol=1e-6)
    warned = [r.getMessage() for r in reports.records if r.levelno == logging.WARNING]
    assert len(warned) == 1 and min(lengths) > 100
    assert warned[0].startswith("5 of 5 prompts are longer than the 100 tokens that the model was trained with")
    assert f"(the longest: {max(lengths)}); give fewer" in warned[0]


def test_a_sequence_longer_than_a_chunk_has_one_of_its_own(base: Path) -> None:  # noqa: F811
    """The longest prompt is the first: nothing stands before it, and no empty chunk either."""
    short = base_embedder(base, chunk_tokens=100, max_prompt_tokens=100)
    texts = QUERIES[:3]
    prompts = short.compose_queries(texts, INSTRUCTION, EXAMPLES * 2)
    assert min(map(len, prompts)) > 100
    for share in (True, False):
        for ids, got_D in zip(prompts, short.encode_queries(texts, INSTRUCTION, EXAMPLES * 2, share), strict=True):
            np.testing.assert_allclose(got_D, slow_embedding(short, ids.tolist()), atol=2e-6)


def test_examples_are_dropped_only_where_that_is_asked_for(base: Path, reports: pytest.LogCaptureFixture) -> None:  # noqa: F811
    short = base_embedder(base, max_prompt_tokens=100)
    whole = short.compose_queries(["river", "stone"], INSTRUCTION, EXAMPLES * 2)
    reports.clear()
    cut = short.compose_queries(["river", "stone"], INSTRUCTION, EXAMPLES * 2, drop_examples=True)
    num_dropped = 4 - len(short.render(cut[0]).split("<instruct>")) + 2
    assert 0 < num_dropped < 4 and max(map(len, cut)) <= 100 < min(map(len, whole))
    text = f"2 of 2 prompts lost examples, {2 * num_dropped} in all, to stay within 100 tokens"
    assert [r.getMessage() for r in reports.records] == [text]
    last = short.compose_queries(["river", "stone"], INSTRUCTION, (EXAMPLES * 2)[num_dropped:])
    assert [ids.tolist() for ids in cut] == [ids.tolist() for ids in last], "the rightmost stay"


def test_a_prompt_longer_than_the_context_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    embedder = base_embedder(base)
    lengths = [len(ids) for ids in embedder.compose_queries(QUERIES, INSTRUCTION, EXAMPLES)]
    config = embedder.encoder.decoder.config
    monkeypatch.setattr(config, "max_position_embeddings", max(lengths))
    embedder.encode_queries(QUERIES, INSTRUCTION, EXAMPLES)
    monkeypatch.setattr(config, "max_position_embeddings", max(lengths) - 1)
    message = f"1 of 5 prompts are longer than the {max(lengths) - 1} tokens .* longest: {max(lengths)}.*; give fewer"
    with pytest.raises(ValueError, match=message):
        embedder.encode_queries(QUERIES, INSTRUCTION, EXAMPLES)
    monkeypatch.setattr(config, "max_position_embeddings", 10)
    with pytest.raises(ValueError, match="1 of 2 passages are longer than the 10 tokens"):
        embedder.encode_passages(["a", "copper garden " * 3])


# Texts.


def test_empty_texts_are_prompts_around_nothing(embedder: FewShotEmbedder, reports: pytest.LogCaptureFixture) -> None:
    query_D, other_D = embedder.encode_queries(["", "river"], INSTRUCTION)
    assert "1 of 2 queries are empty" in reports.text
    wanted = embedder.tokenizer.tokenizer(f"<instruct>{INSTRUCTION}\n<query>\n<response>", add_special_tokens=False)
    ids = [*wanted["input_ids"], embedder.tokenizer.tokens.eos[0]]
    np.testing.assert_allclose(query_D, slow_embedding(embedder, ids), atol=2e-6)
    assert np.abs(query_D - other_D).max() > 1e-3
    passage_D = embedder.encode_passages(["", "  "])[0]
    assert "2 of 2 passages are empty" in reports.text
    np.testing.assert_allclose(passage_D, slow_embedding(embedder, [embedder.tokenizer.tokens.eos[0]]), atol=2e-6)


@pytest.mark.parametrize("bad", [None, 3, b"river", ["river"]])
def test_what_is_no_text_is_named(embedder: FewShotEmbedder, bad: object) -> None:
    with pytest.raises(ValueError, match=r"queries\[1\]=.* is not a text"):
        embedder.encode_queries(["a", bad], INSTRUCTION)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"passages\[1\]=.* is not a text"):
        embedder.encode_passages(["a", bad])  # type: ignore[list-item]
    for example in (bad, ("a", bad), ("a",), ("a", ""), (" ", "b"), "ab"):
        with pytest.raises(ValueError, match=r"examples\[1\]=.* must be a query and a response, neither of them empty"):
            embedder.encode_queries(["a"], INSTRUCTION, [("a", "b"), example])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="passages is a generator; give a list of texts"):
        embedder.encode_passages(text for text in ("a", "b"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="queries='river' is one text; give a list"):
        embedder.encode_queries("river", INSTRUCTION)


def test_half_a_character_is_replaced_and_counted(embedder: FewShotEmbedder, reports: pytest.LogCaptureFixture) -> None:
    got_ND = embedder.encode_queries(["a\ud800b", "river"], INSTRUCTION, [("x\udfff", "y\ud800")])
    wanted_ND = embedder.encode_queries(["a\ufffdb", "river"], INSTRUCTION, [("x\ufffd", "y\ufffd")])
    np.testing.assert_array_equal(got_ND, wanted_ND)
    assert "1 of 2 queries hold half a character" in reports.text
    assert "1 of 1 example queries hold" in reports.text and "1 of 1 example responses hold" in reports.text
    np.testing.assert_array_equal(embedder.encode_passages(["\udc00"]), embedder.encode_passages(["\ufffd"]))


@pytest.mark.parametrize("text", ["a" * 100_000, "river stone, " * 8_000, "\ufdfa" * 100_000])
def test_a_long_text_is_cut_and_takes_no_long_time(
    embedder: FewShotEmbedder, text: str, reports: pytest.LogCaptureFixture
) -> None:
    started = time.process_time()
    assert len(embedder.compose_queries([text], INSTRUCTION)[0]) == 80
    assert time.process_time() - started < 3  # measured: 0.1 s
    assert "1 of 1 queries are longer than 80 tokens and were cut" in reports.text
