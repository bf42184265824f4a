"""The command lines: ``PROGRAM VERB key=value ...``, composed by Hydra.

Exit status: 0 done, 1 something failed, 2 the command has to be changed, 130 interrupted. Errors
are one line; set MOLEDIFF_TRACEBACK=1 to see where they come from.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared import configuration
from shared.checks import check_numbers, check_place, check_switches
from shared.configuration import ConfigurationError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verb:
    """One verb of a command line, of one word or two. Its keys are those of ``configs/NAME.yaml``,
    with ``_`` between the words.

    Args:
        help: what it does, in a line.
        action: 'module:function', imported when it is used; (configuration, program, progress)
            -> :class:`Outcome`.
        bare: whether a word that is not ``key=value`` is the ``path``.
        file: whether ``out`` is a file, which is replaced if it is there, and not a folder.
        examples: what may follow it.
        words: 'module:function' that turns the words after the verb into ``key=value`` words, for
            a verb with a grammar of its own.
    """

    help: str
    action: str
    bare: bool = False
    file: bool = False
    examples: tuple[str, ...] = ()
    words: str | None = None

    def __call__(self, config: DictConfig, program: Program, progress: Progress) -> Outcome:
        outcome: Outcome = find(self.action)(config, program, progress)
        return outcome


def find(name: str) -> Any:
    """What 'module:name' names."""
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


VERBS = {
    "train": Verb("train a model; again in the same folder: go on", "shared.verbs:train"),
    "sample": Verb(
        "generate with a trained model; again in the same folder: only what is missing",
        "shared.verbs:sample",
        examples=("run=runs/mine n=100 solver=dpmpp_2m steps=50 seed=0 out=samples",),
    ),
    "evaluate": Verb(
        "measure files or samples of any origin",
        "shared.judging:evaluate",
        bare=True,
        examples=("samples", "mine.npz reference=theirs.npz out=evaluation"),
    ),
    "report": Verb(
        "write one HTML page about a run or a folder of samples",
        "shared.judging:report",
        bare=True,
        examples=("runs/mine",),
    ),
    "variance": Verb(
        "estimate the optimal reverse variance of a model, for solver=analytic_ddpm",
        "shared.verbs:variance",
        examples=("run=runs/mine", "run=runs/mine kind=npr updates=2000"),
    ),
    "distill": Verb(
        "make a model of few steps out of one of many, guided or not",
        "shared.distillation:distill",
        examples=("run=runs/mine steps=4 first=32 out=runs/four",),
    ),
    "share": Verb(
        "write the weights of a run small, to be shared",
        "shared.verbs:share",
        examples=("run=runs/mine out=mine",),
    ),
    "convert": Verb(
        "turn the checkpoint of another program into a run folder",
        "shared.verbs:convert",
        bare=True,
        examples=("checkpoint.pt out=runs/converted",),
    ),
    "doctor": Verb("say what this installation can do", "shared.doctor:doctor", examples=("",)),
}
PATHS = (
    "out", "run", "path", "reference", "refine", "truth", "report", "start", "data",
    "domain.data", "domain.views", "domain.coarse", "request.scan",
)  # fmt: skip
MISTAKES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True)
class Outcome:
    """What a verb says at its end: lines for the user, the main file or folder it wrote, and
    whether everything that was asked for succeeded."""

    lines: Sequence[str] = ()
    path: Path | None = None
    ok: bool = True


@dataclass(frozen=True)
class Converter:
    """Turns the checkpoints of another program into this one's.

    ``recognises``: the state-dict keys -> whether this converter reads it. ``convert``: (tensors
    and numbers as read, path of the file, folder to write a checkpoint into) -> what the user
    should know, if anything; it may have a parameter ``sizes``, the training data of the model.
    """

    name: str
    recognises: Callable[[frozenset[str]], bool]
    convert: Callable[..., str | None]


@dataclass(frozen=True)
class Program:
    """One command line. ``packages``: where its domains live, as prefixes of ``_target_``;
    ``default``: the domain to judge files with when nothing else tells, if there is one;
    ``reader``: 'module:function' that reads the files of ``converters``; ``more``: verbs of its
    own."""

    name: str
    title: str
    packages: tuple[str, ...]
    default: str | None = None
    examples: tuple[str, ...] = ()
    converters: tuple[Converter, ...] = field(default=(), repr=False)
    reader: str = "shared.checkpoints:read_pickled_tensors"
    more: Mapping[str, Verb] = field(default_factory=dict, repr=False)

    @property
    def verbs(self) -> dict[str, Verb]:
        """Name -> verb, the common ones first."""
        return {**VERBS, **self.more}

    @property
    def domains(self) -> list[str]:
        """The options of the group ``domain`` that are this program's."""
        return [o for o in configuration.options("domain") if self._owns(_target(o))]

    def _owns(self, target: str) -> bool:
        return target.startswith(self.packages)

    def check_domain(self, config: Any) -> None:
        """Refuse the domain of another program.

        Raises:
            ConfigurationError: says which domains this one has.
        """
        target = str(config.get("_target_", ""))
        if not self._owns(target):
            raise ConfigurationError(
                f"{target} belongs to another command; domains of {self.name}: "
                f"{', '.join(self.domains) or 'none'}."
            )


def _target(domain: str) -> str:
    text = (configuration.folder() / "domain" / f"{domain}.yaml").read_text(encoding="utf-8")
    found = re.search(r"^_target_: *(\S+)", text, re.MULTILINE)
    return found.group(1) if found else ""


def main(program: Program, arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        return _dispatch(program, list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return fail(program.name, error)


def fail(name: str, error: Exception) -> int:
    """Say in one line what went wrong; the exit status."""
    if os.environ.get("MOLEDIFF_TRACEBACK"):
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    mistake = isinstance(error, MISTAKES)
    kind = "" if mistake else f"{type(error).__name__}: "
    print(f"{name}: {kind}{text}", file=sys.stderr)
    return 2 if mistake else 1


def _dispatch(program: Program, arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview(program))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"{program.name} {metadata.version('molediff')}")
        return 0
    verbs = program.verbs
    length = 2 if " ".join(arguments[:2]) in verbs else 1
    name, rest = " ".join(arguments[:length]), arguments[length:]
    if name not in verbs:
        raise ConfigurationError(f"no verb '{name}'{nearest(name, verbs)} ({', '.join(verbs)})")
    if any(word in ("-h", "--help") for word in rest):
        print(help_on(program, name))
        return 0
    sweep = any(word in ("-m", "--multirun") for word in rest)
    words = short([word for word in rest if word not in ("-m", "--multirun")])
    if verbs[name].words is not None:
        words = find(verbs[name].words or "")(words)
    given = overrides(name, words, bare=verbs[name].bare, quote=not sweep)
    if sweep:
        return _sweep(program, name, given)
    return execute(program, name, configuration.compose(config_name(name), given))


def short(words: Sequence[str]) -> list[str]:
    """Words with ``-o PLACE`` written out as ``out=PLACE``.

    Raises:
        ConfigurationError: nothing follows ``-o``.
    """
    out, left = [], iter(words)
    for word in left:
        if word == "-o":
            place = next(left, None)
            if place is None:
                raise ConfigurationError("-o: give a file or folder after it.")
            word = f"out={place}"
        out.append(word)
    return out


def config_name(verb: str) -> str:
    """The name of a verb's configuration file."""
    return verb.replace(" ", "_")


def overrides(
    verb: str, words: Sequence[str], *, bare: bool = False, quote: bool = True
) -> list[str]:
    """Words of the command line -> Hydra overrides: a ``bare`` word becomes ``path=``, keys of
    ``request.`` are added, paths may hold any character (``quote``), ``launcher`` may be called
    ``hydra.launcher``.

    Raises:
        ConfigurationError: a word that is neither an option nor ``key=value``.
    """
    out, paths = [], []
    for word in words:
        key, equals, value = word.partition("=")
        if bare and ((not equals and not word.startswith("-")) or Path(word).exists()):
            key, equals, value = "path", "=", word
            paths.append(word)
            if len(paths) > 1:
                raise ConfigurationError(f"{verb} takes one path, not {' and '.join(paths)}.")
        elif not equals and not key.startswith("~"):
            raise ConfigurationError(
                f"'{word}' is not key=value; see {verb} --help"
                if not word.startswith("-")
                else f"no option '{word}'{nearest(word, ('--help', '--multirun'))}"
            )
        key = {"hydra.launcher": "launcher", "hydra/launcher": "launcher"}.get(key, key)
        if key.startswith("request."):
            key = f"++{key}"
            value = f"'{value}'" if re.fullmatch(r"[^'\",]*[<>][^'\",]*", value) else value
        known = key.removeprefix("++") in PATHS
        if quote and known and value != "null" and value[:1] not in ("'", '"'):
            value = os.path.expanduser(value)
            value = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
        out.append(f"{key}={value}" if equals else word)
    return out


def execute(program: Program, verb: str, config: DictConfig) -> int:
    """Run a verb with its progress bar and print what it has to say."""
    check_numbers(config)
    check_switches(config_name(verb), config)
    check_place("out", config.get("out"), program.verbs[verb].file)
    with Bar(verb) as bar:
        outcome = program.verbs[verb](config, program, bar)
    print("\n".join(outcome.lines))
    return 0 if outcome.ok else 1


class Bar:
    """A progress bar that appears with the first report of progress, on a terminal only."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=self.title, disable=None, leave=False)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


# -- sweeps -----------------------------------------------------------------------------------


def _sweep(program: Program, verb: str, words: list[str]) -> int:
    """Hydra's multirun: one job per combination of the values, each in its own folder."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    out = next((w.partition("=")[2] for w in words if w.startswith("out=")), None)
    folder = str(Path((out or f"multirun/{verb}").strip("'\"")).absolute()).replace("'", "\\'")
    words = [w for w in words if not w.startswith("out=")] + [f"hydra.sweep.dir='{folder}'"]
    with configuration.hydra_session():
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        try:
            results = hydra.multirun(config_name(verb), partial(_job, program, verb), words)
        except (HydraException, OmegaConfBaseException) as error:
            text = configuration.explain(config_name(verb), words, error)
            raise ConfigurationError(text) from error
    statuses = [job.return_value for batch in results for job in batch]
    print(f"{statuses.count(0)} of {len(statuses)} jobs succeeded: {folder}")
    return max(statuses, default=0)


def _job(program: Program, verb: str, config: DictConfig) -> int:
    """One job of a sweep; a failure does not stop the others."""
    from hydra.core.hydra_config import HydraConfig

    try:
        configuration.check_complete(config_name(verb), config)
        config.out = HydraConfig.get().runtime.output_dir
        return execute(program, verb, config)
    except Exception as error:
        return fail(program.name, error)


# -- help -------------------------------------------------------------------------------------


def overview(program: Program) -> str:
    """The help of the whole program."""
    wide = max(map(len, program.verbs))
    verbs = "\n".join(f"  {name:<{wide}} {verb.help}" for name, verb in program.verbs.items())
    examples = "\n".join(f"  {program.name} {example}" for example in program.examples)
    return (
        f"{program.title}\n\nusage: {program.name} VERB key=value ...   ({program.name} VERB "
        f"--help, {program.name} --version)\n\n{verbs}\n\ndomains: {', '.join(program.domains)}"
        f"\n\nexamples:\n{examples}"
    )


def help_on(program: Program, name: str) -> str:
    """The help of one verb: its keys as its file explains them, and the options of its groups."""
    verb, file = program.verbs[name], config_name(name)
    choices = _choices(program, file)
    lines = [f"{program.name} {name}: {verb.help}", "", "keys:", *_keys(file), ""]
    lines += ["choices:", *choices, ""] * bool(choices)
    lines += ["-m, --multirun: run every combination of values given as a,b,c", ""]
    own = [e.partition(" ")[2] for e in program.examples if e.startswith(f"{name} ")]
    examples = own or verb.examples
    return "\n".join([*lines, "examples:", *(f"  {program.name} {name} {e}" for e in examples)])


def _keys(verb: str) -> list[str]:
    lines = []
    for name in (verb, "config"):
        text = (configuration.folder() / f"{name}.yaml").read_text(encoding="utf-8")
        parent = ""
        for line in text.splitlines():
            setting, _, comment = line.partition(" # ")
            key, colon, value = setting.partition(":")
            if key[:1].isalpha():
                parent = key
            if colon and parent != "defaults" and not key.startswith("#"):
                key = key if key == parent else f"{parent}.{key.strip()}"
                value = value.strip().replace("???", "...")
                lines.append(f"  {key}{'=' if value else ''}{value}".ljust(24) + comment)
    return [line.rstrip() for line in lines]


def _choices(program: Program, verb: str) -> list[str]:
    lines = []
    for group, default in configuration.defaults(verb).items():
        names = configuration.options(group)
        names = [n for n in program.domains if n in names] if group == "domain" else names
        usual = "" if default in (None, "???") else f" (default {default})"
        lines.append(f"  {group}=".ljust(24) + ", ".join(names) + usual)
    return lines
