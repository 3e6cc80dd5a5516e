"""Times and numbers as SLURM and people write them."""

import math
import re
from collections.abc import Sequence


def parse_time(name: str, text: str) -> float:
    """Seconds of a time as SLURM writes it; math.inf for no limit; ValueError, naming `name`, otherwise."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise ValueError(f"{name} {text!r} is no time; write minutes, hours:minutes:seconds or days-hours")
    days, *rest = found.groups()
    fields = [int(field) for field in rest if field is not None]
    if days is None and len(fields) < 3:  # minutes[:seconds]
        fields = [0, *fields]
    seconds = 86400 * int(days or 0) + sum(n * unit for n, unit in zip(fields, (3600, 60, 1), strict=False))
    if seconds == 0:
        raise ValueError(f"{name} {text!r} must be above 0; UNLIMITED is no limit")
    return float(seconds)


def format_time(seconds: float) -> str:
    """Seconds as days-hours:minutes:seconds, days only where there are any."""
    if math.isinf(seconds):
        return "no limit"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days}-' if days else ''}{hours:02d}:{minutes:02d}:{rest:02d}"


def count(number: int, what: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {what}{'s' * (number != 1)}"


def join_words(words: Sequence[object]) -> str:
    """`1, 2 and 4`."""
    texts = [str(word) for word in words]
    return " and ".join(part for part in (", ".join(texts[:-1]), texts[-1]) if part)
