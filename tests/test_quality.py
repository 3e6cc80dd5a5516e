"""Bad rows: lines counted in each file, messages with the first few, and no copy of all of them in memory."""

import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.data.quality import bad_rows, require_usable, write_quarantine
from pipeline.settings import ColumnSettings


def source(*files: str) -> Any:
    """What is used of a source."""
    dataset = SimpleNamespace(name="d", columns=ColumnSettings())
    return SimpleNamespace(dataset=dataset, place="raw/d", files=[SimpleNamespace(name=name) for name in files])


def unit(file: int, num_lines: int, bad: dict[int, str]) -> dict[str, Any]:
    """A unit's report: bad rows by line."""
    quarantine = [{"line": line, "reason": reason, "start": f"text {line}"} for line, reason in bad.items()]
    good = num_lines - len(bad)
    return {"file": file, "num_lines": num_lines, "num_rows": good, "quarantine": quarantine, "types": {"normal": good}}


def test_lines_count_in_each_file(tmp_path: Path) -> None:
    units = [unit(0, 10, {2: "a"}), unit(0, 5, {1: "b", 5: "a"}), unit(1, 8, {3: "a"})]
    wanted = [("x", 2, "a"), ("x", 11, "b"), ("x", 15, "a"), ("y", 3, "a")]
    assert [(row["file"], row["line"], row["reason"]) for row in bad_rows(source("x", "y"), units)] == wanted
    other = (source("z"), [unit(0, 3, {3: "ü"})])
    assert write_quarantine(tmp_path / "q.jsonl", [(source("x", "y"), units), other]) == 5
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["file"], row["line"], row["reason"]) for row in lines] == [*wanted, ("z", 3, "ü")]
    assert write_quarantine(tmp_path / "none.jsonl", []) == 0 and (tmp_path / "none.jsonl").read_bytes() == b""


def test_messages_count_all_and_show_the_first() -> None:
    units = [unit(0, 100, {line: "even" if line % 2 == 0 else "odd" for line in range(1, 22)})]
    require_usable(source("x"), units, 0.21)
    with pytest.raises(ValueError, match=r"21 of 100 rows are bad \(21.0%\)") as caught:
        require_usable(source("x"), units, 0.2)
    message = str(caught.value)
    assert "11 x odd; 10 x even" in message
    assert message.endswith(
        "first:\n" + "\n".join(f"  x:{n}: {'odd' if n % 2 else 'even'}: text {n}" for n in range(1, 6))
    )


def test_memory_does_not_grow_with_bad_rows(tmp_path: Path) -> None:
    units = [unit(0, 40_000, dict.fromkeys(range(1, 40_001), "empty query"))]
    units.append(unit(0, 1, {}))
    tracemalloc.start()
    try:
        require_usable(source("x"), units, 1.0)
        assert write_quarantine(tmp_path / "q.jsonl", [(source("x"), units)]) == 40_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000, "a dict of each would take 10 MB"
