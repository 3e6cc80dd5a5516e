"""Exported forms of a reranker: scores of the trained one, or nothing is left."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_embedder import change_json
from test_lightweight_reranker import DEPTH, GEMMA, PAIRS, REDUCTIONS, make_own
from transformers import AutoModel, Gemma2Config, LlamaConfig

from pipeline import export_model
from pipeline.inference.exporting import write_merged_reranker
from pipeline.inference.gate import GATE_FILE
from pipeline.inference.reranker import LightweightReranker
from pipeline.inference.reranker_gate import GATE_PAIRS, agreement, gate_scores
from pipeline.model.base import fingerprint_base
from pipeline.prompts import BGE_RERANKER
from pipeline.settings import DatasetSettings, DataSettings, Settings, dump_settings

CPU = torch.device("cpu")
ALL_FORMS = ["adapter, every token", "adapter, 2 to 1", "merged, every token", "merged, 2 to 1"]


def make_run(folder: Path, kind: type, **settings) -> SimpleNamespace:
    """`make_own` with what the trained model, in memory, makes of the gate's pairs."""
    truth = make_own(folder, kind, **settings)
    reranker = truth.reranker.eval()
    scores_WNE = gate_scores(reranker, reranker, truth.pairs, truth.description, CPU, 4096)
    assert scores_WNE.shape == (2, 4 * len(GATE_PAIRS), DEPTH - 1)
    np.save(folder / "run/model" / GATE_FILE, scores_WNE)
    return truth


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_run(folder, LlamaConfig)
    return folder / "run"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    make_run(folder, Gemma2Config, **GEMMA)
    return folder / "run"


@pytest.fixture
def run(llama, tmp_path) -> Path:
    return shutil.copytree(llama, tmp_path / "run")


def export(run: Path, out: Path, *options: str) -> int:
    return export_model.main(["--run", str(run), "--out", str(out), *options])


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_every_form_gives_the_trained_scores(family, request, tmp_path, capsys):
    run, out = request.getfixturevalue(family), tmp_path / "out"
    assert export(run, out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter", "merged"]
    printed = capsys.readouterr().out
    assert "no sentence-transformers/: its cross-encoders read no packed pairs" in printed
    for line in (
        "norm of the adapter",
        "adapter, every token, exit",
        "merged, every token, exit",
        "merged, 2 to 1, exit",
    ):
        assert line in printed
    change_json(out / "merged/reranker.json", base_model="/gone")  # it needs none
    truth = LightweightReranker(run, show_progress=False)
    for form in ("adapter", "merged"):
        found = LightweightReranker(out / form, show_progress=False)
        for reduction in REDUCTIONS:
            np.testing.assert_allclose(found.score(PAIRS, *reduction), truth.score(PAIRS, *reduction), rtol=1e-4)
    assert len(AutoModel.from_pretrained(out / "merged").layers) == DEPTH  # a decoder of transformers like any other
    assert export(out / "merged", tmp_path / "again") == 2
    assert "is merged already; export the run" in capsys.readouterr().err


def test_the_card_tells_what_it_is_and_its_lines_run(gemma, tmp_path, monkeypatch):
    run = shutil.copytree(gemma, tmp_path / "run")
    sets = (DatasetSettings(name="nq", path="a.jsonl"), DatasetSettings(name="quora", path="b.jsonl", relation="q-q"))
    (run / "settings.yaml").write_text(dump_settings(Settings(data=DataSettings(datasets=sets))))
    row = {"task": "fiqa", "metric": "ndcg_at_10", "retriever": "bm25", "setting": "exit=2", "value": 0.25}
    (run / "reranking.json").write_text(json.dumps([row]))
    assert export(run, tmp_path / "out") == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "Base model: base." in card and "Any layer from 2 to 4" in card and "were trained: 1." in card
    assert "Limit of a pair:\n120 tokens" in card and "'A: {query}\\n'`, `'B: {passage}\\n'`" in card
    assert all(f"| `{relation}` | {prompt} |" in card for relation, prompt in BGE_RERANKER.prompts)
    assert "| nq | by task type |\n| quora | q-q |" in card and "max_pair_tokens: 512" in card
    assert "| fiqa | ndcg_at_10 | bm25 | exit=2 | 0.2500 |" in card and "## Licence" in card
    assert re.search(r"\| merged, 2 to 1, exit [234] \(the worst\) \| 1.000000 \| 0.9998 \|", card)

    (snippet,) = re.findall("```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(snippet, names)
    assert "exit_layer=2, compress_layers=(1,), compress_ratio=2)" in snippet and names["cheaper"].shape == (1,)
    told = re.search(r"# (\S+) % less arithmetic for a pair of (\d+) \+ (\d+) \+ (\d+) tokens", snippet)
    assert told is not None
    query, passage, prompt = (int(number) for number in told.groups()[1:])
    assert query + passage + prompt == 120
    # Two of four layers run, the second on half of the passage; attention aside, which is a few per cent.
    tokens = 120 + 120 - passage / 2
    assert float(told[1]) == pytest.approx(100 * (1 - tokens / (4 * 120)), abs=2)


def test_without_the_engines_scores_forms_are_compared_as_saved(run, tmp_path, capsys):
    (run / "model" / GATE_FILE).unlink()
    assert export(run, tmp_path / "out") == 0
    assert "gate.npy is missing: what was trained is compared as it was saved" in capsys.readouterr().out


def spoil_weights(file: Path, change) -> None:
    save_file({name: change(name, value) for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def roll_heads(folder: Path) -> None:
    spoil_weights(folder / "heads.safetensors", lambda _, heads_HD: heads_HD.roll(1, 0))


def swap_two_heads(folder: Path) -> None:
    spoil_weights(folder / "heads.safetensors", lambda _, heads_HD: heads_HD[[1, 0, 2]])


def zero_adapter(folder: Path) -> None:
    spoil_weights(folder / "adapter_model.safetensors", lambda name, value: value * ("lora_B" not in name))


def other_adapter(folder: Path) -> None:
    """As trained on another base: of the same shapes, and other numbers."""
    torch.manual_seed(9)
    spoil_weights(folder / "adapter_model.safetensors", lambda _, value: torch.randn_like(value) * 0.2)


def other_base(folder: Path) -> None:
    """Another base of the same shape, its fingerprint set to fit."""
    tree = json.loads((folder / "reranker.json").read_text())
    base = Path(shutil.copytree(tree["base_model"], folder.parent / "other_base"))
    spoil_weights(base / "model.safetensors", lambda name, value: value * (1.5 if "down_proj" in name else 1))
    change_json(folder / "reranker.json", base_model=str(base), base_fingerprint=fingerprint_base(str(base)))


def other_prompt(folder: Path) -> None:
    prompts = (("q-p", "Predict whether passage B is about query A."), *BGE_RERANKER.prompts[1:])
    template = replace(BGE_RERANKER, prompts=prompts)
    change_json(folder / "reranker.json", template=asdict(template), template_version=template.version)


def other_limit(folder: Path) -> None:
    change_json(folder / "reranker.json", max_pair_tokens=119)


def double_a_matrix(folder: Path) -> None:
    change = "layers.3.mlp.down_proj.weight"
    spoil_weights(folder / "model.safetensors", lambda name, value: value * (2 if name == change else 1))


@pytest.mark.parametrize(
    ("spoil", "where", "named"),
    [
        (zero_adapter, "run", ["norm of the adapter's B matrices: 0.000000", *ALL_FORMS]),
        (other_adapter, "run", ALL_FORMS),
        (other_base, "run", ALL_FORMS),
        (other_prompt, "run", ALL_FORMS),
        (roll_heads, "run", ALL_FORMS),
        (
            other_prompt,
            "merged",
            ["merged, every token", "merged, 2 to 1", "template, tokenizer, limit and exits: 0.0"],
        ),
        (roll_heads, "merged", ["merged, every token", "merged, 2 to 1"]),
        (swap_two_heads, "merged", ["merged, every token", "merged, 2 to 1"]),
        (double_a_matrix, "merged", ["merged, every token, exit 4", "merged, 2 to 1, exit 4"]),
        (other_limit, "merged", ["template, tokenizer, limit and exits: 0.0"]),
    ],
)
def test_a_form_that_differs_leaves_nothing(spoil, where, named, run, tmp_path, monkeypatch, capsys):
    if where == "run":
        spoil(run / "model")
    else:

        def spoiled(model: Path, folder: Path) -> None:
            write_merged_reranker(model, folder)
            spoil(folder)

        monkeypatch.setattr(export_model, "write_merged_reranker", spoiled)
    assert export(run, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the export of ") and "nothing was written" in error
    failed = re.findall(r"(?:\(|; )([^:(;]+(?: \(the worst\))?: [\d.-]+), at least", error)
    assert len(failed) == len(named)
    assert all(found.startswith(name) for found, name in zip(failed, named, strict=True)), failed
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".partial*"))


def test_folders_that_cannot_be_exported(run, tmp_path, capsys):
    def refuse(folder: Path, message: str, *options: str) -> None:
        assert export(folder, tmp_path / "out", *options) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".partial*"))

    refuse(run, "--shots 2 is for prompts of embedders", "--shots", "2")
    refuse(tmp_path / "none", "none: no such folder")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "is not a trained embedder or reranker: no embedder.json, no reranker.json")
    np.save(run / "model" / GATE_FILE, np.zeros((2, 8, 3)))
    refuse(run, "gate.npy holds scores of other pairs or exits ((2, 8, 3), not (2, 48, 3))")
    change_json(run / "model/reranker.json", base_fingerprint="0" * 64)
    refuse(run, "was trained on other weights than those of")
    shutil.rmtree(run / "model")
    (run / "settings.yaml").write_text("")
    refuse(run, "has no model/ yet: its training is not finished")


def test_agreement_is_the_share_of_variance_that_is_right():
    rng = np.random.default_rng(0)
    truth_WNE = rng.normal(5, 2, (2, 400, 3)).astype(np.float32)
    assert (agreement(truth_WNE, truth_WNE) == 1).all()
    noisy = truth_WNE + 0.02 * rng.normal(size=truth_WNE.shape)  # 1 % of the spread
    np.testing.assert_allclose(agreement(truth_WNE, noisy), 1 - 1e-4, atol=3e-5)
    shifted = truth_WNE + np.array([0, 0.1, 2], dtype=np.float32)  # correlation would not see it
    np.testing.assert_allclose(agreement(truth_WNE, shifted)[0], [1, 1 - (0.1 / 2) ** 2, 0], atol=0.15)
    assert agreement(truth_WNE, shifted)[0, 1] < 0.9998
