"""Speed and memory of drawing slides: python benchmarks/synth.py [SIDE_PX ...]."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# Each row runs in its own process, so that peak memory is its own.
_ROW = """
import json, re, sys, time
from pathlib import Path
from pathopipe.synth import SynthSpec, write_slide
side, threads, repeat, path = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
spec = SynthSpec(width_px=side, height_px=side, seed=1, repeat_px=repeat or None)
wall, cpu = time.perf_counter(), time.process_time()
write_slide(path, spec, threads=threads)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024
print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "bytes": path.stat().st_size}))
"""


def main(sides_px: list[int]) -> None:
    print(f"{'size, px':>15} {'repeat':>7} {'threads':>7} {'Mpx/s':>7} {'CPU ns/px':>10} {'peak MB':>8} {'file MB':>8}")
    for side in sides_px:
        for repeat in (0, 4096):
            for threads in (1, 2):
                with tempfile.TemporaryDirectory() as folder:
                    values = [str(v) for v in (side, threads, repeat, Path(folder) / "slide.tiff")]
                    done = subprocess.run(
                        [sys.executable, "-c", _ROW, *values], capture_output=True, text=True, check=True
                    )
                row = json.loads(done.stdout)
                print(
                    f"{side:>7} x{side:>6} {repeat or '-':>7} {threads:>7} {side**2 / row['wall'] / 1e6:>7.1f} "
                    f"{row['cpu'] / side**2 * 1e9:>10.1f} {row['peak']:>8.0f} {row['bytes'] / 1e6:>8.1f}"
                )


if __name__ == "__main__":
    main([int(value) for value in sys.argv[1:]] or [5_000, 20_000])
