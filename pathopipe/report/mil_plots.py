"""Plots of a model's figures: ROC, precision and recall, calibration, confusion, survival, sites; with their counts."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from pathopipe.files import durable_file
from pathopipe.mil.cases import Cases
from pathopipe.mil.curves import Band, calibration_bins, confusion_counts, precision_recall_band, roc_band
from pathopipe.mil.evaluate import MAIN_FIGURE, TITLES, Figure, FigureTable

__all__ = [
    "PLOT_STYLE",
    "draw_calibration",
    "draw_confusion",
    "draw_precision_recall",
    "draw_regression",
    "draw_roc",
    "draw_sites",
    "draw_survival",
    "save_canvas",
    "write_plots",
]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_GREY: Final = "#6b6b6b"
PLOT_STYLE: Final[dict[str, Any]] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.linewidth": 0.8,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "legend.fontsize": 8,
    # Without a salt of its own every SVG would have other ids.
    "svg.hashsalt": "pathopipe",
    "svg.fonttype": "none",
}
_DPI = 200
_SQUARE_INCH = (4.4, 4.6)
_MOST_BANDS = 3
_MOST_CELLS = 15


def write_plots(folder: Path, table: FigureTable, cases: Cases, *, svg: bool = False) -> list[Path]:
    """Draw what fits the kind of target into PNG files (and SVG, if wanted), the same bytes every time.

    Plots that need a class which is not there are left out.

    Returns:
        The files.
    """
    drawings: dict[str, Callable[[], Canvas]] = {}
    if _parts(cases):
        drawings["roc"] = lambda: draw_roc(table, cases)
        drawings["precision-recall"] = lambda: draw_precision_recall(table, cases)
    if cases.kind in ("binary", "multiclass"):
        drawings["calibration"] = lambda: draw_calibration(table, cases)
    if cases.kind in ("binary", "multiclass", "ordinal"):
        drawings["confusion"] = lambda: draw_confusion(table, cases)
    if cases.kind == "regression":
        drawings["prediction"] = lambda: draw_regression(table, cases)
    if cases.kind.startswith("survival"):
        drawings["survival"] = lambda: draw_survival(table, cases)
    if len(_site_figures(table)) > 1:
        drawings["sites"] = lambda: draw_sites(table)
    written = []
    with style.context(["default", PLOT_STYLE]):
        for name, draw in drawings.items():
            canvas = draw()
            written.append(save_canvas(folder / f"{name}.png", canvas))
            if svg:
                written.append(save_canvas(folder / f"{name}.svg", canvas))
    return written


def save_canvas(path: Path, canvas: Canvas) -> Path:
    """Write a figure as PNG or SVG, whole or not at all, without date or version in it."""
    data = io.BytesIO()
    if path.suffix == ".svg":
        FigureCanvasSVG(canvas).print_svg(data, metadata={"Date": None})
    else:
        FigureCanvasAgg(canvas).print_png(data, metadata={"Software": None})
    with durable_file(path) as file:
        file.write(data.getvalue())
    return path


def _canvas(size_inch: tuple[float, float] = _SQUARE_INCH) -> Canvas:
    return Canvas(figsize=size_inch, dpi=_DPI, layout="constrained")


def _parts(cases: Cases) -> list[tuple[str, Cases]]:
    """Binary targets with both classes that a ROC can show: name of the label (empty for the only one), and cases."""
    if cases.kind == "binary":
        parts = [("", cases)]
    elif cases.kind == "multiclass":
        parts = [(name, cases.against_rest(number)) for number, name in enumerate(cases.classes)]
    elif cases.kind == "multilabel":
        parts = [(name, cases.label(number)) for number, name in enumerate(cases.classes)]
    else:
        parts = []
    return [(name, part) for name, part in parts if 0 < part.truth.sum() < len(part)]


def _counted(table: FigureTable, figure: Figure, name: str) -> str:
    return f"n = {figure.n_rows} {table.unit}, {figure.n_positive} {name}; 95 % intervals"


# ---- curves


def draw_roc(table: FigureTable, cases: Cases) -> Canvas:
    """True against false positive share, with the 95 % band over patients."""
    canvas, axes = _curves(table, cases, "auroc", roc_band, "default")
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xlabel="false positive share (1 - specificity)", ylabel="true positive share (sensitivity)")
    axes.set_title(f"ROC{_of(cases)}")
    return canvas


def draw_precision_recall(table: FigureTable, cases: Cases) -> Canvas:
    """Precision against recall, with the 95 % band over patients; what chance gives is dashed.

    A precision holds back to the recall before it, as average precision counts it.
    """
    canvas, axes = _curves(table, cases, "auprc", precision_recall_band, "steps-pre")
    parts = _shown(cases)
    for number, (_, part) in enumerate(parts):
        colour = _GREY if len(parts) == 1 else _COLOURS[number]
        axes.axhline(part.truth.mean(), color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xlabel="recall (sensitivity)", ylabel="precision (positive predictive value)")
    axes.set_title(f"Precision and recall{_of(cases)}")
    return canvas


def _of(cases: Cases) -> str:
    return f", {cases.classes[1]} against {cases.classes[0]}" if cases.kind == "binary" else ""


def _shown(cases: Cases) -> list[tuple[str, Cases]]:
    """The labels that are drawn: all, or as many of the most frequent as there are colours, in order."""
    parts = _parts(cases)
    frequent = sorted(parts, key=lambda part: -part[1].truth.sum())[: len(_COLOURS)]
    kept = {name for name, _ in frequent}
    return [part for part in parts if part[0] in kept]


def _curves(
    table: FigureTable, cases: Cases, name: str, band_of: Callable[[Cases], Band], drawstyle: str
) -> tuple[Canvas, Axes]:
    parts, n_all = _shown(cases), len(_parts(cases))
    canvas = _canvas((4.4, 4.6 + 0.19 * (len(parts) - 1)))
    axes = canvas.subplots()
    for (label, part), colour in zip(parts, _COLOURS, strict=False):
        band, figure = band_of(part), table.find(name, label=label)
        if band.low is not None and band.high is not None and len(parts) <= _MOST_BANDS:
            axes.fill_between(band.grid, band.low, band.high, color=colour, alpha=0.15, linewidth=0)
        text = f"{TITLES[name]} {figure.text()}\n{_counted(table, figure, part.classes[1])}"
        if label:
            text = f"{_cut(label)}: {figure.text()}, {figure.n_positive} of {figure.n_rows}"
        axes.plot(band.x, band.y, color=colour, linewidth=1.6, label=text, drawstyle=drawstyle)
    what = f"{TITLES[name]} of " if cases.kind != "binary" else ""
    which = f"the {len(parts)} most frequent of {n_all} classes" if len(parts) < n_all else "each class"
    title = f"{what}{which}, 95 % intervals over {table.n_patients} patients" if what else None
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    handles, texts = axes.get_legend_handles_labels()
    canvas.legend(handles, texts, loc="outside lower center", title=title, title_fontsize=8)
    return canvas, axes


def draw_calibration(table: FigureTable, cases: Cases) -> Canvas:
    """Found share against stated probability, with Wilson's 95 % intervals, over how many rows are in each bin."""
    canvas = _canvas((4.4, 5.0))
    axes, below = canvas.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    bins, error = calibration_bins(cases), table.find("ece")
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    lengths = np.stack([bins.found - bins.low, bins.high - bins.found]).clip(0)
    text = f"ECE {error.text()}\nn = {error.n_rows} {table.unit}"
    if cases.kind == "binary":
        slope = table.find("calibration_slope")
        text = f"ECE {error.text()}, slope {slope.text()}\n{_counted(table, error, cases.classes[1])}"
    axes.errorbar(
        bins.stated,
        bins.found,
        lengths,
        color=_COLOURS[0],
        marker="o",
        markersize=4,
        linewidth=1.2,
        capsize=2,
        label=text,
    )
    axes.set(ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
    if cases.kind == "binary":
        axes.set(ylabel=f"share that is {cases.classes[1]}")
        score, stated = cases.scores, f"stated probability of {cases.classes[1]}"
    else:
        axes.set(ylabel="share that is right")
        score, stated = cases.scores.max(axis=1), "stated probability of the most probable class"
    axes.set_title("Calibration")
    below.hist(score, bins=np.linspace(0, 1, 21).tolist(), color=_COLOURS[0], alpha=0.6)
    below.set(xlabel=stated, ylabel=table.unit)
    canvas.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    return canvas


def draw_confusion(table: FigureTable, cases: Cases) -> Canvas:
    """Counts of label and decision; shaded by the share of the label's row."""
    counts, k = confusion_counts(cases), len(cases.classes)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(9.0, 2.6 + 0.62 * k)
    canvas = _canvas((side + 0.4, side))
    axes = canvas.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1.25)
    names = [_cut(name) for name in cases.classes]
    axes.set_xticks(range(k), names, rotation=0 if max(map(len, names)) * k < 36 else 90)
    axes.set_yticks(range(k), [f"{name}\n(n = {n})" for name, n in zip(names, counts.sum(axis=1), strict=True)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, column in np.ndindex(k, k):
        text = f"{counts[row, column]}" + (f"\n{share[row, column]:.0%}" if k <= _MOST_CELLS else "")
        colour = "white" if share[row, column] > 0.7 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8 if k <= _MOST_CELLS else 5)
    cut = np.unique(cases.threshold)
    decision = "most probable class"
    if cases.kind == "binary":
        decision = f"at {cut[0]:.3g}" if len(cut) == 1 else "at each fold's threshold"
    axes.set(xlabel=f"decision ({decision})", ylabel="label")
    figure = table.find("balanced_accuracy")
    axes.set_title(f"{table.n_patients} patients; balanced accuracy\n{figure.text()}", fontsize=9)
    return canvas


def _cut(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


# ---- values and times


def draw_regression(table: FigureTable, cases: Cases) -> Canvas:
    """Prediction against label."""
    canvas = _canvas()
    axes = canvas.subplots()
    ends = [min(cases.truth.min(), cases.scores.min()), max(cases.truth.max(), cases.scores.max())]
    axes.plot(ends, ends, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    texts = [f"{TITLES[name]} {table.find(name).text()}" for name in ("spearman", "r2", "mae")]
    label = "\n".join([*texts, f"n = {len(cases)} {table.unit}"])
    axes.scatter(cases.truth, cases.scores, s=12, color=_COLOURS[0], alpha=0.6, linewidths=0, label=label)
    axes.set(xlabel="label", ylabel="prediction")
    axes.set_title("Prediction against label")
    canvas.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    return canvas


def draw_survival(table: FigureTable, cases: Cases) -> Canvas:
    """Kaplan and Meier's curves of the halves above and below the median risk; ticks are censored patients."""
    canvas = _canvas()
    axes = canvas.subplots()
    time, event = cases.truth[:, 0], cases.truth[:, 1] == 1
    high = cases.scores > np.median(cases.scores)
    for chosen, name, colour in ((~high, "lower half of risk", _COLOURS[0]), (high, "upper half of risk", _COLOURS[1])):
        if not chosen.any():
            continue
        steps, survival = _kaplan_meier(time[chosen], event[chosen])
        text = f"{name}: n = {chosen.sum()}, {event[chosen].sum()} with the event"
        axes.step(steps, survival, where="post", color=colour, linewidth=1.6, label=text)
        censored = time[chosen & ~event]
        level = survival[np.searchsorted(steps, censored, side="right") - 1]
        axes.plot(censored, level, linestyle="", marker="|", markersize=5, color=colour)
    axes.set(xlabel="time", ylabel="share without the event", ylim=(0, 1.02))
    axes.set_xlim(left=0)
    axes.set_title(f"{table.n_patients} patients; C-index {table.find('c_index').text()}")
    canvas.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    return canvas


def _kaplan_meier(
    time: NDArray[np.float64], event: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times at which the curve steps (from 0, to the last time) and the share without the event from there on."""
    steps = np.unique(time[event])
    at_risk = (time[:, None] >= steps).sum(axis=0)
    events = ((time[:, None] == steps) & event[:, None]).sum(axis=0)
    survival = np.cumprod(1 - events / at_risk)
    last = survival[-1] if len(survival) else 1.0
    return np.concatenate([[0.0], steps, [time.max()]]), np.concatenate([[1.0], survival, [last]])


# ---- sites


def _site_figures(table: FigureTable) -> list[Figure]:
    return [figure for figure in table.figures if figure.site and figure.name == MAIN_FIGURE[table.kind]]


def draw_sites(table: FigureTable) -> Canvas:
    """The main figure of each site with its interval, under that of all."""
    rows: Sequence[Figure] = [table.main, *_site_figures(table)]
    canvas = _canvas((5.6, 1.2 + 0.32 * len(rows)))
    axes = canvas.subplots()
    for place, figure in enumerate(rows):
        colour = "black" if place == 0 else _COLOURS[0]
        if figure.value is None:
            axes.text(0.02, place, "not computed", color=_GREY, va="center", transform=axes.get_yaxis_transform())
            continue
        low = figure.value if figure.low is None else figure.low
        high = figure.value if figure.high is None else figure.high
        axes.plot([low, high], [place, place], color=colour, linewidth=1.4)
        axes.plot(figure.value, place, color=colour, marker="s" if place == 0 else "o", markersize=5)
    if table.main.value is not None:
        axes.axvline(table.main.value, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(rows)), [f"{_cut(figure.site or 'all')} (n = {figure.n_rows})" for figure in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel=f"{TITLES[MAIN_FIGURE[table.kind]]} (95 % interval)")
    axes.set_title("By site")
    return canvas
