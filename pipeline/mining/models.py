"""Models that mine and score: a cross-encoder or reranker, a SentenceTransformer, or an embedder of this project.

N texts or pairs, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.data.store import TokenStore
from pipeline.data.tokenizing import tokenize_pieces
from pipeline.mining.block_store import Scored
from pipeline.mining.kinds import BATCH_SIZE, Kind, find_kind

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

    from pipeline.inference.embedder import FewShotEmbedder

Judge = Callable[[str, Sequence[tuple[int, int]]], Scored]  # of a relation and (query, passage) text ids


@dataclass(frozen=True)
class PairModel:
    """Reads query and passage together; `score(queries, passages, relation)` gives D = 1. Knows no instruction.

    The relation (pipeline/data/pair_steps.py) is what a reranker is asked of the pairs; it is lost on a cross-encoder.
    """

    kind: Kind
    scale: Literal["logits", "sigmoid"]
    max_tokens: int | None
    score: Callable[[Sequence[str], Sequence[str], str], Scored]


@dataclass(frozen=True)
class TextModel:
    """Embeds texts to length 1; `embed(texts, instruction, as_query)`. The score of a pair is the cosine."""

    kind: Kind
    scale: Literal["cosine"]
    max_tokens: Mapping[str, int | None]  # of "query" and "passage"
    uses_instruction: bool
    embed: Callable[[Sequence[str], str, bool], Scored]


def load_model(
    path: Path,
    option: str,
    batch_size: int | None = None,
    sigmoid: bool = False,
    setting: str | None = None,
) -> PairModel | TextModel:
    """Load a model onto the GPU if there is one.

    Args:
        option: that named the folder, for messages.
        batch_size: pairs or texts of a forward pass of a sentence-transformers model (None: 32); ours packs by tokens.
        sigmoid: squash a cross-encoder's or reranker's logits to 0..1.
        setting: depth and width of a reranker, as `find_setting` names them; None: full.

    Raises:
        ValueError: the folder holds no model, one with several scores a pair, or files that do not belong together.
    """
    kind = find_kind(path, option)
    if kind == "embedder":
        return _load_embedder(path)
    if kind == "cross_encoder":
        return _load_cross_encoder(path, option, sigmoid, batch_size or BATCH_SIZE)
    if kind == "reranker":
        return _load_reranker(path, sigmoid, setting)
    return _load_sentence_transformer(path, batch_size or BATCH_SIZE)


def load_text_model(path: Path, option: str, batch_size: int | None) -> TextModel:
    """As `load_model`, of a folder that `find_kind` says holds nothing that reads pairs."""
    model = load_model(path, option, batch_size)
    assert isinstance(model, TextModel)
    return model


def load_judge(path: Path, store: TokenStore, batch_size: int | None, setting: str | None) -> Judge:
    """A cross-encoder or reranker that scores pairs in 0..1: float32 [N], and bool [N] as of `Scored`.

    Raises:
        ValueError: it gives several scores a pair, or (later) what is not finite.
    """
    teacher = load_model(path, "--teacher", batch_size, sigmoid=True, setting=setting)
    assert isinstance(teacher, PairModel)

    def judge(relation: str, pairs: Sequence[tuple[int, int]]) -> Scored:
        queries, passages = ([store.text(text) for text in side] for side in zip(*pairs, strict=True))
        scores_N1, cut_N = teacher.score(queries, passages, relation)
        if not np.isfinite(scores_N1).all():
            raise ValueError(f"--teacher {path} gives scores that are not finite; its weights are damaged")
        return scores_N1[:, 0], cut_N

    return judge


def embed_texts(model: TextModel, store: TokenStore, text_N: np.ndarray, form_N: np.ndarray) -> Scored:
    """Embed texts of a store by their ids.

    Args:
        form_N: 0 as a passage, i + 1 as a query with the store's instruction i; rising.
    """
    found = []
    for form in np.unique(form_N).tolist():
        texts = [store.text(i) for i in text_N[form_N == form].tolist()]
        found.append(model.embed(texts, store.instructions[form - 1] if form else "", form > 0))
    return np.concatenate([values for values, _ in found]), np.concatenate([cut for _, cut in found])


def _load_cross_encoder(path: Path, option: str, sigmoid: bool, batch_size: int) -> PairModel:
    import torch
    from sentence_transformers import CrossEncoder

    _quiet_transformers()
    model = CrossEncoder(str(path), local_files_only=True)
    if model.num_labels != 1:
        raise ValueError(f"{option} {path} gives {model.num_labels} scores a pair; it must give one")
    activation = torch.nn.Sigmoid() if sigmoid else torch.nn.Identity()

    def score(queries: Sequence[str], passages: Sequence[str], relation: str) -> Scored:
        pairs = list(zip(queries, passages, strict=True))
        scores_N = model.predict(pairs, batch_size=batch_size, show_progress_bar=False, activation_fn=activation)
        return np.asarray(scores_N, dtype=np.float32)[:, None], _is_cut(model, list(queries), list(passages))

    return PairModel("cross_encoder", "sigmoid" if sigmoid else "logits", model.max_seq_length, score)


def _load_reranker(path: Path, sigmoid: bool, setting: str | None) -> PairModel:
    import torch

    from pipeline.inference.reduction import FULL
    from pipeline.inference.reranker import LightweightReranker

    _quiet_transformers()
    reranker = LightweightReranker(path, show_progress=False)
    reduction = reranker.read_setting(setting or FULL)

    def score(queries: Sequence[str], passages: Sequence[str], relation: str) -> Scored:
        composed = reranker.compose(list(zip(queries, passages, strict=True)), relation)
        cut_N = np.array([pair.query_was_cut or pair.passage_was_cut for pair in composed], dtype=bool)
        scores_N = reranker.score_composed(composed, reduction)
        if sigmoid:
            scores_N = torch.sigmoid(torch.from_numpy(scores_N)).numpy()
        return scores_N[:, None], cut_N

    return PairModel("reranker", "sigmoid" if sigmoid else "logits", reranker.description.max_pair_tokens, score)


def _load_sentence_transformer(path: Path, batch_size: int) -> TextModel:
    from sentence_transformers import SentenceTransformer

    _quiet_transformers()
    model = SentenceTransformer(str(path), local_files_only=True)
    prompts = {True: _prompt(model, "query"), False: _prompt(model, "document", "passage", "corpus")}

    def embed(texts: Sequence[str], instruction: str, as_query: bool) -> Scored:
        encode, prompt = model.encode_query if as_query else model.encode_document, prompts[as_query]
        embeddings_ND = encode(
            list(texts), prompt=prompt, batch_size=batch_size, show_progress_bar=False, normalize_embeddings=True
        )
        return np.asarray(embeddings_ND, dtype=np.float32), _is_cut(model, [prompt + text for text in texts])

    limits = dict.fromkeys(("query", "passage"), model.max_seq_length)
    return TextModel("sentence_transformer", "cosine", limits, False, embed)


def _quiet_transformers() -> None:
    """No bars and tables while weights are loaded: they would stand between the bars of mining."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


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


def _load_embedder(path: Path) -> TextModel:
    from pipeline.inference.embedder import load_embedder

    embedder = load_embedder(path, show_progress=False)

    def embed(texts: Sequence[str], instruction: str, as_query: bool) -> Scored:
        cut_N = _is_cut_here(embedder, texts, instruction, as_query)
        if as_query:
            return embedder.encode_queries(texts, instruction), cut_N
        return embedder.encode_passages(texts), cut_N

    limits = {"query": embedder.limits.max_query_tokens, "passage": embedder.limits.max_passage_tokens}
    return TextModel("embedder", "cosine", limits, True, embed)


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
