"""The objects of one slide: tissue, windows, regions, merged layers. No science in here."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pathopipe
from pathopipe.config import Config
from pathopipe.errors import TooManyBadTilesError, UsageError
from pathopipe.pipeline.common import RunPlan, inputs_below, opened, thumbnail_path, tissue_stage, write_pictures
from pathopipe.records import SlideRef, Tissue
from pathopipe.report.objects import draw_objects
from pathopipe.report.thumbnail import write_png
from pathopipe.segmentation.classical import ClassicalNuclei
from pathopipe.segmentation.merge import merge_layers
from pathopipe.segmentation.model import Model
from pathopipe.segmentation.segment import CELLS, SEGMENT_VERSION, Plan, SegmentReport, segment_regions
from pathopipe.slide.base import Slide
from pathopipe.slide.resolution import require_mpp
from pathopipe.store import SlideStore, digest, store_path
from pathopipe.tiles.grid import plan_windows

__all__ = ["SegmentOutcome", "objects_picture_path", "segment_slide"]


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


def objects_picture_path(out: Path, slide_id: str) -> Path:
    """Where the picture of a slide's objects goes."""
    return out / "thumbnails" / f"{slide_id}.objects.png"


def segment_slide(
    ref: SlideRef,
    plan: RunPlan,
    *,
    fresh: bool = False,
    on_windows: Callable[[int, int], None] = lambda done, total: None,
) -> SegmentOutcome:
    """Find the objects of one slide; tissue comes first where it is not there yet.

    Args:
        ref: The slide.
        plan: ``config.segment`` says what to find; its ``stages``, ``fresh`` and ``retry_bad`` are of other stages.
        fresh: Forget the layers concerned first.
        on_windows: Told of windows done and windows in all.

    Raises:
        UsageError: The model does not find what is asked for.
        TooManyBadTilesError: More windows than ``segment.max_bad_share`` can't be read; what was found is kept.
        PathopipeError: The slide can't be done; finished regions are kept.
    """
    started = time.perf_counter()
    config = plan.config
    _check_tasks(config)
    lock = SlideStore(store_path(plan.out, ref.slide_id)).writing_objects()
    with opened(ref, config) as slide, lock:
        store = SlideStore.create_or_open(
            store_path(plan.out, ref.slide_id), slide.info, created_by=f"pathopipe {pathopipe.__version__}"
        )
        store.remove_leftovers()
        tissue, found_tissue = tissue_stage(slide, store, config, None)
        if found_tissue or not thumbnail_path(plan.out, ref.slide_id).exists():
            write_pictures(slide, store, plan, tissue, None, again=found_tissue)
        model = ClassicalNuclei(dark_field="dark-field" in tissue.flags)
        segment_plan = _segment_plan(slide, tissue, model, config)
        inputs = _object_inputs(store, segment_plan, config)
        for layer in inputs:
            # What is only stood on is not forgotten: it may be someone's corrections.
            if fresh and layer in config.segment.tasks:
                store.clear_objects(layer)
        pending = [name for name in inputs if not store.require_inputs(f"objects/{name}", "segment", inputs[name])]
        report = SegmentReport()
        if pending:
            for name in pending:
                store.begin_objects(name, inputs[name], regions=f"{segment_plan.region_px}px")
            report = segment_regions(
                slide, store, replace(segment_plan, wanted=tuple(pending)), threads=plan.threads, on_windows=on_windows
            )
            merging = time.perf_counter()
            about = {"mpp": segment_plan.windows.grid.achieved_mpp, "seconds": report.seconds()}
            merge_layers(store, segment_plan, inputs, about)
            report.merge_s = time.perf_counter() - merging
        picture = objects_picture_path(plan.out, ref.slide_id)
        if pending or not picture.exists():
            drawn = draw_objects(slide, store, list(inputs))
            if drawn is not None:
                write_png(picture, drawn)
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
    )


def _check_tasks(config: Config) -> None:
    known = (*(layer.name for layer in ClassicalNuclei().layers), CELLS)
    for task in config.segment.tasks:
        if task not in known:
            raise UsageError(
                f"segment.tasks: the model '{config.segment.model}' does not find '{task}'; "
                f"it finds {' and '.join(known)}"
            )


def _segment_plan(slide: Slide, tissue: Tissue, model: Model, config: Config) -> Plan:
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
    with_cells = CELLS in settings.tasks
    wanted = {*settings.tasks, *(("nuclei",) if with_cells else ())}
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
