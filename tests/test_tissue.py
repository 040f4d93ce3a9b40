"""Tissue: exact outlines, hard slides drawn and real, every flag present where it should be and absent where not."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from shapely.geometry import Polygon, box, mapping
from skimage.measure import blur_effect

from pathopipe.config import TissueConfig
from pathopipe.errors import MissingResolutionError, UsageError
from pathopipe.geometry import BoxL0
from pathopipe.records import Level, SlideInfo, Tissue
from pathopipe.slide.array import ArraySlide
from pathopipe.slide.open import open_slide
from pathopipe.synth import DrawnSlide, SynthSpec
from pathopipe.tissue import detect_tissue, find_tissue, given_tissue
from pathopipe.tissue.assemble import tissue_from_mask
from pathopipe.tissue.detect import overview_mpp
from pathopipe.tissue.focus import measure_blur
from pathopipe.tissue.outline import rasterise, trace

SLIDES = Path(__file__).parents[2] / "shared" / "data" / "slides"
CONFIG = TissueConfig()
UM = 8.0
Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def detect(rgb: Picture, um: float = UM, config: TissueConfig = CONFIG) -> Tissue:
    return detect_tissue(rgb, dims_l0=(rgb.shape[1], rgb.shape[0]), mpp_l0=(um, um), config=config)


def dice(found: NDArray[np.uint8], truth: Mask) -> float:
    both = np.count_nonzero((found > 0) & truth)
    return 2 * both / max(np.count_nonzero(found) + np.count_nonzero(truth), 1)


@cache
def drawn(width: int, height: int, seed: int, mpp: float = 2.0, **options: object) -> tuple[Picture, Mask]:
    """A drawn slide seen at 8 um/px, and its truth."""
    slide = DrawnSlide(SynthSpec(width_px=width, height_px=height, mpp=mpp, seed=seed, **options))  # type: ignore[arg-type]
    size = (round(width * mpp / UM), round(height * mpp / UM))
    rgb = cv2.resize(slide.read(0, 0, width, height), size, interpolation=cv2.INTER_AREA)
    return rgb, slide.tissue_mask(size[1], size[0]) > 0


def plain() -> tuple[Picture, Mask]:
    return drawn(1000, 800, 4, pen=False, dust=False)


def glass(height: int = 240, width: int = 320, level: float = 241.0, noise: float = 1.2) -> Picture:
    rng = np.random.default_rng(0)
    return np.clip(level + rng.normal(0, noise, (height, width, 3)), 0, 255).astype(np.uint8)


def lit_unevenly(rgb: Picture, corner: float) -> Picture:
    """Vignetting that leaves the share ``corner`` of the light in the corners."""
    height, width = rgb.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return np.clip(rgb * (1 - (1 - corner) * (x * x + y * y) / 2)[..., None], 0, 255).astype(np.uint8)


def as_jpeg(rgb: Picture, quality: int) -> Picture:
    coded = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.ascontiguousarray(cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1])


def marked(rgb: Picture, ink: tuple[int, int, int], strength: float = 0.9) -> tuple[Picture, Mask]:
    """The slide with a marker stroke about 100 um wide across it, and where the ink is."""
    height, width = rgb.shape[:2]
    amount = np.zeros((height, width), np.float32)
    path = np.array([(0.03, 0.8), (0.3, 0.6), (0.45, 0.85), (0.7, 0.7), (0.97, 0.9)]) * (width, height)
    cv2.polylines(amount, [path.astype(np.int32)], False, 1.0, 13, cv2.LINE_AA)
    streaks = cv2.GaussianBlur(np.random.default_rng(1).normal(size=(height, width)).astype(np.float32), (0, 0), 3)
    amount *= np.clip(strength + 0.06 * streaks / streaks.std(), 0, 1)
    light = (np.array(ink) / 255) ** amount[..., None]
    return np.clip(rgb * light, 0, 255).astype(np.uint8), amount > 0.3


INKS = {
    "blue": (30, 60, 180),
    "green": (40, 140, 70),
    "red": (200, 40, 40),
    "black": (35, 33, 36),
    "yellow": (245, 220, 60),
    "purple": (110, 40, 150),
}


# -- outlines -------------------------------------------------------------------------------------------------------

masks = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 1))
)


@given(masks)
def test_outlines_are_exact(mask: NDArray[np.uint8]) -> None:
    polygons = trace(mask)
    assert all(polygon.is_valid for polygon in polygons)
    assert len(polygons) == ndimage.label(mask)[1]
    assert sum(polygon.area for polygon in polygons) == mask.sum()
    assert [p.area for p in polygons] == sorted((p.area for p in polygons), reverse=True)
    assert shapely.union_all(polygons).area == mask.sum()
    np.testing.assert_array_equal(rasterise(polygons, mask.shape[1], mask.shape[0], (1, 1)), mask)


@given(masks, st.integers(1, 300), st.integers(1, 300))
def test_outlines_fill_level_0_on_any_grid(mask: NDArray[np.uint8], width_l0: int, height_l0: int) -> None:
    tissue = tissue_from_mask(mask, (width_l0, height_l0), (0.25, 0.5), CONFIG, method="given")
    scale = (width_l0 / mask.shape[1], height_l0 / mask.shape[0])
    np.testing.assert_array_equal(rasterise(tissue.polygons, mask.shape[1], mask.shape[0], scale), mask)
    share = mask.mean()
    assert sum(p.area for p in tissue.polygons) == pytest.approx(share * width_l0 * height_l0)
    assert sum(tissue.areas_mm2) == pytest.approx(share * width_l0 * height_l0 * 0.25 * 0.5 / 1e6)
    assert tissue.mpp == pytest.approx((scale[0] * 0.25, scale[1] * 0.5))


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(-3, 13), st.floats(-3, 13)), min_size=3, max_size=6), st.sampled_from([0.5, 1, 1.7])
)
def test_a_pixel_is_inside_when_its_centre_is(points: list[tuple[float, float]], scale: float) -> None:
    hull = shapely.convex_hull(shapely.multipoints(points))
    if not isinstance(hull, Polygon):
        return
    drawn_mask = rasterise([hull], 10, 9, (scale, scale))
    x, y = np.meshgrid((np.arange(10) + 0.5) * scale, (np.arange(9) + 0.5) * scale)
    on_edge = shapely.distance(hull.exterior, shapely.points(x, y)) < 1e-9
    np.testing.assert_array_equal((drawn_mask > 0)[~on_edge], shapely.contains_xy(hull, x, y)[~on_edge])


def test_one_pixel_is_its_square() -> None:
    mask = np.zeros((3, 4), np.uint8)
    mask[1, 2] = 1
    (square,) = trace(mask)
    assert square.equals(box(2, 1, 3, 2))
    assert len(square.exterior.coords) == 5


def test_holes_and_touching_corners() -> None:
    ring = np.ones((4, 4), np.uint8)
    ring[1, 1] = ring[2, 2] = 0  # two holes that meet at a point
    ring[3, 3] = 0
    (polygon,) = trace(ring)
    assert polygon.is_valid
    assert len(polygon.interiors) == 2
    assert polygon.area == 13
    apart = trace(np.eye(3, dtype=np.uint8))
    assert [p.area for p in apart] == [1, 1, 1]


def test_long_edges_are_straight_runs() -> None:
    (polygon,) = trace(np.ones((400, 700), np.uint8))
    assert len(polygon.exterior.coords) == 5


# -- drawn slides ---------------------------------------------------------------------------------------------------

HARD = {
    "pale": {"stain_strength": 0.3, "pen": False, "dust": False},
    "pen": {"dust": False},
    "dust": {"pen": False},
    "border": {"border": True, "pen": False},
    "everything": {"border": True, "stain_strength": 0.3},
    "dark field": {"dark_field": True},
}


@pytest.mark.parametrize(("width", "height", "seed"), [(1000, 800, 4), (600, 1100, 7)])
@pytest.mark.parametrize("name", HARD)
def test_hard_drawn_slides(name: str, width: int, height: int, seed: int) -> None:
    rgb, truth = drawn(width, height, seed, **HARD[name])
    tissue = detect(rgb)
    assert dice(tissue.mask, truth) >= 0.95
    assert ("pen" in tissue.flags) == (name in ("pen", "everything"))
    assert ("dark-field" in tissue.flags) == (name == "dark field")
    assert "odd-colours" not in tissue.flags
    assert tissue.method == ("dark-field" if name == "dark field" else "brightfield")


DISTURBED: dict[str, Callable[[Picture], Picture]] = {
    "vignetting": lambda rgb: lit_unevenly(rgb, 0.7),
    "JPEG": lambda rgb: as_jpeg(rgb, 60),
    "yellow lamp": lambda rgb: (rgb * np.array([1, 0.98, 0.9])).astype(np.uint8),
    "overexposed": lambda rgb: np.clip(rgb * 1.08, 0, 255).astype(np.uint8),
    "brown": lambda rgb: np.ascontiguousarray(rgb[..., [1, 0, 2]] // 2 + rgb[..., [0, 2, 1]] // 2),
}


@pytest.mark.parametrize("name", DISTURBED)
def test_light_and_colour_may_vary(name: str) -> None:
    rgb, truth = plain()
    tissue = detect(DISTURBED[name](rgb))
    assert dice(tissue.mask, truth) >= 0.93
    assert "pen" not in tissue.flags


def test_unscanned_areas_are_not_glass_to_learn_from() -> None:
    rgb, truth = plain()
    around = np.full((rgb.shape[0] + 200, rgb.shape[1] + 300, 3), 255, np.uint8)
    around[100:-100, 150:-150] = rgb
    whole = np.pad(truth, ((100, 100), (150, 150)))
    assert dice(detect(around).mask, whole) >= 0.95
    around[around.min(axis=2) == 255] = 0  # the same, shown black
    tissue = detect(around)
    assert dice(tissue.mask, whole) >= 0.95
    assert "dark-field" not in tissue.flags


def test_blue_nuclei_and_brown_ones_are_tissue() -> None:
    """A pale blue counterstain with DAB dots: nearly grey on average."""
    rng = np.random.default_rng(3)
    rgb = glass(200, 200).astype(np.float32)
    truth = np.zeros((200, 200), bool)
    truth[40:160, 30:170] = True
    texture = cv2.GaussianBlur(rng.random((200, 200)).astype(np.float32), (0, 0), 0.7)[..., None]
    rgb = np.where(truth[..., None], rgb * (1 - texture * np.array([0.45, 0.3, 0.15])), rgb)
    dots = truth & (rng.random((200, 200)) < 0.1)
    rgb[dots] = (95, 75, 60)
    assert dice(detect(np.clip(rgb, 0, 255).astype(np.uint8)).mask, truth) >= 0.95


def test_fat_is_tissue_and_a_tear_is_not() -> None:
    rgb = glass(160, 160)
    rng = np.random.default_rng(5)
    rgb[10:150, 10:150] = np.array((200, 130, 180)) + rng.normal(0, 14, (140, 140, 1))
    rgb[30:70, 30:130] = glass(40, 100)  # a tear of 0.32 x 0.8 mm
    rgb[90:130, 30:130] = glass(40, 100)
    for k in range(0, 101, 14):
        rgb[90:130, min(30 + k, 129)] = (232, 200, 222)  # walls of fat cells
    for k in range(0, 41, 14):
        rgb[90 + k, 30:130] = (232, 200, 222)
    tissue = detect(rgb)
    assert tissue.mask[95:125, 35:125].mean() > 0.99
    assert tissue.mask[33:67, 33:127].mean() == 0
    assert [len(p.interiors) for p in tissue.polygons] == [1]


@pytest.mark.parametrize("ink", sorted(INKS.keys() - {"purple"}))
def test_pen_is_not_tissue(ink: str) -> None:
    """Violet ink is left out: where it joins tissue it has the tissue's colour."""
    rgb, truth = plain()
    picture, inked = marked(rgb, INKS[ink])
    tissue = detect(picture)
    assert "pen" in tissue.flags
    around_ink = cv2.dilate(inked.astype(np.uint8), np.ones((7, 7))) > 0
    assert dice(tissue.mask * ~around_ink, truth & ~around_ink) >= 0.95
    # Ink over tissue may be told from neither; on glass it must not count.
    assert tissue.mask[inked & ~truth].mean() < 0.3


@pytest.mark.parametrize("strength", [0.9, 0.45])
@pytest.mark.parametrize("ink", INKS)
def test_pen_on_empty_glass(ink: str, strength: float) -> None:
    tissue = detect(marked(glass(), INKS[ink], strength)[0])
    assert tissue.flags == ("no-tissue", "pen")


def dusty() -> Picture:
    rgb = glass()
    rng = np.random.default_rng(2)
    for x, y in rng.integers(10, 230, (25, 2)).tolist():
        cv2.circle(rgb, (x, y), int(rng.integers(1, 5)), (90, 88, 86), -1, cv2.LINE_AA)
    for x, y in rng.integers(20, 220, (6, 2)).tolist():
        cv2.ellipse(rgb, (x, y), (25, 14), 40, 0, 150, (140, 138, 136), 1, cv2.LINE_AA)
    cv2.line(rgb, (0, 20), (319, 25), (120, 121, 122), 2, cv2.LINE_AA)  # the edge of a cover slip
    return rgb


def smeared() -> Picture:
    """Glass with a soft pink stain of 1 mm."""
    stain = cv2.GaussianBlur(np.pad(np.ones((60, 60)), ((90, 90), (130, 130))), (0, 0), 20)
    return np.clip(glass() - stain[..., None] * (4, 22, 9), 0, 255).astype(np.uint8)


EMPTY: dict[str, Callable[[], Picture]] = {
    "glass": glass,
    "dust and an edge": dusty,
    "vignetting": lambda: lit_unevenly(glass(), 0.6),
    "JPEG blocks": lambda: as_jpeg(lit_unevenly(dusty(), 0.85), 35),
    "smear": smeared,
    "white": lambda: np.full((100, 120, 3), 255, np.uint8),
    "grey": lambda: np.full((100, 120, 3), 128, np.uint8),
    "black": lambda: np.zeros((100, 120, 3), np.uint8),
    "dark noise": lambda: np.random.default_rng(0).poisson(4, (200, 200, 3)).astype(np.uint8),
}


@pytest.mark.parametrize("name", EMPTY)
def test_no_tissue_where_there_is_none(name: str) -> None:
    tissue = detect(EMPTY[name]())
    assert tissue.polygons == ()
    assert tissue.areas_mm2 == ()
    assert not tissue.mask.any()
    assert set(tissue.flags) - {"dark-field"} == {"no-tissue"}


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (5, 3), (1, 300), (300, 1)])
@pytest.mark.parametrize("um", [1.0, 8.0, 60.0])
def test_tiny_slides(shape: tuple[int, int], um: float) -> None:
    rng = np.random.default_rng(0)
    for picture in (rng.integers(0, 256, (*shape, 3)), np.full((*shape, 3), 255), np.full((*shape, 3), 7)):
        tissue = detect(picture.astype(np.uint8), um)
        assert tissue.mask.shape == shape


# -- flags ----------------------------------------------------------------------------------------------------------


def test_little_tissue() -> None:
    rgb, _ = plain()
    tissue = detect(rgb)
    assert sum(tissue.areas_mm2) > 1
    assert tissue.flags == ()
    assert detect(rgb, config=TissueConfig(little_mm2=50)).flags == ("little-tissue",)
    assert detect(rgb, UM / 3).flags == ("little-tissue",)


def test_small_regions_and_holes_go_by_area() -> None:
    rgb, _ = plain()
    whole = sum(detect(rgb).areas_mm2)
    assert detect(rgb, config=TissueConfig(min_region_mm2=50)).flags == ("no-tissue",)
    without_holes = detect(rgb, config=TissueConfig(min_hole_mm2=10))
    assert all(len(p.interiors) == 0 for p in without_holes.polygons)
    assert sum(without_holes.areas_mm2) >= whole


def test_ycbcr_shown_as_rgb_has_odd_colours() -> None:
    rgb, truth = plain()
    coded = np.ascontiguousarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])
    tissue = detect(coded)
    assert tissue.flags == ("odd-colours",)
    assert dice(tissue.mask, truth) >= 0.95


def test_a_stain_of_another_colour_is_odd_but_no_pen() -> None:
    rgb, truth = plain()
    blue_green = np.ascontiguousarray(rgb[..., [1, 0, 2]])
    tissue = detect(blue_green)
    assert "odd-colours" in tissue.flags
    assert "pen" not in tissue.flags
    assert dice(tissue.mask, truth) >= 0.93


@cache
def fine_slide() -> Picture:
    """A drawn slide of 1,400 x 1,400 px at 0.5 um/px."""
    return DrawnSlide(SynthSpec(width_px=1400, height_px=1400, mpp=0.5, seed=2, pen=False)).read(0, 0, 1400, 1400)


@pytest.mark.parametrize(("sigma_um", "blurred"), [(0.0, False), (0.4, False), (2.5, True), (6.0, True)])
def test_blur_is_told_from_full_resolution(sigma_um: float, blurred: bool) -> None:
    rgb = cv2.GaussianBlur(fine_slide(), (0, 0), sigma_um / 0.5) if sigma_um else fine_slide()
    assert ("blur" in find_tissue(ArraySlide(rgb, mpp=0.5, slide_id="a"), CONFIG).flags) == blurred


@pytest.mark.parametrize("sigma_px", [0.0, 1.0, 2.5])
def test_blur_is_that_of_scikit_image(sigma_px: float) -> None:
    grey = np.random.default_rng(3).integers(0, 256, (96, 130), dtype=np.uint8)
    grey[:, ::7] = 20  # more edges across one direction than across the other
    grey = cv2.GaussianBlur(grey, (0, 0), sigma_px) if sigma_px else grey
    rgb = np.stack([grey, np.maximum(grey, 90), np.full_like(grey, 255)], axis=-1)
    assert measure_blur(rgb, 0.5) == pytest.approx(blur_effect(grey), abs=1e-5)


def test_edges_in_one_direction_alone_have_a_blur() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::8] = 255
    with np.errstate(invalid="raise"):
        assert measure_blur(stripes, 0.5) == blur_effect(stripes[:, :, 0]) == 1


def test_blur_is_not_claimed_where_it_cannot_be_told() -> None:
    rgb = cv2.GaussianBlur(plain()[0], (0, 0), 1.5)
    assert "blur" not in find_tissue(ArraySlide(rgb, mpp=8.0, slide_id="a"), CONFIG).flags


# -- the slide ------------------------------------------------------------------------------------------------------


def test_find_tissue_covers_level_0_whatever_its_size() -> None:
    rgb = fine_slide()[:1290, :1370]
    tissue = find_tissue(ArraySlide(rgb, mpp=(0.5, 0.5), slide_id="a"), CONFIG)
    height, width = tissue.mask.shape
    assert tissue.mpp == pytest.approx((1370 * 0.5 / width, 1290 * 0.5 / height))
    assert sum(p.area for p in tissue.polygons) == pytest.approx(tissue.mask.mean() * 1370 * 1290)
    assert all(box(0, 0, 1370, 1290).covers(p) for p in tissue.polygons)


def test_the_same_slide_gives_the_same_tissue_on_any_number_of_threads() -> None:
    rgb = lit_unevenly(drawn(1000, 800, 4)[0], 0.9)
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        alone = detect(rgb)
        cv2.setNumThreads(4)
        together = detect(rgb)
    finally:
        cv2.setNumThreads(threads)
    np.testing.assert_array_equal(alone.mask, together.mask)
    assert alone.polygons == together.polygons


def test_no_resolution_is_an_error_that_names_the_fix() -> None:
    with pytest.raises(MissingResolutionError, match="slide.mpp"):
        find_tissue(ArraySlide(plain()[0], mpp=None, slide_id="a"), CONFIG)


# -- given masks ----------------------------------------------------------------------------------------------------


def info_of(width: int, height: int, bounds: BoxL0 | None = None) -> SlideInfo:
    return SlideInfo(
        slide_id="s1",
        path=Path("s1.tif"),
        reader="array",
        vendor="array",
        dims_l0=(width, height),
        levels=(Level(width, height, 1.0, 1.0),),
        size_bytes=0,
        fingerprint="",
        mpp=(0.5, 0.25),
        bounds_l0=bounds,
    )


def write_geojson(path: Path, *features: tuple[object, dict[str, object]]) -> Path:
    listed = [{"type": "Feature", "geometry": mapping(shape), "properties": options} for shape, options in features]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": listed}))
    return path


def annotation(name: str | None = None) -> dict[str, object]:
    return {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})


def test_given_geojson(tmp_path: Path) -> None:
    shape = Polygon(box(1000, 800, 9000, 7000).exterior, [box(3000, 2000, 5000, 4000).exterior])
    path = write_geojson(tmp_path / "a.geojson", (shape, annotation()), (box(8500, 800, 9500, 7000), annotation()))
    tissue = given_tissue(path, info_of(10_000, 8_000), CONFIG)
    assert tissue.method == "given"
    (polygon,) = tissue.polygons
    assert polygon.equals(shape.union(box(8500, 800, 9500, 7000)))
    assert tissue.areas_mm2 == pytest.approx((polygon.area * 0.5 * 0.25 / 1e6,))
    assert tissue.mask.shape == (250, 625)
    assert tissue.mask.mean() == pytest.approx(polygon.area / 80e6, abs=0.01)
    assert tissue.flags == ()


def test_given_geojson_is_in_the_frame_that_qupath_crops_to(tmp_path: Path) -> None:
    path = write_geojson(tmp_path / "a.geojson", (box(0, 0, 200, 100), annotation()))
    tissue = given_tissue(path, info_of(1000, 800, BoxL0(300, 50, 600, 700)), CONFIG)
    assert tissue.polygons[0].equals(box(300, 50, 500, 150))


def test_given_geojson_takes_what_is_called_tissue(tmp_path: Path) -> None:
    path = write_geojson(
        tmp_path / "a.geojson",
        (box(0, 0, 500, 500), annotation("Tissue")),
        (box(600, 0, 900, 100), annotation("Tumor")),
        (box(0, 600, 100, 700), annotation("Ignore*")),
        (box(700, 700, 710, 710), {"objectType": "detection"}),
    )
    assert [p.area for p in given_tissue(path, info_of(1000, 800), CONFIG).polygons] == [250_000]
    path = write_geojson(
        tmp_path / "b.geojson", (box(0, 0, 500, 500), annotation()), (box(600, 0, 900, 100), annotation("Ignore*"))
    )
    assert [p.area for p in given_tissue(path, info_of(1000, 800), CONFIG).polygons] == [250_000]


@pytest.mark.parametrize(
    ("shape", "says"), [(shapely.Point(3, 4), "areas, not points"), (box(2000, 0, 2100, 50), "outside")]
)
def test_given_geojson_that_cannot_be_tissue(tmp_path: Path, shape: object, says: str) -> None:
    path = write_geojson(tmp_path / "a.geojson", (shape, annotation()))
    with pytest.raises(UsageError, match=says):
        given_tissue(path, info_of(1000, 800), CONFIG)


@pytest.mark.parametrize("name", ["m.png", "m.tif", "palette.png", "grey-rgb.png", "alpha.png", "bit.png", "wide.tif"])
def test_given_label_images(tmp_path: Path, name: str) -> None:
    mask = np.zeros((160, 200), np.uint8)
    mask[40:80, 50:150] = 255
    path = tmp_path / name
    if name == "m.tif":
        tifffile.imwrite(path, mask)
    elif name == "wide.tif":
        tifffile.imwrite(path, mask.astype(np.uint16) * 9)
    elif name == "palette.png":
        picture = Image.fromarray(mask // 255, mode=None).convert("P")
        picture.putpalette([10, 200, 30, 90, 20, 250])
        picture.save(path)
    elif name == "grey-rgb.png":
        Image.fromarray(np.dstack([mask] * 3)).save(path)
    elif name == "alpha.png":
        Image.fromarray(np.dstack([mask, np.full_like(mask, 255)])).save(path)
    elif name == "bit.png":
        Image.fromarray(mask > 0).save(path)
    else:
        Image.fromarray(mask).save(path)
    tissue = given_tissue(path, info_of(2000, 1600), CONFIG)
    assert tissue.mask.shape == (50, 125)
    (polygon,) = tissue.polygons
    # The mask is reduced to about 8 um a pixel, so an edge may move by half of one.
    assert polygon.symmetric_difference(box(500, 400, 1500, 800)).area < 20 * polygon.length


def test_a_coarse_label_image_keeps_its_own_pixels(tmp_path: Path) -> None:
    Image.fromarray(np.eye(4, 5, dtype=np.uint8) * 3).save(tmp_path / "s1_mask.png")
    config = TissueConfig(mask=str(tmp_path / "{slide_id}_mask.png"))
    slide = ArraySlide(np.full((800, 1000, 3), 255, np.uint8), mpp=0.5, slide_id="s1")
    tissue = find_tissue(slide, config)
    np.testing.assert_array_equal(tissue.mask, np.eye(4, 5))
    assert [p.area for p in tissue.polygons] == [40_000] * 4


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: Image.fromarray(np.ones((80, 80), np.uint8)).save(p), "another shape"),
        (lambda p: Image.fromarray(plain()[0][:160, :200]).save(p), "colour picture"),
        (lambda p: p.write_bytes(b"\x89PNG broken"), "can't be read"),
        (lambda p: None, "no such file"),
    ],
)
def test_label_images_that_do_not_fit(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    path = tmp_path / "m.png"
    make(path)
    with pytest.raises(UsageError, match=says):
        given_tissue(path, info_of(1000, 800), CONFIG)


def test_an_empty_label_image_is_no_tissue(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((80, 100), np.uint8)).save(tmp_path / "m.png")
    assert given_tissue(tmp_path / "m.png", info_of(1000, 800), CONFIG).flags == ("no-tissue",)


# -- real slides ----------------------------------------------------------------------------------------------------


def find_on(name: str) -> tuple[Tissue, SlideInfo]:
    slide = open_slide(SLIDES / name)
    try:
        return find_tissue(slide, CONFIG), slide.info
    finally:
        slide.close()


@pytest.mark.shared_data
def test_frozen_section_agrees_with_its_mask() -> None:
    tissue, info = find_on("tiff/TCGA-V5-A7RE-11A-01-TS1.pyramid.tif")
    truth = cv2.imread(str(SLIDES / "tiff/TCGA-V5-A7RE-11A-01-TS1.tissue-mask-ds4.png"), cv2.IMREAD_GRAYSCALE) > 0
    scale = (info.dims_l0[0] / truth.shape[1], info.dims_l0[1] / truth.shape[0])
    found = rasterise(tissue.polygons, truth.shape[1], truth.shape[0], scale)
    assert dice(found, truth) >= 0.97
    assert tissue.flags == ()


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "low", "high", "flags"),
    [
        ("aperio/CMU-1-Small-Region.svs", 0.35, 0.42, {"little-tissue"}),
        ("dicom/cmu-1-small-region", 0.33, 0.42, {"little-tissue", "odd-colours"}),
        ("dicom/camelyon16-lowres-jpeg2000.dcm", 0.30, 0.42, {"pen"}),
        ("hamamatsu/test3-DAPI.ndpi", 0.75, 0.92, {"dark-field", "little-tissue"}),
        ("ome-tiff/OS-1-detail.ome.tif", 0.99, 1.0, {"little-tissue"}),
        ("ome-tiff/OS-2-ndpi-ki67.ome.tif", 0.80, 0.95, {"little-tissue"}),
    ],
)
def test_real_slides(name: str, low: float, high: float, flags: set[str]) -> None:
    tissue, _ = find_on(name)
    assert low <= tissue.mask.mean() <= high
    assert set(tissue.flags) == flags


@pytest.mark.shared_data
def test_cover_slip_edges_and_bubbles_are_not_tissue() -> None:
    tissue, _ = find_on("dicom/camelyon16-lowres-jpeg2000.dcm")
    assert tissue.mask[100:200, 55:70].mean() == 0  # the left edge of the cover slip
    assert tissue.mask[640:, 60:70].mean() == 0
    assert tissue.mask[:20].mean() < 0.01  # the upper edge, with ink on it
    assert tissue.mask[780:].mean() == 0  # air bubbles
    assert tissue.mask[220:330, 250:400].mean() > 0.99


def test_the_coarse_read_is_bounded() -> None:
    config = TissueConfig()
    assert overview_mpp((10_000, 8_000), (0.25, 0.5), config) == 8.0
    mpp = overview_mpp((200_000, 100_000), (0.25, 0.25), config)
    assert 200_000 * 0.25 / mpp * 100_000 * 0.25 / mpp == pytest.approx(5_000_000)
