"""Bad rows: when a dataset cannot be used, and the list of rows left out."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.derived import write_rows
from pipeline.data.raw import column_matches
from pipeline.data.sources import Source
from pipeline.settings import ColumnSettings

_SHOWN = 5


def bad_rows(source: Source, units: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """{file, line, reason, start} of every quarantined row, in the order of the files; lines count in each file."""
    first_line, file = 0, 0
    for unit in units:
        if unit["file"] != file:
            file, first_line = unit["file"], 0
        for row in unit["quarantine"]:
            yield {"file": source.files[file].name, **row, "line": first_line + row["line"]}
        first_line += unit["num_lines"]


def write_quarantine(path: Path, sources: Iterable[tuple[Source, Iterable[dict[str, Any]]]]) -> int:
    """Write the bad rows of all sources (with their unit reports) as JSON lines; returns how many."""
    return write_rows(path, (row for source, units in sources for row in bad_rows(source, units)))


def require_usable(source: Source, units: Sequence[dict[str, Any]], max_bad_share: float) -> None:
    """ValueError if too many rows are bad, no row is good, rows are of different types, or a column is nowhere."""
    good = sum(unit["num_rows"] for unit in units)
    bad = sum(len(unit["quarantine"]) for unit in units)
    what = f"dataset {source.dataset.name!r} ({source.place})"
    if not good and not bad:
        raise ValueError(f"{what} has no rows" + (", only blank lines" if units else ""))
    _require_columns_read(source, what, units)
    share = bad / (good + bad)
    if share > max_bad_share or not good:
        reasons = Counter(row["reason"] for unit in units for row in unit["quarantine"])
        counted = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(_SHOWN))
        shown = islice(bad_rows(source, units), _SHOWN)
        first = "\n".join(f"  {r['file']}:{r['line']}: {r['reason']}: {r['start'][:80]}" for r in shown)
        remedy = (
            f"more than preprocess.max_bad_row_share={max_bad_share}; mend the rows or raise that share"
            if good
            else "no row can be used"
        )
        raise ValueError(
            f"{what}: {bad} of {good + bad} rows are bad ({share:.1%}), {remedy}\n{counted}\nfirst:\n{first}"
        )
    types = sum((Counter(unit["types"]) for unit in units), Counter[str]())
    if len(types) > 1:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(types.items()))
        raise ValueError(
            f"{what} holds rows of different types: {counted}; a dataset has one type: split the file, or set the "
            "dataset's type to quarantine the others"
        )


def _require_columns_read(source: Source, what: str, units: Sequence[dict[str, Any]]) -> None:
    """Every column that the recipe names stands in some row: a misspelt one would be missing without a sign."""
    if source.dataset.columns == ColumnSettings():
        return
    read = {name for unit in units for name in unit["columns_read"]}
    there = list(dict.fromkeys(name for unit in units for name in unit["columns"]))
    for field, names in asdict(source.dataset.columns).items():
        for name in names or ():
            if not any(column_matches(column, name) for column in read):
                raise ValueError(
                    f"{what}: columns.{field} names {name!r}, which no row has; the first rows have: {', '.join(there)}"
                )
