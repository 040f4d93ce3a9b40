"""Peak memory of ``pathopipe run`` with the handcrafted encoder, on drawn slides of growing area.

    python benchmarks/memory.py [--sizes 10000,30000,100000] [--folder DIR]

The slides repeat one drawn block, so that drawing them is quick; reading and embedding do not know that. Every size is
a run in a process of its own; the peak is what the system counted for it and its threads.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pathopipe.store import SlideStore, store_path
from pathopipe.synth import SynthSpec, write_slide


def main() -> None:
    """Draw, run, print one row a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,30000,100000", help="sides of the slides in px")
    parser.add_argument("--folder", type=Path, help="where slides and results go; a temporary folder when left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{'side px':>9} {'slide MB':>9} {'tiles':>7} {'seconds':>8} {'tiles/s':>8} {'peak MB':>8}", flush=True)
        for side_px in map(int, arguments.sizes.split(",")):
            measure(folder, side_px)


def measure(folder: Path, side_px: int) -> None:
    """One row of the table."""
    slide = folder / f"memory-{side_px}.tiff"
    if not slide.exists():
        write_slide(slide, SynthSpec(width_px=side_px, height_px=side_px, mpp=0.25, seed=5, repeat_px=4096))
    out = folder / f"memory-{side_px}"
    command = [sys.executable, "-m", "pathopipe", "run", str(slide), "--out", str(out), "--fresh", "tissue"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, code, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode != 0:
        raise SystemExit(f"{slide}: the run failed; try {' '.join(command)}")
    tiles = len(SlideStore.open(store_path(out, slide.stem)).read_grid("256px-0.5um"))
    megabytes = slide.stat().st_size / 1e6
    peak = usage.ru_maxrss / 1e3
    print(f"{side_px:9d} {megabytes:9.0f} {tiles:7d} {seconds:8.1f} {tiles / seconds:8.0f} {peak:8.0f}", flush=True)


if __name__ == "__main__":
    main()
