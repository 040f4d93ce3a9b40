"""Streams a slide through a model by region: windows are read and mapped once, and regions are finished behind them.

While the model works on the windows of one region, threads read those of the next, and others find, measure and store
the objects of those before.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathopipe.records import TileGrid, Tissue
from pathopipe.segmentation.blend import Said, blend_borders, common_slices
from pathopipe.segmentation.cells import expand_labels
from pathopipe.segmentation.model import Instances, Layer, Model
from pathopipe.segmentation.morphology import measure_labels
from pathopipe.segmentation.stitch import BoxPx, cut_strips, owned_by, regions_of
from pathopipe.segmentation.trace import find_runs, trace_labels, trace_runs
from pathopipe.slide.base import Slide
from pathopipe.store import PartTable, SlideStore
from pathopipe.tiles.grid import Windows
from pathopipe.tiles.read import TileBatch, TileStream

__all__ = ["CELLS", "SEGMENT_VERSION", "Plan", "SegmentReport", "plan_regions", "segment_regions"]

SEGMENT_VERSION = 1
"""Raised whenever the same settings would give other objects."""

CELLS = "cells"
"""The layer that is grown from nuclei."""

_NUCLEUS_UM = 40.0
"""No nucleus is longer; a cell's shape depends on neighbours this far beyond its own reach."""

_STRIP_PX = 16
"""How far the strips by which pieces are matched reach to either side of a region's border."""

_MOST_WORKERS = 4
"""Regions that are finished at once; each takes some hundred megabytes."""

_FAULTS_KEPT = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one slide is segmented."""

    model: Model
    layers: tuple[Layer, ...]
    """The model's layers that are wanted."""
    windows: Windows
    tissue: Tissue
    dims_l0: tuple[int, int]
    """Width and height of the slide in level-0 pixels."""
    region_px: int
    """Side of a region in the working grid; a multiple of the model's core."""
    cell_expansion_um: float | None = None
    """How far cells reach beyond their nuclei; None for no cells."""
    wanted: tuple[str, ...] = ()
    """Layers to compute; all where none is named. The others are in the store."""

    @property
    def halo_px(self) -> int:
        """What is seen around a region's core."""
        if self.cell_expansion_um is None:
            return self.model.halo_px
        reach_um = 2 * self.cell_expansion_um + _NUCLEUS_UM
        return self.model.halo_px + int(np.ceil(reach_um / min(self.windows.grid.achieved_mpp)))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers that come out."""
        names = (*(layer.name for layer in self.layers), *((CELLS,) if self.cell_expansion_um is not None else ()))
        return tuple(name for name in names if not self.wanted or name in self.wanted)


@dataclass(slots=True)
class SegmentReport:
    """What a run over regions did. The model works on the next windows while the loop looks at those before."""

    windows: int = 0
    bad_windows: int = 0
    regions: int = 0
    read_s: float = 0.0
    """Seconds of the reading threads, added up; they pass beside the loop."""
    waiting_s: float = 0.0
    """The loop waited for windows to be read."""
    model_s: float = 0.0
    """The model worked."""
    post_s: float = 0.0
    """Seconds of the post-processing threads, added up; they pass beside the loop."""
    behind_s: float = 0.0
    """The loop waited for post-processing."""
    merge_s: float = 0.0
    objects: dict[str, int] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    def seconds(self) -> dict[str, float]:
        """The times, rounded, as the store keeps them."""
        named = {
            "read": self.read_s,
            "waiting": self.waiting_s,
            "model": self.model_s,
            "objects": self.post_s,
            "behind": self.behind_s,
            "merge": self.merge_s,
        }
        return {name: round(value, 3) for name, value in named.items()}


def plan_regions(plan: Plan) -> dict[str, BoxPx]:
    """The regions that hold windows, by the names of their parts, in rows from the top."""
    per_region = plan.region_px // plan.model.core_px
    held = {(int(row), int(column)) for column, row in plan.windows.place // per_region}
    boxes = regions_of(plan.windows.size_px, plan.region_px)
    return {f"{row}-{column}": boxes[row, column] for row, column in sorted(held)}


def segment_regions(
    slide: Slide,
    store: SlideStore,
    plan: Plan,
    *,
    threads: int,
    on_windows: Callable[[int, int], None] = lambda done, total: None,
) -> SegmentReport:
    """Find the objects of every region that is not there yet and store them as parts.

    Memory is the windows of one row of regions that the next row still needs, and a few regions; it grows with the
    slide's width, not with its area or its objects.

    Args:
        slide: Where the pixels come from.
        store: Where the parts go; the layers were begun.
        plan: What to do.
        threads: How many threads read, and how many finish regions.
        on_windows: Told of windows done and windows in all.
    """
    parts = {name: store.parts(name) for name in plan.names}
    done = set.intersection(*(table.done() for table in parts.values()))
    todo = {name: box for name, box in plan_regions(plan).items() if name not in done}
    report = SegmentReport()
    if not todo:
        return report
    order, needs = _order_windows(plan, todo)
    grid = _in_order(plan.windows.grid, order)
    canvas = _Canvas(plan, Counter(window for wanted in needs.values() for window in wanted))
    batches = TileStream(slide, grid, [(0, slice(0, len(grid)))], batch_size=plan.model.batch_size, threads=threads)
    waiting: deque[Future[float]] = deque()
    workers = min(threads, _MOST_WORKERS)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="objects")
    regions = iter(todo.items())
    ahead = next(regions, None)
    mapper = ThreadPoolExecutor(1, thread_name_prefix="maps")
    try:
        for batch, maps, seconds in _mapped(plan.model, batches, mapper, report):
            # Where nothing can be read, nothing is found.
            maps[~batch.readable] = 0
            canvas.add(order[batch.rows], batch.images, maps, batch.readable)
            report.model_s += seconds
            report.read_s += batch.reading_s
            report.windows += len(maps)
            report.bad_windows += int(np.count_nonzero(~batch.readable))
            report.faults = (report.faults + batch.faults)[:_FAULTS_KEPT]
            while ahead is not None and canvas.has(needs[ahead[0]]):
                name, box = ahead
                seen = canvas.take(needs[name])
                waiting.append(pool.submit(_finish_region, plan, name, box, seen, parts))
                report.regions += 1
                ahead = next(regions, None)
                started = time.perf_counter()
                while len(waiting) > workers:
                    report.post_s += waiting.popleft().result()
                report.behind_s += time.perf_counter() - started
            on_windows(report.windows, len(grid))
        started = time.perf_counter()
        while waiting:
            report.post_s += waiting.popleft().result()
        report.behind_s += time.perf_counter() - started
    finally:
        mapper.shutdown(wait=True, cancel_futures=True)
        batches.close()
        pool.shutdown(wait=True, cancel_futures=True)
    return report


def _mapped(
    model: Model, batches: TileStream, mapper: ThreadPoolExecutor, report: SegmentReport
) -> Iterator[tuple[TileBatch, NDArray[Any], float]]:
    """Batches with their maps and the seconds these took; the model is at the next batch while one is looked at."""

    def timed(images: NDArray[np.uint8]) -> tuple[NDArray[Any], float]:
        started = time.perf_counter()
        return model.maps(images), time.perf_counter() - started

    asked = time.perf_counter()
    before: tuple[TileBatch, Future[tuple[NDArray[Any], float]]] | None = None
    for batch in batches:
        report.waiting_s += time.perf_counter() - asked
        # The stream uses its buffer again as soon as it is asked for the next batch.
        kept = replace(batch, images=batch.images.copy())
        after = (kept, mapper.submit(timed, kept.images))
        if before is not None:
            yield before[0], *before[1].result()
        before = after
        asked = time.perf_counter()
    if before is not None:
        yield before[0], *before[1].result()


def _order_windows(plan: Plan, todo: Mapping[str, BoxPx]) -> tuple[NDArray[np.int64], dict[str, list[int]]]:
    """Windows in the order in which regions want them, each once; and the windows that each region wants."""
    core_px, reach_px = plan.model.core_px, plan.halo_px + plan.model.overlap_px
    at = {(column, row): index for index, (column, row) in enumerate(plan.windows.place.tolist())}
    needs: dict[str, list[int]] = {}
    order: dict[int, None] = {}
    for name, box in todo.items():
        columns = range((box.x_px - reach_px) // core_px, (box.x_px + box.width_px + reach_px - 1) // core_px + 1)
        rows = range((box.y_px - reach_px) // core_px, (box.y_px + box.height_px + reach_px - 1) // core_px + 1)
        needs[name] = [at[column, row] for row in rows for column in columns if (column, row) in at]
        order.update(dict.fromkeys(needs[name]))
    return np.fromiter(order, np.int64, len(order)), needs


def _in_order(grid: TileGrid, order: NDArray[np.int64]) -> TileGrid:
    return replace(grid, xy_l0=grid.xy_l0[order], tissue_fraction=grid.tissue_fraction[order])


@dataclass(frozen=True, slots=True)
class _Window:
    """What one window showed."""

    place: tuple[int, int]
    """Column and row in the lattice."""
    rgb: NDArray[np.uint8]
    """(core, core, 3)"""
    maps: NDArray[Any]
    """(core + 2 overlap, core + 2 overlap, channels)"""
    readable: bool


@dataclass(frozen=True, slots=True)
class _View:
    """What a region sees: its core with a halo around."""

    maps: NDArray[Any]
    rgb: NDArray[np.uint8]
    bad_windows: int
    """Windows of its core that could not be read."""


class _Canvas:
    """Windows, kept until the last region that wants them has taken them."""

    def __init__(self, plan: Plan, wanted: Counter[int]) -> None:
        self._plan = plan
        self._wanted = wanted
        self._windows: dict[int, _Window] = {}

    def add(
        self,
        windows: NDArray[np.int64],
        images: NDArray[np.uint8],
        maps: NDArray[Any],
        readable: NDArray[np.bool_],
    ) -> None:
        """Take in a batch: images with margins, maps with overlaps."""
        margin_px, core_px = self._plan.model.margin_px, self._plan.model.core_px
        inner = slice(margin_px, margin_px + core_px)
        for index, window in enumerate(windows.tolist()):
            column, row = self._plan.windows.place[window].tolist()
            # The images' buffer is used again; and a window that stays must not keep its whole batch with it.
            self._windows[window] = _Window(
                (column, row), images[index, inner, inner].copy(), maps[index].copy(order="K"), bool(readable[index])
            )

    def has(self, windows: Sequence[int]) -> bool:
        """Whether all of some windows are there."""
        return all(window in self._windows for window in windows)

    def take(self, windows: Sequence[int]) -> list[_Window]:
        """The windows that a region sees."""
        taken = [self._windows[window] for window in windows]
        for window in windows:
            self._wanted[window] -= 1
            if not self._wanted[window]:
                del self._windows[window]
        return taken


def _put_together(plan: Plan, box: BoxPx, windows: Sequence[_Window]) -> _View:
    """What a region sees; where no window has its core, it is white and nothing is there."""
    halo_px, core_px, overlap_px = plan.halo_px, plan.model.core_px, plan.model.overlap_px
    height, width = box.height_px + 2 * halo_px, box.width_px + 2 * halo_px
    rgb = np.full((height, width, 3), 255, np.uint8)
    # A plane of memory for each channel: that is how models look at them.
    maps = np.zeros((windows[0].maps.shape[-1], height, width), windows[0].maps.dtype).transpose(1, 2, 0)
    known = np.zeros((height, width), np.bool_)
    corners = [_corner(plan, box, window) for window in windows]
    bad_windows = 0
    for window, (x, y) in zip(windows, corners, strict=True):
        (rows, from_rows), (columns, from_columns) = common_slices(y, core_px, height), common_slices(x, core_px, width)
        own = slice(overlap_px, overlap_px + core_px)
        rgb[rows, columns] = window.rgb[from_rows, from_columns]
        maps[rows, columns] = window.maps[own, own][from_rows, from_columns]
        known[rows, columns] = window.readable
        is_own = halo_px <= x < halo_px + box.width_px and halo_px <= y < halo_px + box.height_px
        bad_windows += is_own and not window.readable
    if overlap_px:
        said = [Said(*corner, window.maps) for window, corner in zip(windows, corners, strict=True) if window.readable]
        blend_borders(maps, known, said, core_px=core_px, overlap_px=overlap_px, categorical=plan.model.categorical)
    return _View(maps, rgb, bad_windows)


def _corner(plan: Plan, box: BoxPx, window: _Window) -> tuple[int, int]:
    """Where the core of a window begins in the view of a region, x then y."""
    core_px, halo_px = plan.model.core_px, plan.halo_px
    return window.place[0] * core_px - box.x_px + halo_px, window.place[1] * core_px - box.y_px + halo_px


def _finish_region(plan: Plan, name: str, box: BoxPx, seen: Sequence[_Window], parts: Mapping[str, PartTable]) -> float:
    """Find, measure and store the objects of one region; returns the seconds it took."""
    started = time.perf_counter()
    view = _put_together(plan, box, seen)
    found = plan.model.instances(view.maps)
    columns: dict[str, dict[str, NDArray[Any]]] = {}
    for layer in plan.layers:
        if layer.joined:
            columns[layer.name] = _joined_part(plan, box, found[layer.name])
        else:
            with_cells = layer.name == "nuclei" and plan.cell_expansion_um is not None
            columns.update(_owned_part(plan, box, layer.name, found[layer.name], view.rgb, with_cells=with_cells))
    for layer_name, table in parts.items():
        table.write(name, {**columns[layer_name], "bad_windows": np.asarray(view.bad_windows)})
    return time.perf_counter() - started


def _owned_part(
    plan: Plan, box: BoxPx, layer: str, instances: Instances, rgb: NDArray[np.uint8], *, with_cells: bool
) -> dict[str, dict[str, NDArray[Any]]]:
    """The objects whose centroid lies in the core and in tissue, and the cells around them; by layer."""
    halo_px, mpp = plan.halo_px, plan.windows.grid.achieved_mpp
    origin_px = (box.x_px - halo_px, box.y_px - halo_px)
    measured = measure_labels(instances.labels, rgb, mpp=mpp, origin_px=origin_px)
    own = owned_by(box, measured.centroid_px) & _in_tissue(plan, measured.centroid_px)
    # In the order that all objects of the slide will have, so that merging only interleaves.
    rows = np.flatnonzero(own)
    rows = rows[np.lexsort((measured.centroid_px[rows, 0], measured.centroid_px[rows, 1]))]
    numbers = rows + 1
    outlines = trace_labels(instances.labels, origin_px=origin_px, scale_l0=plan.windows.factor_l0, numbers=numbers)
    common = {
        "centroid_px": measured.centroid_px[rows],
        "class_id": instances.class_id[rows],
        "class_probability": instances.class_probability[rows],
    }
    found = {layer: {**common, "measurements": measured.values[rows], **outlines._asdict()}}
    if plan.cell_expansion_um is None or not with_cells:
        return found
    reach_px = (plan.cell_expansion_um / mpp[0], plan.cell_expansion_um / mpp[1])
    cells = expand_labels(instances.labels, reach_px, limit=_on_slide(plan, origin_px, instances.labels.shape))
    measured = measure_labels(cells, rgb, mpp=mpp, origin_px=origin_px, numbers=numbers)
    outlines = trace_labels(cells, origin_px=origin_px, scale_l0=plan.windows.factor_l0, numbers=numbers)
    return {**found, CELLS: {**common, "measurements": measured.values, **outlines._asdict()}}


def _on_slide(plan: Plan, origin_px: tuple[int, int], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """(height, width) True for the pixels of a view that lie on the slide."""
    inside: NDArray[np.bool_] = np.zeros(shape, np.bool_)
    width_px, height_px = plan.windows.size_px
    inside[max(-origin_px[1], 0) : height_px - origin_px[1], max(-origin_px[0], 0) : width_px - origin_px[0]] = True
    return inside


def _joined_part(plan: Plan, box: BoxPx, instances: Instances) -> dict[str, NDArray[Any]]:
    """The pieces of large objects in the core, and what is seen at its borders."""
    halo_px = plan.halo_px
    core = instances.labels[halo_px : halo_px + box.height_px, halo_px : halo_px + box.width_px]
    # Most layers are not in most regions.
    framed = np.pad(core if len(instances.class_id) else core[:0], 1)
    runs = find_runs(framed)
    area_px = np.bincount(runs.label, runs.stop - runs.start, minlength=len(instances.class_id) + 1)[1:].astype(
        np.int64
    )
    numbers = np.flatnonzero(area_px) + 1
    origin_px = (box.x_px, box.y_px)
    outlines = trace_runs(framed, runs, numbers, origin_px=origin_px, scale_l0=plan.windows.factor_l0)
    part: dict[str, NDArray[Any]] = {
        "label": numbers.astype(np.int32),
        "class_id": instances.class_id[numbers - 1],
        "class_probability": instances.class_probability[numbers - 1],
        "area_px": area_px[numbers - 1],
        **outlines._asdict(),
    }
    for side, strip in cut_strips(instances.labels, halo_px, min(halo_px, _STRIP_PX)).items():
        part[f"{side}_at"], part[f"{side}_label"] = strip.at, strip.label
    return part


def _in_tissue(plan: Plan, centroid_px: NDArray[np.float64]) -> NDArray[np.bool_]:
    mask = plan.tissue.mask
    scale = np.asarray(plan.windows.factor_l0) * mask.shape[::-1] / plan.dims_l0  # mask pixels a working pixel
    column, row = np.minimum((centroid_px * scale).astype(np.int64), np.asarray(mask.shape[::-1]) - 1).T
    inside: NDArray[np.bool_] = mask[row, column] > 0
    return inside
