"""Distances between clouds, and what they say about a set of completions.

Functions of two tensors [batch, n, 3] and [batch, m, 3] give one number per pair, [batch];
coordinates that are not finite give NaN. The published tables mix conventions: every function
says which it follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pointdiff.assignment import assign
from pointdiff.clouds import Cloud
from pointdiff.ops import farthest_points, knn, take
from shared.domains import Invalid
from shared.metrics import Estimate, mean, proportion

FORMS = ("l2", "l2_half", "l1", "l1_half")


def chamfer(a: Tensor, b: Tensor, form: str = "l2") -> Tensor:
    """Chamfer distance [batch], differentiable.

    Args:
        form: 'l2': mean of min |p-q|^2 over a, plus that over b (CD_t of PDR, CD-l2 of the MVP
            tables); 'l1': the same with |p-q|; '_half': half of it ('l1_half' is CD_p of PDR).

    Raises:
        ValueError: another form.
    """
    if form not in FORMS:
        raise ValueError(f"chamfer: form={form!r}; choose {', '.join(FORMS)}.")
    sides = [_nearest(x, y)[0] for x, y in ((a, b), (b, a))]
    if form.startswith("l1"):
        sides = [_root(side) for side in sides]
    total = sides[0].mean(1) + sides[1].mean(1)
    return total / 2 if form.endswith("half") else total


def _nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of ``a`` to the nearest of ``b``, and which, [batch, n]; NaN where
    a cloud is not finite."""
    squared, index = knn(a, b)
    finite = a.isfinite().flatten(1).all(1) & b.isfinite().flatten(1).all(1)
    return torch.where(finite[:, None], squared[..., 0], torch.nan), index[..., 0]


def _root(squared: Tensor) -> Tensor:
    """The square root with slope 0 at 0; NaN stays NaN."""
    positive = torch.where(squared == 0, 1.0, squared)
    return torch.where(squared == 0, 0.0, positive.sqrt())


def density_aware_chamfer(a: Tensor, b: Tensor, alpha: float = 1000.0) -> Tensor:
    """DCD [batch] of Wu et al. 2021 (Eq. 5), between 0 and 1: half the sum over both sides of the
    mean of 1 - exp(-alpha |p-q|^2) / n_q, where n_q points share the nearest neighbour q.
    Distances are squared as in the published code; differentiable in the distances."""
    return (_crowding(a, b, alpha) + _crowding(b, a, alpha)) / 2


def _crowding(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    squared, index = _nearest(a, b)
    count = torch.zeros(b.shape[:2], dtype=a.dtype, device=a.device)
    count.scatter_add_(1, index, torch.ones_like(squared))
    return (1 - torch.exp(-alpha * squared) / count.gather(1, index)).mean(1)


def f_score(
    prediction: Tensor, truth: Tensor, threshold: float = 1e-4, squared: bool = True
) -> Tensor:
    """Harmonic mean [batch] of precision and recall (Tatarchenko et al. 2019); 0 where both are 0.
    A point counts if its nearest distance is below ``threshold``, which is on |p-q|^2 if
    ``squared`` (MVP and PDR: 1e-4) and else on |p-q| (Tatarchenko: 1 % of the size)."""
    bound = threshold if squared else threshold**2
    precision, recall = (
        _share(_nearest(x, y)[0], bound) for x, y in ((prediction, truth), (truth, prediction))
    )
    total = precision + recall
    return torch.where(total == 0, 0.0, 2 * precision * recall / torch.where(total == 0, 1, total))


def _share(squared: Tensor, bound: float) -> Tensor:
    share = (squared < bound).to(squared.dtype).mean(1)
    return torch.where(squared.isfinite().all(1), share, torch.nan)


def hausdorff(a: Tensor, b: Tensor) -> Tensor:
    """Unidirectional: max over a of min over b of |p-q|, [batch]. From a partial cloud to its
    completion it says how faithful the completion is (UHD, Wu et al. 2020)."""
    return _root(_nearest(a, b)[0]).amax(1)


def earth_mover(a: Tensor, b: Tensor, sweeps: int | None = None, squared: bool = False) -> Tensor:
    """Mean |p-q| (or |p-q|^2) of the best one-to-one assignment, float64 [batch].

    Args:
        sweeps: None: exact, O(n^3); else the approximation of
            :func:`pointdiff.assignment.assign`, never below the exact value; benchmarks/points.py
            measures by how much it is above.

    Raises:
        ValueError: clouds of different size.
    """
    if a.shape != b.shape:
        raise ValueError(f"earth_mover: needs equal sizes, not {a.shape[1]} and {b.shape[1]}.")
    rows = zip(a.detach().cpu().double(), b.detach().cpu().double(), strict=True)
    return torch.tensor([_moved(x, y, sweeps, squared) for x, y in rows], dtype=torch.float64)


def _moved(a: Tensor, b: Tensor, sweeps: int | None, squared: bool) -> float:
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("nan")
    away = np.linalg.norm(a - b[assign(a.numpy(), b.numpy(), sweeps, squared)], axis=1)
    return float((away**2 if squared else away).mean())


# -- several completions of one scan ----------------------------------------------------------


def total_mutual_difference(samples: Tensor) -> float:
    """TMD of k completions [k, n, 3] of one scan (Wu et al. 2020): the sum over completions of
    their mean Chamfer ('l2') distance to the others; the larger, the more diverse.

    Raises:
        ValueError: fewer than two.
    """
    k = len(samples)
    if k < 2:
        raise ValueError(f"total_mutual_difference: needs two completions or more, not {k}.")
    first, second = torch.triu_indices(k, k, 1)
    return float(2 * chamfer(samples[first], samples[second]).sum() / (k - 1))


def minimal_matching_distance(samples: Tensor, reference: Tensor) -> Tensor:
    """MMD terms [references]: Chamfer ('l2') distance of every reference [r, n, 3] to the nearest
    of the samples [s, m, 3] (Achlioptas et al. 2018); their mean is the MMD."""
    terms = [chamfer(samples, truth.expand(len(samples), -1, -1)).amin() for truth in reference]
    return torch.stack(terms)


# -- a set of completions ---------------------------------------------------------------------


def evaluate(
    items: Sequence[Cloud | Invalid],
    reference: Sequence[Cloud],
    *,
    threshold: float = 1e-4,
    sweeps: int | None = None,
    assigned: int = 2048,
) -> dict[str, Estimate]:
    """Means over pairs (item i, reference i) in the units of the clouds: 'chamfer_l2',
    'chamfer_l1_half', 'density_aware_chamfer', 'f1' (squared ``threshold``), and 'emd', where
    clouds of other sizes, or with more points than ``assigned``, are thinned to the farthest N
    first ('emd_N'); 'valid': share of finite items.

    Raises:
        ValueError: as many references as items are needed.
    """
    if len(items) != len(reference):
        raise ValueError(f"evaluate: {len(items)} clouds, {len(reference)} references.")
    pairs = [
        (_tensor(item), _tensor(truth))
        for item, truth in zip(items, reference, strict=True)
        if not isinstance(item, Invalid) and np.isfinite(item).all()
    ]
    found = {
        "chamfer_l2": [float(chamfer(a, b)) for a, b in pairs],
        "chamfer_l1_half": [float(chamfer(a, b, "l1_half")) for a, b in pairs],
        "density_aware_chamfer": [float(density_aware_chamfer(a, b)) for a, b in pairs],
        "f1": [float(f_score(a, b, threshold)) for a, b in pairs],
    }
    sizes = {cloud.shape[1] for pair in pairs for cloud in pair}
    if pairs and all(a.shape == b.shape for a, b in pairs) and max(sizes) <= assigned:
        found["emd"] = [float(earth_mover(a, b, sweeps)) for a, b in pairs]
    elif pairs:
        n = min(*sizes, assigned)
        thin = ((_thinned(a, n), _thinned(b, n)) for a, b in pairs)
        found[f"emd_{n}"] = [float(earth_mover(a, b, sweeps)) for a, b in thin]
    out = {name: mean(values) for name, values in found.items()}
    return {"valid": proportion(len(pairs), len(items)), **out}


def _thinned(cloud: Tensor, n: int) -> Tensor:
    return cloud if cloud.shape[1] == n else take(cloud, farthest_points(cloud, n))


def _tensor(cloud: Cloud) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(cloud, dtype=np.float32))[None]
