"""Point clouds for reports: rotatable scatter plots as offline HTML."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pointdiff.clouds import Cloud
from shared import reports

MOST = 4096
"""Points shown of a cloud."""


def gallery(clouds: Mapping[str, Cloud], columns: int = 3) -> str:
    """Title -> cloud [n, 3], one panel each (partial, completed and truth in a row)."""
    if not clouds:
        return "<p>No clouds.</p>"
    return reports.figures([panels(clouds, columns)])


def panels(clouds: Mapping[str, Cloud], columns: int = 3) -> go.Figure:
    """The figure of :func:`gallery`."""
    rows = -(-len(clouds) // columns)
    figure = make_subplots(
        rows, columns, specs=[[{"type": "scene"}] * columns] * rows, subplot_titles=list(clouds),
        horizontal_spacing=0.01, vertical_spacing=0.04,
    )  # fmt: skip
    ends = np.array([end for cloud in clouds.values() for end in (cloud.min(0), cloud.max(0))])
    middle, size = (ends.min(0) + ends.max(0)) / 2, float(np.ptp(ends, axis=0).max()) or 1.0
    for i, cloud in enumerate(clouds.values()):
        step = -(-len(cloud) // MOST)
        x, y, z = ((cloud[::step] - middle) / size).round(4).astype(np.float32).T
        marker = {"size": 1.6, "color": y, "colorscale": "Viridis"}
        dots = go.Scatter3d(x=x, y=y, z=z, mode="markers", marker=marker, hoverinfo="skip")
        figure.add_trace(dots, row=i // columns + 1, col=i % columns + 1)
    figure.update_scenes(
        xaxis_visible=False, yaxis_visible=False, zaxis_visible=False, aspectmode="data"
    )
    return figure.update_layout(
        height=300 * rows, margin={"l": 0, "r": 0, "t": 30, "b": 0}, showlegend=False
    )
