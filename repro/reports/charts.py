"""Line charts as SVG, as wide as their page and readable without scripts, with the figures for a script that does more.

The plot is an inner SVG in its own coordinates, 0 to `SIDE` each way, which is stretched; lines keep their width by
`vector-effect`. Everything that must not be stretched, which is text and rules, is placed outside it by percentages. No
text reaches the markup but through `Markup.format`, and there are no style attributes, which the page's policy forbids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

SIDE = 10_000
COLOURS = 6  # in the style sheet, each with its own dashes; further runs begin again with other dashes
DASH_SETS = 2
TICKS = 5
TABLE_ROWS = 24
POINTS = 500  # of a line: more cannot be told apart on a screen
BANDS = 3  # up to so many runs have their range drawn; more would hide one another
ROOM = 0.04  # left free above and below, as a share of the height


@dataclass(frozen=True)
class Line:
    """A run's values."""

    name: str  # of the run
    number: int  # of the run, which decides on colour and dashes
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()  # the range that each value stands for, or nothing
    high: Sequence[float] = ()
    dotted: bool = False  # whether each value is marked


@dataclass(frozen=True)
class Published:
    """Values that a run is held against, at the same places."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """What is to be drawn."""

    key: str  # an identifier, unique on the page
    title: str
    lines: Sequence[Line]
    published: Sequence[Published] = ()
    note: str = ""  # what a value is, where the title does not say it
    last_x: float = 1.0  # where the horizontal axis ends; it begins at 0
    further: bool = False  # folded away, behind all others


@dataclass(frozen=True)
class Drawn:
    """A chart as the page takes it."""

    chart: Chart
    svg: Markup
    summary: str  # the chart in words
    header: list[str]
    rows: list[list[str]]  # the chart as a table, about `TABLE_ROWS` of them
    figures: dict[str, Any] = field(repr=False)  # what a script needs to draw it anew


def thinned(x: np.ndarray, y: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """Average values over buckets of `size` neighbours, leaving out what is not finite.

    Returns:
        (last x, mean, least, most) of each bucket that has anything, float64[ceil(n / size)].
    """
    missing = -len(x) % size
    x = np.pad(np.asarray(x, float), (0, missing), mode="edge").reshape(-1, size)
    y = np.pad(np.asarray(y, float), (0, missing), constant_values=np.nan).reshape(-1, size)
    kept = np.isfinite(y).any(axis=1)
    x, y = x[kept], np.where(np.isfinite(y), y, np.nan)[kept]
    return x[:, -1], np.nanmean(y, axis=1), np.nanmin(y, axis=1), np.nanmax(y, axis=1)


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range, about `TICKS` of them."""
    raw = (high - low) / (TICKS - 1)
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
    axes = _Axes((0.0, float(chart.last_x)), _limits(chart))
    banded = len(chart.lines) <= BANDS
    curves = [_line(line, axes, banded=banded) for line in chart.lines]
    svg = Markup(
        '<svg class="plot" role="img" aria-labelledby="{key}-title" aria-describedby="{key}-summary">'
        '<g class="axes">{axes}</g>'
        '<svg class="inner" viewBox="0 0 {side} {side}" preserveAspectRatio="none" width="100%" height="100%">{inner}'
        '</svg><line class="cursor" y1="0" y2="100%" x1="0" x2="0"/></svg>'
    ).format(
        key=chart.key,
        axes=Markup("").join(_labels(axes)),
        side=SIDE,
        inner=Markup("").join([*curves, *(_published(found, axes) for found in chart.published)]),
    )
    figures = {
        "key": chart.key,
        "x": axes.x,
        "y": axes.y,
        "lines": [{"name": line.name, "number": line.number, **_rounded(line)} for line in chart.lines],
        "published": [{"name": found.name, **_rounded(found)} for found in chart.published],
    }
    header, rows = _table(chart)
    return Drawn(chart, svg, _summary(chart), header, rows, figures)


def line_class(run: int) -> str:
    """The style sheet's classes of a run's colour and dashes."""
    return f"run c{run % COLOURS} d{run % COLOURS + (run // COLOURS) % DASH_SETS * COLOURS}"


def _limits(chart: Chart) -> tuple[float, float]:
    values = [value for line in chart.lines for value in (*line.y, *line.low, *line.high)]
    values += [value for found in chart.published for value in found.y]
    low, high = min(values), max(values)
    room = (high - low) * ROOM or abs(high) * ROOM or ROOM
    # A quantity that is never negative is not given negative room.
    return (low - room if low < 0 else max(low - room, 0.0)), high + room


@dataclass(frozen=True)
class _Axes:
    """The first and the last value of each axis."""

    x: tuple[float, float]
    y: tuple[float, float]

    def path(self, x: Iterable[float], y: Iterable[float]) -> str:
        """The points of a line, without the command that begins it."""
        points = zip(x, y, strict=True)
        return "L".join(f"{round(SIDE * _share(a, self.x))} {round(SIDE * (1 - _share(b, self.y)))}" for a, b in points)

    def dots(self, x: Iterable[float], y: Iterable[float]) -> str:
        """A path of no length at each point: with round ends it is a dot that is not stretched."""
        return "".join(f"M{self.path([a], [b])}h0" for a, b in zip(x, y, strict=True))


def _share(value: float, limits: tuple[float, float]) -> float:
    return (value - limits[0]) / (limits[1] - limits[0])


def _line(line: Line, axes: _Axes, *, banded: bool) -> Markup:
    parts = []
    if line.dotted and len(line.low):
        ranges = zip(line.x, line.low, line.high, strict=True)
        parts.append(("range", "".join(f"M{axes.path([x, x], [low, high])}" for x, low, high in ranges)))
    elif banded and len(line.low):
        there, back = axes.path(line.x, line.high), axes.path(line.x[::-1], line.low[::-1])
        parts.append(("band", f"M{there}L{back}Z"))
    parts.append(("line", f"M{axes.path(line.x, line.y)}"))
    if line.dotted or len(line.x) == 1:
        parts.append(("dots", axes.dots(line.x, line.y)))
    paths = Markup("").join(Markup('<path class="{}" d="{}"/>').format(*part) for part in parts)
    return Markup('<g class="{}" data-run="{}">{}</g>').format(line_class(line.number), line.number, paths)


def _published(found: Published, axes: _Axes) -> Markup:
    return Markup(
        '<g class="published" data-run="published"><path class="ring" d="{0}"/><path class="hole" d="{0}"/></g>'
    ).format(axes.dots(found.x, found.y))


def _labels(axes: _Axes) -> Iterable[Markup]:
    for value in nice_ticks(*axes.y):
        yield Markup('<line x1="0" x2="100%" y1="{0}" y2="{0}"/><text x="-8" y="{0}" dy="0.32em">{1}</text>').format(
            f"{100 * (1 - _share(value, axes.y)):.2f}%", number(value)
        )
    for value in nice_ticks(*axes.x):
        if value == int(value):
            yield Markup('<text class="x" x="{:.2f}%" y="100%" dy="1.6em">{}</text>').format(
                100 * _share(value, axes.x), f"{value:,.0f}"
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
    sets: list[Line | Published] = [*chart.lines, *chart.published]
    columns = [dict(zip(found.x, found.y, strict=True)) for found in sets]
    steps = sorted({x for line in chart.lines for x in line.x})
    shown = {*steps[:: max(len(steps) // TABLE_ROWS, 1)], steps[-1], *(x for found in chart.published for x in found.x)}
    rows = [
        [f"{step:,.0f}", *(number(values[step]) if step in values else "" for values in columns)]
        for step in sorted(shown)
    ]
    return ["step", *(found.name for found in sets)], rows


def _rounded(found: Line | Published) -> dict[str, list[float]]:
    values = {"x": found.x, "y": found.y}
    return {axis: [int(v) if v == int(v) else float(f"{v:.5g}") for v in found] for axis, found in values.items()}
