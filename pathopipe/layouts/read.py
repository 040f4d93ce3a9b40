"""Read feature files of other programs: CLAM, TRIDENT and STAMP HDF5, ``.pt`` and ``.npz``; described first.

Files are opened anew for every read, so that thousands of them cost neither memory nor file handles, and readers may
cross threads and processes.
"""

import contextlib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import h5py
import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import UsageError

__all__ = ["FEATURE_SUFFIXES", "CoordUnit", "FeatureFile", "open_features"]

FEATURE_SUFFIXES: Final = (".h5", ".hdf5", ".pt", ".npz")
"""Endings of the files that :func:`open_features` reads."""

CoordUnit = Literal["px_l0", "um", ""]
"""What coordinates are in: level-0 pixels, micrometres, or not stated."""

_FEATURE_KEYS: Final = ("features", "feats", "X", "embeddings")
_COORD_KEYS: Final = ("coords", "coordinates", "xy_l0")
# 4 million numbers a block, 16 MB as float32.
_BLOCK_NUMBERS: Final = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFile:
    """The features of one slide in another program's file."""

    path: Path
    slide_id: str
    """The file's name without its ending."""
    layout: Literal["clam", "trident", "stamp", "hdf5", "pt", "npz"]
    """``hdf5`` where it states too little to tell which program wrote it."""
    key: str
    """Dataset or array of the features; ``""`` for a bare tensor."""
    n_rows: int
    features: int
    """Numbers a row; 0 for a slide without tiles whose width is not stated."""
    dtype: str
    encoder: str
    """As the file or its folder (``features_<encoder>``) states it; ``""`` where neither does."""
    coord_key: str
    """Dataset or array of the coordinates; ``""`` where there is none."""
    coord_unit: CoordUnit
    patch_side: float | None
    """Side of a tile in the unit of the coordinates; None where not stated."""
    leading_axis: bool
    """Stored as (1, N, D)."""
    coord_path: Path
    """Where the coordinates are: the file itself, or one beside it."""
    patch_px: int | None = None
    """Side of a tile in pixels as it was read; None where not stated."""
    nominal_mpp: float | None = None
    """Micrometres per tile pixel after the magnification that is stated: 0.5 for 20; None where none is."""
    overlap_px: int = 0
    """By how many of these pixels tiles overlap, where stated."""
    dims_l0: tuple[int, int] | None = None
    """Width and height of the slide in level-0 pixels, where stated."""

    def read(self, rows: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """The chosen rows, in the order given; all where ``rows`` is None.

        Args:
            rows: (n,) row numbers; may repeat.

        Returns:
            (n, D) in the type of the file; bfloat16 as float32.

        Raises:
            UsageError: The file can't be read.
        """
        if not self.n_rows:
            return np.zeros((0 if rows is None else len(rows), self.features), self.dtype)
        with _explained(self.path):
            if self.path.suffix in (".h5", ".hdf5"):
                return self._read_hdf5(rows)
            array = _load_array(self.path, self.key)
            array = array[0] if self.leading_axis else array
            return np.asarray(array if rows is None else array[rows])

    def coordinates(self) -> NDArray[np.float64] | None:
        """(N, 2) top-left corners of all rows, x then y, in ``coord_unit``; None where there are none.

        Raises:
            UsageError: The file can't be read, or holds another number of coordinates than of features.
        """
        if not self.coord_key or not self.n_rows:
            return None
        with _explained(self.coord_path):
            if self.coord_path.suffix in (".h5", ".hdf5"):
                with h5py.File(self.coord_path, "r") as file:
                    xy = np.asarray(file[self.coord_key][()])
            else:
                xy = _load_array(self.coord_path, self.coord_key)
        xy = xy[0] if xy.ndim == 3 and len(xy) == 1 else xy
        if xy.shape != (self.n_rows, 2):
            raise UsageError(
                f"{self.coord_path}: '{self.coord_key}' has the shape {xy.shape} beside {self.n_rows} rows of "
                "features; make the features again"
            )
        return xy.astype(np.float64)

    def _read_hdf5(self, rows: NDArray[np.intp] | None) -> NDArray[Any]:
        with h5py.File(self.path, "r") as file:
            dataset = file[self.key]
            at = (0,) if self.leading_axis else ()
            if rows is None:
                return np.asarray(dataset[(*at, slice(None))])
            out = np.empty((len(rows), self.features), dataset.dtype)
            # HDF5 selects scattered rows one by one, in ascending order only; whole blocks are many times faster.
            step = max(1, _BLOCK_NUMBERS // max(self.features, 1))
            block_of = rows // step
            for block in np.unique(block_of):
                wanted = np.flatnonzero(block_of == block)
                chosen = rows[wanted]
                low, high = int(chosen.min()), int(chosen.max()) + 1
                out[wanted] = dataset[(*at, slice(low, high))][chosen - low]
            return out


def open_features(path: Path, *, slide_id: str | None = None, beside: bool = False) -> FeatureFile:
    """Look at a feature file without reading its features (``.npz`` and old ``.pt`` files are read whole, and let go).

    Coordinates' unit and tile side come from the file, or from CLAM's or TRIDENT's ``patches`` folder beside it.

    Args:
        path: ``.h5``, ``.hdf5``, ``.pt`` or ``.npz``.
        slide_id: Where the file's name is not the slide's id.
        beside: Where the file has no coordinates, take those of CLAM's ``h5_files`` or of a ``patches`` folder beside
            its own.

    Raises:
        UsageError: The file is truncated, of another kind, lacks features, or holds what can't be features; says what
            was found.
    """
    suffix = path.suffix
    if suffix not in FEATURE_SUFFIXES:
        raise UsageError(f"{path}: no feature file by its ending; known: {', '.join(FEATURE_SUFFIXES)}")
    with _explained(path):
        look = {".pt": _look_at_pt, ".npz": _look_at_npz}.get(suffix, _look_at_hdf5)
        found = look(path)
    key, shape, kind = _choose_features(path, found)
    leading = len(shape) == 3
    n_rows, features = _rows_and_width(path, key, shape, feat_type=found.attributes.get("feat_type", ""))
    coord_path, placed = path, found
    coord_key = _coord_key(found)
    if beside and not coord_key:
        for other in _beside(path, "h5_files", "patches"):
            with _explained(other):
                content = _look_at_hdf5(other)
            if _coord_key(content):
                coord_path, coord_key = other, _coord_key(content)
                placed = replace(content, attributes={**found.attributes, **content.attributes})
                break
    frame = _coordinate_frame(coord_path, placed, coord_key)
    return FeatureFile(
        path=path,
        slide_id=slide_id if slide_id is not None else path.name.removesuffix(suffix),
        layout=_layout(suffix, found, key, coord_key),
        key=key,
        n_rows=n_rows,
        features=features,
        dtype=kind,
        encoder=_encoder(path, found),
        coord_key=coord_key,
        coord_unit=frame.unit,
        patch_side=frame.side,
        leading_axis=leading,
        coord_path=coord_path,
        patch_px=frame.patch_px,
        nominal_mpp=frame.nominal_mpp,
        overlap_px=frame.overlap_px,
        dims_l0=frame.dims_l0,
    )


# --- what is in a file -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Content:
    """Names, shapes and types of the arrays, and what attributes state."""

    shapes: dict[str, tuple[int, ...]]
    kinds: dict[str, str]
    attributes: dict[str, Any]
    """Of the file and its features."""
    coord_attributes: dict[str, Any]


def _look_at_hdf5(path: Path) -> _Content:
    with h5py.File(path, "r") as file:
        arrays = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}
        features = next((arrays[name] for name in _FEATURE_KEYS if name in arrays), None)
        coords = next((arrays[name] for name in _COORD_KEYS if name in arrays), None)
        return _Content(
            shapes={name: tuple(item.shape) for name, item in arrays.items()},
            kinds={name: "object" if item.dtype.kind in "OSU" else str(item.dtype) for name, item in arrays.items()},
            attributes={**_plain(file.attrs), **({} if features is None else _plain(features.attrs))},
            coord_attributes={} if coords is None else _plain(coords.attrs),
        )


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as Python values; bytes as text, arrays of one number as that number."""
    plain = {}
    for name, value in attributes.items():
        if isinstance(value, bytes):
            plain[name] = value.decode("utf-8", "replace")
        elif isinstance(value, np.ndarray | np.generic):
            plain[name] = value.item() if value.size == 1 else value.tolist()
        else:
            plain[name] = value
    return plain


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[Any]:
    _check_magic(path, b"PK")
    # Of a damaged file NumPy would leave its own handle open.
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
        yield file


def _check_magic(path: Path, *magics: bytes) -> None:
    # Libraries take whatever begins otherwise for pickled objects, and say so.
    with path.open("rb") as handle:
        if not handle.read(2).startswith(magics):
            raise ValueError("begins otherwise")


def _look_at_npz(path: Path) -> _Content:
    with _npz(path) as file:
        arrays = {}
        for name in (*_FEATURE_KEYS, *_COORD_KEYS, "encoder"):
            if name in file.files:
                arrays[name] = file[name]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(file.files, ())
    shapes |= {name: array.shape for name, array in arrays.items()}
    encoder = arrays.get("encoder")
    stated = {"encoder": str(encoder)} if encoder is not None and encoder.shape == () else {}
    return _Content(shapes, {name: str(array.dtype) for name, array in arrays.items()}, stated, {})


def _look_at_pt(path: Path) -> _Content:
    content = _load_pt(path)
    items = content if isinstance(content, dict) else {"": content}
    arrays = {str(name): item for name, item in items.items() if hasattr(item, "shape")}
    stated = {name: item for name, item in items.items() if isinstance(item, str | int | float)}
    return _Content(
        shapes={str(name): tuple(getattr(item, "shape", ())) for name, item in items.items()},
        kinds={name: str(item.dtype).removeprefix("torch.") for name, item in arrays.items()},
        attributes=stated,
        coord_attributes=stated,
    )


def _load_pt(path: Path) -> Any:
    import torch

    _check_magic(path, b"PK", b"\x80")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        # Files of the old kind can't be mapped; anything else that is wrong shows again below.
        if "mmap can only be used" not in str(error):
            raise
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_array(path: Path, key: str) -> NDArray[Any]:
    if path.suffix == ".npz":
        with _npz(path) as file:
            return np.asarray(file[key])
    import torch

    content = _load_pt(path)
    tensor = content[key] if key else content
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy())


def _choose_features(path: Path, found: _Content) -> tuple[str, tuple[int, ...], str]:
    key = next((name for name in ("", *_FEATURE_KEYS) if name in found.shapes), None)
    if key is None:
        listed = ", ".join(f"'{name}' {shape}" for name, shape in sorted(found.shapes.items())[:8]) or "nothing"
        raise UsageError(f"{path}: no features here (found {listed}); they must be named {' or '.join(_FEATURE_KEYS)}")
    kind = found.kinds.get(key, "no array")
    if kind == "bfloat16":
        kind = "float32"
    try:
        numeric = np.dtype(kind).kind in "fiu"
    except TypeError:
        numeric = False
    if not numeric:
        raise UsageError(f"{path}: {_named(key)} holds {kind}, not numbers; features must be floats")
    return key, found.shapes[key], kind


def _rows_and_width(path: Path, key: str, shape: tuple[int, ...], *, feat_type: str) -> tuple[int, int]:
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if shape == (0,):
        return 0, 0
    if len(shape) == 1 or feat_type in ("slide", "patient"):
        raise UsageError(f"{path}: {_named(key)} is one vector a slide ({shape}), not tiles; give the tile features")
    if len(shape) != 2 or (shape[0] and not shape[1]):
        raise UsageError(f"{path}: {_named(key)} has the shape {shape}; features must be (tiles, numbers)")
    return shape[0], shape[1]


def _named(key: str) -> str:
    return f"'{key}'" if key else "the tensor"


def _layout(
    suffix: str, found: _Content, key: str, coord_key: str
) -> Literal["clam", "trident", "stamp", "hdf5", "pt", "npz"]:
    if suffix == ".pt":
        return "pt"
    if suffix == ".npz":
        return "npz"
    if "extractor" in found.attributes or "stamp_version" in found.attributes:
        return "stamp"
    if "encoder" in found.attributes or "patch_size_level0" in found.coord_attributes:
        return "trident"
    return "clam" if key == "features" and coord_key == "coords" else "hdf5"


def _encoder(path: Path, found: _Content) -> str:
    for name in ("encoder", "extractor"):
        stated = found.attributes.get(name)
        if isinstance(stated, str) and stated:
            return stated
    return path.parent.name.removeprefix("features_") if path.parent.name.startswith("features_") else ""


def _coord_key(found: _Content) -> str:
    return next((name for name in _COORD_KEYS if name in found.shapes), "")


def _beside(path: Path, *folders: str) -> Iterator[Path]:
    """Files of the same slide in folders beside the file's own."""
    for folder in folders:
        for name in (f"{path.stem}.h5", f"{path.stem}_patches.h5"):
            other = path.parent.parent / folder / name
            if other.is_file() and other != path:
                yield other


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """What coordinates and tiles are, as far as it is stated."""

    unit: CoordUnit
    side: float | None = None
    patch_px: int | None = None
    nominal_mpp: float | None = None
    overlap_px: int = 0
    dims_l0: tuple[int, int] | None = None


def _coordinate_frame(path: Path, found: _Content, coord_key: str) -> _Frame:
    if not coord_key:
        return _Frame(unit="")
    stated = {**found.attributes, **found.coord_attributes}
    if stated.get("unit") == "um":
        side_um = _positive(stated.get("tile_size_um", stated.get("tile_size")))
        return _Frame(unit="um", side=side_um, patch_px=_whole(stated.get("tile_size_px")))
    side = _side_l0(stated)
    if side is None:
        for other in _beside(path, "patches"):
            with _explained(other), h5py.File(other, "r") as file:
                stated = {**stated, **_plain(file["coords"].attrs)} if "coords" in file else stated
            side = _side_l0(stated)
            break
    # CLAM and TRIDENT write whole level-0 pixels; of floats, or of other programs' files, nothing is known.
    whole = np.dtype(found.kinds[coord_key]).kind in "iu"
    clean = whole and ("features" in found.shapes or path.parent.name == "patches")
    known = side is not None or coord_key == "xy_l0" or clean
    magnification = _positive(stated.get("target_magnification"))
    return _Frame(
        unit="px_l0" if known else "",
        side=side,
        patch_px=_whole(stated.get("patch_size")),
        nominal_mpp=None if magnification is None else 10 / magnification,
        overlap_px=_whole(stated.get("overlap")) or 0,
        dims_l0=_dims_l0(stated),
    )


def _dims_l0(stated: Mapping[str, Any]) -> tuple[int, int] | None:
    """Size of the slide as TRIDENT states it, or CLAM where it read level 0."""
    width, height = _whole(stated.get("level0_width")), _whole(stated.get("level0_height"))
    level_dim = stated.get("level_dim")
    if stated.get("patch_level") == 0 and isinstance(level_dim, list) and len(level_dim) == 2:
        width, height = _whole(level_dim[0]), _whole(level_dim[1])
    return None if width is None or height is None else (width, height)


def _side_l0(stated: Mapping[str, Any]) -> float | None:
    """Side of a tile in level-0 pixels as TRIDENT states it, or as follows from CLAM's patch size and downsample."""
    if "patch_size_level0" in stated:
        return _positive(stated["patch_size_level0"])
    size, downsample = stated.get("patch_size"), stated.get("downsample")
    if "patch_level" not in stated or size is None:
        return None
    if stated["patch_level"] == 0:
        return _positive(size)
    factor = downsample[0] if isinstance(downsample, list) else downsample
    return _positive(size * factor) if isinstance(factor, int | float) else None


def _whole(value: Any) -> int | None:
    number = _positive(value)
    return int(number) if number is not None and number.is_integer() else None


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None


class _explained:  # noqa: N801 - reads as a phrase: with _explained(path)
    """Turn what libraries say of a damaged file into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        if not self._path.is_file():
            raise UsageError(f"{self._path}: no such file; check the path")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, UsageError):
            return
        self._refuse(error)

    def _refuse(self, error: BaseException) -> NoReturn:
        path, said = self._path, " ".join(str(error).split())
        if "allow_pickle" in said or "weights_only" in said.lower() or "WeightsUnpickler" in said:
            raise UsageError(
                f"{path}: holds Python objects, which could run code when loaded; save plain arrays or tensors"
            ) from error
        if isinstance(error, OSError | EOFError | zipfile.BadZipFile | RuntimeError | KeyError | ValueError):
            size = path.stat().st_size if path.exists() else 0
            raise UsageError(
                f"{path}: can't be read ({said[:160]}; {size} bytes): truncated or no {path.suffix} file; "
                "copy it again, or make it anew"
            ) from error
        raise error
