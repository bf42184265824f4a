"""What every benchmark writes down: where it ran, its rows as JSON, and a table made of them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from shared.checkpoints import fingerprint, versions


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


def weights(model: Any) -> str:
    """Eight hexadecimal digits that tell the weights of a denoiser from others."""
    return fingerprint(model)[:8]


class Rows:
    """The rows of a table, kept in ``folder/name.json`` as they come: the same command goes on
    where it stopped, and several processes may fill one table.

    Args:
        subject: what all rows share (model, weights, data); rows of another subject are dropped.
        key: what a row is ordered by.
        table: makes the markdown of all rows.
        current: which rows still hold; others are dropped too.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        subject: Mapping[str, Any],
        key: Callable[[Mapping[str, Any]], Any],
        table: Callable[[list[dict[str, Any]]], str],
        current: Callable[[Mapping[str, Any]], bool] = lambda row: True,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.subject = folder, name, dict(subject)
        self.key, self.table, self.current = key, table, current

    def read(self) -> list[dict[str, Any]]:
        file = self.folder / f"{self.name}.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        same = all(content.get(key) == value for key, value in self.subject.items())
        return [row for row in content["rows"] if self.current(row)] if content and same else []

    def has(self, **settings: Any) -> bool:
        return any(settings.items() <= row.items() for row in self.read())

    def add(self, row: Mapping[str, Any], **facts: Any) -> None:
        """Keep a row and write the files; ``facts`` go beside the rows."""
        with FileLock(self.folder / f".{self.name}.lock"):
            rows = sorted([*self.read(), dict(row)], key=self.key)
            result = {**self.subject, **facts, "rows": rows}
            publish(self.folder, self.name, result, self.table(rows))
