"""A slide is known again by content alone."""

import os
from pathlib import Path

import pytest

from pathopipe.slide.fingerprint import fingerprint_files


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_name_place_and_date_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    one = write(tmp_path / "a.svs", b"slide" * 100)
    two = write(tmp_path / "sub" / "b.tif", b"slide" * 100)
    os.utime(two, (1, 1))
    assert fingerprint_files([one]) == fingerprint_files([two])
    assert fingerprint_files([one])[1] == 500


@pytest.mark.parametrize("size", [10, 300_000, 5_000_000])
@pytest.mark.parametrize("place", ["first", "last"])
def test_ends_matter(tmp_path: Path, size: int, place: str) -> None:
    content = bytearray(os.urandom(size))
    before = fingerprint_files([write(tmp_path / "a", bytes(content))])[0]
    content[0 if place == "first" else -1] ^= 1
    assert fingerprint_files([write(tmp_path / "a", bytes(content))])[0] != before


def test_a_stretch_written_anew_is_seen(tmp_path: Path) -> None:
    content = bytearray(5_000_000)
    before = fingerprint_files([write(tmp_path / "a", bytes(content))])[0]
    content[2_000_000:2_100_000] = os.urandom(100_000)
    assert fingerprint_files([write(tmp_path / "a", bytes(content))])[0] != before


def test_size_matters(tmp_path: Path) -> None:
    prints = {fingerprint_files([write(tmp_path / "a", bytes(size))])[0] for size in (0, 1, 500_000, 500_001)}
    assert len(prints) == 4


def test_files_in_any_order(tmp_path: Path) -> None:
    one, two, three = (write(tmp_path / name, name.encode() * 50) for name in "abc")
    assert fingerprint_files([one, two, three]) == fingerprint_files([three, one, two])
    assert fingerprint_files([one, two]) != fingerprint_files([one, three])
    assert fingerprint_files([one, one])[0] != fingerprint_files([one])[0]


def test_time_is_bounded_on_a_huge_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.truncate(10 * 1024**3)
    fingerprint, size_bytes = fingerprint_files([path])
    assert size_bytes == 10 * 1024**3
    assert len(fingerprint) == 64
