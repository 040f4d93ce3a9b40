"""The network: shapes of its maps, how far it sees, and weights files that fit or say why they don't."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pathopipe.errors import UsageError
from pathopipe.segmentation.datasets import TASKS
from pathopipe.segmentation.network import (
    STRIDE_PX,
    ClassSpec,
    NetworkSpec,
    SegmentationNetwork,
    TaskSpec,
    load_network,
    save_network,
    weights_sha256,
)

torch.set_num_threads(1)

SMALL = {"channels": [8, 8, 16, 16], "stem_width": 8, "stem_type": "deep"}


def spec_of(*tasks: str, n_classes: int = 1, **said: Any) -> NetworkSpec:
    classes = tuple(ClassSpec(name=f"class {k}", color=(k, 90, 200)) for k in range(n_classes))
    backbone = {"backbone": "resnet18", "backbone_options": SMALL, "decoder_channels": (16, 12, 8, 8)}
    return NetworkSpec(**{**backbone, **said}, tasks=tuple(TaskSpec(name=task, classes=classes) for task in tasks))


def pixels(height: int, width: int, n: int = 1, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, height, width), dtype=np.uint8))


def network_of(*tasks: str, **said: Any) -> SegmentationNetwork:
    """With statistics of batches that are not those of the start."""
    torch.manual_seed(0)
    network = SegmentationNetwork(spec_of(*tasks, **said)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            module.weight.data.uniform_(0.5, 1.5)
    return network


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("resnet18", SMALL),
        ("test_efficientnet", {}),
        ("test_convnext", {}),  # its finest map has a stride of 4
        ("test_vit", {}),
        ("vit_tiny_patch16_224", {"depth": 3}),
        ("test_vit", {"patch_size": 8, "img_size": 64}),
    ],
)
@pytest.mark.parametrize("n_classes", [1, 3])
def test_maps_of_every_backbone(backbone: str, options: dict[str, Any], n_classes: int) -> None:
    spec = spec_of(*TASKS, n_classes=n_classes, backbone=backbone, backbone_options=options)
    with torch.inference_mode():
        said = SegmentationNetwork(spec).eval()(pixels(64, 96, 2))
    assert {task: tuple(logits.shape) for task, logits in said.items()} == {
        "nuclei": (2, 2 if n_classes == 1 else 5, 64, 96),
        "glands": (2, 2, 64, 96),
        "lumina": (2, 1, 64, 96),
        "tissue_types": (2, n_classes, 2, 3),
    }
    assert all(torch.isfinite(logits).all() for logits in said.values())


@pytest.mark.parametrize("task", TASKS)
def test_one_task_alone(task: str) -> None:
    with torch.inference_mode():
        said = network_of(task, n_classes=2)(pixels(64, 64))
    assert list(said) == [task]


def test_maps_of_a_token_grid_tell_place() -> None:
    """Another patch of pixels changes the maps there the most."""
    network = network_of("nuclei", backbone="test_vit", backbone_options={})
    plain = torch.full((1, 3, 128, 128), 200, dtype=torch.uint8)
    marked = plain.clone()
    marked[..., 96:112, 16:32] = 20
    with torch.inference_mode():
        change = (network(marked)["nuclei"] - network(plain)["nuclei"]).abs().sum((0, 1))
    y, x = divmod(int(change.argmax()), 128)
    assert 80 <= y < 128
    assert x < 48


REACH_PX = 320
"""Of the network below: layers of one block each see 110 px, their decoders as far again."""


def test_a_pixel_sees_only_what_is_near() -> None:
    """Its map stays the same to the bit of rounding, whatever lies beyond, and wherever the window begins."""
    network = network_of(*TASKS, backbone="resnet10t", backbone_options={"channels": [8, 8, 8, 8], "stem_width": 8})
    wide = pixels(192, 2 * REACH_PX + 160)
    other = wide.clone()
    other[..., :64] = 255 - other[..., :64]
    with torch.inference_mode():
        said, changed = network(wide), network(other)
        shifted = network(wide[..., 32:])
    for task in TASKS:
        stride = STRIDE_PX if task == "tissue_types" else 1
        first = (64 + REACH_PX) // stride
        assert torch.allclose(said[task][..., first:], changed[task][..., first:], atol=1e-4)
        assert not torch.allclose(said[task][..., : 64 // stride], changed[task][..., : 64 // stride], atol=1e-2)
        by = 32 // stride
        inner = slice(REACH_PX // stride, None)
        assert torch.allclose(shifted[task][..., inner], said[task][..., by:][..., inner], atol=1e-4)


def shipped_spec() -> NetworkSpec:
    text = (Path(__file__).parents[2] / "configs" / "segmenter.yaml").read_text()
    return NetworkSpec.model_validate(yaml.safe_load(text)["network"])


def test_the_network_of_the_recipe_is_small() -> None:
    spec = shipped_spec()
    assert [task.name for task in spec.tasks] == list(TASKS)
    n_weights = sum(value.numel() for value in SegmentationNetwork(spec).parameters())
    assert 1e6 < n_weights <= 5e6


# Settings


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"backbone": "resnet81"}, r"network\.backbone: timm has no 'resnet81'; did you mean 'resnet18'"),
        ({"backbone_options": {"chanels": [8]}}, r"'resnet18' can't be built with \{'chanels': \[8\]\} .*'chanels'"),
        ({"backbone_options": {"features_only": False}}, "can't be built with .*features_only"),
        ({"backbone": "test_vit", "backbone_options": {"wings": 2}}, "'test_vit' can't be built with .*wings"),
        (
            {"backbone": "test_vit", "backbone_options": {"patch_size": 14}},
            "can't see RGB of 64 x 64 px .*multiple of 32",
        ),
        ({"backbone_options": {"in_chans": 4}}, "'resnet18' with .*can't see RGB"),
    ],
)
def test_backbones_that_cant_be_built(said: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        SegmentationNetwork(spec_of("nuclei", **said))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spec_of("nucleus"), "unknown task 'nucleus'; did you mean 'nuclei'"),
        (lambda: spec_of("nuclei", "glands", "nuclei"), "a task stands there twice: nuclei, glands, nuclei"),
        (lambda: spec_of(), "at least 1 item"),
        (lambda: spec_of("nuclei", n_classes=0), "at least 1 item"),
        (lambda: spec_of("nuclei", mpp=0.01), "greater than or equal to 0.05"),
        (lambda: spec_of("nuclei", decoder_channels=(8, 8)), "at least 4 items"),
        (lambda: spec_of("nuclei", neck="thick"), "Extra inputs are not permitted"),
    ],
)
def test_specs_that_make_no_sense(make: Callable[[], NetworkSpec], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()


def test_a_task_by_its_name() -> None:
    spec = spec_of("nuclei", "lumina", n_classes=2)
    found = spec.task("lumina")
    assert found is not None
    assert [one.record.name for one in found.classes] == ["class 0", "class 1"]
    assert found.classes[1].record.color == (1, 90, 200)
    assert spec.task("glands") is None


# Weights files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "own.safetensors"
    save_network(network_of("nuclei", "tissue_types", n_classes=2), path, extra={"name": "own", "step": "12"})
    return path


def test_a_network_comes_back_as_it_was_in_float16(saved: Path) -> None:
    network = network_of("nuclei", "tissue_types", n_classes=2)
    again = load_network(saved, expected=network.spec)
    assert again.spec == network.spec
    assert not again.training
    before, after = network.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        rounded = value.half().float() if value.is_floating_point() else value
        assert torch.equal(after[name], rounded)
    stored = load_file(saved)
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float16}
    rgb = pixels(64, 64)
    with torch.inference_mode():
        said, expected = again(rgb), network(rgb)
    for task in said:
        assert torch.allclose(said[task], expected[task], atol=0.05, rtol=0.02)
        assert said[task].std() > 0.1


def test_the_same_weights_are_the_same_file(saved: Path, tmp_path: Path) -> None:
    network = network_of("nuclei", "tissue_types", n_classes=2)
    save_network(network, tmp_path / "again.safetensors", extra={"name": "own", "step": "12"})
    assert weights_sha256(tmp_path / "again.safetensors") == weights_sha256(saved)
    with torch.no_grad():
        network.decoders["nuclei"].out.bias[0] += 1
    save_network(network, tmp_path / "other.safetensors", extra={"name": "own", "step": "12"})
    assert weights_sha256(tmp_path / "other.safetensors") != weights_sha256(saved)


def test_the_file_tells_its_network_and_more(saved: Path) -> None:
    from safetensors import safe_open

    with safe_open(saved, framework="pt") as file:
        about = file.metadata()
    assert (about["name"], about["step"]) == ("own", "12")
    assert NetworkSpec.model_validate_json(about["network"]) == spec_of("nuclei", "tissue_types", n_classes=2)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    network = network_of("lumina")
    for value in (float("nan"), 1e6):  # the second is beyond float16
        with torch.no_grad():
            network.decoders["lumina"].out.bias[0] = value
        with pytest.raises(UsageError, match=r"own\.safetensors: weight 'decoders\.lumina\.out\.bias' is not finite"):
            save_network(network, tmp_path / "own.safetensors")
    assert not list(tmp_path.iterdir())


def refusal(path: Path, expected: NetworkSpec | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        load_network(path, expected=expected)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


def test_files_that_are_no_weights(saved: Path, tmp_path: Path) -> None:
    assert "no such weights file" in refusal(tmp_path / "absent.safetensors")
    path = tmp_path / "some.safetensors"
    for data in (b"", b"not weights", saved.read_bytes()[:-1], saved.read_bytes()[:500]):
        path.write_bytes(data)
        assert "the file may be cut short" in refusal(path)
    save_file({"a": torch.zeros(1)}, path)
    assert "not weights of a pathopipe segmentation network (format 'not stated')" in refusal(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "pt"})
    assert "(format 'pt')" in refusal(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "pathopipe segmentation network 1"})
    assert "does not state its network" in refusal(path)
    told = {"format": "pathopipe segmentation network 1", "network": '{"tasks": [{"name": "cells"}]}'}
    save_file({"a": torch.zeros(1)}, path, metadata=told)
    assert "does not state its network" in refusal(path)


def test_keys_that_differ_are_named(saved: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(saved, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(saved)
    path = tmp_path / "other.safetensors"

    def said(changed: dict[str, Tensor]) -> str:
        save_file(changed, path, metadata=about)
        return refusal(path)

    without = {name: value for name, value in tensors.items() if name != "decoders.nuclei.out.bias"}
    assert said(without).endswith("; missing: decoders.nuclei.out.bias")
    assert said(tensors | {"extra": torch.zeros(1)}).endswith("; not of this network: extra")
    wide = tensors | {"decoders.nuclei.out.bias": torch.zeros(99)}
    assert said(wide).endswith("; of another shape: decoders.nuclei.out.bias")
    nothing = said({"extra": torch.zeros(1)})
    assert "; missing: decoders.nuclei.out.bias, " in nothing
    assert " and more; not of this network: extra" in nothing


def test_another_network_than_was_asked_for(saved: Path) -> None:
    text = refusal(saved, spec_of("nuclei", "glands"))
    assert text.endswith("weights of a network for nuclei, tissue_types; asked for is one for nuclei, glands")
    text = refusal(saved, spec_of("nuclei", "tissue_types", n_classes=2, mpp=0.25))
    assert text.endswith("weights of another network: mpp is 0.5, not 0.25")


# Backbones that were trained elsewhere


def timm_model(name: str, **options: Any) -> torch.nn.Module:
    from pathopipe.embeddings.torchvision_import import import_torchvision

    import_torchvision()
    import timm

    torch.manual_seed(7)
    model: torch.nn.Module = timm.create_model(name, **options)
    return model


@pytest.mark.parametrize(
    ("backbone", "options"), [("resnet18", SMALL), ("test_vit", {}), ("test_efficientnet", {}), ("test_convnext", {})]
)
def test_a_backbone_begins_with_the_weights_of_a_whole_model(
    backbone: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Its maps of features are those of the whole model."""
    model = timm_model(backbone, **options, **({"dynamic_img_size": True} if "vit" in backbone else {})).eval()
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    rgb = pixels(160, 160)
    for name in ("whole.pt", "whole.safetensors"):
        network = network_of("nuclei", backbone=backbone, backbone_options=options)
        network.load_backbone(tmp_path / name)
        scaled = (rgb.float() - 0.65 * 255) / (0.25 * 255)
        with torch.inference_mode():
            last = network.eval().encoder.network(scaled)[-1]
            expected = model.forward_intermediates(scaled, intermediates_only=True, norm=False)[-1]
        assert torch.allclose(last, expected, atol=1e-4)


def test_backbone_weights_that_dont_fit(tmp_path: Path) -> None:
    network = network_of("nuclei")
    state = timm_model("resnet18", **SMALL).state_dict()

    def refused(path: Path) -> str:
        with pytest.raises(UsageError) as caught:
            network.load_backbone(path)
        text = str(caught.value)
        assert text.startswith(f"{path}: ")
        assert "\n" not in text
        assert len(text) < 400
        return text

    assert "no such file; backbone_weights names" in refused(tmp_path / "absent.pt")
    path = tmp_path / "some.pt"
    torch.save(state, path)
    cut = path.read_bytes()[:2000]
    for data in (cut, b"", b"garbage"):
        path.write_bytes(data)
        assert "can't be read as weights" in refused(path)
    (tmp_path / "some.safetensors").write_bytes(cut)
    assert "can't be read as weights" in refused(tmp_path / "some.safetensors")
    torch.save([1, 2], path)
    assert "holds a list, not weights by name" in refused(path)
    torch.save(torch.zeros(3), path)
    assert "holds a Tensor, not weights by name" in refused(path)
    torch.save({"state_dict": state}, path)
    assert "lacks" in refused(path)
    other = state | {"layer1.0.conv1.weight": torch.zeros(1, 2, 3, 3)}
    torch.save(other, path)
    assert "lacks 1 of " in refused(path)
    assert refused(path).endswith("of resnet18, or has them in another shape: layer1.0.conv1.weight")


def test_python_objects_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    torch.save({"conv1.weight": Path("x")}, path)
    with pytest.raises(UsageError, match=r"some\.pt: can't be read as weights"):
        network_of("nuclei").load_backbone(path)
