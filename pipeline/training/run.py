"""One rank's run before its first step: data, model and engine, each refused early where it cannot be right."""

import contextlib
import importlib.util
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.data.composing import Limits
from pipeline.data.sampling import Schedule, check_world_size, make_schedule, plan_step
from pipeline.data.store import TokenStore, open_store, require_match, verify_shards
from pipeline.data.tokenizing import PromptTokenizer, load_tokenizer
from pipeline.evaluation.tasks import LocalTask, load_task
from pipeline.files import file_sha256, lease_patience, locked
from pipeline.model.base import fingerprint_base
from pipeline.model.encoder import MARKERS_FILE, Encoder, choose_trained, load_encoder, require_rows
from pipeline.model.loss import require_dims
from pipeline.model.reranker import Reranker, read_reranker_shape
from pipeline.model.shapes import KNOWN, ModelShape, read_shape
from pipeline.prompts import get_template
from pipeline.runtime.checkpoint import find_checkpoint, require_same_run
from pipeline.runtime.engine import build_engine, gathered, sharded_loading
from pipeline.runtime.guards import code_versions, digest_plan, require_alike
from pipeline.runtime.ranks import Ranks, by_first, together
from pipeline.runtime.runlog import require_tracker
from pipeline.runtime.sharding_json import read_deepspeed_json, require_exact
from pipeline.runtime.step import StepInputs, StepResult, encode_chunk, no_sequences, prepare_step, run_step
from pipeline.runtime.watch import Watch, mark
from pipeline.settings import EvaluationSettings, ModelSettings, Settings, flatten

log = logging.getLogger("train")


@dataclass(frozen=True)
class RunInputs:
    """What a run reads, found fit before the model is loaded."""

    settings: Settings
    out: Path
    ranks: Ranks
    watch: Watch
    store: TokenStore
    tokenizer: PromptTokenizer  # the store's
    fingerprints: dict[str, str]  # setting that names something the run reads -> fingerprint of that
    checkpoint: Path | None  # to go on from
    schedule: Schedule
    total_steps: int


@dataclass(frozen=True)
class Run(RunInputs):
    """What stays as it is from the first step to the last, whatever is trained."""

    engine: Any
    shape: ModelShape | None  # None: its arithmetic cannot be counted
    prepare: Callable[[int], StepInputs]  # what this rank needs for a step
    run_step: Callable[[StepInputs], StepResult]  # both passes of it
    forward_nothing: Callable[[], Tensor]  # a forward pass over a chunk that holds nothing of a step


@dataclass(frozen=True)
class EmbedderRun(Run):
    """The run of an embedder."""

    tasks: tuple[LocalTask, ...]  # to evaluate on
    encoder: Encoder


def set_up(settings: Settings, ranks: Ranks, watch: Watch, held: contextlib.ExitStack) -> EmbedderRun:
    """Data, model and engine of one rank; ValueErrors for what a user can mend. `held` keeps the run folder's lock."""
    require_alike_start(settings, ranks)
    tasks = together(lambda: load_tasks(settings.evaluation), ranks)
    inputs = read_inputs(settings, ranks, watch, held, {})
    tokenizer = inputs.tokenizer

    # Model: the frozen base, what trains (the same on every rank), and the engine around them.
    mark(watch, "the loading of the model")
    markers = (tokenizer.tokens.marker_ids, tokenizer.tokens.marker_subtokens)
    with sharded_loading(settings.run.deepspeed, settings.optim, settings.model.dtype):
        encoder = load_encoder(settings.model, *markers, ranks.device.type, gathered)
    require_rows(encoder, tokenizer.largest_id)
    require_dims(settings.loss, encoder.width)
    engine = start_engine(encoder, settings, ranks)
    limits = Limits.from_settings(settings.preprocess)

    def prepare(step: int) -> StepInputs:
        plan = plan_step(inputs.store, inputs.schedule, step)
        return prepare_step(inputs.store, limits, plan, ranks, settings.run.chunk_tokens, settings.loss.mask_shown)

    return EmbedderRun(
        **vars(inputs),
        engine=engine,
        shape=countable_shape(settings.model),
        prepare=prepare,
        run_step=lambda step_inputs: run_step(engine, step_inputs, settings, ranks, watch),
        forward_nothing=lambda: encode_chunk(engine, no_sequences(), ranks.device),
        tasks=tasks,
        encoder=encoder,
    )


def require_alike_start(settings: Settings, ranks: Ranks) -> None:
    """What is wrong should not be found after the model is loaded, nor by one rank alone."""
    out = Path(settings.run.output_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"run.output_dir={out} is a file; name a folder")
    require_alike(code_versions() | {f"setting {k}": repr(v) for k, v in flatten(settings).items()}, ranks)
    sharding = together(lambda: json.dumps(read_deepspeed_json(settings.run.deepspeed), sort_keys=True), ranks)
    require_alike({"the DeepSpeed JSON": sharding}, ranks)
    require_exact(settings.run.deepspeed, settings.run.keep_graphs)
    together(lambda: require_tracker(settings.run.tracker), ranks)
    together(lambda: require_base(settings.model.name), ranks)


def read_inputs(
    settings: Settings, ranks: Ranks, watch: Watch, held: contextlib.ExitStack, own: dict[str, str]
) -> RunInputs:
    """Store, plans and checkpoint; refuses a store that this recipe did not make, or that is damaged.

    Args:
        own: what else a checkpoint must have been trained on: name -> fingerprint.
    """
    out = Path(settings.run.output_dir)
    mark(watch, "the check of the token store")
    store = together(lambda: open_store(settings.data.store, verify=False), ranks)
    # Each rank reads its share of the shards.
    together(lambda: verify_shards(settings.data.store, ranks.rank, ranks.world_size), ranks)
    template = get_template(settings.preprocess.template)
    tokenizer = together(lambda: load_tokenizer(settings.tokenizer_name, template), ranks)
    fingerprints = own | {"data.store": file_sha256(Path(settings.data.store) / "manifest.json")}
    fingerprints["model.name"] = together(lambda: fingerprint_base(settings.model.name), ranks)
    require_alike({"token store": fingerprints["data.store"], "tokenizer": tokenizer.fingerprint}, ranks)
    require_alike({"base model": fingerprints["model.name"]}, ranks)
    require_match(store, settings, tokenizer.fingerprint)
    schedule = make_schedule(store, settings)
    check_world_size(schedule, ranks.world_size)
    require_alike({"first plan": digest_plan(plan_step(store, schedule, 0))}, ranks)
    total_steps = settings.optim.max_steps or math.ceil(settings.optim.epochs * schedule.steps_per_epoch)
    log.info("store %s: %d datasets, %d steps", settings.data.store, len(store.datasets), total_steps)

    # One writer a run folder, and the checkpoint to go on from; the lock goes with this process, however it ends.
    mark(watch, "the search for a checkpoint")
    busy = f"another run writes to {out}; wait for it, or name another run.output_dir"
    patience = min(lease_patience(), settings.run.max_stall_seconds / 2)
    by_first(lambda: held.enter_context(locked(out / "lock", busy, patience)), ranks)
    checkpoint = by_first(lambda: find_checkpoint(out / "checkpoints"), ranks)
    if checkpoint is not None:
        together(lambda: require_same_run(checkpoint, settings, fingerprints), ranks)

    warn_of_odd_sizes(settings, schedule, total_steps)
    return RunInputs(settings, out, ranks, watch, store, tokenizer, fingerprints, checkpoint, schedule, total_steps)


def start_engine(model: Encoder | Reranker, settings: Settings, ranks: Ranks) -> Any:
    """The engine around a loaded model, once what trains is chosen: the same on every rank."""
    torch.manual_seed(settings.run.seed)
    together(lambda: choose_trained(model, settings.model), ranks)
    model.train()
    engine = build_engine(model, settings.optim, settings.model.dtype, settings.run.deepspeed, ranks)
    log.info("%s, ZeRO-%d, %d ranks", describe(model), engine.zero_optimization_stage(), ranks.world_size)
    return engine


def countable_shape(model: ModelSettings) -> ModelShape | None:
    """Shape of a decoder of LLaMA's kind; the arithmetic of others is not counted, and the log says so."""
    try:
        shape = read_reranker_shape(model) if model.kind == "reranker" else read_shape(model, num_markers=0)
    except ValueError as error:
        log.info("no FLOP in the metrics: %s", error)
        return None
    if shape.family not in KNOWN:
        log.info("no FLOP in the metrics: layers of %s are not known", shape.family)
        return None
    return shape


def require_base(name: str) -> None:
    """ValueError for a run's own model/ folder: what stands beside its weights (adapter, marker rows) would be lost."""
    if any((Path(name) / file).is_file() for file in ("adapter_config.json", MARKERS_FILE)):
        raise ValueError(
            f"model.name={name} is the model/ folder of a run, not a base model; name the merged/ folder that "
            f"pipeline/export_model.py writes, or, to go on from its adapter, model.adapter={name} and its base"
        )


def warn_of_odd_sizes(settings: Settings, schedule: Schedule, total_steps: int) -> None:
    """Settings that are allowed and do less than they say."""
    if settings.optim.warmup_steps >= total_steps:
        log.warning(
            "optim.warmup_steps=%d, but the run has %d steps: optim.lr is never reached",
            settings.optim.warmup_steps,
            total_steps,
        )
    if late := [step for step in settings.run.profile_steps if step >= total_steps]:
        log.warning("run.profile_steps names %s, but the run has %d steps, numbered from 0", late, total_steps)
    for dataset in schedule.datasets:
        if dataset.num_queries < dataset.layout.batch_size:
            asked, rows = dataset.layout.batch_size, dataset.num_queries
            log.warning("dataset %s has %d rows, less than the batch of %d queries", dataset.name, rows, asked)


def load_tasks(evaluation: EvaluationSettings) -> tuple[LocalTask, ...]:
    """The tasks to evaluate on; ValueError where one is not whole, or what scores is not installed."""
    if evaluation.every and importlib.util.find_spec("mteb") is None:
        raise ValueError("evaluation.tasks needs mteb, which is not installed; pip install bge-icl-train[eval]")
    tasks = tuple(load_task(folder) for folder in evaluation.tasks)
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"evaluation.tasks: two tasks have one name in task.json: {', '.join(sorted(names))}")
    for task in tasks:
        if evaluation.num_examples > len(task.examples) > 0:
            raise ValueError(
                f"evaluation.num_examples={evaluation.num_examples}, but task {task.name} has {len(task.examples)} in "
                "examples.jsonl; lower it or add some"
            )
        if not task.examples:
            log.info("task %s has no examples.jsonl: it is scored zero-shot only", task.name)
    return tasks


def describe(encoder: torch.nn.Module) -> str:
    """Parameter counts as one phrase."""

    def count(p: torch.nn.Parameter) -> int:
        return getattr(p, "ds_numel", p.numel())

    trained = sum(count(p) for p in encoder.parameters() if p.requires_grad)
    # Buffers too: the frozen embedding table is one.
    total = sum(count(p) for p in encoder.parameters()) + sum(b.numel() for b in encoder.buffers())
    return f"{total / 1e6:.1f} M parameters, {trained / 1e6:.2f} M of them trained"
