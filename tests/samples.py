"""Real rows and texts for tests, and a small recipe with raw data of all five types."""

import gzip
import hashlib
import itertools
import json
from collections.abc import Sequence
from importlib.metadata import files
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.raw import RowRules, check_row, parse_line
from pipeline.datatypes import RawRecord

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLES = REPOSITORY / "examples/quickstart/data"

_NO_RULES = RowRules()
TYPES = {
    "retrieval": "normal",
    "entailment": "only_1neg",
    "similarity": "symmetric_sts",
    "emotion": "symmetric_class",
    "topics": "symmetric_clustering",
}


def parse_row(line: bytes, rules: RowRules = _NO_RULES) -> RawRecord | str:
    """A line of JSON as a valid row, or the reason why it is none."""
    row = parse_line(line)
    return row if isinstance(row, str) else check_row(row, rules, b"\\u" in line)


def installed_file(package: str, suffix: str) -> Path:
    """A file of an installed package, found without importing the package."""
    return next(Path(str(f.locate())) for f in files(package) or [] if str(f).endswith(suffix))


def sample_rows(name: str, count: int | None = None) -> list[dict[str, Any]]:
    """The first rows of one of the quickstart's data files."""
    with gzip.open(SAMPLES / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, count)]


def sample_texts(count: int) -> list[str]:
    """Distinct real texts, `count` of each sample file: queries, positives and negatives."""
    texts: dict[str, None] = {}
    for path in sorted(SAMPLES.glob("*.jsonl.gz")):
        rows = sample_rows(path.name.removesuffix(".jsonl.gz"), count)
        own = [text for row in rows for text in (row["query"], *row["pos"], *row["neg"])]
        texts |= dict.fromkeys(text.strip() for text in own[:count])
    return list(texts)


def write_recipe(folder: Path, tokenizer: str, rows: int = 40, **sections: dict[str, Any]) -> Path:
    """Write raw files (plain and gzip) and a recipe into `folder`; `sections` are merged into the recipe."""
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, lines in tiny_rows(rows).items():
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if name == "topics":
            (raw / "topics.jsonl.gz").write_bytes(gzip.compress(content.encode(), mtime=0))
        else:
            (raw / f"{name}.jsonl").write_text(content, encoding="utf-8")
    recipe = folder / "recipe.yaml"
    tree = tiny_settings(folder, tokenizer)
    for section, values in sections.items():
        tree[section] = {**tree[section], **values}
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return recipe


def tiny_rows(count: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of the five types, from the quickstart's samples; "similarity" has scores in half of its rows.

    "entailment" and "similarity" share half of their texts, which each needs in another form.
    """
    similarity = [row | {"type": "symmetric_sts"} for row in sample_rows("snli", count)]
    for row in similarity[::2]:
        row |= {"pos_scores": [0.9] * len(row["pos"]), "neg_scores": [0.1] * len(row["neg"])}
    return {
        "retrieval": sample_rows("squad_newwiki", count),
        "entailment": sample_rows("snli", count + count // 2)[count // 2 :],
        "similarity": similarity,
        "emotion": sample_rows("goemotions", count),
        "topics": sample_rows("stackoverflow_titles", count),
    }


def tiny_settings(folder: Path, tokenizer: str) -> dict[str, dict[str, Any]]:
    """The recipe as a tree; the model is its tokenizer's folder only, enough for everything before training."""
    datasets = [
        {"name": name, "path": f"{name}.jsonl" + (".gz" if name == "topics" else "")} | {"instruction": f"Find {name}."}
        for name in TYPES
    ]
    return {
        "model": {"name": tokenizer},
        "preprocess": {
            "max_query_tokens": 64,
            "max_passage_tokens": 96,
            "max_example_query_tokens": 48,
            "max_example_passage_tokens": 64,
            "max_prompt_tokens": 256,
            "bucket_edges": [64, 128, 192],
        },
        "data": {"root": str(folder / "raw"), "store": str(folder / "store"), "datasets": datasets},
        "batch": {"queries": 8, "symmetric_queries": 8, "group_size": 3},
        "run": {
            "output_dir": str(folder / "run"),
            "deepspeed": str(REPOSITORY / "ds_configs/zero0.json"),
            "chunk_tokens": 512,
        },
    }


def cut_piece(ids: Sequence[int], limit: int, tail: Sequence[int]) -> list[int]:
    """`ids`, or if longer than `limit` tokens its start followed by the separator that the next piece needs."""
    return list(ids) if len(ids) <= limit else [*ids[: limit - len(tail)], *tail]


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
