"""How much of a tile is nuclei: against known truth, and not taken in by ink, dust and keratin."""

import csv
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathopipe.config import TilesConfig, TissueConfig
from pathopipe.errors import StoreError, TileReadError
from pathopipe.geometry import Region
from pathopipe.records import TileGrid, Tissue
from pathopipe.slide.array import ArraySlide
from pathopipe.slide.base import Slide
from pathopipe.slide.open import open_slide
from pathopipe.slide.resolution import require_mpp
from pathopipe.store import SlideStore
from pathopipe.synth import DrawnSlide, SynthSpec
from pathopipe.tiles.cellularity import cellularity, select_cellular
from pathopipe.tiles.grid import plan_grid
from pathopipe.tissue import find_tissue

EVERYWHERE = Tissue(np.ones((1, 1), np.uint8), (8.0, 8.0), (), ())


def grid_of(slide: Slide, tissue: Tissue = EVERYWHERE, **settings: Any) -> TileGrid:
    config = TilesConfig.model_validate({"side_px": 256, "min_tissue": 0.25, **settings})
    return plan_grid(slide.info, require_mpp(slide.info), tissue, config)


def share_of(labels: np.ndarray, grid: TileGrid) -> np.ndarray:
    """True share of each tile's area that is nuclei."""
    w, h = grid.side_l0
    return np.array([(labels[y : y + h, x : x + w] > 0).sum() / (w * h) for x, y in grid.xy_l0.tolist()])


DRAWN = [
    pytest.param({"seed": 1}, id="pen, dust"),
    pytest.param({"seed": 5, "stain_strength": 0.4}, id="pale"),
    pytest.param({"seed": 3, "stain_strength": 1.6}, id="dark"),
    pytest.param({"seed": 7, "border": True}, id="border"),
    pytest.param({"seed": 2, "dark_field": True}, id="dark field"),
]


@pytest.mark.parametrize("spec", DRAWN)
def test_it_follows_the_true_share_of_nuclei(spec: dict[str, Any]) -> None:
    drawn = DrawnSlide(SynthSpec(width_px=1100, height_px=850, mpp=1.0, **spec))
    slide = ArraySlide(drawn.read(0, 0, 1100, 850), mpp=1.0, slide_id="s")
    tissue = find_tissue(slide, TissueConfig())
    grid = grid_of(slide, tissue, side_px=128, mpp=1.0)
    found = cellularity(slide, grid, dark_field="dark-field" in tissue.flags)
    labels = drawn.labels(0, 0, 1100, 850)["nuclei"]
    truth = share_of(labels, grid)
    assert found.dtype == np.float32
    assert len(grid) > 20
    assert np.corrcoef(found, truth)[0, 1] > 0.95
    chosen = select_cellular(grid, found, 0.2)
    best = np.sort(truth)[::-1][: len(chosen)].mean()
    assert share_of(labels, chosen).mean() > 0.95 * best


# ---- a slide put together by hand, one tile of each kind

EOSIN, NUCLEUS = (226, 150, 190), (92, 60, 130)


def tile_of(kind: str) -> np.ndarray:
    tile = np.full((256, 256, 3), EOSIN, np.uint8)
    random = np.random.default_rng(4)
    if kind in ("few nuclei", "many nuclei"):
        n = {"few nuclei": 4, "many nuclei": 9}[kind]
        for x in range(n):
            for y in range(n):
                cv2.circle(tile, (14 + 256 * x // n, 14 + 256 * y // n), 7, NUCLEUS, -1, cv2.LINE_AA)
    elif kind == "lymphocytes":
        for x in range(0, 256, 16):
            for y in range(0, 256, 16):
                cv2.circle(tile, (x + 8 + y // 16 % 2 * 8, y + 8), 7, NUCLEUS, -1, cv2.LINE_AA)
    elif kind == "keratin":
        tile[40:200] = (72, 32, 80)
    elif kind == "specks":
        for x, y in random.integers(0, 256, (25, 2)).tolist():
            cv2.circle(tile, (x, y), 2, (40, 40, 40), -1)
    elif kind == "glass":
        tile[:] = 242
    elif kind.startswith("ink "):
        colour = {"blue": (40, 70, 170), "green": (30, 120, 60), "red": (200, 40, 50), "black": (20, 20, 25)}[kind[4:]]
        cv2.line(tile, (-20, 60), (280, 190), colour, 90)
        tile = cv2.GaussianBlur(tile, (0, 0), 8)
    return tile


KINDS = (
    *("tissue", "few nuclei", "keratin", "ink black", "ink blue", "many nuclei"),
    *("ink green", "ink red", "specks", "glass", "lymphocytes", "tissue"),
)


def patchwork() -> np.ndarray:
    return np.concatenate(
        [np.concatenate([tile_of(kind) for kind in KINDS[row : row + 6]], axis=1) for row in (0, 6)], axis=0
    )


def test_ink_dust_and_keratin_are_no_nuclei() -> None:
    slide = ArraySlide(patchwork(), mpp=0.5, slide_id="s")
    found = dict(zip(KINDS, cellularity(slide, grid_of(slide)).tolist(), strict=True))
    area = np.pi * 7.5**2 / 256**2
    assert found["few nuclei"] == pytest.approx(16 * area, rel=0.3)
    assert found["many nuclei"] == pytest.approx(81 * area, rel=0.3)
    assert found["lymphocytes"] > found["many nuclei"]
    for kind in ("tissue", "glass", "specks", "ink black", "keratin", "ink blue", "ink green", "ink red"):
        assert found[kind] < found["few nuclei"] / 2, kind
    assert found["tissue"] == found["glass"] == 0


def test_tissue_without_nuclei_has_none() -> None:
    random = np.random.default_rng(0)
    pixels = np.clip(random.normal(EOSIN, 2, (600, 600, 3)), 0, 255).astype(np.uint8)
    slide = ArraySlide(pixels, mpp=0.5, slide_id="s")
    assert cellularity(slide, grid_of(slide)).max() < 0.01


def test_numbers_do_not_depend_on_threads() -> None:
    slide = ArraySlide(patchwork(), mpp=0.5, slide_id="s")
    grid = grid_of(slide, overlap_px=192)
    one = cellularity(slide, grid)
    np.testing.assert_array_equal(cellularity(slide, grid, threads=4), one)
    assert len(grid) > 64  # more than one batch


@pytest.mark.parametrize("mpp", [0.25, 0.4, 0.5, 1.0, 2.0])
def test_any_resolution_and_pyramid_will_do(mpp: float) -> None:
    pixels = patchwork()
    size = (round(pixels.shape[1] * 0.5 / mpp), round(pixels.shape[0] * 0.5 / mpp))
    level_0 = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if mpp > 0.5 else cv2.INTER_LINEAR)
    coarser = [cv2.resize(level_0, (size[0] // by, size[1] // by), interpolation=cv2.INTER_AREA) for by in (2, 8)]
    side = round(128 / max(mpp, 0.5))
    for levels in ((), coarser):
        slide = ArraySlide(level_0, mpp=mpp, slide_id="s", levels=levels)
        grid = grid_of(slide, side_px=side, mpp=max(mpp, 0.5))
        found = dict(zip(KINDS, cellularity(slide, grid).tolist(), strict=False))
        assert found["lymphocytes"] > found["many nuclei"] > 2 * found["few nuclei"] > 0.02


def test_pixels_that_are_not_square() -> None:
    pixels = patchwork()
    slide = ArraySlide(np.repeat(pixels, 2, axis=1), mpp=(0.25, 0.5), slide_id="s")
    whole = ArraySlide(pixels, mpp=0.5, slide_id="s")
    np.testing.assert_allclose(cellularity(slide, grid_of(slide)), cellularity(whole, grid_of(whole)), atol=1e-6)


class Watched(ArraySlide):
    """Remembers what was read; some of it can't be."""

    def __init__(self, *args: Any, bad: tuple[int, int] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.bad = bad
        self.regions: list[Region] = []

    def read(self, region: Region) -> Any:
        self.regions.append(region)
        if self.bad == (region.x_l0, region.y_l0):
            raise TileReadError("s: block 7 is corrupt")
        return super().read(region)


def test_each_place_is_read_once_from_the_level_that_is_coarse_enough() -> None:
    pixels = patchwork()
    coarser = [cv2.resize(pixels, (1536 // by, 512 // by), interpolation=cv2.INTER_AREA) for by in (2, 4, 16)]
    slide = Watched(pixels, mpp=0.5, slide_id="s", levels=coarser)
    cellularity(slide, grid_of(slide))
    assert len(slide.regions) == len(KINDS)
    assert {(one.level, one.width_px, one.height_px) for one in slide.regions} == {(2, 64, 64)}


def test_a_place_that_cannot_be_read_is_not_known_and_never_chosen() -> None:
    slide = Watched(patchwork(), mpp=0.5, slide_id="s", bad=(1024, 256))
    grid = grid_of(slide)
    found = cellularity(slide, grid)
    row = KINDS.index("lymphocytes")
    assert np.flatnonzero(np.isnan(found)).tolist() == [row]
    assert row not in [grid.xy_l0.tolist().index(place) for place in select_cellular(grid, found, 1.0).xy_l0.tolist()]
    assert len(select_cellular(grid, np.full(12, np.nan, np.float32), 0.5)) == 0


def test_memory_does_not_grow_with_the_slide() -> None:
    class Wide:
        """Pixels that are made where they are looked at."""

        dtype = np.dtype(np.uint8)

        def __init__(self, columns: int) -> None:
            self.shape = (256 * 2, 256 * columns, 3)

        def __getitem__(self, key: Any) -> np.ndarray:
            rows, columns = key if isinstance(key, tuple) else (key, slice(0, self.shape[1]))
            return np.full((rows.stop - rows.start, columns.stop - columns.start, 3), 200, np.uint8)

    peaks = []
    for columns in (80, 480):
        slide = ArraySlide(Wide(columns), mpp=0.5, slide_id="s")
        grid = grid_of(slide)
        assert len(grid) == 2 * columns
        tracemalloc.start()
        cellularity(slide, grid)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 800 * 1500


# ---- choosing


def some_grid(n: int) -> TileGrid:
    slide = ArraySlide(np.zeros((16, 16 * max(n, 1), 3), np.uint8), mpp=0.5, slide_id="s")
    grid = grid_of(slide, side_px=16)
    return replace(grid, xy_l0=grid.xy_l0[:n], tissue_fraction=grid.tissue_fraction[:n])


@given(
    values=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, float("nan")]), max_size=40),
    share=st.floats(0.01, 1),
)
def test_the_chosen_are_the_best_in_storage_order(values: list[float], share: float) -> None:
    found = np.array(values, np.float32)
    grid = some_grid(len(values))
    chosen = select_cellular(grid, found, share)
    x = chosen.xy_l0[:, 0]
    assert (np.diff(x) > 0).all()
    kept = x // 16
    known = np.flatnonzero(np.isfinite(found))
    # By hand: most nuclei first, then by row.
    wanted = sorted(known.tolist(), key=lambda row: (-found[row], row))[: int(np.ceil(share * len(values) - 1e-6))]
    assert kept.tolist() == sorted(wanted)
    assert chosen.cellularity is not None
    np.testing.assert_array_equal(chosen.cellularity, found[kept])
    assert chosen.name == f"16px-0.5um-cell{100 * share:g}"


@pytest.mark.parametrize(("n", "share", "kept"), [(0, 0.2, 0), (1, 0.2, 1), (15, 0.2, 3), (16, 0.2, 4), (7, 1.0, 7)])
def test_shares_are_rounded_up_to_whole_tiles(n: int, share: float, kept: int) -> None:
    assert len(select_cellular(some_grid(n), np.ones(n, np.float32), share)) == kept


def test_glass_is_not_counted_among_the_tiles_to_choose_from() -> None:
    grid = some_grid(10)
    grid = replace(grid, tissue_fraction=np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], np.float32))
    chosen = select_cellular(grid, np.linspace(1, 0.1, 10).astype(np.float32), 0.4)
    assert (chosen.xy_l0[:, 0] // 16).tolist() == [5, 6]


@pytest.mark.parametrize("settings", [{"edge": "drop"}, {"min_tissue": 0.0}, {"overlap_px": 128}], ids=str)
def test_no_tissue_no_tiles(settings: dict[str, Any]) -> None:
    slide = ArraySlide(patchwork(), mpp=0.5, slide_id="s")
    grid = grid_of(slide, Tissue(np.zeros((4, 4), np.uint8), (8.0, 8.0), (), ()), **settings)
    found = cellularity(slide, grid)
    assert found.shape == (len(grid),)
    assert len(select_cellular(grid, found, 0.2)) == 0


# ---- in the store


def test_numbers_are_stored_beside_the_tiles(tmp_path: Path) -> None:
    slide = ArraySlide(patchwork(), mpp=0.5, slide_id="s")
    grid = grid_of(slide)
    chosen = select_cellular(grid, cellularity(slide, grid), 0.5)
    store = SlideStore.create_or_open(tmp_path / "s.zarr", slide.info, created_by="test")
    store.write_tissue(EVERYWHERE, {})
    store.write_grid(grid, {})
    store.write_grid(chosen, {})
    again = store.read_grid("256px-0.5um-cell50")
    for name in TileGrid.__slots__:
        assert np.array_equal(getattr(again, name), getattr(chosen, name)), name
        assert type(getattr(again, name)) is type(getattr(chosen, name)), name
    assert store.read_grid("256px-0.5um").cellularity is None
    group = store.path / "tiles" / chosen.name / "cellularity"
    chunk = group / "c" / "0"
    data = bytearray(chunk.read_bytes())
    data[-8] ^= 1
    chunk.write_bytes(bytes(data))
    assert f"tiles/{chosen.name}/cellularity" in [problem.where for problem in store.problems()]
    (group / "zarr.json").unlink()
    assert f"tiles/{chosen.name}/cellularity" in [problem.where for problem in store.problems()]
    with pytest.raises(StoreError, match="cellularity is missing"):
        store.read_grid(chosen.name)


# ---- real slides


@pytest.mark.shared_data
def test_real_breast_tissue_with_outlined_nuclei(shared_data: Path) -> None:
    folder = shared_data / "nuclei" / "nucls"
    images = sorted((folder / "images").iterdir())
    pixels = [cv2.imread(str(path))[..., ::-1] for path in images]
    labels = [cv2.imread(str(next((folder / "labels").glob(f"{path.stem}*"))), -1) for path in images]
    slide = ArraySlide(np.concatenate(pixels, axis=1), mpp=0.25, slide_id="s")
    grid = grid_of(slide, mpp=0.25)
    truth = share_of(np.concatenate(labels, axis=1), grid)
    assert np.corrcoef(cellularity(slide, grid), truth)[0, 1] > 0.95


@pytest.mark.shared_data
def test_real_lilac_tissue_with_outlined_nuclei(shared_data: Path) -> None:
    folder = shared_data / "nuclei" / "dsb2018"
    with (folder / "index.csv").open() as file:
        names = [row["name"] for row in csv.DictReader(file) if row["stain_group"] == "lilac-small"]
    found = []
    for kind in ("images", "labels"):
        paths = [next((folder / kind).glob(f"{name}*")) for name in names]
        found.append([cv2.imread(str(path), 1 if kind == "images" else -1)[:256, :256] for path in paths])
    pixels, labels = (np.concatenate(parts, axis=1) for parts in found)
    slide = ArraySlide(pixels[..., ::-1], mpp=0.5, slide_id="s")
    grid = grid_of(slide)
    order = np.argsort(grid.xy_l0[:, 0])
    assert len(order) == len(names)
    assert np.corrcoef(cellularity(slide, grid), share_of(labels, grid))[0, 1] > 0.9


@pytest.mark.shared_data
def test_real_slides_by_every_road_agree(shared_data: Path) -> None:
    slide = open_slide(shared_data / "slides" / "aperio" / "CMU-1-Small-Region.svs")
    grid = grid_of(slide, find_tissue(slide, TissueConfig()))
    blocks = cellularity(slide, grid, threads=2)
    pixels = slide.read(Region(0, 0, 0, *slide.info.dims_l0))
    array = cellularity(ArraySlide(pixels, mpp=slide.info.mpp, slide_id="s"), grid)
    # Reduced decoding reads up to one shrunk pixel further left or up.
    assert np.corrcoef(blocks, array)[0, 1] > 0.99
    assert np.abs(blocks - array).max() < 0.05
    slide.close()
