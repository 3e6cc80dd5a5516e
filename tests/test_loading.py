"""What can be loaded as an embedder, and what is refused: folders of runs and exports, published models, the hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from test_embedder import EXAMPLES, INSTRUCTION, QUERIES, base, base_embedder, change_json, settings_of, trained  # noqa: F401
from test_export import export, run  # noqa: F401
from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaForCausalLM

from pipeline.inference.embedder import FewShotEmbedder, load_embedder
from pipeline.inference.fingerprint import fingerprint
from pipeline.inference.saving import save_model
from pipeline.model.base import fingerprint_base, weight_files
from pipeline.model.encoder import trainable_parameters
from pipeline.prompts import get_template, render_query

MARKERS = ["<instruct>", "<query>", "<response>"]


@pytest.fixture
def published(base: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A whole model as others publish one: the markers stand in tokenizer and table, nothing tells of this project."""
    folder = tmp_path / "published"
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    model = AutoModel.from_pretrained(base / "model", dtype=torch.float32)
    torch.manual_seed(2)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(path: str | Path, **options: str) -> FewShotEmbedder:
    return load_embedder(path, show_progress=False, **options)  # type: ignore[arg-type]


def slow_embedding(folder: Path, text: str) -> np.ndarray:
    """By transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        return torch.nn.functional.normalize(model(torch.tensor([ids])).last_hidden_state[0, -1], dim=0).numpy()


def test_a_run_and_its_exports(run: Path, tmp_path: Path) -> None:  # noqa: F811
    assert export(run, tmp_path / "out") == 0
    wanted_ND = load(run).encode_queries(QUERIES, task="tiny", examples=EXAMPLES)
    for folder in (run / "model", tmp_path / "out/adapter", tmp_path / "out/merged"):
        embedder = load(str(folder))
        assert embedder.tasks == {"tiny": INSTRUCTION}
        got_ND = embedder.encode_queries(QUERIES, task="tiny", examples=EXAMPLES)
        np.testing.assert_allclose(got_ND, wanted_ND, atol=1e-5)
    shutil.move(run / "model", run / "best_model")
    np.testing.assert_array_equal(load(run / "best_model").encode_queries(QUERIES, INSTRUCTION, EXAMPLES), wanted_ND)


def test_a_published_model_needs_its_template_named(published: Path) -> None:
    embedder = load(published, template="bge_en_icl")
    limits = embedder.limits
    assert (limits.max_query_tokens, limits.max_passage_tokens, limits.max_prompt_tokens) == (512, 512, 2048)
    assert (limits.max_example_query_tokens, limits.max_example_passage_tokens) == (256, 256)
    shown = [(INSTRUCTION, "a river", "in a garden")]
    text = render_query(get_template("bge_en_icl"), INSTRUCTION, "x", shown)
    assert text.startswith(f"<instruct>{INSTRUCTION}\n<query>a river\n<response>in a garden\n\n<instruct>")
    got_D = embedder.encode_queries(["x"], INSTRUCTION, [("a river", "in a garden")])[0]
    np.testing.assert_allclose(got_D, slow_embedding(published, text), atol=2e-6)
    np.testing.assert_allclose(embedder.encode_passages(["river"])[0], slow_embedding(published, "river"), atol=2e-6)
    with pytest.raises(ValueError, match=r"embedder.json is missing; if it is a published one, name .*bge_en_icl,"):
        load(published)
    with pytest.raises(ValueError, match="'bge' is unknown; known templates: bge_en_icl"):
        load(published, template="bge")


def test_a_model_with_a_head_is_loaded_without_it(published: Path, tmp_path: Path) -> None:
    whole = LlamaForCausalLM(AutoConfig.from_pretrained(published))
    whole.model.load_state_dict(AutoModel.from_pretrained(published).state_dict())
    folder = tmp_path / "head"
    shutil.copytree(published, folder)
    whole.save_pretrained(folder)
    assert any(name.startswith("model.") for name in load_file(folder / "model.safetensors"))
    wanted_ND = load(published, template="bge_en_icl").encode_queries(QUERIES, INSTRUCTION)
    got_ND = load(folder, template="bge_en_icl").encode_queries(QUERIES, INSTRUCTION)
    np.testing.assert_allclose(got_ND, wanted_ND, atol=1e-6)


def test_the_type_of_a_published_model_stays(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    for dtype, loaded in (("bfloat16", torch.bfloat16), ("float16", torch.bfloat16), ("float32", torch.float32)):
        change_json(published / "config.json", dtype=dtype)
        weights = {n: w.to(getattr(torch, dtype)) for n, w in load_file(published / "model.safetensors").items()}
        save_file(weights, published / "model.safetensors", metadata={"format": "pt"})
        assert load(published, template="bge_en_icl").encoder.decoder.dtype == loaded
        assert ("was saved in float16, and is loaded in bfloat16" in caplog.text) == (dtype == "float16")
        caplog.clear()


def test_a_model_in_the_hubs_cache(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshots = tmp_path / "hub/models--some--embedder"
    shutil.copytree(published, snapshots / "snapshots" / commit)
    (snapshots / "refs").mkdir()
    (snapshots / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = load("some/embedder", template="bge_en_icl")
    assert fingerprint(found) == fingerprint(load(published, template="bge_en_icl"))
    with pytest.raises(ValueError, match="some/other: no such folder, and not to be had from the hub .*hf download"):
        load("some/other", template="bge_en_icl")


def test_a_template_that_does_not_fit_is_refused(run: Path, base: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="the tokenizer of .* has no <instruct>, <query>, <response>: .*not trained"):
        load(base / "model", template="bge_en_icl")
    assert load(base / "model", template="instruct_query").encode_passages(["x"]).shape == (1, 64)
    with pytest.raises(ValueError, match="template='instruct_query', but .* was trained with 'bge_en_icl'; leave it"):
        load(run, template="instruct_query")
    assert load(run, template="bge_en_icl").tasks


def test_folders_that_hold_no_model(tmp_path: Path, published: Path) -> None:
    (tmp_path / "empty").mkdir()
    for template in (None, "bge_en_icl"):
        with pytest.raises(ValueError, match="embedder.json is missing; nor is it a whole model"):
            load_embedder(tmp_path / "empty", template=template)
    for name in ("none", "./none", "a/b/c"):
        with pytest.raises(ValueError, match="no such folder; name a run"):
            load(name)
    (published / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read|cannot be loaded"):
        load(published, template="bge_en_icl")


def halve(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "markers.safetensors"])
def test_damaged_adapters_are_named(name: str, run: Path) -> None:  # noqa: F811
    halve(run / "model" / name)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load(run)


def test_damaged_whole_models_are_named(published: Path) -> None:
    weights = load_file(published / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if "layers.1" not in n}, published / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"lacks 9 weights \(layers.1.input_layernorm.weight, ...\); was it copied in"):
        load(published, template="bge_en_icl")
    halve(published / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(published, template="bge_en_icl")
    (published / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(published, template="bge_en_icl")


def test_an_adapter_of_another_base_is_refused(
    trained: tuple[Path, FewShotEmbedder],  # noqa: F811
    base: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = trained[0] / "model"
    other = tmp_path / "other"
    shutil.copytree(base / "model", other)
    change_json(model / "embedder.json", base_model=str(other))
    load(model)  # a copy is the same base
    weights = load_file(other / "model.safetensors")
    save_file({n: w + 1 for n, w in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"was trained on other weights than those of .*other now; set base_model in"):
        load(model)
    change_json(model / "embedder.json", base_model=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="needs its base model, and .*gone is no folder here; set base_model in"):
        load(model)

    # Without the record, as older folders are: by the shapes, and by what is adapted.
    change_json(model / "embedder.json", base_model=str(other), base_fingerprint="")
    load(model)
    assert f"says nothing of its base's weights; taken unchecked: {other}" in caplog.text
    adapter = load_file(model / "adapter_model.safetensors")
    name = sorted(adapter)[-1]
    save_file({n: w for n, w in adapter.items() if n != name}, model / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {name} .1 in all.; was it trained on another base model"):
        load(model)
    save_file(
        adapter | {name: adapter[name][:2].clone()}, model / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match="is an adapter of another base model than the one it names: .*size mismatch"):
        load(model)
    deeper = {n.replace("layers.1.", "layers.2."): w.clone() for n, w in adapter.items() if "layers.1." in n}
    save_file(adapter | deeper, model / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"adapts what its base model has not: .*layers.2.* \(14 in all\)"):
        load(model)


FORMS = {
    "model.safetensors": ["model.safetensors"],
    "model.safetensors.index.json": ["model-1.safetensors", "model-2.safetensors"],
    "pytorch_model.bin": ["pytorch_model.bin"],
    "pytorch_model.bin.index.json": ["pytorch_model-1.bin", "pytorch_model-2.bin"],
}


def write_weights(folder: Path, form: str) -> None:
    """Files of weights, and their index if they have one; their bytes are those of their names."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for file in FORMS[form]:
        (folder / file).write_text(file)
    if form.endswith(".json"):
        (folder / form).write_text(json.dumps({"weight_map": {f"layer {file}": file for file in FORMS[form]}}))


@pytest.mark.parametrize("form", FORMS)
def test_the_fingerprint_of_a_base_is_of_the_files_that_are_loaded(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    write_weights(folder, form)
    before = fingerprint_base(str(folder))
    write_weights(folder, list(FORMS)[-1])  # the last in the order in which transformers looks for them
    for extra in ("consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.old.bin", "optimizer.bin"):
        (folder / extra).write_text("other weights, or the same in another form")
    assert [file.name for file in weight_files(folder)] == FORMS[form]
    assert fingerprint_base(str(folder)) == before
    for file in FORMS[form]:
        (folder / file).write_text(file.upper())
        assert fingerprint_base(str(folder)) != before
        (folder / file).write_text(file)
    if form.endswith(".json"):
        (folder / FORMS[form][1]).unlink()
        with pytest.raises(ValueError, match=f"lacks 1 files that {form} names .{FORMS[form][1]}.; fetch them"):
            fingerprint_base(str(folder))
        (folder / form).write_text("[]")
        with pytest.raises(ValueError, match=f"{form} is damaged"):
            fingerprint_base(str(folder))


def test_the_files_are_those_that_transformers_loads(base: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of one folder with weights in two files, in one, and in one of another name."""
    model = AutoModel.from_pretrained(base / "model")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(weight_files(tmp_path)) > 1
    torch.nn.init.constant_(model.norm.weight, 3.0)
    model.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "consolidated.safetensors")
    for loaded in (1.0, 3.0):
        assert AutoModel.from_pretrained(tmp_path).norm.weight[0] == loaded
        stored = {name: weight for file in weight_files(tmp_path) for name, weight in load_file(file).items()}
        assert stored["norm.weight"][0] == loaded
        shutil.copy(tmp_path / "other/model.safetensors", tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_a_base_of_the_hub_is_its_files_in_the_cache(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole copy of the repository, and as transformers fetches it."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    write_weights(repository, form)
    (repository / "consolidated.safetensors").write_text("the same weights in another form")

    def fetch(name: str, allow_patterns: list[str], ignore_patterns: str) -> str:
        cache.mkdir(exist_ok=True)
        names = [path.name for path in repository.iterdir()]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(repository / file, cache / file)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert fingerprint_base("some/base") == fingerprint_base(str(repository))
    fetched = {path.name for path in cache.iterdir()}
    assert fetched == {"config.json", *FORMS[form], *([form] if form.endswith(".json") else [])}


def test_an_adapter_keeps_the_fingerprint_of_the_base_it_was_trained_on(
    base: Path,  # noqa: F811
    trained: tuple[Path, FewShotEmbedder],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Given by training's start; the base may have changed on the hub since."""
    saved, store = trained[1], cast(Any, SimpleNamespace(datasets=()))
    weights = {name: {"weight": p.detach()} for name, p in trainable_parameters(saved.encoder).items()}
    save_model(tmp_path / "model", saved.encoder, weights, saved.tokenizer, settings_of(base), store, "of the start")
    with pytest.raises(ValueError, match="was trained on other weights than those of"):
        load(tmp_path / "model")


def test_a_run_without_its_embedder_json_names_what_is_missing(run: Path) -> None:  # noqa: F811
    assert json.loads((run / "model/embedder.json").read_text())["base_fingerprint"]
    (run / "model/embedder.json").unlink()
    with pytest.raises(ValueError, match="embedder.json is missing"):
        load(run)
