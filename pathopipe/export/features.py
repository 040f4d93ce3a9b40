"""Embeddings of a store as feature files of other programs: the good tiles, in the order of the store."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import StoreError, UsageError
from pathopipe.layouts import Layout, TileFeatures, write_hdf5, write_pt
from pathopipe.records import STATUS_OK, Level, TileGrid
from pathopipe.registry import nearest
from pathopipe.store import EmbeddingArray, SlideStore, digest

__all__ = [
    "FeatureExport",
    "GoodTiles",
    "choose_embeddings",
    "export_hdf5",
    "export_pt",
    "known_embeddings",
    "read_good_tiles",
]

_KEPT = ("license", "warning", "feature_names")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureExport:
    """The features of one slide that were written."""

    slide_id: str
    encoder: str
    grid: str
    files: tuple[Path, ...]
    """The features first; none for an empty slide in a layout that has no files for these."""
    tiles: int
    left_out: int
    """Tiles that were quarantined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodTiles:
    """The tiles of one slide whose embedding is sound."""

    tiles: TileFeatures
    rows: NDArray[np.intp]
    """(n,) row of each in the store."""
    dtype: str
    """Type of the stored numbers."""
    left_out: int
    recipe: dict[str, Any]
    """What the store says of the encoder and how it was run."""


def known_embeddings(store: SlideStore) -> list[tuple[str, str]]:
    """Grid and encoder of all embeddings that were begun."""
    return [(grid, encoder) for grid in store.grids() for encoder in store.encoders(grid)]


def choose_embeddings(
    known: Sequence[tuple[str, str]], *, encoder: str | None = None, grid: str | None = None
) -> tuple[str, str]:
    """Grid and encoder that are meant; either may be left out where there is only one that fits.

    Args:
        known: Grid and encoder of all that there are, of one slide or several.
        encoder: As the user says.
        grid: As the user says.

    Raises:
        UsageError: A name is unknown, or one must be chosen; names the choices.
    """
    if not known:
        raise UsageError("no embeddings here; compute some with 'pathopipe run SLIDE --out DIR'")
    for position, what, wanted in ((1, "encoder", encoder), (0, "grid", grid)):
        names = sorted({pair[position] for pair in known})
        if wanted is not None and wanted not in names:
            raise UsageError(f"--{what} {wanted}: no such {what}; {nearest(wanted, names)}")
    fitting = sorted({pair for pair in known if grid in (None, pair[0]) and encoder in (None, pair[1])})
    if not fitting:
        raise UsageError(f"no embeddings of {encoder} on {grid}; there are: {_listed(sorted(set(known)))}")
    for position, what in ((1, "encoder"), (0, "grid")):
        names = sorted({pair[position] for pair in fitting})
        if len(names) > 1:
            raise UsageError(f"embeddings of several {what}s ({', '.join(names)}); choose one with --{what}")
    return fitting[0]


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{encoder} on {grid}" for grid, encoder in pairs)


def read_good_tiles(store: SlideStore, grid: str, encoder: str) -> GoodTiles:
    """Look at the embeddings of one slide; their numbers are read when they are asked for.

    Raises:
        StoreError: There are none, chunks are missing, or they don't fit the grid.
    """
    slide_id = str(store.slide["id"])
    if (grid, encoder) not in known_embeddings(store):
        there = _listed(known_embeddings(store)) or "none"
        raise StoreError(
            f"{slide_id}: no embeddings of {encoder} on {grid} (there are: {there}); 'pathopipe run' computes them",
            slide_id=slide_id,
        )
    array = store.embeddings(grid, encoder)
    missing = array.n_chunks - len(array.done_chunks())
    if missing:
        raise StoreError(
            f"{slide_id}: {encoder} on {grid} lacks {missing} of {array.n_chunks} chunks; run the same command as "
            "before again to complete it, then export",
            slide_id=slide_id,
        )
    tiles = store.read_grid(grid)
    if len(tiles) != array.rows:
        raise StoreError(
            f"{slide_id}: {len(tiles)} tiles on {grid} beside {array.rows} rows of {encoder}; compute the embeddings "
            "anew with --fresh embed",
            slide_id=slide_id,
        )
    slide = store.slide
    if slide["mpp"] is None:
        raise StoreError(
            f"{slide_id}: the store knows no micrometres per pixel; run it again with --mpp", slide_id=slide_id
        )
    rows = np.flatnonzero(array.read_status() == STATUS_OK)
    about = array.attributes
    identity = about["inputs"].get("encoder", {})
    recipe = {
        "encoder": identity,
        **{key: about[key] for key in _KEPT if key in about},
        "grid": grid,
        "inputs": digest(about["inputs"]),
    }
    level = slide["levels"][tiles.level]
    return GoodTiles(
        tiles=TileFeatures(
            slide_id=slide_id,
            encoder=encoder,
            grid=_take(tiles, rows),
            mpp_l0=(slide["mpp"][0], slide["mpp"][1]),
            dims_l0=(slide["dims_l0"][0], slide["dims_l0"][1]),
            level=Level(**{**level, "scales": tuple(level["scales"])}),
            features=array.features,
            recipe=digest({"encoder": identity, "grid": grid})[:8],
            blocks=_blocks(array, rows, slide_id),
        ),
        rows=rows,
        dtype=array.dtype,
        left_out=array.rows - len(rows),
        recipe=recipe,
    )


def _take(grid: TileGrid, rows: NDArray[np.intp]) -> TileGrid:
    return replace(
        grid,
        xy_l0=grid.xy_l0[rows],
        tissue_fraction=grid.tissue_fraction[rows],
        cellularity=None if grid.cellularity is None else grid.cellularity[rows],
    )


def _blocks(array: EmbeddingArray, rows: NDArray[np.intp], slide_id: str) -> Callable[[], Iterator[NDArray[Any]]]:
    def read() -> Iterator[NDArray[Any]]:
        for chunk in range(array.n_chunks):
            place = array.chunk_slice(chunk)
            try:
                values = array.read_values(place)
            except (ValueError, OSError) as error:
                raise StoreError(
                    f"{slide_id}: chunk {chunk} of the embeddings can't be read ({type(error).__name__}); 'pathopipe "
                    "verify' says what is damaged, 'pathopipe run --retry-bad' computes it again",
                    slide_id=slide_id,
                ) from error
            first, last = np.searchsorted(rows, (place.start, place.stop))
            yield values[rows[first:last] - place.start]

    return read


def export_hdf5(folder: Path, store: SlideStore, grid: str, encoder: str, layout: Layout) -> FeatureExport:
    """Write one slide's features as HDF5, as :func:`pathopipe.layouts.write_hdf5` does.

    Raises:
        StoreError: The embeddings are not complete, damaged, or too large for the layout.
        StoreWriteError: The disk is full, or the folder can't be written.
    """
    good = read_good_tiles(store, grid, encoder)
    return _report(good, write_hdf5(folder, good.tiles, layout))


def export_pt(folder: Path, store: SlideStore, grid: str, encoder: str, layout: Layout) -> FeatureExport:
    """Write one slide's features as a tensor, as :func:`pathopipe.layouts.write_pt` does.

    Raises:
        UsageError: The layout has no such files.
        StoreError: The embeddings are not complete, or damaged.
        StoreWriteError: The disk is full, or the folder can't be written.
    """
    good = read_good_tiles(store, grid, encoder)
    return _report(good, write_pt(folder, good.tiles, layout))


def _report(good: GoodTiles, files: list[Path]) -> FeatureExport:
    return FeatureExport(
        slide_id=good.tiles.slide_id,
        encoder=good.tiles.encoder,
        grid=good.tiles.grid.name,
        files=tuple(files),
        tiles=len(good.tiles.grid),
        left_out=good.left_out,
    )
