"""Packed forward == one sequence at a time, outputs and gradients, for each model family; marker rows; refusals."""

import pytest
import torch
import torch.nn.attention.varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.model import attention
from pipeline.model.encoder import MarkerEmbedding, add_lora, load_encoder, require_rows, trainable_parameters
from pipeline.settings import LoraSettings, ModelSettings

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
# Windows of 4 tokens are shorter than the sequences below, so that they matter.
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=4),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma": GemmaConfig(**SMALL, head_dim=8),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
}
LENGTHS = (9, 1, 5, 12)


def make_model(config: PretrainedConfig, folder) -> str:
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def pack(lengths):
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return torch.cat([torch.arange(n) for n in lengths]), cu_seqlens


def trained_gradients(encoder):
    return {name: p.grad.clone() for name, p in trainable_parameters(encoder).items()}


@pytest.mark.parametrize("version", [(2, 11), (2, 12)])
def test_torchs_varlen_attention_gets_heads_as_its_version_wants_them(version, monkeypatch):
    """The kernel itself needs a GPU: here a stand-in with the same signature, whose truth is one call a sequence."""

    def varlen_attn(query, key, value, ends, ends_of_keys, longest, longest_key, *, scale, window_size, **options):
        wants_lse = options.pop("return_aux", None)
        assert options == ({"enable_gqa": True} if version >= (2, 12) else {})
        assert key.shape[1] == (2 if version >= (2, 12) else 6) and window_size == (-1, 0)
        groups = 6 // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        call = attention._Call(ends, longest, scale, True, None, None)
        out, lse_TH = attention._sdpa_lse(query, key, value, call)
        return (out, lse_TH.T) if wants_lse else out

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_torch_version", lambda: version)
    torch.manual_seed(0)
    query, key, value = (torch.randn(sum(LENGTHS), heads, 8) for heads in (6, 2, 2))
    call = attention._Call(pack(LENGTHS)[1], max(LENGTHS), 0.3, True, None, None)
    got, wanted = (attend(query, key, value, call) for attend in (attention._torch_varlen, attention._sdpa))
    torch.testing.assert_close(got, wanted)
    got, wanted = (attend(query, key, value, call) for attend in (attention._torch_varlen_lse, attention._sdpa_lse))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_transformers_one_by_one(family, pooling, tmp_path):
    """The truth is transformers' own eager attention on one sequence at a time; only the pooling is written here."""
    name = make_model(FAMILIES[family], tmp_path)
    encoder = load_encoder(ModelSettings(name=name, dtype="fp32", pooling=pooling), (), ())
    add_lora(encoder, LoraSettings(rank=2, alpha=4))
    torch.manual_seed(1)
    for p in trainable_parameters(encoder).values():
        torch.nn.init.normal_(p, std=0.1)
    ids_T = torch.randint(0, 100, (sum(LENGTHS),))
    positions_T, cu_seqlens = pack(LENGTHS)
    packed_SD = encoder(ids_T, positions_T, cu_seqlens, max(LENGTHS))
    assert encoder.gives_last_rows is (pooling == "last")
    weight_SD = torch.randn_like(packed_SD)
    (packed_SD * weight_SD).sum().backward()
    packed_gradients = trained_gradients(encoder)

    encoder.zero_grad()
    encoder.decoder.base_model.model.set_attn_implementation("eager")
    rows = []
    for ids in ids_T.split(LENGTHS):
        hidden_TD = encoder.decoder(input_ids=ids[None]).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(hidden_TD[-1] if pooling == "last" else hidden_TD.mean(0), dim=0))
    alone_SD = torch.stack(rows)
    (alone_SD * weight_SD).sum().backward()
    torch.testing.assert_close(packed_SD, alone_SD, atol=3e-6, rtol=0)
    for key, gradient in trained_gradients(encoder).items():
        assert gradient.norm() > 0, key
        assert (packed_gradients[key] - gradient).norm() <= 1e-5 * gradient.norm(), key


class CountedElements(TorchDispatchMode):
    """Adds up the elements of every tensor that an operation gives back."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.total += sum(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
        return result


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_backward_costs_no_more_a_token_in_longer_chunks(family, tmp_path):
    """The gradient of one sequence must not be as large as the chunk: a backward pass would go with S x T."""
    encoder = load_encoder(ModelSettings(name=make_model(FAMILIES[family], tmp_path), dtype="fp32"), (), ())
    add_lora(encoder, LoraSettings(rank=2, alpha=4))

    def elements(num_sequences):
        positions_T, cu_seqlens = pack((5,) * num_sequences)
        embeddings_SD = encoder(torch.arange(5).repeat(num_sequences), positions_T, cu_seqlens, 5)
        with CountedElements() as counted:
            embeddings_SD.sum().backward()
        return counted.total

    assert elements(128) - elements(64) <= 1.1 * 2 * (elements(64) - elements(32))


def test_bidirectional_sees_later_tokens_and_causal_does_not(tmp_path):
    name = make_model(FAMILIES["llama"], tmp_path)
    positions_T, cu_seqlens = pack((6,))
    ids_T = torch.arange(6)
    changed_T = ids_T.clone()
    changed_T[-1] = 50
    for direction, same in (("causal", True), ("bidirectional", False)):
        settings = ModelSettings(
            name=name, dtype="fp32", attention=direction, pooling="mean"
        )  # gives every token's row
        encoder = load_encoder(settings, (), ())
        inputs = {"position_ids": positions_T[None], "cu_seq_lens_q": cu_seqlens, "max_length_q": 6, "use_cache": False}
        first = encoder.decoder(input_ids=ids_T[None], **inputs).last_hidden_state[0, 0]
        second = encoder.decoder(input_ids=changed_T[None], **inputs).last_hidden_state[0, 0]
        assert torch.equal(first, second) is same


def test_unknown_family_computes_the_whole_last_layer(tmp_path, monkeypatch):
    name = make_model(FAMILIES["llama"], tmp_path)
    inputs = (torch.arange(sum(LENGTHS)), *pack(LENGTHS), max(LENGTHS))
    trimmed = load_encoder(ModelSettings(name=name, dtype="fp32"), (), ())
    monkeypatch.setattr("pipeline.model.last_layer.FAMILIES", ())
    whole = load_encoder(ModelSettings(name=name, dtype="fp32"), (), ())
    assert trimmed.gives_last_rows and not whole.gives_last_rows
    torch.testing.assert_close(trimmed(*inputs), whole(*inputs), atol=3e-6, rtol=0)


def test_marker_rows_start_from_the_mean_of_their_subtokens(tmp_path):
    name = make_model(FAMILIES["llama"], tmp_path)
    table = AutoModel.from_pretrained(name).get_input_embeddings().weight
    # Marker 7 was known to the tokenizer before (no sub-tokens): its own row of the table is used.
    encoder = load_encoder(ModelSettings(name=name, dtype="fp32"), (100, 101, 7), ((1, 2), (3, 4, 5), ()))
    embedding = encoder.decoder.get_input_embeddings()
    assert isinstance(embedding, MarkerEmbedding)
    out = embedding(torch.tensor([[100, 9, 101, 7]]))[0]
    expected = torch.stack([table[[1, 2]].mean(0), table[9], table[[3, 4, 5]].mean(0), table[7]])
    torch.testing.assert_close(out, expected)


def test_marker_rows_start_on_the_scale_of_what_the_model_looks_up(tmp_path):
    """Gemma multiplies looked-up rows by the square root of its width."""
    name = make_model(FAMILIES["gemma3"], tmp_path)
    base = AutoModel.from_pretrained(name).get_input_embeddings()
    encoder = load_encoder(ModelSettings(name=name, dtype="fp32"), (100,), ((1, 2),))
    out = encoder.decoder.get_input_embeddings()(torch.tensor([[100, 9]]))[0]
    torch.testing.assert_close(out, torch.stack([base(torch.tensor([1, 2])).mean(0), base(torch.tensor(9))]))


def test_known_markers_add_no_rows(tmp_path):
    encoder = load_encoder(ModelSettings(name=make_model(FAMILIES["llama"], tmp_path)), (5, 6), ((), ()))
    assert not isinstance(encoder.decoder.get_input_embeddings(), MarkerEmbedding)


def test_first_layers_only(tmp_path):
    name = make_model(FAMILIES["gemma3"], tmp_path)
    encoder = load_encoder(ModelSettings(name=name, num_layers=1), (), ())
    assert len(encoder.decoder.layers) == 1
    with pytest.raises(ValueError, match="num_layers=3.*has 2 layers"):
        load_encoder(ModelSettings(name=name, num_layers=3), (), ())


def test_absent_kernel_is_an_error_not_a_fallback(tmp_path, monkeypatch):
    name = make_model(FAMILIES["llama"], tmp_path)
    for kernel in ("flash_attn", "torch_varlen"):
        with pytest.raises(ValueError, match=f"attention_kernel={kernel} cannot run"):
            load_encoder(ModelSettings(name=name, attention_kernel=kernel), (), ())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' cannot run: the tensors are on the CPU"):
        load_encoder(ModelSettings(name=name, embed_kernels="triton"), (), ())


REFUSED = {
    "its attention is not exchangeable": BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=100),
    "attends within chunks of its own": Llama4TextConfig(**SMALL, head_dim=8, num_local_experts=2),
    "attention dropout 0.1 is not supported": LlamaConfig(**SMALL, attention_dropout=0.1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_decoders_that_would_ignore_packing_are_refused(message, tmp_path):
    REFUSED[message].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot be packed: .*{message}"):
        load_encoder(ModelSettings(name=str(tmp_path)), (), ())


def test_attention_sinks_are_refused(tmp_path):
    name = make_model(GptOssConfig(**SMALL, head_dim=8, num_local_experts=2), tmp_path)
    encoder = load_encoder(ModelSettings(name=name, dtype="fp32"), (), ())
    with pytest.raises(ValueError, match="attention sinks"):
        encoder(torch.arange(sum(LENGTHS)), *pack(LENGTHS), max(LENGTHS))


def test_lora_on_some_of_the_projections_is_refused(tmp_path):
    name = make_model(Phi3Config(**SMALL, pad_token_id=0), tmp_path)
    encoder = load_encoder(ModelSettings(name=name), (), ())
    with pytest.raises(ValueError, match="no modules q_proj, k_proj, v_proj, gate_proj, up_proj: LoRA needs"):
        add_lora(encoder, LoraSettings())


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path):
    encoder = load_encoder(ModelSettings(name=make_model(FAMILIES["llama"], tmp_path)), (100,), ((1, 2),))
    require_rows(encoder, 99)
    with pytest.raises(ValueError, match="emits ids up to 100, the model's embedding table has 100 rows"):
        require_rows(encoder, 100)


def test_a_failed_call_leaves_nothing_behind(tmp_path):
    encoder = load_encoder(ModelSettings(name=make_model(FAMILIES["llama"], tmp_path), dtype="fp32"), (), ())
    inputs = (torch.arange(sum(LENGTHS)), *pack(LENGTHS), max(LENGTHS))
    truth = encoder(*inputs)
    hook = encoder.decoder.layers[-1].register_forward_pre_hook(lambda *args: 1 / 0)  # after ours, before the norm
    with pytest.raises(ZeroDivisionError):
        encoder(torch.arange(20, 20 + sum(LENGTHS)), *pack(LENGTHS), max(LENGTHS))
    hook.remove()
    assert torch.equal(encoder(*inputs), truth)


def test_unknown_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="model.name=.*nothing_here"):
        load_encoder(ModelSettings(name=str(tmp_path / "nothing_here")), (), ())


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    name = make_model(FAMILIES["llama"], tmp_path)
    positions_T, cu_seqlens = pack(LENGTHS)
    ids_T = torch.randint(0, 100, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    gradients = []
    for checkpointing in (False, True):
        model = ModelSettings(name=name, dtype="fp32", activation_checkpointing=checkpointing)
        encoder = load_encoder(model, (), ())
        torch.manual_seed(0)
        add_lora(encoder, LoraSettings(rank=2, alpha=4, dropout=0.1))
        for p in trainable_parameters(encoder).values():
            torch.nn.init.normal_(p, std=0.1)
        encoder.train()
        torch.manual_seed(5)
        encoder(ids_T, positions_T, cu_seqlens, max(LENGTHS))[:, 0].sum().backward()
        gradients.append(trained_gradients(encoder))
    for key in gradients[0]:
        torch.testing.assert_close(gradients[0][key], gradients[1][key])
