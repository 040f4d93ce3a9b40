"""The cohort page as HTML: one file that loads nothing, runs nothing but its own script, and escapes every text."""

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import numpy as np
from jinja2 import Environment, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

import pathopipe
from pathopipe.report.cohort_collect import Fact, Status
from pathopipe.report.cohort_odd import LEAST_SLIDES, MOST_TSNE, ODD_FROM, EmbeddingMap, Oddity, measure_of
from pathopipe.report.cohort_plots import COLOURS, OTHER, Plot, dot_plot, group_numbers, scatter_plot
from pathopipe.report.cohort_results import Results
from pathopipe.report.cohort_words import count_text, group_reasons

__all__ = ["Cohort", "cohort_page"]

_SHOWN_IDS: Final = 200
_SHOWN_OUTLIERS: Final = 30
_FAULTS: Final[Mapping[Status, str]] = {
    "failed": "failed",
    "damaged": "can't be read whole",
    "unfinished": "not finished: killed, or being written now",
    "missing": "not run yet",
}
_TIMES: Final = {"model": "model", "waiting": "waiting for tiles", "write": "writing", "objects": "objects"}
_SORTS: Final = {
    "odd": "oddness",
    "id": "slide id",
    "status": "status",
    "tissue": "tissue area",
    "tiles": "tiles",
    "bad": "bad tiles",
    "focus": "focus",
    "haematoxylin": "haematoxylin",
    "eosin": "eosin",
    "distance": "embedding distance",
    "seconds": "seconds of the last run",
}
_LIST: Final = (
    *(("id", "slide", False), ("status", "status", False), ("tissue", "tissue mm²", True), ("tiles", "tiles", True)),
    *(("bad", "bad", True), ("mpp", "µm/px", True), ("focus", "focus", True), ("haematoxylin", "H", True)),
    *(("eosin", "E", True), ("odd", "oddness", True), ("seconds", "seconds", True), ("flags", "flags", False)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """All that the page shows."""

    facts: Sequence[Fact]
    """In the order of their ids."""
    oddities: Mapping[str, Sequence[Oddity]]
    """By slide id, the oddest first."""
    plane: EmbeddingMap | None
    results: Results
    colour: str = ""
    """The column that plots are coloured by; empty for none."""
    notes: tuple[str, ...] = ()


def cohort_page(cohort: Cohort) -> str:
    """The page. The same cohort gives the same bytes: nothing in it depends on time or place.

    A Content-Security-Policy lets the page's own style and script run, by their hashes, and pictures stand in it;
    nothing else can be loaded, sent or run, whatever the texts in it say.
    """
    style = _read("cohort.css").replace(
        "@GROUPS@", "\n".join(f".g{number} {{ fill: {colour}; }}" for number, colour in enumerate(COLOURS))
    )
    script = _read("cohort.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    facts, oddities = cohort.facts, cohort.oddities
    colour_names, colour_of = (
        group_numbers([fact.group for fact in facts]) if cohort.colour else ([""], [0] * len(facts))
    )
    plots = list(_plots(cohort, colour_names, colour_of))
    failures = list(_failures(facts))
    models = _models(cohort.results)
    sections = {
        "counts": "What there is",
        **({"failures": "What went wrong"} if failures else {}),
        "outliers": "Outliers",
        **({"plots": "The cohort"} if plots else {}),
        **({"models": "Models"} if models else {}),
        "slides": "Slides",
    }
    return environment.from_string(_read("cohort.html.j2")).render(
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        slides_text=count_text(len(facts), "slide"),
        headline=_headline(facts, oddities),
        sections=sections.items(),
        notes=cohort.notes,
        figures=_figures(facts, oddities),
        counts=list(_count_tables(facts)),
        failures=failures,
        outliers=_outliers(facts, oddities),
        plots=plots,
        legend=_legend(cohort.colour, colour_names, colour_of),
        models=models,
        statuses=sorted({fact.status for fact in facts}),
        flags=sorted({flag for fact in facts for flag in fact.flags}),
        colour=cohort.colour,
        groups=sorted({fact.group for fact in facts} - {""}) if cohort.colour else [],
        sorts=_SORTS.items(),
        footer=f"pathopipe {pathopipe.__version__}. Slides are named by their ids; this page loads nothing and sends "
        "nothing. 'pathopipe verify' reads every array, which this report does not.",
        data=htmlsafe_json_dumps(
            {
                "slides": [_record(fact, oddities.get(fact.slide_id, ()), cohort.plane) for fact in facts],
                "columns": {"times": _TIMES, "list": _LIST},
            },
            separators=(",", ":"),
            ensure_ascii=False,
            allow_nan=False,
        ),
    )


def _read(name: str) -> str:
    return resources.files("pathopipe.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# ---- the slides


def _record(fact: Fact, odd: Sequence[Oddity], plane: EmbeddingMap | None) -> dict[str, Any]:
    """A slide for the script; what is empty is left out."""
    picture = fact.picture
    record: dict[str, Any] = {
        "status": fact.status,
        "reason": fact.reason,
        "problems": fact.problems,
        "notes": fact.notes,
        "flags": fact.flags,
        "group": fact.group,
        "tissue": _rounded(fact.tissue_mm2),
        "regions": fact.regions,
        "tiles": fact.tiles,
        "bad": fact.bad_tiles or None,
        "mpp": fact.mpp,
        "focus": _rounded(fact.focus),
        "haematoxylin": _rounded(fact.stain[0]) if fact.stain else None,
        "eosin": _rounded(fact.stain[1]) if fact.stain else None,
        "distance": _rounded(plane.distance.get(fact.slide_id)) if plane else None,
        "seconds": fact.seconds,
        "times": [(kind, _rounded(fact.times[kind])) for kind in _TIMES if fact.times.get(kind)],
        "encoders": [(one.name, one.grid, one.done, one.chunks) for one in fact.encoders],
        "layers": list(fact.layers.items()),
        "said": [(one.model, one.target, one.value, _rounded(one.probability), one.note) for one in fact.predictions],
        "odd": [(round(abs(one.z), 1), one.says) for one in odd],
    }
    if picture is not None:
        record["picture"] = (picture.width_px, picture.height_px, base64.b64encode(picture.webp).decode())
    return {"id": fact.slide_id, **{key: value for key, value in record.items() if value not in (None, "", (), [])}}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")


# ---- above the slides


def _headline(facts: Sequence[Fact], oddities: Mapping[str, Sequence[Oddity]]) -> str:
    counts = Counter(fact.status for fact in facts)
    parts = [f"{counts['done']:,} done", *(f"{counts[status]:,} {status}" for status in _FAULTS if counts[status])]
    odd = f"; {count_text(len(oddities), 'outlier')}" if oddities else ""
    return f"{count_text(len(facts), 'slide')}: {', '.join(parts)}{odd}."


def _figures(facts: Sequence[Fact], oddities: Mapping[str, Sequence[Oddity]]) -> list[tuple[str, str]]:
    counts = Counter(fact.status for fact in facts)
    area = sum(fact.tissue_mm2 or 0.0 for fact in facts)
    figures = [
        ("slides", f"{len(facts):,}"),
        ("done", f"{counts['done']:,}"),
        *((status, f"{counts[status]:,}") for status in _FAULTS if counts[status]),
        ("outliers", f"{len(oddities):,}"),
        ("flagged", f"{sum(bool(fact.flags) for fact in facts):,}"),
        ("tissue", f"{area / 100:,.1f} cm²" if area >= 1000 else f"{area:,.2f} mm²"),
        ("tiles", f"{sum(fact.tiles or 0 for fact in facts):,}"),
    ]
    bad = sum(fact.bad_tiles for fact in facts)
    return [*figures, ("bad tiles", f"{bad:,}")] if bad else figures


@dataclass(frozen=True, slots=True)
class _Table:
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    names: int = 1
    """Columns of words; those after them are of numbers."""


def _count_tables(facts: Sequence[Fact]) -> Iterator[_Table]:
    encoders: Counter[tuple[str, str]] = Counter()
    whole: Counter[tuple[str, str]] = Counter()
    layers: Counter[str] = Counter()
    objects: Counter[str] = Counter()
    times: Counter[str] = Counter()
    limits: Counter[str] = Counter()
    for fact in facts:
        for state in fact.encoders:
            encoders[state.name, state.grid] += 1
            whole[state.name, state.grid] += state.complete
            if state.limited_by:
                limits[state.limited_by] += 1
        layers.update(fact.layers.keys())
        objects.update(fact.layers)
        times.update(fact.times)
    flags = Counter(flag for fact in facts for flag in fact.flags)
    rows: list[tuple[str, ...]]
    if encoders:
        rows = [
            (name, grid, f"{whole[name, grid]:,}", f"{count:,}") for (name, grid), count in sorted(encoders.items())
        ]
        yield _Table(("embeddings", "grid", "slides whole", "begun"), rows, names=2)
    if layers:
        rows = [(layer, f"{objects[layer]:,}", f"{count:,}") for layer, count in sorted(layers.items())]
        yield _Table(("objects", "number", "slides"), rows)
    if flags:
        yield _Table(
            ("flag", "slides"), [(flag, f"{n:,}") for flag, n in sorted(flags.items(), key=lambda x: (-x[1], x[0]))]
        )
    if times:
        total = sum(times.values())
        rows = [
            (title, _span(times[kind]), f"{times[kind] / total:.0%}") for kind, title in _TIMES.items() if times[kind]
        ]
        yield _Table(("time of embedding and segmenting", "in all", "share"), rows)
    if limits:
        yield _Table(("embedding limited by", "slides"), [(name, f"{n:,}") for name, n in sorted(limits.items())])


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _failures(facts: Sequence[Fact]) -> Iterator[dict[str, Any]]:
    for status, title in _FAULTS.items():
        own = [(fact.slide_id, fact.reason) for fact in facts if fact.status == status]
        if not own:
            continue
        groups = [
            {
                "reason": group.reason,
                "count": count_text(len(group.slide_ids), "slide"),
                "ids": group.slide_ids[:_SHOWN_IDS],
                "more": max(0, len(group.slide_ids) - _SHOWN_IDS),
            }
            for group in group_reasons(own)
        ]
        yield {"title": f"{count_text(len(own), 'slide')} {title}", "status": status, "groups": groups}


def _outliers(facts: Sequence[Fact], oddities: Mapping[str, Sequence[Oddity]]) -> dict[str, Any]:
    known = sum(fact.tissue_mm2 is not None or fact.tiles is not None for fact in facts)
    explained = (
        "A slide stands here if its tissue area, number of tiles, focus, stain or distance from the nearest slides "
        f"lies {ODD_FROM:g} robust standard deviations or more from the middle of the cohort. That is a reason to "
        "look, not a fault."
    )
    if known < LEAST_SLIDES:
        explained = f"Outliers are looked for among {LEAST_SLIDES} slides or more; here are {known}."
    elif not oddities:
        explained += " No slide does."
    ranked = sorted(oddities, key=lambda slide_id: (-abs(oddities[slide_id][0].z), slide_id))
    rows = [
        {
            "id": slide_id,
            "z": f"{abs(oddities[slide_id][0].z):.1f}",
            "why": "; ".join(one.says for one in oddities[slide_id]),
        }
        for slide_id in ranked[:_SHOWN_OUTLIERS]
    ]
    return {"explained": explained, "rows": rows, "more": max(0, len(ranked) - _SHOWN_OUTLIERS)}


# ---- plots and models


def _plots(cohort: Cohort, names: Sequence[str], groups: Sequence[int]) -> Iterator[Plot]:
    facts, distance = cohort.facts, cohort.plane.distance if cohort.plane else {}
    odd = [fact.slide_id in cohort.oddities for fact in facts]

    def values(name: str) -> Any:
        return np.array([measure_of(fact, name, distance) for fact in facts], np.float64)

    shown = {name: values(name) for name in ("tissue_mm2", "tiles", "focus", "haematoxylin", "eosin")}
    for name, title, axis, note in (
        ("tissue_mm2", "Tissue area", "mm², logarithmic", ""),
        ("tiles", "Tiles", "tiles of a slide's largest grid, logarithmic", ""),
        ("focus", "Focus", "handcrafted focus_log, mean over tiles; falls with blur", ""),
    ):
        if np.isfinite(shown[name]).any():
            log = name != "focus"
            yield dot_plot(title, axis, shown[name], groups, names, odd, log=log, note=note)
    if np.isfinite(shown["haematoxylin"]).any():
        yield scatter_plot(
            "Stain colour",
            ("eosin, optical density", "haematoxylin, optical density"),
            np.stack([shown["eosin"], shown["haematoxylin"]], axis=1),
            groups,
            odd,
            note="Medians over tiles, on the thumbnail; slides on dark ground are left out. Other stains than H&E show "
            "as what they look like.",
        )
    if cohort.plane is not None:
        nowhere = (float("nan"), float("nan"))
        xy = np.array([cohort.plane.xy.get(fact.slide_id, nowhere) for fact in facts], np.float64)
        plane = cohort.plane
        axes = ("first component", "second component") if plane.method == "PCA" else ("t-SNE 1", "t-SNE 2")
        meant = "neighbours are alike, far distances mean little"
        if plane.method == "PCA":
            meant = f"too {'few' if len(plane.xy) < MOST_TSNE else 'many'} slides for t-SNE"
        note = f"Mean embeddings of slides, {plane.encoder}; {plane.method}: {meant}. {plane.note}".strip()
        yield scatter_plot("Embedding map", axes, xy, groups, odd, ticks=False, note=note)


def _legend(column: str, names: Sequence[str], groups: Sequence[int]) -> dict[str, Any] | None:
    if not column:
        return None
    counts = Counter(groups)
    entries = [
        {"name": name, "count": f"{counts[number]:,}", "group": None if name in ("not stated", OTHER) else name}
        for number, name in enumerate(names)
    ]
    return {"column": column, "entries": entries}


def _models(results: Results) -> dict[str, Any] | None:
    lines = []
    if results.fields:
        lines.append(f"Predicted fields of {count_text(len(results.fields), 'slide')} stand on their cards.")
    if results.unread:
        lines.append(f"Could not be read: {', '.join(results.unread)}.")
    if not results.tables and not results.doubts_where and not lines:
        return None
    shown = len(results.doubts)
    doubts_text = f"The first {shown} of {results.n_doubts:,}." if shown < results.n_doubts else f"All {shown}."
    return {
        "tables": results.tables,
        "doubts": results.doubts,
        "doubts_text": f"{doubts_text} The prediction is another; which of the two is right is for you to say.",
        "where": results.doubts_where,
        "lines": lines,
    }
