"""Train a few-shot embedder: `deepspeed pipeline/train.py --config RECIPE [key.sub=value ...]`.

The run folder (run.output_dir) gets settings.yaml, metrics.jsonl, checkpoints/, loss.png and model/ (adapter, marker
rows, tokenizer, template, limits, examples). Started again with the same recipe, a run goes on from its newest
checkpoint.
"""

import argparse
import dataclasses
import hashlib
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.composing import Limits
from pipeline.data.sampling import check_world_size, make_schedule, plan_step, share_saved
from pipeline.data.store import open_store, require_match, verify_shards
from pipeline.data.tokenizing import load_tokenizer
from pipeline.datatypes import BatchPlan, PackedChunk
from pipeline.files import write_text
from pipeline.inference.saving import save_model
from pipeline.model.encoder import add_lora, load_encoder, require_rows
from pipeline.prompts import get_template
from pipeline.runtime.checkpoint import TrainState, find_checkpoint, load_checkpoint, save_checkpoint
from pipeline.runtime.engine import (
    build_engine,
    one_reduction,
    read_state,
    start_distributed,
    stop_distributed,
    take_step,
    write_state,
)
from pipeline.runtime.ranks import Ranks, from_first, read_ranks, share_cores, together
from pipeline.runtime.runlog import (
    StepMetrics,
    append_metrics,
    open_tracker,
    peak_memory_gib,
    plot_losses,
    require_tracker,
    set_up_logging,
    start_metrics,
    step_line,
)
from pipeline.runtime.sharding_json import read_deepspeed_json
from pipeline.runtime.step import StepInputs, StepResult, encode_chunk, prepare_step, run_step
from pipeline.settings import OptimSettings, Settings, dump_settings, load_settings

log = logging.getLogger("train")

REMEDY = "lower optim.lr or lengthen optim.warmup_steps, and look at the rows with pipeline/plan_run.py --step"


def run(settings: Settings, ranks: Ranks) -> None:
    """The whole run on one rank; user errors are ValueErrors."""
    out = Path(settings.run.output_dir)
    limits = Limits.from_settings(settings.preprocess)
    if out.exists() and not out.is_dir():
        raise ValueError(f"run.output_dir={out} is a file; name a folder")
    read_deepspeed_json(settings.run.deepspeed)  # a wrong one should not be found after the model is loaded

    # Data: refuse a store that this recipe did not make, or that is damaged (each rank reads its share of the shards).
    store = open_store(settings.data.store, verify=False)
    together(lambda: verify_shards(settings.data.store, ranks.rank, ranks.world_size), ranks)
    tokenizer = load_tokenizer(settings.tokenizer_name, get_template(settings.preprocess.template))
    require_match(store, settings, tokenizer.fingerprint)
    schedule = make_schedule(store, settings)
    check_world_size(schedule, ranks.world_size)
    require_tracker(settings.run.tracker)
    total_steps = settings.optim.max_steps or math.ceil(settings.optim.epochs * schedule.steps_per_epoch)
    manifest_hash = hashlib.sha256((Path(settings.data.store) / "manifest.json").read_bytes()).hexdigest()
    log.info("store %s: %d datasets, %d steps", settings.data.store, len(store.datasets), total_steps)

    # Model: the frozen base, fresh adapters (the same on every rank), and the engine around them.
    prompt_tokens = tokenizer.tokens
    encoder = load_encoder(settings.model, prompt_tokens.marker_ids, prompt_tokens.marker_subtokens, ranks.device.type)
    require_rows(encoder, tokenizer.largest_id)
    torch.manual_seed(settings.run.seed)
    add_lora(encoder, settings.model.lora)
    encoder.train()
    engine = build_engine(encoder, settings.optim, settings.model.dtype, settings.run.deepspeed, ranks)
    log.info("%s, ZeRO-%d, %d ranks", describe(encoder), engine.zero_optimization_stage(), ranks.world_size)

    # Resume: nothing to ask for, the newest complete checkpoint is taken.
    state = TrainState(seed=settings.run.seed)
    found = together(lambda: find_checkpoint(out / "checkpoints") if ranks.is_first else None, ranks)
    checkpoint = from_first(found, ranks)
    if checkpoint is not None:
        state, trainable = together(lambda: load_checkpoint(checkpoint, settings, manifest_hash), ranks)
        make_optimizer_state(engine, ranks)
        write_state(engine, trainable, state.step, ranks)
        log.info("resumed from %s: step %d of %d", checkpoint, state.step, total_steps)
    if ranks.is_first:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "settings.yaml", dump_settings(settings))
        start_metrics(out / "metrics.jsonl", state.step)
    track = open_tracker(settings.run.tracker if ranks.is_first else "none", out, dataclasses.asdict(settings))

    recent: list[float] = []
    while state.step < total_steps:
        started = time.perf_counter()
        lr = learning_rate(settings.optim, state.step, total_steps)
        plan = plan_step(store, schedule, state.step)
        inputs = prepare_step(store, limits, plan, ranks, settings.run.chunk_tokens)
        result = run_step(engine, inputs, settings, ranks)
        where = f"step {state.step} (dataset {store.datasets[plan.dataset].name}, rows {plan.row_B[:8].tolist()}...)"
        if not math.isfinite(result.loss):
            raise FloatingPointError(f"loss is {result.loss} at {where}; no optimizer step was taken; {REMEDY}")
        norm = take_step(engine, lr)
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at {where}; the last checkpoint is older; {REMEDY}")
        seconds = time.perf_counter() - started
        state = TrainState(
            step=state.step + 1,
            seed=state.seed,
            tokens_seen=state.tokens_seen + inputs.num_tokens,
            queries_seen=state.queries_seen + plan.num_queries,
        )

        if ranks.is_first:
            dataset = store.datasets[plan.dataset].name
            metrics = step_metrics(plan, dataset, inputs, result, norm, lr, seconds, settings.optim.clip_norm, ranks)
            # The first steps are slow (allocation, compilation): the estimate forgets them.
            recent = [*recent[-19:], seconds]
            left = float(np.median(recent)) * (total_steps - state.step)
            log.info(step_line(metrics, total_steps, left))
            append_metrics(out / "metrics.jsonl", metrics)
            track(dataclasses.asdict(metrics))

        if state.step % settings.run.save_every == 0 or state.step == total_steps:
            trainable = read_state(engine)
            if ranks.is_first:
                folder = out / "checkpoints"
                saved = save_checkpoint(folder, state, trainable, settings, manifest_hash, settings.run.keep_last)
                log.info("saved %s", saved)

    trainable = read_state(engine)
    if ranks.is_first:
        save_model(out / "model", encoder, trainable, tokenizer, settings, store)
        plot_losses(out / "metrics.jsonl", out / "loss.png")
        log.info("done: %d steps, %s tokens; model in %s", state.step, f"{state.tokens_seen:,}", out / "model")


def step_metrics(
    plan: BatchPlan,
    dataset: str,
    inputs: StepInputs,
    result: StepResult,
    norm: float,
    lr: float,
    seconds: float,
    clip_norm: float,
    ranks: Ranks,
) -> StepMetrics:
    """One line of metrics.jsonl."""
    return StepMetrics(
        step=plan.step,
        epoch=plan.epoch,
        dataset=dataset,
        loss=result.loss,
        grad_norm=norm,
        lr=lr,
        seconds=seconds,
        queries=plan.num_queries,
        queries_per_second=plan.num_queries / seconds,
        tokens=inputs.num_tokens,
        tokens_per_second=inputs.num_tokens / seconds,
        memory_gib=peak_memory_gib(ranks.device),
        chunks=inputs.num_chunks,
        passes=result.num_passes,
        examples_per_query=len(plan.example_row_E) / plan.num_queries,
        examples_dropped=plan.num_examples_dropped,
        passages=plan.num_passages,
        passages_saved=share_saved(plan),
        examples_missing=plan.num_examples_missing,
        negatives_repeated=plan.num_candidates_repeated,
        rows_revisited=plan.num_rows_revisited,
        clipped=norm > clip_norm,
    )


def learning_rate(optim: OptimSettings, step: int, total_steps: int) -> float:
    """Linear warm-up to optim.lr, then linear or cosine decay that would reach 0 one step after the last."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (1 - progress)


def make_optimizer_state(engine: Any, ranks: Ranks) -> None:
    """One optimizer step that changes nothing to keep: it makes the moments exist, so that they can be set."""
    one_token = np.zeros(1, dtype=np.int64)
    dummy = PackedChunk(one_token, one_token, np.array([0, 1], dtype=np.int32), one_token - 1, 1)
    with one_reduction(engine) as backward:
        embeddings_SD = encode_chunk(engine, dummy, ranks.device)
        backward(embeddings_SD, torch.zeros_like(embeddings_SD), True)
    take_step(engine, 0.0)


def describe(encoder: torch.nn.Module) -> str:
    """Parameter counts as one phrase."""

    def count(p: torch.nn.Parameter) -> int:
        return getattr(p, "ds_numel", p.numel())

    trained = sum(count(p) for p in encoder.parameters() if p.requires_grad)
    # Buffers too: the frozen embedding table is one.
    total = sum(count(p) for p in encoder.parameters()) + sum(b.numel() for b in encoder.buffers())
    return f"{total / 1e6:.1f} M parameters, {trained / 1e6:.2f} M of them trained"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  deepspeed --num_accelerators 2 pipeline/train.py --config examples/quickstart/recipe.yaml
  deepspeed --num_gpus 8 pipeline/train.py --config recipes/bge_en_icl_public.yaml run.chunk_tokens=32768
  python pipeline/train.py --config examples/quickstart/recipe.yaml run.deepspeed=ds_configs/zero1.json   (one process)
The store must exist: python pipeline/preprocess.py --config RECIPE. What a step holds: pipeline/plan_run.py.""",
    )
    parser.add_argument("--config", required=True, help="recipe YAML; settings.py documents every key")
    parser.add_argument("--local_rank", type=int, default=None, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the recipe's")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        ranks = read_ranks(arguments.local_rank)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    set_up_logging(ranks)
    try:
        settings = load_settings(arguments.config, arguments.overrides)
        share_cores(ranks)
        start_distributed(ranks)
        run(settings, ranks)
    except (ValueError, OSError, FloatingPointError) as error:
        # A user's fault shows on every rank alike; the others give the first one time to say it once.
        time.sleep(0 if ranks.is_first else 3)
        print(f"{'' if ranks.is_first else f'[rank {ranks.rank}] '}error: {error}", file=sys.stderr, flush=True)
        return 2
    stop_distributed()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
