"""Sequences behind a shared prefix == whole sequences, for each model family; who cannot share one says so."""

import dataclasses

import pytest
import torch
from test_encoder import FAMILIES, SMALL, make_model, pack
from transformers import MistralConfig

from pipeline.model.attention import _sdpa_lse
from pipeline.model.encoder import add_lora, load_encoder, trainable_parameters, why_no_prefix
from pipeline.model.prefix import Prefix, attend_prefix, attend_rows, attend_rows_plainly, merge
from pipeline.settings import LoraSettings, ModelSettings

LENGTHS = (9, 1, 5, 12)
SHARED = 7


def load(config, folder, **settings):
    encoder = load_encoder(ModelSettings(name=make_model(config, folder), dtype="fp32", **settings), (), ())
    add_lora(encoder, LoraSettings(rank=2, alpha=4))
    torch.manual_seed(1)
    for p in trainable_parameters(encoder).values():
        torch.nn.init.normal_(p, std=0.1)
    return encoder.eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
@torch.no_grad()
def test_sequences_behind_a_prefix_are_those_that_begin_with_it(family, tmp_path):
    config = FAMILIES[family] if family != "mistral" else MistralConfig(**SMALL, sliding_window=64)
    encoder = load(config, tmp_path)
    assert why_no_prefix(encoder, SHARED + max(LENGTHS)) == ""
    start_P, ids_T = torch.randint(0, 100, (SHARED,)), torch.randint(0, 100, (sum(LENGTHS),))
    prefix, edges = Prefix(SHARED), torch.tensor([0, SHARED], dtype=torch.int32)
    encoder(start_P, torch.arange(SHARED), edges, SHARED, prefix)
    assert prefix.is_full and sorted(prefix.keys) == [0, 1] and prefix.num_bytes == 2 * 2 * SHARED * 2 * 8 * 4
    positions_T, cu_seqlens = pack(LENGTHS)
    for _ in range(2):  # it serves any number of chunks
        shared_SD = encoder(ids_T, positions_T + SHARED, cu_seqlens, max(LENGTHS), prefix)
    whole = [torch.cat([start_P, part]) for part in ids_T.split(LENGTHS)]
    positions_T, cu_seqlens = pack([len(part) for part in whole])
    whole_SD = encoder(torch.cat(whole), positions_T, cu_seqlens, SHARED + max(LENGTHS))
    torch.testing.assert_close(shared_SD, whole_SD, atol=2e-6, rtol=0)
    without_SD = encoder(ids_T, *pack(LENGTHS), max(LENGTHS))
    assert (without_SD - whole_SD).abs().max() > 1e-2, "the prefix does nothing, so this compared nothing"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_attention_in_two_parts_is_attention_in_one(dtype, tolerance):
    """Against one softmax over all keys, written out, in fp64."""
    torch.manual_seed(0)
    heads, kv_heads, width, scale = 6, 2, 16, 0.3
    query, key, value = (torch.randn(sum(LENGTHS), n, width).to(dtype) for n in (heads, kv_heads, kv_heads))
    shared_key, shared_value = (torch.randn(SHARED, kv_heads, width).to(dtype) for _ in range(2))
    cu_seqlens = pack(LENGTHS)[1]
    call = FakeCall(cu_seqlens, max(LENGTHS), scale)
    got = merge(*_sdpa_lse(query, key, value, call), *attend_prefix(query, shared_key, shared_value, scale))
    for s, length in enumerate(LENGTHS):
        own = slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
        for h in range(heads):
            g = h * kv_heads // heads
            keys = torch.cat([shared_key[:, g], key[own, g]]).double()
            values = torch.cat([shared_value[:, g], value[own, g]]).double()
            scores = query[own, h].double() @ keys.T * scale
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores[:, SHARED:] = scores[:, SHARED:].masked_fill(later, float("-inf"))
            wanted = scores.softmax(-1) @ values
            torch.testing.assert_close(got[own, h].double(), wanted, atol=tolerance, rtol=tolerance)


@dataclasses.dataclass
class FakeCall:
    cu_seqlens: torch.Tensor
    max_seqlen: int
    scale: float


@pytest.mark.parametrize("causal", [False, True])
def test_the_cpu_kernel_and_plain_operations_agree(causal):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 3, 11, 8) for _ in range(3))
    for got, wanted in zip(
        attend_rows(query, key, value, 0.4, causal), attend_rows_plainly(query, key, value, 0.4, causal), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "family, settings, words",
    [
        ("llama", {"attention": "bidirectional"}, "the model attends both ways"),
        ("llama", {"pooling": "mean"}, "mean pooling reads the prefix's own outputs"),
        ("gemma2", {}, "the model caps attention scores"),
        ("mistral", {}, "prompts of 19 tokens are longer than the model's window of 4"),
    ],
)
def test_who_cannot_share_a_prefix_says_why(family, settings, words, tmp_path):
    assert words in why_no_prefix(load(FAMILIES[family], tmp_path, **settings), 19)
