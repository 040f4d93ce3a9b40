"""From uint8 tiles to a network's input: resized as PIL does, cut from the middle, scaled and normalised."""

import torch
from torch import Tensor
from torch.nn import functional

from pathopipe.embeddings.recipe import Transform
from pathopipe.errors import EncoderError

__all__ = ["TileTransform", "center_crop", "resize_like_pil", "resized_size"]


class TileTransform:
    """The transform of a recipe on a device.

    Pixels are resized in whole numbers, as PIL does it and as the encoders were trained: across, rounded and clamped,
    then down, rounded and clamped. The result is within 2 of 255 grey levels of PIL's everywhere; rounding only once
    at the end would be off by 20 and more where a bicubic filter overshoots. (PIL 13 goes down first where a tall
    picture is squeezed to a square; tiles are squares.)
    """

    def __init__(self, transform: Transform, device: torch.device) -> None:
        self._recipe = transform
        self._mean = torch.tensor(transform.mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(transform.std, device=device).view(1, 3, 1, 1) * 255

    def __call__(self, images: Tensor) -> Tensor:
        """(n, height, width, 3) uint8 on the device -> (n, 3, H, W) float32, normalised.

        Raises:
            EncoderError: The tiles are smaller than the square to be cut from them.
        """
        recipe = self._recipe
        batch = images.permute(0, 3, 1, 2)
        size = resized_size(recipe, (batch.shape[2], batch.shape[3]))
        if batch.shape[2:] != size:
            batch = resize_like_pil(batch, size, recipe.filter)
        if recipe.crop_px is not None:
            batch = center_crop(batch, recipe.crop_px)
        return (batch.float() - self._mean) / self._std


def resized_size(recipe: Transform, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) before -> after the resize of a recipe.

    ``short`` is torchvision's rule: the longer side is scaled alike and cut down to a whole number.
    """
    if recipe.resize_px is None:
        return size
    if recipe.resize == "exact":
        return recipe.resize_px, recipe.resize_px
    height, width = size
    longer = int(recipe.resize_px * max(size) / min(size))
    return (recipe.resize_px, longer) if height <= width else (longer, recipe.resize_px)


def resize_like_pil(batch: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(n, 3, height, width) uint8 -> (n, 3, *size) of whole numbers from 0 to 255, uint8 on a CPU and else float32."""
    if batch.device.type == "cpu":
        # torch's kernel for uint8 is PIL's algorithm, eight times faster than floats; other devices have none.
        return functional.interpolate(batch, size=size, mode=mode, antialias=True)
    return _resize_in_whole_numbers(batch, size, mode)


def _resize_in_whole_numbers(batch: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    across = functional.interpolate(batch.float(), size=(batch.shape[2], size[1]), mode=mode, antialias=True)
    down = functional.interpolate(_round(across), size=size, mode=mode, antialias=True)
    return _round(down)


def _round(values: Tensor) -> Tensor:
    # Halves go up, as in PIL; torch.round takes them to the even neighbour.
    return values.add_(0.5).floor_().clamp_(0, 255)


def center_crop(batch: Tensor, side_px: int) -> Tensor:
    """The square in the middle of (n, 3, height, width), placed as torchvision's CenterCrop places it.

    Raises:
        EncoderError: The images are smaller than the square; torchvision would add black borders.
    """
    height, width = batch.shape[2:]
    if min(height, width) < side_px:
        raise EncoderError(
            f"a square of {side_px} px can't be cut from tiles of {width} x {height} px; "
            "use tiles of the size that `pathopipe encoders show` gives"
        )
    top, left = round((height - side_px) / 2), round((width - side_px) / 2)
    return batch[:, :, top : top + side_px, left : left + side_px]
