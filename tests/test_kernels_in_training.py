"""The kernels in use: every shipped configuration compiles for Hopper; a step gives the same gradients with them."""

import json
import subprocess
import sys

import pytest
from launching import REPOSITORY, environment, launch, require_success, run_python
from safetensors.torch import load_file

from pipeline.preprocess import main as preprocess

TRAIN = REPOSITORY / "pipeline" / "train.py"
WORKER = REPOSITORY / "tests" / "gradient_worker.py"


def test_every_shipped_configuration_compiles_for_hopper_without_spills():
    """No GPU is needed, but a process without the interpreter."""
    variables = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "compile_kernels.py")]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    print(result.stdout)
    require_success(result)
    assert result.stdout.count("bf16") >= 8


def test_two_ranks_with_the_kernels_give_the_reference_gradient(tiny_training, tmp_path, monkeypatch):
    """The interpreter runs them: rows of one rank against passages of both, in a step of several chunks."""
    assert preprocess(["--config", str(tiny_training), "--processes", "1"]) == 0
    out, truth = tmp_path / "kernels.safetensors", tmp_path / "reference.safetensors"
    require_success(run_python(WORKER, ["reference", str(tiny_training), str(truth)]))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = launch(WORKER, ["engine", str(tiny_training), str(out), "0", "model.embed_kernels=triton"], 2)
    require_success(result)
    reference = load_file(truth)
    compared = 0
    for key, value in load_file(out).items():
        name = key.split("|", 2)[2]
        if not name.endswith("chunks"):
            error = float((value.double() - reference[name].double()).norm() / reference[name].double().norm())
            assert error <= 1e-5, f"{key}: relative error {error:.1e}"
            compared += 1
    assert compared == 3 * len(reference)


def test_training_with_the_kernels_gives_the_losses_of_the_twins(tiny_training, tmp_path, monkeypatch):
    """A whole run, optimizer steps and all, with several chunks a step."""
    assert preprocess(["--config", str(tiny_training), "--processes", "1"]) == 0
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    losses = {}
    for impl in ("torch", "triton"):
        out = tmp_path / impl
        overrides = [
            "optim.max_steps=5",
            "run.chunk_tokens=300",
            f"run.output_dir={out}",
            f"model.embed_kernels={impl}",
        ]
        result = launch(TRAIN, ["--config", str(tiny_training), *overrides], 1)
        require_success(result)
        losses[impl] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(losses["torch"]) == 5 and losses["torch"] != losses["triton"], "they are different arithmetic"
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)
