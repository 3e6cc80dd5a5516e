"""Gradients of the two-pass step through the real launcher, against a process without DeepSpeed or caching.

ZeRO 0, 1, 2, 3 x 1 and 2 ranks x three chunk counts, one step of each task type: unequal lengths, negatives from the
other rank, repeated passages, teacher scores, LoRA and marker rows.
"""

from collections import defaultdict

import pytest
import torch
from gradient_worker import options_file
from launching import REPOSITORY, launch, require_success, run_python
from safetensors.torch import load_file

from pipeline.preprocess import main as preprocess
from pipeline.runtime.engine import _backward_fp32_sums

WORKER = REPOSITORY / "tests" / "gradient_worker.py"


@pytest.fixture(scope="module")
def recipe(tiny_training):
    assert preprocess(["--config", str(tiny_training), "--processes", "1"]) == 0
    return tiny_training


@pytest.fixture(scope="module")
def reference_file(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "gradients.safetensors"
    require_success(run_python(WORKER, ["reference", str(recipe), str(out)]))
    return out


@pytest.fixture(scope="module")
def reference(reference_file):
    return load_file(reference_file)


STAGES = "0,1,2,3,3load,3offload,0keep,1keep,2keep"  # load: the model came sharded; keep: three graphs alive


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_zero_stage_and_chunk_count_gives_the_reference_gradient(
    world_size, recipe, reference, reference_file, tmp_path
):
    out = tmp_path / "gradients.safetensors"
    stages = STAGES + ("" if world_size == 1 else ",3options") + (",3hpz" if world_size == 2 else "")
    require_success(launch(WORKER, ["engine", str(recipe), str(out), stages], world_size))
    gradients = load_file(out)
    names = {key.split("|", 1)[1] for key in reference}
    assert any("marker_rows" in name for name in names) and any("lora_A" in name for name in names)
    with_options = {key: gradients.pop(key) for key in list(gradients) if key.startswith("3options")}
    if world_size > 1:
        check_with_options(with_options, load_file(options_file(reference_file)))
    chunk_counts, compared = defaultdict(set), 0
    for key, value in gradients.items():
        stage, budget, task_type, name = key.split("|")
        if name == "chunks":
            chunk_counts[task_type].add(int(value))
            continue
        error = relative_error(value, reference[f"{task_type}|{name}"])
        assert error <= 1e-5, f"{key}: relative error {error:.1e}"
        compared += 1
    assert compared == (len(STAGES.split(",")) + (world_size == 2)) * 3 * len(reference)
    wanted = 3 if world_size < 3 else 2  # a third of so small a batch has no more
    assert len(chunk_counts) == 5 and all(len(counts) >= wanted for counts in chunk_counts.values()), chunk_counts
    assert all(1 in counts for counts in chunk_counts.values())


def check_with_options(gradients, reference):
    """Every option of the loss at once, caching, sharding and all: gradients, and what was masked on both ranks."""
    compared = 0
    for key, value in gradients.items():
        name = key.split("|", 2)[2]
        if name.endswith("chunks"):
            continue
        if name.endswith("counts"):
            assert value.tolist() == reference[name].tolist(), key
        else:
            error = relative_error(value, reference[name])
            assert error <= 1e-5, f"{key}: relative error {error:.1e}"
        compared += 1
    assert compared == 3 * len(reference)
    masked = {key: value.tolist() for key, value in reference.items() if key.endswith("counts")}
    assert all(num_filtered > 0 for num_filtered, _ in masked.values()), masked
    assert all(masked[f"{task_type}|counts"][1] > 0 for task_type in ("normal", "only_1neg")), masked


def test_bf16_with_activation_checkpointing_stays_near_the_fp32_reference(recipe, reference, tmp_path):
    """What the recipes run, through the engine."""
    out = tmp_path / "gradients.safetensors"
    overrides = ["model.dtype=bf16", "model.activation_checkpointing=true"]
    require_success(launch(WORKER, ["engine", str(recipe), str(out), "0,1,2,3,3load", *overrides], 2))
    worst = 0.0
    for key, value in load_file(out).items():
        stage, budget, task_type, name = key.split("|")
        if name == "chunks":
            continue
        error = relative_error(value, reference[f"{task_type}|{name}"])
        assert error <= 0.1, f"{key}: relative error {error:.1e}"
        worst = max(worst, error)
    assert worst > 1e-4, "this was fp32"


def test_full_fine_tuning_gives_the_reference_gradient(recipe, tmp_path):
    """Every weight trains, the table of the input embeddings among them."""
    truth, out = tmp_path / "reference.safetensors", tmp_path / "gradients.safetensors"
    require_success(run_python(WORKER, ["reference", str(recipe), str(truth), "model.trained=full"]))
    require_success(launch(WORKER, ["engine", str(recipe), str(out), "0,2,2keep,3,3load", "model.trained=full"], 2))
    reference, compared = load_file(truth), 0
    assert any("embed_tokens.base" in key for key in reference) and any("marker_rows" in key for key in reference)
    assert not any("lora" in key for key in reference)
    for key, value in load_file(out).items():
        stage, budget, task_type, name = key.split("|")
        if name != "chunks":
            error = relative_error(value, reference[f"{task_type}|{name}"])
            assert error <= 1e-5, f"{key}: relative error {error:.1e}"
            compared += 1
    assert compared == 5 * 3 * len(reference)


def test_bf16_gradients_of_many_chunks_are_summed_in_fp32():
    """In bf16 a sum of ones stops at 256."""
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    sums = {}
    for i in range(400):
        _backward_fp32_sums([parameter], sums, parameter * 1, torch.ones_like(parameter), i == 399)
    assert parameter.grad.tolist() == [400.0, 400.0]


def test_a_step_that_is_not_taken_leaves_no_trace_in_bf16(recipe, tmp_path):
    """bf16 gradients of chunks are summed outside of DeepSpeed; fp32 is part of the next test."""
    out, stages = tmp_path / "engine.safetensors", "0,1,3,0bad,1bad,3bad"
    require_success(launch(WORKER, ["steps", str(recipe), str(out), stages, "model.dtype=bf16"], 2))
    weights = load_file(out)
    bad = [key for key in weights if "bad|" in key]
    assert len(bad) == len(weights) / 2 > 10
    for key in bad:
        assert torch.equal(weights[key], weights[key.replace("bad|", "|")]), key


def test_optimizer_steps_equal_plain_adamw(recipe, tmp_path):
    """Learning rate, clipping and weight decay reach the optimizer under every stage."""
    out, truth = tmp_path / "engine.safetensors", tmp_path / "plain.safetensors"
    overrides = ["optim.weight_decay=0.1", "optim.clip_norm=0.01"]
    require_success(run_python(WORKER, ["plain_steps", str(recipe), str(truth), *overrides]))
    # bad: with a step that is not finite, and so not taken, before each
    stages = "0,1,2,3,3offload,0bad,1bad,2bad,3bad,3offloadbad"
    require_success(launch(WORKER, ["steps", str(recipe), str(out), stages, *overrides], 2))
    plain = load_file(truth)
    weights = load_file(out)
    assert len(weights) == 10 * sum(key.startswith("after|") for key in plain)
    for key, value in weights.items():
        stage, name = key.split("|")
        assert torch.equal(value, weights[f"{stage.removesuffix('bad')}|{name}"]), (
            f"{key}: a step that is not taken leaves a trace"
        )
        moved = plain[f"after|{name}"] - plain[f"before|{name}"]
        assert moved.norm() > 0, name
        assert (value - plain[f"after|{name}"]).norm() <= 1e-3 * moved.norm(), key


def test_with_dropout_stages_agree_and_a_stage_repeats_bit_for_bit(recipe, reference, tmp_path):
    out = tmp_path / "gradients.safetensors"
    arguments = ["engine", str(recipe), str(out), "0,1,2,3,3again", "model.lora.dropout=0.1"]
    require_success(launch(WORKER, arguments, 2))
    gradients = load_file(out)
    without = False
    for key, value in gradients.items():
        stage, rest = key.split("|", 1)
        if rest.endswith("chunks"):
            continue
        assert relative_error(value, gradients[f"0|{rest}"]) <= 1e-5, key
        if stage == "3":
            assert torch.equal(value, gradients[f"3again|{rest}"]), key
        _, task_type, name = rest.split("|")
        without |= relative_error(value, reference[f"{task_type}|{name}"]) > 1e-2
    assert without, "dropout changed nothing, so this test compared runs without dropout"
