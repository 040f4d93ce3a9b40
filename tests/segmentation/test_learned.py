"""A network as a model: the same maps in any company, objects on plain images, clear words on wrong weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from pathopipe.errors import PathopipeError, UsageError
from pathopipe.segmentation import learned
from pathopipe.segmentation.decode import map_channels
from pathopipe.segmentation.learned import LearnedModel, find_objects, open_model
from pathopipe.segmentation.network import ClassSpec, NetworkSpec, SegmentationNetwork, TaskSpec, save_network

CLASSES = {"nuclei": ("Round", "Long"), "glands": ("Gland",), "lumina": ("Lumen",), "tissue_types": ("A", "B", "C")}


def spec_of(*tasks: str) -> NetworkSpec:
    return NetworkSpec(
        backbone="test_resnet",
        mpp=0.5,
        tasks=tuple(
            TaskSpec(
                name=task,
                classes=tuple(ClassSpec(name=name, color=(40 * k, 90, 200)) for k, name in enumerate(CLASSES[task])),
            )
            for task in tasks or CLASSES
        ),
    )


class PixelNetwork(SegmentationNetwork):
    """Says what the colours say: red below 130 is a nucleus, green a gland, blue a lumen."""

    def forward(self, rgb: Tensor) -> dict[str, Tensor]:
        red, green, blue = ((130 - rgb[:, channel].float()) / 60 for channel in range(3))
        deep = functional.avg_pool2d((red > 0).float()[:, None], 9, stride=1, padding=4)[:, 0]
        nothing = torch.full_like(red, -9)
        said = {
            "nuclei": torch.stack([red, deep * 6 - 3, torch.zeros_like(red), green], 1),
            "glands": torch.stack([green, nothing], 1),
            "lumina": blue[:, None],
            "tissue_types": functional.avg_pool2d(rgb.float(), 32),
        }
        return {task.name: said[task.name] for task in self.spec.tasks}


def pixel_model(**changed: Any) -> LearnedModel:
    return LearnedModel(PixelNetwork(spec_of()), sha256="0", device="cpu", precision="fp32", **changed)


@pytest.fixture(scope="module")
def random_model() -> LearnedModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return LearnedModel(SegmentationNetwork(spec_of()), sha256="0", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def windows() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (4, 160, 160, 3), dtype=np.uint8)


def discs(side_px: int, radius_px: float, step_px: int) -> NDArray[np.int32]:
    y, x = np.mgrid[:side_px, :side_px]
    labels = np.zeros((side_px, side_px), np.int32)
    number = 0
    for cy in range(step_px // 2, side_px, step_px):
        for cx in range(step_px // 2, side_px, step_px):
            number += 1
            labels[np.hypot(x + 0.5 - cx, y + 0.5 - cy) < radius_px] = number
    return labels


def painted(labels: NDArray[np.int32]) -> NDArray[np.uint8]:
    rgb = np.full((*labels.shape, 3), 240, np.uint8)
    rgb[labels > 0, 0] = 20
    return rgb


def test_maps_do_not_depend_on_the_other_windows(random_model: LearnedModel, windows: NDArray[np.uint8]) -> None:
    whole = random_model.maps(windows)
    side = 160 - 2 * (random_model.margin_px - random_model.overlap_px)
    assert whole.shape == (4, side, side, len(map_channels(random_model.spec)))
    assert whole.dtype == np.uint8
    assert len(np.unique(whole)) > 20
    one_by_one = np.concatenate([random_model.maps(windows[at : at + 1]) for at in (2, 0, 3, 1)])
    assert (one_by_one[[1, 3, 0, 2]] == whole).all()


def test_windows_side_by_side_are_as_in_one_thread(random_model: LearnedModel, windows: NDArray[np.uint8]) -> None:
    torch.set_num_threads(2)
    try:
        model = LearnedModel(random_model._network, sha256="0", device="cpu", precision="fp32")
        assert model.batch_size == 2
        assert (model.maps(windows) == random_model.maps(windows)).all()
        assert (model.maps(windows[2:3]) == random_model.maps(windows[2:3])).all()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_batch_on_a_gpu_may_round_a_value_by_one(random_model: LearnedModel, windows: NDArray[np.uint8]) -> None:
    batched = LearnedModel(random_model._network, sha256="0", device="cpu", precision="fp32")
    batched._step = 4  # as on a GPU
    soft = [c for c in range(random_model.maps(windows).shape[-1]) if c not in random_model.categorical]
    apart = np.abs(batched.maps(windows)[..., soft].astype(int) - random_model.maps(windows)[..., soft])
    assert apart.max() <= 1


def test_batch_norms_are_folded_into_convolutions(windows: NDArray[np.uint8]) -> None:
    torch.manual_seed(5)
    network = SegmentationNetwork(spec_of()).eval()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:  # as after some training
        torch.nn.init.normal_(norm.running_mean, 0, 0.3)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        torch.nn.init.normal_(norm.bias, 0, 0.3)
    folded = learned._folded(network)
    assert len(norms) > 10
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    pixels = torch.from_numpy(windows[:1]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        there, wanted = folded(pixels), network(pixels)
    for name, logits in wanted.items():
        assert logits.std() > 0.01
        torch.testing.assert_close(there[name], logits, rtol=1e-3, atol=1e-3)


def test_a_norm_that_stands_elsewhere_is_left_alone(windows: NDArray[np.uint8]) -> None:
    class Crossed(SegmentationNetwork):
        """A norm that stands behind a convolution, but works on what goes into it."""

        def __init__(self, spec: NetworkSpec) -> None:
            super().__init__(spec)
            self.mix = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, rgb: Tensor) -> dict[str, Tensor]:
            return {"lumina": self.mix(self.norm(rgb.float() / 255))[:, :1]}

    torch.manual_seed(6)
    network = Crossed(spec_of("lumina")).eval()
    torch.nn.init.normal_(network.norm.running_mean, 3, 1)
    pixels = torch.from_numpy(windows[:1]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        there, wanted = learned._folded(network)(pixels), network(pixels)
    assert (there["lumina"] == wanted["lumina"]).all()


def test_lattice_fits_the_network(random_model: LearnedModel) -> None:
    side_px = random_model.core_px + 2 * random_model.margin_px
    assert side_px % 32 == random_model.core_px % 32 == random_model.margin_px % 32 == 0
    assert random_model.core_px % random_model.margin_px == 0
    assert 0 < random_model.overlap_px <= min(random_model.margin_px, random_model.core_px // 2)
    names = map_channels(random_model.spec)
    assert {names[at] for at in random_model.categorical} == {
        "nuclei.class",
        "tissue_types.class",
        "tissue_types.probability",
    }


def test_without_the_other_decoders_nuclei_stay_the_same(
    random_model: LearnedModel, windows: NDArray[np.uint8]
) -> None:
    small = random_model.only({"nuclei"})
    assert [layer.name for layer in small.layers] == ["nuclei"]
    assert (small.maps(windows) == random_model.maps(windows)[..., :3]).all()
    assert small.identity == random_model.identity
    assert [layer.name for layer in random_model.only({"lumina"}).layers] == ["glands", "lumina"]
    assert random_model.only(CLASSES) is random_model


def test_memory_that_is_too_small_halves_the_batch(windows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = pixel_model(), []
    model._step = 4
    forward = model._forward

    def tight(batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        seen.append(len(batch))
        if len(batch) > room:
            raise torch.cuda.OutOfMemoryError
        return forward(batch)

    monkeypatch.setattr(model, "_forward", tight)
    room = 2
    assert (model.maps(windows) == pixel_model().maps(windows)).all()
    assert seen == [4, 2, 2]
    model.maps(windows)
    assert seen == [4, 2, 2, 2, 2]  # it remembers
    room = 0
    with pytest.raises(PathopipeError, match=r"no memory for one window of 160 x 160 px; use --device cpu"):
        model.maps(windows)


@pytest.mark.parametrize("side_px", [200, 1500])
def test_an_image_is_seen_whole(side_px: int) -> None:
    """Larger than a window, it is put together without seams."""
    rng = np.random.default_rng(1)
    rgb = rng.integers(0, 256, (side_px, side_px // 2, 3), dtype=np.uint8)
    maps = learned._maps_of_image(rgb, pixel_model())
    inside = 1 / (1 + np.exp(-(130 - rgb[..., 0].astype(float)) / 60))
    assert np.abs(maps[..., 0] - inside * 255).max() <= 0.51
    # 1 where the channel of the tissue head is highest, at the middle of a cell of 32 px
    assert set(np.unique(maps[..., map_channels(spec_of()).index("tissue_types.class")]).tolist()) <= {1, 2, 3}


@pytest.mark.parametrize(("mpp", "radius_px", "tolerance"), [(0.5, 8, 0.02), (0.25, 16, 0.02), (0.8, 8, 0.2)])
def test_objects_of_an_image_are_found_at_its_own_resolution(mpp: float, radius_px: int, tolerance: float) -> None:
    truth = discs(300, radius_px, 60)
    found = find_objects(painted(truth), mpp, pixel_model())["nuclei"]
    assert found.labels.shape == truth.shape
    assert found.labels.max() == len(found.class_id) == truth.max() == 25
    numbers = np.arange(1, 26)
    wanted = np.asarray(ndimage.center_of_mass(truth > 0, truth, numbers))
    centres = np.asarray(ndimage.center_of_mass(found.labels > 0, found.labels, numbers))
    nearest = np.linalg.norm(wanted[:, None] - centres[None], axis=2).min(axis=1)
    assert nearest.max() < 1
    area = (found.labels > 0).sum() / (truth > 0).sum()
    assert abs(area - 1) < tolerance


def test_enlarged_outlines_are_smooth() -> None:
    """At half the network's pixel a disc is as round as one can be: its rows are not in equal pairs."""
    truth = discs(240, 40, 240)
    found = find_objects(painted(truth), 0.25, pixel_model())["nuclei"].labels > 0
    assert (found ^ (truth > 0)).sum() < 0.01 * truth.sum()
    width_px = found.sum(axis=1)
    assert (width_px[0::2] != width_px[1::2]).sum() > 10


@pytest.mark.parametrize(
    ("rgb", "mpp", "message"),
    [
        (np.zeros((9, 9), np.uint8), 0.5, "wants uint8 RGB"),
        (np.zeros((9, 9, 3), np.float32), 0.5, "wants uint8 RGB"),
        (np.zeros((0, 9, 3), np.uint8), 0.5, "wants uint8 RGB"),
        (np.zeros((9, 9, 3), np.uint8), 0.0, "positive number"),
        (np.zeros((9, 9, 3), np.uint8), float("nan"), "positive number"),
    ],
)
def test_what_is_no_image_is_refused(rgb: NDArray[Any], mpp: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_objects(rgb, mpp, pixel_model())


def test_weights_from_a_file(tmp_path: Path, windows: NDArray[np.uint8]) -> None:
    torch.manual_seed(3)
    network = SegmentationNetwork(spec_of("nuclei"))
    save_network(network, tmp_path / "mine.safetensors")
    model = open_model(tmp_path / "mine.safetensors", device="cpu", precision="fp32")
    again = open_model(tmp_path / "mine.safetensors", device="cpu", precision="fp32")
    assert (model.maps(windows) == again.maps(windows)).all()
    assert model.identity == again.identity
    assert len(model.identity["weights_sha256"]) == 64
    torch.manual_seed(4)
    save_network(SegmentationNetwork(spec_of("nuclei")), tmp_path / "other.safetensors")
    assert open_model(tmp_path / "other.safetensors", device="cpu").identity != model.identity


def test_wrong_weights_are_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\x00" * 40)
    network = SegmentationNetwork(spec_of("nuclei"))
    whole = tmp_path / "whole.safetensors"
    save_network(network, whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    monkeypatch.setattr(learned, "default_weights", lambda: tmp_path / "absent.safetensors")
    with torch.no_grad():
        network.decoders["nuclei"].out.weight[0] = torch.nan
    monkeypatch.setattr(learned, "load_network", lambda path: network)
    with pytest.raises(UsageError, match=r"whole\.safetensors: 'decoders\.nuclei\.out\.weight' holds numbers that are"):
        open_model(whole)
    monkeypatch.undo()
    for path in (torn, cut, tmp_path / "absent.safetensors"):
        with pytest.raises(UsageError) as caught:
            open_model(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(learned, "default_weights", lambda: tmp_path / "absent.safetensors")
    with pytest.raises(UsageError, match=r"needs weights.*--weights, or use --model classical"):
        open_model()


def test_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"segment\.device=cuda, but torch finds no CUDA device"):
        open_model(tmp_path / "any", device="cuda")


def test_precision_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_bf16, expected in ((True, "bf16 autocast"), (False, "fp32")):
        monkeypatch.setattr(learned, "cpu_has_bf16", lambda has=has_bf16: has)
        model = LearnedModel(PixelNetwork(spec_of()), sha256="0", device="cpu")
        assert model.precision == model.identity["precision"] == expected
