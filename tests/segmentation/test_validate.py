"""Scores of networks on whole images: counted by hand, pooled over images, deaf to what is not known."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathopipe.segmentation.examples import Example
from pathopipe.segmentation.network import ClassSpec, NetworkSpec, SegmentationNetwork, TaskSpec
from pathopipe.segmentation.targets import distance_target
from pathopipe.segmentation.validate import Scores, examine, validate

torch.set_num_threads(1)

CPU = torch.device("cpu")


def spec_of(*tasks: str) -> NetworkSpec:
    classes = tuple(ClassSpec(name=name, color=(1, 90, 200)) for name in ("A", "B", "C"))
    return NetworkSpec(
        backbone="resnet18",
        backbone_options={"channels": [8, 8, 8, 8], "stem_width": 8},
        decoder_channels=(8, 8, 8, 8),
        mpp=0.5,
        tasks=tuple(TaskSpec(name=name, classes=classes if name == "tissue_types" else classes[:1]) for name in tasks),
    )


class Reader(SegmentationNetwork):
    """Says what the pixels say: red how deep in a nucleus, green a gland or lumen, blue the class of the tissue."""

    def forward(self, rgb: Tensor) -> dict[str, Tensor]:
        value = rgb.float() / 255
        yes = (value > 0.02).float() * 20 - 10
        nothing = torch.full_like(yes[:, 1], -10)
        classes = torch.stack([9 - (rgb[:, 2, ::32, ::32].float() / 100 - k).abs() * 9 for k in range(3)], 1)
        said = {
            "nuclei": torch.stack([yes[:, 0], torch.logit(value[:, 0], eps=1e-3)], 1),
            "glands": torch.stack([yes[:, 1], nothing], 1),
            "lumina": yes[:, 1:2],
            "tissue_types": classes,
        }
        return {task.name: said[task.name] for task in self.spec.tasks}


def network_of(*tasks: str) -> Reader:
    return Reader(spec_of(*tasks))


def discs(height: int, width: int, *circles: tuple[float, float, float]) -> NDArray[np.int32]:
    y, x = np.mgrid[:height, :width] + 0.5
    labels = np.zeros((height, width), np.int32)
    for number, (cx, cy, r) in enumerate(circles, start=1):
        labels[np.hypot(x - cx, y - cy) < r] = number
    return labels


def example_of(name: str, shape: tuple[int, int], dataset: str = "own", **said: Any) -> Example:
    planes = [said.pop(channel, np.zeros(shape)) for channel in ("red", "green", "blue")]
    everything: dict[str, Any] = {
        "name": name,
        "dataset": dataset,
        "source": name,
        "rgb": np.stack(planes, -1).astype(np.uint8),
        "mpp": 0.5,
        "labels": {},
        "classes": {},
        "ignore": {},
    }
    return Example(**(everything | said))


def shown(labels: NDArray[np.int32]) -> NDArray[np.float32]:
    return np.ceil(distance_target(labels) * 255)


FOUR = discs(96, 160, (20, 20, 10), (60, 24, 12), (100, 20, 9), (130, 70, 14))


def test_a_network_that_is_right_has_the_best_score() -> None:
    example = example_of("a", FOUR.shape, red=shown(FOUR), labels={"nuclei": FOUR})
    case = examine(network_of("nuclei"), example, device=CPU, autocast=False)
    assert case.nuclei is not None
    assert (case.nuclei.tp, case.nuclei.fp, case.nuclei.fn) == (4, 0, 0)
    assert case.score("nuclei") == case.nuclei.pq > 0.9
    assert case.score("glands") is None
    assert (case.dataset, case.name) == ("own", "a")
    assert case.rgb.shape == (160, 160, 3)
    assert (case.truth["nuclei"][:96] == FOUR).all()
    assert not case.truth["nuclei"][96:].any()
    assert not case.found["nuclei"][96:].any()


def test_missed_and_false_nuclei_count() -> None:
    """Two of four are shown, and one that is not there."""
    seen = np.where(FOUR <= 2, FOUR, 0)
    false = discs(*FOUR.shape, (80, 70, 11))
    example = example_of("a", FOUR.shape, red=shown(seen + 3 * false), labels={"nuclei": FOUR})
    case = examine(network_of("nuclei"), example, device=CPU, autocast=False)
    assert case.nuclei is not None
    assert (case.nuclei.tp, case.nuclei.fp, case.nuclei.fn) == (2, 1, 2)


def test_where_nothing_is_known_nothing_counts() -> None:
    labelled = np.where(FOUR <= 2, FOUR, 0)
    unknown = np.zeros(FOUR.shape, np.bool_)
    unknown[:, 85:] = True
    example = example_of("a", FOUR.shape, red=shown(FOUR), labels={"nuclei": labelled}, ignore={"nuclei": unknown})
    case = examine(network_of("nuclei"), example, device=CPU, autocast=False)
    assert case.nuclei is not None
    assert (case.nuclei.tp, case.nuclei.fp, case.nuclei.fn) == (2, 0, 0)
    assert not case.found["nuclei"][:96][unknown].any()


def test_images_are_seen_at_the_resolution_of_the_network() -> None:
    fine = discs(192, 320, (40, 40, 20), (120, 48, 24), (200, 40, 18), (260, 140, 28))
    example = example_of("a", fine.shape, red=shown(fine), labels={"nuclei": fine}, mpp=0.25)
    case = examine(network_of("nuclei"), example, device=CPU, autocast=False)
    assert case.rgb.shape == (160, 160, 3)
    assert case.nuclei is not None
    assert (case.nuclei.tp, case.nuclei.fp, case.nuclei.fn) == (4, 0, 0)


def gland_example(name: str, first: int, dataset: str = "own") -> Example:
    """40 x 40 px of a gland; shown from column ``first`` on, as wide."""
    labels, green = np.zeros((64, 128), np.int32), np.zeros((64, 128))
    labels[10:50, 20:60] = 1
    green[10:50, first : first + 40] = 200
    return example_of(name, (64, 128), dataset, green=green, labels={"glands": labels, "lumina": labels})


def test_dice_is_of_pooled_pixels() -> None:
    network = network_of("glands", "lumina")
    examples = [gland_example("a", 20), gland_example("b", 40), gland_example("c", 70, "other")]
    one = examine(network, examples[1], device=CPU, autocast=False)
    assert one.overlap_px["glands"] == (2 * 20 * 40, 3200)
    assert one.score("glands") == 0.5
    scores = validate(network, examples, device=CPU, autocast=False)
    assert scores.by_task["glands"] == {"own": (2 * 1600 + 2 * 800) / 6400, "other": 0.0}
    assert scores.by_task["lumina"] == scores.by_task["glands"]  # these lie in glands
    assert scores.mean == pytest.approx((0.75 + 0) / 2)


def test_nuclei_of_a_data_set_are_pooled() -> None:
    few = discs(64, 64, (30, 30, 12))
    examples = [
        example_of("a", FOUR.shape, red=shown(FOUR), labels={"nuclei": FOUR}),
        example_of("b", few.shape, labels={"nuclei": few}),  # shows nothing
        example_of("c", few.shape, "other", red=shown(few), labels={"nuclei": few}),
    ]
    network = network_of("nuclei")
    scores = validate(network, examples, device=CPU, autocast=False).by_task["nuclei"]
    found = examine(network, examples[0], device=CPU, autocast=False).nuclei
    assert found is not None
    # Four pairs, none false, one missed: the sum of IoU over 4 + 1 / 2; not the mean of two images.
    assert scores["own"] == pytest.approx(found.iou_sum / 4.5)
    assert scores["other"] > 0.9


def test_a_data_set_without_objects_has_no_score() -> None:
    nothing = np.zeros((64, 64), np.int32)
    example = example_of("a", (64, 64), labels={"nuclei": nothing, "glands": nothing})
    scores = validate(network_of("nuclei", "glands"), [example], device=CPU, autocast=False)
    assert scores.flat() == {}
    disc = nothing.copy()
    disc[20:30, 20:30] = 1
    both = [example, example_of("b", (64, 64), labels={"nuclei": disc, "glands": nothing})]
    assert validate(network_of("nuclei", "glands"), both, device=CPU, autocast=False).flat() == {"nuclei/own": 0.0}
    assert scores.mean == 0.0


def test_tissue_types_are_right_where_the_first_one_is_allowed() -> None:
    kind = np.zeros((96, 128))
    kind[:, 64:] = 100
    kind[:32] = 100  # two thirds of the cells are of class 1
    network = network_of("tissue_types")
    examples = [
        example_of("a", kind.shape, blue=kind, tissue_types=frozenset({1})),
        example_of("b", kind.shape, blue=kind, tissue_types=frozenset({0, 2})),
        example_of("c", kind.shape, blue=kind, tissue_types=frozenset({1, 2})),
        example_of("d", kind.shape, blue=kind),
    ]
    case = examine(network, examples[0], device=CPU, autocast=False)
    assert case.tissue_types == pytest.approx([4 / 12, 8 / 12, 0], abs=1e-3)
    assert case.allowed == {1}
    scores = validate(network, examples, device=CPU, autocast=False)
    assert scores.flat() == {"tissue_types/own": round(2 / 3, 5)}


def test_what_mirrors_an_image_has_no_say_in_its_tissue_type() -> None:
    """40 px of class 2 above the first of class 0: of the cells below, most lies beyond the image."""
    kind = np.zeros((40, 96))
    kind[:32] = 200
    case = examine(
        network_of("tissue_types"),
        example_of("a", kind.shape, blue=kind, tissue_types=frozenset({2})),
        device=CPU,
        autocast=False,
    )
    assert case.tissue_types == pytest.approx([0, 0, 1], abs=1e-3)


def test_a_tiny_image_has_a_tissue_type() -> None:
    example = example_of("a", (14, 14), blue=np.full((14, 14), 100), tissue_types=frozenset({1}))
    assert validate(network_of("tissue_types"), [example], device=CPU, autocast=False).mean == 1.0


def test_tasks_without_labels_have_no_score() -> None:
    network = network_of("nuclei", "glands", "tissue_types")
    example = example_of("a", FOUR.shape, red=shown(FOUR))
    case = examine(network, example, device=CPU, autocast=False)
    assert case.nuclei is None
    assert case.score("nuclei") is None
    assert case.truth == {}
    assert case.found["nuclei"].max() == 4
    assert validate(network, [example], device=CPU, autocast=False).by_task == {}


def test_a_mean_over_tasks_and_data_sets() -> None:
    scores = Scores({"nuclei": {"a": 0.2, "b": 0.6}, "glands": {"a": 0.8}, "lumina": {}})
    assert scores.mean == pytest.approx(0.6)
    assert scores.flat() == {"nuclei/a": 0.2, "nuclei/b": 0.6, "glands/a": 0.8}
    again = Scores.from_flat({"nuclei/a/b": 0.5, "glands/a": 0.25})
    assert again.by_task == {"nuclei": {"a/b": 0.5}, "glands": {"a": 0.25}}
    assert Scores.from_flat(scores.flat()).mean == scores.mean
    assert Scores({}).mean == 0.0
