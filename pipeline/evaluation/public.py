"""What the paper (arXiv 2409.15700) has for public tasks: instructions, scores, and examples from its authors' files.

The tables are data files under tables/; the "source" of each says where its content is from.
"""

import json
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tables"
EXAMPLES_HOME = "https://github.com/FlagOpen/FlagEmbedding, folder research/llm_dense_retriever/examples/bge-en-icl"


def read_table(name: str) -> dict[str, Any]:
    """A table that is installed with the package."""
    table: dict[str, Any] = json.loads((TABLES / name).read_text(encoding="utf-8"))
    return table


def find_source_task(task_name: str) -> str:
    """The task of MTEB English v1 of whose data a task is a part, a sample or a new split; else the task itself."""
    return str(read_table("mteb.json")["instruction_of"].get(task_name, task_name))


def find_instruction(task_name: str) -> str | None:
    """The paper's instruction for a task of MTEB English v1 or v2 (Table 7); None for other tasks."""
    instruction: str | None = read_table("mteb.json")["instructions"].get(find_source_task(task_name))
    return instruction


def find_paper_scores(task_name: str) -> dict[str, float]:
    """The paper's scores of bge-en-icl (Tables 2, 3, 8 and 9), in hundredths of the metric: 82.76 is 0.8276.

    Args:
        task_name: as in mteb, or of an AIR-Bench domain ("qa_law_en", "long-doc_law_en"). Tasks of MTEB English v2 that
            only share data with one of v1 have no scores.

    Returns:
        "full zero_shot", "full few_shot", "public zero_shot", "public few_shot": by training data and mode; empty for a
        task that the paper does not have.
    """
    table = read_table("paper_scores.json")
    scores: dict[str, float] = table["mteb"].get(task_name) or table["air_bench"].get(task_name, {})
    return scores


def find_examples(task_name: str, folder: str | Path) -> tuple[tuple[str, str], ...]:
    """The paper's in-context examples for a task of MTEB English v1 or v2, in the order of its file.

    They are texts of many datasets, each under a licence of its own, so this package does not hold them.

    Args:
        folder: research/llm_dense_retriever/examples/bge-en-icl/MTEB of a checkout of FlagEmbedding: a file
            `<task>.json` a task, a list of {"query", "response"}. Parts of CQADupstack share one file.

    Returns:
        (query, response) of each example.

    Raises:
        ValueError: no file for this task is there, or it holds something else than examples.
    """
    path = Path(folder) / f"{find_source_task(task_name)}.json"
    if not path.is_file():
        raise ValueError(f"{path}: no examples for task {task_name!r}; the paper's are at {EXAMPLES_HOME}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} must hold a list of examples, got {str(rows)[:80]}")
    return tuple(read_example(row, "response", f"{path}: example {i}") for i, row in enumerate(rows, start=1))


def read_example(row: Any, response_key: str, place: str) -> tuple[str, str]:
    """(query, response) of one example.

    Raises:
        ValueError: it has no query or no response; names `place`.
    """
    query, response = (row.get("query"), row.get(response_key)) if isinstance(row, dict) else (None, None)
    if not isinstance(query, str) or not isinstance(response, str) or not query.strip() or not response.strip():
        raise ValueError(f"{place} must have a text for query and for {response_key}, got {str(row)[:80]}")
    return query, response
