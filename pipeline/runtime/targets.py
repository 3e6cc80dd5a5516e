"""What the loss must know of a step, from its plan: candidates, teacher scores, and what is no negative of a row.

B rows, P distinct passages, C candidates, N candidates and shown passages.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.data.shown import shown_passages
from pipeline.datatypes import BatchPlan
from pipeline.model.loss import LossTargets, ShownPassages


def loss_targets(plan: BatchPlan, rows: slice, device: torch.device, mask_shown: bool) -> LossTargets:
    """The plan's candidates for the rows of one rank, as tensors.

    mask_shown: in-batch negatives that a row's examples show are left out.
    """
    first, last = plan.group_offsets[rows.start], plan.group_offsets[rows.stop]
    offsets = plan.group_offsets[rows.start : rows.stop + 1] - first
    candidate_C = plan.candidate_C[first:last]
    row_C = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    copies_P = np.bincount(plan.candidate_C, minlength=plan.num_passages)
    unscored_B = np.add.reduceat(np.isnan(plan.teacher_score_C), plan.group_offsets[:-1]) > 0
    shown = None
    if mask_shown and plan.in_batch_negatives:
        row_N, passage_N = shown_passages(plan, rows)
        shown = _with_shown(row_C, candidate_C, row_N - rows.start, passage_N, copies_P, len(offsets) - 1, device)
    return LossTargets(
        candidate_C=_int32(candidate_C, device),
        row_C=_tensor(row_C, device),
        group_offsets=_int32(offsets, device),
        positive_text_B=_int32(plan.passage_text_P[candidate_C[offsets[:-1]]], device),
        text_P=_int32(plan.passage_text_P, device),
        copies_P=_int32(copies_P, device) if plan.in_batch_negatives else None,
        teacher_score_C=_tensor(plan.teacher_score_C[first:last], device),
        num_rows=plan.num_queries,
        num_scored_rows=int((~unscored_B).sum()),
        longest_group=int(np.diff(offsets).max(initial=0)),
        shown=shown,
    )


def _with_shown(
    row_C: np.ndarray,
    candidate_C: np.ndarray,
    row_N: np.ndarray,
    passage_N: np.ndarray,
    copies_P: np.ndarray,
    num_rows: int,
    device: torch.device,
) -> ShownPassages:
    """The rows' groups with each shown passage behind the own candidates, once for each of its copies."""
    times_N = copies_P[passage_N]
    row = np.concatenate([row_C, np.repeat(row_N, times_N)])
    order = np.argsort(row, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    size_B = np.bincount(row, minlength=num_rows)
    return ShownPassages(
        candidate_C=_int32(np.concatenate([candidate_C, np.repeat(passage_N, times_N)])[order], device),
        group_offsets=_int32(np.concatenate([[0], np.cumsum(size_B)]), device),
        longest_group=int(size_B.max(initial=0)),
        own_place_C=_tensor(place[: len(row_C)], device),
    )


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _int32(array: np.ndarray, device: torch.device) -> Tensor:
    assert not len(array) or array.max() < 2**31, "text ids and places in a step fit"
    return _tensor(array.astype(np.int32), device)
