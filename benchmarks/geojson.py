"""Time and memory of writing and reading GeoJSON, drawing included: ``python benchmarks/geojson.py [COUNT]``."""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from pathopipe.geojson import FeatureBatch, feature, feature_batches, read_features, stable_id, write_features

VERTICES = 24
CHUNK = 10_000


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, VERTICES, endpoint=False)
    centre = rng.uniform(0, 150_000, (count, 1, 2))
    radius = rng.uniform(10, 16, (count, VERTICES, 1))
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return shapely.polygons(centre + radius * circle), shapely.polygons(centre + 0.6 * radius * circle)


def objects(count: int, *, cells: bool, single: bool) -> Iterator[dict[str, Any] | FeatureBatch | None]:
    classes = [("Tumor", (200, 0, 0)), ("Lymphocyte", (70, 90, 220))]
    kind = "cell" if cells else "detection"
    for start in range(0, count, CHUNK):
        n = min(CHUNK, count - start)
        outer, inner = draw(n, start)
        ids = [stable_id("slide", "nuclei", start + k) for k in range(n)]
        columns = {"Area µm^2": shapely.area(outer), "Detection probability": np.linspace(0, 1, n, dtype=np.float32)}
        if single:
            for k in range(n):
                yield feature(
                    outer[k],
                    object_type=kind,
                    id=ids[k],
                    classification=classes[k % 2],
                    measurements={name: column[k] for name, column in columns.items()},
                    nucleus_geometry=inner[k] if cells else None,
                )
        else:
            yield from feature_batches(
                outer,
                object_type=kind,
                ids=ids,
                classifications=[classes[k % 2] for k in range(n)],
                measurements=columns,
                nucleus_geometries=inner if cells else None,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=200_000)
    parser.add_argument("--cells", action="store_true", help="cells with nuclei instead of detections")
    parser.add_argument("--single", action="store_true", help="make features one by one")
    parser.add_argument("--read", action="store_true", help="read the file back as well")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for ending in (".geojson", ".geojson.gz"):
            path = Path(folder) / f"nuclei{ending}"
            start = time.process_time()
            report = write_features(path, objects(chosen.count, cells=chosen.cells, single=chosen.single))
            spent = time.process_time() - start
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"write {ending}: {report.written} features, {spent:.1f} s CPU, peak {peak_mb:.0f} MB,", end=" ")
            print(f"{path.stat().st_size / 1e6:.0f} MB on disk")
            if chosen.read:
                start = time.process_time()
                count = sum(1 for _ in read_features(path))
                spent = time.process_time() - start
                peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(f"read {ending}: {count} features, {spent:.1f} s CPU, peak {peak_mb:.0f} MB")


if __name__ == "__main__":
    main()
