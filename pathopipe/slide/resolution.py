"""Micrometres per pixel: what a slide states, ranked by trust, checked for sanity and contradiction. Never a guess."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from pathopipe.errors import MissingResolutionError
from pathopipe.records import MppEvidence, SlideInfo

__all__ = [
    "MAX_MPP",
    "MIN_MPP",
    "Resolution",
    "check_override",
    "evidence_from_objective",
    "evidence_from_openslide",
    "evidence_from_pair",
    "evidence_from_tiff_resolution",
    "require_mpp",
    "resolve_mpp",
]

MIN_MPP = 0.05
MAX_MPP = 50.0
_TOLERANCE = 1.10
_OBJECTIVE_TOLERANCE = 1.5
_RANK = {
    "manifest": 0,
    "config": 1,
    "given": 1,
    "openslide.mpp-x": 2,
    "ome.PhysicalSizeX": 3,
    "tiff.XResolution": 4,
    "objective-power": 5,
}
_UM_PER_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0, "micron": 1.0}
_WAYS_OUT = "state it in the manifest column mpp or with --set slide.mpp="


class Resolution(NamedTuple):
    """What the evidence comes to."""

    mpp: tuple[float, float] | None
    evidence: tuple[MppEvidence, ...]
    problems: tuple[str, ...]


def evidence_from_openslide(properties: Mapping[str, str]) -> list[MppEvidence]:
    """Collect what OpenSlide's properties say: vendor field, TIFF tags, objective power."""
    found = evidence_from_pair(
        "openslide.mpp-x", _number(properties.get("openslide.mpp-x")), _number(properties.get("openslide.mpp-y"))
    )
    found += evidence_from_tiff_resolution(
        _number(properties.get("tiff.XResolution")),
        _number(properties.get("tiff.YResolution")),
        properties.get("tiff.ResolutionUnit", ""),
    )
    return found + evidence_from_objective(_number(properties.get("openslide.objective-power")))


def evidence_from_pair(source: str, x: float | None, y: float | None) -> list[MppEvidence]:
    """Note micrometres per pixel of both axes; of one alone it is taken for both and said so, of none nothing."""
    x, y = (value if value is not None and math.isfinite(value) and value > 0 else None for value in (x, y))
    if x is not None and y is not None:
        return [MppEvidence(source, x, y, used=False)]
    value = x if x is not None else y
    if value is None:
        return []
    stated, other = ("x", "y") if x is not None else ("y", "x")
    return [MppEvidence(source, value, value, used=False, note=f"only {stated} is stated; {other} taken as equal")]


def evidence_from_tiff_resolution(x: float | None, y: float | None, unit: str) -> list[MppEvidence]:
    """Turn pixels per ``inch``, ``centimeter`` or ``micron`` into micrometres per pixel; other units say nothing."""
    um = _UM_PER_UNIT.get(unit)
    if um is None:
        return []
    return evidence_from_pair("tiff.XResolution", um / x if x else None, um / y if y else None)


def evidence_from_objective(power: float | None) -> list[MppEvidence]:
    """Nominal micrometres per pixel of an objective: 10 / power."""
    if power is None or power <= 0:
        return []
    return [MppEvidence("objective-power", 10 / power, 10 / power, used=False, note=f"nominal, 10 / {power:g}")]


def check_override(mpp: float | None, *, source: str, name: str, slide_id: str) -> None:
    """Refuse a resolution from the manifest or the config that no slide can have.

    Raises:
        MissingResolutionError: It is outside 0.05 to 50 um/px.
    """
    if mpp is not None and not MIN_MPP <= mpp <= MAX_MPP:
        raise MissingResolutionError(
            f"{name}: the {source} states {mpp:g} um/px, which is outside {MIN_MPP:g} to {MAX_MPP:g}; "
            "correct it, or leave it out to use what the file states",
            slide_id=slide_id,
        )


def resolve_mpp(
    found: Sequence[MppEvidence], *, override: float | None = None, override_source: str = "manifest"
) -> Resolution:
    """Choose the most trusted sane evidence, and say what is wrong with the rest.

    Order: manifest or config, vendor field, OME physical size, TIFF tags, objective power. Values outside 0.05 to 50
    um/px are passed over. Two measured values that differ by more than 10 % on an axis leave no resolution at all
    unless an override settles it. The override has passed :func:`check_override`.
    """
    evidence = sorted(found, key=lambda e: _RANK.get(e.source, len(_RANK)))
    evidence = [replace(e, note=_join(e.note, _insanity(e))) for e in evidence]
    sane = [e for e in evidence if not _insanity(e)]
    measured = [e for e in sane if e.source != "objective-power"]
    if override is not None:
        return _overridden(evidence, measured, sane, override, override_source)
    clash = next(((a, b) for a in measured for b in measured if _ratio(a, b) > _TOLERANCE), None)
    if clash is not None:
        text = f"contradicting resolution: {_state(clash[0])} but {_state(clash[1])}; {_WAYS_OUT}"
        evidence = [replace(e, note=_join(e.note, "contradicted")) if e in measured else e for e in evidence]
        return Resolution(None, tuple(evidence), (text,))
    if not sane:
        return Resolution(None, tuple(evidence), ())
    best = sane[0]
    evidence = [replace(e, used=e is best) for e in evidence]
    return Resolution((best.mpp_x, best.mpp_y), tuple(evidence), tuple(_objective_problem(best, sane)))


def _overridden(
    evidence: list[MppEvidence], measured: list[MppEvidence], sane: list[MppEvidence], override: float, source: str
) -> Resolution:
    given = MppEvidence(source, override, override, used=True)
    problems = []
    other = next((e for e in measured if _ratio(e, given) > _TOLERANCE), None)
    if other is not None:
        given = replace(given, note=f"the file differs: {_state(other)}")
        problems.append(f"resolution taken from the {source} ({override:g} um/px) against {_state(other)}")
    return Resolution((override, override), (given, *evidence), (*problems, *_objective_problem(given, [given, *sane])))


def _objective_problem(used: MppEvidence, sane: Sequence[MppEvidence]) -> list[str]:
    nominal = next((e for e in sane if e.source == "objective-power"), None)
    if nominal is None:
        return []
    if used.source == "objective-power":
        return [f"resolution is only nominal: {_state(used)}"]
    if _ratio(used, nominal) > _OBJECTIVE_TOLERANCE:
        return [f"objective power does not fit the resolution: {_state(nominal)} but {_state(used)} is used"]
    return []


def require_mpp(info: SlideInfo) -> tuple[float, float]:
    """Return micrometres per level-0 pixel, x then y.

    Raises:
        MissingResolutionError: Nothing sane was found, or two sources contradict; names each and the ways out.
    """
    if info.mpp is not None:
        return info.mpp
    clash = next((p for p in info.problems if p.startswith("contradicting resolution")), None)
    if clash is not None:
        raise MissingResolutionError(f"{info.path.name}: {clash}", slide_id=info.slide_id)
    if info.mpp_evidence:
        looked = "found only " + "; ".join(
            f"{_state(e)} ({e.note})" if e.note else _state(e) for e in info.mpp_evidence
        )
    else:
        looked = "looked in the vendor's field, OME physical size, TIFF resolution tags and objective power"
    raise MissingResolutionError(
        f"{info.path.name}: no micrometres per pixel ({looked}); {_WAYS_OUT}", slide_id=info.slide_id
    )


def _number(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        # OpenSlide writes properties with a point, but some vendors' own fields carry a comma.
        value = float(text.replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _insanity(e: MppEvidence) -> str:
    if all(MIN_MPP <= value <= MAX_MPP for value in (e.mpp_x, e.mpp_y)):
        return ""
    return f"outside {MIN_MPP:g} to {MAX_MPP:g} um/px, passed over"


def _ratio(a: MppEvidence, b: MppEvidence) -> float:
    pairs = ((a.mpp_x, b.mpp_x), (a.mpp_y, b.mpp_y))
    return max(max(one / two, two / one) for one, two in pairs)


def _state(e: MppEvidence) -> str:
    if math.isclose(e.mpp_x, e.mpp_y, rel_tol=1e-3):
        return f"{e.source} says {e.mpp_x:.6g} um/px"
    return f"{e.source} says {e.mpp_x:.6g} x {e.mpp_y:.6g} um/px"


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
