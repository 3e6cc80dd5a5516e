"""What examples cost at inference: time a query and memory against the number of shots, with the shared prefix and
without: `python benchmarks/inference_cost.py --model FOLDER`.

Queries, instruction and examples are those of the quickstart's task. Arms run in turn, round by round, in one process,
so that other work on the machine meets all alike; a figure is the median of the rounds. Tokenising and composing
prompts is timed apart. Whole prompts take many times as long, so fewer queries have them. Writes JSON and a plot.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from proving import REPOSITORY, WORK

from pipeline.evaluation.tasks import RetrievalTask, load_retrieval_task
from pipeline.inference.embedder import FewShotEmbedder, load_base_embedder
from pipeline.settings import load_settings

QUICKSTART = REPOSITORY / "examples" / "quickstart"
WIDE = {"max_query_tokens": 512, "max_passage_tokens": 512, "max_prompt_tokens": 2048}
WIDE |= {"max_example_query_tokens": 256, "max_example_passage_tokens": 256}


def load(model: Path, layers: int | None) -> FewShotEmbedder:
    """The untrained model with the paper's limits: what is measured does not depend on the weights' values."""
    overrides = [f"model.name={model}", f"model.num_layers={'null' if layers is None else layers}"]
    overrides += [f"preprocess.{name}={value}" for name, value in WIDE.items()] + ["run.chunk_tokens=4096"]
    settings = load_settings(QUICKSTART / "recipe.yaml", overrides)
    return load_base_embedder(settings, show_progress=False)


def arms(task: RetrievalTask, shots: Sequence[int]) -> list[tuple[int, bool]]:
    """(number of examples, whether their prefix is shared)."""
    return [(n, shared) for n in shots for shared in ((False,) if n == 0 else (True, False))]


def measure(
    embedder: FewShotEmbedder,
    task: RetrievalTask,
    shots: Sequence[int],
    queries: int,
    whole_queries: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """One record an arm: seconds a query, composing and, where it is shared, a prefix that is there already; the same
    for the first call, which encodes the prefix; seconds of composing, tokens, bytes of the prefix.
    """
    found: dict[tuple[int, bool], list[dict[str, float]]] = {arm: [] for arm in arms(task, shots)}
    for number in range(rounds + 1):
        for (n, shared), records in found.items():
            count = queries if shared or n == 0 else whole_queries
            texts = list(task.queries.values())[: count if number else 4]  # the first round warms up
            examples = (task.examples * 2)[:n]
            fresh = replace(embedder)  # without the prefixes of earlier calls: encoding one is part of the cost
            started = time.perf_counter()
            fresh.compose_queries(texts, task.instruction, examples)
            composed = time.perf_counter()
            fresh.encode_queries(texts, task.instruction, examples, share_prefix=shared)
            wall = time.perf_counter() - composed
            started_again = time.perf_counter()
            if shared:
                fresh.encode_queries(texts, task.instruction, examples)
            again = time.perf_counter() - started_again if shared else wall
            lengths = [len(ids) for ids in fresh.compose_queries(texts, task.instruction, examples)]
            prefixes = list(fresh.prefixes.values())
            record = {
                "seconds": again / len(texts),
                "first_seconds": wall / len(texts),
                "compose_seconds": (composed - started) / len(texts),
                "prompt_tokens": statistics.mean(lengths),
                "prefix_tokens": float(sum(prefix.length for prefix in prefixes)),
                "prefix_mib": sum(prefix.num_bytes for prefix in prefixes) / 2**20,
            }
            records.append(record)
    rows = []
    for (n, shared), records in found.items():
        kept = records[1:]
        middle = {name: statistics.median(r[name] for r in kept) for name in kept[0]}
        rows.append({"shots": n, "shared": shared, **middle})
    return rows


def plot(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6))
    zero = [r for r in rows if r["shots"] == 0]
    for shared, label in ((False, "whole prompts"), (True, "examples encoded once")):
        line = sorted((r for r in (*zero, *rows) if r["shared"] is shared or r["shots"] == 0), key=lambda r: r["shots"])
        axis.plot([r["shots"] for r in line], [1000 * r["seconds"] for r in line], marker="o", label=label)
    axis.set_xlabel("examples in the prompt")
    axis.set_ylabel("ms a query")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a base model")
    parser.add_argument("--task", type=Path, default=QUICKSTART / "eval" / "xquad_en")
    parser.add_argument("--layers", type=int, help="the first so many only (default: all)")
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--whole-queries", type=int, default=32, help="of the arms that encode whole prompts")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU: 1 keeps other work on the machine out")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 1, 2, 4, 9])
    parser.add_argument("--out", type=Path, default=WORK / "inference_cost.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    task = load_retrieval_task(arguments.task)
    embedder = load(arguments.model, arguments.layers)
    rows = measure(embedder, task, arguments.shots, arguments.queries, arguments.whole_queries, arguments.rounds)
    zero = next(r for r in rows if r["shots"] == 0)
    print("shots  prefix   tokens a query  ms a query  first call  x zero-shot  composing, ms  prefix, tokens and MiB")
    for r in rows:
        how = "shared" if r["shared"] else "whole"
        print(
            f"{r['shots']:>5}  {how:<7}  {r['prompt_tokens']:>14.0f}  {1000 * r['seconds']:>10.1f}  "
            f"{1000 * r['first_seconds']:>10.1f}  "
            f"{r['seconds'] / zero['seconds']:>11.2f}  {1000 * r['compose_seconds']:>13.2f}  "
            f"{r['prefix_tokens']:>6.0f} {r['prefix_mib']:>8.1f}"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "rows": rows,
        "queries": arguments.queries,
        "whole_queries": arguments.whole_queries,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "layers": embedder.encoder.decoder.config.num_hidden_layers,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    plot(rows, arguments.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
