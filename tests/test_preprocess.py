"""The whole stage from raw files to the store: same bytes however it is run, one clear error for bad input."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from samples import REPOSITORY, file_digests, sample_rows

from pipeline.data import building
from pipeline.data.building import build_store
from pipeline.data.finding import find_sources
from pipeline.data.joining import check_joined
from pipeline.data.parallel import open_pool
from pipeline.data.store import TokenStore, open_store
from pipeline.data.tokenizing import PromptTokenizer, load_tokenizer
from pipeline.files import locked
from pipeline.preprocess import main
from pipeline.prompts import Template, get_template
from pipeline.settings import load_settings

SMALL = {"block_bytes": 20_000, "partition_bytes": 50_000}
Recipe = Callable[..., Path]


@pytest.fixture(autouse=True)
def tokenizers_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "load_tokenizer", cached_tokenizer)


@lru_cache
def cached_tokenizer(name: str, template: Template) -> PromptTokenizer:
    return load_tokenizer(name, template)


def store_of(recipe: Path) -> Path:
    return recipe.parent / "store"


def only(name: str, **values: Any) -> dict[str, Any]:
    """A data section's list with one dataset."""
    return {"datasets": [{"name": name, "path": f"{name}.jsonl"} | values]}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_store_is_the_same_bytes_for_any_number_of_processes(
    tiny_recipe: Recipe, tiny_store: tuple[Path, Path], processes: int
) -> None:
    recipe = tiny_recipe()  # in another folder than tiny_store's
    with open_pool(processes) as pool:
        _, built = build_store(load_settings(recipe), pool, **SMALL)
    assert built and file_digests(store_of(recipe)) == file_digests(tiny_store[1])
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["raw", "recipe.yaml", "store"]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize(
    "stage", ["build_unit", "build_shard", "measure_unit", "join_units", "dump_manifest", "_publish"]
)
def test_interrupted_build_goes_on_and_gives_the_same_bytes(
    tiny_recipe: Recipe, tiny_store: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    recipe, calls = tiny_recipe(), []
    real = getattr(building, stage)

    def dies_at_its_third_call(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == (3 if stage in ("build_unit", "build_shard", "measure_unit", "join_units") else 1):
            raise Killed
        return real(*args)

    monkeypatch.setattr(building, stage, dies_at_its_third_call)
    with pytest.raises(Killed):
        build_store(load_settings(recipe), None, **SMALL)
    assert not store_of(recipe).exists()
    monkeypatch.setattr(building, stage, lambda *args: (calls.append(args), real(*args))[1])
    calls.clear()
    build_store(load_settings(recipe), None, **SMALL)
    assert file_digests(store_of(recipe)) == file_digests(tiny_store[1])
    if stage == "build_unit":
        finished = 2
        total = sum(1 for path in tiny_units(recipe))
        assert len(calls) == total - finished, "finished units are not built again"


def tiny_units(recipe: Path) -> list[Any]:
    files = [file for source in find_sources(load_settings(recipe)) for file in source.files]
    return [block for file in files for block in building.iter_blocks(file, SMALL["block_bytes"])]


def test_killed_process_leaves_no_store_and_the_next_one_finishes(tiny_recipe: Recipe) -> None:
    recipe = tiny_recipe(rows=320)
    command = [sys.executable, str(REPOSITORY / "pipeline/preprocess.py"), "--config", str(recipe), "--processes", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work, deadline = recipe.parent / "store.partial", time.monotonic() + 120
    while not any(work.glob("units-*/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()  # it alone, as the kernel does when memory runs out
    process.wait()
    assert not store_of(recipe).exists() and any(work.glob("units-*/*.json")), "killed between first unit and end"
    assert len(workers) >= 2 and all_end(workers, seconds=20), "its workers end with it"
    assert subprocess.run(command, capture_output=True, check=True).returncode == 0
    found = file_digests(store_of(recipe))
    shutil.rmtree(store_of(recipe))
    build_store(load_settings(recipe), None)
    assert file_digests(store_of(recipe)) == found


def all_end(pids: list[str], seconds: float) -> bool:
    """Whether the processes are gone, or dead and not yet collected, before the time is up."""
    deadline = time.monotonic() + seconds
    alive = set(pids)
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        for pid in sorted(alive):
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except FileNotFoundError:
                state = "Z"
            alive -= {pid} if state == "Z" else set()
    return not alive


def test_what_a_killed_run_still_writes_lands_where_nobody_reads(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another instruction after a kill: units of the first run must not be found by the second."""
    recipe = tiny_recipe(data=only("entailment"))

    def dies(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(building, "build_shard", dies)
        build_store(load_settings(recipe), None, **SMALL)
    old = list((recipe.parent / "store.partial").glob("units-*"))
    real, seen = building.build_unit, []

    def beside_an_old_writer(task: Any) -> Any:
        for folder in old:  # removed by now; a process of the killed run makes it again
            folder.mkdir(exist_ok=True)
            (folder / f"{task.name}.json").write_text("{}")
        seen.append(task.folder)
        return real(task)

    monkeypatch.setattr(building, "build_unit", beside_an_old_writer)
    settings = load_settings(recipe)
    changed = tuple(dataclasses.replace(d, instruction="Changed.") for d in settings.data.datasets)
    changed_settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, datasets=changed))
    manifest, _ = build_store(changed_settings, None, **SMALL)
    assert seen and len(old) == 1 and str(old[0]) not in seen
    assert manifest.datasets[0].instruction == "Changed." and manifest.counts["rows"] == 40


def test_a_unit_of_another_range_is_built_again(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(data=only("entailment"))

    def dies(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(building, "build_shard", dies)
        build_store(load_settings(recipe), None, **SMALL)
    report = sorted((recipe.parent / "store.partial").glob("units-*/*.json"))[0]
    report.write_text(json.dumps(json.loads(report.read_text()) | {"range": [0, 7], "num_rows": 99}))
    manifest, _ = build_store(load_settings(recipe), None, **SMALL)
    lines = (recipe.parent / "raw/entailment.jsonl").read_text().splitlines()
    assert manifest.counts["rows"] + manifest.counts["quarantined"] == len(lines)


def test_changed_raw_file_starts_an_interrupted_build_over(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe(data=only("entailment"))

    def dies(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(building, "_publish", dies)
        build_store(load_settings(recipe), None)
    raw = recipe.parent / "raw/entailment.jsonl"
    raw.write_text("".join(raw.read_text().splitlines(keepends=True)[:7]))
    with caplog.at_level("INFO"):
        manifest, _ = build_store(load_settings(recipe), None)
    assert manifest.counts["rows"] == 7 and "starting over" in caplog.text


def test_units_serve_again_when_only_limits_changed(
    tiny_recipe: Recipe, tiny_store: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, parsed = tiny_recipe(), []

    def dies(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(building, "_publish", dies)
        build_store(load_settings(recipe, ["preprocess.max_passage_tokens=50"]), None, **SMALL)
    monkeypatch.setattr(building, "build_unit", parsed.append)
    build_store(load_settings(recipe), None, **SMALL)
    assert parsed == [] and file_digests(store_of(recipe)) == file_digests(tiny_store[1])


def test_death_between_the_last_renames_is_survived(
    tiny_recipe: Recipe, tiny_store: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    build_store(load_settings(recipe, ["preprocess.max_passage_tokens=50"]), None, **SMALL)
    rename, renamed = os.rename, []

    def dies_at_the_second(*args: Any) -> None:
        renamed.append(args)
        if len(renamed) == 2:
            raise Killed
        rename(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(building.os, "rename", dies_at_the_second)
        build_store(load_settings(recipe), None, overwrite=True, **SMALL)
    assert not store_of(recipe).exists()
    build_store(load_settings(recipe), None, **SMALL)
    assert file_digests(store_of(recipe)) == file_digests(tiny_store[1])
    # And after the last one: the build folder is still there, the store is complete.
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(
            building.shutil, "rmtree", lambda path, **_: dies_at_the_second() if path.name.endswith("partial") else None
        )
        renamed[:] = [()]
        build_store(load_settings(recipe), None, overwrite=True, **SMALL)
    assert build_store(load_settings(recipe), None, **SMALL)[1] is False
    build_store(load_settings(recipe), None, overwrite=True, **SMALL)
    assert file_digests(store_of(recipe)) == file_digests(tiny_store[1])


# The command.


def test_command_builds_then_says_up_to_date_then_refuses_other_settings(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tiny_recipe())
    assert main(["--config", recipe, "--processes", "1"]) == 0
    shown = capsys.readouterr().out
    assert "rows in 200 = stored 200 + quarantined 0" in shown and "symmetric_clustering" in shown
    before = file_digests(store_of(Path(recipe)))
    assert main(["--config", recipe, "--processes", "1"]) == 0
    assert "up to date" in capsys.readouterr().out
    change = "preprocess.max_passage_tokens=80"
    assert main(["--config", recipe, "--processes", "1", change]) == 2
    error = capsys.readouterr().err
    assert "preprocess.max_passage_tokens: store 96, now 80" in error and "--overwrite" in error
    assert file_digests(store_of(Path(recipe))) == before
    assert main(["--config", recipe, "--processes", "1", "--overwrite", change]) == 0
    assert open_store(store_of(Path(recipe))).manifest.limits["max_passage_tokens"] == 80
    assert not store_of(Path(recipe)).with_name("store.partial").exists()


def test_a_folder_that_is_no_store_is_never_replaced(tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(data=only("entailment"))
    keep = store_of(recipe) / "thesis.txt"
    keep.parent.mkdir()
    keep.write_text("years of work")
    for options in ([], ["--overwrite"]):
        assert main(["--config", str(recipe), "--processes", "1", *options]) == 2
        assert "is not a token store" in capsys.readouterr().err and keep.read_text() == "years of work"


def test_an_empty_folder_becomes_the_store(tiny_recipe: Recipe) -> None:
    recipe = tiny_recipe(data=only("entailment"))
    store_of(recipe).mkdir()
    assert main(["--config", str(recipe), "--processes", "1"]) == 0
    assert open_store(store_of(recipe)).manifest.counts["rows"] > 0


def test_rows_are_stored_or_quarantined_with_their_place(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(data=only("entailment"))
    good = [json.dumps(row).encode() for row in sample_rows("snli", 300)]
    bad = {
        3: (b"{", "not JSON"),
        150: (b'{"query": "\xff"}', "not UTF-8"),
        151: (b'{"query": "q", "pos": []}', "no positive (pos is missing or empty)"),
        290: (b'{"query": "\\ud800", "pos": ["p"]}', "a lone surrogate (half a character) in a text"),
    }
    lines = list(good)
    for number, (line, _) in bad.items():
        lines[number - 1] = line
    lines[99] = b"  "
    (recipe.parent / "raw/entailment.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    settings = load_settings(recipe, ["preprocess.max_bad_row_share=0.02"])
    manifest, _ = build_store(settings, None, **SMALL)
    assert len([f for f in manifest.text_files]) > 1
    assert (manifest.counts["rows"], manifest.counts["quarantined"]) == (295, 4)
    assert manifest.datasets[0].counts["blank_lines"] == 1
    found = [json.loads(line) for line in (store_of(recipe) / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["reason"]) for row in found] == [
        ("entailment.jsonl", number, reason) for number, (_, reason) in bad.items()
    ]
    assert found[0]["start"] == "{"
    table = open_store(store_of(recipe)).datasets[0]
    assert sorted(table.source_line_N.tolist()) == [n for n in range(1, 301) if n not in bad and n != 100]


def refused(recipe: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The message of a build that must fail: exit code 2, one error, no store."""
    assert main(["--config", str(recipe), "--processes", "1", *overrides]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and not store_of(recipe).exists()
    return error[error.index("error: ") :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "has no rows, only blank lines"),
        (b"nonsense\n", "1 of 1 rows are bad"),
        (None, "no such file"),
        (b'{"query": "q", "pos": ["p"]}\n' * 50 + b"{\n", "1 of 51 rows are bad (2.0%)"),
        (
            b'{"query": "q", "pos": ["p"]}\n{"query": "q", "pos": ["p"], "type": "symmetric_sts"}\n',
            "rows of different types: 1 normal, 1 symmetric_sts",
        ),
    ],
)
def test_unusable_files_are_refused(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    recipe = tiny_recipe(data=only("mine"))
    if content is not None:
        (recipe.parent / "raw/mine.jsonl").write_bytes(content)
    error = refused(recipe, capsys)
    assert "dataset 'mine'" in error and message in error


def test_too_many_bad_rows_are_listed(tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(data=only("mine", type="only_1neg"))
    rows = [
        '{"query": "q", "pos": ["p"]}',
        '{"query": "", "pos": ["p"]}',
        '{"query": "q", "pos": ["p"], "type": "normal"}',
    ]
    (recipe.parent / "raw/mine.jsonl").write_text("\n".join(rows))
    error = refused(recipe, capsys)
    assert "2 of 3 rows are bad (66.7%)" in error and "preprocess.max_bad_row_share=0.01" in error
    assert "mine.jsonl:2: empty query" in error
    assert "mine.jsonl:3: type 'normal' contradicts the dataset's type 'only_1neg'" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.datasets=[]"], "data.datasets is empty"),
        (["preprocess.tokenizer=/nowhere/tokenizer"], "tokenizer /nowhere/tokenizer: no such folder"),
        (["preprocess.max_example_passage_tokens=1"], "no room for the text of a response"),
        (["preprocess.max_example_query_tokens=12"], "instruction 'Given a premise"),
        (["data.datasets=[{name: a, path: a.parquet}]"], "no such file"),
    ],
)
def test_impossible_recipes_are_refused(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert message in refused(tiny_recipe(data=only("entailment")), capsys, *overrides)


def test_number_of_processes_must_be_positive(tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tiny_recipe()), "--processes", "0"]) == 2
    assert "--processes 0 must be at least 1" in capsys.readouterr().err


def test_second_build_of_the_same_store_is_refused(tiny_recipe: Recipe) -> None:
    recipe = tiny_recipe()
    work = store_of(recipe).with_name("store.partial")
    with locked(work / "lock", ""), pytest.raises(ValueError, match="another process is building"):
        build_store(load_settings(recipe), None)


# The check before the store gets its name.


def test_pieces_that_do_not_join_are_shown(tiny_store: tuple[Path, Path]) -> None:
    settings, store = load_settings(tiny_store[0]), open_store(tiny_store[1])
    pt = load_tokenizer(settings.tokenizer_name, get_template("bge_en_icl"))
    compared, skipped = check_joined(pt, store)
    assert compared > 300 and compared + skipped >= 200

    class Wrong(TokenStore):
        def piece(self, text_id: int, kind: str) -> Any:
            ids = super().piece(text_id, kind).copy()
            if kind == "response" and text_id == wrong:
                ids[-1] += 1
            return ids

    wrong = int(store.datasets[1].pos_text[20])
    broken = Wrong(store.path, store.manifest, store.datasets, store.shards, store.shard_starts)
    with pytest.raises(ValueError, match="dataset 'entailment': the pieces of a prompt are not the prompt tokenised"):
        check_joined(pt, broken)


def test_other_tokenizers_and_templates_pass_the_check(
    tiny_recipe: Recipe, mistral_tokenizer_dir: str, qwen_style_tokenizer_dir: str
) -> None:
    for tokenizer in (mistral_tokenizer_dir, qwen_style_tokenizer_dir):
        recipe = tiny_recipe(rows=12)
        for template in ("instruct_query", "bge_en_icl_passage_prompt"):
            overrides = [f"preprocess.tokenizer={tokenizer}", f"preprocess.template={template}"]
            manifest, _ = build_store(load_settings(recipe, overrides), None, overwrite=True)
            assert manifest.counts["without_context"] == 0 and manifest.counts["rows"] == 60
