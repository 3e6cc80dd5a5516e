"""Mining against its slow twin for any shards and blocks; killed runs, changed options, one message for each fault."""

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import REPOSITORY
from slow_mining import SlowResult, inner_product, mine_slowly
from test_embedder import change_json
from test_lightweight_reranker import own  # noqa: F401
from tiny_encoders import make_cross_encoder, make_minable_run, make_sentence_model

from pipeline.data.columns import open_columns
from pipeline.data.raw_rows import raw_row
from pipeline.data.store import DatasetTable, TokenStore, open_store
from pipeline.inference.reranker import LightweightReranker
from pipeline.mine_negatives import main
from pipeline.mining import dataset as stages
from pipeline.mining.options import MiningOptions
from pipeline.preprocess import main as preprocess
from pipeline.settings import load_settings

WINDOW = ["--window", "3-40", "--num-negatives", "5", "--nearest", "6"]
RULES_ON = ["--max-ratio", "0.98", "--margin", "0.01", "--max-score", "0.97"]


@dataclass(frozen=True)
class Ready:
    """A store and models to mine it with."""

    recipe: Path
    model: Path
    teacher: Path
    store: TokenStore

    def command(self, out: Path, *more: str, embedder: str | Path = "") -> list[str]:
        return ["--config", str(self.recipe), "--embedder", str(embedder or self.model), "--out", str(out), *more]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    folder = tmp_path_factory.mktemp("minable")
    recipe = make_minable_run(folder)
    assert preprocess(["--config", str(recipe), "--processes", "1"]) == 0
    model, teacher = make_sentence_model(folder / "sentence-model"), make_cross_encoder(folder / "teacher")
    return Ready(recipe, model, teacher, open_store(load_settings(recipe).data.store))


@pytest.fixture(scope="module")
def reranker(own: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run folder with a random reranker, for whose limit some pairs are too long."""
    run = shutil.copytree(own[0], tmp_path_factory.mktemp("reranker") / "run")
    change_json(run / "model/reranker.json", max_pair_tokens=56, compress_layers=[1, 2])
    return run


@pytest.fixture(scope="module")
def mined(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole run; read only."""
    out = tmp_path_factory.mktemp("mined") / "out"
    assert main(ready.command(out, *WINDOW, *RULES_ON)) == 0
    return out


def table_of(store: TokenStore, name: str) -> DatasetTable:
    return next(table for table in store.datasets if table.name == name)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report_of(out: Path, name: str) -> dict[str, Any]:
    return next(r for r in json.loads((out / "report.json").read_text()) if r["dataset"] == name)


def results(out: Path) -> dict[str, bytes]:
    """Everything that a run leaves beside its work."""
    paths = [path for path in out.rglob("*") if path.is_file() and "work" not in path.relative_to(out).parts]
    # The recipe names its folder.
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths if path.name != "recipe.yaml"}


def raw_rows(store: TokenStore, table: DatasetTable) -> list[dict[str, Any]]:
    return [raw_row(store, table, n) | {"instruction_id": int(table.instruction_N[n])} for n in range(table.num_rows)]


@cache
def text_ids(store_path: Path) -> dict[str, int]:
    store = open_store(store_path)
    return {store.text(i): i for i in range(store.num_texts)}


def embedded(folder: Path) -> np.ndarray:
    blocks = [open_columns(path) for path in sorted(folder.glob("block-*"))]
    return np.concatenate([block["value"].reshape(len(block["cut"]), -1) for block in blocks])


def slow_result(ready: Ready, out: Path, name: str, options: MiningOptions, teacher: Any = None) -> SlowResult:
    """The twin's result from the embeddings that the run left."""
    store, table = ready.store, table_of(ready.store, name)
    pooled = options.corpus == "type"
    tables = [t for t in store.datasets if t is table or (pooled and t.task_type == table.task_type)]
    ids, rows = text_ids(store.path), raw_rows(store, table)
    pool = [row for t in tables for row in raw_rows(store, t)]
    corpus = sorted({ids[text] for row in pool for text in (*row["pos"], *row["neg"])})
    queries = sorted({(row["instruction_id"], ids[row["query"]]) for row in rows})
    where = out / "work/embeddings"
    query_QD = embedded(where / f"queries-{name.replace(' ', '_')}")
    passage_CD = embedded(next(where.glob("passages-type-*" if pooled else f"passages-dataset-of-{name}")))
    assert len(query_QD) == len(queries) and len(passage_CD) == len(corpus)
    query_of = {pair: query_QD[i] for i, pair in enumerate(queries)}
    passage_of = {text_id: passage_CD[i] for i, text_id in enumerate(corpus)}

    def query(row: dict[str, Any]) -> np.ndarray:
        return query_of[(row["instruction_id"], ids[row["query"]])]

    return mine_slowly(
        rows,
        pool,
        ids,
        name,
        options,
        lambda row, text: inner_product(query(row), passage_of[ids[text]]),
        lambda row, other: inner_product(query(row), query(other)),
        teacher,
    )


def assert_same(ready: Ready, out: Path, name: str, slow: SlowResult, keep: bool = False) -> None:
    """Rows and counts of a run are those of the twin."""
    table = table_of(ready.store, name)
    found, report = lines_of(out / f"{name.replace(' ', '_')}.jsonl"), report_of(out, name)
    assert len(found) == table.num_rows == report["rows"]
    for n, row in enumerate(found):
        before = raw_row(ready.store, table, n)
        assert row["neg"] == (before["neg"] if keep else []) + slow.negatives[n], n
        assert row["nearest"] == slow.nearest[n], n
        assert {k: v for k, v in row.items() if k not in ("neg", "nearest")} == {
            k: v for k, v in before.items() if k not in ("neg", "pos_scores", "neg_scores")
        }
    assert {k: v for k, v in report["removed"].items() if v} == slow.removed
    assert report["candidates"] == slow.candidates
    assert report["kept"] == slow.candidates - sum(slow.removed.values())
    assert report["negatives"] == sum(len(texts) for texts in slow.negatives)
    for k, share in report["recall"].items():
        assert share == np.mean([0 < rank <= int(k) for rank in slow.ranks])
    lowest = report["quantiles"]["positive (lowest of the row)"]
    assert np.allclose(lowest, np.quantile(slow.lowest, (0.05, 0.25, 0.5, 0.75, 0.95)), atol=1e-6)


OPTIONS = MiningOptions(
    first_rank=3, last_rank=40, num_negatives=5, num_nearest=6, max_ratio=0.98, margin=0.01, max_score=0.97
)


@pytest.mark.parametrize("name", ["normal", "symmetric_sts", "symmetric_class", "symmetric_clustering"])
def test_rows_and_counts_are_those_of_the_slow_twin(ready: Ready, mined: Path, name: str) -> None:
    slow = slow_result(ready, mined, name, OPTIONS)
    assert_same(ready, mined, name, slow)
    if name == "normal":
        assert set(slow.removed) == {
            *("positive", "copy", "same_query", "same_positive", "max_score", "margin", "max_ratio")
        }, "the rows try every rule that they can"
        assert 0 < sum(len(texts) < 5 for texts in slow.negatives) == report_of(mined, name)["rows_with_too_few"]
    if name == "symmetric_clustering":
        assert slow.removed["same_category"] > 0


def test_corpus_of_all_datasets_of_the_type_and_kept_negatives(ready: Ready, tmp_path: Path) -> None:
    more = ["--corpus", "type", "--keep-negatives", "--max-ratio", "none", "--seed", "5", "--dataset", "normal"]
    assert main(ready.command(tmp_path / "out", *WINDOW, *more)) == 0
    options = MiningOptions(3, 40, 5, None, None, None, corpus="type", keep_negatives=True, num_nearest=6, seed=5)
    slow = slow_result(ready, tmp_path / "out", "normal", options)
    assert slow.removed["present"] > 0 and report_of(tmp_path / "out", "normal")["corpus_texts"] > 150
    assert_same(ready, tmp_path / "out", "normal", slow, keep=True)


@pytest.mark.parametrize("kind", ["cross-encoder", "reranker"])
def test_teacher_removes_what_it_scores_too_high(
    ready: Ready,
    reranker: Path,
    kind: str,
    tmp_path: Path,
) -> None:
    from sentence_transformers import CrossEncoder

    folder = reranker if kind == "reranker" else ready.teacher
    model = LightweightReranker(folder, show_progress=False) if kind == "reranker" else CrossEncoder(str(folder))

    @cache
    def teacher(query: str, text: str) -> float:
        if isinstance(model, CrossEncoder):
            return float(model.predict([(query, text)], show_progress_bar=False)[0])
        logit = float(model.score([(query, text)], 3, (1,), 2, "p-p")[0])
        return 1 / (1 + math.exp(-logit))

    more = ["--teacher", str(folder), "--teacher-ratio", "0.9", "--dataset", "symmetric_sts", "--max-ratio", "none"]
    setting = ["--teacher-setting", "ratio=2,layers=1,exit=3"] if kind == "reranker" else []
    assert main(ready.command(tmp_path / "out", *WINDOW, *more, *setting)) == 0
    options = MiningOptions(3, 40, 5, max_ratio=None, teacher="x", teacher_ratio=0.9, num_nearest=6)
    slow = slow_result(ready, tmp_path / "out", "symmetric_sts", options, teacher)
    assert_same(ready, tmp_path / "out", "symmetric_sts", slow)
    counts = report_of(tmp_path / "out", "symmetric_sts")["teacher"]
    assert counts["seen"] == len(slow.seen_by_teacher) and counts["removed"] == counts["seen"] - sum(
        map(len, slow.negatives)
    )
    assert 0 < counts["removed"] < counts["seen"]
    if kind == "reranker":
        rows = raw_rows(ready.store, table_of(ready.store, "symmetric_sts"))
        pairs = [*slow.seen_by_teacher, *((row["query"], text) for row in rows for text in row["pos"])]
        num_cut = sum(pair.passage_was_cut for pair in model.compose(pairs, "p-p"))
        name = "exit=3,layers=1,ratio=2"
        assert (counts["setting"], counts["pairs_cut"]) == (name, num_cut) and num_cut
        assert f"it cut {num_cut:,} pairs" in (tmp_path / "out/report.md").read_text()
        assert f"the teacher (setting {name}) read" in (tmp_path / "out/report.md").read_text()
        record = json.loads((tmp_path / "out/settings.json").read_text())["options"]
        assert (record["teacher"]["setting"], record["relations"]["symmetric_sts"]) == (name, "p-p")
        assert "teacher_setting" not in record


def test_words_are_those_of_the_slow_twin(ready: Ready, tmp_path: Path) -> None:
    import bm25s

    out, name = tmp_path / "out", "normal"
    assert main(ready.command(out, *WINDOW, "--dataset", name, "--margin", "0.1", embedder="bm25")) == 0
    store, ids = ready.store, text_ids(ready.store.path)
    rows = raw_rows(store, table_of(store, name))

    def ranker(texts: list[str]) -> Callable[[str, str], np.float32 | None]:
        """bm25s asked for one query at a time, over all texts by id."""
        ordered = sorted(texts, key=ids.__getitem__)
        index = bm25s.BM25()
        index.index(bm25s.tokenize(ordered, stopwords="en", show_progress=False), show_progress=False)

        @cache
        def scores(query: str) -> dict[str, np.float32]:
            words = bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
            found = index.get_scores(words) if words else np.zeros(len(ordered), np.float32)
            return dict(zip(ordered, found, strict=True))

        return lambda query, text: value if (value := scores(query)[text]) > 0 else None

    passages = ranker(list({text for row in rows for text in (*row["pos"], *row["neg"])}))
    queries = ranker([query for _, query in {(row["instruction_id"], row["query"]) for row in rows}])
    slow = mine_slowly(
        rows,
        rows,
        ids,
        name,
        MiningOptions(3, 40, 5, margin=0.1, max_ratio=None, num_nearest=6),
        lambda row, text: passages(row["query"], text),
        lambda row, other: queries(row["query"], other["query"]),
    )
    assert_same(ready, out, name, slow)
    assert not (out / "work/embeddings").exists()


def test_shards_and_blocks_change_nothing(ready: Ready, mined: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stages.MiningRun.__init__, "__defaults__", (7,))
    # Embeddings are taken over: a model's last bits may depend on the texts of a batch, the search may not.
    shutil.copytree(mined / "work/embeddings", tmp_path / "out/work/embeddings")
    shutil.copy(mined / "settings.json", tmp_path / "out/settings.json")
    monkeypatch.setattr("pipeline.mining.models.load_text_model", None)
    assert main(ready.command(tmp_path / "out", *WINDOW, *RULES_ON, "--shard-texts", "13")) == 0
    assert results(tmp_path / "out") == results(mined)


def test_embeddings_are_the_models_own(ready: Ready, mined: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model, table = SentenceTransformer(str(ready.model), device="cpu"), table_of(ready.store, "normal")
    ids = sorted({*table.pos_text.tolist(), *table.neg_text.tolist()})
    found = embedded(mined / "work/embeddings/passages-dataset-of-normal")
    for i in range(0, len(ids), 9):
        alone = model.encode([ready.store.text(ids[i])], normalize_embeddings=True)[0]
        assert np.abs(found[i] - alone).max() < 1e-5
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5


def test_texts_that_the_embedder_cuts_are_counted(ready: Ready, mined: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, table = AutoTokenizer.from_pretrained(ready.model), table_of(ready.store, "normal")

    def count_long(ids: set[Any]) -> int:
        return sum(len(tokenizer(ready.store.text(i))["input_ids"]) > 16 for i in ids)

    queries, passages = {*table.query_text_N.tolist()}, {*table.pos_text.tolist(), *table.neg_text.tolist()}
    cut = report_of(mined, "normal")["texts_cut"]
    assert cut == {"queries": count_long(queries), "passages": count_long(passages)} and cut["passages"] > 0
    line = f"the embedder cut {cut['queries']} of the queries and {cut['passages']} of the texts to its maximum length"
    assert line in (mined / "report.md").read_text()


def test_next_recipe_reads_what_was_mined(ready: Ready, mined: Path, tmp_path: Path) -> None:
    again = [f"data.store={tmp_path / 'store'}"]
    assert preprocess(["--config", str(mined / "recipe.yaml"), "--processes", "1", *again]) == 0
    store = open_store(tmp_path / "store")
    for old, new in zip(ready.store.datasets, store.datasets, strict=True):
        found = lines_of(mined / f"{new.name.replace(' ', '_')}.jsonl")
        assert new.task_type == old.task_type and new.num_rows == old.num_rows
        for n, line in enumerate(new.source_line_N.tolist()):
            row = raw_row(store, new, n)
            before = raw_row(ready.store, old, line - 1)
            assert new.nearest_offsets is not None and new.nearest_row is not None
            nearest = new.nearest_row[new.nearest_offsets[n] : new.nearest_offsets[n + 1]]
            assert new.source_line_N[nearest].tolist() == found[line - 1]["nearest"]
            assert row["neg"] == found[line - 1]["neg"] and row["pos"] == before["pos"]
            assert row["query"] == before["query"] and row["prompt"] == before["prompt"]


# --- a run of this project as the embedder ---


def test_own_model_embeds_queries_with_instruction_and_wraps_passages_of_symmetric_types(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.inference import embedder as embedding
    from pipeline.inference.embedder import load_base_embedder

    base = load_base_embedder(load_settings(ready.recipe), show_progress=False)
    monkeypatch.setattr(embedding, "load_embedder", lambda folder, show_progress: base)
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/embedder.json").write_text("{}")
    names = ["--dataset", "normal", "--dataset", "symmetric_clustering"]
    assert main(ready.command(tmp_path / "out", *WINDOW, *names, embedder=tmp_path / "run")) == 0
    for name in ("normal", "symmetric_clustering"):
        table, where = table_of(ready.store, name), tmp_path / "out/work/embeddings"
        texts = [ready.store.text(i) for i in sorted({*table.pos_text.tolist(), *table.neg_text.tolist()})]
        wrapped = base.encode_queries(texts, f"Do {name}.")
        plain = base.encode_passages(texts)
        found = embedded(where / f"passages-dataset-of-{name}")
        assert np.abs(found - (wrapped if name == "symmetric_clustering" else plain)).max() < 1e-5
        assert np.abs(wrapped - plain).max() > 1e-2
    pairs = sorted({(int(i), int(t)) for i, t in zip(table.instruction_N, table.query_text_N, strict=True)})
    expected = base.encode_queries([ready.store.text(t) for _, t in pairs], "Do symmetric_clustering.")
    assert np.abs(embedded(where / "queries-symmetric_clustering") - expected).max() < 1e-5


# --- going on ---


def mining_process(arguments: list[str]) -> subprocess.Popen[bytes]:
    """A process that mines in small blocks with an embedder of two lines, slowed so that a kill meets it at work."""
    code = (
        "import sys, time, zlib\n"
        "import numpy as np\n"
        "from pipeline.mining import dataset, models\n"
        "def embed(texts, instruction, as_query):\n"
        "    time.sleep(0.05)\n"
        "    rows = [np.random.default_rng(zlib.crc32((instruction + t).encode())).normal(size=8) for t in texts]\n"
        "    unit = np.array([row / np.linalg.norm(row) for row in rows], dtype=np.float32)\n"
        "    return unit, np.zeros(len(texts), dtype=bool)\n"
        "models.load_text_model = lambda *a: models.TextModel('sentence_transformer', 'cosine', {}, False, embed)\n"
        "real_fill, real_mine = dataset.fill_blocks, dataset.mine_block\n"
        "dataset.fill_blocks = lambda *a: real_fill(*a, 16)\n"
        "dataset.mine_block = lambda *a: (time.sleep(0.05), real_mine(*a))[1]\n"
        "dataset.MiningRun.__init__.__defaults__ = (9,)\n"
        "from pipeline.mine_negatives import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, cwd=REPOSITORY)


KILLED = [*WINDOW, "--max-score", "0.9", "--dataset", "normal", "--dataset", "symmetric_sts"]


@pytest.fixture(scope="module")
def never_killed(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("never_killed") / "out"
    assert mining_process(ready.command(out, *KILLED)).wait() == 0
    return out


@pytest.mark.parametrize("moment", ["work/embeddings/passages-*/block-000001.safetensors", "work/rows/normal/*7.npz"])
def test_killed_run_goes_on_to_the_same_bytes(ready: Ready, never_killed: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "out"
    process, deadline = mining_process(ready.command(out, *KILLED)), time.monotonic() + 60
    while not list(out.glob(moment)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and list(out.glob(moment))
    assert not list(out.glob("*.jsonl")) and not (out / "report.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (out / "work").rglob("block-*")}
    assert before and mining_process(ready.command(out, *KILLED)).wait() == 0
    assert results(out) == results(never_killed)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items()), "what is embedded stays"


def test_finished_run_does_nothing_and_datasets_may_follow_each_other(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first, second = (ready.command(out, *WINDOW, "--dataset", name) for name in ("symmetric_sts", "symmetric_class"))
    assert main(second) == 0 and main(first) == 0
    assert [r["dataset"] for r in json.loads((out / "report.json").read_text())] == ["symmetric_sts", "symmetric_class"]
    before = results(out)
    monkeypatch.setattr(stages, "mine_block", None)
    monkeypatch.setattr(stages, "fill_blocks", None)
    assert main(first) == 0 and results(out) == before


def test_changed_options_are_refused_and_overwrite_keeps_the_embeddings(
    ready: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(ready.command(out, *WINDOW, "--dataset", "normal")) == 0
    before = results(out)
    changed = ready.command(out, *WINDOW, "--dataset", "normal", "--margin", "0.2")
    assert main(changed) == 2
    assert "options.margin: there None, now 0.2" in capsys.readouterr().err and results(out) == before
    assert main(ready.command(out, *WINDOW, "--dataset", "normal", "--batch-size", "7")) == 2
    assert "  embeddings.embedder.batch_size: there 64, now 7\n" in capsys.readouterr().err
    loaded: list[Path] = []
    monkeypatch.setattr("pipeline.mining.models.load_text_model", lambda *a: loaded.append(a))
    assert main([*changed, "--overwrite"]) == 0
    assert not loaded and results(out)["normal.jsonl"] != before["normal.jsonl"]


def test_embeddings_of_unknown_origin_are_not_used(ready: Ready, mined: Path, tmp_path: Path) -> None:
    where = "work/embeddings/queries-symmetric_sts/block-000000.safetensors"
    (tmp_path / where).parent.mkdir(parents=True)
    (tmp_path / where).write_bytes((mined / where).read_bytes()[:-9] + b"elsewhere")
    assert main(ready.command(tmp_path, *WINDOW, "--dataset", "symmetric_sts", "--nearest", "0")) == 0
    assert (tmp_path / where).read_bytes() == (mined / where).read_bytes()
    assert "nearest" not in lines_of(tmp_path / "symmetric_sts.jsonl")[0]


def test_another_model_is_refused_and_overwrite_embeds_anew(
    ready: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, copy = tmp_path / "out", tmp_path / "model"
    shutil.copytree(ready.model, copy)
    assert main(ready.command(out, *WINDOW, "--dataset", "symmetric_sts")) == 0
    assert main(ready.command(out, *WINDOW, "--dataset", "symmetric_sts", embedder=copy)) == 0, "the same files"
    weights = next(path for path in copy.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    other = ready.command(out, *WINDOW, "--dataset", "symmetric_sts", embedder=copy)
    assert main(other) == 2
    assert "embeddings.embedder.sha256: there " in capsys.readouterr().err
    old = {p: p.stat().st_mtime_ns for p in (out / "work/embeddings").rglob("block-*")}
    assert main([*other, "--overwrite"]) == 0
    assert all(p.stat().st_mtime_ns != before for p, before in old.items())


# --- what the user can cause ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--embedder", "nowhere"], "--embedder nowhere: no such folder; a model of the hub is fetched first"),
        (["--embedder", "{tmp}"], "holds neither a cross-encoder"),
        (["--embedder", "{teacher}"], "holds a cross-encoder, which gives no embeddings"),
        (["--num-negatives", "0"], "--num-negatives 0 must be at least 1"),
        (["--window", "0-9"], "--window 0-9 must be two ranks"),
        (["--window", "20-10"], "--window 20-10 must be two ranks"),
        (["--window", "ten"], "--window ten must be two ranks"),
        (["--max-ratio", "1.5"], "--max-ratio 1.5 must lie in 0..1"),
        (["--max-ratio", "nan"], "--max-ratio nan must lie in 0..1"),
        (["--max-ratio", "much"], "--max-ratio much must be a number, or none"),
        (["--margin", "-0.1"], "--margin -0.1 must be 0 or more"),
        (["--margin", "2"], "--margin 2.0 must be below 2"),
        (["--max-score", "7"], "--max-score 7.0 must lie in -1..1"),
        (["--max-score", "nan"], "--max-score nan must be a finite number"),
        (["--embedder", "{reranker}"], "holds a reranker, which gives no embeddings"),
        (["--teacher-setting", "light"], "--teacher-setting light is for a reranker as --teacher, which is not given"),
        (
            ["--teacher", "{teacher}", "--teacher-setting", "full"],
            "--teacher-setting full is for rerankers; --teacher ",
        ),
        (
            ["--teacher", "{reranker}", "--teacher-setting", "exit=5"],
            "--teacher-setting exit=5: exit_layer=5 is none of the layers 2 to 4 of this model",
        ),
        (["--teacher-ratio", "0"], "--teacher-ratio 0.0 must lie in 0..1"),
        (["--nearest", "-1"], "--nearest -1 must be 0"),
        (["--shard-texts", "0"], "--shard-texts 0 must be at least 1"),
        (["--dataset", "msmarco"], "--dataset msmarco: the store "),
        (["--teacher", "{tmp}"], "holds neither a cross-encoder"),
        (["data.store={tmp}/none"], "does not exist; build it: python pipeline/preprocess.py"),
        (["--out", "{tmp}"], "is not empty and holds no results of this command"),
        (["--out", "{tmp}/file"], "is a file; name a folder"),
        (["--config", "{tmp}/no.yaml"], "no such file"),
    ],
)
def test_faults_have_one_message(
    ready: Ready,
    reranker: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = [word.format(tmp=tmp_path, teacher=ready.teacher, reranker=reranker) for word in more]
    assert main(ready.command(tmp_path / "out", *arguments)) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ") and message in found and found.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine" and not list(tmp_path.rglob("*.jsonl"))


def test_one_process_mines_in_a_folder_and_a_damaged_record_is_named(
    ready: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    with (out / "work/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(ready.command(out, embedder="bm25")) == 2
    assert f"error: another process writes to {out}" in capsys.readouterr().err
    for record in ("{", "[]", "{}"):
        (out / "settings.json").write_text(record)
        assert main(ready.command(out, embedder="bm25")) == 2
        assert str(out / "settings.json") in capsys.readouterr().err


def test_faults_of_models_have_one_message(
    ready: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = make_cross_encoder(tmp_path / "two", num_labels=2)
    assert main(ready.command(tmp_path / "a", *WINDOW, "--dataset", "normal", "--teacher", str(two))) == 2
    assert "gives 2 scores a pair" in capsys.readouterr().err
    monkeypatch.setattr("pipeline.mine_negatives.importlib.util.find_spec", lambda name: None)
    assert main(ready.command(tmp_path / "b")) == 2
    assert "pip install 'bge-icl-train[mining]'" in capsys.readouterr().err


def test_several_instructions_of_wrapped_passages_are_an_error_for_own_models(ready: Ready, tmp_path: Path) -> None:
    from dataclasses import replace

    table = table_of(ready.store, "symmetric_sts")
    table = replace(table, instruction_N=np.arange(table.num_rows) % 2)
    run = stages.MiningRun(
        *(ready.store, tmp_path, MiningOptions(), "x", True, lambda: None, None), shard_texts=9, bars=False
    )
    with pytest.raises(ValueError, match=r"'symmetric_sts'.*has 2 instructions.*split the dataset"):
        stages._passage_form(run, table)
    assert stages._passage_form(replace(run, wraps_passages=False), table) == 1


def test_window_past_a_tiny_corpus_is_counted_and_goes_on(
    ready: Ready, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Label texts: a corpus of 20, of which none has rank 30."""
    caplog.set_level("INFO", logger="pipeline")
    command = ready.command(tmp_path / "out", "--window", "30-60", "--dataset", "symmetric_class")
    assert main(command) == 0
    report = report_of(tmp_path / "out", "symmetric_class")
    assert report["rows_with_short_window"] == report["rows_with_too_few"] == report["rows"] == 24
    assert report["candidates"] == report["negatives"] == 0
    assert "window of ranks 30-60 reaches past its corpus of 20 texts" in caplog.text
    assert all(row["neg"] == [] for row in lines_of(tmp_path / "out/symmetric_class.jsonl"))
    assert "ends within the window or before it (the corpus is small)" in (tmp_path / "out/report.md").read_text()


def test_report_shows_every_dataset_and_rule(ready: Ready, mined: Path) -> None:
    page = (mined / "report.md").read_text()
    for table in ready.store.datasets:
        assert f"\n## {table.name}\n" in page
        assert (mined / f"scores-{table.name.replace(' ', '_')}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("a text of a row of the same category") == 1, "rules that cannot apply are not shown"
    assert page.count("scores above --max-ratio") == len(ready.store.datasets)
    assert "rank 1 |" in page and "mined negative |" in page and str(ready.recipe.parent) not in page
    scored = report_of(mined, "normal")["scores_dropped"]
    assert scored > 0 and f"teacher scores of {scored} rows dropped" in page
