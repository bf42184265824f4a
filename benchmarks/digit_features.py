"""Train the network whose features judge generated digits, and write its weights.

python benchmarks/digit_features.py [--steps 1500] [--seed 0] [--out FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save
from torch.nn import functional as F

from shared.images.domain import Images
from shared.images.features import DIGITS, DigitNetwork


def train(steps: int, seed: int) -> tuple[DigitNetwork, float]:
    """The network, and its accuracy on the validation split."""
    training, validation = Images(drop_label=0.0).datasets()
    (x, y), held = training[:], validation[:]
    torch.manual_seed(seed)
    network = DigitNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        shift = torch.randint(-1, 2, (2,)).tolist()
        seen = F.pad(x[rows], (1, 1, 1, 1), value=-1.0)
        seen = seen[:, :, 1 + shift[0] : 9 + shift[0], 1 + shift[1] : 9 + shift[1]]
        seen = seen + 0.1 * torch.rand(128, 1, 1, 1) * torch.randn_like(seen)
        loss = F.cross_entropy(network(seen)[1], y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    with torch.no_grad():
        network.deviation.copy_(network(x)[0].var(0).mean().sqrt())
        right = network(held[0])[1].argmax(1) == held[1]
    return network, float(right.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DIGITS)
    args = parser.parse_args()
    network, accuracy = train(args.steps, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(save(network.state_dict()))
    print(f"{args.out}: accuracy on 180 held-out digits {accuracy:.3f}, seed {args.seed}")


if __name__ == "__main__":
    main()
