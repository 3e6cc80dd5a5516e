"""What share of a training step the loss kernel is: one line, measured.

A Mistral-7B with random weights and LoRA encodes one chunk (no graph, then with one), the loss is taken at 512 queries
x 4,096 passages, and the step is reckoned for 512 queries of 512 tokens and 4,096 passages of 256. The chunk holds
4,096 tokens: without activation checkpointing each costs about 0.2 MiB a layer, 26 GiB in all beside 14 GiB of weights.
Parameters are bf16, adapters too, as DeepSpeed makes them in training. Without a GPU a tiny model stands in, so that
every line of this runs: the figures then mean nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_data import GROUP, info_nce, make_embeddings, make_primitive
from transformers import AutoModel, MistralConfig

from pipeline.model.attention import register_packed_attention
from pipeline.model.encoder import Encoder, add_lora
from pipeline.settings import LoraSettings

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
QUERIES, STEP_TOKENS, SCALE = 512, 512 * 512 + 4096 * 256, 50.0
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_encoder(attention: str) -> Encoder:
    """Random weights; the architecture is all that time depends on."""
    sizes: dict[str, Any] = {} if ON_GPU else {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, sliding_window=None)
    with torch.device(DEVICE):
        decoder = AutoModel.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    decoder.requires_grad_(False)
    encoder = Encoder(decoder, "last")
    add_lora(encoder, LoraSettings())
    for parameter in encoder.parameters():
        parameter.data = parameter.data.to(DEVICE, torch.bfloat16)
    return encoder.train()


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
    leaves = [x.requires_grad_() for x in make_embeddings(QUERIES, QUERIES * GROUP, width, SCALE, dtype, DEVICE)]
    primitive = make_primitive(QUERIES, QUERIES * GROUP, SCALE, DEVICE, "auto")
    return seconds(lambda: torch.autograd.grad(info_nce(*primitive(*leaves)), leaves), 10 if ON_GPU else 1)


def slower_than_production(attention: str) -> str:
    """Why the step's seconds are an upper bound here, or nothing."""
    if not ON_GPU:
        return "a dry run without a GPU: the figures mean nothing"
    if attention.startswith("packed_fa_"):
        return ""
    return f"flash-attn is absent, {attention} runs: the step is slower than production's, the loss's share smaller"


def measure(chunk_tokens: int) -> dict[str, Any]:
    attention = register_packed_attention("auto", True, DEVICE, "bf16", None)
    encoder = build_encoder(attention)
    width = encoder.width
    of_chunk = time_chunk(encoder, chunk_tokens, 256)
    peak = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None
    del encoder
    step = of_chunk / chunk_tokens * STEP_TOKENS
    losses = {name: time_loss(width, dtype) for name, dtype in TYPES.items()}
    return {
        "card": torch.cuda.get_device_name() if ON_GPU else "cpu (dry run)",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "width": width,
        "chunk_tokens": chunk_tokens,
        "activation_checkpointing": False,
        "peak_gib": peak,
        "attention": attention,
        "note": slower_than_production(attention),
        "tokens_per_second": chunk_tokens / of_chunk,
        "step_seconds": step,
        "loss_seconds": losses,
        "share": {name: value / step for name, value in losses.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--chunk-tokens", type=int, default=4096 if ON_GPU else 512)
    arguments = parser.parse_args(argv)
    found = measure(arguments.chunk_tokens)
    losses, share = found["loss_seconds"], found["share"]
    print(
        f"{found['card']}: step {found['step_seconds']:.1f} s (attention: {found['attention']}), loss fp32 "
        f"{losses['fp32'] * 1e3:.2f} ms ({share['fp32']:.1e} of the step), bf16 {losses['bf16'] * 1e3:.2f} ms "
        f"({share['bf16']:.1e})"
    )
    if found["note"]:
        print(found["note"])
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
