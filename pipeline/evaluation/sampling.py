"""A fixed sample of a task's test texts, where scoring all of them would take too long."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pipeline.evaluation.tasks import LocalTask, RetrievalTask

Item = TypeVar("Item")


def sample_task(task: LocalTask, max_texts: int | None, seed: int = 0) -> LocalTask:
    """The task with at most `max_texts` queries, test texts or pairs, the same ones at every call.

    Retrieval keeps its whole corpus, reranking the candidates of the queries that are left, classification its whole
    pool. Labelled texts and pairs are drawn in proportion to their labels.

    Raises:
        ValueError: `max_texts` is not at least 1.
    """
    if max_texts is None:
        return task
    if max_texts < 1:
        raise ValueError(f"--max-texts {max_texts} must be 1 or more")
    rng = random.Random(seed)
    if isinstance(task, RetrievalTask):
        kept = _sample(list(task.queries), [""] * len(task.queries), max_texts, rng)
        candidates = None if task.candidates is None else {i: task.candidates[i] for i in kept}
        wanted = task.corpus if candidates is None else {i for ids in candidates.values() for i in ids}
        return replace(
            task,
            queries={i: task.queries[i] for i in kept},
            relevant={i: task.relevant[i] for i in kept},
            candidates=candidates,
            corpus={i: text for i, text in task.corpus.items() if i in wanted},
        )
    labels: list[Any] = [row.get("label", "") for row in task.test]
    return replace(task, test=tuple(_sample(list(task.test), labels, max_texts, rng)))


def _sample(items: Sequence[Item], labels: Sequence[Any], number: int, rng: random.Random) -> list[Item]:
    """`number` of the items in their order, each label with its share but for rounding; all where there are no more."""
    if number >= len(items):
        return list(items)
    by_label = sorted(range(len(items)), key=lambda i: (str(labels[i]), rng.random()))
    return [items[i] for i in sorted(by_label[n * len(items) // number] for n in range(number))]
