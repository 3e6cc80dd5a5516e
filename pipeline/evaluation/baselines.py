"""Models without prompts, to compare with: BM25 and any model of sentence-transformers; mteb runs both."""

import hashlib
import importlib.util
from importlib.metadata import version
from typing import Any

import mteb
import torch
from mteb.models import EncoderProtocol

BM25 = "mteb/baseline-bm25s"


def load_baseline(name: str, option: str = "--baseline") -> tuple[Any, str]:
    """(model of mteb, fingerprint).

    Args:
        name: bm25, or the folder or hub name of a model of sentence-transformers.
        option: that named it, for messages.

    Raises:
        ValueError: there is no such model, or the package that it needs is missing.
    """
    if name == "bm25":
        for package in ("bm25s", "Stemmer"):
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"{option} bm25 needs {package}; pip install bge-icl-train[eval]")
        return mteb.get_model(BM25), f"bm25s {version('bm25s')}, mteb {version('mteb')}"
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError(f"{option} {name} needs sentence-transformers; pip install bge-icl-train[mining]")
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {name}: sentence-transformers cannot load it: {error}") from error
    return mteb.models.SentenceTransformerEncoderWrapper(model), _fingerprint(model)


def can_score(baseline: Any, kind: str) -> bool:
    """Whether a model of mteb can be scored on tasks of this kind: what only ranks has no embeddings."""
    return isinstance(baseline, EncoderProtocol) or kind in ("retrieval", "reranking")


def _fingerprint(model: Any) -> str:
    """sha256 over the modules, their settings and the weights of a model of sentence-transformers."""
    digest = hashlib.sha256(f"{model} {model.max_seq_length} {model.prompts}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
