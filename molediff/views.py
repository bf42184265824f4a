"""Molecules for reports: rotatable structures, drawings and histograms as offline HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rdkit import Chem, rdBase
from rdkit.Chem import Draw

from molediff.molecules import Molecule
from shared import reports

COLOURS = {
    "H": "#d8dee9", "C": "#4a5568", "N": "#3b6fd6", "O": "#d64545", "F": "#38a169",
    "S": "#d69e2e", "Cl": "#2f9e6e", "P": "#dd7a26", "Br": "#8c3b3b",
}  # fmt: skip
RADII = {"H": 0.31, "C": 0.76, "N": 0.71, "O": 0.66, "F": 0.57, "S": 1.05, "Cl": 1.02, "P": 1.07}


def gallery(molecules: Sequence[Molecule], statistics: Mapping[str, Any], most: int = 12) -> str:
    """The first ``most`` molecules as rotatable structures and 2D drawings, then histograms of
    all of them; against the data where ``statistics`` (of the domain) has its counts."""
    if not molecules:
        return "<p>No molecules.</p>"
    solid = [m for m in molecules if m.positions is not None]
    figures = [structures(solid[:most])] if solid else []
    figures.append(histograms(molecules, statistics))
    shown, plots = reports.figures(figures[:-1]), reports.figures(figures[-1:])
    if shown:  # the library is in the page already
        plots = figures[-1].to_html(full_html=False, include_plotlyjs=False)
    return f"{shown}<h3>Drawings</h3>{drawings(molecules[:most])}<h3>Histograms</h3>{plots}"


def structures(molecules: Sequence[Molecule], columns: int = 4) -> go.Figure:
    """Ball-and-stick models that turn under the mouse, one panel each."""
    rows = -(-len(molecules) // columns)
    figure = make_subplots(
        rows, columns, specs=[[{"type": "scene"}] * columns] * rows, horizontal_spacing=0.01,
        vertical_spacing=0.01,
    )  # fmt: skip
    for i, molecule in enumerate(molecules):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        for trace in _sticks_and_balls(molecule):
            figure.add_trace(trace, **place)
    figure.update_scenes(
        xaxis_visible=False, yaxis_visible=False, zaxis_visible=False, aspectmode="data"
    )
    return figure.update_layout(
        height=240 * rows, margin={"l": 0, "r": 0, "t": 0, "b": 0}, showlegend=False
    )


def _sticks_and_balls(molecule: Molecule) -> list[go.Scatter3d]:
    x = np.asarray(molecule.positions, dtype=float)
    symbols = molecule.symbols
    pairs = np.zeros((0, 2), int) if molecule.bonds is None else molecule.bonds
    ends = np.full((3 * len(pairs), 3), np.nan)  # a gap after every bond
    ends[0::3], ends[1::3] = x[pairs[:, 0]], x[pairs[:, 1]]
    sticks = go.Scatter3d(
        x=ends[:, 0], y=ends[:, 1], z=ends[:, 2], mode="lines", hoverinfo="skip",
        line={"color": "#a0aec0", "width": 7},
    )  # fmt: skip
    balls = go.Scatter3d(
        x=x[:, 0], y=x[:, 1], z=x[:, 2], mode="markers", text=symbols, hoverinfo="text",
        marker={
            "size": [6 + 10 * RADII.get(s, 1.0) for s in symbols],
            "color": [COLOURS.get(s, "#b83280") for s in symbols],
            "line": {"color": "#2d3748", "width": 1}, "opacity": 1.0,
        },
    )  # fmt: skip
    return [sticks, balls]


def drawings(molecules: Sequence[Molecule]) -> str:
    """2D formulas as SVG, without the hydrogens where RDKit can read the molecule."""
    return "".join(_drawing(molecule) for molecule in molecules)


def _drawing(molecule: Molecule) -> str:
    with rdBase.BlockLogs():
        try:
            mol = Chem.RemoveHs(Chem.MolFromSmiles(molecule.smiles()))
        except (ValueError, RuntimeError):
            return '<span title="no valid bonds">no formula</span> '
    drawer = Draw.MolDraw2DSVG(170, 130)
    drawer.drawOptions().clearBackground = False  # type: ignore[assignment]
    drawer.DrawMolecule(mol)
    drawer.FinishDrawing()
    return str(drawer.GetDrawingText()).partition("?>")[2]


def histograms(molecules: Sequence[Molecule], statistics: Mapping[str, Any]) -> go.Figure:
    """Shares of sizes and of elements, next to those of the training data where known."""
    figure = make_subplots(1, 2, subplot_titles=("atoms per molecule", "elements"))
    known = {int(n): count for n, count in (statistics.get("sizes") or {}).items()}
    sizes = Counter(len(m) for m in molecules)
    elements = Counter(symbol for m in molecules for symbol in m.symbols)
    _compare(figure, 1, sizes, known)
    _compare(figure, 2, elements, statistics.get("element_counts") or {})
    return figure.update_layout(height=320, margin={"l": 40, "r": 10, "t": 40, "b": 40})


def _compare(
    figure: go.Figure, column: int, made: Mapping[Any, int], data: Mapping[Any, int]
) -> None:
    """Bars of the shares in one panel."""
    keys = sorted({*made, *data})
    for name, counts, colour in (("generated", made, "#2b6cb0"), ("data", data, "#cbd5e0")):
        total = sum(counts.values())
        if total:
            shares = [counts.get(key, 0) / total for key in keys]
            bar = go.Bar(x=keys, y=shares, name=name, marker_color=colour)
            figure.add_trace(bar.update(showlegend=column == 1), row=1, col=column)
