"""Sections about what training makes of the rows: examples that fit, groups, teacher scores, whole prompts."""

import re
from collections.abc import Sequence

import numpy as np

from pipeline.prompts import Template, render_passage, render_query
from pipeline.reporting.charts import bar_chart
from pipeline.reporting.measuring import MeasuredDataset, Report
from pipeline.reporting.page import (
    Section,
    count,
    details,
    escape,
    isolated,
    number,
    part,
    sampled,
    share,
    table,
    text_cell,
)
from pipeline.reporting.plans import MAX_STEPS_SEARCHED, PLANS_PER_DATASET, ShownCandidate, ShownPrompt, ShownText
from pipeline.reporting.rows import median_size

SHOWN_CHARACTERS = 6000  # of one text in a prompt
# Texts a row lists, from and to: how their distribution is shown.
SIZE_CLASSES = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 16), (17, None))


def example_section(report: Report) -> Section:
    """Whether the examples that a query asks for fit its prompt."""
    examples, limit = report.schedule.examples, report.schedule.limits.max_prompt_tokens
    if not examples.asked_for:
        return Section("examples", "Examples", "The recipe shows no examples in training.", "")
    head = (
        "dataset | plans sampled | queries | asked for | shown | dropped: prompt full | missing: no row to show | "
        "shown a query | fit"
    )
    rows, cards = [], []
    for d in report.datasets:
        p = d.plans
        found = p.num_shown + p.num_dropped
        rows.append([
            text_cell(d.entry.name), count(p.num_plans), count(p.num_queries), count(p.num_asked), count(p.num_shown),
            count(p.num_dropped), count(p.num_missing), number(p.num_shown / p.num_queries if p.num_queries else None),
            share(p.num_shown / found if found else None, heat=True),
        ])  # fmt: skip
        cards.append(_fit_card(d))
    lead = (
        f"A query asks for k examples; whole ones are dropped from the left until the prompt fits {limit:,} tokens. A "
        "bar is the share of queries with k examples that can show all of them; its pale rest is what the limit takes. "
        f"Mode <code>{escape(examples.mode)}</code>. {sampled(f'the first {PLANS_PER_DATASET} plans of each dataset')}"
    )
    return Section(
        "examples",
        "Examples",
        lead,
        f'<div class="cards two">{"".join(cards)}</div>{table(head, rows, "fit")}',
    )


def _fit_card(d: MeasuredDataset) -> str:
    fits = [fit for fit in d.plans.fits if fit.num_queries]
    if not fits:
        chart = '<p class="aside">no examples in the sampled plans</p>'
    else:
        shares = [fit.num_all_fit / fit.num_queries for fit in fits]
        tips = [f"k = {fit.k}: {fit.num_all_fit:,} of {fit.num_queries:,} queries show all" for fit in fits]
        labels = [f"k = {fit.k}" for fit in fits]
        chart = bar_chart(labels, shares, tips, "share of queries whose k examples all fit")
    kind = f'<span class="kind">{d.plans.num_queries:,} queries</span>'
    return f'<div class="card"><h3>{isolated(d.entry.name)}{kind}</h3><figure>{chart}</figure></div>'


def group_section(report: Report) -> Section:
    """Positives and negatives a row, and teacher scores."""
    head = " | ".join(["dataset | side | least | median | mean | most", *(_class_name(*c) for c in SIZE_CLASSES)])
    rows = []
    for d in report.datasets:
        for side, sizes in (("positive", d.positives), ("negative", d.negatives)):
            present, total = np.flatnonzero(sizes), int(sizes.sum())
            mean = float(sizes @ np.arange(len(sizes))) / total
            cells = [text_cell(d.entry.name), text_cell(side), count(int(present[0])), count(median_size(sizes))]
            cells += [number(mean), count(int(present[-1]))]
            classes = [int(sizes[low : None if high is None else high + 1].sum()) for low, high in SIZE_CLASSES]
            rows.append([*cells, *(part(n / total) for n in classes)])
    lead = (
        "How many texts a row lists: the columns “0”, “1”, … give the share of rows. A visit to a row draws one of its "
        "positives and up to group - 1 of its negatives. Counted in full."
    )
    body = f"{table(head, rows, 'groups')}<h4>teacher scores</h4>{_teacher(report)}"
    return Section("groups", "Groups and scores", lead, body)


def _class_name(low: int, high: int | None) -> str:
    if high is None:
        return f"≥ {low}"
    return f"{low}" if low == high else f"{low}–{high}"


def _teacher(report: Report) -> str:
    scored = [(d, d.teacher) for d in report.datasets if d.teacher]
    if not scored:
        return "<p>No row has teacher scores: nothing is distilled.</p>"
    head = (
        "dataset | rows looked at | rows with scores | share | lowest | highest | mean softmax entropy, nats | if "
        "uniform | certainty"
    )
    rows = [
        [text_cell(d.entry.name), count(t.num_rows), count(t.num_scored), share(t.num_scored / t.num_rows),
         number(t.lowest, ".4g"), number(t.highest, ".4g"), number(t.mean_entropy, ".3f"),
         number(t.mean_uniform, ".3f"), share(1 - t.mean_entropy / t.mean_uniform if t.mean_uniform else None)]
        for d, t in scored
    ]  # fmt: skip
    without = len(report.datasets) - len(scored)
    rest = f" {without} datasets have none." if without else ""
    if any(t.num_rows < d.table.num_rows for d, t in scored):
        rest += " " + sampled("rows spaced evenly over a dataset, as many as “rows looked at”")
    return table(head, rows, "teacher") + (
        '<p class="aside">Entropy of the softmax at loss.teacher_temperature=1 over a row’s first positive and all its '
        "negatives; near the uniform value the scores tell nothing apart, near 0 they act as a label. Certainty is 1 - "
        f"entropy / uniform.{rest}</p>"
    )


def prompt_section(report: Report) -> Section:
    """A few whole prompts of every dataset."""
    parts = []
    for number_of, d in enumerate(report.datasets):
        prompts = (
            "".join(_prompt(report.template, p) for p in d.prompts)
            or f"<p>None of the first {MAX_STEPS_SEARCHED:,} steps trains it.</p>"
        )
        parts.append(
            details(f"<b>{isolated(d.entry.name)}</b> {len(d.prompts)} prompts", prompts, is_open=number_of == 0)
        )
    lead = (
        "The whole few-shot prompt of a query and the passages it is compared with. Template text is coloured, the "
        "query itself is tinted, the rest is examples. Texts are shown whole; a badge tells where a text is cut and to "
        "how many tokens, everything that counts towards its limit included. BOS and EOS are counted but not shown."
    )
    return Section("prompts", "Prompts", lead, "".join(parts))


def _prompt(template: Template, shown: ShownPrompt) -> str:
    examples = "no example" if not shown.examples else f"{len(shown.examples)} examples"
    examples = "1 example" if len(shown.examples) == 1 else examples
    title = f"<h4>{examples}, {shown.num_tokens:,} tokens (step {shown.step:,}, source line {shown.source_line:,})</h4>"
    if shown.filler and shown.examples:
        title += '<p class="aside">filler: the examples stand as blank lines of the same length</p>'
    candidates = "".join(_candidate(template, c) for c in shown.candidates)
    if shown.num_more_candidates:
        candidates += f'<p class="aside">and {shown.num_more_candidates} more candidates</p>'
    return title + f'<div class="prompt">{prompt_html(template, shown)}</div>{candidates}'


def prompt_html(template: Template, shown: ShownPrompt) -> str:
    """The prompt as HTML: its text content, badges aside, is what `render_query` gives."""
    texts: list[str] = []

    def place(code: str) -> str:
        texts.append(code)
        return f"\ue000{len(texts) - 1}\ue001"

    def instruction(text: str) -> str:
        return place(isolated(text, "shown")) if text else ""

    examples = [
        (instruction(e.instruction), place(_text(e.query, "shown")), place(_text(e.response, "shown")))
        for e in ([] if shown.filler else shown.examples)
    ]
    own = (instruction(shown.instruction), place(_text(shown.query, "ask")))
    return _fill(render_query(template, *own, examples), texts)


def _candidate(template: Template, c: ShownCandidate) -> str:
    role = "positive" if c.is_positive else "negative"
    score = "" if c.score is None else f", teacher score {c.score:.4g}"
    texts = [_text(c.passage, "")]
    if c.instruction is None:
        rendered = render_passage(template, "\ue0000\ue001")
    else:
        texts.append(isolated(c.instruction, "shown"))
        rendered = render_query(template, "\ue0001\ue001" if c.instruction else "", "\ue0000\ue001")
    summary = f'<span class="role {role}">{role}</span>, {c.num_tokens:,} tokens{score}'
    return details(summary, f'<div class="prompt">{_fill(rendered, texts)}</div>', is_open=c.is_positive)


def _fill(rendered: str, texts: Sequence[str]) -> str:
    """Template text escaped and coloured, places filled with the HTML of their texts."""
    parts = re.split("\ue000([0-9]+)\ue001", rendered)
    literals = [f'<span class="lit">{escape(part)}</span>' if part else "" for part in parts[::2]]
    filled = [texts[int(i)] for i in parts[1::2]]
    return "".join(a + b for a, b in zip(literals, [*filled, ""], strict=True))


def _text(shown: ShownText, css_class: str) -> str:
    code = isolated(shown.text[:SHOWN_CHARACTERS], css_class)
    if len(shown.text) > SHOWN_CHARACTERS:
        code += f'<span class="cut">{len(shown.text) - SHOWN_CHARACTERS:,} more characters</span>'
    if shown.is_cut:
        code += f'<span class="cut">cut: {shown.num_uncut:,} → {shown.limit:,} tokens</span>'
    return code
