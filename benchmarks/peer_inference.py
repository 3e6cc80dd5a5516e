"""FlagEmbedding's FlagICLModel as released: seconds a query, and its embeddings.

runs/peers/flagembedding/bin/python benchmarks/peer_inference.py TASK OUT

TASK  JSON: {"model": folder, "instruction", "examples": [[query, response], ...], "queries", "threads"}
OUT   JSON: {"seconds": of a query behind the examples, "zero-shot" and "few-shot": embeddings, "versions"}
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from FlagEmbedding import FlagICLModel

PACKAGES = ("FlagEmbedding", "torch", "transformers")


def main(task_path: str, out: str) -> None:
    task = json.loads(Path(task_path).read_text())
    torch.set_num_threads(task["threads"])
    model = FlagICLModel(
        task["model"], query_instruction_for_retrieval=task["instruction"], use_fp16=False, devices=["cpu"]
    )
    record: dict[str, Any] = {"versions": {name: version(name) for name in PACKAGES}}
    record["zero-shot"] = model.encode_queries(task["queries"]).tolist()  # warms up as well
    model.set_examples([{"query": query, "response": response} for query, response in task["examples"]])
    started = time.perf_counter()
    few_shot = model.encode_queries(task["queries"])
    record["seconds"] = (time.perf_counter() - started) / len(task["queries"])
    record["few-shot"] = few_shot.tolist()
    Path(out).write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
