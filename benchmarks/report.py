"""The report of a large cohort: makes stores cheaply, then measures time, memory and the size of the page.

python benchmarks/report.py --slides 1000
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from shapely.geometry import Polygon

from pathopipe.geometry import polygons_to_ragged
from pathopipe.records import Level, SlideInfo, TileGrid, Tissue
from pathopipe.report.cohort import read_colour, write_report
from pathopipe.report.summary import update_summary
from pathopipe.report.thumbnail import draw_thumbnail, write_png
from pathopipe.store import SlideStore, store_path

SIDE_L0 = 20_000
PICTURES = 12
FEATURES = 768
TILES = 1200


def outline(rng: np.random.Generator) -> Polygon:
    """A lump of tissue in level-0 pixels."""
    turn = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    reach = SIDE_L0 * (0.3 + 0.08 * np.sin(3 * turn + rng.uniform(0, 6)) + rng.normal(0, 0.006, 90))
    return Polygon(np.stack([SIDE_L0 / 2 + reach * np.cos(turn), SIDE_L0 / 2 + reach * np.sin(turn)], axis=1))


def make_pictures(folder: Path, rng: np.random.Generator) -> list[tuple[Path, Tissue, TileGrid]]:
    """Some thumbnails, which the slides share, with what is drawn on them."""
    made = []
    steps = np.arange(0, SIDE_L0, 512)
    lattice = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    for number in range(PICTURES):
        polygon = outline(rng)
        inside = np.hypot(*(lattice + 256 - SIDE_L0 / 2).T) < 0.28 * SIDE_L0
        xy_l0 = lattice[inside][:TILES].astype(np.int64)
        tissue = Tissue(
            mask=np.ones((64, 64), np.uint8),
            mpp=(78.0, 78.0),
            polygons=(polygon,),
            areas_mm2=(polygon.area * 0.0625 / 1e6,),
        )
        grid = TileGrid(
            name="256px-0.5um",
            side_px=256,
            mpp=0.5,
            achieved_mpp=(0.5, 0.5),
            overlap_px=0,
            side_l0=(512, 512),
            stride_l0=(512.0, 512.0),
            level=0,
            read_px=(512, 512),
            resample="area",
            xy_l0=xy_l0,
            tissue_fraction=np.ones(len(xy_l0), np.float32),
        )
        overview = np.full((1600, 1600, 3), 244, np.uint8)
        rows, columns = np.indices((1600, 1600))
        there = np.hypot(rows - 800, columns - 800) < 480
        pink = np.array([200, 130, 180]) + rng.normal(0, 8, 3)
        overview[there] = np.clip(pink + rng.normal(0, 14, (int(there.sum()), 3)), 0, 255)
        path = folder / "pictures" / f"{number}.png"
        write_png(path, draw_thumbnail(overview, (SIDE_L0, SIDE_L0), tissue, grid))
        made.append((path, tissue, grid))
    return made


def make_cohort(folder: Path, n_slides: int, seed: int = 0) -> None:
    """Stores of slides that nobody scanned, every fiftieth failed, every fortieth odd."""
    rng = np.random.default_rng(seed)
    pictures = make_pictures(folder, rng)
    sites = rng.normal(0, 1, (4, FEATURES))
    (folder / "thumbnails").mkdir(parents=True)
    rows, lines = [], ["slide_id,path,site,diagnosis"]
    for number in range(n_slides):
        slide_id = f"slide-{number:05d}"
        picture, tissue, grid = pictures[number % PICTURES]
        site, failed = int(rng.integers(4)), number % 50 == 49
        lines.append(f"{slide_id},none.svs,site {'ABCD'[site]},{('tumour', 'normal')[number % 2]}")
        row = dict.fromkeys(("reason", "flags"), "") | {"slide_id": slide_id, "mpp": "0.25", "seconds": 61.5}
        row |= {"tissue_mm2": 1, "tiles": len(grid), "bad_tiles": 0, "status": "failed" if failed else "done"}
        rows.append(row)
        if failed:
            row["reason"] = f"{slide_id}: tile ({number}, 12) can't be read: not a JPEG block"
            continue
        os.link(picture, folder / "thumbnails" / f"{slide_id}.png")
        scale = float(np.exp(rng.normal(0, 0.3))) * (0.02 if number % 40 == 7 else 1)
        info = SlideInfo(
            slide_id=slide_id,
            path=Path("none.svs"),
            reader="tiff",
            vendor="generic",
            dims_l0=(SIDE_L0, SIDE_L0),
            levels=(Level(SIDE_L0, SIDE_L0, 1.0, 1.0),),
            size_bytes=1,
            fingerprint=slide_id,
            mpp=(0.25, 0.25),
        )
        store = SlideStore.create_or_open(store_path(folder, slide_id), info, created_by="benchmark")
        store.write_table("tissue/mask", tissue.mask)
        for name, array in polygons_to_ragged(tissue.polygons)._asdict().items():
            store.write_table(f"tissue/{name}", array)
        areas = [area * scale for area in tissue.areas_mm2]
        facts = {"areas_mm2": areas, "flags": ["blur"] if number % 33 == 0 else [], "method": "brightfield"}
        store.write_attributes("tissue", {"mpp": tissue.mpp, "unreadable_share": 0.0, **facts, "inputs": {}})
        store.write_grid(grid, {})
        about = {"inputs": {"tiles": "x", "encoder": {"name": "drawn"}}}
        array = store.create_embeddings(
            grid.name, "drawn", rows=len(grid), features=FEATURES, dtype="float16", chunk_rows=1024, about=about
        )
        middle = sites[site] + rng.normal(0, 0.4, FEATURES) + (3 if number % 40 == 7 else 0)
        for chunk in range(array.n_chunks):
            piece = array.chunk_slice(chunk)
            count = piece.stop - piece.start
            values = (middle + np.zeros((count, 1))).astype(np.float16)
            array.write_chunk(chunk, values, np.ones(count, np.uint8))
        seconds = {"read": 30.0, "model": 41.0, "waiting": 9.0, "write": 1.5}
        array.finish(bad_tiles=0, seconds=seconds, limited_by="model")
    update_summary(folder / "summary.csv", rows)
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="Folder for the stores; used again where it is there.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary) / "out"
        if not (folder / "summary.csv").exists():
            started = time.perf_counter()
            make_cohort(folder, arguments.slides)
            print(f"{arguments.slides} stores made in {time.perf_counter() - started:.0f} s")
        process, most, stop = psutil.Process(), [0], threading.Event()

        def watch() -> None:
            while not stop.wait(0.05):
                most[0] = max(most[0], process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        before = process.memory_info().rss
        watcher.start()
        began, processor = time.perf_counter(), time.process_time()
        reading: list[float] = []
        report = write_report(
            folder,
            folder / "report.html",
            labels=read_colour(folder / "manifest.csv", None),
            threads=arguments.threads,
            on_slide=lambda done, total: reading.append(time.perf_counter() - began) if done == total else None,
        )
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        stop.set()
        watcher.join()
        print(
            f"{report.slides} slides: {seconds:.1f} s ({reading[0]:.1f} s of it reading, {processor:.1f} s processor), "
            f"page {report.page_bytes / 1e6:.1f} MB, memory {before / 1e6:.0f} MB before, {most[0] / 1e6:.0f} MB at "
            f"most, {dict(report.statuses)}, {len(report.outliers)} outliers"
        )


if __name__ == "__main__":
    main()
