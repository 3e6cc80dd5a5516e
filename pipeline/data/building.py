"""Building a token store: raw files -> units (A) -> text shards (B) -> row tables and manifest (C).

All work happens in <store>.partial, which becomes the store by a rename at the end, so a store is whole or absent.
Every unit and shard is complete or absent too: an interrupted build goes on where it stopped, as long as settings,
tokenizer and raw files are the same. No file depends on the number of processes.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from pipeline.data.blocks import BLOCK_BYTES, Block, RawFile, add_checksum, iter_blocks
from pipeline.data.composing import Limits, compose_query, compose_wrapped
from pipeline.data.finding import find_sources
from pipeline.data.joining import check_joined
from pipeline.data.parallel import run_tasks
from pipeline.data.pieces import KINDS
from pipeline.data.quality import require_usable, write_quarantine
from pipeline.data.row_tables import HISTOGRAM_EDGES, JoinTask, MeasureTask, TextShards, join_units, measure_unit
from pipeline.data.sources import (
    Source,
    full_identity,
    group_size_of,
    is_empty,
    raw_identity,
    require_store,
    require_up_to_date,
    with_checksums,
)
from pipeline.data.store import (
    FORMAT_VERSION,
    MANIFEST,
    DatasetEntry,
    Manifest,
    StoredFile,
    dump_manifest,
    limits_dict,
    open_store,
)
from pipeline.data.text_shards import ShardTask, Width, build_shard, save_encoder
from pipeline.data.tokenizing import PromptTokenizer, PromptTokens, load_tokenizer, tokenize_pieces
from pipeline.data.units import UnitTask, build_unit
from pipeline.files import file_sha256, lease_patience, locked, safe_name, sync, write_text
from pipeline.prompts import get_template
from pipeline.settings import PreprocessSettings, Settings

log = logging.getLogger(__name__)

PARTITION_BYTES = 4 << 20
# Every partition reads a part of every unit, so both are few: larger inputs have larger ones.
_MAX_PARTITIONS = 4096
_MAX_UNITS = 4096
_MAX_BLOCK_BYTES = 64 << 20  # what a process holds of raw text, several times over
_TEXT_PER_BYTE = {"gzip": 4, "zstd": 4, "parquet": 3}  # of a file, about; of others 1
_HUB_BYTES = 4 << 30  # of a dataset that is streamed: its size is not known


@dataclass(frozen=True)
class BuildPlan:
    """Everything that stages share."""

    settings: Settings
    sources: tuple[Source, ...]
    work: Path  # <store>.partial
    # Named by what decides their bytes: what a killed run's processes still write lands where nobody reads.
    units: Path
    rest: Path
    num_partitions: int
    block_bytes: int
    bars: bool

    @property
    def rows(self) -> Path:
        return self.rest / "rows"

    @property
    def reports(self) -> Path:
        return self.rest / "reports"

    @property
    def target(self) -> Path:
        return self.rest / "store"


def build_store(
    settings: Settings,
    pool: Executor | None = None,
    overwrite: bool = False,
    bars: bool = False,
    block_bytes: int | None = None,
    partition_bytes: int = PARTITION_BYTES,
) -> tuple[Manifest, bool]:
    """Build the token store of a recipe at settings.data.store.

    Args:
        pool: from `open_pool`; changes the time, never the result. None: all in this process.
        overwrite: replace a store made from other settings or raw files.
        bars: show progress bars.
        block_bytes, partition_bytes: size of a unit of raw lines, and of the raw text behind one text shard. By
            default they go with the size of the input.

    Returns:
        the manifest, and whether the store was built (False: it was there already and is up to date).

    Raises:
        ValueError: for everything a user can cause; no store is left behind then.
    """
    store = Path(settings.data.store)
    if not settings.data.datasets:
        raise ValueError("data.datasets is empty; name at least one raw file there")
    found = find_sources(settings)
    # Loading the tokenizer takes seconds: other processes parse rows meanwhile.
    with ThreadPoolExecutor(1) as thread:
        template = get_template(settings.preprocess.template)
        loading = thread.submit(load_tokenizer, settings.tokenizer_name, template)
        parts = list(dict.fromkeys(part for source in found for file in source.files for part in file.parts))
        states = run_tasks(pool, add_checksum, parts, "checksums of raw files", bars, len(parts))
        sources = with_checksums(found, {state.path: state for state in states})
        text_bytes = sum(_text_bytes(file) for source in sources for file in source.files)
        block_bytes = block_bytes or min(max(BLOCK_BYTES, text_bytes // _MAX_UNITS), _MAX_BLOCK_BYTES)
        num_partitions = min(max(-(-text_bytes // partition_bytes), 1), _MAX_PARTITIONS)
        raw = raw_identity(sources, block_bytes, num_partitions)
        if store.exists() and not is_empty(store):
            require_store(store)
        if not overwrite and store.exists() and not is_empty(store):
            return require_up_to_date(store, full_identity(raw, settings, sources, loading.result())), False
        work = store.with_name(store.name + ".partial")
        with locked(work / "lock", f"another process is building in {work}; wait for it to end", lease_patience()):
            if not overwrite and store.exists() and not is_empty(store):
                raise ValueError(f"another process has just built {store}; run again to compare it with the recipe")
            units = _keep_one(work, "units", raw)
            plan = BuildPlan(settings, sources, work, units, work, num_partitions, block_bytes, bars)
            reports = _build_units(plan, pool, loading)
            pt = loading.result()
            identity = full_identity(raw, settings, sources, pt)
            plan = replace(plan, rest=_keep_one(work, "rest", identity))
            for folder in (plan.rows, plan.reports, plan.target):
                folder.mkdir(exist_ok=True)
            manifest = _build(plan, pt, identity, reports, pool)
            _publish(plan, store)
            # Before the lock goes: another process may be waiting to build in this folder.
            shutil.rmtree(work)
    return manifest, True


def _text_bytes(file: RawFile) -> int:
    """About how much text a file holds."""
    return _HUB_BYTES if file.kind == "hub" else file.num_bytes * _TEXT_PER_BYTE.get(file.kind, 1)


def _keep_one(work: Path, stage: str, identity: dict[str, Any]) -> Path:
    """The stage's folder for these inputs, with what an interrupted build has left there; others are removed."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    wanted = work / f"{stage}-{digest}"
    for other in sorted(work.glob(f"{stage}-*")):
        if other != wanted:
            log.info("starting over: %s was made from other raw files or settings", other)
            shutil.rmtree(other)
    if wanted.is_dir():
        log.info("going on with the interrupted build in %s", wanted)
        for leftover in wanted.rglob("*.tmp"):
            leftover.unlink(missing_ok=True)
    wanted.mkdir(exist_ok=True)
    return wanted


UnitReports = dict[str, dict[str, Any]]  # of one source, by unit name, in the order of the file


def _build(
    plan: BuildPlan,
    pt: PromptTokenizer,
    identity: dict[str, Any],
    reports: Sequence[UnitReports],
    pool: Executor | None,
) -> Manifest:
    """Stages B and C, the manifest, and the check of the whole."""
    shards, shard_counts = _build_shards(plan, pt, reports, pool)
    units = [unit for found in reports for unit in found.values()]
    instructions = {text: i for i, text in enumerate(dict.fromkeys(t for unit in units for t in unit["instructions"]))}
    pieces = tokenize_pieces(pt, list(instructions), "instruct")
    _require_room(plan.settings, pt.tokens, list(instructions), pieces)
    tables = _build_tables(plan, pt, reports, shards, instructions, [len(piece) for piece in pieces], pool)
    quarantine = plan.target / "quarantine.jsonl"
    num_bad = write_quarantine(
        quarantine, [(source, list(found.values())) for source, found in zip(plan.sources, reports, strict=True)]
    )
    p, template = plan.settings.preprocess, pt.template
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        identity=identity,
        tokenizer_name=Path(plan.settings.tokenizer_name).name
        if plan.settings.tokenizer_name.startswith("/")
        else plan.settings.tokenizer_name,
        fingerprint=pt.fingerprint,
        template_name=template.name,
        template_version=template.version,
        limits=limits_dict(p),
        bucket_edges=p.bucket_edges,
        histogram_edges=HISTOGRAM_EDGES,
        tokens=pt.tokens,
        instructions=tuple(instructions),
        instruction_ids=tuple(tuple(ids) for ids in pieces),
        datasets=tuple(entry for entry, _ in tables),
        counts={"rows": sum(entry.counts["rows"] for entry, _ in tables), "quarantined": num_bad, **shard_counts},
        text_files=tuple(shards),
        row_files=tuple(file for _, file in tables),
        other_files=(_stored(quarantine, num_bad),),
    )
    write_text(plan.target / MANIFEST, dump_manifest(manifest))
    checked, skipped = check_joined(pt, open_store(plan.target, verify=False))
    log.info("pieces joined equal the whole prompt tokenized: %d prompts compared, %d rows skipped", checked, skipped)
    return manifest


def _build_units(plan: BuildPlan, pool: Executor | None, loading: Future[PromptTokenizer]) -> list[UnitReports]:
    """Stage A, and the judgement on bad rows; a tokenizer that cannot be loaded ends it early."""
    names: list[list[str]] = [[] for _ in plan.sources]

    def tasks() -> Iterator[UnitTask]:
        for number, source in enumerate(plan.sources):
            for file_number, file in enumerate(source.files):
                for i, block in enumerate(iter_blocks(file, plan.block_bytes)):
                    name = f"{number:04d}-{file_number:05d}-{i:07d}"
                    names[number].append(name)
                    if loading.done():
                        loading.result()
                    if not _has_unit(plan.units / f"{name}.json", block):
                        yield _unit_task(plan, source, name, file_number, block)

    total = sum(-(-_text_bytes(file) // plan.block_bytes) for source in plan.sources for file in source.files)
    run_tasks(pool, build_unit, tasks(), "A  parse and hash rows", plan.bars, total, size=_bytes_carried)
    reports = [{name: _read_json(plan.units / f"{name}.json") for name in some} for some in names]
    for source, found in zip(plan.sources, reports, strict=True):
        share = plan.settings.preprocess.max_bad_row_share
        require_usable(source, list(found.values()), share)
    return reports


def _has_unit(report: Path, block: Block) -> bool:
    """Whether the unit is there, and made of this range: how a table is cut may change with the libraries."""
    return report.is_file() and _read_json(report)["range"] == [block.start, block.stop]


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _bytes_carried(task: UnitTask) -> int:
    return len(task.block.data or b"")


def _unit_task(plan: BuildPlan, source: Source, name: str, file: int, block: Block) -> UnitTask:
    return UnitTask(str(plan.units), name, file, block, source.rules, plan.num_partitions)


def _build_shards(
    plan: BuildPlan, pt: PromptTokenizer, reports: Sequence[UnitReports], pool: Executor | None
) -> tuple[list[StoredFile], dict[str, int]]:
    """Stage B. The text files and counts over all texts."""
    # Named by its content: a process that has loaded it never takes it for another one.
    encoder_file = plan.work / f"encoder-{pt.fingerprint[:16]}-{pt.template.version}.json"
    save_encoder(pt.encoder, encoder_file)
    units = tuple(str(plan.units / f"{name}.texts.arrow") for found in reports for name in found)
    widths = _widths(plan.settings.preprocess, pt.tokens)
    targets = [plan.target / f"texts-{i:05d}.arrow" for i in range(plan.num_partitions)]
    tasks = (
        ShardTask(units, i, str(encoder_file), widths, str(target), str(plan.reports / f"{target.name}.json"))
        for i, target in enumerate(targets)
        if not (target.is_file() and (plan.reports / f"{target.name}.json").is_file())
    )
    run_tasks(pool, build_shard, tasks, "B  tokenize distinct texts", plan.bars, len(targets))
    files, counts = [], {"distinct_texts": 0}
    for target in targets:
        report = _read_json(plan.reports / f"{target.name}.json")
        files.append(StoredFile(target.name, report["num_texts"], report["num_bytes"], report["sha256"]))
        counts["distinct_texts"] += report["num_texts"]
        for name, value in sorted(report["counts"].items()):
            counts[name] = counts.get(name, 0) + value
    return files, counts


def _widths(p: PreprocessSettings, tokens: PromptTokens) -> dict[str, Width]:
    """The widest limit of all uses of a kind; training cuts further where a use is narrower."""
    around, query_around = len(tokens.bos) + len(tokens.eos), len(tokens.query_end)
    query = max(p.max_query_tokens, p.max_passage_tokens) - around - query_around
    widths = {
        "query": Width(max(query, p.max_example_query_tokens), tokens.query_tail),
        "response": Width(p.max_example_passage_tokens, tokens.response_tail),
        "passage": Width(p.max_passage_tokens - around, tokens.passage_tail),
    }
    for kind in KINDS:
        if widths[kind].limit <= len(widths[kind].tail):
            raise ValueError(
                f"the limits leave no room for the text of a {kind} beside what the template adds; raise "
                + ("preprocess.max_query_tokens" if kind == "query" else "preprocess.max_*passage_tokens")
            )
    return widths


def _build_tables(
    plan: BuildPlan,
    pt: PromptTokenizer,
    reports: Sequence[UnitReports],
    shards: Sequence[StoredFile],
    instructions: dict[str, int],
    instruction_lengths: Sequence[int],
    pool: Executor | None,
) -> list[tuple[DatasetEntry, StoredFile]]:
    """Stage C. The row table of every dataset, in order."""
    starts = (0, *accumulate(shard.num_items for shard in shards))
    text_shards = TextShards(tuple(str(plan.target / shard.name) for shard in shards), starts)
    types = [next(kind for unit in found.values() for kind in unit["types"]) for found in reports]
    settings = plan.settings
    group_sizes = [group_size_of(settings, s.dataset, t) for s, t in zip(plan.sources, types, strict=True)]

    nearest = [_with_nearest(source, found) for source, found in zip(plan.sources, reports, strict=True)]

    def measure_tasks() -> Iterator[MeasureTask]:
        columns = zip(reports, types, group_sizes, nearest, strict=True)
        for found, task_type, group_size, with_nearest in columns:
            first_lines = accumulate((unit["num_lines"] for unit in found.values()), initial=0)
            for (name, unit), first_line in zip(found.items(), first_lines, strict=False):
                if not (plan.rows / f"{name}.json").is_file():
                    yield MeasureTask(
                        unit=str(plan.units / name),
                        target=str(plan.rows / name),
                        first_line=first_line,
                        instructions=tuple(instructions[text] for text in unit["instructions"]),
                        task_type=task_type,
                        group_size=group_size,
                        shards=text_shards,
                        edges=settings.preprocess.bucket_edges,
                        tokens=pt.tokens,
                        limits=Limits.from_settings(settings.preprocess),
                        instruction_lengths=tuple(instruction_lengths),
                        with_nearest=with_nearest,
                    )

    run_tasks(pool, measure_unit, measure_tasks(), "C  measure rows", plan.bars, sum(len(found) for found in reports))
    targets = _row_files(plan)
    done = [plan.reports / f"{target.name}.json" for target in targets]
    tasks = (
        JoinTask(
            units=tuple(str(plan.rows / name) for name in found),
            target=str(target),
            report=str(report),
            num_texts=starts[-1],
            scored=any(unit["scored"] for unit in found.values()),
            with_nearest=with_nearest,
            num_lines=sum(unit["num_lines"] for unit in found.values()),
        )
        for found, target, report, with_nearest in zip(reports, targets, done, nearest, strict=True)
        if not (target.is_file() and report.is_file())
    )
    run_tasks(pool, join_units, tasks, "C  write row tables", plan.bars, len(targets))
    joined = [_read_json(report) for report in done]
    entries = [
        _dataset_entry(source, found, report, task_type, group_size)
        for source, found, report, task_type, group_size in zip(
            plan.sources, reports, joined, types, group_sizes, strict=True
        )
    ]
    files = [
        StoredFile(target.name, report["num_rows"], report["num_bytes"], report["sha256"])
        for target, report in zip(targets, joined, strict=True)
    ]
    return list(zip(entries, files, strict=True))


def _with_nearest(source: Source, found: UnitReports) -> bool:
    """Whether rows name their nearest rows, by lines of their one file."""
    some = any(unit["nearest"] for unit in found.values())
    if some and len(source.files) > 1:
        raise ValueError(
            f"dataset {source.dataset.name!r}: rows name their nearest rows by line, which means one file, and the "
            f"dataset has {len(source.files)}; leave `nearest` out (columns.nearest: null), or mine again"
        )
    return some


def _dataset_entry(
    source: Source, found: UnitReports, report: dict[str, Any], task_type: str, group_size: int
) -> DatasetEntry:
    left_out = {
        "quarantined": sum(len(unit["quarantine"]) for unit in found.values()),
        "blank_lines": sum(unit["num_blank"] for unit in found.values()),
    }
    return DatasetEntry(
        name=source.dataset.name,
        task_type=task_type,
        source=source.record,
        instruction=source.dataset.instruction,
        group_size=group_size,
        counts=report["counts"] | left_out,
        histograms=report["histograms"],
        bucket_offsets=tuple(report["bucket_offsets"]),
    )


def _row_files(plan: BuildPlan) -> list[Path]:
    """The row file of every dataset; ValueError where two names give the same one."""
    names: dict[str, str] = {}
    for source in plan.sources:
        file = f"rows-{safe_name(source.dataset.name)}.safetensors"
        if file in names:
            raise ValueError(
                f"data.datasets: {names[file]!r} and {source.dataset.name!r} give the same file {file}; rename one"
            )
        names[file] = source.dataset.name
    return [plan.target / file for file in names]


def _require_room(
    settings: Settings, tokens: PromptTokens, instructions: Sequence[str], pieces: Sequence[Sequence[int]]
) -> None:
    """Every instruction leaves room for text in a query, in a wrapped passage and in an example."""
    limits = Limits.from_settings(settings.preprocess)
    for text, ids in zip(instructions, pieces, strict=True):
        examples = [(ids, [0], [0])] if settings.batch.examples.asked_for else []
        try:
            compose_query(tokens, limits, ids, [0], examples)
            compose_wrapped(tokens, limits, ids, [0])
        except ValueError as error:
            raise ValueError(f"instruction {text[:80]!r}: {error}") from error


def _stored(path: Path, num_items: int) -> StoredFile:
    return StoredFile(path.name, num_items, path.stat().st_size, file_sha256(path))


def _publish(plan: BuildPlan, store: Path) -> None:
    """Give the finished folder its name; an old store is moved into the build folder, which is deleted after."""
    for leftover in plan.target.glob("*.tmp"):  # of a killed run's processes
        leftover.unlink(missing_ok=True)
    sync(plan.target)
    if store.exists():
        replaced = plan.work / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(store, replaced)
    os.rename(plan.target, store)
    sync(store.parent)
