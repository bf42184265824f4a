"""Composing and building configurations; every shipped file is tried."""

from __future__ import annotations

import inspect
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf

from shared import configuration
from shared.configuration import ConfigurationError, build, choose, compose, option
from shared.schedules import Schedule
from shared.solvers.base import Solver
from shared.solvers.grids import Grid

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [(g, name) for g in configuration.groups() for name in configuration.options(g)]
VERBS = ("train", "sample", "evaluate", "report", "convert", "variance")
GIVEN = {"denoise", "process", "domain", "schedule", "null", "folder"}
"""Objects that the verbs hand to targets which ask for them."""


def nodes(config):
    """Every node with a target."""
    if OmegaConf.is_dict(config):
        yield from [config] if "_target_" in config else []
        for key in config:
            if not OmegaConf.is_missing(config, key):
                yield from nodes(config[key])
    elif OmegaConf.is_list(config):
        for node in config:
            yield from nodes(node)


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_fits_its_target_and_is_built_where_it_can_be(group, name):
    if group in ("experiment", "launcher"):
        pytest.skip("changes other groups; see below")
    config = option(group, name)
    wants_more = False
    for node in nodes(config):
        configuration._check_target(node._target_)
        parameters = inspect.signature(get_object(node._target_)).parameters
        keys = {str(k) for k in node} - {"_target_", "_partial_"}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            assert keys <= parameters.keys()
        required = {
            k for k, p in parameters.items() if p.default is p.empty and p.kind not in (2, 4)
        }
        missing = {k for k in keys if OmegaConf.is_missing(node, k)}
        missing |= {k for k in keys if k == "path" and node.get(k) is None}  # the verbs find it
        assert required - keys <= GIVEN
        wants_more |= bool(required - keys or missing)
    if not wants_more and group != "domain":  # a domain may need its data
        built = build(config)
        kinds = {"schedule": Schedule, "solver": Solver, "grid": Grid}
        assert isinstance(built, kinds.get(group, object))


@pytest.mark.parametrize("name", configuration.options("experiment"))
def test_every_experiment_composes_and_only_names_allowed_targets(name):
    config = compose("train", [f"experiment={name}"])
    configuration._check_targets(config)
    assert config.domain._target_
    assert config.model._target_


@pytest.mark.parametrize("name", configuration.options("launcher"))
def test_every_launcher_composes(name):
    if name.startswith("submitit"):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert compose("report", [f"launcher={name}", "path=x"]).path == "x"


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("solver", "dpmpp_2m"),
        ("schedule", "ddpm"),
        ("grid", "log_snr"),
        ("guidance", "classifier_free"),
        ("trainer", "default"),
    ],
)
def test_the_command_line_and_python_read_the_same_files(group, name):
    verb = "train" if group in ("schedule", "trainer") else "sample"
    more = ["experiment=toys"] if verb == "train" else ["run=x"]
    composed = compose(verb, [*more, f"{group}={name}"])[group]
    mine = option(group, name)
    assert composed._target_ == mine._target_ if group == "trainer" else composed == mine


def test_choose_takes_overrides():
    assert choose("schedule", "vp_linear", beta_max=10.0).beta_max == 10.0
    assert choose("solver", "dpmpp_2m") == choose("solver", "dpmpp_2m")
    with pytest.raises(ConfigurationError, match="did you mean 'beta_max'"):
        choose("schedule", "vp_linear", beta_mx=10.0)
    with pytest.raises(ConfigurationError, match="did you mean 'vp_linear'"):
        choose("schedule", "vp_liner")
    with pytest.raises(ConfigurationError, match="did you mean 'schedule'"):
        choose("schedules", "vp_linear")
    with pytest.raises(ConfigurationError, match="Images: 'domain.data' is missing"):
        choose("domain", "images")
    with pytest.raises(ConfigurationError, match="Karras.*sigma_min < sigma_max"):
        choose("schedule", "karras", sigma_min=100.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run=x", "stpes=3"], "unknown key 'stpes'; did you mean 'steps'?"),
        (["run=x", "solvr=ddim"], "unknown key 'solvr'; did you mean 'solver'?"),
        (["run=x", "solver=dpmp_2m"], "did you mean 'dpmpp_2m'"),
        (["run=x", "solver=ddim", "grid.t_strat=1"], "did you mean 'grid.t_start'"),
        (["run=x", "trainer=default"], "'trainer' is no choice here"),
        (["run=x", "n=["], "no viable alternative"),
        (["run=x", "out=${nothing}"], "nothing"),
        ([], "'run' is missing"),
    ],
)
def test_mistakes_are_one_line_with_the_nearest_match(overrides, message):
    with pytest.raises(ConfigurationError) as caught:
        compose("sample", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_choices_are_named():
    with pytest.raises(ConfigurationError, match="'model' is missing; choose model=.*plane"):
        compose("train", ["domain=toys"])


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "shared.configuration.Path",
        "shared.cli.os.system",
        "torch.load",
        "torch.hub.load",
        "builtins.eval",
        "shared.no_such_thing",
        "sharedness.x",
        "molediff.cli.cli.os.system",
    ],
)
def test_targets_outside_the_project_are_refused(target):
    with pytest.raises(ConfigurationError, match="_target_"):
        build(OmegaConf.create({"_target_": target}))
    with pytest.raises(ConfigurationError, match="_target_"):
        build(OmegaConf.create({"_target_": "torch.nn.Identity", "deep": [{"_target_": target}]}))


def test_build_passes_what_the_target_asks_for_without_copying():
    config = OmegaConf.create({"_target_": "torch.nn.Linear", "in_features": 2})
    assert build(config, out_features=3, unknown=object()).weight.shape == (3, 2)
    assert build(config, in_features=9, out_features=3).weight.shape == (3, 2)  # the file wins
    assert build(None) is None
    assert build(OmegaConf.create({})) is None
    with pytest.raises(ConfigurationError, match="torch.nn.Linear.*out_features"):
        build(config)
    layer = torch.nn.Linear(1, 1)
    wrap = OmegaConf.create({"_target_": "shared.denoisers.Denoiser"})
    from shared.process import Process

    process = Process.single(choose("schedule", "vp_cosine"))
    assert build(wrap, backbone=layer, process=process).backbone is layer


def test_a_surrounding_hydra_stays_as_it_was():
    from hydra.core.global_hydra import GlobalHydra

    with configuration.hydra_session():
        outer = GlobalHydra.instance().hydra
        assert choose("schedule", "vp_cosine").s == 0.008
        assert GlobalHydra.instance().hydra is outer
    assert not GlobalHydra.instance().is_initialized()


def test_the_wheel_brings_the_configurations(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for module in ("__init__", "configuration"):
            archive.extract(f"shared/{module}.py", tmp_path)
        inside = [n for n in names if n.startswith("shared/configs/")]
        archive.extractall(tmp_path, inside)
    here = {
        f"shared/configs/{p.relative_to(ROOT / 'configs')}" for p in ROOT.glob("configs/**/*.yaml")
    }
    assert here <= names
    find = "import shared.configuration as c; print(c.folder())"
    found = subprocess.run(
        [sys.executable, "-c", find], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert Path(found.stdout.strip()) == tmp_path / "shared" / "configs"
