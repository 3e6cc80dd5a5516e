"""A reranker's loss over groups of scores, at every exit (arXiv 2409.15700v1, appendix D).

B rows (one rank's slice of them), C candidates of those rows, E exits in rising order, G places of the longest group.
"""

import torch
from torch import Tensor

from pipeline.model.loss import LossTargets, by_row, teacher_distribution
from pipeline.settings import LossSettings


def reranker_loss(score_CE: Tensor, targets: LossTargets, settings: LossSettings) -> Tensor:
    """This rank's share of the step's loss: shares of all ranks add up to the mean over all rows, of means over exits.

    At each exit the cross-entropy of the positive against its own group, scores taken as logits; at each but the last
    also KL(last exit's distribution over the group || the exit's own), the last exit a constant: it learns from the
    positives alone. Where rows have teacher scores, at each exit also -sum_g t_g log softmax(scores)_g, t as of
    `contrastive_loss`. Texts equal to the row's positive are no candidates. The paper gives no weights: all are 1, but
    for the teacher's, `distillation_weight`.

    Args:
        score_CE: fp32, the candidates of this rank's rows in the order of the groups; the last exit teaches.
        targets: `group_offsets`, texts and teacher scores of those rows; in-batch candidates play no part.
    """
    if not len(targets.positive_text_B):
        return score_CE.sum() * 0.0
    is_duplicate_C = targets.text_P[targets.candidate_C] == targets.positive_text_B[targets.row_C]
    is_duplicate_C[targets.group_offsets[:-1].long()] = False
    log_BGE = torch.log_softmax(by_row(score_CE.masked_fill(is_duplicate_C[:, None], float("-inf")), targets), dim=1)
    num_exits = score_CE.shape[1]
    loss = -log_BGE[:, 0].sum() / (targets.num_rows * num_exits)

    # Places without a candidate have logarithm -inf. With the same number at all exits they add 0 below, not NaN.
    log_BGE = log_BGE.masked_fill(log_BGE == float("-inf"), 0.0)
    last_BG1 = log_BGE[:, :, -1:].detach()
    divergence = (last_BG1.exp() * (last_BG1 - log_BGE[:, :, :-1])).sum()
    loss = loss + divergence / (targets.num_rows * num_exits)

    if settings.distillation_weight and targets.num_scored_rows:
        score_C = (targets.teacher_score_C / settings.teacher_temperature).masked_fill(is_duplicate_C, float("-inf"))
        scored_B, teacher_BG = teacher_distribution(score_C, targets)
        cross_entropy = -(teacher_BG[..., None] * log_BGE[scored_B]).sum()
        loss = loss + settings.distillation_weight * cross_entropy / (targets.num_scored_rows * num_exits)
    return loss
