"""The report as a reader sees it: in a real Chromium, on a screen and on a phone, by day and at night."""

import base64
import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

from gcvit.report.page import render
from gcvit.report.run_data import read_records
from tests.helpers.launching import python, succeed
from tests.helpers.run_folders import write_evaluation, write_images, write_run, write_samples

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium with its chromedriver (Debian: chromium chromium-driver)"
)
pytestmark = needs_chromium
LEAST_FONT = 10.9  # pixels
# What a reader would stumble over. Texts are measured as they are laid out, whatever holds them.
FIND_FAULTS = """
const faults = [];
const name = (element) => `${element.tagName}.${element.getAttribute("class")} "${element.textContent.slice(0, 40)}"`;
for (const element of document.querySelectorAll("body *")) {
  const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!hasText || !element.checkVisibility() || element.closest("thead, script, style, noscript")) continue;
  const range = document.createRange();
  range.selectNodeContents(element);
  const box = element instanceof SVGElement ? element.getBoundingClientRect() : range.getBoundingClientRect();
  if (!box.width) continue;
  if (box.left < -1 || box.right > innerWidth + 1) faults.push(`outside of the page: ${name(element)}`);
  const holder = element.closest("td, .chart, li, dd, p");
  if (holder && box.right > holder.getBoundingClientRect().right + 1) faults.push(`spills over: ${name(element)}`);
  if (parseFloat(getComputedStyle(element).fontSize) < arguments[0]) faults.push(`small: ${name(element)}`);
}
for (const plot of document.querySelectorAll(".plot")) {
  const frame = plot.getBoundingClientRect();
  const boxes = (selector) => [...plot.querySelectorAll(selector)].map((text) => text.getBoundingClientRect());
  for (const text of plot.querySelectorAll("text")) {
    const box = text.getBoundingClientRect();
    const isInside = box.left > frame.left - 2 && box.right < frame.right + 2 && box.bottom < frame.bottom + 2;
    if (box.width && !isInside) faults.push(`outside of its chart: ${name(text)}`);
  }
  for (const selector of [".xtick text", ".textpoint text"]) {
    const all = boxes(selector);
    all.forEach((one, i) => all.slice(i + 1).forEach((other) => {
      const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
      const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
      if (across > 1 && down > 3) faults.push(`over each other in ${plot.getAttribute("aria-label")}: ${selector}`);
    }));
  }
}
if (document.documentElement.scrollWidth > innerWidth) faults.push("the page scrolls sideways");
return faults;
"""


class Browser:
    """A headless Chromium that tells what it was asked to load, and what went wrong."""

    def __init__(self) -> None:
        options = Options()
        options.binary_location = str(CHROMIUM)
        # Root, and small shared memory, are usual in containers; the page is ours.
        for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(word)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def open(self, page: Path, width: int = 1280, scheme: str = "light") -> None:
        """Open the page at full length, so that every chart that is not folded away is drawn."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        self.resize(width, 900)
        self.driver.get(page.as_uri())
        self.resize(width, self.ask("return document.documentElement.scrollHeight"))
        self.wait(
            "return [...document.querySelectorAll('.plot')].every(p => !p.checkVisibility() || p.querySelector('text'))"
        )

    def ask(self, script: str, *arguments: object):
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str) -> None:
        WebDriverWait(self.driver, 60, poll_frequency=0.1).until(lambda driver: driver.execute_script(script))

    def shoot(self) -> Image.Image:
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
        return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")

    def complaints(self) -> list[str]:
        """Messages on the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        """Addresses that were asked for since the last call, without what the page itself holds."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return {url for params in sent if not (url := params["request"]["url"]).startswith("data:")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """One run with everything, three to compare of which one is long, and a bare one."""
    root = tmp_path_factory.mktemp("report")
    write_images(root / "data")
    one, other = write_run(root / "one"), write_run(root / "other", lr=2e-3, seed=1, batch_size=128)
    for run in (one, other):
        write_evaluation(run, root / "data")
        write_samples(run, 10, num=7)
    write_evaluation(one, root / "data", "sketch", (1, 2, 3, 4))
    long = write_run(root / "long", num_rows=100_000, seed=2, name="a-rather-long-name-" * 5)
    (root / "bare").mkdir()
    (root / "bare" / "metrics.jsonl").write_text('{"step": 5, "kind": "train", "loss": 2.0}\n')
    pages = {}
    for name, runs in {"one": [one], "several": [one, other, long], "bare": [root / "bare"]}.items():
        pages[name] = root / f"{name}.html"
        pages[name].write_text(render(read_records(runs)))
    return pages


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize(
    ("name", "scheme"), [("one", "light"), ("one", "dark"), ("several", "light"), ("bare", "dark")]
)
def test_the_page_can_be_read(browser, pages, name, scheme, width, tmp_path):
    browser.open(pages[name], width, scheme)
    browser.ask("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    browser.wait("return [...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('text'))")
    shot = browser.shoot()
    shot.save(tmp_path / f"{name}-{width}-{scheme}.png")
    assert browser.complaints() == []
    assert browser.requests() <= {pages[name].as_uri()}
    assert browser.ask(FIND_FAULTS, LEAST_FONT) == []
    pixels = np.asarray(shot)
    assert shot.width == width
    assert np.median(pixels) > 240 if scheme == "light" else np.median(pixels) < 40
    assert len(np.unique(pixels[::4, ::4].reshape(-1, 3), axis=0)) > 100  # text, lines, areas: not blank


def test_every_chart_has_its_lines(browser, pages):
    """By the pixels of each chart: the colour of the run is in it, and in no small amount."""
    browser.open(pages["one"])
    shot = np.asarray(browser.shoot()).astype(int)
    charts = browser.ask(
        "return [...document.querySelectorAll('#training .plot, #time .plot')].map((plot) => {"
        "const box = plot.getBoundingClientRect();"
        "return [plot.ariaLabel, box.left, box.top, box.right, box.bottom]; })"
    )
    assert len(charts) == 9
    blue = np.array([0x2B, 0x6A, 0x9B])
    for title, *box in charts:
        left, top, right, bottom = map(int, box)
        near = np.abs(shot[top:bottom, left:right] - blue).sum(2) < 40
        assert near.sum() > 150, title
        assert near.any(0).sum() > 0.6 * (right - left), f"{title}: the line ends early"


def test_a_theme_is_chosen_and_a_run_hidden(browser, pages):
    browser.open(pages["several"])
    light = browser.ask("return getComputedStyle(document.body).backgroundColor")
    for _ in range(2):  # to light, and on to dark
        browser.ask("document.getElementById('theme').click()")
    assert browser.ask("return document.getElementById('theme').textContent") == "Theme: dark"
    assert browser.ask("return getComputedStyle(document.body).backgroundColor") != light
    colors = "return [...document.querySelector('.plot').data].map((trace) => trace.line.color)"
    assert "#74b3e0" in browser.ask(colors)  # night's blue
    browser.ask("document.querySelector('#runs input').click()")
    assert "#74b3e0" not in browser.ask(colors)
    browser.ask("document.querySelector('#runs input').click()")
    assert "#74b3e0" in browser.ask(colors)
    assert browser.complaints() == []


def test_what_is_folded_is_drawn_when_it_is_opened(browser, pages):
    browser.open(pages["several"])
    folded = "[...document.querySelectorAll('details.evaluation')].find((details) => !details.open)"
    assert not browser.ask(f"return {folded}.querySelector('.plot text')")
    browser.ask(f"const details = {folded}; details.id = 'opened'; details.open = true")
    browser.wait("return document.querySelector('#opened .plot text')")


def test_a_run_s_words_do_nothing(browser, tmp_path):
    """Class names and values that would be scripts, were they believed; and a page forged after it was written."""
    evil = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    run = write_run(tmp_path / "run", 10, name=evil)
    for file in (run / "metrics.jsonl", run / "config.yaml"):
        file.write_text(file.read_text().replace('"fsdp"', json.dumps(evil)).replace('"decoding"', json.dumps(evil)))
    write_samples(run, 10)
    tiles = run / "samples" / "step_10.json"
    tiles.write_text(tiles.read_text().replace('"apple"', json.dumps(evil)))
    page = tmp_path / "page.html"
    succeed(python("-m", "gcvit.report", run, "--out", page))
    browser.requests()
    browser.open(page)
    assert "owned" not in browser.driver.title
    assert browser.complaints() == []
    assert browser.requests() == {page.as_uri()}
    page.write_text(page.read_text().replace("<main>", f"<main>{evil}<img src='https://example.org/x.png'>"))
    browser.open(page)
    time.sleep(0.5)
    assert "owned" not in browser.driver.title
    assert any("Content Security Policy" in message for message in browser.complaints())
