"""Line charts as SVG, as wide as their page and readable without scripts, with the figures for a script that does more.

The plot is an inner SVG in its own coordinates, 0 to `SIDE` each way, which is stretched; lines keep their width by
`vector-effect`. Everything that must not be stretched, which is text and rules, is placed outside it by percentages. No
text reaches the markup but through `escape`, and there are no style attributes, which the page's policy forbids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup, escape

SIDE = 10_000
COLOURS = 6
"""In the style sheet, each with its own dashes; further runs begin again with other dashes."""
DASH_SETS = 2
TICKS = 5
TABLE_ROWS = 24
POINTS = 500
"""Of a line: more cannot be told apart on a screen."""
BANDS = 3
"""Up to so many runs have their range drawn; more would hide one another."""
ROOM = 0.04
"""Left free above and below, as a share of the height."""


@dataclass(frozen=True)
class Line:
    """A run's values.

    Attributes:
        name: of the run.
        number: of the run, which decides on colour and dashes.
        low, high: the range that each value stands for, or nothing.
        dotted: whether each value is marked.
    """

    name: str
    number: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dotted: bool = False


@dataclass(frozen=True)
class Published:
    """Values that a run is held against, at the same places."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    margin: float = 0.0


@dataclass(frozen=True)
class Chart:
    """What is to be drawn.

    Attributes:
        key: an identifier, unique on the page.
        note: what a value is, where the title does not say it.
        last_x: where the horizontal axis ends; it begins at 0.
        further: folded away, behind all others.
    """

    key: str
    title: str
    lines: Sequence[Line]
    published: Sequence[Published] = ()
    note: str = ""
    last_x: float = 1.0
    further: bool = False


@dataclass(frozen=True)
class Drawn:
    """A chart as the page takes it.

    Attributes:
        summary: the chart in words.
        header, rows: the chart as a table, of about `TABLE_ROWS` rows.
        figures: what a script needs to draw it anew.
    """

    chart: Chart
    svg: Markup
    summary: str
    header: list[str]
    rows: list[list[str]]
    figures: dict[str, Any] = field(repr=False)


def thinned(x: np.ndarray, y: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """Average values over buckets of `size` neighbours, leaving out what is not finite.

    Returns:
        (last x, mean, least, most) of each bucket that has anything, float64[ceil(n / size)].
    """
    missing = -len(x) % size
    x = np.pad(np.asarray(x, float), (0, missing), mode="edge").reshape(-1, size)
    y = np.pad(np.asarray(y, float), (0, missing), constant_values=np.nan).reshape(-1, size)
    finite = np.isfinite(y)
    kept = finite.any(axis=1)
    x, y, finite = x[kept], y[kept], finite[kept]
    mean = np.where(finite, y, 0.0).sum(axis=1) / finite.sum(axis=1)
    return x[:, -1], mean, np.where(finite, y, np.inf).min(axis=1), np.where(finite, y, -np.inf).max(axis=1)


def bucket_size(longest: int) -> int:
    """How many neighbours are averaged so that the longest line has at most `POINTS`."""
    return max(-(-longest // POINTS), 1)


def nice_ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Round numbers within a range, about `count` of them."""
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def number(value: float) -> str:
    """Write a number as briefly as its size allows."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4g}"


def draw(chart: Chart) -> Drawn:
    """Draw a chart of at least one finite value."""
    low, high = _limits(chart)
    x_range, y_range = (0.0, float(chart.last_x)), (low, high)
    bands = len(chart.lines) <= BANDS
    inner = Markup("").join(
        [
            *(_line(line, x_range, y_range, banded=bands) for line in chart.lines),
            *(_published(found, x_range, y_range) for found in chart.published),
        ]
    )
    axes = Markup("").join([*_rules(y_range), *_columns(x_range)])
    svg = Markup(
        '<svg class="plot" role="img" aria-labelledby="{key}-title" aria-describedby="{key}-summary">'
        '<g class="axes">{axes}</g>'
        '<svg class="inner" viewBox="0 0 {side} {side}" preserveAspectRatio="none" width="100%" height="100%">{inner}'
        '</svg><line class="cursor" y1="0" y2="100%" x1="0" x2="0"/></svg>'
    ).format(key=chart.key, axes=axes, side=SIDE, inner=inner)
    figures = {
        "key": chart.key,
        "x": x_range,
        "y": y_range,
        "lines": [
            {"name": line.name, "number": line.number, "x": _rounded(line.x), "y": _rounded(line.y)}
            for line in chart.lines
        ],
        "published": [
            {"name": found.name, "x": _rounded(found.x), "y": _rounded(found.y)} for found in chart.published
        ],
    }
    header, rows = _table(chart)
    return Drawn(chart, svg, _summary(chart), header, rows, figures)


def line_class(run: int) -> str:
    """The style sheet's classes of a run's colour and dashes."""
    return f"run c{run % COLOURS} d{run % COLOURS + (run // COLOURS) % DASH_SETS * COLOURS}"


def _limits(chart: Chart) -> tuple[float, float]:
    values = [value for line in chart.lines for value in (*line.y, *line.low, *line.high)]
    values += [y + sign * found.margin for found in chart.published for y in found.y for sign in (-1, 1)]
    low, high = min(values), max(values)
    room = (high - low) * ROOM or abs(high) * ROOM or ROOM
    # A quantity that is never negative is not given negative room.
    return (low - room if low < 0 else max(low - room, 0.0)), high + room


def _place(value: float, limits: tuple[float, float]) -> float:
    return (value - limits[0]) / (limits[1] - limits[0])


def _path(x: Iterable[float], y: Iterable[float], x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    points = (
        f"{round(SIDE * _place(a, x_range))} {round(SIDE * (1 - _place(b, y_range)))}"
        for a, b in zip(x, y, strict=True)
    )
    return "L".join(points)


def _line(line: Line, x_range: tuple[float, float], y_range: tuple[float, float], *, banded: bool) -> Markup:
    parts = []
    if banded and len(line.low) and not line.dotted:
        there, back = (
            _path(x, y, x_range, y_range) for x, y in ((line.x, line.high), (line.x[::-1], list(line.low)[::-1]))
        )
        parts.append(Markup('<path class="band" d="M{}L{}Z"/>').format(there, back))
    if line.dotted and len(line.low):
        ranges = "".join(
            f"M{_path([x, x], [low, high], x_range, y_range)}"
            for x, low, high in zip(line.x, line.low, line.high, strict=True)
        )
        parts.append(Markup('<path class="range" d="{}"/>').format(ranges))
    parts.append(Markup('<path class="line" d="M{}"/>').format(_path(line.x, line.y, x_range, y_range)))
    if line.dotted or len(line.x) == 1:
        parts.append(Markup('<path class="dots" d="{}"/>').format(_dots(line.x, line.y, x_range, y_range)))
    return Markup('<g class="{}" data-run="{}">{}</g>').format(
        line_class(line.number), line.number, Markup("").join(parts)
    )


def _published(found: Published, x_range: tuple[float, float], y_range: tuple[float, float]) -> Markup:
    dots = _dots(found.x, found.y, x_range, y_range)
    margin = Markup("")
    if found.margin:
        reach = "".join(
            f"M{_path([x, x], [y - found.margin, y + found.margin], x_range, y_range)}"
            for x, y in zip(found.x, found.y, strict=True)
        )
        margin = Markup('<path class="margin" d="{}"/>').format(reach)
    return Markup(
        '<g class="published" data-run="published">{}<path class="ring" d="{}"/><path class="hole" d="{}"/></g>'
    ).format(margin, dots, dots)


def _dots(x: Iterable[float], y: Iterable[float], x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    # A path of no length with round ends is a dot that is not stretched.
    return "".join(f"M{_path([a], [b], x_range, y_range)}h0" for a, b in zip(x, y, strict=True))


def _rules(y_range: tuple[float, float]) -> Iterable[Markup]:
    for value in nice_ticks(*y_range):
        place = f"{100 * (1 - _place(value, y_range)):.2f}%"
        yield Markup('<line x1="0" x2="100%" y1="{0}" y2="{0}"/><text x="-8" y="{0}" dy="0.32em">{1}</text>').format(
            place, escape(number(value))
        )


def _columns(x_range: tuple[float, float]) -> Iterable[Markup]:
    for value in nice_ticks(*x_range):
        if value == int(value):
            yield Markup('<text class="x" x="{:.2f}%" y="100%" dy="1.6em">{}</text>').format(
                100 * _place(value, x_range), f"{value:,.0f}"
            )


def _summary(chart: Chart) -> str:
    said = []
    for line in chart.lines:
        y = np.asarray(line.y)
        text = f"{line.name}: {number(y[0])} at step {line.x[0]:,.0f}"
        if len(y) > 1:
            text += (
                f", {number(y[-1])} at step {line.x[-1]:,.0f};"
                f" least {number(y.min())} at {line.x[int(y.argmin())]:,.0f},"
                f" most {number(y.max())} at {line.x[int(y.argmax())]:,.0f}"
            )
        said.append(text)
    return ". ".join(said) + "."


def _table(chart: Chart) -> tuple[list[str], list[list[str]]]:
    columns = [(line.name, dict(zip(line.x, line.y, strict=True))) for line in chart.lines]
    published = {x for found in chart.published for x in found.x}
    steps = sorted({x for _, values in columns for x in values})
    keep = set(steps[:: max(len(steps) // TABLE_ROWS, 1)]) | {steps[-1]} | published
    columns += [(found.name, dict(zip(found.x, found.y, strict=True))) for found in chart.published]
    rows = [
        [f"{step:,.0f}", *(number(values[step]) if step in values else "" for _, values in columns)]
        for step in sorted(keep)
    ]
    return ["step", *(name for name, _ in columns)], rows


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.5g}") if value != int(value) else int(value) for value in values]
