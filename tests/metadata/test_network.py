"""The network: masks, missing modalities, attention, and the loss that draws images to reports."""

import math
from dataclasses import replace

import pytest
import torch

from pathopipe.errors import UsageError
from pathopipe.metadata.network import (
    MetadataNetwork,
    MetadataShape,
    SlideBatch,
    alignment_loss,
    drop_modalities,
    modality_sets,
)

SHAPE = MetadataShape(
    tile_features=5, text_features=6, table_features=3, outputs=(2, 1), width=8, hidden=8, attention=4
)


@pytest.fixture
def network() -> MetadataNetwork:
    torch.manual_seed(0)
    return MetadataNetwork(SHAPE).eval()


def batch_of(present: list[list[bool]], seed: int = 1) -> SlideBatch:
    drawn = torch.Generator().manual_seed(seed)
    mask = torch.tensor(present)
    n, n_images = len(present), int(mask[:, 0].sum())
    real = torch.ones(n_images, 4, dtype=torch.bool)
    real[:, 3] = False
    return SlideBatch(
        present=mask,
        tiles=torch.randn(n_images, 4, 5, generator=drawn) if n_images else None,
        real=real if n_images else None,
        text=torch.randn(n, 6, generator=drawn),
        table=torch.randn(n, 3, generator=drawn),
    )


def test_what_absent_modalities_hold_has_no_influence_nan_included(network: MetadataNetwork) -> None:
    batch = batch_of([[True, False, True], [False, True, False]])
    clean = network(batch)
    text, table = batch.text.clone(), batch.table.clone()
    text[0], table[1] = torch.nan, torch.nan
    tiles = batch.tiles.clone()
    tiles[:, 3] = torch.nan  # padding
    torch.testing.assert_close(network(batch._replace(text=text, table=table, tiles=tiles)), clean)


def test_nan_in_absent_rows_reaches_no_gradient(network: MetadataNetwork) -> None:
    batch = batch_of([[True, False, True], [False, True, False]])
    text = batch.text.clone()
    text[0] = torch.nan
    network(batch._replace(text=text)).sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in network.parameters() if weight.grad is not None)


def test_a_slide_is_scored_alike_whatever_stands_beside_it(network: MetadataNetwork) -> None:
    together = batch_of([[False, True, True], [True, True, True], [True, False, False]])
    logits = network(together)
    alone = SlideBatch(
        present=together.present[2:], tiles=together.tiles[1:], real=together.real[1:], text=None, table=None
    )
    torch.testing.assert_close(network(alone), logits[2:])


def test_shared_vector_is_the_mean_of_what_is_present(network: MetadataNetwork) -> None:
    batch = batch_of([[True, True, False]])
    vectors, _ = network.encode(batch)
    assert vectors[0, 2].abs().sum() == 0
    expected = network.heads[0](vectors[0, :2].mean(dim=0))
    torch.testing.assert_close(network.decide(vectors, batch.present)[0, :2], expected)


def test_weights_of_modalities_are_those_of_a_task(network: MetadataNetwork) -> None:
    with torch.no_grad():
        network.weights[1] = torch.tensor([0.0, math.log(3), 0.0])
    batch = batch_of([[True, True, False]])
    vectors, _ = network.encode(batch)
    expected = network.heads[1](0.25 * vectors[0, 0] + 0.75 * vectors[0, 1])
    torch.testing.assert_close(network.decide(vectors, batch.present)[0, 2:], expected)
    # A weight that only compares modalities has nothing to say where there is one.
    one = torch.tensor([[False, True, False]])
    torch.testing.assert_close(network.decide(vectors, one)[0, 2:], network.heads[1](vectors[0, 1]))


def test_attention_sums_to_one_over_real_tiles(network: MetadataNetwork) -> None:
    _, attention = network.encode(batch_of([[True, False, False], [True, True, False]]))
    assert attention.shape == (2, 4, 1)
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(2, 1))
    assert (attention[:, 3] == 0).all()


# --- the image branch --------------------------------------------------------------------------------------------


def test_the_linear_road_sees_mean_spread_and_number_of_tiles(network: MetadataNetwork) -> None:
    batch = batch_of([[True, False, False], [True, False, False]])
    real = batch.real.clone()
    real[1, 1:] = False
    tiles = batch.tiles.masked_fill(~real[..., None], torch.nan)
    found = network.image.describe(tiles, real, torch.tensor([7, 1]))
    first = tiles[0, :3].numpy()
    expected = [*first.mean(axis=0), *first.std(axis=0), math.log(7)]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert found[1].tolist() == pytest.approx([*tiles[1, 0].tolist(), *[0] * 5, 0], abs=1e-6)
    unsized = MetadataNetwork(replace(SHAPE, bag_size=False))
    torch.testing.assert_close(unsized.image.describe(tiles, real, torch.tensor([7, 1])), found[:, :-1])


def test_what_is_constant_in_training_says_nothing(network: MetadataNetwork) -> None:
    batch = batch_of([[True, False, False]] * 3)
    tiles = batch.tiles.clone()
    tiles[..., 0] = 3.0
    described = network.image.describe(tiles, batch.real, torch.full((3,), 5))
    network.image.standardise((torch.zeros(5), torch.ones(5)), described)
    scaled = (described - network.image.shift) * network.image.scale
    kept = [1, 2, 3, 4, 6, 7, 8, 9]
    torch.testing.assert_close(scaled[:, kept].mean(dim=0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled[:, kept].std(dim=0, correction=0), torch.ones(8))
    other = network.image.describe(tiles, batch.real, torch.full((3,), 900))
    other[:, 0] = 1e6
    assert ((other - network.image.shift) * network.image.scale)[:, [0, 5, 10]].abs().sum() == 0


def test_a_sample_of_tiles_stands_for_all_of_them(network: MetadataNetwork) -> None:
    batch = batch_of([[True, False, False]])
    counted = network(batch)
    torch.testing.assert_close(network(batch._replace(sizes=torch.tensor([3]))), counted)
    assert not torch.allclose(network(batch._replace(sizes=torch.tensor([300]))), counted)


# --- the report's branch -----------------------------------------------------------------------------------------


def test_text_is_scaled_by_one_number_so_that_small_axes_stay_small() -> None:
    network = MetadataNetwork(SHAPE)
    vectors = torch.randn(400, 6) * torch.tensor([10.0, 5, 2, 1, 0.5, 0.1]) + 3
    network.text.standardise(vectors)
    scaled = (vectors - network.text.shift) * network.text.scale
    torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.square().mean(), torch.tensor(1.0))
    assert scaled[:, 0].std() > 50 * scaled[:, 5].std()


def test_slides_without_anything_and_modalities_without_a_branch_are_refused(network: MetadataNetwork) -> None:
    with pytest.raises(UsageError, match="no modality"):
        network(batch_of([[True, True, True], [False, False, False]]))
    text_only = MetadataNetwork(MetadataShape(tile_features=0, text_features=6, table_features=0, outputs=(1,)))
    with pytest.raises(UsageError, match="no modality"):
        text_only(batch_of([[True, True, False]]))
    with pytest.raises(UsageError, match="give --features"):
        MetadataNetwork(MetadataShape(tile_features=0, text_features=0, table_features=0, outputs=(1,)))


# --- modality dropout --------------------------------------------------------------------------------------------


def test_dropout_hides_each_modality_at_its_share_and_never_all() -> None:
    present = torch.ones(6000, 3, dtype=torch.bool)
    present[:3000, 1] = False
    kept = drop_modalities(present, 0.4, torch.Generator().manual_seed(0))
    assert kept.any(dim=1).all()
    assert not (kept & ~present).any()
    # Of three, all fall with 0.4 ** 3, and then each is brought back in a third of the cases.
    assert kept[3000:].float().mean(dim=0).tolist() == pytest.approx([0.6 + 0.064 / 3] * 3, abs=0.03)
    assert kept[:3000].float().mean(dim=0).tolist() == pytest.approx([0.6 + 0.16 / 2, 0, 0.6 + 0.16 / 2], abs=0.03)


def test_dropout_of_zero_hides_nothing() -> None:
    present = torch.tensor([[True, False, True], [False, True, False]])
    assert torch.equal(drop_modalities(present, 0.0, torch.Generator().manual_seed(0)), present)


# --- alignment ---------------------------------------------------------------------------------------------------


def test_alignment_is_the_contrastive_loss_by_hand() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    text = torch.tensor([[3.0, 0.0], [0.6, 0.8]])
    alike = [[1.0 / 0.1, 0.6 / 0.1], [0.0, 0.8 / 0.1]]
    rows = [-alike[0][0] + math.log(math.exp(10) + math.exp(6)), -8 + math.log(1 + math.exp(8))]
    columns = [-10 + math.log(math.exp(10) + 1), -8 + math.log(math.exp(6) + math.exp(8))]
    expected = (sum(rows) / 2 + sum(columns) / 2) / 2
    assert float(alignment_loss(image, text, [0, 1])) == pytest.approx(expected, rel=1e-5)


def test_slides_of_one_patient_match_each_others_report() -> None:
    image = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    text = image[[1, 0, 2]]
    # Each of the first two has the other's report: wrong for two patients, half right for two slides of one.
    assert float(alignment_loss(image, text, [0, 1, 2])) == pytest.approx(20 / 3, abs=0.01)
    assert float(alignment_loss(image, text, [7, 7, 3])) == pytest.approx(10 / 3, abs=0.01)


def test_alignment_of_one_patient_is_nothing_and_has_a_gradient() -> None:
    image = torch.randn(2, 4, requires_grad=True)
    loss = alignment_loss(image, torch.randn(2, 4), [5, 5])
    loss.backward()
    assert loss == 0
    assert (image.grad == 0).all()
    assert alignment_loss(torch.zeros(0, 4), torch.zeros(0, 4), []) == 0


def test_sets_of_modalities() -> None:
    assert modality_sets(("image", "table")) == [("image",), ("table",), ("image", "table")]
