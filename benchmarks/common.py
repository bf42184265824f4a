"""What every benchmark writes down: where it ran, its rows as JSON, and a table made of them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shared.checkpoints import versions


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x.partition(":")[2].strip() for x in info.read_text().splitlines()
                 if x.startswith("model name")]  # fmt: skip
        cpu = names[0] if names else cpu
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": dict(versions()), "cpu": cpu, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "accelerator": device,
    }  # fmt: skip


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; numbers with four digits."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def publish(folder: Path, name: str, result: Mapping[str, Any], table: str) -> None:
    """Write ``name``.json and ``name``.md and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), **result}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)
    print(table)
