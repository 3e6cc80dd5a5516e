"""Teachers that give scores: a cross-encoder, a SentenceTransformer, or an embedder of this project.

N texts or pairs, D width.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.data.tokenizing import tokenize_pieces
from pipeline.mining.block_store import Scored
from pipeline.mining.embedding import quiet_transformers

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

    from pipeline.data.store import TokenStore
    from pipeline.inference.embedder import FewShotEmbedder

Kind = Literal["cross_encoder", "sentence_transformer", "embedder"]
BATCH_SIZE = 32


@dataclass(frozen=True)
class PairTeacher:
    """Reads query and passage together; `score(queries, passages)` gives D = 1. Knows no instruction."""

    kind: Kind
    scale: Literal["logits", "sigmoid"]
    max_tokens: int | None
    score: Callable[[Sequence[str], Sequence[str]], Scored]


@dataclass(frozen=True)
class TextTeacher:
    """Embeds texts to length 1; `embed(texts, instruction, as_query)`. The score of a pair is the cosine."""

    kind: Kind
    scale: Literal["cosine"]
    max_tokens: Mapping[str, int | None]  # of "query" and "passage"
    uses_instruction: bool
    embed: Callable[[Sequence[str], str, bool], Scored]


Teacher = PairTeacher | TextTeacher


def model_folder(path: Path) -> Path:
    """The folder that holds the model: of a run its model/ folder."""
    return path / "model" if (path / "model/embedder.json").is_file() else path


def find_kind(path: Path) -> Kind:
    """What kind of teacher a folder holds; ValueError where none is recognised."""
    if not path.is_dir():
        hint = f"hf download {path} --local-dir FOLDER, then --teacher FOLDER"
        raise ValueError(f"--teacher {path}: no such folder; a model of the hub is fetched first: {hint}")
    if (model_folder(path) / "embedder.json").is_file():
        return "embedder"
    saved_as = _read_json(path / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    architectures = _read_json(path / "config.json").get("architectures") or [""]
    if saved_as == "CrossEncoder" or architectures[0].endswith("ForSequenceClassification"):
        return "cross_encoder"
    if (path / "modules.json").is_file() and saved_as == "SentenceTransformer":
        return "sentence_transformer"
    raise ValueError(
        f"--teacher {path} holds neither a cross-encoder (config.json with a ...ForSequenceClassification model), nor "
        "a SentenceTransformer (modules.json), nor an embedder of this project (a run's folder)"
    )


def load_teacher(path: Path, sigmoid: bool, batch_size: int | None) -> Teacher:
    """Load a teacher onto the GPU if there is one.

    Args:
        sigmoid: squash a cross-encoder's logits to 0..1.
        batch_size: pairs or texts of a forward pass of a sentence-transformers model; None: 32.

    Raises:
        ValueError: the folder holds no teacher, an option does not fit its kind, or a package is missing.
    """
    kind = find_kind(path)
    if sigmoid and kind != "cross_encoder":
        raise ValueError(f"--sigmoid is for cross-encoders; {path} is an embedder, whose scores are cosines")
    if batch_size is not None and kind == "embedder":
        raise ValueError("--batch-size is for sentence-transformers models; this embedder packs by tokens")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch-size {batch_size} must be at least 1")
    if kind == "embedder":
        return _load_embedder(path)
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError("sentence-transformers is not installed; pip install 'bge-icl-train[mining]'")
    if kind == "cross_encoder":
        return _load_cross_encoder(path, sigmoid, batch_size or BATCH_SIZE)
    return _load_sentence_transformer(path, batch_size or BATCH_SIZE)


def load_judge(path: Path, store: "TokenStore", batch_size: int) -> Callable[[list[tuple[int, int]]], np.ndarray]:
    """A cross-encoder's scores in 0..1 of (query, passage) pairs of text ids: float32 [N].

    Raises:
        ValueError: the folder holds no cross-encoder, or one whose scores are not finite.
    """
    teacher = load_teacher(path, True, batch_size)
    assert isinstance(teacher, PairTeacher), "an embedder takes no sigmoid"

    def judge(pairs: list[tuple[int, int]]) -> np.ndarray:
        queries, passages = ([store.text(text) for text in side] for side in zip(*pairs, strict=True))
        scores_N = teacher.score(queries, passages)[0][:, 0]
        if not np.isfinite(scores_N).all():
            raise ValueError(f"--teacher {path} gives scores that are not finite; its weights are damaged")
        return scores_N

    return judge


def _load_cross_encoder(path: Path, sigmoid: bool, batch_size: int) -> PairTeacher:
    import torch
    from sentence_transformers import CrossEncoder

    quiet_transformers()
    model = CrossEncoder(str(path), local_files_only=True)
    if model.num_labels != 1:
        raise ValueError(f"--teacher {path} gives {model.num_labels} scores a pair; a teacher must give one")
    activation = torch.nn.Sigmoid() if sigmoid else torch.nn.Identity()

    def score(queries: Sequence[str], passages: Sequence[str]) -> Scored:
        pairs = list(zip(queries, passages, strict=True))
        scores_N = model.predict(pairs, batch_size=batch_size, show_progress_bar=False, activation_fn=activation)
        return np.asarray(scores_N, dtype=np.float32)[:, None], _is_cut(model, list(queries), list(passages))

    return PairTeacher("cross_encoder", "sigmoid" if sigmoid else "logits", model.max_seq_length, score)


def _load_sentence_transformer(path: Path, batch_size: int) -> TextTeacher:
    from sentence_transformers import SentenceTransformer

    quiet_transformers()
    model = SentenceTransformer(str(path), local_files_only=True)
    prompts = {True: _prompt(model, "query"), False: _prompt(model, "document", "passage", "corpus")}

    def embed(texts: Sequence[str], instruction: str, as_query: bool) -> Scored:
        encode, prompt = model.encode_query if as_query else model.encode_document, prompts[as_query]
        embeddings_ND = encode(
            list(texts), prompt=prompt, batch_size=batch_size, show_progress_bar=False, normalize_embeddings=True
        )
        return np.asarray(embeddings_ND, dtype=np.float32), _is_cut(model, [prompt + text for text in texts])

    limits = dict.fromkeys(("query", "passage"), model.max_seq_length)
    return TextTeacher("sentence_transformer", "cosine", limits, False, embed)


def _prompt(model: Any, *names: str) -> str:
    """The model's own prompt for one side, else its default prompt, else nothing."""
    found = [model.prompts[name] for name in (*names, model.default_prompt_name) if name in model.prompts]
    return found[0] or "" if found else ""


def _is_cut(model: "BaseModel", *texts: list[str]) -> np.ndarray:
    """bool [N]: the text or pair is longer than the model reads."""
    limit = model.max_seq_length
    if limit is None:
        return np.zeros(len(texts[0]), dtype=bool)
    ids = model.tokenizer(*texts, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    return np.array([len(one) > limit for one in ids], dtype=bool)


def _load_embedder(path: Path) -> TextTeacher:
    from pipeline.inference.embedder import load_embedder

    embedder = load_embedder(path, show_progress=False)

    def embed(texts: Sequence[str], instruction: str, as_query: bool) -> Scored:
        cut_N = _is_cut_here(embedder, texts, instruction, as_query)
        if as_query:
            return embedder.encode_queries(texts, instruction), cut_N
        return embedder.encode_passages(texts), cut_N

    limits = {"query": embedder.limits.max_query_tokens, "passage": embedder.limits.max_passage_tokens}
    return TextTeacher("embedder", "cosine", limits, True, embed)


def _is_cut_here(embedder: "FewShotEmbedder", texts: Sequence[str], instruction: str, as_query: bool) -> np.ndarray:
    """bool [N]: the text's prompt is longer than the limit of its side."""
    pt, limits = embedder.tokenizer, embedder.limits
    around = len(pt.tokens.bos) + len(pt.tokens.eos)
    if as_query:
        around += len(pt.tokens.query_end)
        around += len(tokenize_pieces(pt, [instruction], "instruct")[0]) if instruction else 0
    limit = limits.max_query_tokens if as_query else limits.max_passage_tokens
    pieces = tokenize_pieces(pt, texts, "query" if as_query else "passage")
    return np.array([len(piece) + around > limit for piece in pieces], dtype=bool)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return tree if isinstance(tree, dict) else {}
