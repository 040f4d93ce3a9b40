"""Barcodes as another program draws them are read; tissue and plots hold none."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pathopipe.privacy.barcodes import read_bars

# Widths of bars and gaps, in turn, as Zint 2.11.1 draws them.
BARS = [
    (
        "Code 128",
        "51 17 18 13 17 99 23 45",
        "2112142131131232212232111221321232211131413121311131232131312331112",
    ),
    (
        "Code 128",
        "20 19 3 4 12 34 56",
        "2112322212312211321212231213221122321311233311212212312331112",
    ),
    (
        "Code 39",
        "S12-12345 A1",
        "1211212111112111221121121111211122111121121111212121121111211122111121212211111111122111212112211111122111211121111211212112111121121121211",
    ),
]


def draw(widths: str, module_px: int) -> NDArray[np.uint8]:
    runs = [
        np.full(int(width) * module_px, 20 if number % 2 == 0 else 230, np.uint8) for number, width in enumerate(widths)
    ]
    row = np.concatenate([np.full(12 * module_px, 230, np.uint8), *runs, np.full(12 * module_px, 230, np.uint8)])
    picture = np.full((120, len(row) + 40), 230, np.uint8)
    picture[40:90, 20 : 20 + len(row)] = row
    return picture


@pytest.mark.parametrize(("name", "text", "widths"), BARS)
@pytest.mark.parametrize("module_px", [2, 3])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_reads_bars_in_all_four_directions(name: str, text: str, widths: str, module_px: int, turns: int) -> None:
    assert read_bars(np.rot90(draw(widths, module_px), turns)) == {(name, text)}


def test_reads_bars_through_noise() -> None:
    name, text, widths = BARS[0]
    noise = np.random.default_rng(5).normal(0, 15, draw(widths, 3).shape)
    assert read_bars(np.clip(draw(widths, 3) + noise, 0, 255).astype(np.uint8)) == {(name, text)}


def test_one_wrong_bar_is_not_read() -> None:
    _, _, widths = BARS[0]
    wrong = widths[:20] + ("1" if widths[20] != "1" else "2") + widths[21:]
    assert not read_bars(draw(wrong, 3))


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_stripes_are_no_barcode(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert not read_bars(rng.integers(0, 256, (300, 400), dtype=np.uint8))
    stripes = np.repeat(rng.integers(0, 2, 200) * 200 + 20, 3).astype(np.uint8)
    assert not read_bars(np.tile(stripes, (50, 1)))


def test_blank_and_tiny_pictures_hold_none() -> None:
    assert not read_bars(np.full((100, 100), 255, np.uint8))
    assert not read_bars(np.zeros((1, 1), np.uint8))
