"""CPU time of the handcrafted encoder a tile, beside two small networks on the same machine in the same run.

python benchmarks/handcrafted.py [--tiles 32] [--rounds 5]

Tiles are drawn (256 x 256 px: stroma, nuclei, a lumen); networks have random weights, fp32, 224 x 224 px. CPU time
counts all threads of the process; the least of the rounds is printed, because other work on the machine only adds.
"""

import argparse
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pathopipe.embeddings.handcrafted import handcrafted_features
from pathopipe.embeddings.torchvision_import import import_torchvision


def draw_tiles(n: int, side_px: int, mpp: float) -> NDArray[np.uint8]:
    """(n, side, side, 3) tiles with nuclei of about 7 um, 4000 to 8000 a square millimetre, and sensor noise."""
    rng = np.random.default_rng(0)
    tiles = np.empty((n, side_px, side_px, 3), np.uint8)
    for tile in tiles:
        tile[:] = (226, 178, 205)
        cv2.circle(tile, (side_px // 4, side_px // 3), int(14 / mpp), (243, 241, 243), -1, cv2.LINE_AA)
        for _ in range(rng.integers(4000, 8000) * int((side_px * mpp) ** 2) // 10**6):
            x, y = (int(v) for v in rng.integers(0, side_px, 2))
            axes = (int(rng.uniform(3, 4.5) / mpp), int(rng.uniform(2, 3.5) / mpp))
            colour = tuple(int(v) for v in np.add((95, 62, 140), rng.integers(-20, 20, 3)))
            cv2.ellipse(tile, (x, y), axes, float(rng.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA)
        tile[:] = np.clip(tile + rng.normal(0, 6, tile.shape), 0, 255)
    return tiles


def cpu_ms(work: Callable[[], object], n_tiles: int, rounds: int) -> tuple[float, float]:
    """Least CPU and wall milliseconds a tile over the rounds, after one that warms up."""
    work()
    found = []
    for _ in range(rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(c for c, _ in found) * 1e3 / n_tiles, min(w for _, w in found) * 1e3 / n_tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    print("| encoder | tile | threads | CPU ms a tile | wall ms a tile |\n| --- | --- | --- | --- | --- |")

    def row(name: str, tile: str, threads: int, work: Callable[[], object]) -> None:
        cpu, wall = cpu_ms(work, args.tiles, args.rounds)
        print(f"| {name} | {tile} | {threads} | {cpu:.1f} | {wall:.1f} |", flush=True)

    for mpp in (0.5, 0.25):
        tiles = draw_tiles(args.tiles, 256, mpp)
        for threads in (1, 2):
            row(
                "handcrafted",
                f"256 px at {mpp} um/px",
                threads,
                lambda tiles=tiles, mpp=mpp, threads=threads: handcrafted_features(tiles, (mpp, mpp), threads=threads),
            )

    import_torchvision()
    import timm

    torch.manual_seed(0)
    batch = torch.rand(args.tiles, 3, 224, 224)
    for name in ("resnet18", "vit_small_patch16_224"):
        model = timm.create_model(name, pretrained=False, num_classes=0).eval()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                row(name, "224 px", threads, lambda model=model: model(batch))


if __name__ == "__main__":
    main()
