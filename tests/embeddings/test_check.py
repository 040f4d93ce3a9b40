"""Checks of encoders: what a wrong row looks like, and the vector that is kept and compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pathopipe.config import EmbedConfig
from pathopipe.embeddings import check as check_module
from pathopipe.embeddings import precision
from pathopipe.embeddings.catalog import find_encoder
from pathopipe.embeddings.check import Check, check_recipe, check_weights
from pathopipe.embeddings.networks import build_network
from pathopipe.embeddings.recipe import EncoderSpec, Transform, Weights
from pathopipe.errors import EncoderError

ROW = EncoderSpec(
    name="mine",
    loader="timm",
    architecture="test_vit",
    arguments={"num_classes": 0, "reg_tokens": 2, "img_size": 96},
    transform=Transform(resize="short", resize_px=128, crop_px=96, filter="bilinear", mean=(0.7, 0.6, 0.5)),
    tile_px=224,
    outputs={"cls": 64, "mean": 64, "cls-mean": 128, "tokens": 2304},
    output="cls",
    prefix_tokens=3,
    tokens=39,
    params_m=0.3024,
)


@pytest.fixture(autouse=True)
def _a_cpu_without_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "no-cpuinfo")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "mine.safetensors"
    save_file(build_network(ROW, seed=3).network.state_dict(), path)
    return path


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {one.what: one for one in checks}


def wrong(spec: EncoderSpec) -> dict[str, str]:
    return {one.what: one.found for one in check_recipe(spec) if one.holds is False}


def test_a_row_that_is_right() -> None:
    checks = by_name(check_recipe(ROW))
    assert {one.what: one.holds for one in checks.values()} == dict.fromkeys(checks, True)
    assert list(checks) == [
        "parameters",
        "tokens",
        "after 3 prefix tokens",
        "numbers of cls",
        "numbers of mean",
        "numbers of cls-mean",
        "numbers of tokens",
        "a white tile",
        "one bright pixel",
    ]
    assert checks["tokens"].found == "39"
    assert checks["after 3 prefix tokens"].found == "6 x 6 patches"
    # (1 - mean) / std.
    assert checks["a white tile"].found == "1.3100, 1.7857, 2.2222"
    assert checks["one bright pixel"].found.startswith("96 x 96 px, ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"params_m": 0.3028}, {"parameters": "0.302 M"}),
        ({"tokens": 37}, {"tokens": "39"}),
        ({"outputs": {"cls": 128, "mean": 64}}, {"numbers of cls": "64"}),
    ],
)
def test_a_row_that_is_wrong_says_where(change: dict[str, Any], expected: dict[str, str]) -> None:
    assert wrong(ROW.model_copy(update=change)) == expected


def test_registers_that_are_counted_for_patches() -> None:
    """The network's builder refuses it, so the check of the square is asked by itself."""
    assert check_module._check_prefix(39, 3).holds
    one = check_module._check_prefix(39, 1)
    assert (one.holds, one.found) == (False, "38 patches")
    assert not check_module._check_prefix(1, 1).holds
    assert "prefix_tokens" in wrong(ROW.model_copy(update={"prefix_tokens": 1}))["network"]


def test_a_network_that_cant_be_built_is_told_and_the_transform_still_checked() -> None:
    spec = ROW.model_copy(update={"architecture": "test_vit9"})
    found = wrong(spec)
    assert list(found) == ["network"]
    assert "can't be built here: timm has no architecture 'test_vit9'" in found["network"]
    assert by_name(check_recipe(spec))["a white tile"].holds


def test_a_transform_that_does_not_do_as_its_row_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(check_module.TileTransform):
        """ImageNet's mean instead of the row's, and another filter."""

        def __init__(self, transform: Transform, device: torch.device) -> None:
            super().__init__(transform.model_copy(update={"mean": (0.485, 0.456, 0.406), "filter": "bicubic"}), device)

    monkeypatch.setattr(check_module, "TileTransform", Wrong)
    assert list(wrong(ROW)) == ["a white tile", "one bright pixel"]


def test_a_crop_larger_than_the_tile() -> None:
    spec = ROW.model_copy(update={"transform": Transform(resize="none", resize_px=None, crop_px=224), "tile_px": 200})
    assert "can't be cut from tiles of 200 x 200 px" in wrong(spec)["transform"]


def test_a_bare_architecture_has_nothing_to_compare_with() -> None:
    checks = by_name(check_recipe(find_encoder("timm.test_vit")))
    assert checks["parameters"] == Check(what="parameters", found="0.306 M")
    assert checks["numbers of pooled"] == Check(what="numbers of pooled", found="64")
    assert checks["one bright pixel"].holds
    with pytest.raises(EncoderError, match="did you mean 'test_vit"):
        check_recipe(find_encoder("timm.test_vitt"))


# With weights


def test_the_vector_is_kept_and_compared(weights: Path, tmp_path: Path) -> None:
    config, vectors = EmbedConfig(weights=weights), tmp_path / "vectors"
    checks, notes = check_weights(ROW, config, vectors)
    first = by_name(checks)
    assert first["weights"].holds
    assert first["vector of a drawn tile"].found == "kept now, for the next time"
    assert notes == []
    (kept,) = vectors.iterdir()
    assert kept.name == f"mine-{first['sha256'].found[:16]}.json"
    document = json.loads(kept.read_text())
    assert len(document["vector"]) == 64
    assert document["versions"]["torch"] == torch.__version__
    checks, notes = check_weights(ROW, config, vectors)
    again = by_name(checks)["vector of a drawn tile"]
    assert (again.holds, again.found) == (True, "cosine 1.000000 to the kept one, length +0.00%")
    assert notes == []
    # Another output is another vector.
    check_weights(ROW.model_copy(update={"name": "mine.mean", "output": "mean"}), config, vectors)
    assert len(list(vectors.iterdir())) == 2


def drift(kept: Path, **changes: Any) -> None:
    kept.write_text(json.dumps(json.loads(kept.read_text()) | changes))


@pytest.fixture
def kept(weights: Path, tmp_path: Path) -> Path:
    """The file of a vector that was kept before."""
    check_weights(ROW, EmbedConfig(weights=weights), tmp_path / "vectors")
    (path,) = (tmp_path / "vectors").iterdir()
    return path


def vector_check(weights: Path, kept: Path, spec: EncoderSpec = ROW) -> tuple[Check, list[str]]:
    checks, notes = check_weights(spec, EmbedConfig(weights=weights), kept.parent)
    return by_name(checks)["vector of a drawn tile"], notes


@pytest.mark.parametrize(("angle", "scale", "holds"), [(0.01, 1.0, True), (0.02, 1.0, False), (0.0, 1.02, False)])
def test_how_far_a_vector_may_drift(weights: Path, kept: Path, angle: float, scale: float, holds: bool) -> None:
    """cos 0.01 is 0.99995, cos 0.02 is 0.9998."""
    vector = np.array(json.loads(kept.read_text())["vector"])
    across = np.random.default_rng(0).normal(size=64)
    across -= vector * (across @ vector) / (vector @ vector)
    across *= np.linalg.norm(vector) / np.linalg.norm(across)
    turned = scale * (np.cos(angle) * vector + np.sin(angle) * across)
    versions = {**json.loads(kept.read_text())["versions"], "torch": "2.0.0"}
    drift(kept, vector=turned.tolist(), versions=versions)
    found, notes = vector_check(weights, kept)
    assert found.holds is holds
    assert len(notes) == 1
    assert f"torch was 2.0.0, is {torch.__version__}" in notes[0]
    assert ("has stayed the same" if holds else "is not the kept one") in notes[0]


def test_a_changed_recipe_is_named(weights: Path, kept: Path) -> None:
    spec = ROW.model_copy(update={"output": "cls-mean"})
    found, notes = vector_check(weights, kept, spec)
    assert (found.holds, found.found) == (False, "128 numbers, 64 were kept")
    assert "output was cls, is cls-mean" in notes[0]
    assert f"remove {kept}" in notes[0]


def test_a_vector_that_differs_for_no_reason_that_is_known(weights: Path, kept: Path) -> None:
    drift(kept, vector=[1.0] * 64)
    found, notes = vector_check(weights, kept)
    assert not found.holds
    assert "no version and nothing of the recipe has changed" in notes[0]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"vector": 3}', "DRIFT vector [NaN]", "DRIFT vector null", "DRIFT versions {}", "\udcff"],
)
def test_a_damaged_file_is_made_anew(weights: Path, kept: Path, content: str) -> None:
    whole = kept.read_bytes()
    if content.startswith("DRIFT "):
        _, key, value = content.split()
        drift(kept, **{key: json.loads(value)})
    else:
        kept.write_bytes(content.encode(errors="surrogateescape"))
    found, notes = vector_check(weights, kept)
    assert found.holds is None
    assert notes == [f"the kept vector was made anew, as it was damaged: {kept}"]
    assert kept.read_bytes() == whole


def test_another_drawn_tile_is_not_compared(weights: Path, kept: Path) -> None:
    drift(kept, tile_sha256="0" * 64, vector=[1.0] * 64)
    found, notes = vector_check(weights, kept)
    assert found.holds is None
    assert "drew another tile" in notes[0]
    assert vector_check(weights, kept)[0].holds


def test_where_nothing_can_be_kept(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    checks, notes = check_weights(ROW, EmbedConfig(weights=weights), tmp_path / "file" / "vectors")
    assert by_name(checks)["vector of a drawn tile"].holds is None
    assert "can't be kept" in notes[0]


def test_half_precision_where_the_cpu_has_it(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "cpu_has_bf16", lambda: True)
    checks, _ = check_weights(ROW, EmbedConfig(weights=weights, device="cpu"), tmp_path)
    half = by_name(checks)["bf16 autocast on cpu"]
    assert half.holds
    assert 0.999 < float(half.found.split()[-1]) < 1


def test_weights_that_do_not_fit_are_an_error(weights: Path, tmp_path: Path) -> None:
    spec = ROW.model_copy(update={"arguments": {**ROW.arguments, "reg_tokens": 4}, "prefix_tokens": 5})
    with pytest.raises(EncoderError, match=r"of another shape 2 \(.* reg_token: 1 x 2 x 64, not 1 x 4 x 64\)"):
        check_weights(spec, EmbedConfig(weights=weights), tmp_path)


def test_a_network_that_takes_one_size_gets_tiles_of_it(weights: Path, tmp_path: Path) -> None:
    spec = ROW.model_copy(update={"transform": Transform(resize="none", resize_px=None), "tile_px": 96})
    checks, _ = check_weights(spec, EmbedConfig(weights=weights), tmp_path)
    assert by_name(checks)["weights"].holds


def test_nothing_is_fetched_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fetch(*arguments: object, **settings: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "model_info", fetch)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    spec = ROW.model_copy(update={"weights": Weights(hub="me/mine")})
    with pytest.raises(EncoderError, match="mine: no weights on this machine"):
        check_weights(spec, EmbedConfig(), tmp_path)
    with pytest.raises(EncoderError, match=r"can't be reached \(AssertionError: asked the hub\)"):
        check_weights(spec, EmbedConfig(), tmp_path, download=True)
