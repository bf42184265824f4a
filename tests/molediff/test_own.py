import sys

import pytest

from molediff.own import load_function, run_file
from shared.configuration import ConfigurationError


def test_a_file_may_hold_whatever_python_can(tmp_path):
    file = tmp_path / "a b:c.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Twice:\n    by: int = 2\n"
        "def twice(x):\n    return Twice().by * x\n"
    )
    assert load_function(f"{file}:twice", "scorer")(3) == 6
    assert run_file(file).Twice().by == 2
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("own.py", r"scorer 'own.py': write FILE\.py:FUNCTION"),
        ("own.py:1f", r"write FILE\.py:FUNCTION"),
        ("own.txt:f", r"write FILE\.py:FUNCTION"),
        ("none.py:f", r"there is no file .*none\.py"),
        ("own.py:h", r"own\.py has no function 'h'; it has f\."),
        ("own.py:number", r"has no function 'number'"),
        ("broken.py:f", r"broken\.py cannot be run: ZeroDivisionError: division by zero"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("number = 3\ndef f(x):\n    return x\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigurationError, match=words):
        load_function(text, "scorer")
