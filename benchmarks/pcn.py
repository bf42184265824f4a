"""The baseline without diffusion: an encoder and a decoder like PCN (Yuan et al. 2018).

A PointNet in two stages makes a vector of the scan, fully connected layers make coarse points of
it, and a folding network places a small grid around each. Trained by Chamfer distances.
"""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pointdiff.domain import Completion
from pointdiff.metrics import chamfer
from pointdiff.pdr.layers import GlobalFeature
from shared.randomness import stream


class EncoderDecoder(nn.Module):
    """A scan [b, m, 4] -> coarse points [b, coarse, 3] and all points [b, coarse * grid^2, 3]."""

    def __init__(
        self, coarse: int = 512, grid: int = 2, width: int = 512, spread: float = 0.05
    ) -> None:
        super().__init__()
        self.encoder = GlobalFeature((4, 64, 128), (256, width))
        self.decoder = nn.Sequential(
            nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
            nn.Linear(512, 3 * coarse),
        )  # fmt: skip
        self.place = nn.Linear(5, 128)
        self.whole = nn.Linear(width, 128)
        self.fold = nn.Sequential(nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 3))
        side = torch.linspace(-spread, spread, grid)
        self.register_buffer("grid", torch.cartesian_prod(side, side))

    def forward(self, partial: Tensor) -> tuple[Tensor, Tensor]:
        vector = self.encoder(partial.transpose(1, 2))
        coarse = self.decoder(vector).unflatten(-1, (-1, 3))
        centres = coarse[:, :, None].expand(-1, -1, len(self.grid), -1)
        spots = self.grid.expand(*centres.shape[:3], 2)
        moved = self.place(torch.cat([centres, spots], -1)) + self.whole(vector)[:, None, None]
        return coarse, (centres + self.fold(moved)).flatten(1, 2)


def initial() -> EncoderDecoder:
    """The network before training."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return EncoderDecoder()


def train(
    network: EncoderDecoder, domain: Completion, seconds: float, spent: float = 0, batch: int = 16
) -> None:
    """Train for so many seconds of processor time; the rate falls over the last 40 %. ``spent``:
    seconds of a training before this one."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    seed, pairs, begun = round(spent), domain.datasets()[0], time.process_time()
    for step in count():
        passed = time.process_time() - begun
        done = passed / seconds
        if done >= 1:
            return
        own = stream(seed, step, "pcn", 0)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(own.integers(2**62)))
            records = [pairs[int(i)] for i in own.integers(len(pairs), size=batch)]
        found = domain.collate(records)
        coarse, fine = network(found.cond["partial"])
        chosen = torch.from_numpy(own.permutation(fine.shape[1])[: domain.points])
        truth = found.state["x"]
        # the published weight of the fine cloud rises during training
        weight = min(1.0, 0.1 + 2 * (spent + passed) / (spent + seconds))
        loss = chamfer(coarse, truth, "l1_half") + weight * chamfer(
            fine[:, chosen], truth, "l1_half"
        )
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (1 - done) / 0.4)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()


def trained(domain: Completion, seconds: float, file: Path | None) -> EncoderDecoder:
    """The network after so many seconds, kept in ``file``. What is found there is taken, and first
    trained for the rest of the time if it had less.

    Raises:
        ValueError: the file's network was trained for longer.
    """
    network, spent = initial(), 0.0
    if file is not None and file.exists():
        network.load_state_dict(load_file(file))
        with safe_open(file, "pt") as found:
            spent = float((found.metadata() or {})["seconds"])
    if spent > seconds:
        raise ValueError(f"{file}: trained for {spent:g} s, more than {seconds:g}.")
    if spent < seconds:
        train(network, domain, seconds - spent, spent)
        if file is not None:
            save_file(network.state_dict(), file, metadata={"seconds": repr(seconds)})
    return network.eval()


@torch.no_grad()
def complete(
    network: EncoderDecoder, domain: Completion, scan: np.ndarray, frame: str | None = None
) -> np.ndarray:
    """The complete cloud [2048, 3] of a scan [n, 3], in its coordinates; see the domain's
    ``frame``."""
    pair = domain.enter(scan, 0, 0, frame)
    _, fine = network(torch.from_numpy(pair.partial)[None])
    return pair.frame.leave(fine[0].numpy())
