"""The maps of one prediction: pictures, QuPath tiles, rasters, contact sheet and faithfulness, a folder a slide."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import UsageError
from pathopipe.export.objects import write_tiles
from pathopipe.files import durable_file
from pathopipe.mil.heatmap import TileMap, extreme_tiles, read_maps, tile_percentiles, tile_raster
from pathopipe.mil.predict import Ensemble, Faithfulness, Prediction, measure_faithfulness, store_prediction
from pathopipe.records import TileGrid
from pathopipe.report.mil_pictures import (
    MapCaption,
    background_from_mask,
    read_picture,
    write_contact_sheet,
    write_heatmap,
    write_ome_tiff,
    write_rgb_tiff,
)
from pathopipe.slide.open import open_slide
from pathopipe.slide.overview import read_overview
from pathopipe.store import SlideStore
from pathopipe.tiles.read import read_tile

__all__ = ["draw_slide"]

_OVERVIEW_PX = 1600
_MOST_VALUES = 30


def draw_slide(
    ensemble: Ensemble,
    prediction: Prediction,
    covariates: list[NDArray[np.float32] | None],
    wanted: Sequence[str],
    files: Mapping[str, Path],
    out: Path,
    tiles: int,
) -> Iterator[str]:
    """Draw the maps of a bag's slides that are wanted; yields what to tell.

    Raises:
        UsageError: The head marks no tiles, or a slide's file is not the one that the store was made from.
    """
    stores = store_prediction(ensemble, prediction)
    faithfulness = [
        measure_faithfulness(ensemble, prediction, covariates, target=number) for number in range(len(ensemble.targets))
    ]
    for store in stores:
        slide_id = store.path.name.removesuffix(".zarr")
        if slide_id in wanted:
            yield from _draw_store(
                ensemble, prediction, faithfulness, store, files.get(slide_id), out / slide_id, tiles
            )


def _draw_store(
    ensemble: Ensemble,
    prediction: Prediction,
    faithfulness: Sequence[Faithfulness | None],
    store: SlideStore,
    file: Path | None,
    folder: Path,
    n_tiles: int,
) -> Iterator[str]:
    grid, every_map, about = read_maps(store, ensemble.name)
    # The mean head weighs all tiles alike: there is nothing to see in its attention, but in its contributions.
    maps = [one for one in every_map if np.nanmin(one.values) < np.nanmax(one.values)] or every_map[:1]
    slide_id = store.slide["id"]
    dims_l0 = (int(store.slide["dims_l0"][0]), int(store.slide["dims_l0"][1]))
    mpp = None if store.slide["mpp"] is None else (float(store.slide["mpp"][0]), float(store.slide["mpp"][1]))
    said = [_say(ensemble, prediction, number) for number in range(len(ensemble.targets))]
    measured = [one.line() for one in faithfulness if one is not None]
    picture = _background(store, file, slide_id, grid)
    rasters = []
    for one in maps:
        shown = tile_percentiles(one.values) if one.kind == "attention" else one.values
        raster = tile_raster(grid, dims_l0, shown)
        rasters.append(tile_raster(grid, dims_l0, one.values))
        label = f" for {one.label}" if one.label else ""
        scale = "contribution to the logit" if one.kind == "contribution" else "attention, rank among the slide's tiles"
        caption = MapCaption(
            title=f"{slide_id}: {one.kind}{label} of {about['head']}, {_folds(about)}",
            scale=scale + label,
            lines=(*said, *measured),
        )
        stem = _stem(one)
        write_heatmap(folder / f"{slide_id}.{stem}.png", picture, raster, one.kind, dims_l0, mpp, caption)
        write_rgb_tiff(folder / f"{slide_id}.{stem}.ome.tiff", slide_id, raster, one.kind, mpp)
    write_ome_tiff(folder / f"{slide_id}.maps.ome.tiff", slide_id, maps, rasters, mpp)
    _write_qupath_tiles(folder / f"{slide_id}.tiles.geojson", store, ensemble.name, grid, maps)
    if file is not None:
        _write_extremes(folder / f"{slide_id}.extremes.png", store, file, grid, maps[0], n_tiles)
    document = {
        "slide_id": slide_id,
        "model": ensemble.name,
        **{key: about[key] for key in ("bag_id", "head", "encoder", "weights", "seen", "folds", "probabilities")},
        "faithfulness": [None if one is None else asdict(one) for one in faithfulness],
        "maps": about["maps"],
        "tiles": int(np.isfinite(maps[0].values).sum()),
    }
    with durable_file(folder / f"{slide_id}.json") as written:
        written.write(json.dumps(document, indent=1, allow_nan=False).encode())
    yield f"{slide_id}: {'; '.join(said)} ({_folds(about)})"
    for one in every_map:
        if not any(one is drawn for drawn in maps):
            yield f"  {one.name.lower()} is the same on all tiles and is not drawn"
    for line in measured:
        yield f"  {line}"
    yield f"  maps: {folder}" + ("" if file is not None else "; give --slide FILE for the highest and lowest tiles")


def _say(ensemble: Ensemble, prediction: Prediction, number: int) -> str:
    spec = ensemble.targets[number]
    values = prediction.probabilities[spec.name]
    if not spec.classes:
        return f"{spec.name}: {values[0]:.3g}"
    order = [1] if spec.kind == "binary" else np.argsort(-values)[:3].tolist()
    return f"{spec.name}: " + ", ".join(f"{spec.classes[at]} {values[at]:.3f}" for at in order)


def _folds(about: Mapping[str, Any]) -> str:
    folds = ", ".join(about["folds"])
    match about["seen"]:
        case "test":
            return f"{folds}, which had it in the test part"
        case "new":
            return (
                f"{folds}, not seen in training"
                if len(about["folds"]) == 1
                else f"mean of {folds}, not seen in training"
            )
        case _:
            return f"{folds}, SEEN IN TRAINING"


def _stem(one: TileMap) -> str:
    label = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in one.label)
    return one.kind + (f"-{label}" if label else "")


def _background(store: SlideStore, file: Path | None, slide_id: str, grid: TileGrid) -> NDArray[np.uint8]:
    """The slide at low power: from its file where that is given, else the run's picture, its tissue mask, its tiles."""
    if file is not None:
        slide = open_slide(file, slide_id=slide_id, mpp=(store.slide["mpp"] or [None])[0])
        try:
            if slide.info.fingerprint != store.slide["fingerprint"]:
                raise UsageError(f"{file}: not the slide that the store of {slide_id} was made from; give that file")
            longest_um = max(
                side * (store.slide["mpp"] or [1, 1])[axis] for axis, side in enumerate(slide.info.dims_l0)
            )
            return read_overview(slide, longest_um / _OVERVIEW_PX)
        finally:
            slide.close()
    picture = read_picture(store.path.parent.parent / "thumbnails" / f"{slide_id}.png")
    if picture is not None:
        return picture
    if store.inputs("tissue") is not None:
        return background_from_mask(store.read_tissue().mask)
    # Imported features know no tissue: their tiles are all that there is.
    dims_l0 = (int(store.slide["dims_l0"][0]), int(store.slide["dims_l0"][1]))
    tiles = tile_raster(grid, dims_l0, np.ones(len(grid), np.float32)).values
    return background_from_mask(np.isfinite(tiles).astype(np.uint8))


def _write_qupath_tiles(path: Path, store: SlideStore, model: str, grid: TileGrid, maps: Sequence[TileMap]) -> None:
    values: dict[str, NDArray[np.float32]] = {}
    for one in maps:
        if one.kind == "attention":
            values[f"{one.name} rank"] = tile_percentiles(one.values)
        values[one.name] = one.values
    seen = np.flatnonzero(np.isfinite(maps[0].values))
    bounds = store.slide["bounds_l0"]
    kept = dict(list(values.items())[:_MOST_VALUES])
    write_tiles(
        path,
        store.slide["id"],
        model,
        grid.xy_l0[seen],
        (float(grid.side_l0[0]), float(grid.side_l0[1])),
        {name: column[seen] for name, column in kept.items()},
        offset_l0=(0.0, 0.0) if bounds is None else (float(bounds[0]), float(bounds[1])),
    )


def _write_extremes(path: Path, store: SlideStore, file: Path, grid: TileGrid, one: TileMap, n_tiles: int) -> None:
    """Read the tiles at both ends of a map, and no others."""
    ranks = tile_percentiles(one.values)
    top, bottom = extreme_tiles(one.values, n_tiles)
    if not len(top):
        return
    slide = open_slide(file, slide_id=store.slide["id"], mpp=(store.slide["mpp"] or [None])[0])
    try:
        rows = [
            (name, [(read_tile(slide, grid, row), _under(grid, one, ranks, row)) for row in chosen.tolist()])
            for name, chosen in ((f"highest {one.name.lower()}", top), (f"lowest {one.name.lower()}", bottom))
        ]
    finally:
        slide.close()
    side_um = grid.side_px * grid.achieved_mpp[0]
    write_contact_sheet(path, rows, f"{store.slide['id']}: tiles of {side_um:.0f} µm; rank, corner in level-0 pixels")


def _under(grid: TileGrid, one: TileMap, ranks: NDArray[np.float32], row: int) -> str:
    value = f"{ranks[row]:.3f}" if one.kind == "attention" else f"{one.values[row]:.3g}"
    return f"{value}\n({grid.xy_l0[row, 0]}, {grid.xy_l0[row, 1]})"
