"""Checkpoints of published programs that ``molediff convert`` reads, and how.

What does the work is imported when a file is read, so that the command line starts quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.cli import Converter

SETS = {
    5: (("H", "C", "N", "O", "F"), None),
    6: (("H", "C", "N", "O", "F"), "nuclear"),
    16: (tuple("H B C N O F Al Si P S Cl As Br I Hg Bi".split()), None),
    17: (tuple("H B C N O F Al Si P S Cl As Br I Hg Bi".split()), "nuclear"),
}
"""Invariant features per atom -> elements and integer feature of EDM's QM9 and GEOM models."""


def read(path: Path) -> Any:
    """The content of a file of ``torch.save``; nothing in it is executed."""
    from shared.inert import read_torch

    return read_torch(path)


def is_edm(keys: frozenset[str]) -> bool:
    """Whether these are the tensors of an unconditional EDM denoiser."""
    return any(key.endswith("egnn.e_block_0.gcl_equiv.coord_mlp.0.weight") for key in keys)


def convert_edm(content: Mapping[str, Any], path: Path, out: Path) -> None:
    """An EDM denoiser trained without context -> a checkpoint folder. The sizes of its training
    molecules are not in the file: sampling takes ``request.atoms``.

    Raises:
        ValueError: a number of features that belongs to no published unconditional model.
    """
    from molediff.geometric.convert import edm_options, edm_weights
    from molediff.geometric.domain import Molecules
    from shared import checkpoints
    from shared.configuration import build, option, plain

    width = next(v.shape[1] for k, v in content.items() if k.endswith("egnn.embedding.weight"))
    features = width - 1  # the rest is the time
    if features not in SETS:
        raise ValueError(
            f"{path}: {features} features per atom belong to no unconditional EDM model of QM9 "
            f"or GEOM ({', '.join(map(str, SETS))}); conditional ones are not converted."
        )
    elements, charges = SETS[features]
    options = edm_options(content)
    model = option("model", "egnn", width=options.width, layers=options.layers)
    model.attention = options.attention
    domain = option("domain", "molecules", charges=charges)
    schedule = option("schedule", "polynomial")
    statistics = {
        "domain": Molecules.name,
        "elements": list(elements),
        "scale": 0.25,
        "charges": charges,
        "charge_scale": 0.1,
        "position_std": 1.0,
        "sizes": {},
        "element_counts": {},
        "properties": {},
    }
    built = build(domain)
    built.restore(statistics)
    denoiser = build(model, domain=built, schedule=build(schedule))
    denoiser.backbone.load_state_dict(edm_weights(content, features))
    config = {"domain": plain(domain), "model": plain(model), "schedule": plain(schedule)}
    checkpoints.save(out, denoiser, config=config, domain=statistics, step=0)


def is_gdss(keys: frozenset[str]) -> bool:
    """Whether these are the tensors of a GDSS checkpoint."""
    from molediff.graphs.convert import recognises

    return recognises(keys)


def convert_gdss(
    content: Mapping[str, Any], path: Path, out: Path, sizes: str | None = None
) -> str | None:
    """A GDSS checkpoint -> a checkpoint folder; ``sizes``: its training graphs or molecules."""
    from molediff.graphs.convert import convert

    return convert(content, path, out, sizes)


CONVERTERS = (
    Converter("GDSS", is_gdss, convert_gdss),
    Converter("EDM", is_edm, convert_edm),
)
