"""The table that a terminal shows while molecules come in."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table as Rows

from molediff.design.judging import Design, Judge, ranked, summary


class Table:
    """Counts and the best molecules so far; call it with every new design. It is redrawn in place
    on a terminal; elsewhere it stays silent, and the end of the run tells all."""

    def __init__(self, judge: Judge, n: int, most: int = 8) -> None:
        self.judge, self.n, self.most = judge, n, most
        self.designs: list[Design] = []
        self._live: Live | None = None

    def __call__(self, design: Design) -> None:
        self.designs.append(design)
        if self._live is not None:
            self._live.update(self.rows())

    def rows(self) -> Rows:
        """The table as it stands."""
        best = [design for design in ranked(self.designs) if design.valid][: self.most]
        columns = [c for target in self.judge.targets for c in self.judge.columns(target.name)]
        columns += [scorer.name for scorer in self.judge.scorers]
        table = Rows("", "molecule", "atoms", *columns, title=self._title(), title_justify="left")
        for place, design in enumerate(best, 1):
            values = (f"{design.values[name]:.3f}" for name in columns)
            table.add_row(str(place), design.smiles, str(len(design.molecule)), *values)
        return table

    def _title(self) -> str:
        found = summary(self.judge, self.designs, len(self.designs))
        valid = round(found["valid"].value * len(self.designs)) if self.designs else 0
        parts = [f"{len(self.designs)} of {self.n} molecules, {valid} valid"]
        parts += [f"{k} {v.value:.3g}" for k, v in found.items() if k.endswith(("error", "mean"))]
        return ", ".join(parts)

    def __enter__(self) -> Table:
        console = Console(file=sys.stderr)
        if console.is_terminal:
            self._live = Live(self.rows(), console=console, refresh_per_second=4).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*error)
