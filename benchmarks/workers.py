"""What it brings on a CPU that a batch is shared out to workers, beside one operation after the other on all threads.

    python benchmarks/workers.py [--architectures vit_small_patch16_224 resnet50] [--rounds 10] [--batch 32]

Both ways take turns in one process, on the same network with random weights and the same tiles; the table has the
median of their times and of the ratio round by round.
"""

import argparse
import os
import statistics
import time

import numpy as np
import torch

from pathopipe.config import load_config
from pathopipe.embeddings import encoder as encoders
from pathopipe.embeddings.catalog import find_encoder
from pathopipe.embeddings.embed import build_encoder


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="*", default=["vit_small_patch16_224", "resnet50"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    tiles = np.random.default_rng(0).integers(0, 256, (arguments.batch, 224, 224, 3)).astype(np.uint8)
    print(f"{cores} cores, batches of {arguments.batch} tiles, torch {torch.__version__}")
    print(f"{'architecture':28s} {'precision':>14s} {'all threads s':>14s} {'workers s':>10s} {'ratio':>6s}")
    for architecture in arguments.architectures:
        name = f"timm.{architecture}"
        config = load_config(None, [f"embed.encoder={name}", "embed.device=cpu"])
        encoder = build_encoder(find_encoder(name), config.embed, mpp=(0.5, 0.5), threads=cores)
        assert isinstance(encoder, encoders.NetworkEncoder)
        lanes = [encoders._HostLane(1), encoders._HostLane(encoders._workers_of(cores))]
        spent: list[list[float]] = [[], []]
        for number in range(arguments.rounds + 1):
            for lane, seconds in zip(lanes, spent, strict=True):
                encoder._lane = lane
                started = time.perf_counter()
                encoder.encode(tiles)
                if number:  # the first call plans
                    seconds.append(time.perf_counter() - started)
        ratio = statistics.median(two / one for one, two in zip(*spent, strict=True))
        one, two = (statistics.median(seconds) for seconds in spent)
        print(f"{architecture:28s} {encoder.precision:>14s} {one:14.3f} {two:10.3f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
