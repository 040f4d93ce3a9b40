"""What rules share: the slides of the manifest, options of the commands, and what a job needs."""

import functools
import shlex
from pathlib import Path

from pathopipe.cohort import read_manifest
from pathopipe.cohort.plan import plan_path, read_plan

OUT = config["out"].rstrip("/")
DONE = f"{OUT}/done"
LOGS = f"{OUT}/logs/workflow"
PLAN = str(plan_path(Path(OUT)))
EXPORTS = {export["name"]: export for export in config["exports"]}
MIL = {model["name"]: model for model in config["mil"]}
METADATA = {model["name"]: model for model in config["metadata"]}

# Outlines alone are no store that 'verify' calls complete: they are read back in the job that writes them.
VERIFY = "each" if config["verify"] == "end" and not (config["encoders"] or config["segment"]) else config["verify"]

# A group is submitted as one job; none may be left and entered again, as a slide's own GPU job would make it.
LATE_GROUP = "results" if config["split"] else "slide"

# The plan looks whether the files are there, once; every job reads this.
SLIDES = {slide.slide_id: slide for slide in read_manifest(Path(config["manifest"]), check_files=False)}


wildcard_constraints:
    slide_id="[^/]+",
    name="[A-Za-z0-9_-]+",


def receipts(stage):
    return [f"{DONE}/{stage}/{slide_id}.json" for slide_id in SLIDES]


def stages():
    """The last stages of a slide: what its verification and the cohort wait for."""
    wanted = (["embed"] if config["encoders"] else []) + (["segment"] if config["segment"] else [])
    return (wanted or ["tissue"]) + [f"export-{name}" for name in EXPORTS]


def last_stages(wildcards):
    return [f"{DONE}/{stage}/{wildcards.slide_id}.json" for stage in stages()]


def every_slide():
    wanted = ["verify"] if VERIFY == "end" else stages()
    return [receipt for stage in wanted for receipt in receipts(stage)]


def every_model():
    return [f"{DONE}/mil-{name}" for name in MIL] + [f"{DONE}/metadata-{name}" for name in METADATA]


def after(receipt):
    return f"--after {shlex.quote(str(receipt))}"


def out_folder(wildcards):
    return OUT


def slide_path(wildcards):
    return str(SLIDES[wildcards.slide_id].path)


def stage_options(with_encoders):
    """Options of a stage's command, as the shell takes them."""
    options = []
    if config["settings"]:
        options += ["--config", config["settings"]]
    for setting in config["set"]:
        options += ["--set", setting]
    if with_encoders and config["encoders"]:
        options += ["--encoder", ",".join(config["encoders"])]
    return options


def slide_options(with_encoders=False):
    def options(wildcards):
        mpp = SLIDES[wildcards.slide_id].mpp
        stated = [] if mpp is None else ["--mpp", f"{mpp:g}"]
        check = ["--check"] if VERIFY == "each" else []
        retries = ["--give-up-after", str(max(1, config["retries"]))]
        return shlex.join([*stage_options(with_encoders), *stated, *check, *retries])

    return options


@functools.cache
def planned(path):
    return read_plan(Path(path))


def needs(stage, what):
    """What the slide's header says that a stage needs, more of it with every try; known when the plan is written."""

    def needed(wildcards, input, attempt):
        try:
            slide = planned(str(input.plan))[wildcards.slide_id]
        except FileNotFoundError as error:
            # With the very name of the input, Snakemake takes it for "to be determined".
            raise FileNotFoundError(error.errno, error.strerror, input.plan) from None
        number = getattr(slide.needs[stage], what)
        return number if what == "gpus" else number * attempt

    return needed
