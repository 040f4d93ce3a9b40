"""Networks on the CPU in fp32, bf16 autocast, bf16 weights and OpenVINO, through the encoder that runs them.

    python benchmarks/precision.py [--architectures vit_small_patch16_224,resnet50] [--batches 2] [--rounds 5]

Random weights, batches of 32 drawn tiles of 224 px, read beforehand and held in memory; resizing and normalising
are counted. The precisions take turns in one process. Of each the best round is printed, because other work on the
machine only adds; the CPU time is that of all threads. The cosine is the least of all tiles, against fp32.
"""

import argparse
import importlib.util
import logging
import os
import time

import numpy as np

from pathopipe.config import load_config
from pathopipe.embeddings.catalog import find_encoder
from pathopipe.embeddings.embed import Encoder, build_encoder
from pathopipe.embeddings.precision import cpu_has_bf16, least_cosine
from pathopipe.synth import DrawnSlide, SynthSpec

BATCH = 32


def main() -> None:
    """Time every architecture in every precision and print one row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="vit_small_patch16_224,resnet50")
    parser.add_argument("--batches", type=int, default=2, help="batches a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    threads = len(os.sched_getaffinity(0))
    tiles = draw_tiles(BATCH)
    n_tiles = BATCH * arguments.batches
    print(f"{threads} threads, batches of {BATCH}, {'has' if cpu_has_bf16() else 'lacks'} bf16 arithmetic")
    print("| network | precision | tiles/s | to fp32 | CPU ms a tile | to fp32 | least cosine |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for architecture in arguments.architectures.split(","):
        encoders = {encoder.identity["precision"]: encoder for encoder in build(architecture, threads)}
        values = {name: encoder.encode(tiles) for name, encoder in encoders.items()}  # warms up, too
        wall = dict.fromkeys(encoders, float("inf"))
        cpu = dict.fromkeys(encoders, float("inf"))
        for _ in range(arguments.rounds):
            for name, encoder in encoders.items():
                wall_began, cpu_began = time.perf_counter(), time.process_time()
                for _ in range(arguments.batches):
                    encoder.encode(tiles)
                wall[name] = min(wall[name], time.perf_counter() - wall_began)
                cpu[name] = min(cpu[name], time.process_time() - cpu_began)
        for name in encoders:
            print(
                f"| {architecture} | {name} | {n_tiles / wall[name]:.1f} | {wall['fp32'] / wall[name]:.2f} "
                f"| {1e3 * cpu[name] / n_tiles:.1f} | {cpu['fp32'] / cpu[name]:.2f} "
                f"| {least_cosine(values['fp32'], values[name]):.5f} |",
                flush=True,
            )


def build(architecture: str, threads: int) -> list[Encoder]:
    """The same network in each precision; ``auto`` is bf16 weights or, where the CPU lacks it, fp32 again."""
    ways = [("torch", asked) for asked in ("fp32", "bf16", "auto")]
    if importlib.util.find_spec("openvino"):
        ways += [("openvino", "fp32"), ("openvino", "auto")]
    spec = find_encoder(f"timm.{architecture}")
    encoders = []
    for engine, asked in ways:
        config = load_config(None, [f"embed.engine={engine}", f"embed.precision={asked}", "embed.device=cpu"])
        encoders.append(build_encoder(spec, config.embed, mpp=(0.5, 0.5), threads=threads))
    return encoders


def draw_tiles(n: int) -> np.ndarray:
    """(n, 224, 224, 3) uint8 drawn tiles, cut from one slide."""
    across = int(np.ceil(np.sqrt(n)))
    slide = DrawnSlide(SynthSpec(width_px=224 * across, height_px=224 * across, mpp=0.5, seed=5))
    return np.stack([slide.read(224 * (at % across), 224 * (at // across), 224, 224) for at in range(n)])


if __name__ == "__main__":
    main()
