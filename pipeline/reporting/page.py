"""HTML of a report: escaping, cells, tables and the page around the sections. One file, nothing loaded from outside."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.reporting.style import SCRIPT, STYLE

# Control characters as their pictures; newline and tab stay.
_PICTURES = {i: 0x2400 + i for i in range(32) if i not in (9, 10)} | {127: 0x2421}


@dataclass(frozen=True)
class Cell:
    """One cell of a table: HTML, and what a click on the column's head sorts by."""

    html: str
    sort: float | str = ""
    is_number: bool = True
    heat: float | None = None  # 0..1: how strongly the cell is tinted
    is_soft: bool = False


@dataclass(frozen=True)
class Section:
    """A section of the page; `lead` and `body` are HTML."""

    id: str
    title: str
    lead: str
    body: str


def escape(text: str) -> str:
    """User text as HTML: nothing in it can be markup, and control characters become visible."""
    return html.escape(text.translate(_PICTURES), quote=True)


def shorten(text: str, length: int) -> str:
    """The text on one line, at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def isolated(text: str, css_class: str = "") -> str:
    """User text in an element of its own: its writing direction stays inside."""
    return f'<bdi class="{css_class}">{escape(text)}</bdi>' if css_class else f"<bdi>{escape(text)}</bdi>"


def text_cell(text: str) -> Cell:
    """A cell of text."""
    return Cell(isolated(text), text, is_number=False)


def markup(code: str, sort: float | str = "") -> Cell:
    """A cell of HTML that is no number."""
    return Cell(code, sort, is_number=False)


def count(value: int, heat: float | None = None) -> Cell:
    """A whole number."""
    return Cell(f"{value:,}", value, heat=heat, is_soft=not value)


def number(value: float | None, form: str = ".2f") -> Cell:
    """Any other number; a dash for none."""
    return Cell("–", -math.inf) if value is None else Cell(format(value, form), value)


def percent(value: float) -> str:
    """A share as text: 0% and 100% only for what is exactly that."""
    if not value:
        return "0%"
    if value < 0.001:
        return "&lt; 0.1%"
    if 0.999 < value < 1:
        return "&gt; 99.9%"
    return f"{value:.1%}" if value < 1 else "100%"


def share(value: float | None, heat: bool = False) -> Cell:
    """A share of 0..1 in per cent; a dash for none."""
    if value is None:
        return Cell("–", -1.0)
    return Cell(percent(value), value, heat=min(1.0, value) if heat and value else None, is_soft=not value)


def part(value: float) -> Cell:
    """One share of a distribution: tinted, a dot for none."""
    return share(value, heat=True) if value else Cell("·", 0.0, is_soft=True)


def bar(value: float) -> Cell:
    """A share with a bar behind it."""
    return Cell(f'<span class="bar" style="--w:{min(value, 1):.2%}">{percent(value)}</span>', value)


def table(head: str, rows: Sequence[Sequence[Cell]], name: str) -> str:
    """A table whose columns sort by a click on their heads: `head` has them with " | " between, `name` is its id."""
    titles = head.split(" | ")
    assert rows and all(len(row) == len(titles) for row in rows)
    numeric = [all(row[i].is_number for row in rows) for i in range(len(titles))]
    heads = "".join(
        f'<th{" class=n" if is_number else ""}><button type="button">{escape(title)}</button></th>'
        for title, is_number in zip(titles, numeric, strict=True)
    )
    body = "\n".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table id="{escape(name)}" class="sortable"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    sort = f' data-sort="{escape(str(cell.sort))}"' if cell.sort != "" else ""
    heat = f' style="--heat-share:{cell.heat:.3f}"' if cell.heat is not None else ""
    classes = [("n", cell.is_number), ("heat", cell.heat is not None), ("soft", cell.is_soft)]
    names = " ".join(name for name, on in classes if on)
    return f'<td class="{names}"{sort}{heat}>{cell.html}</td>'


def sampled(text: str) -> str:
    """The label of what was not counted in full."""
    return f'<span class="sampled">sampled: {escape(text)}</span>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values (HTML) as a list of definitions."""
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in pairs)
        + "</dl>"
    )


def tiles(pairs: Sequence[tuple[str, str]]) -> str:
    """Large figures: (value, what it counts)."""
    return (
        '<div class="tiles">'
        + "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in pairs)
        + "</div>"
    )


def details(summary: str, body: str, is_open: bool = False) -> str:
    """A part that folds; both arguments are HTML."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{body}</details>"


def page(title: str, intro: str, sections: Sequence[Section]) -> str:
    """The whole page; `title` is text, `intro` HTML."""
    links = "".join(f'<a href="#{section.id}">{escape(section.title)}</a>' for section in sections)
    parts = "\n".join(
        f'<section id="{s.id}"><h2>{escape(s.title)}</h2><p class="lead">{s.lead}</p>\n{s.body}</section>'
        for s in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
{intro}
</header>
<nav aria-label="sections">{links}</nav>
<main>
{parts}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
