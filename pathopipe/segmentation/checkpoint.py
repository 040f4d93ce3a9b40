"""What a training leaves on disk so that it can go on after a kill: one checkpoint, and a log of its steps."""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from pathopipe.errors import UsageError
from pathopipe.files import durable_file
from pathopipe.segmentation.examples import Example
from pathopipe.segmentation.settings import SegmenterSettings

__all__ = [
    "Progress",
    "cut_log",
    "digest_images",
    "forget_checkpoint",
    "log_row",
    "read_checkpoint",
    "write_checkpoint",
]

_CHECKPOINT: Final = "checkpoint.pt"
_LOG: Final = "log.jsonl"


@dataclass(slots=True)
class Progress:
    """What a checkpoint knows beside weights."""

    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    worse: int = 0
    """Validations since the best."""
    ended: bool = False
    tissue_step: int = 0
    """Steps taken for tissue types alone."""
    tissue_steps: int = 0
    """How many there are to be; 0 until the first of them."""
    scores: dict[str, float] = field(default_factory=dict)


def digest_settings(settings: SegmenterSettings) -> str:
    """Of what decides the weights; where they are computed does not.

    ``tissue_steps`` is left out: a training that ended without them can go on with them.
    """
    said = settings.model_dump(mode="json")
    for key in ("threads", "device", "checkpoint_every", "tissue_steps"):
        del said["train"][key]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def digest_images(examples: Iterable[Example]) -> str:
    """Of the pixels and labels of all images."""
    images = hashlib.blake2b(digest_size=16)
    for example in examples:
        about = (example.dataset, example.name, example.source, example.mpp, sorted(example.tissue_types or ()))
        images.update(json.dumps([*about, example.rgb.shape, sorted(example.labels)]).encode())
        images.update(np.ascontiguousarray(example.rgb).data)
        for task in sorted(example.labels):
            images.update(np.ascontiguousarray(example.labels[task]).data)
    return images.hexdigest()


def write_checkpoint(
    out: Path,
    settings: SegmenterSettings,
    images: str,
    network: nn.Module,
    mean: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write all that a training needs to go on, whole or not at all; ``images`` is their digest."""
    state = {
        "settings": digest_settings(settings),
        "images": images,
        "network": network.state_dict(),
        "mean": mean.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with durable_file(out / _CHECKPOINT) as file:
        file.write(buffer.getbuffer())


def read_checkpoint(out: Path, settings: SegmenterSettings) -> dict[str, Any] | None:
    """What :func:`write_checkpoint` wrote last; None where there is none.

    Raises:
        UsageError: It can't be read, or is of a training with other settings.
    """
    path = out / _CHECKPOINT
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160] or "it is empty"
        raise UsageError(f"{path}: can't be read ({reason}); start anew with --fresh") from None
    is_same = isinstance(state, dict) and state.get("settings") == digest_settings(settings)
    if not is_same or state["progress"].get("tissue_steps", 0) not in {0, settings.train.tissue_steps}:
        raise UsageError(f"{out}: holds a training with other settings; give another --out, or start anew with --fresh")
    return state


def forget_checkpoint(out: Path) -> None:
    """Remove the checkpoint where there is one."""
    (out / _CHECKPOINT).unlink(missing_ok=True)


def log_row(out: Path, row: Mapping[str, Any]) -> None:
    """Add a row to the log; its key ``step`` tells when."""
    with (out / _LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def cut_log(out: Path, step: int) -> None:
    """Drop the rows of steps that will be taken again, and one that was cut short."""
    path = out / _LOG
    if not path.exists():
        return
    whole = [row for row in path.read_text(encoding="utf-8").splitlines(keepends=True) if row.endswith("\n")]
    kept = [row for row in whole if json.loads(row)["step"] <= step]
    with durable_file(path) as file:
        file.write("".join(kept).encode())
