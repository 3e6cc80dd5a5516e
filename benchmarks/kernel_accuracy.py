"""How much of the loss and its gradient is lost to rounding: bf16 logits as most trainers have them, against ours.

Synthetic embeddings of low rank, like trained ones: alike to the positive, less to hard negatives, little to others.
Truth is fp64 on the same (already rounded) inputs. Without a GPU the kernel runs in Triton's interpreter on a small
problem; with one, at 512 x 4096 x 4096.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined

from embed_kernels import similarity  # noqa: E402

ROWS, GROUP, WIDTH, RANK = (512, 8, 4096, 96) if ON_GPU else (24, 8, 128, 24)
DEVICE = "cuda" if ON_GPU else "cpu"


def make_embeddings(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows: queries [B, D] and candidates [B * G, D]; candidate b * G is the positive of row b."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator))[0].T
    common = torch.randn(RANK, generator=generator)

    def draw(count: int) -> Tensor:
        return torch.randn(count, RANK, generator=generator)

    topic = draw(ROWS)
    query = 0.8 * common + topic + 0.5 * draw(ROWS)
    closeness = torch.tensor([1.0, *[0.8] * (GROUP - 1)])[None, :, None]
    noise = torch.tensor([0.5, *[0.8] * (GROUP - 1)])[None, :, None]
    candidate = 0.8 * common + closeness * topic[:, None] + noise * draw(ROWS * GROUP).view(ROWS, GROUP, RANK)
    return tuple(torch.nn.functional.normalize(x.reshape(-1, RANK) @ basis, dim=1) for x in (query, candidate))  # type: ignore[return-value]


def dense(query: Tensor, candidate: Tensor, scale: float) -> Tensor:
    """InfoNCE over all candidates in the type of the inputs."""
    scores = (query @ candidate.T) * scale
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(query), device=query.device) * GROUP)


def bf16_logits(query: Tensor, candidate: Tensor, scale: float) -> Tensor:
    """As FlagEmbedding computes it: the product in bf16, divided by the temperature in bf16, softmax in fp32."""
    scores = (query @ candidate.T) / torch.tensor(1 / scale, dtype=torch.bfloat16, device=query.device)
    return torch.nn.functional.cross_entropy(scores.float(), torch.arange(len(query), device=query.device) * GROUP)


def ours(query: Tensor, candidate: Tensor, scale: float) -> Tensor:
    num_candidates = len(candidate)
    integers = {"dtype": torch.int32, "device": query.device}
    logits_C, rest_B = similarity(
        query,
        candidate,
        torch.arange(num_candidates, **integers),  # type: ignore[call-overload]
        torch.arange(0, num_candidates + 1, GROUP, **integers),  # type: ignore[call-overload]
        scale,
        torch.ones(num_candidates, **integers),  # type: ignore[call-overload]
        max_group=GROUP,
        impl="triton",
    )
    group = logits_C.view(-1, GROUP)
    return (torch.logaddexp(rest_B, torch.logsumexp(group, 1)) - group[:, 0]).mean()


def measure(loss: Callable[[Tensor, Tensor, float], Tensor], inputs: Sequence[Tensor], scale: float) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(leaves[0], leaves[1], scale)
    value.backward()
    return [value.detach().double(), *(leaf.grad.double() for leaf in leaves)]  # type: ignore[union-attr]


def table() -> list[dict[str, object]]:
    """Relative errors of loss, dq and dc for each way and temperature."""
    inputs = [x.to(DEVICE, torch.bfloat16) for x in make_embeddings()]
    wide = [x.float() for x in inputs]
    ways = {
        "bf16 logits (eager)": (bf16_logits, inputs),
        "kernel, bf16 inputs": (ours, inputs),
        "kernel, fp32 inputs": (ours, wide),
    }
    rows: list[dict[str, object]] = []
    for temperature in (0.05, 0.02, 0.01):
        truth = measure(dense, [x.double() for x in inputs], 1 / temperature)
        for name, (loss, given) in ways.items():
            found = measure(loss, given, 1 / temperature)
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
            rows.append(
                {"way": name, "temperature": temperature, **dict(zip(("loss", "dq", "dc"), errors, strict=True))}
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the table to")
    arguments = parser.parse_args(argv)
    rows = table()
    print(f"{ROWS} x {ROWS * GROUP} x {WIDTH}, {'GPU' if ON_GPU else 'interpreter'}; relative errors against fp64")
    print("way                   temperature   loss      dq        dc")
    for r in rows:
        print(f"{r['way']:21} {r['temperature']:<12} {r['loss']:8.1e}  {r['dq']:8.1e}  {r['dc']:8.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"on_gpu": ON_GPU, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
