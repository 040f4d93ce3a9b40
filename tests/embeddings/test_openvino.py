"""Networks through OpenVINO: the vectors of torch, in batches of any length, or a clear refusal."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pathopipe.config import EmbedConfig, load_config
from pathopipe.embeddings import encoder as encoder_module
from pathopipe.embeddings.catalog import find_encoder
from pathopipe.embeddings.encoder import NetworkEncoder
from pathopipe.embeddings.openvino import CompiledNetwork
from pathopipe.embeddings.precision import least_cosine
from pathopipe.errors import EncoderError, StoreChangedError, UsageError
from pathopipe.pipeline import RunPlan, run_slide
from pathopipe.records import SlideRef

pytest.importorskip("openvino")

TINY = find_encoder("timm.test_vit")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 200, 200, 3)).astype(np.uint8)


def build(**settings: object) -> NetworkEncoder:
    return NetworkEncoder(TINY, EmbedConfig.model_validate({"engine": "openvino", **settings}))


@pytest.fixture(scope="module")
def in_torch() -> np.ndarray:
    config = EmbedConfig.model_validate({"device": "cpu", "precision": "fp32"})
    return NetworkEncoder(TINY, config).encode(IMAGES)


@pytest.fixture(scope="module")
def in_fp32() -> NetworkEncoder:
    return build(precision="fp32")


def test_fp32_is_that_of_torch(in_fp32: NetworkEncoder, in_torch: np.ndarray) -> None:
    assert in_fp32.precision == "openvino fp32"
    assert in_fp32.identity["precision"] == "openvino fp32"
    assert in_fp32.about["least_cosine_to_fp32"] > 0.99999
    assert in_fp32.about["versions"]["openvino"]
    found = in_fp32.encode(IMAGES)
    length = np.linalg.norm(in_torch, axis=1, keepdims=True)
    assert (np.abs(found - in_torch) <= 1e-4 * length).all()


def test_a_vector_hangs_neither_on_its_batch_nor_on_the_next_one(in_fp32: NetworkEncoder) -> None:
    whole = in_fp32.encode(IMAGES)
    kept = whole.copy()
    alone = np.concatenate([in_fp32.encode(IMAGES[row : row + 1]) for row in (4, 0, 2)])
    np.testing.assert_array_equal(whole, kept)
    length = np.linalg.norm(whole, axis=1, keepdims=True)
    assert (np.abs(alone - whole[[4, 0, 2]]) <= 1e-5 * length[[4, 0, 2]]).all()


def test_bf16_is_kept_where_it_agrees(in_torch: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "choose_precision", lambda *asked: "bf16 weights")
    encoder = build()
    assert encoder.precision == "openvino bf16"
    assert least_cosine(in_torch, encoder.encode(IMAGES)) > 0.999


def test_bf16_that_does_not_agree_is_turned_down(
    in_torch: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Coarse(CompiledNetwork):
        def __init__(self, model: nn.Module, *, name: str, bf16: bool, threads: int) -> None:
            super().__init__(model, name=name, bf16=False, threads=threads)
            self._is_coarse = bf16

        def __call__(self, batch: Tensor) -> Tensor:
            found = super().__call__(batch)
            return found + self._is_coarse * found.roll(1, dims=1)

    monkeypatch.setattr(encoder_module, "CompiledNetwork", Coarse)
    with caplog.at_level(logging.WARNING, "pathopipe"):
        encoder = build(precision="bf16")
    assert "for openvino bf16 won't do here (the least cosine to fp32 is 0." in caplog.text
    assert encoder.precision == "openvino fp32"
    assert least_cosine(in_torch, encoder.encode(IMAGES)) > 0.99999


def test_vectors_of_another_engine_are_not_mixed_in(drawn_slide: Path, tmp_path: Path) -> None:
    ref = SlideRef("s", drawn_slide)
    settings = ["embed.encoder=timm.test_vit", "embed.precision=fp32", "embed.device=cpu", "tiles.min_tissue=0.9"]
    run_slide(ref, RunPlan(out=tmp_path, config=load_config(None, settings)))
    again = RunPlan(out=tmp_path, config=load_config(None, [*settings, "embed.engine=openvino"]))
    with pytest.raises(StoreChangedError, match=r"precision was fp32, now openvino fp32"):
        run_slide(ref, again)


def test_what_it_can_not_do_is_said() -> None:
    with pytest.raises(UsageError, match=r"embed.engine=openvino is for CPUs"):
        build(device="cuda")
    with pytest.raises(UsageError, match=r"in bf16 or fp32; leave embed.precision=fp16 out"):
        build(precision="fp16")

    class Odd(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            raise KeyError("no such thing")

    network = CompiledNetwork(Odd(), name="odd", bf16=False, threads=1)
    with pytest.raises(EncoderError, match=r"odd: OpenVINO can't take the network over \(.*; use embed.engine=torch"):
        network(torch.zeros(1, 3, 32, 32))


def test_without_the_package_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EncoderError, match=r"pip install 'pathopipe\[openvino\]', or use embed.engine=torch"):
        build()
