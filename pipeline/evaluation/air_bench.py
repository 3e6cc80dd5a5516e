"""AIR-Bench (arXiv 2412.13102) from local copies of its datasets, and rankings in the form that its leaderboard takes.

A copy lies as on the hub, where each task, domain and language is a dataset repository with a folder a version:

qa_law_en/AIR-Bench_24.05/default/corpus.jsonl                  {"id", "text"} a line
qa_law_en/AIR-Bench_24.05/default/dev_queries.jsonl             {"id", "text"} a line; also test_queries.jsonl
qrels-qa_law_en-dev/AIR-Bench_24.05/default/dev_qrels.jsonl     {"qid", "docid", "relevance"} a line

Judgements may lie beside the queries, too. Those of the test split are not public. Format: data_loader.py, evaluator.py
and docs/submit_to_leaderboard.md of https://github.com/AIR-Bench/AIR-Bench, and the files of qa_web_en on the hub.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.evaluation.public import EXAMPLES_HOME, read_example
from pipeline.evaluation.tasks import RetrievalTask
from pipeline.files import read_json_lines, write_text

log = logging.getLogger(__name__)

INSTRUCTION = "Given a question, retrieve passages that answer the question."  # arXiv 2409.15700, Table 7: all domains
METRICS = {"qa": "ndcg_at_10", "long-doc": "recall_at_10"}  # arXiv 2409.15700, Tables 2 and 3
SPLITS = ("dev", "test")


@dataclass(frozen=True)
class AirBenchPlace:
    """Which dataset of the benchmark a folder holds."""

    version: str  # "AIR-Bench_24.05"
    task_type: str  # "qa" or "long-doc"
    domain: str  # "law"
    language: str  # "en"
    dataset: str  # "default", or the document's name for long-doc

    @property
    def repository(self) -> str:
        """Its name on the hub: "qa_law_en"."""
        return f"{self.task_type}_{self.domain}_{self.language}"

    @property
    def name(self) -> str:
        """The repository's name, with the dataset's where there are several: "long-doc_book_en_origin-of-species"."""
        return self.repository + ("" if self.dataset == "default" else f"_{self.dataset}")


def parse_place(folder: str | Path) -> AirBenchPlace:
    """Which dataset a folder `<task>_<domain>_<language>/<version>/<dataset>` holds, from the path alone.

    Raises:
        ValueError: the path is of another form.
    """
    parts = Path(folder).absolute().parts[-3:]
    words = parts[0].split("_")
    if len(parts) != 3 or len(words) != 3 or words[0] not in METRICS or not parts[1].startswith("AIR-Bench_"):
        raise ValueError(
            f"{folder} is not a dataset folder of AIR-Bench: its path must end in task_domain_language/version/dataset "
            "with qa or long-doc as the task, as in qa_law_en/AIR-Bench_24.05/default"
        )
    return AirBenchPlace(version=parts[1], task_type=words[0], domain=words[1], language=words[2], dataset=parts[2])


def is_place(folder: str | Path) -> bool:
    """Whether a path is that of a dataset folder of AIR-Bench."""
    try:
        parse_place(folder)
    except ValueError:
        return False
    return True


def load_air_bench(folder: str | Path, split: str = "dev", examples: str | Path | None = None) -> RetrievalTask:
    """Read one dataset of AIR-Bench.

    Args:
        folder: `.../<task>_<domain>_<language>/<version>/<dataset>`.
        split: "dev" or "test". Without judgements a test split is a task with all its queries and an empty `relevant`:
            it can be ranked (`write_ranking`), not scored.
        examples: the folder of the paper's in-context examples, in a checkout of FlagEmbedding
            research/llm_dense_retriever/examples/bge-en-icl/AIR-Bench; None: the task has none.

    Raises:
        ValueError: a file is missing; names file and line of a bad row, and judgements of ids that are not there.
    """
    folder = Path(folder)
    place = parse_place(folder)
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is none of AIR-Bench; take one of {', '.join(SPLITS)}")
    corpus = _read_texts(folder / "corpus.jsonl", may_be_empty=True)
    queries = _read_texts(folder / f"{split}_queries.jsonl", may_be_empty=False)
    qrels = _find_qrels(folder, place, split)
    relevant = {} if qrels is None else _read_qrels(qrels, queries, corpus)
    kept = queries if qrels is None else {i: text for i, text in queries.items() if i in relevant}
    if not kept:
        raise ValueError(f"{qrels}: no query of {split}_queries.jsonl has a relevant passage")
    if len(kept) < len(queries):
        log.info("%s: %d of %d queries have no relevant passage", place.name, len(queries) - len(kept), len(queries))
    return RetrievalTask(
        name=place.name,
        instruction=INSTRUCTION,
        metric=METRICS[place.task_type],
        examples=() if examples is None else find_air_bench_examples(place, examples),
        corpus=corpus,
        queries=kept,
        relevant=relevant,
        num_unjudged=len(queries) - len(kept),
    )


def find_air_bench_examples(place: AirBenchPlace, folder: str | Path) -> tuple[tuple[str, str], ...]:
    """(query, response) of the paper's examples for a dataset, in the order of their file.

    Args:
        folder: `examples` of `load_air_bench`: a file qa/<domain>.jsonl or long-doc/<domain>-<dataset>.jsonl a dataset,
            with {"query", "pos"} a line.

    Raises:
        ValueError: no file for this dataset is there, or a line of it is no example.
    """
    stem = place.domain if place.dataset == "default" else f"{place.domain}-{place.dataset.lower()}"
    path = Path(folder) / place.task_type / f"{stem}.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no examples for {place.name}; the paper's are at {EXAMPLES_HOME}")
    examples = tuple(read_example(row, "pos", where) for where, row in read_json_lines(path))
    if not examples:
        raise ValueError(f"{path} is empty")
    return examples


def write_ranking(
    root: str | Path, place: AirBenchPlace, split: str, model_name: str, rankings: Mapping[str, Mapping[str, float]]
) -> Path:
    """Write a dataset's ranking in the form that the leaderboard takes; returns the file's path.

    The file is root/model/NoReranker/task/domain/language_dataset_split.json. AIR-Bench's scripts/zip_results.py packs
    a model's folder for submission.

    Args:
        rankings: query id -> passage id -> score, higher is better. The benchmark's own runs keep the best 1000.

    Raises:
        ValueError: a model's name that cannot be a folder's, an unknown split, no ranking, a score that is no number.
    """
    if not model_name or "/" in model_name or model_name in (".", ".."):
        raise ValueError(f"model_name={model_name!r} becomes a folder's name: take one without a slash")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is none of AIR-Bench; take one of {', '.join(SPLITS)}")
    if not rankings or not all(rankings.values()):
        unranked = ", ".join(query for query, scores in rankings.items() if not scores) or "all queries"
        raise ValueError(f"{place.name}: no passage is ranked for {unranked:.80}; rank some for each query")
    for query, scores in rankings.items():
        if not all(map(math.isfinite, scores.values())):
            raise ValueError(f"{place.name}: a score of query {query!r} is not finite; check the embeddings")
    # The first version had one split, and its files do not name it.
    ending = "" if place.version == "AIR-Bench_24.04" else f"_{split}"
    folder = Path(root) / model_name / "NoReranker" / place.task_type / place.domain
    path = folder / f"{place.language}_{place.dataset}{ending}.json"
    header = {"model_name": model_name, "reranker_name": "NoReranker", "benchmark_version": place.version}
    header |= {"task_type": place.task_type, "domain": place.domain, "language": place.language}
    header |= {"dataset_name": place.dataset, "split": split}
    best_first = {
        query: dict(sorted(((i, float(s)) for i, s in scores.items()), key=lambda item: (-item[1], item[0])))
        for query, scores in rankings.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(header | {"search_results": best_first}, indent=1, allow_nan=False) + "\n")
    return path


def _find_qrels(folder: Path, place: AirBenchPlace, split: str) -> Path | None:
    """The file of judgements, beside the queries or in its own repository; None for a test split without one."""
    name = f"{split}_qrels.jsonl"
    beside = folder.absolute().parents[2] / f"qrels-{place.repository}-{split}" / place.version / place.dataset
    for path in (folder / name, beside / name):
        if path.is_file():
            return path
    if split == "test":
        log.info("%s: its test split comes without judgements: it can be ranked, not scored", place.name)
        return None
    raise ValueError(f"{folder}: no judgements: neither {name} is there nor {beside / name}; copy one")


def _read_texts(path: Path, may_be_empty: bool) -> dict[str, str]:
    """id -> text of every line; ids must be distinct."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy it from the dataset repository on the hub")
    texts: dict[str, str] = {}
    for where, row in read_json_lines(path):
        identity, text = row.get("id"), row.get("text")
        if not isinstance(identity, (str, int)) or not isinstance(text, str):
            raise ValueError(f"{where} must have an id and a text, got {str(row)[:80]}")
        if not text.strip() and not may_be_empty:
            raise ValueError(f"{where}: the text of id={identity!r} is empty")
        if str(identity) in texts:
            raise ValueError(f"{where}: id={identity!r} stands twice")
        texts[str(identity)] = text
    if not texts:
        raise ValueError(f"{path} is empty")
    return texts


def _read_qrels(path: Path, queries: Mapping[str, str], corpus: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Query id -> passage id -> grade, for queries with a grade above 0; hard negatives are judged 0."""
    grades: dict[str, dict[str, int]] = {}
    for where, row in read_json_lines(path):
        query, passage, grade = row.get("qid"), row.get("docid"), row.get("relevance")
        if not isinstance(query, (str, int)) or not isinstance(passage, (str, int)) or type(grade) is not int:
            raise ValueError(f"{where} must have qid, docid and a whole number as relevance, got {str(row)[:80]}")
        query, passage = str(query), str(passage)
        for identity, known, what in ((query, queries, "queries"), (passage, corpus, "corpus")):
            if identity not in known:
                raise ValueError(f"{where} names {identity!r}, which the {what} of this dataset do not hold")
        if grades.setdefault(query, {}).setdefault(passage, grade) != grade:
            raise ValueError(f"{where}: {query!r} and {passage!r} were judged {grades[query][passage]} before")
    return {query: row for query, row in grades.items() if max(row.values()) > 0}
