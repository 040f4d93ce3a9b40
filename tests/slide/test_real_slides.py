"""The real slides, as their README describes them."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from pathopipe.geometry import Region
from pathopipe.slide.open import open_slide
from pathopipe.slide.overview import scan_overview

pytestmark = pytest.mark.shared_data

SLIDES = [
    ("aperio/CMU-1-Small-Region.svs", "tiff", "aperio", (2220, 2967), 1, 0.499),
    ("dicom/cmu-1-small-region/level-3-frames-0-1.dcm", "openslide", "dicom", (2220, 2967), 12, 0.499),
    ("dicom/camelyon16-lowres-jpeg2000.dcm", "openslide", "dicom", (1696, 812), 1, 28.97),
    ("hamamatsu/test3-DAPI.ndpi", "openslide", "hamamatsu", (3968, 4864), 7, 0.228),
    ("ome-tiff/OS-1-detail.ome.tif", "tiff", "ome-tiff", (1101, 1101), 1, 0.2271),
    ("ome-tiff/OS-2-ndpi-ki67.ome.tif", "tiff", "ome-tiff", (2202, 2202), 1, 0.2271),
    ("tiff/TCGA-V5-A7RE-11A-01-TS1.pyramid.tif", "tiff", "generic-tiff", (14364, 10020), 5, 0.2485),
]


@pytest.mark.parametrize(("name", "reader", "vendor", "dims", "levels", "mpp"), SLIDES, ids=lambda v: str(v)[-24:])
def test_info(
    shared_data: Path, name: str, reader: str, vendor: str, dims: tuple[int, int], levels: int, mpp: float
) -> None:
    info = open_slide(shared_data / "slides" / name).info
    assert (info.reader, info.vendor, info.dims_l0, len(info.levels)) == (reader, vendor, dims, levels)
    assert info.mpp == pytest.approx((mpp, mpp), rel=2e-3)
    assert sum(e.used for e in info.mpp_evidence) == 1
    assert all(level.block_width_px for level in info.levels)


@pytest.mark.parametrize("name", [row[0] for row in SLIDES])
def test_overview(shared_data: Path, name: str) -> None:
    slide = open_slide(shared_data / "slides" / name)
    found = scan_overview(slide, 16.0)
    assert found.bad_blocks == 0
    height, width = found.pixels.shape[:2]
    assert slide.info.mpp is not None
    shrink = max(1.0, 16.0 / slide.info.mpp[0])
    assert (width, height) == pytest.approx([side / shrink for side in slide.info.dims_l0], abs=1)
    assert found.pixels.std() > 3


@pytest.mark.parametrize("name", ["OS-1-detail.ome.tif", "OS-2-ndpi-ki67.ome.tif"])
def test_ome_tiffs_are_read_as_tifffile_reads_them(shared_data: Path, name: str) -> None:
    path = shared_data / "slides" / "ome-tiff" / name
    slide = open_slide(path)
    np.testing.assert_array_equal(slide.read(Region(0, 0, 0, *slide.info.dims_l0)), tifffile.imread(path))


def test_the_series_and_the_svs_are_one_grid(shared_data: Path) -> None:
    svs = open_slide(shared_data / "slides" / "aperio" / "CMU-1-Small-Region.svs")
    series = open_slide(shared_data / "slides" / "dicom" / "cmu-1-small-region")
    assert svs.info.dims_l0 == series.info.dims_l0
    one, two = (slide.read(Region(500, 700, 0, 400, 300)).astype(float) for slide in (svs, series))
    # The series is shown in false colours: its first channel is luma.
    luma = one @ [0.299, 0.587, 0.114]
    assert np.corrcoef(luma.ravel(), two[..., 0].ravel())[0, 1] > 0.98
    assert np.abs(one - two).mean() > 10
