"""The stages of one slide, in order, over one store."""

from pathopipe.pipeline.common import RunPlan, Stage, outline_path, thumbnail_path
from pathopipe.pipeline.prepare import Pass, Prepared
from pathopipe.pipeline.run import (
    BegunSlide,
    LaneReports,
    SlideOutcome,
    TilesDone,
    begin_slide,
    check_plan,
    embed_pending,
    finish_slide,
    run_slide,
)

__all__ = [
    "BegunSlide",
    "LaneReports",
    "Pass",
    "Prepared",
    "RunPlan",
    "SlideOutcome",
    "Stage",
    "TilesDone",
    "begin_slide",
    "check_plan",
    "embed_pending",
    "finish_slide",
    "outline_path",
    "run_slide",
    "thumbnail_path",
]
