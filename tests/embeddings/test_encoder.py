"""Networks as encoders: seeds, weights, transforms, and what goes wrong with weights files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from pathopipe.embeddings.catalog import find_encoder
from pathopipe.embeddings.encoder import NetworkEncoder, _HostLane
from pathopipe.errors import EncoderError, UsageError

TINY = find_encoder("timm.test_vit")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 200, 200, 3)).astype(np.uint8)


def build(weights: Path | None = None, **settings: object) -> NetworkEncoder:
    return NetworkEncoder(TINY, weights=weights, device="cpu", **{"precision": "fp32", **settings})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def encoder() -> NetworkEncoder:
    return build()


def test_random_weights_come_from_the_seed(encoder: NetworkEncoder) -> None:
    same, other = build(), build(seed=1)
    assert np.array_equal(encoder.encode(IMAGES), same.encode(IMAGES))
    assert not np.allclose(encoder.encode(IMAGES), other.encode(IMAGES))
    assert encoder.identity["weights"] == "random (seed 0)"
    assert "random weights" in encoder.about["warning"]
    assert encoder.identity == same.identity
    assert encoder.identity["weights_sha256"] != other.identity["weights_sha256"]


def test_building_leaves_the_global_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build(seed=3)
    assert torch.equal(torch.rand(1), expected)


def test_the_transform_is_resize_scale_normalise(encoder: NetworkEncoder) -> None:
    recipe = encoder._model.pretrained_cfg
    side = recipe["input_size"][1]
    batch = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float()
    batch = functional.interpolate(batch, size=(side, side), mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, std = (torch.tensor(recipe[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = encoder._model((batch - mean) / std).numpy()
    assert np.allclose(encoder.encode(IMAGES), expected, atol=1e-4)


def test_a_row_does_not_depend_on_its_batch(encoder: NetworkEncoder) -> None:
    whole = encoder.encode(IMAGES)
    parts = np.concatenate([encoder.encode(IMAGES[:2]), encoder.encode(IMAGES[2:])])
    assert np.allclose(whole, parts, atol=1e-5)


def test_half_precision_is_near_full(encoder: NetworkEncoder) -> None:
    full, half = encoder.encode(IMAGES), build(precision="bf16").encode(IMAGES)
    cosine = (full * half).sum(1) / np.linalg.norm(full, axis=1) / np.linalg.norm(half, axis=1)
    assert cosine.min() > 0.999
    assert not np.array_equal(full, half)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_from_a_file(encoder: NetworkEncoder, tmp_path: Path, suffix: str) -> None:
    state = build(seed=7)._model.state_dict()
    state = {**state, "head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    loaded = build(path)
    assert np.array_equal(loaded.encode(IMAGES), build(seed=7).encode(IMAGES))
    assert loaded.identity["weights"] == "file"
    assert len(loaded.identity["weights_sha256"]) == 64
    assert loaded.about["warning"] is None


def test_wrong_weights_name_the_keys(tmp_path: Path) -> None:
    state = build()._model.state_dict()
    state["stranger"] = state.pop("pos_embed")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(EncoderError, match=r"missing 1 \(pos_embed\); unexpected 1 \(stranger\)"):
        build(tmp_path / "w.safetensors")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    state = build()._model.state_dict()
    state["pos_embed"] = torch.zeros(1, 3, 64)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(EncoderError, match=r"of another shape 1 \(pos_embed\)"):
        build(tmp_path / "w.safetensors")


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, ("owned",))


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Code()}, tmp_path / "evil.pt")
    with pytest.raises(EncoderError, match="not a weights file that can be read safely"):
        build(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_broken_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(EncoderError, match="not a weights file"):
        build(tmp_path / "text.pt")
    with pytest.raises(EncoderError, match="no such weights file"):
        build(tmp_path / "absent.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(EncoderError, match="no table of tensors"):
        build(tmp_path / "list.pt")


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(
        UsageError, match="no architecture 'vit_smal_patch16_224'; did you mean 'vit_small_patch16_224'"
    ):
        NetworkEncoder(find_encoder("timm.vit_smal_patch16_224"), weights=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_asked_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="finds no CUDA device"):
        NetworkEncoder(TINY, weights=None, device="cuda")


def test_a_batch_too_large_for_the_device_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build()
    expected = encoder.encode(IMAGES)
    sizes: list[int] = []
    forward = encoder._forward

    def small(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError
        return forward(images)

    monkeypatch.setattr(encoder, "_forward", small)
    assert np.allclose(encoder.encode(IMAGES), expected, atol=1e-5)
    assert sizes == [5, 2, 2, 1]
    sizes.clear()
    encoder.encode(IMAGES)
    assert sizes == [2, 2, 1]


def test_not_even_one_tile_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build()

    def never(images: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(encoder, "_forward", never)
    with pytest.raises(EncoderError, match="no memory for one tile"):
        encoder.encode(IMAGES)


class _LoggedLane(_HostLane):
    """A device whose copies are not done until they are waited for."""

    ahead = 1

    def __init__(self) -> None:
        self.underway: list[np.ndarray] = []
        self.log: list[str] = []

    def send(self, images: np.ndarray) -> torch.Tensor:
        self.underway.append(images)
        self.log.append(f"send {len(images)}")
        return super().send(images.copy())

    def wait_for_copies(self) -> None:
        self.underway.clear()
        self.log.append("copied")

    def fetch(self, features: torch.Tensor) -> Callable[[], np.ndarray]:
        values = super().fetch(features)

        def wait() -> np.ndarray:
            self.log.append(f"arrived {len(features)}")
            return values()

        return wait


def test_tiles_may_be_overwritten_once_a_batch_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build()
    expected = encoder.encode(IMAGES)
    lane = _LoggedLane()
    monkeypatch.setattr(encoder, "_lane", lane)
    buffer = IMAGES[:3].copy()
    first = encoder.start(buffer)
    assert not lane.underway
    buffer[:2] = IMAGES[3:]
    second = encoder.start(buffer[:2])
    assert lane.log == ["send 3", "copied", "send 2", "copied"]
    assert np.allclose(first(), expected[:3], atol=1e-5)
    assert np.allclose(second(), expected[3:], atol=1e-5)
    assert lane.log[4:] == ["arrived 3", "arrived 2"]


def test_running_out_of_memory_loses_no_batch_underway(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build()
    expected = encoder.encode(IMAGES)
    lane = _LoggedLane()
    monkeypatch.setattr(encoder, "_lane", lane)
    before = encoder.start(IMAGES)
    forward = encoder._forward

    def small(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError
        return forward(images)

    monkeypatch.setattr(encoder, "_forward", small)
    after = encoder.start(IMAGES)
    assert lane.log == ["send 5", "copied", "send 5", "copied", "send 2", "send 2", "send 1", "copied"]
    assert np.allclose(before(), expected, atol=1e-5)
    assert np.allclose(after(), expected, atol=1e-5)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu() -> None:
    cpu = build(precision="fp32").encode(IMAGES)
    for precision, least in (("fp32", 0.9999), ("bf16", 0.999), ("fp16", 0.999)):
        encoder = NetworkEncoder(TINY, weights=None, device="cuda", precision=precision)  # type: ignore[arg-type]
        buffer = encoder.allocate(IMAGES.shape)
        buffer[:] = IMAGES
        gpu = encoder.encode(buffer)
        cosine = (cpu * gpu).sum(1) / np.linalg.norm(cpu, axis=1) / np.linalg.norm(gpu, axis=1)
        assert cosine.min() > least


@pytest.mark.gpu
def test_batches_that_overlap_on_the_gpu_are_not_mixed_up() -> None:
    encoder = NetworkEncoder(TINY, weights=None, device="cuda", precision="fp32")
    many = np.random.default_rng(1).integers(0, 256, (16, 32, 224, 224, 3)).astype(np.uint8)
    expected = [encoder.encode(images) for images in many]
    buffer = encoder.allocate(many[0].shape)
    results: list[np.ndarray] = []
    waiting: list[Callable[[], np.ndarray]] = []
    for images in many:
        buffer[:] = images
        waiting.append(encoder.start(buffer))
        buffer[:] = 0
        if len(waiting) > encoder.ahead:
            results.append(waiting.pop(0)())
    results += [result() for result in waiting]
    assert all(np.allclose(one, other, atol=1e-4) for one, other in zip(results, expected, strict=True))
