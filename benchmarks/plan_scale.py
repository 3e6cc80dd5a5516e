"""Plans for more rows than fit a benchmark's disk as text: seconds to start, milliseconds a step, memory.

The row table is real, written and mapped by the code of the store; texts exist as lengths only, computed from their id.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline.data.columns import write_columns
from pipeline.data.permutation import mix_key, permute
from pipeline.data.sampling import Schedule, make_schedule, plan_step
from pipeline.data.store import DatasetEntry, DatasetTable, open_table
from pipeline.data.tokenizing import PromptTokens
from pipeline.files import file_sha256
from pipeline.settings import BatchSettings, DatasetSettings, DataSettings, ExampleSettings, Settings

EPILOG = """examples:
  python benchmarks/plan_scale.py --rows 1000000
  python benchmarks/plan_scale.py --rows 100000000 --work /scratch/plans
"""
BLOCK_ROWS = 1 << 20
NEGATIVES, NEAREST = 2, 4
COLD_STEPS = 50  # enough to tell, few enough that most of the table stays on the disk
EDGES = (64, 128, 256, 512)
TOKENS = PromptTokens((1,), (2,), (5,), (6,), (7, 7), (), (3, 4, 5), ((), (), ()))


@dataclass(frozen=True)
class LengthStore:
    """What plans ask of a store, with lengths in place of texts."""

    path: Path
    manifest: Any
    datasets: tuple[DatasetTable, ...]
    instructions: tuple[str, ...]
    instruction_pieces: tuple[np.ndarray, ...]

    def piece_lengths(self, text_ids: np.ndarray, kind: str) -> np.ndarray:
        return 8 + np.asarray(text_ids, dtype=np.int64) * 2_654_435_761 % (1 << 32) % 120


def write_table(path: Path, num_rows: int) -> None:
    """Row n asks for text 2 n and answers with text 2 n + 1; negatives are answers of other rows."""
    columns = {
        "query_text": ("int64", num_rows),
        "category_text": ("int64", num_rows),
        "source_line": ("int64", num_rows),
        "instruction": ("int32", num_rows),
        "length": ("int32", num_rows),
        "pos_offsets": ("int64", num_rows + 1),
        "pos_text": ("int64", num_rows),
        "neg_offsets": ("int64", num_rows + 1),
        "neg_text": ("int64", NEGATIVES * num_rows),
        "nearest_offsets": ("int64", num_rows + 1),
        "nearest_row": ("int64", NEAREST * num_rows),
    }

    def pieces() -> Iterator[tuple[str, int, np.ndarray]]:
        yield "pos_offsets", num_rows, np.array([num_rows])
        yield "neg_offsets", num_rows, np.array([NEGATIVES * num_rows])
        yield "nearest_offsets", num_rows, np.array([NEAREST * num_rows])
        for start in range(0, num_rows, BLOCK_ROWS):
            row = np.arange(start, min(start + BLOCK_ROWS, num_rows))
            other = np.stack([permute(row, num_rows, mix_key(g)) for g in range(NEGATIVES)], axis=1)
            yield "query_text", start, 2 * row
            yield "category_text", start, np.full(len(row), -1)
            yield "source_line", start, row + 1
            yield "instruction", start, np.zeros(len(row))
            yield "length", start, np.full(len(row), 100)
            yield "pos_offsets", start, row
            yield "pos_text", start, 2 * row + 1
            yield "neg_offsets", start, NEGATIVES * row
            yield "neg_text", NEGATIVES * start, (2 * other + 1).reshape(-1)
            near = (row[:, None] + np.arange(1, NEAREST + 1)) % num_rows
            yield "nearest_offsets", start, NEAREST * row
            yield "nearest_row", NEAREST * start, near.reshape(-1)

    write_columns(path, columns, pieces())


def open_lengths(path: Path, num_rows: int) -> LengthStore:
    """The table as one dataset in five buckets."""
    offsets = tuple(num_rows * j // (len(EDGES) + 1) for j in range(len(EDGES) + 2))
    entry = DatasetEntry("rows", "normal", {"entry": "rows", "no_in_batch_neg": False}, "find", 8, {}, {}, offsets)
    piece = np.array([3, 9, 10, 6], dtype=np.int32)
    manifest = SimpleNamespace(tokens=TOKENS)
    return LengthStore(path, manifest, (open_table(path, entry),), ("find",), (piece,))


def forget(path: Path) -> None:
    """Drop the file from the page cache: what comes next reads from the disk. No map of it may be open."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_steps(store: LengthStore, schedule: Schedule, steps: Sequence[int]) -> list[float]:
    """Milliseconds of each step."""
    times = []
    for step in steps:
        start = time.perf_counter()
        plan_step(store, schedule, step)  # type: ignore[arg-type]
        times.append(1000 * (time.perf_counter() - start))
    return times


def measure(work: Path, num_rows: int, num_steps: int) -> dict[str, Any]:
    """Start and steps of every example mode: first from the disk, then with the table in the page cache."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"rows-{num_rows}.safetensors"
    if not path.exists():
        write_table(path, num_rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    modes: dict[str, dict[str, float]] = {}
    for mode in ("in_batch", "pool", "fixed", "nearest", "filler", "none"):
        batch = BatchSettings(examples=ExampleSettings(mode=mode))
        settings = replace(Settings(), batch=batch, data=DataSettings(datasets=(DatasetSettings(name="rows"),)))
        forget(path)
        start = time.perf_counter()
        store = open_lengths(path, num_rows)
        schedule = make_schedule(store, settings)  # type: ignore[arg-type]
        plan_step(store, schedule, 0)  # type: ignore[arg-type]
        started = time.perf_counter() - start
        cold_steps, steps = np.random.default_rng(0).integers(0, schedule.steps_per_epoch, (2, num_steps)).tolist()
        from_disk = time_steps(store, schedule, cold_steps[:COLD_STEPS])
        start = time.perf_counter()
        file_sha256(path)  # as training does when it opens a store
        read_seconds = time.perf_counter() - start
        times = time_steps(store, schedule, steps)
        modes[mode] = {
            "start_seconds": started,
            "step_ms_from_disk_median": float(np.median(from_disk)),
            "read_seconds": read_seconds,
            "step_ms_median": float(np.median(times)),
            "step_ms_worst": max(times),
        }
        del store
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "rows": num_rows,
        "steps_per_epoch": schedule.steps_per_epoch,
        "queries_per_step": Settings().batch.queries,
        "table_bytes": path.stat().st_size,
        "peak_mib_above_start": after - before,
        "modes": modes,
        **{name: max(mode[name] for mode in modes.values()) for name in next(iter(modes.values()))},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--steps", type=int, default=200, help="random steps planned in each mode")
    parser.add_argument("--work", type=Path, default=Path("runs/prove/plans"), help="112 bytes a row")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    args = parser.parse_args(argv)
    result = measure(args.work, args.rows, args.steps)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
