"""The parts of a cohort page: reasons without places, robust scores, the map, pictures and plots."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from shapely.geometry import box

from pathopipe.records import TileGrid, Tissue
from pathopipe.report.cohort_collect import Fact, choose_encoder
from pathopipe.report.cohort_odd import ODD_FROM, find_oddities, map_slides, robust_z
from pathopipe.report.cohort_pictures import read_picture, small_picture, stain_of
from pathopipe.report.cohort_plots import COLOURS, dot_plot, group_numbers, scatter_plot
from pathopipe.report.cohort_words import group_reasons, hide_places
from pathopipe.report.thumbnail import draw_thumbnail, write_png
from pathopipe.stain import optical_density, unmix

OUT = Path("/srv/lab/results")


# ---- words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/Jane Doe/x.svs: no reader opens this file", "[path]: no reader opens this file"),
        ("Jane Doe 1970.svs: no reader opens this file", "[file]: no reader opens this file"),
        ("s1.svs: set slide.mpp (looked in openslide.mpp-x)", "s1.svs: set slide.mpp (looked in openslide.mpp-x)"),
        ("s11.svs: set slide.mpp", "[file]: set slide.mpp"),
        ("/srv/lab/results/slides/s1.zarr: no store here", "slides/s1.zarr: no store here"),
        ("delete /srv/lab/results/slides/s1.zarr/tissue and run again", "delete slides/s1.zarr/tissue and run again"),
        (r"C:\Users\doe\scan.svs: damaged", "[path]: damaged"),
        (r"\\server\share\doe.svs: damaged", "[path]: damaged"),
        ("s3://doe-bucket/Doe.svs?signature=abc: denied", "[address]: denied"),
        ("file '../doe/scan.svs' can't be found", "file '[path]' can't be found"),
        ("file '~/doe/scan' can't be found", "file '[path]' can't be found"),
        (
            "s1: embeddings/256px-0.5um/handcrafted was made from other inputs (mpp was 0.5, now 0.25)",
            "s1: embeddings/256px-0.5um/handcrafted was made from other inputs (mpp was 0.5, now 0.25)",
        ),
        ("5 % of 3 / 4 at 0.5 um/px, tile (12, 5)", "5 % of 3 / 4 at 0.5 um/px, tile (12, 5)"),
    ],
)
def test_places_and_file_names_are_hidden(text: str, shown: str) -> None:
    assert hide_places(text, folder=OUT, slide_id="s1") == shown


@given(
    before=st.sampled_from(["", "s1: ", "can't read ", "'", "(", "see: "]),
    path=st.lists(st.from_regex(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]", fullmatch=True), min_size=2, max_size=5),
    after=st.sampled_from(["", ": gone", "' is gone", ") gone", ", gone", " is gone"]),
)
def test_no_folder_survives(before: str, path: list[str], after: str) -> None:
    assert hide_places(f"{before}/{'/'.join(path)}{after}", folder=OUT, slide_id="s1") == f"{before}[path]{after}"


def test_reasons_that_differ_in_id_and_numbers_are_one() -> None:
    groups = group_reasons(
        [
            ("a1", "a1: tile (3, 4) can't be read"),
            ("a2", "a2: tile (31, 7) can't be read"),
            ("b", "b.svs: no micrometres per pixel"),
            ("a", "no file of slide a"),
        ]
    )
    assert [(group.reason, group.slide_ids) for group in groups] == [
        ("tile (3, 4) can't be read", ("a1", "a2")),
        ("no file of slide this slide", ("a",)),
        ("this slide.svs: no micrometres per pixel", ("b",)),
    ]


# ---- scores


def test_robust_z_is_scipys() -> None:
    values = np.random.default_rng(0).normal(5, 2, 101)
    expected = (values - np.median(values)) / stats.median_abs_deviation(values, scale="normal")
    assert np.allclose(robust_z(values), expected, rtol=1e-4)


def test_robust_z_by_hand() -> None:
    # Median 3, deviations 2 1 0 1 97, their median 1: the last lies 97 / 1.4826 deviations off.
    assert robust_z(np.array([1.0, 2, 3, 4, 100]))[4] == pytest.approx(97 / 1.4826)
    # More than half are equal: the mean deviation 10 / 5 takes over.
    assert robust_z(np.array([1.0, 1, 1, 1, 11]))[4] == pytest.approx(10 / (1.2533 * 2))
    assert (robust_z(np.array([7.0, 7, 7])) == 0).all()
    with_gap = robust_z(np.array([1.0, np.nan, 3]))
    assert np.isnan(with_gap[1]) and np.isfinite(with_gap[[0, 2]]).all()


def cohort(n: int = 60) -> list[Fact]:
    """Slides whose numbers are quantiles of normal distributions, so that none stands apart."""
    rng = np.random.default_rng(1)
    area, tiles, focus, haematoxylin, eosin = (
        rng.permutation(stats.norm.ppf((np.arange(n) + 0.5) / n)) for _ in range(5)
    )
    return [
        Fact(
            slide_id=f"s{row:02d}",
            tissue_mm2=50 * np.exp(0.2 * area[row]),
            tiles=int(3000 * np.exp(0.2 * tiles[row])),
            focus=0.45 + 0.01 * focus[row],
            stain=(0.2 + 0.01 * haematoxylin[row], 0.15 + 0.01 * eosin[row]),
        )
        for row in range(n)
    ]


def test_planted_outliers_are_found_with_their_reason() -> None:
    facts = cohort()
    assert find_oddities(facts, {}) == {}
    facts[3].tissue_mm2, facts[3].tiles = 0.4, 0
    facts[5].focus = 0.2
    facts[7].stain = (0.2, 0.6)
    far = {f"s{row:02d}": 1 + row / 100 for row in range(60)} | {"s09": 30.0, "s10": 0.01}  # near is not odd
    found = find_oddities(facts, far)
    assert {name: [one.measure for one in odd] for name, odd in found.items()} == {
        "s03": ["tissue_mm2", "tiles"],
        "s05": ["focus"],
        "s07": ["eosin"],
        "s09": ["distance"],
    }
    assert found["s03"][0].says.startswith("tissue area 0.4 mm², far below the middle of ")
    assert found["s03"][1].z < -ODD_FROM and found["s07"][0].z > ODD_FROM
    assert find_oddities(facts[:7], far) == {}  # too few for a middle


def test_map_tells_clusters_and_strangers_and_is_the_same_twice() -> None:
    rng = np.random.default_rng(2)
    centres = rng.normal(0, 1, (2, 64))
    vectors = {f"s{n:02d}": (centres[n % 2] + rng.normal(0, 0.2, 64)).astype(np.float32) for n in range(40)}
    vectors["odd"] = rng.normal(0, 1, 64).astype(np.float32) * 4
    plane = map_slides("net", vectors)
    assert plane is not None and plane.method == "t-SNE" and plane == map_slides("net", dict(reversed(vectors.items())))
    assert max(plane.distance, key=lambda name: plane.distance[name]) == "odd"
    xy = np.array([plane.xy[f"s{n:02d}"] for n in range(40)])
    nearest = np.argsort(((xy[:, None] - xy) ** 2).sum(axis=2), axis=1)[:, 1]
    assert (nearest % 2 == np.arange(40) % 2).all()


def test_few_slides_are_laid_out_by_components() -> None:
    vectors = {
        name: np.array(vector, np.float32) for name, vector in (("a", [0, 0, 5]), ("b", [1, 0, 5]), ("c", [3, 1, 5]))
    }
    plane = map_slides("net", vectors)
    assert plane is not None and plane.method == "PCA"
    # Two components hold all of three slides, so distances in the plane are those of the scaled features.
    scaled = np.array([[0, 0], [1, 0], [3, 1]]) / np.array([[0, 0], [1, 0], [3, 1]]).std(axis=0)
    found = np.array([plane.xy[name] for name in "abc"])
    assert np.linalg.norm(found[0] - found[2]) == pytest.approx(np.linalg.norm(scaled[0] - scaled[2]), rel=1e-5)
    assert plane.distance["b"] == pytest.approx(np.linalg.norm(scaled[[0, 2]] - scaled[1], axis=1).mean(), rel=1e-5)
    assert map_slides("net", {"a": vectors["a"], "b": vectors["b"]}) is None
    assert map_slides("net", dict.fromkeys("abcd", vectors["a"])) is None


def test_most_common_encoder_is_shown_rather_a_network() -> None:
    states = {("handcrafted", 198): 5, ("net", 384): 5, ("other", 12): 2}
    assert choose_encoder(states, None) == ("net", 384)
    assert choose_encoder(states, "handcrafted") == ("handcrafted", 198)
    assert choose_encoder({}, None) is None
    with pytest.raises(ValueError, match="no slide here has embeddings of it; did you mean 'other'"):
        choose_encoder(states, "othr")


# ---- pictures


def grid_of(side_l0: int, xy_l0: np.ndarray) -> TileGrid:
    return TileGrid(
        name="g",
        side_px=side_l0,
        mpp=0.5,
        achieved_mpp=(0.5, 0.5),
        overlap_px=0,
        side_l0=(side_l0, side_l0),
        stride_l0=(float(side_l0), float(side_l0)),
        level=0,
        read_px=(side_l0, side_l0),
        resample="none",
        xy_l0=xy_l0.astype(np.int64),
        tissue_fraction=np.ones(len(xy_l0), np.float32),
    )


@pytest.mark.parametrize("side_l0", [256, 32])  # framed, and too small for frames: tinted
def test_stain_of_a_thumbnail_is_that_of_the_tissue(side_l0: int, tmp_path: Path) -> None:
    colour = np.array([183, 96, 170], np.uint8)
    overview = np.full((800, 1000, 3), 245, np.uint8)
    overview[100:500, 200:700] = colour
    steps = np.stack(np.meshgrid(np.arange(2048, 6900, side_l0), np.arange(1024, 4700, side_l0)), axis=-1)
    tissue = Tissue(
        mask=np.ones((8, 10), np.uint8), mpp=(5, 5), polygons=(box(2000, 1000, 7000, 5000),), areas_mm2=(1.0,)
    )
    grid = grid_of(side_l0, steps.reshape(-1, 2))
    write_png(tmp_path / "t.png", draw_thumbnail(overview, (10_000, 8_000), tissue, grid))
    picture = read_picture(tmp_path / "t.png")
    assert picture is not None
    found = stain_of(picture, grid, (10_000, 8_000))
    expected = unmix(optical_density(colour[None]))[0]
    assert found == pytest.approx(expected[:2].tolist(), abs=0.01)
    assert stain_of(picture, grid_of(side_l0, np.empty((0, 2))), (10_000, 8_000)) is None


def test_small_pictures_keep_their_limit_and_show_the_outline() -> None:
    picture = np.full((600, 1200, 3), 250, np.uint8)
    ring = np.array([[1000, 500], [9000, 500], [9000, 4500], [1000, 4500], [1000, 500]], np.float64)
    data, width, height = small_picture(picture, [ring], (12_000, 6_000), side_px=240, most_bytes=20_000)
    shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert (width, height) == (240, 120) == shown.shape[1::-1] and len(data) <= 20_000
    # The upper edge runs at row 10, from column 20 to 180.
    assert shown[9:12, 25:175].mean() < 225 and shown[30:60, 40:160].mean() > 240
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)
    data, width, _ = small_picture(noise, [], (9000, 9000), side_px=320, most_bytes=4000)
    assert len(data) <= 4000 and width < 320


def test_what_is_no_picture_is_none(tmp_path: Path) -> None:
    assert read_picture(tmp_path / "none.png") is None
    (tmp_path / "bad.png").write_bytes(b"\x89PNG but no more")
    (tmp_path / "empty.png").write_bytes(b"")
    assert read_picture(tmp_path / "bad.png") is None and read_picture(tmp_path / "empty.png") is None


# ---- plots


def test_rare_groups_are_the_others() -> None:
    groups = [f"g{n}" for n in range(12) for _ in range(12 - n)] + [""]
    names, numbers = group_numbers(groups)
    assert names == [*(f"g{n}" for n in range(7)), "other"] and len(names) == len(COLOURS)
    assert numbers[0] == 0 and numbers[-1] == 7 and numbers[groups.index("g6")] == 6
    assert group_numbers(["b", "", "b", "a"]) == (["b", "a", "not stated"], [0, 2, 0, 1])


def test_dots_stand_where_their_values_are() -> None:
    values = np.array([1.0, 10, 100, np.nan, 0])
    plot = dot_plot(
        "Tissue", "mm²", values, [0, 0, 1, 1, 0], ["a", "<b>"], [False, True, False, False, False], log=True
    )
    dots = {
        int(i): (g, float(x)) for i, g, x in re.findall(r'data-i="(\d)" class="(g\d[^"]*)" cx="([\d.]+)"', plot.svg)
    }
    assert set(dots) == {0, 1, 2, 4} and dots[1][0] == "g0 odd" and dots[2][0] == "g1"
    assert dots[2][1] - dots[1][1] == pytest.approx(dots[1][1] - dots[0][1], abs=0.2)  # decades
    assert dots[4][1] <= dots[0][1]
    assert "&lt;b&gt;" in plot.svg and "<b>" not in plot.svg
    assert 'aria-label="Tissue: 4 slides, from 0 to 100, median 5.5. mm²"' in plot.svg


def test_a_scatter_has_y_upwards() -> None:
    xy = np.array([[0.0, 0], [1, 1], [np.nan, 1]])
    svg = scatter_plot("Stain", ("E", "H"), xy, [0, 0, 0], [False, False, False]).svg
    found = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert len(found) == 2 and found[1][0] > found[0][0] and found[1][1] < found[0][1]


def test_a_plot_of_a_giant_cohort_is_bounded_and_keeps_the_outliers() -> None:
    n = 20_000
    odd = np.zeros(n, bool)
    odd[[5, 19_999]] = True
    values = np.random.default_rng(0).uniform(1, 2, n)
    svg = dot_plot("Focus", "focus", values, [0] * n, [""], odd.tolist()).svg
    assert (
        svg.count("<circle") == 4000 and 'data-i="5" class="g0 odd"' in svg and 'data-i="19999" class="g0 odd"' in svg
    )
