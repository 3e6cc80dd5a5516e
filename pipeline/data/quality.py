"""Bad rows: when a dataset cannot be used, and the list of rows left out."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.files import write_text

_SHOWN = 5


def bad_rows(file_name: str, units: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """{file, line, reason, start} of every quarantined row, in the order of the file."""
    found, first_line = [], 0
    for unit in units:
        for row in unit["quarantine"]:
            found.append({"file": file_name, **row, "line": first_line + row["line"]})
        first_line += unit["num_lines"]
    return found


def write_quarantine(path: Path, sources: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> int:
    """Write the bad rows of all sources (file name, unit reports) as JSON lines; returns how many."""
    rows = [row for name, units in sources for row in bad_rows(name, units)]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def require_usable(name: str, path: Path, units: Sequence[dict[str, Any]], max_bad_share: float) -> None:
    """ValueError if too many rows are bad, no row is good, or rows are of different types."""
    good, bad = sum(unit["num_rows"] for unit in units), bad_rows(path.name, units)
    what = f"dataset {name!r} ({path})"
    if not good and not bad:
        raise ValueError(f"{what} has no rows, only blank lines")
    share = len(bad) / (good + len(bad))
    if share > max_bad_share or not good:
        reasons = Counter(row["reason"] for row in bad)
        counted = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(_SHOWN))
        first = "\n".join(f"  {r['file']}:{r['line']}: {r['reason']}: {r['start'][:80]}" for r in bad[:_SHOWN])
        remedy = (
            f"more than preprocess.max_bad_row_share={max_bad_share}; mend the rows or raise that share"
            if good
            else "no row can be used"
        )
        raise ValueError(
            f"{what}: {len(bad)} of {good + len(bad)} rows are bad ({share:.1%}), {remedy}\n{counted}\nfirst:\n{first}"
        )
    types = sum((Counter(unit["types"]) for unit in units), Counter[str]())
    if len(types) > 1:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(types.items()))
        raise ValueError(
            f"{what} holds rows of different types: {counted}; a dataset has one type: split the file, or set the "
            "dataset's type to quarantine the others"
        )
