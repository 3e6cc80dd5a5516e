"""Embed a corpus of any size into one .npy file: `python pipeline/encode_corpus.py --model M --corpus C --out O`.

The corpus is JSON lines in BEIR's form, {"_id", "title", "text"} (title and text are joined), or {"text"}. Embeddings
go to OUT, in the order of the lines, and at the end their ids, one a line, to OUT.ids.txt (c.npy.ids.txt beside c.npy).
With several processes (one a GPU) each takes the next block of texts that no other has. What was interrupted goes on
when the command is given again, after the last whole block of each process; more machines can help by giving the same
command on a shared file system.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

from pipeline.files import write_atomic
from pipeline.inference.corpus_file import BLOCK_TEXTS, CorpusTexts, read_corpus
from pipeline.inference.workers import start_workers, stop_workers, visible_gpus

log = logging.getLogger("encode")

EPILOG = """example:
  python pipeline/encode_corpus.py --model runs/quickstart --corpus examples/quickstart/eval/xquad_en/corpus.jsonl \\
      --out runs/quickstart/corpus.npy
  python pipeline/encode_corpus.py --model BAAI/bge-en-icl --template bge_en_icl --corpus corpus.jsonl --out corpus.npy

afterwards:
  corpus = numpy.load("corpus.npy", mmap_mode="r")          # [N, D], nothing is read yet
  ids = open("corpus.npy.ids.txt").read().splitlines()          # of its rows
"""


def encode(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Write embeddings and ids; returns the exit code of the worst process where the work is not done."""
    if not args.corpus.is_file():
        raise ValueError(f"--corpus {args.corpus}: no such file; it is a file of JSON lines")
    if args.worker:
        encode_here(args, args.num_texts)
        return 0
    num_texts = sum(1 for _ in read_corpus(args.corpus))  # a bad line is found before the model is loaded
    if not num_texts:
        raise ValueError(f"--corpus {args.corpus} holds no texts")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not args.out.exists():
        ids_file(args.out).unlink(missing_ok=True)  # of embeddings that were removed
    processes = args.processes or max(1, len(visible_gpus()))
    if processes > 1:
        if code := run_workers(args, [*command, "--num-texts", str(num_texts)], processes, num_texts):
            return code
    else:
        encode_here(args, num_texts)
    write_ids(args.corpus, args.out)
    return 0


def encode_here(args: argparse.Namespace, num_texts: int) -> None:
    """Write the embeddings, in this process."""
    # Loading these takes seconds; wrong arguments should not have to wait for it.
    import transformers

    from pipeline.inference.corpus import encode_corpus
    from pipeline.inference.embedder import load_embedder

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    embedder = load_embedder(args.model, args.chunk_tokens, not args.worker, dim=args.dim, template=args.template)
    encode_corpus(embedder, CorpusTexts(args.corpus, num_texts), args.out, args.dtype, args.block_texts)


def ids_file(out: Path) -> Path:
    """The file with the ids of a file of embeddings."""
    return out.with_name(f"{out.name}.ids.txt")


def write_ids(corpus: Path, out: Path) -> None:
    """Write the ids of all lines, one a line, complete or not at all; ValueError where `out` is not of these texts."""
    from pipeline.inference.corpus import require_texts

    def texts(file: IO[str]) -> Iterator[str]:
        for identity, text in read_corpus(corpus):
            file.write(identity + "\n")
            yield text

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            try:
                require_texts(out, texts(file))
            except ValueError:
                path.unlink()
                raise

    write_atomic(ids_file(out), write)


def run_workers(args: argparse.Namespace, command: Sequence[str], processes: int, num_texts: int) -> int:
    """The same command in processes of their own; they share the blocks."""
    from pipeline.inference.corpus import count_done

    workers = start_workers(Path(__file__), command, processes)
    try:
        # Not on a terminal (a batch job's log): a line now and then.
        interval = 0.2 if sys.stderr.isatty() else 30.0
        with tqdm(total=num_texts, desc="encode corpus", unit="text", mininterval=interval) as bar:
            while any(worker.poll() is None for worker in workers):
                bar.update(min(count_done(args.out) * args.block_texts, num_texts) - bar.n)
                time.sleep(0.5)
            bar.update(min(count_done(args.out) * args.block_texts, num_texts) - bar.n)
    finally:
        codes = stop_workers(workers)
    if failed := sum(code != 0 for code in codes):
        rest = "the others took over their blocks" if failed < processes else "the same command goes on from here"
        log.warning("%d of %d processes failed; %s", failed, processes, rest)
    return 0 if 0 in codes else max(abs(code) for code in codes)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG
    )
    parser.add_argument(
        "--model", required=True, help="a run, its model/, an export, or a published embedder (folder or hub name)"
    )
    parser.add_argument("--corpus", type=Path, required=True, help="JSON lines with a text, and _id and title if any")
    parser.add_argument("--out", type=Path, required=True, help="the .npy file to make")
    parser.add_argument("--template", help="of a published embedder: the template that it was trained with")
    parser.add_argument("--dim", type=int, help="a width of loss.matryoshka_dims to cut embeddings to")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the file; default %(default)s"
    )
    parser.add_argument("--processes", type=int, help="how many encode; default: one a GPU, one without a GPU")
    parser.add_argument(
        "--block-texts", type=int, default=BLOCK_TEXTS, help="texts that are saved at once; default %(default)s"
    )
    parser.add_argument("--chunk-tokens", type=int, help="tokens of one forward pass; default: by device")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--num-texts", type=int, help=argparse.SUPPRESS)  # for a worker: already counted
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    command = list(sys.argv[1:] if argv is None else argv)
    args = parse_arguments(command)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        if args.processes is not None and args.processes < 1:
            raise ValueError(f"--processes {args.processes} must be 1 or more")
        return encode(args, command)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
