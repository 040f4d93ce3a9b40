"""Whole-slide pathology: slides in; tissue, tiles, embeddings, objects and predictions out.

The names below are loaded when they are first used, so that ``import pathopipe`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathopipe.cluster import run_cohort
    from pathopipe.config import Config, load_config
    from pathopipe.errors import PathopipeError
    from pathopipe.pipeline import RunPlan, run_slide
    from pathopipe.records import SlideRef
    from pathopipe.slide.array import ArraySlide
    from pathopipe.slide.find import find_slides
    from pathopipe.slide.open import open_slide
    from pathopipe.store import SlideStore
    from pathopipe.tiles.lazy import as_dask_array

__all__ = [
    "ArraySlide",
    "Config",
    "PathopipeError",
    "RunPlan",
    "SlideRef",
    "SlideStore",
    "as_dask_array",
    "find_slides",
    "load_config",
    "open_slide",
    "run_cohort",
    "run_slide",
]

__version__ = "0.1.0"

_HOMES = {
    "ArraySlide": "pathopipe.slide.array",
    "Config": "pathopipe.config",
    "PathopipeError": "pathopipe.errors",
    "RunPlan": "pathopipe.pipeline",
    "SlideRef": "pathopipe.records",
    "SlideStore": "pathopipe.store",
    "as_dask_array": "pathopipe.tiles.lazy",
    "find_slides": "pathopipe.slide.find",
    "load_config": "pathopipe.config",
    "open_slide": "pathopipe.slide.open",
    "run_cohort": "pathopipe.cluster",
    "run_slide": "pathopipe.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pathopipe' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
