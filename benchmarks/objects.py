"""What objects cost beside the model that finds them: post-processing, writing, memory, export.

    python benchmarks/objects.py network [--slide FILE] [--weights FILE] [--side-px 8000] [--rounds 3] [--device auto]
    python benchmarks/objects.py regions [--weights FILE] [--side-px 8000] [--region-sizes 512,2048,8192]
    python benchmarks/objects.py stub [--side-px 8000] [--rounds 3]
    python benchmarks/objects.py slides [--weights FILE] [--sizes 6000,20000,60000x14000] [--folder DIR]
    python benchmarks/objects.py merge [--counts 10000,100000,1000000]
    python benchmarks/objects.py export [--counts 200000,1000000]

``network``: the network of ``--weights`` (else the shipped one) sees the windows of a slide (a drawn one where none is
given) held in memory, and nothing else is done; then the slide goes through reading, the same network, blending,
instances, measurements, parts and merging. CPU seconds are of the whole process, all threads added up: they say more
than the clock where others use the machine. ``regions``: the same slide with regions of several sizes; how many objects
have no equal (IoU above 0.99) among those of the largest. ``stub``: as ``network``, with a small network whose weights
are random and whose output is thrown away; the classical maps take its place. ``slides``: ``pathopipe segment``,
classical or with ``--weights``, in a process of its own, on slides that repeat one drawn block; the peak is what the
system counted. ``merge``: what regions found, made up, into one layer. ``export``: layers of made-up nuclei of 24
vertices to GeoJSON.
"""

import argparse
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from pathopipe.cluster import keep_freed_memory
from pathopipe.config import TissueConfig
from pathopipe.geojson import stable_ids
from pathopipe.geometry import Outlines, outlines_to_shapes
from pathopipe.records import ObjectClass, ObjectTable, Tissue
from pathopipe.segmentation.classical import ClassicalNuclei
from pathopipe.segmentation.merge import merge_layers
from pathopipe.segmentation.model import Model
from pathopipe.segmentation.morphology import MEASUREMENT_NAMES
from pathopipe.segmentation.segment import Plan, SegmentReport, segment_regions
from pathopipe.slide.array import ArraySlide
from pathopipe.slide.base import Slide
from pathopipe.slide.open import open_slide
from pathopipe.slide.resolution import require_mpp
from pathopipe.store import SlideStore, store_path
from pathopipe.synth import SynthSpec, write_slide
from pathopipe.tiles.grid import Windows, plan_windows
from pathopipe.tiles.read import read_tile
from pathopipe.tissue import find_tissue


def make_stub(cores: int) -> ClassicalNuclei:
    """A model whose time is a network's; torch is imported here, for its memory would stand in the other tables."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(cores)

    class StubNetwork(ClassicalNuclei):
        """A U-Net of four levels, 16 to 128 channels: about the smallest that segments nuclei well."""

        def __init__(self) -> None:
            super().__init__()
            widths = (16, 32, 64, 128)
            self.down = nn.ModuleList(block(i, o) for i, o in zip((3, *widths), widths, strict=False))
            self.up = nn.ModuleList(block(o + i, i) for i, o in itertools.pairwise(widths))
            self.head = nn.Conv2d(widths[0], 4, 1)

        @torch.inference_mode()
        def forward(self, images: NDArray[np.uint8]) -> None:
            """Everything that a network would do."""
            for image in images:
                x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
                passed = []
                for level, down in enumerate(self.down):
                    x = down(nn.functional.max_pool2d(x, 2) if level else x)
                    passed.append(x)
                for level in reversed(range(len(self.up))):
                    wide = nn.functional.interpolate(x, scale_factor=2.0)
                    x = self.up[level](torch.cat([passed[level], wide], dim=1))
                self.head(x).argmax(dim=1).to(torch.uint8)

        def maps(self, windows: NDArray[np.uint8]) -> NDArray[Any]:
            """The network's time and the classical maps."""
            self.forward(windows)
            return super().maps(windows)

    def block(inputs: int, outputs: int) -> nn.Module:
        """Two convolutions."""
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    return StubNetwork()


def stub(side_px: int, rounds: int) -> None:
    """The network alone, and the whole."""
    cores = len(os.sched_getaffinity(0))
    model = make_stub(cores)
    with tempfile.TemporaryDirectory() as temporary:
        slide = open_slide(drawn(Path(temporary), side_px))
        plan, windows = plan_of(slide, model, 2048)
        pixels = np.stack([read_tile(slide, windows.grid, row) for row in range(len(windows.grid))])
        print(f"{len(pixels)} windows of {windows.grid.side_px} px, {cores} cores")
        header = ("round", "network s", "whole s", "whole/network", "objects s", "merge s", "nuclei")
        print("".join(f"{name:>15}" for name in header))
        for number in range(rounds):
            started = time.perf_counter()
            for first in range(0, len(pixels), model.batch_size):
                model.maps(pixels[first : first + model.batch_size])
            bare = time.perf_counter() - started
            started = time.perf_counter()
            store, report, merge_s = whole_road(slide, Path(temporary) / f"{number}.zarr", plan, cores)
            whole, n = time.perf_counter() - started, len(store.objects("nuclei"))
            row = (number + 1, f"{bare:.1f}", f"{whole:.1f}", f"{whole / bare:.2f}", f"{report.post_s:.1f}")
            row = (*row, f"{merge_s:.1f}", n)
            print("".join(f"{value:>15}" for value in row), flush=True)


def drawn(folder: Path, side_px: int) -> Path:
    """A drawn slide at 0.25 um/px."""
    path = folder / f"drawn-{side_px}.tiff"
    if not path.exists():
        write_slide(path, SynthSpec(width_px=side_px, height_px=side_px, mpp=0.25, seed=5))
    return path


def network(
    folder: Path, side_px: int, rounds: int, weights: Path | None, device: Any, slide_path: Path | None = None
) -> None:
    """The bare network, and ``segment`` with it."""
    from pathopipe.segmentation.learned import open_model

    cores = len(os.sched_getaffinity(0))
    model = open_model(weights, device=device, threads=cores)
    slide = open_slide(slide_path or drawn(folder, side_px))
    plan, windows = plan_of(slide, model, 2048)
    pixels = np.stack([read_tile(slide, windows.grid, row) for row in range(len(windows.grid))])
    core_mpx = len(pixels) * model.core_px**2 / 1e6
    print(
        f"{len(pixels)} windows of {windows.grid.side_px} px, {core_mpx:.0f} Mpx without margins; {model.device.type}, "
        f"{model.precision}, {cores} cores; weights {model.identity['weights_sha256'][:12]}"
    )
    header = ("round", "network s", "whole s", "whole/network", "network CPU s", "whole CPU s", "whole/network")
    header = (*header, "blend, objects s", "merge s", "objects", "peak MB")
    print("".join(f"{name:>18}" for name in header))
    model.maps(pixels[: model.batch_size])  # the first call plans its convolutions
    keep_freed_memory()  # as the command does
    for number in range(rounds):
        started, cpu_started = time.perf_counter(), time.process_time()
        for first in range(0, len(pixels), model.batch_size):
            model.maps(pixels[first : first + model.batch_size])
        bare, bare_cpu = time.perf_counter() - started, time.process_time() - cpu_started
        started, cpu_started = time.perf_counter(), time.process_time()
        store, report, merge_s = whole_road(slide, folder / f"{number}.zarr", plan, cores)
        whole, whole_cpu = time.perf_counter() - started, time.process_time() - cpu_started
        n = "+".join(str(len(store.objects(layer.name))) for layer in plan.layers)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        row = (number + 1, f"{bare:.1f}", f"{whole:.1f}", f"{whole / bare:.2f}")
        row = (*row, f"{bare_cpu:.1f}", f"{whole_cpu:.1f}", f"{whole_cpu / bare_cpu:.2f}")
        row = (*row, f"{report.post_s:.1f}", f"{merge_s:.1f}", n, f"{peak_mb:.0f}")
        print("".join(f"{value:>18}" for value in row), flush=True)


def regions(folder: Path, side_px: int, sizes: list[int], weights: Path | None, device: Any) -> None:
    """Whether the size of regions changes objects."""
    from pathopipe.segmentation.learned import open_model

    cores = len(os.sched_getaffinity(0))
    model = open_model(weights, device=device, threads=cores)
    slide = open_slide(drawn(folder, side_px))
    found: dict[str, NDArray[np.object_]] = {}
    print("".join(f"{name:>15}" for name in ("region px", "layer", "objects", "not the same", "share %")))
    for region_px in sorted(sizes, reverse=True):
        plan, _ = plan_of(slide, model, region_px)
        store, _, _ = whole_road(slide, folder / f"regions-{region_px}.zarr", plan, cores)
        for layer in plan.layers:
            shapes = outlines_to_shapes(store.objects(layer.name).read().outlines)
            largest = found.setdefault(layer.name, shapes)
            n_other = len(shapes) - same_objects(shapes, largest) + len(largest) - same_objects(largest, shapes)
            share = 100 * n_other / max(len(shapes) + len(largest), 1)
            row = (plan.region_px, layer.name, len(shapes), n_other, f"{share:.3f}")
            print("".join(f"{value:>15}" for value in row), flush=True)


def same_objects(shapes: NDArray[np.object_], others: NDArray[np.object_]) -> int:
    """How many of some shapes have a partner with an IoU above 0.99."""
    one, other = shapely.STRtree(others).query(shapes, predicate="intersects")
    shared = shapely.area(shapely.intersection(shapes[one], others[other]))
    iou = shared / (shapely.area(shapes[one]) + shapely.area(others[other]) - shared)
    return len(np.unique(one[iou > 0.99]))


def plan_of(slide: Slide, model: Model, region_px: int) -> tuple[Plan, Windows]:
    """All layers of a model on the tissue of a slide."""
    tissue = find_tissue(slide, TissueConfig())
    windows = plan_windows(
        slide.info,
        require_mpp(slide.info),
        tissue,
        mpp=model.mpp,
        core_px=model.core_px,
        margin_px=model.margin_px,
        allow_enlarge=False,
    )
    plan = Plan(
        model=model,
        layers=model.layers,
        windows=windows,
        tissue=tissue,
        dims_l0=slide.info.dims_l0,
        region_px=-(-region_px // model.core_px) * model.core_px,
    )
    return plan, windows


def whole_road(slide: Slide, path: Path, plan: Plan, cores: int) -> tuple[SlideStore, SegmentReport, float]:
    """From the slide to merged layers; the seconds are those of merging."""
    store = SlideStore.create_or_open(path, slide.info, created_by="benchmark")
    for name in plan.names:
        store.begin_objects(name, {}, regions="")
    report = segment_regions(slide, store, plan, threads=cores)
    merging = time.perf_counter()
    merge_layers(store, plan, {name: {} for name in plan.names}, {})
    return store, report, time.perf_counter() - merging


def slides(folder: Path, sizes: list[tuple[int, int]], weights: Path | None) -> None:
    """``pathopipe segment`` on growing slides."""
    header = ("side px", "tissue mm2", "seconds", "CPU seconds", "peak MB", "GeoJSON s", "its peak MB", "  objects")
    print("".join(f"{name:>15}" for name in header), flush=True)
    for width_px, height_px in sizes:
        slide = folder / f"objects-{width_px}x{height_px}.tiff"
        if not slide.exists():
            write_slide(slide, SynthSpec(width_px=width_px, height_px=height_px, mpp=0.25, seed=5, repeat_px=4096))
        out = folder / slide.stem
        model = ("--weights", weights) if weights is not None else ("--model", "classical")
        seconds, cpu_s, peak_mb = run("segment", slide, "--out", out, "--no-geojson", "--fresh", *model)
        export_s, _, export_mb = run("export", "geojson", out, "--out", out / "qupath", "--layer", "nuclei")
        store = SlideStore.open(store_path(out, slide.stem))
        n = ", ".join(f"{len(store.objects(layer))} {layer}" for layer in store.layers())
        row = (f"{width_px}x{height_px}", f"{sum(store.read_tissue().areas_mm2):.1f}", f"{seconds:.1f}")
        row = (*row, f"{cpu_s:.1f}", f"{peak_mb:.0f}", f"{export_s:.1f}", f"{export_mb:.0f}", f"  {n}")
        print("".join(f"{value:>15}" for value in row), flush=True)


def merge(folder: Path, counts: list[int]) -> None:
    """Parts of made-up regions of 2,500 nuclei into one layer."""
    header = ("nuclei", "regions", "seconds", "us/nucleus", "most MB so far")
    print("".join(f"{name:>15}" for name in header))
    model, region_px, per_row = ClassicalNuclei(), 2048, 50
    for n in counts:
        side = max(1, round(np.sqrt(n / per_row**2)))
        info = ArraySlide(np.zeros((8, 8, 3), np.uint8), mpp=0.5, slide_id=f"merge-{n}").info
        info = replace(info, dims_l0=(side * region_px, side * region_px))
        tissue = Tissue(mask=np.ones((64, 64), np.uint8), mpp=(1.0, 1.0), polygons=(), areas_mm2=())
        windows = plan_windows(
            info, (0.5, 0.5), tissue, mpp=0.5, core_px=model.core_px, margin_px=model.margin_px, allow_enlarge=False
        )
        plan = Plan(
            model=model,
            layers=model.layers,
            windows=windows,
            tissue=tissue,
            dims_l0=info.dims_l0,
            region_px=region_px,
        )
        store = SlideStore.create_or_open(folder / f"merge-{n}.zarr", info, created_by="benchmark")
        store.begin_objects("nuclei", {}, regions="")
        (table,) = made_up(per_row**2, per_row * 40, "merge")
        rng = np.random.default_rng(0)
        for row in range(side):
            for column in range(side):
                corner = np.array([column, row]) * region_px
                moved = table.outlines._replace(vertices_l0=table.outlines.vertices_l0 + corner.astype(np.float32))
                part = {
                    "centroid_px": table.centroid_l0 + corner + rng.uniform(-5, 5, table.centroid_l0.shape),
                    "class_id": table.class_id,
                    "class_probability": table.class_probability,
                    "measurements": rng.uniform(0, 9, (len(table), len(MEASUREMENT_NAMES))).astype(np.float32),
                    **moved._asdict(),
                    "bad_windows": np.asarray(0),
                }
                store.parts("nuclei").write(f"{row}-{column}", part)
        started = time.perf_counter()
        merge_layers(store, plan, {"nuclei": {}}, {})
        seconds, found = time.perf_counter() - started, len(store.objects("nuclei"))
        most_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        cells = (found, side * side, f"{seconds:.1f}", f"{seconds / found * 1e6:.0f}", f"{most_mb:.0f}")
        print("".join(f"{value:>15}" for value in cells), flush=True)


def export(folder: Path, counts: list[int]) -> None:
    """Made-up nuclei to GeoJSON."""
    print(f"{'nuclei':>9} {'seconds':>8} {'peak MB':>8} {'files':>6} {'MB':>6}")
    for n in counts:
        out = folder / f"export-{n}"
        side = int(np.ceil(np.sqrt(n))) * 40
        info = ArraySlide(np.zeros((8, 8, 3), np.uint8), mpp=0.25, slide_id=f"export-{n}").info
        store = SlideStore.create_or_open(store_path(out, info.slide_id), info, created_by="benchmark")
        store.write_objects("nuclei", made_up(n, side, info.slide_id), about={"inputs": {"n": n}})
        seconds, _, peak_mb = run("export", "geojson", out, "--out", out / "qupath", "--layer", "nuclei")
        files = list((out / "qupath").glob("*.geojson*"))
        size = sum(path.stat().st_size for path in files) / 1e6
        print(f"{n:9d} {seconds:8.1f} {peak_mb:8.0f} {len(files):6d} {size:6.0f}", flush=True)


def made_up(n: int, side: int, slide_id: str) -> Iterator[ObjectTable]:
    """Round nuclei of 24 vertices on a grid, 16 measurements each."""
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = np.stack([np.cos(turn), np.sin(turn)], axis=1) * 12
    ring = np.concatenate([ring, ring[:1]])
    rng = np.random.default_rng(0)
    for first in range(0, n, 20_000):
        rows = np.arange(first, min(first + 20_000, n))
        centre = np.stack([rows * 40 % side + 20, rows * 40 // side * 40 + 20], axis=1).astype(np.float64)
        size = rng.uniform(0.6, 1.0, (len(rows), 1, 1))
        one_each = np.arange(len(rows) + 1, dtype=np.int64)
        yield ObjectTable(
            classes=(ObjectClass("Nucleus", (0, 90, 200)),),
            measurement_names=tuple(f"Number {k} µm" for k in range(16)),
            centroid_l0=centre,
            class_id=np.zeros(len(rows), np.uint8),
            class_probability=np.full(len(rows), np.nan, np.float32),
            measurements=rng.uniform(0, 100, (len(rows), 16)).astype(np.float32),
            outlines=Outlines(
                (centre[:, None] + ring * size).reshape(-1, 2).astype(np.float32), one_each * 25, one_each, one_each
            ),
            id=stable_ids(slide_id, "nuclei", rows.tolist()),
            parent=np.full(len(rows), -1),
        )


def run(*arguments: object) -> tuple[float, float, float]:
    """A command in a process of its own: wall seconds, CPU seconds, peak MB."""
    command = [sys.executable, "-m", "pathopipe", *map(str, arguments)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {said.decode()}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3


def main() -> None:
    """Run one of the six."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("network", "regions", "stub", "slides", "merge", "export"))
    parser.add_argument("--side-px", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slide", type=Path, help="of network: this one, not a drawn one")
    parser.add_argument("--sizes", default="6000,20000,60000", help="of slides: sides, or WIDTHxHEIGHT")
    parser.add_argument("--weights", type=Path, help="the shipped ones when left out; of slides: classical")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--region-sizes", default="512,2048,8192")
    parser.add_argument("--counts", help="nuclei of merge and export")
    parser.add_argument("--folder", type=Path, help="where slides and results go; a temporary folder when left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.what == "network":
            network(folder, arguments.side_px, arguments.rounds, arguments.weights, arguments.device, arguments.slide)
        elif arguments.what == "regions":
            sizes = [int(size) for size in arguments.region_sizes.split(",")]
            regions(folder, arguments.side_px, sizes, arguments.weights, arguments.device)
        elif arguments.what == "stub":
            stub(arguments.side_px, arguments.rounds)
        elif arguments.what == "slides":
            sizes = [[int(side) for side in size.split("x")] for size in arguments.sizes.split(",")]
            slides(folder, [(size[0], size[-1]) for size in sizes], arguments.weights)
        elif arguments.what == "merge":
            merge(folder, [int(count) for count in (arguments.counts or "10000,100000,1000000").split(",")])
        else:
            export(folder, [int(count) for count in (arguments.counts or "200000,1000000").split(",")])


if __name__ == "__main__":
    main()
