"""What the workflow costs a slide beside computing, how long it takes to plan many, and how quickly a manifest is read.

    python benchmarks/workflow.py overhead [--slides 200] [--side-px 4000] [--cores 2] [--split]
    python benchmarks/workflow.py plan [--slides 1000,10000]
    python benchmarks/workflow.py manifest [--rows 100000]

``overhead`` runs drawn slides through Snakemake (a few files are drawn, the rest are links to them) and takes off what
the same slides need in one process with all imports done. Beside wall time stands CPU time, of Snakemake and all its
jobs, which a busy machine changes less. ``plan`` is Snakemake's dry run.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pathopipe.cohort import read_manifest
from pathopipe.cohort.receipts import read_receipts
from pathopipe.config import load_config
from pathopipe.pipeline import RunPlan, run_slide
from pathopipe.records import SlideRef
from pathopipe.synth import SynthSpec, write_slide

WORKFLOWS = Path(__file__).parents[1] / "workflows"
DRAWN = 4


def main() -> None:
    """Measure one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("overhead", "plan", "manifest"), default="overhead")
    parser.add_argument("--slides", default=None)
    parser.add_argument("--side-px", type=int, default=4000)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--split", action="store_true", help="a job each for tissue, tiles and embeddings")
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.what == "overhead":
            overhead(folder, int(arguments.slides or 200), arguments.side_px, arguments.cores, arguments.split)
        elif arguments.what == "plan":
            for n_slides in map(int, (arguments.slides or "1000,10000").split(",")):
                plan(folder, n_slides)
        else:
            manifest(folder, arguments.rows)


def overhead(folder: Path, n_slides: int, side_px: int, cores: int, split: bool) -> None:
    drawn = min(DRAWN, n_slides)
    for number in range(drawn):
        write_slide(
            folder / f"drawn{number}.tiff", SynthSpec(width_px=side_px, height_px=side_px, mpp=0.5, seed=number)
        )
    for number in range(n_slides):
        os.link(folder / f"drawn{number % drawn}.tiff", folder / f"{number}.tiff")
    rows = "".join(f"s{number},{number}.tiff\n" for number in range(n_slides))
    (folder / "cohort.csv").write_text(f"slide_id,path\n{rows}")
    started = time.perf_counter()
    usage = snakemake(folder, "--cores", str(cores), "--config", f"split={split}")
    wall_s = (time.perf_counter() - started) / n_slides
    cpu_s = (usage.ru_utime + usage.ru_stime) / n_slides
    # The first pays for the imports.
    config, bare_wall_s, bare_cpu_s = load_config(None, []), 0.0, 0.0
    for number in range(1 + drawn):
        started, cpu_started = time.perf_counter(), time.process_time()
        ref = SlideRef(f"s{number}", folder / f"drawn{number % drawn}.tiff")
        run_slide(ref, RunPlan(out=folder / "bare", config=config, threads=1))
        if number:
            bare_wall_s += (time.perf_counter() - started) / drawn
            bare_cpu_s += (time.process_time() - cpu_started) / drawn
    jobs = sum(1 for _ in read_receipts(folder / "results")) / n_slides
    print(f"{n_slides} slides of {side_px} px on {cores} cores, {jobs:.0f} jobs a slide; seconds a slide:")
    print(f"  wall {wall_s:.2f} through Snakemake, {bare_wall_s:.2f} of computing on one core")
    print(f"  CPU  {cpu_s:.2f} through Snakemake, {bare_cpu_s:.2f} of computing: overhead {cpu_s - bare_cpu_s:.2f}")


def plan(folder: Path, n_slides: int) -> None:
    rows = "".join(f"s{number},{number}.tiff\n" for number in range(n_slides))
    (folder / "cohort.csv").write_text(f"slide_id,path\n{rows}")
    for batch in ("", "slides=1/10"):
        started = time.perf_counter()
        target = ("--batch", batch, "slides") if batch else ()
        usage = snakemake(folder, "--cores", "1", "--dry-run", "--quiet", "all", *target)
        wall_s, cpu_s = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
        peak_mb = usage.ru_maxrss / 1024
        print(f"{n_slides} slides, {batch or 'whole'}: wall {wall_s:.1f} s, CPU {cpu_s:.1f} s, {peak_mb:.0f} MB")


def manifest(folder: Path, n_rows: int) -> None:
    for number in range(n_rows):
        (folder / f"{number}.svs").touch()
    rows = "".join(f"s{number},{number}.svs,0.25,P{number % 997}\n" for number in range(n_rows))
    (folder / "cohort.csv").write_text(f"slide_id,path,mpp,patient_id\n{rows}")
    for check_files in (True, False):
        started = time.perf_counter()
        read_manifest(folder / "cohort.csv", check_files=check_files)
        how = "with" if check_files else "without"
        print(f"{n_rows} rows, {how} looking for the files: {time.perf_counter() - started:.1f} s")


def snakemake(folder: Path, *arguments: str) -> resource.struct_rusage:
    """Run the workflow on ``cohort.csv``; what Snakemake and its jobs took."""
    config = folder / "config.yaml"
    config.write_text("manifest: cohort.csv\nout: results\nreport: false\nverify: never\n")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(WORKFLOWS / "Snakefile"), "--configfile"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [*command, str(config), *arguments],
        cwd=folder,
        # As an installed package: without its bytecode every job would compile what it imports.
        env={**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(said)
    return usage


if __name__ == "__main__":
    main()
