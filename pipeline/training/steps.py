"""The loop over steps: resume, step, line, evaluation, checkpoint."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.files import write_text
from pipeline.model.flop import StepFlop, Work, executed_flop, model_flop
from pipeline.runtime.attempt import write_end, write_ready
from pipeline.runtime.checkpoint import TrainState, load_checkpoint, save_checkpoint
from pipeline.runtime.engine import discard_gradients, read_state, take_step, write_state
from pipeline.runtime.guards import is_spike, too_late
from pipeline.runtime.ranks import by_first, together
from pipeline.runtime.runlog import append_metrics, open_tracker, start_metrics, step_line, step_metrics
from pipeline.runtime.step import StepInputs, StepResult, make_optimizer_state, moment
from pipeline.runtime.watch import STOPPED, StopRequested, mark
from pipeline.settings import OptimSettings, dump_settings
from pipeline.training.evaluating import evaluate, is_due, must_make_up
from pipeline.training.run import EmbedderRun, Run

log = logging.getLogger("train")

MAX_BAD_STEPS = 3
NEVER_MOVED = "no step has moved the weights yet: look for NaN in model.name or model.adapter, and at the rows"
REMEDY = "lower optim.lr or lengthen optim.warmup_steps, and look at the rows with pipeline/plan_run.py --step"


def resume(run: Run) -> TrainState:
    """Where the run stands: at its newest complete checkpoint, if it has one."""
    mark(run.watch, "the loading of the checkpoint")
    out, ranks, checkpoint = run.out, run.ranks, run.checkpoint
    state = TrainState(seed=run.settings.run.seed)
    if checkpoint is not None:
        state, trainable = together(lambda: load_checkpoint(checkpoint), ranks)
        make_optimizer_state(run.engine, run.forward_nothing, ranks)
        write_state(run.engine, trainable, state.updates, ranks)
        log.info("resumed from %s: %d steps are done", checkpoint, state.step)

    def begin() -> None:
        write_text(out / "settings.yaml", dump_settings(run.settings))
        start_metrics(out / "metrics.jsonl", state.step)

    by_first(begin, ranks)
    write_ready(ranks, state.step)
    return state


def train_steps(run: Run, state: TrainState, loader: Executor) -> TrainState:
    """All steps from `state` to the last; raises what `train` raises."""
    settings, ranks, out = run.settings, run.ranks, run.out
    track = open_tracker(settings.run.tracker if ranks.is_first else "none", out, dataclasses.asdict(settings))
    saved_step, bad_in_a_row = state.step, 0
    save_seconds = evaluate_seconds = 0.0
    recent: list[float] = []
    losses: dict[int, list[float]] = {}  # the last ones of each dataset

    # An evaluation that a kill or a stop cut off is made up.
    if must_make_up(run, state.step):
        evaluate_seconds = stoppable_evaluation(run, state, saved_step)
    if state.step < run.total_steps:
        coming = loader.submit(run.prepare, state.step)
    while state.step < run.total_steps:
        started = time.perf_counter()
        coming_up = save_seconds + (evaluate_seconds if is_due(run, state.step + 1) else 0)
        if ranks.is_first and (hurry := too_late(recent, coming_up)):
            run.watch.asked = hurry
        inputs = coming.result()
        plan, seconds = inputs.plan, {"data": time.perf_counter() - started}
        if state.step + 1 < run.total_steps:
            coming = loader.submit(run.prepare, state.step + 1)
        lr = learning_rate(settings.optim, state.step, run.total_steps)
        profiled = state.step in settings.run.profile_steps
        try:
            with start_profile() if profiled and ranks.is_first else contextlib.nullcontext() as records:
                result = run.run_step(inputs)
        except StopRequested as stop:
            # Weights do not change inside a step: this one is done again.
            raise stopped(run, state, saved_step, stop) from None
        dataset = run.store.datasets[plan.dataset].name
        where = f"step {state.step} (dataset {dataset}, rows {plan.row_B[:8].tolist()}...)"
        if result.fault or not math.isfinite(result.loss):
            bad_in_a_row, norm = bad_in_a_row + 1, math.nan
            discard_gradients(run.engine)
            fault = f"loss is {result.loss} at {where}, not finite: {result.fault or 'the loss alone'}"
            if bad_in_a_row == MAX_BAD_STEPS:
                remedy = REMEDY if state.updates else NEVER_MOVED
                raise FloatingPointError(f"{fault}; {bad_in_a_row} steps in a row were like that; {remedy}")
            if ranks.is_first:
                log.warning("%s; no rank takes this step", fault)
        else:
            updating = moment(ranks.device)
            bad_in_a_row, norm = 0, take_step(run.engine, lr)
            seconds["update"] = moment(ranks.device) - updating
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
            # The profiler takes time of its own: a step under it is no measure of the others.
            flop = None if profiled else count_flop(run, inputs, result)
            clip_norm = settings.optim.clip_norm
            metrics = step_metrics(
                plan, dataset, inputs, result, norm, lr, seconds, flop, clip_norm, run.total_steps, ranks
            )
            # The first steps are slow (allocation, compilation): the estimate forgets them.
            recent = recent if profiled and recent else [*recent[-19:], seconds["all"]]
            log.info(step_line(metrics, float(np.median(recent)) * (run.total_steps - state.step)))
            append_metrics(out / "metrics.jsonl", metrics)
            track(dataclasses.asdict(metrics))

        if profiled:
            mark(run.watch, "writing the profile")
            by_first(functools.partial(write_profile, records, out / "profile", plan.step), ranks)
        if state.step == run.total_steps or state.step % settings.run.save_every == 0:
            save_seconds, saved_step = save(run, state), state.step
        if is_due(run, state.step):
            evaluate_seconds = stoppable_evaluation(run, state, saved_step)
    if not state.updates:
        raise FloatingPointError(
            f"none of {state.step} steps moved the weights: there is no model to save; {NEVER_MOVED}"
        )
    return state


def stopped(run: Run, state: TrainState, saved_step: int, stop: StopRequested) -> StopRequested:
    """Save what is done since the last checkpoint; the reason with how far the run came."""
    if saved_step < state.step:
        save(run, state)
    done = state.step if state.updates else 0
    write_end(run.ranks, STOPPED, done, str(stop))
    return StopRequested(f"{stop}; {done} of {run.total_steps} steps are done and saved")


def stoppable_evaluation(run: Run, state: TrainState, saved_step: int) -> float:
    """`evaluate`, given up where a stop is asked for; the run that goes on makes it up."""
    assert isinstance(run, EmbedderRun), "a reranker's recipe names no tasks"
    try:
        return evaluate(run, state)
    except StopRequested as stop:
        raise stopped(run, state, saved_step, stop) from None


def start_profile() -> profile:
    """torch's profiler, for both passes of a step."""
    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])])


def write_profile(records: Any, folder: Path, step: int) -> None:
    """A trace (for https://ui.perfetto.dev) and a table of operators."""
    folder.mkdir(parents=True, exist_ok=True)
    records.export_chrome_trace(str(folder / f"step-{step:06d}.json.gz"))
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    write_text(folder / f"step-{step:06d}.txt", records.key_averages().table(sort_by=order, row_limit=40))
    log.info("profile of step %d in %s", step, folder)


def count_flop(run: Run, inputs: StepInputs, result: StepResult) -> StepFlop | None:
    """Arithmetic of the step over all ranks; None for models whose shape is not known."""
    if run.shape is None:
        return None
    model, whole = run.settings.model, Work(inputs.num_tokens, inputs.num_squares, inputs.plan.num_sequences)
    work = inputs.layer_work or whole
    forwards, causal = result.num_passes / inputs.num_chunks, model.attention == "causal"
    executed = executed_flop(run.shape, work, causal, forwards, model.activation_checkpointing)
    return StepFlop(executed, model_flop(run.shape, work))


def save(run: Run, state: TrainState) -> float:
    """Write a checkpoint; returns the seconds. All ranks wait for it: a full disk then ends the run on all of them."""
    if not state.updates:
        log.warning("nothing is saved after %d steps: none of them moved the weights yet", state.step)
        return 0.0
    started = time.perf_counter()
    mark(run.watch, f"saving after {state.step} steps")
    trainable, folder, keep_last = read_state(run.engine), run.out / "checkpoints", run.settings.run.keep_last
    work = functools.partial(save_checkpoint, folder, state, trainable, run.settings, run.fingerprints, keep_last)
    log.info("saved %s", by_first(work, run.ranks))
    return time.perf_counter() - started


def finish(run: Run, state: TrainState) -> None:
    """Say that the run is done, to its job and to its reader."""
    write_end(run.ranks, 0, state.step, "done")
    if run.ranks.is_first:
        tokens, without = f"{state.tokens_seen:,}", state.step - state.updates
        log.info("done: %d steps (%d without an update), %s tokens", state.step, without, tokens)
        log.info("model in %s", run.out / "model")


def learning_rate(optim: OptimSettings, step: int, total_steps: int) -> float:
    """Linear warm-up to optim.lr, then linear or cosine decay that would reach 0 one step after the last."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (1 - progress)
