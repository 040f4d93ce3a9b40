"""Losses against plain numpy; what is not labelled has no say."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathopipe.segmentation.examples import UNKNOWN
from pathopipe.segmentation.losses import TASK_WEIGHT, losses

N, SIDE, CELLS, CLASSES, TYPES = 3, 64, 2, 3, 4
Arrays = dict[str, NDArray[Any]]


def random_targets(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    inside = (rng.random((N, SIDE, SIDE)) < 0.3).astype(np.float32)
    distance = np.where(rng.random((N, SIDE, SIDE)) < 0.2, 1, rng.random((N, SIDE, SIDE))) * inside
    kinds = rng.integers(0, CLASSES, (N, SIDE, SIDE)).astype(np.uint8)
    glands = (rng.random((N, 2, SIDE, SIDE)) < 0.4).astype(np.float32)
    return {
        "nuclei": np.stack([inside, distance.astype(np.float32)], 1),
        "nuclei_weight": (rng.random((N, SIDE, SIDE)) < 0.8).astype(np.float32),
        "nuclei_class": np.where((inside > 0) & (rng.random(inside.shape) < 0.7), kinds, UNKNOWN).astype(np.uint8),
        "glands": glands,
        "glands_weight": (rng.random((N, 2, SIDE, SIDE)) < 0.8).astype(np.float32),
        "lumina": (rng.random((N, SIDE, SIDE)) < 0.2).astype(np.float32),
        "lumina_weight": (rng.random((N, SIDE, SIDE)) < 0.8).astype(np.float32),
        "tissue_cells": np.array([[[1, 0], [6, 15]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]], np.int32),
        "tissue_whole": np.array([0, 5, 0]),
        "tissue_weight": np.array([[[1, 1], [1, 1]], [[1, 1], [0, 1]], [[1, 1], [1, 1]]], np.float32),
    }


def random_outputs(seed: int = 1, *, classes: bool = True) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {
        "nuclei": (N, 2 + (CLASSES if classes else 0), SIDE, SIDE),
        "glands": (N, 2, SIDE, SIDE),
        "lumina": (N, 1, SIDE, SIDE),
        "tissue_types": (N, TYPES, CELLS, CELLS),
    }
    return {task: rng.normal(0, 2, shape).astype(np.float32) for task, shape in shapes.items()}


def found_of(outputs: Arrays, targets: Arrays) -> dict[str, float]:
    found = losses(
        {name: torch.from_numpy(value) for name, value in outputs.items()},
        {name: torch.from_numpy(value) for name, value in targets.items()},
    )
    assert all(value.ndim == 0 for value in found.values())
    return {name: value.item() for name, value in found.items()}


# The same in plain numpy, image by image


def sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def entropy(share: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    return -(target * np.log(share) + (1 - target) * np.log(1 - share))


def binary(logits: NDArray[Any], target: NDArray[Any], weight: NDArray[Any]) -> float:
    share = sigmoid(logits)
    dice = []
    for p, t, w in zip(share, target.astype(np.float64), weight.astype(np.float64), strict=True):
        if w.any():
            dice.append(1 - (2 * (p * t * w).sum() + 1) / ((p * w).sum() + (t * w).sum() + 1))
    return float((entropy(share, target) * weight).sum() / weight.sum() + np.mean(dice))


def distance_loss(logits: NDArray[Any], target: NDArray[Any], weight: NDArray[Any]) -> float:
    p, t = sigmoid(logits), target.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.nan_to_num(t * np.log(t / p)) + np.nan_to_num((1 - t) * np.log((1 - t) / (1 - p)))
    return float((divergence * weight).sum() / weight.sum())


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    share = np.exp(logits.astype(np.float64))
    return share / share.sum(1, keepdims=True)


def test_objects_are_as_in_numpy() -> None:
    outputs, targets = random_outputs(), random_targets()
    found = found_of(outputs, targets)
    inside, weight = targets["nuclei"][:, 0], targets["nuclei_weight"]
    assert found["nuclei"] == pytest.approx(binary(outputs["nuclei"][:, 0], inside, weight), rel=1e-4)
    near = weight * (0.3 + inside)
    assert found["distance"] == pytest.approx(
        distance_loss(outputs["nuclei"][:, 1], targets["nuclei"][:, 1], near), rel=1e-3
    )
    kind = targets["nuclei_class"]
    share = softmax(outputs["nuclei"][:, 2:])
    each = [-np.log(share[n, kind[n, y, x], y, x]) for n, y, x in np.argwhere(kind != UNKNOWN)]
    assert found["nuclei_class"] == pytest.approx(float(np.mean(each)), rel=1e-4)
    glands = [binary(outputs["glands"][:, k], targets["glands"][:, k], targets["glands_weight"][:, k]) for k in (0, 1)]
    assert found["glands"] == pytest.approx(sum(glands), rel=1e-4)
    assert found["lumina"] == pytest.approx(
        binary(outputs["lumina"][:, 0], targets["lumina"], targets["lumina_weight"]), rel=1e-4
    )
    assert found.keys() == TASK_WEIGHT.keys()


def test_tissue_is_as_in_numpy() -> None:
    outputs, targets = random_outputs(), random_targets()
    share = softmax(outputs["tissue_types"])
    # Three cells are labelled: class 0; 1 or 2; anything, which adds nothing.
    cells = [share[0, 0, 0, 0], share[0, 1, 1, 0] + share[0, 2, 1, 0], 1.0]
    # Image 1 may be of class 0 or 2; of its three cells in the image the better two count.
    allowed = share[1, 0] + share[1, 2]
    better = sorted([allowed[0, 0], allowed[0, 1], allowed[1, 1]])[-2:]
    # A ten-thousandth is added, so that the logarithm stays finite.
    expected = -np.mean(np.log(np.add(cells, 1e-4))) - np.log(np.mean(better) + 1e-4) + 2 * np.log(1 + 1e-4)
    assert found_of(outputs, targets)["tissue_types"] == pytest.approx(float(expected), rel=1e-5)


def perfect(targets: Arrays) -> Arrays:
    sure = 25.0
    with np.errstate(divide="ignore"):
        distance = np.clip(np.log(targets["nuclei"][:, 1] / (1 - targets["nuclei"][:, 1])), -sure, sure)
    kinds = np.stack([np.where(targets["nuclei_class"] == k, sure, -sure) for k in range(CLASSES)], 1)
    tissue = np.full((N, TYPES, CELLS, CELLS), -sure, np.float32)
    tissue[0, 0], tissue[0, 1, 1, 0], tissue[0, 0, 1, 0] = sure, sure, -sure
    tissue[1, 2] = sure
    return {
        "nuclei": np.concatenate(
            [((2 * targets["nuclei"][:, :1] - 1) * sure), distance[:, None], kinds], 1, dtype=np.float32
        ),
        "glands": (2 * targets["glands"] - 1) * np.float32(sure),
        "lumina": (2 * targets["lumina"][:, None] - 1) * np.float32(sure),
        "tissue_types": tissue,
    }


def test_perfect_maps_have_no_loss_and_wrong_ones_have() -> None:
    targets = random_targets()
    said = perfect(targets)
    found = found_of(said, targets)
    assert found.keys() == TASK_WEIGHT.keys()
    assert max(found.values()) < 1e-3
    assert min(found.values()) > -1e-5
    wrong = found_of({task: -value for task, value in said.items()}, targets)
    assert all(wrong[name] > 1 for name in ("nuclei", "glands", "lumina", "nuclei_class", "tissue_types"))


def gradients(outputs: Arrays, targets: Arrays) -> dict[str, Tensor]:
    said = {name: torch.from_numpy(value).requires_grad_() for name, value in outputs.items()}
    found = losses(said, {name: torch.from_numpy(value) for name, value in targets.items()})
    torch.stack([TASK_WEIGHT[name] * value for name, value in found.items()]).sum().backward()  # type: ignore[no-untyped-call]
    return {name: value.grad for name, value in said.items() if value.grad is not None}


def test_unknown_pixels_have_no_gradient_at_all() -> None:
    targets = random_targets()
    targets["nuclei_weight"][1], targets["glands_weight"][2, 1] = 0, 0  # a whole image, one map of another
    found = gradients(random_outputs(), targets)
    for task, weight in (
        ("nuclei", np.broadcast_to(targets["nuclei_weight"][:, None], (N, 2, SIDE, SIDE))),
        ("glands", targets["glands_weight"]),
        ("lumina", targets["lumina_weight"][:, None]),
    ):
        gradient = found[task][:, : weight.shape[1]].numpy()
        assert (gradient[weight == 0] == 0).all()
        assert (gradient[weight > 0] != 0).mean() > 0.99
    kinds = np.abs(found["nuclei"][:, 2:].numpy()).sum(1)
    assert ((kinds > 0) == (targets["nuclei_class"] != UNKNOWN)).all()
    tissue = np.abs(found["tissue_types"].numpy()).sum(1)
    assert (tissue[0] > 1e-6).tolist() == [[True, False], [True, False]]  # where all is allowed nothing is learnt
    assert (tissue[1] > 0).sum() == 2
    assert tissue[1, 1, 0] == 0  # beyond the image
    assert not tissue[2].any()


@pytest.mark.parametrize("task", ["nuclei", "glands", "lumina", "tissue_types"])
def test_tasks_without_labels_are_absent(task: str) -> None:
    targets = random_targets()
    if task == "tissue_types":
        targets["tissue_cells"][:], targets["tissue_whole"][:] = 0, 0
    else:
        targets[f"{task}_weight"][:] = 0
        targets["nuclei_class"][:] = UNKNOWN
    own = {"nuclei": {"nuclei", "distance", "nuclei_class"}}.get(task, {task})
    outputs = random_outputs()
    assert losses(
        {name: torch.from_numpy(value) for name, value in outputs.items()},
        {name: torch.from_numpy(value) for name, value in targets.items()},
    ).keys() >= TASK_WEIGHT.keys() - own - {"nuclei_class"}
    assert not own & found_of(outputs, targets).keys()
    assert task not in gradients(outputs, targets)


def test_a_network_of_fewer_tasks_has_fewer_losses() -> None:
    targets = random_targets()
    outputs = random_outputs(classes=False)
    assert found_of({"glands": outputs["glands"]}, targets).keys() == {"glands"}
    assert found_of({"nuclei": outputs["nuclei"]}, targets).keys() == {"nuclei", "distance"}


def test_a_map_with_known_pixels_in_no_image_but_one_is_finite() -> None:
    targets = random_targets()
    for name in ("nuclei_weight", "glands_weight", "lumina_weight"):
        targets[name][:] = 0
        targets[name][0].reshape(-1)[-1] = 1  # the border of glands alone
    found = found_of(random_outputs(), targets)
    assert np.isfinite(list(found.values())).all()
    assert all(torch.isfinite(value).all() for value in gradients(random_outputs(), targets).values())


def test_nothing_labelled_is_no_loss() -> None:
    targets = {name: np.zeros_like(value) for name, value in random_targets().items()}
    targets["nuclei_class"][:] = UNKNOWN
    assert found_of(random_outputs(), targets) == {}


def test_losses_of_extreme_logits_are_finite() -> None:
    targets = random_targets()
    for factor in (1e4, -1e4):
        outputs = {task: np.sign(value) * np.float32(factor) for task, value in random_outputs().items()}
        assert np.isfinite(list(found_of(outputs, targets).values())).all()
        assert all(torch.isfinite(value).all() for value in gradients(outputs, targets).values())
