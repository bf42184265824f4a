"""A classifier of noisy images, for guidance and for features of an edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.denoisers import Denoiser
from shared.guidance.energies import Time
from shared.images.networks import Block
from shared.losses import TimeSampler
from shared.nn.embedding import Sinusoidal, TimeEmbedding
from shared.predictions import Condition
from shared.process import Process, State
from shared.schedules import Schedule

if TYPE_CHECKING:
    from shared.images.domain import Images


class Encoder(nn.Module):
    """[batch, channels, height, width] and time code -> 'features' [batch, k, h, w] of the last
    level and 'logits' [batch, classes]: the downward half of a U-Net, pooled."""

    def __init__(self, channels: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        embedding = 4 * widths[0]
        self.time = TimeEmbedding(64, embedding, Sinusoidal(64, max_period=100.0))
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.levels = nn.ModuleList(Block(a, b, embedding) for a, b in pairs)
        self.leave = nn.Linear(widths[-1], classes)

    def forward(
        self, inputs: State, code: Tensor, mask: Tensor | None, cond: Condition | None
    ) -> State:
        embedding, h = self.time(code), self.enter(inputs["x"])
        for level, block in enumerate(self.levels):
            h = block(F.avg_pool2d(h, 2) if level else h, embedding)
        h = F.silu(h)
        return {"features": h, "logits": self.leave(h.mean((2, 3)))}


class ImageClassifier(Denoiser):
    """p(class | x_t); trains like a denoiser, on the labels that are not hidden."""

    def classify(
        self,
        x: State,
        t: Time,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> Tensor:
        """Logits [batch, classes] of states at time ``t``; ``cond`` is not used: what is wanted
        must not leak into what is predicted."""
        return self.run(x, t)["logits"]

    def features(self, x: Tensor, t: Time) -> Tensor:
        """Features [batch, k, h, w] of images at time ``t``, as EGSDE's energies take them."""
        return self.run({"x": x}, t)["features"]

    def losses(
        self,
        x0: State,
        noise: State,
        t: Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Tensor]:
        """Cross-entropy [batch], zero where the label is hidden."""
        if cond is None or "label" not in cond:
            raise ValueError("a classifier of images learns from labels, which the data lack.")
        logits, label = self.classify(self.process.perturb(x0, t, noise), t), cond["label"]
        known = label < logits.shape[1]
        terms = F.cross_entropy(logits, label.clamp(max=logits.shape[1] - 1), reduction="none")
        return {"class": terms * known}


def image_classifier(
    domain: Images,
    schedule: Schedule,
    widths: Sequence[int] = (32, 64),
    times: TimeSampler | None = None,
) -> ImageClassifier:
    """A classifier for the classes of ``domain``, at the noise levels of ``schedule``.

    Raises:
        ValueError: data without classes.
    """
    if not domain.classes:
        raise ValueError("model: a classifier needs images with classes; these have none.")
    network = Encoder(domain.shape[0], widths, domain.classes)
    return ImageClassifier(network, Process.single(schedule), times=times)


def load_classifier(run: str, process: Process) -> ImageClassifier:
    """The classifier trained in ``run``, for guiding a model of ``process``.

    Raises:
        ValueError: the run holds something else, or a classifier for other noise levels.
    """
    from shared.models import load  # it builds models, this one among them

    model: Any = load(run).denoiser
    if not isinstance(model, ImageClassifier):
        raise ValueError(
            f"{run} holds no classifier of images; train one with experiment=digits_classifier."
        )
    ours, theirs = process.lead, model.process.lead
    t = torch.linspace(max(ours.t_min, theirs.t_min), min(ours.t_max, theirs.t_max), 9).double()
    if not torch.allclose(ours.log_snr(t), theirs.log_snr(t), atol=0.05):
        raise ValueError(
            f"{run} was trained at other noise levels ({type(theirs).__name__}) than the model "
            f"({type(ours).__name__}); train it with the model's schedule."
        )
    return model.requires_grad_(False).eval()
