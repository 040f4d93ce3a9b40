"""The review page: everything escaped, nothing fetched, what stands where, pictures as they are on the slide."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from pathopipe.geometry import Region
from pathopipe.metadata.review import Contradiction, Evidence, NearSlide, TopTile
from pathopipe.report.metadata import PageHead, read_tiles, review_page, write_review_page
from pathopipe.slide.open import open_slide

HEAD = PageHead(source="catalogue.csv", model_id="model@1", n_slides=40, records={"organ": 38, "stain": 40})
ONE = Contradiction(
    row=3,
    slide_id="s3",
    patient_id="p3",
    task="organ",
    recorded="colon",
    predicted="lung",
    p_recorded=0.0004,
    p_predicted=0.93,
    surety=0.9999,
    log_odds=9.2,
    abstained=False,
    modalities="image+text",
)
SHOWN = Evidence(
    tiles=(TopTile(times_mean=3.26, x_l0=800, y_l0=600, width_l0=224, height_l0=224),),
    words=(("alveolar", 0.4), ("bronchus", 0.2)),
    near=(NearSlide(slide_id="s9", recorded="lung", similarity=0.912),),
    n_neighbours=10,
    as_predicted=8,
    as_recorded=1,
)


class Reader(HTMLParser):
    """Tags, attributes and text of a page; void tags aside, all that is opened must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_says_what_there_is() -> None:
    page = Reader(review_page(HEAD, [ONE, replace(ONE, slide_id="s5", row=5)], [SHOWN]))
    text = re.sub(r"\s+", " ", page.text)
    assert "The first 1 of 2 contradictions" in text and "s5" not in text
    assert "organ382" in text and "stain400" in text
    assert "s3 patient p3" in text and "organ: colon → lung" in text
    assert "wrong with probability > 99.9 %; predicted 93.0 %, recorded < 0.1 %; from image, text" in text
    assert "words: alveolar, bronchus" in text and "nearest slides: s9 (lung, 0.91)" in text
    assert "of the 10 nearest slides 8 are recorded as predicted here, 1 as recorded here" in text
    assert "tiles: 3.3× at (800, 600)" in text and "img" not in page.tags
    assert "not sure enough" not in text
    assert "not sure enough" in review_page(HEAD, [replace(ONE, abstained=True)], [SHOWN])
    assert "No record contradicts its prediction." in review_page(HEAD, [], [])


def test_nothing_in_a_table_becomes_markup() -> None:
    bad = '<script>alert(1)</script>"&'
    one = replace(ONE, slide_id=bad, patient_id=bad, task=bad, recorded=bad, predicted=bad, label=bad, modalities=bad)
    shown = replace(SHOWN, words=((bad, 1.0),), near=(NearSlide(slide_id=bad, recorded=bad, similarity=1.0),))
    head = replace(HEAD, source=bad, model_id=bad, records={bad: 1}, notes=(bad,))
    page = Reader(review_page(head, [one], [shown]))
    assert "script" not in page.tags and page.text.count(bad) >= 13


def test_page_loads_and_runs_nothing() -> None:
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "jpeg")
    page = Reader(review_page(HEAD, [ONE], [SHOWN], {3: [picture.getvalue()]}))
    assert {"script", "link", "iframe", "object", "form"}.isdisjoint(page.tags)
    assert all(not name.startswith("on") and name != "href" for name, _ in page.attributes)
    (source,) = [value or "" for name, value in page.attributes if name == "src"]
    assert base64.b64decode(source.removeprefix("data:image/jpeg;base64,")) == picture.getvalue()
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    assert "tiles: " not in page.text


def test_pictures_are_the_tiles_of_the_slide(drawn_slide: Path, tmp_path: Path) -> None:
    slide = open_slide(drawn_slide)
    try:
        inside, nowhere = SHOWN.tiles[0], replace(SHOWN.tiles[0], x_l0=None, y_l0=None)
        pictures = read_tiles(slide, [inside, nowhere])
        truth = slide.read(Region(800, 600, 0, 224, 224))
    finally:
        slide.close()
    assert pictures[1] == b""
    found = np.asarray(Image.open(io.BytesIO(pictures[0])))
    assert found.shape == (144, 144, 3)
    expected = np.asarray(Image.fromarray(truth).resize((144, 144), Image.Resampling.BOX))
    assert np.abs(found.astype(int) - expected).mean() < 8
    # Red and blue the right way round: the drawn tissue is pink, not blue.
    assert np.abs(found.mean(axis=(0, 1)) - truth.mean(axis=(0, 1))).max() < 2
    write_review_page(tmp_path / "review.html", HEAD, [ONE], [SHOWN], {3: pictures})
    assert "data:image/jpeg" in (tmp_path / "review.html").read_text()
