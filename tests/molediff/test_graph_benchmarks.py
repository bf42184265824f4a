"""The benchmarks of graphs in their smallest form, on a model made up."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import networkx as nx
import pytest
import torch
from test_graph_convert import zinc

from molediff.graphs.data import write_graphs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def checkpoint(tmp_path):
    content = zinc(name="something")
    for key in ("x_state_dict", "adj_state_dict"):
        content[key] = {name: 0.05 * value for name, value in content[key].items()}
    torch.save(content, tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


def test_tables(checkpoint, tmp_path, monkeypatch) -> None:
    graphs = importlib.import_module("graphs")
    data = tmp_path / "data.g6"
    write_graphs(data, [nx.cycle_graph(n) for n in range(4, 14)])
    words = ["x", str(checkpoint), "--data", str(data), "--small", "--threads", "1",
             "--out", str(tmp_path), "--solver"]  # fmt: skip
    file = tmp_path / "graphs_something.json"
    for solver in ("published", "published,ddim"):
        monkeypatch.setattr(sys, "argv", [*words, solver])
        graphs.main()
    rows = json.loads(file.read_text())["rows"]
    assert [row["solver"] for row in rows] == ["published", "ddim"]  # the first is kept
    assert all(len(row["sets"]) == 4 and "average" in row["sets"][0] for row in rows)
    assert rows[0]["nfe"] == 6
    monkeypatch.setattr(sys, "argv", [*words, "nothing"])
    with pytest.raises(SystemExit, match="--solver nothing"):
        graphs.main()


def test_speed(checkpoint, tmp_path, monkeypatch) -> None:
    speed = importlib.import_module("graphs_speed")
    content = torch.load(checkpoint, weights_only=True)
    content["model_config"]["data"]["data"] = "ego_small"
    torch.save(content, checkpoint)
    monkeypatch.setattr(sys, "argv", ["x", str(checkpoint), "--small", "--out", str(tmp_path)])
    speed.main()
    result = json.loads((tmp_path / "graphs_speed_ego_small.json").read_text())
    assert result["largest_difference"] < 1e-4
    assert result["sampler"]["seconds"].keys() == {"3", "9"}
