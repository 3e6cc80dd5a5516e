"""Host memory while ranks load a model: straight into ZeRO-3's shards (as training does) against whole on every rank.

A random Mistral-shaped model is written to disk in bf16 and loaded by several ranks on CPU, where shards lie in host
memory too. Sampled from outside, over all ranks at the same moment, above what they hold before loading: anonymous
memory, and pages of the mapped weight files, which the kernel may take back at any time.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preprocess_scale import descendants
from proving import PRECISE_MEMORY

REPOSITORY = Path(__file__).resolve().parents[1]
EPILOG = """examples:
  python benchmarks/load_memory.py
  python benchmarks/load_memory.py --ranks 2 --layers 24 --width 2048
"""


def write_model(folder: Path, layers: int, width: int) -> int:
    """A random model in files of at most 200 MB; returns its bytes."""
    import torch
    from transformers import MistralConfig, MistralModel

    shape: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "vocab_size": 4096,
    }
    config = MistralConfig(**shape, num_attention_heads=8, num_key_value_heads=2)
    torch.manual_seed(0)
    model: Any = MistralModel(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def load(model: Path, marks: Path, sharded: bool) -> None:
    """One rank: everything that training does up to the first step, without data."""
    import torch

    from pipeline.model.encoder import add_lora, load_encoder
    from pipeline.runtime.engine import build_engine, gathered, sharded_loading, start_distributed, stop_distributed
    from pipeline.runtime.ranks import read_ranks, share_cores
    from pipeline.settings import LoraSettings, ModelSettings, OptimSettings

    ranks, optim = read_ranks(), OptimSettings()
    share_cores(ranks)
    start_distributed(ranks)
    zero3 = REPOSITORY / "ds_configs/zero3.json"
    settings = ModelSettings(name=str(model), lora=LoraSettings(rank=8, alpha=16))
    torch.distributed.barrier()
    (marks / f"ready-{ranks.rank}").touch()
    time.sleep(1)
    if sharded:
        with sharded_loading(zero3, optim, settings.dtype):
            encoder = load_encoder(settings, (), (), "cpu", gathered)
    else:
        encoder = load_encoder(settings, (), ())
    add_lora(encoder, settings.lora)
    build_engine(encoder, optim, settings.dtype, zero3, ranks)
    (marks / f"done-{ranks.rank}").touch()
    time.sleep(1)
    stop_distributed()


def memory_of(pids: Sequence[int]) -> tuple[int, int]:
    """(anonymous and shared, mapped files) bytes of processes at this moment."""
    sums = {"RssAnon": 0, "RssShmem": 0, "RssFile": 0}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for line in lines:
            name = line.partition(":")[0]
            if name in sums:
                sums[name] += 1024 * int(line.split()[1])
    return sums["RssAnon"] + sums["RssShmem"], sums["RssFile"]


def watch(model: Path, ranks: int, sharded: bool) -> dict[str, float]:
    """Launch the ranks and sample them until all have loaded."""
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as probe:
        marks = Path(temporary)
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        how = "sharded" if sharded else "whole"
        command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", port, __file__]
        path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
        variables = os.environ | PRECISE_MEMORY | {"PATH": path, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        job = subprocess.Popen(
            [*command, "--worker", how, "--model", str(model), "--marks", str(marks)],
            env=variables,
            stdout=subprocess.DEVNULL,
        )
        before, peak = (0, 0), [0, 0]
        while job.poll() is None and len(list(marks.glob("done-*"))) < ranks:
            now = memory_of(descendants(job.pid))
            if len(list(marks.glob("ready-*"))) < ranks:
                before = now
            else:
                peak = [max(old, new) for old, new in zip(peak, now, strict=True)]
            time.sleep(0.01)
        if job.wait():
            raise SystemExit(f"the ranks ended with code {job.returncode}")
    return {"anonymous_bytes": float(peak[0] - before[0]), "mapped_bytes": float(peak[1] - before[1])}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    for name in ("--worker", "--model", "--marks", "--local_rank"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        load(Path(args.model), Path(args.marks), args.worker == "sharded")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        size = write_model(Path(temporary), args.layers, args.width)
        result: dict[str, Any] = {"ranks": args.ranks, "model_bytes": size}
        for how in ("whole", "sharded"):
            result[how] = watch(Path(temporary), args.ranks, how == "sharded")
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
