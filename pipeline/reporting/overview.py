"""The top of a report: what the store is, what stands out, its datasets and the rows left out."""

from datetime import datetime, timezone

from pipeline.reporting.measuring import Report
from pipeline.reporting.page import (
    Section,
    bar,
    count,
    details,
    escape,
    facts,
    isolated,
    markup,
    number,
    percent,
    shorten,
    table,
    text_cell,
    tiles,
)

CUT_WORTH_A_NOTE = 0.05  # share of cut texts, of dropped examples
SHARED_WORTH_A_NOTE = 0.01  # share of a dataset's positives that another one holds
_SHOWN_CHARACTERS = 110
_SHOWN_INSTRUCTIONS = 5  # of a dataset, most used first


def intro(report: Report) -> str:
    """Path, figures, identity and what stands out."""
    manifest, schedule = report.store.manifest, report.schedule
    written = datetime.fromtimestamp((report.store.path / "manifest.json").stat().st_mtime, timezone.utc)
    sizes = sum(file.num_bytes for file in manifest.files)
    figures = [
        (f"{manifest.counts['rows']:,}", "rows"),
        (f"{manifest.counts['distinct_texts']:,}", "distinct texts"),
        (f"{manifest.counts['tokens']:,}", "stored tokens"),
        (f"{len(report.datasets)}", "datasets"),
        (f"{schedule.steps_per_epoch:,}", "steps an epoch"),
        (f"{manifest.counts['quarantined']:,}", "rows left out"),
    ]
    limits = ", ".join(f"{name.removeprefix('max_').removesuffix('_tokens').replace('_', ' ')} {value:,}"
                       for name, value in manifest.limits.items())  # fmt: skip
    examples = schedule.examples
    asked = f"{examples.mode}, 0 to {examples.max_examples} a query" if examples.asked_for else "none"
    pairs = [
        ("tokenizer", f"{isolated(manifest.tokenizer_name)} <code>{escape(manifest.fingerprint[:16])}…</code>"),
        ("template", f"<code>{escape(manifest.template_version)}</code>"),
        ("limits, tokens", limits),
        ("bucket edges", ", ".join(f"{edge:,}" for edge in manifest.bucket_edges) or "none"),
        ("examples", escape(asked)),
        ("seed of the plans", str(schedule.seed)),
        ("files", f"{len(manifest.files):,}, {sizes / 1e6:,.1f} MB"),
        ("written", f"{written:%Y-%m-%d %H:%M} UTC"),
    ]
    noted = notes(report)
    listed = f'<ul class="notes">{"".join(f"<li>{note}</li>" for note in noted)}</ul>' if noted else ""
    return f'<p class="path">{escape(str(report.store.path))}</p>\n{tiles(figures)}\n{listed}\n{facts(pairs)}'


def notes(report: Report) -> list[str]:
    """What a careful reader would stop at, as HTML lines."""
    found = []
    if quarantined := report.store.manifest.counts["quarantined"]:
        total = report.store.manifest.counts["rows"] + quarantined
        found.append(f"{quarantined:,} of {total:,} rows were left out ({percent(quarantined / total)}).")
    for name, key, num_texts in (
        ("queries", "queries_cut", lambda d: d.texts.query.num_texts),
        ("passages", "passages_cut", lambda d: d.texts.num_passages),
        ("example queries", "example_queries_cut", lambda d: d.texts.query.num_texts),
        ("example responses", "example_responses_cut", lambda d: d.texts.num_responses),
    ):
        cut = [(d.entry.counts[key] / max(num_texts(d) * report.text_stride, 1), d.entry.name) for d in report.datasets]
        if listed := _list([(s, n) for s, n in cut if s > CUT_WORTH_A_NOTE]):
            found.append(f"Many {name} are longer than their limit and are cut: {listed}.")
    dropped = [(d.plans.num_dropped / max(d.plans.num_asked, 1), d.entry.name) for d in report.datasets]
    if listed := _list([(s, n) for s, n in dropped if s > CUT_WORTH_A_NOTE]):
        found.append(f"In-context examples dropped in the sampled plans because prompts are full: {listed}.")
    shared = [(_most_shared(report, i), d.entry.name) for i, d in enumerate(report.datasets)]
    if listed := _list([(s, n) for s, n in shared if s > SHARED_WORTH_A_NOTE]):
        found.append(f"Positives that another dataset holds too: {listed}.")
    for evaluation in report.evaluations:
        if evaluation.share_of_queries_seen:
            seen = percent(evaluation.share_of_queries_seen)
            found.append(f"{seen} of the queries of {isolated(evaluation.texts.name)} stand in the training data.")
    lonely = [(float(d.negatives[0]) / d.table.num_rows, d.entry.name) for d in report.datasets
              if not d.schedule.in_batch_negatives]  # fmt: skip
    if listed := _list([(s, n) for s, n in lonely if s > 0]):
        found.append(f"Rows without any negative, in-batch or own, whose loss is 0: {listed}.")
    return found


def _list(shares: list[tuple[float, str]]) -> str:
    return ", ".join(f"{isolated(name)} {percent(share)}" for share, name in sorted(shares, reverse=True))


def _most_shared(report: Report, i: int) -> float:
    others = [int(n) for j, n in enumerate(report.shared_positives[i]) if j != i]
    return max(others, default=0) / max(int(report.shared_positives[i, i]), 1)


def dataset_section(report: Report) -> Section:
    """Rows, tokens and steps of every dataset."""
    total_steps = report.schedule.steps_per_epoch
    total_rows = sum(d.table.num_rows for d in report.datasets)
    head = (
        "dataset | type | rows | tokens | tokens a row | batch | group | in-batch negatives | steps an epoch | share "
        "of rows | share of steps | passes an epoch"
    )
    rows = []
    for d in report.datasets:
        s, tokens = d.schedule, d.entry.counts["tokens"]
        rows.append([
            text_cell(d.entry.name), text_cell(d.entry.task_type), count(d.table.num_rows), count(tokens),
            number(tokens / d.table.num_rows, ",.0f"), count(s.num_queries), count(s.group_size),
            text_cell("yes" if s.in_batch_negatives else "no"), count(s.steps_per_epoch),
            bar(d.table.num_rows / total_rows), bar(s.steps_per_epoch / total_steps),
            number(s.steps_per_epoch / s.layout.num_batches),
        ])  # fmt: skip
    source_head = "dataset | raw file | bytes | rows | left out | blank lines | sha256"
    sources = [
        [text_cell(d.entry.name), text_cell(d.entry.source["name"]), count(d.entry.source["bytes"]),
         count(d.entry.counts["rows"]), count(d.entry.counts["quarantined"]), count(d.entry.counts["blank_lines"]),
         markup(f'<code class="sha">{escape(d.entry.source["sha256"])}</code>')]
        for d in report.datasets
    ]  # fmt: skip
    lead = (
        "A step draws all its rows from one dataset. Tokens count every query and passage of every row within its "
        "limit, without examples; a text of several rows counts in each. Shares of steps are those of this recipe's "
        "batch sizes and <code>batch.mix_temperature</code>."
    )
    asked = [
        [text_cell(d.entry.name), count(n), markup(isolated(shorten(report.store.instructions[i], 400)) or "–")]
        for d in report.datasets
        for i, n in d.instructions[:_SHOWN_INSTRUCTIONS]
    ]
    body = table(head, rows, "datasets-table")
    body += details("instructions", table("dataset | rows | instruction", asked, "instructions"))
    body += details("raw files that it was made from", table(source_head, sources, "sources"))
    return Section("datasets", "Datasets", lead, body)


def quarantine_section(report: Report) -> Section:
    """Rows that could not be used, with reasons."""
    if not report.bad_rows:
        return Section("left-out", "Left out", "None: every row of the raw files could be used.", "")
    reasons = table("reason | rows", [[text_cell(r), count(n)] for r, n in report.bad_reasons], "reasons")
    shown = [
        [text_cell(r["file"]), count(r["line"]), text_cell(r["reason"]),
         text_cell(shorten(r["start"], _SHOWN_CHARACTERS))]
        for r in report.bad_rows
    ]  # fmt: skip
    first = table("file | line | reason | starts with", shown, "bad-rows")
    lead = "All of them stand in <code>quarantine.jsonl</code> of the store, with file, line and reason."
    return Section("left-out", "Left out", lead, f"{reasons}<h4>the first of them</h4>{first}")
