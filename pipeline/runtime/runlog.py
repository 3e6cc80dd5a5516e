"""What a run leaves to read: the logger, one line a step, metrics.jsonl, a tracker if asked for, loss.png."""

import hashlib
import importlib.util
import json
import logging
import math
import resource
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.data.sampling import share_saved
from pipeline.datatypes import BatchPlan
from pipeline.files import write_text
from pipeline.model.flop import StepFlop, peak_flops
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.step import StepInputs, StepResult

Track = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Tokens are real tokens; there is no padding to count."""

    step: int
    total_steps: int  # of the whole run
    epoch: int
    dataset: str
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    seconds_of: dict[str, float]  # data (waited for), pass_1, loss, pass_2, reduce, update
    queries: int
    queries_per_second: float
    tokens: int
    tokens_per_second: float
    tflops: float | None  # executed by a rank a second, 1e12; this and the next two: pipeline/model/flop.py
    hfu: float | None  # that as share of the card's peak; None where the peak is not known
    mfu: float | None  # 4NT instead of what is executed
    memory_gib: float  # peak on this rank: allocator on GPU, resident set on CPU
    chunks: int  # per rank
    passes: int  # forward passes of a rank: one a chunk, and another for each chunk whose graph was not kept
    examples_per_query: float
    examples_dropped: int
    passages: int
    passages_saved: float  # share of candidates that needed no encoding of their own
    examples_missing: int  # drawn, but there were not enough rows that may be shown
    negatives_repeated: int  # to fill groups, where the recipe asks for it
    negatives_filtered: int  # suspected false negatives that the loss left out, copies counted, all ranks together
    negatives_shown: int  # in-batch negatives left out because their query's examples show them
    pair_queries_cut: int  # of a reranker's pairs, as the next three: those with a query, or a passage, that was cut
    pair_passages_cut: int
    merge_layers: tuple[int, ...]  # behind which passages were merged
    merge_ratio: int  # passage tokens that became one there
    rows_revisited: int
    clipped: bool
    skipped: bool  # loss or gradient was not finite: the weights did not move


def step_metrics(
    plan: BatchPlan,
    dataset: str,
    inputs: StepInputs,
    result: StepResult,
    norm: float,
    lr: float,
    seconds: dict[str, float],
    flop: StepFlop | None,
    clip_norm: float,
    total_steps: int,
    ranks: Ranks,
) -> StepMetrics:
    """One line of metrics.jsonl."""
    rank_seconds = seconds["all"] * ranks.world_size
    peak = peak_flops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
    return StepMetrics(
        step=plan.step,
        total_steps=total_steps,
        epoch=plan.epoch,
        dataset=dataset,
        loss=result.loss,
        grad_norm=norm,
        lr=lr,
        seconds=seconds["all"],
        seconds_of={name: round(value, 6) for name, value in seconds.items() if name != "all"},
        queries=plan.num_queries,
        queries_per_second=plan.num_queries / seconds["all"],
        tokens=inputs.num_tokens,
        tokens_per_second=inputs.num_tokens / seconds["all"],
        tflops=flop.executed / rank_seconds / 1e12 if flop else None,
        hfu=flop.executed / rank_seconds / peak if flop and peak else None,
        mfu=flop.model / rank_seconds / peak if flop and peak else None,
        memory_gib=peak_memory_gib(ranks.device),
        chunks=inputs.num_chunks,
        passes=result.num_passes,
        examples_per_query=len(plan.example_row_E) / plan.num_queries,
        examples_dropped=plan.num_examples_dropped,
        passages=plan.num_passages,
        passages_saved=share_saved(plan),
        examples_missing=plan.num_examples_missing,
        negatives_repeated=plan.num_candidates_repeated,
        negatives_filtered=result.num_filtered,
        negatives_shown=inputs.num_negatives_shown,
        pair_queries_cut=inputs.num_queries_cut,
        pair_passages_cut=inputs.num_passages_cut,
        merge_layers=inputs.compress_layers,
        merge_ratio=inputs.compress_ratio,
        rows_revisited=plan.num_rows_revisited,
        clipped=norm > clip_norm,
        skipped=math.isnan(norm),
    )


def set_up_logging(ranks: Ranks) -> None:
    """First rank: everything to stdout. Others: warnings only, with their rank in front."""
    who = "" if ranks.is_first else f"[rank {ranks.rank}] "
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO if ranks.is_first else logging.WARNING,
        format=f"{who}%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    # Every rank would repeat these, and none is for the user to act on: DeepSpeed calls collectives by older names,
    # transformers reports the layers that model.num_layers leaves out.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers)\.")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for noisy in ("DeepSpeed", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step_line(m: StepMetrics, seconds_left: float) -> str:
    """The one line a step that people watch."""
    minutes, seconds = divmod(int(seconds_left), 60)
    work = f"{m.tflops:.0f} TFLOP/s | " if m.tflops is not None and m.tflops >= 1 else ""
    if m.hfu is not None:
        work = f"{m.tflops:.0f} TFLOP/s, HFU {m.hfu:.0%}, MFU {m.mfu:.0%} | "
    filtered = f"{m.negatives_filtered:,} filtered | " if m.negatives_filtered else ""
    cut = f"{m.pair_passages_cut:,} pairs cut | " if m.pair_passages_cut else ""
    merged = f"{m.merge_ratio} to 1 behind {', '.join(map(str, m.merge_layers))} | " if m.merge_layers else ""
    return (
        f"step {m.step + 1}/{m.total_steps} | {m.dataset} | loss {m.loss:.4f} | grad {m.grad_norm:.2f}"
        f"{' clipped' if m.clipped else ''}{' NOT TAKEN' if m.skipped else ''} | lr {m.lr:.2e} | "
        f"{m.queries_per_second:.1f} q/s | {m.tokens_per_second:,.0f} tok/s | {work}"
        f"mem {m.memory_gib:.2f} GiB | {m.chunks} chunks, {m.passes} passes | "
        f"{m.examples_per_query:.1f} examples/q | {filtered}{cut}{merged}{m.seconds:.2f} s | "
        f"eta {minutes // 60}h{minutes % 60:02d}m{seconds:02d}s"
    )


def start_metrics(path: Path, first_step: int) -> None:
    """Make metrics.jsonl end just before `first_step`: steps after the last checkpoint are done again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < first_step]
    write_text(path, "".join(line + "\n" for line in kept))


def append_metrics(path: Path, metrics: StepMetrics) -> None:
    with path.open("a", encoding="utf-8") as file:
        values = asdict(metrics).items()  # JSON has no NaN
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values}
        file.write(json.dumps(finite) + "\n")


def require_tracker(kind: str) -> None:
    """ValueError if the tracker asked for is not installed; asked on every rank, before anything is loaded."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise ValueError(f"run.tracker={kind} is not installed; pip install bge-icl-train[tracking], or set it to none")


def open_tracker(kind: str, folder: Path, settings: dict[str, Any]) -> Track:
    """A function that takes one step's metrics."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(metrics: dict[str, Any]) -> None:
            phases = {f"seconds_of/{name}": value for name, value in metrics["seconds_of"].items()}
            for name, value in (metrics | phases).items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, metrics["step"])
            writer.flush()

        return to_tensorboard
    if kind == "wandb":
        import wandb

        # The same id at every restart: one run there as here.
        run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        run = wandb.init(project="bge-icl-train", id=run_id, dir=str(folder), config=settings, resume="allow")
        return lambda metrics: run.log(metrics, step=metrics["step"])
    return lambda metrics: None


def plot_losses(metrics_path: Path, picture: Path) -> None:
    """loss.png: loss of every step, one colour a dataset, and the learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics_path.read_text(encoding="utf-8").splitlines()]
    rows = [line for line in lines if line["loss"] is not None]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1))
    top.plot([r["step"] for r in rows], [r["loss"] for r in rows], color="0.8", linewidth=1, zorder=1)
    for name in sorted({r["dataset"] for r in rows}):
        mine = [r for r in rows if r["dataset"] == name]
        top.scatter([r["step"] for r in mine], [r["loss"] for r in mine], s=14, label=name, zorder=2)
    top.set_ylabel("loss")
    top.legend(fontsize="small")
    bottom.plot([r["step"] for r in rows], [r["lr"] for r in rows])
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
