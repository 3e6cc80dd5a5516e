"""InfoNCE with own-group, in-batch and cross-device candidates, and distillation (arXiv 2409.15700, section 3.2).

B rows (one rank's slice of them), P distinct passages of the whole step, C candidates of those rows, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from embed_kernels import similarity


@dataclass(frozen=True)
class LossTargets:
    """What the loss must know of one rank's rows; the counts and passages are those of the whole step.

    candidate_C points into the passages; the first candidate of a row is its positive. positive_text_B and text_P are
    text ids: equal ids are equal texts. copies_P is None where in-batch and cross-device candidates take no part.
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


def contrastive_loss(
    query_BD: Tensor, passage_PD: Tensor, targets: LossTargets, temperature: float, distillation_weight: float
) -> Tensor:
    """This rank's share of the step's loss: shares of all ranks add up to the mean over all rows.

    InfoNCE: -log exp(s+) / (exp(s+) + sum of exp(s) over own negatives and, where `copies_P` is given, everybody
    else's candidates), with s = cosine / temperature. Texts equal to the row's positive never count as negatives.
    Distillation: -sum softmax(teacher) log softmax(s) over the own group, mean over rows with teacher scores.
    """
    if not len(targets.positive_text_B):
        return (query_BD.sum() + passage_PD.sum()) * 0.0
    logits_C, rest_lse_B = similarity(
        query_BD,
        passage_PD,
        targets.candidate_C,
        targets.row_C,
        1.0 / temperature,
        targets.copies_P,
        targets.positive_text_B,
        targets.text_P,
    )
    positive_C = targets.group_offsets[:-1]
    is_duplicate_C = targets.text_P[targets.candidate_C] == targets.positive_text_B[targets.row_C]
    is_duplicate_C[positive_C] = False
    group_lse_B = torch.logsumexp(_by_row(logits_C.masked_fill(is_duplicate_C, float("-inf")), targets), dim=1)
    loss = (torch.logaddexp(rest_lse_B, group_lse_B) - logits_C[positive_C]).sum() / targets.num_rows
    if distillation_weight and targets.num_scored_rows:
        divergence = _distillation(logits_C, targets) / targets.num_scored_rows
        loss = loss + distillation_weight * divergence
    return loss


def _by_row(values_C: Tensor, targets: LossTargets) -> Tensor:
    """Ragged groups as rows of equal length, filled up with -inf."""
    place_C = torch.arange(len(values_C), device=values_C.device) - targets.group_offsets[targets.row_C]
    longest = int(targets.group_offsets.diff().max())
    padded = values_C.new_full((len(targets.positive_text_B), longest), float("-inf"))
    return padded.index_put((targets.row_C, place_C), values_C)


def _distillation(logits_C: Tensor, targets: LossTargets) -> Tensor:
    """Sum over scored rows of the cross-entropy from the teacher's to the student's distribution over the group."""
    teacher_BG = _by_row(targets.teacher_score_C, targets)
    scored_B = ~torch.isnan(teacher_BG).any(dim=1)
    if not scored_B.any():
        return logits_C.sum() * 0.0
    teacher_BG = torch.softmax(teacher_BG[scored_B], dim=1)
    student_BG = torch.log_softmax(_by_row(logits_C, targets)[scored_B], dim=1)
    # Filler places have teacher weight 0 and student -inf: their product must be 0, not NaN.
    return -(teacher_BG * student_BG.masked_fill(teacher_BG == 0, 0.0)).sum()
