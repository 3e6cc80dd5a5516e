"""The slow twin of mining: brute-force numpy search, and every rule in a plain loop over texts."""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.permutation import mix_key
from pipeline.mining.options import MiningOptions


@dataclass
class SlowResult:
    """Of one dataset: mined negatives and nearest lines of each row, and what the report counts."""

    negatives: list[list[str]]
    nearest: list[list[int]]
    removed: dict[str, int]
    candidates: int
    ranks: list[int]  # of the best positive, 0: not reached
    lowest: list[float]
    seen_by_teacher: list[tuple[str, str]]  # queries with candidates


def inner_product(query_D: np.ndarray, text_D: np.ndarray) -> np.float32:
    """In fp64, rounded once."""
    return np.float32(np.sum(query_D.astype(np.float64) * text_D.astype(np.float64)))


def same_but_for_form(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", text)) or text


def mine_slowly(
    rows: list[dict[str, Any]],
    pool: list[dict[str, Any]],
    ids: dict[str, int],
    name: str,
    options: MiningOptions,
    score: Any,
    query_score: Any,
    teacher: Any = None,
) -> SlowResult:
    """Mine a dataset given as raw rows in store order.

    Args:
        pool: rows of all datasets whose texts make the corpus.
        ids: text -> text id.
        score: (row, text) -> float, or None where the text is not ranked.
        query_score: (row, row) -> the same for two queries.
    """
    corpus = sorted({text for row in pool for text in (*row["pos"], *row["neg"])}, key=ids.__getitem__)
    result = SlowResult([], [], {}, 0, [], [], [])
    for n, row in enumerate(rows):
        scores = {text: score(row, text) for text in corpus}
        ranked = [t for t in corpus if scores[t] is not None and t != row["query"]]
        ranked.sort(key=lambda t: (-scores[t], ids[t]))
        ranked = ranked[: max(options.last_rank, 100)]
        lowest = min(scores[p] if scores[p] is not None else np.float32(0) for p in row["pos"])
        result.lowest.append(float(lowest))
        result.ranks.append(min((ranked.index(p) + 1 for p in row["pos"] if p in ranked), default=0))
        kept = []
        for text in ranked[options.first_rank - 1 : options.last_rank]:
            result.candidates += 1
            reason = why_not(row, text, float(scores[text]), float(lowest), pool, options)
            if reason is None:
                kept.append(text)
            else:
                result.removed[reason] = result.removed.get(reason, 0) + 1
        kept.sort(key=ids.__getitem__)
        order = np.random.default_rng(mix_key(options.seed, n, *name.encode())).permutation(len(kept))
        drawn = []
        for text in (kept[i] for i in order):
            if len(drawn) == options.num_negatives:
                break
            if teacher is not None:
                result.seen_by_teacher.append((row["query"], text))
                worst = min(teacher(row["query"], p) for p in row["pos"])
                if teacher(row["query"], text) > worst - (1 - options.teacher_ratio) * abs(worst):
                    continue
            drawn.append(text)
        drawn.sort(key=lambda t: (-scores[t], ids[t]))
        result.negatives.append(drawn)
        result.nearest.append(slow_nearest(rows, n, options.num_nearest, ids, query_score))
    return result


def slow_nearest(rows: list[dict[str, Any]], n: int, wanted: int, ids: dict[str, int], query_score: Any) -> list[int]:
    """1-based lines of the nearest rows of row n."""
    others = [m for m, row in enumerate(rows) if row["query"] != rows[n]["query"]]
    found = {m: query_score(rows[n], rows[m]) for m in others}
    near = [m for m in others if found[m] is not None]
    near.sort(key=lambda m: (-found[m], rows[m]["instruction_id"], ids[rows[m]["query"]], m))
    return [m + 1 for m in near[:wanted]]


def why_not(
    row: dict[str, Any], text: str, score: float, lowest: float, pool: list[dict[str, Any]], o: MiningOptions
) -> str | None:
    """The first rule that a candidate breaks."""
    own = {row["query"], *row["pos"]}
    if text in row["pos"]:
        return "positive"
    if same_but_for_form(text) in {same_but_for_form(t) for t in own}:
        return "copy"
    if any(other["query"] == row["query"] and text in other["pos"] for other in pool):
        return "same_query"
    for other in pool:
        texts = {other["query"], *other["pos"]}
        if text in texts and texts & own:
            return "same_positive"
    if row.get("category"):
        for other in pool:
            if other.get("category") == row["category"] and text in {other["query"], *other["pos"]}:
                return "same_category"
    if o.keep_negatives and text in row["neg"]:
        return "present"
    if o.max_score is not None and score > o.max_score:
        return "max_score"
    if o.margin is not None and score > lowest - o.margin:
        return "margin"
    if o.max_ratio is not None and score > lowest - (1 - o.max_ratio) * abs(lowest):
        return "max_ratio"
    return None
