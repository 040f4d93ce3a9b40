"""Plots and pictures: which are drawn, that they are the same every time, and that what they show can be read back."""

import re
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from matplotlib.figure import Figure as Canvas

from pathopipe.mil.cases import Cases, Kind, gather_cases
from pathopipe.mil.evaluate import figures_of
from pathopipe.mil.heatmap import Raster, TileMap
from pathopipe.report.mil_pictures import (
    MapCaption,
    background_from_mask,
    read_picture,
    write_contact_sheet,
    write_heatmap,
    write_ome_tiff,
    write_rgb_tiff,
)
from pathopipe.report.mil_plots import (
    draw_calibration,
    draw_confusion,
    draw_precision_recall,
    draw_roc,
    draw_survival,
    write_plots,
)


def cases_of(kind: Kind, n: int = 60, classes: int = 3) -> Cases:
    rng = np.random.default_rng(0)
    ids = [f"p{number}" for number in range(n)]
    sites = ["north", "south"] * (n // 2)
    if kind == "binary":
        truth = rng.integers(0, 2, n)
        score = 1 / (1 + np.exp(-(rng.normal(size=n) + truth)))
        return gather_cases(kind, truth, score, ids, sites, ["normal", "tumour"])
    if kind in ("multiclass", "ordinal"):
        truth = rng.integers(0, classes, n)
        logits = rng.normal(size=(n, classes)) + np.eye(classes)[truth]
        score = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return gather_cases(kind, truth, score, ids, sites, [f"class {c}" for c in range(classes)])
    if kind == "multilabel":
        return gather_cases(kind, rng.integers(0, 2, (n, 2)), rng.random((n, 2)), ids, sites, ["er", "pr"])
    if kind == "regression":
        return gather_cases(kind, rng.normal(size=n), rng.normal(size=n), ids, sites)
    times = np.stack([rng.exponential(10, n), rng.random(n) < 0.7], axis=1)
    return gather_cases(kind, times, rng.normal(size=n), ids, sites)


def texts(canvas: Canvas) -> str:
    """Everything that is written on a figure."""
    found = [text.get_text() for text in canvas.findobj(lambda one: hasattr(one, "get_text"))]  # type: ignore[attr-defined]
    return " | ".join(found)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("binary", {"roc", "precision-recall", "calibration", "confusion", "sites"}),
        ("multiclass", {"roc", "precision-recall", "calibration", "confusion", "sites"}),
        ("multilabel", {"roc", "precision-recall", "sites"}),
        ("ordinal", {"confusion", "sites"}),
        ("regression", {"prediction", "sites"}),
        ("survival_cox", {"survival", "sites"}),
    ],
)
def test_what_fits_the_target_is_drawn(tmp_path: Path, kind: Kind, names: set[str]) -> None:
    cases = cases_of(kind)
    written = write_plots(tmp_path, figures_of(cases, draws=50), cases)
    assert {path.stem for path in written} == names
    for path in written:
        picture = read_picture(path)
        assert picture is not None
        # Drawn, not blank, and nothing reaches the edge.
        assert picture.std() > 5
        assert (picture[:2] == 255).all()
        assert (picture[-2:] == 255).all()


def test_plots_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    cases = cases_of("binary")
    table = figures_of(cases, draws=50)
    first = write_plots(tmp_path / "a", table, cases, svg=True)
    again = write_plots(tmp_path / "b", table, cases, svg=True)
    assert len(first) == 10
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    svg = (tmp_path / "a" / "roc.svg").read_text()
    assert not re.search(r"\d{4}-\d{2}-\d{2}T", svg)


def test_legends_say_what_the_figures_say() -> None:
    cases = cases_of("binary")
    table = figures_of(cases, draws=50)
    n = int(cases.truth.sum())
    for draw, name in ((draw_roc, "auroc"), (draw_precision_recall, "auprc"), (draw_calibration, "ece")):
        written = texts(draw(table, cases))
        assert table.find(name).text() in written
        assert f"n = 60 patients, {n} tumour" in written
    assert "at 0.5" in texts(draw_confusion(table, cases))


def test_confusion_shows_all_rows() -> None:
    cases = cases_of("multiclass")
    shown = texts(draw_confusion(figures_of(cases, draws=0), cases))
    counts = [int(count) for count in re.findall(r"(\d+)\n\d+%", shown)]
    assert len(counts) == 9
    assert sum(counts) == 60


def test_many_classes_keep_the_most_frequent() -> None:
    cases = cases_of("multiclass", n=200, classes=12)
    shown = texts(draw_roc(figures_of(cases, draws=0), cases))
    assert "the 8 most frequent of 12 classes" in shown


def test_survival_curve_by_hand() -> None:
    # Low risk: events at 2 and 6, censored at 4. Of three at risk one goes at 2, of one at risk one at 6.
    cases = gather_cases(
        "survival_cox",
        [[2, 1], [4, 0], [6, 1], [1, 1], [1, 1], [1, 1]],
        [0.1, 0.1, 0.1, 0.9, 0.9, 0.9],
        [f"p{number}" for number in range(6)],
    )
    lines = draw_survival(figures_of(cases, draws=0), cases).axes[0].get_lines()
    assert np.asarray(lines[0].get_xdata()).tolist() == [0, 2, 6, 6]
    assert np.asarray(lines[0].get_ydata()) == pytest.approx([1, 2 / 3, 0, 0])
    assert np.asarray(lines[1].get_xdata()).tolist() == [4]
    assert np.asarray(lines[1].get_ydata()) == pytest.approx([2 / 3])


def test_an_absent_class_leaves_its_plots_out(tmp_path: Path) -> None:
    cases = gather_cases("binary", [1, 1, 1], [0.2, 0.8, 0.9], ["a", "b", "c"])
    written = write_plots(tmp_path, figures_of(cases), cases)
    assert {path.stem for path in written} == {"calibration", "confusion"}


# ---- pictures


def raster_of(rows: int = 20, columns: int = 30) -> Raster:
    values = np.random.default_rng(0).random((rows, columns)).astype(np.float32)
    values[:5] = np.nan
    return Raster(values, (512.0, 512.0))


@pytest.mark.parametrize("kind", ["attention", "contribution"])
@pytest.mark.parametrize("dims_l0", [(15_360, 10_240), (40_000, 10_240), (5_000, 30_000)])
def test_a_heatmap_colours_tiles_and_nothing_else(tmp_path: Path, kind: str, dims_l0: tuple[int, int]) -> None:
    path = tmp_path / "map.png"
    white = np.full((100, 150, 3), 255, np.uint8)
    caption = MapCaption(title="slide", scale="attention percentile", lines=("tumour 0.91",))
    write_heatmap(path, white, raster_of(), kind, dims_l0, (0.25, 0.25), caption)
    picture = read_picture(path)
    assert picture is not None
    coloured = (picture.max(axis=2).astype(int) - picture.min(axis=2)) > 20
    assert coloured.mean() > 0.02
    first = path.read_bytes()
    write_heatmap(path, white, raster_of(), kind, dims_l0, (0.25, 0.25), caption)
    assert path.read_bytes() == first


def test_the_map_lies_where_the_tiles_are(tmp_path: Path) -> None:
    """One hot tile of four by four: its colour is in its quarter of the right panel and nowhere else."""
    values = np.full((4, 4), np.nan, np.float32)
    values[3, 0] = 1.0
    path = tmp_path / "map.png"
    grey = np.full((64, 64, 3), 128, np.uint8)
    write_heatmap(
        path, grey, Raster(values, (100, 100)), "attention", (400, 400), None, MapCaption(title="t", scale="s")
    )
    picture = read_picture(path)
    assert picture is not None
    panels = (np.abs(picture.astype(int) - 128) <= 2).all(axis=2)
    columns = np.flatnonzero(panels.sum(axis=0) > 100)
    gap = np.flatnonzero(np.diff(columns) > 5)[0]
    left, right = columns[gap + 1], columns[-1]
    rows = np.flatnonzero(panels[:, right - 5])
    top, bottom = rows[0], rows[-1]
    panel = picture[top : bottom + 1, left : right + 1]
    side = panel.shape[0] // 4
    quarter = np.array([[panel[r * side + side // 2, c * side + side // 2] for c in range(4)] for r in range(4)], int)
    hot = np.abs(quarter - 128).max(axis=2) > 20
    assert np.argwhere(hot).tolist() == [[3, 0]]


def test_background_and_missing_pictures(tmp_path: Path) -> None:
    assert read_picture(tmp_path / "none.png") is None
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    assert read_picture(tmp_path / "broken.png") is None
    background = background_from_mask(np.array([[0, 1]], np.uint8))
    assert background[0, 0].tolist() == [255, 255, 255]
    assert background[0, 1].tolist() != [255, 255, 255]


def test_contact_sheet(tmp_path: Path) -> None:
    tiles = [(np.full((64, 64, 3), (250, 0, 0), np.uint8), f"{number}") for number in range(3)]
    path = tmp_path / "sheet.png"
    write_contact_sheet(path, [("highest", tiles), ("lowest", tiles[:1])], "slide")
    picture = read_picture(path)
    assert picture is not None
    red = (picture == [250, 0, 0]).all(axis=2)
    assert red[: len(red) // 2].sum() == pytest.approx(3 * red[len(red) // 2 :].sum(), rel=0.05)


def test_rasters_read_back_with_their_size_and_names(tmp_path: Path) -> None:
    path = tmp_path / "maps.ome.tiff"
    maps = [
        TileMap(name="Attention", kind="attention", label="", values=np.zeros(1, np.float32)),
        TileMap(name="Contribution: tumour", kind="contribution", label="tumour", values=np.zeros(1, np.float32)),
    ]
    raster = raster_of(300, 200)
    other = Raster(raster.values - 0.5, raster.cell_l0)
    write_ome_tiff(path, "slide", maps, [raster, other], (0.25, 0.5))
    with tifffile.TiffFile(path) as file:
        assert file.is_ome
        series = file.series[0]
        assert series.axes == "CYX"
        assert [level.shape for level in series.levels] == [(2, 300, 200), (2, 150, 100), (2, 75, 50), (2, 38, 25)]
        assert all(level.keyframe.is_tiled for level in series.levels)
        assert np.array_equal(series.asarray()[0], np.nan_to_num(raster.values, nan=0))
        assert np.array_equal(series.asarray()[1], np.nan_to_num(other.values, nan=0))
        about = file.ome_metadata or ""
    assert 'PhysicalSizeX="128.0"' in about
    assert 'PhysicalSizeY="256.0"' in about
    assert 'PhysicalSizeXUnit="µm"' in about
    assert 'Name="Contribution: tumour"' in about
    first = path.read_bytes()
    write_ome_tiff(path, "slide", maps, [raster, other], (0.25, 0.5))
    assert path.read_bytes() == first


@pytest.mark.parametrize("kind", ["attention", "contribution"])
def test_coloured_rasters_open_as_slides(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "map.ome.tiff"
    values = np.full((40, 30), np.nan, np.float32)
    values[10, 20], values[11, 20] = 1.0, 0.0
    write_rgb_tiff(path, "slide", Raster(values, (512.0, 512.0)), kind, (0.25, 0.25))
    with openslide.OpenSlide(str(path)) as slide:
        assert slide.dimensions == (30 * 16, 40 * 16)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(8)
        pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    assert (pixels[160:176, 320:336] == pixels[160, 320]).all()
    assert pixels[160, 320].tolist() != pixels[176, 320].tolist()
    # Only the two tiles are coloured; zero contribution is nearly white.
    coloured = (pixels != 255).any(axis=2)
    assert coloured.sum() == 2 * 16 * 16
    with tifffile.TiffFile(path) as file:
        shapes = [level.shape for level in file.series[0].levels]
        assert shapes == [(640, 480, 3), (320, 240, 3), (160, 120, 3), (80, 60, 3), (40, 30, 3)]
        assert 'PhysicalSizeX="8.0"' in (file.ome_metadata or "")
