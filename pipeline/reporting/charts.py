"""Small bar charts as inline SVG: colours and fonts come from the page's style sheet, so they follow its dark mode."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 320, 138
_LEFT, _RIGHT, _TOP, _BOTTOM = 4, 4, 26, 18


def length_chart(
    counts: Sequence[int], edges: Sequence[int], limit: int | None, marks: Sequence[int], name: str
) -> str:
    """Histogram of lengths over log-spaced bins.

    Args:
        counts: by bin: up to edges[0], up to edges[1], ..., above the last edge.
        limit: drawn as a line with its number; None: no line.
        marks: drawn as dashed lines.
        name: what the lengths are of, for readers of the page that see no pictures.
    """
    last = max(
        [i for i, c in enumerate(counts) if c] + [math.ceil(bin_place(v, edges)) - 1 for v in (limit, *marks) if v]
    )
    last = min(last, len(counts) - 1)
    labels = [str(edge) for edge in edges] + [f"> {edges[-1]}"]
    lower = [0, *edges]
    total = max(sum(counts), 1)
    tips = [
        f"{lower[i] + 1:,} to {edges[i]:,} tokens: {c:,}" if i < len(edges) else f"above {edges[-1]:,} tokens: {c:,}"
        for i, c in enumerate(counts)
    ]
    width = _bin_width(last + 1)
    lines = [_line(_LEFT + width * min(bin_place(mark, edges), last + 1), "edge", f"edge {mark}") for mark in marks]
    end = math.inf
    if limit is not None:
        end = bin_place(limit, edges)  # lengths are cut to the limit, so no bar reaches past it
        x = _LEFT + width * min(bin_place(limit, edges), last + 1)
        lines.append(_line(x, "limit", f"limit {limit}"))
        anchor = "end" if x > WIDTH / 2 else "start"
        lines.append(f'<text class="limit-text" x="{x:.1f}" y="9" style="text-anchor:{anchor}">limit {limit}</text>')
    shares = [c / total for c in counts[: last + 1]]
    ticks = [
        f'<text x="{_clamp(_LEFT + width * (i + 1)):.1f}" y="{HEIGHT - 5}">{labels[i]}</text>' for i in range(last + 1)
    ]
    bars, numbers = _bars(shares, tips, None, end)
    return _svg(bars + "".join(lines) + numbers + "".join(ticks), name, "lengths")


def bin_place(value: int, edges: Sequence[int]) -> float:
    """Where a length lies on the axis in bins: 0 at no tokens, i + 1 at edges[i], between them by its logarithm."""
    for i, edge in enumerate(edges):
        if value <= edge:
            return value / edge if i == 0 else i + math.log(value / edges[i - 1]) / math.log(edge / edges[i - 1])
    return len(edges) + min(1.0, math.log2(value / edges[-1]))


def bar_chart(labels: Sequence[str], shares: Sequence[float], tips: Sequence[str], name: str) -> str:
    """One bar a label; the full height, drawn pale behind it, stands for a share of 1."""
    width = _bin_width(len(labels))
    ticks = [
        f'<text x="{_LEFT + width * (i + 0.5):.1f}" y="{HEIGHT - 5}">{escape(label)}</text>'
        for i, label in enumerate(labels)
    ]
    bars, numbers = _bars(shares, tips, top=1.0)
    return _svg(bars + numbers + "".join(ticks), name)


def _bin_width(num_bins: int) -> float:
    return (WIDTH - _LEFT - _RIGHT) / num_bins


def _bars(shares: Sequence[float], tips: Sequence[str], top: float | None, end: float = math.inf) -> tuple[str, str]:
    """(bars on a base line, per cent above each).

    Args:
        top: the share that the full height stands for; None: the largest.
        end: where the last bar ends, in bins.
    """
    width, full = _bin_width(len(shares)), HEIGHT - _TOP - _BOTTOM
    scale = full / (top or max(shares) or 1.0)
    bars, labels = [], []
    for i, (share, tip) in enumerate(zip(shares, tips[: len(shares)], strict=True)):
        x, height, wide = _LEFT + width * i, share * scale, width * min(1.0, max(end - i, 0.1)) - 4
        y = HEIGHT - _BOTTOM - height
        track = f'<rect class="b2" x="{x + 2:.1f}" y="{_TOP}" width="{wide:.1f}" height="{full}"/>' if top else ""
        bars.append(
            f"<g><title>{escape(tip)} ({share:.1%})</title>{track}"
            f'<rect class="b" x="{x + 2:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{height:.1f}"/></g>'
        )
        if share:
            labels.append(f'<text x="{x + 2 + wide / 2:.1f}" y="{y - 4:.1f}">{_short(share)}</text>')
    base = HEIGHT - _BOTTOM + 0.5
    bars.append(f'<line class="axis" x1="0" x2="{WIDTH}" y1="{base}" y2="{base}"/>')
    return "".join(bars), "".join(labels)


def _short(share: float) -> str:
    """A share above a bar, in whole per cent; 100% only for all."""
    if 0.995 <= share < 1:
        return "&gt;99%"
    return "&lt;1%" if share < 0.005 else f"{share:.0%}"


def _clamp(x: float) -> float:
    return min(x, WIDTH - 14)


def _line(x: float, css_class: str, tip: str) -> str:
    title = f"<title>{escape(tip)}</title>"
    return f'<line class="{css_class}" x1="{x:.1f}" x2="{x:.1f}" y1="13" y2="{HEIGHT - _BOTTOM}">{title}</line>'


def _svg(body: str, name: str, css_class: str = "") -> str:
    return (
        f'<svg class="{css_class}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">{body}</svg>'
    )
