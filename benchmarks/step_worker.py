"""What prove.py launches on every rank: whole training steps on a random model, measured. Prints nothing; writes JSON.

deepspeed --num_accelerators W benchmarks/step_worker.py RECIPE OUT MODE [key.sub=value ...]
    sets       one step of every dataset and two more: loss, tokens, padding, seconds, share of passages saved
    distinct   per dataset the same step with and without distinct passages: CPU seconds, loss
    cached     peak memory of one step above the state after start-up, and its CPU seconds; gradient cache on
    uncached   the same batch with the graphs of all chunks kept alive
    growth     the CPU seconds of steps of several batch sizes, in parts, in turn and again
"""

import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from metering import cpu_seconds, memory_mib, reset_peak

from pipeline.data.composing import Limits, plan_lengths
from pipeline.data.sampling import make_schedule, plan_step, share_saved
from pipeline.data.store import TokenStore, open_store
from pipeline.datatypes import BatchPlan
from pipeline.model.encoder import add_lora, load_encoder
from pipeline.runtime.engine import build_engine, start_distributed, stop_distributed, take_step
from pipeline.runtime.ranks import Ranks, gather_values, read_ranks, share_cores
from pipeline.runtime.step import StepInputs, StepResult, prepare_step, run_step
from pipeline.runtime.watch import leave
from pipeline.settings import Settings, load_settings

BATCHES = (32, 64, 128, 256, 512)
ROUNDS = 7


def first_plans(store: TokenStore, schedule: Any) -> list[BatchPlan]:
    """The first step of every dataset, in the store's order, then two more of the epoch's."""
    plans: dict[int, BatchPlan] = {}
    step = 0
    while len(plans) < len(store.datasets):
        plan = plan_step(store, schedule, step)
        plans.setdefault(plan.dataset, plan)
        step += 1
    return [plans[d] for d in sorted(plans)] + [plan_step(store, schedule, step + i) for i in range(2)]


def step_record(store: TokenStore, plan: BatchPlan, inputs: StepInputs, limits: Limits, ranks: Ranks) -> dict[str, Any]:
    """What is known of a step before it runs; tokens that the encoder sees are counted in its actual inputs."""
    seen = sum(gather_values(float(sum(len(chunk.input_ids_T) for chunk in inputs.chunks)), ranks))
    return {
        "dataset": store.datasets[plan.dataset].name,
        "queries": plan.num_queries,
        "candidates": len(plan.candidate_C),
        "candidates_repeated": plan.num_candidates_repeated,
        "passages": plan.num_passages,
        "saved": share_saved(plan),
        "examples_per_query": len(plan.example_row_E) / plan.num_queries,
        "chunks": inputs.num_chunks,
        "real_tokens": int(plan_lengths(store, limits, plan).sum()),
        "encoder_tokens": int(seen),
    }


def run_uncached(encoder: torch.nn.Module, inputs: StepInputs, settings: Settings, ranks: Ranks) -> StepResult:
    """The obvious step: every chunk's graph stays alive until the loss is known."""
    import torch.distributed as dist

    from pipeline.model.loss import contrastive_loss
    from pipeline.runtime.ranks import gather_embeddings
    from pipeline.runtime.step import encode_chunk

    with_graph = [encode_chunk(encoder, chunk, ranks.device) for chunk in inputs.chunks]
    local_SD = torch.cat(with_graph)
    all_SD = gather_embeddings(local_SD.detach(), inputs.sequences_of_rank, ranks).requires_grad_()
    query_BD, passage_PD = all_SD[inputs.rows], all_SD[inputs.plan.num_queries :]
    share = contrastive_loss(query_BD, passage_PD, inputs.targets, settings.loss)
    share.backward()
    assert all_SD.grad is not None
    dist.all_reduce(all_SD.grad)
    mine = torch.from_numpy(inputs.sequences_of_rank[ranks.rank])
    local_SD.backward(all_SD.grad[mine])
    return StepResult(loss=float(share), num_passes=1, num_filtered=0, fault="", seconds={})


def grow(
    engine: Any, encoder: torch.nn.Module, store: TokenStore, limits: Limits, settings: Settings, ranks: Ranks
) -> list[dict[str, Any]]:
    """CPU seconds of steps of BATCHES, each in parts: from one forward of the encoder to the next.

    The machine's speed wanders by more than what is looked for, in spells shorter than a step of many queries: so every
    part is read ROUNDS times, all batches in turn. A batch of few queries is several different steps of the first
    dataset, so that every batch sees texts of all lengths.
    """
    records: dict[int, dict[str, Any]] = {}
    steps: dict[int, list[StepInputs]] = {}
    for queries in BATCHES:
        batch = dataclasses.replace(settings.batch, queries=queries, symmetric_queries=queries)
        schedule = make_schedule(store, dataclasses.replace(settings, batch=batch))
        every = (plan_step(store, schedule, number) for number in itertools.count())
        plans = list(itertools.islice((plan for plan in every if plan.dataset == 0), max(1, 256 // queries)))
        chunk_tokens = settings.run.chunk_tokens
        steps[queries] = [
            prepare_step(store, limits, plan, ranks, chunk_tokens, settings.loss.mask_shown) for plan in plans
        ]
        known = [
            step_record(store, plan, inputs, limits, ranks) for plan, inputs in zip(plans, steps[queries], strict=True)
        ]
        records[queries] = known[0] | {
            "steps": len(plans),
            "real_tokens": sum(record["real_tokens"] for record in known),
            "chunks": sum(record["chunks"] for record in known),
            "part_seconds": [],
        }
    moments: list[float] = []
    encoder.register_forward_pre_hook(lambda *_: moments.append(cpu_seconds()))
    run_step(engine, steps[BATCHES[0]][0], settings, ranks)  # pays for what is set up once
    take_step(engine, 0.0)
    for number in range(ROUNDS):
        for queries in BATCHES[::-1] if number % 2 else BATCHES:
            moments[:] = [cpu_seconds()]
            for inputs in steps[queries]:
                run_step(engine, inputs, settings, ranks)
                take_step(engine, 0.0)
            moments.append(cpu_seconds())
            parts = [after - before for before, after in itertools.pairwise(moments)]
            records[queries]["part_seconds"].append(parts)
    for record in records.values():
        everywhere: list[Any] = [None] * ranks.world_size
        torch.distributed.all_gather_object(everywhere, record["part_seconds"])
        record["part_seconds"] = everywhere  # ranks x rounds x parts; ranks may differ by a chunk, rounds do not
    return list(records.values())


def main(recipe: str, out: str, mode: str, overrides: list[str]) -> None:
    settings = load_settings(recipe, overrides)
    ranks = read_ranks()
    share_cores(ranks)
    start_distributed(ranks)
    store = open_store(settings.data.store)
    limits = Limits.from_settings(settings.preprocess)
    schedule = make_schedule(store, settings)
    tokens = store.manifest.tokens
    encoder = load_encoder(settings.model, tokens.marker_ids, tokens.marker_subtokens)
    torch.manual_seed(settings.run.seed)
    add_lora(encoder, settings.model.lora)
    encoder.train()
    engine = None
    if mode != "uncached":
        engine = build_engine(encoder, settings.optim, settings.model.dtype, settings.run.deepspeed, ranks)
    records = []
    if mode == "sets":
        for plan in first_plans(store, schedule):
            inputs = prepare_step(store, limits, plan, ranks, settings.run.chunk_tokens, settings.loss.mask_shown)
            record, started = step_record(store, plan, inputs, limits, ranks), time.perf_counter()
            result = run_step(engine, inputs, settings, ranks)
            norm = take_step(engine, settings.optim.lr)
            record |= {"loss": result.loss, "grad_norm": norm, "passes": result.num_passes}
            record |= {"seconds": time.perf_counter() - started, "finite": math.isfinite(result.loss + norm)}
            records.append(record)
    elif mode == "distinct":
        repeating = dataclasses.replace(schedule, distinct_passages=False)
        for plan in first_plans(store, schedule)[:-2]:
            twins = {"distinct": plan, "repeated": plan_step(store, repeating, plan.step)}
            record = {"dataset": store.datasets[plan.dataset].name, "saved": share_saved(plan)}
            # The first of two rounds warms up the allocator.
            for arm, twin in [*twins.items(), *twins.items()]:
                inputs = prepare_step(store, limits, twin, ranks, settings.run.chunk_tokens, settings.loss.mask_shown)
                started = cpu_seconds()
                result = run_step(engine, inputs, settings, ranks)
                record[f"cpu_seconds_{arm}"] = sum(gather_values(cpu_seconds() - started, ranks))
                record[f"loss_{arm}"] = result.loss
                take_step(engine, 0.0)
            records.append(record)
    elif mode == "growth":
        records = grow(engine, encoder, store, limits, settings, ranks)
    else:
        plan = first_plans(store, schedule)[0]
        inputs = prepare_step(store, limits, plan, ranks, settings.run.chunk_tokens, settings.loss.mask_shown)
        record = step_record(store, plan, inputs, limits, ranks)
        before, started = reset_peak(), cpu_seconds()
        if engine is None:
            result = run_uncached(encoder, inputs, settings, ranks)
        else:
            result = run_step(engine, inputs, settings, ranks)
        peak = max(gather_values(memory_mib("VmHWM") - before, ranks))
        record["cpu_seconds"] = sum(gather_values(cpu_seconds() - started, ranks))
        embeddings = plan.num_sequences * encoder.width * 4 / 2**20
        record |= {"peak_mib": peak, "embeddings_mib": embeddings, "loss": result.loss, "passes": result.num_passes}
        records.append(record)
    if ranks.is_first:
        Path(out).write_text(json.dumps(records, indent=2))
    stop_distributed()


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(arguments[0], arguments[1], arguments[2], arguments[3:])
    leave(0)
