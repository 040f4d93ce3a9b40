"""The card of a trained segmentation network: what it learnt from, how good it is, and pictures."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from pathopipe.files import durable_file
from pathopipe.report.thumbnail import write_png
from pathopipe.segmentation.settings import SegmenterSettings
from pathopipe.segmentation.train import Trained
from pathopipe.segmentation.validate import Case

__all__ = ["draw_cases", "write_card"]

_SIDE_PX = 360
_TRUTH_RGB, _FOUND_RGB = (0, 190, 70), (255, 215, 0)
_SCORE_OF = {
    "nuclei": "PQ, objects pooled",
    "glands": "Dice, pixels pooled",
    "lumina": "Dice, pixels pooled",
    "tissue_types": "share of images with an allowed class first",
}


def write_card(settings: SegmenterSettings, trained: Trained, out: Path) -> Path:
    """Write ``model_card.md`` and its picture ``cases.png``; returns the card's path."""
    picture = draw_cases(trained.cases)
    if picture is not None:
        write_png(out / "cases.png", picture)
    lines = [
        f"# {settings.name}",
        "",
        f"A segmentation network for {', '.join(task.name for task in settings.network.tasks)} at "
        f"{settings.network.mpp:g} um/px; {settings.network.backbone} encoder, one decoder a task. Trained by "
        "`pathopipe segmenter train` with the settings at the end.",
        "",
        "## Learnt from",
        "",
        "| data set | kind | share | images learnt from | kept back |",
        "| --- | --- | --- | --- | --- |",
    ]
    for dataset in settings.datasets:
        learnt, kept_back = trained.images[dataset.name]
        lines.append(f"| {dataset.name} | {dataset.kind} | {dataset.share:g} | {learnt} | {kept_back} |")
    lines += ["", "Images are kept back by source (slide, patient, mosaic): no source is on both sides.", ""]
    if trained.scores.by_task:
        then = (
            f" The head of tissue types then learnt alone for {trained.tissue_steps} steps, which these scores did not "
            "choose."
            if trained.tissue_steps
            else ""
        )
        lines += [
            "## On what was kept back",
            "",
            f"Whole images at {settings.network.mpp:g} um/px. The network of step {trained.step} of {trained.steps} "
            f"was chosen by these very scores, so they flatter it a little.{then}",
            "",
            "| task | data set | score | |",
            "| --- | --- | --- | --- |",
        ]
        for task, each in trained.scores.by_task.items():
            lines += [f"| {task} | {name} | {value:.3f} | {_SCORE_OF[task]} |" for name, value in each.items()]
        lines.append("")
    if picture is not None:
        lines += ["Best (top) and worst images of each data set; green is the truth, yellow what was found.", ""]
        lines += ["![cases](cases.png)", ""]
    lines += [
        "## Settings",
        "",
        f"torch {version('torch')}, Python {platform.python_version()}.",
        "",
        "```yaml",
        yaml.safe_dump(settings.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=120).rstrip(),
        "```",
        "",
    ]
    path = out / "model_card.md"
    with durable_file(path) as file:
        file.write("\n".join(lines).encode())
    return path


def draw_cases(cases: Sequence[Case]) -> NDArray[np.uint8] | None:
    """One column a data set, the best image at the top; None where there is none."""
    columns: dict[str, list[NDArray[np.uint8]]] = {}
    for case in cases:
        columns.setdefault(case.dataset, []).append(_draw_case(case))
    if not columns:
        return None
    height = max(len(column) for column in columns.values())
    blank = np.full((_SIDE_PX, _SIDE_PX, 3), 255, np.uint8)
    stacked = [np.vstack([*column, *[blank] * (height - len(column))]) for column in columns.values()]
    picture: NDArray[np.uint8] = np.hstack(stacked)
    return picture


def _draw_case(case: Case) -> NDArray[np.uint8]:
    scale = _SIDE_PX / max(case.rgb.shape[:2])
    size = (round(case.rgb.shape[1] * scale), round(case.rgb.shape[0] * scale))
    canvas = np.full((_SIDE_PX, _SIDE_PX, 3), 255, np.uint8)
    canvas[: size[1], : size[0]] = cv2.resize(case.rgb, size, interpolation=cv2.INTER_CUBIC)
    words = [case.dataset]
    for task, truth in case.truth.items():
        for labels, colour in ((truth, _TRUTH_RGB), (case.found[task], _FOUND_RGB)):
            wide = cv2.resize(labels.astype(np.float32), size, interpolation=cv2.INTER_NEAREST)
            square = np.ones((2, 2), np.uint8)
            edge = cv2.erode(wide, square) != cv2.dilate(wide, square)
            canvas[: size[1], : size[0]][edge] = colour
        score = case.score(task)
        words.append(f"{task} {score:.2f}" if score is not None else task)
    text = ", ".join(words)
    for colour, width in (((255, 255, 255), 3), ((20, 20, 20), 1)):
        cv2.putText(canvas, text, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, width, cv2.LINE_AA)
    return canvas
