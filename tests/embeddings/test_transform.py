"""Transforms by value: constants, checkerboards and impulses against PIL and plain arithmetic, for every recipe."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pathopipe.embeddings.catalog import catalog
from pathopipe.embeddings.recipe import Transform
from pathopipe.embeddings.torchvision_import import import_torchvision
from pathopipe.embeddings.transform import TileTransform, _resize_in_whole_numbers, center_crop, resized_size
from pathopipe.errors import EncoderError

CPU = torch.device("cpu")
PIL_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
RECIPES = list({row.transform: None for row in catalog().values() if row.loader != "handcrafted" and row.transform})
GREY_LEVELS = 2
"""How far from PIL's a pixel may be; see TileTransform."""

RANDOM = np.random.default_rng(0)


def name_of(recipe: Transform) -> str:
    return (
        f"{recipe.resize}-{recipe.resize_px}-{recipe.crop_px}-{recipe.filter}-{recipe.mean[0]:.2f}-{recipe.std[0]:.2f}"
    )


every_resize = pytest.mark.parametrize(
    "recipe", {(each.resize, each.resize_px, each.crop_px, each.filter): each for each in RECIPES}.values(), ids=name_of
)
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=name_of)


def checkerboard(side_px: int, cell_px: int) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[:side_px, :side_px] // cell_px
    return np.repeat(((rows + columns) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)


def impulse(side_px: int, row: int, column: int) -> NDArray[np.uint8]:
    image = np.zeros((side_px, side_px, 3), np.uint8)
    image[row, column] = (255, 128, 64)
    return image


def by_hand(image: NDArray[np.uint8], recipe: Transform) -> NDArray[np.float64]:
    """(height, width, 3) uint8 -> (3, H, W), by PIL and numpy alone."""
    height, width = image.shape[:2]
    if recipe.resize_px is not None:
        wide = tall = recipe.resize_px
        if recipe.resize == "short" and width > height:
            wide = recipe.resize_px * width // height
        elif recipe.resize == "short":
            tall = recipe.resize_px * height // width
        # Across, then down, as one call did for most of PIL's life; of late it goes down first where that is cheaper.
        across = Image.fromarray(image).resize((wide, height), PIL_FILTERS[recipe.filter])
        image = np.asarray(across.resize((wide, tall), PIL_FILTERS[recipe.filter]))
    if recipe.crop_px is not None:
        top, left = (round((side - recipe.crop_px) / 2) for side in image.shape[:2])
        image = image[top : top + recipe.crop_px, left : left + recipe.crop_px]
    return ((image / 255 - np.array(recipe.mean)) / np.array(recipe.std)).transpose(2, 0, 1)


def grey_levels(values: NDArray[np.float64], recipe: Transform) -> NDArray[np.float64]:
    """Normalised (3, H, W) -> pixels from 0 to 255."""
    mean, std = (np.array(each).reshape(3, 1, 1) for each in (recipe.mean, recipe.std))
    return (values * std + mean) * 255


def transformed(image: NDArray[np.uint8], recipe: Transform) -> NDArray[np.float64]:
    return TileTransform(recipe, CPU)(torch.from_numpy(image[None]))[0].double().numpy()


def test_the_catalogue_has_many_recipes() -> None:
    assert len(RECIPES) > 15
    assert {(recipe.resize, recipe.filter) for recipe in RECIPES} >= {
        ("short", "bicubic"),
        ("short", "bilinear"),
        ("exact", "bicubic"),
        ("exact", "bilinear"),
        ("none", "bilinear"),
    }


@every_recipe
@pytest.mark.parametrize("level", [0, 101, 255])
def test_a_constant_stays_one(recipe: Transform, level: int) -> None:
    values = transformed(np.full((256, 256, 3), level, np.uint8), recipe)
    side_px = recipe.crop_px or recipe.resize_px or 256
    assert values.shape == (3, side_px, side_px)
    for channel, mean, std in zip(values, recipe.mean, recipe.std, strict=True):
        np.testing.assert_allclose(channel, (level / 255 - mean) / std, atol=2e-5)


IMAGES = {
    "squares of 32": checkerboard(512, 32),
    "squares of 5": checkerboard(512, 5),
    "squares of 1": checkerboard(512, 1),
    "impulse": impulse(512, 255, 256),
    "noise": RANDOM.integers(0, 256, (256, 256, 3), np.uint8),
    "wide": RANDOM.integers(0, 256, (230, 317, 3), np.uint8),
    "tall": RANDOM.integers(0, 256, (400, 229, 3), np.uint8),
}


@pytest.mark.parametrize("image", IMAGES)
@every_resize
def test_pixels_are_pils(recipe: Transform, image: str) -> None:
    expected, found = by_hand(IMAGES[image], recipe), transformed(IMAGES[image], recipe)
    assert found.shape == expected.shape
    difference = np.abs(grey_levels(found, recipe) - grey_levels(expected, recipe))
    assert difference.max() < GREY_LEVELS + 0.01
    assert difference.mean() < 0.15


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_the_reference_is_one_call_of_pil_for_squares(mode: str) -> None:
    recipe = Transform(resize="exact", resize_px=224, filter=mode, mean=(0, 0, 0), std=(1, 1, 1))  # type: ignore[arg-type]
    once = np.asarray(Image.fromarray(IMAGES["noise"]).resize((224, 224), PIL_FILTERS[mode]))
    assert np.array_equal(np.round(by_hand(IMAGES["noise"], recipe).transpose(1, 2, 0) * 255), once)


@every_resize
def test_small_tiles_are_enlarged(recipe: Transform) -> None:
    image = RANDOM.integers(0, 256, (128, 128, 3), np.uint8)
    if recipe.resize == "none" and recipe.crop_px is not None:
        with pytest.raises(EncoderError, match=f"a square of {recipe.crop_px} px can't be cut from tiles of 128 x 128"):
            transformed(image, recipe)
        return
    difference = np.abs(grey_levels(transformed(image, recipe), recipe) - grey_levels(by_hand(image, recipe), recipe))
    assert difference.max() < GREY_LEVELS + 0.01


@every_resize
def test_tiles_of_the_right_size_are_not_resampled(recipe: Transform) -> None:
    side_px = recipe.resize_px or 300
    image = RANDOM.integers(0, 256, (side_px, side_px, 3), np.uint8)
    off = (side_px - (recipe.crop_px or side_px)) // 2
    pixels = image[off : side_px - off, off : side_px - off].transpose(2, 0, 1)
    assert np.abs(grey_levels(transformed(image, recipe), recipe) - pixels).max() < 1e-3


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size_px", "side_px"), [(512, 224), (256, 224), (256, 248), (512, 448), (128, 224)])
def test_what_other_devices_compute_is_as_near_to_pil(mode: str, size_px: int, side_px: int) -> None:
    for image in (RANDOM.integers(0, 256, (size_px, size_px, 3), np.uint8), checkerboard(size_px, 8)):
        expected = np.asarray(Image.fromarray(image).resize((side_px, side_px), PIL_FILTERS[mode])).astype(float)
        batch = torch.from_numpy(image[None]).permute(0, 3, 1, 2)
        found = _resize_in_whole_numbers(batch, (side_px, side_px), mode)
        assert torch.equal(found, found.round())
        difference = np.abs(found[0].permute(1, 2, 0).numpy() - expected)
        assert difference.max() <= GREY_LEVELS
        assert difference.mean() < 0.15


def test_rounding_once_would_not_do() -> None:
    # Why the resize goes in two steps: where the first overshoots, PIL clamps before the second.
    image = RANDOM.integers(0, 256, (256, 256, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)).astype(float)
    batch = torch.from_numpy(image[None]).permute(0, 3, 1, 2).float()
    once = torch.nn.functional.interpolate(batch, size=(224, 224), mode="bicubic", antialias=True).round().clamp(0, 255)
    assert np.abs(once[0].permute(1, 2, 0).numpy() - expected).max() > 10


def test_tiles_of_a_batch_do_not_mix_and_are_left_alone() -> None:
    images = torch.from_numpy(RANDOM.integers(0, 256, (3, 256, 256, 3), np.uint8))
    before = images.clone()
    transform = TileTransform(Transform(resize="short", resize_px=256, crop_px=224), CPU)
    whole = transform(images)
    assert whole.dtype == torch.float32
    assert torch.equal(images, before)
    for index in range(3):
        assert torch.equal(whole[index : index + 1], transform(images[index : index + 1]))


@pytest.mark.parametrize("height", [300, 301, 450])
@pytest.mark.parametrize("width", [224, 225, 227, 600])
def test_sizes_and_crops_are_torchvisions(height: int, width: int) -> None:
    import_torchvision()
    from torchvision.transforms import v2

    image = RANDOM.integers(0, 256, (height, width, 3), np.uint8)
    ramp = torch.arange(height * width).view(1, 1, height, width).expand(1, 3, -1, -1)
    assert torch.equal(center_crop(ramp, 224), v2.CenterCrop(224)(ramp))
    recipe = Transform(resize="short", resize_px=224, crop_px=None, filter="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    expected = np.asarray(v2.Resize(224, interpolation=v2.InterpolationMode.BILINEAR)(Image.fromarray(image)))
    assert resized_size(recipe, (height, width)) == expected.shape[:2]
    difference = transformed(image, recipe).transpose(1, 2, 0) * 255 - expected
    assert np.abs(difference).max() < GREY_LEVELS + 0.01


def test_an_impulse_by_arithmetic() -> None:
    # 512 px to 256 with a triangle of 2 + 2 old pixels: their centres lie 1/4 and 3/4 of a new pixel from its centre,
    # so the weights are 3/4 and 1/4 over their sum of 2. Column 200 is the first of its pair, row 101 the second.
    recipe = Transform(resize="exact", resize_px=256, filter="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    red = transformed(impulse(512, 101, 200), recipe)[0] * 255
    across = {99: np.floor(255 * 1 / 8 + 0.5), 100: np.floor(255 * 3 / 8 + 0.5)}
    expected = np.zeros((256, 256))
    for column, value in across.items():
        for row, weight in ((50, 3 / 8), (51, 1 / 8)):
            expected[row, column] = np.floor(value * weight + 0.5)
    np.testing.assert_allclose(red, expected, atol=1e-3)


@pytest.mark.gpu
@every_resize
def test_a_gpu_is_as_near_to_pil(recipe: Transform) -> None:
    image = torch.from_numpy(IMAGES["noise"][None])
    if recipe.crop_px is not None and recipe.resize == "none" and recipe.crop_px > image.shape[1]:
        pytest.skip("the tile is smaller than what is cut from it")
    found = TileTransform(recipe, torch.device("cuda"))(image.cuda())[0].double().cpu().numpy()
    difference = np.abs(grey_levels(found, recipe) - grey_levels(by_hand(IMAGES["noise"], recipe), recipe))
    assert difference.max() < GREY_LEVELS + 0.01
    assert difference.mean() < 0.15


def test_other_devices_are_given_floats() -> None:
    # There is no kernel for uint8 beside the CPU's, so the choice is by device; meta stands for the others.
    transform = TileTransform(Transform(), torch.device("meta"))
    assert transform(torch.empty(2, 256, 256, 3, dtype=torch.uint8, device="meta")).shape == (2, 3, 224, 224)
