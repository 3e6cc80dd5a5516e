"""What the entries of a recipe mean: folders, Parquet, Hugging Face datasets, BEIR folders, and their errors."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from samples import REPOSITORY, sample_rows

from pipeline.data import building
from pipeline.data.beir import join_title, read_grades, read_texts
from pipeline.data.building import build_store
from pipeline.data.finding import find_sources
from pipeline.data.parallel import open_pool
from pipeline.data.raw_rows import raw_row
from pipeline.data.schedule import make_schedule
from pipeline.data.store import Manifest, TokenStore, open_store, require_match
from pipeline.data.tokenizing import PromptTokenizer, load_tokenizer
from pipeline.evaluation.tasks import load_task
from pipeline.preprocess import main
from pipeline.prompts import Template
from pipeline.settings import Settings, load_settings

ROWS = sample_rows("squad_newwiki", 60)
SMALL = {"block_bytes": 8_000, "partition_bytes": 100_000}
Build = Callable[..., tuple[TokenStore, Settings]]


@pytest.fixture(autouse=True)
def tokenizers_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "load_tokenizer", cached_tokenizer)


@lru_cache
def cached_tokenizer(name: str, template: Template) -> PromptTokenizer:
    return load_tokenizer(name, template)


@pytest.fixture
def settings_of(tiny_recipe: Callable[..., Path]) -> Callable[..., Settings]:
    """Settings whose data.datasets are the given entries; raw files lie in <tmp_path>/raw."""

    def load(*entries: dict[str, Any], store: str = "store", overrides: tuple[str, ...] = ()) -> Settings:
        recipe = tiny_recipe(rows=1, data={"datasets": list(entries)})
        return load_settings(recipe, [f"data.store={recipe.parent / store}", *overrides])

    return load


@pytest.fixture
def build(settings_of: Callable[..., Settings]) -> Build:
    def run(*entries: dict[str, Any], sizes: dict[str, int] = SMALL, **options: Any) -> tuple[TokenStore, Settings]:
        settings = settings_of(*entries, **options)
        build_store(settings, None, **sizes)
        return open_store(settings.data.store), settings

    return run


def stored_rows(store: TokenStore, dataset: int = 0) -> list[dict[str, Any]]:
    """{query, pos, neg} of all rows in the order of the raw files."""
    table = store.datasets[dataset]
    rows = sorted((int(table.source_line_N[n]), raw_row(store, table, n)) for n in range(table.num_rows))
    return [{key: row[key] for key in ("query", "pos", "neg")} for _, row in rows]


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"query": r["query"].strip(), "pos": [t.strip() for t in r["pos"]], "neg": [t.strip() for t in r["neg"]]}
        for r in rows
    ]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as other trainers have them: one text a column."""
    return [
        {"anchor": r["query"], "positive": r["pos"][0], "negative_1": r["neg"][0], "negative_2": None, "id": i}
        for i, r in enumerate(rows)
    ]


PAIRS = {"query": "anchor", "pos": "positive", "neg": ["negative_1", "negative_2"]}
PAIR_ROWS = [row | {"pos": row["pos"][:1], "neg": row["neg"][:1]} for row in ROWS]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format that the name asks for: lines, Parquet, or a folder of save_to_disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=25)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines(rows)))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines(rows[:9])) + zstandard.compress(lines(rows[9:])))
    elif path.suffix == ".jsonl":
        path.write_bytes(lines(rows))
    else:
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk(str(path), num_shards=3)
    return path


FORMATS = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "saved")


@pytest.mark.parametrize("columns", [False, True])
def test_every_format_gives_the_same_rows_for_any_number_of_processes(
    tmp_path: Path, build: Build, columns: bool
) -> None:
    for name in FORMATS:
        write(tmp_path / "raw" / name, pairs(ROWS) if columns else ROWS)
    common = {"instruction": "Find it.", "type": "normal"} | ({"columns": PAIRS} if columns else {})
    store, settings = build(*({"name": name, "path": name} | common for name in FORMATS))
    for i in range(len(FORMATS)):
        assert stored_rows(store, i) == plain(PAIR_ROWS if columns else ROWS)
    own = () if columns else tuple(dict.fromkeys(row["prompt"] for row in ROWS))
    assert store.instructions == (own or ("Find it.",)), "a row's own prompt goes before"
    assert store.manifest.counts["rows"] == 5 * len(ROWS) and store.manifest.counts["quarantined"] == 0
    if columns:
        with_three = replace(settings, data=replace(settings.data, store=settings.data.store + "-3"))
        with open_pool(3) as pool:
            build_store(with_three, pool, **SMALL)
        files = [path.name for path in store.path.iterdir()]
        assert all((store.path / f).read_bytes() == (Path(with_three.data.store) / f).read_bytes() for f in files)


def test_bad_rows_of_tables_are_quarantined_by_row(tmp_path: Path, build: Build) -> None:
    rows = [dict(row) for row in ROWS]
    rows[7]["query"], rows[33]["pos"], rows[59]["neg"] = " ", None, ["n", ""]
    write(tmp_path / "raw/t.parquet", rows)
    write(tmp_path / "raw/saved", rows)
    for name, shown in (
        ("t.parquet", ["t.parquet"] * 3),
        ("saved", [f"saved/data-0000{i}-of-00003.arrow" for i in (0, 1, 2)]),
    ):
        store, _ = build(
            {"name": "t", "path": name}, store=f"store-{name}", overrides=("preprocess.max_bad_row_share=0.1",)
        )
        bad = [json.loads(line) for line in (store.path / "quarantine.jsonl").read_text().splitlines()]
        wanted = [8, 34, 60] if name == "t.parquet" else [8, 14, 20]
        assert [(row["file"], row["line"]) for row in bad] == list(zip(shown, wanted, strict=True))
        reasons = ["empty query", "no positive (pos is missing or empty)", "an empty text in neg"]
        assert [row["reason"] for row in bad] == reasons and bad[0]["start"].startswith("{'query': ' '")
        assert store.manifest.counts["rows"] + len(bad) == len(ROWS)


# Folders.


def test_each_file_of_a_folder_is_a_dataset_in_order_of_names(
    tmp_path: Path, build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    raw = tmp_path / "raw/data"
    write(raw / "nq_no_in_batch_neg.jsonl", ROWS[20:40])
    write(raw / "fever.jsonl.gz", ROWS[:20])
    for i in (1, 0):
        write(raw / f"hotpot-0000{i}-of-00002.parquet", ROWS[40 + 10 * i : 50 + 10 * i])
    (raw / "README.md").write_text("about")
    for path in ("data/", "../raw/data/*.*"):
        store_name = f"store{len(path)}"
        with caplog.at_level("INFO"):
            store, settings = build({"name": "mix", "path": path, "instruction": "Find."}, store=store_name)
        assert [t.name for t in store.datasets] == ["mix/fever", "mix/hotpot", "mix/nq_no_in_batch_neg"]
        assert [stored_rows(store, i) for i in range(3)] == [plain(ROWS[:20]), plain(ROWS[40:]), plain(ROWS[20:40])]
        assert "not data files, left out: README.md" in caplog.text
        # Training has the recipe and the store alone.
        for file in raw.iterdir():
            file.rename(tmp_path / file.name)
        require_match(store, settings, store.manifest.fingerprint)
        assert [d.in_batch_negatives for d in make_schedule(store, settings).datasets] == [True, True, False]
        forced = replace(settings.data.datasets[0], in_batch_negatives=True)
        schedule = make_schedule(store, replace(settings, data=replace(settings.data, datasets=(forced,))))
        assert [d.in_batch_negatives for d in schedule.datasets] == [True] * 3, "the recipe's word goes before"
        other = replace(settings.data.datasets[0], instruction="Search.")
        with pytest.raises(ValueError, match="instruction of dataset mix/fever: store Find., recipe Search."):
            require_match(
                store, replace(settings, data=replace(settings.data, datasets=(other,))), store.manifest.fingerprint
            )
        other = replace(settings.data.datasets[0], name="mixed")
        with pytest.raises(ValueError, match=r"only in the recipe \['mixed'\], only in the store \['mix'\]"):
            make_schedule(store, replace(settings, data=replace(settings.data, datasets=(other,))))
        for name in ("nq_no_in_batch_neg.jsonl", "fever.jsonl.gz", "README.md"):
            (tmp_path / name).rename(raw / name)
        for path_of_shard in tmp_path.glob("hotpot*"):
            path_of_shard.rename(raw / path_of_shard.name)


@pytest.mark.parametrize("path", ["nli_no_in_batch_neg", "nli_no_in_batch_neg/", "nli_no_in_batch_neg/*.jsonl"])
def test_a_folders_name_switches_in_batch_negatives_off_with_and_without_a_slash(
    tmp_path: Path, settings_of: Callable[..., Settings], path: str
) -> None:
    write(tmp_path / "raw/nli_no_in_batch_neg/a.jsonl", ROWS)
    sources = find_sources(settings_of({"name": "nli", "path": path}))
    assert [source.no_in_batch_neg for source in sources] == [True]
    write(tmp_path / "raw/plain/a.jsonl", ROWS)
    assert not find_sources(settings_of({"name": "nli", "path": "plain"}))[0].no_in_batch_neg


def test_globs_through_folders_and_brackets_in_names(tmp_path: Path, settings_of: Callable[..., Settings]) -> None:
    for i, name in enumerate(("b/x.jsonl", "a-1/x.jsonl", "a/x.jsonl", "c_no_in_batch_neg/y.jsonl")):
        write(tmp_path / "raw [old]" / name, ROWS[i:])
    write(tmp_path / "raw [old]/z[1].jsonl", ROWS[9:])
    root = (f"data.root={tmp_path}/raw [old]",)
    found = find_sources(settings_of({"name": "n", "path": "**/*.jsonl"}, overrides=root))
    names = ["n/a-1/x", "n/a/x", "n/b/x", "n/c_no_in_batch_neg/y", "n/z[1]"]
    assert [source.dataset.name for source in found] == names
    assert [source.no_in_batch_neg for source in found] == [False, False, False, True, False]
    assert [source.files[0].name for source in found][0] == "a-1/x.jsonl"
    (single,) = find_sources(settings_of({"name": "n", "path": "z[1].jsonl"}, overrides=root))
    assert single.dataset.name == "n"


def test_files_of_a_folder_as_one_dataset(tmp_path: Path, build: Build) -> None:
    for i, name in enumerate(("b.parquet", "a.jsonl", "c.jsonl.zst")):
        write(tmp_path / "raw/parts" / name, ROWS[20 * i : 20 * i + 20])
    (tmp_path / "raw/parts/a.jsonl").write_bytes(b"oops\n" + lines(ROWS[20:40]) + b"oops\n")
    store, _ = build(
        {"name": "all", "path": "parts", "merge_files": True}, overrides=("preprocess.max_bad_row_share=0.5",)
    )
    assert [t.name for t in store.datasets] == ["all"]
    assert stored_rows(store) == plain(ROWS[20:40] + ROWS[:20] + ROWS[40:])
    bad = [json.loads(line) for line in (store.path / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in bad] == [("a.jsonl", 1), ("a.jsonl", 22)]
    source = store.manifest.datasets[0].source
    assert [f["name"] for f in source["files"]] == ["a.jsonl", "b.parquet", "c.jsonl.zst"]
    size = sum(path.stat().st_size for path in (tmp_path / "raw/parts").iterdir())
    assert (source["name"], source["bytes"], source["entry"]) == ("3 files", size, "all")


# BEIR.


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "raw/beir"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": f"Title {i}" if i % 2 else "", "text": f"Text {i}."} for i in range(9)]
    (folder / "corpus.jsonl").write_bytes(lines(corpus) + b"broken\n")
    (folder / "queries.jsonl").write_bytes(
        lines([{"_id": f"q{i}", "title": "x", "text": f"Question {i}?"} for i in range(6)])
    )
    judged = ["q0 d0 1", "q1 d1 2", "q0 d3 0", "q2 missing 1", "q2 d2 1", "q3 d4 0", "gone d1 1", "q0 d5 1", "q4 d1 1"]
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels/train.tsv").write_text(header + "\n".join(judged).replace(" ", "\t") + "\n")
    (folder / "qrels/test.tsv").write_text(header + "q5\td8\t1\n")
    return folder


def test_beir_folder(beir: Path, build: Build, caplog: pytest.LogCaptureFixture) -> None:
    store, _ = build({"name": "b", "path": "beir"}, overrides=("preprocess.max_bad_row_share=0.5",))
    assert stored_rows(store) == [
        {"query": "Question 0?", "pos": ["Text 0.", "Title 5 Text 5."], "neg": ["Title 3 Text 3."]},
        {"query": "Question 1?", "pos": ["Title 1 Text 1."], "neg": []},
        {"query": "Question 4?", "pos": ["Title 1 Text 1."], "neg": []},
    ]
    bad = [json.loads(line) for line in (store.path / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in bad] == [
        (3, "corpus-id 'missing' is not in corpus.jsonl"),
        (4, "no positive (pos is missing or empty)"),
        (5, "query-id 'gone' is not in queries.jsonl"),
    ]
    assert '"query": "q2"' in bad[0]["start"] and bad[0]["file"] == "beir"
    assert "corpus.jsonl: 1 lines are no texts" in caplog.text
    assert [f["name"] for f in store.manifest.datasets[0].source["files"]] == [
        "beir/train.tsv",
        "beir/corpus.jsonl",
        "beir/queries.jsonl",
    ]


def test_only_the_texts_that_judgements_refer_to_are_held(beir: Path) -> None:
    assert read_texts(beir / "corpus.jsonl", {"d1", "gone"}, with_title=True) == {"d1": "Title 1 Text 1."}
    assert read_texts(beir / "queries.jsonl", {"q0"}, with_title=False) == {"q0": "Question 0?"}


def test_beir_texts_are_those_of_evaluation(beir: Path, build: Build) -> None:
    (beir / "corpus.jsonl").write_bytes((beir / "corpus.jsonl").read_bytes().removesuffix(b"broken\n"))
    (beir / "task.json").write_text(json.dumps({"name": "b", "type": "retrieval", "instruction": "Find."}))
    store, _ = build({"name": "b", "path": "beir", "split": "test"})
    task = load_task(beir)
    (query,) = task.relevant
    wanted = [{"query": task.queries[query], "pos": [task.corpus["d8"]], "neg": []}]
    assert stored_rows(store) == wanted
    assert task.corpus["d7"] == join_title("Title 7", "Text 7.")


def test_beir_split_that_is_not_there(beir: Path, settings_of: Callable[..., Settings]) -> None:
    with pytest.raises(ValueError, match="no split 'dev'; there are: test, train"):
        find_sources(settings_of({"name": "b", "path": "beir", "split": "dev"}))


@pytest.mark.parametrize(
    ("judgements", "line"),
    [
        (b"q0\td0\t1.0\n", 1),
        (b"\xef\xbb\xbfq0\td0\t1.0\nq1\td0\t1\n", 1),
        (b"q0\td0\t\xc2\xb2\n", 1),
        (b"query-id\tcorpus-id\tscore\nq0\td0\t\xc2\xb2\n", 2),
        (b"query-id\tcorpus-id\tscore\nq0\td0\t--1\n", 2),
        (b"query-id\tcorpus-id\tscore\nq0\td0\t0.5\n", 2),
        (b"query-id\tcorpus-id\tscore\nq\xff\td0\t1\n", 2),
        (b"query-id\tcorpus-id\tscore\nquery-id\tcorpus-id\tscore\n", 2),
    ],
)
def test_grades_that_are_no_whole_numbers(judgements: bytes, line: int, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes(judgements)
    with pytest.raises(
        ValueError, match=rf"train.tsv:{line} must be `query-id<TAB>corpus-id<TAB>whole number` in UTF-8, got "
    ):
        read_grades(tmp_path / "train.tsv")


@pytest.mark.parametrize("header", [b"", b"query-id\tcorpus-id\tscore\n", b"\xef\xbb\xbfqid\tpid\tgrade\r\n"])
def test_judgements_with_and_without_a_header(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes(header + b"q0\td0\t1\r\nq0\td1\t-1\n\nq1\td0\t 2 \n")
    assert read_grades(tmp_path / "train.tsv") == {"q0": {"d0": 1, "d1": -1}, "q1": {"d0": 2}}


def test_beir_judgement_that_is_none(beir: Path, settings_of: Callable[..., Settings]) -> None:
    (beir / "qrels/train.tsv").write_text("q0 0 d0 1\nq1 0 d0 1\n")
    with pytest.raises(ValueError, match=r"train\.tsv:2 must be `query-id<TAB>corpus-id<TAB>whole number`"):
        build_store(settings_of({"name": "b", "path": "beir"}), None)


# Hugging Face.


def test_split_of_a_saved_dataset_dict(tmp_path: Path, build: Build, settings_of: Callable[..., Settings]) -> None:
    from datasets import Dataset, DatasetDict

    parts = {"train": Dataset.from_list(pairs(ROWS[:40])), "dev": Dataset.from_list(pairs(ROWS[40:]))}
    DatasetDict(parts).save_to_disk(str(tmp_path / "raw/dict"))
    entry = {"name": "d", "path": "dict", "columns": PAIRS}
    store, _ = build(entry | {"split": "dev"})
    assert stored_rows(store) == plain(PAIR_ROWS[40:])
    with pytest.raises(ValueError, match="several splits; there are: train, dev; set split"):
        find_sources(settings_of(entry))
    with pytest.raises(ValueError, match="no split 'test'; there are: train, dev"):
        find_sources(settings_of(entry | {"split": "test"}))
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "raw/single"))
    with pytest.raises(ValueError, match="one dataset without splits; leave split='train' out"):
        find_sources(settings_of({"name": "d", "path": "single", "split": "train"}))


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The hub cannot be reached in tests: its one name is read from a file by the library's own loader."""
    import datasets

    real, calls = datasets.load_dataset, []
    file = str(write(tmp_path / "hub/pairs.jsonl", pairs(ROWS)))

    def load(name: str, config: str | None, **options: Any) -> Any:
        calls.append((name, config, options["split"], options.pop("revision"), options["streaming"]))
        if name not in ("owner/pairs", "sentence-transformers/all-nli"):
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist on the Hub")
        return real("json", data_files={"train": file}, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_names_are_read_by_the_same_path(build: Build, fake_hub: list[tuple[Any, ...]], streaming: bool) -> None:
    entry = {"name": "h", "path": f"hf://owner/pairs@{COMMIT}", "config": "triplet", "split": "train", "columns": PAIRS}
    store, _ = build(
        entry | {"streaming": streaming}, sizes=SMALL | ({"partition_bytes": 1 << 30} if streaming else {})
    )
    assert stored_rows(store) == plain(PAIR_ROWS)
    assert set(fake_hub) == {("owner/pairs", "triplet", "train", COMMIT, streaming)}
    assert len(list(store.path.glob("texts-*"))) == (4 if streaming else 1)


def test_hub_errors_name_the_dataset(fake_hub: list[tuple[Any, ...]], settings_of: Callable[..., Settings]) -> None:
    with pytest.raises(ValueError, match="dataset 'h': hf://owner/other: Dataset 'owner/other' doesn't exist"):
        find_sources(settings_of({"name": "h", "path": "hf://owner/other", "split": "train"}))
    with pytest.raises(ValueError, match="a part of a split cannot be read"):
        find_sources(settings_of({"name": "h", "path": "hf://owner/pairs", "split": "train[:9]", "columns": PAIRS}))
    with pytest.raises(ValueError, match="columns.pos names 'answer'.*there are: anchor, positive, negative_1"):
        build_store(
            settings_of(
                {
                    "name": "h",
                    "path": f"hf://owner/pairs@{COMMIT}",
                    "split": "train",
                    "streaming": True,
                    "columns": PAIRS | {"pos": "answer"},
                }
            ),
            None,
        )


def test_a_damaged_file_of_the_hub_names_the_dataset(
    tmp_path: Path, fake_hub: list[tuple[Any, ...]], settings_of: Callable[..., Settings]
) -> None:
    (tmp_path / "hub/pairs.jsonl").write_text('{"anchor": "a", "positive": "b"}\n{"anchor": ')
    with pytest.raises(ValueError, match=r"hf://owner/pairs: An error occurred .*\(.+\); check name, config and split"):
        find_sources(settings_of({"name": "h", "path": "hf://owner/pairs", "split": "train", "columns": PAIRS}))


def test_a_stream_that_breaks_off_names_the_dataset(
    settings_of: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the library raises in mid-stream once its own tries are used up."""
    import datasets
    from huggingface_hub.errors import HTTPError

    class Stream:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def with_format(self, _: str) -> "Stream":
            return self

        def iter(self, batch_size: int) -> Iterator[pa.Table]:
            yield pa.Table.from_pylist(pairs(ROWS[:5]))
            raise self.error

    entry = {"name": "h", "path": f"hf://owner/pairs@{COMMIT}", "split": "train", "streaming": True, "columns": PAIRS}
    for error in (ConnectionError("Server Disconnected"), HTTPError("reset"), TimeoutError(), ValueError("bad page")):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, error=error, **__: Stream(error))
        reason = str(error) or "TimeoutError"
        with pytest.raises(ValueError, match=f"hf://owner/pairs@.*: reading stopped behind row 5: {reason}; run the"):
            build_store(settings_of(entry), None)


# The README.


def test_the_recipe_of_the_readme_is_read(tmp_path: Path, beir: Path, fake_hub: list[Any], build: Build) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    data = yaml.safe_load(text.split("## Sources")[1].split("```yaml\n")[1].split("```")[0])["data"]
    raw = tmp_path / "raw"
    write(raw / "bge-data/nq.jsonl", ROWS[:20])
    write(raw / "bge-data/fever.jsonl.zst", ROWS[20:40])
    (raw / "beir/corpus.jsonl").write_bytes((beir / "corpus.jsonl").read_bytes().removesuffix(b"broken\n"))
    (raw / "beir/qrels/train.tsv").write_text("q0\td0\t1\n")
    beir.rename(tmp_path / "fiqa")
    (raw / "beir").mkdir()
    (tmp_path / "fiqa").rename(raw / "beir/fiqa")
    # The name on the hub holds what every name holds here: pairs with one negative in `negative`.
    triplets = [{"anchor": r["query"], "positive": r["pos"][0], "negative": r["neg"][0]} for r in ROWS[:30]]
    write(tmp_path / "hub/pairs.jsonl", triplets)
    mined = [{"question": r["query"], "answer": r["pos"][0], "negative_1": r["neg"][0], "type": 7} for r in ROWS[40:]]
    for i, part in enumerate((mined[:9], mined[9:])):
        write(raw / f"mined/part-{i}.parquet", part)
    store, _ = build(*data["datasets"])
    found = {t.name: (t.num_rows, t.task_type) for t in store.datasets}
    assert found == {
        "bge/fever": (20, "normal"),
        "bge/nq": (20, "normal"),
        "fiqa": (1, "normal"),
        "nli": (30, "only_1neg"),
        "mined": (20, "normal"),
    }
    assert stored_rows(store, 4) == plain(PAIR_ROWS[40:])


# Errors.


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a.jsonl", "split": "train"}, "split='train' is for folders of save_to_disk, BEIR folders and hub"),
        ({"path": "folder", "split": "train"}, "split='train' is for folders of save_to_disk, BEIR folders and hub"),
        ({"path": "a.jsonl", "config": "en"}, "data.datasets[0].config='en' is for hub names"),
        ({"path": "a.jsonl", "streaming": True}, "data.datasets[0].streaming=True is for hub names"),
        ({"path": "a.jsonl", "merge_files": True}, "merge_files is for folders and globs, and this is one file"),
        ({"path": "hf://a/b"}, "hf://a/b needs a split"),
        ({"path": "hf://a/b/c", "split": "train"}, "must be written hf://owner/name"),
        ({"path": "hf://a/b", "split": "t", "merge_files": True}, "merge_files is for folders and globs"),
        ({"path": "hf://a/b@main", "split": "train", "streaming": True}, "name the commit as 40 digits"),
        ({"path": "a.jsonl", "columns": {"query": ["a", "b"]}}, "columns.query=['a', 'b'] must name one column"),
        ({"path": "a.jsonl", "columns": {"query": "a*"}}, "columns.query=['a*'] must name one column"),
        ({"path": "a.jsonl", "columns": {"neg": [""]}}, "columns.neg=[''] must name columns"),
        ({"path": "a.jsonl", "columns": {"negative": "n"}}, "unknown setting 'data.datasets[0].columns.negative'"),
        ({"path": "a.jsonl", "columns": {"neg": 3}}, "columns.neg=3 must be a list"),
        ({"path": "nowhere.jsonl"}, "no such file"),
        ({"path": "nowhere/*.jsonl"}, "no data file is there"),
        ({"path": "empty"}, "no data file is there"),
        ({"path": "a.csv"}, "files of this form are not read, only .jsonl"),
        ({"path": "list.json"}, "holds one JSON list, not one row a line"),
        ({"path": "folder"}, "zero.jsonl: the file is empty"),
        ({"path": "twins"}, "a.jsonl, a.jsonl.gz differ in their suffix alone"),
        ({"path": "shards"}, "1 of the 3 shards of 'x' are there"),
        ({"path": "pairs.jsonl"}, "no column 'query'; name the one to read as columns.query; there are: anchor, posi"),
        ({"path": "pairs.parquet"}, "no column 'query'; name the one to read as columns.query; there are: anchor, po"),
        ({"path": "pairs.jsonl", "columns": PAIRS | {"neg": "negative"}}, "columns.neg names 'negative', which no row"),
        ({"path": "pairs.parquet", "columns": PAIRS | {"neg": "negative"}}, "columns.neg names 'negative', which does"),
        ({"path": "none.parquet"}, "none.parquet) has no rows"),
        ({"path": "torn"}, "not a whole folder of save_to_disk"),
    ],
)
def test_entries_that_make_no_sense(
    tmp_path: Path,
    tiny_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    entry: dict[str, Any],
    message: str,
) -> None:
    raw = tmp_path / "raw"
    write(raw / "a.jsonl", ROWS)
    for name in ("pairs.jsonl", "pairs.parquet"):
        write(raw / name, pairs(ROWS))
    (raw / "empty").mkdir()
    pq.write_table(pa.table({"query": ["q"], "pos": ["p"]}).slice(1), raw / "none.parquet")
    (raw / "a.csv").write_text("query,pos\n")
    (raw / "list.json").write_text(json.dumps(ROWS))
    write(raw / "folder/one.jsonl", ROWS)
    (raw / "folder/zero.jsonl").touch()
    write(raw / "twins/a.jsonl", ROWS)
    write(raw / "twins/a.jsonl.gz", ROWS)
    write(raw / "shards/x-00001-of-00003.parquet", ROWS)
    (raw / "torn").mkdir()
    for name in ("state.json", "dataset_info.json"):
        (raw / "torn" / name).write_text("{}")
    recipe = tiny_recipe(rows=1, data={"datasets": [{"name": "a"} | entry]})
    assert main(["--config", str(recipe), "--processes", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "store").exists()


def test_rows_that_stand_twice_in_a_mix_are_named(
    tmp_path: Path, settings_of: Callable[..., Settings], build: Build
) -> None:
    write(tmp_path / "raw/folder/a.jsonl", pairs(ROWS))
    (tmp_path / "raw/b.jsonl").write_bytes((tmp_path / "raw/folder/a.jsonl").read_bytes())
    first = {"name": "first", "path": "folder/a.jsonl", "columns": PAIRS}
    for other in ("folder/a.jsonl", "b.jsonl", "folder"):
        with pytest.raises(ValueError, match=r"a\.jsonl of dataset 'first' and .* of dataset 'second.*the same bytes"):
            build_store(settings_of(first, {"name": "second", "path": other, "columns": PAIRS}), None)
    # Spark writes many empty files that are alike; they hold no rows.
    for i in range(3):
        pq.write_table(pa.table({"query": ["q"], "pos": ["p"]}).slice(0, 0 if i else 1), tmp_path / f"raw/{i}.parquet")
    store, _ = build({"name": "spark", "path": "*.parquet", "merge_files": True}, store="spark")
    assert store.datasets[0].num_rows == 1
    back = {"name": "back", "path": "b.jsonl", "columns": {"query": "positive", "pos": "anchor"}}
    store, _ = build(first, back)
    assert [row["query"] for row in stored_rows(store, 1)] == [row["pos"][0] for row in plain(ROWS)]


def test_a_file_that_changes_during_a_build_leaves_no_store(
    tmp_path: Path, settings_of: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, real = settings_of({"name": "a", "path": "*", "merge_files": True}), building.add_checksum
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet"):
        for other in (tmp_path / "raw").iterdir():
            other.unlink()
        path = write(tmp_path / "raw" / name, ROWS)
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"{name} changed while it was being read"):
            patch.setattr(building, "add_checksum", lambda state, path=path: (real(state), write(path, ROWS[:9]))[0])
            build_store(settings, None, **SMALL)
        assert not (tmp_path / "store").exists()
    manifest, _ = build_store(settings, None, **SMALL)
    assert manifest.counts["rows"] == 9, "run again, it is read as it is now"


def test_names_that_collide_are_refused(tmp_path: Path, settings_of: Callable[..., Settings]) -> None:
    write(tmp_path / "raw/folder/a.jsonl", ROWS)
    write(tmp_path / "raw/b.jsonl", ROWS[1:])
    with pytest.raises(ValueError, match="two datasets would be named 'x/a'"):
        find_sources(settings_of({"name": "x", "path": "folder"}, {"name": "x/a", "path": "b.jsonl"}))


def test_columns_and_split_belong_to_the_identity_of_a_store(
    tmp_path: Path, build: Build, settings_of: Callable[..., Settings]
) -> None:
    write(tmp_path / "raw/p.jsonl", pairs(ROWS))
    entry = {"name": "p", "path": "p.jsonl", "columns": {"query": "anchor", "pos": "positive"}}
    build(entry)
    assert build_store(settings_of(entry), None, **SMALL)[1] is False
    with pytest.raises(ValueError, match=r"datasets.p.columns: store .*'positive'.*, now .*negative_1"):
        build_store(settings_of(entry | {"columns": PAIRS}), None, **SMALL)


def test_odd_rows_of_every_size_reach_the_store(tmp_path: Path, build: Build) -> None:
    """A million-token text, ten thousand negatives, NUL characters: stored, cut where limits say so, none lost."""
    rows = [
        {"query": "long", "pos": ["word " * 1_000_000], "neg": []},
        {"query": "many", "pos": ["p"], "neg": [f"negative {i}" for i in range(10_000)]},
        {"query": "nul \0 inside", "pos": ["p\0"], "neg": ["\ufeffmark"]},
    ]
    write(tmp_path / "raw/odd.jsonl", rows)
    write(tmp_path / "raw/odd.parquet", rows[1:])
    entries = [{"name": "j", "path": "odd.jsonl"}, {"name": "p", "path": "odd.parquet"}]
    store, _ = build(*entries, sizes={})
    assert stored_rows(store) == plain(rows) and stored_rows(store, 1) == plain(rows[1:])
    counts: Manifest = store.manifest
    assert counts.counts["rows"] == 5 and counts.datasets[0].counts["passages_cut"] == 1
