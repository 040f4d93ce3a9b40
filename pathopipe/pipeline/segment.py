"""The objects of one slide: tissue, windows, regions, merged layers. No science in here."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pathopipe
from pathopipe.config import Config
from pathopipe.errors import TooManyBadTilesError, UsageError
from pathopipe.pipeline.common import RunPlan, inputs_below, opened, thumbnail_path, tissue_stage, write_pictures
from pathopipe.records import SlideRef, Tissue
from pathopipe.report.objects import draw_fields, draw_objects
from pathopipe.report.thumbnail import write_png
from pathopipe.report.tile_types import TISSUE_TYPES, write_tile_types
from pathopipe.segmentation.classical import ClassicalNuclei
from pathopipe.segmentation.merge import merge_layers
from pathopipe.segmentation.model import Model
from pathopipe.segmentation.segment import CELLS, SEGMENT_VERSION, Plan, SegmentReport, segment_regions
from pathopipe.slide.base import Slide
from pathopipe.slide.resolution import require_mpp
from pathopipe.store import SlideStore, digest, store_path
from pathopipe.store.claims import claimed
from pathopipe.tiles.grid import plan_windows

__all__ = [
    "Finder",
    "SegmentOutcome",
    "fields_picture_path",
    "objects_picture_path",
    "open_finder",
    "segment_slide",
    "tile_types_path",
]

_SHIPPED_NOTE = (
    "the shipped weights are a starting point: look at the pictures; docs/segmentation.md says how to train your own "
    "('pathopipe segmenter train') and use them (--weights FILE)"
)
_DARK_FIELD_NOTE = (
    "a dark-field slide, which the shipped network does not know: its nuclei were found by the model 'classical'"
)


@dataclass(frozen=True, slots=True)
class SegmentOutcome:
    """What the objects of one slide came to."""

    slide_id: str
    objects: Mapping[str, int]
    """How many, by layer."""
    did: tuple[str, ...]
    """Layers that were computed now; the rest was in the store."""
    tissue_mm2: float
    flags: tuple[str, ...]
    problems: tuple[str, ...]
    bad_windows: int
    seconds: float
    report: SegmentReport
    notes: tuple[str, ...] = ()
    """What a user should know of the model that was used."""
    tables: tuple[Path, ...] = ()
    """Tables of tissue types by tile that were written."""


@dataclass(frozen=True, slots=True)
class Finder:
    """A model, and what to say of it."""

    model: Model
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    only: Callable[[Collection[str]], Model] | None = None
    """Leaves out what some layers don't need."""


def open_finder(plan: RunPlan) -> Finder:
    """The model that ``config.segment`` asks for, which finds every layer that it asks for.

    Raises:
        UsageError: It does not, its weights can't be used, or its device is not there.
    """
    finder = Finder(ClassicalNuclei()) if plan.config.segment.model == "classical" else _open_network(plan)
    _settle_tasks(plan.config, finder.model)
    return finder


def objects_picture_path(out: Path, slide_id: str) -> Path:
    """Where the picture of a slide's objects goes."""
    return out / "thumbnails" / f"{slide_id}.objects.png"


def fields_picture_path(out: Path, slide_id: str) -> Path:
    """Where the picture of a few larger fields goes, with the objects of all layers."""
    return out / "thumbnails" / f"{slide_id}.fields.png"


def tile_types_path(out: Path, slide_id: str, grid: str) -> Path:
    """Where the tissue types of a slide's tiles go."""
    return out / "tissue_types" / f"{slide_id}.{grid}.csv"


def segment_slide(
    ref: SlideRef,
    plan: RunPlan,
    *,
    finder: Finder | None = None,
    fresh: bool = False,
    on_windows: Callable[[int, int], None] = lambda done, total: None,
) -> SegmentOutcome:
    """Find the objects of one slide; tissue comes first where it is not there yet.

    Args:
        ref: The slide.
        plan: ``config.segment`` says what to find; its ``stages``, ``fresh`` and ``retry_bad`` are of other stages.
        finder: From :func:`open_finder` with the same plan, for slide after slide; opened here where None.
        fresh: Forget the layers concerned first.
        on_windows: Told of windows done and windows in all.

    Raises:
        UsageError: The model does not find what is asked for, or its weights can't be used.
        TooManyBadTilesError: More windows than ``segment.max_bad_share`` can't be read; what was found is kept.
        PathopipeError: The slide can't be done; finished regions are kept.
    """
    started = time.perf_counter()
    config = plan.config
    finder = finder if finder is not None else open_finder(plan)
    lock = SlideStore(store_path(plan.out, ref.slide_id)).writing_objects()
    with opened(ref, config) as slide, lock:
        # Tissue is the ground of `run` as well; only one of the two may be at it.
        with claimed(plan.out, ref.slide_id):
            store = SlideStore.create_or_open(
                store_path(plan.out, ref.slide_id), slide.info, created_by=f"pathopipe {pathopipe.__version__}"
            )
            store.remove_leftovers()
            tissue, found_tissue = tissue_stage(slide, store, config, None)
            if found_tissue or not thumbnail_path(plan.out, ref.slide_id).exists():
                write_pictures(slide, store, plan, tissue, None, again=found_tissue)
        if "dark-field" in tissue.flags:
            finder = _for_dark_field(finder, config)
        tasks = _settle_tasks(config, finder.model)
        segment_plan = _segment_plan(slide, tissue, finder.model, config, tasks)
        inputs = _object_inputs(store, segment_plan, config)
        for layer in inputs:
            # What is only stood on is not forgotten: it may be someone's corrections.
            if fresh and layer in tasks:
                store.clear_objects(layer)
        pending = [name for name in inputs if not store.require_inputs(f"objects/{name}", "segment", inputs[name])]
        report = SegmentReport()
        if pending:
            for name in pending:
                store.begin_objects(name, inputs[name], regions=f"{segment_plan.region_px}px")
            report = segment_regions(
                slide, store, _narrowed(segment_plan, finder, pending), threads=plan.threads, on_windows=on_windows
            )
            merging = time.perf_counter()
            about = {"mpp": segment_plan.windows.grid.achieved_mpp, "seconds": report.seconds(), **finder.about}
            merge_layers(store, segment_plan, inputs, about)
            report.merge_s = time.perf_counter() - merging
        _write_objects_pictures(slide, store, plan.out, list(inputs), again=bool(pending))
        tables = _write_tile_types(store, plan.out) if TISSUE_TYPES in inputs else ()
    bad_windows = max(store.objects(name).attributes["bad_windows"] for name in inputs)
    n_windows = len(segment_plan.windows.grid)
    if bad_windows > config.segment.max_bad_share * n_windows:
        first = f"; the first: {report.faults[0]}" if report.faults else ""
        raise TooManyBadTilesError(
            f"{ref.slide_id}: {bad_windows} of {n_windows} windows can't be read, more than segment.max_bad_share="
            f"{config.segment.max_bad_share:g}; what was found elsewhere is kept; mend the file and use --fresh{first}",
            slide_id=ref.slide_id,
        )
    return SegmentOutcome(
        slide_id=ref.slide_id,
        objects={name: len(store.objects(name)) for name in inputs},
        did=tuple(pending),
        tissue_mm2=round(sum(tissue.areas_mm2), 3),
        flags=tissue.flags,
        problems=tuple(store.slide["problems"]),
        bad_windows=bad_windows,
        seconds=time.perf_counter() - started,
        report=report,
        notes=finder.notes if pending else (),
        tables=tables,
    )


def _open_network(plan: RunPlan) -> Finder:
    from pathopipe.segmentation.learned import open_model  # torch takes seconds, and classical nuclei don't need it

    settings = plan.config.segment
    model = open_model(
        settings.weights,
        device=settings.device,
        precision=settings.precision,
        batch_size=settings.batch_size,
        threads=plan.threads,
    )
    weights = settings.weights.name if settings.weights is not None else "shipped"
    notes = (_SHIPPED_NOTE,) if settings.weights is None else ()
    return Finder(model, {**model.about, "weights_file": weights}, notes, model.only)


def _for_dark_field(finder: Finder, config: Config) -> Finder:
    if config.segment.weights is not None:
        return finder  # whoever trained it knows what for
    notes = (_DARK_FIELD_NOTE,) if config.segment.model == "network" else ()
    return Finder(ClassicalNuclei(dark_field=True), notes=notes)


def _settle_tasks(config: Config, model: Model) -> tuple[str, ...]:
    """The layers that are asked for: all that the model finds where none is named."""
    found = tuple(layer.name for layer in model.layers)
    known = (*found, *((CELLS,) if "nuclei" in found else ()))
    for task in config.segment.tasks:
        if task not in known:
            raise UsageError(
                f"segment.tasks: the model '{model.identity['name']}' does not find '{task}'; "
                f"it finds {', '.join(known[:-1])} and {known[-1]}"
                if len(known) > 1
                else f"segment.tasks: these weights do not find '{task}', but {known[0]} alone"
            )
    return config.segment.tasks or found


def _narrowed(plan: Plan, finder: Finder, pending: Collection[str]) -> Plan:
    """The plan for the layers that are still to be found, with no more of the model than they need."""
    needed = {*pending, *(("nuclei",) if CELLS in pending else ())}
    model = finder.only(needed) if finder.only is not None else plan.model
    layers = tuple(layer for layer in plan.layers if layer.name in needed)
    return replace(plan, model=model, layers=layers, wanted=tuple(pending))


def _write_objects_pictures(slide: Slide, store: SlideStore, out: Path, layers: list[str], *, again: bool) -> None:
    for path, draw in (
        (objects_picture_path(out, slide.info.slide_id), draw_objects),
        (fields_picture_path(out, slide.info.slide_id), draw_fields),
    ):
        if again or not path.exists():
            drawn = draw(slide, store, layers)
            if drawn is not None:
                write_png(path, drawn)


def _write_tile_types(store: SlideStore, out: Path) -> tuple[Path, ...]:
    """The tissue types of the tiles of every grid; written anew each time, for grids may have come or changed."""
    paths = []
    for grid in store.grids():
        paths.append(tile_types_path(out, store.path.stem, grid))
        write_tile_types(paths[-1], store, grid)
    return tuple(paths)


def _segment_plan(slide: Slide, tissue: Tissue, model: Model, config: Config, tasks: tuple[str, ...]) -> Plan:
    settings = config.segment
    windows = plan_windows(
        slide.info,
        require_mpp(slide.info),
        tissue,
        mpp=model.mpp,
        core_px=model.core_px,
        margin_px=model.margin_px,
        allow_enlarge=settings.allow_enlarge,
    )
    with_cells = CELLS in tasks
    wanted = {*tasks, *(("nuclei",) if with_cells else ())}
    return Plan(
        model=model,
        layers=tuple(layer for layer in model.layers if layer.name in wanted),
        windows=windows,
        tissue=tissue,
        dims_l0=slide.info.dims_l0,
        region_px=-(-settings.region_px // model.core_px) * model.core_px,
        cell_expansion_um=settings.cell_expansion_um if with_cells else None,
    )


def _object_inputs(store: SlideStore, plan: Plan, config: Config) -> dict[str, dict[str, Any]]:
    """What each layer is computed from, by its name. The size of regions is not among it: it changes no object."""
    common = {
        "version": SEGMENT_VERSION,
        "tissue": digest(inputs_below(store, "tissue", "tissue")),
        "model": plan.model.identity,
        "allow_enlarge": config.segment.allow_enlarge,
    }
    inputs = {layer.name: common for layer in plan.layers}
    if plan.cell_expansion_um is not None:
        inputs[CELLS] = {**common, "cell_expansion_um": plan.cell_expansion_um}
    return inputs
