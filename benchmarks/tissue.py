"""Agreement and CPU time of tissue detection, on drawn slides and on the real ones beside the checkout.

python benchmarks/tissue.py [--seeds 3] [--outlines FOLDER]

Drawn slides are drawn at 2 um/px and seen at 8 um/px. CPU seconds are those of ``detect_tissue`` on the overview, the
least of three; ``read`` is what reading the overview and judging focus takes besides. ``--outlines`` writes a picture
of each result.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.config import TissueConfig
from pathopipe.records import Tissue
from pathopipe.slide.open import open_slide
from pathopipe.slide.overview import read_overview
from pathopipe.synth import DrawnSlide, SynthSpec
from pathopipe.tissue import detect_tissue, find_tissue

SHARED_SLIDES = Path(__file__).parents[2] / "shared" / "data" / "slides"
REAL = (
    "tiff/TCGA-V5-A7RE-11A-01-TS1.pyramid.tif",
    "aperio/CMU-1-Small-Region.svs",
    "dicom/cmu-1-small-region",
    "dicom/camelyon16-lowres-jpeg2000.dcm",
    "hamamatsu/test3-DAPI.ndpi",
    "ome-tiff/OS-1-detail.ome.tif",
    "ome-tiff/OS-2-ndpi-ki67.ome.tif",
)
TRUTH = {REAL[0]: "tiff/TCGA-V5-A7RE-11A-01-TS1.tissue-mask-ds4.png"}
DRAWN = {
    "plain": {"pen": False, "dust": False},
    "pale": {"stain_strength": 0.3, "pen": False},
    "pen": {"dust": False},
    "dust": {"pen": False},
    "border": {"border": True, "pen": False},
    "pale, pen, border": {"stain_strength": 0.3, "border": True},
    "dark field": {"dark_field": True},
}
SIZES = ((1400, 1000), (700, 900), (2200, 800))
CONFIG = TissueConfig()


class Case(NamedTuple):
    """One slide, what is known of it and what was found."""

    name: str
    rgb: NDArray[np.uint8]
    dims_l0: tuple[int, int]
    mpp_l0: tuple[float, float]
    truth: NDArray[np.bool_] | None
    found: Tissue
    read_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--outlines", type=Path)
    args = parser.parse_args()
    print("| slide | size l0 | overview | Dice | tissue mm2 | regions | flags | CPU s | read s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in (*drawn_cases(args.seeds), *real_cases()):
        show(case)
        if args.outlines is not None:
            args.outlines.mkdir(parents=True, exist_ok=True)
            draw(case, args.outlines / f"{case.name.replace(' ', '-').replace(',', '')}.png")
    speed()


def drawn_cases(seeds: int) -> Iterator[Case]:
    for seed in range(seeds):
        width, height = SIZES[seed % len(SIZES)]
        for name, options in DRAWN.items():
            spec = SynthSpec(width_px=width, height_px=height, mpp=2.0, seed=seed, **options)
            slide = DrawnSlide(spec)
            size = (width // 4, height // 4)
            rgb = cv2.resize(slide.read(0, 0, width, height), size, interpolation=cv2.INTER_AREA)
            found = detect_tissue(rgb, dims_l0=(width, height), mpp_l0=(2.0, 2.0), config=CONFIG)
            truth = slide.tissue_mask(size[1], size[0]) > 0
            yield Case(f"{name} {seed}", rgb, (width, height), (2.0, 2.0), truth, found, 0.0)


def real_cases() -> Iterator[Case]:
    for name in REAL:
        path = SHARED_SLIDES / name
        if not path.exists():
            continue
        slide = open_slide(path)
        start = time.process_time()
        found = find_tissue(slide, CONFIG)
        taken = time.process_time() - start
        truth = None
        if name in TRUTH:
            truth = cv2.imread(str(SHARED_SLIDES / TRUTH[name]), cv2.IMREAD_GRAYSCALE) > 0
        rgb = read_overview(slide, CONFIG.mpp)
        assert slide.info.mpp is not None
        yield Case(path.name, rgb, slide.info.dims_l0, slide.info.mpp, truth, found, taken)
        slide.close()


def cpu_seconds(case: Case) -> float:
    least = np.inf
    for _ in range(3):
        start = time.process_time()
        detect_tissue(case.rgb, dims_l0=case.dims_l0, mpp_l0=case.mpp_l0, config=CONFIG)
        least = min(least, time.process_time() - start)
    return float(least)


def dice(found: NDArray[np.uint8], truth: NDArray[np.bool_]) -> float:
    """Agreement at the finer of the two resolutions."""
    mask = cv2.resize(found, (truth.shape[1], truth.shape[0]), interpolation=cv2.INTER_NEAREST) > 0
    return float(2 * np.count_nonzero(mask & truth) / max(np.count_nonzero(mask) + np.count_nonzero(truth), 1))


def show(case: Case) -> None:
    agreement = f"{dice(case.found.mask, case.truth):.4f}" if case.truth is not None else "-"
    seconds = cpu_seconds(case)
    print(
        f"| {case.name} | {case.dims_l0[0]} x {case.dims_l0[1]} | {case.rgb.shape[1]} x {case.rgb.shape[0]} "
        f"| {agreement} | {sum(case.found.areas_mm2):.3f} | {len(case.found.polygons)} "
        f"| {', '.join(case.found.flags) or '-'} | {seconds:.2f} | {max(case.read_s - seconds, 0):.2f} |",
        flush=True,
    )


def draw(case: Case, path: Path) -> None:
    zoom = max(1, 900 // max(case.rgb.shape[:2]))
    picture = cv2.resize(case.rgb[..., ::-1], None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)
    if case.found.method == "dark-field":
        picture = cv2.convertScaleAbs(picture, alpha=4)
    scale = (picture.shape[1] / case.dims_l0[0], picture.shape[0] / case.dims_l0[1])
    for polygon in case.found.polygons:
        for ring in (polygon.exterior, *polygon.interiors):
            cv2.polylines(picture, [np.rint(np.asarray(ring.coords) * scale).astype(np.int32)], True, (0, 200, 0), 1)
    cv2.imwrite(str(path), picture)


def speed() -> None:
    """A big slide: about 100,000 x 80,000 px at 0.25 um/px, from copies of a drawn one."""
    slide = DrawnSlide(SynthSpec(width_px=1250, height_px=1000, mpp=8.0, seed=1))
    rgb = np.tile(slide.read(0, 0, 1250, 1000), (2, 2, 1))
    dims = (rgb.shape[1] * 32, rgb.shape[0] * 32)
    found = detect_tissue(rgb, dims_l0=dims, mpp_l0=(0.25, 0.25), config=CONFIG)
    show(Case("four copies at 8 um/px", rgb, dims, (0.25, 0.25), None, found, 0.0))


if __name__ == "__main__":
    main()
