"""Training texts that stand in evaluation sets too, by normalised text.

A retrieval set is a folder in BEIR's form: queries.jsonl {"_id", "text"} and corpus.jsonl {"_id", "title", "text"}.
Of other tests test.jsonl is read: `text`, `sentence1`, `sentence2` and `query` count as queries, the texts of
`positive` and `negative` as corpus. Texts are compared by 64 bits of a hash of what `normalize_text` makes of them.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.normalizing import normalize_text
from pipeline.data.store import TokenStore
from pipeline.reporting.texts import DatasetTexts

MAX_TEXTS = 2_000_000  # training texts normalised; of more, every n-th distinct text of each dataset and side
SHOWN_TEXTS = 3
_QUERY_KEYS = ("text", "sentence1", "sentence2", "query")
_CORPUS_KEYS = ("positive", "negative")


@dataclass(frozen=True)
class EvaluationTexts:
    """Hashes of the distinct normalised texts of an evaluation folder, uint64, rising."""

    name: str
    queries: np.ndarray
    corpus: np.ndarray  # a passage with a title counts twice: with its title before it, and without
    num_passages: int  # distinct passages, each once


@dataclass(frozen=True)
class TrainingTexts:
    """Hashes of the normalised texts of a dataset: one a distinct text, in the order of the ids."""

    query_ids: np.ndarray
    queries: np.ndarray  # uint64
    positive_ids: np.ndarray
    positives: np.ndarray


@dataclass(frozen=True)
class Overlap:
    """Training texts of one dataset among the texts of one evaluation folder, counted by distinct training text."""

    queries_in_queries: int
    queries_in_corpus: int
    positives_in_queries: int
    positives_in_corpus: int
    shown: tuple[int, ...]  # ids of the first few such texts

    @property
    def any(self) -> bool:
        return bool(self.shown)


def load_evaluation(folder: Path) -> EvaluationTexts:
    """Read an evaluation folder; ValueError if it holds no texts in the known forms."""
    if not folder.is_dir():
        raise ValueError(f"--eval {folder}: no such folder")
    names = [name for name in ("queries.jsonl", "corpus.jsonl", "test.jsonl") if (folder / name).is_file()]
    if not names:
        raise ValueError(f"--eval {folder}: it holds neither queries.jsonl with corpus.jsonl nor test.jsonl")
    queries, passages, untitled = bytearray(), bytearray(), bytearray()
    for name in names:
        for place, row in _json_lines(folder / name):
            if name == "corpus.jsonl":
                title, text = _texts(place, row, ("title",)), _texts(place, row, ("text",))
                passages += _digest(" ".join([*title, *text]))
                untitled += b"".join(map(_digest, text)) if any(title) else b""
                continue
            queries += b"".join(map(_digest, _texts(place, row, _QUERY_KEYS)))
            if name == "test.jsonl":
                passages += b"".join(map(_digest, _texts(place, row, _CORPUS_KEYS)))
    if not queries and not passages:
        raise ValueError(f"--eval {folder}: {', '.join(names)} hold no texts; known keys: {', '.join(_QUERY_KEYS)}")
    distinct = np.unique(_hashes(passages))
    corpus = np.union1d(distinct, _hashes(untitled))
    return EvaluationTexts(folder.resolve().name, np.unique(_hashes(queries)), corpus, len(distinct))


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not a line of JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number} must be a JSON object, got {type(row).__name__}")
            yield f"{path}:{number}", row


def _texts(place: str, row: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """The texts under these keys, one or a list of them each; a key that is missing or null gives none."""
    texts = []
    for key in keys:
        values = row.get(key)
        for text in values if isinstance(values, list) else [values]:
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{place}: {key} must be a text or a list of texts, got {str(text)[:80]!r}")
            texts += [] if text is None else [text]
    return texts


def hash_texts(texts: Iterable[str]) -> np.ndarray:
    """uint64: the first 8 bytes of the BLAKE2b hash of each text's normalised form."""
    return _hashes(b"".join(map(_digest, texts)))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(normalize_text(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _hashes(digests: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(bytes(digests), dtype="<u8")


def training_stride(texts: Sequence[DatasetTexts]) -> int:
    """n, where every n-th distinct text of each dataset and side is normalised: 1 up to MAX_TEXTS texts."""
    return max(1, -(-sum(t.query.num_texts + t.positive.num_texts for t in texts) // MAX_TEXTS))


def training_texts(store: TokenStore, texts: DatasetTexts, stride: int) -> TrainingTexts:
    """Hash every stride-th distinct query and positive of a dataset."""
    query_ids, positive_ids = texts.query.text_K[::stride], texts.positive.text_K[::stride]
    queries, positives = (hash_texts(store.text(i) for i in ids.tolist()) for ids in (query_ids, positive_ids))
    return TrainingTexts(query_ids, queries, positive_ids, positives)


def find_overlap(training: TrainingTexts, evaluation: EvaluationTexts) -> Overlap:
    """Count a dataset's texts that stand in an evaluation folder."""
    pairs = [
        (ids, np.isin(hashes, known))
        for ids, hashes in ((training.query_ids, training.queries), (training.positive_ids, training.positives))
        for known in (evaluation.queries, evaluation.corpus)
    ]
    shown = dict.fromkeys(i for ids, found in pairs for i in ids[np.flatnonzero(found)[:SHOWN_TEXTS]].tolist())
    counts = [int(found.sum()) for _, found in pairs]
    return Overlap(counts[0], counts[1], counts[2], counts[3], tuple(shown)[:SHOWN_TEXTS])


def share_of_queries_seen(training: Sequence[TrainingTexts], evaluation: EvaluationTexts) -> float:
    """Share of the evaluation's distinct queries that are a query or a positive of any dataset."""
    if not len(evaluation.queries):
        return 0.0
    seen = np.zeros(len(evaluation.queries), dtype=bool)
    for texts in training:
        seen |= np.isin(evaluation.queries, texts.queries) | np.isin(evaluation.queries, texts.positives)
    return float(seen.mean())
