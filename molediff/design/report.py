"""The report of a design run: one HTML file, offline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from molediff.design.judging import Design, Judge, summary
from molediff.oracles import Oracle
from molediff.targets import Range, Target, Value
from molediff.views import drawings, structures
from shared import checkpoints, reports
from shared.domains import Invalid
from shared.metrics import Estimate
from shared.reports import Section

SHOWN = 12


def write(
    file: Path,
    judge: Judge,
    designs: Sequence[Design],
    failures: Sequence[Invalid],
    *,
    n: int,
    facts: Mapping[str, Any],
    known: Sequence[Sequence[float]] = (),
    columns: Sequence[str] = (),
    baseline: Sequence[Design] = (),
    unguided: int = 0,
    warnings: Sequence[str] = (),
) -> Path:
    """Write the page about ``designs`` (best first).

    Args:
        n: how many were asked for. facts: name -> value, shown under the title.
        known: rows (atoms, properties ``columns``) of training molecules, for the histograms.
        baseline: molecules of the same model without guidance, ``unguided`` asked for.
    """
    best = [design for design in designs if design.valid][:SHOWN]
    history = {name: [row[i + 1] for row in known] for i, name in enumerate(columns)}
    figures = [structures([d.molecule for d in best])] if best else []
    drawn = [_values(judge, designs, baseline, history)] if judge.targets else []
    plots = [
        figure.to_html(full_html=False, include_plotlyjs="inline" if i == 0 else False)
        for i, figure in enumerate([*figures, *drawn])
    ]
    sections = [
        Section("Warnings", reports.table(("warning",), [(text,) for text in warnings])),
        Section("Targets", _targets(judge)),
        Section("Outcome", _outcome(judge, designs, n, baseline, unguided)),
        Section("Best molecules", plots[0] + _captions(best) if best else _none()),
        Section("Properties", plots[-1] if drawn else ""),
        Section("Ranking", _ranking(designs)),
        Section("Failures", _failures(designs, failures, n)),
        Section("Oracles", _oracles(judge.oracles)),
        Section(
            "Versions",
            reports.table(("package", "version"), list(checkpoints.versions().items())),
        ),
    ]
    wanted = ", ".join(map(str, judge.targets)) or "molecules"
    return reports.write(file, f"Design: {wanted}", facts, sections)


def _none() -> str:
    return "<p>No molecule passed the valence rule.</p>"


def _targets(judge: Judge) -> str:
    rows = []
    for target in judge.targets:
        row = judge.properties[target.name]
        data = f"{row['min']:.4g} to {row['max']:.4g}, mean {row['mean']:.4g}"
        trust = [
            f"{short}: ±{oracle.accuracy[target.name].mae.value:.3g}"
            for short, oracle in judge.oracles.items()
            if target.name in oracle.accuracy
        ]
        rows.append((str(target), row.get("unit", ""), data, "; ".join(trust) or "no oracle"))
    head = ("target", "unit", "training data", "mean error of the oracles")
    return reports.table(head, rows)


def _outcome(
    judge: Judge, designs: Sequence[Design], n: int, baseline: Sequence[Design], unguided: int
) -> str:
    """Designs next to unguided samples, where there are any."""
    ours = summary(judge, designs, n)
    theirs = summary(judge, baseline, unguided) if unguided else {}
    head = ("", "designed", *(("unguided",) if theirs else ()))
    rows = [
        (name, str(value), *((str(theirs.get(name, "")),) if theirs else ()))
        for name, value in ours.items()
    ]
    return reports.table(head, rows) + (
        "<p>Errors are mean distances of valid molecules to the target, with 95 % intervals.</p>"
    )


def _captions(best: Sequence[Design]) -> str:
    cells = []
    for place, design in enumerate(best, 1):
        values = ", ".join(f"{name} {value:.3g}" for name, value in design.values.items())
        figure = drawings([design.molecule])
        cells.append(
            '<figure style="display:inline-block;width:13rem;margin:0 .5rem 1rem 0;'
            f'vertical-align:top">{figure}<figcaption style="font-size:.8rem">{place}. '
            f"{design.smiles}<br>{values}</figcaption></figure>"
        )
    return "<p>Structures turn under the mouse, best first.</p>" + "".join(cells)


def _values(
    judge: Judge,
    designs: Sequence[Design],
    baseline: Sequence[Design],
    history: Mapping[str, Sequence[float]],
) -> go.Figure:
    """A histogram for every target: training data, unguided and designed molecules by the first
    oracle, and what was asked for."""
    figure = make_subplots(1, len(judge.targets), subplot_titles=[str(t) for t in judge.targets])
    for place, target in enumerate(judge.targets, 1):
        columns = judge.columns(target.name)
        series = [("training data", "#cbd5e0", list(history.get(target.name, ())))]
        if columns:
            for name, colour, rows in (
                ("unguided", "#d69e2e", baseline),
                ("designed", "#2b6cb0", designs),
            ):
                series.append((name, colour, [d.values[columns[0]] for d in rows if d.valid]))
        for name, colour, values in series:
            good = [v for v in values if np.isfinite(v)]
            if good:
                bars = go.Histogram(
                    x=good, name=name, histnorm="probability density", marker_color=colour,
                    opacity=0.65, nbinsx=40, showlegend=place == 1,
                )  # fmt: skip
                figure.add_trace(bars, row=1, col=place)
        _mark(figure, target, place)
    return figure.update_layout(
        barmode="overlay", height=340, margin={"l": 40, "r": 10, "t": 40, "b": 40}
    )


def _mark(figure: go.Figure, target: Target, place: int) -> None:
    if isinstance(target, Value):
        figure.add_vline(x=target.value, line={"color": "#d64545", "width": 2}, col=place, row=1)
    elif isinstance(target, Range):
        for end in (target.low, target.high):
            if np.isfinite(end):
                figure.add_vline(x=end, line={"color": "#d64545", "dash": "dot"}, col=place, row=1)


def _ranking(designs: Sequence[Design], most: int = 100) -> str:
    rows = [design.row() for design in designs if design.valid][:most]
    if not rows:
        return ""
    head = ("rank", *(name for name in rows[0] if name != "valid"))
    body = [(i, *(v for k, v in row.items() if k != "valid")) for i, row in enumerate(rows, 1)]
    return reports.table(head, body)


def _failures(designs: Sequence[Design], failures: Sequence[Invalid], n: int) -> str:
    reasons = Counter(item.reason for item in failures)
    reasons["valences, charges or fragments that make no molecule"] += sum(
        not design.valid for design in designs
    )
    return reports.failures({k: v for k, v in reasons.items() if v}, n)


def _oracles(oracles: Mapping[str, Oracle]) -> str:
    rows: list[tuple[str, str, str]] = []
    for short, oracle in oracles.items():
        for name, accuracy in oracle.accuracy.items():
            rows.append((f"{short} ({oracle.name})", name, str(accuracy)))
    return (
        reports.table(("oracle", "property", "mean absolute error on held-out molecules"), rows)
        + "<p>Oracles did not steer the sampling.</p>"
    )


def estimates(values: Mapping[str, Estimate]) -> list[str]:
    """The outcome as lines for a terminal."""
    return [f"{name}: {value}" for name, value in values.items()]
