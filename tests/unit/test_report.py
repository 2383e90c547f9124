"""The report: one page, complete in itself, with every text escaped and no secret."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from pantheraml.training import report

VOID = {"meta", "link", "br", "hr", "img"}


class Page(HTMLParser):
    """Notes tags, attributes and text, and that tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def entries(count=30):
    lines = [{"step": i, "loss": 4.0 / i, "lr": 1e-3 / i} for i in range(1, count + 1)]
    return [*lines, {"step": 10, "eval_loss": 0.9}, {"step": 20, "eval_loss": 0.5}]


def make(**changes):
    options = {
        "title": "tiny",
        "status": "finished",
        "entries": entries(),
        "facts": {"steps": "30"},
        "settings": {"learning_rate": 2e-4, "seed": 3407},
        "versions": {"torch": "2.13"},
        "adapted": "3 of 4 modules",
        "modules": [("model.norm", "norm", "triton"), ("lm_head", "head", "left: bias")],
    }
    return report.Report(**options | changes)


def test_the_page_is_well_formed_and_complete_in_itself():
    text = report.render(make())
    page = Page(text)
    assert not page.open
    assert page.tags.count("svg") == 2
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text
    words = " ".join(page.words)
    for word in ("tiny", "finished", "3407", "2.13", "3 of 4 modules", "model.norm", "left: bias", "step"):
        assert word in words


NASTY = "<script>alert(1)</script>\"'&\x1b[31m"


@pytest.mark.parametrize("where", ["title", "status", "adapted", "facts", "settings", "versions", "modules"])
def test_texts_are_escaped(where):
    value = {
        "facts": {NASTY: NASTY},
        "settings": {"output_dir": NASTY},
        "versions": {NASTY: NASTY},
        "modules": [(NASTY, NASTY, NASTY)],
    }.get(where, NASTY)
    text = report.render(make(**{where: value}))
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "script" not in Page(text).tags
    assert not Page(text).open


SECRETS = {
    "hub_token": "canary-1",
    "api_key": "canary-2",
    "wandb_api_key": "canary-3",
    "password": "canary-4",
    "client_secret": "canary-5",
    "repository": "https://user:canary-6@host/path",
    "run_name": "run hf_canary7canary7 end",
}


def test_secrets_are_left_out():
    text = report.render(make(settings=SECRETS | {"num_input_tokens_seen": 7, "eos_token": "</s>", "seed": 1}))
    assert "canary" not in text
    assert "https://***@host/path" in text
    assert "num_input_tokens_seen" in text
    assert "eos_token" in text


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0}],
        [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}],
        [{"step": i, "loss": 1 / i} for i in range(1, 5000)],
        [{"step": 1, "loss": -3.0}, {"step": 2, "loss": 1e9}],
        [{"step": 5, "eval_loss": 1.0}],
    ],
    ids=["none", "one", "constant", "not finite", "many", "wide", "evaluations only"],
)
def test_any_run_can_be_drawn(lines):
    text = report.render(make(entries=lines))
    assert not Page(text).open
    assert "nan" not in text.lower().replace("pantheraml", "")
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = ET.fromstring(svg)
        for line in root.iter("polyline"):
            points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
            assert len(points) <= 1001
            assert all(0 <= x <= 860 and 0 <= y <= 320 for x, y in points)
    assert len(text) < 400_000


def test_the_curve_falls_when_the_loss_does():
    svg = ET.fromstring(report.chart([(1, 4.0), (2, 2.0), (3, 1.0)], [], label="loss", smooth=False))
    heights = [float(pair.split(",")[1]) for pair in svg.find("polyline").get("points").split()]
    assert heights == sorted(heights)
    labels = [text.text for text in svg.iter("text")]
    assert {"step", "loss", "4", "1"} <= set(labels)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.37, 2.41), (1e-6, 3e-5), (-5, 1000), (3, 3), (0, 0)], ids=str)
def test_ticks_span_the_values_at_equal_distances(low, high):
    marks = report.ticks(low, high)
    assert marks[0] <= low + 1e-12
    assert marks[-1] >= high - 1e-12
    assert 2 <= len(marks) <= 9
    steps = [b - a for a, b in itertools.pairwise(marks)]
    assert max(steps) == pytest.approx(min(steps))


def test_a_moving_average_follows_without_lag():
    straight = [(float(i), 3.0 * i) for i in range(200)]
    assert report.moving_average(straight)[10:-10] == straight[10:-10]
    noisy = [(float(i), (i % 2) * 2.0) for i in range(200)]
    assert all(0.7 < y < 1.3 for _, y in report.moving_average(noisy))
    assert report.moving_average([(1.0, 5.0)]) == [(1.0, 5.0)]


def test_writing_replaces_the_page_whole(tmp_path):
    folder = tmp_path / "new"
    first = report.write(make(title="one"), folder)
    assert report.write(make(title="two"), folder) == first
    assert "two" in first.read_text()
    assert [path.name for path in folder.iterdir()] == ["report.html"]
