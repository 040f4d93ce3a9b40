"""How well the classical finder segments nuclei, and what it costs: real images by stain, drawn slides, counts.

python benchmarks/segmentation.py [--data ../shared/data] [--mpp 0.5] [--overlays FOLDER]

dsb2018 does not state its resolution; what is assumed stands in the table. Counts are set beside those that QuPath gave
on the same images (see the README of the data). PQ, F1 and Dice are pooled over a group's images; AJI is the mean of
its images. Time is that of one thread, on a region of drawn tissue.
"""

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.geometry import Region
from pathopipe.segmentation.classical import ClassicalNuclei, find_nuclei
from pathopipe.segmentation.metrics import aji, overlap, panoptic, pixels
from pathopipe.slide.open import open_slide
from pathopipe.synth import DrawnSlide, SynthSpec

# By the size of the nuclei: the same kinds of tissue at 0.5 (small) and at 2.3 to 2.5 times that (large).
ASSUMED_MPP = {"lilac-small": 0.5, "lilac-large": 0.2, "white": 0.27, "pink": 0.25}
NUCLS_MPP = 0.25
DRAWN = {
    "drawn": {},
    "drawn, pale": {"stain_strength": 0.3},
    "drawn, dark": {"stain_strength": 1.6},
    "drawn, dark field": {"dark_field": True},
}
SEEDS = (1, 2, 3)
DRAWN_SIDE_PX = 1024
COUNTS = {
    "ome-tiff/OS-1-detail.ome.tif": "319 (watershed), 331 (StarDist)",
    "ome-tiff/OS-2-ndpi-ki67.ome.tif": "1323 (threshold 0.2), 1066 (0.4)",
}


class Image(NamedTuple):
    """An image with known nuclei."""

    name: str
    group: str
    rgb: NDArray[np.uint8]
    truth: NDArray[np.int32]
    mpp: float


def read_rgb(path: Path) -> NDArray[np.uint8]:
    return np.ascontiguousarray(cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1])


def read_labels(path: Path) -> NDArray[np.int32]:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.int32)


def real_images(nuclei: Path) -> Iterator[Image]:
    with (nuclei / "dsb2018" / "index.csv").open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["stain_group"], row["name"]))
    for row in rows:
        name, group = row["name"], row["stain_group"]
        folder = nuclei / "dsb2018"
        yield Image(
            name,
            group,
            read_rgb(folder / "images" / f"{name}.png"),
            read_labels(folder / "labels" / f"{name}.png"),
            ASSUMED_MPP[group],
        )
    for path in sorted((nuclei / "nucls" / "images").glob("*.png")):
        yield Image(path.stem, "nucls", read_rgb(path), read_labels(nuclei / "nucls" / "labels" / path.name), NUCLS_MPP)


def drawn_images() -> Iterator[Image]:
    for group, changed in DRAWN.items():
        for seed in SEEDS:
            slide = DrawnSlide(SynthSpec(width_px=6000, height_px=6000, mpp=0.25, seed=seed, **changed))
            # The square of a coarse lattice that holds most tissue.
            mask = slide.tissue_mask(600, 600)
            corners = [(x, y) for x in range(0, 4900, 512) for y in range(0, 4900, 512)]
            x, y = max(corners, key=lambda c: mask[c[1] // 10 : c[1] // 10 + 102, c[0] // 10 : c[0] // 10 + 102].mean())
            box = (x, y, DRAWN_SIDE_PX, DRAWN_SIDE_PX)
            yield Image(f"seed-{seed}", group, slide.read(*box), slide.labels(*box)["nuclei"], 0.25)


def outlined(rgb: NDArray[np.uint8], labels: NDArray[np.int32], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Twice enlarged, with outlines."""
    size = (rgb.shape[1] * 2, rgb.shape[0] * 2)
    picture = cv2.resize(rgb, size, interpolation=cv2.INTER_CUBIC)
    wide = cv2.resize(labels.astype(np.float32), size, interpolation=cv2.INTER_NEAREST)
    square = np.ones((2, 2), np.uint8)
    picture[cv2.erode(wide, square) != cv2.dilate(wide, square)] = colour
    return picture


def score(images: list[Image], model: ClassicalNuclei, overlays: Path | None) -> None:
    tallies = [(overlap(image.truth, find_nuclei(image.rgb, image.mpp, model)), image) for image in images]
    found = sum((panoptic(pairs) for pairs, _ in tallies[1:]), panoptic(tallies[0][0]))
    area = sum((pixels(pairs) for pairs, _ in tallies[1:]), pixels(tallies[0][0]))
    mean_aji = np.nanmean([aji(pairs).jaccard for pairs, _ in tallies])
    first = images[0]
    print(
        f"| {first.group} | {len(images)} | {first.mpp} | {found.tp + found.fn} | {found.tp + found.fp} "
        f"| {found.pq:.3f} | {found.sq:.3f} | {found.f1:.3f} | {mean_aji:.3f} | {area.dice:.3f} |",
        flush=True,
    )
    if overlays is not None:
        for _, image in tallies:
            labels = find_nuclei(image.rgb, image.mpp, model)
            pair = [outlined(image.rgb, image.truth, (0, 200, 0)), outlined(image.rgb, labels, (255, 230, 0))]
            path = overlays / f"{image.group.replace(', ', '-')}-{image.name}.png"
            cv2.imwrite(str(path), np.hstack(pair)[..., ::-1])


def count(slides: Path, model: ClassicalNuclei, overlays: Path | None) -> None:
    print("\n| image | found | QuPath |\n| --- | --- | --- |")
    for name, by_qupath in COUNTS.items():
        if not (slides / name).exists():
            print(f"| {name} | not there | {by_qupath} |")
            continue
        slide = open_slide(slides / name)
        width, height = slide.info.dims_l0
        rgb = slide.read(Region(0, 0, 0, width, height))
        labels = find_nuclei(rgb, slide.info.mpp[0], model)
        print(f"| {name} | {labels.max()} | {by_qupath} |", flush=True)
        if overlays is not None:
            cv2.imwrite(str(overlays / f"{Path(name).name}.png"), outlined(rgb, labels, (255, 230, 0))[..., ::-1])


def clock(model: ClassicalNuclei, rounds: int = 5) -> None:
    """CPU milliseconds a megapixel of the working grid, halo and margin included as a slide has them."""
    cv2.setNumThreads(1)
    core, margin, halo = model.core_px, model.margin_px, model.halo_px
    side = core + 2 * margin
    slide = DrawnSlide(SynthSpec(width_px=4000, height_px=4000, mpp=model.mpp, seed=1, pen=False, dust=False))
    window = slide.read(1600, 1600, side, side)[None]
    region_px = 2048
    repeats = -(-(region_px + 2 * halo) // core)
    maps_s, instances_s = [], []
    for _ in range(rounds):
        start = time.process_time()
        found = model.maps(window)
        maps_s.append(time.process_time() - start)
        region = np.tile(found[0], (repeats, repeats, 1))[: region_px + 2 * halo, : region_px + 2 * halo]
        start = time.process_time()
        labels = model.instances(region)["nuclei"].labels
        instances_s.append(time.process_time() - start)
    maps_ms = min(maps_s) * 1e3 / core**2 * 1e6
    instances_ms = min(instances_s) * 1e3 / region_px**2 * 1e6
    print("\n| CPU ms a megapixel | maps | instances | sum | of 512 x 512 px |\n| --- | --- | --- | --- | --- |")
    total = maps_ms + instances_ms
    print(f"| {model.mpp} um/px | {maps_ms:.0f} | {instances_ms:.0f} | {total:.0f} | {total * 0.262144:.0f} |")
    print(f"\nregions of {region_px} px with {halo} px of halo; {labels.max()} nuclei in the region")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--mpp", type=float, default=0.5, help="micrometres per working pixel")
    parser.add_argument("--overlays", type=Path, help="write a picture of truth and result of each image here")
    args = parser.parse_args()
    if args.overlays is not None:
        args.overlays.mkdir(parents=True, exist_ok=True)

    print("| group | images | um/px | true | found | PQ | SQ | F1 | AJI | Dice |\n" + "| --- " * 10 + "|")
    nuclei = args.data / "nuclei"
    images = [*(real_images(nuclei) if nuclei.is_dir() else ()), *drawn_images()]
    for group in dict.fromkeys(image.group for image in images):
        model = ClassicalNuclei(mpp=args.mpp, dark_field=group == "drawn, dark field")
        score([image for image in images if image.group == group], model, args.overlays)
    count(args.data / "slides", ClassicalNuclei(mpp=args.mpp), args.overlays)
    clock(ClassicalNuclei(mpp=args.mpp))


if __name__ == "__main__":
    main()
