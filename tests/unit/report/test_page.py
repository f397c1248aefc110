"""The page as a browser would parse it: what is in it, and that nothing of a run's files becomes markup."""

import base64
import hashlib
import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gcvit.monitoring import step_timer as measured
from gcvit.report.__main__ import main
from gcvit.report.charts import PALETTE
from gcvit.report.formatting import duration, gigabytes, listing, short
from gcvit.report.page import render, to_json
from gcvit.report.published import find_place
from gcvit.report.run_data import read_record, read_records
from gcvit.report.step_time import STAGES, describe_bounds
from gcvit.report.summary import summarize
from tests.helpers.run_folders import CLASSES, write_evaluation, write_images, write_rows, write_run, write_samples

EVIL = "</script><img src=x onerror=alert(1)>\"'{{ 7 * 7 }}&lt;b&gt;"


class Page(HTMLParser):
    """Tags with their attributes, scripts, and the text outside of them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    def charts(self):
        kinds = [attributes.get("class") for attributes in self.named("script")]
        return [json.loads(text) for text, kind in zip(self.scripts, kinds, strict=True) if kind == "figure"]


def write_whole_run(folder: Path, data: Path) -> Path:
    write_run(folder, 30)
    write_evaluation(folder, data)
    write_samples(folder, 10)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_images(root / "data")
    evil_classes = (EVIL.replace("/", "|"), "brick", "cloud", "drum")  # a folder's name has no slash
    write_images(root / "evil-data", evil_classes, num=4)
    write_whole_run(root / "fair", root / "data")
    evil = write_whole_run(root / EVIL.replace("/", "|"), root / "evil-data")
    config = json.loads((evil / "config.yaml").read_text()) | {"tag": EVIL, "engine": EVIL, EVIL: EVIL}
    (evil / "config.yaml").write_text(json.dumps(config))
    rows = [json.loads(line) for line in (evil / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] != "train":
            strings = ("device", "outcome", "where", "reason", "what", "commit", "engine")
            row |= {name: EVIL for name in strings if name in row and row[name] != "finished"}
            row |= {"samples": [EVIL]} if row["kind"] == "bad_step" else {}
            row |= {"hosts": [EVIL], "versions": {EVIL: EVIL}} if row["kind"] == "start" else {}
        else:
            row |= {"bound_by": EVIL, "slowest_rank": EVIL}
    write_rows(evil, rows)
    for file in (*evil.glob("evaluations/*.json"), *evil.glob("samples/*.json")):
        file.write_text(file.read_text().replace('"drum"', json.dumps(EVIL)).replace('"ema"', json.dumps(EVIL)))
    return root / "fair", evil


@pytest.fixture(scope="module")
def fair(folders):
    return Page(render([read_record(folders[0])]))


def test_the_page_has_every_part(fair):
    headings = [attributes["id"] for attributes in fair.named("section")]
    expected = ["summary", "training", "time", "stalls", "evaluation", "samples", "published", "settings"]
    assert headings == expected
    titles = [attributes["aria-label"] for attributes in fair.named("div") if attributes.get("role") == "img"]
    for title in (
        "Loss",
        "Top-1 accuracy, %",
        "Learning rate",
        "Steps over time",
        "Reliability",
        "Seconds a step, by stage",
    ):
        assert title in titles
    assert len(fair.charts()) == len(titles) == 14
    for text in (
        "gc_vit_xxtiny",
        "86.00\u202f%",
        "It was started 2 times.",
        "Swin-T",
        "64.58\u202f%",
        "drum",
        "NVIDIA H100",
    ):
        assert text in fair.text


def test_the_page_stands_alone_and_runs_its_own_scripts_only(fair):
    (policy,) = [a["content"] for a in fair.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    kinds = [attributes.get("type") for attributes in fair.named("script")]
    run = [text for text, kind in zip(fair.scripts, kinds, strict=True) if kind is None]
    assert {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run} == allowed
    assert len(run) == 2  # plotly once, and ours
    assert "default-src 'none'" in policy
    for tag, attributes in fair.tags:
        assert tag not in ("link", "iframe", "object", "base")
        assert "src" not in attributes or attributes["src"].startswith("data:image/jpeg;base64,")
        assert tag != "a" or attributes["href"].startswith("#")


@pytest.fixture(scope="module")
def both(folders):
    return Page(render(read_records(folders)))


def test_nothing_of_a_run_becomes_markup(both, fair):
    page = both
    kinds = [attributes.get("type") for attributes in page.named("script")]
    assert kinds.count(None) == 2
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in fair.tags} | {"form", "label", "input", "i"}
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all(attributes["src"].startswith("data:image/") for attributes in page.named("img"))
    assert EVIL in page.text  # shown, as what it is
    assert "49" not in re.findall(r"'(\d+)&lt;b", page.text)
    for chart in page.charts():
        for trace in chart["data"]:
            for name in ("hovertemplate", "text", "customdata"):
                assert "<img" not in json.dumps(trace.get(name))


def test_several_runs_are_compared(both, folders):
    page = both
    assert "Differences between the runs" in page.text
    boxes = [attributes["value"] for attributes in page.named("input")]
    assert boxes == ["fair", folders[1].name]
    loss = page.charts()[0]
    assert {trace["meta"] for trace in loss["data"]} == set(boxes)


def test_a_run_without_anything_is_told_in_sentences(tmp_path):
    (tmp_path / "config.yaml").write_text("tag: new\n")
    page = Page(render([read_record(tmp_path, "new")]))
    for sentence in (
        "The run has no rows yet.",
        "new has no training rows, so no curves.",
        "new: no row has a time",
        "new: the rows lack the seconds of each stage of a step.",
        "There is no evaluation of new",
        "There are no samples of new.",
        "new: no row has hardware and versions.",
    ):
        assert sentence in page.text
    assert len(page.charts()) == 3  # the published


def test_json_stays_inside_of_its_script():
    assert "<" not in to_json({"a": "</script>"})
    assert json.loads(to_json({"a": "</script>&'\u2028"})) == {"a": "</script>&'\u2028"}


def test_a_run_stands_among_the_published_where_it_was_measured_on_imagenet(tmp_path):
    folder = write_run(tmp_path / "a", 6)
    assert find_place(read_record(folder), 0).top1 is None
    config = json.loads((folder / "config.yaml").read_text())
    config["model"]["num_classes"] = 1000
    (folder / "config.yaml").write_text(json.dumps(config))
    assert find_place(read_record(folder), 0).top1 is None  # on 5,000 images
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_rows(folder, [row | {"num_samples": 50_000} if row["kind"] == "val/ema" else row for row in rows])
    place = find_place(read_record(folder), 0)
    assert place.top1 == 86.0
    write_images(tmp_path / "data")
    for name, tta, sizes in (
        *(("real", None, [224]), ("val", "flip", [224]), ("val", None, [224, 256])),
        *(("val", None, [224]), ("imagenet", None, [224])),
    ):
        file = write_evaluation(folder, tmp_path / "data", name)
        evaluation = json.loads(file.read_text())
        evaluation["options"] |= {"tta": tta, "img_size": sizes}
        evaluation["result"] |= {"num_samples": 50_000, "top1": 90.0}
        file.write_text(json.dumps(evaluation))
        is_plain = name in ("val", "imagenet") and tta is None and len(sizes) == 1
        assert find_place(read_record(folder), 0).top1 == (90.0 if is_plain else 86.0)
        file.unlink()
    assert place.millions == pytest.approx(11.995428)
    assert place.gmacs == pytest.approx(12.7 / 6)


def test_throughput_is_of_the_devices_that_were_there(tmp_path):
    """5,200 images a second on eight, then 2,600 on four."""
    tiles = {name: note for name, _, note in summarize(read_record(write_run(tmp_path / "a", 40)), "run-1").tiles}
    found = re.fullmatch(r"median; (\d+) a device", tiles["throughput"])
    assert 640 < int(found[1]) < 660


def test_a_run_that_was_started_again_has_not_ended(tmp_path):
    folder = write_run(tmp_path / "a", 30)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "It finished." in summarize(read_record(folder), "run-1").sentence
    write_rows(folder, rows[:-1])
    assert "No row marks its end" in summarize(read_record(folder), "run-1").sentence
    (preempted,) = [i for i, row in enumerate(rows) if row.get("outcome") == "preempted"]
    write_rows(folder, rows[: preempted + 1])
    assert "waits for a restart" in summarize(read_record(folder), "run-1").sentence
    write_rows(folder, [*rows, rows[-1] | {"kind": "start", "time": rows[-1]["time"] + 9}])
    assert "No row marks its end" in summarize(read_record(folder), "run-1").sentence


def test_the_rank_that_is_the_slowest_is_named(tmp_path):
    folder = write_run(tmp_path / "a", 30)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for others, sentence in ((range(4), ""), ([3], " Rank 3 was the slowest in 100\u202f% of them.")):
        ranks = itertools.cycle(others)
        write_rows(folder, [row | {"slowest_rank": next(ranks)} if row["kind"] == "train" else row for row in rows])
        assert describe_bounds(read_record(folder)).partition("steps.")[2] == sentence


def test_every_stage_that_a_run_names_has_its_colour():
    assert set(STAGES) == set(measured.STAGES)
    assert set(STAGES) < set(PALETTE)


def test_colours_of_day_are_told_apart():
    """A night's colour is found by the day's."""
    days = [day for day, _ in PALETTE.values()]
    assert len(set(days)) == len(days)


def contrast(one: str, other: str) -> float:
    """By WCAG 2.2, 1 to 21."""
    parts = [[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in (one, other)]
    linear = [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color] for color in parts]
    light = sorted(0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in linear)
    return (light[1] + 0.05) / (light[0] + 0.05)


@pytest.mark.parametrize("time", [0, 1], ids=["day", "night"])
def test_words_can_be_read_and_lines_be_seen(time):
    for ground in ("page", "card"):
        for name, tones in PALETTE.items():
            least = 4.5 if name in ("ink", "muted", "alarm") else 3 if name.startswith("run-") else 1
            assert contrast(tones[time], PALETTE[ground][time]) >= least, (name, ground)


def test_words():
    assert duration(93_784) == "1\u202fd 2\u202fh"
    assert duration(60) == "1\u202fmin"
    assert short(90_320_836) == "90.3\u202fM"
    assert [short(999.4), short(999.7), short(9_994), short(999_700)] == ["999", "1\u202f000", "9\u202f994", "1\u202fM"]
    assert [gigabytes(999.4e6), gigabytes(999.8e6)] == ["999\u202fMB", "1\u202fGB"]
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert len(CLASSES) == 4


def run_main_with(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["gcvit.report", *map(str, words)])
    main()


def test_the_command_writes_beside_the_run_or_to_the_given_file(monkeypatch, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("tag: new\n")
    run_main_with(monkeypatch, tmp_path)
    run_main_with(monkeypatch, tmp_path, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "report.html").stat().st_size == (tmp_path / "page.html").stat().st_size
    assert "MB" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "several runs"),
        (["a", "--out", "."], "a folder"),
        (["a"], "no run here"),
        ([*"abcdefghi", "--out", "x"], "more runs than colours"),
    ],
)
def test_mistakes_are_named(monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run_main_with(monkeypatch, *words)
