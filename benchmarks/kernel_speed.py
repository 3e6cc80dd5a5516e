"""Time and peak memory of similarity + InfoNCE on a GPU, beside what trainers do today; needs a CUDA device.

    eager bf16     as FlagEmbedding computes it: product and division by the temperature in bf16
    eager fp32     the same with logits in fp32 (torch.mm with out_dtype)
    compiled       torch.compile of that
    chunked        a loop over chunks of candidates, fp32 logits, recomputed in backward
    cce            the package cut-cross-entropy, where it is installed
    ours           embed_kernels.similarity

Forward, and forward with backward; medians of interleaved rounds over inputs larger than the L2 cache. A shape whose
loss or gradient disagrees with fp64 is not timed. Results go to --json line by line as they come, and to a plot.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embed_kernels import gather_last_token, similarity

GROUP = 8
SCALE = 50.0  # temperature 0.02
SHAPES = ((512, 4096, 4096), (512, 32768, 4096), (4096, 32768, 4096), (512, 4096, 1024), (4096, 32768, 1024))
PEAK_FLOPS = 790e12  # H200, dense bf16, as measured with large matrix products
L2_BYTES = 64 << 20
Loss = Callable[[Tensor, Tensor], Tensor]


def make_inputs(rows: int, candidates: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows of low rank in bf16; candidate b * GROUP is the positive of row b."""
    generator = torch.Generator("cuda").manual_seed(seed)
    basis = torch.randn(96, width, generator=generator, device="cuda")
    topic = torch.randn(rows, 96, generator=generator, device="cuda")
    other = torch.randn(candidates, 96, generator=generator, device="cuda")
    other[: rows * GROUP] += topic.repeat_interleave(GROUP, dim=0)[:candidates]
    return tuple(torch.nn.functional.normalize(x @ basis, dim=1).bfloat16() for x in (topic, other))  # type: ignore[return-value]


def positives(query: Tensor) -> Tensor:
    return torch.arange(len(query), device=query.device) * GROUP


def eager_bf16(query: Tensor, candidate: Tensor) -> Tensor:
    scores = query @ candidate.T / (1 / SCALE)
    return torch.nn.functional.cross_entropy(scores, positives(query))


class _MatmulFp32(torch.autograd.Function):
    """bf16 operands, fp32 product; torch.mm with out_dtype has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, candidate: Tensor) -> Tensor:
        ctx.save_for_backward(query, candidate)
        return torch.mm(query, candidate.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        query, candidate = ctx.saved_tensors
        gradient = gradient.to(query.dtype)
        return gradient @ candidate, gradient.T @ query


def eager_fp32(query: Tensor, candidate: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(_MatmulFp32.apply(query, candidate) * SCALE, positives(query))


class _Chunked(torch.autograd.Function):
    CHUNK = 8192

    @staticmethod
    def forward(ctx: Any, query: Tensor, candidate: Tensor) -> Tensor:
        parts = []
        for start in range(0, len(candidate), _Chunked.CHUNK):
            logits = torch.mm(query, candidate[start : start + _Chunked.CHUNK].T, out_dtype=torch.float32) * SCALE
            parts.append(torch.logsumexp(logits, 1))
        lse = torch.logsumexp(torch.stack(parts), 0)
        ctx.save_for_backward(query, candidate, lse)
        own = (query.float() * candidate[positives(query)].float()).sum(1) * SCALE
        return (lse - own).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        query, candidate, lse = ctx.saved_tensors
        factor = gradient * SCALE / len(query)
        dq, dc = torch.zeros_like(query, dtype=torch.float32), torch.empty_like(candidate)
        for start in range(0, len(candidate), _Chunked.CHUNK):
            part = candidate[start : start + _Chunked.CHUNK]
            shares = torch.exp(torch.mm(query, part.T, out_dtype=torch.float32) * SCALE - lse[:, None])
            here = (positives(query) >= start) & (positives(query) < start + _Chunked.CHUNK)
            shares[here, positives(query)[here] - start] -= 1
            shares = (shares * factor).to(query.dtype)
            dc[start : start + _Chunked.CHUNK] = shares.T @ query
            dq += torch.mm(shares, part, out_dtype=torch.float32)
        return dq.to(query.dtype), dc


def chunked(query: Tensor, candidate: Tensor) -> Tensor:
    return _Chunked.apply(query, candidate)


def cut_cross_entropy(query: Tensor, candidate: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(query * SCALE, candidate, positives(query))


def make_ours(rows: int, candidates: int) -> Loss:
    integers = {"dtype": torch.int32, "device": "cuda"}
    own = torch.arange(rows * GROUP, **integers)  # type: ignore[call-overload]
    offsets = torch.arange(0, rows * GROUP + 1, GROUP, **integers)  # type: ignore[call-overload]
    copies = torch.ones(candidates, **integers)  # type: ignore[call-overload]

    def ours(query: Tensor, candidate: Tensor) -> Tensor:
        logits_C, rest_B = similarity(query, candidate, own, offsets, SCALE, copies, max_group=GROUP, impl="triton")
        group = logits_C.view(-1, GROUP)
        return (torch.logaddexp(rest_B, torch.logsumexp(group, 1)) - group[:, 0]).mean()

    return ours


def losses(rows: int, candidates: int) -> dict[str, Loss]:
    found: dict[str, Loss] = {"ours": make_ours(rows, candidates), "eager bf16": eager_bf16, "eager fp32": eager_fp32}
    found |= {"compiled": torch.compile(eager_fp32), "chunked": chunked}
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        found["cce"] = cut_cross_entropy
    return found


def errors(loss: Loss, inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Relative errors of the loss and of dq on the first rows, against fp64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(leaves[0], leaves[1])
    value.backward()
    query, candidate = (x.double() for x in inputs)
    some = slice(0, 64)
    total, gradient = torch.zeros((), dtype=torch.float64, device="cuda"), None
    for start in range(0, len(query), 64):
        part = query[start : start + 64].detach().requires_grad_()
        target = positives(query)[start : start + 64]
        share = torch.nn.functional.cross_entropy(part @ candidate.T * SCALE, target, reduction="sum") / len(query)
        if start == 0:
            gradient = torch.autograd.grad(share, part)[0]
        total += share.detach()
    assert gradient is not None and leaves[0].grad is not None
    of_gradient = (leaves[0].grad[some].double() - gradient).norm() / gradient.norm()
    return abs(float(value) / float(total) - 1), float(of_gradient)


def time_once(loss: Loss, inputs: Sequence[Tensor], backward: bool, repeats: int) -> float:
    """Milliseconds of one call, mean over `repeats` back to back, clocks between events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        value = loss(inputs[0], inputs[1])
        if backward:
            torch.autograd.grad(value, list(inputs))
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def peak_mib(loss: Loss, inputs: Sequence[Tensor]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(loss(inputs[0], inputs[1]), list(inputs))
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def count_launches(loss: Loss, inputs: Sequence[Tensor]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as records:
        torch.autograd.grad(loss(inputs[0], inputs[1]), list(inputs))
        torch.cuda.synchronize()
    return sum(1 for event in records.events() if "memcpy" not in event.name.lower())


def measure_shape(rows: int, candidates: int, width: int, rounds: int) -> list[dict[str, Any]]:
    bytes_of_one = (rows + candidates) * width * 2
    sets = [make_inputs(rows, candidates, width, seed) for seed in range(max(2, -(-L2_BYTES // bytes_of_one)))]
    leaves = [[x.requires_grad_() for x in some] for some in sets]
    found = losses(rows, candidates)
    records = {}
    for name, loss in found.items():
        of_loss, of_gradient = errors(loss, sets[0])
        records[name] = {"loss_error": of_loss, "dq_error": of_gradient, "peak_mib": peak_mib(loss, leaves[0])}
        records[name]["launches"] = count_launches(loss, leaves[0])
    ours = records["ours"]
    if not (ours["loss_error"] <= 1e-5 and ours["dq_error"] <= 6e-3):
        raise SystemExit(f"error: {rows} x {candidates} x {width}: ours disagrees with fp64: {ours}")
    repeats = 20 if rows * candidates < 1e7 else 3
    times: dict[tuple[str, bool], list[float]] = {}
    for r in range(rounds):
        for name, loss in found.items():
            for backward in (False, True):
                sample = time_once(loss, leaves[r % len(leaves)], backward, repeats)
                times.setdefault((name, backward), []).append(sample)
    floor_ms = 3 * 2 * rows * candidates * width / PEAK_FLOPS * 1e3
    results = []
    for name, record in records.items():
        forward, both = (sorted(times[name, backward][1:]) for backward in (False, True))
        results.append(
            {"shape": [rows, candidates, width], "way": name, **record, "floor_ms": floor_ms}
            | {"forward_ms": statistics.median(forward), "forward_spread_ms": [forward[0], forward[-1]]}
            | {"both_ms": statistics.median(both), "both_spread_ms": [both[0], both[-1]]}
        )
    return results


def measure_gather(rounds: int) -> list[dict[str, Any]]:
    """512 and 4,608 rows of 4,096 out of 32,768 packed tokens."""
    results = []
    hidden = torch.randn(32768, 4096, device="cuda", dtype=torch.bfloat16)
    for rows in (512, 4608):
        last = torch.randperm(32768, device="cuda")[:rows].sort().values
        for impl in ("triton", "torch"):
            samples = []
            for _ in range(rounds):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                graph = torch.cuda.CUDAGraph()
                gather_last_token(hidden, last, impl=impl)  # type: ignore[arg-type]
                with torch.cuda.graph(graph):
                    for _ in range(20):
                        gather_last_token(hidden, last, impl=impl)  # type: ignore[arg-type]
                begin.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                samples.append(begin.elapsed_time(end) / 20 * 1e3)
            results.append({"gather_rows": rows, "way": impl, "microseconds": statistics.median(samples)})
    return results


def plot(records: Sequence[dict[str, Any]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in records if "shape" in r))
    figure, axes = plt.subplots(1, len(shapes), figsize=(3.2 * len(shapes), 3.5), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        mine = [r for r in records if tuple(r.get("shape", ())) == shape]
        axis.barh([r["way"] for r in mine], [r["both_ms"] for r in mine])
        axis.axvline(mine[0]["floor_ms"], color="0.4", linestyle="--")
        axis.set_title(" x ".join(map(str, shape)), fontsize=9)
        axis.set_xlabel("ms, forward + backward")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write results to as they come")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: there is no CUDA device; these are timings of a GPU", file=sys.stderr)
        return 2
    import triton

    records: list[dict[str, Any]] = [
        {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        | {"date": time.strftime("%Y-%m-%d")}
    ]
    print("shape                 way          forward ms  both ms  % of floor  peak MiB  launches  dq error")
    for shape in SHAPES:
        for r in measure_shape(*shape, arguments.rounds):
            records.append(r)
            print(
                f"{' x '.join(map(str, shape)):21} {r['way']:11} {r['forward_ms']:11.3f} {r['both_ms']:8.3f} "
                f"{r['floor_ms'] / r['both_ms']:11.0%} {r['peak_mib']:9.0f} {r['launches']:9} {r['dq_error']:9.1e}",
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    for r in measure_gather(arguments.rounds):
        records.append(r)
        print(f"gather {r['gather_rows']} rows, {r['way']}: {r['microseconds']:.1f} us", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")
        plot(records, arguments.json.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
