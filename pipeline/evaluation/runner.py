"""Scores of a model on tasks; mteb ranks, classifies, clusters and scores, so that numbers compare with published ones.

N texts, D width.
"""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mteb import evaluate
from mteb.abstasks import AbsTask
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType

from pipeline.evaluation.memory import Memory, remembered
from pipeline.evaluation.mteb_tasks import as_mteb
from pipeline.evaluation.sides import BARE, EXAMPLES, INSTRUCTION, carried, is_normalized
from pipeline.evaluation.tasks import LocalTask
from pipeline.inference.embedder import Example, FewShotEmbedder

log = logging.getLogger(__name__)

Encode = Callable[[list[str], str], np.ndarray]  # (N texts, what they carry) -> float32 [N, D]


def score_modes(
    embedder: FewShotEmbedder, task: LocalTask, modes: Sequence[str], num_examples: int, sides: str = "released"
) -> dict[str, float]:
    """The local task's metric for each mode; texts without examples are encoded once for all modes.

    Raises:
        ValueError: few_shot is asked for with no examples, or with more than the task holds; an unknown metric.
    """
    shots = {mode: choose_examples(task, num_examples) if mode == "few_shot" else () for mode in modes}
    scores = {}
    memory: Memory = {}
    for mode in modes:
        encode = prompted(embedder, task.kind, task.instruction, shots[mode], sides, memory)
        scores[mode] = score_local(task, encode, sides)
    return scores


def choose_examples(task: LocalTask, num_examples: int) -> tuple[Example, ...]:
    """The first `num_examples` examples of the task: the same for every model and query."""
    if num_examples < 1:
        raise ValueError(f"--num-examples {num_examples} leaves few_shot without examples; score zero_shot alone")
    if num_examples > len(task.examples):
        raise ValueError(
            f"--num-examples {num_examples}: task {task.name} has {len(task.examples)} in examples.jsonl; "
            "lower it, add examples, or score zero_shot alone"
        )
    return task.examples[:num_examples]


def prompted(
    embedder: FewShotEmbedder, kind: str, instruction: str, examples: Sequence[Example], sides: str, memory: Memory
) -> Encode:
    """The embedder with a task's instruction and examples as a function of texts and what they carry.

    Args:
        memory: of embeddings without examples, which other modes share, and which, in a folder, a run that was cut off
            does not make again. It serves one model and one task.
    """
    normalize = is_normalized(sides, kind)

    def encode_all(texts: list[str], carry: str) -> np.ndarray:
        if carry == BARE:
            return embedder.encode_passages(texts, normalize=normalize)
        return embedder.encode_queries(texts, instruction, examples if carry == EXAMPLES else (), normalize=normalize)

    def encode(texts: list[str], carry: str) -> np.ndarray:
        distinct = list(dict.fromkeys(texts))
        if carry == EXAMPLES and not examples:
            carry = INSTRUCTION
        if carry == EXAMPLES:
            found_ND = encode_all(distinct, carry)
        else:
            found_ND = remembered(memory, carry, distinct, lambda: encode_all(distinct, carry))
        number = {text: n for n, text in enumerate(distinct)}
        return found_ND[[number[text] for text in texts]]

    return encode


def score_local(task: LocalTask, encode: Encode, sides: str = "released") -> float:
    """The local task's metric (0..1) by cosine similarity; ValueError where mteb computes no such metric."""
    return score_mteb(encoder_of(encode, task.kind, sides), as_mteb(task, sides))[0]


def score_mteb(model: Any, task: AbsTask) -> tuple[float, Any]:
    """(main score 0..1, all of mteb's: split -> one record a language subset).

    Raises:
        ValueError: mteb does not compute the metric that the task names, or its score is not finite.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            results = evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results
        except KeyError as error:
            if error.args != (task.metadata.main_score,):
                raise
            raise ValueError(f"mteb has no metric {error} for tasks of type {task.metadata.type}") from error
    if not results:
        raise ValueError(f"mteb gives no result for {task.metadata.name}: is its data private?")
    score = float(results[0].get_score())
    if not math.isfinite(score):
        raise ValueError(f"the score of {task.metadata.name} is {score}: is every label or score of the task the same?")
    return score, results[0].scores


def encoder_of(encode: Encode, kind: str, sides: str) -> AbsEncoder:
    """A function of texts as a model of mteb, for tasks of this kind."""
    return _Encoder(encode, kind, sides)


class _Encoder(AbsEncoder):
    """mteb asks for a class."""

    def __init__(self, encode: Encode, kind: str, sides: str) -> None:
        self.mteb_model_meta = ModelMeta.create_empty({"name": "local/embedder", "revision": "local"})
        self._encode, self._kind, self._sides = encode, kind, sides

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **kwargs: Any) -> np.ndarray:
        """Embeddings [N, D] of all batches."""
        carry = carried(self._sides, self._kind, is_document=prompt_type == PromptType.document)
        embeddings_ND = self._encode([text for batch in inputs for text in batch["text"]], carry)
        if not np.isfinite(embeddings_ND).all():
            raise ValueError("the model returns embeddings that are not finite; its weights are damaged")
        return embeddings_ND
