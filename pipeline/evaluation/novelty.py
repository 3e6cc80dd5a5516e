"""How new a task is to a model, judged by the names of its training sets (tables/families.json)."""

import re
from collections.abc import Iterable, Sequence

from pipeline.evaluation.public import find_source_task, read_table


def mark_novelty(task_name: str, task_type: str, datasets: Sequence[str]) -> str:
    """Whether a model was trained on a task's data, on data of the same family, or on neither.

    Args:
        task_name: as in mteb, in AIR-Bench ("qa_law_en"), or of a local folder.
        task_type: as in mteb ("PairClassification") or in task.json ("pair_classification"); it decides for tasks
            that the table does not list: they count as in every family of their type.
        datasets: names of the training sets, as in a store's manifest; folders before the name are passed over.

    Returns:
        "trained-on", "same family" or "unseen". Training sets that `find_unlisted` names tell nothing here, unless the
        task has the name of one (with or without an ending: docs, docs_test).
    """
    table = read_table("families.json")
    families = table["families"].values()
    listed_sets = {name: name for family in families for name in family["datasets"]} | table["aliases"]
    listed_tasks = {_key(name): name for family in families for name in family["tasks"]}
    trained = {_key(name) for name in datasets}
    trained |= {listed_sets[found] for found in (_find(name, listed_sets) for name in datasets) if found is not None}
    found = _find(find_source_task(task_name), listed_tasks)
    if found is not None:
        task = listed_tasks[found]
        unlisted = [name for name in datasets if _find(name, listed_sets) is None]  # scidocs_rr is not SCIDOCS
        namesakes = any(_find(name, listed_tasks) == found for name in unlisted)
        is_trained = namesakes or not trained.isdisjoint(table["trained_on"].get(task, ()))
        related = [family for family in families if task in family["tasks"]]
    else:
        is_trained = _find(task_name, trained) is not None
        wanted = _key(task_type).replace("_", "")
        related = [family for family in families if wanted in (kind.lower() for kind in family["types"])]
    if is_trained:
        return "trained-on"
    return "unseen" if all(trained.isdisjoint(family["datasets"]) for family in related) else "same family"


def find_unlisted(datasets: Iterable[str]) -> tuple[str, ...]:
    """The training sets of which the table does not know what they are, so that a mark may be too good."""
    table = read_table("families.json")
    known = {name for family in table["families"].values() for name in family["datasets"]} | set(table["aliases"])
    return tuple(name for name in datasets if _find(name, known) is None)


def _key(name: str) -> str:
    """The last part of a name, in lower case, with _ for all but letters and digits."""
    return re.sub(r"[\W_]+", "_", name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()).strip("_")


def _find(name: str, listed: Iterable[str]) -> str | None:
    """The longest listed key that `name` is, or that it begins with before a further part."""
    key = _key(name)
    return max((other for other in listed if f"{key}_".startswith(f"{other}_")), key=len, default=None)
