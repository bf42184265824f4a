"""Progressive distillation (Salimans & Ho 2022) of an image model, against its teacher by DDIM.

    python benchmarks/distillation.py [--run digits] [--first 16] [--steps 4] [--updates 600]
        [--teacher 50] [--n 1797] [--seed 0] [--small] [--out FOLDER]

FID as in benchmarks/images.py.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import markdown, publish, weights
from images import Bench

from shared.batches import Batches
from shared.distillation import distilled
from shared.models import load
from shared.solvers import DDIM, PowerTimes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--run", default="digits", help="run folder or pretrained name")
    parser.add_argument("--first", type=int, default=16, help="calls of the first teacher")
    parser.add_argument("--steps", type=int, default=4, help="calls of the last student")
    parser.add_argument("--updates", type=int, default=600, help="per halving")
    parser.add_argument("--teacher", type=int, default=50, help="calls to compare with")
    parser.add_argument("--n", type=int, default=1797)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.small:
        args.first, args.updates, args.teacher, args.n = 8, 2, 8, 40
    model = load(args.run)
    bench, denoiser = Bench(model, args), model.denoiser
    records = model.domain.datasets()[0]
    batches = Batches(model.domain, denoiser.process, records, 128, args.seed)
    start, grid = time.process_time(), PowerTimes()
    student = distilled(denoiser, batches, grid, args.steps, args.first, args.updates)
    seconds = time.process_time() - start
    rows = [
        {"model": name, "calls": calls, "n": args.n}
        | {"fid": bench.fid(DDIM(), grid, calls, denoise)[0].as_json()}
        for name, calls, denoise in (
            ("teacher", args.steps, None),
            ("teacher", args.teacher, None),
            ("distilled", args.steps, student),
        )
    ]
    result = {
        "run": args.run, "weights": weights(denoiser), "features": bench.features.name,
        "first": args.first, "updates": args.updates, "seed": args.seed,
        "processor_seconds": seconds, "rows": rows,
        "distilled_over_teacher": rows[2]["fid"]["value"] / rows[1]["fid"]["value"],
    }  # fmt: skip
    lines = [(r["model"], r["calls"], r["n"], f"{r['fid']['value']:.3g}") for r in rows]
    text = markdown(("model", "calls (DDIM)", "n", "FID"), lines)
    publish(args.out, "distillation", result, text)


if __name__ == "__main__":
    main()
