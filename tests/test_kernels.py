"""Triton kernels against an fp64 oracle: in Triton's interpreter on CPU, on the device where there is one.

On CPU every pair of sizes, types, temperatures and masks occurs in some case, on a GPU every triple of more of them.
KERNEL_TEST_PRODUCT=1 runs their whole product: tens of thousands of cases.
"""

import itertools
import math
import os

import pytest
import torch

from embed_kernels import dispatch, gather_last_token, gather_similarity, reference, similarity, similarity_kernel

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of gradients, relative. Shares are rounded to the inputs' type once, gradients once more.
GRADIENT_ERROR = {"fp32": 3e-5 if ON_GPU else 5e-6, "fp16": 1e-3, "bf16": 6e-3}
# Of logits and log-sum-exp, absolute, for a scale of 1: an error of the dot product is multiplied by the scale.
LOGIT_ERROR = 1e-5 if ON_GPU else 2e-7
MASKS = ("none", "exclude", "require", "threshold", "all", "no_rest")
FACTORS: dict[str, tuple] = {
    "rows": (1, 5, 33, 64, 512) if ON_GPU else (1, 5, 33, 64),
    "passages": (1, 9, 130, 257, 4096) if ON_GPU else (1, 9, 130, 257),
    "width": (16, 48, 80, 128, 1024, 4096) if ON_GPU else (16, 48, 80, 128),
    "group": (1, 2, 8),
    "dtype": tuple(DTYPES),
    "temperature": (1.0, 0.05, 0.02, 0.01),
    "mask": MASKS,
}


def cover(factors: dict[str, tuple], strength: int) -> list[tuple]:
    """Cases in which all values of every `strength` factors occur together: greedy, the same in every run."""
    names = list(factors)
    missing = {
        frozenset(zip(chosen, values, strict=True))
        for chosen in itertools.combinations(names, strength)
        for values in itertools.product(*(factors[name] for name in chosen))
    }
    cases = []
    while missing:
        case = dict(sorted(min(missing, key=lambda some: repr(sorted(some, key=repr))), key=repr))
        for name in names:
            if name in case:
                continue
            others = list(itertools.combinations(case.items(), strength - 1))
            gains = {value: sum(frozenset((*o, (name, value))) in missing for o in others) for value in factors[name]}
            case[name] = max(gains, key=lambda value: gains[value])
        missing -= {frozenset(some) for some in itertools.combinations(case.items(), strength)}
        cases.append(tuple(case[name] for name in names))
    return cases


if ON_GPU and os.environ.get("KERNEL_TEST_PRODUCT") == "1":
    CASES = list(itertools.product(*FACTORS.values()))
else:
    CASES = cover(FACTORS, 3 if ON_GPU else 2)
# The tile of large problems.
CASES += [(2100, 8300, 1024, 8, dtype, 0.02, mask) for dtype in DTYPES for mask in ("none", "all") if ON_GPU]


@pytest.mark.parametrize("strength", [2, 3])
def test_the_cover_is_small_and_whole(strength):
    factors = {"a": (1, 2), "b": (1, 2, 3), "c": (1, 2), "d": (1, 2)}
    cases = cover(factors, strength)
    for places in itertools.combinations(range(4), strength):
        wanted = math.prod(len(list(factors.values())[i]) for i in places)
        assert len({tuple(case[i] for i in places) for case in cases}) == wanted
    assert len(cases) < 24 and (ON_GPU or len(CASES) <= 200)


def unit(rows: int, directions_4D: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Unit vectors around a few directions that queries and passages share: many are alike, as embeddings are."""
    width = directions_4D.shape[1]
    mixed = torch.randn(rows, 4, generator=generator) @ directions_4D
    return torch.nn.functional.normalize(mixed + 0.7 * torch.randn(rows, width, generator=generator), dim=1)


def make_case(rows, passages, width, group, dtype, temperature, mask, seed=0):
    """Inputs of one call: ragged groups up to `group` with repeats, keys that match now and then, a zero row."""
    generator = torch.Generator().manual_seed(seed)

    def integers(below, count):
        return torch.randint(0, below, (count,), generator=generator, dtype=torch.int32)

    sizes = integers(group, rows) + 1
    sizes[0] = group
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).int()
    candidate_C = integers(passages, int(offsets[-1]))
    if len(candidate_C) > 1 and group > 1:
        candidate_C[1] = candidate_C[0]  # one passage twice in a group
    directions_4D = torch.randn(4, width, generator=generator)
    query_BD, passage_PD = (unit(count, directions_4D, generator) for count in (rows, passages))
    query_BD[-1] = 0.0
    # Not every candidate of the batch is some row's here: copies beyond the local rows are other ranks'.
    copies_P = torch.bincount(candidate_C, minlength=passages).int() + integers(2, passages)
    keys = {
        "exclude_keys": (integers(7, rows), integers(7, passages)),
        "require_keys": (integers(2, rows), integers(2, passages)),
        "threshold_B": torch.rand(rows, generator=generator) * 0.6 + 0.2,
    }
    chosen = {"exclude": ["exclude_keys"], "require": ["require_keys"], "threshold": ["threshold_B"], "all": list(keys)}
    options = {name: keys[name] for name in chosen.get(mask, [])}
    if "require_keys" in options:
        options["require_keys"][0][0] = 9  # a row that nothing matches
    query_BD, passage_PD = query_BD.to(DTYPES[dtype]), passage_PD.to(DTYPES[dtype])
    if "threshold_B" in options:
        # Pairs at the very threshold would fall on either side by rounding.
        near = (query_BD.double() @ passage_PD.double().T - options["threshold_B"][:, None].double()).abs().amin(dim=1)
        options["threshold_B"] = torch.where(near < 1e-4, options["threshold_B"] + 3e-4, options["threshold_B"])
    inputs = (query_BD, passage_PD, candidate_C, offsets)
    return inputs, 1.0 / temperature, None if mask == "no_rest" else copies_P, options


def oracle(
    query_BD, passage_PD, candidate_C, offsets, scale, copies_P, exclude_keys=None, require_keys=None, threshold_B=None
):
    """Row by row in fp64: every kept passage as often as it counts."""
    logits, rest = [], []
    for b in range(len(query_BD)):
        own = candidate_C[offsets[b] : offsets[b + 1]]
        cosine_P = passage_PD @ query_BD[b]
        logits.append(cosine_P[own] * scale)
        if copies_P is None:
            rest.append(torch.full((), -math.inf, dtype=torch.float64))
            continue
        times_P = copies_P - torch.bincount(own, minlength=len(passage_PD))
        keep_P = times_P > 0
        if exclude_keys is not None:
            keep_P &= exclude_keys[0][b] != exclude_keys[1]
        if require_keys is not None:
            keep_P &= require_keys[0][b] == require_keys[1]
        if threshold_B is not None:
            keep_P &= cosine_P <= threshold_B[b].double()
        repeated = cosine_P[keep_P].repeat_interleave(times_P[keep_P]) * scale
        rest.append(torch.logsumexp(repeated, 0) if len(repeated) else torch.full((), -math.inf, dtype=torch.float64))
    return torch.cat(logits), torch.stack(rest)


def run(call, inputs, scale, copies_P, options, dtype=None, device="cpu", seed=1):
    """Outputs and the gradients of a fixed random linear function of them, in fp64 on CPU."""

    def move(value):
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    query_BD, passage_PD = (move(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in inputs[:2])
    scale = torch.tensor(scale, dtype=torch.float32 if dtype is None else dtype, device=device).requires_grad_()
    copies_P = move(copies_P)
    logits_C, rest_B = call(
        query_BD, passage_PD, *map(move, inputs[2:]), scale, copies_P, **{k: move(v) for k, v in options.items()}
    )
    generator = torch.Generator().manual_seed(seed)
    weight_C = torch.randn(logits_C.shape, generator=generator, dtype=torch.float64).to(device)
    weight_B = torch.rand(rest_B.shape, generator=generator, dtype=torch.float64).to(device)
    some_B = rest_B > -math.inf
    ((logits_C.double() * weight_C).sum() + (rest_B[some_B].double() * weight_B[some_B]).sum()).backward()
    results = (logits_C, rest_B, query_BD.grad, passage_PD.grad, scale.grad)
    return [r.detach().double().cpu() for r in results]


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    """||value - truth|| / ||truth||; both zero is no error."""
    difference = float((value - truth).norm())
    return difference / float(truth.norm()) if difference else 0.0


def check(result, truth, dtype, scale):
    logits_C, rest_B, *gradients = zip(result, truth, strict=True)
    assert torch.equal(rest_B[0] == -math.inf, rest_B[1] == -math.inf)
    some_B = rest_B[1] > -math.inf
    allowed = LOGIT_ERROR * (scale + 10.0)
    assert (logits_C[0] - logits_C[1]).abs().max() <= allowed
    assert not some_B.any() or (rest_B[0] - rest_B[1])[some_B].abs().max() <= allowed
    for value, expected in gradients[:2]:
        assert relative(value, expected) <= GRADIENT_ERROR[dtype]


def triton_similarity(*args, **kwargs):
    return similarity(*args, impl="triton", **kwargs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_similarity_equals_the_oracle(case):
    inputs, scale, copies_P, options = make_case(*case)
    # The twin in fp64 is the oracle's equal (the next test), and a GPU's cases are too large for a loop over rows.
    truth = run(reference.similarity if ON_GPU else oracle, inputs, scale, copies_P, options, torch.float64, DEVICE)
    result = run(triton_similarity, inputs, scale, copies_P, options, device=DEVICE)
    check(result, truth, case[4], scale)
    # The scale's gradient is one sum over all pairs, with much cancellation; it goes through dq in the inputs' type.
    terms = (truth[2] * inputs[0].double()).abs().sum() / scale
    assert (result[4] - truth[4]).abs() <= {"fp32": 1e-5, "fp16": 1e-3, "bf16": 6e-3}[case[4]] * terms + 1e-6


def test_masks_and_large_logits_are_exercised():
    """Cases in which thresholds drop pairs, own copies among them, and positives are far above the rest."""
    inputs, scale, copies_P, options = make_case(33, 130, 128, 8, "fp32", 0.01, "threshold")
    cosine_BP = inputs[0] @ inputs[1].T
    dropped_BP = cosine_BP > options["threshold_B"][:, None]
    assert 0.02 < dropped_BP.float().mean() < 0.9
    row_C = torch.repeat_interleave(torch.arange(33), inputs[3].diff())
    own_times_C = copies_P[inputs[2]] > torch.tensor(
        [(inputs[2][row_C == b] == c).sum() for b, c in zip(row_C, inputs[2], strict=True)]
    )
    assert (dropped_BP[row_C, inputs[2]] & own_times_C).any()
    logits_C, rest_B = reference.similarity(*inputs, scale, copies_P)
    highest_B = torch.full((33,), -math.inf).scatter_reduce(0, row_C, logits_C, "amax")
    assert (highest_B - rest_B).max() > 30 or cosine_BP.max() * scale > 60


@pytest.mark.skipif(ON_GPU, reason="the GPU's cases take these tiles by themselves")
@pytest.mark.parametrize("name", ["SMALL", "LARGE", "FP32"])
def test_tiles_of_the_gpu_give_the_same_numbers(name, monkeypatch):
    tile = getattr(similarity_kernel, name)
    monkeypatch.setattr(similarity_kernel, "choose_tile", lambda *_: tile)
    dtype = "fp32" if name == "FP32" else "bf16"
    inputs, scale, copies_P, options = make_case(130, 300, 80, 3, dtype, 0.05, "all")
    truth = run(reference.similarity, inputs, scale, copies_P, options, torch.float64)
    check(run(triton_similarity, inputs, scale, copies_P, options), truth, dtype, scale)


def test_many_tiles_are_merged_in_blocks(monkeypatch):
    monkeypatch.setattr(similarity_kernel, "FINISH_TILES", 2)
    inputs, scale, copies_P, options = make_case(5, 257, 16, 2, "fp32", 0.01, "none")
    truth = run(oracle, inputs, scale, copies_P, options, torch.float64)
    check(run(triton_similarity, inputs, scale, copies_P, options, device=DEVICE), truth, "fp32", scale)


def test_a_positive_far_above_the_rest_does_not_drown_it():
    """Its logit is 200 above the others': shifted by it, they would all be 0 in fp32."""
    axes_DD = torch.eye(16, device=DEVICE)
    offsets, copies_P = torch.tensor([0, 1, 2]).int().to(DEVICE), torch.ones(16, dtype=torch.int32, device=DEVICE)
    leaf = axes_DD[:2].clone().requires_grad_()
    logits_C, rest_B = triton_similarity(leaf, axes_DD, torch.tensor([0, 1]).int().to(DEVICE), offsets, 200.0, copies_P)
    assert logits_C.tolist() == [200.0, 200.0]
    torch.testing.assert_close(rest_B, torch.full((2,), math.log(15), device=DEVICE))
    rest_B.sum().backward()
    torch.testing.assert_close(leaf.grad[0], 200.0 / 15 * (1 - axes_DD[0]))


def in_strides(vector: torch.Tensor) -> torch.Tensor:
    """The same values, every second place of a larger vector."""
    wide = torch.full((2 * len(vector),), 3, dtype=vector.dtype)
    wide[::2] = vector
    return wide[::2]


def test_vectors_in_strides():
    inputs, scale, copies_P, options = make_case(33, 130, 48, 8, "fp32", 0.05, "all")
    truth = run(oracle, inputs, scale, copies_P, options, torch.float64)
    strided = {
        name: tuple(map(in_strides, value)) if isinstance(value, tuple) else in_strides(value)
        for name, value in options.items()
    }
    vectors = (*inputs[:2], *map(in_strides, inputs[2:]))
    assert not vectors[2].is_contiguous()
    check(run(triton_similarity, vectors, scale, in_strides(copies_P), strided), truth, "fp32", scale)
    # One threshold for all rows.
    options["threshold_B"] = torch.tensor(0.55).expand(33)
    truth = run(oracle, inputs, scale, copies_P, options, torch.float64)
    check(run(triton_similarity, inputs, scale, copies_P, options), truth, "fp32", scale)


@pytest.mark.parametrize("scale_type", [torch.float64, torch.bfloat16, float])
def test_a_scale_of_any_type(scale_type):
    inputs, _, copies_P, _ = make_case(5, 9, 16, 2, "fp32", 0.5, "none")
    scale = 2.0 if scale_type is float else torch.tensor(2.0, dtype=scale_type, requires_grad=True)
    arguments = [x.to(DEVICE) for x in inputs]
    results = [similarity(*arguments, scale, copies_P.to(DEVICE), impl=impl) for impl in ("triton", "torch")]
    torch.testing.assert_close(*(rest_B for _, rest_B in results), check_dtype=False)
    if scale_type is not float:
        results[0][1][:-1].sum().backward()
        assert scale.grad is not None and scale.grad.dtype == scale_type


@pytest.mark.parametrize("mask", ["none", "threshold"])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_nan_never_looks_like_nothing_left(impl, mask):
    inputs, scale, copies_P, options = make_case(9, 40, 16, 2, "fp32", 0.05, mask)
    inputs[1][7] = math.nan
    copies_P[7] = 50  # some copy is always another row's
    moved = {name: value.to(DEVICE) for name, value in options.items()}
    _, rest_B = similarity(*(x.to(DEVICE) for x in inputs), scale, copies_P.to(DEVICE), **moved, impl=impl)
    assert rest_B.isnan().all()


def test_a_row_with_nothing_left_hands_no_gradient_on():
    inputs, scale, copies_P, options = make_case(5, 9, 16, 2, "fp32", 0.05, "require")
    query_BD = inputs[0].to(DEVICE).requires_grad_()
    moved = {name: tuple(x.to(DEVICE) for x in value) for name, value in options.items()}
    rest = [x.to(DEVICE) for x in inputs[1:]]
    _, rest_B = triton_similarity(query_BD, *rest, scale, copies_P.to(DEVICE), **moved)
    assert rest_B[0] == -math.inf and rest_B[1] > -math.inf
    rest_B.backward(torch.full_like(rest_B, math.nan))
    assert not query_BD.grad[0].any() and query_BD.grad[1].isnan().any()


@pytest.mark.parametrize("mask", MASKS)
def test_the_twin_equals_the_oracle_and_its_gradients_are_right(mask):
    inputs, scale, copies_P, options = make_case(6, 11, 16, 3, "fp32", 0.1, mask)
    truth = run(oracle, inputs, scale, copies_P, options, torch.float64)
    for value, expected in zip(
        run(reference.similarity, inputs, scale, copies_P, options, torch.float64), truth, strict=True
    ):
        torch.testing.assert_close(value, expected)

    def kept(query_BD, passage_PD, scale):
        logits_C, rest_B = reference.similarity(query_BD, passage_PD, *inputs[2:], scale, copies_P, **options)
        return logits_C, rest_B[rest_B > -math.inf]

    leaves = [x.double().requires_grad_() for x in (*inputs[:2], torch.tensor(scale))]
    assert torch.autograd.gradcheck(kept, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_passages_in_chunks_change_nothing(dtype):
    """Chunks are summed in fp32, so they cost no accuracy in any type."""
    inputs, scale, copies_P, options = make_case(33, 257, 48, 8, dtype, 0.02, "all")
    truth = run(oracle, inputs, scale, copies_P, options, torch.float64)
    whole = run(triton_similarity, inputs, scale, copies_P, options, device=DEVICE)

    def in_chunks(*args, **kwargs):
        return triton_similarity(*args, workspace_bytes=1, **kwargs)

    parts = run(in_chunks, inputs, scale, copies_P, options, device=DEVICE)
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1]) and torch.equal(parts[3], whole[3])
    assert relative(parts[2], truth[2]) <= 1.05 * relative(whole[2], truth[2]) + 1e-6


def test_equal_inputs_give_equal_bits():
    inputs, scale, copies_P, options = make_case(33, 257, 80, 8, "bf16", 0.02, "all")
    first, second = (run(triton_similarity, inputs, scale, copies_P, options, device=DEVICE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_permuted_passages_permute_their_gradient():
    inputs, scale, copies_P, options = make_case(9, 40, 16, 4, "fp32", 0.05, "exclude")
    order_P = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    place_P = torch.argsort(order_P)
    moved = (inputs[0], inputs[1][order_P], place_P[inputs[2]].int(), inputs[3])
    keys = {"exclude_keys": (options["exclude_keys"][0], options["exclude_keys"][1][order_P])}
    plain = run(triton_similarity, inputs, scale, copies_P, options, device=DEVICE)
    permuted = run(triton_similarity, moved, scale, copies_P[order_P], keys, device=DEVICE)
    assert relative(permuted[2], plain[2]) <= 1e-6 and relative(permuted[3], plain[3][order_P]) <= 1e-6


@pytest.mark.parametrize("mask", ["none", "all"])
def test_shares_of_the_rest_add_up_to_what_arrived(mask):
    """Forward and backward must leave out the same pairs: with p = e1 everywhere, dL/dq sums the shares themselves."""
    inputs, _, copies_P, options = make_case(33, 130, 16, 4, "fp32", 0.05, mask)
    query_BD = inputs[0].clone()
    passage_PD = inputs[1].clone()
    passage_PD[:, -1] = 1.0  # a constant column: its gradient in q is the sum of all shares
    query_BD[:, -1] = 0.0
    query_BD = query_BD.to(DEVICE).requires_grad_()
    options = {k: tuple(x.to(DEVICE) for x in v) if isinstance(v, tuple) else v.to(DEVICE) for k, v in options.items()}
    _, rest_B = triton_similarity(
        query_BD, passage_PD.to(DEVICE), *(x.to(DEVICE) for x in inputs[2:]), 20.0, copies_P.to(DEVICE), **options
    )
    some_B = rest_B > -math.inf
    assert some_B.any()
    arriving_B = torch.rand(len(rest_B), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    (rest_B[some_B] * arriving_B[some_B]).sum().backward()
    torch.testing.assert_close(query_BD.grad[some_B, -1], 20.0 * arriving_B[some_B], rtol=1e-5, atol=1e-5)
    assert not query_BD.grad[~some_B].any()


def test_inputs_in_strides_and_poisoned_memory(monkeypatch):
    """Every element that a kernel hands on was written by it: fresh memory is full of NaN."""
    # 78 values a row are padded: bulk copies want multiples of 16 bytes.
    inputs, scale, copies_P, options = make_case(33, 130, 78, 8, "fp32", 0.02, "all")
    truth = run(triton_similarity, inputs, scale, copies_P, options, device=DEVICE)
    strided = []
    for rows in inputs[:2]:
        wide = torch.full((len(rows), 156), math.nan)
        wide[:, ::2] = rows
        strided.append(wide.to(DEVICE)[:, ::2])
        assert not strided[-1].is_contiguous()
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(math.nan if out.is_floating_point() else 1 << 20)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    result = run(triton_similarity, (*strided, *inputs[2:]), scale, copies_P, options, device=DEVICE)
    for value, expected in zip(result, truth, strict=True):
        assert torch.equal(value, expected)


# Last-token gather.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 80, 576] + ([4096] if ON_GPU else []))
def test_gather_equals_the_oracle(dtype, width):
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(40, width, generator=generator).to(DTYPES[dtype]) * 3
    hidden_TD[17] = 0.0
    last_S = torch.tensor([0, 4, 17, 39])
    weight_SD = torch.randn(4, width, generator=generator, dtype=torch.float64)

    def both(call, hidden):
        leaf = hidden.detach().requires_grad_()
        out = call(leaf, last_S.to(leaf.device))
        (out.double().cpu() * weight_SD).sum().backward()
        return out.detach().double().cpu(), leaf.grad.double().cpu()

    truth, gradient = both(reference.gather_last_token, hidden_TD.double())
    out, result = both(lambda h, i: gather_last_token(h, i, impl="triton"), hidden_TD.to(DEVICE))
    assert relative(out, truth) <= 1e-6
    rounding = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 8e-3}[dtype]
    kept = torch.ones(40, dtype=torch.bool)
    kept[17] = False  # a zero row is divided by eps: its gradient is 1e12 large
    assert relative(result[kept], gradient[kept]) <= rounding
    assert not result[[t for t in range(40) if t not in last_S.tolist()]].any()
    if dtype == "fp32":
        assert relative(result[17], gradient[17]) <= 1e-5


def test_the_twin_of_the_gather_has_right_gradients():
    hidden_TD = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.gather_last_token, (hidden_TD, torch.tensor([1, 5])))


def test_rows_shorter_than_eps_are_divided_by_eps():
    hidden_TD = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * 1e-3
    weight_SD = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for impl in ("triton", "torch"):
        leaf = hidden_TD.clone().to(DEVICE).requires_grad_()
        out = gather_last_token(leaf, torch.tensor([1, 3], device=DEVICE), eps=0.1, impl=impl)
        (out * weight_SD).sum().backward()
        results.append((out.detach(), leaf.grad))
    assert 0 < results[0][0].norm(dim=1).max() < 0.5
    torch.testing.assert_close(*results)


def test_gather_of_rows_in_strides():
    hidden_TD = torch.randn(20, 32, device=DEVICE)[::2, ::2]
    last_S = torch.tensor([1, 5, 9, 7], device=DEVICE)[::2]
    torch.testing.assert_close(
        gather_last_token(hidden_TD, last_S, impl="triton"), reference.gather_last_token(hidden_TD, last_S)
    )


@pytest.mark.parametrize("mask", ["none", "exclude", "require", "threshold", "no_rest"])
def test_gather_and_similarity_in_one_call(mask):
    inputs, scale, copies_P, options = make_case(5, 9, 16, 2, "fp32", 0.05, mask)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (14,), generator=generator)
    last_S = (lengths.cumsum(0) - 1).to(DEVICE)
    hidden_TD = torch.randn(int(lengths.sum()), 16, generator=generator)
    if mask == "threshold":
        options["threshold_B"] = torch.zeros(5)  # half of random pairs
    options = {k: tuple(x.to(DEVICE) for x in v) if isinstance(v, tuple) else v.to(DEVICE) for k, v in options.items()}
    arguments = (last_S, *(x.to(DEVICE) for x in inputs[2:]), scale, None if copies_P is None else copies_P.to(DEVICE))
    results = []
    for impl in ("triton", "torch"):
        leaf = hidden_TD.clone().to(DEVICE).requires_grad_()
        logits_C, rest_B = gather_similarity(leaf, *arguments, **options, impl=impl)
        some_B = rest_B > -math.inf
        assert bool(some_B.any()) == (mask != "no_rest")
        (logits_C.square().sum() + rest_B[some_B].sum()).backward()
        results.append((logits_C.detach(), rest_B.detach(), leaf.grad))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-5)
    # The twin itself, so that a mask lost on the way shows.
    embeddings_SD = reference.gather_last_token(hidden_TD, last_S.cpu())
    plain = reference.similarity(embeddings_SD[:5], embeddings_SD[5:], *inputs[2:], scale, copies_P)[1]
    assert torch.allclose(plain, results[0][1].cpu()) == (mask in ("none", "no_rest"))


# Operators and the choice between kernel and twin.


def test_operators_keep_pytorch_s_contracts():
    from embed_kernels.last_token_kernel import last_token
    from embed_kernels.similarity_kernel import similarity as operator

    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    hidden_TD = torch.randn(6, 16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(last_token, (hidden_TD, torch.tensor([1, 5], device=DEVICE), 1e-12), test_utils=tests)
    inputs, scale, copies_P, options = make_case(5, 9, 16, 2, "fp32", 0.5, "exclude")
    query_BD, passage_PD = (x.to(DEVICE).requires_grad_() for x in inputs[:2])
    arguments = (
        query_BD, passage_PD, *(x.to(DEVICE) for x in inputs[2:]), 2,
        torch.tensor(scale, device=DEVICE), copies_P.to(DEVICE), *(x.to(DEVICE) for x in options["exclude_keys"]),
        None, None, None, 1 << 20,
    )  # fmt: skip
    torch.library.opcheck(operator, arguments, test_utils=tests)


def test_compiles_as_one_graph():
    inputs, scale, copies_P, _ = make_case(5, 9, 16, 2, "fp32", 0.5, "none")

    def loss(query_BD, passage_PD):
        logits_C, rest_B = similarity(
            query_BD,
            passage_PD,
            *(x.to(DEVICE) for x in inputs[2:]),
            scale,
            copies_P.to(DEVICE),
            max_group=2,
            impl="triton",
        )
        return logits_C.sum() + rest_B.sum()

    values = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().to(DEVICE).requires_grad_() for x in inputs[:2]]
        value = call(*leaves)
        value.backward()
        values.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b)


def test_impossible_choices_are_errors(monkeypatch):
    query_BD, offsets = torch.randn(2, 8), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="impl='cuda' must be auto, triton or torch"):
        gather_last_token(query_BD, offsets[:1], impl="cuda")
    with pytest.raises(ValueError, match="impl='triton' cannot run: it has no torch.float64"):
        gather_last_token(query_BD.double(), offsets[:1], impl="triton")
    with pytest.raises(ValueError, match="queries are torch.float32, passages torch.float64"):
        similarity(query_BD, query_BD.double(), offsets[:2], offsets, 1.0, None)
    with pytest.raises(ValueError, match="candidate_C is torch.int64, must be int32"):
        similarity(query_BD, query_BD, offsets[:2], offsets.int(), 1.0, None)
    indices = (offsets[:2].int(), offsets.int())
    # Also where no rest is asked for, and PyTorch does the work.
    with pytest.raises(ValueError, match="impl='bogus' must be auto, triton or torch"):
        similarity(query_BD, query_BD, *indices, 1.0, None, impl="bogus")
    with pytest.raises(ValueError, match="impl='triton' cannot run: it has no torch.float64"):
        similarity(query_BD.double(), query_BD.double(), *indices, 1.0, None, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._choose_once.cache_clear()
    with pytest.raises(ValueError, match="tensors are on the CPU"):
        gather_last_token(query_BD, offsets[:1], impl="triton")
    dispatch._choose_once.cache_clear()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate_C": [0, 1, 9]}, "candidate_C holds 9, must lie in 0..8"),
        ({"candidate_C": [0, -1, 2]}, "candidate_C holds -1, must lie in 0..8"),
        ({"candidate_C": [[0, 1, 2]]}, r"candidate_C has shape \(1, 3\), must be \('any',\)"),
        ({"group_offsets": [0, 3]}, r"group_offsets has shape \(2,\), must be \(3,\)"),
        ({"group_offsets": [1, 2, 3]}, "group_offsets must rise from 0 to the number of candidates, 3"),
        ({"group_offsets": [0, 4, 3]}, "group_offsets must rise"),
        ({"group_offsets": [0, 1, 2]}, "group_offsets must rise"),
        ({"copies_P": [1]}, r"copies_P has shape \(1,\), must be \(9,\)"),
        ({"max_group": 1}, "max_group=1 is less than the longest group, 2"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(impl, change, message):
    if ON_GPU and ("holds" in message or "rise" in message or "max_group" in change):
        pytest.skip("values are read on the CPU only")
    if impl == "torch" and "max_group" in change:
        pytest.skip("the twin does not use it")
    arguments = {"candidate_C": [0, 1, 2], "group_offsets": [0, 2, 3], "copies_P": [1] * 9} | change
    tensors = {
        name: value if isinstance(value, int) else torch.tensor(value, dtype=torch.int32, device=DEVICE)
        for name, value in arguments.items()
    }
    query_BD, passage_PD = torch.randn(2, 16, device=DEVICE), torch.randn(9, 16, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        similarity(query_BD, passage_PD, scale=2.0, **tensors, impl=impl)


def test_shapes_that_do_not_fit_are_errors():
    query_BD, passage_PD = torch.randn(2, 16), torch.randn(9, 16)
    rest = (torch.tensor([0, 1, 2]).int(), torch.tensor([0, 2, 3]).int(), 2.0, torch.ones(9).int())
    for width in (15, 17):
        with pytest.raises(ValueError, match=r"passage_PD has shape .*, must be \('any', 16\)"):
            similarity(query_BD, torch.randn(9, width), *rest)
    keys = (torch.zeros(2).int(), torch.zeros(9).int())
    for name in ("exclude_keys", "require_keys"):
        with pytest.raises(ValueError, match=rf"{name}\[0\] has shape \(9,\), must be \(2,\)"):
            similarity(query_BD, passage_PD, *rest, **{name: keys[::-1]})
    with pytest.raises(ValueError, match=r"threshold_B has shape \(1,\), must be \(2,\)"):
        similarity(query_BD, passage_PD, *rest, threshold_B=torch.zeros(1))
    with pytest.raises(ValueError, match=r"scale has shape \(2,\), must be one number"):
        similarity(query_BD, passage_PD, *rest[:2], torch.ones(2), rest[3])
    with pytest.raises(ValueError, match="copies_P is on meta, must be on cpu"):
        similarity(query_BD, passage_PD, *rest[:3], torch.ones(9, device="meta").int())
    with pytest.raises(ValueError, match="last_token_S holds 2, must lie in 0..1"):
        gather_last_token(query_BD, torch.tensor([2]))
    with pytest.raises(ValueError, match=r"hidden_TD has shape \(1, 2, 16\)"):
        gather_last_token(query_BD[None], torch.tensor([1]))
    with pytest.raises(ValueError, match="group_offsets names 2 queries, last_token_S 1 sequences"):
        gather_similarity(query_BD, torch.tensor([1]), *rest)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_without_passages_or_rows(impl):
    none = torch.empty(0, dtype=torch.int32, device=DEVICE)
    query_BD = torch.randn(2, 16, device=DEVICE)
    logits_C, rest_B = similarity(query_BD, query_BD[:0], none, torch.zeros(3).int().to(DEVICE), 2.0, none, impl=impl)
    assert len(logits_C) == 0 and rest_B.tolist() == [-math.inf] * 2
    offsets = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    ones = torch.ones(2, dtype=torch.int32, device=DEVICE)
    logits_C, rest_B = similarity(query_BD[:0], query_BD, none, offsets, 2.0, ones, impl=impl)
    assert len(logits_C) == 0 and len(rest_B) == 0


def test_the_choice_is_logged_once(caplog):
    dispatch._choose_once.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(3):
            gather_last_token(torch.randn(2, 8), torch.tensor([1]))
    assert len(caplog.records) == 1 and "last-token gather kernel: torch (asked for: auto" in caplog.text
