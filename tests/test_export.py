"""Exported forms of a model: equal to the trained one, or nothing is left."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_embedder import EXAMPLES, INSTRUCTION, QUERIES, base, change_json, trained  # noqa: F401
from test_encoder import FAMILIES, make_model
from transformers import AutoModel, AutoTokenizer

from pipeline import export_model
from pipeline.data.tokenizing import load_tokenizer
from pipeline.inference import exporting
from pipeline.inference.description import read_description
from pipeline.inference.embedder import FewShotEmbedder, load_embedder
from pipeline.inference.gate import GATE_FILE, GATE_TEXTS, gate_embeddings
from pipeline.model.encoder import MarkerEmbedding, load_encoder, require_rows
from pipeline.prompts import get_template
from pipeline.settings import ModelSettings
from pipeline.training.run import require_base

Trained = tuple[Path, FewShotEmbedder]


@pytest.fixture
def run(trained: Trained) -> Path:  # noqa: F811
    """A run folder with examples of one training set and what the engine made of the gate's texts."""
    folder, embedder = trained
    # As instruction-tuned models have one, which sentence-transformers would put every text into.
    (folder / "model" / "chat_template.jinja").write_text("chat: {{ messages[0]['content'] }}")
    rows = [{"instruction": INSTRUCTION, "query": query, "response": response} for query, response in EXAMPLES]
    (folder / "model" / "examples.json").write_text(json.dumps({"tiny": rows}))
    change_json(folder / "model" / "embedder.json", tasks={"tiny": INSTRUCTION})
    np.save(folder / "model" / GATE_FILE, gate_embeddings(embedder))
    return folder


def export(run: Path, out: Path) -> int:
    return export_model.main(["--run", str(run), "--out", str(out), "--shots", "2"])


def test_every_form_gives_the_trained_embeddings(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export(run, out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter", "merged", "sentence-transformers"]
    printed = capsys.readouterr().out
    for name in ("norm of the adapter", "the engine at the end", "adapter ", "merged ", "sentence-transformers "):
        assert name in printed
    wanted_ND = load_embedder(run, show_progress=False).encode_queries(QUERIES, INSTRUCTION, EXAMPLES)
    for name in ("adapter", "merged"):
        loaded = load_embedder(out / name, show_progress=False)
        np.testing.assert_allclose(loaded.encode_queries(QUERIES, INSTRUCTION, EXAMPLES), wanted_ND, atol=1e-5)

    # It can be the base of another run: its tokenizer has the markers, whose rows stay as they are.
    require_base(str(out / "merged"))
    again = load_tokenizer(str(out / "merged"), get_template("bge_en_icl"))
    assert again.tokens.marker_subtokens == ((), (), ())
    encoder = load_encoder(ModelSettings(name=str(out / "merged"), dtype="fp32"), again.tokens.marker_ids, ((),) * 3)
    require_rows(encoder, again.largest_id)

    # The merged folder is a model of transformers like any other: no code of this project.
    decoder, tokenizer = AutoModel.from_pretrained(out / "merged"), AutoTokenizer.from_pretrained(out / "merged")
    prompts = json.loads((out / "sentence-transformers" / "config_sentence_transformers.json").read_text())["prompts"]
    assert {"tiny", "tiny, few-shot"} <= prompts.keys()
    text = prompts["tiny, few-shot"] + QUERIES[0] + "\n<response>"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        hidden_D = decoder(torch.tensor([ids])).last_hidden_state[0, -1]
    np.testing.assert_allclose(torch.nn.functional.normalize(hidden_D, dim=0).numpy(), wanted_ND[0], atol=1e-5)

    card = (out / "README.md").read_text()
    assert 'prompt_name="tiny, few-shot"' in card
    assert INSTRUCTION in card and "| merged | 1.000000 | 0.9999 |" in card and "'\\n<response>'" in card


def test_a_model_without_tasks_is_exported_without_prompts_and_that_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(run / "model" / "embedder.json", tasks={})
    assert export(run, tmp_path / "out") == 0
    assert "names no tasks (it is of an older version): no prompts are written" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "prompt_name" not in card and "SentenceTransformer" not in card and "load_embedder(" in card


def test_what_is_left_out_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mean pooling is no form for sentence-transformers here; best_model/ has no embeddings of the engine."""
    (run / "model" / GATE_FILE).unlink()
    change_json(run / "model" / "embedder.json", pooling="mean")
    assert export(run, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "no sentence-transformers/: it is written for causal attention and last-token pooling" in printed
    assert "gate.npy is missing: what was trained is compared as it was saved" in printed
    assert not (tmp_path / "out" / "sentence-transformers").exists()


@pytest.mark.parametrize("what", ["merged", "engine", "adapter", "template", "pooling"])
def test_a_form_that_differs_leaves_nothing(
    what: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if what == "merged":
        write = exporting.write_merged

        def spoiled(model: Path, folder: Path) -> None:
            write(model, folder)
            weights = load_file(folder / "model.safetensors")
            weights["layers.0.mlp.down_proj.weight"] *= 2
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

        monkeypatch.setattr(export_model, "write_merged", spoiled)
    elif what == "template":
        write = exporting.write_merged

        def with_other_words(model: Path, folder: Path) -> None:
            write(model, folder)
            description = read_description(folder)
            template = replace(description.template, query_end="<query>")
            tokens = replace(description.tokens, query_end=description.tokens.marker_ids[1:2])
            change_json(folder / "embedder.json", template=asdict(template), prompt_tokens=asdict(tokens))
            change_json(folder / "embedder.json", template_version=template.version)

        monkeypatch.setattr(export_model, "write_merged", with_other_words)
    elif what == "pooling":
        write_st = exporting.write_sentence_transformers

        def with_means(merged: Path, folder: Path, prompts: Mapping[str, str]) -> None:
            write_st(merged, folder, prompts)
            (config,) = folder.glob("*_Pooling/config.json")
            change_json(config, pooling_mode="mean")

        monkeypatch.setattr(export_model, "write_sentence_transformers", with_means)
    elif what == "engine":
        np.save(run / "model" / GATE_FILE, np.roll(np.load(run / "model" / GATE_FILE), 1, axis=0))
    else:
        file = run / "model" / "adapter_model.safetensors"
        weights = {n: w * 0 if "lora_B" in n else w for n, w in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        (run / "model" / GATE_FILE).unlink()
    assert export(run, tmp_path / "out") == 2
    error = capsys.readouterr().err
    named = {
        "merged": "merged: ",
        "template": "merged: ",
        "pooling": "sentence-transformers: ",
        "engine": "the engine at the end",
        "adapter": "norm of the adapter's B matrices: 0.0",
    }
    assert named[what] in error and "nothing was written" in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".partial*"))


def test_folders_that_cannot_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    assert export(run, tmp_path / "there") == 2
    assert "exists; name a new folder" in capsys.readouterr().err
    assert export(tmp_path / "there", tmp_path / "out") == 2
    assert "is not a trained embedder" in capsys.readouterr().err
    data = (run / "model" / "adapter_model.safetensors").read_bytes()
    (run / "model" / "adapter_model.safetensors").write_bytes(data[:100])
    assert export(run, tmp_path / "out") == 2
    assert "adapter_model.safetensors is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_marker_rows_become_rows_of_the_table(family: str, tmp_path: Path) -> None:
    """Gemma scales what it looks up; ids may lie behind the table, or on spare rows of it."""
    name = make_model(FAMILIES[family], tmp_path)
    encoder = load_encoder(ModelSettings(name=name, dtype="fp32"), (97, 103), ((1, 2), (3,)))
    table = encoder.decoder.get_input_embeddings()  # type: ignore[operator]
    assert isinstance(table, MarkerEmbedding)
    torch.nn.init.normal_(table.marker_rows)
    whole_VD = exporting.whole_table(table)
    assert whole_VD.shape == (104, 32)
    ids_T = torch.tensor([5, 97, 103, 96])
    scale = float(getattr(table.base, "embed_scale", 1.0))
    torch.testing.assert_close(whole_VD[ids_T] * scale, table(ids_T).detach())


def test_the_gates_texts_are_many_scripts() -> None:
    assert len({ord(max(text)) >> 8 for text in GATE_TEXTS}) >= 6
