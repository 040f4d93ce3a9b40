"""What is known of each slide of an output folder, read from stores, summary and pictures; one slide at a time."""

import csv
import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from pathopipe.cohort.receipts import read_receipt
from pathopipe.errors import StoreError, UsageError
from pathopipe.records import STATUS_OK
from pathopipe.registry import nearest
from pathopipe.report.cohort_pictures import read_picture, small_picture, stain_of
from pathopipe.report.cohort_words import hide_places
from pathopipe.store import SlideStore, store_path

__all__ = [
    "HANDCRAFTED",
    "EncoderState",
    "Fact",
    "Picture",
    "PictureSize",
    "Prediction",
    "Status",
    "Vectors",
    "choose_encoder",
    "draw_picture",
    "list_slides",
    "read_fact",
]

Status = Literal["done", "failed", "damaged", "unfinished", "missing"]
"""``failed``: the last run says so; ``damaged``: its store can't be read; ``unfinished``: a run was killed or goes on;
``missing``: the table names it, and nothing was done."""

HANDCRAFTED: Final = "handcrafted"
_FOCUS: Final = "focus_log"
_MOST_ROWS: Final = 4096
"""Tiles whose mean stands for a slide, so that reading a giant one takes no longer than a large one."""
_MOST_FEATURES: Final = 8192
"""Longer rows are grids of tokens, whose mean over tiles says little."""

Vectors = dict[tuple[str, int], NDArray[np.float32]]
"""Mean embedding of a slide, (features,), by name of the encoder and length of its rows."""
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class EncoderState:
    """How far the embeddings of one encoder on one grid have come."""

    grid: str
    name: str
    done: int
    """Chunks that are there."""
    chunks: int
    complete: bool
    identity: str
    """What decides its numbers, as text; differs where weights or versions do."""
    features: int
    limited_by: str | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one model says of the slide."""

    model: str
    target: str
    value: str
    probability: float | None
    note: str = ""


@dataclass(slots=True, kw_only=True)
class Fact:
    """All that the page says of one slide; filled in part by part, for any part may be damaged."""

    slide_id: str
    status: Status = "done"
    reason: str = ""
    problems: list[str] = field(default_factory=list)
    """What can't be read, or is not finished."""
    notes: tuple[str, ...] = ()
    """What the reader of the slide found odd."""
    flags: tuple[str, ...] = ()
    tissue_mm2: float | None = None
    regions: int | None = None
    tiles: int | None = None
    """Of its largest grid."""
    bad_tiles: int = 0
    mpp: str = ""
    seconds: float | None = None
    """Of its last run."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds of embedding by what the loop did: ``model``, ``waiting``, ``write``; and ``objects``."""
    encoders: list[EncoderState] = field(default_factory=list)
    layers: dict[str, int] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)
    focus: float | None = None
    """Mean over tiles of the handcrafted ``focus_log``; falls with blur."""
    stain: tuple[float, float] | None = None
    """Median over tiles of haematoxylin and eosin, optical density, from the thumbnail."""
    group: str = ""
    """What the plots are coloured by."""
    picture: "Picture | None" = None


@dataclass(frozen=True, slots=True)
class Picture:
    """A small picture of a slide."""

    webp: bytes
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True)
class PictureSize:
    """How large a small picture may be."""

    side_px: int
    most_bytes: int


# ---- the slides there are


def list_slides(folder: Path, listed: Collection[str] = ()) -> dict[str, dict[str, str]]:
    """Ids of all slides of an output folder, sorted, each with the row that the summary has of it.

    Receipts of a workflow that tell of failures count as the summary does.

    Args:
        folder: The ``--out`` folder of a run.
        listed: Ids that a table names; slides too, whether or not anything was done with them.

    Returns:
        Cells by column, of them ``status`` and ``reason``; empty for a slide that the summary does not name.

    Raises:
        UsageError: There is no such folder, or nothing of pathopipe in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the --out folder of 'pathopipe run'")
    rows = {row["slide_id"]: row for row in _read_summary(folder / "summary.csv")}
    for stage in ("tissue", "tiles", "embed", "segment"):
        for slide_id, reason in _failed_receipts(folder, stage):
            row = rows.setdefault(slide_id, {})
            if row.get("status") != "failed":
                row |= {"status": "failed", "reason": f"{stage}: {reason}"}
    stores = [path.stem for path in (folder / "slides").glob("*.zarr")]
    if not rows and not stores:
        raise UsageError(
            f"{folder}: no stores in slides/ and no summary.csv, so there is nothing to report; "
            "give the folder that 'pathopipe run --out' filled"
        )
    return {slide_id: rows.get(slide_id, {}) for slide_id in sorted({*rows, *stores, *listed})}


def _failed_receipts(folder: Path, stage: str) -> Iterator[tuple[str, str]]:
    for path in sorted((folder / "done" / stage).glob("[!.]*.json")):
        try:
            receipt = read_receipt(path)
        except StoreError:
            yield path.stem, "its receipt can't be read"
            continue
        if receipt.status == "failed":
            yield receipt.slide_id, receipt.reason


def _read_summary(path: Path) -> list[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (FileNotFoundError, csv.Error):
        return []
    texts = [{name: cell for name, cell in row.items() if name and isinstance(cell, str)} for row in rows]
    return [row for row in texts if row.get("slide_id")]


def choose_encoder(states: Mapping[tuple[str, int], int], wanted: str | None) -> tuple[str, int] | None:
    """The encoder of the map: the one with most slides, a network rather than handcrafted numbers.

    Args:
        states: Number of slides by name and length of rows.
        wanted: A name; None to choose.

    Raises:
        UsageError: No slide has embeddings of the wanted one.
    """
    usable = {key: count for key, count in states.items() if wanted in (None, key[0])}
    if wanted is not None and not usable:
        hint = nearest(wanted, {name for name, _ in states}) if states else "no slide has embeddings of any encoder"
        raise UsageError(f"--encoder {wanted}: no slide here has embeddings of it; {hint}")
    if not usable:
        return None
    return min(usable, key=lambda key: (-usable[key], key[0] == HANDCRAFTED, key))


# ---- one slide


def read_fact(
    folder: Path, slide_id: str, row: Mapping[str, str], size: PictureSize | None = None
) -> tuple[Fact, Vectors]:
    """What is known of one slide, and the mean embedding of each of its encoders.

    Nothing that is wrong with a store ends this; it is said in the fact. A store that is being written right now
    shows as unfinished.

    Args:
        folder: The output folder.
        slide_id: Of the slide.
        row: Its row of the summary.
        size: Of its picture; None for no picture.

    Returns:
        The fact, and the vectors of encoders whose chunks are all there.
    """
    fact = Fact(slide_id=slide_id, seconds=_number(row.get("seconds", "")))
    vectors: Vectors = {}
    path = store_path(folder, slide_id)
    if path.is_dir():
        _Reading(folder, fact, vectors).everything(path, size)
    elif row.get("status") == "done":
        fact.problems.append("its store is gone")
        fact.status = "damaged"
    else:
        fact.status = "missing"
    if row.get("status") == "failed":
        fact.status, fact.reason = "failed", row.get("reason", "").removeprefix("'") or "no reason is known"
    elif fact.status == "missing":
        fact.reason = "not run yet"
    elif fact.status != "done":
        fact.reason = "; ".join(fact.problems)
    fact.reason = hide_places(fact.reason, folder=folder, slide_id=slide_id)
    fact.problems = [hide_places(text, folder=folder, slide_id=slide_id) for text in fact.problems]
    fact.notes = tuple(hide_places(text, folder=folder, slide_id=slide_id) for text in fact.notes)
    return fact, vectors


def draw_picture(folder: Path, fact: Fact, size: PictureSize) -> None:
    """Give a fact its picture, where there is a thumbnail and a store that tells of it."""
    reading = _Reading(folder, fact, {})
    store = reading.attempt("the store", lambda: SlideStore.open(store_path(folder, fact.slide_id)))
    if store is not None:
        reading.attempt("the thumbnail", lambda: reading.picture(store, size))


class _Reading:
    """One slide being read, part by part: a part that is damaged is told, and the others are read."""

    def __init__(self, folder: Path, fact: Fact, vectors: Vectors) -> None:
        self._folder = folder
        self._fact = fact
        self._vectors = vectors

    def attempt(self, what: str, read: Callable[[], Read]) -> Read | None:
        """What ``read`` gives; None where it fails, which is told."""
        try:
            return read()
        except StoreError as error:
            fault = str(error)
        except Exception as error:  # damage shows in a dozen ways, and the other slides go on
            fault = f"{what} can't be read ({type(error).__name__})"
        self._fact.problems.append(fault)
        self._fact.status = "damaged"
        return None

    def everything(self, path: Path, size: PictureSize | None) -> None:
        """Read all parts of a store."""
        fact = self._fact
        store = self.attempt("the store", lambda: SlideStore.open(path))
        if store is None:
            return
        self.attempt("the slide's description", lambda: _read_slide(fact, store))
        self.attempt("tissue", lambda: _read_tissue(fact, store))
        imported = self.attempt("tiles", lambda: _read_tiles(fact, store))
        for grid in store.children("embeddings"):
            for name in store.children(f"embeddings/{grid}"):
                read = partial(_read_embeddings, fact, store, grid, name, self._vectors)
                self.attempt(f"embeddings/{grid}/{name}", read)
        self.attempt("objects", lambda: _read_layers(fact, store))
        self.attempt("predictions", lambda: _read_predictions(fact, store))
        self.attempt("the thumbnail", lambda: self.picture(store, size))
        if "tissue" not in store.children("") and not imported and not fact.layers:
            _unfinished(fact, "tissue is not found yet")
        if not store.children("tiles") and not fact.layers:
            _unfinished(fact, "no tiles yet")

    def picture(self, store: SlideStore, size: PictureSize | None) -> None:
        """Stain and small picture, from the thumbnail."""
        fact = self._fact
        picture = read_picture(self._folder / "thumbnails" / f"{fact.slide_id}.png")
        if picture is None:
            return
        width_l0, height_l0 = store.slide["dims_l0"]
        grids = store.grids()
        if grids and "dark-field" not in fact.flags and fact.stain is None:
            # Grids around another one leave the slide; the finest shows most of the tissue.
            grid = max(grids, key=lambda name: (_rows(store, f"tiles/{name}/xy_l0"), name))
            fact.stain = stain_of(picture, store.read_grid(grid), (width_l0, height_l0))
        if size is not None:
            rings = _outlines(store) if store.inputs("tissue") is not None else []
            found = small_picture(
                picture, rings, (width_l0, height_l0), side_px=size.side_px, most_bytes=size.most_bytes
            )
            fact.picture = Picture(*found)


def _outlines(store: SlideStore) -> list[NDArray[np.float64]]:
    vertices, offsets = store.read_array("tissue/vertices_l0"), store.read_array("tissue/ring_offsets")
    return [vertices[start:end] for start, end in pairwise(offsets.tolist())]


def _unfinished(fact: Fact, what: str) -> None:
    fact.problems.append(what)
    if fact.status == "done":
        fact.status = "unfinished"


def _read_slide(fact: Fact, store: SlideStore) -> None:
    slide = store.slide
    fact.mpp = " x ".join(dict.fromkeys(f"{mpp:.4g}" for mpp in slide["mpp"]))
    fact.notes = tuple(map(str, slide["problems"]))


def _read_tissue(fact: Fact, store: SlideStore) -> None:
    if "tissue" not in store.children(""):
        return
    attributes = store.attributes("tissue")
    if "inputs" not in attributes:
        _unfinished(fact, "tissue is not finished")
        return
    fact.tissue_mm2 = float(sum(attributes["areas_mm2"]))
    fact.regions = len(attributes["areas_mm2"])
    fact.flags = tuple(map(str, attributes["flags"]))


def _read_tiles(fact: Fact, store: SlideStore) -> bool:
    """Count tiles; whether some of them were imported."""
    imported = False
    for grid in store.children("tiles"):
        inputs = store.inputs(f"tiles/{grid}")
        if inputs is None:
            _unfinished(fact, f"tiles/{grid} is not finished")
            continue
        imported = imported or "imported" in inputs
        fact.tiles = max(fact.tiles or 0, _rows(store, f"tiles/{grid}/xy_l0"))
    return imported


def _rows(store: SlideStore, array: str) -> int:
    # The length stands in the array's description; opening the array takes a hundred times as long.
    described = json.loads((store.path / array / "zarr.json").read_bytes())
    return int(described["shape"][0])


def _read_embeddings(fact: Fact, store: SlideStore, grid: str, name: str, vectors: Vectors) -> None:
    group = f"embeddings/{grid}/{name}"
    attributes = store.attributes(group)
    if "inputs" not in attributes:
        _unfinished(fact, f"{group} is not finished")
        return
    rows = store.embeddings(grid, name)
    done = rows.done_chunks()
    complete = bool(attributes.get("complete")) and len(done) == rows.n_chunks
    identity = json.dumps(attributes["inputs"].get("encoder"), sort_keys=True)
    fact.encoders.append(
        EncoderState(
            grid, name, len(done), rows.n_chunks, complete, identity, rows.features, attributes.get("limited_by")
        )
    )
    fact.bad_tiles = max(fact.bad_tiles, int(attributes.get("bad_tiles", 0)))
    for kind, seconds in attributes.get("seconds", {}).items():
        if kind != "read":  # passes beside the loop
            fact.times[kind] = fact.times.get(kind, 0.0) + float(seconds)
    if not complete:
        _unfinished(fact, f"{group} has {len(done)} of {rows.n_chunks} chunks")
        return
    if rows.features > _MOST_FEATURES:
        return
    wanted = max(1, min(len(done), _MOST_ROWS // rows.chunk_rows))
    total, count = np.zeros(rows.features), 0
    status = rows.read_status()
    for chunk in np.unique(np.linspace(0, len(done) - 1, wanted).round().astype(int)) if rows.rows else ():
        piece = rows.chunk_slice(int(chunk))
        good = status[piece] == STATUS_OK
        total += rows.read_values(piece)[good].sum(axis=0, dtype=np.float64)
        count += int(good.sum())
    if not count or not np.isfinite(total).all():
        return
    vector = (total / count).astype(np.float32)
    vectors.setdefault((name, rows.features), vector)
    names = attributes.get("feature_names", ())
    if name == HANDCRAFTED and _FOCUS in names and fact.focus is None:
        fact.focus = float(vector[names.index(_FOCUS)])


def _read_layers(fact: Fact, store: SlideStore) -> None:
    for layer in store.children("objects"):
        attributes = store.attributes(f"objects/{layer}")
        if "inputs" not in attributes:
            _unfinished(fact, f"objects/{layer} is not finished")
            continue
        fact.layers[layer] = _rows(store, f"objects/{layer}/centroid_l0")
        seconds = attributes.get("seconds")
        if isinstance(seconds, dict) and "objects" not in fact.times:  # layers found together state the same
            fact.times["objects"] = float(seconds.get("waiting", 0.0)) + float(seconds.get("model", 0.0))


def _read_predictions(fact: Fact, store: SlideStore) -> None:
    for model in store.prediction_models():
        about = store.attributes(f"predictions/{model}")
        for target in about.get("targets", ()):
            found = [float(p) for p in about.get("probabilities", {}).get(target["name"], ())]
            seen = str(about.get("seen", ""))
            note = f"SEEN in {'training' if seen == 'train' else 'validation'}" if seen in ("train", "val") else ""
            value, probability = _said(target, found)
            if value:
                fact.predictions.append(Prediction(model, str(target["name"]), value, probability, note))


def _said(target: Mapping[str, Any], found: list[float]) -> tuple[str, float | None]:
    """A prediction in words, and its probability where it is a class."""
    classes = [str(name) for name in target.get("classes", ())]
    if not found or not np.isfinite(found).all():
        return "", None
    if target.get("kind") == "multilabel":
        return ", ".join(name for name, p in zip(classes, found, strict=False) if p >= 0.5) or "none", None
    if classes and len(classes) == len(found):
        best = int(np.argmax(found))
        return classes[best], found[best]
    return ", ".join(f"{value:.3g}" for value in found), None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
