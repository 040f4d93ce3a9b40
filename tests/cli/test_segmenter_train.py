"""``pathopipe segmenter train`` as a user types it: what it writes, how it goes on, how it says no."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pathopipe.cli import app, segmenter_train
from pathopipe.segmentation.network import load_network

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def threads_as_before() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Four pictures with nuclei, and four with a type of tissue; two steps of a tiny network."""
    y, x = np.mgrid[:96, :96] + 0.5
    for number in range(4):
        labels = (np.hypot(x - 30 - 5 * number, y - 40) < 12).astype(np.uint16)
        labels[np.hypot(x - 70, y - 60) < 10 + number] = 2
        rgb = np.where(labels[..., None] > 0, [90, 50, 140], [235, 180, 210]).astype(np.uint8)
        kind = ("fat", "stroma")[number % 2]
        for name, array in (("images", rgb), ("nuclei", labels), (f"tiles/{kind}", rgb)):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"p{number}.png")
    path = tmp_path / "own.yaml"
    color = [1, 2, 3]
    network = {
        "backbone_options": {"channels": [8, 8, 16, 16], "stem_width": 8, "stem_type": "deep"},
        "decoder_channels": [16, 12, 8, 8],
        "tasks": [
            {"name": "nuclei", "classes": [{"name": "Nucleus", "color": color}]},
            {"name": "tissue_types", "classes": [{"name": "Fat", "color": color}, {"name": "Stroma", "color": color}]},
        ],
    }
    train = {"steps": 2, "batch_size": 2, "crop_px": 64, "checkpoint_every": 1, "holdout": 0.3, "precision": "fp32"}
    datasets = [
        {"name": "discs", "kind": "label-images", "images": "images", "labels": {"nuclei": "nuclei"}, "mpp": 0.5},
        {"name": "tiles", "kind": "tiles", "images": "tiles", "mpp": 0.5, "types": {"fat": "Fat", "stroma": "Stroma"}},
    ]
    path.write_text(yaml.safe_dump({"name": "tiny", "network": network, "train": train, "datasets": datasets}))
    return path


def changed(config: Path, old: str, new: str) -> Path:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    return config


def test_a_training_from_end_to_end(cli: Cli, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    ended = cli("segmenter", "train", "--config", config, "--out", out, "--device", "cpu")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("tiny: 2 steps (all that were asked for); kept is the network of step 2")
    assert f"weights: {out / 'weights.safetensors'}\nmodel card: {out / 'model_card.md'}" in ended.out
    scores = {tuple(line.split()[:2]) for line in ended.out.splitlines()}
    assert {("nuclei", "discs"), ("tissue_types", "tiles")} <= scores
    assert "step 2: mean 0." in ended.err
    assert load_network(out / "weights.safetensors").spec.task("nuclei") is not None
    assert {path.name for path in out.iterdir()} == {
        "weights.safetensors",
        "model_card.md",
        "cases.png",
        "log.jsonl",
        "checkpoint.pt",
    }
    assert "| discs | label-images | 1 | 3 | 1 |" in (out / "model_card.md").read_text()
    assert json.loads((out / "log.jsonl").read_text())["step"] == 2

    again = cli("segmenter", "train", "--config", config, "--out", out, "--device", "cpu", "--json")
    assert again.code == 0, again.err

    def refuse(token: str) -> None:
        raise AssertionError(token)

    document = json.loads(again.out, parse_constant=refuse)
    assert (document["steps"], document["stopped_early"]) == (2, False)
    assert document["weights"] == str(out / "weights.safetensors")
    assert set(document["scores"]) == {"nuclei/discs", "tissue_types/tiles"}

    other = cli("segmenter", "train", "--config", config, "--out", out, "--set", "train.seed=3")
    assert other.code == 2
    assert "holds a training with other settings; give another --out, or start anew with --fresh" in other.err
    fresh = cli("segmenter", "train", "--config", config, "--out", out, "--set", "train.steps=1", "--fresh")
    assert fresh.code == 0, fresh.err
    assert fresh.out.startswith("tiny: 1 steps")


def test_an_interrupted_training_goes_on(
    cli: Cli, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "model", list[int]()

    def on_step(self: Any, step: int, steps: int, loss: float) -> None:
        seen.append(step)
        if len(seen) == 2:
            raise app._Interrupted

    monkeypatch.setattr(segmenter_train._TrainProgress, "on_step", on_step)
    command = ("segmenter", "train", "--config", config, "--out", out, "--set", "train.holdout=0")
    first = cli(*command)
    assert first.code == 130
    assert "interrupted; what was finished is kept" in first.err
    assert cli(*command).code == 0
    assert seen == [1, 2, 2]
    assert (out / "weights.safetensors").is_file()


def test_data_may_be_elsewhere(cli: Cli, config: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "configs" / "own.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(config.read_text())
    command = ("segmenter", "train", "--config", elsewhere, "--out", tmp_path / "model", "--set", "train.steps=1")
    wrong = cli(*command)
    assert wrong.code == 2
    assert f"{elsewhere.parent / 'images'}" in wrong.err
    right = cli(*command, "--data", tmp_path)
    assert right.code == 0, right.err


def refused(cli: Cli, config: Path, *more: object, code: int = 2) -> str:
    ended = cli("segmenter", "train", "--config", config, "--out", config.parent / "model", *more)
    assert ended.code == code, ended.err
    assert ended.out == ""
    lines = [line for line in ended.err.splitlines() if not line.startswith("step ")]
    assert len(lines) == 1
    assert lines[0].startswith("pathopipe: ")
    return str(lines[0])


def test_unknown_keys_name_the_nearest(cli: Cli, config: Path) -> None:
    assert "unknown key 'train.stps'; did you mean 'steps'?" in refused(cli, config, "--set", "train.stps=4")
    changed(config, "batch_size", "batchsize")
    assert "unknown key 'train.batchsize'; did you mean 'batch_size'?" in refused(cli, config)


def test_a_config_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    assert "absent.yaml: config can't be read" in refused(cli, tmp_path / "absent.yaml")


def test_labels_of_an_unknown_kind(cli: Cli, config: Path) -> None:
    changed(config, "label-images", "label-imges")
    assert "data set 'discs': unknown kind 'label-imges'; did you mean 'label-images'?" in refused(cli, config)


def test_a_data_set_without_the_target(cli: Cli, config: Path) -> None:
    changed(config, "name: nuclei\n", "name: glands\n")
    assert "data set 'discs' is labelled for nuclei, but the network is to learn glands, tissue_types" in refused(
        cli, config
    )


def test_tissue_labels_of_one_class(cli: Cli, config: Path) -> None:
    changed(config, "stroma: Stroma", "stroma: Fat")
    assert "all tissue labels are of one class (Fat), which teaches nothing" in refused(cli, config)


def test_a_backbone_that_timm_has_not(cli: Cli, config: Path) -> None:
    assert "network.backbone: timm has no 'resnet17'; did you mean 'resnet18'" in refused(
        cli, config, "--set", "network.backbone=resnet17"
    )


def test_a_loss_that_is_no_number_ends_with_its_samples(cli: Cli, config: Path) -> None:
    said = refused(
        cli,
        config,
        *("--set", "train.learning_rate=1e36", "--set", "train.warmup_steps=0", "--set", "train.steps=6"),
        *("--set", "train.holdout=0"),
        code=1,
    )
    assert "the loss is not finite" in said
    assert "its samples: " in said
    assert ": p" in said


def test_an_out_that_is_a_file(cli: Cli, config: Path) -> None:
    (config.parent / "model").write_text("")
    assert "this is a file; name a folder" in refused(cli, config)


def test_help_has_examples(cli: Cli) -> None:
    ended = cli("segmenter", "train", "--help")
    assert ended.code == 0
    assert "pathopipe segmenter train --config configs/segmenter.yaml --data DATA --out model" in ended.out
    for option in ("--config", "--out", "--data", "--set", "--fresh", "--json", "--device"):
        assert option in ended.out
    assert "docs/training_data.md" in ended.out
    assert cli("segmenter", "train").code == 2
