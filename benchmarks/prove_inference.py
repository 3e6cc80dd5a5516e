"""The topic inference of prove.py: what examples cost a query, and that an export is the trained model."""

import json
import re
import shutil
import subprocess
import sys

from proving import REPOSITORY, RUN, WORK, Row, call, row

PREFIX_TOKENS = 760


def prove_inference() -> list[Row]:
    base = RUN / "base_model"
    call([sys.executable, "examples/quickstart/prepare_model.py", "--out", str(base)])
    out = WORK / "inference_cost.json"
    out.unlink(missing_ok=True)
    call([sys.executable, "benchmarks/inference_cost.py", "--model", str(base), "--out", str(out)])
    return [*cost(json.loads(out.read_text())), *gate()]


def cost(record: Row) -> list[Row]:
    rows = record["rows"]
    zero = next(r for r in rows if r["shots"] == 0)
    shared = [r for r in rows if r["shared"]]
    one = min(shared, key=lambda r: abs(r["prefix_tokens"] - PREFIX_TOKENS))
    whole = next(r for r in rows if r["shots"] == one["shots"] and not r["shared"])
    ratio, without = one["seconds"] / zero["seconds"], whole["seconds"] / zero["seconds"]
    return [
        row(
            f"time of a query behind {one['shots']} examples ({one['prefix_tokens']:.0f} tokens) that are encoded "
            f"already, SmolLM2-135M with {record['layers']} layers on CPU",
            "at most 1.5 x zero-shot",
            f"{1000 * one['seconds']:.0f} ms against {1000 * zero['seconds']:.0f} ms zero-shot ({ratio:.2f} x); when "
            f"{record['queries']} queries also bear the encoding of the examples {1000 * one['first_seconds']:.0f} ms; "
            f"whole prompts {1000 * whole['seconds']:.0f} ms ({without:.1f} x)",
            ratio <= 1.5,
        )
    ]


def gate() -> list[Row]:
    """Export the quickstart's model; the gate prints one line a form."""
    claim = "every exported form of the quickstart's model against the trained engine, lowest cosine"
    if not (RUN / "model").is_dir():
        return [row(claim, "at least 0.9999", "not shown: run make demo first", None)]
    out = WORK / "export"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "pipeline/export_model.py", "--run", str(RUN), "--out", str(out)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    lines = re.findall(r"^(.+?)\s+(\d+\.\d+) \(at least", result.stdout, flags=re.MULTILINE)
    shown = "; ".join(f"{name} {value}" for name, value in lines) or result.stderr[-300:]
    return [row(claim, "at least 0.9999", shown, result.returncode == 0)]
