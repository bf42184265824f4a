"""A run: one folder with everything about one training.

| in the folder | what |
|---|---|
| config.yaml | the resolved configuration, with the seed that was drawn if none was given |
| versions.json | Python, packages, platform |
| log.txt | one line per event |
| metrics.csv | step, name, value; one row per number, appended |
| checkpoints/ | last, best, and one every k steps |
| samples/, report.html | written by sampling and by reports |

Running again in the same folder goes on from the last checkpoint.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from shared.checkpoints import MANIFEST, versions, write_atomically

GROWING = ("trainer.max_steps",)
FREE = (
    "trainer.*_every",
    "trainer.accelerator",
    "trainer.compile",
    "trainer.devices",
    "trainer.nodes",
    "trainer.progress",
    "trainer.strategy",
    "trainer.workers",
    "trainer.validation_batches",
    "logger*",
    "launcher*",
    "hydra*",
    "out",
)
METRICS_HEADER = "step,name,value\n"
_pretrained: list[Path] = []


class RunConflict(ValueError):
    """The folder belongs to a run with other settings, or another process writes it."""


def register_pretrained(folder: Path) -> None:
    """Add a folder whose sub-folders are checkpoints that :meth:`Run.open` finds by name."""
    if folder not in _pretrained:
        _pretrained.append(folder)


def pretrained() -> dict[str, Path]:
    """Name -> checkpoint folder of everything registered."""
    found = (path.parent for root in _pretrained for path in sorted(root.glob(f"*/{MANIFEST}")))
    return {folder.name: folder for folder in found}


def process_rank() -> int:
    """Number of this process in a distributed job, as torchrun, Slurm and Lightning tell it."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys -> dotted keys; lists and empty mappings stay values."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out.update(flat(value, f"{name}."))
        else:
            out[name] = list(value) if isinstance(value, tuple) else value
    return out


class Run:
    """A run folder. :meth:`create` opens it for writing and holds its lock until :meth:`close`;
    :meth:`open` reads."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], lock: FileLock | None = None
    ) -> None:
        self.folder = folder
        self.config = dict(config)
        self._lock = lock

    @classmethod
    def create(cls, folder: Path, config: Mapping[str, Any]) -> Run:
        """Make a run, or reopen the one in ``folder`` if the settings agree or nothing was trained
        yet. ``config`` holds plain values; a ``seed`` of None is drawn (or taken from the run that
        is there).

        In a distributed job only rank zero writes; the others get the folder and their config.

        Raises:
            RunConflict: another process writes the folder, or settings that matter differ.
        """
        folder = Path(folder)
        if process_rank() != 0:
            return cls(folder, config)
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder, config, _locked(folder))
        try:
            run._settle(dict(config))
        except BaseException:
            run.close()
            raise
        return run

    def _settle(self, config: dict[str, Any]) -> None:
        file = self.folder / "config.yaml"
        known = _read_config(file) if file.exists() else None
        if config.get("seed") is None:
            config["seed"] = secrets.randbelow(2**31) if known is None else known.get("seed")
        if known is not None and self._started:
            _check_agreement(self.folder, known, config)
        self.config = config
        for name in ("checkpoints", "samples"):
            (self.folder / name).mkdir(exist_ok=True)
        write_atomically(file, OmegaConf.to_yaml(OmegaConf.create(config)).encode())
        self._record_versions()
        self.log(f"{'started' if known is None else 'reopened'}, seed {config['seed']}")

    @property
    def _started(self) -> bool:
        """Whether a checkpoint is there; before the first one a mistake can still be mended."""
        return any(self.checkpoints.glob(f"*/{MANIFEST}"))

    def _record_versions(self) -> None:
        file = self.folder / "versions.json"
        now = {**versions(), "platform": platform.platform()}
        if file.exists() and json.loads(file.read_text()) != now:
            self.log(f"versions changed, before: {file.read_text()}")
        write_atomically(file, json.dumps(now, indent=1).encode())

    @classmethod
    def open(cls, name: str | Path) -> Run:
        """Find a run by its folder, a checkpoint folder, or a pretrained model by its name.

        Raises:
            FileNotFoundError: none of these; lists the pretrained names.
            ValueError: a file.
        """
        folder = Path(name)
        if not any((folder / name).exists() for name in ("config.yaml", MANIFEST)):
            folder = pretrained().get(str(name), folder)
        if (folder / "config.yaml").exists():
            return cls(folder, _read_config(folder / "config.yaml"))
        if (folder / MANIFEST).exists():
            return cls(folder, json.loads((folder / MANIFEST).read_text()).get("config", {}))
        if folder.is_file():
            raise ValueError(
                f"'{name}' is a file, not a run folder; the `convert` command turns the "
                "checkpoint of another program into one."
            )
        raise FileNotFoundError(
            f"'{name}' is neither a run folder nor a pretrained model; "
            f"pretrained: {', '.join(sorted(pretrained())) or 'none'}."
        )

    def close(self) -> None:
        """Release the folder for other processes."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- content ------------------------------------------------------------------------------

    @property
    def writes(self) -> bool:
        """Whether this process may write the folder."""
        return self._lock is not None

    @property
    def seed(self) -> int:
        return int(self.config.get("seed") or 0)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.folder / "samples"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def checkpoint(self, which: str | None = None) -> Path:
        """Folder of a checkpoint: 'last', 'best', 'step-NNN', or None for the best there is.

        Raises:
            FileNotFoundError: not there; names those that are.
        """
        if which is None and (self.folder / MANIFEST).exists():
            return self.folder
        there = [path.parent.name for path in sorted(self.checkpoints.glob(f"*/{MANIFEST}"))]
        for name in ("best", "last") if which is None else (which,):
            if name in there:
                return self.checkpoints / name
        raise FileNotFoundError(
            f"run {self.folder} has no checkpoint{f' {which}' if which else ''}; "
            f"there: {', '.join(there) or 'none'}."
        )

    def log(self, text: str) -> None:
        """Append one line to log.txt."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{now} {' '.join(text.split())}\n")

    def write_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append numbers to metrics.csv."""
        file = self.folder / "metrics.csv"
        rows = _csv([(step, name, float(value)) for name, value in values.items()])
        with file.open("a", newline="", encoding="utf-8") as handle:
            handle.write(rows if handle.tell() else METRICS_HEADER + rows)

    def metrics(self) -> list[tuple[int, str, float]]:
        """Rows (step, name, value) of metrics.csv in order; a row that a crash cut off is left
        out."""
        file = self.folder / "metrics.csv"
        if not file.exists():
            return []
        whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
        rows = list(csv.reader(io.StringIO(whole)))[1:]
        return [(int(step), name, float(value)) for step, name, value in rows]

    def rewind(self, step: int) -> None:
        """Drop metrics after ``step``: training goes on from an earlier checkpoint."""
        text = METRICS_HEADER + _csv([row for row in self.metrics() if row[0] <= step])
        write_atomically(self.folder / "metrics.csv", text.encode())


def _csv(rows: Iterable[tuple[int, str, float]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """While this lasts no other process that asks may write the folder, which is made.

    Raises:
        RunConflict: another process writes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder)
    try:
        yield
    finally:
        lock.release()


def _locked(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunConflict(
            f"{folder} is being written by another process; wait for it, or choose another folder."
        ) from None
    return lock


def _read_config(file: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    return {str(k): v for k, v in content.items()} if isinstance(content, dict) else {}


def _check_agreement(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, now = flat(old), flat(new)
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _may_change(key, before.get(key), now.get(key))
    ]
    if differing:
        raise RunConflict(
            f"run {folder} was made with other settings: "
            + "; ".join(
                f"{key} is {_show(before, key)} there, now {_show(now, key)}" for key in differing
            )
            + ". Give the old values to go on with it, or choose another folder."
        )


def _may_change(key: str, before: Any, now: Any) -> bool:
    if key in GROWING:
        return _is_number(before) and _is_number(now) and now > before
    return any(fnmatch(key, pattern) for pattern in FREE)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _show(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "not set"
