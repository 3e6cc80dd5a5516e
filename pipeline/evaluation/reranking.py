"""A retriever's ranking, and the same with its first passages in a reranker's order; mteb scores both.

Left to itself mteb (`convert_to_reranking`, then a cross-encoder) scores the first passages alone: whatever the
retriever had below them is lost to recall and MAP. Here it keeps its place below what was reranked, so that reranking
changes no recall beyond its depth. What mteb gets is a finished ranking, as falling whole numbers: its metrics read
scores as 32-bit numbers, and put equal ones in falling order of ids.

N pairs.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.models import EncoderProtocol, ModelMeta, SearchEncoderWrapper
from mteb.models.models_protocols import SearchProtocol

from pipeline.evaluation.jobs import PACKAGES, Job, Model
from pipeline.evaluation.memory import collect_notes
from pipeline.evaluation.runner import encoder_of, prompted, score_mteb
from pipeline.evaluation.tasks import join_title
from pipeline.inference.reduction import FULL, Reduction
from pipeline.inference.reranker import LightweightReranker, Pair

RETRIEVER = "retriever"  # beside names of settings: what ordered a ranking

Row = dict[str, Any]
Part = tuple[str, str, str]  # task of mteb, subset, split
Order = dict[str, list[str]]  # query id -> passage ids, best first


@dataclass(frozen=True)
class Found:
    """What a retriever found in one part of a task."""

    queries: dict[str, str]  # id -> text
    order: Order
    passages: dict[str, str]  # id -> text, of those that are among the first of some query
    unmatched: int  # queries for which it found nothing: no passage, or (BM25) none that shares a word
    unranked: int  # given candidates that it left out; they stand below all others


def rerank_job(
    model: Model,
    reranker: LightweightReranker,
    job: Job,
    reductions: dict[str, Reduction],
    top: int,
    relation: str,
) -> Iterator[Row]:
    """A record of the retriever, then one for each reduction as soon as it is scored; pairs are composed once.

    Args:
        job: of type retrieval or reranking; an embedder gets its examples.
        reductions: by their names.
        top: so many of the retriever's first passages are reranked; the others stay below them.
        relation: what is asked of a pair, as of `LightweightReranker.score`.
    """
    task = job.make()
    for part in _parts(task):
        if not part.data_loaded:  # else mteb would load it anew for each reduction
            part.load_data()
    before, seconds, found, notes = _retrieve(model, job, task, top)
    shared = _describe(model, job, found) | {"top": top, "relation": relation, "device": _device(reranker)}
    shared |= {"retriever_value": before, "retriever_seconds": seconds}
    yield shared | {"setting": RETRIEVER, "value": before, "gain": 0.0, "pairs": 0, "seconds": seconds, "notes": notes}
    pairs = list(dict.fromkeys(pair for part in found.values() for pair in _pairs(part, top)))
    with collect_notes() as cuts:
        composed = reranker.compose(pairs, relation)
    shared |= {
        "pairs": len(pairs),
        "pairs_cut": sum(pair.query_was_cut or pair.passage_was_cut for pair in composed),
        "tokens_per_pair": sum(len(pair.ids) for pair in composed) / max(1, len(composed)),
        "depth": reranker.model.depth,
    }
    whole = reranker.count_flop(composed, reranker.read_setting(FULL))
    for name, reduction in reductions.items():
        started = time.monotonic()
        with collect_notes() as notes:
            scores_N = reranker.score_composed(composed, reduction)
        seconds = time.monotonic() - started
        score_of = dict(zip(pairs, scores_N.tolist(), strict=True))
        ranked = _Ranked({key: reorder(part, score_of, top) for key, part in found.items()})
        value = score_mteb(ranked, task)[0]
        flop = reranker.count_flop(composed, reduction)
        yield shared | {
            "setting": name,
            **reduction._asdict(),
            "value": value,
            "gain": value - before,
            "flop_per_query": flop / shared["queries"],
            "flop_saved": 1 - flop / whole if whole else 0.0,
            "seconds": seconds,
            "notes": [*cuts, *notes],
        }


def _describe(model: Model, job: Job, found: dict[Part, Found]) -> Row:
    """What all records of a task have in common: task, retriever, versions."""
    return {
        "task": job.task,
        "kind": job.kind,
        "metric": job.metric,
        "data": job.data,
        "retriever": model.label,
        "retriever_fingerprint": model.fingerprint,
        "retriever_examples": len(job.examples) if model.embedder else 0,
        "queries": sum(len(part.queries) for part in found.values()),
        "queries_unmatched": sum(part.unmatched for part in found.values()),
        "candidates_unranked": sum(part.unranked for part in found.values()),
        "versions": {name: version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    }


def _device(reranker: LightweightReranker) -> str:
    return torch.cuda.get_device_name() if reranker.device.type == "cuda" else "cpu"


def reorder(found: Found, score_of: dict[Pair, float], top: int) -> Order:
    """The first `top` of each query by falling score, equal ones as they stood; below them the others as they were."""
    return {
        query: sorted(ids[:top], key=lambda i: -score_of[found.queries[query], found.passages[i]]) + ids[top:]
        for query, ids in found.order.items()
    }


def _pairs(found: Found, top: int) -> Iterator[Pair]:
    """(query, passage) of all that is reranked."""
    for query, ids in found.order.items():
        for i in ids[:top]:
            yield found.queries[query], found.passages[i]


def _parts(task: AbsTask) -> list[Any]:
    return list(task.metadata.tasks) if isinstance(task, AbsTaskAggregate) else [task]


def _retrieve(model: Model, job: Job, task: AbsTask, top: int) -> tuple[float, float, dict[Part, Found], list[str]]:
    """(the retriever's score, seconds of its search, what it found, notes on what was cut)."""
    same_ids = {part.metadata.name for part in _parts(task) if part.ignore_identical_ids}
    with collect_notes() as notes, TemporaryDirectory() as memory:
        scorer = model.baseline
        if model.embedder is not None:
            encode = prompted(model.embedder, job.kind, job.instruction, job.examples, job.sides, Path(memory))
            scorer = encoder_of(encode, job.kind, job.sides)
        noting = _Noting(scorer, top, same_ids)
        value = score_mteb(noting, task)[0]
    return value, noting.seconds, noting.found, notes


def _rank(scores: dict[str, float], candidates: Sequence[str]) -> list[str]:
    """Passages as mteb's metrics order them, then candidates without a score, by a hash: their order in the task would
    tell which are relevant."""
    as_read = np.array(list(scores.values()), dtype=np.float32).tolist()
    ranked = [i for _, i in sorted(zip(as_read, scores, strict=True), reverse=True)]
    left_out = [i for i in candidates if i not in scores]
    return ranked + sorted(left_out, key=lambda i: hashlib.sha256(i.encode()).digest())


class _Noting:
    """A retriever that keeps what it found; mteb asks for a class."""

    def __init__(self, scorer: Any, top: int, same_ids: set[str]) -> None:
        is_encoder = isinstance(scorer, EncoderProtocol) and not isinstance(scorer, SearchProtocol)
        self._searcher = SearchEncoderWrapper(scorer) if is_encoder else scorer  # as mteb itself takes it
        self._top, self._same_ids = top, same_ids
        self.mteb_model_meta = scorer.mteb_model_meta
        self.found: dict[Part, Found] = {}
        self.seconds = 0.0

    def index(self, corpus: Any, **kwargs: Any) -> None:
        started = time.monotonic()
        self._searcher.index(corpus=corpus, **kwargs)
        self._corpus = corpus
        self.seconds += time.monotonic() - started

    def search(self, queries: Any, **kwargs: Any) -> dict[str, dict[str, float]]:
        started = time.monotonic()
        results: dict[str, dict[str, float]] = self._searcher.search(queries=queries, **kwargs)
        self.seconds += time.monotonic() - started
        name, candidates = kwargs["task_metadata"].name, kwargs.get("top_ranked") or {}
        order = {}
        for query, scores in results.items():
            ranked = _rank(scores, candidates.get(query, ()))
            order[query] = [i for i in ranked if i != query or name not in self._same_ids]
        wanted = {i for ids in order.values() for i in ids[: self._top]}
        places = [place for place, i in enumerate(self._corpus["id"]) if i in wanted]
        self.found[name, kwargs["hf_subset"], kwargs["hf_split"]] = Found(
            queries=dict(zip(queries["id"], queries["text"], strict=True)),
            order=order,
            passages={
                row["id"]: join_title(row.get("title") or "", row["text"]) for row in self._corpus.select(places)
            },
            unmatched=sum(not any(scores.values()) for scores in results.values()),
            unranked=sum(i not in scores for query, scores in results.items() for i in candidates.get(query, ())),
        )
        return results


class _Ranked:
    """A finished ranking; mteb asks for a class."""

    def __init__(self, order: dict[Part, Order]) -> None:
        self.mteb_model_meta = ModelMeta.create_empty({"name": "local/reranker", "revision": "local"})
        self._order = order

    def index(self, corpus: Any, **kwargs: Any) -> None:
        """Nothing is searched for any more."""

    def search(self, queries: Any, **kwargs: Any) -> dict[str, dict[str, float]]:
        order = self._order[kwargs["task_metadata"].name, kwargs["hf_subset"], kwargs["hf_split"]]
        return {query: {i: float(len(ids) - n) for n, i in enumerate(ids)} for query, ids in order.items()}
