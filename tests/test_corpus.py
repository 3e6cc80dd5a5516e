"""A corpus in blocks: the bytes of one undisturbed call, whatever is killed and however many processes share it."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from launching import REPOSITORY, environment
from test_embedder import base, base_embedder, trained  # noqa: F401
from tiny_run import WORDS

from pipeline import encode_corpus as command
from pipeline.files import take_lock
from pipeline.inference import corpus
from pipeline.inference.corpus import blocks_folder, count_done, encode_corpus
from pipeline.inference.corpus_file import CorpusTexts, read_corpus
from pipeline.inference.embedder import FewShotEmbedder, load_embedder

TEXTS = [f"{WORDS[i % 11]} {WORDS[i * i % 7]} {i}" for i in range(23)]


@pytest.fixture(scope="module")
def embedder(base: Path) -> FewShotEmbedder:  # noqa: F811
    return base_embedder(base)


class Killed(BaseException):
    """Ends a call as a signal would: nothing in between handles it."""


def counting(monkeypatch: pytest.MonkeyPatch, most: int = 10**9) -> list[int]:
    """The number of texts of each block that is encoded, as a list; the process ends at block number `most`."""
    passes: list[int] = []
    encode = FewShotEmbedder.encode_counted

    def counted(self: FewShotEmbedder, texts: list[str], **options: Any) -> tuple[np.ndarray, Counter[str]]:
        if len(passes) == most:
            raise Killed
        passes.append(len(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(FewShotEmbedder, "encode_counted", counted)
    return passes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block_texts", [1, 4, 23, 100])
def test_the_file_holds_the_embeddings_of_all_texts(
    embedder: FewShotEmbedder, dtype: Any, block_texts: int, tmp_path: Path
) -> None:
    got_ND = encode_corpus(embedder, TEXTS, tmp_path / "c.npy", dtype, block_texts)
    assert isinstance(got_ND, np.memmap) and got_ND.dtype == dtype and got_ND.shape == (23, 64)
    parts = [embedder.encode_passages(TEXTS[i : i + block_texts]) for i in range(0, 23, block_texts)]
    np.testing.assert_array_equal(np.load(tmp_path / "c.npy"), np.concatenate(parts).astype(dtype))
    np.testing.assert_allclose(got_ND, embedder.encode_passages(TEXTS), atol=1e-6 if dtype == "float32" else 1e-3)
    assert encode_corpus(embedder, [], tmp_path / "none.npy").shape == (0, 64)


@pytest.mark.parametrize("most", [0, 1, 3, 5])
def test_a_call_goes_on_after_the_last_whole_block(
    embedder: FewShotEmbedder, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_corpus(embedder, TEXTS, tmp_path / "whole.npy", block_texts=4)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        counting(patch, most)
        encode_corpus(embedder, TEXTS, tmp_path / "c.npy", block_texts=4)
    assert not (tmp_path / "c.npy").exists() and count_done(tmp_path / "c.npy") == most
    # A mark that was cut off, and rows without a mark, count nothing.
    if most:
        mark = blocks_folder(tmp_path / "c.npy") / "000000"
        mark.write_text(mark.read_text()[:17])
    passes = counting(monkeypatch)
    encode_corpus(embedder, iter(TEXTS), tmp_path / "c.npy", block_texts=4)
    assert len(passes) == 6 - most + bool(most)
    assert (tmp_path / "c.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    encode_corpus(embedder, TEXTS, tmp_path / "c.npy", block_texts=4)
    assert len(passes) == 6 - most + bool(most), "what is finished is not encoded again"


def end_after_the_others(out: Path, held: IO[str]) -> threading.Thread:
    """A process that ends without doing its block, when the two other blocks are done."""

    def wait() -> None:
        while count_done(out) < 2:
            time.sleep(0.01)
        held.close()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_blocks_of_another_process_are_waited_for_and_taken_over(
    embedder: FewShotEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.npy"
    blocks_folder(out).mkdir()
    passes = counting(monkeypatch)
    held = take_lock(blocks_folder(out) / "000001")
    assert held is not None
    other = end_after_the_others(out, held)
    encode_corpus(embedder, TEXTS, out, block_texts=10)
    other.join()
    assert passes == [10, 3, 10], "the other blocks meanwhile, and its block after it"
    np.testing.assert_allclose(np.load(out), embedder.encode_passages(TEXTS), atol=1e-6)

    blocks_folder(tmp_path / "d.npy").mkdir()
    held = take_lock(blocks_folder(tmp_path / "d.npy") / "000001")
    assert held is not None
    end_after_the_others(tmp_path / "d.npy", held)
    with pytest.raises(ValueError, match=r"blocks \[1\] of .*d.npy were left by another process, and texts has been"):
        encode_corpus(embedder, iter(TEXTS), tmp_path / "d.npy", block_texts=10)


def test_what_was_begun_otherwise_is_refused(embedder: FewShotEmbedder, tmp_path: Path) -> None:
    out = tmp_path / "c.npy"
    encode_corpus(embedder, TEXTS, out, block_texts=10)
    other = dataclasses.replace(embedder, limits=dataclasses.replace(embedder.limits, max_passage_tokens=59))
    for message, change in (
        ("model '.*' there, '.*' now", {"embedder": other}),
        ("dtype 'float32' there, 'float16' now", {"dtype": "float16"}),
        ("block_texts 10 there, 11 now", {"block_texts": 11}),
        ("width 64 there, 24 now", {"embedder": dataclasses.replace(embedder, dim=24)}),
        ("block 1 was encoded from other texts", {"texts": [*TEXTS[:15], "other", *TEXTS[16:]]}),
        ("block 2 was encoded from other texts", {"texts": [*TEXTS, "more"]}),
        ("block 2 was encoded from other texts", {"texts": TEXTS[:-1]}),
        ("holds 1 blocks more than the 20 texts", {"texts": TEXTS[:20]}),
    ):
        arguments: dict[str, Any] = {"embedder": embedder, "texts": TEXTS, "out": out, "block_texts": 10} | change
        with pytest.raises(ValueError, match=message):
            encode_corpus(**arguments)
    encode_corpus(embedder, TEXTS[:20], tmp_path / "d.npy", block_texts=10)
    with pytest.raises(ValueError, match="d.npy is finished, and the texts go on after it; remove it"):
        encode_corpus(embedder, TEXTS, tmp_path / "d.npy", block_texts=10)
    blocks_folder(out).rename(tmp_path / "away")
    with pytest.raises(ValueError, match="c.npy exists without c.npy.blocks/, which tells what it holds"):
        encode_corpus(embedder, TEXTS, out, block_texts=10)


def test_marks_without_their_embeddings_are_refused(embedder: FewShotEmbedder, tmp_path: Path) -> None:
    """A file that was removed or cut off must not come back with zeros in it."""
    out = tmp_path / "c.npy"
    partial = blocks_folder(out) / corpus.PARTIAL
    lost = r"marks blocks as done whose embeddings are lost: .*; remove .*c.npy.blocks/"
    encode_corpus(embedder, TEXTS, out, block_texts=10)
    whole = out.read_bytes()
    out.unlink()
    for left in (None, 0, len(whole) - 1, len(whole) - 64 * 4 * 23, len(whole) - 64 * 4 * 3):
        if left is not None:
            partial.write_bytes(whole[:left])
        with pytest.raises(ValueError, match=lost):
            encode_corpus(embedder, TEXTS, out, block_texts=10)
        assert not out.exists()
    out.write_bytes(whole[:-1])
    partial.unlink()
    with pytest.raises(ValueError, match=lost):
        encode_corpus(embedder, TEXTS, out, block_texts=10)
    # Killed before it took its name, the whole file is taken as it is.
    out.unlink()
    partial.write_bytes(whole)
    encode_corpus(embedder, TEXTS, out, block_texts=10)
    assert out.read_bytes() == whole
    # What lies between marks is encoded only where nothing before it or after it is lost.
    out.unlink()
    (blocks_folder(out) / "000001").unlink()
    with pytest.raises(ValueError, match=lost):
        encode_corpus(embedder, TEXTS, out, block_texts=10)
    partial.write_bytes(whole[: len(whole) - 64 * 4 * 14])
    with pytest.raises(ValueError, match=lost):
        encode_corpus(embedder, TEXTS, out, block_texts=10)


def test_what_was_changed_is_counted_once_over_all_blocks(
    embedder: FewShotEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pipeline.inference")
    texts = [*TEXTS[:5], "stone " * 100, *TEXTS[:3], "", "river " * 100, "\ud800", "market " * 100]

    def lines() -> list[tuple[str, str]]:
        found = [(r.levelname, r.getMessage()) for r in caplog.records if "passages" in r.getMessage()]
        caplog.clear()
        return found

    cut = "are longer than 60 tokens and were cut"
    embedder.encode_passages(texts)
    changed = [("WARNING", "1 of 13 passages hold half a character (a lone surrogate), now U+FFFD")]
    changed += [("INFO", "1 of 13 passages are empty"), ("INFO", f"3 of 13 passages {cut}")]
    assert sorted(lines()) == sorted(changed)
    encode_corpus(embedder, texts, tmp_path / "c.npy", block_texts=2)
    wanted = [(level, line.replace("passages", "passages that this process encoded")) for level, line in changed]
    assert sorted(lines()) == sorted(wanted)
    encode_corpus(embedder, texts, tmp_path / "c.npy", block_texts=2)
    assert [r.getMessage() for r in caplog.records] == [f"{tmp_path / 'c.npy'}: every block was done before"]
    caplog.clear()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        counting(patch, 3)
        encode_corpus(embedder, texts, tmp_path / "d.npy", block_texts=2)
    caplog.clear()
    encode_corpus(embedder, texts, tmp_path / "d.npy", block_texts=2)
    assert ("INFO", f"2 of 7 passages that this process encoded {cut}") in lines()


def test_what_cannot_be_encoded(embedder: FewShotEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"texts\[12\]=None is not a text"):
        encode_corpus(embedder, [*TEXTS[:12], None], tmp_path / "c.npy", block_texts=10)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="block_texts=0 must be 1 or more"):
        encode_corpus(embedder, TEXTS, tmp_path / "c.npy", block_texts=0)
    with pytest.raises(ValueError, match=r"place=\(0, 2\)"):
        encode_corpus(dataclasses.replace(embedder, place=(0, 2)), TEXTS, tmp_path / "c.npy")
    bad = np.full((23, 64), np.nan, dtype=np.float32)
    monkeypatch.setattr(FewShotEmbedder, "encode_counted", lambda self, texts: (bad, Counter()))
    with pytest.raises(ValueError, match="block 0 of .*d.npy: embeddings are not finite"):
        encode_corpus(embedder, TEXTS, tmp_path / "d.npy")


def test_the_header_has_one_length_for_all_sizes() -> None:
    record = {"dtype": "float32", "width": 4096}
    assert len({len(corpus._header(number, record)) for number in (0, 1, 10**6, 10**12)}) == 1


# The file and the command.


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_of_a_corpus(tmp_path: Path) -> None:
    rows = [{"_id": "a", "title": "T", "text": "x"}, {"_id": 7, "text": "y"}, {"_id": "b c", "title": "", "text": ""}]
    path = write_lines(tmp_path / "c.jsonl", *rows)
    assert list(read_corpus(path)) == [("a", "T x"), ("7", "y"), ("b c", "")]
    texts = CorpusTexts(path, 3)
    assert len(texts) == 3 and list(texts) == list(texts) == ["T x", "y", ""]
    assert list(read_corpus(write_lines(path, {"text": "x"}, {"text": "y"}))) == [("0", "x"), ("1", "y")]
    for row, message in (
        ({"_id": "b"}, "c.jsonl:2 must have a text"),
        ({"_id": "b", "text": None}, "c.jsonl:2 must have a text"),
        ({"_id": "b", "text": "x", "title": 3}, "c.jsonl:2 must have a text"),
        ({"text": "x"}, "c.jsonl:2 has no _id, unlike the lines before"),
        ({"_id": "b\n", "text": "x"}, "c.jsonl:2: _id='b.n' must be a text of one line"),
        ({"_id": "\ud800", "text": "x"}, "c.jsonl:2: _id=.* must be a text of one line"),
        ({"_id": None, "text": "x"}, "c.jsonl:2: _id=None must be"),
        ([], "c.jsonl:2 must be a JSON object"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_corpus(write_lines(path, {"_id": "a", "text": "x"}, row)))


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    line = [sys.executable, str(REPOSITORY / "pipeline/encode_corpus.py"), *map(str, arguments)]
    return subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_killed_command_goes_on_with_two_processes(
    trained: tuple[Path, FewShotEmbedder],  # noqa: F811
    tmp_path: Path,
) -> None:
    texts = [f"{' '.join(WORDS)} {i}" for i in range(2000)]
    rows = [{"_id": f"p{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    lines, out = write_lines(tmp_path / "c.jsonl", *rows), tmp_path / "c.npy"
    arguments = ("--model", trained[0], "--corpus", lines, "--out", out, "--block-texts", "10")
    killed = start(*arguments)
    while count_done(out) < 3:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = count_done(out)
    assert 3 <= done < 200 and not out.exists()
    again = start(*arguments, "--processes", "2")
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert (tmp_path / "c.npy.ids.txt").read_text().splitlines() == [f"p{i}" for i in range(2000)]
    whole = encode_corpus(load_embedder(trained[0], show_progress=False), texts, tmp_path / "w.npy", block_texts=10)
    assert whole.shape == (2000, 64) and out.read_bytes() == (tmp_path / "w.npy").read_bytes()


def test_ids_stand_beside_the_embeddings_of_their_texts_only(
    trained: tuple[Path, FewShotEmbedder],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = write_lines(tmp_path / "a.jsonl", *({"_id": f"a{i}", "text": TEXTS[i]} for i in range(7)))
    other = write_lines(tmp_path / "b.jsonl", *({"_id": f"b{i}", "text": TEXTS[-i - 1]} for i in range(7)))

    def encode(lines: Path, name: str, *more: str) -> int:
        out = str(tmp_path / "new" / name)
        return command.main(
            ["--model", str(trained[0]), "--corpus", str(lines), "--out", out, "--block-texts", "3", *more]
        )

    def ids(name: str) -> str | None:
        path = tmp_path / "new" / f"{name}.ids.txt"
        return path.read_text() if path.is_file() else None

    of_first, of_other = ("".join(f"{x}{i}\n" for i in range(7)) for x in "ab")
    assert encode(first, "emb.v1") == encode(other, "emb.v2") == 0
    assert (ids("emb.v1"), ids("emb.v2")) == (of_first, of_other)
    assert encode(other, "emb.v1") == 2 and "was encoded from other texts" in capsys.readouterr().err
    assert ids("emb.v1") == of_first, "a corpus that is refused leaves the ids"

    # Of a call that ends early there are no ids, and a worker writes none.
    with monkeypatch.context() as patch, pytest.raises(Killed):
        counting(patch, 1)
        encode(first, "emb.v3")
    assert encode(first, "emb.v3", "--worker", "--num-texts", "7") == 0
    assert (tmp_path / "new" / "emb.v3").is_file() and ids("emb.v3") is None
    assert encode(first, "emb.v3") == 0 and ids("emb.v3") == of_first

    # Ids of embeddings that were removed go before others can take their place.
    (tmp_path / "new" / "emb.v3").unlink()
    shutil.rmtree(blocks_folder(tmp_path / "new" / "emb.v3"))
    assert encode(other, "emb.v3", "--model", str(tmp_path / "none")) == 2 and ids("emb.v3") is None

    # A corpus that changed after it was encoded.
    before = sorted(path.name for path in (tmp_path / "new").iterdir())
    for number, changed in ((7, [*TEXTS[:6], "other"]), (6, TEXTS[:6]), (8, TEXTS[:8])):
        write_lines(first, *({"_id": f"c{i}", "text": text} for i, text in enumerate(changed)))
        with pytest.raises(ValueError, match=f"from other texts|7 embeddings for {number} texts"):
            command.write_ids(first, tmp_path / "new" / "emb.v1")
    assert ids("emb.v1") == of_first and before == sorted(path.name for path in (tmp_path / "new").iterdir())


def test_errors_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_lines(tmp_path / "c.jsonl", {"text": "x"})
    for message, arguments in (
        ("no such file", ["--corpus", str(tmp_path / "none.jsonl")]),
        ("c.jsonl:2 must have a text", ["--corpus", str(write_lines(tmp_path / "c.jsonl", {"text": "x"}, {}))]),
        ("holds no texts", ["--corpus", str(write_lines(tmp_path / "empty.jsonl"))]),
        ("--processes 0 must be 1 or more", ["--corpus", str(good), "--processes", "0"]),
    ):
        assert command.main(["--model", str(tmp_path / "m"), "--out", str(tmp_path / "o.npy"), *arguments]) == 2
        assert message in capsys.readouterr().err
    write_lines(good, {"text": "x"})
    assert command.main(["--model", "./m", "--out", str(tmp_path / "o.npy"), "--corpus", str(good)]) == 2
    assert "m: no such folder" in capsys.readouterr().err
