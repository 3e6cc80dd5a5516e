"""The rules that a raw row must meet, whatever file it comes from, and the columns that it is read from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from pipeline.datatypes import TASK_TYPES, RawRecord
from pipeline.settings import ColumnSettings

FIELDS = tuple(f.name for f in fields(ColumnSettings))
MAX_LINE_BYTES = 256 << 20  # a file without newlines must not fill the memory
MAX_TEXT_CHARS = 8_000_000  # tokenizing needs a hundred times that in memory, and a limit keeps some hundred tokens
_LISTS = ("pos", "neg", "pos_scores", "neg_scores")
_MAX_SCORE = 3.4e38
_OWN_NAMES = ColumnSettings()


@dataclass(frozen=True)
class RowRules:
    """What the recipe says about the rows of a dataset."""

    type: str = ""  # for all rows ("": what the row says, else "normal")
    instruction: str = ""  # of rows without `prompt`
    columns: ColumnSettings = _OWN_NAMES


def parse_line(line: bytes) -> dict[str, Any] | str:
    """A line as a JSON object, or the reason why it is none."""
    if len(line) > MAX_LINE_BYTES:
        return f"a line of more than {MAX_LINE_BYTES >> 20} MiB"
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    return row if isinstance(row, dict) else f"not an object but {_kind(row)}"


def check_row(row: dict[str, Any], rules: RowRules, escaped: bool = False) -> RawRecord | str:
    """The fields of a row as a valid record, or the reason why it is none.

    Args:
        escaped: the row comes from JSON with \\u escapes, which can write half a character.
    """
    if rules.columns is not _OWN_NAMES and rules.columns != _OWN_NAMES:
        row = map_columns(row, rules.columns)
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
        task_type = rules.type or "normal"
    if not isinstance(task_type, str) or task_type not in TASK_TYPES:
        return f"unknown type {str(task_type)[:40]!r} (known: {', '.join(TASK_TYPES)})"
    if rules.type and task_type != rules.type:
        return f"type {task_type!r} contradicts the dataset's type {rules.type!r}"
    category: str | None = None
    if task_type == "symmetric_clustering":
        found = _text(row, "category")
        if isinstance(found, _Fault):
            return found.reason
        category = found
    prompt = row.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        return f"prompt is not a string but {_kind(prompt)}"
    instruction = (prompt or "").strip() or rules.instruction.strip()
    if escaped and not _encodable(query, *pos, *neg, instruction, category or ""):
        return "a lone surrogate (half a character) in a text"
    nearest = row.get("nearest") or []
    if not isinstance(nearest, list) or not all(type(line) is int and 0 < line < 1 << 63 for line in nearest):
        return "nearest is not a list of line numbers"
    return RawRecord(query, pos, neg, scores[0], scores[1], instruction, category, task_type, tuple(nearest))


# Columns.


@lru_cache(maxsize=256)
def find_columns(columns: ColumnSettings, present: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """Field -> the columns among `present` that it is read from, in the order of the recipe; `*` as they stand."""
    found = {}
    for field in FIELDS:
        named = getattr(columns, field)
        patterns = (field,) if named == () else named or ()
        matches = [[name for name in present if column_matches(name, pattern)] for pattern in patterns]
        found[field] = tuple(dict.fromkeys(name for some in matches for name in some))
    return found


def column_matches(name: str, pattern: str) -> bool:
    """Whether a column is the one, or one of those, that a recipe names."""
    # Only the star means something: brackets may be part of a name.
    return name == pattern or ("*" in pattern and fnmatchcase(name, pattern.replace("[", "[[]").replace("?", "[?]")))


def require_columns(columns: ColumnSettings, present: Sequence[str], where: str) -> None:
    """ValueError, naming the columns there are, if one that the recipe names or every row needs is not among them."""
    there = ", ".join(present[:30]) + (f" and {len(present) - 30} more" if len(present) > 30 else "")
    for field in FIELDS:
        for pattern in getattr(columns, field) or ():
            if not any(column_matches(name, pattern) for name in present):
                raise ValueError(
                    f"{where}: columns.{field} names {pattern!r}, which does not exist; there are: {there}"
                )
    for field in ("query", "pos"):
        if not find_columns(columns, tuple(present))[field]:
            raise ValueError(
                f"{where}: no column {field!r}; name the one to read as columns.{field}; there are: {there}"
            )


def map_columns(row: dict[str, Any], columns: ColumnSettings) -> dict[str, Any]:
    """The row with the names of the fields; several columns of a field join to one list, without what is null."""
    mapped: dict[str, Any] = {}
    for field, names in find_columns(columns, tuple(row)).items():
        if field not in _LISTS or len(names) < 2:
            mapped[field] = row[names[0]] if names else None
            continue
        values = [row[name] for name in names if row[name] is not None]
        joined = [item for value in values for item in (value if isinstance(value, list) else [value])]
        mapped[field] = joined if values else None
    return mapped


@dataclass(frozen=True)
class _Fault:
    reason: str


def _kind(value: Any) -> str:
    names = {"NoneType": "null", "str": "a string", "list": "a list", "dict": "an object", "bool": "true or false"}
    names |= {"int": "a number", "float": "a number"}
    return names.get(type(value).__name__, type(value).__name__)


def _text(row: dict[str, Any], key: str) -> str | _Fault:
    value = row.get(key)
    if value is None:
        return _Fault(f"no {key}")
    if not isinstance(value, str):
        return _Fault(f"{key} is not a string but {_kind(value)}")
    value = value.strip()
    if len(value) > MAX_TEXT_CHARS:
        return _Fault(f"{key} of more than {MAX_TEXT_CHARS:,} characters")
    return value or _Fault(f"empty {key}")


def _texts(row: dict[str, Any], key: str) -> tuple[str, ...] | _Fault:
    values = row.get(key)
    if values is None:
        return ()
    if isinstance(values, str):  # one text may stand without its list
        values = [values]
    if not isinstance(values, list):
        return _Fault(f"{key} is not a list but {_kind(values)}")
    for value in values:
        if not isinstance(value, str):
            return _Fault(f"{key} holds {_kind(value)} instead of a string")
    texts = tuple([value.strip() for value in values])
    if any(len(text) > MAX_TEXT_CHARS for text in texts):
        return _Fault(f"a text of more than {MAX_TEXT_CHARS:,} characters in {key}")
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
        if isinstance(values, (int, float)) and not isinstance(values, bool):
            values = [values]
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
