"""Embeddings on which a kernel's faults show, and the exact answers on them: what the benchmarks check against.

Where positives are far more alike than all others, the rest of the batch has no weight in the softmax, and a kernel
that leaves it out passes any check of loss and gradient. Here positives are only a little more alike than what all
texts share, and the rest's share of the softmax is asserted.
B rows, P passages, G own candidates of a row (row b owns passages b * G to b * G + G - 1, the first is its positive),
D width, N passages picked.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embed_kernels import Impl, similarity

GROUP = 8
RANK = 96  # directions that embeddings vary in, as in trained ones
MIN_REST_SHARE = 0.3
PIECE = 8192  # passages held in fp64 at a time
PICKED = 64

Loss = Callable[[Tensor, Tensor], Tensor]


def make_embeddings(
    rows: int,
    passages: int,
    width: int,
    scale: float,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    rank: int = RANK,
) -> tuple[Tensor, Tensor]:
    """query_BD and passage_PD, unit rows; half of each is a direction common to all. `scale` is 1 / temperature."""
    generator, rank = torch.Generator(device).manual_seed(seed), min(rank, width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def finish(mixed: Tensor) -> Tensor:
        return torch.nn.functional.normalize((common + mixed) @ basis, dim=1).to(dtype)

    # Orthonormal, so that similarities are spread alike at every width.
    basis = torch.linalg.qr(draw(width, rank))[0].T
    common, topic = draw(rank), draw(rows, rank)
    query_BD = finish(topic)
    passage_PD = torch.empty(passages, width, device=device, dtype=dtype)
    # Of own candidates to their row. At a low temperature it takes less for the positive to outweigh all others.
    closeness = 0.4 if scale <= 50 else 0.32
    closeness_G = torch.tensor([closeness, *[0.8 * closeness] * (GROUP - 1)], device=device)[:, None]
    for start in range(0, passages, PIECE):
        mixed = draw(min(PIECE, passages - start), rank)
        own = topic[start // GROUP : (start + len(mixed)) // GROUP]
        noise = mixed[: len(own) * GROUP].view(-1, GROUP, rank)
        mixed[: len(own) * GROUP] = (closeness_G * own[:, None] + (1 - closeness_G**2).sqrt() * noise).flatten(0, 1)
        passage_PD[start : start + len(mixed)] = finish(mixed)
    return query_BD, passage_PD


def info_nce(logits_C: Tensor, rest_B: Tensor) -> Tensor:
    """Mean loss from what `similarity` returns."""
    own_BG = logits_C.view(-1, GROUP)
    return (torch.logaddexp(rest_B, torch.logsumexp(own_BG, 1)) - own_BG[:, 0]).mean()


def make_primitive(
    rows: int, passages: int, scale: float, device: str, impl: Impl
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`similarity` of these groups: (query_BD, passage_PD) -> logits_C, rest_B."""
    candidate_C = torch.arange(rows * GROUP, dtype=torch.int32, device=device)
    offsets = torch.arange(0, rows * GROUP + 1, GROUP, dtype=torch.int32, device=device)
    copies_P = torch.ones(passages, dtype=torch.int32, device=device)

    def primitive(query_BD: Tensor, passage_PD: Tensor) -> tuple[Tensor, Tensor]:
        return similarity(query_BD, passage_PD, candidate_C, offsets, scale, copies_P, max_group=GROUP, impl=impl)

    return primitive


@dataclass(frozen=True)
class Exact:
    """In fp64 on the same, already rounded, inputs."""

    loss: float
    rest_share: float  # of the softmax, mean over rows
    rest_B: Tensor  # log-sum-exp over all but the own group
    grad_query_BD: Tensor
    picked: tuple[Tensor, ...]  # indices of passages: positives, others
    grad_passage: tuple[Tensor, ...]  # [N, D] for each of them


def _rest_logits(query_BD: Tensor, passage_PD: Tensor, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    """A piece of the passages and its logits, the own groups at -inf."""
    row_B = torch.arange(len(query_BD), device=query_BD.device)
    for start in range(0, len(passage_PD), PIECE):
        piece = passage_PD[start : start + PIECE].double()
        owner = torch.arange(start, start + len(piece), device=piece.device) // GROUP
        yield piece, (query_BD @ piece.T * scale).masked_fill_(owner[None] == row_B[:, None], float("-inf"))


def solve_exactly(query_BD: Tensor, passage_PD: Tensor, scale: float) -> Exact:
    """InfoNCE and its gradients; asserts that the rest has weight enough for its absence to be seen."""
    query_BD, rows = query_BD.double(), len(query_BD)
    own_BGD = passage_PD[: rows * GROUP].double().view(rows, GROUP, -1)
    own_BG = torch.einsum("bd,bgd->bg", query_BD, own_BGD) * scale
    rest_B = torch.full_like(own_BG[:, 0], float("-inf"))
    for _, logits in _rest_logits(query_BD, passage_PD, scale):
        rest_B = torch.logaddexp(rest_B, torch.logsumexp(logits, 1))
    total_B = torch.logaddexp(rest_B, torch.logsumexp(own_BG, 1))
    rest_share = float(torch.exp(rest_B - total_B).mean())
    assert rest_share >= MIN_REST_SHARE, f"the rest has {rest_share:.2g} of the softmax: these inputs hide its absence"
    weight_BG = torch.exp(own_BG - total_B[:, None])
    weight_BG[:, 0] -= 1
    grad_query_BD = torch.einsum("bg,bgd->bd", weight_BG, own_BGD)
    for piece, logits in _rest_logits(query_BD, passage_PD, scale):
        grad_query_BD += torch.exp(logits - total_B[:, None]) @ piece
    place_N = torch.linspace(0, rows - 1, min(PICKED, rows), device=query_BD.device).long()
    other_N = torch.linspace(1, len(passage_PD) - 1, min(PICKED, rows), device=query_BD.device).long()
    picked = (place_N * GROUP, other_N[other_N % GROUP != 0])
    gradients = []
    for index_N in picked:
        weight_BN = torch.exp(query_BD @ passage_PD[index_N].double().T * scale - total_B[:, None])
        is_positive_BN = index_N[None] == torch.arange(rows, device=index_N.device)[:, None] * GROUP
        gradients.append((weight_BN - is_positive_BN.double()).T @ query_BD * (scale / rows))
    loss = float((total_B - own_BG[:, 0]).mean())
    return Exact(loss, rest_share, rest_B, grad_query_BD * (scale / rows), picked, tuple(gradients))


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def loss_errors(loss: Loss, inputs: Sequence[Tensor], exact: Exact) -> dict[str, float]:
    """Relative errors of loss, dq and dc (the worse of positives and others)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(leaves[0], leaves[1])
    grad_query_BD, grad_passage_PD = torch.autograd.grad(value, leaves)
    of_passages = (_relative(grad_passage_PD[i], g) for i, g in zip(exact.picked, exact.grad_passage, strict=True))
    return {
        "loss": abs(float(value.detach()) / exact.loss - 1),
        "dq": _relative(grad_query_BD, exact.grad_query_BD),
        "dc": max(of_passages),
    }


def rest_error(rest_B: Tensor, exact: Exact) -> float:
    """Largest absolute error of the rest's log-sum-exp."""
    return float((rest_B.detach().double() - exact.rest_B).abs().max())


def error_limits(dtype: torch.dtype, scale: float) -> dict[str, float]:
    """What a right kernel stays under, for the errors that `loss_errors` and `rest_error` give.

    A cosine over 4,096 dimensions may be off by 2e-5 where tensor cores sum it (they cut off at every step), by 2e-6
    in fp32. Gradients are rounded to the inputs' type.
    """
    of_cosine, of_gradient = (2e-6, 1e-4) if dtype == torch.float32 else (2e-5, 6e-3)
    return {"loss": of_cosine * scale, "rest_lse": of_cosine * scale, "dq": of_gradient, "dc": of_gradient}


def find_faults(errors: dict[str, float], dtype: torch.dtype, scale: float) -> list[str]:
    """One line for each error beyond its limit; NaN is beyond any."""
    limits = error_limits(dtype, scale)
    return [f"{name} is off by {errors[name]:.1e} (limit {limits[name]:.1e})" for name in limits
            if not errors[name] <= limits[name]]  # fmt: skip
