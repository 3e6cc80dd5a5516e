"""InfoNCE with own-group, in-batch and cross-device candidates, and distillation (arXiv 2409.15700, section 3.2).

B rows (one rank's slice of them), P distinct passages of the whole step, C candidates of those rows, N candidates and
shown passages of those rows, D width, G places of the longest group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from embed_kernels import Impl, similarity
from pipeline.settings import LossSettings

FILLER = -1e30
COUNTED_AT_ONCE = 1 << 22  # pairs of row and passage that `count_filtered` holds


@dataclass(frozen=True)
class ShownPassages:
    """Groups of passages that are none of "everybody else's" for a row: its own candidates and what its examples show.

    `similarity` leaves out one copy of a passage for each time that it stands in the row's group. So a shown passage
    stands here, behind the row's own candidates, as often as the whole step holds it.
    """

    candidate_C: Tensor
    group_offsets: Tensor
    longest_group: int
    own_place_C: Tensor  # int64: where the row's own candidates stand


@dataclass(frozen=True)
class LossTargets:
    """What the loss must know of one rank's rows; the counts and passages are those of the whole step.

    candidate_C points into the passages; the first candidate of a row is its positive. positive_text_B and text_P are
    text ids: equal ids are equal texts. copies_P is None where in-batch and cross-device candidates take no part.
    shown is None where what examples show counts like any other passage. Integers are int32, but for row_C.
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
    shown: ShownPassages | None = None


def contrastive_loss(
    query_BD: Tensor, passage_PD: Tensor, targets: LossTargets, settings: LossSettings, impl: Impl = "auto"
) -> Tensor:
    """This rank's share of the step's loss: shares of all ranks add up to the mean over all rows.

    InfoNCE: -log exp(s+) / (exp(s+) + sum of exp(s) over own negatives and, where `copies_P` is given, everybody
    else's candidates), with s = cosine / temperature. Texts equal to the row's positive never count as negatives, nor
    do in-batch ones that the row's examples show (`mask_shown`) and suspected false negatives (`filter_threshold`).
    Distillation, mean over rows with teacher scores, t = softmax(scores / teacher_temperature) over the own group:
    `kl_div` is -sum_g t_g log softmax(s)_g over the own group; `m3_kd` (arXiv 2402.03216, as FlagEmbedding computes
    it) is sum_g t_g times the InfoNCE of candidate g against all others but those before it in the group. Own
    negatives that are filtered stay in the group there: the teacher says how false they are.
    Matryoshka (arXiv 2205.13147, equation 1): the weighted sum of this loss over the full width, which weighs 1, and
    over truncated embeddings made unit vectors again; the filter takes each width's own cosines.
    """
    if not len(targets.positive_text_B):
        return (query_BD.sum() + passage_PD.sum()) * 0.0
    loss = _loss_of_width(query_BD, passage_PD, targets, settings, impl)
    for dim, weight in settings.matryoshka:
        query_Bd, passage_Pd = (torch.nn.functional.normalize(x[:, :dim], dim=1) for x in (query_BD, passage_PD))
        loss = loss + weight * _loss_of_width(query_Bd, passage_Pd, targets, settings, impl)
    return loss


def require_dims(settings: LossSettings, width: int) -> None:
    """ValueError unless each of matryoshka_dims truncates embeddings of this width."""
    if any(dim >= width for dim in settings.matryoshka_dims):
        raise ValueError(
            f"loss.matryoshka_dims={list(settings.matryoshka_dims)} must lie below the model's width, {width}, which "
            "is always trained: leave larger ones out"
        )


def _loss_of_width(
    query_BD: Tensor, passage_PD: Tensor, targets: LossTargets, settings: LossSettings, impl: Impl
) -> Tensor:
    threshold_B = filter_threshold(query_BD, passage_PD, targets, settings)
    own = targets.shown or targets
    logits_C, rest_lse_B = similarity(
        query_BD,
        passage_PD,
        own.candidate_C,
        own.group_offsets,
        1.0 / settings.temperature,
        targets.copies_P,
        exclude_keys=(targets.positive_text_B, targets.text_P),
        threshold_B=threshold_B,
        max_group=own.longest_group,
        impl=impl,
    )
    if targets.shown is not None:
        logits_C = logits_C[targets.shown.own_place_C]
    positive_C = targets.group_offsets[:-1].long()
    is_duplicate_C = targets.text_P[targets.candidate_C] == targets.positive_text_B[targets.row_C]
    is_duplicate_C[positive_C] = False
    is_left_out_C = is_duplicate_C
    if threshold_B is not None:
        is_left_out_C = is_duplicate_C | (logits_C.detach() * settings.temperature > threshold_B[targets.row_C])
        is_left_out_C[positive_C] = False
    group_lse_B = torch.logsumexp(by_row(logits_C.masked_fill(is_left_out_C, float("-inf")), targets), dim=1)
    loss = (torch.logaddexp(rest_lse_B, group_lse_B) - logits_C[positive_C]).sum() / targets.num_rows
    if settings.distillation_weight and targets.num_scored_rows:
        distil = {"kl_div": _kl_div, "m3_kd": _m3_kd}[settings.distillation]
        teacher_score_C = targets.teacher_score_C / settings.teacher_temperature
        divergence = distil(logits_C, rest_lse_B, is_duplicate_C, teacher_score_C, targets) / targets.num_scored_rows
        loss = loss + settings.distillation_weight * divergence
    return loss


def filter_threshold(
    query_BD: Tensor, passage_PD: Tensor, targets: LossTargets, settings: LossSettings
) -> Tensor | None:
    """The cosine above which a row's candidates are suspected false negatives, float [B]; None: the filter is off.

    A function of the row's positive: its cosine + filter_margin (Qwen3 Embedding, arXiv 2506.05176, takes 0.1), or
    x filter_ratio (NV-Retriever's TopK-PercPos, arXiv 2407.15831, takes 0.95). A constant: no gradient flows into it.
    """
    if not settings.filters_negatives:
        return None
    positive_B = targets.candidate_C[targets.group_offsets[:-1].long()].long()
    cosine_B = (query_BD.detach() * passage_PD.detach()[positive_B]).sum(dim=1)
    if settings.filter_margin is not None:
        return cosine_B + settings.filter_margin
    assert settings.filter_ratio is not None
    # As far below a negative cosine as below a positive one, where the plain product would lie above it.
    return cosine_B - (1.0 - settings.filter_ratio) * cosine_B.abs()


@torch.no_grad()
def count_filtered(query_BD: Tensor, passage_PD: Tensor, targets: LossTargets, settings: LossSettings) -> Tensor:
    """How many candidates of this rank's rows the filter leaves out at full width: int64, no dimensions.

    Each copy counts, as in the loss; what is no negative for another reason does not. A second multiplication of rows
    by passages, a bounded part of it at a time: a cosine within rounding of its threshold may fall on the other side.
    """
    threshold_B = filter_threshold(query_BD, passage_PD, targets, settings)
    assert threshold_B is not None, "nothing is filtered, so nothing should be computed"
    cosine_C, _ = similarity(query_BD, passage_PD, targets.candidate_C, targets.group_offsets, 1.0, None)
    is_other_C = targets.text_P[targets.candidate_C] != targets.positive_text_B[targets.row_C]
    total = ((cosine_C > threshold_B[targets.row_C]) & is_other_C).sum()
    if targets.copies_P is None:
        return total
    own = targets.shown or targets
    row_N = torch.repeat_interleave(
        torch.arange(len(query_BD), device=query_BD.device),
        own.group_offsets.diff().long(),
        output_size=len(own.candidate_C),
    )
    num_rows = max(1, COUNTED_AT_ONCE // max(1, len(passage_PD)))
    for first in range(0, len(query_BD), num_rows):
        rows = slice(first, first + num_rows)
        here_N = (row_N >= first) & (row_N < first + num_rows)
        copies_BP = targets.copies_P.repeat(len(query_BD[rows]), 1)
        place = (row_N[here_N] - first, own.candidate_C[here_N].long())
        copies_BP.index_put_(place, copies_BP.new_tensor(-1), accumulate=True)
        is_above_BP = query_BD[rows] @ passage_PD.T > threshold_B[rows, None]
        is_above_BP &= targets.positive_text_B[rows, None] != targets.text_P
        total += (copies_BP.clamp_(min=0) * is_above_BP).sum()
    return total


def by_row(values_C: Tensor, targets: LossTargets) -> Tensor:
    """Ragged groups as rows of equal length, filled up with -inf; further dimensions stay behind."""
    place_C = torch.arange(len(values_C), device=values_C.device) - targets.group_offsets[targets.row_C]
    shape = (len(targets.positive_text_B), targets.longest_group, *values_C.shape[1:])
    padded = values_C.new_full(shape, float("-inf"))
    return padded.index_put((targets.row_C, place_C), values_C)


def _kl_div(
    logits_C: Tensor, rest_lse_B: Tensor, is_duplicate_C: Tensor, teacher_score_C: Tensor, targets: LossTargets
) -> Tensor:
    """Sum over scored rows of the cross-entropy from the teacher's to the student's distribution over the group."""
    scored_B, teacher_BG = teacher_distribution(teacher_score_C, targets)
    student_BG = torch.log_softmax(by_row(logits_C, targets)[scored_B], dim=1)
    # Filler places have teacher weight 0 and student -inf: their product must be 0, not NaN.
    return -(teacher_BG * student_BG.masked_fill(teacher_BG == 0, 0.0)).sum()


def _m3_kd(
    logits_C: Tensor, rest_lse_B: Tensor, is_duplicate_C: Tensor, teacher_score_C: Tensor, targets: LossTargets
) -> Tensor:
    """Sum over scored rows; duplicates of the positive are no candidates here either."""
    scored_B, teacher_BG = teacher_distribution(teacher_score_C.masked_fill(is_duplicate_C, float("-inf")), targets)
    # Finite, unlike -inf: the log-sum-exp of filler alone then has a gradient of 0, not NaN.
    student_BG = by_row(logits_C.masked_fill(is_duplicate_C, FILLER), targets).clamp_min(FILLER)[scored_B]
    divergence = logits_C.sum() * 0.0
    for g in range(targets.longest_group):
        against_B = torch.logaddexp(rest_lse_B[scored_B], torch.logsumexp(student_BG[:, g:], dim=1))
        divergence = divergence + (teacher_BG[:, g] * (against_B - student_BG[:, g])).sum()
    return divergence


def teacher_distribution(score_C: Tensor, targets: LossTargets) -> tuple[Tensor, Tensor]:
    """Which rows have scores, and for those the teacher's distribution over the group (0 in filler places)."""
    scores_BG = by_row(score_C, targets)
    scored_B = ~torch.isnan(scores_BG).any(dim=1)
    return scored_B, torch.softmax(scores_BG[scored_B], dim=1)
