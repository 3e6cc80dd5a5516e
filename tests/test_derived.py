"""What tools write from a store: rows with their neighbours' lines, recipes that preprocess to the same rows."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fake_store import make_store
from samples import sample_rows, tiny_settings

from pipeline.data.derived import (
    choose_datasets,
    kept_rows,
    new_folder,
    rows_file,
    write_recipe,
    write_rows,
)
from pipeline.data.raw_rows import raw_row
from pipeline.data.store import TokenStore, open_store
from pipeline.preprocess import main as preprocess
from pipeline.settings import load_settings


def test_neighbours_are_lines_of_the_new_file() -> None:
    rows = [
        {"query": f"q{i}", "pos": [f"p{i}"], "neg": [], "nearest": near}
        for i, near in enumerate(([4, 2], [1], [2], [3]))
    ]
    store = make_store({"d": ("normal", rows)})
    table = store.datasets[0]
    everything = list(kept_rows(store, table, np.ones(4, bool)))
    assert [row["nearest"] for row in everything] == [[4, 2], [1], [2], [3]]
    some = list(kept_rows(store, table, np.array([True, False, True, True])))
    assert [row["query"] for row in some] == ["q0", "q2", "q3"]
    assert [row["nearest"] for row in some] == [[3], [], [2]], "row 1 is gone, rows 2 and 3 moved up"
    without = make_store({"d": ("normal", [{"query": "q", "pos": ["p"], "neg": []}])})
    assert "nearest" not in next(kept_rows(without, without.datasets[0], np.ones(1, bool)))


@pytest.fixture(scope="module")
def recipe(smollm2_tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An entry that is a folder of three files, one of them named no_in_batch_neg, and one with columns of its own."""
    folder = tmp_path_factory.mktemp("derived")
    files: dict[str, list[dict[str, Any]]] = {
        "many/a": sample_rows("squad_newwiki", 6),
        "many/b": sample_rows("squad_newwiki", 12)[6:],
        "many/c_no_in_batch_neg": sample_rows("squad_newwiki", 18)[12:],
        "single": [
            {"question": row["query"], "answer": row["pos"][0], "wrong": row["neg"]} for row in sample_rows("snli", 6)
        ],
    }
    (folder / "raw/many").mkdir(parents=True)
    for name, rows in files.items():
        write_rows(folder / "raw" / f"{name}.jsonl", rows)
    tree = tiny_settings(folder, smollm2_tokenizer_dir)
    columns = {"query": ["question"], "pos": ["answer"], "neg": ["wrong"]}
    tree["data"]["datasets"] = [
        {"name": "many", "path": "many", "instruction": "Find it.", "group_size": 2, "relation": "p-p"},
        {"name": "single", "path": "single.jsonl", "type": "only_1neg", "columns": columns},
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert preprocess(["--config", str(path), "--processes", "1"]) == 0
    return path


def derive(recipe: Path, out: Path, names: list[str]) -> tuple[tuple[str, ...], Path]:
    """Write these datasets unchanged, as a tool would; returns what the recipe lacks, and the recipe."""
    settings = load_settings(recipe)
    store = open_store(settings.data.store)
    out.mkdir(exist_ok=True)
    for table in store.datasets:
        if table.name in names:
            write_rows(out / rows_file(table.name), kept_rows(store, table, np.ones(table.num_rows, bool)))
    lacking = write_recipe(settings, store, out / "recipe.yaml", out, {name: rows_file(name) for name in names})
    return lacking, out / "recipe.yaml"


def rows_by_name(store: TokenStore) -> dict[str, list[str]]:
    return {
        t.name: sorted(json.dumps(raw_row(store, t, n), sort_keys=True) for n in range(t.num_rows))
        for t in store.datasets
    }


def test_a_written_recipe_gives_the_same_rows(recipe: Path, tmp_path: Path) -> None:
    before = open_store(load_settings(recipe).data.store)
    names = [table.name for table in before.datasets]
    assert names == ["many/a", "many/b", "many/c_no_in_batch_neg", "single"]
    lacking, written = derive(recipe, tmp_path, names)
    assert lacking == ()
    assert preprocess(["--config", str(written), "--processes", "1"]) == 0
    settings = load_settings(written)
    assert Path(settings.data.store) == tmp_path / "store"
    assert rows_by_name(open_store(settings.data.store)) == rows_by_name(before)
    assert [d.in_batch_negatives for d in settings.data.datasets] == [None, None, False, None]
    assert [d.group_size for d in settings.data.datasets] == [2, 2, 2, None]
    assert [d.relation for d in settings.data.datasets] == ["p-p", "p-p", "p-p", ""]


def test_entries_of_which_nothing_is_written_stay(recipe: Path, tmp_path: Path) -> None:
    before = rows_by_name(open_store(load_settings(recipe).data.store))
    lacking, written = derive(recipe, tmp_path / "a", ["single"])
    assert lacking == ()
    assert preprocess(["--config", str(written), "--processes", "1"]) == 0
    assert rows_by_name(open_store(load_settings(written).data.store)) == before
    lacking, written = derive(recipe, tmp_path / "b", ["many/b"])
    assert lacking == ("many/a", "many/c_no_in_batch_neg")
    assert preprocess(["--config", str(written), "--processes", "1"]) == 0
    assert list(rows_by_name(open_store(load_settings(written).data.store))) == ["many/b", "single"]


def test_datasets_by_name_or_entry(recipe: Path) -> None:
    store = open_store(load_settings(recipe).data.store)
    assert choose_datasets(store, []) == (0, 1, 2, 3)
    assert choose_datasets(store, ["many/b"]) == (1,)
    assert choose_datasets(store, ["single", "many"]) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="--dataset many/d: the store .* holds many/a, many/b"):
        choose_datasets(store, ["many/d"])


def test_two_runs_with_one_folder_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "deep/out"
    with pytest.raises(ValueError, match="--out .*/deep/out appeared while"), new_folder(path) as first:
        write_rows(first / "a.jsonl", [{"of": "first"}])
        with new_folder(path) as second:
            write_rows(second / "b.jsonl", [{"of": "second"}])
        write_rows(first / "c.jsonl", [{"of": "first"}])
        assert [file.name for file in path.iterdir()] == ["b.jsonl"]
    assert [file.name for file in path.iterdir()] == ["b.jsonl"]
    assert list(path.parent.iterdir()) == [path], "no unfinished folder is left"
    assert path.stat().st_mode == path.parent.stat().st_mode, "others may read it as any folder"


def test_a_run_whose_folder_vanishes_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out") as folder:
        write_rows(folder / "a.jsonl", [{"x": 1}])
        shutil.rmtree(folder)
        write_rows(folder / "b.jsonl", [{"x": 2}])
    assert not list(tmp_path.iterdir())


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="bad row"), new_folder(tmp_path / "out") as folder:
        write_rows(folder / "a.jsonl", [{"x": 1}])
        raise ValueError("bad row")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and not list((tmp_path / "out").iterdir())
