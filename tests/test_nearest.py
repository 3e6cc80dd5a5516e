"""Nearest rows from raw lines to rows of the table, whatever buckets and blocks the rows fall into."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from samples import parse_row

from pipeline.data.building import build_store
from pipeline.data.store import open_store
from pipeline.settings import load_settings


def write_rows(recipe: Path, tmp_path: Path, rows: list[Any], **dataset: Any) -> Path:
    """The tiny run's recipe over one file of these rows."""
    tree = yaml.safe_load(recipe.read_text())
    tree["model"]["name"] = str(recipe.parent / "model")
    tree["run"]["deepspeed"] = str(recipe.parent / "zero3.json")
    tree["preprocess"]["bucket_edges"] = [40, 60]
    tree["data"] = {"root": ".", "store": "store", "datasets": [{"name": "d", "path": "d.jsonl"} | dataset]}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def make_rows(count: int) -> list[Any]:
    rng = random.Random(0)
    rows = []
    for i in range(count):
        nearest = rng.sample([line for line in range(1, count + 1) if line != i + 1], rng.randrange(5))
        text = " ".join(["river"] * rng.randrange(1, 50))
        rows.append({"query": f"{text} {i}", "pos": [f"stone {i}"], "nearest": nearest})
    return rows


def test_lines_become_rows(tiny_training: Path, tmp_path: Path) -> None:
    rows = make_rows(60)
    recipe = write_rows(tiny_training, tmp_path, rows)
    build_store(load_settings(recipe), block_bytes=1000, partition_bytes=2000)
    (table,) = open_store(tmp_path / "store").datasets
    assert np.count_nonzero(np.diff(table.bucket_offsets)) > 1, "the test wants rows that move"
    assert table.nearest_offsets is not None and table.nearest_row is not None
    for n in range(table.num_rows):
        found = table.nearest_row[table.nearest_offsets[n] : table.nearest_offsets[n + 1]]
        assert table.source_line_N[found].tolist() == rows[table.source_line_N[n] - 1]["nearest"]


def test_rows_without_neighbours_cost_nothing(tiny_training: Path, tmp_path: Path) -> None:
    rows = [row | {"nearest": []} for row in make_rows(9)]
    build_store(load_settings(write_rows(tiny_training, tmp_path, rows)))
    (table,) = open_store(tmp_path / "store").datasets
    assert table.nearest_offsets is None and table.nearest_row is None


@pytest.mark.parametrize("line", [3, 999])
def test_a_line_that_is_no_row_is_an_error(tiny_training: Path, tmp_path: Path, line: int) -> None:
    rows = make_rows(200)
    rows[2] = {"query": "quarantined", "pos": []}
    for row in rows:
        row["nearest"] = [n for n in row.get("nearest", []) if n != 3]
    rows[7]["nearest"] = [line]
    recipe = write_rows(tiny_training, tmp_path, rows)
    with pytest.raises(ValueError, match=f"`nearest` names line {line} of its file, which is no row .* mine again"):
        build_store(load_settings(recipe))


def test_neighbours_across_files_are_an_error(tiny_training: Path, tmp_path: Path) -> None:
    recipe = write_rows(tiny_training, tmp_path, make_rows(9), path="parts", merge_files=True)
    (tmp_path / "parts").mkdir()
    for i in range(2):
        rows = [row | {"query": f"{row['query']} {i}"} for row in make_rows(9)]
        (tmp_path / "parts" / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="by line, which means one file, and the dataset has 2"):
        build_store(load_settings(recipe))


@pytest.mark.parametrize("nearest", ["3", [0], [1.5], [True], {"a": 1}])
def test_other_values_are_refused(nearest: Any) -> None:
    row = json.dumps({"query": "q", "pos": ["p"], "nearest": nearest}).encode()
    assert parse_row(row) == "nearest is not a list of line numbers"
