"""The classical nucleus finder: what it finds, that it is local to the pixel, and what it must leave alone."""

import dataclasses
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from skimage.measure import label as connected
from skimage.measure import regionprops

from pathopipe.errors import UsageError
from pathopipe.segmentation.classical import ClassicalNuclei, find_nuclei
from pathopipe.segmentation.metrics import overlap, panoptic
from pathopipe.segmentation.parting import NucleusSize, _connect_diagonally, _shapes, part_nuclei, parting_reach_px
from pathopipe.segmentation.trace import Runs, find_runs, paint_runs
from pathopipe.synth import DrawnSlide, SynthSpec

NUCLEAR, STROMA, GLASS = (95, 62, 140), (226, 178, 205), (243, 242, 244)


def canvas(height: int, width: int, colour: tuple[int, int, int] = STROMA, noise: float = 2.0) -> NDArray[np.uint8]:
    grain = np.random.default_rng(5).normal(0, noise, (height, width, 3))
    return np.clip(np.asarray(colour) + grain, 0, 255).astype(np.uint8)


def blot(image: NDArray[np.uint8], x: int, y: int, axes: tuple[int, int], colour: tuple[int, int, int]) -> None:
    cv2.ellipse(image, (x, y), axes, 30, 0, 360, colour, -1, cv2.LINE_AA)


def crowd(seed: int, side: int, n: int) -> NDArray[np.uint8]:
    """A signal image of overlapping ellipses: clumps far larger than a nucleus."""
    rng = np.random.default_rng(seed)
    image = np.zeros((side, side), np.uint8)
    for _ in range(n):
        x, y = rng.integers(0, side, 2).tolist()
        axes = (int(rng.integers(4, 11)), int(rng.integers(3, 8)))
        cv2.ellipse(image, (x, y), axes, float(rng.uniform(0, 180)), 0, 360, int(rng.integers(70, 200)), -1)
    grain = rng.normal(0, 12, image.shape)
    return np.clip(cv2.GaussianBlur(image, (0, 0), 1.2) + grain, 0, 255).astype(np.uint8)


@cache
def clouds(seed: int, side: int) -> NDArray[np.uint8]:
    """Smooth noise: connected parts of every shape and size."""
    noise = np.random.default_rng(seed).normal(0, 1, (side, side))
    smooth = cv2.GaussianBlur(noise, (0, 0), 3.0)
    return np.clip(60 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)


@cache
def drawn_signal(seed: int) -> NDArray[np.uint8]:
    """The signal of drawn tissue, enlarged nuclei density by being read at 0.5 um/px."""
    slide = DrawnSlide(SynthSpec(width_px=1400, height_px=1400, mpp=0.5, seed=seed, pen=False, dust=False))
    model = ClassicalNuclei()
    edge = model.margin_px
    window = slide.read(350, 350, model.core_px + 2 * edge, model.core_px + 2 * edge)
    signal: NDArray[np.uint8] = model.maps(window[None])[0, ..., 0]
    return signal


def pixels_of(labels: NDArray[np.int32], x: int, y: int, box: tuple[int, int, int, int]) -> set[frozenset[int]]:
    """The pixel sets (whole-image addresses) of objects whose centroid lies in the box (left, top, right, bottom)."""
    rows, columns = np.nonzero(labels)
    label = labels[rows, columns]
    n = np.bincount(label)
    centre_y, centre_x = (np.bincount(label, weights=w) / np.maximum(n, 1) for w in (rows, columns))
    own = (n > 0) & (centre_x + x >= box[0]) & (centre_x + x < box[2])
    own &= (centre_y + y >= box[1]) & (centre_y + y < box[3])
    address = (rows + y) * 100_000 + columns + x
    return {frozenset(address[label == number].tolist()) for number in np.flatnonzero(own)}


# -- locality ----------------------------------------------------------------------------------------------------------


def check_crop(signal: NDArray[np.uint8], left: int, top: int, side: int, size: NucleusSize) -> int:
    """Objects in the core of a crop with its halo are those of the whole; returns how many there were."""
    halo = parting_reach_px(0.5, size)
    x, y = max(left - halo, 0), max(top - halo, 0)
    crop = np.ascontiguousarray(signal[y : top + side + halo, x : left + side + halo])
    box = (left, top, left + side, top + side)
    of_whole = pixels_of(part_nuclei(signal, 0.5, size), 0, 0, box)
    assert pixels_of(part_nuclei(crop, 0.5, size), x, y, box) == of_whole
    return len(of_whole)


@settings(max_examples=7)
@given(st.integers(0, 10_000), st.integers(0, 400), st.integers(0, 400), st.integers(20, 120))
def test_a_nucleus_in_a_crowd_is_the_same_in_every_crop(seed: int, left: int, top: int, side: int) -> None:
    check_crop(crowd(seed, 480, 1600), left, top, side, NucleusSize())


@settings(max_examples=5)
@given(st.integers(0, 3), st.integers(0, 400), st.integers(0, 400))
def test_an_object_of_noise_is_the_same_in_every_crop(seed: int, left: int, top: int) -> None:
    check_crop(clouds(seed, 480), left, top, 90, NucleusSize())


@pytest.mark.parametrize(("left", "top"), [(150, 150), (177, 233), (240, 171)])
def test_a_drawn_nucleus_is_the_same_in_every_crop(left: int, top: int) -> None:
    assert check_crop(drawn_signal(4), left, top, 120, NucleusSize()) > 1


def test_a_crowd_is_dense_enough_to_mean_something() -> None:
    signal = crowd(1, 600, 2500)
    clumps = np.bincount(connected(signal >= 48, connectivity=2).ravel())[1:]
    assert clumps.max() > 100_000  # connected over most of the image
    assert part_nuclei(signal, 0.5, NucleusSize()).max() > 300


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["0121d6759c5a", "442c4eb01856"])
def test_a_real_nucleus_is_the_same_in_every_crop(shared_data: Path, name: str) -> None:
    image = cv2.imread(str(shared_data / "nuclei" / "dsb2018" / "images" / f"{name}.png"))[..., ::-1]
    model = ClassicalNuclei()
    tiled = np.tile(image, (3, 3, 1))[: model.core_px + 128, : model.core_px + 128]
    signal = model.maps(np.ascontiguousarray(tiled)[None])[0, ..., 0]
    for left, top in ((160, 160), (201, 222), (290, 187)):
        assert check_crop(signal, left, top, 130, model.size) > 2


def test_a_longer_reach_is_not_promised_in_vain() -> None:
    """The bound is one on distances: a halo of a few pixels gives other objects."""
    signal = crowd(3, 600, 2500)
    whole = pixels_of(part_nuclei(signal, 0.5, NucleusSize()), 0, 0, (200, 200, 400, 400))
    crop = np.ascontiguousarray(signal[195:405, 195:405])
    assert pixels_of(part_nuclei(crop, 0.5, NucleusSize()), 195, 195, (200, 200, 400, 400)) != whole


def test_a_window_sees_all_it_looks_at() -> None:
    """The signal does not depend on where the lattice lies: no step between windows."""
    slide = DrawnSlide(SynthSpec(width_px=1600, height_px=1200, mpp=0.5, seed=2))
    model = ClassicalNuclei()
    side = model.core_px + 2 * model.margin_px
    one = model.maps(slide.read(200, 200, side, side)[None])[0, ..., 0]
    other = model.maps(slide.read(456, 328, side, side)[None])[0, ..., 0]
    assert one.any()
    assert np.array_equal(one[128:, 256:], other[:-128, :-256])


def test_windows_of_a_batch_do_not_meet() -> None:
    slide = DrawnSlide(SynthSpec(width_px=1600, height_px=1200, mpp=0.5, seed=2))
    model = ClassicalNuclei()
    side = model.core_px + 2 * model.margin_px
    windows = np.stack([slide.read(x, 100, side, side) for x in (0, 400, 800)])
    together = model.maps(windows)
    assert together.shape == (3, model.core_px, model.core_px, 1)
    assert together.dtype == np.uint8
    for window, found in zip(windows, together, strict=True):
        assert np.array_equal(model.maps(window[None])[0], found)


def test_the_margin_divides_the_core() -> None:
    for mpp in (0.25, 0.5):
        model = ClassicalNuclei(mpp=mpp)
        assert model.core_px % model.margin_px == 0
        assert model.halo_px == parting_reach_px(mpp, model.size)


# -- what is found -----------------------------------------------------------------------------------------------------


def test_single_nuclei_are_found_where_they_are() -> None:
    image = canvas(400, 500)
    places = [(60, 60), (200, 80), (350, 90), (90, 250), (300, 300)]
    truth = np.zeros(image.shape[:2], np.int32)
    for number, (x, y) in enumerate(places, 1):
        blot(image, x, y, (9, 6), NUCLEAR)
        cv2.ellipse(truth, (x, y), (9, 6), 30, 0, 360, number, -1)
    found = panoptic(overlap(truth, find_nuclei(image, 0.5)))
    assert (found.tp, found.fp, found.fn) == (5, 0, 0)
    assert found.sq > 0.8


def test_touching_nuclei_are_parted() -> None:
    image = canvas(200, 300)
    for x in (100, 113, 126):
        cv2.circle(image, (x, 100), 7, NUCLEAR, -1, cv2.LINE_AA)
    labels = find_nuclei(image, 0.5)
    assert sorted(labels[100, [100, 113, 126]].tolist()) == [1, 2, 3]


def test_a_brown_nucleus_is_found_like_a_blue_one() -> None:
    image = canvas(200, 300, (232, 230, 233))
    blot(image, 80, 100, (9, 6), (105, 120, 175))
    blot(image, 200, 100, (9, 6), (110, 75, 45))
    labels = find_nuclei(image, 0.5)
    assert labels.max() == 2
    assert labels[100, 80] > 0 < labels[100, 200]


def test_nuclei_shine_in_dark_field() -> None:
    image = canvas(200, 300, (0, 0, 8))
    blot(image, 80, 100, (9, 6), (0, 0, 190))
    blot(image, 200, 100, (9, 6), (0, 0, 120))
    assert find_nuclei(image, 0.5, ClassicalNuclei(dark_field=True)).max() == 2


@pytest.mark.parametrize(
    "colour", [GLASS, (255, 255, 255), (0, 0, 0), STROMA, NUCLEAR], ids=["glass", "white", "black", "stroma", "blue"]
)
def test_nothing_is_found_where_nothing_is(colour: tuple[int, int, int]) -> None:
    image = canvas(600, 700, colour, noise=3.0)
    ok, coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70])
    assert ok
    assert find_nuclei(cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1], 0.5).max() == 0


def test_red_cells_are_no_nuclei() -> None:
    image = canvas(300, 300)
    for x in range(30, 280, 25):
        for y in range(30, 280, 25):
            cv2.circle(image, (x, y), 7, (205, 45, 75), -1, cv2.LINE_AA)
    assert find_nuclei(image, 0.5).max() == 0


def test_the_rim_of_an_ink_stroke_is_no_chain_of_nuclei() -> None:
    image = canvas(400, 400)
    cv2.line(image, (-50, 60), (450, 260), (30, 40, 120), 70)
    # Mirrored at the image's edge the stroke has corners, where it is not wide enough to be known for what it is.
    assert not find_nuclei(image, 0.5)[:, 60:-60].any()


def test_size_gates_are_in_micrometres() -> None:
    image = canvas(200, 300)
    cv2.circle(image, (80, 100), 5, NUCLEAR, -1, cv2.LINE_AA)  # 20 um2
    cv2.circle(image, (200, 100), 11, NUCLEAR, -1, cv2.LINE_AA)  # 95 um2
    assert find_nuclei(image, 0.5).max() == 2
    for size, kept_x in ((NucleusSize(min_um2=40), 200), (NucleusSize(max_um2=40), 80)):
        labels = find_nuclei(image, 0.5, ClassicalNuclei(size=size))
        assert labels.max() == 1
        assert labels[100, kept_x] == 1


def test_labels_are_whole_connected_and_numbered() -> None:
    slide = DrawnSlide(SynthSpec(width_px=1200, height_px=1200, mpp=0.5, seed=3))
    labels = find_nuclei(slide.read(300, 300, 500, 500), 0.5)
    things = regionprops(labels)
    assert [t.label for t in things] == list(range(1, int(labels.max()) + 1))
    assert len(things) > 30
    for thing in things:
        area_um2 = thing.area * 0.25
        assert 10 <= area_um2 <= 400
        assert connected(thing.image, connectivity=1).max() == 1


@pytest.mark.parametrize("mpp", [0.25, 0.5])
@pytest.mark.parametrize("stain_strength", [0.4, 1.0])
def test_drawn_nuclei_are_found(mpp: float, stain_strength: float) -> None:
    side = int(400 / mpp)
    spec = SynthSpec(
        width_px=2 * side, height_px=2 * side, mpp=mpp, seed=6, stain_strength=stain_strength, pen=False, dust=False
    )
    slide = DrawnSlide(spec)
    box = (side // 2, side // 2, side // 2, side // 2)
    truth = slide.labels(*box)["nuclei"]
    found = panoptic(overlap(truth, find_nuclei(slide.read(*box), mpp)))
    assert found.tp + found.fn > 40
    assert found.f1 > 0.85
    assert found.pq > 0.7


def test_a_fine_image_gets_labels_of_its_own_size() -> None:
    image = canvas(301, 403)
    blot(image, 200, 150, (27, 18), NUCLEAR)
    labels = find_nuclei(image, 0.17)
    assert labels.shape == (301, 403)
    assert labels.max() == 1
    truth = np.zeros((301, 403), np.uint8)
    cv2.ellipse(truth, (200, 150), (27, 18), 30, 0, 360, 1, -1)
    assert ((labels > 0) & (truth > 0)).sum() / ((labels > 0) | (truth > 0)).sum() > 0.85


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (530, 5)])
def test_images_of_any_shape_are_taken(shape: tuple[int, int]) -> None:
    assert find_nuclei(canvas(*shape), 0.5).shape == shape


def test_instances_fit_the_layer() -> None:
    model = ClassicalNuclei()
    signal = crowd(7, 300, 250)
    found = model.instances(signal[..., None])
    assert set(found) == {layer.name for layer in model.layers} == {"nuclei"}
    nuclei = found["nuclei"]
    n = int(nuclei.labels.max())
    assert n > 50
    assert nuclei.class_id.shape == nuclei.class_probability.shape == (n,)
    assert nuclei.labels.dtype == np.int32
    assert not nuclei.class_id.any()
    assert np.isnan(nuclei.class_probability).all()


def test_empty_maps_hold_nothing() -> None:
    found = ClassicalNuclei().instances(np.zeros((64, 64, 1), np.uint8))["nuclei"]
    assert found.labels.max() == 0
    assert len(found.class_id) == 0


def test_identity_tells_what_decides() -> None:
    plain = ClassicalNuclei().identity
    others = [
        ClassicalNuclei(mpp=0.25),
        ClassicalNuclei(dark_field=True),
        ClassicalNuclei(contrast_od=0.2),
        *(
            ClassicalNuclei(size=dataclasses.replace(NucleusSize(), **{field.name: 12.0}))
            for field in dataclasses.fields(NucleusSize)
        ),
    ]
    assert all(model.identity != plain for model in others)


@pytest.mark.parametrize("arguments", [{"mpp": 1.0}, {"mpp": 0.1}, {"contrast_od": 0.0}])
def test_settings_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(arguments))):
        ClassicalNuclei(**arguments)


def test_an_image_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="uint8 RGB"):
        find_nuclei(np.zeros((20, 20), np.uint8), 0.5)
    with pytest.raises(UsageError, match="mpp"):
        find_nuclei(canvas(20, 20), float("nan"))


def runs_of(mask: NDArray[np.bool_]) -> Runs:
    return find_runs(np.pad(mask, 1).astype(np.uint8))


@given(mask=arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=14)))
def test_runs_connect_diagonally_as_pixels_do(mask: NDArray[np.bool_]) -> None:
    runs = runs_of(mask)
    n, part = _connect_diagonally(runs.start, runs.stop, mask.shape[1] + 2)
    found = paint_runs(runs, part + 1, mask.shape)
    expected, n_expected = connected(mask, connectivity=2, return_num=True)
    assert n == n_expected
    assert (found == expected).all()  # both number in the order of first pixels


def test_shapes_of_parts_are_those_of_their_pixels() -> None:
    mask = crowd(3, 160, 60) > 90
    runs = runs_of(mask)
    n, part = _connect_diagonally(runs.start, runs.stop, 162)
    shapes = _shapes(part, n, runs.start, runs.stop - runs.start, 162)
    regions = regionprops(connected(mask, connectivity=2))
    assert len(regions) == n > 20
    for row, region in enumerate(regions):
        y, x = region.coords.T.astype(float)
        covariance = np.cov(np.stack([x, y]), bias=True) + np.eye(2) / 12
        small, large = np.linalg.eigvalsh(covariance)
        assert shapes.area_px[row] == region.area
        top, left, bottom, right = region.bbox
        assert shapes.extent_px[row] == max(bottom - top, right - left)
        assert shapes.axis_ratio[row] == pytest.approx(np.sqrt(small / large), rel=1e-6)
        assert shapes.fit[row] == pytest.approx(min(region.area / (4 * np.pi * np.sqrt(small * large)), 1), rel=1e-6)
