"""A trained network as a model: windows of pixels in, maps of bytes out, on a CPU or a GPU."""

import copy
import itertools
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pathopipe.embeddings.precision import cpu_has_bf16
from pathopipe.errors import PathopipeError, UsageError
from pathopipe.segmentation.blend import Said, blend_borders
from pathopipe.segmentation.decode import DECODE_VERSION, instances_of, layers_of, map_channels, reach_px, to_maps
from pathopipe.segmentation.model import Instances, Layer
from pathopipe.segmentation.network import (
    STRIDE_PX,
    SegmentationNetwork,
    default_weights,
    load_network,
    weights_sha256,
)

__all__ = ["LEARNED_VERSION", "LearnedModel", "find_objects", "open_model"]

LEARNED_VERSION: Final = 2
"""Raised when the same weights would give other maps."""

Device = Literal["auto", "cpu", "cuda"]
Asked = Literal["auto", "fp32", "bf16", "fp16"]
Precision = Literal["fp32", "bf16 autocast", "fp16 autocast"]

_AUTOCAST = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}

# Multiples of the network's stride, so that every window has the cells of tissue types at the same places.
_CORE_PX, _MARGIN_PX, _OVERLAP_PX = 704, 32, 16

_CUDA_BATCH_SIZE: Final = 16
_SIDE_BY_SIDE: Final = 4
"""Most windows at once on a CPU; each takes some hundred megabytes."""


class LearnedModel:
    """Objects by a :class:`~pathopipe.segmentation.network.SegmentationNetwork`; a segmentation model.

    In fp32 the maps of a window are the same whichever windows come with it: on a CPU every window goes through by
    itself, to the last bit; on a GPU rounding may move a map value by one of 255. Another number of threads, another
    machine or another precision moves some values by a few.

    On a CPU a few windows go through side by side, each with its share of torch's threads: then nothing waits for the
    slowest of them layer by layer, which costs most where the finding of objects keeps the same cores busy.

    Args:
        network: With its weights.
        sha256: What tells these weights from others.
        device: Where it runs; ``auto`` is a CUDA device where there is one.
        precision: ``auto`` is autocast to bf16 on a CPU that multiplies it in hardware and fp32 on others; on a GPU
            autocast to bf16, or to fp16 where it has no bf16.
        batch_size: Windows a step on a GPU, windows handed over at once on a CPU; chosen by device when left out.

    Raises:
        UsageError: There is no CUDA device where one is asked for.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        *,
        sha256: str,
        device: Device = "auto",
        precision: Asked = "auto",
        batch_size: int | None = None,
    ) -> None:
        self.spec = network.spec
        self.device = _choose_device(device)
        self.precision = _choose_precision(precision, self.device)
        # Every region finds the same areas of one class, so a single pixel that two of them share makes them one.
        self.layers: tuple[Layer, ...] = tuple(
            replace(layer, joined_share=0.0) if layer.name == "tissue_types" else layer
            for layer in layers_of(self.spec)
        )
        self.mpp = self.spec.mpp
        self.core_px, self.margin_px, self.overlap_px = _CORE_PX, _MARGIN_PX, _OVERLAP_PX
        self.categorical: tuple[int, ...] = tuple(
            number
            for number, name in enumerate(map_channels(self.spec))
            if name.endswith(".class") or name.startswith("tissue_types.")
        )
        self.halo_px = reach_px(self.spec)
        threads = torch.get_num_threads()
        self._workers = min(threads, batch_size or _SIDE_BY_SIDE) if self.device.type == "cpu" else 1
        self._threads_each = threads // self._workers
        self.batch_size = batch_size or (self._workers if self.device.type == "cpu" else _CUDA_BATCH_SIZE)
        self.identity: dict[str, Any] = {
            "name": "network",
            "version": [LEARNED_VERSION, DECODE_VERSION],
            "weights_sha256": sha256,
            "backbone": self.spec.backbone,
            "mpp": self.mpp,
            "precision": self.precision,
        }
        self.about: dict[str, Any] = {"device": self.device.type, "torch": torch.__version__}
        """What else is worth keeping; it does not decide the result beyond rounding."""
        self._network: nn.Module = _folded(network).requires_grad_(False).to(self.device)
        self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._sha256 = sha256
        # Batches are no faster on a CPU, and with a window alone the others can't have a say.
        self._step = 1 if self.device.type == "cpu" else self.batch_size
        self._pool: ThreadPoolExecutor | None = None

    def only(self, layers: Collection[str]) -> "LearnedModel":
        """The same model without the decoders that some layers don't need; what it finds of these is the same."""
        wanted = {*layers, *(("glands",) if "lumina" in layers else ())}  # lumina are sought in glands
        tasks = tuple(task for task in self.spec.tasks if task.name in wanted)
        if len(tasks) == len(self.spec.tasks):
            return self
        network = copy.deepcopy(self._network)
        assert isinstance(network, SegmentationNetwork)
        network.spec = self.spec.model_copy(update={"tasks": tasks})
        network.decoders = nn.ModuleDict({task.name: network.decoders[task.name] for task in tasks})
        device: Device = "cuda" if self.device.type == "cuda" else "cpu"
        asked: dict[Precision, Asked] = {"fp32": "fp32", "bf16 autocast": "bf16", "fp16 autocast": "fp16"}
        return LearnedModel(
            network,
            sha256=self._sha256,
            device=device,
            precision=asked[self.precision],
            batch_size=self.batch_size,
        )

    def maps(self, windows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(n, height, width, 3) RGB -> maps of what lies ``margin_px - overlap_px`` inside; sides in whole strides.

        Raises:
            PathopipeError: Not even one window fits into the device's memory.
        """
        while True:
            try:
                parts = self._each([windows[at : at + self._step] for at in range(0, len(windows), self._step)])
                return parts[0] if len(parts) == 1 else np.concatenate(parts)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                if self._step == 1:
                    raise PathopipeError(
                        f"the {self.device.type} device has no memory for one window of {windows.shape[1]} x "
                        f"{windows.shape[2]} px; use --device cpu"
                    ) from None
                self._step //= 2

    def instances(self, maps: NDArray[np.uint8]) -> dict[str, Instances]:
        """(height, width, channels) of a region with its halo -> the objects of every layer, by its name.

        Nuclei of the halo, which are other regions', may be left out.
        """
        return instances_of(maps, self.spec, self.mpp, halo_px=self.halo_px)

    def instances_at(self, maps: NDArray[np.uint8], mpp: float) -> dict[str, Instances]:
        """The same for the maps of a whole image, which may have been brought to another resolution."""
        return instances_of(maps, self.spec, mpp)

    def _each(self, steps: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        if self.device.type != "cpu":
            return [self._forward(step) for step in steps]
        if self._pool is None:
            # The number of threads is a thread's own, so that of the caller stays as it is. Windows that stand alone
            # go through the pool as well: they are to be what they would be among others.
            self._pool = ThreadPoolExecutor(
                self._workers, "network", initializer=torch.set_num_threads, initargs=(self._threads_each,)
            )
        return list(self._pool.map(self._forward, steps))

    @torch.inference_mode()
    def _forward(self, windows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        sent = torch.from_numpy(windows)
        if self.device.type == "cuda":
            sent = sent.pin_memory().to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=_AUTOCAST.get(self.precision), enabled=self.precision in _AUTOCAST):
            # Seen as (n, 3, height, width), pixels stay where they are: that is channels last.
            outputs = self._network(sent.permute(0, 3, 1, 2))
        edge_px = self.margin_px - self.overlap_px
        planes = to_maps(outputs, self.spec).permute(0, 3, 1, 2)
        inner = planes[..., edge_px : windows.shape[1] - edge_px, edge_px : windows.shape[2] - edge_px]
        return np.moveaxis(inner.contiguous().cpu().numpy(), 1, -1)


def open_model(
    weights: Path | None = None,
    *,
    device: Device = "auto",
    precision: Asked = "auto",
    batch_size: int | None = None,
    threads: int | None = None,
    setting: str = "segment.device",
) -> LearnedModel:
    """Read a network that ``pathopipe segmenter train`` wrote, or the one that is shipped.

    Args:
        weights: Its file; the shipped one where None.
        device: Where it runs.
        precision: See :class:`LearnedModel`.
        batch_size: See :class:`LearnedModel`.
        threads: Threads of torch on a CPU; left as they are when None.
        setting: What the user set the device with, for the message where there is none.

    Raises:
        UsageError: No such file, not a network of pathopipe, a number of it is not finite, or there is no such device.
    """
    _choose_device(device, setting)
    if threads is not None:
        torch.set_num_threads(threads)
    path = weights if weights is not None else default_weights()
    if weights is None and not path.is_file():
        raise UsageError(
            "the model 'network' needs weights, and none came with this installation; "
            "name a file with --weights, or use --model classical"
        )
    network = load_network(path)
    for name, value in network.state_dict().items():
        if not torch.isfinite(value).all():
            raise UsageError(f"{path}: '{name}' holds numbers that are not finite; train anew or use other weights")
    return LearnedModel(network, sha256=weights_sha256(path), device=device, precision=precision, batch_size=batch_size)


def find_objects(rgb: NDArray[np.uint8], mpp: float, model: LearnedModel) -> dict[str, Instances]:
    """Find the objects of an image that is no slide: a tile, a crop, a field of view.

    The network sees it at its own resolution, mirrored beyond the edge. Where the image is finer, the maps are brought
    to its resolution before objects are parted, so that outlines are smooth.

    Args:
        rgb: (height, width, 3).
        mpp: Micrometres per pixel of the image.
        model: From :func:`open_model`.

    Returns:
        Objects of every layer, by its name, at the image's own resolution.

    Raises:
        UsageError: The image is not RGB or empty, or ``mpp`` is not a positive number.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or not rgb.size:
        raise UsageError(f"find_objects: wants uint8 RGB (height, width, 3), got {rgb.dtype} {rgb.shape}")
    if not (np.isfinite(mpp) and mpp > 0):
        raise UsageError(f"find_objects: mpp must be a positive number of um per pixel, got {mpp}")
    height, width = rgb.shape[:2]
    factor = mpp / model.mpp
    work_size = (max(round(width * factor), 1), max(round(height * factor), 1))
    if work_size == (width, height):
        return model.instances_at(_maps_of_image(rgb, model), mpp)
    work = cv2.resize(rgb, work_size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    maps = _maps_of_image(np.asarray(work, np.uint8), model)
    if factor < 1:
        return model.instances_at(_enlarged(maps, (width, height), model.categorical), mpp)
    return {name: _shrunk(found, (width, height)) for name, found in model.instances_at(maps, model.mpp).items()}


def _maps_of_image(rgb: NDArray[np.uint8], model: LearnedModel) -> NDArray[np.uint8]:
    """(height, width, channels) maps: in one window where the image is no larger, else window by window, blended."""
    height, width = rgb.shape[:2]
    core_px, margin_px, overlap_px = model.core_px, model.margin_px, model.overlap_px
    rows, columns = -(-height // core_px), -(-width // core_px)
    if rows == columns == 1:
        window = _mirrored(rgb, margin_px, _whole(height + 2 * margin_px), _whole(width + 2 * margin_px))
        return model.maps(window[None])[0, overlap_px : overlap_px + height, overlap_px : overlap_px + width]
    padded = _mirrored(rgb, margin_px, rows * core_px + 2 * margin_px, columns * core_px + 2 * margin_px)
    side_px = core_px + 2 * margin_px
    said = []
    for y in range(0, rows * core_px, core_px):
        for x in range(0, columns * core_px, core_px):
            window = np.ascontiguousarray(padded[y : y + side_px, x : x + side_px])
            said.append(Said(x, y, model.maps(window[None])[0]))
    maps = np.empty((rows * core_px, columns * core_px, said[0].maps.shape[-1]), np.uint8)
    own = slice(overlap_px, overlap_px + core_px)
    for x, y, found in said:
        maps[y : y + core_px, x : x + core_px] = found[own, own]
    known = np.ones(maps.shape[:2], np.bool_)
    blend_borders(maps, known, said, core_px=core_px, overlap_px=overlap_px, categorical=model.categorical)
    return np.ascontiguousarray(maps[:height, :width])


def _folded(network: SegmentationNetwork) -> SegmentationNetwork:
    """A copy whose convolutions do the work of the batch norms behind them: the same to rounding, in less time."""
    plain = copy.deepcopy(network).to("cpu").eval()
    folded = copy.deepcopy(plain)
    for module in folded.modules():
        children = list(module.named_children())
        for (name, before), (norm_name, norm) in itertools.pairwise(children):
            holder, at = (before, str(len(before) - 1)) if isinstance(before, nn.Sequential) else (module, name)
            layer = getattr(holder, at, None)
            if type(layer) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.num_features == layer.out_channels:
                setattr(holder, at, fuse_conv_bn_eval(layer, norm))
                setattr(module, norm_name, nn.Identity())
    # Which layer feeds which can't be read off a backbone, only that they stand side by side.
    pixels = torch.arange(3 * 64 * 64, dtype=torch.int64).mul_(7919).remainder_(251).view(1, 3, 64, 64)
    with torch.inference_mode():
        there, wanted = folded(pixels.to(torch.uint8)), plain(pixels.to(torch.uint8))
    same = all(torch.allclose(there[name], logits, rtol=1e-3, atol=1e-3) for name, logits in wanted.items())
    return folded if same else plain


def _whole(side_px: int) -> int:
    return -(-side_px // STRIDE_PX) * STRIDE_PX


def _mirrored(rgb: NDArray[np.uint8], margin_px: int, height_px: int, width_px: int) -> NDArray[np.uint8]:
    """The image with a margin at the top left, filled up to a size with its mirror images."""
    below, right = height_px - margin_px - rgb.shape[0], width_px - margin_px - rgb.shape[1]
    return np.pad(rgb, ((margin_px, below), (margin_px, right), (0, 0)), mode="symmetric")


def _enlarged(maps: NDArray[np.uint8], size: tuple[int, int], categorical: Collection[int]) -> NDArray[np.uint8]:
    """Maps at a larger size (width, height)."""
    larger = np.empty((size[1], size[0], maps.shape[-1]), np.uint8)
    for channel in range(maps.shape[-1]):
        filter_ = cv2.INTER_NEAREST if channel in categorical else cv2.INTER_LINEAR
        larger[..., channel] = cv2.resize(np.ascontiguousarray(maps[..., channel]), size, interpolation=filter_)
    return larger


def _shrunk(found: Instances, size: tuple[int, int]) -> Instances:
    """Objects at a smaller size (width, height); those that lose their last pixel are gone."""
    # Float32 holds whole numbers to 2**24, more objects than an image in memory has.
    nearest = cv2.resize(found.labels.astype(np.float32), size, interpolation=cv2.INTER_NEAREST).astype(np.int32)
    numbers = np.unique(nearest[nearest > 0])
    renumbered = np.zeros(len(found.class_id) + 1, np.int32)
    renumbered[numbers] = np.arange(1, len(numbers) + 1)
    return Instances(renumbered[nearest], found.class_id[numbers - 1], found.class_probability[numbers - 1])


def _choose_device(asked: Device, setting: str = "segment.device") -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{setting}=cuda, but torch finds no CUDA device here; use cpu or auto")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def _choose_precision(asked: Asked, device: torch.device) -> Precision:
    if asked == "fp32":
        return "fp32"
    if asked != "auto":
        return "bf16 autocast" if asked == "bf16" else "fp16 autocast"
    if device.type == "cpu":
        return "bf16 autocast" if cpu_has_bf16() else "fp32"
    return "bf16 autocast" if torch.cuda.is_bf16_supported() else "fp16 autocast"
