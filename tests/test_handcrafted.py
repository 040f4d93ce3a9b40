import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

from pathopipe.embeddings.handcrafted import FEATURE_NAMES, HANDCRAFTED_VERSION, handcrafted_features
from pathopipe.embeddings.handcrafted.nuclei import NUCLEUS_NAMES, find_nuclei
from pathopipe.embeddings.handcrafted.planes import plan_scale, planes_of
from pathopipe.embeddings.handcrafted.texture import cooccurrence, haralick, local_binary_patterns
from pathopipe.errors import UsageError
from pathopipe.stain import optical_density, unmix

Tiles = NDArray[np.uint8]

STROMA, NUCLEUS, LUMEN = (226, 178, 205), (95, 62, 140), (244, 242, 244)


def measured(tile: Tiles, mpp: float | tuple[float, float] = 0.5) -> dict[str, float]:
    both = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    return dict(zip(FEATURE_NAMES, handcrafted_features(tile[None], both)[0].tolist(), strict=True))


def constant(colour: tuple[int, int, int], side_px: int = 64) -> Tiles:
    return np.full((side_px, side_px, 3), colour, np.uint8)


def draw_ellipses(rows: list[tuple[float, float, float, float, float]], mpp: float, side_um: float = 128) -> Tiles:
    """Dark ellipses (x, y, half axes in um, angle in degrees) on stroma, drawn 8 times finer and averaged."""
    fine = 8
    tile = constant(STROMA, round(side_um / mpp) * fine)
    for x, y, a, b, angle in rows:
        centre = (round(x / mpp * fine), round(y / mpp * fine))
        axes = (round(a / mpp * fine), round(b / mpp * fine))
        cv2.ellipse(tile, centre, axes, angle, 0, 360, NUCLEUS, -1)
    side = tile.shape[0] // fine
    return cv2.resize(tile, (side, side), interpolation=cv2.INTER_AREA)


def draw_tissue(seed: int, mpp: float, side_px: int) -> Tiles:
    """Nuclei of many sizes, shades and directions, lumina and grain."""
    rng = np.random.default_rng(seed)
    tile = constant(STROMA, side_px)
    tile[:, : side_px // 3] = (214, 150, 190)
    cv2.circle(tile, (side_px // 4, side_px // 3), round(9 / mpp), LUMEN, -1, cv2.LINE_AA)
    for _ in range(max(int((side_px * mpp) ** 2 * 0.005), 3)):
        centre = tuple(int(v) for v in rng.integers(0, side_px, 2))
        axes = tuple(int(v / mpp) for v in rng.uniform(2, 5, 2))
        colour = tuple(int(v) for v in np.add(NUCLEUS, rng.integers(-30, 30, 3)))
        cv2.ellipse(tile, centre, axes, float(rng.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA)
    return np.clip(tile + rng.normal(0, 5, tile.shape), 0, 255).astype(np.uint8)


# --- names ---


def test_names_are_one_a_column_and_say_what_they_are() -> None:
    assert isinstance(HANDCRAFTED_VERSION, int)
    assert 100 <= len(FEATURE_NAMES) <= 200
    assert len(set(FEATURE_NAMES)) == len(FEATURE_NAMES)
    assert all(re.fullmatch(r"[a-z][a-z0-9_.]+", name) for name in FEATURE_NAMES)
    features = handcrafted_features(np.zeros((3, 32, 48, 3), np.uint8), (0.5, 0.5))
    assert features.shape == (3, len(FEATURE_NAMES))
    assert features.dtype == np.float32


def test_the_guide_names_every_group() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "handcrafted.md").read_text(encoding="utf-8")
    assert f"{len(FEATURE_NAMES)} numbers" in guide
    missing = {name for name in FEATURE_NAMES if f"`{name.split('_')[0]}_" not in guide and f"`{name}`" not in guide}
    assert not missing


def test_no_tiles_give_no_rows() -> None:
    assert handcrafted_features(np.empty((0, 64, 64, 3), np.uint8), (0.5, 0.5)).shape == (0, len(FEATURE_NAMES))


@pytest.mark.parametrize(
    ("images", "mpp", "threads"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), (0.5, 0.5), 1),
        (np.zeros((8, 8, 3), np.uint8), (0.5, 0.5), 1),
        (np.zeros((1, 8, 8, 4), np.uint8), (0.5, 0.5), 1),
        (np.zeros((1, 0, 8, 3), np.uint8), (0.5, 0.5), 1),
        (np.zeros((1, 8, 8, 3), np.uint8), (0.5, 0.0), 1),
        (np.zeros((1, 8, 8, 3), np.uint8), (float("nan"), 0.5), 1),
        (np.zeros((1, 8, 8, 3), np.uint8), (0.5, 0.5), 0),
    ],
)
def test_wrong_use_is_refused(images: NDArray[np.generic], mpp: tuple[float, float], threads: int) -> None:
    with pytest.raises(UsageError, match=r"got"):
        handcrafted_features(images, mpp, threads=threads)  # type: ignore[arg-type]


# --- a row is its own tile's affair ---


POOL = np.stack([draw_tissue(seed, 0.5, 64) for seed in range(4)] + [constant((255, 255, 255)), constant((9, 200, 40))])
ALONE = {
    mpp: [handcrafted_features(tile[None], mpp)[0].tobytes() for tile in POOL]
    for mpp in ((0.5, 0.5), (0.25, 0.25), (0.31, 0.4))
}


@settings(max_examples=25)
@given(
    rows=st.lists(st.integers(0, len(POOL) - 1), min_size=1, max_size=9),
    threads=st.integers(1, 3),
    mpp=st.sampled_from(sorted(ALONE)),
    layout=st.sampled_from(["plain", "strided", "fortran"]),
)
def test_a_row_depends_on_its_own_tile_alone(
    rows: list[int], threads: int, mpp: tuple[float, float], layout: str
) -> None:
    batch = POOL[rows]
    if layout == "strided":
        batch = np.repeat(batch, 2, axis=2)[:, :, ::2]
    elif layout == "fortran":
        batch = np.asfortranarray(batch)
    features = handcrafted_features(batch, mpp, threads=threads)
    assert [row.tobytes() for row in features] == [ALONE[mpp][row] for row in rows]


@pytest.fixture
def opencv_threads() -> Iterator[None]:
    before = cv2.getNumThreads()
    yield
    cv2.setNumThreads(before)


@pytest.mark.usefixtures("opencv_threads")
def test_opencv_threads_change_nothing() -> None:
    # Large enough that OpenCV splits its work: components are numbered otherwise with more threads.
    tiles = np.stack([draw_tissue(seed, 0.5, 512) for seed in range(2)])
    found = set()
    for threads in (1, 2, 5):
        cv2.setNumThreads(threads)
        found.add(handcrafted_features(tiles, (0.5, 0.5)).tobytes())
        found.add(handcrafted_features(tiles, (0.5, 0.5), threads=2).tobytes())
    assert len(found) == 1


def test_the_pool_is_kept_survives_a_fork_and_needs_no_torch() -> None:
    code = """
import os, sys, threading
import numpy as np
from pathopipe.embeddings.handcrafted import handcrafted_features
tiles = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
alone = handcrafted_features(tiles, (0.5, 0.5)).tobytes()
for _ in range(3):
    assert handcrafted_features(tiles, (0.5, 0.5), threads=2).tobytes() == alone
assert sum(t.name.startswith("handcrafted") for t in threading.enumerate()) == 2
assert "torch" not in sys.modules
if hasattr(os, "fork"):
    child = os.fork()
    if child == 0:
        os._exit(0 if handcrafted_features(tiles, (0.5, 0.5), threads=2).tobytes() == alone else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})


# --- always finite ---


@settings(max_examples=40)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    kind=st.sampled_from(["white", "black", "colour", "noise", "black or white", "chequers", "one dark pixel"]),
    mpp=st.tuples(*[st.sampled_from([0.05, 0.2, 0.25, 0.4967, 0.5, 1.0, 3.0, 50.0])] * 2),
    seed=st.integers(0, 99),
)
def test_any_tile_gives_finite_bounded_numbers(
    height: int, width: int, kind: str, mpp: tuple[float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tile = np.empty((height, width, 3), np.uint8)
    if kind == "colour":
        tile[:] = rng.integers(0, 256, 3)
    elif kind == "noise":
        tile[:] = rng.integers(0, 256, tile.shape)
    elif kind == "black or white":
        tile[:] = 255 * rng.integers(0, 2, (height, width, 1))
    elif kind == "chequers":
        tile[:] = 255 * (np.indices((height, width)).sum(axis=0) % 2)[..., None]
    else:
        tile[:] = 0 if kind == "black" else 255
        if kind == "one dark pixel":
            tile[height // 2, width // 2] = (60, 20, 90)
    features = handcrafted_features(tile[None], mpp)
    assert np.isfinite(features).all()
    assert np.abs(features).max() < 1e6


def test_a_large_tile_of_noise_is_finite() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (1, 1024, 1024, 3), np.uint8)
    assert np.isfinite(handcrafted_features(noise, (0.5, 0.5))).all()


def test_more_nuclei_than_uint16_counts() -> None:
    row, column = np.indices((2860, 2860), np.int16, sparse=True)
    tile = constant(STROMA, 2860)
    tile[((row - 2) % 11 < 7) & ((column - 2) % 11 < 7)] = NUCLEUS
    found = measured(tile)
    assert np.expm1(found["nucleus_count_log"]) == pytest.approx(260**2, rel=1e-6)
    assert found["nucleus_area_um2_sd"] < 0.1


# --- tissue has no up ---


TURNS = [lambda t: t[:, ::-1], lambda t: t[::-1], lambda t: np.rot90(t), lambda t: t.transpose(1, 0, 2)]


@pytest.mark.parametrize("turn", TURNS, ids=["mirror", "upside down", "quarter turn", "transpose"])
@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_turned_tiles_have_the_same_numbers(turn, mpp: float) -> None:
    tile = draw_tissue(5, mpp, 128)
    before, after = (handcrafted_features(t[None], (mpp, mpp)) for t in (tile, turn(tile)))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-6)


# --- physical size ---


def test_the_same_tissue_at_another_resolution_has_close_numbers() -> None:
    tiles = {0.125: [draw_tissue(seed, 0.125, 512) for seed in range(12)]}
    for mpp in (0.25, 0.5):
        tiles[mpp] = [cv2.resize(t, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for t in tiles[mpp / 2]]
    # Another way of halving stands for another scanner.
    tiles[0.5] = [cv2.resize(t, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_LINEAR) for t in tiles[0.25]]
    features = {mpp: handcrafted_features(np.stack(t), (mpp, mpp)) for mpp, t in tiles.items()}
    for other in (0.125, 0.5):
        varying = features[0.25].std(axis=0) > 1e-3
        off = np.abs(features[other] - features[0.25])[:, varying] / features[0.25].std(axis=0)[varying]
        assert np.median(off.mean(axis=0)) < 0.05
        together = [
            np.corrcoef(a, b)[0, 1] for a, b in zip(features[0.25].T, features[other].T, strict=True) if a.std() > 1e-3
        ]
        assert np.median(together) > 0.99
    wrong = handcrafted_features(np.stack(tiles[0.125]), (0.5, 0.5))  # as if the resolution were not heeded
    off = np.abs(wrong - features[0.25])[:, varying] / features[0.25].std(axis=0)[varying]
    assert np.median(off.mean(axis=0)) > 0.5


@pytest.mark.parametrize("mpp", [0.4967, 0.5, 0.4903])
def test_nearly_the_working_resolution_is_not_resampled(mpp: float) -> None:
    scale = plan_scale(256, 200, (mpp, mpp))
    assert (scale.width_px, scale.height_px) == (200, 256)
    assert scale.mpp == pytest.approx((mpp, mpp))


def test_unlike_axes_are_evened_out() -> None:
    discs = draw_ellipses([(32, 32, 4, 4, 0), (96, 80, 4, 4, 0)], 0.25)
    squeezed = cv2.resize(discs, None, fx=0.5, fy=1, interpolation=cv2.INTER_AREA)
    even, uneven = measured(discs, 0.25), measured(squeezed, (0.5, 0.25))
    for name in ("nucleus_count_log", "nucleus_area_um2_mean", "nucleus_axis_ratio_mean", "nucleus_neighbour_um_mean"):
        assert uneven[name] == pytest.approx(even[name], rel=0.02)


# --- colour and stain ---


def test_numbers_of_a_constant_tile() -> None:
    colour = (180, 90, 150)
    found = measured(constant(colour))
    for name, value in zip(("red", "green", "blue"), colour, strict=True):
        for statistic in ("mean", "p05", "p50", "p95"):
            assert found[f"{name}_{statistic}"] == pytest.approx(value / 255, abs=1e-6)
        assert found[f"{name}_sd"] == 0
    assert found["saturation_mean"] == pytest.approx((180 - 90) / 180, abs=0.005)
    assert found["hue_pink_share"] == 1  # 320 degrees
    assert found["tissue_share"] == 1
    assert found["white_largest_share"] == found["white_edge_mm_per_mm2_log"] == 0
    amounts = unmix(optical_density(np.asarray(colour, np.uint8)))
    for name, amount in zip(("haematoxylin", "eosin", "dab"), amounts, strict=True):
        for statistic in ("mean", "p05", "p95"):
            assert found[f"od_{name}_{statistic}"] == pytest.approx(float(amount), abs=0.006)
        assert found[f"od_{name}_sd"] == 0
    log_ratio = np.log((amounts[0] + 0.02) / (amounts[1] + 0.02))
    assert found["od_haematoxylin_to_eosin_log"] == pytest.approx(float(log_ratio), abs=0.05)
    assert all(found[name] == 0 for name in FEATURE_NAMES if "gradient" in name or "laplacian" in name)
    assert all(found[name] == 0 for name in NUCLEUS_NAMES if name.startswith("nucleus_"))
    assert found["lbp_grey_1um_8_share"] == 1  # all neighbours as bright as the centre


def test_glass_is_no_tissue() -> None:
    found = measured(constant((250, 250, 250)))
    assert found["tissue_share"] == 0
    assert found["white_largest_share"] == found["white_lumen_share"] == 1
    assert all(found[name] == 0 for name in FEATURE_NAMES if name.startswith("od_"))


def test_percentiles_and_spread_of_two_colours() -> None:
    tile = constant((200, 120, 160))
    tile[:16] = (100, 60, 120)  # a quarter
    found = measured(tile)
    assert found["red_mean"] == pytest.approx(175 / 255, abs=1e-6)
    assert found["red_sd"] == pytest.approx(np.sqrt(0.25 * 0.75) * 100 / 255, abs=1e-6)
    assert (found["red_p05"], found["red_p50"]) == pytest.approx((100 / 255, 200 / 255))
    # Haematoxylin rises where eosin falls, and two points lie on a line.
    assert found["od_haematoxylin_eosin_correlation"] == pytest.approx(-1, abs=1e-6)


def test_white_spaces_are_counted_and_sized() -> None:
    tile = constant(STROMA, 256)
    for x, y, radius_um in ((64, 64, 20), (64, 192, 5), (192, 64, 5), (192, 192, 1)):
        cv2.circle(tile, (x, y), radius_um * 2, LUMEN, -1)
    found = measured(tile)
    area_mm2 = 0.128**2
    assert np.expm1(found["white_spaces_per_mm2_log"]) == pytest.approx(3 / area_mm2, rel=1e-3)  # the least is a speck
    assert found["white_lumen_share"] == found["white_largest_share"] > 0
    assert found["white_lumen_share"] == pytest.approx(np.pi * 20**2 / 128**2, rel=0.1)
    assert np.expm1(found["white_space_area_um2_log"]) == pytest.approx(np.pi * (20**2 + 2 * 5**2) / 3, rel=0.1)
    # The edge of a disc in pixel steps is its bounding box's: 8 radii.
    assert np.expm1(found["white_edge_mm_per_mm2_log"]) == pytest.approx(8 * 31e-3 / area_mm2, rel=0.1)


# --- texture ---


def smooth_noise(seed: int, shape: tuple[int, int], sigma: float = 1.0) -> Tiles:
    noise = np.random.default_rng(seed).integers(0, 256, shape).astype(np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), sigma), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_local_binary_patterns_are_those_of_scikit_image(seed: int) -> None:
    plane = smooth_noise(seed, (60, 83), 0.5 + seed)
    codes = local_binary_pattern(plane, 8, 1, "uniform")[1:-1, 1:-1].astype(int)
    expected = np.bincount(codes.ravel(), minlength=10) / codes.size
    # Weights of 1/256: one pixel in a thousand may fall on the other side.
    np.testing.assert_allclose(local_binary_patterns(plane), expected, atol=0.002)


@pytest.mark.parametrize("step", [1, 4])
def test_cooccurrence_and_haralick_are_those_of_scikit_image(step: int) -> None:
    levels = smooth_noise(7, (40, 55)) >> 4
    counts = graycomatrix(levels, [step], [0, np.pi / 2], levels=16, symmetric=True).sum(axis=3, keepdims=True)
    expected = (counts / counts.sum())[:, :, 0, 0]
    found = cooccurrence(levels, step)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    contrast, homogeneity, entropy, correlation = haralick(found[None])[0]
    shares = counts / counts.sum()
    assert contrast == pytest.approx(graycoprops(shares, "contrast").item())
    assert homogeneity == pytest.approx(graycoprops(shares, "homogeneity").item())
    assert correlation == pytest.approx(graycoprops(shares, "correlation").item())
    some = expected[expected > 0]
    assert entropy == pytest.approx(-(some * np.log2(some)).sum())


def stripes(angle: float) -> Tiles:
    y, x = np.indices((256, 256))
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / 20)  # 10 um apart
    return np.stack([230 + 0 * wave, 150 + 60 * wave, 200 + 10 * wave], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("angle", [0, 0.4, np.pi / 4, np.pi / 2])
def test_fibres_in_any_direction_are_coherent(angle: float) -> None:
    found = measured(stripes(angle))
    assert found["fibre_coherence_tile"] > 0.9
    assert found["fibre_coherence_8um"] > 0.9


def test_crossed_fibres_are_coherent_only_in_small() -> None:
    tile = stripes(0.0)
    tile[:, 128:] = stripes(np.pi / 2)[:, 128:]
    found = measured(tile)
    assert found["fibre_coherence_8um"] > 0.9
    assert found["fibre_coherence_tile"] < 0.1


def test_blur_is_seen() -> None:
    sharp = draw_tissue(3, 0.5, 256)
    blurred = cv2.GaussianBlur(sharp, (0, 0), 2)
    before, after = measured(sharp), measured(blurred)
    assert after["focus_log"] < 0.5 * before["focus_log"]
    assert after["texture_grey_0.5um_laplacian_log"] < 0.5 * before["texture_grey_0.5um_laplacian_log"]
    assert after["texture_grey_4um_gradient_log"] == pytest.approx(before["texture_grey_4um_gradient_log"], rel=0.1)


def test_texture_peaks_at_the_scale_of_its_grain() -> None:
    def gradients(period_um: float) -> NDArray[np.float64]:
        y, x = np.indices((256, 256)) * 0.5
        wave = np.sin(2 * np.pi * x / period_um) * np.sin(2 * np.pi * y / period_um)
        found = measured((180 + 40 * wave).astype(np.uint8)[..., None].repeat(3, axis=2))
        return np.asarray([found[f"texture_grey_{um}um_laplacian_log"] for um in ("0.5", "1", "2", "4")])

    assert int(gradients(6).argmax()) < int(gradients(24).argmax())


# --- nuclei ---


@pytest.mark.parametrize("mpp", [0.25, 0.5])
@pytest.mark.parametrize("radius_um", [3.0, 4.0, 5.0])
def test_drawn_discs_are_counted_and_measured(mpp: float, radius_um: float) -> None:
    centres = [(16 + 24 * i, 16 + 24 * j) for i in range(5) for j in range(5)]
    found = measured(draw_ellipses([(x, y, radius_um, radius_um, 0) for x, y in centres], mpp), mpp)
    area = np.pi * radius_um**2
    assert np.expm1(found["nucleus_count_log"]) == pytest.approx(25, rel=1e-4)
    assert np.expm1(found["nucleus_per_mm2_log"]) == pytest.approx(25 / 0.128**2, rel=1e-4)
    for statistic in ("mean", "p10", "p50", "p90"):
        assert found[f"nucleus_area_um2_{statistic}"] == pytest.approx(area, rel=0.1)
    assert found["nucleus_area_share"] == pytest.approx(25 * area / 128**2, rel=0.1)
    assert found["nucleus_axis_ratio_mean"] > 0.95
    assert found["nucleus_ellipse_fit_p10"] > 0.97
    assert found["nucleus_neighbour_um_mean"] == pytest.approx(24, rel=0.01)
    assert found["nucleus_neighbour_um_sd"] < 0.3
    assert found["nucleus_spacing_evenness"] == pytest.approx(2 * 24 * np.sqrt(25) / 128, rel=0.01)
    expected = unmix(optical_density(np.asarray(NUCLEUS, np.uint8)))[0]
    assert found["nucleus_haematoxylin_od_mean"] == pytest.approx(float(expected), rel=0.1)
    outside = unmix(optical_density(np.asarray(STROMA, np.uint8)))
    assert found["od_haematoxylin_outside_nuclei"] == pytest.approx(float(outside[0]), abs=0.02)
    assert found["od_eosin_outside_nuclei"] == pytest.approx(float(outside[1]), abs=0.02)


def test_long_nuclei_have_their_ratio_and_direction() -> None:
    rows = [(20 + 22 * i, 20 + 22 * j, 7.0, 2.8, 30.0) for i in range(5) for j in range(5)]
    found = measured(draw_ellipses(rows, 0.25), 0.25)
    assert np.expm1(found["nucleus_count_log"]) == pytest.approx(25, rel=1e-4)
    assert found["nucleus_axis_ratio_mean"] == pytest.approx(2.8 / 7.0, rel=0.1)
    assert found["nucleus_alignment_tile"] > 0.98
    crossed = [(x, y, a, b, 30.0 + 90 * (k % 2)) for k, (x, y, a, b, _) in enumerate(rows)]
    assert measured(draw_ellipses(crossed, 0.25), 0.25)["nucleus_alignment_tile"] < 0.1


def test_touching_nuclei_are_parted_and_long_ones_are_not() -> None:
    pairs = [(x + dx, y, 4.0, 4.0, 0.0) for x in (24, 64, 104) for y in (24, 64, 104) for dx in (-3.6, 3.6)]
    assert np.expm1(measured(draw_ellipses(pairs, 0.5))["nucleus_count_log"]) == pytest.approx(18, rel=1e-4)
    long = [(x, y, 7.2, 3.0, 20.0) for x in (24, 64, 104) for y in (24, 64, 104)]
    assert np.expm1(measured(draw_ellipses(long, 0.5))["nucleus_count_log"]) == pytest.approx(9, rel=1e-4)


def test_notched_shapes_fit_an_ellipse_less() -> None:
    round_ones = [(x, y, 5.0, 5.0, 0.0) for x in (32, 96) for y in (32, 96)]
    tile = draw_ellipses(round_ones, 0.25)
    whole = measured(tile, 0.25)["nucleus_ellipse_fit_mean"]
    for x, y, *_ in round_ones:
        cv2.rectangle(tile, (int(x / 0.25) - 5, int(y / 0.25)), (int(x / 0.25) + 5, int((y + 5) / 0.25)), STROMA, -1)
    assert measured(tile, 0.25)["nucleus_ellipse_fit_mean"] < whole - 0.05


def test_brown_nuclei_are_found_and_told_apart() -> None:
    rows = [(x, y, 4.0, 4.0, 0.0) for x in (24, 64, 104) for y in (24, 64, 104)]
    blue = draw_ellipses(rows, 0.5)
    brown = blue.copy()
    brown[(blue < 130).any(axis=-1)] = (120, 75, 45)
    first, second = measured(blue), measured(brown)
    assert first["nucleus_count_log"] == second["nucleus_count_log"] == pytest.approx(np.log(10))
    assert second["nucleus_dab_od_mean"] > first["nucleus_dab_od_mean"] + 0.3


def test_five_neighbours_need_six_nuclei() -> None:
    one, two = (measured(draw_ellipses([(32.0 + 20 * k, 64, 4, 4, 0) for k in range(n)], 0.5)) for n in (1, 2))
    assert (one["nucleus_neighbour_um_mean"], one["nucleus_fifth_neighbour_um"]) == (0, 0)
    assert two["nucleus_neighbour_um_mean"] == pytest.approx(20, rel=0.01)
    assert two["nucleus_fifth_neighbour_um"] == 0


@pytest.mark.shared_data
def test_counts_follow_the_truth_on_real_tissue(shared_data: Path) -> None:
    folder = shared_data / "nuclei" / "nucls"
    found, truth = [], []
    for path in sorted((folder / "images").glob("*.png")):
        tile = cv2.imread(str(path))[..., ::-1]
        labels = find_nuclei(planes_of(tile, plan_scale(*tile.shape[:2], (0.25, 0.25))))
        found.append(len(np.unique(labels)) - 1)
        truth.append(len(np.unique(cv2.imread(str(folder / "labels" / path.name), cv2.IMREAD_UNCHANGED))) - 1)
    assert len(truth) == 8
    assert np.corrcoef(found, truth)[0, 1] > 0.9
    assert sum(found) == pytest.approx(sum(truth), rel=0.25)
