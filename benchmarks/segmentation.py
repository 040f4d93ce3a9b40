"""How well objects are found, network beside classical finder: real images by stain, drawn slides, counts, costs.

python benchmarks/segmentation.py [--data ../shared/data] [--weights FILE] [--kept-back] [--overlays FOLDER]

dsb2018 does not state its resolution; what is assumed stands in the table. Counts are set beside those that QuPath gave
on the same images (see the README of the data). PQ, F1 and Dice are pooled over a group's images; AJI is the mean of
its images. ``--kept-back`` scores only images that the recipe of the shipped network (configs/segmenter.yaml) does not
learn from; glands and tissue types are scored on those in any case. On a slide of an organ that no label of the recipe
comes from, finders are compared with the points that another network put there, which are no truth. Time is that of one
thread, on a region of drawn tissue.
"""

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from pathopipe.geometry import Region
from pathopipe.segmentation.classical import ClassicalNuclei, find_nuclei
from pathopipe.segmentation.examples import Example, read_datasets, split_by_source
from pathopipe.segmentation.learned import LearnedModel, find_objects, open_model
from pathopipe.segmentation.metrics import aji, detection, overlap, panoptic, pixels
from pathopipe.segmentation.model import Instances
from pathopipe.segmentation.network import default_weights, load_network
from pathopipe.segmentation.settings import read_settings
from pathopipe.segmentation.validate import examine
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
RECIPE = Path(__file__).parents[1] / "configs" / "segmenter.yaml"
Finder = Callable[[NDArray[np.uint8], float, str], NDArray[np.int32]]
"""Labels of nuclei from pixels, um/px and the group of the image."""
COUNTS = {
    "ome-tiff/OS-1-detail.ome.tif": "319 (watershed), 331 (StarDist)",
    "ome-tiff/OS-2-ndpi-ki67.ome.tif": "1323 (threshold 0.2), 1066 (0.4)",
}


POINTS = ("tiff/TCGA-V5-A7RE-11A-01-TS1.pyramid.tif", "TCGA-V5-A7RE-11A-01-TS1.nulite-points.geojson")
N_FIELDS, FIELD_PX = 8, 1536
"""The fields with most points."""


NO_GLANDS = "aperio/CMU-1-Small-Region.svs"
SURE = 0.85


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


def score(images: list[Image], name: str, find: Finder, overlays: Path | None) -> None:
    found_on = [(find(image.rgb, image.mpp, image.group), image) for image in images]
    tallies = [overlap(image.truth, labels) for labels, image in found_on]
    found = sum((panoptic(pairs) for pairs in tallies[1:]), panoptic(tallies[0]))
    area = sum((pixels(pairs) for pairs in tallies[1:]), pixels(tallies[0]))
    mean_aji = np.nanmean([aji(pairs).jaccard for pairs in tallies])
    first = images[0]
    print(
        f"| {first.group} | {name} | {len(images)} | {first.mpp} | {found.tp + found.fn} | {found.tp + found.fp} "
        f"| {found.pq:.3f} | {found.sq:.3f} | {found.f1:.3f} | {mean_aji:.3f} | {area.dice:.3f} |",
        flush=True,
    )
    if overlays is not None:
        for labels, image in found_on:
            pair = [outlined(image.rgb, image.truth, (0, 200, 0)), outlined(image.rgb, labels, (255, 230, 0))]
            path = overlays / f"{name}-{image.group.replace(', ', '-')}-{image.name}.png"
            cv2.imwrite(str(path), np.hstack(pair)[..., ::-1])


def count(slides: Path, finders: dict[str, Finder], overlays: Path | None) -> None:
    print("\n| image | " + " | ".join(finders) + " | QuPath |\n| --- " + "| --- " * (len(finders) + 1) + "|")
    for name, by_qupath in COUNTS.items():
        if not (slides / name).exists():
            print(f"| {name} | not there |")
            continue
        slide = open_slide(slides / name)
        width, height = slide.info.dims_l0
        rgb = slide.read(Region(0, 0, 0, width, height))
        found = {one: find(rgb, slide.info.mpp[0], "") for one, find in finders.items()}
        print(
            f"| {name} | " + " | ".join(str(labels.max()) for labels in found.values()) + f" | {by_qupath} |",
            flush=True,
        )
        if overlays is not None:
            for one, labels in found.items():
                picture = outlined(rgb, labels, (255, 230, 0))[..., ::-1]
                cv2.imwrite(str(overlays / f"{one}-{Path(name).name}.png"), picture)


def agree(data: Path, finders: dict[str, Finder]) -> None:
    """How far finders agree with the points that another network, NuLite, put on a frozen section of the oesophagus."""
    slide_path, points_path = data / "slides" / POINTS[0], data / "geojson" / POINTS[1]
    print("\n| points of NuLite | finder | points | found | F1 at 5 um | precision | recall |\n" + "| --- " * 7 + "|")
    if not (slide_path.exists() and points_path.exists()):
        print("| not there |")
        return
    marked = json.loads(points_path.read_text(encoding="utf-8"))
    xy = np.floor(np.concatenate([each["geometry"]["coordinates"] for each in marked])).astype(np.int64)
    slide = open_slide(slide_path)
    fields, n_points = np.unique(xy // FIELD_PX, axis=0, return_counts=True)
    corners = fields[np.argsort(-n_points, kind="stable")[:N_FIELDS]] * FIELD_PX
    for name, find in finders.items():
        counts = []
        for x, y in corners.tolist():
            own = xy[(xy // FIELD_PX * FIELD_PX == (x, y)).all(axis=1)] - (x, y)
            truth = np.zeros((FIELD_PX, FIELD_PX), np.int32)
            truth[own[:, 1], own[:, 0]] = np.arange(1, len(own) + 1)
            labels = find(slide.read(Region(x, y, 0, FIELD_PX, FIELD_PX)), slide.info.mpp[0], "")
            counts.append(detection(overlap(truth, labels), 5 / slide.info.mpp[0]))
        tp, fp, fn = (sum(getattr(one, what) for one in counts) for what in ("tp", "fp", "fn"))
        print(
            f"| {N_FIELDS} fields of {FIELD_PX} px | {name} | {tp + fn} | {tp + fp} "
            f"| {2 * tp / (2 * tp + fp + fn):.3f} | {tp / (tp + fp):.3f} | {tp / (tp + fn):.3f} |",
            flush=True,
        )


def kept_back(data: Path) -> list[Example]:
    """Images of people's labels that the recipe does not learn from."""
    settings = read_settings(RECIPE)
    datasets = [
        dataset.model_copy(
            update={
                key: {task: data / path for task, path in value.items()} if isinstance(value, dict) else data / value
                for key in ("images", "labels", "table")
                if (value := getattr(dataset, key, None)) is not None
            }
        )
        for dataset in settings.datasets
        if dataset.kind != "drawn"
    ]
    tasks = {task.name: tuple(one.name for one in task.classes) for task in settings.network.tasks}
    del tasks["lumina"]  # of drawn fields alone
    examples = read_datasets(datasets, tasks)
    shares = {one.name: one.holdout for one in datasets if one.holdout is not None}
    return split_by_source(examples, settings.train.holdout, settings.train.seed, shares=shares)[1]


def score_glands(examples: list[Example], model: LearnedModel, slides: Path) -> None:
    """Dice on images of people's masks, at the resolution that the recipe assumes and at others; and where none are."""
    own = [example for example in examples if "glands" in example.labels and example.labels["glands"].any()]
    print(
        f"\n| glands, kept back | images | patients | as if um/px | Dice | mean of images | Dice of sure ones |\n"
        f"{'| --- ' * 7}|"
    )
    for factor in (0.5, 0.75, 1.0, 1.3):
        found = [find_objects(example.rgb, example.mpp * factor, model)["glands"] for example in own]
        every = [
            dice_parts(one.labels > 0, example.labels["glands"] > 0) for one, example in zip(found, own, strict=True)
        ]
        sure = [dice_parts(surely(one), example.labels["glands"] > 0) for one, example in zip(found, own, strict=True)]
        n_sources = len({example.source for example in own})
        pooled, pooled_sure = (np.sum(parts, axis=0) for parts in (every, sure))
        print(
            f"| {own[0].dataset} | {len(own)} | {n_sources} | {own[0].mpp * factor:.2f} | {pooled[0] / pooled[1]:.3f} "
            f"| {np.mean([both / each for both, each in every]):.3f} | {pooled_sure[0] / pooled_sure[1]:.3f} |",
            flush=True,
        )
    path = slides / NO_GLANDS
    print("\n| slide without glands | found mm2 | of that sure |\n| --- | --- | --- |")
    if not path.exists():
        print("| not there |")
        return
    slide = open_slide(path)
    width, height = slide.info.dims_l0
    mpp = slide.info.mpp[0]
    one = find_objects(slide.read(Region(0, 0, 0, width, height)), mpp, model)["glands"]
    areas = [np.count_nonzero(mask) * mpp**2 / 1e6 for mask in (one.labels > 0, surely(one))]
    print(f"| {NO_GLANDS} (skin) | {areas[0]:.3f} | {areas[1]:.3f} |")


def surely(found: Instances) -> NDArray[np.bool_]:
    """Where the glands are that have a class probability of at least ``SURE``."""
    return np.append(False, found.class_probability >= SURE)[found.labels]


def dice_parts(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[int, int]:
    """Twice what is shared, and the sum of both."""
    return 2 * np.count_nonzero(found & truth), np.count_nonzero(found) + np.count_nonzero(truth)


def score_tissue(examples: list[Example], model: LearnedModel, network: torch.nn.Module) -> None:
    """Macro AUROC of tissue types, one against the rest; a patient's images of one label count once."""
    names = [one.name for one in model.spec.task("tissue_types").classes]
    print("\n| tissue types, kept back | images | patients | classes | macro AUROC by patient |\n" + "| --- " * 5 + "|")
    labelled = [example for example in examples if example.tissue_types]
    for dataset in dict.fromkeys(_collection(example) for example in labelled):
        own = [one for one in labelled if _collection(one) == dataset]
        grouped: dict[tuple[str, frozenset[int]], list[NDArray[np.float32]]] = {}
        for example in own:
            case = examine(network, example, device=torch.device("cpu"), autocast=model.precision != "fp32")
            grouped.setdefault((example.source, example.tissue_types), []).append(case.tissue_types)
        share = np.array([np.mean(each, axis=0) for each in grouped.values()])
        labels = [allowed for _, allowed in grouped]
        areas = []
        for allowed in sorted(set(labels), key=sorted):
            is_one = np.array([label == allowed for label in labels])
            if is_one.any() and not is_one.all():
                areas.append(roc_auc_score(is_one, share[:, sorted(allowed)].sum(axis=1)))
        told = ", ".join("/".join(names[at] for at in sorted(allowed)) for allowed in sorted(set(labels), key=sorted))
        n_sources = len({example.source for example in own})
        value = f"{np.mean(areas):.3f}" if areas else "one class"
        print(f"| {dataset} | {len(own)} | {n_sources} | {told} | {value} |", flush=True)


def _collection(example: Example) -> str:
    """The recipe has an entry each for what is normal and what is tumour in one collection."""
    return example.dataset.removesuffix("-normal").removesuffix("-tumour")


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
    parser.add_argument("--weights", type=Path, help="of another network than the shipped one")
    parser.add_argument("--kept-back", action="store_true", help="leave out images that the recipe learns from")
    parser.add_argument("--overlays", type=Path, help="write a picture of truth and result of each image here")
    args = parser.parse_args()
    if args.overlays is not None:
        args.overlays.mkdir(parents=True, exist_ok=True)
    model = open_model(args.weights)
    nuclei_only = model.only(["nuclei"])

    def classical(rgb: NDArray[np.uint8], mpp: float, group: str) -> NDArray[np.int32]:
        return find_nuclei(rgb, mpp, ClassicalNuclei(dark_field=group == "drawn, dark field"))

    def network(rgb: NDArray[np.uint8], mpp: float, group: str) -> NDArray[np.int32]:
        return find_objects(rgb, mpp, nuclei_only)["nuclei"].labels

    finders: dict[str, Finder] = {"classical": classical, "network": network}
    is_there = (args.data / "nuclei").is_dir()
    examples = kept_back(args.data) if is_there else []
    untold = {example.name for example in examples}
    images = list(drawn_images())
    if is_there:
        images = [one for one in real_images(args.data / "nuclei") if not args.kept_back or one.name in untold] + images
    print("| group | finder | images | um/px | true | found | PQ | SQ | F1 | AJI | Dice |\n" + "| --- " * 11 + "|")
    for group in dict.fromkeys(image.group for image in images):
        for name, find in finders.items():
            if name == "classical" or group != "drawn, dark field":  # the network knows stained tissue alone
                score([image for image in images if image.group == group], name, find, args.overlays)
    count(args.data / "slides", finders, args.overlays)
    agree(args.data, finders)
    if is_there:
        score_glands(examples, model, args.data / "slides")
        score_tissue(examples, model, load_network(args.weights or default_weights()))
    clock(ClassicalNuclei())


if __name__ == "__main__":
    main()
