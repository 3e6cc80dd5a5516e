"""A reranker's gradients under ZeRO-3, the model loaded sharded, against those without DeepSpeed.

deepspeed ... reranker_worker.py MODEL ZERO_JSON
"""

import sys
from contextlib import nullcontext

import torch
from deepspeed.utils import safe_get_full_grad
from test_reranker import YES, make_pairs, packed_scores

from pipeline.model.encoder import add_lora
from pipeline.model.reranker import Reranker, load_reranker
from pipeline.runtime.engine import build_engine, gathered, one_reduction, sharded_loading, start_distributed
from pipeline.runtime.engine import stop_distributed as stop
from pipeline.runtime.ranks import read_ranks
from pipeline.settings import LoraSettings, ModelSettings, OptimSettings


def build(folder: str, whole=lambda _: nullcontext()) -> Reranker:
    """The same adapters and heads in every process."""
    model = ModelSettings(name=folder, dtype="fp32", activation_checkpointing=True)
    reranker = load_reranker(model, YES, 1, gathered=whole)
    add_lora(reranker, LoraSettings(rank=2, alpha=4))
    torch.manual_seed(5)
    for p in (p for p in reranker.parameters() if p.requires_grad):
        torch.nn.init.normal_(p, std=0.1)
    return reranker.train()


def main(folder: str, config: str) -> None:
    ranks, optim, reduction = read_ranks(), OptimSettings(), (None, (1, 3), 2)
    start_distributed(ranks)
    plain = build(folder)
    scores_SE = packed_scores(plain, make_pairs(), *reduction)
    gradient_SE = torch.randn(scores_SE.shape, generator=torch.Generator().manual_seed(6))
    scores_SE.backward(gradient_SE)
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}

    with sharded_loading(config, optim, "fp32"):
        reranker = build(folder, gathered)
    engine = build_engine(reranker, optim, "fp32", config, ranks)
    with one_reduction(engine, ranks) as backward:
        for last in (False, True):  # two chunks: the second call follows the first one's trace
            found_SE = packed_scores(engine, make_pairs(), *reduction)
            backward(found_SE, gradient_SE / 2, last)
    assert (found_SE - scores_SE).norm() <= 1e-5 * scores_SE.norm()
    assert all(p.ds_status.name == "NOT_AVAILABLE" for p in reranker.parameters()), "weights stayed whole"
    for name, p in reranker.named_parameters():
        if p.requires_grad:
            error = (safe_get_full_grad(p) - wanted[name]).norm() / wanted[name].norm()
            assert error <= 1e-5, (name, error)
    # One exit, as an evaluation during training would ask for: fewer layers than the engine has seen, then all again.
    with torch.no_grad():
        for exits, columns in (((2,), [1]), (None, [0, 1, 2, 3])):
            found_SE = packed_scores(engine, make_pairs(), exits, *reduction[1:])
            assert (found_SE - scores_SE[:, columns]).norm() <= 1e-5 * scores_SE.norm()
    stop()


if __name__ == "__main__":
    main(*(a for a in sys.argv[1:] if not a.startswith("--local_rank")))
