"""Trained models of molecules in Python."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molediff.geometric.domain import Molecules
from molediff.molecules import Molecule
from shared import models
from shared.models import Model

if TYPE_CHECKING:
    from molediff.design import Designs


class MoleculeModel(Model[Molecule]):
    """A model of molecules in 3D, which can be asked for some with wanted properties."""

    def design(self, **wishes: Any) -> Designs:
        """``model.design(gap=5.0, mu="2..3", n=64, seed=0)``: molecules best first; see
        :func:`molediff.design.design` for all that can be asked for."""
        from molediff.design import design  # oracles and reports take a second to import

        return design(self, **wishes)


def load(run: str | Path, checkpoint: str | None = None) -> Model[Any]:
    """A trained model by its run folder or pretrained name ('qm9'); one of molecules in 3D can
    also ``design``. See :func:`shared.models.load`."""
    model = models.load(run, checkpoint)
    if not isinstance(model.domain, Molecules):
        return model
    return MoleculeModel(*(getattr(model, f.name) for f in fields(model)))
