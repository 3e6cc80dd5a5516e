"""What each study of in-context examples compares: arms, which differ in the examples that stand before a query.

Draws: number 0 is the first examples of the task's file, as evaluation shows them; every other one is random. Draws of
more examples hold those of fewer. All arms of one draw alter the same examples, so that their differences are not those
of the choice.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.evaluation.altered_examples import (
    Count,
    add_noise,
    as_filler,
    labels_only,
    opaque_labels,
    permute_labels,
    shuffle_responses,
    words_of,
    wrong_responses,
)
from pipeline.evaluation.tasks import COLUMNS, LocalTask, RetrievalTask
from pipeline.inference.choosing import Embed, Order, choose_bm25, choose_nearest, choose_random
from pipeline.inference.prompting import Example

Alter = Callable[[Sequence[Example], random.Random], Sequence[Example]]
STUDIES = ("shots", "content", "labels", "choice")
LABELLED = ("classification", "clustering")
ZERO = "zero-shot"
ORDERS: tuple[Order, ...] = ("nearest_last", "nearest_first", "random")
# What the arms of each study are, for the reader of its tables; "{k}" is the number of examples.
EXPLAINED = {
    "shots": {},
    "content": {
        "true": "{k} examples of the task as they are",
        "shuffled": "the same responses, none of them behind its own query",
        "wrong": "responses of the other tasks, cut to the tokens of the true ones",
        "noisy": "half of the words of query and response replaced by random words of the task's examples",
        "filler": "lorem ipsum of as many tokens",
    },
    "labels": {
        "true": "{k} examples of the task as they are",
        "permuted": "each label replaced by another one of those shown: the same list of labels, a wrong mapping",
        "opaque": 'labels replaced by "class A", "class B", ...: equal ones stay equal, and there is no list of labels',
        "labels only": "true labels behind lorem ipsum of the queries' tokens: the list of labels alone",
    },
    "choice": {
        "first": "the first {k} examples of the task, for all queries",
        "random": "{k} random examples of the pool, for all queries; the pool is the task's examples and, in "
        "classification, its labelled texts (train.jsonl)",
        "nearest": "for each text the {k} examples of the pool whose queries its own zero-shot embedding is nearest to",
        "bm25": "the same by BM25",
    },
}


@dataclass(frozen=True)
class Arm:
    """One measurement to be made: examples for all queries, or with `by` examples of each text's own."""

    name: str
    num_examples: int
    draw: int | None = None  # None: no chance in it
    examples: tuple[Example, ...] = ()
    by: str = ""  # nearest or bm25
    order: Order = "nearest_last"


def check_study(study: str, task: LocalTask, max_shots: int | None, num_examples: int) -> None:
    """ValueError where the task cannot be studied so."""
    if study == "labels" and task.kind not in LABELLED:
        raise ValueError(
            f"--study labels: task {task.name} is of type {task.kind}, which has no labels; name tasks of type "
            f"{' or '.join(LABELLED)}"
        )
    if not task.examples:
        raise ValueError(f"task {task.name} has no examples to study; add an examples.jsonl to its folder")
    asked = 1 if max_shots is None else max_shots
    needed, option = (asked, "--max-shots") if study == "shots" else (num_examples, "--num-examples")
    if not 1 <= needed <= len(task.examples):
        raise ValueError(
            f"{option} {needed}: task {task.name} has {len(task.examples)} in examples.jsonl; set 1 to "
            f"{len(task.examples)}, or add examples"
        )


def draw_examples(examples: Sequence[Example], number: int, draw: int) -> tuple[Example, ...]:
    """Draw 0: the first ones; else random ones. A draw of a larger number begins with that of a smaller one."""
    order = list(examples) if draw == 0 else random.Random(draw).sample(list(examples), len(examples))
    return tuple(order[:number])


def shots_arms(task: LocalTask, max_shots: int, num_draws: int) -> list[Arm]:
    """1 to `max_shots` examples, each number from every draw."""
    numbers = range(1, max_shots + 1)
    return [Arm(f"{n}", n, d, draw_examples(task.examples, n, d)) for n in numbers for d in range(num_draws)]


def content_arms(
    task: LocalTask, others: Sequence[LocalTask], num_examples: int, num_draws: int, count: Count
) -> tuple[list[Arm], list[str]]:
    """(arms, why some are missing): true examples, and controls of equal length in tokens.

    Args:
        others: tasks whose responses are wrong here.
    """
    foreign = list(dict.fromkeys(response for other in others for _, response in other.examples))
    words = words_of(task.examples)
    alterations: dict[str, Alter] = {
        "true": lambda shown, rng: shown,
        "shuffled": shuffle_responses,
        "wrong": lambda shown, rng: wrong_responses(shown, foreign, rng, count),
        "noisy": lambda shown, rng: add_noise(shown, words, rng, count),
        "filler": lambda shown, rng: as_filler(shown, count),
    }
    return _altered(task, alterations, num_examples, num_draws)


def label_arms(task: LocalTask, num_examples: int, num_draws: int, count: Count) -> tuple[list[Arm], list[str]]:
    """(arms, why some are missing): true labels, and labels that say less."""
    alterations: dict[str, Alter] = {
        "true": lambda shown, rng: shown,
        "permuted": permute_labels,
        "opaque": lambda shown, rng: opaque_labels(shown),
        "labels only": lambda shown, rng: labels_only(shown, count),
    }
    return _altered(task, alterations, num_examples, num_draws)


def choice_arms(task: LocalTask, num_examples: int, num_draws: int) -> list[Arm]:
    """The same examples for all queries, or for each its nearest ones; no text gets itself.

    Raises:
        ValueError: the pool has too few examples that are no test texts.
    """
    pool, k = pool_of(task), num_examples
    arms = [Arm("first", k, None, task.examples[:k])]
    for draw in range(1, num_draws + 1):
        arms.append(Arm("random", k, draw, tuple(choose_random(pool, k, draw, _test_texts(task)))))
    for by in ("nearest", "bm25"):
        for order in ORDERS:
            name = f"{by}, {order.replace('_', ' ') if order != 'random' else 'random order'}"
            draws = range(1, num_draws + 1) if order == "random" else [None]
            arms += [Arm(name, k, draw, by=by, order=order) for draw in draws]
    return arms


def pool_of(task: LocalTask) -> list[Example]:
    """What examples are chosen from: the task's, and for classification its labelled texts (train.jsonl)."""
    labelled = [] if isinstance(task, RetrievalTask) else [(row["text"], row["label"]) for row in task.train]
    return list(dict.fromkeys([*task.examples, *labelled]))


def choose_each(arm: Arm, pool: Sequence[Example], texts: Sequence[str], embed: Embed) -> list[list[Example]]:
    """The examples of each text's own, by the rule of the arm."""
    if arm.by == "nearest":
        return choose_nearest(pool, texts, arm.num_examples, embed, arm.order, arm.draw or 0)
    assert arm.by == "bm25"
    return choose_bm25(pool, texts, arm.num_examples, arm.order, arm.draw or 0)


def _altered(
    task: LocalTask, alterations: Mapping[str, Alter], num_examples: int, num_draws: int
) -> tuple[list[Arm], list[str]]:
    arms: list[Arm] = []
    failed: Counter[tuple[str, str]] = Counter()
    for name, alter in alterations.items():
        for draw in range(num_draws):
            shown = draw_examples(task.examples, num_examples, draw)
            try:
                arms.append(Arm(name, num_examples, draw, tuple(alter(shown, random.Random(draw)))))
            except ValueError as error:
                failed[name, str(error)] += 1
    notes = [f"{task.name}: {n} of {num_draws} draws have no {name} arm: {why}" for (name, why), n in failed.items()]
    return arms, notes


def _test_texts(task: LocalTask) -> list[str]:
    if isinstance(task, RetrievalTask):
        return list(task.queries.values())
    return [row[column] for row in task.test for column in COLUMNS[task.kind] if column not in ("label", "score")]
