"""``pathopipe encoders check`` as a user types it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pathopipe.embeddings.catalog import find_encoder
from pathopipe.embeddings.networks import build_network

Cli = Callable[..., Any]

ROW = {
    "loader": "timm",
    "architecture": "test_vit",
    "arguments": {"num_classes": 0},
    "transform": {"resize": "exact", "resize_px": 160},
    "outputs": {"cls": 64},
    "output": "cls",
    "tokens": 101,
}


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own file; vectors are kept beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "mine.yaml"
    rows = {"mine": ROW, "tall": {**ROW, "tokens": 100}, "absent": {**ROW, "loader": "custom", "package": "nowhere"}}
    path.write_text(yaml.safe_dump(rows))
    return path


@pytest.fixture
def weights(catalog: Path) -> Path:
    path = catalog.parent / "mine.pt"
    torch.save(build_network(find_encoder("mine", catalog), seed=1).network.state_dict(), path)
    return path


def test_a_row_without_weights(cli: Cli, catalog: Path) -> None:
    ended = cli("encoders", "check", "mine", "--catalog", catalog)
    assert ended.code == 0, ended.err
    lines = {line.split("  ")[0]: line.split() for line in ended.out.splitlines()}
    assert lines["mine"] == ["mine", "expected", "found"]
    assert lines["tokens"] == ["tokens", "101", "101", "ok"]
    assert lines["after 1 prefix tokens"][-5:] == ["10", "x", "10", "patches", "ok"]
    assert lines["parameters"] == ["parameters", "0.306", "M"]
    assert "note: the weights were not looked at" in ended.err


def test_a_row_that_is_wrong(cli: Cli, catalog: Path) -> None:
    ended = cli("encoders", "check", "tall", "--catalog", catalog)
    assert ended.code == 1
    assert ["tokens", "100", "101", "WRONG"] in [line.split() for line in ended.out.splitlines()]


def test_a_row_that_cant_be_built_here(cli: Cli, catalog: Path, weights: Path) -> None:
    ended = cli("encoders", "check", "absent", "--catalog", catalog, "--weights", weights)
    assert ended.code == 1
    assert "can't be built here: absent: " in ended.out
    assert "no network to put them in" in ended.err


def test_weights_and_the_vector(cli: Cli, catalog: Path, weights: Path) -> None:
    command = ("encoders", "check", "mine", "--catalog", catalog, "--weights", weights)
    first = cli(*command)
    assert first.code == 0, first.err
    assert "kept now, for the next time" in first.out
    (kept,) = (catalog.parent / "cache" / "pathopipe" / "encoders").iterdir()
    again = cli(*command, "--json")
    document = json.loads(again.out)
    assert (again.code, document["name"], document["holds"], document["notes"]) == (0, "mine", True, [])
    found = {one["what"]: one for one in document["checks"]}
    assert found["vector of a drawn tile"]["holds"]
    assert found["vector of a drawn tile"]["found"].startswith("cosine 1.000000")
    assert found["sha256"]["found"].startswith(kept.stem.removeprefix("mine-"))
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "vector": [1.0] * 64}))
    changed = cli(*command)
    assert changed.code == 1
    assert "WRONG" in changed.out
    assert f"remove {kept}" in changed.err


def test_weights_from_a_mirror_folder(cli: Cli, catalog: Path, weights: Path) -> None:
    ended = cli("encoders", "check", "mine", "--catalog", catalog, "--weights-dir", weights.parent)
    assert ended.code == 0, ended.err
    assert "mine.pt: every key fits" in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["viirchow2"], "did you mean 'virchow2'"),
        (["handcrafted"], "computed by formulas, not by a network"),
        (["mine", "--weights", "absent.pt"], "absent.pt: no such weights file"),
        (["mine", "--weights-dir", "EMPTY"], "no weights in the mirror folder"),
        (["mine", "--download"], "they are not on the hub"),
        (["timm.test_vitt"], "timm has no architecture 'test_vitt'"),
    ],
)
def test_wrong_use(cli: Cli, catalog: Path, arguments: list[str], message: str) -> None:
    (catalog.parent / "empty").mkdir()
    places = {"EMPTY": catalog.parent / "empty"}
    ended = cli("encoders", "check", *(places.get(one, one) for one in arguments), "--catalog", catalog)
    assert ended.code == 2, ended
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_wrong_keys_are_named(cli: Cli, catalog: Path) -> None:
    torch.save({"stranger": torch.zeros(1)}, catalog.parent / "w.pt")
    ended = cli("encoders", "check", "mine", "--catalog", catalog, "--weights", catalog.parent / "w.pt")
    assert ended.code == 2
    assert "unexpected 1 (stranger)" in ended.err


def test_a_bare_architecture(cli: Cli, catalog: Path) -> None:
    ended = cli("encoders", "check", "timm.test_vit", "--json")
    assert ended.code == 0, ended.err
    found = {one["what"]: one for one in json.loads(ended.out)["checks"]}
    assert found["parameters"]["holds"] is None


def test_help_shows_examples(cli: Cli) -> None:
    ended = cli("encoders", "check", "--help")
    assert ended.code == 0
    assert "pathopipe encoders check uni2-h" in ended.out
