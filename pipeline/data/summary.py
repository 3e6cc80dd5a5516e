"""What preprocessing tells its user at the end."""

from collections.abc import Sequence

from pipeline.data.store import DatasetEntry, Manifest

_BAR_WIDTH = 30
_COLUMNS = (
    ("rows", "rows"),
    ("quarantined", "bad"),
    ("distinct_texts", "texts"),
    ("tokens", "tokens"),
    ("queries_cut", "query cut"),
    ("passages_cut", "passage cut"),
    ("example_queries_cut", "ex.query cut"),
    ("example_responses_cut", "ex.resp. cut"),
)


def summarize(manifest: Manifest) -> str:
    """Counts of every dataset as a table (cut: distinct texts), then a histogram of row lengths each."""
    header = ["dataset", "type", *(title for _, title in _COLUMNS), "repeated"]
    lines = [
        [d.name, d.task_type, *(f"{d.counts[key]:,}" for key, _ in _COLUMNS), _repeated(d)] for d in manifest.datasets
    ]
    totals = manifest.counts
    blank = sum(d.counts["blank_lines"] for d in manifest.datasets)
    parts = [
        align([header, *lines], num_left=2),
        f"rows in {totals['rows'] + totals['quarantined']:,} = stored {totals['rows']:,} + quarantined "
        f"{totals['quarantined']:,}" + (f" (blank lines, not rows: {blank:,})" if blank else ""),
        f"distinct texts {totals['distinct_texts']:,}, stored tokens {totals['tokens']:,}; tokenized without context: "
        f"{totals.get('without_context', 0):,}",
        "row length (zero-shot query + longest positive + expected negatives), tokens:",
        *(_histogram(d, manifest.bucket_edges) for d in manifest.datasets),
    ]
    return "\n".join(parts)


def _repeated(entry: DatasetEntry) -> str:
    """Share of text uses that refer to a text which another use has already."""
    return f"{1 - entry.counts['distinct_texts'] / entry.counts['text_uses']:.0%}"


def align(rows: Sequence[Sequence[str]], num_left: int) -> str:
    """Rows as lines with columns of equal width, the first `num_left` of them flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < num_left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _histogram(entry: DatasetEntry, edges: Sequence[int]) -> str:
    """One line a length bucket."""
    counts = [b - a for a, b in zip(entry.bucket_offsets[:-1], entry.bucket_offsets[1:], strict=True)]
    names = [*(f"<= {edge}" for edge in edges), f" > {edges[-1]}" if edges else "all"]
    lines = [
        f"    {name:>7}  {count:>9,}  {'#' * round(_BAR_WIDTH * count / max(counts))}"
        for name, count in zip(names, counts, strict=True)
    ]
    return "\n".join([f"  {entry.name}", *lines])
