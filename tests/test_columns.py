"""Files of columns: written in pieces, read as views, refused where damaged."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.data.columns import open_columns, write_columns

COLUMNS = {
    "small": np.arange(7, dtype=np.uint8),
    "wide": np.arange(5, dtype=np.int64) << 40,
    "empty": np.empty(0, dtype=np.int32),
    "score": np.array([1.5, np.nan, -2.0], dtype=np.float32),
    "narrow": -np.arange(9, dtype=np.int32),
}
SHAPES = {name: (values.dtype.name, len(values)) for name, values in COLUMNS.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "table.safetensors"
    pieces = [
        (name, a, values[a:b])
        for name, values in COLUMNS.items()
        for a, b in reversed(list(pairwise([*range(0, len(values), 2), len(values)])))
    ]
    write_columns(path, SHAPES, pieces)
    return path


def test_columns_come_back_through_ours_and_the_library(path: Path) -> None:
    for found in (open_columns(path), load_file(path)):
        assert set(found) == set(COLUMNS)
        for name, values in COLUMNS.items():
            np.testing.assert_array_equal(found[name], values)
            assert found[name].dtype == values.dtype
    assert not open_columns(path)["wide"].flags.writeable


def test_a_column_not_filled_exactly_leaves_no_file(tmp_path: Path) -> None:
    pieces = [(name, 0, values) for name, values in COLUMNS.items()]
    for wrong in (pieces[1:], [*pieces, ("wide", 0, np.arange(1))]):
        with pytest.raises(AssertionError, match="not filled exactly"):
            write_columns(tmp_path / "table", SHAPES, wrong)
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("size", [0, 4, 20, 300])
def test_a_cut_file_is_refused(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="is not a readable table"):
        open_columns(path)
