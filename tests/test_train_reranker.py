"""Whole runs of a reranker through the launcher: trained, killed, resumed, saved, refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from launching import REPOSITORY, launch, require_success
from safetensors.torch import load_file
from tiny_run import make_tiny_reranker_run, make_tiny_run

from pipeline import train as train_embedder
from pipeline import train_reranker
from pipeline.data.pair_steps import RELATIONS, compose_pairs, draw_width, pair_parts
from pipeline.data.pairs import load_pair_tokenizer
from pipeline.data.sampling import make_schedule, plan_step
from pipeline.data.store import open_store
from pipeline.inference.gate import GATE_FILE
from pipeline.inference.reranker import LightweightReranker
from pipeline.inference.reranker_gate import gate_scores
from pipeline.model.flop import executed_flop, layer_work
from pipeline.model.reranker import read_reranker_shape, scale_layers
from pipeline.preprocess import main as preprocess
from pipeline.prompts import BGE_RERANKER
from pipeline.runtime.checkpoint import require_same_run
from pipeline.settings import load_settings

TRAIN = REPOSITORY / "pipeline" / "train_reranker.py"
# Two ranks, ZeRO-3, several chunks a step, dropout: what makes exact resume hard.
COMMON = ["model.lora.dropout=0.1", "optim.max_steps=6", "run.save_every=3", "run.chunk_tokens=190"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = make_tiny_reranker_run(tmp_path_factory.mktemp("reranker_run"))
    assert preprocess(["--config", str(path), "--processes", "1"]) == 0
    return path


def train(recipe, out, *overrides, world_size=2):
    arguments = ["--config", str(recipe), *COMMON, f"run.output_dir={out}", *overrides]
    return launch(TRAIN, arguments, world_size)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def flop_of(recipe, line):
    """TFLOP a second and rank of a step, from its plan, pair by pair."""
    settings = load_settings(recipe)
    store, pt = open_store(settings.data.store), load_pair_tokenizer(settings.tokenizer_name, BGE_RERANKER)
    plan = plan_step(store, make_schedule(store, settings), line["step"])
    parts_C3 = pair_parts(compose_pairs(store, pt, plan, RELATIONS[plan.task_type], 56))
    shape, width = read_reranker_shape(settings.model), (line["merge_layers"], line["merge_ratio"])
    works = [layer_work(parts_C3[c : c + 1], 4, *width) for c in range(len(parts_C3))]
    forwards = line["passes"] / line["chunks"]
    flop = sum(executed_flop(shape, work, True, forwards, recomputed=False) for work in works)
    return flop / (2 * line["seconds"]) / 1e12


@pytest.fixture(scope="module")
def whole_run(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    result = train(recipe, out)
    require_success(result)
    return out, result.stdout


def test_run_folder_holds_everything_and_the_model_scores(recipe, whole_run):
    out, stdout = whole_run
    for name in ("settings.yaml", "loss.png", "checkpoints/step-000003", "checkpoints/step-000006"):
        assert (out / name).exists(), name
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(6)) and stdout.count("| loss ") == 6
    assert all(line["chunks"] >= 2 and line["passes"] == 2 * line["chunks"] - 1 for line in lines)
    seed, layers = load_settings(recipe).run.seed, scale_layers(4)[1]
    widths = [(tuple(line["merge_layers"]), line["merge_ratio"]) for line in lines]
    assert widths == [draw_width(seed, step, layers) for step in range(6)] and len(set(widths)) > 2
    assert [line["tflops"] for line in lines] == pytest.approx([flop_of(recipe, line) for line in lines])
    assert sum(line["pair_passages_cut"] for line in lines) > 0 and "pairs cut |" in stdout
    assert "to 1 behind" in stdout

    adapter = load_file(out / "model" / "adapter_model.safetensors")
    assert all(value.norm() > 0 for name, value in adapter.items() if "lora_B" in name)
    weights = load_file(out / "checkpoints" / "step-000006" / "weights.safetensors")
    reranker = LightweightReranker(out, show_progress=False)
    np.testing.assert_array_equal(reranker.model.heads.weight_HD.detach(), weights["heads.weight_HD"])
    assert reranker.description.compress_layers == layers and reranker.description.max_pair_tokens == 56
    pairs = [("river stone", "amber violin"), ("cloud", "engine market planet copper")]
    deep, short = reranker.score(pairs), reranker.score(pairs, exit_layer=2, compress_ratio=2)
    assert deep.shape == (2,) and np.isfinite(deep).all() and not np.array_equal(deep, short)
    # What an export is compared with, by the engine: sharded, on both ranks, without dropout.
    own = reranker.model
    wanted_WNE = gate_scores(own, own, reranker.tokenizer, reranker.description, reranker.device, 4096)
    np.testing.assert_allclose(np.load(out / "model" / GATE_FILE), wanted_WNE, rtol=1e-4, atol=1e-5)


def test_a_killed_run_goes_on_bit_for_bit(recipe, whole_run, tmp_path):
    """As a kill after step 4 leaves it: newest checkpoint of step 3, metrics beyond it, a line cut in two."""
    out = tmp_path / "cut"
    shutil.copytree(whole_run[0], out)
    shutil.rmtree(out / "checkpoints" / "step-000006")
    shutil.rmtree(out / "model")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:4]) + '{"step": 4, "los')
    result = train(recipe, out)
    require_success(result)
    assert "step-000003: 3 steps are done" in result.stdout
    assert [line["loss"] for line in metrics(out)] == [line["loss"] for line in metrics(whole_run[0])]
    for name in ("checkpoints/step-000006/weights", "checkpoints/step-000006/moments", "model/heads"):
        truth, found = (load_file(folder / f"{name}.safetensors") for folder in (whole_run[0], out))
        assert truth.keys() == found.keys() and all((truth[key] == found[key]).all() for key in truth), name


def test_each_entry_refuses_what_the_other_trains(recipe, tmp_path, capsys):
    embedders = make_tiny_run(tmp_path)
    for entry, config, said in (
        (train_embedder, recipe, "reranker, and pipeline/train.py trains the embedders: start pipeline/train_reranker"),
        (train_reranker, embedders, "embedder, and pipeline/train_reranker.py trains the rerankers: start pipeline/"),
    ):
        assert entry.main(["--config", str(config), f"run.output_dir={tmp_path}/run"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert line.startswith(f"error: model.kind={said}")
    assert not (tmp_path / "run").exists()


def test_a_limit_without_room_and_an_unknown_relation_are_said_in_one_line(recipe, tmp_path):
    result = train(recipe, tmp_path, "preprocess.max_pair_tokens=12", world_size=1)
    assert result.returncode == 2 and "max_pair_tokens=12 leaves no room" in result.stderr, result.stderr[-3000:]
    entry = "data.datasets=[{name: a, path: a.jsonl, relation: q-z}]"
    with pytest.raises(ValueError, match="relation='q-z' is unknown; known relations: q-p"):
        load_settings(recipe, [entry])


def test_a_checkpoint_of_a_reranker_is_no_embedders_and_the_other_way_round(recipe, whole_run, tmp_path):
    settings, checkpoint = load_settings(recipe, COMMON), whole_run[0] / "checkpoints" / "step-000006"
    inputs = json.loads((checkpoint / "state.json").read_text())["inputs"]
    require_same_run(checkpoint, settings, inputs)
    known = {name: inputs[name] for name in ("data.store", "model.name")}
    require_same_run(checkpoint, settings, known)  # as on a login node, where not all is read
    embedders = dataclasses.replace(settings, model=dataclasses.replace(settings.model, kind="embedder"))
    with pytest.raises(ValueError, match="was saved with model.kind='reranker', now 'embedder'"):
        require_same_run(checkpoint, embedders, known)
    with pytest.raises(ValueError, match="was trained on another pair template .contents bge_rer"):
        require_same_run(checkpoint, settings, inputs | {"pair template": "bge_reranker-0"})
    # Settings from before they had a kind, of which a reranker's say embedder.
    old = tmp_path / "step-000006"
    old.mkdir()
    shutil.copy(checkpoint / "state.json", old)
    lines = (checkpoint / "settings.yaml").read_text().replace("  kind: reranker\n", "")
    (old / "settings.yaml").write_text(lines)
    assert load_settings(old / "settings.yaml").model.kind == "embedder"
    require_same_run(old, settings, inputs)
    with pytest.raises(ValueError, match="was saved with model.kind='reranker', now 'embedder'"):
        require_same_run(old, embedders, known)
