"""Gradients of one step, written to a file: run by test_gradients.py, through the launcher or (reference) plainly.

python gradient_worker.py reference RECIPE OUT           one process, no DeepSpeed, no caching, sequences one by one
deepspeed ... gradient_worker.py engine RECIPE OUT STAGES   every chunk budget under each ZeRO stage
python gradient_worker.py plain_steps RECIPE OUT         weights after three steps of torch's own AdamW
deepspeed ... gradient_worker.py steps RECIPE OUT STAGES    weights after three steps of the engine
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from dense_loss import DenseStep, dense_loss
from safetensors.torch import save_file

from pipeline.data.composing import Limits, sequence_ids
from pipeline.data.sampling import make_schedule, plan_step
from pipeline.data.store import open_store
from pipeline.datatypes import BatchPlan
from pipeline.model.encoder import Encoder, choose_trained, load_encoder, trainable_parameters
from pipeline.settings import LossSettings, Settings, load_settings

CHUNK_TOKENS = {"one": 100_000, "few": 800, "many": 190}  # few: shared by the ranks


def build_encoder(settings: Settings, tokens, **options) -> Encoder:
    """The same weights in every process; lora_B is not zero, or lora_A would have no gradient."""
    encoder = load_encoder(settings.model, tokens.marker_ids, tokens.marker_subtokens, **options)
    torch.manual_seed(settings.run.seed)
    choose_trained(encoder, settings.model)
    for name, p in trainable_parameters(encoder).items():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return encoder.train()


def steps_of_interest(store, schedule) -> list[BatchPlan]:
    """The first step of every task type."""
    plans: dict[str, BatchPlan] = {}
    for step in range(schedule.steps_per_epoch):
        plan = plan_step(store, schedule, step)
        plans.setdefault(plan.task_type, plan)
    return list(plans.values())


def all_options(loss: LossSettings) -> LossSettings:
    """Every option of the loss at once, with values that do something in these steps."""
    return replace(
        loss,
        teacher_temperature=2.0,
        filter_margin=0.05,
        mask_shown=True,
        matryoshka_dims=(8, 32),
        matryoshka_weights=(0.5, 2.0),
    )


def reference_loss(
    encoder: Encoder, store, limits, plan: BatchPlan, settings: Settings
) -> tuple[torch.Tensor, int, int]:
    """Every sequence alone, every candidate written out: no packing, no distinct passages, no kernels of ours."""

    def embed(s: int) -> torch.Tensor:
        ids = torch.from_numpy(sequence_ids(store, limits, plan, s))
        cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
        return encoder(ids, torch.arange(len(ids)), cu_seqlens, len(ids))[0]

    embeddings_SD = torch.stack([embed(s) for s in range(plan.num_sequences)])
    query_BD, passage_PD = embeddings_SD[: plan.num_queries], embeddings_SD[plan.num_queries :]
    return dense_loss(query_BD, passage_PD, dense_step(plan), settings.loss)


def dense_step(plan: BatchPlan) -> DenseStep:
    """The plan as lists."""

    def ragged(values: np.ndarray, offsets: np.ndarray) -> list[list]:
        return [part.tolist() for part in np.split(values, offsets[1:-1])]

    scores = ragged(plan.teacher_score_C, plan.group_offsets)
    return DenseStep(
        groups=ragged(plan.candidate_C, plan.group_offsets),
        text_P=plan.passage_text_P.tolist(),
        scores=[None if np.isnan(own).any() else own for own in scores],
        in_batch=plan.in_batch_negatives,
        shown=ragged(plan.example_response_E, plan.example_offsets),
    )


def run_reference(settings: Settings, out: str) -> None:
    """Gradients of every plan, and in a second file (options-NAME) those with every option of the loss."""
    store = open_store(settings.data.store)
    limits = Limits.from_settings(settings.preprocess)
    plans = steps_of_interest(store, make_schedule(store, settings))
    file = Path(out)
    for path, loss_settings in ((file, settings.loss), (options_file(file), all_options(settings.loss))):
        gradients = {}
        for plan in plans:
            encoder = build_encoder(settings, store.manifest.tokens)
            loss, *counts = reference_loss(encoder, store, limits, plan, replace(settings, loss=loss_settings))
            loss.backward()
            gradients[f"{plan.task_type}|loss"] = loss.detach()[None]
            if path != file:
                gradients[f"{plan.task_type}|counts"] = torch.tensor(counts)
            for name, p in trainable_parameters(encoder).items():
                gradients[f"{plan.task_type}|{name}"] = p.grad
        save_file(gradients, path)


def options_file(out: Path) -> Path:
    return out.with_name(f"options-{out.name}")


def start_rank(settings: Settings):
    """(this process's place, store, limits, plans) with the process group up."""
    from pipeline.runtime.engine import start_distributed
    from pipeline.runtime.ranks import read_ranks, share_cores

    ranks = read_ranks()
    share_cores(ranks)
    start_distributed(ranks)
    store = open_store(settings.data.store)
    plans = steps_of_interest(store, make_schedule(store, settings))
    return ranks, store, Limits.from_settings(settings.preprocess), plans


def run_engine(settings: Settings, recipe: str, out: str, stages: str) -> None:
    from deepspeed.utils import safe_get_full_grad

    from pipeline.runtime.engine import build_engine, discard_gradients, gathered, sharded_loading, stop_distributed
    from pipeline.runtime.step import prepare_step, run_step

    ranks, store, limits, plans = start_rank(settings)
    gradients = {}
    # 2keep: stage 2 with several live graphs; 3load: the model came sharded; 3options: every option of the loss;
    # 3offload, 3hpz: those configs, as training loads them
    for stage in stages.split(","):
        run = replace(settings.run, keep_graphs=3 if stage.endswith("keep") else 1)
        loss = all_options(settings.loss) if stage.endswith("options") else settings.loss
        kind = f"_{stage[1:]}" if stage[1:] in ("offload", "hpz") else ""
        config = Path(recipe).parent / f"zero{stage[0]}{kind}.json"
        if stage.endswith("load") or kind:
            with sharded_loading(config, settings.optim, settings.model.dtype):
                encoder = build_encoder(settings, store.manifest.tokens, gathered=gathered)
        else:
            encoder = build_encoder(settings, store.manifest.tokens)
        engine = build_engine(encoder, settings.optim, settings.model.dtype, config, ranks)
        if stage[0] == "3" and ranks.world_size > 1:
            assert all(p.ds_tensor.numel() < p.ds_numel for p in encoder.parameters()), "nothing is partitioned"
        for plan in plans:
            for budget, chunk_tokens in CHUNK_TOKENS.items():
                budget_of_rank = chunk_tokens // ranks.world_size if budget == "few" else chunk_tokens
                inputs = prepare_step(store, limits, plan, ranks, budget_of_rank, loss.mask_shown)
                result = run_step(engine, inputs, replace(settings, loss=loss, run=run), ranks)
                key = f"{stage}|{budget}|{plan.task_type}"
                gradients[f"{key}|loss"] = torch.tensor([result.loss])
                gradients[f"{key}|chunks"] = torch.tensor([inputs.num_chunks])
                if loss != settings.loss:
                    gradients[f"{key}|counts"] = torch.tensor([result.num_filtered, inputs.num_negatives_shown])
                for name, p in trainable_parameters(engine.module).items():
                    gradients[f"{key}|{name}"] = safe_get_full_grad(p).float().clone()
                discard_gradients(engine)
    if ranks.is_first:
        save_file(gradients, out)
    stop_distributed()


LEARNING_RATES = (1e-3, 3e-3, 5e-4)


def run_plain_steps(settings: Settings, out: str) -> None:
    """Three steps of torch's own AdamW and clipping on the reference gradients."""
    store = open_store(settings.data.store)
    limits = Limits.from_settings(settings.preprocess)
    encoder = build_encoder(settings, store.manifest.tokens)
    trained = trainable_parameters(encoder)
    weights = {f"before|{name}": p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=settings.optim.weight_decay)
    plans = steps_of_interest(store, make_schedule(store, settings))
    for lr, plan in zip(LEARNING_RATES, plans, strict=False):
        optimizer.param_groups[0]["lr"] = lr
        reference_loss(encoder, store, limits, plan, settings)[0].backward()
        assert torch.nn.utils.clip_grad_norm_(trained.values(), settings.optim.clip_norm) > settings.optim.clip_norm
        optimizer.step()
        optimizer.zero_grad()
    save_file(weights | {f"after|{name}": p.detach() for name, p in trained.items()}, out)


def run_steps(settings: Settings, recipe: str, out: str, stages: str) -> None:
    from pipeline.runtime import step
    from pipeline.runtime.engine import build_engine, discard_gradients, read_state, stop_distributed, take_step
    from pipeline.runtime.step import encode_chunk, prepare_step, run_step

    ranks, store, limits, plans = start_rank(settings)
    weights = {}
    # 2bad: stage 2, and before each step one whose embeddings are NaN, which is given up
    for stage in stages.split(","):
        encoder = build_encoder(settings, store.manifest.tokens)
        config = Path(recipe).parent / f"zero{stage[0]}{'_offload' if 'offload' in stage else ''}.json"
        engine = build_engine(encoder, settings.optim, settings.model.dtype, config, ranks)
        for lr, plan in zip(LEARNING_RATES, plans, strict=False):
            inputs = prepare_step(store, limits, plan, ranks, CHUNK_TOKENS["few"], settings.loss.mask_shown)
            if stage.endswith("bad"):
                step.encode_chunk = lambda *arguments: encode_chunk(*arguments) * math.nan
                assert run_step(engine, inputs, settings, ranks).fault
                discard_gradients(engine)
                step.encode_chunk = encode_chunk
            run_step(engine, inputs, settings, ranks)
            take_step(engine, lr)
        weights |= {f"{stage}|{name}": parts["weight"] for name, parts in read_state(engine).items()}
    if ranks.is_first:
        save_file(weights, out)
    stop_distributed()


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    mode, recipe, *rest = arguments
    num_plain = 2 if mode in ("engine", "steps") else 1
    plain, overrides = rest[:num_plain], rest[num_plain:]
    settings = load_settings(recipe, overrides)
    if mode == "reference":
        run_reference(settings, *plain)
    elif mode == "plain_steps":
        run_plain_steps(settings, *plain)
    elif mode == "steps":
        run_steps(settings, recipe, *plain)
    else:
        run_engine(settings, recipe, *plain)
