"""Features that another program computed, into the store of their slide: a grid of tiles, and rows on it.

What is not stated is not guessed: without the slide's file its resolution must be given, and so must the size of the
tiles where neither the feature file nor the ``patches`` folder beside it says it.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

import pathopipe
from pathopipe.embeddings.catalog import find_encoder
from pathopipe.errors import StoreChangedError, UsageError
from pathopipe.layouts import FeatureFile
from pathopipe.records import STATUS_NOT_FINITE, STATUS_OK, STATUS_OVERFLOW, Level, MppEvidence, SlideInfo, TileGrid
from pathopipe.slide.open import open_slide
from pathopipe.slide.resolution import check_override, require_mpp
from pathopipe.store import SlideStore, digest, store_path
from pathopipe.store.claims import one_writer

__all__ = ["FeatureImport", "ImportedSlide", "encoder_name", "import_features"]

_CHUNK_ROWS: Final = 1024
_NAME: Final = re.compile(r"[a-z0-9._-]+")
_EXACT: Final = 0.02
"""As for grids that are computed: 0.2485 um/px serves 0.25."""
_NOMINAL: Final = 1.5
"""How far the nominal magnification of a file may be from what its tiles measure."""
_SIZE_TOLERANCE: Final = 0.1
_CELLS_A_TILE: Final = 8
_ESTIMATED: Final = "size of the slide not known: it is as far as the imported tiles reach"
_NO_FILE: Final = "made from imported features; the slide's file was not at hand"


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureImport:
    """What the user states of files that don't state it themselves."""

    encoder: str | None = None
    """What the features are called in the store."""
    grid: str | None = None
    """What the grid of tiles is called; after the tiles' size where None."""
    unit: Literal["px", "um"] | None = None
    """Of coordinates: level-0 pixels or micrometres."""
    tile_px: int | None = None
    """Side of a tile in pixels, as the encoder got it."""
    tile_um: float | None = None
    """Side of a tile in micrometres."""
    features: int | None = None
    """Numbers a tile, for files of empty slides, which don't say."""
    replace: bool = False
    """Put the new features in the place of others of that encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedSlide:
    """How the import of one file ended."""

    slide_id: str
    encoder: str
    grid: str
    tiles: int
    features: int
    bad_tiles: int
    """Rows that are not finite."""
    unchanged: bool
    """The store held these very features already."""
    notes: tuple[str, ...]
    """What the user should know."""


def import_features(
    file: FeatureFile,
    out: Path,
    wanted: FeatureImport,
    *,
    slide: Path | None = None,
    mpp: float | None = None,
    mpp_source: str = "config",
) -> ImportedSlide:
    """Bring the features of one slide into its store, making the store where there is none.

    Rows keep their order. Those with a number that is not finite are quarantined. The grid holds the coordinates as
    they are; they need not be regular.

    Args:
        file: As :func:`pathopipe.layouts.open_features` finds it, with ``beside=True`` for ``.pt`` files of CLAM.
        out: Folder of the results.
        wanted: What is not in the file.
        slide: The slide's file; only its header is read.
        mpp: Micrometres per level-0 pixel; wins over what the slide states, and is needed without it.
        mpp_source: Who says so: ``manifest`` or ``config``.

    Raises:
        UsageError: Something is missing or contradictory, tiles lie outside the slide, or the store holds other
            features of that name.
        SlideError: The slide can't be opened, or states no resolution.
        StoreChangedError: The store was made from another file or at another resolution.
        StoreWriteError: The disk is full, or the folder can't be written.
    """
    encoder = encoder_name(file, wanted)
    path = store_path(out, file.slide_id)
    frame = _slide_frame(file, path, slide, mpp, mpp_source)
    tiles = _tiles(file, wanted, frame)
    features = file.features or wanted.features
    if not features:
        raise UsageError(
            f"{file.path}: an empty slide, whose number of features is not stated; import it together with others"
        )
    with one_writer(path.parent / f".{path.stem}.import.lock", f"features of {file.slide_id}"):
        if frame.info is None:
            store = SlideStore.open(path)
        else:
            info = frame.info if frame.sized else _reaching(frame.info, tiles)
            store = SlideStore.create_or_open(path, info, created_by=f"pathopipe {pathopipe.__version__}")
        return _store_features(store, file, encoder, features, tiles, wanted)


def encoder_name(file: FeatureFile, wanted: FeatureImport) -> str:
    """What the features are called in the store.

    Raises:
        UsageError: Nothing says it, it can't be a name, or an encoder of that name has another number of features.
    """
    name = wanted.encoder or file.encoder.lower()
    if not name:
        raise UsageError(f"{file.path}: doesn't say which encoder made it; name it with --encoder")
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{file.path}: encoder '{name}' can't be a name in a store; give one of small letters, digits, '.', '_' "
            "and '-' with --encoder"
        )
    try:
        known = find_encoder(name).features
    except UsageError:
        known = 0  # names of other programs are as good
    if known and file.n_rows and file.features != known:
        raise UsageError(
            f"{file.path}: {file.features} numbers a tile, but the encoder {name} gives {known}; "
            "give these features another name with --encoder"
        )
    return name


# ---------------------------------------------------------------------------------------------------------------------
# The slide
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """What the tiles stand on."""

    info: SlideInfo | None
    """None where the store is there and its slide is not at hand."""
    mpp: tuple[float, float]
    dims_l0: tuple[int, int]
    sized: bool
    """Whether ``dims_l0`` is known."""
    note: str = ""
    """Where ``dims_l0`` comes from, if it may be wrong."""


def _slide_frame(file: FeatureFile, path: Path, slide: Path | None, mpp: float | None, source: str) -> _Frame:
    check_override(mpp, source=source, name=file.path.name, slide_id=file.slide_id)
    if slide is not None:
        return _from_slide(file, path, slide, mpp, source)
    if SlideStore(path).attributes("").get("pathopipe"):
        return _from_store(file, SlideStore.open(path), mpp)
    if mpp is None:
        raise UsageError(
            f"{file.path}: micrometres per pixel of slide {file.slide_id} are not known; give the slides with --slides "
            "FOLDER or --manifest CSV, or state it with --mpp (um per level-0 pixel)"
        )
    dims_l0 = file.dims_l0 or (0, 0)
    info = SlideInfo(
        slide_id=file.slide_id,
        path=file.path,
        reader="none",
        vendor="",
        dims_l0=dims_l0,
        levels=(Level(*dims_l0, 1.0, 1.0),),
        size_bytes=0,
        fingerprint="",
        mpp=(mpp, mpp),
        mpp_evidence=(MppEvidence(source, mpp, mpp, used=True),),
        problems=(_NO_FILE,),
    )
    return _Frame(info=info, mpp=(mpp, mpp), dims_l0=dims_l0, sized=file.dims_l0 is not None)


def _reaching(info: SlideInfo, tiles: TileGrid) -> SlideInfo:
    """The slide, as large as its tiles reach."""
    width, height = (tiles.xy_l0.max(axis=0, initial=0) + tiles.side_l0).tolist()
    return replace(
        info, dims_l0=(width, height), levels=(Level(width, height, 1.0, 1.0),), problems=(*info.problems, _ESTIMATED)
    )


def _from_slide(file: FeatureFile, path: Path, slide: Path, mpp: float | None, source: str) -> _Frame:
    opened = open_slide(slide, slide_id=file.slide_id, mpp=mpp, mpp_source=source)
    try:
        info = opened.info
        known_mpp = require_mpp(info)
    finally:
        opened.close()
    if file.dims_l0 is not None and file.dims_l0 != info.dims_l0:
        stated, found = (f"{width} x {height}" for width, height in (file.dims_l0, info.dims_l0))
        raise UsageError(
            f"{file.path}: made from a slide of {stated} px, but {slide} has {found} px; give the file that the "
            "features were made from"
        )
    about = SlideStore(path).attributes("").get("pathopipe")
    if about and not about["slide"]["fingerprint"]:
        raise StoreChangedError(
            f"{path}: made from features alone, without the slide's file; import into another --out, or delete the "
            "store and import all its features again, with the slide",
            slide_id=file.slide_id,
        )
    return _Frame(info=info, mpp=known_mpp, dims_l0=info.dims_l0, sized=True)


def _from_store(file: FeatureFile, store: SlideStore, mpp: float | None) -> _Frame:
    slide = store.slide
    if slide["mpp"] is None:
        raise UsageError(f"{store.path}: states no micrometres per pixel; import into another --out with --mpp")
    known = (float(slide["mpp"][0]), float(slide["mpp"][1]))
    if mpp is not None and mpp not in known:
        raise StoreChangedError(
            f"{store.path}: made at {known[0]:g} um/px, not at {mpp:g}; leave out --mpp, or import into another --out",
            slide_id=file.slide_id,
        )
    dims_l0 = (int(slide["dims_l0"][0]), int(slide["dims_l0"][1]))
    note = " (the reach of the tiles that were imported first)" if _ESTIMATED in slide["problems"] else ""
    return _Frame(info=None, mpp=known, dims_l0=dims_l0, sized=True, note=note)


# ---------------------------------------------------------------------------------------------------------------------
# The tiles
# ---------------------------------------------------------------------------------------------------------------------


def _tiles(file: FeatureFile, wanted: FeatureImport, frame: _Frame) -> TileGrid:
    unit = {"px": "px_l0", "um": "um", None: file.coord_unit}[wanted.unit]
    if file.coord_unit and unit != file.coord_unit:
        stated = "micrometres" if file.coord_unit == "um" else "level-0 pixels"
        raise UsageError(f"{file.path}: its coordinates are {stated}; leave out --unit")
    side_l0 = _side_l0(file, wanted, frame, unit)
    side_px = wanted.tile_px or file.patch_px
    if side_px is None:
        raise UsageError(
            f"{file.path}: doesn't say how many pixels wide its tiles are; state it with --tile-px (as the encoder got "
            "them, 224 or 256 for example)"
        )
    achieved = (side_l0[0] * frame.mpp[0] / side_px, side_l0[1] * frame.mpp[1] / side_px)
    mpp = _asked_mpp(file, wanted, side_px, achieved[0])
    xy_l0 = _corners_l0(file, frame, unit, side_l0)
    overlap = f"-o{file.overlap_px}" if file.overlap_px else ""
    name = wanted.grid or f"{side_px}px-{mpp:g}um{overlap}"
    if not _NAME.fullmatch(name):
        raise UsageError(f"--grid {name}: use small letters, digits, '.', '_' and '-'")
    return TileGrid(
        name=name,
        side_px=side_px,
        mpp=mpp,
        achieved_mpp=achieved,
        overlap_px=file.overlap_px,
        side_l0=side_l0,
        stride_l0=(_step(xy_l0[:, 0], side_l0[0]), _step(xy_l0[:, 1], side_l0[1])),
        level=0,
        read_px=side_l0,
        resample="none" if side_l0 == (side_px, side_px) else "area" if min(side_l0) >= side_px else "enlarge",
        xy_l0=xy_l0,
        # What the other program took for tissue is not known.
        tissue_fraction=np.full(len(xy_l0), np.nan, np.float32),
    )


def _side_l0(file: FeatureFile, wanted: FeatureImport, frame: _Frame, unit: str) -> tuple[int, int]:
    """Width and height of a tile in level-0 pixels."""
    sides: list[float] = []
    if file.patch_side is not None:
        sides = [file.patch_side / mpp if unit == "um" else file.patch_side for mpp in frame.mpp]
    if wanted.tile_um is not None:
        given = [wanted.tile_um / mpp for mpp in frame.mpp]
        if sides and abs(given[0] / sides[0] - 1) > _SIZE_TOLERANCE:
            raise UsageError(
                f"{file.path}: its tiles are {sides[0] * frame.mpp[0]:.4g} um wide at {frame.mpp[0]:g} um/px, not "
                f"{wanted.tile_um:g}; leave out --tile-um, or correct --mpp"
            )
        sides = sides or given
    if not sides:
        raise UsageError(
            f"{file.path}: neither it nor a patches folder beside its own says how wide its tiles are; put that folder "
            "there, or state it with --tile-um (128 for 256 px at 0.5 um/px)"
        )
    return max(1, round(sides[0])), max(1, round(sides[1]))


def _asked_mpp(file: FeatureFile, wanted: FeatureImport, side_px: int, achieved: float) -> float:
    """The resolution that the tiles were meant to have, so that slides from several scanners share a grid's name."""
    if wanted.tile_um is not None:
        return wanted.tile_um / side_px
    if file.nominal_mpp is not None and (wanted.tile_px is None or wanted.tile_px == file.patch_px):
        ratio = achieved / file.nominal_mpp
        if max(ratio, 1 / ratio) > _NOMINAL:
            raise UsageError(
                f"{file.path}: its tiles have {achieved:.3g} um/px, but it states {10 / file.nominal_mpp:g}x, about "
                f"{file.nominal_mpp:g} um/px; correct --mpp (um per level-0 pixel)"
            )
        return file.nominal_mpp
    nominal: float = 0.25 * 2.0 ** round(np.log2(achieved / 0.25))
    return nominal if abs(achieved / nominal - 1) <= _EXACT else float(f"{achieved:.4g}")


def _corners_l0(file: FeatureFile, frame: _Frame, unit: str, side_l0: tuple[int, int]) -> NDArray[np.int64]:
    """(N, 2) top-left corners."""
    if not file.n_rows:
        return np.zeros((0, 2), np.int64)
    xy = file.coordinates()
    if xy is None:
        raise UsageError(
            f"{file.path}: holds no coordinates; CLAM's are in h5_files/{file.path.stem}.h5 or "
            f"patches/{file.path.stem}.h5, beside the folder of the .pt files: put them there, or import the .h5 files"
        )
    if not unit:
        raise UsageError(
            f"{file.coord_path}: doesn't say whether its coordinates are pixels or micrometres; state it with "
            "--unit px or --unit um"
        )
    if not np.isfinite(xy).all():
        row = int(np.flatnonzero(~np.isfinite(xy).all(axis=1))[0])
        raise UsageError(f"{file.coord_path}: the coordinates of row {row} are not finite; make the features again")
    xy_l0 = xy / np.asarray(frame.mpp) if unit == "um" else xy
    corners = np.rint(xy_l0)
    if unit == "px_l0" and (corners != xy_l0).any():
        raise UsageError(
            f"{file.coord_path}: coordinates that are not whole numbers can't be level-0 pixels; "
            "are they micrometres (--unit um)?"
        )
    # Tiles may hang over the edges, but not lie beyond them.
    end = np.asarray(frame.dims_l0) if frame.sized else np.inf
    outside = np.flatnonzero(((corners + side_l0 <= 0) | (corners >= end)).any(axis=1))
    if len(outside):
        x, y = corners[outside[0]].tolist()
        size = f"the slide's {frame.dims_l0[0]} x {frame.dims_l0[1]} px{frame.note}" if frame.sized else "the slide"
        raise UsageError(
            f"{file.coord_path}: {len(outside)} of {len(corners)} tiles lie outside {size}, the first at "
            f"({x:.0f}, {y:.0f}); is it the same slide, and are unit and --mpp right?"
        )
    return corners.astype(np.int64)


def _step(starts: NDArray[np.int64], side_l0: int) -> float:
    """The step s of which all starts are ``floor(k * s)``, or a fraction of a tile where there is none.

    Tiles of other programs begin where a piece of tissue begins. Maps lay them on cells as wide as the step, so that a
    fraction of a tile puts them where they are, nearly.
    """
    places = np.unique(starts)
    coarse = max(1.0, side_l0 / _CELLS_A_TILE)
    if _fits(places, side_l0):
        return float(side_l0)
    gaps = np.unique(np.diff(places))
    # Starts are rounded down, so that the gap between two is a whole number of steps, give or take a pixel.
    first = float(min([side_l0, *gaps.tolist()]))
    low, high = max(1.0, first - 1), first + 2
    for length, before, after in [*((gap, 1, 1) for gap in gaps.tolist()), *((x, 0, 1) for x in places.tolist())]:
        count = round(length / ((low + high) / 2))
        if count:
            low, high = max(low, (length - before) / count), min(high, (length + after) / count)
        if low >= high:
            return coarse
    # The roundest number that does.
    for step in (*(round((low + high) / 2, digits) for digits in range(7)), low):
        if low <= step < high and _fits(places, step):
            return step
    return coarse


def _fits(places: NDArray[np.int64], step: float) -> bool:
    return bool((np.floor(np.ceil(places / step - 1e-9) * step) == places).all())


# ---------------------------------------------------------------------------------------------------------------------
# Into the store
# ---------------------------------------------------------------------------------------------------------------------


def _store_features(
    store: SlideStore, file: FeatureFile, encoder: str, features: int, tiles: TileGrid, wanted: FeatureImport
) -> ImportedSlide:
    grid_inputs = _grid_inputs(tiles)
    notes: list[str] = []
    stale = _conflict(store, tiles, encoder)
    group = f"embeddings/{tiles.name}/{encoder}"
    known = store.inputs(group)
    if stale is None and store.inputs(f"tiles/{tiles.name}") is not None:
        grid_inputs = store.inputs(f"tiles/{tiles.name}") or {}  # computed here, or by an earlier import
    inputs = {
        "imported": {"file": file.path.name, "layout": file.layout, "sha256": _sha256(file.path)},
        "tiles": digest(grid_inputs),
        "encoder": {"name": encoder, "imported": True},
    }
    if known is not None and _essence(known) == _essence(inputs) and stale is None:
        if store.attributes(group).get("complete"):
            return _report(store, file, encoder, tiles, features, unchanged=True, notes=())
    elif known is not None or stale:
        if not wanted.replace:
            raise UsageError(stale or _occupied(store, encoder, tiles.name, known))
        notes += _forget(store, tiles.name, encoder, stale)
    if store.inputs(f"tiles/{tiles.name}") is None:
        store.write_grid(tiles, grid_inputs)
    array = store.create_embeddings(
        tiles.name,
        encoder,
        rows=file.n_rows,
        features=features,
        dtype="float16" if file.dtype == "float16" else "float32",
        chunk_rows=_CHUNK_ROWS,
        about={"inputs": inputs, "source": file.layout},
    )
    bad = 0
    for chunk, values in enumerate(_read_chunks(file, array.chunk_rows)):
        stored, status = _judge(values, np.dtype(array.dtype))
        bad += int(np.count_nonzero(status != STATUS_OK))
        array.write_chunk(chunk, stored, status)
    array.finish(bad_tiles=bad)
    doubled = len(tiles.xy_l0) - len(np.unique(tiles.xy_l0, axis=0))
    if doubled:
        notes.append(f"{doubled} of {len(tiles)} tiles lie exactly on another one; they are kept, and count twice")
    stated = file.encoder.lower()
    if stated and stated != encoder:
        notes.append(f"the file says {file.encoder}; stored as {encoder}")
    return _report(store, file, encoder, tiles, features, unchanged=False, notes=tuple(notes))


def _report(
    store: SlideStore,
    file: FeatureFile,
    encoder: str,
    tiles: TileGrid,
    features: int,
    *,
    unchanged: bool,
    notes: tuple[str, ...],
) -> ImportedSlide:
    return ImportedSlide(
        slide_id=file.slide_id,
        encoder=encoder,
        grid=tiles.name,
        tiles=len(tiles),
        features=features,
        bad_tiles=store.attributes(f"embeddings/{tiles.name}/{encoder}")["bad_tiles"],
        unchanged=unchanged,
        notes=notes,
    )


def _grid_inputs(tiles: TileGrid) -> dict[str, Any]:
    return {"imported": {"corners": hashlib.sha256(tiles.xy_l0.tobytes()).hexdigest(), "side_l0": list(tiles.side_l0)}}


def _essence(inputs: dict[str, Any]) -> Any:
    """What makes the numbers: the name of a file does not."""
    imported = inputs.get("imported")
    return (imported or {}).get("sha256", ""), inputs.get("tiles"), inputs.get("encoder")


def _conflict(store: SlideStore, tiles: TileGrid, encoder: str) -> str | None:
    """Why the tiles that are there must go first; None where they are the same, or there are none.

    Raises:
        UsageError: Other features stand on other tiles of that name.
    """
    inputs = store.inputs(f"tiles/{tiles.name}")
    if inputs is None:
        return None
    known = store.read_grid(tiles.name)
    if np.array_equal(known.xy_l0, tiles.xy_l0) and known.side_l0 == tiles.side_l0:
        return None
    slide_id = store.path.stem
    others = [name for name in store.children(f"embeddings/{tiles.name}") if name != encoder]
    if "imported" not in inputs or others:
        whose = f", on which {', '.join(others)} stands" if others else ""
        raise UsageError(
            f"{slide_id}: the grid {tiles.name} is there with other tiles ({len(known)}, not {len(tiles)} of this "
            f"file{whose}); choose another name with --grid"
        )
    return (
        f"{slide_id}: the grid {tiles.name} is there with other tiles ({len(known)}, not {len(tiles)} of this file); "
        "--replace puts these in their place, --grid NAME keeps both"
    )


def _occupied(store: SlideStore, encoder: str, grid: str, known: dict[str, Any] | None) -> str:
    imported = (known or {}).get("imported")
    whence = f"imported from another file ({imported['file']})" if imported else "computed by 'pathopipe run'"
    return (
        f"{store.path.stem}: holds {encoder} on {grid} already, {whence}; --replace puts these in their place, "
        "--encoder NAME keeps both"
    )


def _forget(store: SlideStore, grid: str, encoder: str, stale: str | None) -> Iterator[str]:
    store.clear(f"embeddings/{grid}/{encoder}")
    if stale:
        store.clear(f"tiles/{grid}")
    for model in store.prediction_models():
        found = store.predictions(model)
        if found.grid == grid:
            yield f"predictions of {model} were made from what was replaced; predict again"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_chunks(file: FeatureFile, chunk_rows: int) -> Iterator[NDArray[Any]]:
    # Only HDF5 gives parts of a file.
    whole = file.read() if file.layout in ("pt", "npz") else None
    for start in range(0, file.n_rows, chunk_rows):
        rows = np.arange(start, min(start + chunk_rows, file.n_rows))
        yield file.read(rows) if whole is None else whole[rows]


def _judge(values: NDArray[Any], dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Rows as they are stored, NaN where they can't be, and their status."""
    status = np.full(len(values), STATUS_OK, np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        stored = values.astype(dtype)
    status[~np.isfinite(stored).all(axis=1)] = STATUS_OVERFLOW
    status[~np.isfinite(values).all(axis=1)] = STATUS_NOT_FINITE
    stored[status != STATUS_OK] = np.nan
    return stored, status
