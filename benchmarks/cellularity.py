"""Cellularity against known truth on drawn slides, and CPU time a tile on drawn and real ones.

python benchmarks/cellularity.py [--seeds 3] [--pictures FOLDER]

Slides are drawn at 1 um/px, tissue is found as in a run, tiles are 128 um wide. ``r`` is the correlation of cellularity
with the true share of nuclei over the tiles of a slide; ``chosen`` is the true share in the fifth of tiles that was
chosen, over that of the best fifth. CPU time is that of all threads, the least of three. ``--pictures`` draws the
chosen tiles.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.config import TilesConfig, TissueConfig
from pathopipe.records import TileGrid
from pathopipe.slide.array import ArraySlide
from pathopipe.slide.base import Slide
from pathopipe.slide.open import open_slide
from pathopipe.slide.overview import read_overview
from pathopipe.slide.resolution import require_mpp
from pathopipe.synth import DrawnSlide, SynthSpec
from pathopipe.tiles.cellularity import cellularity, select_cellular
from pathopipe.tiles.grid import plan_grid
from pathopipe.tissue import find_tissue

SHARED_SLIDES = Path(__file__).parents[2] / "shared" / "data" / "slides"
REAL = (
    "tiff/TCGA-V5-A7RE-11A-01-TS1.pyramid.tif",
    "aperio/CMU-1-Small-Region.svs",
    "hamamatsu/test3-DAPI.ndpi",
    "ome-tiff/OS-1-detail.ome.tif",
    "ome-tiff/OS-2-ndpi-ki67.ome.tif",
)
DRAWN = {
    "plain": {"pen": False, "dust": False},
    "pen and dust": {},
    "pale, pen": {"stain_strength": 0.4},
    "dark": {"stain_strength": 1.6},
    "dark field": {"dark_field": True},
}
SHARE = 0.2


class Case(NamedTuple):
    """One slide, and where its nuclei are if that is known."""

    name: str
    slide: Slide
    nuclei: NDArray[np.int32] | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=Path)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    print("| slide | tiles | r | chosen | median share | CPU ms a tile |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in (*drawn_cases(args.seeds), *real_cases()):
        show(case, args.pictures)
        case.slide.close()


def drawn_cases(seeds: int) -> Iterator[Case]:
    for name, settings in DRAWN.items():
        for seed in range(1, seeds + 1):
            drawn = DrawnSlide(SynthSpec(width_px=1400, height_px=1100, mpp=1.0, seed=seed, **settings))
            slide = ArraySlide(drawn.read(0, 0, 1400, 1100), mpp=1.0, slide_id=f"{name} {seed}")
            yield Case(slide.info.slide_id, slide, drawn.labels(0, 0, 1400, 1100)["nuclei"])


def real_cases() -> Iterator[Case]:
    for name in REAL:
        if (SHARED_SLIDES / name).exists():
            yield Case(Path(name).name, open_slide(SHARED_SLIDES / name), None)


def show(case: Case, pictures: Path | None) -> None:
    slide = case.slide
    mpp_l0 = require_mpp(slide.info)
    mpp = 1.0 if case.nuclei is not None else 0.5
    tissue = find_tissue(slide, TissueConfig())
    grid = plan_grid(slide.info, mpp_l0, tissue, TilesConfig(side_px=round(128 / mpp), mpp=mpp))
    seconds = []
    for _ in range(3):
        started = time.process_time()
        found = cellularity(slide, grid, dark_field="dark-field" in tissue.flags)
        seconds.append(time.process_time() - started)
    chosen = select_cellular(grid, found, SHARE)
    r = quality = "-"
    if case.nuclei is not None:
        truth = true_share(case.nuclei, grid)
        best = np.sort(truth)[::-1][: len(chosen)].mean()
        r, quality = f"{np.corrcoef(found, truth)[0, 1]:.3f}", f"{true_share(case.nuclei, chosen).mean() / best:.3f}"
    cost = 1000 * min(seconds) / len(grid)
    print(f"| {case.name} | {len(grid)} | {r} | {quality} | {np.nanmedian(found):.3f} | {cost:.2f} |", flush=True)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        draw(slide, chosen, pictures / f"{case.name.replace(' ', '-').replace(',', '')}.png")


def true_share(nuclei: NDArray[np.int32], grid: TileGrid) -> NDArray[np.float64]:
    width, height = grid.side_l0
    area = width * height
    return np.array([np.count_nonzero(nuclei[y : y + height, x : x + width]) / area for x, y in grid.xy_l0.tolist()])


def draw(slide: Slide, chosen: TileGrid, path: Path) -> None:
    overview = read_overview(slide, 4.0).copy()
    scale = np.array(overview.shape[1::-1]) / slide.info.dims_l0
    for corner in chosen.xy_l0:
        first, last = (np.rint(place * scale).astype(int).tolist() for place in (corner, corner + chosen.side_l0))
        cv2.rectangle(overview, first, last, (0, 140, 0), 2)
    cv2.imwrite(str(path), overview[..., ::-1])


if __name__ == "__main__":
    main()
