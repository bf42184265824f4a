"""Every command that the README or a help text shows can be read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import molediff.cli
import pointdiff.cli
import shared.images.cli
from shared import cli, configuration
from shared.checks import check_numbers

PROGRAMS = {p.PROGRAM.name: p.PROGRAM for p in (molediff.cli, pointdiff.cli, shared.images.cli)}
README = (
    (Path(__file__).resolve().parents[1] / "README.md").read_text().replace("\n  steps", " steps")
)


def documented() -> list[str]:
    names = "|".join(PROGRAMS)
    shown = re.findall(rf"(?:^|`)((?:{names}) [a-z][^`\n]+)", README, re.MULTILINE)
    helped = [f"{p.name} {words}" for p in PROGRAMS.values() for words in p.examples]
    verbs = [
        f"{p.name} {name} {words}"
        for p in PROGRAMS.values()
        for name, verb in p.more.items()
        for words in verb.examples
    ]
    return list(dict.fromkeys(line.strip() for line in [*shown, *helped, *verbs]))


@pytest.mark.parametrize("line", documented())
def test_documented_commands_compose(line):
    program, *words = shlex.split(line, comments=True)
    verbs = PROGRAMS[program].verbs
    length = 2 if " ".join(words[:2]) in verbs else 1
    name, rest = " ".join(words[:length]), words[length:]
    if name not in verbs and "--help" in rest:
        pytest.skip("the help of any verb")
    verb = verbs[name]
    if "--help" in rest or not rest:
        return
    sweep = "-m" in rest
    rest = cli.short([w.partition(",")[0] if sweep else w for w in rest if w != "-m"])
    if verb.words is not None:
        rest = cli.find(verb.words)(rest)
    given = cli.overrides(name, rest, bare=verb.bare)
    check_numbers(configuration.compose(cli.config_name(name), given))


def test_o_is_short_for_out():
    assert cli.short(["a.ply", "-o", "b.ply", "n=2"]) == ["a.ply", "out=b.ply", "n=2"]
    with pytest.raises(configuration.ConfigurationError, match="-o"):
        cli.short(["a.ply", "-o"])
