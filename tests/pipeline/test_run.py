"""All stages of a slide: resume, change, bad tiles, and the same bytes however the work was shared out."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from numpy.typing import NDArray
from safetensors.torch import save_file

from pathopipe.cluster import cohort, run_cohort
from pathopipe.cluster import outcomes as cluster_outcomes
from pathopipe.config import Config, load_config
from pathopipe.embeddings import embed
from pathopipe.embeddings.torchvision_import import import_torchvision
from pathopipe.errors import (
    PathopipeError,
    SlideError,
    StoreBusyError,
    StoreChangedError,
    StoreWriteError,
    TileReadError,
    TooManyBadTilesError,
    UsageError,
)
from pathopipe.geometry import Region
from pathopipe.pipeline import (
    BegunSlide,
    Pass,
    RunPlan,
    SlideOutcome,
    begin_slide,
    check_plan,
    common,
    embed_pending,
    outline_path,
    prepare,
    run,
    run_slide,
    thumbnail_path,
)
from pathopipe.records import SlideRef
from pathopipe.slide.base import Slide
from pathopipe.slide.open import open_slide
from pathopipe.store import SlideStore, store_path
from pathopipe.store.claims import Claim, claimed
from pathopipe.tiles.read import TileBatch

GRID = "256px-0.5um"


def plan_of(out: Path, *settings: str, **options: object) -> RunPlan:
    return RunPlan(out=out, config=load_config(None, ["embed.chunk_rows=16", *settings]), **options)  # type: ignore[arg-type]


def arrays_of(out: Path) -> dict[str, bytes]:
    """Every array object of every store below a folder: chunk data and array metadata, not attributes of groups."""
    found = {}
    for path in sorted((out / "slides").rglob("*")):
        if path.is_file() and (path.name != "zarr.json" or json.loads(path.read_bytes())["node_type"] == "array"):
            found[path.relative_to(out).as_posix()] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def ref(drawn_slide: Path) -> SlideRef:
    return SlideRef("drawn", drawn_slide)


@pytest.fixture(scope="module")
def undisturbed(ref: SlideRef, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run_slide(ref, plan_of(out))
    return out


def test_a_run_leaves_what_it_promised(undisturbed: Path, ref: SlideRef) -> None:
    store = SlideStore.open(store_path(undisturbed, "drawn"))
    assert list(store.problems()) == []
    grid = store.read_grid(GRID)
    rows = store.embeddings(GRID, "handcrafted")
    assert len(grid) > 10
    assert rows.read_values().shape == (len(grid), rows.features)
    assert rows.read_values().dtype == np.float32
    assert np.isfinite(rows.read_values()).all()
    assert rows.attributes["complete"] is True
    assert rows.attributes["bad_tiles"] == 0
    assert set(rows.attributes["seconds"]) == {"read", "model", "waiting", "write"}
    outline = json.loads(outline_path(undisturbed, "drawn").read_text())
    assert {feature["properties"]["classification"]["name"] for feature in outline["features"]} == {"Tissue"}
    assert thumbnail_path(undisturbed, "drawn").read_bytes().startswith(b"\x89PNG")


def test_tiles_are_openslides_pixels(undisturbed: Path, drawn_slide: Path) -> None:
    import openslide

    from pathopipe.tiles.read import read_tile

    grid = SlideStore.open(store_path(undisturbed, "drawn")).read_grid(GRID)
    slide = open_slide(drawn_slide)
    with openslide.OpenSlide(drawn_slide) as theirs:
        for row in range(0, len(grid), 7):
            location = tuple(grid.xy_l0[row].tolist())
            rgba = np.asarray(theirs.read_region(location, grid.level, grid.read_px))
            expected = np.where(rgba[..., 3:] == 0, 255, rgba[..., :3])
            assert np.array_equal(read_tile(slide, grid, row), expected)
    slide.close()


def test_a_second_run_computes_nothing(undisturbed: Path, ref: SlideRef, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("computed again")

    for module, name in (
        (run, "embed_chunks"),
        (prepare, "find_tissue"),
        (common, "find_tissue"),
        (prepare, "plan_grid"),
    ):
        monkeypatch.setattr(module, name, never)
    outcome = run_slide(ref, plan_of(undisturbed))
    assert outcome.did == ()
    assert outcome.tiles > 10


@pytest.mark.parametrize("settings", [["embed.batch_size=3"], ["embed.batch_size=64", "embed.read_threads=4"]])
def test_batch_size_and_threads_do_not_matter(
    undisturbed: Path, ref: SlideRef, tmp_path: Path, settings: list[str]
) -> None:
    run_slide(ref, plan_of(tmp_path, *settings, threads=2))
    assert arrays_of(tmp_path) == arrays_of(undisturbed)


def test_workers_and_order_of_slides_do_not_matter(drawn_slide: Path, tmp_path: Path) -> None:
    refs = [SlideRef("a", drawn_slide), SlideRef("b", drawn_slide)]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = run_cohort(refs, plan_of(one))
    shared = run_cohort(refs[::-1], plan_of(two), workers=2)
    assert arrays_of(one) == arrays_of(two)
    assert [outcome.slide_id for outcome in shared] == ["b", "a"]
    assert {outcome.status for outcome in alone + shared} == {"done"}
    assert sum(outcome.report.tiles for outcome in shared) == sum(outcome.tiles for outcome in shared)


def test_other_settings_are_refused_and_fresh_is_the_way_out(ref: SlideRef, tmp_path: Path) -> None:
    run_slide(ref, plan_of(tmp_path))
    stricter = ("tiles.min_tissue=0.9",)
    with pytest.raises(StoreChangedError, match=r"config.min_tissue was 0.25, now 0.9.*--fresh tiles.*another --out"):
        run_slide(ref, plan_of(tmp_path, *stricter))
    outcome = run_slide(ref, plan_of(tmp_path, *stricter, fresh="tiles"))
    assert outcome.did == ("tiles", "handcrafted")
    store = SlideStore.open(store_path(tmp_path, "drawn"))
    assert store.read_grid(GRID).tissue_fraction.min() >= 0.9
    with pytest.raises(StoreChangedError, match="config.mpp was 8.0, now 16.0"):
        run_slide(ref, plan_of(tmp_path, *stricter, "tissue.mpp=16"))
    outcome = run_slide(ref, plan_of(tmp_path, *stricter, "tissue.mpp=16", fresh="tissue"))
    assert outcome.did == ("tissue", "tiles", "handcrafted")
    outcome = run_slide(ref, plan_of(tmp_path, *stricter, "tissue.mpp=16", fresh="embed"))
    assert outcome.did == ("handcrafted",)


def test_a_changed_tissue_alone_is_not_mixed_with_old_tiles(ref: SlideRef, tmp_path: Path) -> None:
    run_slide(ref, plan_of(tmp_path))
    SlideStore.open(store_path(tmp_path, "drawn")).clear("tissue")
    with pytest.raises(StoreChangedError, match="tiles/256px-0.5um was made from other inputs"):
        run_slide(ref, plan_of(tmp_path, "tissue.mpp=16"))


def test_another_resolution_is_refused(ref: SlideRef, tmp_path: Path) -> None:
    run_slide(ref, plan_of(tmp_path))
    with pytest.raises(StoreChangedError, match=r"made at \[0.5, 0.5\] um/px, the slide is now taken for \[0.4, 0.4\]"):
        run_slide(replace(ref, mpp=0.4), plan_of(tmp_path))


def test_several_grids_and_encoders_live_side_by_side(ref: SlideRef, tmp_path: Path) -> None:
    run_slide(ref, plan_of(tmp_path))
    run_slide(ref, plan_of(tmp_path, "tiles.mpp=1.0", "embed.encoder=handcrafted,timm.test_vit"))
    store = SlideStore.open(store_path(tmp_path, "drawn"))
    assert store.grids() == ["256px-0.5um", "256px-1um"]
    assert store.encoders("256px-1um") == ["handcrafted", "timm.test_vit"]
    rows = store.embeddings("256px-1um", "timm.test_vit")
    assert rows.read_values().dtype == np.float16
    assert "random" in rows.attributes["warning"]
    assert list(store.problems()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_encoders_of_one_grid_share_what_is_read(
    ref: SlideRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    both = "embed.encoder=handcrafted,timm.test_vit"
    for number, settings in enumerate((["embed.encoder=handcrafted"], ["embed.encoder=timm.test_vit"])):
        run_slide(ref, plan_of(tmp_path / f"alone{number}", *settings))
    read: list[int] = []
    stream = embed.TileStream

    def counting(*arguments: Any, **settings: Any) -> Iterator[TileBatch]:
        for batch in stream(*arguments, **settings):
            read.append(len(batch.images))
            yield batch

    monkeypatch.setattr(embed, "TileStream", counting)
    [outcome] = run_cohort([ref], plan_of(tmp_path / "both", both), workers=workers)
    assert outcome.status == "done"
    assert outcome.did == ("tissue", "tiles", "handcrafted", "timm.test_vit")
    if workers == 1:
        assert sum(read) == outcome.tiles
    arrays = arrays_of(tmp_path / "both")
    for number in (0, 1):
        alone = arrays_of(tmp_path / f"alone{number}")
        assert {name: arrays[name] for name in alone} == alone
    # What was lost of one encoder is computed for it alone.
    (tmp_path / "both" / "slides" / "drawn.zarr" / "embeddings" / GRID / "timm.test_vit/values/c/1/0").unlink()
    read.clear()
    run_slide(ref, plan_of(tmp_path / "both", both))
    assert sum(read) == 16
    assert arrays_of(tmp_path / "both") == arrays


_ROWS = """
small:
  loader: timm
  architecture: test_vit
  tile_px: 128
  mpp: 1.0
  outputs: {pooled: 64}
  output: pooled
"""


def test_each_encoder_gets_the_tiles_of_its_recipe(ref: SlideRef, tmp_path: Path) -> None:
    import_torchvision()
    import timm

    (tmp_path / "mine.yaml").write_text(_ROWS)
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    settings = [
        "embed.encoder=handcrafted,small",
        f"embed.catalog={tmp_path / 'mine.yaml'}",
        f"embed.weights={{small: {weights}}}",
    ]
    out = tmp_path / "out"
    assert check_plan([ref], plan_of(out, *settings)) == []
    outcome = run_slide(ref, plan_of(out, *settings))
    store = SlideStore.open(store_path(out, "drawn"))
    assert store.grids() == ["128px-1um", GRID]
    assert store.encoders("128px-1um") == ["small"]
    assert store.encoders(GRID) == ["handcrafted"]
    assert store.embeddings("128px-1um", "small").attributes["departs"] is None
    assert outcome.tiles == max(len(store.read_grid(name)) for name in store.grids())
    assert list(store.problems()) == []

    other = [*settings, "tiles.mpp=0.5"]
    [note] = check_plan([ref], plan_of(out, *other))
    assert note == "small: tiles of 128 px at 0.5 um/px depart from its recipe, 128 px at 1 um/px"


def test_places_at_several_resolutions_and_those_with_most_nuclei(ref: SlideRef, tmp_path: Path) -> None:
    chosen = ["tiles.cellular_share=0.25"]
    outcome = run_slide(ref, plan_of(tmp_path, *chosen))
    assert outcome.did == ("tissue", "tiles", "handcrafted")
    name, around = f"{GRID}-cell25", "256px-1um-around-0.5um-cell25"
    store = SlideStore.open(store_path(tmp_path, "drawn"))
    assert store.grids() == [name]
    before = arrays_of(tmp_path)

    # A further scale joins what is there.
    outcome = run_slide(ref, plan_of(tmp_path, *chosen, "tiles.scales_um=1"))
    assert outcome.did == ("tiles", "handcrafted")
    assert store.grids() == [name, around]
    grid, wider = store.read_grid(name), store.read_grid(around)
    assert len(grid) == len(wider) == outcome.tiles
    assert np.array_equal(grid.xy_l0 + np.array(grid.side_l0) // 2, wider.xy_l0 + np.array(wider.side_l0) // 2)
    for each in (name, around):
        assert np.isfinite(store.embeddings(each, "handcrafted").read_values()).all()
    assert {key: value for key, value in arrays_of(tmp_path).items() if key in before} == before
    assert list(store.problems()) == []
    assert run_slide(ref, plan_of(tmp_path, *chosen, "tiles.scales_um=1")).did == ()

    outcome = run_slide(ref, plan_of(tmp_path, *chosen, "tiles.scales_um=1", "tiles.min_tissue=0.9", fresh="tiles"))
    assert store.read_grid(around).around == name
    assert list(store.problems()) == []


def test_weights_that_nobody_asked_for_are_refused(ref: SlideRef, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'timm.test_vti' is not among the encoders of this run; did you mean"):
        check_plan([ref], plan_of(tmp_path, "embed.encoder=timm.test_vit", "embed.weights={timm.test_vti: a.pt}"))
    two = "embed.encoder=timm.test_vit,timm.resnet18"
    with pytest.raises(UsageError, match=r"one file for 2 encoders .*give a file for each"):
        check_plan([ref], plan_of(tmp_path, two, "embed.weights=a.pt"))


def test_the_manifests_mpp_wins_and_is_recorded(drawn_slide: Path, tmp_path: Path) -> None:
    run_slide(SlideRef("drawn", drawn_slide, mpp=0.25), plan_of(tmp_path, "slide.mpp=1.0"))
    slide = SlideStore.open(store_path(tmp_path, "drawn")).slide
    assert slide["mpp"] == [0.25, 0.25]
    used = [evidence for evidence in slide["mpp_evidence"] if evidence["used"]]
    assert [evidence["source"] for evidence in used] == ["manifest"]
    assert len(slide["mpp_evidence"]) > 1


def test_stages_one_by_one_are_a_run(undisturbed: Path, ref: SlideRef, tmp_path: Path) -> None:
    for stage in ("tissue", "tiles", "embed"):
        run_slide(ref, plan_of(tmp_path, stages=(stage,)))
    assert arrays_of(tmp_path) == arrays_of(undisturbed)


def test_a_slide_without_tissue_is_a_result(tmp_path: Path) -> None:
    glass = np.full((600, 700, 3), 243, np.uint8)
    tifffile.imwrite(tmp_path / "glass.tiff", glass, tile=(256, 256), photometric="rgb", compression="deflate")
    outcome = run_slide(SlideRef("glass", tmp_path / "glass.tiff", mpp=0.5), plan_of(tmp_path / "out"))
    assert (outcome.status, outcome.tiles, outcome.tissue_mm2) == ("done", 0, 0.0)
    assert "no-tissue" in outcome.flags
    store = SlideStore.open(store_path(tmp_path / "out", "glass"))
    assert list(store.problems()) == []
    assert zarr.open_array(store.path / "embeddings" / GRID / "handcrafted" / "values", mode="r").shape[0] == 0


class Faulty:
    """A slide in which some tiles can't be read."""

    def __init__(self, slide: Slide, is_bad: Callable[[Region], bool], *, tiles_only: bool = True) -> None:
        self._slide = slide
        self._tiles_only = tiles_only
        self._is_bad = is_bad
        self.info = slide.info

    def read(self, region: Region) -> NDArray[np.uint8]:
        is_tile = region.width_px == 256 and region.height_px == 256
        if (is_tile or not self._tiles_only) and self._is_bad(region):
            raise TileReadError(f"x {region.x_l0}: corrupt block")
        return self._slide.read(region)

    def close(self) -> None:
        self._slide.close()


@pytest.fixture
def plant_faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Region], bool]], None]]:
    def plant(is_bad: Callable[[Region], bool]) -> None:
        monkeypatch.setattr(common, "open_slide", lambda *a, **k: Faulty(open_slide(*a, **k), is_bad))

    yield plant
    monkeypatch.undo()


def test_bad_tiles_are_kept_out_and_can_be_tried_again(
    undisturbed: Path, ref: SlideRef, tmp_path: Path, plant_faults: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = SlideStore.open(store_path(undisturbed, "drawn")).read_grid(GRID)
    corner = tuple(grid.xy_l0[3].tolist())
    plant_faults(lambda region: (region.x_l0, region.y_l0) == corner)
    outcome = run_slide(ref, plan_of(tmp_path))
    assert outcome.bad_tiles == 1
    rows = SlideStore.open(store_path(tmp_path, "drawn")).embeddings(GRID, "handcrafted")
    assert rows.read_status().tolist() == [1 + (row == 3) for row in range(rows.rows)]
    assert np.isnan(rows.read_values()[3]).all()
    assert np.isfinite(np.delete(rows.read_values(), 3, axis=0)).all()
    assert rows.attributes["bad_tiles"] == 1
    monkeypatch.undo()
    assert run_slide(ref, plan_of(tmp_path)).bad_tiles == 1
    assert run_slide(ref, plan_of(tmp_path, retry_bad=True)).bad_tiles == 0
    assert arrays_of(tmp_path) == arrays_of(undisturbed)


def test_too_many_bad_tiles_fail_the_slide_and_keep_the_good(
    ref: SlideRef, tmp_path: Path, plant_faults: Callable[..., None]
) -> None:
    plant_faults(lambda region: region.x_l0 < 1000)
    for _ in range(2):  # a second run says the same
        with pytest.raises(
            TooManyBadTilesError, match=r"tiles are bad, more than embed.max_bad_share=0.05.*--retry-bad"
        ):
            run_slide(ref, plan_of(tmp_path))
    rows = SlideStore.open(store_path(tmp_path, "drawn")).embeddings(GRID, "handcrafted")
    assert np.isfinite(rows.read_values()[rows.read_status() == 1]).all()
    run_slide(ref, plan_of(tmp_path, "embed.max_bad_share=1"))


def test_fresh_forgets_nothing_before_it_is_sure(undisturbed: Path, ref: SlideRef, tmp_path: Path) -> None:
    run_slide(ref, plan_of(tmp_path))
    with pytest.raises(StoreChangedError, match="--fresh tiles"):
        run_slide(ref, plan_of(tmp_path, "tiles.min_tissue=0.9", fresh="embed"))
    with pytest.raises(SlideError, match="coarser than tiles.mpp"):
        run_slide(ref, plan_of(tmp_path, "tiles.mpp=0.1", fresh="tissue"))
    (tmp_path / "mask.geojson").write_text("no mask")
    with pytest.raises(PathopipeError):
        run_slide(ref, plan_of(tmp_path, f"tissue.mask={tmp_path / 'mask.geojson'}", fresh="tissue"))
    assert arrays_of(tmp_path) == arrays_of(undisturbed)


def test_a_slide_that_can_hardly_be_read_is_not_a_slide_without_tissue(
    ref: SlideRef, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(region: Region) -> bool:
        return region.x_l0 < 1200

    monkeypatch.setattr(common, "open_slide", lambda *a, **k: Faulty(open_slide(*a, **k), half, tiles_only=False))
    for _ in range(2):
        with pytest.raises(TooManyBadTilesError, match=r"\d\d% of the slide's area can't be read.*--retry-bad"):
            run_slide(ref, plan_of(tmp_path, "embed.max_bad_share=0.4"))
    tissue = SlideStore.open(store_path(tmp_path, "drawn")).read_tissue()
    assert "unreadable" in tissue.flags
    assert 0.4 < tissue.unreadable_share < 0.9
    monkeypatch.undo()
    # The tissue was looked for on half a picture, so mending the file brings more than the bad tiles.
    run_slide(ref, plan_of(tmp_path, "embed.max_bad_share=0.4", retry_bad=True))
    assert arrays_of(tmp_path) == arrays_of(undisturbed)


@pytest.mark.parametrize("workers", [1, 2])
def test_one_bad_slide_does_not_stop_the_cohort(drawn_slide: Path, tmp_path: Path, workers: int) -> None:
    (tmp_path / "empty.svs").touch()
    (tmp_path / "text.svs").write_text("not a slide")
    refs = [
        SlideRef("empty", tmp_path / "empty.svs"),
        SlideRef("good", drawn_slide),
        SlideRef("text", tmp_path / "text.svs"),
        SlideRef("gone", tmp_path / "gone.svs"),
    ]
    told: list[str] = []
    outcomes = run_cohort(
        refs, plan_of(tmp_path / "out"), workers=workers, on_slide=lambda outcome: told.append(outcome.slide_id)
    )
    assert [outcome.status for outcome in outcomes] == ["failed", "done", "failed", "failed"]
    assert all(outcome.reason for outcome in outcomes if outcome.status == "failed")
    assert sorted(told) == ["empty", "gone", "good", "text"]


def test_a_bug_in_one_slide_is_logged_with_its_traceback(
    drawn_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(common, "find_tissue", broken)
    outcome = run_cohort([SlideRef("s", drawn_slide)], plan_of(tmp_path))[0]
    assert "unexpected ZeroDivisionError (planted)" in outcome.reason
    assert "in broken" in (tmp_path / "logs" / "s.txt").read_text()


def test_a_refused_run_leaves_the_slide_as_sound_as_it_was(
    drawn_slide: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    cli("run", drawn_slide, "--out", out)
    summary = (out / "summary.csv").read_bytes()
    result = cli("run", drawn_slide, "--out", out, "--set", "tiles.min_tissue=0.9")
    assert result.code == 1
    assert "was made from other inputs" in result.out
    assert (out / "summary.csv").read_bytes() == summary
    assert cli("verify", out).code == 0


def test_the_next_slide_is_begun_while_one_is_embedded(
    drawn_slide: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, second_is_begun, waited = cohort.begin_slide, threading.Event(), []

    def told(ref: SlideRef, plan: RunPlan, *, claim: Claim) -> BegunSlide:
        begun = begin(ref, plan, claim=claim)
        if ref.slide_id == "second":
            second_is_begun.set()
        return begun

    def on_tiles(slide_id: str, done: int, total: int) -> None:
        if slide_id == "drawn":
            waited.append(second_is_begun.wait(30))

    monkeypatch.setattr(cohort, "begin_slide", told)
    refs = [SlideRef("drawn", drawn_slide), SlideRef("second", drawn_slide)]
    outcomes = run_cohort(refs, plan_of(tmp_path), on_tiles=on_tiles)
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    assert waited
    assert all(waited)
    shutil.rmtree(tmp_path / "slides" / "second.zarr")
    assert arrays_of(tmp_path) == arrays_of(undisturbed)


def test_a_run_that_is_stopped_lets_go_of_the_slide_that_it_had_begun(drawn_slide: Path, tmp_path: Path) -> None:
    def stop(outcome: SlideOutcome) -> None:
        raise KeyboardInterrupt

    refs = [SlideRef(name, drawn_slide) for name in ("one", "two", "three")]
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run_cohort(refs, plan_of(tmp_path), on_slide=stop)
    assert threading.active_count() == threads
    assert not list((tmp_path / "slides").glob(".*.claim"))
    assert [outcome.status for outcome in run_cohort(refs, plan_of(tmp_path))] == ["done"] * 3


def test_an_output_that_takes_no_files_ends_the_run(
    drawn_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(ref: SlideRef, plan: RunPlan, *, claim: object) -> None:
        monkeypatch.setattr(cluster_outcomes, "check_writable", refuse)
        raise StoreWriteError("disk full")

    def refuse(out: Path) -> None:
        raise StoreWriteError(f"{out}: can't be written (No space left on device)")

    monkeypatch.setattr(cohort, "begin_slide", full)
    with pytest.raises(StoreWriteError, match="No space left"):
        run_cohort([SlideRef("a", drawn_slide), SlideRef("b", drawn_slide)], plan_of(tmp_path))


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_fills_up_keeps_what_was_done(ref: SlideRef, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    # Room for the small stages and some chunks, not for all.
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=340k", "tmpfs", out], check=False).returncode != 0:
        pytest.skip("no right to mount")
    try:
        with pytest.raises(StoreWriteError, match="No space left on device.*free space"):
            run_slide(ref, plan_of(out))
        assert not list(out.rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
        run_slide(ref, plan_of(out))
        assert arrays_of(out) == arrays_of(undisturbed)
    finally:
        subprocess.run(["umount", out], check=True)


def _count_chunk_writes(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


_KILLED_RUN = """
import sys
from pathlib import Path
from pathopipe.store import EmbeddingArray
write = EmbeddingArray.write_chunk
def logged(self, chunk, values, status):
    with open({log!r}, "a") as file:
        file.write(f"{{chunk}}\\n")
    write(self, chunk, values, status)
EmbeddingArray.write_chunk = logged
from pathopipe.cli.app import main
sys.argv = ["pathopipe", "run", {slide!r}, "--out", {out!r}, "--set", "embed.chunk_rows=16"]
main()
"""


def test_killed_at_random_moments_nothing_is_lost(drawn_slide: Path, undisturbed: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "chunks.log"
    code = _KILLED_RUN.format(log=str(log), slide=str(drawn_slide), out=str(out))
    rng = random.Random(4)
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    seconds = time.monotonic() - started
    n_chunks = _count_chunk_writes(log)
    assert n_chunks >= 3
    assert arrays_of(out) == arrays_of(undisturbed)
    SlideStore.open(store_path(out, "drawn")).clear_stage("tissue")
    log.unlink()

    kills = kills_since_start = 0
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        # Most of the time is start-up; the moments are drawn from the part in which files are written.
        time.sleep(seconds * rng.uniform(0.45, 0.95))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills, kills_since_start = kills + 1, kills_since_start + 1
        else:
            # The machine is quicker than it was: from the beginning, and sooner.
            SlideStore.open(store_path(out, "drawn")).clear_stage("tissue")
            log.unlink(missing_ok=True)
            seconds, kills_since_start = seconds * 0.7, 0
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert kills >= 1
    assert arrays_of(out) == arrays_of(undisturbed)
    assert list(SlideStore.open(store_path(out, "drawn")).problems()) == []
    assert not list(out.rglob("*.partial"))
    assert _count_chunk_writes(log) <= n_chunks + kills_since_start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_130_with_a_sound_store(
    drawn_slide: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = [
        "run",
        str(drawn_slide),
        "--out",
        str(tmp_path),
        "--set",
        "embed.chunk_rows=16",
        "--set",
        "embed.batch_size=1",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "pathopipe", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        values = store_path(tmp_path, "drawn") / "embeddings" / GRID / "handcrafted" / "values" / "c"
        deadline = time.monotonic() + 60
        while not values.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    if process.returncode == 0:
        pytest.skip("the run ended before the signal")
    assert process.returncode == 130, told
    assert "interrupted; what was finished is kept" in told
    assert "Traceback" not in told
    assert not list(tmp_path.rglob("*.partial"))
    run_slide(SlideRef("drawn", drawn_slide), plan_of(tmp_path))
    assert arrays_of(tmp_path) == arrays_of(undisturbed)


def test_ctrl_c_on_a_terminal_is_one_line_though_the_workers_get_it_too(drawn_slide: Path, tmp_path: Path) -> None:
    settings = ["--workers", "2", "--set", "embed.chunk_rows=16", "--set", "embed.batch_size=1"]
    with subprocess.Popen(
        [sys.executable, "-m", "pathopipe", "run", str(drawn_slide), "--out", str(tmp_path), *settings],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "slides").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert told.splitlines() == [
        "pathopipe: interrupted; what was finished is kept, the same command goes on from there"
    ]
    assert not list(tmp_path.rglob("*.partial"))


def test_the_default_plan_is_the_default_config(tmp_path: Path) -> None:
    assert RunPlan(out=tmp_path).config == Config()


def pass_of(ref: SlideRef, plan: RunPlan) -> Pass:
    """What is to be embedded of a slide whose small stages are done now."""
    with claimed(plan.out, ref.slide_id) as claim, begin_slide(ref, plan, claim=claim) as begun:
        [whole] = begun.prepared.passes
    return whole


def test_chunks_that_an_earlier_try_finished_are_passed_over(ref: SlideRef, tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    whole = pass_of(ref, plan)
    [n_chunks] = {len(chunks) for chunks in whole.chunks.values()}
    parts = list(whole.parts(1, longest=2))
    assert len(parts[0].chunks["handcrafted"]) == 2
    assert sum(len(part.chunks["handcrafted"]) for part in parts) == n_chunks
    [first] = embed_pending(ref, plan, parts[0]).values()
    [rest] = embed_pending(ref, plan, whole).values()
    assert first.tiles == 32
    assert first.tiles + rest.tiles == whole.n_tiles
    assert embed_pending(ref, plan, whole) == {}


def test_a_slide_that_was_taken_over_is_not_written_to(ref: SlideRef, tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    whole = pass_of(ref, plan)
    with claimed(tmp_path, "drawn") as claim:
        other = {**json.loads(claim.path.read_text()), "token": "other", "host": "node7"}
        claim.path.write_text(json.dumps(other))
        with pytest.raises(StoreBusyError, match="drawn: taken over by process .* on node7"):
            embed_pending(ref, plan, whole, claim=claim)
    assert SlideStore.open(store_path(tmp_path, "drawn")).embeddings(GRID, "handcrafted").done_chunks() == []


def test_a_slide_that_is_being_written_is_left_alone(undisturbed: Path, ref: SlideRef, tmp_path: Path) -> None:
    with claimed(tmp_path, "drawn"):
        with pytest.raises(StoreBusyError, match=f"drawn: another run is writing it .process {os.getpid()} on "):
            run_slide(ref, plan_of(tmp_path))
    assert not store_path(tmp_path, "drawn").exists()
    run_slide(ref, plan_of(tmp_path))
    store = SlideStore.open(store_path(tmp_path, "drawn"))
    (store.path / "objects" / "nuclei").mkdir(parents=True)
    with store.writing_objects(), pytest.raises(StoreBusyError, match="the objects of drawn"):
        run_slide(ref, plan_of(tmp_path, fresh="tissue"))
    assert store.inputs("tissue") is not None
