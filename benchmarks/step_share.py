"""What share of a training step the two kernels are: one line, measured.

A Mistral-7B with random weights and LoRA encodes one chunk (no graph, then with one), the loss is taken at 512 queries
x 4,096 passages, and the step is reckoned for 512 queries of 512 tokens and 4,096 passages of 256. Without a GPU a tiny
model stands in, so that every line of this runs: the figures then mean nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModel, MistralConfig

from embed_kernels import similarity
from pipeline.model.attention import register_packed_attention
from pipeline.model.encoder import Encoder, add_lora
from pipeline.settings import LoraSettings

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
QUERIES, GROUP, STEP_TOKENS = 512, 8, 512 * 512 + 4096 * 256


def build_encoder() -> Encoder:
    """Random weights; the architecture is all that time depends on."""
    sizes = {} if ON_GPU else {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, sliding_window=None)
    attention = register_packed_attention("auto", True, DEVICE, "bf16", None)
    with torch.device(DEVICE):
        decoder = AutoModel.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    decoder.requires_grad_(False)
    encoder = Encoder(decoder, "last")
    add_lora(encoder, LoraSettings())
    return encoder.to(DEVICE).train()


def seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    if ON_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if ON_GPU:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def time_chunk(encoder: Encoder, num_tokens: int, length: int) -> float:
    """Seconds of both passes over a chunk of sequences of one length."""
    ids_T = torch.randint(0, 1000, (num_tokens,), device=DEVICE)
    positions_T = torch.arange(num_tokens, device=DEVICE) % length
    cu_seqlens = torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device=DEVICE)

    def both() -> None:
        with torch.no_grad():
            encoder(ids_T, positions_T, cu_seqlens, length)
        encoder(ids_T, positions_T, cu_seqlens, length).sum().backward()

    return seconds(both, 3)


def time_loss(width: int, dtype: torch.dtype) -> float:
    """Seconds of similarity and InfoNCE, forward and backward."""
    candidates = QUERIES * GROUP
    integers = {"dtype": torch.int32, "device": DEVICE}
    query, passage = (torch.randn(n, width, device=DEVICE) for n in (QUERIES, candidates))
    leaves = [torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_() for x in (query, passage)]
    own = torch.arange(candidates, **integers)  # type: ignore[call-overload]
    offsets = torch.arange(0, candidates + 1, GROUP, **integers)  # type: ignore[call-overload]
    copies = torch.ones(candidates, **integers)  # type: ignore[call-overload]

    def loss() -> None:
        logits_C, rest_B = similarity(leaves[0], leaves[1], own, offsets, 50.0, copies, max_group=GROUP)
        group = logits_C.view(-1, GROUP)
        (torch.logaddexp(rest_B, torch.logsumexp(group, 1)) - group[:, 0]).mean().backward()

    return seconds(loss, 10 if ON_GPU else 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--chunk-tokens", type=int, default=16384 if ON_GPU else 512)
    arguments = parser.parse_args(argv)
    encoder = build_encoder()
    width = encoder.decoder.config.hidden_size
    of_chunk = time_chunk(encoder, arguments.chunk_tokens, 256)
    step = of_chunk / arguments.chunk_tokens * STEP_TOKENS
    losses = {name: time_loss(width, t) for name, t in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    found = {
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu (dry run)",
        "width": width,
        "tokens_per_second": arguments.chunk_tokens / of_chunk,
        "step_seconds": step,
        "loss_seconds": losses,
        "share": {name: value / step for name, value in losses.items()},
    }
    print(
        f"{found['device']}: step {step:.1f} s, loss fp32 {losses['fp32'] * 1e3:.2f} ms "
        f"({losses['fp32'] / step:.1e} of the step), bf16 {losses['bf16'] * 1e3:.2f} ms"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
