"""What reading tiles costs beside decoding them: CPU time, wall time with two threads, memory; and what dct changes.

    python benchmarks/reading.py [--rounds 5] [--tiles 1024] [--side-px 30000 60000] [--difference]

Every slide is read in two ways: tiles of 256 px at the resolution of level 0, and tiles at half of it made from level 0
alone. Unit is the decoding of exactly the JPEG tiles that are needed, each once and whole, with libjpeg-turbo through
imagecodecs, from bytes at hand into the same memory again and again, which lies where the decoder is fastest (at a
multiple of 32 bytes it takes up to 40 % longer). A second unit is the same as imagecodecs is usually called, with a
new array for every JPEG tile. What two threads gain is compared with what they gain when they do
nothing but decode. All roads take turns in one process, and the table has the median of
their ratios round by round, so that other load hits them alike; CPU times come in ms a tile. Memory is the growth of
the process while it reads the whole grid, read in a process of its own. ``--difference`` compares the pixels and the
handcrafted embeddings of tiles made by reduced decoding with those of an area filter.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import imagecodecs
import numpy as np
import psutil
import tifffile
from numpy.typing import NDArray

from pathopipe.config import TilesConfig
from pathopipe.embeddings.handcrafted import FEATURE_NAMES, handcrafted_features
from pathopipe.geometry import Region
from pathopipe.records import TileGrid, Tissue
from pathopipe.slide.base import Slide, empty_pixels
from pathopipe.slide.open import open_slide
from pathopipe.slide.openslide import OpenSlideReader
from pathopipe.synth import SynthSpec, write_slide
from pathopipe.tiles.grid import plan_grid
from pathopipe.tiles.read import TileStream, read_tile

REAL = Path(__file__).parents[2] / "shared" / "data" / "slides" / "tiff" / "TCGA-V5-A7RE-11A-01-TS1.pyramid.tif"
BATCH = 32
EVERYWHERE = Tissue(np.ones((1, 1), np.uint8), (8.0, 8.0), (), ())


def main() -> None:
    """Draw slides and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiles", type=int, default=1024, help="tiles read in a round")
    parser.add_argument("--side-px", type=int, nargs="*", default=[30_000], help="sides of the drawn slides")
    parser.add_argument("--difference", action="store_true", help="compare dct with area instead of timing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        paths = [REAL] if REAL.exists() else []
        for side_px in arguments.side_px:
            paths.append(Path(temporary) / f"drawn-{side_px}.tiff")
            spec = SynthSpec(width_px=side_px, height_px=side_px, mpp=0.25, seed=3, repeat_px=4096)
            write_slide(paths[-1], spec)
        # Tiles of 240 px do not fit the grid: each JPEG tile serves several of ours.
        paths.append(retiled(paths[0], Path(temporary) / "blocks-of-240.tiff"))
        for path in paths:
            if arguments.difference:
                compare_filters(path)
            else:
                measure_slide(path, arguments.rounds, arguments.tiles)


def retiled(source: Path, path: Path, block_px: int = 240, side_px: int = 9600) -> Path:
    """Copy the middle of a slide into a TIFF of JPEG tiles of another size."""
    slide = open_slide(source)
    x, y = ((side - side_px) // 2 if side > side_px else 0 for side in slide.info.dims_l0)
    pixels = slide.read(Region(x, y, 0, side_px, side_px))
    tifffile.imwrite(
        path,
        pixels,
        tile=(block_px, block_px),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 80, "outcolorspace": "rgb"},
        metadata=None,
        resolution=(40_000, 40_000),
        resolutionunit="CENTIMETER",
    )
    slide.close()
    return path


def grid_of(slide: Slide, factor: int, resample: str, n_tiles: int | None = None) -> TileGrid:
    """Whole tiles in storage order, made from level 0 even where a coarser level would do."""
    info = replace(slide.info, levels=slide.info.levels[:1])
    config = TilesConfig.model_validate({"mpp": 0.25 * factor, "min_tissue": 0.0, "resample": resample, "edge": "drop"})
    grid = plan_grid(info, (0.25, 0.25), EVERYWHERE, config)
    # From the middle of the order: scans begin with glass.
    first = 0 if n_tiles is None else max(0, (len(grid) - n_tiles) // 2)
    some = slice(first, None if n_tiles is None else first + n_tiles)
    return replace(grid, xy_l0=grid.xy_l0[some], tissue_fraction=grid.tissue_fraction[some])


def needed_streams(path: Path, grid: TileGrid) -> list[tuple[bytes, bytes | None]]:
    """The JPEG tiles under a grid, each once, with their tables."""
    with tifffile.TiffFile(path) as tif, path.open("rb") as file:
        page = tif.pages[0].aspage()
        across = -(-page.imagewidth // page.tilewidth)
        needed = {
            row * across + column
            for x, y in grid.xy_l0.tolist()
            for row in range(y // page.tilelength, (y + grid.side_l0[1] - 1) // page.tilelength + 1)
            for column in range(x // page.tilewidth, (x + grid.side_l0[0] - 1) // page.tilewidth + 1)
        }
        streams = []
        for index in sorted(needed):
            file.seek(page.dataoffsets[index])
            streams.append((file.read(page.databytecounts[index]), page.jpegtables))
    return streams


Road = Callable[[], tuple[float, float]]
"""Goes once over the tiles and returns CPU and wall seconds; what is done before the clock starts does not count."""


def timed(work: Callable[[], None]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def decoding(streams: list[tuple[bytes, bytes | None]], threads: int) -> Road:
    shape = imagecodecs.jpeg8_decode(streams[0][0], tables=streams[0][1]).shape
    buffers = [empty_pixels(shape) for _ in range(threads)]

    def work(number: int) -> None:
        for stream, tables in streams[number::threads]:
            imagecodecs.jpeg8_decode(stream, tables=tables, out=buffers[number])

    def road() -> tuple[float, float]:
        with ThreadPoolExecutor(threads) as pool:
            return timed(lambda: [None for _ in pool.map(work, range(threads))] and None)

    return road


PLAIN = "decode whole, new arrays"


def decoding_plainly(streams: list[tuple[bytes, bytes | None]]) -> Road:
    """One thread, into memory that is asked for each time."""

    def work() -> None:
        for stream, tables in streams:
            imagecodecs.jpeg8_decode(stream, tables=tables)

    return lambda: timed(work)


def streaming(path: Path, grid: TileGrid, threads: int) -> Road:
    """Read a grid the way ``run`` does, through a freshly opened slide: nothing is decoded yet."""

    def road() -> tuple[float, float]:
        slide = open_slide(path)

        def work() -> None:
            for _ in TileStream(slide, grid, [(0, slice(0, len(grid)))], batch_size=BATCH, threads=threads):
                pass

        spent = timed(work)
        slide.close()
        return spent

    return road


def asking_openslide(path: Path, grid: TileGrid) -> Road:
    """One tile at a time; every fourth batch, for it takes its time."""
    some = [row for row in range(len(grid)) if row // BATCH % 4 == 0]

    def road() -> tuple[float, float]:
        slide = OpenSlideReader(path, slide_id="s", files=("", 0))
        cpu, wall = timed(lambda: [read_tile(slide, grid, row) for row in some] and None)
        slide.close()
        return cpu * len(grid) / len(some), wall * len(grid) / len(some)

    return road


def measure_slide(path: Path, rounds: int, n_tiles: int) -> None:
    slide = open_slide(path)
    native = grid_of(slide, 1, "auto", n_tiles)
    dct, area = (grid_of(slide, 2, resample, n_tiles) for resample in ("auto", "area"))
    slide.close()
    assert (native.resample, dct.resample, area.resample) == ("none", "dct", "area")
    print(
        f"\n{path.name}, {slide.info.dims_l0[0]} x {slide.info.dims_l0[1]} px, {len(native)} tiles native, "
        f"{len(area)} of twice the side"
    )
    for title, grids in (("native", {"native": native}), ("2x finer", {"dct": dct, "area": area})):
        grid = next(iter(grids.values()))
        streams = needed_streams(path, grid)
        roads = {f"decode whole, threads={threads}": decoding(streams, threads) for threads in (1, 2)}
        roads[PLAIN] = decoding_plainly(streams)
        for name, one in grids.items():
            for threads in (1, 2):
                roads[f"pathopipe {name}, threads={threads}"] = streaming(path, one, threads)
        openslide_grid = replace(grid, resample="none" if grid is native else "area")
        roads["OpenSlide, a read_region a tile"] = asking_openslide(path, openslide_grid)
        print_table(title, interleaved(roads, rounds), len(grid))
    for name, one in (("native", native), ("dct", dct), ("area", area)):
        print(f"memory of reading {name}, 2 threads: {peak_growth_mb(path, one):.0f} MB")


def interleaved(roads: dict[str, Road], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall) seconds of each road in each round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in roads}
    for number in range(rounds + 1):
        for name, road in roads.items():
            spent = road()
            if number:  # the first round warms the file cache
                found[name].append(spent)
    return found


def print_table(title: str, found: dict[str, list[tuple[float, float]]], n_tiles: int) -> None:
    unit, plain = next(iter(found.values())), found[PLAIN]
    print(f"{title:34s} {'CPU ms/tile':>12s} {'x decode CPU':>13s} {'x new arrays':>13s} {'wall ms/tile':>13s}")
    for name, times in found.items():
        by_unit, by_plain = (
            statistics.median(cpu / base for (cpu, _), (base, _) in zip(times, one, strict=True))
            for one in (unit, plain)
        )
        cpu_ms, wall_ms = (statistics.median(column) / n_tiles * 1e3 for column in zip(*times, strict=True))
        print(f"  {name:32s} {cpu_ms:12.3f} {by_unit:13.2f} {by_plain:13.2f} {wall_ms:13.3f}", flush=True)
    for name in [name for name in found if name.endswith("threads=2")]:
        pairs = zip(found[name.replace("threads=2", "threads=1")], found[name], strict=True)
        faster = statistics.median(one / two for (_, one), (_, two) in pairs)
        print(f"  {name}: {faster:.2f} times faster than one (wall)", flush=True)


def peak_growth_mb(path: Path, grid: TileGrid) -> float:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_growth_mb, (path, grid))


def _peak_growth_mb(path: Path, grid: TileGrid) -> float:
    process = psutil.Process()
    before = peak = process.memory_info().rss
    slide = open_slide(path)
    for _ in TileStream(slide, grid, [(0, slice(0, len(grid)))], batch_size=BATCH, threads=2):
        peak = max(peak, process.memory_info().rss)
    slide.close()
    return (peak - before) / 2**20


def compare_filters(path: Path, n_tiles: int = 600) -> None:
    """Pixels and handcrafted numbers of dct against area."""
    slide = open_slide(path)
    roads = [grid_of(slide, 2, resample) for resample in ("auto", "area")]
    errors: list[float] = []
    numbers: list[list[NDArray[np.float32]]] = [[], []]
    biases: list[NDArray[np.float64]] = []
    for row in islice(rows_with_tissue(slide, roads[1]), n_tiles):
        tiles = [read_tile(slide, grid, row) for grid in roads]
        difference = tiles[0].astype(np.float64) - tiles[1]
        errors.append(float(np.mean(difference**2)))
        biases.append(difference.mean(axis=(0, 1)))
        for found, tile in zip(numbers, tiles, strict=True):
            found.append(handcrafted_features(tile[None], roads[0].achieved_mpp, threads=1)[0])
    slide.close()
    dct, area = (np.stack(found).astype(np.float64) for found in numbers)
    spread = area.std(axis=0)
    moved = np.abs(dct - area)[:, spread > 0] / spread[spread > 0]
    middle = np.median(moved, axis=0)
    worst = np.argsort(middle)[::-1][:3]
    names = np.asarray(FEATURE_NAMES)[spread > 0]
    psnr = 10 * np.log10(255**2 / np.asarray(errors))
    print(f"\n{path.name}: dct against area, {len(errors)} tiles of 256 px at 0.5 um/px with tissue")
    print(
        f"  PSNR a tile: median {np.median(psnr):.1f} dB, worst {psnr.min():.1f} dB; "
        f"mean difference {np.mean(biases):+.3f} grey levels"
    )
    print(
        f"  handcrafted, change in units of a feature's sd over tiles: median over features of the median over tiles "
        f"{np.median(middle):.4f}, 95 % of features below {np.quantile(middle, 0.95):.3f}; most changed: "
        + ", ".join(f"{names[n]} {middle[n]:.2f}" for n in worst)
    )
    correlations = [np.corrcoef(dct[:, n], area[:, n])[0, 1] for n in np.flatnonzero(spread > 0)]
    print(
        f"  correlation of a feature over tiles: median {np.median(correlations):.5f}, least {np.min(correlations):.4f}"
    )


def rows_with_tissue(slide: Slide, grid: TileGrid) -> Iterator[int]:
    """Rows, spread over the slide, of tiles that are not mostly glass."""
    for row in np.random.default_rng(0).permutation(len(grid)).tolist():
        if np.mean(read_tile(slide, grid, row).min(axis=2) < 210) > 0.5:
            yield row


if __name__ == "__main__":
    main()
