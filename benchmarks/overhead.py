"""What ``run`` costs beside the model: all stages of a slide against the bare network on the same tiles.

    python benchmarks/overhead.py [--architecture vit_small_patch16_224] [--slides 1] [--rounds 3]

The bare network sees the same uint8 batches, read beforehand and held in memory; its time covers resizing, normalising
and the forward pass. Both are measured in turn in one process, and the table has every round. Start-up (imports,
building the network) is left out of both. With several slides (the same one by several names) a cohort is run, and the
bare network sees the tiles as many times: what is saved between two slides shows.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from pathopipe.cluster import run_cohort
from pathopipe.config import load_config
from pathopipe.embeddings.catalog import find_encoder
from pathopipe.embeddings.embed import build_encoder
from pathopipe.pipeline import RunPlan
from pathopipe.records import SlideRef
from pathopipe.slide.open import open_slide
from pathopipe.store import SlideStore, store_path
from pathopipe.synth import SynthSpec, write_slide
from pathopipe.tiles.read import read_tile

BATCH = 32


def main() -> None:
    """Draw a slide, run both roads in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="vit_small_patch16_224")
    parser.add_argument("--side-px", type=int, default=9000, help="side of the drawn slide at 0.25 um/px")
    parser.add_argument("--slides", type=int, default=1, help="slides of the cohort")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    name = f"timm.{arguments.architecture}"
    config = load_config(None, [f"embed.encoder={name}", "tiles.side_px=224", f"embed.batch_size={BATCH}"])
    cores = len(os.sched_getaffinity(0))
    encoder = build_encoder(find_encoder(name), config.embed, mpp=(0.5, 0.5), threads=cores)
    with tempfile.TemporaryDirectory() as temporary:
        slide_path = Path(temporary) / "drawn.tiff"
        write_slide(slide_path, SynthSpec(width_px=arguments.side_px, height_px=arguments.side_px, mpp=0.25, seed=5))
        refs = [SlideRef(f"drawn{number}", slide_path) for number in range(arguments.slides)]
        out = Path(temporary) / "out"
        run_cohort(refs, RunPlan(out=out, config=config, threads=cores))  # builds the model, warms the file cache
        tiles = load_tiles(out, slide_path)
        print(f"{name}, {len(refs)} slides of {len(tiles)} tiles", end=" ")
        print(f"of 224 px at 0.5 um/px from 0.25, batch {BATCH}, {cores} cores")
        print(f"{'round':>5} {'run s':>8} {'bare s':>8} {'run/bare':>9} {'tiles/s':>8}")
        for number in range(arguments.rounds):
            started = time.perf_counter()
            run_cohort(refs, RunPlan(out=out, config=config, fresh="tissue", threads=cores))
            whole = time.perf_counter() - started
            started = time.perf_counter()
            for _ in refs:
                for first in range(0, len(tiles), BATCH):
                    encoder.encode(tiles[first : first + BATCH])
            bare = time.perf_counter() - started
            pace = len(refs) * len(tiles) / whole
            print(f"{number + 1:5d} {whole:8.2f} {bare:8.2f} {whole / bare:9.3f} {pace:8.1f}", flush=True)


def load_tiles(out: Path, slide_path: Path) -> np.ndarray:
    """All tiles of the slide, (n, 224, 224, 3) uint8."""
    store = SlideStore.open(store_path(out, "drawn0"))
    grid = store.read_grid(store.grids()[0])
    slide = open_slide(slide_path)
    tiles = np.stack([read_tile(slide, grid, row) for row in range(len(grid))])
    slide.close()
    return tiles


if __name__ == "__main__":
    main()
