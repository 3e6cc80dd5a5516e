"""InfoNCE with own-group, in-batch and cross-device candidates, and distillation (arXiv 2409.15700, section 3.2).

B rows (one rank's slice of them), P distinct passages of the whole step, C candidates of those rows, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from embed_kernels import Impl, similarity
from pipeline.settings import LossSettings

FILLER = -1e30


@dataclass(frozen=True)
class LossTargets:
    """What the loss must know of one rank's rows; the counts and passages are those of the whole step.

    candidate_C points into the passages; the first candidate of a row is its positive. positive_text_B and text_P are
    text ids: equal ids are equal texts. copies_P is None where in-batch and cross-device candidates take no part.
    Integers are int32, but for row_C.
    """

    candidate_C: Tensor
    row_C: Tensor
    group_offsets: Tensor
    positive_text_B: Tensor
    text_P: Tensor
    copies_P: Tensor | None
    teacher_score_C: Tensor
    num_rows: int
    num_scored_rows: int
    longest_group: int


def contrastive_loss(
    query_BD: Tensor, passage_PD: Tensor, targets: LossTargets, settings: LossSettings, impl: Impl = "auto"
) -> Tensor:
    """This rank's share of the step's loss: shares of all ranks add up to the mean over all rows.

    InfoNCE: -log exp(s+) / (exp(s+) + sum of exp(s) over own negatives and, where `copies_P` is given, everybody
    else's candidates), with s = cosine / temperature. Texts equal to the row's positive never count as negatives.
    Distillation, mean over rows with teacher scores t (a softmax over the own group): `kl_div` is
    -sum_g t_g log softmax(s)_g over the own group; `m3_kd` (arXiv 2402.03216, as FlagEmbedding computes it) is
    sum_g t_g times the InfoNCE of candidate g against all others but those before it in the group.
    """
    if not len(targets.positive_text_B):
        return (query_BD.sum() + passage_PD.sum()) * 0.0
    logits_C, rest_lse_B = similarity(
        query_BD,
        passage_PD,
        targets.candidate_C,
        targets.group_offsets,
        1.0 / settings.temperature,
        targets.copies_P,
        exclude_keys=(targets.positive_text_B, targets.text_P),
        max_group=targets.longest_group,
        impl=impl,
    )
    positive_C = targets.group_offsets[:-1].long()
    is_duplicate_C = targets.text_P[targets.candidate_C] == targets.positive_text_B[targets.row_C]
    is_duplicate_C[positive_C] = False
    group_lse_B = torch.logsumexp(_by_row(logits_C.masked_fill(is_duplicate_C, float("-inf")), targets), dim=1)
    loss = (torch.logaddexp(rest_lse_B, group_lse_B) - logits_C[positive_C]).sum() / targets.num_rows
    if settings.distillation_weight and targets.num_scored_rows:
        distil = {"kl_div": _kl_div, "m3_kd": _m3_kd}[settings.distillation]
        divergence = distil(logits_C, rest_lse_B, is_duplicate_C, targets) / targets.num_scored_rows
        loss = loss + settings.distillation_weight * divergence
    return loss


def _by_row(values_C: Tensor, targets: LossTargets) -> Tensor:
    """Ragged groups as rows of equal length, filled up with -inf."""
    place_C = torch.arange(len(values_C), device=values_C.device) - targets.group_offsets[targets.row_C]
    padded = values_C.new_full((len(targets.positive_text_B), targets.longest_group), float("-inf"))
    return padded.index_put((targets.row_C, place_C), values_C)


def _kl_div(logits_C: Tensor, rest_lse_B: Tensor, is_duplicate_C: Tensor, targets: LossTargets) -> Tensor:
    """Sum over scored rows of the cross-entropy from the teacher's to the student's distribution over the group."""
    scored_B, teacher_BG = _teacher(targets.teacher_score_C, targets)
    student_BG = torch.log_softmax(_by_row(logits_C, targets)[scored_B], dim=1)
    # Filler places have teacher weight 0 and student -inf: their product must be 0, not NaN.
    return -(teacher_BG * student_BG.masked_fill(teacher_BG == 0, 0.0)).sum()


def _m3_kd(logits_C: Tensor, rest_lse_B: Tensor, is_duplicate_C: Tensor, targets: LossTargets) -> Tensor:
    """Sum over scored rows; duplicates of the positive are no candidates here either."""
    scored_B, teacher_BG = _teacher(targets.teacher_score_C.masked_fill(is_duplicate_C, float("-inf")), targets)
    # Finite, unlike -inf: the log-sum-exp of filler alone then has a gradient of 0, not NaN.
    student_BG = _by_row(logits_C.masked_fill(is_duplicate_C, FILLER), targets).clamp_min(FILLER)[scored_B]
    divergence = logits_C.sum() * 0.0
    for g in range(targets.longest_group):
        against_B = torch.logaddexp(rest_lse_B[scored_B], torch.logsumexp(student_BG[:, g:], dim=1))
        divergence = divergence + (teacher_BG[:, g] * (against_B - student_BG[:, g])).sum()
    return divergence


def _teacher(score_C: Tensor, targets: LossTargets) -> tuple[Tensor, Tensor]:
    """Which rows have scores, and for those the teacher's distribution over the group (0 in filler places)."""
    scores_BG = _by_row(score_C, targets)
    scored_B = ~torch.isnan(scores_BG).any(dim=1)
    return scored_B, torch.softmax(scores_BG[scored_B], dim=1)
