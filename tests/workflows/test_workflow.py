"""The Snakemake workflow: lint, plan, use as a module; and once for real, killed in the middle."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pathopipe.cohort.receipts import read_receipt, read_receipts
from pathopipe.synth import SynthSpec, write_slide

pytest.importorskip("snakemake", reason="pip install 'pathopipe[workflow]'")

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / "workflows" / "Snakefile"
PROFILE = ROOT / "workflows" / "profiles" / "local"


def start(folder: Path, *arguments: str, snakefile: Path = WORKFLOW) -> "subprocess.Popen[str]":
    """Start Snakemake in a process group of its own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "--cores", "2", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def snakemake(folder: Path, *arguments: str, snakefile: Path = WORKFLOW) -> tuple[int, str]:
    """How Snakemake ended, and what it said."""
    process = start(folder, *arguments, snakefile=snakefile)
    try:
        said, _ = process.communicate()
    except BaseException:  # out of time: its jobs must not live on
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, said


def write(folder: Path, config: str) -> Path:
    (folder / "config.yaml").write_text(config)
    return folder


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """A folder with a manifest of two slides, one of an odd name, whose files are not looked at before the plan."""
    (tmp_path / "cohort.csv").write_text('slide_id,path,mpp\na,a.tiff,\n"b 2\'s",b.tiff,0.5\n')
    return write(tmp_path, "manifest: cohort.csv\nout: results\n")


EVERYTHING = """
manifest: cohort.csv
out: results
split: true
segment: [nuclei]
verify: end
encoders: [handcrafted, timm.resnet18]
exports: [{name: clam, format: h5, options: [--layout, clam, --encoder, handcrafted]}]
mil: [{name: outcome, command: train, options: [--target, outcome]}]
metadata: [{name: fields, command: predict, options: [--model, models/fields]}]
"""


def jobs_of(said: str) -> dict[str, int]:
    """Snakemake's table of jobs."""
    lines = said.partition("Job stats:")[2].partition("total")[0].splitlines()
    table = [line.split() for line in lines]
    return {row[0]: int(row[1]) for row in table if len(row) == 2 and row[1].isdigit()}


@pytest.mark.slow
def test_lint(cohort: Path) -> None:
    for config in ((cohort / "config.yaml").read_text(), EVERYTHING):
        write(cohort, config)
        code, said = snakemake(cohort, "--configfile", "config.yaml", "--lint")
        assert code == 0, said
        assert "good condition" in said


@pytest.mark.slow
def test_the_plan_of_the_default(cohort: Path) -> None:
    code, said = snakemake(cohort, "--configfile", "config.yaml", "--profile", str(PROFILE), "--dry-run")
    assert code == 0, said
    assert jobs_of(said) == {"all": 1, "plan": 1, "embed": 2, "summary": 1, "report": 1, "status": 1}
    assert sorted(path.name for path in cohort.iterdir()) == [".snakemake", "cohort.csv", "config.yaml"]


@pytest.mark.slow
def test_outlines_alone_are_read_back_where_they_are_written(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tiff", SynthSpec(width_px=700, height_px=700, mpp=0.5))
    (tmp_path / "cohort.csv").write_text("slide_id,path\na,a.tiff\n")
    write(tmp_path, "manifest: cohort.csv\nout: results\nencoders: []\nverify: end\nreport: false\n")
    code, said = snakemake(tmp_path, "--configfile", "config.yaml", "--profile", str(PROFILE))
    assert code == 0, said
    assert "tissue" in jobs_of(said) and "verify" not in jobs_of(said)
    assert "1 of 1 slides without failure" in said


@pytest.mark.slow
def test_the_plan_of_everything(cohort: Path) -> None:
    code, said = snakemake(write(cohort, EVERYTHING), "--configfile", "config.yaml", "--dry-run", "--printshellcmds")
    assert code == 0, said
    once = ("all", "plan", "mil", "metadata", "summary", "report", "status")
    a_slide = ("tissue", "tiles", "embed", "segment", "export", "verify")
    assert jobs_of(said) == {**dict.fromkeys(once, 1), **dict.fromkeys(a_slide, 2)}
    assert "--slide-id='b 2'\"'\"'s' --encoder handcrafted,timm.resnet18 --mpp 0.5" in said
    assert "--tasks nuclei --threads 1 --after results/done/tissue/a.json" in said


@pytest.mark.slow
def test_as_a_module_of_another_workflow(cohort: Path) -> None:
    outer = cohort / "Snakefile"
    outer.write_text(f"""
module pathopipe:
    snakefile: {str(WORKFLOW)!r}
    config: {{"manifest": "cohort.csv", "out": "slides"}}

use rule * from pathopipe as pathopipe_*

rule mine:
    default_target: True
    input: "slides/done/status"
    output: "mine.txt"
    shell: "touch {{output}}"
""")
    code, said = snakemake(cohort, "--dry-run", snakefile=outer)
    assert code == 0, said
    assert jobs_of(said)["pathopipe_embed"] == 2
    assert jobs_of(said)["mine"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("manifest: cohort.csv\n", "'out' is a required property"),
        ("manifest: cohort.csv\nout: results\nencoder: uni\n", "'encoder' was unexpected"),
        ("manifest: cohort.csv\nout: results\nfail_on: some\n", "'some' is not one of ['never', 'any', 'all']"),
        ("manifest: none.csv\nout: results\n", "none.csv: the manifest can't be read"),
    ],
)
def test_wrong_configs(cohort: Path, config: str, says: str) -> None:
    code, said = snakemake(write(cohort, config), "--configfile", "config.yaml", "--dry-run")
    assert code == 1
    assert says in said


def chunks(out: Path) -> dict[Path, tuple[int, int]]:
    """The finished chunks of embeddings: which file it is, and when it was written."""
    found = out.glob("slides/*.zarr/embeddings/*/*/values/c/*/0")
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def stored(out: Path) -> dict[str, bytes]:
    """Every array of every store; metadata hold seconds."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.glob("slides/*.zarr/**/*")
        if path.is_file() and path.name != "zarr.json"
    }


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_in_the_middle(tmp_path: Path) -> None:
    for number, side_px in enumerate((4000, 2400)):
        write_slide(tmp_path / f"{number}.tiff", SynthSpec(width_px=side_px, height_px=side_px, mpp=0.5, seed=number))
    (tmp_path / "2.tiff").write_bytes((tmp_path / "1.tiff").read_bytes()[:20_000])
    (tmp_path / "cohort.csv").write_text("slide_id,path\nzero,0.tiff\none,1.tiff\nbroken,2.tiff\n")
    config = (
        "manifest: cohort.csv\nout: results\nverify: end\nreport: false\nset: [embed.chunk_rows=4]\n"
        "exports: [{name: clam, format: h5, options: [--layout, clam]}]\n"
    )
    run = ("--configfile", "config.yaml", "--profile", str(PROFILE))
    out = write(tmp_path, config) / "results"

    process = start(tmp_path, *run)
    while len(chunks(out)) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = chunks(out)
    assert len(before) >= 3
    killed = {receipt.slide_id for _, receipt in read_receipts(out)}

    code, said = snakemake(tmp_path, *run)
    assert code == 1
    assert "unlock" in said  # Snakemake's own word for it
    assert snakemake(tmp_path, *run, "--unlock")[0] == 0
    code, said = snakemake(tmp_path, *run)
    assert code == 1, said  # for the slide that failed
    after = chunks(out)
    assert len(after) > len(before)
    assert {path: after[path] for path in before} == before
    assert killed < {"zero", "one", "broken"}

    stages = ("embed", "export-clam", "verify")
    for slide_id in ("zero", "one"):
        assert {read_receipt(out / "done" / stage / f"{slide_id}.json").status for stage in stages} == {"ok"}
    broken = {stage: read_receipt(out / "done" / stage / "broken.json") for stage in stages}
    assert {stage: receipt.status for stage, receipt in broken.items()} == {
        "embed": "failed",
        "export-clam": "passed-over",
        "verify": "passed-over",
    }
    assert f"failed: broken: {broken['embed'].reason}" in said or f"failed: {broken['embed'].reason}" in said
    assert "2 of 3 slides without failure" in said
    assert not list(out.rglob("*.partial"))
    assert not list(out.rglob("*.begun"))

    # Again: nothing but the exit status, until failures are allowed.
    code, said = snakemake(tmp_path, *run)
    assert code == 1
    assert jobs_of(said) == {"all": 1, "status": 1}
    assert snakemake(tmp_path, *run, "--config", "fail_on=never")[0] == 0

    # An undisturbed run gives the same bytes.
    shutil.move(out, tmp_path / "killed")
    assert snakemake(tmp_path, *run, "--config", "fail_on=never")[0] == 0
    assert stored(out) == stored(tmp_path / "killed")
    inputs = {path.relative_to(out): receipt.inputs for path, receipt in read_receipts(out)}
    assert inputs == {
        path.relative_to(tmp_path / "killed"): receipt.inputs for path, receipt in read_receipts(tmp_path / "killed")
    }


EVERY_RULE = """
manifest: cohort.csv
out: results
segment: [nuclei]
verify: end
set: [segment.model=classical, tissue.min_region_mm2=0]
metadata:
- {name: fields, command: train, options: [--tasks, fields.yaml, --set, metadata.folds=2, --set, metadata.epochs=2]}
mil:
- {name: outcome, command: train, options: [--target, outcome, --folds, "2", --head, mean, --set, mil.epochs=2]}
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_rule(tmp_path: Path) -> None:
    """Objects, models and the report, which the plan alone does not try; then a model is applied, and no more."""
    lines = ["slide_id,path,patient_id,site,outcome"]
    for number in range(2):
        write_slide(tmp_path / f"drawn{number}.tiff", SynthSpec(width_px=700, height_px=700, mpp=0.5, seed=number))
    for number in range(10):
        (tmp_path / f"{number}.tiff").hardlink_to(tmp_path / f"drawn{number % 2}.tiff")
        lines.append(f"s{number},{number}.tiff,P{number},{'AB'[number // 2 % 2]},{('low', 'high')[number % 2]}")
    (tmp_path / "cohort.csv").write_text("\n".join(lines))
    (tmp_path / "fields.yaml").write_text("tasks:\n- {name: outcome, kind: multi-class, classes: [low, high]}\n")
    run = ("--configfile", "config.yaml", "--profile", str(PROFILE))
    out = write(tmp_path, EVERY_RULE) / "results"
    code, said = snakemake(tmp_path, *run)
    assert code == 0, said
    once = ("all", "plan", "mil", "metadata", "summary", "report", "status")
    assert jobs_of(said) == {**dict.fromkeys(once, 1), **dict.fromkeys(("embed", "segment", "verify"), 10)}
    assert {(receipt.stage, receipt.status) for _, receipt in read_receipts(out)} == {
        (stage, "ok") for stage in ("embed", "segment", "verify")
    }
    assert "10 of 10 slides without failure" in said
    for name in ("mil/outcome/results.csv", "metadata/fields/figures.csv", "geojson/s0.nuclei.geojson", "report.html"):
        assert (out / name).stat().st_size, name

    write(tmp_path, EVERY_RULE + "- {name: again, command: predict, options: [--model, results/mil/outcome]}\n")
    code, said = snakemake(tmp_path, *run)
    assert code == 0, said
    assert jobs_of(said) == dict.fromkeys(("all", "mil", "report", "status"), 1)
    assert len((out / "mil" / "again" / "predictions.csv").read_text().splitlines()) == 11
    assert list(out.glob("slides/s0.zarr/predictions/*"))
