"""Planned against measured memory of real training steps: `python benchmarks/plan_check.py`.

Trains small random models for two steps under several shapes, chunk budgets and ZeRO stages and prints, for each, what
`bge-icl plan --estimate` would say and what was there. Rows are written to runs/prove/plan_check.json; it exits 1
where a peak is off by more than 15 %.

On CPU, fp32: `rest` are the bytes of all tensors after a step, `peak` adds the largest resident set within the next
step above the one before it; `no_graph` is that of a chunk in pass 1 and `gathered` what ZeRO-3 gathered for a step;
attention is one call a sequence. On GPUs, bf16: torch.cuda's own counters, attention in one call (torch's varlen
kernel or flash-attn). THE GPU SIDE HAS NOT BEEN RUN YET.
"""

import argparse
import gc
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from proving import PRECISE_MEMORY, REPOSITORY, WORK, Row, call

LIMITS = {
    "max_query_tokens": 64,
    "max_passage_tokens": 64,
    "max_example_query_tokens": 48,
    "max_example_passage_tokens": 48,
    "max_prompt_tokens": 256,
}
WITHIN = 0.15
# layers, width, width of the MLP, heads, key heads
SHAPES = {"small": (2, 256, 768, 4, 2), "wide": (3, 512, 1792, 8, 2), "deep": (8, 256, 768, 4, 4)}
# shape, chunk_tokens, activation checkpointing, ZeRO stage, ranks
CASES = (
    ("small", 2048, False, 3, 2),
    ("small", 8192, False, 3, 2),
    ("wide", 4096, False, 3, 2),
    ("wide", 4096, True, 3, 2),
    ("wide", 4096, False, 1, 2),
    ("wide", 4096, True, 1, 2),
    ("wide", 4096, False, 2, 2),
    ("wide", 4096, False, 0, 1),
    ("deep", 4096, False, 3, 2),
    ("deep", 4096, True, 1, 1),
)


def make_model(name: str) -> Path:
    """A random Llama of one of SHAPES with the tokenizer of prove.py's model."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    layers, width, mlp_width, heads, kv_heads = SHAPES[name]
    folder = WORK / f"plan_{name}"
    tokenizer = AutoTokenizer.from_pretrained(WORK / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=len(tokenizer),
    )
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_sharding(stage: int) -> Path:
    """The repository's JSON of a stage in proportion to small models: with the shipped bucket nothing else would be
    seen, with the shipped threshold and limit of live weights all would stay whole.
    """
    config = json.loads((REPOSITORY / "ds_configs" / f"zero{stage}.json").read_text())
    if stage > 0:
        config["zero_optimization"]["reduce_bucket_size"] = 2_000_000
    if stage == 3:
        sizes = {
            "param_persistence_threshold": 20_000,
            "prefetch_bucket_size": 200_000,
            "max_live_parameters": 2_000_000,
        }
        config["zero_optimization"] |= {f"stage3_{name}": size for name, size in sizes.items()}
    path = WORK / f"plan_zero{stage}.json"
    path.write_text(json.dumps(config))
    return path


# What each rank runs.


def tensor_bytes() -> int:
    """Bytes of all distinct storages that Python can see."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def rest_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return tensor_bytes()


def peak_above_rest(device: torch.device, work: Any) -> float:
    """Bytes that `work` needs at its peak above what lives before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from step_worker import memory_mib

    gc.collect()
    resident = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    work()
    return (memory_mib("VmHWM") - resident) * 2**20


def count_gathered() -> list[int]:
    """Lets ZeRO-3's all-gathers be counted from now on: bytes of each one's result, its own rank's part included."""
    from deepspeed import comm

    sizes: list[int] = []
    original = comm.allgather_fn

    def counted(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(output.numel() * output.element_size())
        return original(output, *args, **kwargs)

    comm.allgather_fn = counted
    return sizes


def worker(recipe: str, out: str, overrides: list[str]) -> None:
    """Two steps of the first dataset: the first makes all buffers, the second is measured; plans beside."""
    from pipeline.data.composing import Limits
    from pipeline.data.sampling import make_schedule, plan_step
    from pipeline.data.store import open_store
    from pipeline.model.encoder import add_lora, load_encoder
    from pipeline.runtime.engine import build_engine, start_distributed, stop_distributed, take_step
    from pipeline.runtime.ranks import gather_values, read_ranks, share_cores
    from pipeline.runtime.step import encode_chunk, prepare_step, run_step
    from pipeline.settings import load_settings

    settings = load_settings(recipe, overrides)
    ranks = read_ranks()
    share_cores(ranks)
    start_distributed(ranks)
    store = open_store(settings.data.store)
    tokens = store.manifest.tokens
    encoder = load_encoder(settings.model, tokens.marker_ids, tokens.marker_subtokens, ranks.device.type)
    add_lora(encoder, settings.model.lora)
    encoder.train()
    engine = build_engine(encoder, settings.optim, settings.model.dtype, settings.run.deepspeed, ranks)
    del encoder
    schedule = make_schedule(store, settings)
    limits = Limits.from_settings(settings.preprocess)
    inputs = prepare_step(store, limits, plan_step(store, schedule, 0), ranks, settings.run.chunk_tokens, False)

    def step() -> None:
        run_step(engine, inputs, settings, ranks)
        take_step(engine, 0.0)

    def pass_without_graph() -> None:
        with torch.no_grad():
            encode_chunk(engine, inputs.chunks[0], ranks.device)

    gathered = count_gathered()
    step()
    step()
    del gathered[:]
    rest = rest_bytes(ranks.device)
    measured = {"rest": rest, "peak": rest + peak_above_rest(ranks.device, step)}
    measured["gathered"] = sum(gathered)
    pass_without_graph()
    measured["no_graph"] = peak_above_rest(ranks.device, pass_without_graph)
    most = {name: max(gather_values(float(value), ranks)) for name, value in measured.items()}
    most |= {"tokens": max(gather_values(float(max(len(c.input_ids_T) for c in inputs.chunks)), ranks))}
    most |= {"sequences": max(gather_values(float(max(len(c.sequence_S) for c in inputs.chunks)), ranks))}
    record = most | {"chunks": inputs.num_chunks, "step_sequences": inputs.plan.num_sequences}
    record |= {"queries": inputs.plan.num_queries, "markers": sum(1 for s in tokens.marker_subtokens if s)}
    if ranks.is_first:
        Path(out).write_text(json.dumps(record))
    stop_distributed()


# Planned, and compared.


def planned(recipe: Path, overrides: Sequence[str], record: Row, num_ranks: int, on_gpu: bool) -> dict[str, float]:
    """The same numbers from the formulas, for the chunk that was measured."""
    from pipeline.model.shapes import read_shape
    from pipeline.planning.activations import chunk_memory
    from pipeline.planning.cases import make_case
    from pipeline.planning.estimate import Cluster, Load, memory_of_chunk
    from pipeline.planning.sharding import gathered_numel, read_sharding
    from pipeline.runtime.sharding_json import read_deepspeed_json
    from pipeline.settings import load_settings

    settings = load_settings(recipe, overrides)
    shape = read_shape(settings.model, record["markers"])
    cluster = Cluster(1, num_ranks, 80.0, 1e9, 1e9, 1e12, 0.5)
    load = Load(0.0, 0.0, record["queries"], 0.0, 1, record["step_sequences"], 0)
    case = make_case(settings, shape, read_sharding(read_deepspeed_json(settings.run.deepspeed)), cluster, load)
    if not on_gpu:
        kernels = replace(case.kernels, fused=False, mask_element=case.kernels.element)
        case = replace(case, kernels=kernels, fused_loss=False)
    tokens, sequences = int(record["tokens"]), int(record["sequences"])
    memory = memory_of_chunk(case, tokens, sequences)
    passes = 3 * record["chunks"] - 1  # as plan_cost: a forward for all, another for all but one, a backward for all
    gathered = memory.always.get("gathered weights", 0.0)
    return {
        "rest": sum(memory.always.values()) - gathered,
        "peak": memory.peak,
        "no_graph": chunk_memory(shape, case.kernels, tokens, sequences).no_graph + gathered,
        "gathered": passes * gathered_numel(shape, case.sharding) * case.kernels.element if num_ranks > 1 else 0,
    }


def check(recipe: Path, case: tuple[str, int, bool, int, int], on_gpu: bool) -> Row:
    name, chunk_tokens, checkpointing, stage, num_ranks = case
    out = WORK / "plan_check_case.json"
    overrides = [
        f"model.name={WORK / f'plan_{name}'}",
        f"model.dtype={'bf16' if on_gpu else 'fp32'}",
        f"model.activation_checkpointing={str(checkpointing).lower()}",
        f"run.chunk_tokens={chunk_tokens}",
        f"run.deepspeed={write_sharding(stage)}",
    ]
    from proving import free_port

    launcher = ["deepspeed", "--num_gpus" if on_gpu else "--num_accelerators", str(num_ranks)]
    launcher += ["--master_port", free_port()]
    script = ["benchmarks/plan_check.py", "--worker", str(recipe), str(out), *overrides]
    call([*launcher, *script], {} if on_gpu else PRECISE_MEMORY)
    record = json.loads(out.read_text())
    plan = planned(recipe, overrides, record, num_ranks, on_gpu)
    label = (
        f"{name}, chunk {chunk_tokens}, {'recomputed' if checkpointing else 'kept'}, ZeRO-{stage}, {num_ranks} ranks"
    )
    return {"case": label, "chunks": record["chunks"], "planned": plan, "measured": {k: record[k] for k in plan}}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY / "examples" / "quickstart" / "data")
    parser.add_argument("--only", help="cases whose line contains this")
    arguments = parser.parse_args(argv)
    from proving import make_random_model, write_recipe

    on_gpu = torch.cuda.is_available()
    WORK.mkdir(parents=True, exist_ok=True)
    make_random_model()
    file = sorted(arguments.data.glob("squad*.jsonl*"))[0]
    shutil.rmtree(WORK / "store_plan", ignore_errors=True)
    batch = {"queries": 48, "group_size": 2, "examples": {"max_examples": 2}}
    recipe = write_recipe("plan", arguments.data, [file], LIMITS, batch)
    for name in SHAPES:
        make_model(name)
    rows = []
    print("on GPU, bf16: this side of the script has never been run before" if on_gpu else "on CPU, fp32")
    for case in CASES:
        if arguments.only and arguments.only not in str(case):
            continue
        rows.append(check(recipe, case, on_gpu))
        r = rows[-1]
        print(f"{r['case']} ({r['chunks']} chunks a rank), MiB planned / measured")
        for part, plan in r["planned"].items():
            seen = r["measured"][part]
            if seen:
                print(f"  {part:<9} {plan / 2**20:8.1f} / {seen / 2**20:8.1f}  {plan / seen - 1:+.1%}", flush=True)
    out = REPOSITORY / "runs" / "prove" / "plan_check.json"
    out.write_text(json.dumps(rows, indent=2) + "\n")
    worst = max(abs(r["planned"]["peak"] / r["measured"]["peak"] - 1) for r in rows)
    print(
        f"largest error of a peak: {worst:.1%} (target: at most {WITHIN:.0%}); written to {out.relative_to(REPOSITORY)}"
    )
    return 0 if worst <= WITHIN else 1


if __name__ == "__main__":
    if "--worker" in sys.argv:
        left = [a for a in sys.argv[1:] if a != "--worker" and not a.startswith("--local_rank")]
        worker(left[0], left[1], left[2:])
    else:
        raise SystemExit(main())
