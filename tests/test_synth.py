"""Drawn slides: seamless, the same everywhere and every time, true to their truth, and files that others open."""

import hashlib
import itertools
import math
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import pathopipe.synth.layout
import pathopipe.synth.tiff
from pathopipe.errors import StoreWriteError, UsageError
from pathopipe.geojson import read_features
from pathopipe.stain import optical_density, unmix
from pathopipe.synth import DrawnSlide, SynthSpec, TruthObject, write_slide
from pathopipe.synth.sprites import fill_polygon

_NUCLEI = ("Epithelial", "Lymphocyte", "Fibroblast", "Endothelial")
# A millimetre of tissue: several blocks each way, glands, lumina and every kind of nucleus.
SPEC = SynthSpec(width_px=2300, height_px=2100, mpp=0.5, seed=3)


@pytest.fixture(scope="module")
def slide() -> DrawnSlide:
    return DrawnSlide(SPEC)


@pytest.fixture(scope="module")
def whole(slide: DrawnSlide) -> NDArray[np.uint8]:
    return slide.read(0, 0, SPEC.width_px, SPEC.height_px)


@pytest.fixture(scope="module")
def labels(slide: DrawnSlide) -> dict[str, NDArray[np.int32]]:
    return slide.labels(0, 0, SPEC.width_px, SPEC.height_px)


@pytest.fixture(scope="module")
def objects(slide: DrawnSlide) -> list[TruthObject]:
    return slide.objects(0, 0, SPEC.width_px, SPEC.height_px)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("synth")
    path, truth = folder / "slide.tiff", folder / "truth.geojson"
    write_slide(path, SPEC, truth=truth, threads=2)
    return path, truth


boxes = st.tuples(st.integers(-50, 2400), st.integers(-50, 2200), st.integers(1, 700), st.integers(1, 700))


# -- pixels ------------------------------------------------------------------------------------------------------------


@given(box=boxes)
@settings(max_examples=40, deadline=None)
def test_any_cut_equals_the_whole(slide: DrawnSlide, whole: NDArray[np.uint8], box: tuple[int, int, int, int]) -> None:
    x, y, width, height = box
    padded = np.full((SPEC.height_px + 1000, SPEC.width_px + 1000, 3), 255, np.uint8)
    padded[100 : 100 + SPEC.height_px, 100 : 100 + SPEC.width_px] = whole
    assert np.array_equal(
        slide.read(x, y, width, height), padded[100 + y : 100 + y + height, 100 + x : 100 + x + width]
    )


def test_order_of_drawing_is_of_no_account(whole: NDArray[np.uint8]) -> None:
    fresh = DrawnSlide(SPEC)
    for x, y in ((1500, 1300), (20, 900), (900, 10)):
        assert np.array_equal(fresh.read(x, y, 333, 222), whole[y : y + 222, x : x + 333])


def test_no_seam_between_blocks(
    slide: DrawnSlide, whole: NDArray[np.uint8], labels: dict[str, NDArray[np.int32]]
) -> None:
    """Across a block border pixels differ no more than across other columns, and nuclei there are whole."""
    step = np.abs(np.diff(cv2.GaussianBlur(whole, (0, 0), 1.5).astype(np.int16), axis=1)).max(axis=2)
    edge = slide.block_px - 1
    near = [step[:, edge + k].mean() for k in (-40, -30, -20, 20, 30, 40)]
    assert step[:, edge].mean() < 1.3 * max(near)
    haem = unmix(optical_density(whole))[..., 0]
    inside = labels["nuclei"] > 0
    by_border = np.zeros_like(inside)
    for border in range(slide.block_px, max(inside.shape), slide.block_px):
        by_border[:, border - 4 : border + 4] = by_border[border - 4 : border + 4] = True
    assert (inside & by_border).sum() > 1000
    assert np.mean(haem[inside & by_border] < 0.25) < 1.5 * np.mean(haem[inside] < 0.25) + 0.01


def test_placement_does_not_depend_on_how_it_is_worked_out(
    objects: list[TruthObject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller squares give the same glands and nuclei: what decides about a nucleus is all looked at."""
    monkeypatch.setattr(pathopipe.synth.layout, "_NUCLEI_A_SQUARE", 17)
    monkeypatch.setattr(pathopipe.synth.layout, "_FAT_A_SQUARE", 4)
    monkeypatch.setattr(pathopipe.synth.layout, "_KEPT_SQUARES", 2000)
    monkeypatch.setattr(pathopipe.synth.layout.GlandLattice, "CELLS_A_SQUARE", 2)
    other = DrawnSlide(SPEC).objects(0, 0, SPEC.width_px, SPEC.height_px)
    assert {(o.kind, o.id, o.polygon.wkb) for o in other} == {(o.kind, o.id, o.polygon.wkb) for o in objects}


def test_other_processes_draw_the_same(slide: DrawnSlide) -> None:
    code = (
        "import hashlib\n"
        "from pathopipe.synth import DrawnSlide, SynthSpec\n"
        f"slide = DrawnSlide({SPEC!r})\n"
        "pixels = slide.read(700, 600, 640, 560)\n"
        "labels = slide.labels(700, 600, 640, 560)\n"
        "print(hashlib.sha256(pixels.tobytes() + labels['nuclei'].tobytes()).hexdigest())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = slide.read(700, 600, 640, 560).tobytes() + slide.labels(700, 600, 640, 560)["nuclei"].tobytes()
    assert done.stdout.strip() == hashlib.sha256(mine).hexdigest()


def test_seeds_differ(whole: NDArray[np.uint8]) -> None:
    other = DrawnSlide(SynthSpec(width_px=2300, height_px=2100, mpp=0.5, seed=4))
    assert not np.array_equal(other.tissue_mask(50, 50), DrawnSlide(SPEC).tissue_mask(50, 50))


def test_glass_is_bright_with_a_little_noise(slide: DrawnSlide, whole: NDArray[np.uint8]) -> None:
    bare = DrawnSlide(SynthSpec(width_px=2300, height_px=2100, mpp=0.5, seed=3, pen=False, dust=False))
    glass = bare.read(0, 0, 2300, 40)  # tissue keeps clear of the edge
    assert 238 <= glass.mean() <= 246
    assert 0.3 < glass.std() < 4
    assert glass.max() < 255


def test_tissue_is_pink_and_nuclei_blue(whole: NDArray[np.uint8], labels: dict[str, NDArray[np.int32]]) -> None:
    nucleus = whole[labels["nuclei"] > 0].mean(axis=0)
    stroma = whole[(labels["nuclei"] == 0) & (labels["glands"] == 0)]
    stroma = stroma[stroma[:, 1] < 190].mean(axis=0)
    assert nucleus[2] > nucleus[0] > nucleus[1]
    assert stroma[0] > stroma[2] > stroma[1]


# -- truth -------------------------------------------------------------------------------------------------------------


def test_haematoxylin_is_in_the_nuclei(whole: NDArray[np.uint8], labels: dict[str, NDArray[np.int32]]) -> None:
    spec = SynthSpec(width_px=2300, height_px=2100, mpp=0.5, seed=3, pen=False, dust=False)
    haem = unmix(optical_density(DrawnSlide(spec).read(0, 0, 2300, 2100)))[..., 0]
    inside = labels["nuclei"] > 0
    # The ring around a nucleus is what a shift of a pixel or two would blur into it.
    ring = (cv2.dilate(inside.astype(np.uint8), np.ones((9, 9))) > 0) & (
        cv2.dilate(inside.astype(np.uint8), np.ones((5, 5))) == 0
    )
    assert haem[inside].mean() > 0.42
    assert haem[ring].mean() < 0.5 * haem[inside].mean()
    dark = haem > 0.36
    assert (dark & inside).sum() > 0.85 * dark.sum()


def test_labels_have_the_area_of_the_polygons(labels: dict[str, NDArray[np.int32]], objects: list[TruthObject]) -> None:
    for kind, name, each, total in (("nucleus", "nuclei", 0.30, 0.02), ("gland", "glands", 0.02, 0.005)):
        counts = np.bincount(labels[name].ravel(), minlength=max(o.id for o in objects) + 1)
        own = [o for o in objects if o.kind == kind]
        areas = np.array([o.polygon.area for o in own])
        drawn = np.array([counts[o.id] for o in own])
        assert len(own) > 10
        assert abs(drawn.sum() / areas.sum() - 1) < total
        assert np.percentile(np.abs(drawn / areas - 1), 98) < each


def test_labels_and_objects_name_the_same_things(
    labels: dict[str, NDArray[np.int32]], objects: list[TruthObject]
) -> None:
    for kind, name in (("nucleus", "nuclei"), ("gland", "glands"), ("lumen", "lumina")):
        assert {o.id for o in objects if o.kind == kind} == set(np.unique(labels[name]).tolist()) - {0}


@given(box=boxes)
@settings(max_examples=15, deadline=None)
def test_labels_of_a_cut_are_cut_labels(
    slide: DrawnSlide, labels: dict[str, NDArray[np.int32]], box: tuple[int, int, int, int]
) -> None:
    x, y = min(max(box[0], 0), 2299), min(max(box[1], 0), 2099)
    width, height = min(box[2], 2300 - x), min(box[3], 2100 - y)
    cut = slide.labels(x, y, width, height)
    for name, image in labels.items():
        assert np.array_equal(cut[name], image[y : y + height, x : x + width]), name


def test_objects_of_parts_are_the_objects(slide: DrawnSlide, objects: list[TruthObject]) -> None:
    parts = [
        (o.kind, o.id, o.polygon.wkb)
        for y in range(0, 2100, 450)
        for x in range(0, 2300, 620)
        for o in slide.objects(x, y, min(620, 2300 - x), min(450, 2100 - y))
    ]
    assert len(parts) == len(set(parts))
    assert set(parts) == {(o.kind, o.id, o.polygon.wkb) for o in objects}


def test_objects_are_sound(slide: DrawnSlide, objects: list[TruthObject]) -> None:
    tissue = shapely.union_all(slide.tissue_polygons()).buffer(1.0)
    glands = {o.id: o.polygon for o in objects if o.kind == "gland"}
    assert {"Epithelial", "Lymphocyte", "Fibroblast"} <= {o.class_name for o in objects}
    for o in objects:
        assert o.polygon.is_valid
        assert tissue.contains(o.polygon)
        if o.kind == "nucleus":
            size_um = 2 * math.sqrt(o.polygon.area / math.pi) * SPEC.mpp
            assert 3 < size_um < 15
            assert (o.class_name == "Epithelial") == (o.parent is not None)
        if o.parent is not None:
            assert glands[o.parent].buffer(1.5).contains(o.polygon.centroid)
    shapes = list(glands.values())
    tree = shapely.STRtree(shapes)
    for i, j in tree.query(shapes, predicate="intersects").T:
        assert i == j, "glands overlap"


def test_tissue_mask_is_the_polygons(slide: DrawnSlide) -> None:
    plain = DrawnSlide(SynthSpec(width_px=2300, height_px=2100, mpp=0.5, seed=3, pen=False))
    mask = plain.tissue_mask(420, 460)
    area = sum(p.area for p in plain.tissue_polygons())
    assert set(np.unique(mask)) == {0, 1}
    assert mask.sum() * 25 == pytest.approx(area, rel=0.01)
    assert slide.tissue_mask(420, 460).sum() < mask.sum()  # this one has ink over its tissue


def test_mask_agrees_with_the_picture(whole: NDArray[np.uint8], slide: DrawnSlide) -> None:
    bare = DrawnSlide(SynthSpec(width_px=2300, height_px=2100, mpp=0.5, seed=3, pen=False, dust=False))
    green = bare.read(0, 0, 2300, 2100)[..., 1]
    seen = cv2.resize((green < 225).astype(np.float32), (115, 105), interpolation=cv2.INTER_AREA) > 0.3
    seen = cv2.morphologyEx(seen.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((7, 7))) > 0
    truth = bare.tissue_mask(105, 115) > 0
    assert (seen & truth).sum() / (seen | truth).sum() > 0.93


# -- physical size -----------------------------------------------------------------------------------------------------


def test_other_resolutions_show_the_same_tissue(slide: DrawnSlide) -> None:
    fine = DrawnSlide(SynthSpec(width_px=4600, height_px=4200, mpp=0.25, seed=3))
    own, other = (shapely.union_all(s.tissue_polygons()) for s in (slide, fine))
    other = shapely.transform(other, lambda xy: xy / 2)
    assert own.symmetric_difference(other).area < 0.001 * own.area
    a = {o.id: o for o in slide.objects(500, 500, 500, 500)}
    b = {o.id: o for o in fine.objects(1000, 1000, 1000, 1000)}
    shared = a.keys() & b.keys()
    assert len(shared) > 0.95 * len(a)  # but for those whose centre falls on the box's edge
    for number in shared:
        assert a[number].class_name == b[number].class_name
        assert (
            a[number].polygon.centroid.distance(shapely.transform(b[number].polygon.centroid, lambda xy: xy / 2)) < 1.5
        )
    small = cv2.resize(fine.read(1000, 1000, 1000, 1000), (500, 500), interpolation=cv2.INTER_AREA)
    same = np.abs(cv2.blur(small, (9, 9)).astype(int) - cv2.blur(slide.read(500, 500, 500, 500), (9, 9)).astype(int))
    assert same.mean() < 8


@pytest.mark.parametrize("mpp", [0.1, 0.2485, 2.0, 7.0])
def test_odd_resolutions_are_drawn(mpp: float) -> None:
    slide = DrawnSlide(SynthSpec(width_px=400, height_px=300, mpp=mpp, seed=1, pen=False, dust=False))
    image, mask = slide.read(0, 0, 400, 300), slide.tissue_mask(300, 400) > 0
    assert image[mask].mean() < image[~mask].mean() - 20


# -- hard cases --------------------------------------------------------------------------------------------------------


def test_pale_tissue_has_less_of_both_stains() -> None:
    od = []
    for strength in (1.0, 0.3):
        spec = SynthSpec(width_px=900, height_px=900, mpp=0.5, seed=3, stain_strength=strength, pen=False, dust=False)
        slide = DrawnSlide(spec)
        inside = slide.tissue_mask(900, 900) > 0
        glass = slide.read(0, 0, 900, 12).mean()
        od.append(-np.log10(slide.read(0, 0, 900, 900)[inside] / glass).mean())
    assert od[1] == pytest.approx(0.3 * od[0], rel=0.08)


def test_dark_field_is_blue_nuclei_on_black() -> None:
    slide = DrawnSlide(SynthSpec(width_px=1000, height_px=900, mpp=0.5, seed=3, dark_field=True))
    image, nuclei = slide.read(0, 0, 1000, 900), slide.labels(0, 0, 1000, 900)["nuclei"] > 0
    outside = slide.tissue_mask(900, 1000) == 0
    assert image[outside].mean() < 6
    assert image[nuclei][:, 2].mean() > 90
    assert image[..., :2].max() < 30


def test_pen_is_coloured_and_not_tissue() -> None:
    with_pen, without = (
        DrawnSlide(SynthSpec(width_px=2300, height_px=2100, mpp=0.5, seed=3, pen=pen, dust=False))
        for pen in (True, False)
    )
    changed = np.abs(with_pen.read(0, 0, 2300, 2100).astype(int) - without.read(0, 0, 2300, 2100)).max(axis=2) > 60
    assert 0.003 < changed.mean() < 0.2
    tissue = without.tissue_mask(2100, 2300) > 0
    assert (changed & tissue).any()
    assert (changed & ~tissue).any()
    assert with_pen.tissue_mask(2100, 2300)[changed].mean() < 0.03
    assert [p.wkb for p in with_pen.tissue_polygons()] == [p.wkb for p in without.tissue_polygons()]


def test_dust_and_border_are_drawn() -> None:
    base, dusty, framed = (
        DrawnSlide(SynthSpec(width_px=1600, height_px=1400, mpp=0.5, seed=2, pen=False, dust=dust, border=border))
        for dust, border in ((False, False), (True, False), (False, True))
    )
    plain = base.read(0, 0, 1600, 1400)
    share = (dusty.read(0, 0, 1600, 1400) != plain).any(axis=2).mean()
    assert 0.0001 < share < 0.1
    frame = framed.read(0, 0, 1600, 1400)
    assert frame[:, :12].mean() < 20
    assert frame[-12:].mean() < 20
    assert plain[:, :12].mean() > 230
    assert framed.tissue_mask(140, 160)[:, 0].max() == 0


def test_repeated_slide_repeats() -> None:
    spec = SynthSpec(width_px=2500, height_px=1900, mpp=0.5, seed=5, repeat_px=1024)
    one = DrawnSlide(SynthSpec(width_px=1024, height_px=1024, mpp=0.5, seed=5))
    slide = DrawnSlide(spec)
    image = slide.read(0, 0, 2500, 1900)
    assert np.array_equal(image[:1024, :1024], one.read(0, 0, 1024, 1024))
    assert np.array_equal(image[:, 1024:2048], image[:, :1024])
    assert np.array_equal(slide.read(1000, 900, 300, 300), image[900:1200, 1000:1300])
    first = one.objects(0, 0, 1024, 1024)
    assert len(slide.objects(0, 0, 2048, 1024)) == 2 * len(first)
    found = slide.objects(0, 0, 2500, 1900)
    assert len({(o.kind, o.id) for o in found}) == len(found)
    labels = slide.labels(0, 0, 2500, 1900)
    assert {o.id for o in found if o.kind == "gland"} <= set(np.unique(labels["glands"]).tolist())
    mask = slide.tissue_mask(950, 1250)
    assert np.array_equal(mask[:512, 512:1024], mask[:512, :512])
    assert mask[:512, :512].sum() == one.tissue_mask(512, 512).sum()


# -- files -------------------------------------------------------------------------------------------------------------


def test_openslide_reads_it(written: tuple[Path, Path], whole: NDArray[np.uint8]) -> None:
    with openslide.OpenSlide(written[0]) as file:
        assert file.properties["openslide.vendor"] == "generic-tiff"
        assert float(file.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert float(file.properties["openslide.mpp-y"]) == pytest.approx(0.5)
        assert file.level_dimensions == ((2300, 2100), (1150, 1050), (575, 525))
        full = np.asarray(file.read_region((0, 0), 0, file.dimensions).convert("RGB")).astype(int)
        # JPEG halves the resolution of colour, so thin nuclei lose some.
        assert np.abs(full - whole).mean() < 4
        assert np.abs(full.mean(axis=2) - whole.mean(axis=2)).mean() < 3
        for level in (1, 2):
            seen = np.asarray(file.read_region((0, 0), level, file.level_dimensions[level]).convert("RGB")).astype(int)
            factor = 2**level
            rows, columns = seen.shape[0] * factor, seen.shape[1] * factor
            mean = whole[:rows, :columns].reshape(seen.shape[0], factor, seen.shape[1], factor, 3).mean(axis=(1, 3))
            assert np.abs(seen - mean).mean() < 4


def test_tifffile_reads_it(written: tuple[Path, Path], whole: NDArray[np.uint8]) -> None:
    with tifffile.TiffFile(written[0]) as file:
        assert not file.is_bigtiff
        assert [page.shape for page in file.pages] == [(2100, 2300, 3), (1050, 1150, 3), (525, 575, 3)]
        assert all(page.tile == (256, 256) for page in file.pages)
        assert file.pages[0].tags["ResolutionUnit"].value == 3
        assert np.abs(file.pages[0].asarray().astype(int) - whole).mean() < 4


def test_every_level_is_the_one_below_halved(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    # 1,500 is no multiple of any tile or block, so that no two tiles of a level are alike.
    write_slide(path, SynthSpec(width_px=5100, height_px=2700, mpp=0.25, seed=2, repeat_px=1500))
    with openslide.OpenSlide(path) as file:
        assert file.level_count == 4
        images = [
            np.asarray(file.read_region((0, 0), k, d).convert("RGB")) for k, d in enumerate(file.level_dimensions)
        ]
    for below, level in itertools.pairwise(images):
        half = cv2.resize(
            below[: 2 * level.shape[0], : 2 * level.shape[1]], level.shape[1::-1], interpolation=cv2.INTER_AREA
        )
        assert np.abs(half.astype(int) - level).mean() < 5
        off = np.abs(cv2.blur(half, (32, 32)).astype(int) - cv2.blur(level, (32, 32)).astype(int))
        assert off.max() < 12  # no tile is at a wrong place


@pytest.mark.parametrize("size", [(1, 1), (255, 300), (1024, 1024), (3000, 20), (1025, 2049)])
def test_any_size_is_written(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "a.tiff"
    write_slide(path, SynthSpec(width_px=size[0], height_px=size[1], mpp=1.0), threads=1)
    with openslide.OpenSlide(path) as file:
        assert file.dimensions == size
        for level, dims in enumerate(file.level_dimensions):
            assert np.asarray(file.read_region((0, 0), level, dims)).shape == (dims[1], dims[0], 4)
        assert max(file.level_dimensions[-1]) <= 1000 or min(file.level_dimensions[-1]) == 1


def test_big_tiff_is_read_by_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathopipe.synth.tiff, "_CLASSIC_LIMIT", 0)
    path, spec = tmp_path / "big.tiff", SynthSpec(width_px=1200, height_px=700, mpp=0.2485)
    write_slide(path, spec, threads=1)
    with openslide.OpenSlide(path) as file:
        assert file.level_count == 2
        assert float(file.properties["openslide.mpp-x"]) == pytest.approx(0.2485, rel=1e-6)
        full = np.asarray(file.read_region((0, 0), 0, file.dimensions).convert("RGB")).astype(int)
        assert np.abs(full - DrawnSlide(spec).read(0, 0, 1200, 700)).mean() < 4
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff


def test_threads_make_the_same_file(tmp_path: Path, written: tuple[Path, Path]) -> None:
    write_slide(tmp_path / "slide.tiff", SPEC, threads=1)
    assert (tmp_path / "slide.tiff").read_bytes() == written[0].read_bytes()


def test_truth_file_holds_the_objects(
    written: tuple[Path, Path], slide: DrawnSlide, objects: list[TruthObject]
) -> None:
    found = list(read_features(written[1]))
    names: dict[str, int] = {}
    for one in found:
        (name,) = one.names
        names[name] = names.get(name, 0) + 1
        assert one.object_type == ("detection" if name in _NUCLEI else "annotation")
    expected = {"Tissue": len(slide.tissue_polygons())}
    for o in objects:
        expected[o.class_name] = expected.get(o.class_name, 0) + 1
    assert names == expected


def test_progress_ends_at_one_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    seen: list[float] = []
    spec = SynthSpec(width_px=2100, height_px=1100, mpp=0.25)
    write_slide(tmp_path / "a.tiff", spec, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1

    def stop(done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_slide(tmp_path / "b.tiff", spec, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tiff"]


def test_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreWriteError):
        write_slide(tmp_path / "file" / "a.tiff", SynthSpec(width_px=64, height_px=64))


@pytest.mark.parametrize(
    "bad",
    [
        {"width_px": 0},
        {"mpp": 0.0},
        {"mpp": math.nan},
        {"stain_strength": -1.0},
        {"seed": -1},
        {"repeat_px": 10},
    ],
)
def test_wrong_specs_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        SynthSpec(**{"width_px": 100, "height_px": 100, **bad})  # type: ignore[arg-type]


def test_wrong_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_slide(tmp_path / "a.tiff", SPEC, threads=0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_slide(tmp_path: Path) -> None:
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from pathopipe.synth import SynthSpec, write_slide\n"
        "side = int(sys.argv[1])\n"
        "write_slide(Path(sys.argv[2]), SynthSpec(width_px=side, height_px=side), threads=2)\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024)\n"
    )
    peak_mb = []
    for side in (3000, 12000):
        run = [sys.executable, "-c", code, str(side), str(tmp_path / "a.tiff")]
        peak_mb.append(int(subprocess.run(run, capture_output=True, text=True, check=True).stdout))
    assert peak_mb[1] < 400
    assert peak_mb[1] - peak_mb[0] < 100  # 16 times the pixels: 400 MB more where they were all held


# -- the polygon filler ------------------------------------------------------------------------------------------------


@given(
    points=st.lists(st.tuples(st.floats(-5, 25), st.floats(-5, 25)), min_size=3, max_size=12, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_filled_pixels_are_those_with_their_centre_inside(points: list[tuple[float, float]]) -> None:
    # Points around their middle make a simple ring.
    ring = np.array(points)
    ring = ring[np.argsort(np.arctan2(*(ring - ring.mean(axis=0)).T[::-1]))]
    polygon = shapely.Polygon(ring)
    if not polygon.is_valid or polygon.area < 0.5:
        return
    image = np.zeros((20, 20), np.uint8)
    fill_polygon(image, ring, 1)
    y, x = np.mgrid[:20, :20] + 0.5
    sure = shapely.distance(polygon.exterior, shapely.points(x, y)) > 1e-6
    assert np.array_equal(image[sure] > 0, shapely.contains_xy(polygon, x, y)[sure])
