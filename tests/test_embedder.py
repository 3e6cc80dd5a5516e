"""FewShotEmbedder against a slow twin: each prompt rendered as text, tokenised whole, encoded alone and unpacked."""

import dataclasses
import json
import logging
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_run import WORDS, make_tiny_model

from pipeline.inference.description import read_description
from pipeline.inference.embedder import FewShotEmbedder, load_base_embedder, load_embedder
from pipeline.inference.saving import save_model
from pipeline.model.base import fingerprint_base
from pipeline.model.encoder import add_lora, load_encoder, trainable_parameters
from pipeline.prompts import get_template, render_passage, render_query
from pipeline.settings import LoraSettings, Settings, load_settings

INSTRUCTION = "Find the word."
QUERIES = ["river stone", "a", "cloud amber violin engine", "<|end|> market planet", "winter " * 6 + "garden"]
PASSAGES = ["copper garden", "x", "planet river " * 5, "stone"]
EXAMPLES = [("amber cloud", "amber is a stone"), ("where is winter", "in the garden")]
LIMITS = {
    "max_query_tokens": 80,
    "max_passage_tokens": 60,
    "max_example_query_tokens": 60,
    "max_example_passage_tokens": 40,
    "max_prompt_tokens": 400,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model(folder / "model", [" ".join(WORDS), INSTRUCTION, "where is the word in a stone x"])
    return folder


def settings_of(base: Path, **preprocess: object) -> Settings:
    tree = {
        "model": {"name": "./model", "dtype": "fp32", "lora": {"rank": 4, "alpha": 8}},
        "preprocess": {**LIMITS, **preprocess},
        "data": {"root": ".", "store": "store"},
        "run": {"output_dir": "run", "deepspeed": "zero0.json"},
    }
    (base / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return load_settings(base / "recipe.yaml")


def base_embedder(base: Path, chunk_tokens: int | None = None, **preprocess: object) -> FewShotEmbedder:
    return load_base_embedder(settings_of(base, **preprocess), chunk_tokens, show_progress=False)


def slow_ids(embedder: FewShotEmbedder, text: str) -> list[int]:
    """The rendered text tokenised at once, markers as special tokens, then EOS."""
    tokenizer = embedder.tokenizer.tokenizer
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def slow_embedding(embedder: FewShotEmbedder, ids: list[int]) -> np.ndarray:
    """One sequence; last token, L2."""
    return torch.nn.functional.normalize(slow_hidden(embedder, ids)[-1], dim=0).numpy()


def slow_hidden(embedder: FewShotEmbedder, ids: list[int]) -> torch.Tensor:
    """One sequence through the decoder with transformers' own attention: [T, D]."""
    decoder = embedder.encoder.decoder
    packed = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return decoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    finally:
        decoder.set_attn_implementation(packed)


@pytest.mark.parametrize("template", ["bge_en_icl", "instruct_query", "bge_en_icl_passage_prompt"])
@pytest.mark.parametrize("instruction", [INSTRUCTION, ""])
def test_embeddings_are_those_of_the_slow_twin(base: Path, template: str, instruction: str) -> None:
    embedder = base_embedder(base, template=template, max_passage_tokens=200)
    texts = [text for text in QUERIES if "<|end|>" not in text]
    shots = [(instruction, *example) for example in EXAMPLES]
    for examples, shown in (([], []), (EXAMPLES, shots)):
        got_ND = embedder.encode_queries(texts, instruction, examples)
        assert got_ND.dtype == np.float32
        assert got_ND.shape == (len(texts), 64)
        for text, got_D in zip(texts, got_ND, strict=True):
            ids = slow_ids(embedder, render_query(get_template(template), instruction, text, shown))
            np.testing.assert_allclose(got_D, slow_embedding(embedder, ids), atol=2e-6)
    for text, got_D in zip(PASSAGES, embedder.encode_passages(PASSAGES), strict=True):
        ids = slow_ids(embedder, render_passage(get_template(template), text))
        np.testing.assert_allclose(got_D, slow_embedding(embedder, ids), atol=2e-6)


def test_prompts_that_share_their_start_are_the_slow_twins(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A long query drops an example: its prompt begins otherwise, and is in a group of its own."""
    caplog.set_level(logging.INFO, logger="pipeline.inference")
    embedder = base_embedder(base, max_prompt_tokens=170)
    texts = ["river stone", "cloud amber", "winter " * 6 + "garden", "copper " * 9]
    prompts = embedder.compose_queries(texts, INSTRUCTION, EXAMPLES * 2, drop_examples=True)
    assert len({tuple(ids[:60].tolist()) for ids in prompts}) > 1
    got_ND = embedder.encode_queries(texts, INSTRUCTION, EXAMPLES * 2, drop_examples=True)
    for text, ids, got_D in zip(texts, prompts, got_ND, strict=True):
        np.testing.assert_allclose(got_D, slow_embedding(embedder, ids.tolist()), atol=2e-6, err_msg=text)


def test_a_model_that_attends_both_ways_encodes_whole_prompts_and_says_so(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pipeline.inference")
    settings = settings_of(base)
    both = dataclasses.replace(settings, model=dataclasses.replace(settings.model, attention="bidirectional"))
    embedder = load_base_embedder(both, show_progress=False)
    shared_ND = embedder.encode_queries(QUERIES, INSTRUCTION, EXAMPLES)
    assert "every prompt is encoded whole: the model attends both ways" in caplog.text
    np.testing.assert_array_equal(shared_ND, embedder.encode_queries(QUERIES, INSTRUCTION, EXAMPLES, False))


def test_the_prompt_is_rendered_as_the_model_sees_it(base: Path) -> None:
    embedder = base_embedder(base)
    ids = embedder.compose_queries(["river stone"], INSTRUCTION, EXAMPLES[:1])[0]
    wanted = render_query(embedder.tokenizer.template, INSTRUCTION, "river stone", [(INSTRUCTION, *EXAMPLES[0])])
    assert embedder.render(ids) == wanted + "<|end|>"


def test_user_text_cannot_forge_an_end(base: Path) -> None:
    embedder = base_embedder(base)
    ids = embedder.compose_queries(["<|end|> market <query>"], INSTRUCTION)[0].tolist()
    assert ids.count(embedder.tokenizer.tokens.eos[0]) == 1
    assert ids.count(embedder.tokenizer.tokens.marker_ids[1]) == 1


def test_chunks_change_nothing(base: Path) -> None:
    one = base_embedder(base, chunk_tokens=4000).encode_queries(QUERIES, INSTRUCTION, EXAMPLES)
    many = base_embedder(base, chunk_tokens=400).encode_queries(QUERIES, INSTRUCTION, EXAMPLES)
    np.testing.assert_allclose(one, many, atol=1e-6)
    alone = [base_embedder(base).encode_queries([text], INSTRUCTION, EXAMPLES)[0] for text in QUERIES]
    np.testing.assert_allclose(one, alone, atol=1e-6)
    assert np.abs(one[:, None] - one[None]).max(-1)[~np.eye(len(one), dtype=bool)].min() > 1e-3, "order would not show"


def test_no_chunk_is_above_the_budget(base: Path) -> None:
    embedder = base_embedder(base, chunk_tokens=400)
    sizes: list[int] = []
    embedder.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    embedder.encode_queries(QUERIES * 3, INSTRUCTION, EXAMPLES, share_prefix=False)
    prompts = embedder.compose_queries(QUERIES * 3, INSTRUCTION, EXAMPLES)
    total = sum(map(len, prompts))
    assert sum(sizes) == total
    assert max(sizes) <= 400
    assert len(sizes) < len(QUERIES) * 3, "several sequences share a chunk"
    shared = len(os.path.commonprefix([ids.tolist() for ids in prompts]))
    del sizes[:]
    embedder.encode_queries(QUERIES * 3, INSTRUCTION, EXAMPLES)
    start = sizes[0]  # up to the query's own piece, which begins with a marker
    assert 40 < start <= shared <= start + 1 and sum(sizes) == total - (len(prompts) - 1) * start
    assert max(sizes) <= 400
    del sizes[:]
    embedder.encode_queries(QUERIES, INSTRUCTION, EXAMPLES)
    assert sum(sizes) == sum(map(len, prompts[: len(QUERIES)])) - len(QUERIES) * start, "the start is kept"


def test_embeddings_have_unit_length_and_examples_matter(base: Path) -> None:
    embedder = base_embedder(base)
    zero_ND, few_ND = (embedder.encode_queries(QUERIES, INSTRUCTION, shown) for shown in ([], EXAMPLES))
    np.testing.assert_allclose(np.linalg.norm(few_ND, axis=1), 1, atol=1e-5)
    assert np.abs(zero_ND - few_ND).max(1).min() > 1e-3


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("dim", [None, 24])
def test_without_normalizing_the_pooled_hidden_state_comes_back(base: Path, pooling: str, dim: int | None) -> None:
    settings = settings_of(base)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, pooling=pooling))
    embedder = dataclasses.replace(load_base_embedder(settings, show_progress=False), dim=dim)
    for normalize in (False, True):
        few_ND = embedder.encode_queries(QUERIES, INSTRUCTION, EXAMPLES, normalize=normalize)
        passages_ND = embedder.encode_passages(PASSAGES, normalize=normalize)
        prompts = embedder.compose_queries(QUERIES, INSTRUCTION, EXAMPLES)
        whole = [embedder.tokenizer.tokenizer(text)["input_ids"] for text in PASSAGES]
        whole = [[*ids, embedder.tokenizer.tokens.eos[0]] for ids in whole]
        for got_D, ids in zip([*few_ND, *passages_ND], [*[ids.tolist() for ids in prompts], *whole], strict=True):
            hidden_TD = slow_hidden(embedder, ids)
            wanted_D = (hidden_TD[-1] if pooling == "last" else hidden_TD.mean(0)).numpy()[:dim]
            wanted_D = wanted_D / np.linalg.norm(wanted_D) if normalize else wanted_D
            assert normalize or abs(np.linalg.norm(wanted_D) - 1) > 0.5
            np.testing.assert_allclose(got_D, wanted_D, atol=2e-5 if not normalize else 2e-6)


def test_nothing_in_nothing_out(base: Path) -> None:
    embedder = base_embedder(base)
    assert embedder.encode_passages([]).shape == (0, 64)
    assert embedder.encode_queries([], INSTRUCTION, EXAMPLES).shape == (0, 64)


def test_what_is_cut_and_dropped_is_counted(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipeline.inference")
    embedder = base_embedder(base)
    long_text = "river " * 100
    ids = embedder.compose_queries(["river", long_text], INSTRUCTION, [*EXAMPLES, (long_text, long_text)])
    embedder.encode_passages(["stone", long_text, long_text])
    assert "1 of 2 queries are longer than 80 tokens and were cut" in caplog.text
    assert "1 of 3 example queries are longer than 60 tokens and were cut" in caplog.text
    assert "1 of 3 example responses are longer than 40 tokens and were cut" in caplog.text
    assert "2 of 3 passages are longer than 60 tokens and were cut" in caplog.text
    assert "prompts" not in caplog.text
    assert all(len(prompt) <= 400 for prompt in ids)


def test_nothing_is_reported_where_nothing_was_cut(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipeline.inference")

    def reports() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name.startswith("pipeline.inference")]

    embedder = base_embedder(base)
    embedder.encode_queries(["river"], INSTRUCTION, EXAMPLES)
    length = len(embedder.compose_queries(["river stone"], INSTRUCTION)[0])
    base_embedder(base, max_query_tokens=length).compose_queries(["river stone"], INSTRUCTION)
    assert reports() == []
    base_embedder(base, max_query_tokens=length - 1).compose_queries(["river stone"], INSTRUCTION)
    assert reports() == [f"1 of 1 queries are longer than {length - 1} tokens and were cut"]


def test_a_chunk_must_hold_the_longest_sequence(base: Path) -> None:
    with pytest.raises(ValueError, match="a chunk of 399 tokens cannot hold the model's longest sequence, 400"):
        base_embedder(base, chunk_tokens=399)


# A trained model's folder.


@pytest.fixture
def trained(base: Path, tmp_path: Path) -> tuple[Path, FewShotEmbedder]:
    """(run folder, the embedder that was saved there): adapters and marker rows are random, not zero."""
    settings = settings_of(base)
    embedder = load_base_embedder(settings, show_progress=False)
    tokens = embedder.tokenizer.tokens
    encoder = load_encoder(settings.model, tokens.marker_ids, tokens.marker_subtokens)
    add_lora(encoder, LoraSettings(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(encoder).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    encoder.eval()
    weights = {name: {"weight": p.detach().clone()} for name, p in trainable_parameters(encoder).items()}
    store: Any = SimpleNamespace(datasets=())
    of_base = fingerprint_base(settings.model.name)
    save_model(tmp_path / "run/model", encoder, weights, embedder.tokenizer, settings, store, of_base)
    return tmp_path / "run", dataclasses.replace(embedder, encoder=encoder)


def test_a_trained_embedder_comes_back(base: Path, trained: tuple[Path, FewShotEmbedder]) -> None:
    run, saved = trained
    wanted_ND = saved.encode_queries(QUERIES, INSTRUCTION, EXAMPLES)
    untrained_ND = base_embedder(base).encode_queries(QUERIES, INSTRUCTION, EXAMPLES)
    assert np.abs(wanted_ND - untrained_ND).max() > 1e-2
    for folder in (run, run / "model"):
        loaded = load_embedder(folder, show_progress=False)
        assert loaded.limits == saved.limits
        assert loaded.tokenizer.tokens == saved.tokenizer.tokens
        np.testing.assert_allclose(loaded.encode_queries(QUERIES, INSTRUCTION, EXAMPLES), wanted_ND, atol=1e-6)
        np.testing.assert_allclose(loaded.encode_passages(PASSAGES), saved.encode_passages(PASSAGES), atol=1e-6)


def test_a_trained_width_is_cut_out_and_made_a_unit_vector(
    base: Path, trained: tuple[Path, FewShotEmbedder], tmp_path: Path
) -> None:
    run, saved = trained
    folder = tmp_path / "matryoshka"
    shutil.copytree(run / "model", folder)
    change_json(folder / "embedder.json", matryoshka_dims=[8, 24])
    loaded = load_embedder(folder, show_progress=False, dim=24)
    whole_ND, cut_ND = saved.encode_passages(PASSAGES)[:, :24], loaded.encode_passages(PASSAGES)
    np.testing.assert_allclose(cut_ND, whole_ND / np.linalg.norm(whole_ND, axis=1, keepdims=True), atol=1e-6)
    assert loaded.encode_queries(QUERIES, INSTRUCTION, EXAMPLES).shape == (len(QUERIES), 24)
    assert loaded.encode_passages([]).shape == (0, 24)
    assert load_embedder(folder, show_progress=False).encode_passages(PASSAGES).shape == (len(PASSAGES), 64)
    for path, trained_dims in ((folder, "8, 24"), (run, "the full width alone")):
        with pytest.raises(ValueError, match=f"dim=16 was not trained in .* \\(loss.matryoshka_dims: {trained_dims}"):
            load_embedder(path, show_progress=False, dim=16)
    tree = json.loads((folder / "embedder.json").read_text())
    del tree["matryoshka_dims"]
    (folder / "embedder.json").write_text(json.dumps(tree))
    assert read_description(folder).matryoshka_dims == ()


def test_marker_rows_are_loaded(trained: tuple[Path, FewShotEmbedder]) -> None:
    from safetensors.torch import load_file, save_file

    run, saved = trained
    path = run / "model/markers.safetensors"
    save_file({name: rows + 1 for name, rows in load_file(path).items()}, path)
    changed_ND = load_embedder(run, show_progress=False).encode_queries(QUERIES, INSTRUCTION)
    assert np.abs(changed_ND - saved.encode_queries(QUERIES, INSTRUCTION)).max() > 1e-3


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_are_no_embedder(trained: tuple[Path, FewShotEmbedder], tmp_path: Path) -> None:
    model = trained[0] / "model"

    def refused(message: str, *remove: str, **changes: object) -> None:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model, folder)
        for name in remove:
            (folder / name).unlink()
        if changes:
            change_json(folder / "embedder.json", **changes)
        with pytest.raises(ValueError, match=message):
            load_embedder(folder, show_progress=False)

    template = json.loads((model / "embedder.json").read_text())["template"]
    refused("is not a trained embedder: embedder.json is missing", "embedder.json")
    refused("holds no adapter_config.json", "adapter_config.json")
    refused("cannot be loaded", "tokenizer.json")
    refused("embedder.json cannot be read", limits={})
    limits = json.loads((model / "embedder.json").read_text())["limits"]
    for wrong in (0, "512", 512.0):
        refused(
            f"limits.max_query_tokens={wrong!r} is no number of tokens", limits=limits | {"max_query_tokens": wrong}
        )
    refused("embedder.json cannot be read", template={"nam": "x"})
    refused("the template is not the one of template_version", template=template | {"query": "Q: {}\n"})
    end = replace(get_template("bge_en_icl"), query_end="<query>")
    refused("prompt_tokens are not those of its", template=asdict(end), template_version=end.version)
    refused("the model was trained with 0000", tokenizer_fingerprint="0000")
    with pytest.raises(ValueError, match="no such folder"):
        load_embedder(tmp_path / "none")
