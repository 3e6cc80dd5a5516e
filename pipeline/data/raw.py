"""Raw rows: JSONL files cut into blocks of whole lines, and the rules that a row must meet.

Blocks have a fixed size whatever the number of processes, so everything made from them is the same on any machine.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.datatypes import TASK_TYPES, RawRecord

BLOCK_BYTES = 8 << 20
_MAX_SCORE = 3.4e38


@dataclass(frozen=True)
class Block:
    """Whole lines of a file: those that start in bytes start .. stop - 1, or the lines themselves (of a .gz file)."""

    path: str
    start: int
    stop: int
    data: bytes | None = None


def is_gzip(path: str | Path) -> bool:
    return str(path).endswith(".gz")


def iter_blocks(path: str | Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Cut a file into blocks; ValueError for a .gz file that cannot be decompressed."""
    if not is_gzip(path):
        size = Path(path).stat().st_size
        for start in range(0, size, block_bytes):
            yield Block(str(path), start, min(start + block_bytes, size))
        return
    start = 0
    try:
        with gzip.open(path, "rb") as stream:
            while data := stream.read(block_bytes):
                if not data.endswith(b"\n"):
                    data += stream.readline()
                yield Block(str(path), start, start + len(data), data)
                start += len(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}; copy or compress it again") from error


def read_block(block: Block) -> bytes:
    """The lines of a block."""
    if block.data is not None:
        return block.data
    with open(block.path, "rb") as file:
        begin = block.start
        if begin > 0:
            file.seek(begin - 1)
            begin += len(file.readline()) - 1
        if begin >= block.stop:
            return b""
        data = file.read(block.stop - begin)
        return data if data.endswith(b"\n") else data + file.readline()


def split_lines(data: bytes) -> list[bytes]:
    """Lines without their newline; a newline at the end does not begin another line."""
    lines = data.split(b"\n")
    return lines[:-1] if not lines[-1] else lines


def parse_row(line: bytes, dataset_type: str = "", dataset_instruction: str = "") -> RawRecord | str:
    """A line as a valid row, or the reason why it is none.

    Args:
        dataset_type: type set for the whole dataset ("": what the row says, else "normal").
        dataset_instruction: of rows without `prompt`.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(row, dict):
        return f"not an object but {_kind(row)}"
    query, pos, neg = _text(row, "query"), _texts(row, "pos"), _texts(row, "neg")
    if isinstance(query, _Fault):
        return query.reason
    if isinstance(pos, _Fault):
        return pos.reason
    if isinstance(neg, _Fault):
        return neg.reason
    if not pos:
        return "no positive (pos is missing or empty)"
    scores = _scores(row, len(pos), len(neg))
    if isinstance(scores, _Fault):
        return scores.reason
    task_type = row.get("type")
    if task_type is None or task_type == "":
        task_type = dataset_type or "normal"
    if not isinstance(task_type, str) or task_type not in TASK_TYPES:
        return f"unknown type {str(task_type)[:40]!r} (known: {', '.join(TASK_TYPES)})"
    if dataset_type and task_type != dataset_type:
        return f"type {task_type!r} contradicts the dataset's type {dataset_type!r}"
    category: str | None = None
    if task_type == "symmetric_clustering":
        found = _text(row, "category")
        if isinstance(found, _Fault):
            return found.reason
        category = found
    prompt = row.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        return f"prompt is not a string but {_kind(prompt)}"
    instruction = (prompt or "").strip() or dataset_instruction.strip()
    if b"\\u" in line and not _encodable(query, *pos, *neg, instruction, category or ""):
        return "a lone surrogate (half a character) in a text"
    return RawRecord(query, pos, neg, scores[0], scores[1], instruction, category, task_type)


@dataclass(frozen=True)
class _Fault:
    reason: str


def _kind(value: Any) -> str:
    names = {"NoneType": "null", "str": "a string", "list": "a list", "dict": "an object", "bool": "true or false"}
    return names.get(type(value).__name__, "a number")


def _text(row: dict[str, Any], key: str) -> str | _Fault:
    value = row.get(key)
    if value is None:
        return _Fault(f"no {key}")
    if not isinstance(value, str):
        return _Fault(f"{key} is not a string but {_kind(value)}")
    value = value.strip()
    return value or _Fault(f"empty {key}")


def _texts(row: dict[str, Any], key: str) -> tuple[str, ...] | _Fault:
    values = row.get(key)
    if values is None:
        return ()
    if not isinstance(values, list):
        return _Fault(f"{key} is not a list but {_kind(values)}")
    for value in values:
        if not isinstance(value, str):
            return _Fault(f"{key} holds {_kind(value)} instead of a string")
    texts = tuple([value.strip() for value in values])
    return texts if all(texts) else _Fault(f"an empty text in {key}")


Scores = tuple[float, ...] | None


def _scores(row: dict[str, Any], num_pos: int, num_neg: int) -> tuple[Scores, Scores] | _Fault:
    """(pos_scores, neg_scores): both or none, one finite number a text. Lists of nothing but null are none."""
    if all(_no_scores(row.get(key)) for key in ("pos_scores", "neg_scores")):
        return None, None
    found = []
    for key, wanted in (("pos_scores", num_pos), ("neg_scores", num_neg)):
        values = row.get(key)
        if values is None and wanted == 0:
            values = []
        if values is None:
            return _Fault(f"{key} is missing where the other scores are given")
        if not isinstance(values, list) or len(values) != wanted:
            length = f"{len(values)} values" if isinstance(values, list) else _kind(values)
            return _Fault(f"{key} holds {length} for {wanted} texts")
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            return _Fault(f"{key} holds something that is not a number")
        # Scores are stored as fp32, so what overflows there is not finite either; NaN fails every comparison.
        if not all(abs(v) <= _MAX_SCORE for v in values):
            return _Fault(f"{key} holds a number that is not finite")
        found.append(tuple(float(v) for v in values))
    return found[0], found[1]


def _no_scores(values: Any) -> bool:
    return values is None or (isinstance(values, list) and bool(values) and all(v is None for v in values))


def _encodable(*texts: str) -> bool:
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
