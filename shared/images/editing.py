"""Editing given images with a model: SDEdit, EGSDE, inpainting, super-resolution."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

from shared.cli import Outcome, Program, Progress
from shared.configuration import ConfigurationError, plain
from shared.domains import Invalid
from shared.guidance import (
    Faithful,
    GaussianNoise,
    Guided,
    Known,
    Measurement,
    Realistic,
    RePaint,
    SDEdit,
    Source,
    Term,
    low_pass,
    prior_spread,
)
from shared.images import files
from shared.images.classifier import load_classifier
from shared.images.domain import Images
from shared.images.files import Picture
from shared.models import Model, find_device, load
from shared.predictions import Condition, Denoise
from shared.process import State
from shared.randomness import Draws
from shared.sampling import Job, time_grid
from shared.solvers.base import Solver

METHODS = ("sdedit", "egsde", "inpaint", "superres")
SIDES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Edit:
    """How images are edited.

    Args:
        method: 'sdedit' noises the image to ``strength`` and denoises it; 'egsde' also pushes it
            from the domain of the source and towards its coarse structure (Zhao et al. 2022);
            'inpaint' keeps the part ``keep``; 'superres' makes images whose averages over blocks
            of ``factor`` pixels are those of the given ones (posterior sampling, Chung et al.
            2023).
        strength: time to start from, as a share of the schedule's: 0 changes nothing.
        keep: 'left', 'right', 'top', 'bottom', or [batch or 1, height, width] True where given.
        resamples: passes of RePaint.
        classifier: run of a noisy classifier, whose features tell domains apart (EGSDE).
        realistic, faithful: weights of EGSDE's energies.
        factor: of the low-pass filter of EGSDE, and of super-resolution.
        noise: standard deviation allowed to the averages of super-resolution.

    Raises:
        ValueError: an unknown method, or settings outside their range.
    """

    method: str = "sdedit"
    strength: float = 0.5
    keep: str | np.ndarray = "left"
    resamples: int = 5
    classifier: str | None = None
    realistic: float = 500.0
    faithful: float = 2.0
    factor: int = 2
    noise: float = 0.05

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method}: give one of {', '.join(METHODS)}.")
        if not 0.0 < self.strength <= 1.0 or self.resamples < 1 or self.factor < 1:
            raise ValueError(
                f"edit: needs 0 < strength <= 1 ({self.strength}), resamples >= 1 "
                f"({self.resamples}) and factor >= 1 ({self.factor})."
            )
        if self.method == "egsde" and self.classifier is None:
            raise ValueError("edit: method=egsde needs classifier=RUN, a noisy classifier.")

    def kept(self, shape: tuple[int, int]) -> Tensor:
        """True where a pixel is given, [batch or 1, 1, height, width]."""
        if not isinstance(self.keep, str):
            mask = torch.from_numpy(np.asarray(self.keep, dtype=bool))
            if mask.shape[-2:] != shape:
                raise ValueError(f"keep: {list(mask.shape)} is no mask of images {list(shape)}.")
            return mask.reshape(-1, 1, *shape)
        if self.keep not in SIDES:
            raise ValueError(f"keep={self.keep}: give one of {', '.join(SIDES)}, or a mask.")
        mask = torch.zeros(1, 1, *shape, dtype=torch.bool)
        height, width = (s // 2 for s in shape)
        rows = {"top": slice(height), "bottom": slice(height, None)}.get(self.keep, slice(None))
        columns = {"left": slice(width), "right": slice(width, None)}.get(self.keep, slice(None))
        mask[..., rows, columns] = True
        return mask


def edited(
    model: Model[Any],
    pictures: Sequence[Picture],
    edit: Edit,
    *,
    solver: str | Solver = "auto",
    grid: Any = "auto",
    steps: int | None = None,
    seed: int = 0,
    denoise: Denoise | None = None,
    batch: int = 64,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    **request: Any,
) -> list[Picture | Invalid]:
    """The edited form of every picture; 'superres' takes pictures ``factor`` times smaller.

    Args:
        denoise: a guided form of the model's. Others as in :meth:`shared.models.Model.generate`.

    Raises:
        ValueError: a model of something else, pictures of another size, impossible settings.
    """
    domain, place = model.domain, find_device(device)
    if not isinstance(domain, Images):
        raise ValueError("edit: this model makes no images.")
    if domain.autoencoder is not None and edit.method in ("inpaint", "superres"):
        raise ValueError(
            f"edit: method={edit.method} works on pixels, this model on latents; choose sdedit."
        )
    small = edit.factor if edit.method == "superres" else 1
    pixels = _encoded(domain, pictures, small)
    method, times, calls = model.chosen(solver, grid, steps)
    base = denoise or model.prepared(method, place)
    out: list[Picture | Invalid] = []
    for first in range(0, len(pixels), batch):
        rows = pixels[first : first + batch].to(place)
        indices = list(range(first, first + len(rows)))
        way, guided = _prepared(model, edit, method, base, rows, Draws(seed, indices))
        points = time_grid(model.denoiser.process, way, times, calls)
        job = Job(guided, model.denoiser.process, domain, way, points, seed, request, place)
        out += job.items(indices)[0]
        if progress is not None:
            progress(len(out), len(pixels))
    return out


def _encoded(domain: Images, pictures: Sequence[Picture], small: int) -> Tensor:
    channels, height, width = domain.picture_shape
    wanted = (height // small, width // small)
    for number, picture in enumerate(pictures):
        colours = 1 if picture.ndim == 2 else picture.shape[-1]
        if picture.shape[:2] != wanted or colours != channels:
            raise ValueError(
                f"edit: picture {number} is {list(picture.shape)}; the model needs "
                f"{list(wanted)} with {channels} channels."
            )
    return domain.encode(np.stack(list(pictures)))


def _prepared(
    model: Model[Any], edit: Edit, solver: Solver, base: Denoise, rows: Tensor, draws: Draws
) -> tuple[Solver, Denoise]:
    """The solver and the denoiser that edit one batch."""
    process = model.denoiser.process
    source: State = {"x": rows}
    if edit.method == "inpaint":
        keep = edit.kept((rows.shape[2], rows.shape[3])).expand(-1, rows.shape[1], -1, -1)
        return RePaint(solver, Known(source, {"x": keep}), 1, edit.resamples), base
    if edit.method == "superres":
        # the average of factor^2 pixels has so much less variance than one of them
        noise = GaussianNoise(
            edit.noise, lambda alpha, sigma: prior_spread(1.0)(alpha, sigma) / edit.factor**2
        )

        def average(x: State) -> Tensor:
            return F.avg_pool2d(x["x"], edit.factor)

        energy = Measurement(process, average, "given", noise)
        guided = Guided(base, process, [Term(energy, at="estimate")])
        return solver, _told(guided, {"given": rows})
    start = process.lead.t_min + edit.strength * (process.lead.t_max - process.lead.t_min)
    way = SDEdit(solver, source, start)
    if edit.method == "sdedit":
        return way, base
    features = load_classifier(str(edit.classifier), process).to(rows.device).features
    noise_of_source = draws.normal("egsde", 0, rows)
    told = Source(process, "x", "source", "source_noise")
    energies = [
        Term(Realistic(features, told), edit.realistic),
        Term(Faithful(low_pass(edit.factor), told), edit.faithful),
    ]
    guided = Guided(base, process, energies)
    return way, _told(guided, {"source": rows, "source_noise": noise_of_source})


def _told(guided: Denoise, more: Condition) -> Denoise:
    """``guided`` with conditions of its own."""
    return lambda x, t, mask=None, cond=None: guided(x, t, mask, {**(cond or {}), **more})


# -- pictures ---------------------------------------------------------------------------------


def trajectory(model: Model[Any], n: int, *, every: int = 1, **settings: Any) -> np.ndarray:
    """The estimates of x_0 along the way of ``n`` samples, uint8 [rows, n, height, width(, 3)],
    one row for every ``every``-th denoiser call and the result last. ``settings`` as for
    :meth:`shared.models.Model.generate`, in one batch."""
    seen: list[np.ndarray] = []
    domain = model.domain

    def watch(x: State, t: Any, mask: Any = None, cond: Any = None) -> Any:
        predictions = model.denoiser(x, t, mask, cond)
        clean = {"x": predictions["x"].x0.cpu()}
        seen.append(np.stack([np.asarray(item) for item in domain.decode(clean, None)]))
        return predictions

    items = model.sample(n, denoise=watch, batch=n, **settings)
    return np.stack([*seen[::every], np.stack([np.asarray(item) for item in items])])


def sheet(rows: Sequence[np.ndarray]) -> bytes:
    """Rows of tiles [n, height, width(, 3)] as one PNG."""
    tiles = np.concatenate(list(rows))
    return files.png(tiles, columns=len(rows[0]), zoom=max(1, 40 // tiles.shape[1]))


def _shape(path: Path, given: Any) -> tuple[int, int]:
    """Height and width of the images at ``path``, as given or as a sample folder tells."""
    if given is None and (path / "settings.json").exists():
        settings = json.loads((path / "settings.json").read_text(encoding="utf-8"))
        given = settings["statistics"]["shape"][1:]
    if given is None:
        raise ConfigurationError("picture: give shape=[HEIGHT,WIDTH] of the images in path.")
    height, width = given
    return int(height), int(width)


# -- the verbs --------------------------------------------------------------------------------


def edit(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """``imagediff edit``: images in, edited images and a picture of both out."""
    from shared.models import guided

    model = load(config.run, config.checkpoint)
    program.check_domain(model.checkpoint.config["domain"])
    folder = Path(config.out or "edited")
    settings = plain(config.edit)
    if Path(str(settings["keep"])).is_file():
        settings["keep"] = np.load(settings["keep"], allow_pickle=False)
    how = Edit(**settings)
    small = how.factor if how.method == "superres" else 1
    if not isinstance(model.domain, Images):
        raise ConfigurationError("edit: this model makes no images.")
    height, width = (s // small for s in model.domain.picture_shape[1:])
    found = list(files.read(Path(config.path), (height, width)))[: config.n]
    pictures = [p for p in found if not isinstance(p, Invalid)]
    if not pictures:
        reason = found[0].reason if found and isinstance(found[0], Invalid) else "nothing in it"
        raise ConfigurationError(f"{config.path}: no image of {height} x {width} ({reason}).")
    denoise = None
    if config.guidance:
        denoise = guided(config.guidance, model.denoiser, model.domain)
    items = edited(
        model,
        pictures,
        how,
        solver=config.solver,
        grid=config.grid,
        steps=config.steps,
        seed=config.seed,
        denoise=denoise,
        batch=config.batch,
        device=config.device,
        progress=progress,
        **plain(config.request),
    )
    good = [item for item in items if not isinstance(item, Invalid)]
    folder.mkdir(parents=True, exist_ok=True)
    model.domain.write(folder / "edited.npz", good)
    zoomed = [p.repeat(small, 0).repeat(small, 1) for p in pictures]
    if len(good) == len(pictures):
        (folder / "edited.png").write_bytes(sheet([np.stack(zoomed[:20]), np.stack(good[:20])]))
    lines = [f"{len(good)} of {len(found)} edited: {folder / 'edited.npz'}, edited.png"]
    return Outcome(lines, folder, len(good) == len(found))


def picture(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """``imagediff picture``: how samples come about, or a grid of given images, as a PNG."""
    file = Path(config.out or "picture.png")
    if file.suffix != ".png":
        file = file / "picture.png"
    if config.path is not None:
        path = Path(config.path)
        inside, shape = path / "samples.npy", _shape(path, config.shape)
        images = files.read(inside if inside.exists() else path, shape)
        tiles = [p for p in images if not isinstance(p, Invalid)][: config.n]
        if not tiles:
            raise ConfigurationError(f"{path}: no image of {shape[0]} x {shape[1]} in it.")
        data = files.png(np.stack(tiles), zoom=max(1, 40 // shape[0]))
    elif config.run is not None:
        model = load(config.run, config.checkpoint)
        program.check_domain(model.checkpoint.config["domain"])
        options = {key: config[key] for key in ("solver", "grid", "steps", "every", "seed")}
        data = sheet(list(trajectory(model, config.n, **options, **plain(config.request))))
    else:
        raise ConfigurationError("picture: give run=RUN, or path=FILE of images.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return Outcome((f"picture: {file}",), file)
