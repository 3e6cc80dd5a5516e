"""What the topics of prove.py share: rows of their tables, and commands run outside the process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
WORK = REPOSITORY / "runs" / "prove" / "work"
RUN = REPOSITORY / "runs" / "quickstart"
Row = dict[str, Any]


def row(claim: str, target: str, measured: str, holds: bool | None) -> Row:
    # Said at once: a proof that takes an hour may be ended before its table is printed.
    print(f"  {claim} | {target} | {measured} | {holds}", flush=True)
    return {"claim": claim, "target": target, "measured": measured, "holds": holds}


# Large tensors are mapped, and unmapped when freed: the peak of the process is then the peak of live tensors. It costs
# time, so nothing that is timed runs like this.
PRECISE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def call(command: Sequence[str], variables: dict[str, str] | None = None, accepted: Sequence[int] = (0,)) -> None:
    print("$", " ".join(command), flush=True)
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    environment = os.environ | {"PATH": path, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= variables or {}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if result.returncode not in accepted:
        raise SystemExit(f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}\nfailed: {' '.join(command)}")


def training_files(data: Path) -> list[Path]:
    """Raw files of a folder; scored pairs are a check of STS data, not a training set."""
    files = sorted(file for file in data.glob("*.jsonl*") if "scored" not in file.name)
    if not files:
        raise SystemExit(f"error: --data {data} holds no .jsonl or .jsonl.gz files")
    return files


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch_worker(recipe: Path, mode: str, *overrides: str, ranks: int = 2) -> list[Row]:
    out = WORK / f"{mode}.json"
    launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", free_port()]
    # Threads that wait for each other burn CPU seconds: one a rank, so that seconds are work.
    one_thread = {"OMP_NUM_THREADS": "1"}
    variables = {"cached": PRECISE_MEMORY | one_thread, "uncached": PRECISE_MEMORY | one_thread, "growth": one_thread}
    call([*launcher, "benchmarks/step_worker.py", str(recipe), str(out), mode, *overrides], variables.get(mode))
    return json.loads(out.read_text())


def write_recipe(name: str, data: Path, files: Sequence[Path], preprocess: Row, batch: Row) -> Path:
    """A recipe over raw files for a random 2-layer, 256-wide model with the quickstart's tokenizer."""
    recipe = {
        "model": {"name": str(WORK / "model"), "dtype": "fp32", "lora": {"rank": 16, "alpha": 32}},
        "preprocess": preprocess,
        "data": {
            "root": str(data.resolve()),
            "store": str(WORK / f"store_{name}"),
            "datasets": [{"name": file.name.split(".")[0], "path": file.name} for file in files],
        },
        "batch": batch,
        "run": {
            "output_dir": str(WORK / f"run_{name}"),
            "deepspeed": str(REPOSITORY / "ds_configs" / "zero3.json"),
            "chunk_tokens": 8192,
        },
    }
    path = WORK / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    call([sys.executable, "pipeline/preprocess.py", "--config", str(path), "--processes", "2"])
    return path


def make_random_model() -> None:
    """2 layers, 256 wide, with the quickstart's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    base = RUN / "base_model"
    call([sys.executable, "examples/quickstart/prepare_model.py", "--out", str(base)])
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
    )
    LlamaModel(config).save_pretrained(WORK / "model")
    tokenizer.save_pretrained(WORK / "model")
