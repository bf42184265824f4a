"""Checkpoints of published programs that ``molediff convert`` reads, and how.

What does the work is imported when a file is read, so that the command line starts quickly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Whether these are the tensors of an EDM denoiser."""
    return any(key.endswith("egnn.e_block_0.gcl_equiv.coord_mlp.0.weight") for key in keys)


def convert_edm(
    content: Mapping[str, Any],
    path: Path,
    out: Path,
    sizes: str | None = None,
    properties: Sequence[str] = (),
) -> str | None:
    """An EDM denoiser -> a checkpoint folder.

    Args:
        sizes: its training data, a folder made by ``molediff data prepare``. Without it,
            sampling takes ``request.atoms``.
        properties: columns of these data that a conditional model was told, in its order (no
            charges and one-hot rows of 1/8, as published).

    Raises:
        ValueError: a number of features that belongs to no published model, properties without
            data, or a noise schedule that is not polynomial.
    """
    from omegaconf import open_dict

    from molediff.geometric.convert import edm_options, edm_weights
    from shared import checkpoints
    from shared.configuration import build, option, plain

    width = next(v.shape[1] for k, v in content.items() if k.endswith("egnn.embedding.weight"))
    features = width - 1 - len(properties)  # the rest is the time and the context
    if features not in SETS or (properties and SETS[features][1]):
        raise ValueError(
            f"{path}: {features} features per atom belong to no EDM model of QM9 or GEOM "
            f"({', '.join(map(str, SETS))}) told {len(properties)} properties; give those of a "
            "conditional one, properties=[alpha]."
        )
    if properties and sizes is None:
        raise ValueError("properties: give sizes=FOLDER too, data with their mean and spread.")
    elements, charges = SETS[features]
    options = edm_options(content)
    model = option("model", "egnn", width=options.width, layers=options.layers)
    with open_dict(model):
        for name in ("attention", "sublayers", "sin_embedding"):
            model[name] = getattr(options, name)
    scale = 0.125 if properties else 0.25
    domain = option("domain", "molecules", charges=charges, scale=scale)
    domain.properties = list(properties)
    schedule = _edm_schedule(content, path)
    statistics = _edm_statistics(elements, plain(domain), sizes)
    built = build(domain)
    built.restore(statistics)
    denoiser = build(model, domain=built, schedule=build(schedule))
    denoiser.backbone.load_state_dict(edm_weights(content, features))
    config = {"domain": plain(domain), "model": plain(model), "schedule": plain(schedule)}
    checkpoints.save(out, denoiser, config=config, domain=statistics, step=0)
    return None if sizes else "give request.atoms=N when you sample, or convert with sizes=FOLDER"


def _edm_schedule(content: Mapping[str, Any], path: Path) -> Any:
    """The configuration of the checkpoint's noise schedule, that of EDM where it has none.

    Raises:
        ValueError: a learned schedule or another table than ``polynomial_2``.
    """
    import torch

    from shared.configuration import build, option

    found = {k.rpartition("gamma.")[2]: v for k, v in content.items() if "gamma." in k}
    if not found:
        return option("schedule", "polynomial")
    table = found["gamma"].double() if found.keys() == {"gamma"} else torch.zeros(0)
    if len(table) > 2:
        precision = float(f"{table[0].sigmoid():.4g}")
        schedule = option("schedule", "polynomial", precision=precision, steps=len(table) - 1)
        ours = -2.0 * build(schedule).log_snr(torch.linspace(0, 1, len(table)).double())
        if torch.allclose(ours, table, rtol=0, atol=1e-3):
            return schedule
    raise ValueError(
        f"{path}: its noise schedule ({', '.join(found)}) is not the table of 'polynomial_2', "
        "the only one that is converted."
    )


def _edm_statistics(
    elements: Sequence[str], domain: Mapping[str, Any], sizes: str | None
) -> dict[str, Any]:
    """The constants of an EDM model, with those of its training data where they are given."""
    from shared.configuration import build

    fixed = {
        "domain": "molecules",
        "elements": list(elements),
        "scale": domain["scale"],
        "charges": domain["charges"],
        "charge_scale": 0.1,
        "position_std": 1.0,
    }
    if sizes is None:
        return fixed | {"sizes": {}, "element_counts": {}, "properties": {}}
    data = build({**domain, "data": str(sizes)}).statistics()
    kept = ("sizes", "element_counts", "properties", "context", "known")
    return fixed | {key: data[key] for key in kept} | {"free": False}


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
