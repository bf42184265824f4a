"""Configurations: YAML options in groups, composed by Hydra and built into objects.

``compose`` makes the configuration of one command line verb, ``choose`` builds one option of a
group, and ``build`` instantiates a node. The command line and Python calls read the same files,
which lie in ``configs`` at the root of the repository and inside ``shared`` in a wheel.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

TARGETS = ("shared", "molediff", "pointdiff", "torch.nn", "torch.optim")
"""Packages whose members a configuration may name."""


class ConfigurationError(ValueError):
    """A key, value or option that the user has to change; one line."""


# -- where the files are ----------------------------------------------------------------------


def folder() -> Path:
    """The folder of the shipped configurations.

    Raises:
        FileNotFoundError: neither the repository nor the wheel has one.
    """
    here = Path(__file__).resolve().parent
    for path in (here / "configs", here.parent / "configs"):
        if (path / "config.yaml").exists():
            return path
    raise FileNotFoundError(f"no configurations beside {here}; install the package again.")


def groups() -> list[str]:
    """The names of the groups."""
    return sorted(path.name for path in folder().iterdir() if path.is_dir())


def options(group: str) -> list[str]:
    """The options of a group.

    Raises:
        ConfigurationError: no such group.
    """
    if group not in groups():
        raise ConfigurationError(f"no group '{group}'{nearest(group, groups())}")
    return sorted(path.stem for path in (folder() / group).glob("*.yaml"))


# -- composing --------------------------------------------------------------------------------


@contextmanager
def hydra_session() -> Iterator[None]:
    """A Hydra of our own, whatever the caller does with Hydra."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder()), job_name="run", version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().clear()
        if outer is not None:
            GlobalHydra.instance().initialize(outer)


def compose(verb: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of ``verb`` with ``key=value`` overrides in Hydra's grammar.

    Raises:
        ConfigurationError: an unknown key or option, with the nearest known one.
    """
    with hydra_session():
        try:
            config = hydra_compose(verb, list(overrides))
            OmegaConf.resolve(config)
            check_complete(verb, config)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigurationError(explain(verb, overrides, error)) from error
    return config


def check_complete(verb: str, config: DictConfig) -> None:
    """Refuse a configuration with mandatory values missing.

    Raises:
        ConfigurationError: names the first one.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigurationError(f"{verb}: '{missing[0]}' is missing; give {missing[0]}=...")


def explain(verb: str, overrides: Sequence[str], error: Exception) -> str:
    """What is wrong with ``overrides``, in one line."""
    known = known_keys(verb)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        key = key.partition("@")[0]
        if override.startswith("+") or key.startswith("hydra"):
            continue
        if key in groups():
            if key not in known:
                return f"{verb}: '{key}' is no choice here{nearest(key, known)}"
            unknown = [o for o in value.split(",") if o not in ("null", *options(key))]
            if unknown:
                return _no_option(key, unknown[0])
        elif key not in known | _keys_of_choices(verb, overrides):
            keys = known | _keys_of_choices(verb, overrides)
            return f"{verb}: unknown key '{key}'{nearest(key, keys)}"
    missing = re.search(r"You must specify '([\w/]+)'", str(error))
    if missing:
        group = missing.group(1)
        text = f"{verb}: '{group}' is missing; choose {group}={'|'.join(options(group))}"
        return f"{text} or experiment={'|'.join(options('experiment'))}"
    return " ".join(str(error).split())


def defaults(verb: str) -> dict[str, str | None]:
    """The groups that a verb chooses from -> the default option, '???' where there is none."""
    entries = OmegaConf.to_container(OmegaConf.load(folder() / f"{verb}.yaml"))
    assert isinstance(entries, dict)
    chosen = [entry for entry in entries["defaults"] if isinstance(entry, dict)]
    return {str(group): value for entry in chosen for group, value in entry.items()}


def own_settings(verb: str) -> dict[str, Any]:
    """The keys of a verb's own file and their defaults."""
    return plain(OmegaConf.load(folder() / f"{verb}.yaml"))


def known_keys(verb: str) -> set[str]:
    """Keys and groups of a verb's own file."""
    files = (OmegaConf.load(folder() / f"{name}.yaml") for name in (verb, "config"))
    return {key for file in files for key in _flat(file)} - {"defaults"} | set(defaults(verb))


def _keys_of_choices(verb: str, overrides: Sequence[str]) -> set[str]:
    """Keys that the chosen options bring along; none if the choices themselves do not fit."""
    choices = [o.partition(",")[0] for o in overrides if o.partition("=")[0] in groups()]
    try:
        return set(_flat(hydra_compose(verb, choices)))
    except (HydraException, OmegaConfBaseException):
        return set()


def _flat(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, with dots."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in ("hydra", "_target_", "_partial_"):
                yield f"{prefix}{key}"
                yield from _flat(value, f"{prefix}{key}.")


def _no_option(group: str, name: str) -> str:
    names = options(group)
    return f"{group}: no option '{name}'{nearest(name, names)} (options: {', '.join(names)})"


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def reject_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that are not known.

    Raises:
        ConfigurationError: names the first one and the nearest known one.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            has = ", ".join(known) or "nothing"
            raise ConfigurationError(
                f"{what}: unknown key '{name}'{nearest(name, known)} (known: {has})"
            )


# -- building ---------------------------------------------------------------------------------


def choose(group: str, name: str, /, **overrides: Any) -> Any:
    """Build the option ``name`` of ``group``; ``overrides`` replace values of its file.

    Example:
        ``choose("solver", "dpmpp_2m", lower_order_final=False)``

    Raises:
        ConfigurationError: an unknown group, option or key, or a value that does not fit.
    """
    return build(option(group, name, **overrides))


def option(group: str, name: str, /, **overrides: Any) -> DictConfig:
    """The configuration of one option of a group, not yet built.

    Raises:
        ConfigurationError: as :func:`choose`.
    """
    if name not in options(group):
        raise ConfigurationError(_no_option(group, name))
    with hydra_session():
        composed = hydra_compose(overrides=[f"+{group}={name}"])
    config: DictConfig = composed.get(group) or OmegaConf.create({})
    reject_unknown(f"{group}={name}", overrides, [str(k) for k in config if k != "_target_"])
    for key, value in overrides.items():
        config[key] = value
    return config


def build(config: Any, /, **arguments: Any) -> Any:
    """Instantiate a node. ``arguments`` are objects that it may need beside its own values (a
    domain, a schedule): those that its target has a parameter for are passed on, never copied.
    An empty node gives None.

    Raises:
        ConfigurationError: a target outside :data:`TARGETS` or values that do not fit it.
    """
    if not config:
        return None
    target = str(config.get("_target_", "?"))
    check_complete(target, config)
    _check_targets(config)
    try:
        if not arguments:
            return instantiate(config, _convert_="all")
        maker = instantiate(config, _partial_=True, _convert_="all")
        wanted = inspect.signature(maker.func).parameters.keys() - {str(k) for k in config}
        return maker(**{k: v for k, v in arguments.items() if k in wanted})
    except (InstantiationException, TypeError, ValueError) as error:
        cause = error.__cause__ or error
        raise ConfigurationError(f"{target}: {' '.join(str(cause).split())}") from error


def _check_targets(config: Any) -> None:
    if isinstance(config, ListConfig):
        nodes = list(config)
    elif isinstance(config, DictConfig):
        nodes = list(config.values())
        if "_target_" in config:
            _check_target(str(config["_target_"]))
    else:
        return
    for node in nodes:
        _check_targets(node)


def _check_target(target: str) -> None:
    """A target must be named, and live, in a package of :data:`TARGETS`: modules that those
    packages import are not reachable through them."""
    try:
        home = getattr(get_object(target), "__module__", "") if _inside(target) else ""
    except Exception as error:
        raise ConfigurationError(f"_target_ {target}: {' '.join(str(error).split())}") from error
    if not _inside(str(home)):
        raise ConfigurationError(
            f"_target_ {target} is refused: a configuration may only name members of "
            f"{', '.join(TARGETS)}."
        )


def _inside(name: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in TARGETS)


def plain(config: Any) -> dict[str, Any]:
    """A configuration as a dictionary that JSON can hold."""
    if isinstance(config, Mapping) and not isinstance(config, DictConfig):
        config = OmegaConf.create(dict(config))
    out = OmegaConf.to_container(config, resolve=True)
    assert isinstance(out, dict)
    return {str(k): v for k, v in out.items()}
