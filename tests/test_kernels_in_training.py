"""The kernels in use: every shipped configuration compiles for Hopper; a step gives the same gradients with them."""

import subprocess
import sys

from launching import REPOSITORY, environment, launch, require_success, run_python
from safetensors.torch import load_file

from pipeline.preprocess import main as preprocess

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
