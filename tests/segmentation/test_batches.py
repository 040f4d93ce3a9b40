"""Batches: the same for any beginning and any number of threads, mixed by share, small images four to a crop."""

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pathopipe.segmentation.batches import Batch, Pool, iterate_batches, stack_targets
from pathopipe.segmentation.examples import UNKNOWN, Example
from pathopipe.segmentation.network import ClassSpec, NetworkSpec, TaskSpec
from pathopipe.segmentation.targets import make_targets

torch.set_num_threads(1)

CLASSES = tuple(ClassSpec(name=name, color=(1, 2, 3)) for name in ("A", "B", "C"))
SPEC = NetworkSpec(
    tasks=tuple(TaskSpec(name=name, classes=CLASSES) for name in ("nuclei", "glands", "lumina", "tissue_types"))
)


def example_of(name: str, side_px: int = 96, *, source: str | None = None, **said: Any) -> Example:
    rng = np.random.default_rng(sum(map(ord, name)))
    everything: dict[str, Any] = {
        "name": name,
        "dataset": "own",
        "source": source or name,
        "rgb": rng.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8),
        "mpp": 0.5,
        "labels": {},
        "classes": {},
        "ignore": {},
    }
    return Example(**(everything | said))


def squares(side_px: int = 96) -> NDArray[np.int32]:
    labels = np.zeros((side_px, side_px), np.int32)
    labels[10:30, 10:30], labels[10:30, 30:50], labels[60:90, 40:80] = 1, 2, 3
    return labels


def pools() -> list[Pool]:
    labelled = [
        example_of(f"n{k}", labels={"nuclei": squares()}, classes={"nuclei": np.array([0, 1, 255], np.uint8)})
        for k in range(3)
    ]
    told = [example_of(f"t{k}", tissue_types=frozenset({k})) for k in range(2)]
    return [
        Pool(name="nuclei", share=3.0, zoom=(0.8, 1.3), examples=labelled),
        Pool(name="tiles", share=1.0, zoom=(1, 1), examples=told),
    ]


def batches_of(some: list[Pool], **said: Any) -> list[Batch]:
    given: dict[str, Any] = {
        "first_step": 0,
        "last_step": 4,
        "batch_size": 4,
        "crop_px": 64,
        "seed": 5,
        "strength": 1.0,
        "threads": 1,
    }
    return list(iterate_batches(some, SPEC, **(given | said)))


def same(one: Batch, other: Batch) -> bool:
    return (
        (one.step, one.names) == (other.step, other.names)
        and torch.equal(one.rgb, other.rgb)
        and torch.equal(one.plain, other.plain)
        and torch.equal(one.untold, other.untold)
        and torch.equal(one.inside, other.inside)
        and all(torch.equal(value, other.targets[name]) for name, value in one.targets.items())
    )


def test_what_a_batch_holds() -> None:
    (batch,) = batches_of(pools(), first_step=7, last_step=8)
    assert batch.step == 7
    assert batch.rgb.shape == batch.plain.shape == (4, 3, 64, 64)
    assert batch.rgb.dtype == torch.uint8
    assert batch.rgb.is_contiguous(memory_format=torch.channels_last)
    assert {name: tuple(value.shape) for name, value in batch.targets.items()} == {
        "nuclei": (4, 2, 64, 64),
        "nuclei_weight": (4, 64, 64),
        "nuclei_class": (4, 64, 64),
        "glands": (4, 2, 64, 64),
        "glands_weight": (4, 2, 64, 64),
        "lumina": (4, 64, 64),
        "lumina_weight": (4, 64, 64),
        "tissue_cells": (4, 2, 2),
        "tissue_whole": (4,),
        "tissue_weight": (4, 2, 2),
    }
    assert batch.inside.shape == (4, 64, 64)
    for place, name in enumerate(batch.names):
        has_nuclei = name.startswith("nuclei: n")
        assert bool(batch.untold[place]) != has_nuclei
        assert batch.targets["nuclei_weight"][place].any() == has_nuclei
        assert (batch.targets["tissue_whole"][place] > 0) != has_nuclei
        assert not batch.targets["glands_weight"][place].any()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_by_seed_and_step_alone(threads: int) -> None:
    whole = batches_of(pools(), last_step=6)
    assert [batch.step for batch in whole] == list(range(6))
    later = batches_of(pools(), first_step=3, last_step=6, threads=threads)
    assert all(same(one, other) for one, other in zip(whole[3:], later, strict=True))
    assert not torch.equal(whole[0].plain, whole[1].plain)
    assert not torch.equal(batches_of(pools(), last_step=1, seed=6)[0].plain, whole[0].plain)


def test_every_batch_holds_the_mixture() -> None:
    for batch in batches_of(pools(), last_step=20):
        assert Counter(name.split(":")[0] for name in batch.names) == {"nuclei": 3, "tiles": 1}


def test_shares_that_dont_fit_a_batch_hold_on_average() -> None:
    some = [
        Pool(name=name, share=share, zoom=(1, 1), examples=[example_of(name)])
        for name, share in (("a", 0.5), ("b", 0.35), ("c", 0.15))
    ]
    n_steps = 100
    count = Counter(name[0] for batch in batches_of(some, last_step=n_steps, batch_size=3) for name in batch.names)
    found = np.array([count["a"], count["b"], count["c"]]) / (3 * n_steps)
    assert found == pytest.approx([0.5, 0.35, 0.15], abs=0.05)


def test_sources_count_the_same_however_many_images_they_gave() -> None:
    examples = [example_of("alone", source="small")] + [example_of(f"x{k}", source="large") for k in range(9)]
    some = [Pool(name="own", share=1.0, zoom=(1, 1), examples=examples)]
    names = [name for batch in batches_of(some, last_step=50) for name in batch.names]
    assert 0.4 < names.count("own: alone") / len(names) < 0.6
    assert len(set(names)) == 10


def test_small_images_stand_four_to_a_crop() -> None:
    colours = {"p": (200, 40, 40), "q": (40, 200, 40)}
    examples = [
        example_of(
            name,
            32,
            rgb=np.full((32, 32, 3), colour, np.uint8),
            labels={"glands": np.full((32, 32), 1, np.int32)} if name == "p" else {"glands": np.zeros((32, 32), int)},
            tissue_types=frozenset({0}) if name == "p" else frozenset({1, 2}),
        )
        for name, colour in colours.items()
    ]
    some = [Pool(name="small", share=1.0, zoom=(1, 1), examples=examples)]
    seen = set()
    for batch in batches_of(some, strength=0.0):
        for place, said in enumerate(batch.names):
            names = said.removeprefix("small: ").split(", ")
            assert len(names) == 4
            seen.add(tuple(names))
            for number, name in enumerate(names):
                rows, columns = (slice(32 * k, 32 * k + 32) for k in divmod(number, 2))
                quarter = batch.plain[place, :, rows, columns]
                assert (quarter == torch.tensor(colours[name], dtype=torch.uint8)[:, None, None]).all()
                known = batch.targets["glands_weight"][place, 0, rows, columns] > 0
                assert known.any()
                inside = batch.targets["glands"][place, 0, rows, columns] > 0
                assert torch.equal(inside & known, known if name == "p" else torch.zeros_like(known))
                # Each crop is one cell, and its label is of it alone.
                assert batch.targets["tissue_cells"][place, number // 2, number % 2] == (1 if name == "p" else 6)
    assert len(seen) > 3


def test_the_zoom_of_a_data_set_decides_what_is_small() -> None:
    examples = [example_of("x", 40)]
    for zoom, n_names in (((1.0, 1.0), 4), ((1.2, 1.2), 1)):
        (batch,) = batches_of([Pool(name="own", share=1.0, zoom=zoom, examples=examples)], last_step=1)
        assert [name.count("x") for name in batch.names] == [n_names] * 4


def test_a_teacher_sees_the_tissue_before_its_stain_was_changed() -> None:
    """Turned and zoomed, but in colours of the image."""
    colour = np.array([180, 120, 160], np.uint8)
    plain_of = [example_of("x", rgb=np.broadcast_to(colour, (96, 96, 3)).copy())]
    some = [Pool(name="own", share=1.0, zoom=(0.8, 1.2), examples=plain_of)]
    changed = []
    for batch in batches_of(some):
        assert (batch.plain == torch.from_numpy(colour)[:, None, None]).all()
        changed.append((batch.rgb.float() - batch.plain.float()).abs().mean())
    assert max(changed) > 3


def test_a_crop_that_fails_says_so_and_no_thread_stays() -> None:
    broken = example_of("x", labels={"nuclei": np.zeros((4, 4), np.int32)}, ignore={"nuclei": None})
    with pytest.raises(AttributeError):
        batches_of([Pool(name="own", share=1.0, zoom=(1, 1), examples=[broken])], threads=2)
    batches = iterate_batches(
        pools(), SPEC, first_step=0, last_step=50, batch_size=1, crop_px=64, seed=0, strength=1.0, threads=2
    )
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("crops")]


def test_targets_are_stacked_by_field() -> None:
    from pathopipe.segmentation.augment import whole_image

    crops = [whole_image(one, mpp=0.5, multiple_px=32) for one in pools()[0].examples[:2]]
    targets = [make_targets(crop, SPEC) for crop in crops]
    stacked = stack_targets(targets)
    for name, value in stacked.items():
        assert np.array_equal(value[1].numpy(), getattr(targets[1], name))
    assert (stacked["nuclei_class"] == UNKNOWN).any()
