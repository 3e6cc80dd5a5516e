"""reranking.json (a list of records, one for each ranking that was scored) and their table."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.evaluation.reranking import RETRIEVER, Row
from pipeline.evaluation.table import plain_table
from pipeline.files import take_lock, write_text

# What a file holds once.
IDENTITY = (
    *("task", "data", "metric", "retriever_fingerprint", "retriever_examples"),
    *("fingerprint", "setting", "top", "relation"),
)


def read_rows(path: Path) -> list[Row]:
    """The records of a file, none where there is no file; ValueError if it is not a list of them."""
    if not path.is_file():
        return []
    try:
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            _identity(row)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a list of rankings ({error!r}); remove it to begin anew") from error
    return rows


def add_row(path: Path, row: Row) -> None:
    """Add a record to a file; the one of the same models, task and setting is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = take_lock(path.with_name(f".{path.name}.lock"), wait=True)
    assert lock is not None
    with lock:
        kept = [old for old in read_rows(path) if _identity(old) != _identity(row)]
        write_text(path, json.dumps([*kept, row], indent=1) + "\n")


def reranking_table(rows: Sequence[Row]) -> str:
    """A line for each ranking: under each retriever the reductions that put its first passages in order."""
    heading = ["task", "metric", "ranked by", "score", "gain", "pairs", "tokens a pair", "GFLOP a query", "saved"]
    lines = [[*heading, "seconds"]]
    for row in rows:
        lines.append([row["task"], row["metric"], row["setting"], f"{row['value']:.4f}"])
        if row["setting"] == RETRIEVER:
            lines[-1][2] = row["retriever"]
            lines[-1] += [""] * 5
        else:
            lines[-1] += [f"{row['gain']:+.4f}", str(row["pairs"]), f"{row['tokens_per_pair']:.1f}"]
            lines[-1] += [f"{row['flop_per_query'] / 1e9:.4g}", f"{row['flop_saved']:.1%}"]
        lines[-1].append(f"{row['seconds']:.1f}")
    return plain_table(lines)


def _identity(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in IDENTITY)
