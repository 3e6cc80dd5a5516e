"""What a mining run found: numbers a dataset (report.json), the page that a person reads, and a plot of the scores.

N rows, G mined negatives of all rows.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import safe_name, write_atomic, write_text
from pipeline.mining.blocks import SHOWN_RANKS, MinedBlock, MiningInput
from pipeline.mining.options import BM25, RECALL_RANKS, MiningOptions
from pipeline.mining.rules import REASONS, active_rules
from pipeline.mining.search import DenseIndex

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 60

Report = dict[str, Any]


def dataset_report(source: MiningInput, blocks: Sequence[MinedBlock]) -> Report:
    """The numbers of one dataset, as plain values."""
    options, table = source.options, source.table
    active = active_rules(options, bool((table.category_text_N >= 0).any()))
    found_N = np.concatenate([np.diff(block.negative_offsets) for block in blocks])
    rank_N = np.concatenate([block.positive_rank_B for block in blocks])
    candidates_N = np.concatenate([block.num_candidates_B for block in blocks])
    removed_R = np.sum([block.removed_R for block in blocks], axis=0)
    teacher_counts = np.sum([block.teacher_counts for block in blocks], axis=0).tolist()
    near_N = np.concatenate([np.diff(block.nearest_offsets) for block in blocks])
    report = {
        "dataset": table.name,
        "type": table.task_type,
        "rows": table.num_rows,
        "distinct_queries": len(source.queries.text_Q),
        "corpus_texts": len(source.corpus_C),
        "texts_cut": _texts_cut(source),
        "window": [options.first_rank, options.last_rank],
        "rows_with_short_window": int((candidates_N <= options.last_rank - options.first_rank).sum()),
        "recall": {str(k): float(((rank_N > 0) & (rank_N <= k)).mean()) for k in RECALL_RANKS},
        "candidates": int(candidates_N.sum()),
        "removed": {name: int(removed_R[list(REASONS).index(name)]) for name in active},
        "kept": int(candidates_N.sum() - removed_R.sum()),
        "teacher": _teacher(options, teacher_counts),
        "negatives": int(found_N.sum()),
        "rows_by_negatives": np.bincount(found_N, minlength=options.num_negatives + 1).tolist(),
        "rows_with_too_few": int((found_N < options.num_negatives).sum()),
        "scores_dropped": _rows_with_scores(source),
        "quantiles": {name: _quantiles(values) for name, values in _series(blocks).items()},
    }
    if options.num_nearest:
        report["rows_with_few_neighbours"] = int((near_N < options.num_nearest).sum())
    return report


def _teacher(options: MiningOptions, counts: Sequence[int]) -> Report | None:
    """What the teacher did, and a reranker's depth and width; None without one."""
    if options.teacher is None:
        return None
    found = dict(zip(("seen", "removed", "pairs_cut"), counts, strict=True))
    return found if options.teacher_setting is None else found | {"setting": options.teacher_setting}


def _texts_cut(source: MiningInput) -> dict[str, int] | None:
    """Texts longer than the embedder reads; None for BM25, which reads all."""
    index = source.passages
    if not isinstance(index, DenseIndex):
        return None
    return {"queries": index.queries.count_cut(), "passages": index.texts.count_cut()}


def _rows_with_scores(source: MiningInput) -> int:
    """Rows whose teacher scores go, because the new negatives have none."""
    score, table = source.table.pos_score, source.table
    return 0 if score is None else int((~np.isnan(score[table.pos_offsets[:-1]])).sum())


def _series(blocks: Sequence[MinedBlock]) -> dict[str, np.ndarray]:
    rank_NR = np.concatenate([block.rank_score_BR for block in blocks])
    series = {"positive (lowest of the row)": np.concatenate([block.positive_score_B for block in blocks])}
    series |= {f"rank {rank}": rank_NR[:, r] for r, rank in enumerate(SHOWN_RANKS)}
    series["mined negative"] = np.concatenate([block.negative_score_G for block in blocks])
    series["nearest row's query"] = np.concatenate([block.nearest_score_B for block in blocks])
    return {name: values[~np.isnan(values)] for name, values in series.items()}


def _quantiles(values: np.ndarray) -> list[float] | None:
    return [round(float(q), 6) for q in np.quantile(values.astype(np.float64), QUANTILES)] if len(values) else None


def plot_scores(path: Path, dataset: str, blocks: Sequence[MinedBlock]) -> None:
    """Histograms of the scores of positives, of what stands at the shown ranks, and of the mined negatives."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = {name: values for name, values in _series(blocks).items() if len(values) and "row's query" not in name}
    low, high = (f([f(values) for values in series.values()]) for f in (np.min, np.max))
    edges = np.linspace(low, max(high, low + 1e-6), _BINS)
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, values in series.items():
        bold = {"linewidth": 2.0} if "rank" not in name else {"linewidth": 1.0, "linestyle": "--"}
        share, _ = np.histogram(values, edges)
        axes.stairs(share / len(values), edges, label=name, **bold)
    axes.set(xlabel="score", ylabel="share", title=dataset)
    axes.legend(fontsize=8)
    figure.tight_layout()
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None}))
    plt.close(figure)


def write_reports(out: Path, embedder: str, reports: Sequence[Report]) -> None:
    """Write report.json and report.md; nothing in them depends on time or machine."""
    write_text(out / "report.json", json.dumps(list(reports), indent=1, ensure_ascii=False) + "\n")
    lines = ["# Mined negatives", "", f"Embedder: `{embedder}`. Options and checksums: settings.json.", ""]
    lines += summary_table(reports)
    for report in reports:
        lines += ["", f"## {report['dataset']}", "", *_notes(report, embedder), "", *_removed(report), ""]
        lines += _quantile_table(report)
        lines += ["", f"![scores](scores-{safe_name(report['dataset'])}.png)"]
    write_text(out / "report.md", "\n".join(lines) + "\n")


def summary_table(reports: Sequence[Report]) -> list[str]:
    """One line a dataset, as Markdown."""
    recalls = [f"recall@{k}" for k in RECALL_RANKS]
    header = ["dataset", "rows", "corpus", "cut", *recalls, "candidates", "removed", "negatives", "rows with too few"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for r in reports:
        recall = [f"{value:.3f}" for value in r["recall"].values()]
        counts = [r["candidates"], sum(r["removed"].values()), r["negatives"], r["rows_with_too_few"]]
        cut = "-" if r["texts_cut"] is None else f"{sum(r['texts_cut'].values()):,}"
        sizes = [f"{r['rows']:,}", f"{r['corpus_texts']:,}", cut]
        cells = [r["dataset"], *sizes, *recall, *(f"{c:,}" for c in counts)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _notes(report: Report, embedder: str) -> list[str]:
    first, last = report["window"]
    lines = [
        f"- {report['rows']:,} rows ({report['type']}), {report['distinct_queries']:,} distinct queries, window of "
        f"ranks {first}-{last} over {report['corpus_texts']:,} texts; recall@k: rows whose best positive is at rank "
        "k or better.",
        "- negatives a row: " + ", ".join(f"{n}: {c:,} rows" for n, c in enumerate(report["rows_by_negatives"]) if c),
    ]
    if short := report["rows_with_short_window"]:
        why = "texts that share no word with the query are not ranked" if embedder == BM25 else "the corpus is small"
        lines.append(f"- in {short:,} rows the ranking ends within the window or before it ({why}).")
    if cut := report["texts_cut"]:
        lines.append(
            f"- the embedder cut {cut['queries']:,} of the queries and {cut['passages']:,} of the texts to its maximum "
            "length."
        )
    if teacher := report["teacher"]:
        seen, removed = teacher["seen"], teacher["removed"]
        how = f" (setting {teacher['setting']})" if "setting" in teacher else ""
        lines.append(f"- the teacher{how} read {seen:,} drawn candidates and removed {removed:,}.")
        if cut := teacher["pairs_cut"]:
            lines.append(f"- it cut {cut:,} pairs of a query and a positive or candidate to its maximum length.")
    if report["scores_dropped"]:
        lines.append(f"- teacher scores of {report['scores_dropped']:,} rows dropped: new negatives have none.")
    if report.get("rows_with_few_neighbours"):
        lines.append(f"- {report['rows_with_few_neighbours']:,} rows have fewer neighbours than asked for.")
    return lines


def _removed(report: Report) -> list[str]:
    """Candidates removed, under the first rule that each broke."""
    total = max(report["candidates"], 1)
    rows = [(REASONS[name], count) for name, count in report["removed"].items()]
    rows += [("left to draw from", report["kept"])]
    lines = [f"| of {report['candidates']:,} candidates in the window | count | share |", "|---|---|---|"]
    return lines + [f"| {name} | {count:,} | {count / total:.1%} |" for name, count in rows]


def _quantile_table(report: Report) -> list[str]:
    lines = [f"| score of | {' | '.join(f'{q:.0%}' for q in QUANTILES)} |", "|---" * (len(QUANTILES) + 1) + "|"]
    for name, values in report["quantiles"].items():
        if values is not None:
            lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return lines
