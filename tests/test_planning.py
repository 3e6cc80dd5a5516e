"""The estimate: against tensors followed one by one, against numbers worked out by hand, and its advice."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from fake_store import make_settings, make_store, plain_rows
from live_tensors import FusedAttention, measure_passes
from test_encoder import FAMILIES, make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from pipeline import plan_run
from pipeline.data.composing import plan_lengths
from pipeline.data.packing import deal
from pipeline.data.sampling import make_schedule, plan_step
from pipeline.model import attention
from pipeline.model.encoder import add_lora, choose_trained, load_encoder
from pipeline.model.flop import Work, executed_flop, forward_flop, model_flop, peak_flops
from pipeline.model.shapes import ModelShape, read_shape
from pipeline.planning.activations import Kernels, chunk_memory
from pipeline.planning.advice import alternatives, recommend, warnings
from pipeline.planning.cases import make_case, sampled_workload, stated_workload
from pipeline.planning.estimate import (
    GRAIN,
    USABLE,
    Case,
    Cluster,
    Load,
    fits,
    largest_chunk,
    memory_of_chunk,
    plan_cost,
    plan_memory,
)
from pipeline.planning.sharding import (
    gathered_numel,
    gradient_bytes,
    optimizer_parts,
    read_sharding,
    reduction_bytes,
    weight_parts,
)
from pipeline.settings import LoraSettings, ModelSettings, Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "vocab_size": 200}
# What the published config.json of Mistral-7B-v0.1 says.
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "vocab_size": 32000,
}


# Against tensors followed one by one.


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    model = ModelSettings(
        name=make_model(FAMILIES[family], tmp_path), dtype="fp32", num_layers=1, lora=LoraSettings(rank=3)
    )
    encoder = load_encoder(model, (90, 91), ((1, 2), (3,)))
    add_lora(encoder, model.lora)
    shape = read_shape(model, num_markers=2)
    parameters = list(encoder.parameters())
    assert sorted(shape.frozen) == sorted(p.numel() for p in parameters if not p.requires_grad)
    assert sorted(shape.trained) == sorted(p.numel() for p in parameters if p.requires_grad)
    assert shape.table == max(b.numel() for b in encoder.buffers())


PASSES = {
    "llama": (LlamaConfig, {}, {}),
    "wide mlp": (LlamaConfig, {"intermediate_size": 768, "num_hidden_layers": 4}, {}),
    "all heads": (LlamaConfig, {"num_key_value_heads": 4}, {}),
    "wide heads": (LlamaConfig, {"num_key_value_heads": 4, "head_dim": 64}, {}),
    "qwen2": (Qwen2Config, {}, {}),
    "qwen3": (Qwen3Config, {"head_dim": 64}, {}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 64, "query_pre_attn_scalar": 64}, {}),
    "recomputed": (LlamaConfig, {"num_hidden_layers": 4}, {"activation_checkpointing": True}),
    "recomputed, wide mlp": (LlamaConfig, {"intermediate_size": 768}, {"activation_checkpointing": True}),
    "dropout": (LlamaConfig, {}, {"lora": LoraSettings(rank=8, dropout=0.1)}),
    "dropout, ZeRO-3's linear": (LlamaConfig, {}, {"lora": LoraSettings(rank=8, dropout=0.1)}),
    "mean": (LlamaConfig, {}, {"pooling": "mean"}),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fused", [False, True], ids=["one call a sequence", "fused"])
@pytest.mark.parametrize("name", PASSES)
def test_activations_are_what_the_passes_keep(
    name: str, fused: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes, settings = PASSES[name]
    config: dict[str, Any] = {**SHAPE, "intermediate_size": 384, "num_hidden_layers": 3, "num_key_value_heads": 2}
    if fused:
        monkeypatch.setattr(attention, "_sdpa", lambda query, key, value, call: FusedAttention.apply(query, key, value))
    keeps_inputs = "ZeRO-3" in name
    if keeps_inputs:
        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    lora = LoraSettings(rank=8)
    path = make_model(kind(**config | changes), tmp_path)
    model = ModelSettings(**{"name": path, "dtype": dtype, "lora": lora} | settings)
    encoder = load_encoder(model, (190, 191, 192), ((1, 2),) * 3)
    add_lora(encoder, model.lora)
    encoder.to(torch.bfloat16 if dtype == "bf16" else torch.float32).train()  # as the engine does
    tokens, length = 512, 32
    ids_T, positions_T = torch.randint(0, 180, (tokens,)), torch.arange(length).repeat(tokens // length)
    cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    real = measure_passes(encoder, lambda: encoder(ids_T, positions_T, cu_seqlens, length))
    element = 2 if dtype == "bf16" else 4
    dropout, checkpointing = model.lora.dropout > 0, model.activation_checkpointing
    kernels = Kernels(element, fused, dropout, checkpointing, keeps_inputs, mask_element=element)
    planned = chunk_memory(read_shape(model, 3), kernels, tokens, tokens // length)
    assert planned.graph == pytest.approx(real["graph"], rel=0.03)
    assert planned.graph + planned.backward == pytest.approx(real["peak"], rel=0.06)
    assert planned.no_graph == pytest.approx(real["no_graph"], rel=0.07)


# Against numbers worked out by hand.


TINY = ModelShape(
    family="llama",
    layers=2,
    width=8,
    heads=2,
    kv_heads=1,
    head_width=4,
    mlp_width=16,
    vocabulary=10,
    lora_rank=2,
    markers=3,
    capped=False,
    last_rows_only=True,
)
BF16 = Kernels(element=2, fused=True, dropout=False, checkpointing=False)
FROZEN = 2 * (2 * 64 + 2 * 32 + 3 * 128 + 2 * 8) + 8  # per layer q, o; k, v; the MLP; two norms; and the last norm
TRAINED = 2 * 2 * (2 * 16 + 2 * 12 + 3 * 24) + 24  # rank x (in + out) of the seven; three markers


def zero(stage: int, **keys: Any) -> Any:
    return read_sharding({"zero_optimization": {"stage": stage, **keys}})


def test_weights_by_hand() -> None:
    assert (sum(TINY.frozen), sum(TINY.trained), TINY.table) == (FROZEN, TRAINED, 80)
    assert weight_parts(TINY, zero(1), 4, 2) == {
        "embedding table": 160,
        "frozen weights": 2 * FROZEN,
        "adapters": 2 * TRAINED,
    }
    # Above 64 elements: three matrices of the MLP a layer. All may stay gathered, and one is on its way.
    keys = {"stage3_param_persistence_threshold": 64, "stage3_prefetch_bucket_size": 0}
    assert gathered_numel(TINY, zero(3, **keys)) == 6 * 128
    parts = weight_parts(TINY, zero(3, **keys), 4, 2)
    assert parts == {
        "embedding table": 160,
        "frozen weights, sharded": FROZEN / 4 * 2,
        "adapters, sharded": TRAINED / 4 * 2,
        "frozen weights, small ones whole": 2 * (FROZEN - 6 * 128),
        "adapters, small ones whole": 2 * TRAINED,
        "gathered weights": 2 * (6 * 128 + 128),
    }
    near = weight_parts(TINY, zero(3, **keys, stage3_max_reuse_distance=200), 4, 2)
    assert near["gathered weights"] == 2 * (100 + 128 + 128)
    few = keys | {"stage3_prefetch_bucket_size": 10, "stage3_max_live_parameters": 200, "stage3_max_reuse_distance": 0}
    assert weight_parts(TINY, zero(3, **few), 4, 2)["gathered weights"] == 2 * (200 + 128 + 128 + 10)
    assert weight_parts(TINY, zero(3, **keys, zero_hpz_partition_size=2), 4, 2)["frozen weights, sharded"] == (
        FROZEN * (1 / 4 + 1 / 2) * 2
    )
    away = weight_parts(TINY, zero(3, **keys, offload_param={"device": "cpu"}), 4, 2)
    assert away["frozen weights, sharded"] == 0 and away["gathered weights"] == 2 * 7 * 128


def test_optimizer_by_hand() -> None:
    assert optimizer_parts(TINY, zero(0), 4, 2) == (4 * TRAINED, 8 * TRAINED, 0)
    assert optimizer_parts(TINY, zero(0), 4, 4) == (0, 8 * TRAINED, 0)
    assert optimizer_parts(TINY, zero(1), 4, 4) == (TRAINED, 2 * TRAINED, 0)
    assert optimizer_parts(TINY, zero(3, reduce_bucket_size=1000), 4, 2) == (
        TRAINED,
        2 * TRAINED,
        2 * (TRAINED / 4 + 1000),
    )
    assert gradient_bytes(TINY, zero(1), 2) == 6 * TRAINED and gradient_bytes(TINY, zero(1), 4) == 4 * TRAINED
    assert reduction_bytes(TINY, zero(1, reduce_bucket_size=1000), 4, 2) == 4000 + 3 * TRAINED
    assert reduction_bytes(TINY, zero(2, reduce_bucket_size=1000, overlap_comm=True), 4, 2) == 4000 + 3 * TRAINED


def test_graph_by_hand() -> None:
    attention = (32 + 4) + 16 + (2 * 8 + 2 * 4) * 2 + 4 * 2 + 4 * 2 * 2  # norm, its output, q k v out, lse, LoRA
    mlp = (32 + 4) + 16 + 4 * 16 * 2 + 3 * 2 * 2
    once = 100 * (2 * 4 + 3) * 2 + 10 * (36 + 64)  # rotations and markers; last norm and pooling of 10 sequences
    kept = 100 * (2 * attention + mlp) + 10 * mlp + once
    chunk = chunk_memory(TINY, BF16, tokens=100, sequences=10)
    assert chunk.graph == kept
    assert chunk.backward == 100 * 12 * 8  # through the last layer's norm: more than (2 * 8 + 2 * 4) * 2 of attention
    assert chunk.no_graph == 100 * ((4 * 8 + 4 * 16) * 2 + 2 * 4 * 2)
    recomputed = chunk_memory(TINY, replace(BF16, checkpointing=True), tokens=100, sequences=10)
    assert recomputed.graph == 100 * (8 * 2 + attention) + 10 * mlp + once
    layer = 100 * (attention + mlp) + 100 * (2 * 16 + 2 * 8) * 2
    assert recomputed.graph + recomputed.backward == once + 100 * 8 * 2 + layer


LOAD = Load(tokens=4000, squares=80_000, queries=16, sequences=200, largest=4000, most_sequences=200, longest=100)
CLUSTER = Cluster(nodes=2, gpus_per_node=4, gpu_gib=1.0, gpu_link=1e6, node_link=1e5, flops=1e9, utilisation=0.5)


def tiny_case(**changes: Any) -> Case:
    sharding = zero(3, stage3_param_persistence_threshold=64, reduce_bucket_size=1000)
    case = Case(
        shape=TINY,
        sharding=sharding,
        kernels=BF16,
        cluster=CLUSTER,
        load=LOAD,
        chunk_tokens=200,
        causal=True,
        fused_loss=True,
    )
    return replace(case, **changes)


def test_time_by_hand() -> None:
    frozen = 2 * (2 * 64 + 2 * 32) * 8000 + 2 * 3 * 128 * (4000 + 200)
    lora = 2 * 2 * (2 * 16 + 2 * 12) * 8000 + 2 * 2 * 3 * 24 * 4200
    scores = 2 * 2 * 80_000 * 8  # two layers, half of 4 L^2 Q
    work = tiny_case().load.work
    assert forward_flop(TINY, work, causal=True) == (frozen, lora, scores)
    # All weights trained: no adapters, and the projections' own gradients besides.
    everything = replace(TINY, lora_rank=0, full=True)
    assert executed_flop(everything, work, True, 1.0, recomputed=False) == 3 * frozen + 3.5 * scores
    weights = 2 * (2 * 64 + 2 * 32 + 3 * 128)
    assert (model_flop(TINY, work), model_flop(everything, work)) == (4 * weights * 4000, 6 * weights * 4000)
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("some card") is None
    cost = plan_cost(tiny_case())
    assert (cost.chunks, cost.forwards) == (3, 5)
    assert cost.flop == pytest.approx((frozen + lora + scores) * 5 / 3 + frozen + 2 * lora + 2.5 * scores)
    assert cost.compute_seconds == pytest.approx(cost.flop / (8 * 1e9 * 0.5))
    assert cost.gather_bytes == pytest.approx((5 + 3) * 6 * 128 * 2 * 7 / 8)
    assert cost.gather_seconds == pytest.approx(cost.gather_bytes / 1e5)
    assert cost.seconds == (
        max(cost.compute_seconds, cost.gather_seconds),
        cost.compute_seconds + cost.gather_seconds,
    )
    recomputed = plan_cost(tiny_case(kernels=replace(BF16, checkpointing=True)))
    # One of two layers, whole: the last one is cut to last tokens and kept.
    layer = 2 * (2 * 64 + 2 * 32 + 3 * 128) * 4000 + 2 * 2 * (2 * 16 + 2 * 12 + 3 * 24) * 4000 + scores / 2
    assert recomputed.flop - cost.flop == pytest.approx(layer)
    assert recomputed.gather_bytes == cost.gather_bytes
    two_way = plan_cost(tiny_case(causal=False))
    assert two_way.flop - cost.flop == pytest.approx(scores * (5 / 3 + 2.5))


COUNTED = {
    "lora": {},
    "recomputed": {"activation_checkpointing": True},
    "mean": {"pooling": "mean"},
    "mean, recomputed": {"pooling": "mean", "activation_checkpointing": True},
    "full": {"trained": "full"},
}


@pytest.mark.parametrize("name", COUNTED)
def test_arithmetic_is_what_torch_counts(name: str, tmp_path: Path) -> None:
    """Of matrix products; attention is left out, which torch's counter does not know on a CPU."""
    config = LlamaConfig(**SHAPE, intermediate_size=384, num_hidden_layers=3, num_key_value_heads=2)
    settings: dict[str, Any] = {"name": make_model(config, tmp_path), "dtype": "fp32", "lora": LoraSettings(rank=8)}
    model = ModelSettings(**settings | COUNTED[name])
    encoder = load_encoder(model, (), ())
    choose_trained(encoder, model)
    encoder.decoder.enable_input_require_grads()  # as trained marker rows do
    tokens, length = 512, 32
    ids_T, positions_T = torch.randint(0, 180, (tokens,)), torch.arange(length).repeat(tokens // length)
    cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        encoder.train()(ids_T, positions_T, cu_seqlens, length).sum().backward()
    products = ("mm", "addmm", "bmm")
    real = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[1] in products)
    work = Work(tokens, 0, tokens // length)
    planned = executed_flop(read_shape(model, 0), work, True, 1.0, recomputed=model.activation_checkpointing)
    assert planned == pytest.approx(real, rel=0.01)


def test_traffic_stays_in_a_node_with_hpz_and_on_one_node() -> None:
    case = tiny_case()
    copied = replace(case, sharding=replace(case.sharding, node_copy=4))
    assert plan_cost(copied).gather_seconds == pytest.approx(8 * 6 * 128 * 2 * 3 / 4 / 1e6)
    alone = replace(case, cluster=replace(CLUSTER, nodes=1), chunk_tokens=400)
    assert plan_cost(alone).gather_seconds == pytest.approx(8 * 6 * 128 * 2 * 3 / 4 / 1e6)
    assert plan_cost(replace(case, sharding=zero(1))).gather_seconds == 0
    assert plan_cost(replace(case, cluster=replace(CLUSTER, nodes=1, gpus_per_node=1))).gather_bytes == 0


# How the parts hang together.


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parts_add_up_and_one_moment_is_the_peak(stage: int) -> None:
    memory = plan_memory(tiny_case(sharding=zero(stage)))
    sums = {name: sum(parts.values()) for name, parts in memory.moments.items()}
    assert set(sums) == {"pass 1", "loss", "pass 2", "step"}
    assert memory.peak == sum(memory.always.values()) + max(sums.values())
    assert sums[memory.moment] == max(sums.values())
    assert all(value >= 0 for parts in (memory.always, *memory.moments.values()) for value in parts.values())


def test_kept_graphs_are_so_many_graphs() -> None:
    one, three = plan_memory(tiny_case()), plan_memory(tiny_case(graphs=3))
    graph = one.moments["pass 2"]["graph of 1 chunk"]
    assert three.moments["pass 2"]["graph of 3 chunks"] == 3 * graph
    assert three.moments["loss"]["graph of 3 chunks"] == 3 * graph
    assert plan_cost(tiny_case(graphs=3)).forwards == 3 and plan_cost(tiny_case(graphs=9)).forwards == 3
    assert plan_memory(tiny_case(graphs=9)) == three, "a step has three chunks"


def test_offload_moves_the_optimizer_to_the_host() -> None:
    here = plan_memory(tiny_case())
    away = plan_memory(tiny_case(sharding=replace(tiny_case().sharding, offload_optimizer=True)))
    gone = {name: value for name, value in here.always.items() if name not in away.always}
    assert set(gone) == {"fp32 masters", "Adam's two moments"}
    masters, moments = gone.values()
    assert away.host["masters, moments and gradients"] == (2 * masters + moments) * 4


def test_peak_is_monotone() -> None:
    def peak(**changes: Any) -> float:
        return plan_memory(tiny_case(**changes)).peak

    by_chunk = [peak(chunk_tokens=n) for n in (100, 200, 300, 400, 500)]
    assert by_chunk == sorted(by_chunk) and by_chunk[0] < by_chunk[-1]
    by_layers = [peak(shape=replace(TINY, layers=n)) for n in range(1, 6)]
    assert by_layers == sorted(set(by_layers))
    by_ranks = [peak(cluster=replace(CLUSTER, nodes=n)) for n in (1, 2, 4, 8)]
    assert by_ranks == sorted(by_ranks, reverse=True)
    assert peak(kernels=replace(BF16, dropout=True)) > peak() < peak(kernels=replace(BF16, element=4, fused=False))
    deep = replace(TINY, layers=8)
    assert peak(shape=deep, kernels=replace(BF16, checkpointing=True)) < peak(shape=deep)


def test_a_chunk_holds_no_more_than_a_step() -> None:
    whole = tiny_case(chunk_tokens=10_000)
    assert plan_memory(whole) == memory_of_chunk(whole, 500, 25)
    assert plan_memory(tiny_case()) == memory_of_chunk(tiny_case(), 200, 10)


# Mistral-7B.


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mistral-7b")
    (folder / "config.json").write_text(json.dumps(MISTRAL))
    return str(folder)


@pytest.fixture(scope="module")
def public(mistral: str) -> Callable[..., tuple[Case, Settings]]:
    """Case and settings of the paper's recipe on a cluster."""
    recipe = ROOT / "recipes" / "bge_en_icl_public.yaml"

    def build(*overrides: str, nodes: int = 1, gpus: int = 8, gib: float = 80.0, node_link: float = 50e9, **keys: Any):
        settings = load_settings(recipe, [f"model.name={mistral}", *overrides])
        config = json.loads(Path(settings.run.deepspeed).read_text())
        config["zero_optimization"] |= keys
        cluster = Cluster(nodes, gpus, gib, 450e9, node_link, 989e12, 0.4)
        load = stated_workload(settings, 500, 180, 1000).load
        return make_case(settings, read_shape(settings.model, 3), read_sharding(config), cluster, load), settings

    return build


def test_published_size(mistral: str) -> None:
    shape = read_shape(ModelSettings(name=mistral), 3)
    assert sum(shape.frozen) + shape.table == 7_241_732_096 - 131_072_000  # the checkpoint's, less its output layer
    assert read_shape(ModelSettings(name=mistral, num_layers=4), 3).layers == 4
    with pytest.raises(ValueError, match="model.num_layers=33, but the model has 32 layers"):
        read_shape(ModelSettings(name=mistral, num_layers=33), 3)
    with pytest.raises(ValueError, match="config.json cannot be read"):
        read_shape(ModelSettings(name=f"{mistral}/nowhere"), 3)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("gib", [24.0, 48.0, 80.0])
def test_the_largest_chunk_fits_and_the_next_does_not(public: Any, gib: float, checkpointing: str) -> None:
    case, _ = public(f"model.activation_checkpointing={checkpointing}", gib=gib, gpus=4)
    found = largest_chunk(case)
    assert found and found % GRAIN == 0
    assert fits(replace(case, chunk_tokens=found))
    in_one = found >= case.load.largest / case.cluster.world_size
    assert in_one or not fits(replace(case, chunk_tokens=found + GRAIN))
    assert gib > 24 or not in_one


def test_nothing_fits_a_small_card(public: Any) -> None:
    case, settings = public("run.deepspeed=../ds_configs/zero1.json".replace("..", str(ROOT)), gib=12.0)
    assert largest_chunk(case) is None
    assert any("no run.chunk_tokens would do" in line for line in warnings(case, settings))


# One change each, and the only line that it adds.
SPOKEN = [
    ([], {"gib": 8.0}, "does not fit: "),
    (["model.activation_checkpointing=false"], {"gib": 40.0}, "or set model.activation_checkpointing=true"),
    ([], {"gib": 141.0}, "model.activation_checkpointing is not needed"),
    ([], {"reduce_bucket_size": 1_500_000_000}, "reduce_bucket_size=1500000000 is more than"),
    ([], {"gpus": 1}, "ZeRO-3 on one GPU shards nothing"),
    ([], {"zero_hpz_partition_size": 3}, "zero_hpz_partition_size=3 should divide"),
    ([], {"offload_optimizer": {"device": "cpu"}}, "offload_optimizer saves 0.23 GiB a rank"),
    ([], {"offload_param": {"device": "cpu"}}, "offload_param: every pass copies"),
    (["batch.queries=500"], {}, "batch.queries=500 is not divisible by 8 ranks"),
    (["run.chunk_tokens=131072"], {}, "a step has 124,160 tokens a rank"),
    (["model.dtype=fp32"], {}, "model.dtype=fp32: fused attention"),
    (["model.attention_kernel=sdpa"], {}, "model.attention_kernel=sdpa makes one call"),
]


@pytest.mark.parametrize(("overrides", "changes", "said"), SPOKEN, ids=[said[:30] for _, _, said in SPOKEN])
def test_every_warning_speaks_once(public: Any, overrides: list[str], changes: dict[str, Any], said: str) -> None:
    always = warnings(*public())
    assert not always
    found = warnings(*public(*overrides, **changes))
    assert sum(said in line for line in found) == 1, found


def test_warnings_of_the_model(public: Any) -> None:
    case, settings = public()
    strange = replace(case, shape=replace(case.shape, family="phi9", capped=True, last_rows_only=False))
    found = warnings(replace(strange, chunk_tokens=100), settings)
    for said in ("phi9 layers are counted as LLaMA's", "soft-capped", "is below the longest sequence, 2048 tokens"):
        assert sum(said in line for line in found) == 1


def test_recommendation_follows_link_and_memory(public: Any) -> None:
    slow, _ = public(nodes=4, node_link=12.5e9)
    assert "ds_configs/zero1.json" in str(recommend(slow))
    tight, _ = public("run.chunk_tokens=4096", nodes=4, node_link=12.5e9, gib=16.0)
    assert fits(tight) and "ds_configs/zero3_hpz.json" in str(recommend(tight))
    fast, _ = public(nodes=4, node_link=400e9)
    assert recommend(replace(fast, cluster=replace(fast.cluster, gpu_link=400e9), chunk_tokens=31_232)) is None
    plain, _ = public(f"run.deepspeed={ROOT}/ds_configs/zero1.json", nodes=4, node_link=12.5e9)
    assert recommend(replace(plain, sharding=zero(1))) is None
    assert all(case.load == slow.load for case in alternatives(slow).values())


ESTIMATE = ["--estimate", "--query-tokens", "500", "--passage-tokens", "180", "--steps", "3000"]


@pytest.mark.parametrize(
    "hardware",
    [
        ["--gpus-per-node", "1", "--gpu-memory", "141"],
        [],
        ["--nodes", "4", "--link-gbps", "3200"],
        ["--nodes", "4", "--link-gbps", "100"],
    ],
    ids=["1 x 141", "8 x 80", "32 x 80 fast", "32 x 80 slow"],
)
def test_the_command_prints_at_once(mistral: str, hardware: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    read_shape(ModelSettings(name=mistral), 3)  # the first one imports transformers
    started = time.process_time()
    recipe = str(ROOT / "recipes" / "bge_en_icl_public.yaml")
    assert plan_run.main(["--config", recipe, *ESTIMATE, *hardware, f"model.name={mistral}"]) == 0
    assert time.process_time() - started < 2
    out = capsys.readouterr().out
    for said in ("ESTIMATE", "32 layers, 7.11 B parameters, 167.8 M trained", "3,000 steps", "GPU-hours", "padding 0"):
        assert said in out
    assert "512 queries, 4,608 sequences, 993,280 tokens" in out
    assert ("try: run.deepspeed=ds_configs/zero1.json" in out) == ("100" in hardware)
    assert_parts_add_up(out)


def assert_parts_add_up(out: str) -> None:
    """The numbers as printed: the peak is the sum of what is always there and of the moment that decides."""
    lines = out[out.index("memory of a rank, GiB") : out.index("host memory")].splitlines()
    peak = float(lines[0].split()[5])
    parts = [float(line.split()[-1]) for line in lines if line.startswith("  ")]
    assert len(parts) > 8 and sum(parts) == pytest.approx(peak, abs=0.005 * (len(parts) + 1))


def test_the_readme_shows_what_is_printed(mistral: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line of its blocks, in order; `...` stands for lines left out."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n\$ bge-icl plan (.*?--estimate.*?)```", text.replace("\\\n", ""), flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        command, *shown = block.splitlines()
        assert plan_run.main([*command.split(), f"model.name={mistral}"]) == 0
        printed = iter(capsys.readouterr().out.replace(mistral, "mistralai/Mistral-7B-v0.1").splitlines())
        missing = [line for line in shown if line != "..." and line not in printed]
        assert not missing, command


# Lengths of a store.


def test_lengths_of_a_store_are_those_of_its_plans() -> None:
    store = make_store({"qa": ("normal", plain_rows(64)), "sts": ("symmetric_sts", plain_rows(20, 2, "s"))})
    settings = make_settings(store)
    schedule = make_schedule(store, settings)
    workload = sampled_workload(store, schedule, settings)
    every = [plan_lengths(store, schedule.limits, plan_step(store, schedule, n)) for n in range(13)]
    assert schedule.steps_per_epoch == 13 == workload.steps_per_epoch == workload.steps  # all of them are sampled
    assert workload.load.tokens == pytest.approx(np.mean([sum(lengths) for lengths in every]))
    assert workload.load.squares == pytest.approx(np.mean([sum(n * n for n in lengths) for lengths in every]))
    assert workload.load.largest == max(sum(lengths) for lengths in every)
    p = settings.preprocess
    assert workload.load.longest == max(p.max_prompt_tokens, p.max_passage_tokens), (
        "every chunk must hold what may come"
    )
    assert workload.load.most_sequences == max(len(lengths) for lengths in every)
    for lengths in every:
        load = replace(workload.load, tokens=float(sum(lengths)))
        chunks = plan_cost(tiny_case(load=load, chunk_tokens=250, cluster=replace(CLUSTER, gpus_per_node=1))).chunks
        assert len(deal(lengths, 2, 250)[0]) == chunks


def test_the_command_reads_the_store(
    mistral: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store({"qa": ("normal", plain_rows(64))})
    settings = make_settings(store)
    run = replace(settings.run, deepspeed=str(ROOT / "ds_configs" / "zero3.json"))
    data = replace(settings.data, store=str(tmp_path))
    settings = replace(settings, run=run, data=data, model=ModelSettings(name=mistral))
    monkeypatch.setattr(plan_run, "load_settings", lambda path, overrides: settings)
    monkeypatch.setattr(plan_run, "open_store", lambda path, verify: store)
    monkeypatch.setattr(plan_run, "require_match", lambda store, settings, fingerprint: None)
    assert plan_run.main(["--config", "recipe.yaml", "--estimate"]) == 0
    out = capsys.readouterr().out
    assert "8 of 8 steps of the store" in out and "epoch      8 steps" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2"], "--nodes says something about an estimate only: add --estimate"),
        (["--estimate", "--nodes", "0"], "--nodes 0 must be above 0"),
        (["--estimate", "--link-gbps", "-1"], "--link-gbps -1.0 must be above 0"),
        (["--estimate", "--utilisation", "40"], "--utilisation 40.0 must be above 0 and at most 1"),
        (["--estimate", "--query-tokens", "9"], "--query-tokens and --passage-tokens go together"),
        (["--estimate", "--steps", "9"], "--steps is for stated lengths"),
        (["--estimate", "--step", "1"], "leave out --step, --world-size"),
        (
            ["--estimate", "--query-tokens", "9", "--passage-tokens", "513"],
            "--passage-tokens 513: a mean of sequences that the recipe limits to 512 tokens",
        ),
        (["--estimate"], "or state mean lengths with --query-tokens"),
        ([*ESTIMATE, "run.chunk_tokens=100"], "run.chunk_tokens=100 cannot hold one sequence"),
        ([*ESTIMATE, "run.deepspeed=no.json"], "no such file; ds_configs/ has one for each ZeRO stage"),
    ],
)
def test_user_errors_are_one_line(
    mistral: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(ROOT / "recipes" / "bge_en_icl_public.yaml")
    assert plan_run.main(["--config", recipe, *arguments, f"model.name={mistral}", "data.store=/no/such/store"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_wrong_json_is_named() -> None:
    with pytest.raises(ValueError, match="reduce_bucket_size='auto' must be a number"):
        zero(3, reduce_bucket_size="auto")
    assert USABLE < 1
