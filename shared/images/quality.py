"""How close generated images are to data, in a space of features: Frechet and kernel distance,
precision and recall; and the Inception Score."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from shared.images.features import Features
from shared.images.pictures import Pictures
from shared.metrics import Estimate, proportion
from shared.randomness import stream
from shared.resampling import jackknife

KERNEL = 10_000
"""Samples, at most, whose kernels with each other are in memory at once."""


def scores(
    features: Features, pictures: np.ndarray, reference: np.ndarray | Pictures, against: str
) -> dict[str, Estimate]:
    """All of them for uint8 ``pictures`` and ``reference`` [n, height, width(, 3)]. Names tell the
    features and the reference with its size; ``against`` says what the reference is."""
    found, logits = features(pictures)
    truth, _ = features(reference)
    what = f"{features.name}_vs_{against}{len(truth)}"
    some = _some(truth, KERNEL)  # the kernel distance is unbiased, so fewer are only less exact
    kernel = f"kid_{features.name}_vs_{against}{len(some)}"
    out = {
        f"fid_{what}": jackknife(lambda p: frechet_distance(p, truth), found),
        kernel: jackknife(lambda p: kernel_distance(p, some), _some(found, KERNEL)),
        f"precision_{what}": coverage(found, truth),
        f"recall_{what}": coverage(truth, found),
    }
    if logits is not None:
        out[f"inception_score_{features.name}"] = jackknife(inception_score, logits)
    return out


def _some(points: np.ndarray, most: int) -> np.ndarray:
    """``points`` [n, d], or ``most`` of them by chance, always the same."""
    if len(points) <= most:
        return points
    return points[np.sort(stream(0, 0, "images/kernel", 0).permutation(len(points))[:most])]


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of Gaussians fitted to samples [n, d] and
    [m, d] (Dowson & Landau 1982); FID on Inception features (Heusel et al. 2017). It falls with
    more samples: compare at equal n only."""
    gap = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cov_a, cov_b = np.atleast_2d(cov_a), np.atleast_2d(cov_b)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0.0)).sum()
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of samples [n, d] and [m, d] under the kernel
    (x.y / d + 1)^3 (Binkowski et al. 2018, KID), over all samples at once instead of averaged over
    random subsets."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def within(x: np.ndarray) -> float:
        values, n = kernel(x, x), len(x)
        return float((values.sum() - np.trace(values)) / (n * (n - 1)))

    return within(a) + within(b) - 2.0 * float(kernel(a, b).mean())


def inception_score(logits: np.ndarray) -> float:
    """exp E KL(p(class | image) || p(class)) of logits [n, c], over all images at once (Salimans
    et al. 2016)."""
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    p = np.exp(log_p)
    marginal = np.log(p.mean(0).clip(min=1e-300))
    return float(np.exp((p * (log_p - marginal)).sum(1).mean()))


def coverage(points: np.ndarray, support: np.ndarray, k: int = 3) -> Estimate:
    """Share of ``points`` [n, d] within the distance of the ``k``-th neighbour of some sample of
    ``support`` [m, d]: precision of generated points in real support, recall the other way round
    (Kynkaanniemi et al. 2019)."""
    if len(support) <= k:
        return proportion(0, 0)
    radius = np.concatenate(
        # the nearest of a point in its own set is itself
        [np.partition(d, k, axis=1)[:, k] for d in _distances(support, support)]
    )
    inside = [np.any(d <= radius, axis=1) for d in _distances(points, support)]
    return proportion(int(np.concatenate(inside).sum()), len(points))


def _distances(a: np.ndarray, b: np.ndarray, rows: int = 1024) -> Iterator[np.ndarray]:
    """Blocks [rows, m] of Euclidean distances."""
    square: Callable[[np.ndarray], np.ndarray] = lambda x: np.square(x).sum(1)  # noqa: E731
    for block in np.array_split(a, max(1, -(-len(a) // rows))):
        d = square(block)[:, None] + square(b)[None] - 2.0 * block @ b.T
        yield np.sqrt(d.clip(min=0.0))
