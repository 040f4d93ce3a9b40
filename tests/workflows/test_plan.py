"""The plan of a cohort: what each slide needs, from its header."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pathopipe.cohort.plan import PLANNED_STAGES, Needs, PlannedSlide, plan_path, read_plan, write_plan
from pathopipe.config import load_config
from pathopipe.errors import StoreError
from pathopipe.pipeline.needs import most_tiles, needs_of
from pathopipe.records import Level, SlideInfo

Cli = Callable[..., Any]


def header(side_px: int, mpp: float | None = 0.25) -> SlideInfo:
    return SlideInfo(
        slide_id="s",
        path=Path("s.svs"),
        reader="openslide",
        vendor="aperio",
        dims_l0=(side_px, side_px),
        levels=(Level(side_px, side_px, 1.0, 1.0),),
        size_bytes=1,
        fingerprint="f",
        mpp=None if mpp is None else (mpp, mpp),
    )


def test_a_plan_reads_back(tmp_path: Path) -> None:
    needs = {stage: Needs(100 + number, number, number % 2) for number, stage in enumerate(PLANNED_STAGES)}
    slides = [
        PlannedSlide(slide_id="ä, b", size_bytes=5, dims_l0=(3, 4), most_tiles=2, needs=needs),
        PlannedSlide(slide_id="c", size_bytes=0, dims_l0=(0, 0), most_tiles=0, problem='"no" slide', needs=needs),
    ]
    write_plan(plan_path(tmp_path), slides)
    assert list(read_plan(plan_path(tmp_path)).values()) == slides


def test_no_plan_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_plan(plan_path(tmp_path))
    plan_path(tmp_path).write_text("slide_id,size_bytes\na,many\n")
    with pytest.raises(StoreError, match="cohort plan"):
        read_plan(plan_path(tmp_path))


def test_tiles_are_counted_by_area() -> None:
    # 20,000 px at 0.25 um/px are 5 mm; tiles of 256 px at 0.5 um/px are 0.128 mm: 39.06 a side.
    assert most_tiles(header(20_000), load_config(None, [])) == 40 * 40
    assert most_tiles(header(20_000), load_config(None, ["tiles.side_px=512", "tiles.overlap_px=256"])) == 40 * 40
    assert most_tiles(header(20_000, mpp=None), load_config(None, [])) == 0


def test_larger_slides_and_networks_need_more() -> None:
    plain, network = load_config(None, []), load_config(None, ["embed.encoder=uni", "embed.device=cpu"])
    on_gpu = load_config(None, ["embed.encoder=uni", "embed.device=cuda"])
    small, large = needs_of(header(10_000), plain), needs_of(header(100_000), plain)
    for stage in PLANNED_STAGES:
        assert small[stage].mem_mb < large[stage].mem_mb
        assert small[stage].minutes <= large[stage].minutes
        assert not large[stage].gpus
    # Measured for these two: 213 and 486 MB.
    assert small["embed"].mem_mb >= 2 * 213
    assert large["embed"].mem_mb >= 2 * 486
    slow, quick = needs_of(header(100_000), network)["embed"], needs_of(header(100_000), on_gpu)["embed"]
    # 303 million parameters in fp32 are 1.2 GB.
    assert slow.mem_mb > large["embed"].mem_mb + 1200
    assert slow.minutes > 10 * quick.minutes
    assert (slow.gpus, quick.gpus) == (0, 1)
    assert needs_of(header(100_000), on_gpu)["segment"].gpus == 0
    assert needs_of(None, plain)["tissue"].minutes == small["tissue"].minutes


def test_the_command(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    (tmp_path / "text.tiff").write_text("no slide")
    manifest = tmp_path / "cohort.csv"
    manifest.write_text(f"slide_id,path\ndrawn,{drawn_slide}\ntext,text.tiff\n")
    result = cli("cohort", "plan", manifest, "--out", tmp_path / "out")
    assert result.code == 0
    assert "2 slides" in result.out
    assert "1 can't be opened" in result.out
    drawn, text = read_plan(tmp_path / "out" / "plan.csv").values()
    assert (drawn.dims_l0, drawn.problem, drawn.size_bytes) == ((2400, 1800), "", drawn_slide.stat().st_size)
    assert drawn.most_tiles == 10 * 8
    assert "not a slide" in text.problem


def test_what_is_wrong_is_said_before_any_work(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "cohort.csv"
    manifest.write_text(f"slide_id,path\ndrawn,{drawn_slide}\nnone,none.tiff\n")
    plan = ("cohort", "plan", manifest, "--out", tmp_path / "out")
    assert "none.tiff' can't be found" in cli(*plan).err
    assert cli(*plan).code == 2
    assert cli(*plan, "--allow-missing", "--encoder", "handcraftet").code == 2
    assert not (tmp_path / "out" / "plan.csv").exists()
    assert cli(*plan, "--allow-missing").code == 0
    assert "no such file" in read_plan(tmp_path / "out" / "plan.csv")["none"].problem.lower()
