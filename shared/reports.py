"""Reports: one HTML file that holds everything it shows and loads nothing from a network."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from shared.checkpoints import write_atomically
from shared.metrics import Estimate


@dataclass(frozen=True)
class Section:
    """A heading and an HTML fragment."""

    title: str
    body: str


STYLE = """
:root { --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --tint: #f7f9fb; --accent: #2b6cb0; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 58rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; }
.when { color: var(--soft); margin: 0; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.75rem 0 0; padding: 0; }
.facts div { background: var(--tint); border: 1px solid var(--line); border-radius: .5rem;
  padding: .5rem .9rem; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .45rem .75rem .45rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: .85rem; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: .5rem;
  padding: 1rem; overflow: auto; font-size: .82rem; line-height: 1.45; }
img { image-rendering: pixelated; max-width: 100%; } svg { max-width: 100%; }
.wide { overflow-x: auto; }
"""


def page(title: str, facts: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """The whole page. ``facts`` are shown under the title, name -> value."""
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    cards = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )
    body = "".join(
        f'<section><h2>{html.escape(s.title)}</h2><div class="wide">{s.body}</div></section>'
        for s in sections
        if s.body
    )
    name = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{name}</h1><p class="when">{when}</p><dl class="facts">{cards}</dl>{body}'
        "</main></body></html>\n"
    )


def write(path: Path, title: str, facts: Mapping[str, Any], sections: Sequence[Section]) -> Path:
    """Write the page to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page(title, facts, sections).encode())
    return path


# -- fragments --------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers are aligned. No rows: nothing."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="number">{_number(value)}</td>'
    kind = ' class="number"' if isinstance(value, int) else ""
    return f"<td{kind}>{html.escape(str(value))}</td>"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def metrics(values: Mapping[str, Estimate]) -> str:
    """Metrics with their 95 % intervals."""
    rows = [
        (name.replace("_", " "), e.value, f"{_number(e.low)} to {_number(e.high)}", e.n)
        for name, e in values.items()
    ]
    return table(("metric", "value", "95 % interval", "n"), rows)


def failures(reasons: Mapping[str, int], n: int) -> str:
    """Why samples are missing: reason -> count, of ``n``."""
    ordered = sorted(reasons.items(), key=lambda pair: -pair[1])
    rows = [(reason, count, f"{count / n:.1%}") for reason, count in ordered]
    return table(("reason", "samples", "share"), rows)


def code(text: str) -> str:
    """Text as it stands."""
    return f"<pre>{html.escape(text.strip())}</pre>"


def figures(items: Sequence[Any]) -> str:
    """Plotly figures; the first one brings the library (5 MB) into the page."""
    return "".join(
        item.to_html(full_html=False, include_plotlyjs="inline" if i == 0 else False)
        for i, item in enumerate(items)
    )


def curve(points: Sequence[tuple[float, float]], label: str) -> str:
    """A line through (x, y) points as a small SVG, on a logarithmic y-axis where all y are
    positive. Points that are not finite are left out."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return ""
    log = all(y > 0 for _, y in points)
    xs = [x for x, _ in points]
    ys = [math.log10(y) if log else y for _, y in points]
    width, height, left, pad = 640, 220, 70, 24
    wide, tall = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
    path = " ".join(
        f"{left + (x - min(xs)) / wide * (width - left - pad):.1f},"
        f"{height - pad - (y - min(ys)) / tall * (height - 2 * pad):.1f}"
        for x, y in zip(xs, ys, strict=True)
    )
    ends = [10**y if log else y for y in (max(ys), min(ys))]
    marks = "".join(
        f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{_number(value)}</text>'
        for value, y in zip(ends, (pad, height - pad), strict=True)
    )
    marks += f'<text x="{left}" y="{height - 4}">{min(xs):g}</text>'
    marks += f'<text x="{width - pad}" y="{height - 4}" text-anchor="end">{max(xs):g}</text>'
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{html.escape(label)}" font-size="12" fill="#616e7c">{marks}'
        f'<polyline points="{path}" fill="none" stroke="#2b6cb0" stroke-width="1.5"/>'
        f'<text x="{left}" y="14">{html.escape(label)}</text></svg>'
    )
