"""Train a few-shot embedder: `deepspeed pipeline/train.py --config RECIPE [key.sub=value ...]`.

The run folder (run.output_dir) gets settings.yaml, metrics.jsonl, checkpoints/, loss.png and model/ (adapter, marker
rows, tokenizer, template, limits, examples). Started again with the same recipe, a run goes on from its newest
checkpoint.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.composing import Limits
from pipeline.data.sampling import Schedule, check_world_size, make_schedule, plan_step
from pipeline.data.store import TokenStore, open_store, require_match, verify_shards
from pipeline.data.tokenizing import PromptTokenizer, load_tokenizer
from pipeline.evaluation.tasks import RetrievalTask, load_task
from pipeline.files import file_sha256, locked, write_text
from pipeline.inference.embedder import FewShotEmbedder
from pipeline.inference.saving import save_model
from pipeline.model.encoder import Encoder, choose_trained, load_encoder, require_rows
from pipeline.model.loss import require_dims
from pipeline.prompts import get_template
from pipeline.runtime.checkpoint import TrainState, find_checkpoint, load_checkpoint, save_checkpoint
from pipeline.runtime.engine import (
    build_engine,
    discard_gradients,
    gathered,
    read_state,
    require_keepable,
    sharded_loading,
    start_distributed,
    stop_distributed,
    take_step,
    write_state,
)
from pipeline.runtime.guards import code_versions, digest_plan, is_spike, require_alike, too_late
from pipeline.runtime.ranks import Ranks, from_first, read_ranks, share_cores, together
from pipeline.runtime.runlog import (
    append_metrics,
    open_tracker,
    plot_losses,
    require_tracker,
    set_up_logging,
    start_metrics,
    step_line,
    step_metrics,
)
from pipeline.runtime.step import StepInputs, make_optimizer_state, prepare_step, run_step
from pipeline.runtime.watch import (
    LOST,
    NOT_FINITE,
    STOPPED,
    StopRequested,
    Watch,
    is_lost_peer,
    mark,
    start_watch,
    stop_watching_signals,
    who_is_behind,
)
from pipeline.settings import EvaluationSettings, OptimSettings, Settings, dump_settings, flatten, load_settings

log = logging.getLogger("train")

STOPPED_AT = "stopped_at"  # in the run folder: the steps done by a run that was asked to stop
MAX_BAD_STEPS = 3
REMEDY = "lower optim.lr or lengthen optim.warmup_steps, and look at the rows with pipeline/plan_run.py --step"


@dataclass(frozen=True)
class Run:
    """What stays as it is from the first step to the last."""

    settings: Settings
    out: Path
    ranks: Ranks
    watch: Watch
    store: TokenStore
    manifest_hash: str
    schedule: Schedule
    tokenizer: PromptTokenizer
    tasks: tuple[RetrievalTask, ...]  # to evaluate on
    encoder: Encoder
    engine: Any
    total_steps: int


def set_up(settings: Settings, ranks: Ranks, watch: Watch) -> Run:
    """Data, model and engine of one rank; ValueErrors for what a user can mend."""
    out = Path(settings.run.output_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"run.output_dir={out} is a file; name a folder")
    # What is wrong should not be found after the model is loaded.
    require_keepable(settings.run.deepspeed, settings.run.keep_graphs)
    require_alike(code_versions() | {f"setting {k}": repr(v) for k, v in flatten(settings).items()}, ranks)
    require_tracker(settings.run.tracker)
    tasks = load_tasks(settings.evaluation)

    # Data: refuse a store that this recipe did not make, or that is damaged (each rank reads its share of the shards).
    mark(watch, "the check of the token store")
    store = open_store(settings.data.store, verify=False)
    together(lambda: verify_shards(settings.data.store, ranks.rank, ranks.world_size), ranks)
    tokenizer = load_tokenizer(settings.tokenizer_name, get_template(settings.preprocess.template))
    manifest_hash = file_sha256(Path(settings.data.store) / "manifest.json")
    require_alike({"token store": manifest_hash, "tokenizer": tokenizer.fingerprint}, ranks)
    require_match(store, settings, tokenizer.fingerprint)
    schedule = make_schedule(store, settings)
    check_world_size(schedule, ranks.world_size)
    require_alike({"first plan": digest_plan(plan_step(store, schedule, 0))}, ranks)
    total_steps = settings.optim.max_steps or math.ceil(settings.optim.epochs * schedule.steps_per_epoch)
    log.info("store %s: %d datasets, %d steps", settings.data.store, len(store.datasets), total_steps)

    # Model: the frozen base, what trains (the same on every rank), and the engine around them.
    mark(watch, "the loading of the model")
    markers = (tokenizer.tokens.marker_ids, tokenizer.tokens.marker_subtokens)
    with sharded_loading(settings.run.deepspeed, settings.optim, settings.model.dtype):
        encoder = load_encoder(settings.model, *markers, ranks.device.type, gathered)
    require_rows(encoder, tokenizer.largest_id)
    require_dims(settings.loss, encoder.width)
    torch.manual_seed(settings.run.seed)
    choose_trained(encoder, settings.model)
    encoder.train()
    engine = build_engine(encoder, settings.optim, settings.model.dtype, settings.run.deepspeed, ranks)
    log.info("%s, ZeRO-%d, %d ranks", describe(encoder), engine.zero_optimization_stage(), ranks.world_size)
    return Run(
        settings, out, ranks, watch, store, manifest_hash, schedule, tokenizer, tasks, encoder, engine, total_steps
    )


def train(run: Run) -> None:
    """From the newest checkpoint to the finished model.

    Raises:
        StopRequested: someone asked for it, or the job's time ends; what is done is saved.
        FloatingPointError: several steps in a row were not finite.
    """
    out, ranks = run.out, run.ranks
    with contextlib.ExitStack() as held:
        # One writer a run folder; the lock goes with this process, however it ends.
        busy = f"another run writes to {out}; wait for it, or name another run.output_dir"
        together(lambda: held.enter_context(locked(out / "lock", busy)) if ranks.is_first else None, ranks)
        state = resume(run)
        # The next step is planned and packed while this one computes.
        loader = held.enter_context(ThreadPoolExecutor(1))
        state = train_steps(run, state, loader)
        mark(run.watch, "writing the model")
        trainable = read_state(run.engine)
        if ranks.is_first:
            save_model(out / "model", run.encoder, trainable, run.tokenizer, run.settings, run.store)
            plot_losses(out / "metrics.jsonl", out / "loss.png")
            tokens, without = f"{state.tokens_seen:,}", state.step - state.updates
            log.info("done: %d steps (%d without an update), %s tokens", state.step, without, tokens)
            log.info("model in %s", out / "model")


def resume(run: Run) -> TrainState:
    """Where the run stands: nothing to ask for, the newest complete checkpoint is taken."""
    mark(run.watch, "the search for a checkpoint")
    out, ranks = run.out, run.ranks
    state = TrainState(seed=run.settings.run.seed)
    found = together(lambda: find_checkpoint(out / "checkpoints") if ranks.is_first else None, ranks)
    checkpoint = from_first(found, ranks)
    if checkpoint is not None:
        state, trainable = together(lambda: load_checkpoint(checkpoint, run.settings, run.manifest_hash), ranks)
        make_optimizer_state(run.engine, ranks)
        write_state(run.engine, trainable, state.updates, ranks)
        log.info("resumed from %s: %d steps are done", checkpoint, state.step)
    if ranks.is_first:
        (out / STOPPED_AT).unlink(missing_ok=True)
        write_text(out / "settings.yaml", dump_settings(run.settings))
        start_metrics(out / "metrics.jsonl", state.step)
    return state


def train_steps(run: Run, state: TrainState, loader: Executor) -> TrainState:
    """All steps from `state` to the last; raises what `train` raises."""
    settings, ranks, out = run.settings, run.ranks, run.out
    limits, evaluate_every = Limits.from_settings(settings.preprocess), settings.evaluation.every
    track = open_tracker(settings.run.tracker if ranks.is_first else "none", out, dataclasses.asdict(settings))
    saved_step, save_seconds, bad_in_a_row = state.step, 0.0, 0
    recent: list[float] = []
    losses: dict[int, list[float]] = {}  # the last ones of each dataset

    def load(step: int) -> StepInputs:
        plan = plan_step(run.store, run.schedule, step)
        return prepare_step(run.store, limits, plan, ranks, settings.run.chunk_tokens, settings.loss.mask_shown)

    coming = loader.submit(load, state.step)
    while state.step < run.total_steps:
        started = time.perf_counter()
        if ranks.is_first and (hurry := too_late(recent, save_seconds)):
            run.watch.asked = hurry
        inputs = coming.result()
        plan, seconds = inputs.plan, {"data": time.perf_counter() - started}
        if state.step + 1 < run.total_steps:
            coming = loader.submit(load, state.step + 1)
        lr = learning_rate(settings.optim, state.step, run.total_steps)
        try:
            result = run_step(run.engine, inputs, settings, ranks, run.watch)
        except StopRequested as stop:
            # Weights do not change inside a step: those after the last one are saved, and this one is done again.
            if saved_step < state.step:
                save(run, state)
            if ranks.is_first:
                write_text(out / STOPPED_AT, f"{state.step}\n")
            raise StopRequested(f"{stop}; {state.step} of {run.total_steps} steps are done and saved") from None
        dataset = run.store.datasets[plan.dataset].name
        where = f"step {state.step} (dataset {dataset}, rows {plan.row_B[:8].tolist()}...)"
        if result.fault or not math.isfinite(result.loss):
            bad_in_a_row, norm = bad_in_a_row + 1, math.nan
            discard_gradients(run.engine)
            fault = f"loss is {result.loss} at {where}, not finite: {result.fault or 'the loss alone'}"
            if bad_in_a_row == MAX_BAD_STEPS:
                raise FloatingPointError(f"{fault}; {bad_in_a_row} steps in a row were like that; {REMEDY}")
            if ranks.is_first:
                log.warning("%s; no rank takes this step", fault)
        else:
            updating = time.perf_counter()
            bad_in_a_row, norm = 0, take_step(run.engine, lr)
            seconds["update"] = time.perf_counter() - updating
            if not math.isfinite(norm):
                raise FloatingPointError(f"gradient norm is {norm} at {where}; the last checkpoint is older; {REMEDY}")
        seconds = {"all": time.perf_counter() - started} | seconds | result.seconds
        state = TrainState(
            step=state.step + 1,
            updates=state.updates + (not bad_in_a_row),
            seed=state.seed,
            tokens_seen=state.tokens_seen + inputs.num_tokens,
            queries_seen=state.queries_seen + plan.num_queries,
        )

        if ranks.is_first:
            if is_spike(losses.setdefault(plan.dataset, []), result.loss):
                log.warning("loss %.4f is more than 3 times what it was lately: %s", result.loss, where)
            metrics = step_metrics(plan, dataset, inputs, result, norm, lr, seconds, settings.optim.clip_norm, ranks)
            # The first steps are slow (allocation, compilation): the estimate forgets them.
            recent = [*recent[-19:], seconds["all"]]
            log.info(step_line(metrics, run.total_steps, float(np.median(recent)) * (run.total_steps - state.step)))
            append_metrics(out / "metrics.jsonl", metrics)
            track(dataclasses.asdict(metrics))

        at_end = state.step == run.total_steps
        if evaluate_every and (at_end or state.step % evaluate_every == 0):
            evaluate(run, state)
        if at_end or state.step % settings.run.save_every == 0:
            save_seconds, saved_step = save(run, state), state.step
    return state


def save(run: Run, state: TrainState) -> float:
    """Write a checkpoint; returns the seconds. All ranks wait for it: a full disk then ends the run on all of them."""
    started = time.perf_counter()
    mark(run.watch, f"saving after {state.step} steps")
    trainable = read_state(run.engine)

    def write() -> Path | None:
        if not run.ranks.is_first:
            return None
        folder, keep_last = run.out / "checkpoints", run.settings.run.keep_last
        return save_checkpoint(folder, state, trainable, run.settings, run.manifest_hash, keep_last)

    log.info("saved %s", together(write, run.ranks))
    return time.perf_counter() - started


def evaluate(run: Run, state: TrainState) -> None:
    """Score the model as it is on the recipe's tasks, all ranks together; the best one stands in best_model/."""
    from pipeline.evaluation.during import record_scores, score_tasks  # mteb takes seconds to load

    started, ranks, settings = time.perf_counter(), run.ranks, run.settings
    mark(run.watch, f"evaluating after {state.step} steps")
    embedder = FewShotEmbedder(
        encoder=run.engine,
        tokenizer=run.tokenizer,
        limits=Limits.from_settings(settings.preprocess),
        device=ranks.device,
        chunk_tokens=settings.run.chunk_tokens,
        show_progress=False,
        place=(ranks.rank, ranks.world_size),
    )
    run.engine.eval()
    scores = score_tasks(embedder, run.tasks, settings.evaluation.num_examples)
    run.engine.train()
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    best = from_first(ranks.is_first and record_scores(run.out, state.step, scores), ranks)
    took = f"{time.perf_counter() - started:.0f} s{'; the best so far' if best else ''}"
    log.info("after %d steps: %s (%s)", state.step, shown, took)
    if best:
        trainable = read_state(run.engine)
        if ranks.is_first:
            save_model(run.out / "best_model", run.encoder, trainable, run.tokenizer, settings, run.store)


def load_tasks(evaluation: EvaluationSettings) -> tuple[RetrievalTask, ...]:
    """The tasks to evaluate on; ValueError where one is not whole, or what scores is not installed."""
    if evaluation.every and importlib.util.find_spec("mteb") is None:
        raise ValueError("evaluation.tasks needs mteb, which is not installed; pip install bge-icl-train[eval]")
    return tuple(load_task(folder) for folder in evaluation.tasks)


def learning_rate(optim: OptimSettings, step: int, total_steps: int) -> float:
    """Linear warm-up to optim.lr, then linear or cosine decay that would reach 0 one step after the last."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (1 - progress)


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
    watch, code = None, 0
    try:
        settings = load_settings(arguments.config, arguments.overrides)
        share_cores(ranks)
        start_distributed(ranks)
        watch = start_watch(ranks, settings.run.max_stall_seconds)
        train(set_up(settings, ranks, watch))
    except StopRequested as stop:
        log.info("stopped by %s; the same command goes on from there", stop)
        code = STOPPED
    except FloatingPointError as error:
        code = report(error, ranks, NOT_FINITE)
    except (ValueError, OSError) as error:
        return report(error, ranks, 2)
    except RuntimeError as error:
        if watch is None or not is_lost_peer(error):
            raise
        where = f"{watch.place}; {who_is_behind(watch)}"
        print(f"error: rank {ranks.rank} lost another rank at {where}; the same command goes on", file=sys.stderr)
        os._exit(LOST)  # the process group cannot be left in order any more
    stop_distributed()
    return code


def report(error: Exception, ranks: Ranks, code: int) -> int:
    """Say what is wrong; a user's fault shows on every rank alike, so the others give the first one time to say it."""
    stop_watching_signals()
    time.sleep(0 if ranks.is_first else 3)
    print(f"{'' if ranks.is_first else f'[rank {ranks.rank}] '}error: {error}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
