"""What a mining run is asked for: the rules by which negatives are chosen, and their checks."""

import math
from dataclasses import dataclass
from typing import Literal

BM25 = "bm25"  # in place of a model's folder
RECALL_RANKS = (1, 10, 100)  # of the report
SHARD_TEXTS = 200_000  # embeddings in memory at a time: 3.3 GB at 4096 numbers each


@dataclass(frozen=True)
class MiningOptions:
    """Rules by which negatives are chosen; a score is an inner product of unit vectors, or BM25's sum."""

    first_rank: int = 10  # window of ranks, 1 is the best; the query's own text takes no rank
    last_rank: int = 200
    num_negatives: int = 7
    max_score: float | None = None  # a candidate above it goes
    margin: float | None = None  # a candidate above (positive's score - margin) goes
    # A candidate above ratio x the positive's score goes: TopK-PercPos of NV-Retriever (arXiv 2407.15831), 0.95 there.
    max_ratio: float | None = 0.95
    teacher: str | None = None  # folder of a cross-encoder or a reranker
    teacher_setting: str | None = None  # depth and width of a reranker; None: full
    teacher_ratio: float = 0.95  # of the teacher's score of the positive
    corpus: Literal["dataset", "type"] = "dataset"
    keep_negatives: bool = False
    num_nearest: int = 32  # 0: none
    seed: int = 0

    @property
    def search_depth(self) -> int:
        """Ranks to search: the window, and those that the report shows."""
        return max(self.last_rank, *RECALL_RANKS)


def check_options(options: MiningOptions, embedder: str) -> None:
    """ValueError names option, value and remedy of the first one that cannot be."""
    o = options
    if not 1 <= o.first_rank <= o.last_rank:
        window = f"{o.first_rank}-{o.last_rank}"
        raise ValueError(f"--window {window} must be two ranks, the better first, 1 the best; for example 10-200")
    if o.num_negatives < 1:
        raise ValueError(f"--num-negatives {o.num_negatives} must be at least 1")
    if o.num_nearest < 0:
        raise ValueError(f"--nearest {o.num_nearest} must be 0 (none) or more")
    if o.seed < 0:
        raise ValueError(f"--seed {o.seed} must be 0 or more")
    if o.max_score is not None and not math.isfinite(o.max_score):
        raise ValueError(f"--max-score {o.max_score} must be a finite number")
    if o.max_score is not None and embedder != BM25 and not -1 < o.max_score <= 1:
        raise ValueError(f"--max-score {o.max_score} must lie in -1..1: scores of an embedder are cosines")
    if o.margin is not None and not 0 <= o.margin < math.inf:
        raise ValueError(f"--margin {o.margin} must be 0 or more and finite")
    if o.margin is not None and embedder != BM25 and o.margin >= 2:
        raise ValueError(f"--margin {o.margin} must be below 2: scores of an embedder are cosines")
    if o.teacher is None and o.teacher_setting is not None:
        raise ValueError(
            f"--teacher-setting {o.teacher_setting} is for a reranker as --teacher, which is not given: leave it out"
        )
    for name, value in (("--max-ratio", o.max_ratio), ("--teacher-ratio", o.teacher_ratio)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} {value} must lie in 0..1 (0 excluded); 0.95 keeps what scores below 95 %")


def limit_below(score: float, ratio: float) -> float:
    """`ratio` x score, and as far below a negative score, where the plain product would lie above it."""
    return score - (1.0 - ratio) * abs(score)
