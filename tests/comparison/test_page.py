"""The page in a browser: charts are drawn, nothing complains, nothing is wider than a phone."""

import json
import re
import shutil
import subprocess

import pytest

from alignment.comparison import write_comparison
from tests.helpers.patience import patience
from tests.helpers.run_folders import make_run

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
"use strict";
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective + " " + event.blockedURI));
console.error = (...said) => errors.push(said.join(" "));
const lines = () => document.querySelectorAll("#chart-nats-margins .scatterlayer .trace").length;
addEventListener("load", () => setTimeout(() => {
  const charts = [...document.querySelectorAll(".chart")].map((node) => ({
    name: node.dataset.chart,
    drawn: node.querySelectorAll(".scatterlayer .trace path").length,
    legend: node.querySelectorAll(".legend .traces").length,
    ink: [...node.querySelectorAll(".xtick text")].map((text) => getComputedStyle(text).fill)[0],
  }));
  const found = { errors, charts, wide: document.documentElement.scrollWidth, window: innerWidth };
  found.undrawn = !document.getElementById("undrawn").hidden;
  found.page = getComputedStyle(document.body).backgroundColor;
  const boxes = [...document.querySelectorAll(".legend input")];
  found.lines = [lines()];
  boxes.slice(0, 1).forEach((box) => box.click());
  setTimeout(() => report({ ...found, boxes: boxes.length, lines: [...found.lines, lines()] }), 500);
}, 1500));
function report(found) {
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
}
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A comparison of two losses, with an odd text in it."""
    folder = tmp_path_factory.mktemp("sweep")
    number = 0
    for loss, betas in (("dpo", (0.1, 0.5)), ("simpo", (2.0, 8.0))):
        for beta in betas:
            for seed in (0, 1):
                make_run(
                    folder / f"{number}-made", loss, {"beta": beta}, seed, scores=[1.0, 0.0, 1.0, 0.5], kl=1.0 + number
                )
                number += 1
    return write_comparison([folder], folder)


def look(page, folder, *flags):
    """What a browser makes of the page: the probe is its first script, so that it hears of every error."""
    if CHROMIUM is None:
        pytest.skip("NO BROWSER: chromium is not installed, so nobody looked whether the page draws its charts")
    probed = folder / "page.html"
    probed.write_text(page.read_text().replace("<head>\n", "<head>\n" + PROBE, 1))
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=20000",
            *flags,
            "--dump-dom",
            probed.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=True,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, "the page did not load"
    return json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


LIGHT = ("--window-size=1280,900",)
DARK = ("--window-size=500,900", "--force-dark-mode", "--blink-settings=preferredColorScheme=0")


@pytest.mark.parametrize(
    ("flags", "paper", "ink"),
    [
        pytest.param(LIGHT, "rgb(255, 255, 255)", "rgb(28, 33, 38)", marks=pytest.mark.matrix),
        (DARK, "rgb(20, 24, 29)", "rgb(228, 232, 236)"),
    ],
    ids=["wide and light", "narrow and dark"],
)
def test_every_chart_is_drawn_and_nothing_complains(page, tmp_path, flags, paper, ink):
    found = look(page, tmp_path, *flags)
    assert found["errors"] == [] and not found["undrawn"]
    names = [chart["name"] for chart in found["charts"]]
    assert {"frontier-win-rate", "frontier-reward-accuracy", "over-dpo-loss-beta", "over-simpo-loss-beta"} <= set(names)
    assert {"nats-margins", "logps-chosen", "kl-offline", "lengths"} <= set(names)
    assert names[:2] == ["glance-win-rate", "glance-reward-accuracy"], "what a reader looks for comes first"
    for chart in found["charts"]:
        assert chart["drawn"] >= (2 if chart["name"].startswith("over-") else 4), chart
        assert chart["legend"] == (4 if chart["name"].startswith("frontier-") else 0), chart
    assert (found["boxes"], found["lines"]) == (4, [8, 6]), "the box of a variant hides its two members"
    assert found["wide"] <= found["window"], "tables scroll on their own, the page does not"
    assert found["page"] == paper
    assert {chart["ink"] for chart in found["charts"]} == {ink}


def test_a_broken_page_is_seen(page, tmp_path):
    """The probe itself: an error and an empty chart do not pass."""
    broken = tmp_path / "broken.html"
    drawn = "Plotly.newPlot(node, figure.data"
    assert drawn in page.read_text()
    broken.write_text(page.read_text().replace(drawn, "Plotly.newPlot(node, []"))
    assert not any(chart["drawn"] for chart in look(broken, tmp_path)["charts"])
    broken.write_text(page.read_text().replace(drawn, "Plotly.newPlot(nodes.none.x, []"))
    found = look(broken, tmp_path)
    assert found["errors"] and found["undrawn"]
