"""A reranker's estimate: against single pairs, drawn widths, torch's counts, and tensors followed one by one."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_tensors import FusedAttention, measure_passes
from test_encoder import make_model
from tiny_run import make_tiny_reranker_run
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from pipeline import plan_run, preprocess
from pipeline.data.pair_steps import RELATIONS, draw_width
from pipeline.data.pairs import load_pair_tokenizer
from pipeline.data.sampling import make_schedule, plan_step
from pipeline.data.store import open_store
from pipeline.model import attention
from pipeline.model.encoder import choose_trained
from pipeline.model.flop import executed_flop, forward_flop, layer_work, pair_flop
from pipeline.model.reranker import Reranker, load_reranker, read_reranker_shape, scale_layers
from pipeline.planning.activations import Kernels, chunk_memory
from pipeline.planning.cases import make_case
from pipeline.planning.estimate import Cluster, plan_cost, plan_memory
from pipeline.planning.pairs import PROMPT_TOKENS, expected_work, sampled_pairs, stated_pairs
from pipeline.planning.sharding import read_sharding
from pipeline.prompts import BGE_RERANKER
from pipeline.runtime.pair_step import prepare_pair_step
from pipeline.runtime.ranks import Ranks
from pipeline.settings import LoraSettings, ModelSettings, Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200}
SHAPE |= {"intermediate_size": 384, "num_hidden_layers": 6}
YES = 5
CLUSTER = Cluster(1, 2, 80.0, 1e9, 1e9, 1e12, 0.5)
GEMMA = {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42}
GEMMA |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000}


def build(config: Any, folder: Path, **settings: Any) -> tuple[ModelSettings, Reranker]:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    given = {"kind": "reranker", "name": str(folder), "dtype": "fp32", "lora": LoraSettings(rank=8)}
    model = ModelSettings(**given | settings)
    reranker = load_reranker(model, YES)
    choose_trained(reranker, model)
    return model, reranker.train()


# Arithmetic.


@pytest.mark.parametrize("width", [((), 1), ((2,), 2), ((1, 3, 5), 4)])
def test_a_layers_mean_work_is_that_of_single_pairs(width: Any, tmp_path: Path) -> None:
    shape = read_reranker_shape(ModelSettings(name=make_model(LlamaConfig(**SHAPE), tmp_path), kind="reranker"))
    parts_C3 = np.random.default_rng(0).integers(0, 40, (50, 3)) + [1, 0, 1]
    single = sum(pair_flop(shape, tuple(parts), shape.layers, *width) - 2 * shape.width for parts in parts_C3.tolist())
    assert sum(forward_flop(shape, layer_work(parts_C3, shape.layers, *width), True)) == pytest.approx(single)


def test_expected_work_is_the_mean_over_steps() -> None:
    parts_C3, depth = np.array([[9, 61, 12], [30, 200, 12], [5, 0, 12]]), 42
    works = [layer_work(parts_C3, depth, *draw_width(3, step, scale_layers(depth)[1])) for step in range(4000)]
    expected = expected_work(parts_C3, depth)
    assert expected.tokens == pytest.approx(np.mean([w.tokens for w in works]), rel=0.02)
    assert expected.squares == pytest.approx(np.mean([w.squares for w in works]), rel=0.03)
    assert expected.tokens < 0.8 * parts_C3.sum() and expected.sequences == 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("width", [((), 1), ((1, 3), 4)])
def test_arithmetic_is_what_torch_counts(width: Any, checkpointing: bool, tmp_path: Path) -> None:
    """Of matrix products of both passes; attention is left out, which torch's counter does not know on a CPU."""
    model, reranker = build(LlamaConfig(**SHAPE), tmp_path, activation_checkpointing=checkpointing)
    reranker.decoder.enable_input_require_grads()  # the formula counts the first layer as any other
    tokens, length = 512, 64
    cu_seqlens, span_S2 = np.arange(0, tokens + 1, length, dtype=np.int32), np.array([(5, 58)] * (tokens // length))
    route = reranker.plan(cu_seqlens, span_S2, None, *width)
    with FlopCounterMode(display=False) as counter:
        reranker(torch.randint(0, 180, (tokens,)), route).sum().backward()
    products = ("mm", "addmm", "bmm")
    real = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[1] in products)
    work = layer_work(np.array([(5, 53, 6)] * len(span_S2)), 6, *width)
    planned = executed_flop(read_reranker_shape(model), replace(work, squares=0.0), True, 1.0, checkpointing)
    assert planned == pytest.approx(real, rel=0.01)


# Memory.


# kind, its shape, settings, whether attention is fused
PASSES = {
    "llama": (LlamaConfig, {}, {}, False),
    "deep": (LlamaConfig, {"num_hidden_layers": 12}, {"dtype": "bf16"}, True),
    "qwen3": (Qwen3Config, {"head_dim": 64}, {"dtype": "bf16"}, True),
    "recomputed": (LlamaConfig, {}, {"dtype": "bf16", "activation_checkpointing": True}, True),
    "recomputed, deep": (LlamaConfig, {"num_hidden_layers": 12}, {"activation_checkpointing": True}, False),
    "dropout": (LlamaConfig, {}, {"lora": LoraSettings(rank=8, dropout=0.1)}, False),
}


@pytest.mark.parametrize("name", PASSES)
def test_activations_are_what_the_passes_keep(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changes, settings, fused = PASSES[name]
    if fused:
        monkeypatch.setattr(attention, "_sdpa", lambda query, key, value, call: FusedAttention.apply(query, key, value))
    model, reranker = build(kind(**SHAPE | changes), tmp_path, **settings)
    reranker.to(torch.bfloat16 if model.dtype == "bf16" else torch.float32)
    tokens, length = 512, 32
    cu_seqlens, span_S2 = np.arange(0, tokens + 1, length, dtype=np.int32), np.array([(4, 26)] * (tokens // length))
    ids_T, (_, merges) = torch.randint(0, 180, (tokens,)), scale_layers(reranker.depth)
    routes = [reranker.plan(cu_seqlens, span_S2, None, *width) for width in (((), 1), (merges[:1], 2))]
    real, merged = (measure_passes(reranker, functools.partial(reranker, ids_T, route)) for route in routes)
    shape, element = read_reranker_shape(model), 2 if model.dtype == "bf16" else 4
    assert sorted(shape.trained) == sorted(p.numel() for p in reranker.parameters() if p.requires_grad)
    assert sorted(shape.frozen) == sorted(p.numel() for p in reranker.parameters() if not p.requires_grad)
    kernels = Kernels(element, fused, model.lora.dropout > 0, model.activation_checkpointing, mask_element=element)
    planned = chunk_memory(shape, kernels, tokens, tokens // length)
    assert planned.graph + planned.backward == pytest.approx(real["peak"], rel=0.06)
    assert planned.no_graph == pytest.approx(real["no_graph"], rel=0.1)
    assert merged["peak"] < real["peak"], "a step that merges nothing decides"


def test_a_gemma_2_has_heads_and_scores_in_its_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    overrides = [f"model.name={tmp_path}", "model.activation_checkpointing=true"]
    settings = load_settings(ROOT / "recipes/reranker_gemma2.yaml", overrides)
    shape, sharding = read_reranker_shape(settings.model), read_sharding({"zero_optimization": {"stage": 1}})
    assert (shape.exits, shape.last_rows_only) == (35, False)
    assert sum(shape.trained) - sum(replace(shape, exits=0).trained) == 35 * 3584
    load = stated_pairs(settings, 20, 200, 100, shape.layers).load
    memory = plan_memory(make_case(settings, shape, sharding, CLUSTER, load))
    assert memory.moments["loss"]["scores of the step, 4 x"] == 4 * 2048 * 35 * 4
    assert not memory.moments["loss"]["similarities"]
    assert not any("embeddings" in name for parts in memory.moments.values() for name in parts)


# What the run works on.


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny_reranker_run(tmp_path_factory.mktemp("reranker_run"))
    assert preprocess.main(["--config", str(path), "--processes", "1"]) == 0
    return path


def test_pairs_of_a_store_are_those_of_its_steps(recipe: Path) -> None:
    settings = load_settings(recipe, ["run.chunk_tokens=200", "data.store=" + load_settings(recipe).data.store])
    store, pt = open_store(settings.data.store), load_pair_tokenizer(settings.tokenizer_name, BGE_RERANKER)
    schedule = make_schedule(store, settings)
    sampled = sorted({round(s) for s in np.linspace(0, schedule.steps_per_epoch - 1, 16)})
    ranks = Ranks(rank=0, local_rank=0, world_size=2, device=torch.device("cpu"))
    inputs = []
    for step in sampled:
        plan = plan_step(store, schedule, step)
        inputs.append(prepare_pair_step(store, pt, plan, RELATIONS[plan.task_type], 4, settings, ranks))
    workload = sampled_pairs(store, schedule, settings, 4)
    load, shape = workload.load, read_reranker_shape(settings.model)
    assert workload.source == f"16 of {schedule.steps_per_epoch} steps of the store, their pairs tokenized"
    assert load.tokens == pytest.approx(np.mean([i.num_tokens for i in inputs]))
    assert load.squares == pytest.approx(np.mean([i.num_squares for i in inputs]))
    assert load.largest == max(i.num_tokens for i in inputs)
    assert load.sequences == pytest.approx(np.mean([len(i.plan.candidate_C) for i in inputs]))
    assert load.longest == settings.preprocess.max_pair_tokens
    # Widths: what steps read lies around the mean, which is that of all of them.
    assert min(i.layer_work.tokens for i in inputs) < load.work.tokens < max(i.layer_work.tokens for i in inputs)
    assert load.work.tokens < load.tokens
    for step in inputs:
        one = replace(load, tokens=float(step.num_tokens))
        case = make_case(settings, shape, read_sharding({}), CLUSTER, one)
        assert plan_cost(case).chunks == step.num_chunks


def test_stated_pairs_by_hand(recipe: Path) -> None:
    settings = load_settings(recipe, ["preprocess.max_pair_tokens=400", "optim.max_steps=9"])
    workload = stated_pairs(settings, 20, 200, None, 1)  # of one layer: nothing merges
    pairs, length = 6 * 4, 220 + PROMPT_TOKENS
    assert (workload.load.tokens, workload.load.sequences, workload.steps) == (pairs * length, pairs, 9)
    assert workload.load.work.tokens == pairs * length and workload.load.work.squares == pairs * length**2
    # Two layers, a merge between them with ratio 2, 4 or 8: the mean of the second layer's lengths.
    second = [20 + PROMPT_TOKENS + 200 // ratio for ratio in (1, 2, 4, 8)]
    work = stated_pairs(settings, 20, 200, None, 2).load.work
    assert work.tokens == pytest.approx(pairs * (length + np.mean(second)) / 2)
    assert work.squares == pytest.approx(pairs * (length**2 + np.mean(np.square(second))) / 2)


def plan(recipe: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = plan_run.main(["--config", str(recipe), *arguments])
    return code, *capsys.readouterr()


def test_the_command_estimates_pairs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, errors = plan(recipe, capsys, "--estimate")
    assert code == 0, errors
    for said in (
        "4 layers, 4 exits, ",
        " pairs, ",
        "their pairs tokenized",
        "widths     a layer reads ",
        "heads, sharded",
    ):
        assert said in out
    assert "sequences" not in out and "embeddings" not in out
    code, out, errors = plan(recipe, capsys, "--estimate", "--query-tokens", "20", "--passage-tokens", "24")
    assert code == 0 and "6 queries, 24 pairs, 1,344 tokens" in out and "12 tokens of prompt and BOS" in out
    for lengths, said in ((("43", "1"), "--query-tokens 43: "), (("20", "25"), "--passage-tokens 25: ")):
        code, _, errors = plan(
            recipe, capsys, "--estimate", "--query-tokens", lengths[0], "--passage-tokens", lengths[1]
        )
        assert (
            code == 2 and errors.startswith(f"error: {said}preprocess.max_pair_tokens=56") and errors.count("\n") == 1
        )


def test_a_step_is_shown_as_pairs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: Settings = load_settings(recipe)
    store, pt = open_store(settings.data.store), load_pair_tokenizer(settings.tokenizer_name, BGE_RERANKER)
    schedule = make_schedule(store, settings)
    ranks = Ranks(rank=0, local_rank=0, world_size=2, device=torch.device("cpu"))
    for step in range(4):
        code, out, errors = plan(recipe, capsys, "--step", str(step), "--world-size", "2", "--query", "1")
        assert code == 0, errors
        drawn = plan_step(store, schedule, step)
        inputs = prepare_pair_step(store, pt, drawn, RELATIONS[drawn.task_type], 4, settings, ranks)
        layers, ratio = inputs.compress_layers, inputs.compress_ratio
        width = f"{ratio} to 1 behind layers {', '.join(map(str, layers))}" if layers else "nothing is merged"
        assert width in out and f"\ntokens               {inputs.num_tokens}, padding 0\n" in out
        share = inputs.layer_work.tokens / inputs.num_tokens
        assert f"a layer reads {share:.0%} of the tokens" in out
        assert f"0 with a query cut, {inputs.num_passages_cut} with a passage cut" in out
        assert f"{RELATIONS[drawn.task_type]}: {BGE_RERANKER.prompt(RELATIONS[drawn.task_type])}" in out
        sizes = [len(sequence_S) for sequence_S in inputs.sequences_of_rank]
        assert all(f"({size} pairs)" in out for size in sizes) and sum(sizes) == len(drawn.candidate_C)
        query = store.text(int(drawn.query_text_B[1]))
        assert f"  | A: {query}\n  | B: " in out and out.count("positive  ") == 1
    code, _, errors = plan(recipe, capsys, "--step", "0", "--query", "99")
    assert code == 2 and errors.startswith("error: --query 99 is not in step 0")


def test_a_group_without_negatives_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = plan(recipe, capsys, "batch.group_size=1")
    assert code == 2 and "has group_size=1: a reranker learns from the negatives of its group alone; raise it" in errors
