"""A folder of samples that grows chunk by chunk and survives a kill."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.checkpoints import write_atomically
from shared.domains import Domain, Invalid
from shared.runs import flat
from shared.sampling import STATUSES, Record, Summary

STEMS = ("samples", "molecules")
"""Names of the file with the items."""


class Folder:
    """A folder of samples that grows chunk by chunk and survives a kill.

    ``samples<suffix>`` (or another ``stem``) holds the decoded items, ``manifest.jsonl`` one
    :class:`Record` per sample, ``settings.json`` what made them. Items are written before their
    records, so opening the folder again cuts a torn last line and items without records: what is
    left is consistent, and at most the chunk in flight is lost.

    Raises:
        ValueError: the folder was made with other settings, holds more samples than are asked for,
            or its files were changed.
    """

    def __init__(
        self,
        path: Path,
        domain: Domain[Any],
        settings: Mapping[str, Any],
        stem: str = STEMS[0],
    ) -> None:
        self.path, self.domain, self.stem = path, domain, stem
        path.mkdir(parents=True, exist_ok=True)
        self._check_settings(settings)
        self.records = self._repair()

    @property
    def file(self) -> Path:
        return self.path / f"{self.stem}{self.domain.suffix}"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.jsonl"

    def put(self, records: Sequence[Record], items: Sequence[Any]) -> None:
        good = [item for item in items if not isinstance(item, Invalid)]
        if good:
            self.domain.write(self.file, good)
        end = self.file.stat().st_size if self.file.exists() else None
        records = [Record(r.index, r.seed, r.status, r.reason, end) for r in records]
        with self.manifest.open("a", encoding="utf-8") as out:
            out.write("".join(json.dumps(asdict(r)) + "\n" for r in records))
            out.flush()
            os.fsync(out.fileno())
        self.records |= {r.index: r for r in records}

    def finish(self, summary: Summary) -> None:
        """Add the outcome to ``settings.json``; a run with nothing to do keeps the older cost."""
        path = self.path / "settings.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        cost = {"nfe": summary.nfe, "seconds": round(summary.seconds, 3)} if summary.nfe else {}
        counts = {name: getattr(summary, name) for name in STATUSES}
        settings["result"] = {**settings.get("result", {}), **counts, **cost}
        _write_json(path, settings)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = self.path / "settings.json"
        asked = json.loads(json.dumps(settings))
        if path.exists() and self.manifest.exists():  # else a mistake stopped it before any sample
            had = json.loads(path.read_text(encoding="utf-8"))
            result = had.pop("result", {})
            before, now = ({k: v for k, v in flat(s).items() if v != {}} for s in (had, asked))
            for key in sorted(before.keys() | now.keys()):
                if key != "n" and before.get(key) != now.get(key):
                    raise ValueError(
                        f"{self.path} holds samples made with {key}={_short(before.get(key))}, "
                        f"now asked for {_short(now.get(key))}; choose another out, or remove "
                        "that folder."
                    )
            held = 1 + max((record.index for record in read_manifest(self.path)), default=-1)
            if held > asked.get("n", held):
                raise ValueError(
                    f"{self.path} holds {held} samples already, more than n={asked['n']}; give "
                    f"n={held} or more, or choose another out."
                )
            asked["result"] = result
        elif self.manifest.exists():
            raise ValueError(
                f"{self.path} has a manifest but no settings.json; choose another out."
            )
        elif self.file.exists() and not path.exists():
            raise ValueError(f"{self.file} is there, and no record of it; choose another out.")
        _write_json(path, asked)

    def _repair(self) -> dict[int, Record]:
        records = {record.index: record for record in read_manifest(self.path, repair=True)}
        last = max((r.end or 0 for r in records.values()), default=0)
        size = self.file.stat().st_size if self.file.exists() else 0
        if size < last:
            raise ValueError(
                f"{self.file} has {size} bytes, its manifest says {last}; it was changed. Choose "
                "another out."
            )
        if size > last:
            os.truncate(self.file, last)
        if last == 0:
            self.file.unlink(missing_ok=True)
        return records


def read_manifest(path: Path, *, repair: bool = False) -> list[Record]:
    """The records of a sample folder in the order written; a torn last line is left out, and cut
    off the file if ``repair``. No manifest: no records.

    Raises:
        ValueError: a line that is no record, other than a torn last one.
    """
    file = path / "manifest.jsonl"
    if not file.exists():
        return []
    records, good = [], 0
    for number, line in enumerate(lines := file.read_bytes().splitlines(keepends=True)):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("torn")
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number + 1 < len(lines):
                raise ValueError(f"{file}, line {number + 1}: not a record ({error}).") from error
            break
        good += len(line)
    if repair and good < file.stat().st_size:
        os.truncate(file, good)
    return records


def _short(value: Any) -> str:
    return textwrap.shorten(str(value), 80, placeholder=" ...")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
