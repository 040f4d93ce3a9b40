"""What models say of a slide, in its store: logits, and the attention of each tile."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathopipe.store.groups import Groups

__all__ = ["Predictions", "read_predictions", "write_predictions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What one model says of a slide."""

    logits: NDArray[np.float32]
    """(K,)."""
    attention: NDArray[np.float32] | None
    """(N, A), one row a tile of the grid, NaN for tiles that the model did not see."""
    grid: str
    about: dict[str, Any]


def write_predictions(
    groups: Groups,
    model: str,
    logits: NDArray[np.float32],
    attention: NDArray[np.float32] | None,
    *,
    grid: str,
    about: Mapping[str, Any],
) -> None:
    """Replace the predictions of one model; the attributes come last."""
    group = f"predictions/{model}"
    groups.clear(group)
    groups.write_table(f"{group}/logits", np.asarray(logits, np.float32))
    if attention is not None:
        groups.write_table(f"{group}/attention", np.asarray(attention, np.float32))
    groups.write_attributes(group, {"inputs": {}, **about, "grid": grid})


def read_predictions(groups: Groups, model: str) -> Predictions:
    """The predictions of one model; StoreError where there are none."""
    group = f"predictions/{model}"
    about = groups.finished(group)
    has_attention = "attention" in groups.children(group)
    return Predictions(
        logits=groups.read_array(f"{group}/logits"),
        attention=groups.read_array(f"{group}/attention") if has_attention else None,
        grid=about["grid"],
        about=about,
    )
