"""In-context examples that lack one thing: the controls of a study of what examples do.

All functions take examples and return new ones, as many and in the same order. Chance comes from `rng` alone. What they
answer stands in the open reviews of arXiv 2409.15700: is it the content of examples that helps, or only their length,
their form, or the list of labels that they spell out?

Lengths: `count` tells the tokens of a text as query or response. Where a text is replaced, the new one is built word by
word up to the tokens of the old one; where no further word fits, full stops follow, which are a token each in common
tokenizers. In a tokenizer that merges them the new text may be a little shorter than the old one, never longer (but
for a text shorter than one full stop).
"""

import random
import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import cycle, islice

from pipeline.inference.prompting import Example

Count = Callable[[str, str], int]  # (text, "query" or "response") -> tokens

FILLER = ("lorem", "ipsum", "dolor", "sit", "amet", "consectetur", "adipiscing", "elit")


def shuffle_responses(examples: Sequence[Example], rng: random.Random) -> list[Example]:
    """The responses permuted so that no query keeps its own text as response.

    Raises:
        ValueError: impossible, because one response stands at more than half of the examples.
    """
    responses = [response for _, response in examples]
    most = max(Counter(responses).values(), default=0)
    if 2 * most > len(responses):
        raise ValueError(
            f"{most} of {len(responses)} examples have the same response, so one would keep its own; show more "
            "examples, or others"
        )
    # Equal responses stand together and are moved on by the largest group: past their own kind, whatever it is.
    drawn = {response: rng.random() for response in dict.fromkeys(responses)}
    order = sorted(range(len(responses)), key=lambda i: (drawn[responses[i]], rng.random()))
    taken = dict(zip(order, order[most:] + order[:most], strict=True))
    return [(query, responses[taken[i]]) for i, (query, _) in enumerate(examples)]


def permute_labels(examples: Sequence[Example], rng: random.Random) -> list[Example]:
    """Each label replaced by another of the labels shown, equal ones by equal ones: the same list, another meaning.

    Raises:
        ValueError: the examples show one label only.
    """
    labels = list(dict.fromkeys(response for _, response in examples))
    if len(labels) < 2:
        raise ValueError(f"{len(examples)} examples show only the label {labels}; show more examples, or others")
    rng.shuffle(labels)
    other = dict(zip(labels, labels[1:] + labels[:1], strict=True))
    return [(query, other[label]) for query, label in examples]


def opaque_labels(examples: Sequence[Example]) -> list[Example]:
    """Labels replaced by "class A", "class B", ... in the order in which they appear; equal ones stay equal."""
    names = {label: f"class {_letters(n)}" for n, label in enumerate(dict.fromkeys(r for _, r in examples))}
    return [(query, names[label]) for query, label in examples]


def labels_only(examples: Sequence[Example], count: Count) -> list[Example]:
    """True responses behind filler of the length of each query."""
    return [(_fill(FILLER, count(query, "query"), "query", count), response) for query, response in examples]


def as_filler(examples: Sequence[Example], count: Count) -> list[Example]:
    """Both halves replaced by filler of their length."""
    only = labels_only(examples, count)
    return [(query, _fill(FILLER, count(response, "response"), "response", count)) for query, response in only]


def wrong_responses(
    examples: Sequence[Example], foreign: Sequence[str], rng: random.Random, count: Count
) -> list[Example]:
    """Each response replaced by responses of other tasks, which are joined and cut to its length.

    Raises:
        ValueError: `foreign` is empty.
    """
    if not foreign:
        raise ValueError("wrong responses are taken from other tasks; name a second --task")
    wrong = []
    for query, response in examples:
        words = " ".join(rng.sample(list(foreign), len(foreign))).split()
        wrong.append((query, _fill(words, count(response, "response"), "response", count)))
    return wrong


def add_noise(examples: Sequence[Example], words: Sequence[str], rng: random.Random, count: Count) -> list[Example]:
    """Half of the words (rounded up) of every query and response replaced by random ones of equal length in tokens.

    Args:
        words: what is drawn from; a word is never replaced by itself.

    Raises:
        ValueError: `words` holds fewer than two different words.
    """
    length = {word: count(word, "response") for word in dict.fromkeys(words)}
    if len(length) < 2:
        raise ValueError(f"noise needs two different words or more to draw from, got {list(length)}")

    def replace(text: str, half: str) -> str:
        parts = text.split()
        for place in rng.sample(range(len(parts)), (len(parts) + 1) // 2):
            own = count(parts[place], "response")
            others = [word for word in length if word != parts[place]]
            parts[place] = rng.choice([word for word in others if length[word] == own] or others)
        return _fill(parts, count(text, half), half, count, again=False)

    return [(replace(query, "query"), replace(response, "response")) for query, response in examples]


def words_of(examples: Sequence[Example]) -> list[str]:
    """All words of the examples, queries and responses."""
    return [word for example in examples for text in example for word in text.split()]


def _fill(words: Sequence[str], num_tokens: int, half: str, count: Count, again: bool = True) -> str:
    """The words in their order, over and over unless `again` is False, then full stops, up to `num_tokens` tokens."""
    # A word takes a token at least, so this many are enough.
    spaced = islice(cycle(words) if again else words, num_tokens)
    text = ""
    for parts in ((f" {word}" for word in spaced), [" ."] * num_tokens, ["."] * num_tokens):
        for part in parts:
            longer = (text + part).strip()
            if count(longer, half) > num_tokens:
                break
            text = longer
    return text or "."


def _letters(number: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    letters = string.ascii_uppercase
    return letters[number] if number < 26 else _letters(number // 26 - 1) + letters[number % 26]
