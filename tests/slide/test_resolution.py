"""Resolution: ranked evidence, sanity, contradiction, override."""

from pathlib import Path
from typing import Any

import pytest

from pathopipe.errors import MissingResolutionError
from pathopipe.records import Level, MppEvidence, SlideInfo
from pathopipe.slide.resolution import (
    Resolution,
    check_override,
    evidence_from_objective,
    evidence_from_openslide,
    evidence_from_pair,
    evidence_from_tiff_resolution,
    require_mpp,
    resolve_mpp,
)


def vendor(x: str, y: str | None = None, **more: str) -> dict[str, str]:
    return {"openslide.mpp-x": x, "openslide.mpp-y": y if y is not None else x} | {
        key.replace("__", "."): value for key, value in more.items()
    }


def resolve(properties: dict[str, str], **options: Any) -> Resolution:
    return resolve_mpp(evidence_from_openslide(properties), **options)


def info_of(resolution: Resolution) -> SlideInfo:
    return SlideInfo(
        slide_id="a",
        path=Path("a.svs"),
        reader="openslide",
        vendor="aperio",
        dims_l0=(10, 10),
        levels=(Level(10, 10, 1.0, 1.0),),
        size_bytes=1,
        fingerprint="",
        mpp=resolution.mpp,
        mpp_evidence=resolution.evidence,
        problems=resolution.problems,
    )


def used(resolution: Resolution) -> list[str]:
    return [e.source for e in resolution.evidence if e.used]


def test_vendor_field_is_used() -> None:
    resolution = resolve(vendor("0.2485"))
    assert resolution.mpp == (0.2485, 0.2485)
    assert used(resolution) == ["openslide.mpp-x"]
    assert resolution.problems == ()


def test_different_axes_are_kept() -> None:
    assert resolve(vendor("0.25", "0.26")).mpp == (0.25, 0.26)


def test_rank_is_vendor_then_ome_then_tiff_then_objective() -> None:
    ranked = [
        *evidence_from_objective(40),
        *evidence_from_tiff_resolution(40_000, 40_000, "centimeter"),
        *evidence_from_pair("ome.PhysicalSizeX", 0.251, 0.251),
        *evidence_from_pair("openslide.mpp-x", 0.252, 0.252),
    ]
    for count, source in ((4, "openslide.mpp-x"), (3, "ome.PhysicalSizeX"), (2, "tiff.XResolution")):
        assert used(resolve_mpp(ranked[:count])) == [source]
    assert [e.source for e in resolve_mpp(ranked).evidence] == [e.source for e in reversed(ranked)]


@pytest.mark.parametrize(("unit", "per_unit"), [("centimeter", 40_000), ("inch", 101_600), ("micron", 4)])
def test_tiff_units(unit: str, per_unit: float) -> None:
    (found,) = evidence_from_tiff_resolution(per_unit, per_unit, unit)
    assert found.mpp_x == pytest.approx(0.25)


def test_tiff_resolution_without_unit_says_nothing() -> None:
    assert evidence_from_tiff_resolution(40_000, 40_000, "") == []
    assert evidence_from_tiff_resolution(40_000, 40_000, "none") == []
    assert evidence_from_tiff_resolution(0, 0, "inch") == []


@pytest.mark.parametrize("text", ["0.0001", "1e6", "0.049", "50.1"])
def test_absurd_resolution_is_passed_over_with_a_note(text: str) -> None:
    resolution = resolve(vendor(text))
    assert resolution.mpp is None
    assert "outside 0.05 to 50" in resolution.evidence[0].note
    with pytest.raises(MissingResolutionError, match=r"a\.svs: .*openslide\.mpp-x says .*outside.*--set slide\.mpp="):
        require_mpp(info_of(resolution))


@pytest.mark.parametrize("text", ["", "nan", "inf", "-0.25", "0", "unknown"])
def test_what_is_no_number_is_no_evidence(text: str) -> None:
    assert resolve(vendor(text)).evidence == ()


def test_screen_resolution_is_passed_over_and_the_next_source_used() -> None:
    resolution = resolve_mpp([*evidence_from_tiff_resolution(72, 72, "inch"), *evidence_from_objective(20)])
    assert resolution.mpp == (0.5, 0.5)
    assert used(resolution) == ["objective-power"]
    assert any("nominal" in problem for problem in resolution.problems)


def test_an_absurd_value_contradicts_nothing() -> None:
    properties = vendor("0.25") | {"tiff.XResolution": "72", "tiff.YResolution": "72", "tiff.ResolutionUnit": "inch"}
    assert resolve(properties).mpp == (0.25, 0.25)


def contradiction(factor: float) -> dict[str, str]:
    per_cm = str(10_000 / (0.25 * factor))
    return vendor("0.25") | {
        "tiff.XResolution": per_cm,
        "tiff.YResolution": per_cm,
        "tiff.ResolutionUnit": "centimeter",
    }


def test_contradiction_leaves_no_resolution_and_names_both() -> None:
    resolution = resolve(contradiction(2))
    assert resolution.mpp is None
    assert used(resolution) == []
    with pytest.raises(MissingResolutionError) as caught:
        require_mpp(info_of(resolution))
    message = str(caught.value)
    assert "openslide.mpp-x says 0.25 um/px" in message
    assert "tiff.XResolution says 0.5 um/px" in message
    assert "manifest" in message
    assert "--set slide.mpp=" in message
    assert caught.value.slide_id == "a"


@pytest.mark.parametrize(("factor", "clashes"), [(1.09, False), (1.11, True), (1 / 1.09, False), (1 / 1.11, True)])
def test_contradiction_begins_at_ten_per_cent(factor: float, clashes: bool) -> None:
    assert (resolve(contradiction(factor)).mpp is None) is clashes


def test_contradiction_on_one_axis_counts() -> None:
    found = [*evidence_from_pair("openslide.mpp-x", 0.25, 0.25), *evidence_from_pair("ome.PhysicalSizeX", 0.25, 0.5)]
    assert resolve_mpp(found).mpp is None


def test_override_settles_a_contradiction_and_is_noted() -> None:
    resolution = resolve(contradiction(2), override=0.25, override_source="manifest")
    assert resolution.mpp == (0.25, 0.25)
    assert used(resolution) == ["manifest"]
    assert "tiff.XResolution says 0.5" in resolution.problems[0]


def test_override_that_agrees_is_no_problem() -> None:
    resolution = resolve(vendor("0.2485"), override=0.25, override_source="config")
    assert (resolution.mpp, resolution.problems) == ((0.25, 0.25), ())
    assert used(resolution) == ["config"]
    assert [e.source for e in resolution.evidence] == ["config", "openslide.mpp-x"]


def test_override_serves_both_axes() -> None:
    assert resolve(vendor("0.25", "0.5"), override=0.3).mpp == (0.3, 0.3)


@pytest.mark.parametrize("value", [0.0, -1.0, 0.01, 51.0, float("nan"), float("inf")])
def test_absurd_override_is_refused(value: float) -> None:
    with pytest.raises(MissingResolutionError, match=r"a\.svs: the manifest states .* outside") as caught:
        check_override(value, source="manifest", name="a.svs", slide_id="a")
    assert caught.value.slide_id == "a"
    for sound in (0.05, 50.0, None):
        check_override(sound, source="manifest", name="a.svs", slide_id="a")


def test_objective_far_from_the_resolution_is_a_problem_not_an_error() -> None:
    assert resolve(vendor("0.25", **{"openslide__objective-power": "20"})).problems != ()
    assert resolve(vendor("0.25", **{"openslide__objective-power": "20"})).mpp == (0.25, 0.25)
    assert resolve(vendor("0.3", **{"openslide__objective-power": "40"})).problems == ()


def test_one_axis_stands_for_both_and_says_so() -> None:
    (found,) = evidence_from_pair("ome.PhysicalSizeX", None, 0.25)
    assert (found.mpp_x, found.mpp_y) == (0.25, 0.25)
    assert "only y is stated" in found.note


def test_no_evidence_is_an_error_that_names_what_was_looked_at() -> None:
    with pytest.raises(MissingResolutionError) as caught:
        require_mpp(info_of(resolve({})))
    for word in ("a.svs", "vendor", "OME", "TIFF", "objective", "manifest", "--set slide.mpp="):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_require_mpp_returns_what_was_found() -> None:
    assert require_mpp(info_of(resolve(vendor("0.25", "0.26")))) == (0.25, 0.26)


def test_given_evidence_is_not_lost() -> None:
    odd = MppEvidence("something-new", 0.25, 0.25, used=False)
    assert resolve_mpp([odd]).mpp == (0.25, 0.25)
