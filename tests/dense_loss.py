"""The loss as one formula a row, every candidate written out: the truth of the tests, without a kernel of ours."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.settings import LossSettings


@dataclass(frozen=True)
class DenseStep:
    """A whole step: passages of each row (positive first), text ids, teacher scores, and texts that a row's examples
    show.
    """

    groups: Sequence[Sequence[int]]
    text_P: Sequence[int]
    scores: Sequence[Sequence[float] | None]
    in_batch: bool
    shown: Sequence[Sequence[int]]


def dense_loss(query_BD: Tensor, passage_PD: Tensor, step: DenseStep, loss: LossSettings) -> tuple[Tensor, int, int]:
    """(loss, negatives filtered, negatives shown), the last two at full width."""
    total, num_filtered, num_shown = _one_width(query_BD, passage_PD, step, loss)
    weights = loss.matryoshka_weights or [1.0] * len(loss.matryoshka_dims)
    for dim, weight in zip(loss.matryoshka_dims, weights, strict=True):
        short = [x[:, :dim] / x[:, :dim].norm(dim=1, keepdim=True) for x in (query_BD, passage_PD)]
        total = total + weight * _one_width(*short, step, loss)[0]
    return total, num_filtered, num_shown


def _one_width(query_BD: Tensor, passage_PD: Tensor, step: DenseStep, loss: LossSettings) -> tuple[Tensor, int, int]:
    """One row at a time, candidates repeated as often as rows hold them."""
    losses, divergences = [], []
    num_filtered = num_shown = 0
    for b, group in enumerate(step.groups):
        cosine_P = torch.stack([query_BD[b] @ passage_PD[p] for p in range(len(passage_PD))])
        positive = group[0]
        limit = _limit(float(cosine_P[positive].detach()), loss)
        own = [p for p in group[1:] if step.text_P[p] != step.text_P[positive]]
        others = [p for other, g in enumerate(step.groups) if other != b for p in g] if step.in_batch else []
        others = [p for p in others if step.text_P[p] != step.text_P[positive]]
        unseen = [p for p in others if not (loss.mask_shown and step.text_P[p] in step.shown[b])]
        num_shown += len(others) - len(unseen)
        others = [p for p in unseen if cosine_P[p] <= limit]
        hard = [p for p in own if cosine_P[p] <= limit]
        num_filtered += len(own) - len(hard) + len(unseen) - len(others)
        logits = cosine_P[[positive, *hard, *others]] / loss.temperature
        losses.append(torch.logsumexp(logits, 0) - logits[0])
        scores = step.scores[b]
        if scores is not None:
            distil = {"kl_div": _kl_div, "m3_kd": _m3_kd}[loss.distillation]
            divergences.append(distil(cosine_P / loss.temperature, group, others, step.text_P, scores, loss))
    total = torch.stack(losses).mean()
    if divergences and loss.distillation_weight:
        total = total + loss.distillation_weight * torch.stack(divergences).mean()
    return total, num_filtered, num_shown


def _limit(positive: float, loss: LossSettings) -> float:
    """The highest cosine of a negative that is not suspected."""
    if loss.filter_margin is not None:
        return positive + loss.filter_margin
    if loss.filter_ratio is not None:
        return positive * (loss.filter_ratio if positive > 0 else 2 - loss.filter_ratio)
    return float("inf")


def _teacher(scores, loss: LossSettings) -> Tensor:
    return torch.softmax(torch.tensor(scores, dtype=torch.float64) / loss.teacher_temperature, 0)


def _kl_div(logits_P: Tensor, group, others, text_P, scores, loss: LossSettings) -> Tensor:
    return -(_teacher(scores, loss) * torch.log_softmax(logits_P[list(group)], 0)).sum()


def _m3_kd(logits_P: Tensor, group, others, text_P, scores, loss: LossSettings) -> Tensor:
    """One contrastive loss for each candidate of the group, against the rest of the batch and the group behind it."""
    first = [g for g, p in enumerate(group) if g == 0 or text_P[p] != text_P[group[0]]]
    teacher = _teacher([scores[g] for g in first], loss)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(first)):
        logits = logits_P[[*(group[g] for g in first[i:]), *others]]
        total = total + teacher[i] * torch.nn.functional.cross_entropy(logits[None], torch.tensor([0]))
    return total
