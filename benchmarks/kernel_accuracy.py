"""How much of the loss and its gradient is lost to rounding: bf16 logits as most trainers have them, against ours.

Synthetic embeddings of low rank, as trained ones are, on which the rest of the batch has weight in the softmax
(kernel_data.py). Truth is fp64 on the same (already rounded) inputs. Without a GPU the kernel runs in Triton's
interpreter on a small problem; with one, at 512 x 4096 x 4096. Exits 3 where the kernel is further off than rounding
explains.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined

from kernel_data import (  # noqa: E402
    GROUP,
    Exact,
    find_faults,
    info_nce,
    loss_errors,
    make_embeddings,
    make_primitive,
    rest_error,
    solve_exactly,
)

ROWS, WIDTH, RANK = (512, 4096, 96) if ON_GPU else (24, 128, 24)
PASSAGES = ROWS * GROUP
DEVICE = "cuda" if ON_GPU else "cpu"


def bf16_logits(inputs: Sequence[Tensor], scale: float, exact: Exact) -> dict[str, float]:
    """As FlagEmbedding computes it: the product in bf16, divided by the temperature in bf16, softmax in fp32."""

    def loss(query_BD: Tensor, passage_PD: Tensor) -> Tensor:
        temperature = torch.tensor(1 / scale, dtype=torch.bfloat16, device=query_BD.device)
        scores_BP = (query_BD @ passage_PD.T) / temperature
        target_B = torch.arange(len(query_BD), device=query_BD.device) * GROUP
        return torch.nn.functional.cross_entropy(scores_BP.float(), target_B)

    return loss_errors(loss, inputs, exact)


def kernel(inputs: Sequence[Tensor], scale: float, exact: Exact) -> dict[str, float]:
    primitive = make_primitive(ROWS, PASSAGES, scale, DEVICE, impl="triton")
    errors = loss_errors(lambda query_BD, passage_PD: info_nce(*primitive(query_BD, passage_PD)), inputs, exact)
    return errors | {"rest_lse": rest_error(primitive(*inputs)[1], exact)}


def errors_by_way() -> Iterator[dict[str, Any]]:
    """For each temperature and way: loss, dq and dc relative, the rest's log-sum-exp absolute."""
    for temperature in (0.05, 0.02, 0.01):
        scale = 1 / temperature
        inputs = make_embeddings(ROWS, PASSAGES, WIDTH, scale, torch.bfloat16, DEVICE, rank=RANK)
        exact = solve_exactly(*inputs, scale)
        shown = {"temperature": temperature, "rest_share": exact.rest_share}
        yield {"way": "bf16 logits (eager)", **shown, **bf16_logits(inputs, scale, exact), "faults": []}
        for dtype in (torch.bfloat16, torch.float32):
            errors = kernel([x.to(dtype) for x in inputs], scale, exact)
            way = f"kernel, {'bf16' if dtype == torch.bfloat16 else 'fp32'} inputs"
            yield {"way": way, **shown, **errors, "faults": find_faults(errors, dtype, scale)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the table to")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    print(f"{ROWS} x {PASSAGES} x {WIDTH}, {'GPU' if ON_GPU else 'interpreter'}; errors against fp64")
    print("way                   temperature  rest's share   loss      dq        dc        rest_lse")
    for r in errors_by_way():
        rows.append(r)
        rest = f"{r['rest_lse']:8.1e}" if "rest_lse" in r else ""
        print(
            f"{r['way']:21} {r['temperature']:<11} {r['rest_share']:12.2f}   {r['loss']:8.1e}  {r['dq']:8.1e}  "
            f"{r['dc']:8.1e}  {rest}  {'; '.join(r['faults'])}",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps({"on_gpu": ON_GPU, "rows": rows}, indent=2) + "\n")
    return 3 if any(r["faults"] for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
