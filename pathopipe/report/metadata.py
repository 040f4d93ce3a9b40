"""The review of a catalogue as one page: contradictions with their evidence, no network, nothing that runs."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import TileReadError
from pathopipe.files import durable_file
from pathopipe.geometry import Region
from pathopipe.metadata.review import Contradiction, Evidence, TopTile
from pathopipe.slide.base import Slide

__all__ = ["PageHead", "read_tiles", "review_page", "write_review_page"]

_PICTURE_PX: Final = 144
_JPEG_QUALITY: Final = 80

_STYLE: Final = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; } h1, td, article { overflow-wrap: anywhere; }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #bbb; }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; }
article { border-top: 1px solid #ccc; padding: .7rem 0; display: grid; grid-template-columns: 3rem minmax(0, 1fr); }
article > div:first-child { color: #666; font-variant-numeric: tabular-nums; }
.ids { font-weight: 600; } .quiet { color: #666; } .was { text-decoration: line-through; color: #a33; }
.now { font-weight: 600; color: #146c43; } ul { margin: .3rem 0 0; padding-left: 1.1rem; }
figure { display: inline-block; margin: .4rem .5rem 0 0; } figcaption { font-size: .75rem; color: #666; }
img { display: block; width: 144px; }
@media print { article { break-inside: avoid; } }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageHead:
    """What stands above the list."""

    source: str
    """The catalogue that was reviewed."""
    model_id: str
    n_slides: int
    records: Mapping[str, int]
    """Records that were judged, by task."""
    notes: tuple[str, ...] = ()


def read_tiles(slide: Slide, tiles: Sequence[TopTile]) -> list[bytes]:
    """Pictures of tiles of a slide as JPEG; empty for a tile without a place, or that can't be read."""
    pictures = []
    for tile in tiles:
        if tile.x_l0 is None or tile.y_l0 is None or not tile.width_l0 or not tile.height_l0:
            pictures.append(b"")
            continue
        try:
            pixels = slide.read(Region(tile.x_l0, tile.y_l0, 0, tile.width_l0, tile.height_l0))
        except TileReadError:
            pictures.append(b"")
            continue
        pictures.append(_jpeg(cv2.resize(pixels, (_PICTURE_PX, _PICTURE_PX), interpolation=cv2.INTER_AREA)))
    return pictures


def _jpeg(rgb: NDArray[np.uint8]) -> bytes:
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return encoded.tobytes()


def write_review_page(
    path: Path,
    head: PageHead,
    contradictions: Sequence[Contradiction],
    evidence: Sequence[Evidence],
    pictures: Mapping[int, Sequence[bytes]] | None = None,
) -> None:
    """Write :func:`review_page`, whole or not at all."""
    with durable_file(path) as file:
        file.write(review_page(head, contradictions, evidence, pictures).encode())


def review_page(
    head: PageHead,
    contradictions: Sequence[Contradiction],
    evidence: Sequence[Evidence],
    pictures: Mapping[int, Sequence[bytes]] | None = None,
) -> str:
    """One HTML page; the first contradictions, as many as there is evidence for, are shown.

    Args:
        head: What stands above.
        contradictions: All of them, in order.
        evidence: Of the first ones.
        pictures: By row of the cohort, JPEG files of the top tiles, as :func:`read_tiles` gives them.
    """
    listed = Counter(one.task for one in contradictions)
    rows = "".join(
        f'<tr><td>{escape(task)}</td><td class="n">{n}</td><td class="n">{listed[task]}</td></tr>'
        for task, n in head.records.items()
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in head.notes)
    count = min(len(evidence), len(contradictions))
    if not contradictions:
        said = "No record contradicts its prediction."
    elif count < len(contradictions):
        said = f"The first {count} of {len(contradictions)} contradictions; the table beside this page has all."
    else:
        said = f"{count} contradiction{'' if count == 1 else 's'}."
    articles = "".join(
        _article(number, one, shown, (pictures or {}).get(one.row, ()))
        for number, (one, shown) in enumerate(zip(contradictions, evidence, strict=False), 1)
    )
    # Names come from tables that others wrote: everything is escaped, and the page may load and run nothing.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Review of {escape(head.source)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Records to look at: {escape(head.source)}</h1>\n"
        f'<p class="quiet">{head.n_slides} slides, judged by {escape(head.model_id)}; no patient is judged by a '
        "model that has learnt from it. A record stands here because the prediction is another; which of the two is "
        "right is for you to say.</p>\n"
        '<table><tr><th>Field</th><th class="n">Records</th><th class="n">Contradicted</th></tr>'
        f"{rows}</table>\n" + (f"<ul>{notes}</ul>\n" if notes else "") + f"<h2>{said}</h2>\n{articles}"
        '<p class="quiet">Tiles: those the model weighs most, the same for every field of a slide; times the average '
        "weight, and the corner in level-0 pixels. Words: what in the report speaks for the prediction against the "
        "record. Nearest slides are of other patients, by the model&rsquo;s own vectors.</p>\n</body></html>\n"
    )


def _article(number: int, one: Contradiction, shown: Evidence, pictures: Sequence[bytes]) -> str:
    about = f" ({escape(one.label)})" if one.label else ""
    chances = f"wrong with probability {_share(one.surety)}"
    if one.p_recorded is not None and one.p_predicted is not None:
        chances += f"; predicted {_share(one.p_predicted)}, recorded {_share(one.p_recorded)}"
    lines = [f"{chances}; from {escape(one.modalities.replace('+', ', '))}"]
    if one.abstained:
        lines.append("the model is not sure enough to fill this field in by itself")
    if shown.words:
        lines.append("words: " + ", ".join(escape(word) for word, _ in shown.words))
    if shown.near:
        near = ", ".join(
            f"{escape(slide.slide_id)} ({escape(slide.recorded) or 'none'}, {slide.similarity:.2f})"
            for slide in shown.near
        )
        lines.append(f"nearest slides: {near}")
    if shown.n_neighbours:
        lines.append(
            f"of the {shown.n_neighbours} nearest slides {shown.as_predicted} are recorded as predicted here, "
            f"{shown.as_recorded} as recorded here"
        )
    if shown.tiles and not any(pictures):
        places = ", ".join(_place(tile) for tile in shown.tiles if tile.x_l0 is not None)
        lines.append(f"tiles: {places}" if places else "tiles: the features state no coordinates")
    figures = "".join(
        f'<figure><img alt="tile, {_place(tile)}" src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}">'
        f"<figcaption>{_place(tile)}</figcaption></figure>"
        for tile, picture in zip(shown.tiles, pictures, strict=False)
        if picture
    )
    items = "".join(f"<li>{line}</li>" for line in lines)
    return (
        f'<article><div>{number}</div><div><span class="ids">{escape(one.slide_id)}</span> '
        f'<span class="quiet">patient {escape(one.patient_id)}</span><br>{escape(one.task)}{about}: '
        f'<span class="was">{escape(one.recorded) or "none"}</span> &rarr; '
        f'<span class="now">{escape(one.predicted) or "none"}</span><ul>{items}</ul>{figures}</div></article>\n'
    )


def _place(tile: TopTile) -> str:
    times = f"{tile.times_mean:.1f}&times;"
    return times if tile.x_l0 is None else f"{times} at ({tile.x_l0}, {tile.y_l0})"


def _share(value: float) -> str:
    """A probability that never rounds to certainty."""
    if value > 0.999:
        return "&gt; 99.9 %"
    return "&lt; 0.1 %" if value < 0.001 else f"{100 * value:.1f} %"
