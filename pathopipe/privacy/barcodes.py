"""Reads the barcodes that laboratories print on slide labels: Code 128 and Code 39, along rows and columns.

Both have what keeps chance out: Code 128 a check symbol, Code 39 the same start and stop and two of three widths.
Source: ISO/IEC 15417 (Code 128), ISO/IEC 16388 (Code 39).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_bars"]

_LINES = 160
_LEAST_CONTRAST = 60
_LEAST_CHARACTERS = 3
# Widths of bar, gap, bar, ... of the symbols 0 to 105, in modules; the stop has a seventh.
_WIDTHS = (
    "212222 222122 222221 121223 121322 131222 122213 122312 132212 221213 221312 231212 112232 122132 122231 "
    "113222 123122 123221 223211 221132 221231 213212 223112 312131 311222 321122 321221 312212 322112 322211 "
    "212123 212321 232121 111323 131123 131321 112313 132113 132311 211313 231113 231311 112133 112331 132131 "
    "113123 113321 133121 313121 211331 231131 213113 213311 213131 311123 311321 331121 312113 312311 332111 "
    "314111 221411 431111 111224 111422 121124 121421 141122 141221 112214 112412 122114 122411 142112 142211 "
    "241211 221114 413111 241112 134111 111242 121142 121241 114212 124112 124211 411212 421112 421211 212141 "
    "214121 412121 111143 111341 131141 114113 114311 411113 411311 113141 114131 311141 411131 211412 211214 "
    "211232 "
)
_CODE_128 = _WIDTHS.split()
_SYMBOLS = {tuple(map(int, widths)): number for number, widths in enumerate(_CODE_128)}
_STARTS = (103, 104, 105)
_STOP = (2, 3, 3, 1, 1, 1)
# Wide elements of the nine, as bits from the left; "*" starts and ends.
_CODE_39 = dict(
    zip(
        (
            0b000110100, 0b100100001, 0b001100001, 0b101100000, 0b000110001, 0b100110000, 0b001110000, 0b000100101,
            0b100100100, 0b001100100, 0b100001001, 0b001001001, 0b101001000, 0b000011001, 0b100011000, 0b001011000,
            0b000001101, 0b100001100, 0b001001100, 0b000011100, 0b100000011, 0b001000011, 0b101000010, 0b000010011,
            0b100010010, 0b001010010, 0b000000111, 0b100000110, 0b001000110, 0b000010110, 0b110000001, 0b011000001,
            0b111000000, 0b010010001, 0b110010000, 0b011010000, 0b010000101, 0b110000100, 0b011000100, 0b010010100,
        ),
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ-. *",
        strict=True,
    )
)  # fmt: skip
_STAR = 0b010010100


def read_bars(grey: NDArray[np.uint8]) -> set[tuple[str, str]]:
    """Kind and text of every barcode that lies along the rows or columns of a picture, in either direction.

    Args:
        grey: (height, width) uint8, bars dark on light.

    Returns:
        Pairs of ``Code 128`` or ``Code 39`` and what it says (for Code 128 the numbers of its symbols).
    """
    found: set[tuple[str, str]] = set()
    for picture in (grey, grey.T):
        rows = np.unique(np.linspace(0, len(picture) - 1, _LINES).astype(int))
        for row in picture[rows]:
            runs, starts_dark = _runs(row)
            if len(runs) < 30:
                continue
            for widths, dark in ((runs, starts_dark), (runs[::-1], starts_dark ^ (len(runs) % 2 == 0))):
                bars = widths[0 if dark else 1 :]
                found.update(("Code 128", text) for text in _read_128(bars))
                found.update(("Code 39", text) for text in _read_39(bars))
    return found


def _runs(row: NDArray[np.uint8]) -> tuple[NDArray[np.int64], bool]:
    """Lengths of the dark and light runs of a row of pixels, and whether the first is dark."""
    low, high = int(row.min()), int(row.max())
    if high - low < _LEAST_CONTRAST:
        return np.empty(0, np.int64), False
    dark = row < (low + high) / 2
    edges = np.flatnonzero(np.diff(dark)) + 1
    return np.diff(np.concatenate([[0], edges, [len(row)]])), bool(dark[0])


def _read_128(bars: NDArray[np.int64]) -> Iterator[str]:
    """Texts of Code 128 in the runs of one row, the first of which is dark."""
    if len(bars) < 6 * 4 + 7:
        return
    windows = np.lib.stride_tricks.sliding_window_view(bars, 6)[::2]
    modules = _modules(windows)
    starts = np.array([[int(c) for c in _CODE_128[number]] for number in _STARTS])
    for place in np.flatnonzero((modules[:, None] == starts).all(axis=2).any(axis=1)):
        numbers: list[int] = []
        for symbol in range(place, len(modules), 3):
            widths = tuple(modules[symbol].tolist())
            if widths == _STOP:
                check = numbers[0] + sum(weight * number for weight, number in enumerate(numbers[1:-1], 1))
                if len(numbers) >= _LEAST_CHARACTERS + 2 and check % 103 == numbers[-1]:
                    yield " ".join(map(str, numbers[1:-1]))
                break
            if widths not in _SYMBOLS:
                break
            numbers.append(_SYMBOLS[widths])


def _modules(windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Widths in modules of symbols that are eleven modules wide."""
    return np.asarray(np.rint(windows * 11 / windows.sum(axis=1, keepdims=True)), np.int64)


def _read_39(bars: NDArray[np.int64]) -> Iterator[str]:
    """Texts of Code 39 in the runs of one row, the first of which is dark."""
    if len(bars) < 10 * (_LEAST_CHARACTERS + 2):
        return
    windows = np.lib.stride_tricks.sliding_window_view(bars, 9)[::2]
    ordered = np.sort(windows, axis=1)
    # Three of nine are wide, at least one and a half times as wide as the widest narrow one.
    clear = (ordered[:, 6] >= 1.5 * ordered[:, 5]) & (ordered[:, 8] <= 2 * ordered[:, 6])
    wide = windows >= ordered[:, 6:7]
    codes = (wide * (1 << np.arange(8, -1, -1))).sum(axis=1)
    stars = np.flatnonzero(clear & (codes == _STAR))
    for place in stars:
        text = ""
        for symbol in range(place + 5, len(codes), 5):
            if not clear[symbol] or int(codes[symbol]) not in _CODE_39:
                break
            if codes[symbol] == _STAR:
                if len(text) >= _LEAST_CHARACTERS:
                    yield text
                break
            text += _CODE_39[int(codes[symbol])]
