from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_import_boundary_covers_every_module_of_the_core(project):
    (contract,) = (
        c
        for c in project["tool"]["importlinter"]["contracts"]
        if c.get("forbidden_modules") == ["shared.images"]
    )
    found = {p.stem for p in (ROOT / "shared").iterdir() if p.suffix == ".py" or p.is_dir()}
    core = {f"shared.{m}" for m in found if not m.startswith("_") and m != "images"}
    assert set(contract["source_modules"]) == core


def test_configurations_travel_inside_the_wheel(project):
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["configs"] == "shared/configs"
    assert set(wheel["packages"]) == {"shared", "molediff", "pointdiff"}


def test_torch_is_pinned_so_that_no_package_replaces_a_cpu_build():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert any(line.startswith("torch==") and ";" not in line for line in lines)


def test_the_installed_commands_start(project):
    for command, target in project["project"]["scripts"].items():
        module, _, function = target.partition(":")
        __import__(module)
        assert callable(getattr(sys.modules[module], function)), command
