"""The reranker's loss against a formula that goes row by row and exit by exit; slices of rows."""

import dataclasses

import pytest
import torch
from dense_reranker import dense_reranker_loss
from test_loss import STEP, targets_of

from pipeline.model.reranker_loss import reranker_loss
from pipeline.settings import LossSettings

NUM_EXITS = 3
TAUGHT = LossSettings(distillation_weight=0.7, teacher_temperature=2.0)
ALONE = LossSettings(distillation_weight=0.0)
ALL = slice(0, len(STEP.groups))


def make_scores(step=STEP):
    """fp64 [C, E]."""
    generator = torch.Generator().manual_seed(0)
    number = sum(map(len, step.groups))
    return (3 * torch.randn(number, NUM_EXITS, dtype=torch.float64, generator=generator)).requires_grad_()


def with_gradient(loss, scores):
    return loss.detach(), torch.autograd.grad(loss, scores)[0]


@pytest.mark.parametrize("settings", [TAUGHT, ALONE], ids=["teacher", "alone"])
def test_loss_and_gradient_equal_the_dense_formula(settings):
    """Groups of 1 to 5, copies of the positive among the negatives, rows with and without teacher scores."""
    scores = make_scores()
    found = with_gradient(reranker_loss(scores, targets_of(STEP, ALL), settings), scores)
    wanted = with_gradient(dense_reranker_loss(scores, STEP, settings), scores)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=1e-15)
    assert found[1].isfinite().all() and (found[1] != 0).any(dim=1).sum() > 10


def test_the_last_exit_teaches_and_learns_nothing_from_the_others():
    scores, targets = make_scores(), targets_of(STEP, ALL)
    whole = with_gradient(reranker_loss(scores, targets, ALONE), scores)[1][:, -1]
    last = scores[:, -1:].detach().requires_grad_()
    alone = with_gradient(reranker_loss(last, targets, ALONE), last)[1][:, 0]
    torch.testing.assert_close(whole * NUM_EXITS, alone)
    same = scores[:, -1:].detach().expand(-1, NUM_EXITS)
    torch.testing.assert_close(reranker_loss(same, targets, ALONE), reranker_loss(last, targets, ALONE).detach())


def test_a_group_of_one_has_nothing_to_learn():
    step = dataclasses.replace(STEP, groups=[[0]], scores=[None], shown=[[]])
    scores = make_scores(step)
    loss, gradient = with_gradient(reranker_loss(scores, targets_of(step, slice(0, 1)), TAUGHT), scores)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("edges", [(0, 3, 6), (0, 1, 2, 6), (0, 0, 6)])
def test_shares_of_ranks_add_up(edges):
    scores, offsets = make_scores(), targets_of(STEP, ALL).group_offsets.tolist()
    whole = with_gradient(reranker_loss(scores, targets_of(STEP, ALL), TAUGHT), scores)
    shares = sum(
        reranker_loss(scores[offsets[a] : offsets[b]], targets_of(STEP, slice(a, b)), TAUGHT)
        for a, b in zip(edges[:-1], edges[1:], strict=True)
        if a < b
    )
    for found, wanted in zip(with_gradient(shares, scores), whole, strict=True):
        torch.testing.assert_close(found, wanted)


def test_fp32_stays_near_fp64_where_scores_are_large():
    large = (100 * make_scores()).detach()
    targets, found, wanted = targets_of(STEP, ALL), large.float().requires_grad_(), large.clone().requires_grad_()
    single = dataclasses.replace(targets, teacher_score_C=targets.teacher_score_C.float())
    low, high = (with_gradient(reranker_loss(x, t, TAUGHT), x) for x, t in ((found, single), (wanted, targets)))
    torch.testing.assert_close(low[0].double(), high[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(low[1].double(), high[1], rtol=0, atol=1e-6)
