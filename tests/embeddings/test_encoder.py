"""Networks as encoders: seeds, recipes, identity, batches, and devices that are short of memory."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from pathopipe.config import EmbedConfig
from pathopipe.embeddings import encoder as encoder_module
from pathopipe.embeddings.catalog import find_encoder
from pathopipe.embeddings.encoder import NetworkEncoder, _HostLane, _workers_of
from pathopipe.embeddings.networks import EncoderNetwork, build_network
from pathopipe.embeddings.precision import check_tiles
from pathopipe.embeddings.recipe import EncoderSpec, Transform, Weights
from pathopipe.errors import EncoderError, UsageError

TINY = find_encoder("timm.test_vit")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 200, 200, 3)).astype(np.uint8)
ROW = EncoderSpec(
    name="mine",
    title="Mine",
    loader="timm",
    architecture="test_vit",
    arguments={"num_classes": 0, "reg_tokens": 2, "img_size": 96},
    weights=Weights(hub="me/mine", revision="v1"),
    transform=Transform(resize="short", resize_px=128, crop_px=96, filter="bilinear", mean=(0.7, 0.6, 0.7)),
    tile_px=224,
    mpp=0.25,
    outputs={"cls": 64, "mean": 64, "cls-mean": 128, "tokens": 2304},
    output="cls-mean",
    prefix_tokens=3,
    license="CC-BY-NC-4.0",
    commercial="no",
    gated="yes",
)


def build(weights: Path | None = None, spec: EncoderSpec = TINY, **settings: object) -> NetworkEncoder:
    settings = {"weights": weights, "device": "cpu", "precision": "fp32", **settings}
    return NetworkEncoder(spec, EmbedConfig.model_validate(settings))


def state_of(encoder: NetworkEncoder) -> dict[str, torch.Tensor]:
    model = encoder._model
    assert isinstance(model, EncoderNetwork)
    return model.network.state_dict()


@pytest.fixture(scope="module")
def row_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of ROW."""
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_file(build_network(ROW, seed=3).network.state_dict(), path)
    return path


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


def test_the_transform_of_a_bare_architecture_is_timms(encoder: NetworkEncoder) -> None:
    network = build_network(TINY).network
    side = network.pretrained_cfg["input_size"][1]
    batch = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    batch = functional.interpolate(batch, size=(side, side), mode="bicubic", antialias=True).float() / 255
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.eval()((batch - mean) / std).numpy()
    assert np.allclose(encoder.encode(IMAGES), expected, atol=1e-4)
    assert encoder.identity["transform"]["resize_px"] == side


def test_a_row_of_the_catalogue_with_its_own_recipe(row_file: Path) -> None:
    encoder = build(row_file, ROW)
    assert encoder.features == 128
    network = build_network(ROW, seed=3).network.eval()
    batch = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    batch = functional.interpolate(batch, size=(128, 128), mode="bilinear", antialias=True)[:, :, 16:112, 16:112] / 255
    assert ROW.transform is not None
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (ROW.transform.mean, ROW.transform.std))
    with torch.no_grad():
        tokens = network.forward_features((batch - mean) / std).numpy()  # type: ignore[operator]
    # The class token, two registers, 6 x 6 patches.
    assert tokens.shape == (5, 39, 64)
    expected = np.concatenate([tokens[:, 0], tokens[:, 3:].mean(axis=1)], axis=1)
    assert np.allclose(encoder.encode(IMAGES), expected, atol=1e-4)


def test_identity_and_about_of_a_row(row_file: Path) -> None:
    encoder = build(row_file, ROW)
    assert encoder.identity == {
        "name": "mine",
        "weights": "file",
        "weights_sha256": sha256(row_file.read_bytes()).hexdigest(),
        "network": encoder.identity["network"],
        "output": "cls-mean",
        "transform": {
            "resize": "short",
            "resize_px": 128,
            "crop_px": 96,
            "filter": "bilinear",
            "mean": [0.7, 0.6, 0.7],
            "std": [0.229, 0.224, 0.225],
        },
        "precision": "fp32",
    }
    about = encoder.about
    assert (about["title"], about["license"], about["commercial"], about["gated"]) == ("Mine", ROW.license, "no", "yes")
    assert (about["hub"], about["revision"], about["recipe_tile_px"], about["recipe_mpp"]) == (
        "me/mine",
        "v1",
        224,
        0.25,
    )
    assert (about["weights_file"], about["weights_from"]) == ("mine.safetensors", "file")
    assert about["versions"]["timm"]
    assert about["warning"] is None
    # A store is read on other machines, by other people.
    assert str(row_file.parent) not in json.dumps([encoder.identity, about])


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        ({"arguments": {**ROW.arguments, "init_values": None, "qk_norm": False}}, True),
        ({"prefix_tokens": 3}, False),
        ({"notes": "words", "license": "MIT", "params_m": 3.0}, False),
        ({"weights": ROW.weights.model_copy(update={"strip": ("module.",)})}, True),
        ({"weights": ROW.weights.model_copy(update={"hub": "you/mine", "drop": ("x.",)})}, False),
        ({"output": "cls"}, True),
        ({"transform": ROW.transform.model_copy(update={"filter": "bicubic"}) if ROW.transform else None}, True),
    ],
)
def test_what_makes_another_encoder_of_a_row(row_file: Path, change: dict[str, object], is_another: bool) -> None:
    plain, changed = build(row_file, ROW), build(row_file, ROW.model_copy(update=change))
    assert (plain.identity != changed.identity) is is_another


def test_a_row_without_weights_is_refused_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"mine: no weights in the mirror folder(.|\n)*embed\.weights=FILE"):
        build(spec=ROW, weights_dir=tmp_path)


def test_a_row_whose_weights_lie_in_the_mirror_folder(row_file: Path) -> None:
    encoder = build(spec=ROW, weights_dir=row_file.parent)
    assert encoder.about["weights_from"] == "mirror"
    assert encoder.identity == build({"mine": row_file}, ROW).identity  # type: ignore[arg-type]


def test_a_row_that_is_wrong_about_its_numbers(row_file: Path) -> None:
    spec = ROW.model_copy(update={"outputs": {"cls-mean": 64}})
    with pytest.raises(EncoderError, match="mine: output 'cls-mean' has 128 numbers, its row says 64"):
        build(row_file, spec)


def test_code_of_a_repository_runs_only_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ROW.model_copy(update={"name": "coded", "loader": "transformers", "remote_code": True})
    calls = []

    def load_remote(spec: EncoderSpec, source: str | Path, revision: str = "") -> EncoderNetwork:
        calls.append((source, revision))
        return build_network(ROW, seed=3)

    monkeypatch.setattr(encoder_module, "load_remote", load_remote)
    with pytest.raises(EncoderError, match="read that code, then allow it with --set embed.trust_remote_code=true"):
        build(spec=spec)
    assert not calls
    from_hub = build(spec=spec, trust_remote_code=True)
    (tmp_path / "coded").mkdir()
    (tmp_path / "coded" / "config.json").touch()
    mirrored = build(spec=spec, trust_remote_code=True, weights_dir=tmp_path)
    assert calls == [("me/mine", "v1"), (tmp_path / "coded", "")]
    assert from_hub.identity == mirrored.identity
    assert (from_hub.about["weights_from"], mirrored.about["weights_from"]) == ("hub", "mirror")

    def fail(spec: EncoderSpec, source: str | Path, revision: str = "") -> EncoderNetwork:
        raise EncoderError("coded: the code can't be loaded (ImportError: einops)")

    monkeypatch.setattr(encoder_module, "load_remote", fail)
    with pytest.raises(EncoderError, match=r"ImportError: einops\)\n1\. from the hub"):
        build(spec=spec, trust_remote_code=True)


def test_networks_are_filled_without_a_second_copy_where_their_state_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    built_on = []

    def build_and_tell(spec: EncoderSpec, *, seed: int = 0, device: str = "cpu") -> EncoderNetwork:
        built_on.append(device)
        return build_network(spec, seed=seed, device=device)

    monkeypatch.setattr(encoder_module, "build_network", build_and_tell)
    assert next(encoder_module._build_empty(ROW).parameters()).is_meta
    assert built_on == ["meta"]
    # Rotary positions are buffers outside the state, which no file brings.
    rotary = ROW.model_copy(
        update={
            "architecture": "eva02_tiny_patch14_224",
            "arguments": {"num_classes": 0, "depth": 1},
            "outputs": {"pooled": 192},
            "output": "pooled",
        }
    )
    whole = encoder_module._build_empty(rotary)
    assert built_on[1:] == ["meta", "cpu"]
    assert not any(tensor.is_meta for tensor in (*whole.parameters(), *whole.buffers()))


@pytest.mark.parametrize("name", ["bare", "row"])
def test_a_tiles_vector_does_not_depend_on_its_neighbours(encoder: NetworkEncoder, row_file: Path, name: str) -> None:
    """Batch size and order move it by no more than 1e-5 of its length, the bound of the docstring."""
    encoder = encoder if name == "bare" else build(row_file, ROW)
    tiles = np.concatenate([IMAGES, check_tiles()[:, :200, :200]])
    together = encoder.encode(tiles)
    order = np.random.default_rng(2).permutation(len(tiles))
    others = [
        np.concatenate([encoder.encode(tiles[at : at + size]) for at in range(0, len(tiles), size)])
        for size in (1, 2, 4)
    ]
    others.append(encoder.encode(tiles[order])[np.argsort(order)])
    length = np.linalg.norm(together, axis=1)
    assert max(float((np.linalg.norm(other - together, axis=1) / length).max()) for other in others) < 1e-5


def test_half_precision_is_near_full(encoder: NetworkEncoder) -> None:
    full, half = encoder.encode(IMAGES), build(precision="bf16").encode(IMAGES)
    cosine = (full * half).sum(1) / np.linalg.norm(full, axis=1) / np.linalg.norm(half, axis=1)
    assert cosine.min() > 0.999
    assert not np.array_equal(full, half)


def test_a_bare_architecture_with_weights_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": state_of(build(seed=7)) | {"head.weight": torch.zeros(10, 64)}}, path)
    loaded = build(path)
    assert np.array_equal(loaded.encode(IMAGES), build(seed=7).encode(IMAGES))
    assert loaded.identity["weights"] == "file"
    assert loaded.identity["weights_sha256"] == sha256(path.read_bytes()).hexdigest()
    assert loaded.about["warning"] is None
    (tmp_path / "timm.test_vit.pt").write_bytes(path.read_bytes())
    assert build(weights_dir=tmp_path).identity == loaded.identity


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(
        UsageError, match="no architecture 'vit_smal_patch16_224'; did you mean 'vit_small_patch16_224'"
    ):
        build(spec=find_encoder("timm.vit_smal_patch16_224"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_asked_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="finds no CUDA device"):
        build(device="cuda")


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
        super().__init__(workers=1)
        self.underway: list[np.ndarray] = []
        self.log: list[str] = []

    def run(self, images: np.ndarray, forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], np.ndarray]:
        self.underway.append(images)
        self.log.append(f"send {len(images)}")
        values = super().run(images.copy(), forward)

        def wait() -> np.ndarray:
            self.log.append(f"arrived {len(images)}")
            return values()

        return wait

    def wait_for_copies(self) -> None:
        self.underway.clear()
        self.log.append("copied")


@pytest.mark.parametrize(
    ("threads", "workers"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4), (9, 3), (64, 4)]
)
def test_no_thread_is_left_over(threads: int, workers: int) -> None:
    assert _workers_of(threads) == workers


@pytest.mark.parametrize("n_tiles", [1, 7, 8, 9, 31])
def test_workers_change_no_vector(n_tiles: int) -> None:
    images = np.random.default_rng(n_tiles).integers(0, 256, (n_tiles, 224, 224, 3)).astype(np.uint8)
    encoder = build(precision="fp32")
    encoder._lane = _HostLane(workers=1)
    alone = encoder.encode(images)
    encoder._lane = _HostLane(workers=4)
    shared = encoder.encode(images)
    assert shared.shape == alone.shape
    assert np.linalg.norm(shared - alone, axis=1).max() <= 1e-5 * np.linalg.norm(alone, axis=1).min()
    assert (encoder.encode(images) == shared).all()


def test_what_fails_in_a_worker_is_told() -> None:
    lane = _HostLane(workers=2)

    def forward(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"no kernel for {len(images)} tiles")

    with pytest.raises(RuntimeError, match="no kernel for 4 tiles"):
        lane.run(np.zeros((8, 2, 2, 3), np.uint8), forward)


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
        encoder = build(device="cuda", precision=precision)
        buffer = encoder.allocate(IMAGES.shape)
        buffer[:] = IMAGES
        gpu = encoder.encode(buffer)
        cosine = (cpu * gpu).sum(1) / np.linalg.norm(cpu, axis=1) / np.linalg.norm(gpu, axis=1)
        assert cosine.min() > least


@pytest.mark.gpu
def test_batches_that_overlap_on_the_gpu_are_not_mixed_up() -> None:
    encoder = build(device="cuda")
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
