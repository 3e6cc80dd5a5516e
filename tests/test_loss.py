"""The loss against a dense, obvious formula with every candidate written out; its options; slices of rows."""

import dataclasses

import numpy as np
import pytest
import torch
from dense_loss import DenseStep, dense_loss
from torch.utils._python_dispatch import TorchDispatchMode

import embed_kernels
from embed_kernels import gather_last_token
from pipeline.data.shown import count_shown
from pipeline.datatypes import BatchPlan
from pipeline.model import loss as loss_module
from pipeline.model.loss import contrastive_loss, count_filtered, filter_threshold, require_dims
from pipeline.runtime.targets import loss_targets
from pipeline.settings import LossSettings

CPU = torch.device("cpu")


def plan_of(step: DenseStep) -> BatchPlan:
    """The plan that has these candidates, scores and shown texts, and nothing else of interest."""
    num_rows, num_shown = len(step.groups), sum(len(shown) for shown in step.shown)
    nan = float("nan")
    scores = [s for g, own in zip(step.groups, step.scores, strict=True) for s in (own or [nan] * len(g))]
    zeros_B, zeros_E = np.zeros(num_rows, dtype=np.int64), np.zeros(num_shown, dtype=np.int64)
    return BatchPlan(
        step=0,
        epoch=0,
        dataset=0,
        task_type="normal",
        in_batch_negatives=step.in_batch,
        row_B=np.arange(num_rows),
        query_text_B=zeros_B,
        instruction_B=zeros_B,
        example_offsets=np.cumsum([0, *(len(shown) for shown in step.shown)]),
        example_row_E=zeros_E,
        example_query_E=zeros_E,
        example_response_E=np.array([text for shown in step.shown for text in shown], dtype=np.int64),
        example_instruction_E=zeros_E,
        group_offsets=np.cumsum([0, *(len(group) for group in step.groups)]),
        candidate_C=np.array([p for group in step.groups for p in group], dtype=np.int64),
        teacher_score_C=np.array(scores, dtype=np.float32),
        passage_text_P=np.array(step.text_P, dtype=np.int64),
        passage_instruction_P=np.full(len(step.text_P), -1),
        num_rows_revisited=0,
        num_candidates_repeated=0,
        num_examples_dropped=0,
    )


def targets_of(step: DenseStep, rows: slice, mask_shown: bool = False):
    """Targets in fp64: the formula's own arithmetic."""
    targets = loss_targets(plan_of(step), rows, CPU, mask_shown)
    return dataclasses.replace(targets, teacher_score_C=targets.teacher_score_C.double())


# Ragged groups; passage 0 is the positive of rows 0 and 3 and a negative of row 1; passages 1 and 6 are one text under
# two instructions; row 4 repeats a negative and holds a copy of its own positive; row 5 has no negatives.
# Row 0 shows a text that is two passages, row 2 its own hard negative, row 3 its own positive, row 4 a text twice.
STEP = DenseStep(
    groups=[[0, 2, 3], [1, 0], [4, 5, 6, 2], [0, 1], [6, 2, 2, 6, 1], [5]],
    text_P=[10, 11, 12, 13, 14, 15, 11],
    scores=[[3.0, 1.0, 0.5], None, [2.0, 2.0, 0.0, -1.0], None, [1.0, 0.0, 0.0, 1.0, 0.5], [7.0]],
    in_batch=True,
    shown=[[11, 14], [12], [15, 77], [10, 15], [10, 10, 99], []],
)


def embeddings(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    query_BD = torch.randn(len(STEP.groups), 8, dtype=torch.float64, generator=generator)
    passage_PD = torch.randn(len(STEP.text_P), 8, dtype=torch.float64, generator=generator)
    return [torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_() for x in (query_BD, passage_PD)]


PLAIN = LossSettings(temperature=0.05, distillation_weight=0.0)
KL, M3 = (dataclasses.replace(PLAIN, distillation=kind, distillation_weight=0.7) for kind in ("kl_div", "m3_kd"))
WIDTHS = {"matryoshka_dims": (2, 5), "matryoshka_weights": (0.5, 2.0)}
ALL = {"teacher_temperature": 2.5, "filter_ratio": 0.9, "mask_shown": True} | WIDTHS
CASES = {
    "plain": PLAIN,
    "kl_div": KL,
    "m3_kd": M3,
    "teacher_temperature-kl_div": dataclasses.replace(KL, teacher_temperature=3.0),
    "teacher_temperature-m3_kd": dataclasses.replace(M3, teacher_temperature=0.4),
    "margin": dataclasses.replace(PLAIN, filter_margin=0.25),
    "negative_margin-m3_kd": dataclasses.replace(M3, filter_margin=-0.1),
    "ratio": dataclasses.replace(PLAIN, filter_ratio=0.9),
    "ratio_above_1-kl_div": dataclasses.replace(KL, filter_ratio=1.5),
    "shown": dataclasses.replace(PLAIN, mask_shown=True),
    "shown-m3_kd": dataclasses.replace(M3, mask_shown=True),
    "matryoshka": dataclasses.replace(PLAIN, matryoshka_dims=(1, 4)),
    "matryoshka-weights-kl_div": dataclasses.replace(KL, **WIDTHS),
    "all-kl_div": dataclasses.replace(KL, **ALL),
    "all-m3_kd": dataclasses.replace(M3, **ALL),
}


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cuts", [(0, 6), (0, 2, 6), (0, 0, 5, 6)])
def test_equals_the_dense_formula_in_value_gradient_and_counts(in_batch, case, cuts):
    query_BD, passage_PD = embeddings()
    step, settings = dataclasses.replace(STEP, in_batch=in_batch), CASES[case]
    expected, num_filtered, num_shown = dense_loss(query_BD, passage_PD, step, settings)
    truth = torch.autograd.grad(expected, (query_BD, passage_PD))
    shares, sums, counted = [], [torch.zeros_like(query_BD), torch.zeros_like(passage_PD)], 0
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        rows = slice(first, last)
        targets = targets_of(step, rows, settings.mask_shown)
        share = contrastive_loss(query_BD[rows], passage_PD, targets, settings)
        shares.append(share.detach())
        for total, part in zip(sums, torch.autograd.grad(share, (query_BD, passage_PD)), strict=True):
            total += part
        if settings.filters_negatives:
            counted += int(count_filtered(query_BD[rows], passage_PD, targets, settings))
    torch.testing.assert_close(torch.stack(shares).sum(), expected.detach())
    for total, part in zip(sums, truth, strict=True):
        torch.testing.assert_close(total, part)
    assert counted == num_filtered
    assert (count_shown(plan_of(step)) if settings.mask_shown else 0) == num_shown


@pytest.mark.parametrize("case", CASES)
def test_every_option_changes_the_loss(case):
    """So that a formula that forgets one, on both sides, would be seen."""
    query_BD, passage_PD = embeddings()
    settings = CASES[case]
    off = dataclasses.replace(
        LossSettings(), **{k: getattr(settings, k) for k in ("temperature", "distillation", "distillation_weight")}
    )
    with_option, num_filtered, num_shown = dense_loss(query_BD, passage_PD, STEP, settings)
    assert (settings == off) == torch.equal(with_option, dense_loss(query_BD, passage_PD, STEP, off)[0])
    num_negatives = len(STEP.groups) * (sum(len(group) for group in STEP.groups) - 1)
    assert (num_filtered > 0) == settings.filters_negatives and num_filtered < num_negatives
    assert (num_shown > 0) == settings.mask_shown


def test_the_ratio_masks_more_below_the_positive_whatever_its_sign():
    """A plain product lies above a negative cosine and would spare what outscores the positive."""
    query_BD, passage_PD = embeddings()
    targets = targets_of(STEP, slice(0, 6))
    cosine_B = (query_BD * passage_PD[[group[0] for group in STEP.groups]]).sum(dim=1).detach()
    assert (cosine_B < 0).any() and (cosine_B > 0).any()
    for ratio, below in ((0.9, True), (1.1, False)):
        threshold_B = filter_threshold(query_BD, passage_PD, targets, LossSettings(filter_ratio=ratio))
        assert not threshold_B.requires_grad
        assert ((threshold_B < cosine_B) == below).all()
        torch.testing.assert_close((threshold_B - cosine_B).abs(), 0.1 * cosine_B.abs())


def test_where_the_filter_is_off_nothing_is_computed_for_it(monkeypatch):
    query_BD, passage_PD = embeddings()
    targets, seen = targets_of(STEP, slice(0, 6)), []

    def similarity(*arguments, **options):
        seen.append(options)
        return embed_kernels.similarity(*arguments, **options)

    monkeypatch.setattr(loss_module, "similarity", similarity)
    contrastive_loss(query_BD, passage_PD, targets, PLAIN)
    assert [call["threshold_B"] for call in seen] == [None]
    with pytest.raises(AssertionError, match="nothing is filtered"):
        count_filtered(query_BD, passage_PD, targets, PLAIN)


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_counting_holds_a_part_of_the_rows_x_passages_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    num_rows, num_passages = 60, 100
    groups = [torch.randint(num_passages, (3,), generator=generator).tolist() for _ in range(num_rows)]
    shown = [torch.randint(num_passages, (2,), generator=generator).tolist() for _ in range(num_rows)]
    step = DenseStep(groups, list(range(num_passages)), [None] * num_rows, True, shown)
    query_BD, passage_PD = (
        torch.nn.functional.normalize(torch.randn(n, 2, dtype=torch.float64, generator=generator), dim=1)
        for n in (num_rows, num_passages)
    )
    settings = LossSettings(filter_ratio=0.95, mask_shown=True)
    targets = targets_of(step, slice(0, num_rows), mask_shown=True)
    wanted = dense_loss(query_BD, passage_PD, step, settings)[1]
    for at_once in (700, 1):
        monkeypatch.setattr(loss_module, "COUNTED_AT_ONCE", at_once)
        with LargestResult() as watch:
            counted = count_filtered(query_BD, passage_PD, targets, settings)
        assert int(counted) == wanted
        # Beside the parts there are lists of candidates and of shown passages with their places, two numbers each.
        assert watch.largest <= max(at_once, num_passages, 2 * len(targets.shown.candidate_C)) < num_rows * num_passages


@pytest.mark.parametrize("case", ["all-kl_div", "negative_margin-m3_kd"])
def test_the_kernels_give_the_dense_formula(case):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU: Triton's interpreter
    query_BD, passage_PD = embeddings()
    settings = CASES[case]
    expected = dense_loss(query_BD, passage_PD, STEP, settings)[0]
    truth = torch.autograd.grad(expected, (query_BD, passage_PD))
    low = [x.detach().to(device, torch.float32).requires_grad_() for x in (query_BD, passage_PD)]
    targets = loss_targets(plan_of(STEP), slice(0, 6), device, settings.mask_shown)
    value = contrastive_loss(*low, targets, settings, impl="triton")
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for got, wanted in zip(torch.autograd.grad(value, low), truth, strict=True):
        assert (got.double().cpu() - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_shown_hard_negative_stays_one_and_its_other_copies_go():
    """Row 2 shows passage 5, its own hard negative, which is the positive of row 5 as well."""
    targets = targets_of(STEP, slice(2, 3), mask_shown=True)
    assert targets.shown.candidate_C.tolist() == [4, 5, 6, 2, 5, 5]
    assert targets.shown.own_place_C.tolist() == [0, 1, 2, 3]
    only_it = dataclasses.replace(STEP, shown=[[], [], [15], [], [], []])
    assert count_shown(plan_of(only_it)) == 1
    assert count_shown(plan_of(dataclasses.replace(only_it, in_batch=False))) == 0
    filler = dataclasses.replace(plan_of(only_it), filler=True)
    assert count_shown(filler) == 0, "the examples of the control experiment have no content"
    targets = loss_targets(filler, slice(2, 3), CPU, mask_shown=True)
    assert targets.shown.candidate_C.tolist() == targets.candidate_C.tolist()


def test_a_batch_of_nothing_but_the_positive_has_no_loss_and_no_nan():
    query_BD, passage_PD = embeddings()
    step = DenseStep([[0], [0]], STEP.text_P, [None, None], True, [[], []])
    for settings in (PLAIN, CASES["all-kl_div"]):
        targets = targets_of(step, slice(0, 2), settings.mask_shown)
        loss = contrastive_loss(query_BD[:2], passage_PD, targets, settings)
        gradients = torch.autograd.grad(loss, (query_BD, passage_PD))
        assert loss.item() == 0.0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_a_filter_that_leaves_no_negative_leaves_no_loss_and_no_nan():
    query_BD, passage_PD = embeddings()
    settings = dataclasses.replace(PLAIN, filter_margin=-1.0)
    close_PD = passage_PD * 0 + query_BD[:1].detach()
    loss = contrastive_loss(query_BD, close_PD, targets_of(STEP, slice(0, 6)), settings)
    gradients = torch.autograd.grad(loss, (query_BD, passage_PD))
    assert loss.item() == 0.0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_dims_at_or_above_the_width_are_refused():
    settings = LossSettings(matryoshka_dims=(4, 8))
    require_dims(settings, 9)
    with pytest.raises(ValueError, match=r"loss.matryoshka_dims=\[4, 8\] must lie below the model's width, 8"):
        require_dims(settings, 8)


def test_gather_last_token_picks_normalises_and_keeps_fp32():
    hidden_TD = torch.randn(10, 4).to(torch.bfloat16)
    out = gather_last_token(hidden_TD, torch.tensor([2, 9]))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(out[1] * hidden_TD[9].float().norm(), hidden_TD[9].float())
