"""Reading pickles without running them."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import networkx as nx
import pytest
import torch

from shared.inert import (
    Placeholder,
    is_module_pickle,
    read_modules,
    read_pickle,
    read_torch,
)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_objects_become_placeholders(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = [nx.path_graph(3), Harmful(), {"a": (1, 2.5, "x")}]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        Path("graphs.pkl").write_bytes(pickle.dumps(content, protocol))
        graph, harmful, plain = read_pickle(Path("graphs.pkl"))
        assert isinstance(graph, Placeholder)
        assert dict(graph.state["_adj"][1]) == {0: {}, 2: {}}
        assert harmful.given == ("touch harmed",)
        assert plain == content[2]
    assert not Path("harmed").exists()


def test_foreign_mappings_of_torch_files(tmp_path) -> None:
    file = tmp_path / "file.pt"
    torch.save({"w": torch.ones(2), "o": argparse.Namespace(a=1)}, file)
    content = read_torch(file)
    assert torch.equal(content["w"], torch.ones(2))
    assert vars(content["o"]) == {"a": 1}


def test_modules_without_their_code(tmp_path) -> None:
    file = tmp_path / "module.pkl"
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    file.write_bytes(pickle.dumps({"ema": module, "epoch": 3}))
    assert is_module_pickle(file)
    found = read_modules(file)
    assert found.keys() == {"ema"}
    assert found["ema"].keys() == module.state_dict().keys()
    assert torch.equal(found["ema"]["0.weight"], module[0].weight)
    file.write_bytes(pickle.dumps({"epoch": 3}))
    with pytest.raises(ValueError, match="no pickled module"):
        read_modules(file)


def test_damage(tmp_path) -> None:
    for read in (read_pickle, read_torch):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
        (tmp_path / "bad").write_bytes(b"\x80\x04not a pickle")
        with pytest.raises(ValueError, match="truncated"):
            read(tmp_path / "bad")
