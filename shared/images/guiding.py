"""Guidance of images as configurations name it: by a noisy classifier, and away from the dense
middle of a class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.guidance import Classifier, Guided, Term
from shared.guidance.energies import Energy, Time, condition
from shared.images.classifier import ImageClassifier, load_classifier
from shared.images.domain import Images
from shared.predictions import Condition, Denoise
from shared.process import Process, State


def by_classifier(
    denoise: Denoise,
    process: Process,
    run: str,
    scale: float = 1.0,
    label: int | str = "label",
    clip: float | None = None,
) -> Guided:
    """Classifier guidance (Dhariwal & Nichol 2021).

    Args:
        run: of a classifier of noisy images. label: the class, or the condition that tells it.
        scale, clip: of the gradient, see :class:`shared.guidance.Term`.
    """
    energy = Classifier(load_classifier(run, process).classify, label)
    return Guided(denoise, process, [Term(energy, scale, clip=clip)])


@dataclass(frozen=True, eq=False)
class Typical(Energy):
    """Cosine similarity of the features of x_t to the mean features of its class at that time: low
    where the samples of a class are rare (after Sehwag et al. 2022, who contrast the similarities
    to all classes; the classifier's term does that here).

    Args:
        centres: [classes, times, k] mean features of clean data perturbed to ``times``.
    """

    classifier: ImageClassifier
    centres: Tensor
    times: Tensor
    name: str = "typical"

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        features = self.classifier.features(x["x"], t).mean((2, 3))
        label = condition(cond, "label", self.name).clamp(max=len(self.centres) - 1)
        now = torch.as_tensor(t, dtype=torch.float64).expand(len(features)).to(self.times)
        nearest = (now[:, None] - self.times).abs().argmin(1)
        centre = self.centres.to(features)[label, nearest]
        return F.cosine_similarity(features, centre, dim=1)


def low_density(
    denoise: Denoise,
    process: Process,
    domain: Images,
    run: str,
    scale: float = 1.0,
    stay: float = 1.0,
    images: int = 512,
) -> Guided:
    """Samples from the rare parts of their class: ``scale`` pushes them from its middle, ``stay``
    is the classifier's guidance that keeps them in it. The middle is estimated on ``images``
    training images, so the data must be at hand."""
    classifier = load_classifier(run, process)
    times = torch.linspace(process.lead.t_min, process.lead.t_max, 17, dtype=torch.float64)
    typical = Typical(classifier, _centres(classifier, domain, times, images), times)
    own = Classifier(classifier.classify, "label")
    return Guided(denoise, process, [Term(typical, scale), Term(own, stay)])


@torch.no_grad()
def _centres(classifier: ImageClassifier, domain: Images, times: Tensor, images: int) -> Tensor:
    pixels, labels = domain.training(images)
    white = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    out = []
    for t in times.tolist():
        x = classifier.process.perturb({"x": pixels}, t, {"x": white})["x"]
        features = classifier.features(x, t).mean((2, 3))
        means = [features[labels == k].mean(0) for k in range(domain.classes)]
        out.append(torch.stack(means))
    return torch.stack(out, 1)
