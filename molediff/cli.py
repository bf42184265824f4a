"""The ``molediff`` command."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from molediff import published
from shared import cli
from shared.cli import Outcome, Program, Progress, Verb
from shared.configuration import ConfigurationError, plain
from shared.models import find_device


def prepare_data(
    config: DictConfig, program: Program, progress: Progress | None = None
) -> Outcome:
    """``molediff data prepare``: raw data -> a data set that ``domain.data`` takes."""
    from molediff.geometric.prepare import prepare

    options = plain(config)
    source, out = options.pop("path"), options.pop("out")
    if out is None:
        raise ConfigurationError("data prepare: 'out' is missing; give out=FOLDER.")
    data = prepare(source, out, **options)
    left_out = data.info["invalid"]["count"]
    lines = [f"{data!r}", f"properties: {', '.join(data.property_names) or 'none'}"]
    if left_out:
        lines.append(f"{left_out} records left out; reasons in {Path(out) / 'invalid.jsonl'}")
    if bare := data.info["open_hydrogens"]:
        lines.append(f"{bare} molecules have hydrogens that are not among their atoms")
    return Outcome(lines, Path(out))


def label_data(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """``molediff data label``: predictions for the properties that a data set lacks."""
    from molediff.geometric.predicting import Predictor, label

    if config.out is None:
        raise ConfigurationError("data label: 'out' is missing; give out=FOLDER.")
    predictor = Predictor.load(config.run, find_device(config.device))
    data = label(config.path, predictor, config.out, keep=config.keep, progress=progress)
    return Outcome((f"{data!r}, {data.info['labelled']['n']} molecules labelled",), data.path)


PROGRAM = Program(
    name="molediff",
    title="Diffusion models of molecules, in 3D and as graphs.",
    packages=("molediff.",),
    default="molecules",
    examples=(
        "design gap=5.0 n=64",
        "sample run=qm9 n=100 out=samples",
        "evaluate samples",
        "data prepare mine.sdf out=data/mine",
        "train experiment=qm9_small domain.data=data/mine out=runs/mine",
        "sample run=runs/mine n=100 solver=dpmpp_2m steps=50 seed=0 out=mine",
        "convert generative_model_ema.npy out=runs/edm",
    ),
    converters=published.CONVERTERS,
    reader="molediff.published:read",
    more={
        "design": Verb(
            "molecules with wanted properties, ranked and judged; again: only what is missing",
            "molediff.design.run:design_verb",
            examples=(
                "gap=5.0 n=64",
                "'gap>7' mu=2.0..3.0 n=200 out=run1",
                "homo=-6.2eV composition='N<=1 F=0' scaffold=frag.sdf:0-5",
                "lumo=min score='qed>0.5; lacks:[N+](=O)[O-]'",
            ),
            words="molediff.design.wishes:as_overrides",
        ),
        "export": Verb(
            "write samples in another format; molecules known as graphs get coordinates",
            "molediff.export:export",
            bare=True,
            examples=("samples to=new.sdf dimensions=3", "graphs to=graphs.graphml"),
        ),
        "data prepare": Verb(
            "turn raw molecules (QM9, SDF, XYZ, SMILES, CSV) into a data set for training",
            "molediff.cli:prepare_data",
            bare=True,
            examples=("mine.sdf out=data/mine", "dsgdb9nsd.xyz.tar.bz2 out=data/qm9"),
        ),
        "data label": Verb(
            "fill in missing properties of a data set with the predictions of a model",
            "molediff.cli:label_data",
            bare=True,
            examples=("data/qm9 run=runs/oracle out=data/labelled",),
        ),
        "oracle measure": Verb(
            "measure a property model on held-out molecules, and keep its errors with it",
            "molediff.geometric.predicting:measure_verb",
            bare=True,
            examples=("data/qm9 run=runs/oracle",),
        ),
        "oracle calibrate": Verb(
            "fit GFN2-xTB to the labels of a data set, and measure its error",
            "molediff.oracles:calibrate_verb",
            bare=True,
            examples=("data/qm9 out=calibration", "data/qm9 n=300 relax=true out=calibration"),
        ),
    },
)


def main() -> int:
    """Entry point."""
    return cli.main(PROGRAM)
