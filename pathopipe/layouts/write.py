"""Write features as CLAM, TRIDENT and STAMP keep them: HDF5 and ``.pt`` files that are whole or absent, block by block.

Neither library may write to the disk itself: HDF5 ends the process where the disk is full, and torch wants a tensor in
memory. So what is small is made in memory, and the rows of features are streamed to where they belong.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import h5py
import numpy as np
from numpy.typing import DTypeLike, NDArray

from pathopipe.errors import StoreError, UsageError
from pathopipe.files import durable_file
from pathopipe.records import Level, TileGrid

__all__ = [
    "HDF5_LAYOUTS",
    "PT_LAYOUTS",
    "Layout",
    "TileFeatures",
    "nominal_magnification",
    "stream_hdf5",
    "write_hdf5",
    "write_pt",
]

Layout = Literal["clam", "trident", "stamp"]

HDF5_LAYOUTS: Final[tuple[Layout, ...]] = ("clam", "trident", "stamp")
PT_LAYOUTS: Final[tuple[Layout, ...]] = ("clam", "trident")

STAMP_VERSION: Final = "2.0.0"
"""The release whose layout is written: coordinates in micrometres, ``tile_size_um`` and ``tile_size_px``."""

_PAGE: Final = 4096
_ALIGNMENT: Final = 64
_ZIP_HEADER: Final = 30
_ZIP64_FROM: Final = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class TileFeatures:
    """The features of one slide's good tiles, read as they are written."""

    slide_id: str
    encoder: str
    grid: TileGrid
    """The good tiles only, in the order of the rows."""
    mpp_l0: tuple[float, float]
    """Micrometres per level-0 pixel, x then y."""
    dims_l0: tuple[int, int]
    """Width and height of the slide in level-0 pixels."""
    level: Level
    """The level that the tiles were read from."""
    features: int
    """Numbers a tile."""
    recipe: str
    """Short hash of what decides the numbers."""
    blocks: Callable[[], Iterator[NDArray[Any]]]
    """Starts anew at every call: (n, features) of some consecutive rows; together ``len(grid)`` rows."""


def nominal_magnification(mpp: float) -> float:
    """The name of a resolution: 40 for about 0.25 um/px, 20 for 0.5, 10 for 1.

    What is further than a fifth from any of these is 10 / mpp.
    """
    power = round(math.log2(mpp / 0.25))
    near = 0.25 * 2.0**power
    magnification = 40 / 2.0**power if abs(mpp / near - 1) <= 0.2 else round(10 / mpp, 2)
    return int(magnification) if magnification == int(magnification) else magnification


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def write_hdf5(folder: Path, slide: TileFeatures, layout: Layout) -> list[Path]:
    """Write the features of a slide as HDF5; files of that name are replaced.

    ``clam``: ``h5_files/<id>.h5`` and ``patches/<id>.h5``. ``trident``: ``features_<encoder>/<id>.h5`` and
    ``patches/<id>_patches.h5``. ``stamp``: ``<encoder>-<recipe>/<id>.h5``.

    Args:
        folder: Where these folders go.
        slide: What to write.
        layout: Whose way.

    Returns:
        The files; none for a slide without tiles, but in TRIDENT's way, which writes empty features.

    Raises:
        StoreError: A number is too large for the float16 of STAMP, or features can't be read.
        StoreWriteError: The disk is full, or the folder can't be written.
    """
    if not len(slide.grid) and layout != "trident":
        return []
    coordinates = _coordinates(folder, slide, layout)
    if layout == "stamp":
        path = folder / f"{slide.encoder}-{slide.recipe}" / f"{slide.slide_id}.h5"
        key = "feats"
    else:
        name = "h5_files" if layout == "clam" else f"features_{slide.encoder}"
        path = folder / name / f"{slide.slide_id}.h5"
        key = "features"
    dtype: np.dtype[Any] = np.dtype(np.float16 if layout == "stamp" else np.float32)

    def describe(file: h5py.File) -> None:
        if layout == "trident":
            file[key].attrs.update({"name": slide.slide_id, "savetodir": "", "encoder": slide.encoder})
            _put_trident_coordinates(file, slide)
        elif layout == "clam":
            file["coords"] = slide.grid.xy_l0
        else:
            _put_stamp(file, slide)

    with durable_file(path) as target:
        stream_hdf5(target, key, _shape(slide), dtype, _in_type(slide, dtype), describe)
    return [path, *coordinates]


def write_pt(folder: Path, slide: TileFeatures, layout: Layout) -> list[Path]:
    """Write the features of a slide as one float32 tensor (N, D), and its coordinates in a ``patches`` folder.

    ``clam``: ``pt_files/<id>.pt`` and ``patches/<id>.h5``. ``trident``: ``features_<encoder>/<id>.pt`` and
    ``patches/<id>_patches.h5``.

    Returns:
        The files; none for a slide without tiles, but in TRIDENT's way, which writes an empty tensor.

    Raises:
        UsageError: STAMP has no such files.
        StoreError: Features can't be read.
        StoreWriteError: The disk is full, or the folder can't be written.
    """
    if layout not in PT_LAYOUTS:
        raise UsageError(f"{layout} reads no .pt files; write HDF5, or choose {' or '.join(PT_LAYOUTS)}")
    if not len(slide.grid) and layout != "trident":
        return []
    coordinates = _coordinates(folder, slide, layout)
    name = "pt_files" if layout == "clam" else f"features_{slide.encoder}"
    path = folder / name / f"{slide.slide_id}.pt"
    with durable_file(path) as target:
        _stream_pt(target, _shape(slide), _in_type(slide, np.dtype(np.float32)))
    return [path, *coordinates]


def _shape(slide: TileFeatures) -> tuple[int, ...]:
    return (len(slide.grid), slide.features) if len(slide.grid) else (0,)


def _in_type(slide: TileFeatures, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    largest = np.finfo(dtype).max
    start = 0
    for block in slide.blocks():
        if block.dtype.itemsize > dtype.itemsize:
            too_large = np.flatnonzero((np.abs(block) > largest).any(axis=1))
            if len(too_large):
                row = int(too_large[0])
                raise StoreError(
                    f"{slide.slide_id}: row {start + row} of {slide.encoder} holds {np.abs(block[row]).max():g}, too "
                    f"large for {dtype}; export in a layout of float32 (clam, trident)",
                    slide_id=slide.slide_id,
                )
        start += len(block)
        yield block.astype(dtype)


def _coordinates(folder: Path, slide: TileFeatures, layout: Layout) -> list[Path]:
    """Write the file of coordinates alone; STAMP has none."""
    if layout == "stamp":
        return []
    ending = "" if layout == "clam" else "_patches"
    path = folder / "patches" / f"{slide.slide_id}{ending}.h5"
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        if layout == "trident":
            _put_trident_coordinates(file, slide)
        else:
            file["coords"] = slide.grid.xy_l0
            file["coords"].attrs.update(_clam_attributes(slide))
    with durable_file(path) as target:
        target.write(image.getbuffer())
    return [path]


def _clam_attributes(slide: TileFeatures) -> dict[str, Any]:
    grid, level = slide.grid, slide.level
    number, side_px = grid.level, grid.read_px[0]
    downsample = (level.downsample_x, level.downsample_y)
    level_dim = (level.width_px, level.height_px)
    if round(side_px * level.downsample_x) != grid.side_l0[0]:
        # The side of a tile at that level is rounded; at level 0 it is not.
        number, side_px, downsample, level_dim = 0, grid.side_l0[0], (1.0, 1.0), slide.dims_l0
    return {
        "patch_size": side_px,
        "patch_level": number,
        "downsample": np.array(downsample),
        "downsampled_level_dim": np.array(level_dim),
        "level_dim": np.array(level_dim),
        "name": slide.slide_id,
        "save_path": "",
    }


def _put_trident_coordinates(file: h5py.File, slide: TileFeatures) -> None:
    grid = slide.grid
    file["coords"] = grid.xy_l0
    file["coords"].attrs.update(
        {
            "patch_size": grid.side_px,
            "patch_size_level0": grid.side_l0[0],
            "level0_magnification": nominal_magnification(slide.mpp_l0[0]),
            "target_magnification": nominal_magnification(grid.mpp),
            "overlap": grid.overlap_px,
            "level0_width": slide.dims_l0[0],
            "level0_height": slide.dims_l0[1],
            "name": slide.slide_id,
            "savetodir": "",
        }
    )


def _put_stamp(file: h5py.File, slide: TileFeatures) -> None:
    grid = slide.grid
    file["coords"] = (grid.xy_l0 * np.asarray(slide.mpp_l0)).astype(np.float32)
    file.attrs.update(
        {
            "unit": "um",
            # As wide as the tiles are, not as was asked: coordinates and size share one scale.
            "tile_size_um": grid.side_l0[0] * slide.mpp_l0[0],
            "tile_size_px": grid.side_px,
            "extractor": slide.encoder,
            "feat_type": "tile",
            "stamp_version": STAMP_VERSION,
            "code_hash": slide.recipe,
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# HDF5
# ---------------------------------------------------------------------------------------------------------------------


def stream_hdf5(
    target: BinaryIO,
    name: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    blocks: Iterable[NDArray[Any]],
    describe: Callable[[h5py.File], None],
) -> None:
    """Write an HDF5 file with one large array, plain and in one piece, a block of rows at a time.

    Args:
        target: An empty file that can be written and sought.
        name: Of the large array.
        shape: Of the large array.
        dtype: Of the large array.
        blocks: Its rows.
        describe: Called with the file and the unfilled array in it; adds attributes and small arrays, which are held
            in memory.

    Raises:
        ValueError: The blocks hold more or fewer rows than ``shape`` says.
        OSError: The disk is full.
    """
    pages = _Pages()
    kind = np.dtype(dtype).newbyteorder("<")
    with h5py.File(pages, "w") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        # Room is made in the file, but nothing is written into it.
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        plan.set_obj_track_times(False)
        place = h5py.h5d.create(
            file.id, name.encode(), h5py.h5t.py_create(kind, logical=True), h5py.h5s.create_simple(shape), plan
        )
        describe(file)
        file.flush()
        offset = place.get_offset()
    pages.copy_to(target)
    if offset is not None:
        target.seek(offset)
    _copy_rows(target, shape, kind, blocks)


def _copy_rows(target: BinaryIO, shape: tuple[int, ...], kind: np.dtype[Any], blocks: Iterable[NDArray[Any]]) -> None:
    rows = 0
    for block in blocks:
        target.write(np.ascontiguousarray(block, kind).data.cast("B") if block.size else b"")
        rows += len(block)
    if rows != shape[0]:
        raise ValueError(f"{rows} rows came for {shape[0]}")


class _Pages(io.RawIOBase):
    """A file in memory that holds only those pages that were written to."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._length = 0
        self._at = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def truncate(self, size: int | None = None) -> int:
        self._length = self._at if size is None else size
        return self._length

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._length - self._at))
        for page, start, length, done in self._parts(wanted):
            held = self._pages.get(page)
            view[done : done + length] = bytes(length) if held is None else held[start : start + length]
        self._at += wanted
        return wanted

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for page, start, length, done in self._parts(len(view)):
            held = self._pages.setdefault(page, bytearray(_PAGE))
            held[start : start + length] = view[done : done + length]
        self._at += len(view)
        self._length = max(self._length, self._at)
        return len(view)

    def copy_to(self, target: BinaryIO) -> None:
        """Write every page to its place in another file, which becomes as long as this one."""
        for page, held in sorted(self._pages.items()):
            target.seek(page * _PAGE)
            target.write(held[: self._length - page * _PAGE])
        target.truncate(self._length)

    def _parts(self, length: int) -> Iterator[tuple[int, int, int, int]]:
        """Page, first byte in it, number of bytes, and what came before, for what follows the present place."""
        done = 0
        while done < length:
            page, start = divmod(self._at + done, _PAGE)
            part = min(_PAGE - start, length - done)
            yield page, start, part, done
            done += part


# ---------------------------------------------------------------------------------------------------------------------
# .pt
# ---------------------------------------------------------------------------------------------------------------------


def _stream_pt(target: BinaryIO, shape: tuple[int, ...], blocks: Iterable[NDArray[Any]]) -> None:
    """Write what ``torch.save`` writes of a float32 tensor: a ZIP file of a pickle and the bare numbers."""
    numbers = math.prod(shape)
    kind = np.dtype("<f4")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (
            ("data.pkl", _pickled_tensor(shape)),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
        large = numbers * kind.itemsize >= _ZIP64_FROM
        data = zipfile.ZipInfo("archive/data/0")
        # torch maps the numbers into memory where they begin at a multiple of 64 bytes; padding is a field of its own.
        header = target.tell() + _ZIP_HEADER + len(data.filename) + (20 if large else 0) + 4
        padding = -header % _ALIGNMENT
        data.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        with archive.open(data, "w", force_zip64=large) as file:
            _copy_rows(file, shape, kind, blocks)  # type: ignore[arg-type]


class _Storage:
    """Stands for the numbers of the tensor."""


class _Tensor:
    """Is pickled as a tensor of the given shape over the numbers."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        from torch._utils import _rebuild_tensor_v2

        strides = (self._shape[1], 1) if len(self._shape) == 2 else (1,)
        return _rebuild_tensor_v2, (_Storage(), 0, self._shape, strides, False, OrderedDict())


def _pickled_tensor(shape: tuple[int, ...]) -> bytes:
    import torch

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            if isinstance(item, _Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", math.prod(shape))
            return None

    pickled = io.BytesIO()
    Pickler(pickled, protocol=2).dump(_Tensor(shape))
    return pickled.getvalue()
