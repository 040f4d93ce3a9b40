"""Receipts: whole or absent, and a slide that is killed again and again is one day a failed one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pathopipe.cohort.receipts import (
    Receipt,
    begun_before,
    read_receipt,
    read_receipts,
    receipt_place,
    write_receipt,
)
from pathopipe.errors import StoreError, UsageError
from pathopipe.store import SlideStore

Cli = Callable[..., Any]


def test_a_receipt_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "done" / "tiles" / "ä b.v2.json"
    place = receipt_place(path)
    assert (place.out, place.stage, place.slide_id) == (tmp_path, "tiles", "ä b.v2")
    receipt = Receipt(slide_id="ä b.v2", stage="tiles", status="failed", reason="because", facts={"tiles": {"g": 3}})
    write_receipt(path, receipt)
    assert read_receipt(path) == receipt
    (path.parent / ".hidden.json").write_text("half of a rec")
    (tmp_path / "done" / "plan").touch()
    assert list(read_receipts(tmp_path)) == [(path, receipt)]


@pytest.mark.parametrize("path", ["x.json", "done/x.json", "out/done/tiles/x", "out/tiles/done/x.json"])
def test_paths_that_are_no_receipts(path: str) -> None:
    with pytest.raises(UsageError, match="OUT/done/STAGE/SLIDE_ID.json"):
        receipt_place(Path(path))


@pytest.mark.parametrize("text", ["", "[]", '{"slide_id": "a"}', '{"slide_id": "a", "stage": "t", "status": "fine"}'])
def test_damaged_receipts(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(StoreError, match="delete it"):
        read_receipt(path)


def die_in_the_middle(path: Path) -> None:
    child = os.fork()
    if child == 0:
        with begun_before(path):
            os._exit(9)
    os.waitpid(child, 0)


def test_only_what_leaves_no_word_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "done" / "tissue" / "a.json"
    with begun_before(path) as killed:
        assert killed == 0
    die_in_the_middle(path)
    die_in_the_middle(path)
    with pytest.raises(KeyboardInterrupt), begun_before(path) as killed:
        assert killed == 2
        raise KeyboardInterrupt
    with begun_before(path) as killed:
        assert killed == 0
    assert not list(path.parent.iterdir())


# --- commands ----------------------------------------------------------------------------------------------------


def receipt_of(out: Path, stage: str, slide_id: str) -> Receipt:
    return read_receipt(out / "done" / stage / f"{slide_id}.json")


def test_a_slide_through_its_stages(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    out, done = tmp_path / "out", tmp_path / "out" / "done"
    options = ("--out", out, "--slide-id", "s", drawn_slide, "--check")
    assert cli("tissue", *options, "--receipt", done / "tissue" / "s.json").code == 0
    assert cli("tiles", *options, "--receipt", done / "tiles" / "s.json", "--after", done / "tissue" / "s.json")[0] == 0
    assert cli("embed", *options, "--receipt", done / "embed" / "s.json", "--after", done / "tiles" / "s.json")[0] == 0
    tissue, tiles, embed = (receipt_of(out, stage, "s") for stage in ("tissue", "tiles", "embed"))
    assert {tissue.status, tiles.status, embed.status} == {"ok"}
    assert len({tissue.inputs, tiles.inputs, embed.inputs}) == 3
    grid = SlideStore.open(out / "slides" / "s.zarr").read_grid("256px-0.5um")
    assert embed.facts["tiles"] == tiles.facts["tiles"] == {"256px-0.5um": len(grid)}
    assert embed.facts["bad_tiles"] == {"256px-0.5um/handcrafted": 0}

    # All in one job: the same numbers from the same inputs.
    whole = tmp_path / "whole"
    options = ("--out", whole, "--slide-id", "s", drawn_slide, "--earlier", "--receipt", whole / "done/embed/s.json")
    assert cli("embed", *options).code == 0
    assert receipt_of(whole, "embed", "s").inputs == embed.inputs
    assert receipt_of(whole, "embed", "s").facts == embed.facts

    # What reads back damaged is a failure.
    chunk = out / "slides/s.zarr/embeddings/256px-0.5um/handcrafted/values/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    options = ("--out", out, "--slide-id", "s", drawn_slide, "--receipt", done / "embed" / "s.json")
    assert cli("embed", *options, "--check").code == 0
    again = receipt_of(out, "embed", "s")
    assert again.status == "failed"
    assert "reads back damaged (embeddings/256px-0.5um/handcrafted/values" in again.reason
    result = cli("verify", out / "slides" / "s.zarr", "--receipt", done / "verify" / "s.json")
    assert result.code == 0
    assert "ended with exit code 1: s: " in receipt_of(out, "verify", "s").reason


def test_failures_are_results(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    out, done = tmp_path / "out", tmp_path / "out" / "done"
    broken = tmp_path / "broken.tiff"
    broken.write_bytes(drawn_slide.read_bytes()[:5000])
    result = cli("tissue", broken, "--out", out, "--receipt", done / "tissue" / "broken.json")
    assert result.code == 0
    failed = receipt_of(out, "tissue", "broken")
    assert failed.status == "failed"
    assert failed.reason in result.err
    result = cli("tissue", tmp_path / "none.tiff", "--out", out, "--receipt", done / "tissue" / "none.json")
    assert (result.code, receipt_of(out, "tissue", "none").status) == (0, "failed")
    assert "no such file" in receipt_of(out, "tissue", "none").reason

    # Later stages pass it over, and name the first cause.
    after, last = done / "tissue" / "broken.json", done / "tiles" / "broken.json"
    assert cli("tiles", broken, "--out", out, "--receipt", last, "--after", after).code == 0
    passed = receipt_of(out, "tiles", "broken")
    assert (passed.status, passed.reason) == ("passed-over", f"tissue failed: {failed.reason}")
    store = out / "slides" / "broken.zarr"
    target = done / "export-clam" / "broken.json"
    clam = ("export", "h5", store, "--layout", "clam", "--out", tmp_path / "clam")
    assert cli(*clam, "--receipt", target, "--after", last).code == 0
    assert receipt_of(out, "export-clam", "broken").reason == passed.reason
    assert not (tmp_path / "clam").exists()


def test_what_is_not_the_slides_fault_has_no_receipt(
    cli: Cli, drawn_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = tmp_path / "done" / "tissue" / "s.json"
    options = ("tissue", drawn_slide, "--out", tmp_path, "--slide-id", "s")
    assert cli(*options, "--receipt", receipt, "--set", "tissue.mpp=many").code == 2
    assert cli(*options, "--check").code == 2
    assert cli(*options, "--receipt", tmp_path / "s.json").code == 2

    def out_of_memory(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("pathopipe.pipeline.run_slide", out_of_memory)
    with pytest.raises(MemoryError):
        cli(*options, "--receipt", receipt)
    assert not list(receipt.parent.iterdir())


def test_an_unexpected_error_keeps_its_traceback(
    cli: Cli, drawn_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*arguments: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("pathopipe.pipeline.run_slide", fault)
    receipt = tmp_path / "done" / "tissue" / "s.json"
    assert cli("tissue", drawn_slide, "--out", tmp_path, "--slide-id", "s", "--receipt", receipt).code == 0
    assert "unexpected ZeroDivisionError (of all things)" in read_receipt(receipt).reason
    assert "of all things" in (tmp_path / "logs" / "s.tissue.txt").read_text()


def test_a_slide_that_kills_its_job_is_given_up(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    receipt = tmp_path / "done" / "tissue" / "s.json"
    options = ("tissue", drawn_slide, "--out", tmp_path, "--slide-id", "s", "--receipt", receipt, "--give-up-after", 2)
    die_in_the_middle(receipt)
    assert cli(*options).code == 0
    assert read_receipt(receipt).status == "ok"
    die_in_the_middle(receipt)
    die_in_the_middle(receipt)
    assert cli(*options).code == 0
    assert read_receipt(receipt).status == "failed"
    assert "killed 2 times" in read_receipt(receipt).reason


def put(out: Path, stage: str, slide_id: str, status: str, **more: object) -> None:
    write_receipt(
        out / "done" / stage / f"{slide_id}.json",
        Receipt(slide_id=slide_id, stage=stage, status=status, **more),  # type: ignore[arg-type]
    )


def test_status(cli: Cli, tmp_path: Path) -> None:
    assert cli("cohort", "status", tmp_path).code == 2
    facts = {"tissue_mm2": 2.5, "flags": ["pen"], "mpp": "0.5", "tiles": {"g": 7}, "bad_tiles": {"g/e": 1}}
    put(tmp_path, "embed", "a", "ok", seconds=2.0, facts=facts)
    assert cli("cohort", "status", tmp_path).code == 0
    put(tmp_path, "embed", "b", "failed", reason="b: no good")
    put(tmp_path, "export-clam", "b", "passed-over", reason="embed failed: b: no good")
    result = cli("cohort", "status", tmp_path)
    assert result.code == 1
    assert "embed: 1 ok, 1 failed\nexport-clam: 1 passed-over\nfailed: b: no good\n" in result.out
    assert "1 of 2 slides without failure" in result.out
    summary = (tmp_path / "summary.csv").read_text().splitlines()
    assert summary[1:] == ["a,done,,2.5,7,1,0.5,pen,2.0", "b,failed,b: no good,0.0,0,0,,,0.0"]
    assert cli("cohort", "status", tmp_path, "--fail-on", "all").code == 0
    assert cli("cohort", "status", tmp_path, "--fail-on", "never").code == 0
    told = json.loads(cli("cohort", "status", tmp_path, "--json", "--fail-on", "never").out)
    assert (told["slides"], told["failed"]) == (2, {"b": "b: no good"})
    assert cli("cohort", "status", tmp_path, "--forget-failed").code == 0
    assert [receipt.slide_id for _, receipt in read_receipts(tmp_path)] == ["a"]
