"""Packed reranker == loops over a padded batch, scores and gradients; what runs, what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from dense_reranker import Pair, dense_scores
from launching import REPOSITORY, launch, require_success
from tiny_run import sharding_config
from tokenizers import Tokenizer, models
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, PretrainedConfig

from pipeline.model.encoder import add_lora
from pipeline.model.flop import pair_flop
from pipeline.model.reranker import Reranker, load_reranker, yes_token
from pipeline.model.shapes import ModelShape, read_shape
from pipeline.settings import LoraSettings, ModelSettings

DEPTH, YES = 4, 7
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
# Windows of 4 tokens are shorter than the pairs below, before and after a merge. Caps are low enough to bend.
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral_window": MistralConfig(**SMALL, sliding_window=4),
    "gemma2": Gemma2Config(
        **SMALL,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
}
# Tokens of query, passage and prompt: passages shorter than each ratio, of one token, and none at all.
PAIRS = ((3, 17, 2), (1, 1, 3), (4, 6, 1), (2, 0, 2), (0, 9, 4))
REDUCTIONS = [((), 1), *(((layers), ratio) for layers in ((2,), (1, 3)) for ratio in (1, 2, 4, 8))]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Family -> folder of a random causal model; each is written once."""
    folders = {}

    def write(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(folders[family])
        return str(folders[family])

    return write


def make_reranker(folder: str, first_exit: int = 1, **settings) -> Reranker:
    reranker = load_reranker(ModelSettings(name=folder, dtype="fp32", **settings), YES, first_exit)
    torch.manual_seed(1)
    for row_D in reranker.heads.weight_HD.data:  # each its own, so that a wrong one shows
        row_D.normal_(std=0.3)
    return reranker


def make_pairs() -> list[Pair]:
    draw = torch.Generator().manual_seed(2)
    return [
        Pair(torch.randint(0, 60, (sum(parts),), generator=draw).tolist(), parts[0], parts[0] + parts[1])
        for parts in PAIRS
    ]


def packed_scores(reranker, pairs, exits=None, layers=(), ratio=1):
    cu_seqlens = np.cumsum([0, *(len(pair.ids) for pair in pairs)], dtype=np.int32)
    spans = np.array([(pair.start, pair.stop) for pair in pairs])
    ids_T = torch.tensor([i for pair in pairs for i in pair.ids])
    return reranker(ids_T, reranker.plan(cu_seqlens, spans, exits, layers, ratio))


def gradients(reranker, scores):
    """Of a random sum of the scores, for all that trains."""
    weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3))
    reranker.zero_grad()
    (scores * weight).sum().backward()
    return {name: p.grad.clone() for name, p in reranker.named_parameters() if p.grad is not None}


def assert_same(found, wanted):
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(("layers", "ratio"), REDUCTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_dense(family, layers, ratio, folder_of):
    """All exits of one call; gradients of the heads and of every weight of the decoder but the table."""
    reranker = make_reranker(folder_of(family))
    reranker.decoder.layers.requires_grad_(True)
    reranker.decoder.norm.requires_grad_(True)
    pairs = make_pairs()
    packed, dense = packed_scores(reranker, pairs, None, layers, ratio), None
    found = gradients(reranker, packed)
    dense = dense_scores(reranker, pairs, reranker.exits, layers, ratio)
    wanted = gradients(reranker, dense)
    assert packed.shape == (len(pairs), DEPTH) and packed.dtype == torch.float32
    for s in range(len(pairs)):
        assert_same(packed[s], dense[s])
    assert found.keys() == wanted.keys() and len(found) > 9 * DEPTH
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("k", range(1, DEPTH + 1))
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_one_exit_gives_its_column_and_runs_nothing_above(family, k, folder_of):
    reranker = make_reranker(folder_of(family))
    reranker.decoder.layers.requires_grad_(True)
    calls = []
    for i, layer in enumerate(reranker.decoder.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    pairs, reduction = make_pairs(), ((1, 3), 2)
    packed = packed_scores(reranker, pairs, (k,), *reduction)
    assert calls == list(range(k)) and reranker.decoder.config.num_hidden_layers == DEPTH
    found = gradients(reranker, packed)
    dense = dense_scores(reranker, pairs, (k,), *reduction)
    wanted = gradients(reranker, dense)
    assert_same(packed, dense)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_exits_with_gaps_and_heads_of_the_upper_layers_only(folder_of):
    reranker = make_reranker(folder_of("llama"), first_exit=2)
    assert reranker.exits == (2, 3, 4)
    pairs = make_pairs()
    packed = packed_scores(reranker, pairs, (4, 2), (2, 3), 2)
    assert_same(packed, dense_scores(reranker, pairs, (2, 4), (2, 3), 2))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_adapters_and_recomputed_activations(checkpointing, folder_of):
    reranker = make_reranker(folder_of("gemma2"), activation_checkpointing=checkpointing)
    add_lora(reranker, LoraSettings(rank=2, alpha=4))
    torch.manual_seed(4)
    for name, p in reranker.named_parameters():
        assert p.requires_grad is ("lora_" in name or "heads" in name), name
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    reranker.train()
    calls = []
    base = reranker.decoder.base_model.model
    base.layers[2].mlp.register_forward_hook(lambda *_: calls.append(2))
    pairs, reduction = make_pairs(), ((1, 3), 2)
    packed = packed_scores(reranker, pairs, None, *reduction)
    found = gradients(reranker, packed)
    assert len(calls) == 1 + checkpointing
    base.gradient_checkpointing_disable()
    dense = dense_scores(reranker, pairs, reranker.exits, *reduction)
    wanted = gradients(reranker, dense)
    assert_same(packed, dense)
    assert found.keys() == wanted.keys() and len(found) == 1 + DEPTH * 7 * 2
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_pair_alone_scores_as_in_company(folder_of):
    reranker = make_reranker(folder_of("mistral_window"))
    pairs = make_pairs()
    together = packed_scores(reranker, pairs, None, (1, 2), 4)
    alone = torch.cat([packed_scores(reranker, [pair], None, (1, 2), 4) for pair in pairs])
    assert_same(together, alone)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_heads_start_as_the_row_of_yes(family, folder_of):
    """At full depth the score is the logit of a causal model as transformers computes it; Gemma's head is its table."""
    reranker = load_reranker(ModelSettings(name=folder_of(family), dtype="fp32"), YES, 2)
    assert reranker.heads.weight_HD.dtype == torch.float32 and len(reranker.heads.weight_HD) == DEPTH - 1
    whole = AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float32, attn_implementation="eager")
    pairs = make_pairs()
    wanted = [whole(torch.tensor([pair.ids])).logits[0, -1, YES] for pair in pairs]
    assert_same(packed_scores(reranker, pairs, (DEPTH,))[:, 0], torch.stack(wanted))
    trained = [name for name, p in reranker.named_parameters() if p.requires_grad]
    assert trained == ["heads.weight_HD"]


def test_calls_without_a_route_are_as_before(folder_of):
    reranker = make_reranker(folder_of("llama"))
    fresh = AutoModel.from_pretrained(folder_of("llama"), dtype=torch.float32, attn_implementation="eager")
    ids, wanted = torch.arange(9)[None], fresh(torch.arange(9)[None]).last_hidden_state
    reranker.decoder.set_attn_implementation("eager")
    torch.testing.assert_close(reranker.decoder(ids).last_hidden_state, wanted)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (((5,), (), 1), "exit_layer=5 is none of the layers 2 to 4"),
        (((1,), (), 1), "exit_layer=1 is none of the layers 2 to 4"),
        (((2,), (0,), 2), r"compress_layers=\[0\]: 0 is none of the layers 1 to 3"),
        (((4,), (1, 4), 2), r"compress_layers=\[1, 4\]: 4 is none of the layers 1 to 3"),
        (((4,), (1,), 0), "compress_ratio=0 must be 1"),
    ],
)
def test_what_cannot_be_asked_for(asked, message, folder_of):
    reranker = make_reranker(folder_of("llama"), first_exit=2)
    with pytest.raises(ValueError, match=message):
        packed_scores(reranker, make_pairs(), *asked)


def test_what_makes_no_reranker(folder_of, tmp_path):
    model = ModelSettings(name=folder_of("llama"), dtype="fp32")
    with pytest.raises(ValueError, match="first_exit=5 is none of the layers 1 to 4"):
        load_reranker(model, YES, 5)
    with pytest.raises(ValueError, match="attention=bidirectional: a reranker predicts"):
        load_reranker(dataclasses.replace(model, attention="bidirectional"), YES, 1)
    AutoModel.from_config(FAMILIES["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no lm_head.weight with a row 7"):
        load_reranker(dataclasses.replace(model, name=str(tmp_path)), YES, 1)
    with pytest.raises(ValueError, match=r"heads \(3, 32\) do not fit a decoder of 4 layers of width 32"):
        Reranker(make_reranker(folder_of("llama")).decoder, torch.zeros(3, 32), 1)


def test_yes_must_be_one_token():
    assert yes_token(Tokenizer(models.WordLevel({"Yes": 3, "?": 0}, unk_token="?"))) == 3
    letters = Tokenizer(models.BPE({"Y": 0, "e": 1, "s": 2}, []))
    with pytest.raises(ValueError, match='the tokenizer makes 3 tokens of "Yes"'):
        yes_token(letters)


@pytest.mark.parametrize(("layers", "ratio"), REDUCTIONS)
def test_arithmetic_is_what_torch_counts(layers, ratio, folder_of):
    """Gemma 2, whose attention here is plain matrix products; one pair and one exit at a time, with adapters."""
    model = ModelSettings(name=folder_of("gemma2"), dtype="fp32", lora=LoraSettings(rank=2, alpha=4))
    shape = read_shape(model, 0)
    reranker = load_reranker(model, YES, 1)
    add_lora(reranker, model.lora)
    for parts, pair in zip(PAIRS[:2], make_pairs()[:2], strict=True):
        for k in (2, 3, DEPTH):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                packed_scores(reranker, [pair], (k,), layers, ratio)
            assert pair_flop(shape, parts, k, layers, ratio, causal=False) == counter.get_total_flops()


def test_the_papers_setting_saves_what_it_says():
    """Exit 25 of Gemma-2-9b's 42 layers, two tokens to one after layer 8: 1 - (8 + 17 / 2) / 42 = 60.7 %."""
    gemma = ModelShape("gemma2", 42, 3584, 16, 8, 256, 14336, 256000, 0, 0, True, False)
    passages_only = [pair_flop(gemma, (0, 512, 0), *setting) for setting in ((25, (8,), 2), (42,), (25,))]
    light, full, shallow = passages_only
    assert 1 - light / full == pytest.approx(0.607, abs=0.003)  # attention, which saves more, is 2 % of the work
    assert shallow / full == pytest.approx(25 / 42, rel=1e-6)
    assert 1 - pair_flop(gemma, (60, 60, 12), 25, (8,), 2) / pair_flop(gemma, (60, 60, 12), 42) < 0.51


def test_zero_3_gathers_what_it_needs(folder_of, tmp_path):
    """One rank: its weights are stubs outside of the modules that use them, as with many."""
    config = sharding_config(tmp_path, "zero3")
    require_success(launch(REPOSITORY / "tests/reranker_worker.py", [folder_of("gemma2"), str(config)], 1))
