"""Local folders and public tasks in the form that mteb evaluates."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType

from pipeline.evaluation.sides import EXAMPLES, KINDS, carried
from pipeline.evaluation.tasks import LocalTask, RetrievalTask, mteb_metric
from pipeline.files import file_sha256

ENGLISH = ("MTEB(eng, v1)", "MTEB(eng, v2)")
# mteb's names of the types.
TYPES = {
    "Retrieval": "retrieval",
    "Reranking": "reranking",
    "Classification": "classification",
    "Clustering": "clustering",
    "STS": "sts",
    "PairClassification": "pair_classification",
    "Summarization": "summarization",
}


def as_mteb(task: LocalTask, sides: str) -> AbsTask:
    """A task in memory as one of mteb's, a new one at each call: mteb's draws go on from where an earlier run left."""
    kind = task.kind
    if isinstance(task, RetrievalTask):
        made: AbsTask = _make(_Retrieval, task, "Reranking" if task.candidates else "Retrieval")
        made.dataset = {"default": {"test": _retrieval_split(task)}}
    elif kind == "classification":
        made = _make(_Classification, task, "Classification")
        made.dataset = DatasetDict({"train": Dataset.from_list([*task.train]), "test": Dataset.from_list([*task.test])})
    elif kind == "clustering":
        made = _make(_Clustering, task, "Clustering")
        # Ten k-means on as many drawn texts: one alone, from a fixed seed, can be several points off their mean.
        made.max_fraction_of_documents_to_embed = None  # type: ignore[attr-defined]
        made.max_documents_per_cluster = len(task.test)  # type: ignore[attr-defined]
        texts = {"sentences": [row["text"] for row in task.test], "labels": [row["label"] for row in task.test]}
        made.dataset = DatasetDict({"test": Dataset.from_dict(texts)})
    elif kind == "sts":
        made = _make(_STS, task, "STS")
        scores = [row["score"] for row in task.test]
        made.min_score, made.max_score = min(scores), max(scores)  # type: ignore[attr-defined]
        made.dataset = DatasetDict({"test": Dataset.from_list([*task.test])})
    else:
        assert kind == "pair_classification"
        made = _make(_PairClassification, task, "PairClassification")
        made.dataset = DatasetDict({"test": Dataset.from_list([*task.test]).rename_column("label", "labels")})
    made.data_loaded = True
    mark_sides(made, kind, sides)
    return made


def benchmark_tasks(name: str) -> list[str]:
    """The names of a benchmark's tasks; ValueError for one whose languages are not those that `public_task` takes."""
    if name not in ENGLISH:
        raise ValueError(f"--benchmark {name} is not evaluated here; known are {', '.join(ENGLISH)}")
    return [task.metadata.name for task in mteb.get_benchmark(name).tasks]


def public_task(name: str, sides: str, data_root: Path | None = None) -> tuple[AbsTask, str]:
    """(task, kind) of mteb's own by name; of tasks in many languages, what the English benchmarks take of them.

    Args:
        data_root: folder with local copies of data sets under their hub names (mteb/sts15-sts, ...), which are read
            instead of the hub.

    Raises:
        ValueError: mteb has no such task, or it is of a type that is not evaluated here.
    """
    listed = [task for known in ENGLISH for task in mteb.get_benchmark(known).tasks if task.metadata.name == name]
    subsets = listed[0].hf_subsets if listed else None
    try:
        task = mteb.get_task(name, hf_subsets=subsets, eval_splits=listed[0].eval_splits if listed else None)
    except KeyError as error:
        raise ValueError(f"task {name} is neither a folder nor a task of mteb {version('mteb')}") from error
    kind = TYPES.get(task.metadata.type)
    if kind is None or "text" not in task.metadata.modalities:
        raise ValueError(f"task {name} is of mteb's type {task.metadata.type}; evaluated are {', '.join(TYPES)}")
    for part in task.metadata.tasks if isinstance(task, AbsTaskAggregate) else [task]:
        mark_sides(part, kind, sides)
        local = data_root / part.metadata.dataset["path"] if data_root else None
        if local is not None and local.is_dir():
            dataset = part.metadata.dataset | {"path": str(local)}
            part.metadata = part.metadata.model_copy(update={"dataset": dataset})
    return task, kind


def data_revision(task: AbsTask, data_root: Path | None) -> str:
    """Name and revision of the data of a public task with its subsets and splits; of a local copy what is in it."""
    found = []
    for part in task.metadata.tasks if isinstance(task, AbsTaskAggregate) else [task]:
        path, revision = part.metadata.dataset["path"], part.metadata.dataset.get("revision", "")
        if data_root is not None and Path(path).is_dir():
            files = sorted(file for file in Path(path).rglob("*") if file.is_file())
            content = [(str(file.relative_to(path)), file_sha256(file)) for file in files]
            path, revision = Path(path).relative_to(data_root), hashlib.sha256(repr(content).encode()).hexdigest()
        found.append(f"{path}@{revision} {'+'.join(part.hf_subsets)} {'+'.join(part.eval_splits)}")
    return ", ".join(found)


def mark_sides(task: AbsTask, kind: str, sides: str) -> None:
    """Let mteb say which of a pair is the second, where the two do not carry the same."""
    if kind in ("sts", "pair_classification") and carried(sides, kind, is_document=True) != EXAMPLES:
        task.input1_prompt_type, task.input2_prompt_type = PromptType.query, PromptType.document  # type: ignore[attr-defined]


def _make(kind: type[AbsTask], task: LocalTask, type_name: Any) -> AbsTask:
    made = kind()
    made.metadata = kind.metadata.model_copy(update={"type": type_name, "main_score": mteb_metric(task)})
    return made


def _retrieval_split(task: RetrievalTask) -> dict[str, Any]:
    untitled = [""] * len(task.corpus)
    corpus = {"id": list(task.corpus), "title": untitled, "text": list(task.corpus.values())}
    return {
        "corpus": Dataset.from_dict(corpus),
        "queries": Dataset.from_dict({"id": list(task.queries), "text": list(task.queries.values())}),
        "relevant_docs": {i: dict(row) for i, row in task.relevant.items()},
        "top_ranked": task.candidates,
    }


_METADATA = TaskMetadata(
    name="local",
    description="a local folder",
    type="Retrieval",
    dataset={"path": "local", "revision": "local"},
    eval_langs=["eng-Latn"],
    main_score="ndcg_at_10",
)


class _Retrieval(AbsTaskRetrieval):
    metadata = _METADATA


class _Classification(AbsTaskClassification):
    metadata = _METADATA


class _Clustering(AbsTaskClustering):
    metadata = _METADATA


class _STS(AbsTaskSTS):
    metadata = _METADATA


class _PairClassification(AbsTaskPairClassification):
    metadata = _METADATA


assert set(TYPES.values()) == set(KINDS)
