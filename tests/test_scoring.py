"""Teacher scores: each kind of teacher against a slow twin, resume after a kill, statistics, user errors."""

import dataclasses
import errno
import fcntl
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_store import make_store
from launching import REPOSITORY, environment
from test_embedder import change_json
from test_lightweight_reranker import own, published  # noqa: F401
from tiny_run import WORDS
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from pipeline.data import columns
from pipeline.data.store import open_store
from pipeline.data.teacher_groups import group_entropy
from pipeline.files import locked
from pipeline.inference.reranker import LightweightReranker
from pipeline.mining import kinds
from pipeline.mining.folder import folder_digest, own_folder
from pipeline.mining.kinds import find_kind
from pipeline.mining.scoring import TEMPERATURES, Scores, describe
from pipeline.preprocess import main as preprocess
from pipeline.prompts import BGE_RERANKER, render_pair
from pipeline.score_rows import judge, main, parse_arguments, score_rows
from pipeline.settings import dump_settings, load_settings

LIMIT = 48  # tokens: some pairs and texts of the tiny data are longer
PAIR_LIMIT = 56  # of a reranker
KILLED_AT = 3


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take most of the time of models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tiny_training: Path) -> Path:
    assert preprocess(["--config", str(tiny_training), "--processes", "1"]) == 0
    return tiny_training


def write_bert(folder: Path, labels: int | None) -> Path:
    """A random two-layer BERT with a byte-level tokenizer; `labels`: outputs of a classifier, None: no classifier."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["ash", *WORDS, *(f" {w}" for w in WORDS)], 300, special_tokens=["[PAD]"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="[PAD]", model_max_length=LIMIT)
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=LIMIT,
        initializer_range=0.5,
        num_labels=labels or 2,
    )
    model = BertForSequenceClassification(config) if labels else BertModel(config)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("cross") / "encoder", 1)


@pytest.fixture(scope="module")
def sentence_transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("bi")
    transformer = Transformer(str(write_bert(folder / "bert", None)))
    pooling = Pooling(transformer.get_embedding_dimension())
    prompts = {"query": "river ", "document": "stone "}
    SentenceTransformer(modules=[transformer, pooling], prompts=prompts, device="cpu").save(str(folder / "encoder"))
    return folder / "encoder"


@pytest.fixture(scope="module")
def embedder(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a random adapter over the tiny recipe's model."""
    from pipeline.inference.embedder import load_base_embedder
    from pipeline.inference.saving import save_model
    from pipeline.model.encoder import add_lora, load_encoder, trainable_parameters

    settings = load_settings(recipe)
    base = load_base_embedder(settings, show_progress=False)
    tokens = base.tokenizer.tokens
    encoder = load_encoder(settings.model, tokens.marker_ids, tokens.marker_subtokens)
    add_lora(encoder, settings.model.lora)
    weights = {name: {"weight": p.detach() + 0.1} for name, p in trainable_parameters(encoder).items()}
    run = tmp_path_factory.mktemp("run")
    save_model(run / "model", encoder, weights, base.tokenizer, settings, SimpleNamespace(datasets=()), "")
    return run


@pytest.fixture(scope="module")
def reranker(own: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run folder with a random reranker of exits 2 to 4, for whose limit some pairs are too long."""
    run = shutil.copytree(own[0], tmp_path_factory.mktemp("reranker") / "run")
    change_json(run / "model/reranker.json", max_pair_tokens=PAIR_LIMIT, compress_layers=[1, 2])
    return run


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_score(recipe: Path, teacher: Path, out: Path, *more: str) -> dict:
    assert main(["--config", str(recipe), "--teacher", str(teacher), "--out", str(out), *more]) == 0
    return json.loads((out / "scores.json").read_text())


def slow_logit(model: torch.nn.Module, tokenizer: Any, query: str, passage: str) -> tuple[float, bool]:
    """One pair alone through transformers; and whether it was cut."""
    whole = tokenizer(query, passage, verbose=False)["input_ids"]
    batch = tokenizer(query, passage, truncation="longest_first", max_length=LIMIT, return_tensors="pt")
    with torch.no_grad():
        return float(model(**batch).logits[0, 0]), len(whole) > LIMIT


def test_a_cross_encoder_scores_every_row(recipe: Path, cross_encoder: Path, tmp_path: Path) -> None:
    report = run_score(recipe, cross_encoder, tmp_path / "out", "--dataset", "normal", "--batch-size", "5")
    store = open_store(load_settings(recipe).data.store)
    table = store.datasets[0]
    rows = rows_of(tmp_path / "out/normal.jsonl")
    assert len(rows) == table.num_rows == 24
    pairs, cut = set(), set()
    model = AutoModelForSequenceClassification.from_pretrained(cross_encoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(cross_encoder)
    for n, row in enumerate(rows):
        assert row["query"] == store.text(int(table.query_text_N[n])), "line i + 1 is row i of the store"
        assert set(row) == {"query", "pos", "neg", "type", "pos_scores", "neg_scores", "prompt"}
        for passage, score in zip(row["pos"] + row["neg"], row["pos_scores"] + row["neg_scores"], strict=True):
            logit, is_cut = slow_logit(model, tokenizer, row["query"], passage)
            assert score == pytest.approx(logit, abs=2e-5)
            pairs.add((row["query"], passage))
            cut |= {(row["query"], passage)} if is_cut else set()
    found = report["datasets"]["normal"]
    assert (report["kind"], report["scale"], report["max_tokens"]) == ("cross_encoder", "logits", LIMIT)
    assert (found["scored"], found["truncated"]) == (len(pairs), len(cut))
    assert 0 < len(cut) < len(pairs)
    everything = [s for row in rows for s in row["pos_scores"] + row["neg_scores"]]
    assert found["candidates"] == len(everything)
    assert [found["min"], found["max"], found["mean"]] == pytest.approx(
        [min(everything), max(everything), np.mean(everything)]
    )


def test_a_pair_is_scored_once(recipe: Path, cross_encoder: Path, tmp_path: Path) -> None:
    tree = load_settings(recipe)
    rows = [{"query": "river", "pos": ["stone"], "neg": ["cloud", "stone river"]}] * 3
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dataclasses.replace(
        tree.data,
        root=str(tmp_path),
        store=str(tmp_path / "store"),
        datasets=(dataclasses.replace(tree.data.datasets[0], path="raw.jsonl"),),
    )
    (tmp_path / "recipe.yaml").write_text(dump_settings(dataclasses.replace(tree, data=data)))
    assert preprocess(["--config", str(tmp_path / "recipe.yaml"), "--processes", "1"]) == 0
    report = run_score(tmp_path / "recipe.yaml", cross_encoder, tmp_path / "out")
    assert report["datasets"]["normal"]["scored"] == 3 and report["datasets"]["normal"]["candidates"] == 9


def test_sigmoid(recipe: Path, cross_encoder: Path, tmp_path: Path) -> None:
    run_score(recipe, cross_encoder, tmp_path / "a", "--dataset", "normal")
    report = run_score(recipe, cross_encoder, tmp_path / "b", "--dataset", "normal", "--sigmoid")
    assert report["scale"] == "sigmoid"
    for raw, squashed in zip(rows_of(tmp_path / "a/normal.jsonl"), rows_of(tmp_path / "b/normal.jsonl"), strict=True):
        assert squashed["neg_scores"] == pytest.approx([1 / (1 + math.exp(-s)) for s in raw["neg_scores"]], abs=1e-5)


def test_a_sentence_transformer_gives_cosines(recipe: Path, sentence_transformer: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    report = run_score(recipe, sentence_transformer, tmp_path / "out")
    assert (report["kind"], report["scale"]) == ("sentence_transformer", "cosine")
    model = SentenceTransformer(str(sentence_transformer), device="cpu")

    def slow(text: str) -> np.ndarray:
        embedding_D = model.encode([text], prompt="")[0].astype(np.float64)
        return embedding_D / np.linalg.norm(embedding_D)

    # Symmetric types compare like with like: both sides have the query's prompt.
    for name, prompt in (("normal", "stone "), ("symmetric_sts", "river "), ("symmetric_class", "stone ")):
        for row in rows_of(tmp_path / f"out/{name}.jsonl")[::6]:
            query_D = slow("river " + row["query"])
            wanted = [float(query_D @ slow(prompt + text)) for text in row["pos"] + row["neg"]]
            assert row["pos_scores"] + row["neg_scores"] == pytest.approx(wanted, abs=2e-6)
    tokenizer = AutoTokenizer.from_pretrained(sentence_transformer)
    rows = rows_of(tmp_path / "out/normal.jsonl")
    texts = {f"river {row['query']}" for row in rows} | {f"stone {t}" for row in rows for t in row["pos"] + row["neg"]}
    assert report["datasets"]["normal"]["scored"] == len(texts)
    num_long = sum(len(tokenizer(t, verbose=False)["input_ids"]) > LIMIT for t in texts)
    assert report["datasets"]["normal"]["truncated"] == num_long > 0


def test_an_own_embedder_gives_cosines(recipe: Path, embedder: Path, tmp_path: Path) -> None:
    from pipeline.inference.embedder import load_embedder

    report = run_score(recipe, embedder, tmp_path / "out", "--dataset", "normal", "--dataset", "symmetric_sts")
    assert (report["kind"], report["scale"]) == ("embedder", "cosine")
    assert report["max_tokens"] == {"query": 60, "passage": 60}
    model = load_embedder(embedder, show_progress=False)
    for name in ("normal", "symmetric_sts"):
        for row in rows_of(tmp_path / f"out/{name}.jsonl")[::8]:
            texts = row["pos"] + row["neg"]
            query_D = model.encode_queries([row["query"]], row["prompt"])[0]
            passages_PD = (
                model.encode_queries(texts, row["prompt"]) if name == "symmetric_sts" else model.encode_passages(texts)
            )
            assert row["pos_scores"] + row["neg_scores"] == pytest.approx((passages_PD @ query_D).tolist(), abs=1e-5)


def asking(recipe: Path, out: Path, **relations: str) -> Path:
    """The recipe with a question for these datasets."""
    settings = load_settings(recipe)
    entries = (dataclasses.replace(d, relation=relations.get(d.name, "")) for d in settings.data.datasets)
    data = dataclasses.replace(settings.data, datasets=tuple(entries))
    out.write_text(dump_settings(dataclasses.replace(settings, data=data)))
    return out


def is_cut(model: LightweightReranker, query: str, passage: str, relation: str) -> bool:
    """Whether the whole text of a pair has more tokens than the model reads."""
    text = render_pair(BGE_RERANKER, query, passage, BGE_RERANKER.prompt(relation))
    return len([*model.tokenizer.bos, *model.tokenizer.encoder.tokenizer.encode(text).ids]) > PAIR_LIMIT


def test_a_reranker_is_asked_what_recipe_or_type_say(recipe: Path, reranker: Path, tmp_path: Path) -> None:
    wanted = {"normal": "q-p", "symmetric_sts": "p-p", "only_1neg": "arguana"}
    named = asking(recipe, tmp_path / "recipe.yaml", only_1neg="arguana")
    report = run_score(named, reranker, tmp_path / "out", *(f"--dataset={name}" for name in wanted))
    assert (report["kind"], report["scale"], report["max_tokens"]) == ("reranker", "logits", PAIR_LIMIT)
    assert wanted.items() <= report["relations"].items()
    model = LightweightReranker(reranker, show_progress=False)
    for name, relation in wanted.items():
        found = {
            (row["query"], passage): score
            for row in rows_of(tmp_path / f"out/{name}.jsonl")
            for passage, score in zip(row["pos"] + row["neg"], row["pos_scores"] + row["neg_scores"], strict=True)
        }
        for pair, score in list(found.items())[::3]:
            assert score == pytest.approx(float(model.score([pair], relation=relation)[0]), abs=2e-5)
        num_cut = sum(is_cut(model, *pair, relation) for pair in found)
        counts = report["datasets"][name]
        assert (counts["scored"], counts["truncated"]) == (len(found), num_cut) and 0 < num_cut < len(found)


def test_a_reranker_at_a_depth_and_width_squashed(recipe: Path, reranker: Path, tmp_path: Path) -> None:
    more = ["--dataset", "normal", "--sigmoid", "--teacher-setting", "exit=3,layers=1,ratio=4"]
    report = run_score(recipe, reranker, tmp_path / "out", *more)
    assert (report["scale"], report["setting"]) == ("sigmoid", "exit=3,layers=1,ratio=4")
    model = LightweightReranker(reranker, show_progress=False)
    for row in rows_of(tmp_path / "out/normal.jsonl")[::4]:
        for passage, score in zip(row["pos"] + row["neg"], row["pos_scores"] + row["neg_scores"], strict=True):
            logit = float(model.score([(row["query"], passage)], 3, (1,), 4)[0])
            assert score == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5)


def test_the_published_layout_scores(
    recipe: Path,
    published: tuple[Path, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    report = run_score(recipe, published[0], tmp_path / "out", "--dataset", "normal", "--teacher-setting", "exit=3")
    assert (report["kind"], report["setting"], report["max_tokens"]) == ("reranker", "exit=3", 512)
    model = LightweightReranker(published[0], show_progress=False)
    row = rows_of(tmp_path / "out/normal.jsonl")[0]
    pairs = [(row["query"], passage) for passage in row["pos"] + row["neg"]]
    assert row["pos_scores"] + row["neg_scores"] == pytest.approx(model.score(pairs, 3).tolist(), abs=2e-5)


def test_an_interrupted_reranker_goes_on_to_the_same_bytes(
    recipe: Path, reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(out: str) -> None:
        arguments = ["--config", str(recipe), "--teacher", str(reranker), "--out", str(tmp_path / out)]
        score_rows(parse_arguments([*arguments, "--dataset", "normal"]), block_items=16)

    written, write = [], columns.write_atomic

    def stop_at_last(path: Path, fill: Any) -> None:
        written.append(path.name)
        if len(written) == KILLED_AT:
            raise KeyboardInterrupt
        write(path, fill)

    monkeypatch.setattr(columns, "write_atomic", stop_at_last)
    with pytest.raises(KeyboardInterrupt):
        score("cut")
    score("cut")
    assert written.count("block-000002.safetensors") == 2 and len(written) == len(set(written)) + 1
    score("whole")
    for name in ("normal.jsonl", "scores.json", "settings.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_the_written_recipe_makes_a_store_with_the_scores(
    recipe: Path, sentence_transformer: Path, tmp_path: Path
) -> None:
    run_score(recipe, sentence_transformer, tmp_path / "out", "--dataset", "only_1neg")
    assert preprocess(["--config", str(tmp_path / "out/recipe.yaml"), "--processes", "1"]) == 0
    before, after = (open_store(load_settings(r).data.store) for r in (recipe, tmp_path / "out/recipe.yaml"))
    scored = {
        table.name for table in after.datasets if table.pos_score is not None and not np.isnan(table.pos_score).all()
    }
    assert scored == {"only_1neg", "normal"}, "normal had scores of its own"
    assert [t.num_rows for t in before.datasets] == [t.num_rows for t in after.datasets]
    table = after.datasets[1]
    rows = {row["query"]: row for row in rows_of(tmp_path / "out/only_1neg.jsonl")}
    row = rows[after.text(int(table.query_text_N[0]))]
    assert table.neg_score is not None
    assert table.neg_score[: len(row["neg"])].tolist() == np.array(row["neg_scores"], dtype=np.float32).tolist()


DRIVER = """
import os, signal, sys
from pipeline.data import columns
from pipeline.score_rows import parse_arguments, score_rows
calls, write = [], columns.write_atomic
def die_inside(path, fill):
    calls.append(path)
    if len(calls) == {killed_at}:
        fill(path.with_name(path.name + ".tmp"))
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, fill)
columns.write_atomic = die_inside
score_rows(parse_arguments(sys.argv[1:]), block_items=16)
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    recipe: Path,
    cross_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def arguments(out: str) -> list[str]:
        common = ["--config", str(recipe), "--teacher", str(cross_encoder), "--out", str(tmp_path / out)]
        return [*common, "--dataset", "normal", "--dataset", "only_1neg"]

    code = DRIVER.format(killed_at=KILLED_AT)
    env = environment() | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/kernels"}
    killed = subprocess.run([sys.executable, "-c", code, *arguments("killed")], env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    work = tmp_path / "killed/work/scores/normal"
    (tmp_path / "killed/normal.jsonl.host-1.tmp").touch()
    assert len(list(work.glob("*.safetensors"))) == KILLED_AT - 1
    assert not (tmp_path / "killed/normal.jsonl").exists()

    written = []
    write = columns.write_atomic
    monkeypatch.setattr(columns, "write_atomic", lambda path, fill: (written.append(path.name), write(path, fill)))
    score_rows(parse_arguments(arguments("killed")), block_items=16)
    num_resumed = len(written)
    assert not list((tmp_path / "killed").rglob("*.tmp")), "what the killed run was writing"
    score_rows(parse_arguments(arguments("whole")), block_items=16)
    assert len(written) - num_resumed == num_resumed + KILLED_AT - 1, "finished blocks are not computed again"
    names, others = (sorted(path.name for path in (tmp_path / out).glob("*.*")) for out in ("whole", "killed"))
    assert names == others and len(names) == 5
    with own_folder(tmp_path / "whole"):
        assert main(arguments("whole")) == 2
    assert "another process writes to" in capsys.readouterr().err
    for name in set(names) - {"recipe.yaml"}:  # which names the folder
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    # A second run has nothing to do but to clear what a kill at the very end leaves.
    written.clear()
    (tmp_path / "whole/work/scores/normal").mkdir()
    score_rows(parse_arguments(arguments("whole")), block_items=16)
    assert written == [] and not (tmp_path / "whole/work/scores/normal").exists()


def test_scores_of_another_teacher_are_not_mixed(
    recipe: Path, cross_encoder: Path, sentence_transformer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_score(recipe, cross_encoder, tmp_path / "out", "--dataset", "normal")
    before = (tmp_path / "out/normal.jsonl").read_bytes()
    arguments = ["--config", str(recipe), "--out", str(tmp_path / "out"), "--teacher"]
    assert main([*arguments, str(sentence_transformer)]) == 2
    assert "  scores.teacher.sha256: there " in capsys.readouterr().err
    for more, message in (
        (["--sigmoid"], "  scores.sigmoid: there False, now True\n"),
        (["--batch-size", "8"], "  scores.teacher.batch_size: there 32, now 8\n"),
    ):
        assert main([*arguments, str(cross_encoder), *more]) == 2
        assert message in capsys.readouterr().err
    assert main([*arguments, str(cross_encoder), "--dataset", "only_1neg"]) == 0
    assert set(json.loads((tmp_path / "out/scores.json").read_text())["datasets"]) == {"normal", "only_1neg"}
    assert (tmp_path / "out/normal.jsonl").read_bytes() == before
    assert main([*arguments, str(cross_encoder), "--sigmoid", "--dataset", "only_1neg", "--overwrite"]) == 0
    assert set(json.loads((tmp_path / "out/scores.json").read_text())["datasets"]) == {"only_1neg"}
    assert not (tmp_path / "out/normal.jsonl").exists(), "scores of two scales in one folder"


def test_a_reranker_that_is_run_or_asked_otherwise_is_not_mixed(
    recipe: Path, reranker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_score(recipe, reranker, tmp_path / "out", "--dataset", "symmetric_class", "--teacher-setting", "light")
    again, light = ["--teacher", str(reranker), "--out", str(tmp_path / "out"), "--config"], "exit=2,layers=1,ratio=2"
    for more, message in (
        ([str(recipe)], f"  scores.teacher.setting: there {light}, now full\n"),
        ([str(recipe), "--teacher-setting=exit=2"], f"  scores.teacher.setting: there {light}, now exit=2\n"),
        (
            [str(asking(recipe, tmp_path / "recipe.yaml", symmetric_class="q-q")), f"--teacher-setting={light}"],
            "  scores.relations.symmetric_class: there q-p, now q-q\n",
        ),
    ):
        assert main([*again, *more]) == 2
        found = capsys.readouterr().err
        assert message in found and found.count("there ") == 1
    only = ["--dataset", "symmetric_class", "--teacher-setting", light]
    assert main([*again, str(recipe), *only]) == 0 and "symmetric_class: up to date" in capsys.readouterr().out


def test_what_decides_last_bits_is_recorded(
    recipe: Path,
    cross_encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_score(recipe, cross_encoder, tmp_path / "out", "--dataset", "normal")
    again = ["--config", str(recipe), "--teacher", str(cross_encoder), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(kinds, "version", lambda package: "9.9")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda: "H100")
        assert main(again) == 2
    message = capsys.readouterr().err
    for name, now in (("device", "H100"), ("torch", "9.9"), ("transformers", "9.9"), ("sentence-transformers", "9.9")):
        assert f"  scores.teacher.{name}: there " in message and f", now {now}\n" in message
    assert message.count("there ") == 4


def test_a_file_system_without_locks_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    def hold() -> AbstractContextManager[None]:
        return locked(tmp_path / "new/lock", "somebody is here")

    with hold(), pytest.raises(ValueError, match="^somebody is here$"), hold():
        pass
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match=r"lock cannot be locked \(Function not implemented\).* -o flock"), hold():
        pass


def test_a_copied_teacher_is_the_same_and_hidden_files_are_none_of_it(cross_encoder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(cross_encoder, copy)
    (copy / ".cache/huggingface").mkdir(parents=True)
    (copy / ".cache/huggingface/download.metadata").write_text("1732212345.6")
    assert folder_digest(copy) == folder_digest(cross_encoder)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert folder_digest(copy) != folder_digest(cross_encoder)


def test_a_run_that_failed_at_its_start_blocks_no_other(recipe: Path, cross_encoder: Path, tmp_path: Path) -> None:
    two = write_bert(tmp_path / "two", 2)
    arguments = ["--config", str(recipe), "--out", str(tmp_path / "out"), "--dataset", "normal", "--teacher"]
    assert main([*arguments, str(two)]) == 2
    assert main([*arguments, str(cross_encoder)]) == 0


def test_a_damaged_report_is_named(
    recipe: Path, cross_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_score(recipe, cross_encoder, tmp_path / "out", "--dataset", "normal")
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "out/scores.json").write_text(damaged)
        again = ["--config", str(recipe), "--teacher", str(cross_encoder), "--out", str(tmp_path / "out")]
        assert main(again) == 2
        assert str(tmp_path / "out/scores.json") in capsys.readouterr().err


def test_files_of_others_are_not_overwritten(
    recipe: Path, cross_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = recipe.parent / "data"
    before = {path: path.read_bytes() for path in [recipe, *raw.iterdir()]}
    for out in (raw, recipe.parent):
        assert main(["--config", str(recipe), "--teacher", str(cross_encoder), "--out", str(out)]) == 2
        assert "holds no results of this command" in capsys.readouterr().err
        assert not (out / "work").exists()
    assert {path: path.read_bytes() for path in [recipe, *raw.iterdir()]} == before


FEW_FILES = """
import resource, sys
from pathlib import Path
import numpy as np
from fake_store import make_store
from pipeline.mining.scoring import score_dataset
from pipeline.mining.models import PairModel, TextModel
rows = [{"query": f"q{i}", "pos": [f"p{i}"], "neg": [f"n{i}", "same"]} for i in range(100)]
store = make_store({"d": ("normal", rows)})
table = store.datasets[0]
def embed(texts, instruction, as_query):
    return np.array([[len(t), sum(map(ord, t))] for t in texts], np.float32), np.array([t == "q7" for t in texts])
def score(queries, passages, relation):
    assert relation == "p-p"
    return (embed(queries, "", True)[0] * embed(passages, "", False)[0]).sum(1)[:, None], embed(queries, "", True)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
teachers = PairModel("cross_encoder", "logits", None, score), TextModel("embedder", "cosine", {}, False, embed)
for teacher, items, cut in zip(teachers, (300, 301), (3, 1)):
    found = score_dataset(store, table, "p-p", teacher, Path(sys.argv[1]) / teacher.kind, False, 2)
    assert (found.num_items, found.num_cut) == (items, cut)
    for side, text in ((found.pos_score, table.pos_text), (found.neg_score, table.neg_text)):
        query = np.repeat(table.query_text_N, len(text) // 100).tolist()
        wanted = score([store.text(i) for i in query], [store.text(i) for i in text.tolist()], "p-p")[0][:, 0]
        assert np.array_equal(side, wanted)
"""


def test_more_blocks_than_a_process_may_open_files(tmp_path: Path) -> None:
    env = environment() | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/kernels:{REPOSITORY}/tests"}
    ran = subprocess.run([sys.executable, "-c", FEW_FILES, str(tmp_path)], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [len(list(folder.iterdir())) for folder in sorted(tmp_path.iterdir())] == [150, 151]


def slow_entropy(scores: list[float], temperature: float) -> float:
    weights = [math.exp(s / temperature) for s in scores]
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)


def test_entropy_of_ragged_groups() -> None:
    groups = [[0.3, -0.2], [1.0, 2.0, 3.0, 0.5], [5.0, 5.0, 5.0]]
    flat = np.array([s for group in groups for s in group])
    offsets = np.array([0, 2, 6, 9])
    for temperature in (0.1, 1.0, 10.0):
        wanted = [slow_entropy(group, temperature) for group in groups]
        assert group_entropy(flat, offsets, temperature).tolist() == pytest.approx(wanted, abs=1e-12)
    # Scores as in released data: far apart, and far from 0.
    assert group_entropy(np.array([98.7, 82.4, 85.0]), np.array([0, 3]), 1.0)[0] < 2e-5


def test_statistics_count_rows_without_negatives() -> None:
    rows = [
        {"query": "a", "pos": ["p", "p2"], "neg": ["n1", "n2"]},
        {"query": "b", "pos": ["p"], "neg": []},
        {"query": "c", "pos": ["p"], "neg": ["n1"]},
    ]
    table = make_store({"d": ("normal", rows)}).datasets[0]
    scores = Scores(np.array([2, 9, 4, 1], np.float32), np.array([1, 0, 3], np.float32), 7, 2)
    found = describe(table, scores)
    assert (found["rows"], found["rows_without_negatives"], found["candidates"]) == (3, 1, 7)
    assert found["positive_first"] == 0.5
    wanted = (slow_entropy([2, 1, 0], 1) / math.log(3) + slow_entropy([1, 3], 1) / math.log(2)) / 2
    assert found["entropy"]["1.0"] == pytest.approx(wanted, abs=1e-9)
    without = make_store({"d": ("normal", rows[1:2])}).datasets[0]
    nothing = describe(without, Scores(np.array([1], np.float32), np.array([], np.float32), 1, 0))
    assert nothing["entropy"] is None and nothing["positive_first"] is None


ENTROPY = dict(zip(map(str, TEMPERATURES), (0.0, 0.01, 0.04, 0.2, 0.6, 0.95, 0.99), strict=True))


@pytest.mark.parametrize(
    ("entropy", "temperature", "words"),
    [
        (ENTROPY, 0.5, "at temperature 0.5 the teacher's distribution is almost one-hot (entropy 4.0% of uniform)"),
        (ENTROPY, 0.2, "at temperature 0.1 the teacher's distribution is almost one-hot (entropy 1.0% of uniform)"),
        (ENTROPY, 1.0, None),
        (ENTROPY, 30.0, "almost uniform (entropy 99.0% of uniform)"),
        (None, 1.0, "nothing to distil"),
    ],
)
def test_warnings(entropy: dict[str, float] | None, temperature: float, words: str | None) -> None:
    warnings = judge({"d": {"entropy": entropy}}, temperature)
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]
    assert words is None or entropy is None or "With loss.teacher_temperature=2 it would be 60.0%" in warnings[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "BAAI/bge-reranker-v2-m3"], "no such folder; a model of the hub is fetched first: hf download"),
        (["--teacher", "{empty}"], "holds neither a cross-encoder"),
        (["--teacher", "{two}"], "gives 2 scores a pair"),
        (["--teacher", "{bi}", "--sigmoid"], "--sigmoid is for cross-encoders"),
        (["--teacher", "{bi}", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--teacher", "{own}", "--batch-size", "8"], "--batch-size is for sentence-transformers models"),
        (["--teacher", "{rr}", "--batch-size", "8"], "this reranker packs by tokens: leave it out"),
        (
            ["--teacher", "{rr}", "--teacher-setting", "exit=5"],
            "--teacher-setting exit=5: exit_layer=5 is none of the layers 2 to 4 of this model",
        ),
        (["--teacher", "{rr}", "--teacher-setting", "lite"], "--teacher-setting lite: 'lite' is not understood"),
        (["--teacher", "{published}", "--teacher-setting", "exit=5"], "exit_layer=5 is none of the layers 2 to 4"),
        (["--teacher", "{cross}", "--teacher-setting", "full"], "--teacher-setting full is for rerankers; --teacher "),
        (
            ["--teacher", "{own}", "--teacher-setting", "ratio=2"],
            "--teacher-setting ratio=2 is for rerankers; --teacher ",
        ),
        (["--teacher", "{bi}", "--dataset", "nq"], "--dataset nq: the store"),
    ],
)
def test_user_errors(
    arguments: list[str],
    message: str,
    recipe: Path,
    cross_encoder: Path,
    sentence_transformer: Path,
    embedder: Path,
    reranker: Path,
    published: tuple[Path, Any],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    two = write_bert(tmp_path / "two", 2) if "{two}" in arguments else ""
    names = {"empty": tmp_path / "empty", "two": two, "bi": sentence_transformer, "own": embedder}
    names |= {"cross": cross_encoder, "rr": reranker, "published": published[0]}
    filled = [argument.format(**names) for argument in arguments]
    capsys.readouterr()  # the bar of a model that was just written
    assert main(["--config", str(recipe), "--out", str(tmp_path / "out"), *filled]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ") and message in found and found.count("\n") == 1


def test_scores_that_are_not_finite_are_an_error(
    recipe: Path, cross_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cross_encoder, tmp_path / "broken")
    model = AutoModelForSequenceClassification.from_pretrained(cross_encoder)
    model.classifier.bias.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    arguments = ["--config", str(recipe), "--teacher", str(tmp_path / "broken"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "numbers that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out/normal.jsonl").exists()


def test_kinds(
    cross_encoder: Path,
    sentence_transformer: Path,
    embedder: Path,
    reranker: Path,
    published: tuple[Path, Any],  # noqa: F811
) -> None:
    paths = (cross_encoder, sentence_transformer, embedder, embedder / "model")
    kinds = ["cross_encoder", "sentence_transformer", "embedder", "embedder"]
    assert [find_kind(path, "--teacher") for path in paths] == kinds
    assert {find_kind(path, "--teacher") for path in (reranker, reranker / "model", published[0])} == {"reranker"}
