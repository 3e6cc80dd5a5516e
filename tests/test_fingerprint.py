"""The fingerprint of an embedder: one for one model wherever it lies, another for any change that moves embeddings."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_embedder import base, change_json, settings_of, trained  # noqa: F401

from pipeline.inference import fingerprint as module
from pipeline.inference.embedder import FewShotEmbedder, load_base_embedder, load_embedder
from pipeline.inference.fingerprint import fingerprint


def of(folder: Path) -> str:
    return fingerprint(load_embedder(folder, show_progress=False))


@pytest.fixture
def model(trained: tuple[Path, FewShotEmbedder]) -> Path:  # noqa: F811
    return trained[0] / "model"


def test_a_copy_in_another_folder_on_another_base_folder_is_the_same(model: Path, base: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(model, tmp_path / "other name")
    shutil.copytree(base / "model", tmp_path / "other base")
    change_json(tmp_path / "other name" / "embedder.json", base_model=str(tmp_path / "other base"))
    assert of(model) == of(tmp_path / "other name")
    assert len(of(model)) == 64


def test_slices_change_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = of(model)
    monkeypatch.setattr(module, "_SLICE", 7)
    assert of(model) == whole


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "markers.safetensors", "base", "base table"])
def test_one_changed_number_of_any_weight_is_seen(file: str, model: Path, base: Path, tmp_path: Path) -> None:  # noqa: F811
    """By the smallest step, in the last number of a tensor."""
    before, path = of(model), model / file
    if file.startswith("base"):
        shutil.copytree(base / "model", tmp_path / "changed")
        path = tmp_path / "changed" / "model.safetensors"
        change_json(model / "embedder.json", base_model=str(path.parent), base_fingerprint="")
    weights = load_file(path)
    name = "embed_tokens.weight" if file == "base table" else sorted(weights)[-1]
    assert file != "base" or name == "norm.weight"
    last = weights[name].view(-1)
    last[-1] = torch.nextafter(last[-1], torch.tensor(9.0))
    save_file(weights, path, metadata={"format": "pt"})
    assert of(model) != before


@pytest.mark.parametrize(
    "file, changes",
    [
        ("embedder.json", {"pooling": "mean"}),
        ("embedder.json", {"attention": "bidirectional"}),
        ("embedder.json", {"dtype": "bf16"}),
        ("embedder.json", {"limits": {"max_prompt_tokens": 399}}),
        ("adapter_config.json", {"lora_alpha": 4}),
        ("base/config.json", {"rms_norm_eps": 1e-3}),
    ],
)
def test_what_is_no_weight_counts_too(file: str, changes: dict, model: Path, base: Path, tmp_path: Path) -> None:  # noqa: F811
    before = of(model)
    path = model / file
    if file.startswith("base"):
        shutil.copytree(base / "model", tmp_path / "changed")
        path = tmp_path / "changed" / "config.json"
        change_json(model / "embedder.json", base_model=str(path.parent), base_fingerprint="")
    tree = json.loads(path.read_text())
    change_json(path, **{k: tree[k] | v if isinstance(v, dict) else v for k, v in changes.items()})
    assert of(model) != before


def test_template_and_width_count(model: Path, base: Path) -> None:  # noqa: F811
    embedder = load_embedder(model, show_progress=False)
    others = [dataclasses.replace(embedder, dim=24)]
    others += [
        load_base_embedder(settings_of(base, template=t), show_progress=False) for t in ("bge_en_icl", "instruct_query")
    ]
    assert len({fingerprint(one) for one in [embedder, *others]}) == 4


def test_what_does_not_move_embeddings_does_not_count(model: Path) -> None:
    embedder = load_embedder(model, show_progress=False)
    other = dataclasses.replace(embedder, chunk_tokens=4000, tasks={"a": "b"}, show_progress=True)
    assert fingerprint(embedder) == fingerprint(other)
    embedder.encode_queries(["river"], "Find.", [("a", "b")])
    assert fingerprint(embedder) == fingerprint(other), "encoding changes nothing"


def test_weights_that_are_elsewhere_are_refused(model: Path) -> None:
    embedder = load_embedder(model, show_progress=False)
    embedder.encoder.decoder.norm.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="norm.weight is empty here: its values are spread over ranks"):
        fingerprint(embedder)
