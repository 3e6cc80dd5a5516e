"""Time and peak memory of similarity + InfoNCE on a GPU, beside what trainers do today.

    eager bf16     as FlagEmbedding computes it: product and division by the temperature in bf16
    eager fp32     the same with logits in fp32 (torch.mm with out_dtype, or fp32 inputs)
    compiled       torch.compile of that, anew for each shape
    chunked        a loop over chunks of candidates, fp32 logits, recomputed in backward
    cce            the package cut-cross-entropy, where it is installed
    twin           embed_kernels.similarity in plain PyTorch (fp32 inputs, which is what training passes)
    ours           embed_kernels.similarity

Forward, and forward with backward; medians of interleaved rounds that go round input sets of twice the L2 cache.
Small shapes are timed as replays of a CUDA graph, so that no launch from Python is in the figure; each record says
how it was `timed`. A shape on which ours disagrees with fp64 is not timed, and the exit code is then 3. Results go to
--json as they come, and to a plot. Without a GPU only that comparison runs, on tiny shapes in Triton's interpreter.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined

import triton  # noqa: E402
from gpu_timing import device_work, make_round, milliseconds, peak_mib, run_once  # noqa: E402
from kernel_baselines import SCALE, chunked, cut_cross_entropy, eager_bf16, eager_fp32  # noqa: E402
from kernel_data import (  # noqa: E402
    RANK,
    Exact,
    Loss,
    find_faults,
    info_nce,
    loss_errors,
    make_embeddings,
    make_primitive,
    rest_error,
    solve_exactly,
)

from embed_kernels import gather_last_token  # noqa: E402
from pipeline.files import write_text  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
BF16, FP32 = torch.bfloat16, torch.float32
# (rows, candidates, width) and the inputs' type; what prove.py reads comes first.
CASES = (
    ((512, 4096, 4096), BF16),
    ((4096, 32768, 4096), BF16),
    ((512, 4096, 4096), FP32),
    ((512, 32768, 4096), BF16),
    ((512, 4096, 1024), BF16),
    ((512, 32768, 4096), FP32),
    ((4096, 32768, 1024), BF16),
    ((512, 1 << 20, 4096), BF16),
    ((4096, 32768, 4096), FP32),
)
COUNTED = (CASES[0], CASES[2])
DRY_CASES = (((16, 160, 64), BF16), ((16, 160, 64), FP32))
LEFT_OUT = {
    "shape": [512, 1 << 20, 4096],
    "dtype": "fp32",
    "left_out": "17 GB of candidates and as much for their gradient; more tiles than one program of the kernel merges",
}
PEAK_FLOPS = {BF16: 790e12, FP32: 67e12}  # H100 and H200: bf16 as measured with large products, fp32 as specified
L2_BYTES = 64 << 20  # of the largest card
GRAPH_LIMIT = 1 << 25  # logits of a shape that is timed by graph replay; larger ones hide their launches
Record = dict[str, Any]


def type_name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == BF16 else "fp32"


def make_loss(rows: int, candidates: int, impl: Any) -> Loss:
    primitive = make_primitive(rows, candidates, SCALE, DEVICE, impl)
    return lambda query_BD, passage_PD: info_nce(*primitive(query_BD, passage_PD))


def in_one_line(error: RuntimeError) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def find_losses(rows: int, candidates: int, dtype: torch.dtype, compile_too: bool) -> dict[str, Loss]:
    """Every way that takes these inputs; ours first."""
    found: dict[str, Loss] = {"ours": make_loss(rows, candidates, "triton")}
    if dtype == FP32:
        found["twin"] = make_loss(rows, candidates, "torch")
    else:
        found["eager bf16"] = eager_bf16
    found["eager fp32"] = eager_fp32
    if compile_too:
        torch._dynamo.reset()
        found["compiled"] = torch.compile(eager_fp32, dynamic=False)
    found["chunked"] = chunked
    if dtype == BF16 and importlib.util.find_spec("cut_cross_entropy") is not None:
        found["cce"] = cut_cross_entropy
    return found


def check_ours(loss: Loss, inputs: Sequence[Tensor], exact: Exact) -> tuple[dict[str, float], list[str]]:
    """Errors of ours, and which of them are beyond their limit."""
    primitive = make_primitive(len(inputs[0]), len(inputs[1]), SCALE, DEVICE, "triton")
    errors = loss_errors(loss, inputs, exact)
    with torch.no_grad():
        errors["rest_lse"] = rest_error(primitive(inputs[0], inputs[1])[1], exact)
    return errors, find_faults(errors, inputs[0].dtype, SCALE)


def time_rounds(
    calls: dict[tuple[str, bool], Callable[[], None]], rounds: int, repeats: int, num_sets: int
) -> dict[str, Record]:
    """Milliseconds for one input set, by way; ways take turns, so that a drift of the clock meets all."""
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in calls}
    for _ in range(rounds + 1):
        for key, call in calls.items():
            times[key].append(milliseconds(call, repeats) / repeats / num_sets)
    found: dict[str, Record] = {}
    for (name, backward), taken in times.items():
        label, taken = "both" if backward else "forward", taken[1:]  # the first warms up
        figures = {f"{label}_ms": statistics.median(taken), f"{label}_spread_ms": [min(taken), max(taken)]}
        found[name] = found.get(name, {}) | figures
    return found


def measure_case(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int, compile_too: bool) -> list[Record]:
    """A record for each way; one for ours alone, with its faults, where it disagrees with fp64."""
    rows, candidates, width = shape
    bytes_of_one = (rows + candidates) * width * dtype.itemsize
    num_sets = 1 + 2 * L2_BYTES // bytes_of_one if ON_GPU else 1
    rank = RANK if ON_GPU else 24
    sets = [make_embeddings(rows, candidates, width, SCALE, dtype, DEVICE, seed, rank) for seed in range(num_sets)]
    exact = solve_exactly(*sets[0], SCALE)
    shared: Record = {
        "shape": list(shape),
        "dtype": type_name(dtype),
        "input_sets": num_sets,
        "rest_share": exact.rest_share,
    }
    shared |= {"floor_ms": 3 * 2 * rows * candidates * width / PEAK_FLOPS[dtype] * 1e3}
    # Graphs hold no reference to what they read: losses and leaves must outlive them.
    losses = find_losses(rows, candidates, dtype, compile_too)
    leaves = [[x.detach().requires_grad_() for x in some] for some in sets]
    ours, faults = check_ours(losses["ours"], sets[0], exact)
    records: dict[str, Record] = {"ours": {**shared, "way": "ours", "errors": ours, "faults": faults}}
    if faults:
        return list(records.values())
    calls: dict[tuple[str, bool], Callable[[], None]] = {}
    for name, loss in losses.items():
        record = records.setdefault(name, {**shared, "way": name, "faults": []})
        replayed = rows * candidates <= GRAPH_LIMIT and name != "cce"  # which may wait for the device
        try:
            if name != "ours":
                record["errors"] = loss_errors(loss, sets[0], exact)
            if ON_GPU:
                record["peak_mib"] = peak_mib(loss, leaves[0])
                record["timed"] = "graph replay" if replayed else "launched from Python"
                both = {(name, b): make_round(loss, leaves, b, replayed) for b in (False, True)}
                calls |= both
        except RuntimeError as error:  # out of memory, or a torch that cannot compile or capture it
            if name == "ours":
                raise
            record["left_out"] = in_one_line(error)
    repeats = max(1, min(20, int(10 / shared["floor_ms"] / num_sets)))
    for name, figures in time_rounds(calls, rounds, repeats, num_sets).items():
        records[name] |= figures
    return list(records.values())


def count_launches(shape: tuple[int, int, int], dtype: torch.dtype) -> Record:
    """Kernels and copies on the device, forward and backward: of the whole loss each way, of `similarity` alone.

    The last thing measured: a tracer, once started, may slow launches down. None where it saw nothing.
    """
    rows, candidates, width = shape
    leaves = [x.requires_grad_() for x in make_embeddings(rows, candidates, width, SCALE, dtype, DEVICE)]

    def count(call: Callable[[], object]) -> Record:
        call()
        work = device_work(call)
        return {"launches": len(work["kernels"]) or None, "copies": len(work["copies"]), "names": work}

    ways: dict[str, Record] = {}
    for name, loss in find_losses(rows, candidates, dtype, compile_too=dtype == BF16).items():
        try:
            ways[name] = count(functools.partial(run_once, loss, leaves, True))
        except RuntimeError as error:
            ways[name] = {"left_out": in_one_line(error)}
    primitive = make_primitive(rows, candidates, SCALE, DEVICE, "triton")
    gradients = [torch.ones_like(x) for x in primitive(leaves[0], leaves[1])]
    ways["similarity alone"] = count(
        lambda: torch.autograd.grad(primitive(leaves[0], leaves[1]), list(leaves), list(gradients))
    )
    return {"launches_at": list(shape), "dtype": type_name(dtype), "ways": ways}


def measure_gather(rounds: int) -> list[Record]:
    """512 and 4,608 rows of 4,096 out of 32,768 packed tokens; other rows in every call of a graph."""
    results = []
    hidden_TD = torch.randn(32768, 4096, device="cuda", dtype=BF16)
    for rows in (512, 4608):
        lasts = [torch.randperm(32768, device="cuda")[:rows].sort().values for _ in range(40)]
        for impl in ("triton", "torch"):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                gather_last_token(hidden_TD, lasts[0], impl=impl)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for last_S in lasts:
                    gather_last_token(hidden_TD, last_S, impl=impl)
            graph.replay()  # the first replay loads the graph
            samples = [milliseconds(graph.replay, 1) / len(lasts) * 1e3 for _ in range(rounds)]
            shared = {"gather_rows": rows, "way": impl, "timed": "graph replay"}
            results.append({**shared, "microseconds": statistics.median(samples)})
    return results


def plot(records: Sequence[Record], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in records if "both_ms" in r]
    cases = list(dict.fromkeys((tuple(r["shape"]), r["dtype"]) for r in timed))
    figure, axes = plt.subplots(1, max(len(cases), 1), figsize=(3.2 * max(len(cases), 1), 3.5), squeeze=False)
    for axis, (shape, dtype) in zip(axes[0], cases, strict=False):
        mine = [r for r in timed if (tuple(r["shape"]), r["dtype"]) == (shape, dtype)]
        axis.barh([r["way"] for r in mine], [r["both_ms"] for r in mine])
        axis.axvline(mine[0]["floor_ms"], color="0.4", linestyle="--")
        axis.set_title(f"{' x '.join(map(str, shape))}, {dtype}", fontsize=9)
        axis.set_xlabel("ms, forward + backward")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def show(r: Record) -> None:
    if "launches_at" in r:
        counts = ", ".join(f"{way} {x.get('launches', '?')} + {x.get('copies', '?')}" for way, x in r["ways"].items())
        print(f"kernels + copies at {' x '.join(map(str, r['launches_at']))} {r['dtype']}: {counts}", flush=True)
        return
    if "shape" not in r:
        print(f"gather {r['gather_rows']} rows, {r['way']}: {r['microseconds']:.1f} us", flush=True)
        return
    text = f"{' x '.join(map(str, r['shape'])):19} {r['dtype']}  {r.get('way', ''):11}"
    if "both_ms" in r:
        text += f"{r['forward_ms']:11.3f} {r['both_ms']:8.3f} {r['floor_ms'] / r['both_ms']:10.0%} {r['peak_mib']:9.0f}"
    if "errors" in r:
        text += "  " + " ".join(f"{name} {value:.1e}" for name, value in r["errors"].items())
    note = "; ".join(r.get("faults", [])) or r.get("left_out", "") or r.get("timed", "not timed: no GPU")
    print(f"{text}  {note}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write results to as they come")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=600, help="begin no shape after this long")
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    card = torch.cuda.get_device_name() if ON_GPU else "cpu (dry run)"
    head = {"card": card, "torch": torch.__version__, "triton": triton.__version__}
    records: list[Record] = [{**head, "date": time.strftime("%Y-%m-%dT%H:%M:%S")}]
    shown = 1

    def keep() -> None:
        nonlocal shown
        for r in records[shown:]:
            show(r)
        shown = len(records)
        if arguments.json:
            write_text(arguments.json, json.dumps(records, indent=1) + "\n")

    print("shape               type  way          forward ms  both ms  % of floor  peak MiB  errors")
    if ON_GPU:
        records += measure_gather(arguments.rounds)
    for shape, dtype in CASES if ON_GPU else DRY_CASES:
        spent = time.monotonic() - began
        if spent > arguments.seconds:
            late = f"{spent:.0f} s were spent before it, and --seconds is {arguments.seconds:.0f}"
            records.append({"shape": list(shape), "dtype": type_name(dtype), "left_out": late})
        else:
            # The compiler alone takes seconds a shape; fp32 is compared with what training would run instead of ours.
            compile_too = dtype == BF16 and spent < 0.7 * arguments.seconds
            records += measure_case(shape, dtype, arguments.rounds, compile_too and ON_GPU)
            if ON_GPU:
                torch.cuda.empty_cache()
        keep()
    records.append(LEFT_OUT)
    keep()
    if ON_GPU:
        if arguments.json:
            plot(records, arguments.json.with_suffix(".png"))
        for shape, dtype in COUNTED:
            records.append(count_launches(shape, dtype))
            keep()
    return 3 if any(r.get("faults") for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
