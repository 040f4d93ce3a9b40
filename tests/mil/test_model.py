"""Saved models: what was written is what is read, and features of other encoders are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pathopipe.cohort import LabelTable
from pathopipe.errors import EncoderError, StoreError, UsageError
from pathopipe.mil.bags import Bag, array_bag
from pathopipe.mil.covariates import CovariateSpec, encode_covariates, fit_covariates
from pathopipe.mil.heads import HEADS, HeadShape, build_head
from pathopipe.mil.model import MilModel, ModelCard
from pathopipe.mil.targets import TargetSpec

TARGETS = (
    TargetSpec(name="grade", kind="multiclass", columns=("grade",), classes=("a", "b", "c")),
    TargetSpec(name="age", kind="regression", columns=("age",), mean=50.0, std=10.0),
)


def model(head: str = "abmil", *, encoder_id: str = "uni@12ab", members: int = 2) -> MilModel:
    torch.manual_seed(1)
    shape = HeadShape(features=4, outputs=4, hidden=8, attention=4, covariates=3)
    card = ModelCard(
        head=head,
        shape=shape,
        targets=TARGETS,
        encoder=encoder_id.partition("@")[0],
        encoder_id=encoder_id,
        covariates=(CovariateSpec(name="sex", values=("f", "m")),),
        temperatures=(2.0, 1.0),
        bag_size=(1.0, 0.5),
        members=members,
    )
    networks = [build_head(head, shape) for _ in range(members)]
    for network in networks:
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
    return MilModel(card, networks)


def bag(n_tiles: int = 7, *, features: int = 4, encoder: str = "uni") -> Bag:
    values = np.random.default_rng(n_tiles).standard_normal((n_tiles, features)).astype(np.float32)
    return array_bag("s1", values, encoder=encoder)


SEX = np.asarray([1, 0], np.float32)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_a_saved_model_predicts_the_same(head: str, tmp_path: Path) -> None:
    given = model(head)
    given.save(tmp_path)
    read = MilModel.load(tmp_path)
    assert read.card == given.card
    first, second = given.predict(bag(), SEX), read.predict(bag(), SEX)
    np.testing.assert_array_equal(first.logits, second.logits)
    if first.attention is not None:
        np.testing.assert_array_equal(first.attention, second.attention)
        np.testing.assert_allclose(first.attention.sum(axis=0), 1, atol=1e-5)


def test_members_are_averaged_and_calibrated() -> None:
    both = model()
    alone = [MilModel(both.card, [network]).predict(bag(), SEX).logits for network in both._networks]
    found = both.predict(bag(), SEX)
    np.testing.assert_allclose(found.logits, np.mean(alone, axis=0), atol=1e-6)
    raised = np.exp(found.logits[:3] / 2)
    np.testing.assert_allclose(found.probabilities["grade"], raised / raised.sum(), rtol=1e-6)
    assert found.probabilities["age"][0] == pytest.approx(found.logits[3] * 10 + 50)
    assert both.outputs == ("grade=a", "grade=b", "grade=c", "age")


def test_the_number_of_tiles_is_a_covariate() -> None:
    one = model(members=1)
    network = one._networks[0]
    assert network.covariates is not None
    values = bag(1).read()
    few, many = (one.predict(array_bag("s", np.repeat(values, n, axis=0)), SEX).logits for n in (3, 30))
    step = (np.log(30) - np.log(3)) / 0.5
    np.testing.assert_allclose(many - few, network.covariates.weight[:, 2].detach().numpy() * step, atol=1e-4)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"encoder": "virchow"}, "trained on encoder uni@12ab, these features are of virchow"),
        ({"features": 5}, "width 4, these features are of width 5"),
    ],
)
def test_other_features_are_refused(other: dict[str, object], message: str) -> None:
    model().check_features([bag()])
    with pytest.raises(EncoderError, match=message):
        model().check_features([bag(), bag(**other)])  # type: ignore[arg-type]


def test_other_weights_of_the_same_encoder_are_refused() -> None:
    class Source:
        slide_id, encoder, encoder_id, grid, n_tiles, n_rows, features = "s1", "uni", "uni@ffff", "", 3, 3, 4

    with pytest.raises(EncoderError, match="uni@12ab.*uni@ffff"):
        model().check_features([Bag(bag_id="s1", patient_id="s1", site="", sources=(Source(),))])  # type: ignore[arg-type]


def test_features_that_state_no_encoder_pass() -> None:
    model().check_features([bag(encoder="")])


def test_empty_bags_and_missing_covariates_are_refused() -> None:
    with pytest.raises(UsageError, match="no tile"):
        model().predict(array_bag("s", np.zeros((0, 4), np.float32)), SEX)


def test_damage_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model here"):
        MilModel.load(tmp_path)
    model().save(tmp_path)
    card = json.loads((tmp_path / "model.json").read_text())
    for change in ({"format": 99}, {"head": "mean"}, {"members": 5}):
        (tmp_path / "model.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(StoreError):
            MilModel.load(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(card))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="can't be read"):
        MilModel.load(tmp_path)


def test_covariates_are_fitted_on_training_rows_only() -> None:
    columns = {"age": ("20", "40", "", "1000"), "sex": ("f", "m", "f", "x")}
    names = ("a", "b", "c", "d")
    table = LabelTable(source="t.csv", slide_ids=names, patient_ids=names, sites=("",) * 4, split=None, columns=columns)
    specs = fit_covariates(("age", "sex"), table, np.asarray([0, 1, 2]))
    encoded = encode_covariates(specs, table)
    # Age, age missing, f, m; an unknown category is zero in all.
    np.testing.assert_allclose(encoded, [[-1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [97, 0, 0, 0]])
    with pytest.raises(UsageError, match="no column 'agee'"):
        fit_covariates(("agee",), table, np.asarray([0]))
