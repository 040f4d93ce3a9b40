"""Commands on a bucket: the same results as in a folder, and the same words."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathopipe.cohort.receipts import Receipt, begun_before, read_receipts, write_receipt
from pathopipe.files import remove_tree, sizes_below
from pathopipe.mil.bags import find_features
from pathopipe.mil.sources import StoreSource
from pathopipe.remote import RemotePath, location

CHUNKS = ("--set", "embed.chunk_rows=16")


def without_times(name: str, data: bytes) -> object:
    if not name.endswith("handcrafted/zarr.json"):
        return data
    metadata = json.loads(data)
    del metadata["attributes"]["seconds"], metadata["attributes"]["limited_by"]
    return metadata


def test_a_bucket_holds_what_a_folder_holds(
    drawn_slide: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "out"
    bucket = location(f"memory://{uuid.uuid4().hex}/out")
    for out in (local, bucket):
        ran = cli("run", drawn_slide, "--out", out, *CHUNKS)
        assert ran.code == 0, ran
        assert ran.out.endswith(f"results in {out}\n")
    both = [{name for name in sizes_below(out) if not name.startswith(".")} for out in (local, bucket)]
    assert both[0] == both[1]
    for name in sorted(both[0] - {"summary.csv"}):
        assert without_times(name, (local / name).read_bytes()) == without_times(name, (bucket / name).read_bytes())
    assert cli("verify", bucket).out == "drawn: sound\n"
    assert cli("report", bucket, "--out", tmp_path / "page.html").out.startswith("1 slides: 1 done")
    assert cli("report", bucket).code == 0
    assert (bucket / "report.html").read_bytes().startswith(b"<!doctype html>")
    # Classifiers read their tiles from there.
    sources = [StoreSource.open(find_features(out)["drawn"], slide_id="drawn") for out in (local, bucket)]
    rows = np.arange(5, 30)
    taken = [np.empty((len(rows), source.features), np.float32) for source in sources]
    for source, into in zip(sources, taken, strict=True):
        source.read_into(into, rows)
    assert np.array_equal(*taken)
    # What is done stays, what is gone is computed again, what was made from other settings is refused.
    (values,) = [name for name in both[1] if name.endswith("values/c/1/0")]
    before = {name: (bucket / name).stat().st_mtime for name in both[1] if "/values/c/" in name}
    (bucket / values).unlink()
    assert "lacks 1 of 3 chunks (1)" in cli("verify", bucket).out
    assert cli("run", drawn_slide, "--out", bucket, *CHUNKS).code == 0
    assert (bucket / values).read_bytes() == (local / values).read_bytes()
    assert {name for name in before if (bucket / name).stat().st_mtime != before[name]} == {values}
    refused = cli("run", drawn_slide, "--out", bucket, *CHUNKS, "--set", "tissue.min_region_mm2=0.02")
    assert refused.code == 1
    assert "made from other inputs" in refused.out
    assert {path.name for path in tmp_path.iterdir()} == {"out", "page.html"}
    remove_tree(bucket)
    assert "no store here" in cli("verify", bucket).err


def test_stages_and_receipts_may_lie_in_a_bucket(drawn_slide: Path, cli: Callable[..., Any]) -> None:
    bucket = location(f"memory://{uuid.uuid4().hex}")
    (bucket / "in" / "drawn.tiff").write_bytes(drawn_slide.read_bytes())
    assert isinstance(bucket, RemotePath)
    out = bucket / "out"
    missing = cli("tissue", bucket / "in" / "none.tiff", "--out", out)
    assert missing.code == 2
    assert "no such file" in missing.err
    path = out / "done" / "tissue" / "a.json"
    with begun_before(path) as killed:
        assert killed == 0
        left = (path.parent / ".a.json.begun").read_bytes()
    (path.parent / ".a.json.begun").write_bytes(left)  # as a kill leaves it
    with begun_before(path) as killed:
        assert killed == 1
    write_receipt(path, Receipt(slide_id="a", stage="tissue", status="failed", reason="a: odd"))
    assert [(str(place), receipt.status) for place, receipt in read_receipts(out)] == [(str(path), "failed")]
    counted = cli("cohort", "status", out)
    assert counted.code == 1
    assert "failed: a: odd" in counted.out
    assert (out / "summary.csv").is_file()
