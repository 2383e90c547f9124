"""``report.html``: one self-contained page about a run. No script, nothing fetched, every text escaped."""

from __future__ import annotations

import html
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "report.html"
_SECRET_NAME = re.compile(r"token|secret|password|passwd|api_?key|credential|authorization", re.IGNORECASE)
# Names that hold the word token and are no secret.
_NO_SECRET = re.compile(r"tokens|eos_token|pad_token|bos_token|token_accuracy|trainable_token", re.IGNORECASE)
_SECRET_VALUES = (
    (re.compile(r"(?<=://)[^/\s@]+@"), "***@"),
    (re.compile(r"\b(?:hf|sk|ghp|gho|glpat|wandb)[_-][A-Za-z0-9_-]{8,}"), "***"),
)

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

_WIDTH, _HEIGHT = 860, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 40
_MAX_POINTS = 1000
_TICKS = 5
_MAX_REACH = 50

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5b6675;--line:#d8dee6;--paper:#fff;--card:#f6f8fa;
--a:#2563eb;--b:#d97706}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa5b4;--line:#303845;--paper:#12161c;--card:#1a2029;
--a:#6ea0ff;--b:#f5b04c}}
body{margin:0 auto;max-width:920px;padding:2rem 1rem;font:15px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--paper)}
h1{font-size:1.5rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}.soft{color:var(--soft)}
.cards{display:flex;flex-wrap:wrap;gap:.6rem;margin:1.2rem 0}.card{background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:.5rem .9rem}.card b{display:block;font-size:1.15rem}
svg{width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}.grid{stroke:var(--line)}.axis{stroke:var(--soft)}
.raw{fill:none;stroke:var(--a);stroke-opacity:.3}.smooth{fill:none;stroke:var(--a);stroke-width:2}
.eval{fill:none;stroke:var(--b);stroke-width:2}.dot{fill:var(--b)}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.2rem .6rem .2rem 0;vertical-align:top;
border-bottom:1px solid var(--line);overflow-wrap:anywhere}th{font-weight:500;color:var(--soft);width:16rem}
details{margin-top:1rem}summary{cursor:pointer}
"""


@dataclass
class Report:
    """What the page says.

    Attributes:
        title: Heading: the model's name.
        status: How the run ended, in words.
        entries: Lines of ``metrics.jsonl``.
        facts: Figures shown at the top.
        settings: Options of the run. Those named like a secret, and credentials inside values, are left out.
        versions: Package name to version.
        adapted: Summary line of the adaptation, or None when there was none.
        modules: ``(module, role, what)`` for the modules that were swapped or left, ``what`` being the implementation
            or the reason.
    """

    title: str
    status: str
    entries: Sequence[Mapping[str, Any]]
    facts: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    adapted: str | None = None
    modules: Sequence[tuple[str, str, str]] = ()


def write(report: Report, folder: Path) -> Path:
    """Write ``report.html`` into ``folder``; a reader never sees half of it. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / FILE, folder / f".{FILE}.{os.getpid()}"
    partial.write_text(render(report), encoding="utf-8")
    partial.replace(path)
    return path


def render(report: Report) -> str:
    """The page as text."""
    losses = _series(report.entries, "loss")
    evaluations = _series(report.entries, "eval_loss")
    parts = [
        f"<h1>{_text(report.title)}</h1>",
        f'<p class="soft">{_text(report.status)}</p>',
        '<div class="cards">',
        *(f'<div class="card">{_text(name)}<b>{_text(value)}</b></div>' for name, value in report.facts.items()),
        "</div>",
        "<h2>Loss</h2>",
        chart(losses, evaluations, label="loss") if losses or evaluations else "<p>No step was logged.</p>",
    ]
    rates = _series(report.entries, "lr")
    if len(rates) > 1:
        parts += ["<h2>Learning rate</h2>", chart(rates, [], label="learning rate", smooth=False)]
    if report.adapted:
        rows = "".join(
            f"<tr><td>{_text(module)}</td><td>{_text(role)}</td><td>{_text(what)}</td></tr>"
            for module, role, what in report.modules
        )
        parts += [
            "<h2>Adaptation</h2>",
            f"<p>{_text(report.adapted)}</p>",
            f"<details><summary>{len(report.modules):,} modules</summary><table>{rows}</table></details>"
            if rows
            else "",
        ]
    parts += ["<h2>Settings</h2>", _table(redacted(report.settings)), "<h2>Versions</h2>", _table(report.versions)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(report.title)}: PantheraML report</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def redacted(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings without secrets: neither options named like one, nor credentials inside the values."""
    shown = {}
    for name, value in settings.items():
        if value is None or (_SECRET_NAME.search(name) and not _NO_SECRET.search(name)):
            continue
        text = str(value)
        for pattern, replacement in _SECRET_VALUES:
            text = pattern.sub(replacement, text)
        shown[name] = text
    return shown


def chart(
    points: Sequence[tuple[float, float]],
    marks: Sequence[tuple[float, float]],
    *,
    label: str,
    smooth: bool = True,
) -> str:
    """An SVG line chart over the step.

    Args:
        points: ``(step, value)`` of the main line.
        marks: ``(step, value)`` of a second line with dots, the evaluations.
        label: Name of the vertical axis.
        smooth: Whether to draw the main line faintly and a moving average over it.
    """
    everything = [*points, *marks]
    x_ticks = ticks(min(x for x, _ in everything), max(x for x, _ in everything), whole=True)
    y_ticks = ticks(min(y for _, y in everything), max(y for _, y in everything))
    x_low, x_high = min(x_ticks[0], everything[0][0]), max(x_ticks[-1], max(x for x, _ in everything))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT) + _LEFT
        down = (y_high - y) / ((y_high - y_low) or 1) * (_HEIGHT - _TOP - _BOTTOM) + _TOP
        return round(across, 1), round(down, 1)

    def line(values: Iterable[tuple[float, float]], kind: str) -> str:
        path = " ".join(f"{x},{y}" for x, y in (place(*value) for value in values))
        return f'<polyline class="{kind}" points="{path}"/>'

    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(label)} over the steps">']
    for value in y_ticks:
        _, y = place(x_low, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{value:.4g}</text>')
    for value in x_ticks:
        x, _ = place(value, y_low)
        parts.append(f'<line class="axis" x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 5}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{value:,.0f}</text>')
    parts.append(f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>')
    parts.append(
        f'<text x="14" y="{(_TOP + bottom) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(_TOP + bottom) / 2})">{_text(label)}</text>'
    )
    if points:
        parts.append(line(_thinned(points), "raw" if smooth else "smooth"))
        if smooth:
            parts.append(line(_thinned(moving_average(points)), "smooth"))
    if marks:
        parts.append(line(_thinned(marks), "eval"))
        parts += [
            f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>' for x, y in (place(*mark) for mark in _thinned(marks))
        ]
        parts.append(
            f'<text x="{right - 8}" y="{_TOP + 14}" text-anchor="end">blue: training, orange: evaluation</text>'
        )
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round values at equal distances that span ``low`` to ``high``."""
    if high <= low:
        spread = max(abs(low) * 0.1, 1 if whole else 1e-3)
        low, high = low - spread, high + spread
    raw = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    step = max(1.0, round(step)) if whole else step
    first = math.floor(low / step) if not whole else math.ceil(low / step)
    last = math.ceil(high / step) if not whole else math.floor(high / step)
    return [index * step for index in range(first, last + 1)] or [low]


def moving_average(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, each with the mean over about a twentieth of them around it."""
    reach = min(len(points) // 40, _MAX_REACH)
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    smoothed = []
    for index, (x, _) in enumerate(points):
        low, high = max(0, index - reach), min(len(points), index + reach + 1)
        smoothed.append((x, (sums[high] - sums[low]) / (high - low)))
    return smoothed


def _series(entries: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """``(step, value)`` of the finite values; one at a step, the last."""
    values = {entry["step"]: entry[name] for entry in entries if isinstance(entry.get(name), int | float)}
    return [(float(step), float(value)) for step, value in sorted(values.items()) if math.isfinite(value)]


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    stride = -(-len(points) // _MAX_POINTS)
    return points if stride <= 1 else [*points[::stride], points[-1]]


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{cells}</table>"


def _text(value: Any) -> str:
    return html.escape(_CONTROL.sub("", str(value)), quote=True)
