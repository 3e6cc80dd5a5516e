"""A corpus as a file of JSON lines, read line by line."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import read_json_lines

BLOCK_TEXTS = 4096  # embedded and saved together: 64 MB of embeddings of a 7B model


@dataclass(frozen=True)
class CorpusTexts:
    """The texts of a corpus.jsonl, read anew with every iteration."""

    path: Path
    num_texts: int

    def __len__(self) -> int:
        return self.num_texts

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in read_corpus(self.path))


def read_corpus(path: Path) -> Iterator[tuple[str, str]]:
    """(id, title and text) of every line: BEIR's `{"_id", "title", "text"}`, or `{"text"}`, whose id is its row from 0.

    Raises:
        ValueError: a line is no passage, or only some have an _id; names file and line.
    """
    with_ids = None
    for number, (place, row) in enumerate(read_json_lines(path)):
        title, text, identity = row.get("title") or "", row.get("text"), row.get("_id", number)
        if not isinstance(text, str) or not isinstance(title, str):
            raise ValueError(f"{place} must have a text (and may have a title), got {str(row)[:80]}")
        if with_ids not in (None, "_id" in row):
            raise ValueError(f"{place} has {'an' if '_id' in row else 'no'} _id, unlike the lines before; give all one")
        with_ids = "_id" in row
        if isinstance(identity, bool) or not isinstance(identity, (str, int)) or not str(identity).isprintable():
            raise ValueError(f"{place}: _id={identity!r:.40} must be a text of one line, or a whole number")
        yield str(identity), f"{title} {text}".strip()
