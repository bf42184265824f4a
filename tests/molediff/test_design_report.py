"""The report of a design run, in a browser where one is installed."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
from test_geometric_domain import embedded

from molediff.design import report
from molediff.design.judging import Judge, ranked
from molediff.oracles import Accuracy
from molediff.targets import Target
from shared.metrics import mean

KNOWN = {"gap": {"unit": "eV", "mean": 6.9, "mad": 1.0, "min": 1.0, "max": 14.0}}
BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
TURN = """<script>
window.addEventListener("load", () => setTimeout(async () => {
  const plot = document.querySelector(".js-plotly-plot");
  const camera = () => JSON.stringify(plot._fullLayout.scene.camera.eye);
  const before = camera();
  await Plotly.relayout(plot, {"scene.camera.eye": {x: 0.1, y: 2.0, z: 0.3}});
  const drawn = document.querySelectorAll("canvas, .gl-container").length;
  document.title = (camera() !== before ? "turned" : "stuck") + " " + drawn;
}, 500));
</script>"""


class Sized:
    name = "sized"
    accuracy = {"gap": Accuracy("eV", mean([0.1, 0.2]))}

    def __call__(self, molecules):
        return {"gap": np.array([0.5 * len(m) for m in molecules])}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    judge = Judge([Target.parse("gap=5", KNOWN)], KNOWN, {"sized": Sized()})
    molecules = judge([embedded(s) for s in ("CCO", "CC=O", "CCN")])
    designs = ranked([judge.design(i, m) for i, m in enumerate(molecules)])
    file = tmp_path_factory.mktemp("report") / "report.html"
    known = [[9, 5.0 + 0.1 * i] for i in range(20)]
    return report.write(
        file, judge, designs, [], n=3, facts={"n": 3}, known=known, columns=["gap"],
        baseline=designs[:1], unguided=1, warnings=["a warning"],
    )  # fmt: skip


def test_the_page_says_everything_and_loads_nothing(page):
    text = page.read_text()
    for words in (
        "gap = 5 eV",
        "a warning",
        "unguided",
        "CCO",
        "training data",
        "Ranking",
        "±0.15",
    ):
        assert words in text
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']?(https?:)?//", text)


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_structures_turn_in_a_browser_without_a_network(page, tmp_path):
    copy = tmp_path / "report.html"
    copy.write_text(page.read_text().replace("</body>", TURN + "</body>"))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu-sandbox"]
    command += ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    state, drawn = title[1].split()
    assert state == "turned"
    assert int(drawn) > 0
