"""What a bucket costs beside a local folder: a drawn slide to both, with the requests that the server counted.

    python benchmarks/remote.py [--side-px 4000] [--chunk-rows 256]

Needs ``moto_server`` on the path (pip install 'moto[server]', in an environment of its own if need be). Moto is a
single process in Python on this machine: it counts requests as S3 would, but its seconds are its own. Start-up is left
out of all times.
"""

import argparse
import collections
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from pathopipe.config import load_config
from pathopipe.files import sizes_below
from pathopipe.pipeline import RunPlan, run_slide
from pathopipe.records import SlideRef
from pathopipe.remote import location
from pathopipe.store import SlideStore, store_path
from pathopipe.synth import SynthSpec, write_slide

# Dollars a million requests at AWS S3 Standard, us-east-1, as listed in 2025; deleting is free.
PRICES = {"PUT": 5.0, "LIST": 5.0, "GET": 0.4, "HEAD": 0.4, "DELETE": 0.0}


def main() -> None:
    """Run a slide into a folder and into a bucket; print a table of requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side-px", type=int, default=4000, help="side of the drawn slide at 0.5 um/px")
    parser.add_argument("--chunk-rows", type=int, default=256)
    arguments = parser.parse_args()
    config = load_config(None, [f"embed.chunk_rows={arguments.chunk_rows}", "tiles.min_tissue=0"])
    program = shutil.which("moto_server")
    if program is None:
        parser.error("there is no moto_server on the path: pip install 'moto[server]'")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        slide = folder / "drawn.tiff"
        write_slide(slide, SynthSpec(width_px=arguments.side_px, height_px=arguments.side_px, mpp=0.5, seed=5))
        log = folder / "server.log"
        process = start_server(program, log)
        try:
            bucket = location("s3://bench/out")
            run_slide(SlideRef("warm", slide), RunPlan(out=folder / "warm", config=config))
            print(f"{'':24}{'seconds':>8}" + "".join(f"{kind:>8}" for kind in PRICES) + f"{'MB':>8}")
            for what, out in (("run, to a folder", folder / "out"), ("run, to a bucket", bucket)):
                measure(
                    what, log, lambda out=out: run_slide(SlideRef("s", slide), RunPlan(out=out, config=config)), out
                )
            measure(
                "run again, all done",
                log,
                lambda: run_slide(SlideRef("s", slide), RunPlan(out=bucket, config=config)),
                bucket,
            )
            store = SlideStore.open(store_path(bucket, "s"))
            (grid,) = store.grids()
            rows = store.embeddings(grid, "handcrafted")
            chunk, status = rows.read_values(rows.chunk_slice(0)), rows.read_status()[rows.chunk_slice(0)]
            measure("verify", log, lambda: list(store.problems()), bucket)
            measure("one chunk", log, lambda: rows.write_chunk(0, chunk, status), bucket)
            print(f"{rows.rows} tiles in {rows.n_chunks} chunks of {rows.chunk_rows}")
        finally:
            process.kill()
            process.wait()


def start_server(program: str, log: Path) -> subprocess.Popen[bytes]:
    """Moto with a bucket, and the environment that leads there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint, AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_REGION="us-east-1"
    )
    with log.open("w") as told:
        process = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", endpoint.rpartition(":")[2]], stdout=told, stderr=told
        )
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bench", method="PUT")).close()
            return process
        except urllib.error.URLError:
            if process.poll() is not None:
                raise
            time.sleep(0.2)


def measure(what, log: Path, work, out: Path) -> None:
    """Do some work; print its seconds, requests by kind, and what lies in the output folder."""
    before = len(log.read_text().splitlines())
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    counts: collections.Counter[str] = collections.Counter()
    for line in log.read_text().splitlines()[before:]:
        match = re.search(r'"(GET|PUT|HEAD|DELETE|POST) (\S*)', line)
        if match is not None:
            kind = {"POST": "DELETE"}.get(match[1], match[1])
            counts["LIST" if kind == "GET" and "list-type" in match[2] else kind] += 1
    size = sum(sizes_below(out).values()) / 1e6
    dollars = sum(PRICES[kind] * number for kind, number in counts.items()) / 1e6
    row = "".join(f"{counts[kind]:8d}" for kind in PRICES)
    print(f"{what:24}{seconds:8.2f}{row}{size:8.2f}   ${dollars * 1e6:.0f} for a million", flush=True)


if __name__ == "__main__":
    main()
