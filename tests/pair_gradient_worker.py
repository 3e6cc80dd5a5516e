"""Gradients of a reranker's steps under every ZeRO stage, against the same pairs one by one without DeepSpeed.

deepspeed ... pair_gradient_worker.py RECIPE STAGES
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from dense_reranker import dense_reranker_loss
from gradient_worker import dense_step, start_rank

from pipeline.data.pair_steps import RELATIONS, compose_pairs, draw_width
from pipeline.data.pairs import PairTokenizer, load_pair_tokenizer
from pipeline.data.store import TokenStore
from pipeline.datatypes import BatchPlan
from pipeline.model.encoder import choose_trained, trainable_parameters
from pipeline.model.reranker import Reranker, load_reranker, scale_layers, yes_token
from pipeline.prompts import BGE_RERANKER
from pipeline.runtime.engine import build_engine, discard_gradients, gathered, sharded_loading, stop_distributed
from pipeline.runtime.pair_step import prepare_pair_step, run_pair_step
from pipeline.settings import Settings, load_settings

CHUNK_TOKENS = (100_000, 200)  # one chunk a rank, and many
DEPTH = 4


def build(settings: Settings, pt: PairTokenizer, **options) -> Reranker:
    """The same weights in every process; neither lora_B nor any head is as it starts."""
    reranker = load_reranker(settings.model, yes_token(pt.encoder.tokenizer), scale_layers(DEPTH)[0], **options)
    choose_trained(reranker, settings.model)
    torch.manual_seed(5)
    for p in trainable_parameters(reranker).values():
        torch.nn.init.normal_(p, std=0.1)
    return reranker.train()


def reference(settings: Settings, store: TokenStore, pt: PairTokenizer, plan: BatchPlan) -> dict[str, torch.Tensor]:
    """Loss and gradients, every pair alone."""
    reranker = build(settings, pt)
    width = draw_width(settings.run.seed, plan.step, scale_layers(DEPTH)[1])
    scores = []
    for pair in compose_pairs(store, pt, plan, RELATIONS[plan.task_type], settings.preprocess.max_pair_tokens):
        route = reranker.plan(np.array([0, len(pair.ids)]), np.array([(pair.start, pair.stop)]), None, *width)
        scores.append(reranker(torch.from_numpy(pair.ids), route))
    loss = dense_reranker_loss(torch.cat(scores), dense_step(plan), settings.loss)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in trainable_parameters(reranker).items()}


def main(recipe: str, stages: str) -> None:
    settings = load_settings(recipe)
    ranks, store, _, plans = start_rank(settings)
    pt = load_pair_tokenizer(settings.tokenizer_name, BGE_RERANKER)
    wanted = [reference(settings, store, pt, plan) for plan in plans]
    ratios, compared, chunk_counts = set(), 0, set()
    for stage in stages.split(","):
        config = Path(recipe).parent / f"zero{stage}.json"
        with sharded_loading(config, settings.optim, settings.model.dtype):
            reranker = build(settings, pt, gathered=gathered)
        engine = build_engine(reranker, settings.optim, settings.model.dtype, config, ranks)
        for plan, truth in zip(plans, wanted, strict=True):
            for chunk_tokens in CHUNK_TOKENS:
                budget = replace(settings, run=replace(settings.run, chunk_tokens=chunk_tokens))
                inputs = prepare_pair_step(store, pt, plan, RELATIONS[plan.task_type], DEPTH, budget, ranks)
                result = run_pair_step(engine, inputs, budget, ranks)
                found = {name: safe_get_full_grad(p) for name, p in trainable_parameters(engine.module).items()}
                found["loss"] = torch.tensor(result.loss)
                for name, value in truth.items():
                    error = float((found[name].double() - value.double()).norm() / value.double().norm())
                    assert error <= 1e-5, f"ZeRO-{stage}, {plan.task_type}, {chunk_tokens}, {name}: {error:.1e}"
                    compared += 1
                discard_gradients(engine)
                ratios.add(inputs.compress_ratio)
                chunk_counts.add(inputs.num_chunks)
    assert len(ratios) > 1 and len(chunk_counts) > 2, (ratios, chunk_counts)
    if ranks.is_first:
        print("compared", compared, "ratios", sorted(ratios), "chunks", sorted(chunk_counts))
    stop_distributed()


if __name__ == "__main__":
    main(*(a for a in sys.argv[1:] if not a.startswith("--local_rank")))
