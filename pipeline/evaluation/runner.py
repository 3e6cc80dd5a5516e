"""Scores of an embedder on local tasks; mteb ranks and scores, so that numbers compare with published ones.

N texts, D width.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from mteb import evaluate
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType

from pipeline.evaluation.tasks import RetrievalTask
from pipeline.inference.embedder import Example, FewShotEmbedder

log = logging.getLogger(__name__)

Encode = Callable[[list[str]], np.ndarray]  # N texts -> float32 [N, D]


def score_modes(
    embedder: FewShotEmbedder, task: RetrievalTask, modes: Sequence[str], num_examples: int
) -> dict[str, float]:
    """The task's metric for each mode; passages are encoded once for all modes.

    Raises:
        ValueError: few_shot is asked for with no examples, or with more than the task holds; an unknown metric.
    """
    examples = {mode: choose_examples(task, num_examples) if mode == "few_shot" else () for mode in modes}
    encode_passages = _each_once(embedder.encode_passages)
    scores = {}
    for mode in modes:
        shots = examples[mode]

        def encode_queries(texts: list[str], shots: Sequence[Example] = shots) -> np.ndarray:
            return embedder.encode_queries(texts, task.instruction, shots)

        scores[mode] = score_retrieval(task, encode_queries, encode_passages)
    return scores


def choose_examples(task: RetrievalTask, num_examples: int) -> tuple[Example, ...]:
    """The first `num_examples` examples of the task: the same for every model and query."""
    if num_examples < 1:
        raise ValueError(f"--num-examples {num_examples} leaves few_shot without examples; use --modes zero_shot")
    if num_examples > len(task.examples):
        raise ValueError(
            f"--num-examples {num_examples}: task {task.name} has {len(task.examples)} in examples.jsonl; "
            "lower it, add examples, or use --modes zero_shot"
        )
    return task.examples[:num_examples]


def score_retrieval(task: RetrievalTask, encode_queries: Encode, encode_passages: Encode) -> float:
    """The task's metric (0..1) by cosine similarity; ValueError where mteb computes no such metric."""
    meta = ModelMeta.create_empty({"name": "local/embedder", "revision": "local"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate(
            _LocalEncoder(meta, encode_queries, encode_passages),  # type: ignore[arg-type]
            _LocalRetrieval(task),
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
        )
    scores = result.task_results[0].scores["test"][0]
    if task.metric not in scores:
        known = sorted(name for name in scores if name.endswith("_at_10"))
        raise ValueError(f"task {task.name}: unknown metric {task.metric!r}; for example {', '.join(known)}")
    return float(scores[task.metric])


class _LocalRetrieval(AbsTaskRetrieval):
    """A task in memory in the form that mteb takes its own from."""

    metadata = TaskMetadata(
        name="local",
        description="a local folder",
        type="Retrieval",
        dataset={"path": "local", "revision": "local"},
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    def __init__(self, task: RetrievalTask) -> None:
        super().__init__()
        self._task = task

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Hand over the texts; nothing is downloaded."""
        corpus = [{"id": i, "title": "", "text": text} for i, text in self._task.corpus.items()]
        queries = [{"id": i, "text": text} for i, text in self._task.queries.items()]
        split = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list(queries),
            "relevant_docs": {i: dict(row) for i, row in self._task.relevant.items()},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}  # type: ignore[dict-item]
        self.data_loaded = True


class _LocalEncoder(AbsEncoder):
    """Two functions as a model of mteb."""

    def __init__(self, meta: ModelMeta, encode_queries: Encode, encode_passages: Encode) -> None:
        self.mteb_model_meta = meta
        self._encode = {PromptType.query: encode_queries, PromptType.document: encode_passages}

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **kwargs: Any) -> np.ndarray:
        """Embeddings [N, D] of all batches."""
        assert prompt_type is not None
        embeddings_ND = self._encode[prompt_type]([text for batch in inputs for text in batch["text"]])
        if not np.isfinite(embeddings_ND).all():
            raise ValueError("the model returns embeddings that are not finite; its weights are damaged")
        return embeddings_ND


def _each_once(encode: Callable[[Sequence[str]], np.ndarray]) -> Encode:
    """`encode` that remembers: a text seen before, in this call or an earlier one, is not encoded again."""
    seen: dict[str, np.ndarray] = {}

    def encode_new(texts: list[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in seen]
        if new:
            seen.update(zip(new, encode(new), strict=True))
        return np.stack([seen[text] for text in texts])

    return encode_new
