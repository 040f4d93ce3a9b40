"""Files with random bytes flipped: never a crash or a hang, never other pixels than OpenSlide's without an error."""

import faulthandler
from pathlib import Path

import numpy as np
import pytest
from slide_files import picture, pyramid, write_ome, write_svs, write_tiff

from pathopipe.errors import PathopipeError, TileReadError
from pathopipe.geometry import Region
from pathopipe.slide.base import BlockSlide
from pathopipe.slide.native import NativeReader
from pathopipe.slide.open import open_slide
from pathopipe.slide.openslide import OpenSlideReader

WRITERS = {
    "svs": lambda path: write_svs(path, pyramid(500, 380, 1)),
    "ycbcr": lambda path: write_tiff(
        path, pyramid(512, 384, 2), tile=128, compression="jpeg", photometric="ycbcr", subsampling=(2, 2)
    ),
    "deflate": lambda path: write_tiff(path, [picture(400, 300)], tile=128, compression="deflate"),
    "lzw": lambda path: write_tiff(path, [picture(400, 300)], tile=128, compression="lzw", bigtiff=True),
    "ome": lambda path: write_ome(path, pyramid(400, 300, 2), tile=128, compression="jpeg"),
}


def read_all(path: Path) -> str:
    """Read every level in pieces, as they are and shrunk; compare with OpenSlide where its road was taken over."""
    try:
        slide = open_slide(path, mpp=0.25)
    except PathopipeError:
        return "refused"
    reference = OpenSlideReader(path, slide_id="r", files=("", 0)) if isinstance(slide, NativeReader) else None
    failed = False
    try:
        for number, level in enumerate(slide.info.levels[:2]):
            step = level.downsample_x
            for y in range(0, min(level.height_px, 512), 128):
                for x in range(0, min(level.width_px, 512), 128):
                    region = Region(int(x * step), int(y * step), number, 128, 128)
                    try:
                        found = slide.read(region)
                    except TileReadError:
                        failed = True
                    else:
                        if reference is not None:
                            # Where OpenSlide has an error, so must we.
                            np.testing.assert_array_equal(found, reference.read(region), err_msg=str(region))
                    if isinstance(slide, BlockSlide):
                        out = np.empty((64, 64, 3), np.uint8)
                        try:
                            slide.read_into(out, region, factor=2, dct=2 in level.scales, keep=False)
                        except TileReadError:
                            failed = True
    finally:
        slide.close()
        if reference is not None:
            reference.close()
    return "failed" if failed else "read"


@pytest.mark.parametrize(("cases", "seed"), [(12, 1), pytest.param(400, 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", WRITERS)
def test_flipped_bytes(tmp_path: Path, kind: str, cases: int, seed: int) -> None:
    whole = WRITERS[kind](tmp_path / "whole.tif").read_bytes()
    path = tmp_path / "flipped.tif"
    rng = np.random.default_rng(seed)
    ends: dict[str, int] = {"refused": 0, "failed": 0, "read": 0}
    for case in range(cases):
        data = np.frombuffer(whole, np.uint8).copy()
        # Half of the cases go for the headers and directories, which are few bytes of a file.
        start = 0 if case % 2 else max(0, len(data) - 3000) if case % 4 else 0
        stop = len(data) if case % 2 else min(len(data), start + 3000)
        places = rng.integers(start, stop, int(rng.integers(1, 6)))
        data[places] ^= rng.integers(1, 256, len(places)).astype(np.uint8)
        path.write_bytes(data.tobytes())
        faulthandler.dump_traceback_later(60, exit=False)
        try:
            ends[read_all(path)] += 1
        except Exception as error:
            raise AssertionError(f"case {case}: bytes {places.tolist()} of {kind}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
    assert ends["failed"] + ends["refused"] > 0
    assert ends["read"] + ends["failed"] > 0
