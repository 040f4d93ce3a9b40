"""The plan of a cohort: a table of what each slide's header says, and what each stage will need of a machine."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pathopipe.errors import StoreError
from pathopipe.files import durable_file

__all__ = ["PLANNED_STAGES", "Needs", "PlannedSlide", "plan_path", "read_plan", "write_plan"]

PLANNED_STAGES: Final = ("tissue", "tiles", "embed", "segment")
_SLIDE_COLUMNS: Final = ("slide_id", "size_bytes", "width_px", "height_px", "most_tiles", "problem")


@dataclass(frozen=True, slots=True)
class Needs:
    """What one stage of one slide needs."""

    mem_mb: int
    minutes: int
    """Wall time."""
    gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSlide:
    """One slide of the plan."""

    slide_id: str
    size_bytes: int
    """Of the file; 0 where it can't be opened."""
    dims_l0: tuple[int, int]
    """Width and height in level-0 pixels; (0, 0) where it can't be opened."""
    most_tiles: int
    """How many tiles there are, were the whole slide tissue."""
    problem: str = ""
    """Why it can't be opened."""
    needs: Mapping[str, Needs] = field(default_factory=dict)
    """By stage."""


def plan_path(out: Path) -> Path:
    """Where the plan of an output folder is."""
    return out / "plan.csv"


def write_plan(path: Path, slides: Iterable[PlannedSlide]) -> None:
    """Write the plan, a row a slide."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    needed = [f"{stage}_{what}" for stage in PLANNED_STAGES for what in Needs.__slots__]
    writer.writerow([*_SLIDE_COLUMNS, *needed])
    for slide in slides:
        numbers = [getattr(slide.needs[stage], what) for stage in PLANNED_STAGES for what in Needs.__slots__]
        about = [slide.slide_id, slide.size_bytes, *slide.dims_l0, slide.most_tiles, slide.problem]
        writer.writerow([*about, *numbers])
    with durable_file(path) as file:
        file.write(text.getvalue().encode())


def read_plan(path: Path) -> dict[str, PlannedSlide]:
    """Read what :func:`write_plan` wrote, by slide id.

    Raises:
        FileNotFoundError: There is no plan yet.
        StoreError: It is no such table.
    """
    with path.open(encoding="utf-8", newline="") as file:
        try:
            return {row["slide_id"]: _slide(row) for row in csv.DictReader(file)}
        except (KeyError, ValueError, TypeError) as error:
            raise StoreError(
                f"{path}: not a readable plan ({error}); write it anew with 'pathopipe cohort plan'"
            ) from None


def _slide(row: Mapping[str, str]) -> PlannedSlide:
    return PlannedSlide(
        slide_id=row["slide_id"],
        size_bytes=int(row["size_bytes"]),
        dims_l0=(int(row["width_px"]), int(row["height_px"])),
        most_tiles=int(row["most_tiles"]),
        problem=row["problem"],
        needs={stage: Needs(*(int(row[f"{stage}_{what}"]) for what in Needs.__slots__)) for stage in PLANNED_STAGES},
    )
