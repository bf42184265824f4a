"""Fixtures that every test module may use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

BESIDE = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, torch.Tensor], dict]]:
    """Loads (tensors, description) of one item of published outputs; skips where it is absent."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
        path = BESIDE / "golden" / f"{name}.safetensors"
        if not path.exists():
            pytest.skip(f"published outputs {name} are not on this machine")
        return load_file(path), json.loads(path.with_suffix(".json").read_text())

    return load


@pytest.fixture(scope="session")
def data_folder() -> Callable[[str], Path]:
    """A file or folder of the reference data; skips where it is absent."""

    def find(name: str) -> Path:
        path = BESIDE / "data" / name
        if not path.exists():
            pytest.skip(f"reference data {name} are not on this machine")
        return path

    return find
