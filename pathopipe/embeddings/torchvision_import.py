"""Imports torchvision where its compiled operators don't load.

timm imports torchvision. The package index's torchvision is a CUDA build; beside a CPU-only torch its compiled library
can't be loaded, and the import stops with "operator torchvision::nms does not exist". Nothing that timm takes from
torchvision needs those operators, so it is enough that their names exist.
"""

import contextlib
import importlib
import sys

import torch

__all__ = ["import_torchvision"]

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Import torchvision, declaring its operators first where a plain import fails for want of them.

    Raises:
        RuntimeError: The import fails for another reason.
    """
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        with contextlib.suppress(RuntimeError):  # declared by the half-loaded module already
            library.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(library)  # a library that is collected takes its schemas with it
    importlib.import_module("torchvision")
