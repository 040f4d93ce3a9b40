"""Precision by CPU flags, and bf16 weights only where they agree with fp32."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pathopipe.config import EmbedConfig, load_config
from pathopipe.embeddings import encoder as encoder_module
from pathopipe.embeddings import precision
from pathopipe.embeddings.catalog import find_encoder
from pathopipe.embeddings.encoder import NetworkEncoder
from pathopipe.embeddings.precision import check_tiles, choose_precision, cpu_has_bf16, least_cosine, with_bf16_weights
from pathopipe.embeddings.recipe import EncoderSpec, Transform
from pathopipe.errors import StoreChangedError
from pathopipe.pipeline import RunPlan, run_slide
from pathopipe.records import SlideRef
from pathopipe.store import SlideStore, store_path

TINY = find_encoder("timm.test_vit")
CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 200, 200, 3)).astype(np.uint8)


def build(spec: EncoderSpec = TINY, **settings: object) -> NetworkEncoder:
    return NetworkEncoder(spec, EmbedConfig.model_validate({"device": "cpu", **settings}))


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for /proc/cpuinfo: a CPU with bf16."""
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nvmx flags\t: x\nflags\t\t: fpu avx512f avx512_bf16 pku\n\nprocessor\t: 1\n")
    monkeypatch.setattr(precision, "_CPUINFO", path)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16x\n", False),
        ("model name\t: avx512_bf16\nflags\t\t: fpu avx2\n", False),
        ("flags\t\t:\n", False),
        ("", False),
    ],
)
def test_bf16_is_read_from_the_flags(flags: Path, text: str, expected: bool) -> None:
    flags.write_text(text)
    assert cpu_has_bf16() is expected


def test_a_system_that_says_nothing_has_none(flags: Path) -> None:
    flags.unlink()
    assert not cpu_has_bf16()
    assert choose_precision("auto", CPU) == "fp32"


def test_what_is_asked_for_is_taken(flags: Path) -> None:
    assert choose_precision("auto", CPU) == "bf16 weights"
    assert [choose_precision(asked, CPU) for asked in ("fp32", "bf16", "fp16")] == [  # type: ignore[arg-type]
        "fp32",
        "bf16 autocast",
        "fp16 autocast",
    ]


@pytest.mark.parametrize(
    ("native", "with_bf16", "without"),
    [
        (None, "bf16 autocast", "fp16 autocast"),
        ("fp32", "fp32", "fp32"),
        ("fp16", "fp16 autocast", "fp16 autocast"),
        ("bf16", "bf16 autocast", "fp32"),
    ],
)
def test_a_gpu_does_as_the_authors_did(
    monkeypatch: pytest.MonkeyPatch, native: precision.Native | None, with_bf16: str, without: str
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_precision("auto", gpu, native) == with_bf16
    assert choose_precision("fp32", gpu, native) == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert choose_precision("auto", gpu, native) == without


def test_on_a_cpu_the_row_does_not_matter(flags: Path) -> None:
    assert {choose_precision("auto", CPU, native) for native in (None, "fp32", "fp16", "bf16")} == {"bf16 weights"}  # type: ignore[arg-type]


def test_a_network_that_takes_one_size_is_tried_on_that(flags: Path, tmp_path: Path) -> None:
    spec = TINY.model_copy(
        update={
            "name": "no-resize",
            "transform": Transform(resize="none", resize_px=None),
            "tile_px": 160,
            "outputs": {"pooled": 64},
        }
    )
    torch.save(build()._model.float().network.state_dict(), tmp_path / "w.pt")  # type: ignore[operator]
    assert build(spec, weights=tmp_path / "w.pt").precision == "bf16 weights"


def test_auto_takes_bf16_weights_near_fp32_and_says_so(flags: Path, caplog: pytest.LogCaptureFixture) -> None:
    full, half, again = build(precision="fp32"), build(), build()
    assert half.identity["precision"] == "bf16 weights"
    assert {parameter.dtype for parameter in half._model.parameters()} == {torch.bfloat16}
    assert 0.999 < half.about["least_cosine_to_fp32"] <= 1
    assert full.about["least_cosine_to_fp32"] is None
    values = half.encode(IMAGES)
    assert values.dtype == np.float32
    assert least_cosine(full.encode(IMAGES), values) > 0.999
    assert not np.array_equal(full.encode(IMAGES), values)
    assert np.array_equal(values, again.encode(IMAGES))
    assert (half.identity, half.about) == (again.identity, again.about)
    # The weights are known by what was loaded, whatever they are computed in.
    assert half.identity["weights_sha256"] == full.identity["weights_sha256"]
    assert not caplog.records


def test_every_arithmetic_has_a_name_of_its_own(flags: Path) -> None:
    names = {build(precision=asked).identity["precision"] for asked in ("auto", "fp32", "bf16", "fp16")}
    assert names == {"bf16 weights", "fp32", "bf16 autocast", "fp16 autocast"}


class _Shifted(nn.Module):
    """A network whose bf16 twin loses what tells tiles apart."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.inner(batch)
        return features + 0.1 * features.abs().mean() * torch.arange(features.shape[1], dtype=features.dtype)


class _NoKernel(nn.Module):
    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("\"some_op\" not implemented for 'BFloat16'")


@pytest.mark.parametrize(
    ("broken", "reason", "has_cosine"),
    [
        (lambda model: _Shifted(with_bf16_weights(model)), "the least cosine to fp32 is 0.", True),
        (lambda model: _NoKernel(), "not implemented for 'BFloat16'", False),
    ],
)
def test_bf16_weights_that_disagree_are_turned_down(
    flags: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: object,
    reason: str,
    has_cosine: bool,
) -> None:
    monkeypatch.setattr(encoder_module, "with_bf16_weights", broken)
    with caplog.at_level(logging.WARNING, logger="pathopipe"):
        encoder = build()
    assert encoder.identity["precision"] == "fp32"
    assert (encoder.about["least_cosine_to_fp32"] is not None) is has_cosine
    assert not has_cosine or encoder.about["least_cosine_to_fp32"] <= 0.999
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "timm.test_vit: runs in fp32" in caplog.text
    assert reason in caplog.text
    assert np.array_equal(encoder.encode(IMAGES), build(precision="fp32").encode(IMAGES))


def test_numbers_that_are_not_finite_do_not_pass(flags: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflowing(nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.full((len(batch), 64), torch.inf)

    monkeypatch.setattr(encoder_module, "with_bf16_weights", lambda model: Overflowing())
    monkeypatch.setattr(logging.getLogger("pathopipe"), "disabled", True)
    encoder = build()
    assert encoder.identity["precision"] == "fp32"
    assert encoder.about["least_cosine_to_fp32"] is None


def test_the_least_cosine_is_over_rows() -> None:
    one = np.array([[1, 0], [1, 1]], np.float32)
    assert least_cosine(one, one) == pytest.approx(1)
    assert least_cosine(one, np.array([[2, 0], [1, 0]], np.float32)) == pytest.approx(np.sqrt(0.5))
    assert np.isnan(least_cosine(one, np.array([[np.nan, 0], [1, 1]], np.float32)))
    assert np.isnan(least_cosine(one, np.zeros((2, 2), np.float32)))


def test_the_tiles_of_the_check_are_tissue_and_the_same_each_time() -> None:
    tiles = check_tiles().copy()
    check_tiles.cache_clear()
    assert np.array_equal(tiles, check_tiles())
    assert tiles.shape == (4, 256, 256, 3)
    assert all(tile.std() > 10 for tile in tiles)
    assert len({tile.tobytes() for tile in tiles}) == 4
    assert check_tiles(100).shape == (4, 100, 100, 3)


def test_a_store_keeps_to_one_precision_and_tells_it(flags: Path, drawn_slide: Path, tmp_path: Path) -> None:
    def run(*settings: str) -> None:
        config = load_config(
            None, ["embed.encoder=timm.test_vit", "tiles.side_px=224", "tiles.mpp=2", "embed.device=cpu", *settings]
        )
        run_slide(SlideRef("s", drawn_slide), RunPlan(out=tmp_path, config=config))

    run()
    store = SlideStore.open(store_path(tmp_path, "s"))
    attributes = store.embeddings("224px-2um", "timm.test_vit").attributes
    assert attributes["inputs"]["encoder"]["precision"] == "bf16 weights"
    assert attributes["least_cosine_to_fp32"] > 0.999
    assert attributes["limited_by"] in {"reading", "model", "writing"}
    assert set(attributes["seconds"]) == {"read", "model", "waiting", "write"}
    with pytest.raises(StoreChangedError, match="precision was bf16 weights, now fp32"):
        run("embed.precision=fp32")
    with pytest.raises(StoreChangedError, match="precision was bf16 weights, now bf16 autocast"):
        run("embed.precision=bf16")
