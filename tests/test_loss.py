"""The loss against a dense, obvious formula with every candidate written out; distillation; masks; slices of rows."""

import numpy as np
import pytest
import torch

from embed_kernels import gather_last_token
from pipeline.model.loss import LossTargets, contrastive_loss
from pipeline.settings import LossSettings

TEMPERATURE = 0.05


def dense_loss(query_BD, passage_PD, groups, text_P, scores, in_batch, weight, kind="kl_div"):
    """One row at a time, candidates repeated as often as rows hold them."""
    losses, divergences = [], []
    for b, group in enumerate(groups):
        positive = group[0]
        kept = [group[0]] + [p for p in group[1:] if text_P[p] != text_P[positive]]
        others = [p for other, g in enumerate(groups) if other != b for p in g] if in_batch else []
        kept += [p for p in others if text_P[p] != text_P[positive]]
        logits = torch.stack([query_BD[b] @ passage_PD[p] for p in kept]) / TEMPERATURE
        losses.append(torch.logsumexp(logits, 0) - logits[0])
        if scores[b] is not None and kind == "m3_kd":
            divergences.append(dense_m3_kd(query_BD[b], passage_PD, group, others, text_P, scores[b]))
        elif scores[b] is not None:
            student = torch.log_softmax(torch.stack([query_BD[b] @ passage_PD[p] for p in group]) / TEMPERATURE, 0)
            divergences.append(-(torch.softmax(torch.tensor(scores[b]), 0) * student).sum())
    total = torch.stack(losses).mean()
    return total + weight * torch.stack(divergences).mean() if divergences and weight else total


def dense_m3_kd(query_D, passage_PD, group, others, text_P, scores):
    """One contrastive loss for each candidate of the group, against the rest of the batch and the group behind it."""
    first = [g for g, p in enumerate(group) if g == 0 or text_P[p] != text_P[group[0]]]
    teacher = torch.softmax(torch.tensor([scores[g] for g in first], dtype=torch.float64), 0)
    others = [p for p in others if text_P[p] != text_P[group[0]]]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(first)):
        kept = [group[g] for g in first[i:]] + others
        logits = torch.stack([query_D @ passage_PD[p] for p in kept]) / TEMPERATURE
        total = total + teacher[i] * torch.nn.functional.cross_entropy(logits[None], torch.tensor([0]))
    return total


def targets_of(groups, text_P, scores, in_batch, rows):
    flat = [p for group in groups for p in group]
    mine = groups[rows]
    nan = float("nan")
    score_C = [s for b, g in list(enumerate(groups))[rows] for s in (scores[b] or [nan] * len(g))]
    lengths = [len(group) for group in mine]
    copies_P = torch.from_numpy(np.bincount(flat, minlength=len(text_P))).int()
    return LossTargets(
        candidate_C=torch.tensor([p for group in mine for p in group], dtype=torch.int32),
        row_C=torch.repeat_interleave(torch.arange(len(mine)), torch.tensor(lengths, dtype=torch.int64)),
        group_offsets=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        positive_text_B=torch.tensor([text_P[group[0]] for group in mine], dtype=torch.int32),
        text_P=torch.tensor(text_P, dtype=torch.int32),
        copies_P=copies_P if in_batch else None,
        teacher_score_C=torch.tensor(score_C, dtype=torch.float64),
        num_rows=len(groups),
        num_scored_rows=sum(s is not None for s in scores),
        longest_group=max(lengths, default=0),
    )


# Ragged groups; passage 0 is the positive of rows 0 and 3 and a negative of row 1; passages 1 and 6 are one text under
# two instructions; row 4 repeats a negative and holds a copy of its own positive; row 5 has no negatives.
GROUPS = [[0, 2, 3], [1, 0], [4, 5, 6, 2], [0, 1], [6, 2, 2, 6, 1], [5]]
TEXT_P = [10, 11, 12, 13, 14, 15, 11]
SCORES = [[3.0, 1.0, 0.5], None, [2.0, 2.0, 0.0, -1.0], None, [1.0, 0.0, 0.0, 1.0, 0.5], [7.0]]


def embeddings():
    generator = torch.Generator().manual_seed(0)
    query_BD = torch.randn(len(GROUPS), 8, dtype=torch.float64, generator=generator)
    passage_PD = torch.randn(len(TEXT_P), 8, dtype=torch.float64, generator=generator)
    return [torch.nn.functional.normalize(x, dim=1).requires_grad_() for x in (query_BD, passage_PD)]


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize(("kind", "weight"), [("kl_div", 0.0), ("kl_div", 0.7), ("m3_kd", 0.7)])
@pytest.mark.parametrize("cuts", [(0, 6), (0, 2, 6), (0, 0, 5, 6)])
def test_equals_the_dense_formula_in_value_and_gradient(in_batch, kind, weight, cuts):
    query_BD, passage_PD = embeddings()
    expected = dense_loss(query_BD, passage_PD, GROUPS, TEXT_P, SCORES, in_batch, weight, kind)
    truth = torch.autograd.grad(expected, (query_BD, passage_PD))
    shares, sums = [], [torch.zeros_like(query_BD), torch.zeros_like(passage_PD)]
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        rows = slice(first, last)
        targets = targets_of(GROUPS, TEXT_P, SCORES, in_batch, rows)
        share = contrastive_loss(query_BD[rows], passage_PD, targets, LossSettings(TEMPERATURE, kind, weight))
        shares.append(share.detach())
        for total, part in zip(sums, torch.autograd.grad(share, (query_BD, passage_PD)), strict=True):
            total += part
    torch.testing.assert_close(torch.stack(shares).sum(), expected.detach())
    for total, part in zip(sums, truth, strict=True):
        torch.testing.assert_close(total, part)


def test_a_batch_of_nothing_but_the_positive_has_no_loss_and_no_nan():
    query_BD, passage_PD = embeddings()
    targets = targets_of([[0], [0]], TEXT_P, [None, None], True, slice(0, 2))
    loss = contrastive_loss(query_BD[:2], passage_PD, targets, LossSettings(TEMPERATURE))
    gradients = torch.autograd.grad(loss, (query_BD, passage_PD))
    assert loss.item() == 0.0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_gather_last_token_picks_normalises_and_keeps_fp32():
    hidden_TD = torch.randn(10, 4).to(torch.bfloat16)
    out = gather_last_token(hidden_TD, torch.tensor([2, 9]))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(out[1] * hidden_TD[9].float().norm(), hidden_TD[9].float())
