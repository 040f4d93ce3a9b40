"""Plots of a cohort page as SVG: a dot a slide, coloured by group, that the page's script can find by its number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

__all__ = ["COLOURS", "OTHER", "Plot", "dot_plot", "group_numbers", "scatter_plot"]

Floats = NDArray[np.float64]

COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#4d4d4d", "#b22222")
"""After Okabe & Ito 2008, which people with any colour vision tell apart; two of them darkened for a white page."""
OTHER: Final = "other"
MOST_DOTS: Final = 4000
"""Slides that one plot shows; a page with more dots would be slow to move."""

_WIDTH: Final = 460
_HEIGHT: Final = 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 8.0, 40.0
_ROW: Final = 44.0
_LABEL: Final = 104.0


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot and what it is of."""

    title: str
    svg: Markup
    note: str = ""


def group_numbers(groups: Sequence[str]) -> tuple[list[str], list[int]]:
    """The most frequent groups, at most eight with ``other`` for the rest, and the number of each slide's among them.

    Args:
        groups: Of each slide; empty where not known.
    """
    counts: dict[str, int] = {}
    for name in groups:
        counts[name or "not stated"] = counts.get(name or "not stated", 0) + 1
    names = sorted(counts, key=lambda name: (name == "not stated", -counts[name], name))
    if len(names) > len(COLOURS):
        names = [*names[: len(COLOURS) - 1], OTHER]
    place = {name: number for number, name in enumerate(names)}
    return names, [place.get(name or "not stated", len(names) - 1) for name in groups]


def dot_plot(
    title: str,
    axis: str,
    values: Floats,
    groups: Sequence[int],
    names: Sequence[str],
    odd: Sequence[bool],
    *,
    log: bool = False,
    note: str = "",
) -> Plot:
    """A row of dots a group, its median marked.

    Args:
        title: What stands above.
        axis: What the values are, with the unit.
        values: (n,) NaN where not known; the number of a dot is its place here.
        groups: (n,) place in ``names``.
        names: Of the groups.
        odd: (n,) whether the slide stands apart; drawn with a ring.
        log: A logarithmic scale; values of 0 are drawn at its left end.
        note: What stands below.
    """
    known = np.flatnonzero(np.isfinite(values))
    left = _LABEL if len(names) > 1 else 14.0
    height = _TOP + _BOTTOM + _ROW * max(1, len(names)) * (1 if len(names) > 1 else 2)
    row = (height - _TOP - _BOTTOM) / max(1, len(names))
    scale, ticks = _scale(values[known], log)
    x_of = _spread(scale(values), left, _WIDTH - _RIGHT)
    parts = _x_axis(ticks, scale, left, height, axis)
    # Steps of the golden ratio spread neighbours evenly over the row, the same way every time.
    jitter = (np.arange(len(values)) * 0.618034) % 1 - 0.5
    for number, name in enumerate(names):
        middle = _TOP + row * (number + 0.5)
        own = [at for at in known.tolist() if groups[at] == number]
        if len(names) > 1:
            parts.append(
                Markup('<text class="name" x="{}" y="{}">{}<title>{}</title></text>').format(
                    _n(left - 8), _n(middle + 4), _cut(name), name
                )
            )
        if own:
            at_x = float(np.median(x_of[own]))
            line = Markup('<path class="median" d="M{} {}v{}"/>')
            parts.append(line.format(_n(at_x), _n(middle - row * 0.42), _n(row * 0.84)))
    y_of = np.array([_TOP + row * (group + 0.5) for group in groups]) + jitter * row * 0.7
    parts += _dots(known, x_of, y_of, groups, odd)
    told = f"{title}: {len(known)} slides" + (
        f", from {_tick(float(values[known].min()))} to {_tick(float(values[known].max()))}, "
        f"median {_tick(float(np.median(values[known])))}"
        if len(known)
        else ""
    )
    return Plot(title, _svg(parts, height, f"{told}. {axis}"), note)


def scatter_plot(
    title: str,
    axes: tuple[str, str],
    xy: Floats,
    groups: Sequence[int],
    odd: Sequence[bool],
    *,
    ticks: bool = True,
    note: str = "",
) -> Plot:
    """Dots in the plane.

    Args:
        title: What stands above.
        axes: What x and y are, with units.
        xy: (n, 2) NaN where not known; the number of a dot is its place here.
        groups: (n,) number of each slide's group.
        odd: (n,) whether the slide stands apart; drawn with a ring.
        ticks: Whether the numbers mean anything.
        note: What stands below.
    """
    known = np.flatnonzero(np.isfinite(xy).all(axis=1))
    left = _LEFT if ticks else 30.0
    scale_x, ticks_x = _scale(xy[known, 0], log=False)
    scale_y, ticks_y = _scale(xy[known, 1], log=False)
    x_of = _spread(scale_x(xy[:, 0]), left, _WIDTH - _RIGHT)
    y_of = _spread(scale_y(xy[:, 1]), _HEIGHT - _BOTTOM, _TOP)
    parts = _x_axis(ticks_x if ticks else [], scale_x, left, _HEIGHT, axes[0])
    bottom = _HEIGHT - _BOTTOM
    parts.append(Markup('<path class="axis" d="M{} {}V{}"/>').format(_n(left), _n(_TOP), _n(bottom)))
    for tick in ticks_y if ticks else []:
        y = float(_spread(scale_y(np.array([tick])), bottom, _TOP)[0])
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(_n(left), _n(y), _n(_WIDTH - _RIGHT)))
        parts.append(Markup('<text class="name" x="{}" y="{}">{}</text>').format(_n(left - 6), _n(y + 4), _tick(tick)))
    middle = (_TOP + bottom) / 2
    parts.append(
        Markup('<text class="label" x="{0}" y="{1}" transform="rotate(-90 {0} {1})">{2}</text>').format(
            13, _n(middle), axes[1]
        )
    )
    parts += _dots(known, x_of, y_of, groups, odd)
    return Plot(title, _svg(parts, _HEIGHT, f"{title}: {len(known)} slides. {axes[0]} against {axes[1]}"), note)


# ---- pieces


def _dots(
    known: NDArray[np.intp], x_of: Floats, y_of: Floats, groups: Sequence[int], odd: Sequence[bool]
) -> list[Markup]:
    """Circles with the number of their slide; odd ones last, so that they lie on top, and never left out."""
    ordinary = [int(at) for at in known if not odd[at]]
    ringed = [int(at) for at in known if odd[at]][:MOST_DOTS]
    room = max(0, MOST_DOTS - len(ringed))
    if len(ordinary) > room:
        ordinary = (
            [ordinary[at] for at in np.unique(np.linspace(0, len(ordinary) - 1, room).astype(int))] if room else []
        )
    return [
        Markup(f'<circle data-i="{at}" class="g{groups[at]}{" odd" if odd[at] else ""}" cx="{x_of[at]:.1f}" ')
        + Markup(f'cy="{y_of[at]:.1f}" r="{4.2 if odd[at] else 3}"/>')
        for at in (*ordinary, *ringed)
    ]


def _svg(parts: Sequence[Markup], height: float, told: str) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _n(height), told)
    return head + Markup("").join(parts) + Markup("</svg>")


class _Scale:
    """Values to shares of an axis; clipped where a logarithm has no place for them."""

    def __init__(self, low: float, high: float, *, log: bool) -> None:
        self.low, self.high, self._log = low, high, log

    def __call__(self, values: Floats) -> Floats:
        if self._log:
            with np.errstate(divide="ignore"):
                values = np.log10(values)
            return np.clip((values - math.log10(self.low)) / math.log10(self.high / self.low), 0, 1)
        return (values - self.low) / (self.high - self.low)


def _scale(values: Floats, log: bool) -> tuple[_Scale, list[float]]:
    """A scale that holds all values, and round numbers on it."""
    if log:
        positive = values[values > 0]
        if len(positive):
            low, high = float(positive.min()) / 1.3, float(positive.max()) * 1.3
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            steps = (1,) if len(decades) > 4 else (1, 3) if len(decades) > 2 else (1, 2, 3, 5)
            ticks = [step * 10.0**decade for decade in decades for step in steps]
            return _Scale(low, high, log=True), [tick for tick in ticks if low <= tick <= high]
        return _Scale(0.1, 10, log=True), [1.0]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    room = (high - low) * 0.05 or abs(low) * 0.1 or 1.0
    low, high = low - room, high + room
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    ticks = [round(step * number, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return _Scale(low, high, log=False), ticks


def _spread(shares: Floats, start: float, end: float) -> Floats:
    return start + shares * (end - start)


def _x_axis(ticks: Sequence[float], scale: _Scale, left: float, height: float, axis: str) -> list[Markup]:
    bottom = height - _BOTTOM
    parts = [Markup('<path class="axis" d="M{} {}H{}"/>').format(_n(left), _n(bottom), _n(_WIDTH - _RIGHT))]
    for tick in ticks:
        x = float(_spread(scale(np.array([tick])), left, _WIDTH - _RIGHT)[0])
        parts.append(Markup('<path class="grid" d="M{} {}V{}"/>').format(_n(x), _n(_TOP), _n(bottom)))
        parts.append(Markup('<text class="tick" x="{}" y="{}">{}</text>').format(_n(x), _n(bottom + 15), _tick(tick)))
    middle = (left + _WIDTH - _RIGHT) / 2
    parts.append(Markup('<text class="label" x="{}" y="{}">{}</text>').format(_n(middle), _n(height - 6), axis))
    return parts


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cut(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}…"
