"""``segment`` as a user runs it: from a slide file to nuclei, files for QuPath, a picture; resumes; refuses."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
import tifffile

from pathopipe.config import load_config
from pathopipe.errors import SlideError, StoreBusyError, StoreChangedError, TooManyBadTilesError, UsageError
from pathopipe.geojson import read_features
from pathopipe.geometry import outlines_to_shapes
from pathopipe.pipeline import RunPlan, common
from pathopipe.pipeline.segment import SegmentOutcome, segment_slide
from pathopipe.records import SlideRef
from pathopipe.slide.open import open_slide
from pathopipe.store import SlideStore, store_path
from pathopipe.synth import DrawnSlide, SynthSpec, write_slide

SPEC = SynthSpec(width_px=2300, height_px=2100, mpp=0.25, seed=3, pen=False, dust=False)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "drawn.tiff"
    write_slide(path, SPEC)
    return path


def segmented(slide: Path, out: Path, *settings: str, fresh: bool = False) -> SegmentOutcome:
    plan = RunPlan(out=out, config=load_config(None, ("segment.model=classical", *settings)), threads=2)
    return segment_slide(SlideRef("drawn", slide), plan, fresh=fresh)


def content(store: SlideStore) -> dict[str, list[bytes]]:
    """Every array of every layer."""
    layers = {}
    for layer in store.layers():
        table = store.objects(layer).read()
        columns = (table.centroid_l0, table.class_id, table.measurements, table.id, table.parent, *table.outlines)
        layers[layer] = [column.tobytes() for column in columns]
    return layers


@pytest.fixture(scope="module")
def whole(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    segmented(slide, out, "segment.tasks=nuclei,cells", "segment.region_px=100000")
    return out


@pytest.mark.parametrize("region_px", [512, 1024])
def test_region_size_changes_no_byte(slide: Path, whole: Path, tmp_path: Path, region_px: int) -> None:
    outcome = segmented(slide, tmp_path, "segment.tasks=nuclei,cells", f"segment.region_px={region_px}")
    assert outcome.report.regions > 1
    assert content(SlideStore.open(store_path(tmp_path, "drawn"))) == content(
        SlideStore.open(store_path(whole, "drawn"))
    )


def test_it_finds_most_of_the_nuclei_that_were_drawn(whole: Path) -> None:
    drawn = DrawnSlide(SPEC).objects(0, 0, SPEC.width_px, SPEC.height_px)
    truth = np.array([each.polygon for each in drawn if each.kind == "nucleus"])
    found = outlines_to_shapes(SlideStore.open(store_path(whole, "drawn")).objects("nuclei").read().outlines)
    assert shapely.is_valid(found).all()
    tree = shapely.STRtree(found)
    one, other = tree.query(truth, predicate="intersects")
    shared = shapely.area(shapely.intersection(truth[one], found[other]))
    matched = shared / (shapely.area(truth[one]) + shapely.area(found[other]) - shared) > 0.5
    recall, precision = matched.sum() / len(truth), matched.sum() / len(found)
    assert len(truth) > 300
    assert min(recall, precision) > 0.6


def test_a_second_run_computes_nothing_and_another_layer_joins_the_first(slide: Path, tmp_path: Path) -> None:
    first = segmented(slide, tmp_path)
    assert first.did == ("nuclei",)
    again = segmented(slide, tmp_path, "segment.region_px=512")  # regions are not among the inputs
    assert (again.did, again.objects) == ((), first.objects)
    cells = segmented(slide, tmp_path, "segment.tasks=cells")
    assert cells.did == ("cells",)
    assert cells.objects == {"nuclei": first.objects["nuclei"], "cells": first.objects["nuclei"]}
    with pytest.raises(StoreChangedError, match=r"cell_expansion_um was 5\.0, now 3.*segment --fresh"):
        segmented(slide, tmp_path, "segment.tasks=cells", "segment.cell_expansion_um=3")
    fresh = segmented(slide, tmp_path, "segment.tasks=cells", "segment.cell_expansion_um=3", fresh=True)
    assert fresh.did == ("cells",)  # the nuclei are stood on, not asked for
    both = segmented(slide, tmp_path, "segment.tasks=nuclei,cells", "segment.cell_expansion_um=3", fresh=True)
    assert both.did == ("nuclei", "cells")


def test_two_runs_at_once_are_refused(slide: Path, tmp_path: Path) -> None:
    segmented(slide, tmp_path)
    with SlideStore.open(store_path(tmp_path, "drawn")).writing_objects():
        with pytest.raises(StoreBusyError, match="another process is writing the objects of drawn"):
            segmented(slide, tmp_path, "segment.tasks=cells")


def test_corrections_are_not_thrown_away(slide: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    assert cli("segment", slide, "--out", tmp_path, "--slide-id", "drawn", "--model", "classical").code == 0
    (file,) = (tmp_path / "geojson").glob("drawn.nuclei.geojson*")
    back = ("import", "geojson", file, "--out", tmp_path, "--slide-id", "drawn", "--layer", "nuclei", "--replace")
    assert cli(*back).code == 0
    with pytest.raises(StoreChangedError, match="objects that were imported"):
        segmented(slide, tmp_path, "segment.tasks=cells", fresh=True)
    result = cli("run", slide.parent, "--out", tmp_path, "--fresh", "tissue")
    assert (result.code, "what was imported (nuclei)" in result.out) == (1, True)
    assert SlideStore.open(store_path(tmp_path, "drawn")).imported_layers() == ["nuclei"]


def test_a_kill_loses_no_finished_region(slide: Path, whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pathopipe", "segment", slide, "--out", tmp_path, "--tasks", "nuclei,cells"]
    command += ["--set", "segment.region_px=512", "--slide-id", "drawn", "--model", "classical"]
    for _ in range(3):
        process = subprocess.Popen([*map(str, command), "--fresh"])
        parts = SlideStore(store_path(tmp_path, "drawn")).parts("cells")
        deadline = time.monotonic() + 120
        while not parts.done() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        if parts.done():
            break  # else it was through before anyone looked
    assert parts.done()
    outcome = segmented(slide, tmp_path, "segment.tasks=nuclei,cells", "segment.region_px=512")
    assert 0 < outcome.report.regions < 9
    assert content(SlideStore.open(store_path(tmp_path, "drawn"))) == content(
        SlideStore.open(store_path(whole, "drawn"))
    )


def test_the_command_says_what_it_found_and_writes_what_qupath_opens(
    slide: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    command = ("segment", slide, "--out", tmp_path, "--slide-id", "drawn", "--model", "classical")
    result = cli(*command, "--tasks", "nuclei,cells")
    assert result.code == 0, result.err
    n = len(SlideStore.open(store_path(tmp_path, "drawn")).objects("nuclei"))
    assert f"{n} nuclei, {n} cells" in result.out
    assert "nuclei/mm2" in result.out
    (nuclei,) = (tmp_path / "geojson").glob("drawn.nuclei.geojson*")
    assert str(nuclei) in result.out
    features = list(read_features(nuclei))
    assert len(features) == n
    assert {feature.object_type for feature in features} == {"detection"}
    assert "Area µm^2" in features[0].measurements
    (cells,) = (tmp_path / "geojson").glob("drawn.cells.geojson*")
    assert all(feature.nucleus_geometry is not None for feature in read_features(cells))
    picture = cv2.imread(str(tmp_path / "thumbnails" / "drawn.objects.png"))
    assert picture is not None and picture.shape[1] > 1000
    again = cli(*command, "--no-geojson")
    assert "was done already" in again.out
    assert cli("verify", tmp_path).code == 0


def test_a_model_does_not_find_what_it_can_not(slide: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    result = cli("segment", slide, "--out", tmp_path, "--tasks", "nuclei,glands", "--model", "classical")
    assert result.code == 2
    assert "'classical' does not find 'glands'; it finds nuclei and cells" in result.err
    with pytest.raises(UsageError, match="does not find 'nucleus'"):
        segmented(slide, tmp_path, "segment.tasks=nucleus")


def test_a_slide_without_tissue_has_no_objects(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "glass.tiff",
        np.full((900, 900, 3), 245, np.uint8),
        tile=(256, 256),
        resolution=(1e4 / 0.5, 1e4 / 0.5),
        resolutionunit="CENTIMETER",
        photometric="rgb",
    )
    outcome = segmented(tmp_path / "glass.tiff", tmp_path / "out")
    assert outcome.objects == {"nuclei": 0}
    assert "no-tissue" in outcome.flags


def test_a_coarse_slide_is_refused_and_can_be_forced(tmp_path: Path) -> None:
    spec = SynthSpec(width_px=800, height_px=700, mpp=1.0, seed=1, pen=False, dust=False)
    write_slide(tmp_path / "coarse.tiff", spec)
    with pytest.raises(SlideError, match=r"scanned at 1 um/px, coarser than the 0\.5 um/px"):
        segmented(tmp_path / "coarse.tiff", tmp_path / "out")
    outcome = segmented(tmp_path / "coarse.tiff", tmp_path / "forced", "segment.allow_enlarge=true")
    assert outcome.objects["nuclei"] > 10


def test_a_slide_that_states_no_resolution_is_refused(tmp_path: Path, cli: Callable[..., Any]) -> None:
    tifffile.imwrite(tmp_path / "bare.tiff", np.full((600, 600, 3), 200, np.uint8), tile=(256, 256), photometric="rgb")
    result = cli("segment", tmp_path / "bare.tiff", "--out", tmp_path / "out", "--model", "classical")
    assert result.code == 1
    assert "--mpp" in result.err or "slide.mpp" in result.err


def test_too_many_unreadable_windows_fail_the_slide_and_keep_the_rest(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pathopipe.errors import TileReadError
    from pathopipe.slide.base import Slide

    class Torn:
        """Windows on the right can't be read, but the coarse picture can."""

        def __init__(self, slide: Slide) -> None:
            self._slide = slide
            self.info = slide.info
            self.close = slide.close

        def read(self, region: Any) -> Any:
            if region.width_px >= 600 and region.x_l0 > 800 and region.y_l0 > 0:
                raise TileReadError("torn")
            return self._slide.read(region)

    monkeypatch.setattr(common, "open_slide", lambda *a, **k: Torn(open_slide(*a, **k)))
    with pytest.raises(TooManyBadTilesError, match=r"windows can't be read, more than segment\.max_bad_share.*torn"):
        segmented(slide, tmp_path)
    store = SlideStore.open(store_path(tmp_path, "drawn"))
    assert len(store.objects("nuclei")) > 20
    monkeypatch.setattr(common, "open_slide", open_slide)
    assert segmented(slide, tmp_path, fresh=True).bad_windows == 0


@pytest.mark.slow
@pytest.mark.shared_data
def test_regions_of_a_real_slide(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "slides" / "tiff" / "TCGA-V5-A7RE-11A-01-TS1.pyramid.tif"
    contents = []
    for region_px in (512, 1024, 2048, 100_000):
        out = tmp_path / str(region_px)
        segmented(path, out, f"segment.region_px={region_px}")
        contents.append(content(SlideStore.open(store_path(out, "drawn"))))
    assert all(each == contents[0] for each in contents)


def test_info_of_the_layers_is_kept(whole: Path) -> None:
    attributes = SlideStore.open(store_path(whole, "drawn")).objects("nuclei").attributes
    assert attributes["inputs"]["model"]["name"] == "classical"
    assert attributes["mpp"] == [0.5, 0.5]
    json.dumps(attributes, allow_nan=False)
