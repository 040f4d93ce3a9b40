"""``pathopipe segmenter train``: a segmentation network from labelled images, and its model card."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathopipe.cli.options import Device, Json
from pathopipe.cli.progress import BarProgress, format_table

if TYPE_CHECKING:
    from rich.progress import TaskID

    from pathopipe.segmentation.settings import SegmenterSettings
    from pathopipe.segmentation.train import Trained
    from pathopipe.segmentation.validate import Scores

__all__ = ["train"]

_SCORE_OF = {"nuclei": "PQ", "glands": "Dice", "lumina": "Dice", "tissue_types": "share right"}


def train(
    config: Annotated[Path, typer.Option("--config", help="YAML file: network, training, data sets.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for weights, card, log and checkpoint.")],
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Paths of data sets are relative to it.  [default: config's]")
    ] = None,
    device: Device = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as train.steps=500.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the training in --out and start anew.")] = False,
    as_json: Json = False,
) -> None:
    """Train a network for nuclei, glands, lumina and tissue types; run again to go on where it was stopped.

    \b
    Examples:
      pathopipe segmenter train --config configs/segmenter.yaml --data DATA --out model
      pathopipe segmenter train --config mine.yaml --out model --set train.steps=1000 --device cuda
      pathopipe segment slide.svs --out results --weights model/weights.safetensors

    Data sets may be labelled for different tasks; what a data set does not label is left out of its loss. Kinds of data
    sets and an example: docs/training_data.md and configs/segmenter.yaml.
    Exit code: 0 trained, 1 failed, 2 wrong use, 130 interrupted (the last checkpoint is kept).
    """
    import json

    import cv2

    from pathopipe.cluster import check_writable, usable_cores
    from pathopipe.report.segmenter import write_card
    from pathopipe.segmentation.settings import read_settings
    from pathopipe.segmentation.train import train_segmenter

    overrides = [*(settings or ()), *([f"train.device={device.value}"] if device is not None else [])]
    settled = read_settings(config, overrides)
    check_writable(out)
    cv2.setNumThreads(1)  # crops are made beside torch; threads of their own that wait for work take its cores away
    with _TrainProgress() as progress:
        trained = train_segmenter(
            settled,
            out,
            data=config.parent if data is None else data,
            fresh=fresh,
            on_step=progress.on_step,
            on_scores=progress.on_scores,
            threads=usable_cores(),
        )
    card = write_card(settled, trained, out)
    if as_json:
        print(json.dumps(_report(trained), indent=2))
        return
    print(_describe(settled, trained))
    print(f"weights: {trained.weights}\nmodel card: {card}")


def _report(trained: "Trained") -> dict[str, object]:
    return {
        "weights": str(trained.weights),
        "step": trained.step,
        "steps": trained.steps,
        "tissue_steps": trained.tissue_steps,
        "stopped_early": trained.stopped_early,
        "seconds": round(trained.seconds, 1),
        "scores": trained.scores.flat(),
    }


def _describe(settings: "SegmenterSettings", trained: "Trained") -> str:
    ended = "no better for a while, so it ended there" if trained.stopped_early else "all that were asked for"
    then = f"; then {trained.tissue_steps} for tissue types alone" if trained.tissue_steps else ""
    lines = [f"{settings.name}: {trained.steps} steps ({ended}); kept is the network of step {trained.step}{then}"]
    rows = [
        (task, name, _SCORE_OF[task], f"{value:.3f}", str(trained.images[name][1]))
        for task, each in trained.scores.by_task.items()
        for name, value in each.items()
    ]
    if rows:
        lines.append(format_table(("task", "data set", "score", "kept back", "images"), rows))
    return "\n".join(lines)


class _TrainProgress(BarProgress):
    """Tells of steps: a bar on a terminal, a line a minute elsewhere; and of every validation."""

    _EVERY_S = 60.0

    def __init__(self) -> None:
        super().__init__("steps")
        self._task: TaskID | None = None
        self._told = time.monotonic()

    def on_step(self, step: int, steps: int, loss: float) -> None:
        """A step was taken."""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("training", total=steps)
            self._bar.update(self._task, completed=step, description=f"loss {loss:.3f}")
        elif time.monotonic() - self._told >= self._EVERY_S:
            self._told = time.monotonic()
            self.tell(f"step {step} of {steps}: loss {loss:.3f}")

    def on_scores(self, step: int, scores: "Scores") -> None:
        """The network was tried on what was kept back."""
        found = ", ".join(f"{name} {value:.3f}" for name, value in scores.flat().items())
        self.tell(f"step {step}: mean {scores.mean:.3f}; {found}")
