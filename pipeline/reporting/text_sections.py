"""Sections about texts: lengths, repeats, texts that datasets share, texts that evaluation sets hold too."""

from collections.abc import Sequence

import numpy as np

from pipeline.data.store import DatasetEntry
from pipeline.reporting.charts import length_chart
from pipeline.reporting.measuring import MeasuredDataset, Report
from pipeline.reporting.page import (
    Cell,
    Section,
    count,
    details,
    isolated,
    markup,
    number,
    part,
    sampled,
    share,
    shorten,
    table,
    text_cell,
)
from pipeline.reporting.plans import PLANS_PER_DATASET
from pipeline.reporting.texts import REPEAT_CLASSES

_SHOWN_CHARACTERS = 160
_MOST_USED = 5


def length_section(report: Report) -> Section:
    """Histograms with limits and bucket edges, and what is cut."""
    cards = "".join(_length_card(report, d.entry) for d in report.datasets)
    head = (
        "dataset | queries cut | of | share | passages cut | of | share | example queries cut | share | example "
        "responses cut | of | share"
    )
    rows = [_cut_row(d, report.text_stride) for d in report.datasets]
    around = "; “of” is estimated from the sample" if report.text_stride > 1 else ""
    lead = (
        "Tokens of whole sequences: instruction, markers, BOS and EOS included, cut to the limit (the solid line), so "
        "the bar at the limit holds what was cut. A row's length is its zero-shot query + longest positive + expected "
        "negatives; dashed lines are the edges of the length buckets. Bins double in width."
    )
    cut = f"<h4>distinct texts cut to their limit{around}</h4>{table(head, rows, 'cut')}"
    return Section("lengths", "Lengths", lead, f'<div class="cards">{cards}</div>{cut}')


def _length_card(report: Report, entry: DatasetEntry) -> str:
    manifest = report.store.manifest
    limits = {"query": manifest.limits["max_query_tokens"], "passage": manifest.limits["max_passage_tokens"]}
    figures = "".join(
        "<figure>"
        + length_chart(counts, manifest.histogram_edges, limits.get(use), manifest.bucket_edges if use == "row" else (),
                       f"lengths of {use} in tokens")
        + f"<figcaption>{use} ({sum(counts):,})</figcaption></figure>"
        for use, counts in entry.histograms.items()
    )  # fmt: skip
    title = f'<h3>{isolated(entry.name)}<span class="kind">{entry.task_type}</span></h3>'
    return f'<div class="card">{title}<div class="charts">{figures}</div></div>'


def _cut_row(d: MeasuredDataset, stride: int) -> list[Cell]:
    counts = d.entry.counts
    queries, passages = d.texts.query.num_texts * stride, d.texts.num_passages * stride
    responses = d.texts.num_responses * stride

    def of(cut: int, total: int) -> Cell:
        return share(min(1.0, cut / total) if total else None, heat=True)

    return [
        text_cell(d.entry.name),
        count(counts["queries_cut"]), count(queries), of(counts["queries_cut"], queries),
        count(counts["passages_cut"]), count(passages), of(counts["passages_cut"], passages),
        count(counts["example_queries_cut"]), of(counts["example_queries_cut"], queries),
        count(counts["example_responses_cut"]), count(responses), of(counts["example_responses_cut"], responses),
    ]  # fmt: skip


def repeat_section(report: Report) -> Section:
    """How often one text stands in several rows, and what a batch saves by that."""
    head = "dataset | side | uses | distinct texts | uses a text | repeated"
    head = " | ".join([head, *(_class_name(low, high) for low, high in REPEAT_CLASSES)])
    rows, most = [], []
    for d in report.datasets:
        for side in ("positive", "negative"):
            uses = getattr(d.texts, side)
            mean = uses.num_uses / uses.num_texts if uses.num_texts else None
            cells = [
                text_cell(d.entry.name),
                text_cell(side),
                count(uses.num_uses),
                count(uses.num_texts),
                number(mean, ",.2f"),
            ]
            rows.append([*cells, share(uses.share_repeated), *map(part, uses.class_shares())])
            for text, times in uses.most_used(_MOST_USED):
                shown = markup(_long(report.store.text(text)))
                most.append([text_cell(d.entry.name), text_cell(side), count(times), shown])
    lead = (
        "A text that stands in several rows is encoded once a step for all of them. Columns “1×”, “2×”, … give the "
        "share of uses whose text is used that often in the dataset; “repeated” is the share of uses that refer to a "
        f"text which another use has already. {_text_sample(report)}"
    )
    top = table("dataset | side | uses | text", most, "most-used") if most else "<p>No text is used twice.</p>"
    plans = f"the first {PLANS_PER_DATASET} plans of each dataset"
    body = [table(head, rows, "repeats"), f"<h4>what a batch saves {sampled(plans)}</h4>", _saved_table(report)]
    return Section("repeats", "Repeated passages", lead, "".join(body) + details("most used texts", top))


def _saved_table(report: Report) -> str:
    head = (
        "dataset | plans sampled | of steps an epoch | candidates a batch | distinct passages a batch | encodings "
        "saved | least | most"
    )
    rows = []
    for d in report.datasets:
        p, cells = d.plans, [text_cell(d.entry.name), count(d.plans.num_plans), count(d.schedule.steps_per_epoch)]
        if p.num_plans:
            cells += [number(p.num_candidates / p.num_plans, ",.1f"), number(p.num_passages / p.num_plans, ",.1f")]
            cells += [share(float(np.mean(p.saved)), heat=True), share(min(p.saved)), share(max(p.saved))]
        else:
            cells += [number(None)] * 5
        rows.append(cells)
    return table(head, rows, "saved")


def _class_name(low: int, high: int | None) -> str:
    if high is None:
        return f"≥ {low}×"
    return f"{low}×" if low == high else f"{low}–{high}×"


def _text_sample(report: Report) -> str:
    n = report.text_stride
    return sampled(f"1 text in {n}, all its uses") if n > 1 else "Counted in full."


def shared_section(report: Report) -> Section:
    """Texts that two datasets both have."""
    names = [d.entry.name for d in report.datasets]
    lead = (
        "Distinct texts that two datasets both hold, character by character; on the diagonal all distinct texts of "
        "one. The tint is the share of the row's texts. Shared passages are candidates in both datasets' steps, and "
        f"shared queries may have other positives there. {_text_sample(report)}"
    )
    body = "".join(
        f"<h4>{side}</h4>{_matrix(names, shared_DD, f'shared-{side}')}"
        for side, shared_DD in (("queries", report.shared_queries), ("positives", report.shared_positives))
    )
    return Section("shared", "Shared texts", lead, body)


def _matrix(names: Sequence[str], shared_DD: np.ndarray, name: str) -> str:
    head = " | ".join(["dataset", *(str(i + 1) for i in range(len(names)))])
    rows = []
    for i, own in enumerate(names):
        cells = [Cell(f"{i + 1}&ensp;{isolated(own)}", i, is_number=False)]
        for j, value in enumerate(shared_DD[i].tolist()):
            heat = value / max(int(shared_DD[i, i]), 1) if i != j else None
            shown = Cell(f"{value:,}", value, is_soft=True) if i == j else count(value, heat)
            cells.append(shown if value else Cell("·", 0, is_soft=True))
        rows.append(cells)
    return table(head, rows, name)


def overlap_section(report: Report) -> Section:
    """Training texts that stand in the evaluation folders."""
    title = "Evaluation overlap"
    if not report.evaluations:
        how = "No evaluation folder was given: <code>--eval FOLDER ...</code> compares the training texts with theirs."
        return Section("overlap", title, how, "")
    n = report.text_stride * report.overlap_stride
    note = sampled(f"1 training text in {n}") if n > 1 else "All training texts were compared."
    lead = (
        "Distinct training queries and positives that are a query or a passage of an evaluation set, after NFKC, case "
        "folding and white space. A passage with a title is two passage texts: with it and without it. The labelled "
        f"texts of train.jsonl are a set of their own. {note}"
    )
    head = (
        "evaluation set | its queries | its passage texts | its queries seen in training | training queries among its "
        "queries | training queries among its passages | positives among its queries | positives among its passages"
    )
    rows = []
    for evaluation in report.evaluations:
        o, texts = evaluation.overlaps, evaluation.texts
        rows.append([
            text_cell(texts.name), count(len(texts.queries)), count(len(texts.corpus)),
            share(evaluation.share_of_queries_seen, heat=True), count(sum(x.queries_in_queries for x in o)),
            count(sum(x.queries_in_corpus for x in o)), count(sum(x.positives_in_queries for x in o)),
            count(sum(x.positives_in_corpus for x in o)),
        ])  # fmt: skip
    body = [table(head, rows, "overlap-totals"), "<h4>by dataset</h4>", _overlap_table(report)]
    return Section("overlap", title, lead, "".join(body))


def _overlap_table(report: Report) -> str:
    head = (
        "evaluation set | dataset | queries compared | among its queries | share | among its passages | share | "
        "positives compared | among its queries | share | among its passages | share"
    )
    rows, shown = [], []
    for evaluation in report.evaluations:
        for d, training, o in zip(report.datasets, report.training, evaluation.overlaps, strict=True):
            if not o.any:
                continue
            names = [text_cell(evaluation.texts.name), text_cell(d.entry.name)]
            num_queries, num_positives = len(training.queries), len(training.positives)
            cells = [*names, count(num_queries), *_of(o.queries_in_queries, num_queries)]
            cells += [*_of(o.queries_in_corpus, num_queries), count(num_positives)]
            cells += [*_of(o.positives_in_queries, num_positives), *_of(o.positives_in_corpus, num_positives)]
            rows.append(cells)
            shown += [[*names, markup(_long(report.store.text(text)))] for text in o.shown]
    if not rows:
        return "<p>No training text stands in any of them.</p>"
    rest = '<p class="aside">Pairs of an evaluation set and a dataset that are not listed share no text.</p>'
    examples = details("some of these texts", table("evaluation set | dataset | text", shown, "overlap-texts"))
    return table(head, rows, "overlap-datasets") + rest + examples


def _of(part: int, total: int) -> list[Cell]:
    return [count(part), share(part / max(total, 1), heat=True)]


def _long(text: str) -> str:
    return f'<div class="long">{isolated(shorten(text, _SHOWN_CHARACTERS))}</div>'
