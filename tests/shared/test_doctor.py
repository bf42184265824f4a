"""What the doctor says."""

from __future__ import annotations

import importlib

import pytest

from shared import configuration, doctor
from shared.doctor import Optional


def test_it_names_versions_devices_packages_and_configurations():
    text = doctor.describe()
    for word in ("torch", "cpu", "torch-geometric", "logger=wandb", str(configuration.folder())):
        assert word in text


def test_packages_that_are_there_and_not():
    assert doctor.installed(Optional("pytest", "pytest", "tests")) == pytest.__version__
    assert doctor.installed(Optional("no_such_thing", "no-such-thing", "x")) is None
    assert doctor.installed(Optional("no_such.thing", "no-such-thing", "x")) is None
    assert doctor.installed(Optional("shared.cli", "no-such-package", "x")) == "?"
    assert "pip install 'molediff[peers]'" in doctor._line(Optional("no_such", "no", "x", "peers"))


def test_missing_configurations_are_said(monkeypatch):
    def absent():
        raise FileNotFoundError("no configurations; install the package again.")

    monkeypatch.setattr(configuration, "folder", absent)
    assert "missing: no configurations" in doctor.describe()


@pytest.mark.parametrize("package", [p for p in doctor.OPTIONAL if doctor.installed(p)])
def test_what_is_called_installed_can_be_imported(package):
    if package.module in ("torch_geometric", "diffusers"):
        pytest.skip("slow to import")
    importlib.import_module(package.module)
