"""LightweightReranker against loops over a padded batch; its own folder and the published layout; what is refused."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dense_reranker import Pair, dense_scores
from safetensors.torch import load_file, save_file
from test_embedder import base, change_json  # noqa: F401
from tiny_run import WORDS
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from pipeline.data.pairs import load_pair_tokenizer
from pipeline.inference.embedder import load_embedder
from pipeline.inference.reranker import LightweightReranker
from pipeline.inference.reranker_files import RerankerDescription, save_reranker
from pipeline.model.base import fingerprint_base
from pipeline.model.encoder import add_lora, trainable_parameters
from pipeline.model.reranker import load_reranker, yes_token
from pipeline.prompts import BGE_RERANKER, render_pair
from pipeline.settings import LoraSettings, ModelSettings

DEPTH = 4
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 600,
}
PAIRS = [
    ("river stone", "copper garden planet " * 7),
    ("where is winter", ""),
    ("river stone", "engine"),
    ("amber?", "violin market\ncloud. " * 3),
    ("what", "river <|end|> stone"),
]
REDUCTIONS = [(None, None, 1), (2, None, 1), (3, (1, 2), 2), (4, (1, 3), 4), (2, (3,), 2)]


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    texts = [" ".join(WORDS), *(prompt for _, prompt in BGE_RERANKER.prompts), "Yes Yes A: B:\n"] * 3
    bpe.train_from_iterator(texts, vocab_size=450, special_tokens=["<|end|>", "<bos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", bos_token="<bos>", pad_token="<|end|>"
    )
    tokenizer.save_pretrained(folder)
    # As Gemma's: BOS is wanted, and its configuration says so.
    change_json(folder / "tokenizer_config.json", add_bos_token=True)
    return tokenizer


GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "sliding_window": 8,
}


def make_own(folder: Path, kind: type = LlamaConfig, **settings) -> SimpleNamespace:
    """What was trained; `folder` gets base/ and run/model/ as training writes it, its base a layer deeper."""
    tokenizer = make_tokenizer(folder / "base")
    torch.manual_seed(0)
    config = kind(**(SMALL | settings | {"num_hidden_layers": DEPTH + 1}), vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    pt = load_pair_tokenizer(str(folder / "base"), BGE_RERANKER)
    model = ModelSettings(name=str(folder / "base"), dtype="fp32", num_layers=DEPTH)  # one layer fewer than it has
    reranker = load_reranker(model, yes_token(pt.encoder.tokenizer), 2)
    add_lora(reranker, LoraSettings(rank=2, alpha=4))
    for p in trainable_parameters(reranker).values():
        torch.nn.init.normal_(p, std=0.2)
    assert pt.bos == (tokenizer.bos_token_id,)
    digest = fingerprint_base(str(folder / "base"))
    description = RerankerDescription(model, BGE_RERANKER, 120, 2, (1,), pt.bos, pt.fingerprint, digest)
    weights = {name: p.detach() for name, p in trainable_parameters(reranker).items()}
    save_reranker(folder / "run/model", reranker, weights, pt, description)
    return SimpleNamespace(reranker=reranker, tokenizer=tokenizer, pairs=pt, description=description)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> tuple[Path, SimpleNamespace]:
    """(run with model/ as training writes it, what was trained)."""
    folder = tmp_path_factory.mktemp("own")
    return folder / "run", make_own(folder)


@pytest.fixture
def copy(own, tmp_path) -> Path:
    return shutil.copytree(own[0] / "model", tmp_path / "copy")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, SimpleNamespace]:
    """(folder in the layout of the published model, the same model in memory)."""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(1)
    config = Gemma2Config(**SMALL, **GEMMA, vocab_size=len(tokenizer))
    model = Gemma2ForCausalLM(config)
    heads_HD = torch.randn(DEPTH - 1, 32) * 0.3
    weights = {name: w.clone() for name, w in model.state_dict().items() if name.startswith("model.")}
    weights |= {f"lm_head.{i}.linear_head.weight": row_D[None].clone() for i, row_D in enumerate(heads_HD)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    names = {"AutoConfig": "gemma_config.CostWiseGemmaConfig", "AutoModelForCausalLM": "gemma_model.CostWise"}
    tree = config.to_dict() | {"model_type": "cost_wise_gemma", "architectures": ["CostWiseGemmaForCausalLM"]}
    # A configuration of that time: without what transformers has added since, and with its old name of the type.
    old = {key: value for key, value in tree.items() if key not in ("layer_types", "dtype", "rope_parameters")}
    own = {"auto_map": names, "start_layer": 2, "layer_sep": 1, "layer_wise": True, "torch_dtype": "float32"}
    old |= {
        "rope_theta": 10000.0,
        "cache_implementation": "hybrid",
        "transformers_version": "4.42.0",
        "_name_or_path": "x",
    }
    (folder / "config.json").write_text(json.dumps(old | own))
    heads = SimpleNamespace(weight_HD=heads_HD, first_exit=2)
    return folder, SimpleNamespace(reranker=SimpleNamespace(decoder=model.model, heads=heads), tokenizer=tokenizer)


def slow_scores(truth, pairs, reduction, relation="q-p") -> np.ndarray:
    """Each pair's text tokenised whole; the passage found by its characters."""
    exit_layer, layers, ratio = reduction
    dense = []
    for query, passage in pairs:
        text = render_pair(BGE_RERANKER, query, passage, dict(BGE_RERANKER.prompts)[relation])
        plain = truth.tokenizer.backend_tokenizer
        plain.encode_special_tokens = True
        whole, first = plain.encode(text, add_special_tokens=False), len(f"A: {query}\n")
        inside = [first <= begin < first + len(f"B: {passage}") for begin, _ in whole.offsets]
        start = 1 + inside.index(True)
        dense.append(Pair([truth.tokenizer.bos_token_id, *whole.ids], start, start + sum(inside)))
    with torch.no_grad():
        scores = dense_scores(truth.reranker, dense, (exit_layer or DEPTH,), layers if ratio > 1 else (), ratio)
    return scores[:, 0].numpy()


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == np.float32 and found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["own", "published"])
def test_scores_are_those_of_the_slow_twin_in_the_order_of_pairs(kind, reduction, request):
    path, truth = request.getfixturevalue(kind)
    wanted = slow_scores(truth, PAIRS, reduction)
    assert len(set(wanted.round(4))) == len(PAIRS)
    for chunk_tokens in (None, 60):
        reranker = LightweightReranker(path, chunk_tokens, show_progress=False)
        assert_close(reranker.score(PAIRS, *reduction), wanted)


def test_relations_defaults_and_no_pairs(own):
    reranker = LightweightReranker(own[0], show_progress=False)
    for relation in ("q-q", "p-p", "arguana"):
        wanted = slow_scores(own[1], PAIRS, (3, (), 1), relation)
        assert_close(reranker.score(PAIRS, 3, relation=relation), wanted)
    assert_close(reranker.score(PAIRS, compress_ratio=2), slow_scores(own[1], PAIRS, (4, (1,), 2)))
    assert reranker.score([]).shape == (0,)
    with pytest.raises(ValueError, match="relation='a-b' is unknown"):
        reranker.score(PAIRS, relation="a-b")


def test_what_is_cut_is_counted(own, caplog):
    caplog.set_level(logging.INFO, logger="pipeline.inference")
    long = "copper garden " * 100
    LightweightReranker(own[0], show_progress=False).score(
        [*PAIRS, ("amber", long), ("river", long), (long, "stone"), (long, long)]
    )
    assert "3 of 9 pairs are longer than 120 tokens: their passages were cut" in caplog.text
    assert "2 of 9 pairs have queries beyond 3/4 of 120 tokens, which were cut" in caplog.text
    assert "1 of 9 passages are empty" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PAIRS, 1), "exit_layer=1 is none of the layers 2 to 4"),
        ((PAIRS, 5), "exit_layer=5 is none of the layers 2 to 4"),
        ((PAIRS, 3, (4,), 2), r"compress_layers=\[4\]: 4 is none of"),
        ((PAIRS, 3, (1,), 0), "compress_ratio=0 must be 1"),
        ((PAIRS, 3, (), 2), "compress_ratio=2, but compress_layers is empty"),
        (("ab",), "pairs is a str; give a list"),
        ((["ab"],), r"pairs\[0\]='ab' must be a query and a passage"),
        (([("a", "b", "c")],), r"pairs\[0\]=.* must be a query and a passage"),
        (([("a", None)],), r"passages\[0\]=None is not a text"),
    ],
)
def test_what_cannot_be_scored(arguments, message, own):
    reranker = LightweightReranker(own[0], show_progress=False)
    with pytest.raises(ValueError, match=message):
        reranker.score(*arguments)


def test_an_embedder_is_refused_and_so_is_a_folder_without_a_model(base, tmp_path, own):  # noqa: F811
    (tmp_path / "run").mkdir()
    (tmp_path / "run/embedder.json").write_text("{}")
    with pytest.raises(ValueError, match="is an embedder .*, not a reranker; load_embedder takes it"):
        LightweightReranker(tmp_path / "run")
    with pytest.raises(ValueError, match="is no reranker: reranker.json is missing, and it has not the layout of BAAI"):
        LightweightReranker(base / "model")
    with pytest.raises(ValueError, match="no such folder"):
        LightweightReranker(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a trained embedder"):
        load_embedder(own[0])


def test_damaged_folders_are_refused(own, copy, tmp_path):
    change_json(copy / "reranker.json", tokenizer_fingerprint="0" * 64)
    with pytest.raises(ValueError, match="the tokenizer files have fingerprint"):
        LightweightReranker(copy)
    fingerprint = json.loads((own[0] / "model/reranker.json").read_text())["tokenizer_fingerprint"]
    change_json(copy / "reranker.json", tokenizer_fingerprint=fingerprint, max_pair_tokens=601)
    with pytest.raises(ValueError, match="max_pair_tokens=601, but its decoder reads 600 tokens"):
        LightweightReranker(copy)
    change_json(copy / "reranker.json", max_pair_tokens=120, first_exit=1)
    with pytest.raises(ValueError, match=r"heads \(3, 32\) do not fit a decoder of 4 layers"):
        LightweightReranker(copy)
    change_json(copy / "reranker.json", first_exit=2, base_model=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="needs its base model, .* is no folder here; set base_model in"):
        LightweightReranker(copy)
    change_json(copy / "reranker.json", template_version="x")
    with pytest.raises(ValueError, match="the template is not the one of template_version"):
        LightweightReranker(copy)
    (copy / "reranker.json").write_text("{}")
    with pytest.raises(ValueError, match="reranker.json cannot be read"):
        LightweightReranker(copy)


@pytest.mark.parametrize("file", ["heads.safetensors", "adapter_model.safetensors", "adapter_config.json"])
def test_missing_files_are_named(file, copy):
    (copy / file).unlink()
    with pytest.raises(ValueError, match=file):
        LightweightReranker(copy)


def test_a_base_with_other_weights_is_refused(own, copy, tmp_path):
    other = shutil.copytree(own[0].parent / "base", tmp_path / "base")
    weights = load_file(other / "model.safetensors")
    save_file({n: w + 1 for n, w in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    change_json(copy / "reranker.json", base_model=str(other))
    with pytest.raises(ValueError, match="was trained on other weights than those of"):
        LightweightReranker(copy)


def test_a_published_layout_that_is_not_whole_is_refused(published, tmp_path):
    folder = shutil.copytree(published[0], tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    for gone, message in (("lm_head.2.linear_head.weight", "holds no lm_head.2"), ("model.norm.weight", "lacks 1 wei")):
        rest = {name: value for name, value in weights.items() if name != gone}
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            LightweightReranker(folder)
    change_json(folder / "config.json", layer_sep=2)
    with pytest.raises(ValueError, match="has layer_sep=2; a head for each layer is needed"):
        LightweightReranker(folder)


def test_what_is_saved_belongs_together(own, tmp_path):
    pt = load_pair_tokenizer(str(own[0] / "model"), BGE_RERANKER)
    changed = dataclasses.replace(BGE_RERANKER, query="Q: {}\n")
    model = ModelSettings(name=str(own[0].parent / "base"), dtype="fp32")
    with pytest.raises(AssertionError):
        description = RerankerDescription(model, changed, 120, 2, (1,), pt.bos, pt.fingerprint)
        save_reranker(tmp_path / "model", own[1].reranker, {}, pt, description)
