"""A token store in memory with whitespace tokens: what tests of plans need, without a tokenizer or a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline.data.tokenizing import PromptTokens
from pipeline.settings import (
    BatchSettings,
    DatasetSettings,
    DataSettings,
    ExampleSettings,
    PreprocessSettings,
    RunSettings,
    Settings,
)

TOKENS = PromptTokens(
    bos=(1,),
    eos=(2,),
    query_end=(5,),
    query_tail=(6,),
    response_tail=(7, 7),
    passage_tail=(),
    marker_ids=(3, 4, 5),
    marker_subtokens=((), (), ()),
)
INSTRUCT, QUERY, RESPONSE = TOKENS.marker_ids


@dataclass(frozen=True)
class FakeStore:
    """The attributes and methods of the real store that plans and composing use."""

    path: Path
    manifest: Any
    datasets: tuple[Any, ...]
    instructions: tuple[str, ...]
    instruction_pieces: tuple[np.ndarray, ...]
    texts: tuple[str, ...]
    pieces: Mapping[str, Sequence[np.ndarray]]

    @property
    def num_texts(self) -> int:
        return len(self.texts)

    def piece(self, text_id: int, kind: str) -> np.ndarray:
        return self.pieces[kind][text_id]

    def piece_lengths(self, text_ids: np.ndarray, kind: str) -> np.ndarray:
        lengths = np.array([len(piece) for piece in self.pieces[kind]], dtype=np.int64)
        return lengths[text_ids]

    def text(self, text_id: int) -> str:
        return self.texts[text_id]


def make_store(datasets: Mapping[str, tuple[str, list[dict[str, Any]]]], buckets: Sequence[int] = ()) -> FakeStore:
    """Store of {name: (type, rows)}; a row has query, pos, neg and maybe scores, instruction, category, nearest.

    `buckets` are sizes of the first length buckets of every dataset; the last one takes the remaining rows.
    """
    text_ids: dict[str, int] = {}
    instruction_ids: dict[str, int] = {}
    tables = []
    for name, (task_type, rows) in datasets.items():
        tables.append(make_table(name, task_type, rows, text_ids, instruction_ids, buckets))
    words: dict[str, int] = {}

    def ids(text: str, head: tuple[int, ...], tail: tuple[int, ...]) -> np.ndarray:
        return np.array([*head, *(words.setdefault(w, 100 + len(words)) for w in text.split()), *tail], dtype=np.int32)

    return FakeStore(
        path=Path("fake"),
        manifest=SimpleNamespace(tokens=TOKENS, fingerprint="fake"),
        datasets=tuple(tables),
        instructions=tuple(instruction_ids),
        instruction_pieces=tuple(ids(t, (INSTRUCT,), (6,)) if t else np.empty(0, np.int32) for t in instruction_ids),
        texts=tuple(text_ids),
        pieces={
            "query": [ids(t, (QUERY,), TOKENS.query_tail) for t in text_ids],
            "response": [ids(t, (RESPONSE,), TOKENS.response_tail) for t in text_ids],
            "passage": [ids(t, (), TOKENS.passage_tail) for t in text_ids],
        },
    )


def make_table(
    name: str,
    task_type: str,
    rows: list[dict[str, Any]],
    text_ids: dict[str, int],
    instruction_ids: dict[str, int],
    buckets: Sequence[int],
) -> Any:
    def text(value: str | None) -> int:
        return -1 if value is None else text_ids.setdefault(value, len(text_ids))

    def ragged(key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        lists = [row[key] for row in rows]
        offsets = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
        scores = [row.get(f"{key}_scores") or [np.nan] * len(row[key]) for row in rows]
        has_scores = any(row.get(f"{key}_scores") for row in rows)
        flat_scores = np.array([s for row in scores for s in row], dtype=np.float32) if has_scores else None
        return offsets, np.array([text(t) for x in lists for t in x], dtype=np.int64), flat_scores

    def nearest() -> tuple[np.ndarray | None, np.ndarray | None]:
        if not any("nearest" in row for row in rows):
            return None, None
        lists = [row.get("nearest", []) for row in rows]
        offsets = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
        return offsets, np.array([line - 1 for x in lists for line in x], dtype=np.int64)

    instructions = [row.get("instruction", "find") for row in rows]
    nearest_offsets, nearest_row = nearest()
    pos_offsets, pos_text, pos_score = ragged("pos")
    neg_offsets, neg_text, neg_score = ragged("neg")
    return SimpleNamespace(
        name=name,
        task_type=task_type,
        num_rows=len(rows),
        query_text_N=np.array([text(row["query"]) for row in rows], dtype=np.int64),
        instruction_N=np.array([instruction_ids.setdefault(i, len(instruction_ids)) for i in instructions], np.int32),
        category_text_N=np.array([text(row.get("category")) for row in rows], dtype=np.int64),
        pos_offsets=pos_offsets,
        pos_text=pos_text,
        pos_score=pos_score,
        neg_offsets=neg_offsets,
        neg_text=neg_text,
        neg_score=neg_score,
        length_N=np.full(len(rows), 10, dtype=np.int32),
        bucket_offsets=np.array([0, *np.cumsum(list(buckets)), len(rows)], dtype=np.int64),
        source_line_N=np.arange(1, len(rows) + 1, dtype=np.int64),
        entry=name,
        no_in_batch_neg=False,
        nearest_offsets=nearest_offsets,
        nearest_row=nearest_row,
    )


def plain_rows(num_rows: int, num_negatives: int = 3, name: str = "d") -> list[dict[str, Any]]:
    """Rows with different texts everywhere, of 1 to 9 words."""
    rows = []
    for i in range(num_rows):
        long = " w" * (i % 9)
        negatives = [f"{name}-n{i}-{j}{long}" for j in range(num_negatives)]
        rows.append({"query": f"{name}-q{i}{long}", "pos": [f"{name}-p{i}{long}"], "neg": negatives})
    return rows


def make_settings(store: Any, mode: str = "in_batch", max_examples: int = 5, **changes: Any) -> Settings:
    """Settings for all datasets of a store; `changes` go to whichever section has the field."""
    batch: dict[str, Any] = {"queries": 8, "symmetric_queries": 4, "group_size": 4}
    preprocess: dict[str, Any] = {
        "max_query_tokens": 20,
        "max_passage_tokens": 16,
        "max_example_query_tokens": 12,
        "max_example_passage_tokens": 10,
        "max_prompt_tokens": 200,
    }
    run: dict[str, Any] = {}
    datasets = changes.pop("datasets", None) or tuple(
        DatasetSettings(name=t.name, path=f"{t.name}.jsonl") for t in store.datasets
    )
    for key, value in changes.items():
        section = next(
            s
            for s, c in ((batch, BatchSettings), (preprocess, PreprocessSettings), (run, RunSettings))
            if key in c.__dataclass_fields__
        )
        section[key] = value
    return replace(
        Settings(),
        data=DataSettings(datasets=datasets),
        batch=BatchSettings(**batch, examples=ExampleSettings(mode=mode, max_examples=max_examples)),  # type: ignore
        preprocess=PreprocessSettings(**preprocess),
        run=RunSettings(**run),
    )
