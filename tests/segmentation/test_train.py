"""Training: it learns, goes on after any kill to the same weights, and stops with clear words."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pathopipe.errors import UsageError
from pathopipe.segmentation import train
from pathopipe.segmentation.examples import Example
from pathopipe.segmentation.network import SegmentationNetwork, load_network
from pathopipe.segmentation.settings import SegmenterSettings, read_settings
from pathopipe.segmentation.train import NotFiniteLossError, Trained, train_segmenter
from pathopipe.segmentation.validate import Scores

NUCLEI = {"name": "nuclei", "classes": [{"name": "Nucleus", "color": [70, 90, 220]}]}
GLANDS = {"name": "glands", "classes": [{"name": "Gland", "color": [60, 160, 60]}]}
TISSUES = {
    "name": "tissue_types",
    "classes": [{"name": "Fat", "color": [250, 235, 160]}, {"name": "Stroma", "color": [240, 170, 190]}],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of purple discs on pink, their nuclei as label images; and four of one colour, pink or white."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("images", "nuclei", "tiles/fat", "tiles/stroma"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:96, :96] + 0.5
    for number in range(6):
        labels = np.zeros((96, 96), np.uint16)
        for disc in range(9):
            cx, cy = 16 + 32 * (disc % 3), 16 + 32 * (disc // 3)
            labels[np.hypot(x - cx - rng.uniform(-3, 3), y - cy - rng.uniform(-3, 3)) < rng.uniform(7, 11)] = disc + 1
        rgb = np.where(labels[..., None] > 0, [90, 50, 140], [235, 180, 210]) + rng.normal(0, 5, (96, 96, 3))
        Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).save(folder / "images" / f"p{number}.png")
        Image.fromarray(labels).save(folder / "nuclei" / f"p{number}.png")
    for kind, colour in (("fat", (250, 248, 250)), ("stroma", (230, 150, 190))):
        for number in range(2):
            Image.fromarray(np.full((96, 96, 3), colour, np.uint8)).save(
                folder / "tiles" / kind / f"{kind}{number}.png"
            )
    return folder


DISCS = {"name": "discs", "kind": "label-images", "images": "images", "labels": {"nuclei": "nuclei"}, "mpp": 0.5}
TILES = {
    "name": "tiles",
    "kind": "tiles",
    "images": "tiles",
    "mpp": 0.5,
    "types": {"fat": "Fat", "stroma": "Stroma"},
}


def settings_of(*, tasks: Any = (NUCLEI,), datasets: Any = (DISCS,), network: Any = None, **said: Any) -> Any:
    return SegmenterSettings.model_validate(
        {
            "name": "tiny",
            "network": {
                "backbone": "resnet18",
                "backbone_options": {"channels": [8, 8, 16, 16], "stem_width": 8, "stem_type": "deep"},
                "decoder_channels": [16, 12, 8, 8],
                "tasks": list(tasks),
                **(network or {}),
            },
            "train": {
                "steps": 8,
                "batch_size": 2,
                "crop_px": 64,
                "learning_rate": 0.01,
                "warmup_steps": 2,
                "validate_every": 4,
                "checkpoint_every": 2,
                "holdout": 0.2,
                "device": "cpu",
                "precision": "fp32",
                "seed": 1,
                **said,
            },
            "datasets": list(datasets),
        }
    )


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(path: Path) -> dict[str, Tensor]:
    return load_network(path).state_dict()


class Killed(BaseException):
    """As a signal would."""


def kill_at(step: int) -> Callable[[int, int, float], None]:
    def on_step(now: int, steps: int, loss: float) -> None:
        if now == step:
            raise Killed

    return on_step


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained, list[float]]:
    """A training of eight steps: its folder, how it ended, its losses."""
    out, losses = tmp_path_factory.mktemp("undisturbed"), list[float]()
    ended = train_segmenter(settings_of(), out, data=data, on_step=lambda step, steps, loss: losses.append(loss))
    return out, ended, losses


def test_how_a_training_ends(undisturbed: tuple[Path, Trained, list[float]]) -> None:
    out, ended, losses = undisturbed
    assert (ended.steps, ended.stopped_early) == (8, False)
    assert ended.step in {4, 8}
    assert ended.images == {"discs": (5, 1)}
    assert len(losses) == 8
    assert list(ended.scores.flat()) == ["nuclei/discs"]
    assert [case.dataset for case in ended.cases] == ["discs"]
    validated = rows(out)
    assert [row["step"] for row in validated] == [4, 8]
    kept = next(row for row in validated if row["step"] == ended.step)
    assert kept["scores"] == ended.scores.flat()
    assert ended.weights == out / "weights.safetensors"
    assert load_network(ended.weights).spec == settings_of().network


def test_it_learns_what_is_easy(data: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    scored: dict[int, Scores] = {}
    said = {"steps": 51, "validate_every": 51, "warmup_steps": 5, "stain": 0.2, "ema": 0.9}
    ended = train_segmenter(
        settings_of(**said),
        tmp_path,
        data=data,
        on_step=lambda step, steps, loss: losses.append(loss),
        on_scores=lambda step, scores: scored.update({step: scores}),
    )
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert list(scored) == [51]
    assert ended.scores.by_task["nuclei"]["discs"] > 0.4
    assert ended.cases[0].score("nuclei") == pytest.approx(ended.scores.by_task["nuclei"]["discs"], abs=0.1)
    assert [row["step"] for row in rows(tmp_path)] == [50, 51]
    assert set(rows(tmp_path)[0]["losses"]) == {"nuclei", "distance"}


@pytest.mark.parametrize("step", [1, 5, 6])
def test_a_killed_training_goes_on_to_the_same_weights(
    step: int, undisturbed: tuple[Path, Trained, list[float]], data: Path, tmp_path: Path
) -> None:
    """Bit for bit, before and after the first checkpoint and the first validation; with other threads, too."""
    whole, expected, losses = undisturbed
    with pytest.raises(Killed):
        train_segmenter(settings_of(), tmp_path, data=data, on_step=kill_at(step))
    again: list[int] = []
    late: list[float] = []

    def on_step(step: int, steps: int, loss: float) -> None:
        again.append(step)
        late.append(loss)

    ended = train_segmenter(settings_of(threads=2), tmp_path, data=data, on_step=on_step)
    assert again == list(range((step - 1) // 2 * 2 + 1, 9))
    assert late == losses[again[0] - 1 :]
    assert (tmp_path / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert ended.scores == expected.scores
    assert ended.step == expected.step
    assert rows(tmp_path) == rows(whole)


def test_a_finished_training_takes_no_step(
    undisturbed: tuple[Path, Trained, list[float]], data: Path, tmp_path: Path
) -> None:
    out, expected, _ = undisturbed
    before = (out / "weights.safetensors").read_bytes()
    ended = train_segmenter(settings_of(), out, data=data, on_step=kill_at(1))
    assert (out / "weights.safetensors").read_bytes() == before
    assert (ended.step, ended.steps, ended.scores) == (expected.step, 8, expected.scores)
    assert ended.cases[0].score("nuclei") == expected.cases[0].score("nuclei")


_PROGRAM = """
import sys
from pathlib import Path
import torch
from pathopipe.segmentation.settings import read_settings
from pathopipe.segmentation.train import train_segmenter
torch.set_num_threads(1)
out, data = Path(sys.argv[1]), Path(sys.argv[2])
train_segmenter(read_settings(data / "settings.yaml"), out, data=data, on_step=lambda *told: print(*told, flush=True))
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_process_that_is_killed_loses_no_more_than_a_checkpoint(
    undisturbed: tuple[Path, Trained, list[float]], data: Path, tmp_path: Path
) -> None:
    whole, _, losses = undisturbed
    (data / "settings.yaml").write_text(settings_of().model_dump_json())
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path), str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("5 "):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "checkpoint.pt").is_file()
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    told = [line.split() for line in ended.stdout.splitlines()]
    assert int(told[0][0]) in {3, 5, 7}
    assert [float(line[2]) for line in told] == losses[int(told[0][0]) - 1 :]
    assert (tmp_path / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


def copied(out: Path, target: Path) -> Path:
    for path in out.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_other_settings_are_refused(undisturbed: tuple[Path, Trained, list[float]], data: Path, tmp_path: Path) -> None:
    out = copied(undisturbed[0], tmp_path)
    for other in (
        settings_of(seed=2),
        settings_of(steps=9),
        settings_of(network={"mpp": 0.6}),
        settings_of(datasets=[{**DISCS, "zoom": [1, 1]}]),
    ):
        with pytest.raises(UsageError, match=r"holds a training with other settings; give another --out, or .*--fresh"):
            train_segmenter(other, out, data=data)
    # What does not decide the weights may differ.
    train_segmenter(settings_of(threads=3, checkpoint_every=7, device="auto"), out, data=data, on_step=kill_at(1))


def test_other_images_are_refused(undisturbed: tuple[Path, Trained, list[float]], data: Path, tmp_path: Path) -> None:
    other = tmp_path / "data"
    shutil.copytree(data, other)
    picture = other / "images" / "p0.png"
    rgb = np.array(Image.open(picture))
    rgb[0, 0] ^= 1
    Image.fromarray(rgb).save(picture)
    with pytest.raises(UsageError, match=r"holds a training on other images or labels .*--fresh"):
        train_segmenter(settings_of(), undisturbed[0], data=other)


def test_fresh_forgets_at_once(undisturbed: tuple[Path, Trained, list[float]], data: Path, tmp_path: Path) -> None:
    """Killed before its first checkpoint, a fresh training does not go on from the old one."""
    out = copied(undisturbed[0], tmp_path)
    seen: list[int] = []

    def on_step(step: int, steps: int, loss: float) -> None:
        seen.append(step)
        if len(seen) == 1:
            raise Killed

    with pytest.raises(Killed):
        train_segmenter(settings_of(steps=2), out, data=data, fresh=True, on_step=on_step)
    assert not (out / "checkpoint.pt").exists()
    train_segmenter(settings_of(steps=2), out, data=data, on_step=on_step)
    assert seen == [1, 1, 2]
    assert [row["step"] for row in rows(out)] == [2]


def test_wrong_data_forgets_nothing(undisturbed: tuple[Path, Trained, list[float]], data: Path, tmp_path: Path) -> None:
    out = copied(undisturbed[0], tmp_path)
    with pytest.raises(UsageError):
        train_segmenter(settings_of(datasets=[{**DISCS, "images": "absent"}]), out, data=data, fresh=True)
    assert (out / "checkpoint.pt").is_file()
    assert len(rows(out)) == 2


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_torn_checkpoint_is_named(
    content: bytes | None, undisturbed: tuple[Path, Trained, list[float]], data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((undisturbed[0] / "checkpoint.pt").read_bytes()[:3000] if content is None else content)
    with pytest.raises(UsageError, match=r"checkpoint\.pt: can't be read .*start anew with --fresh") as caught:
        train_segmenter(settings_of(), tmp_path, data=data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_log_that_was_cut_short_is_mended(
    undisturbed: tuple[Path, Trained, list[float]], data: Path, tmp_path: Path
) -> None:
    out = copied(undisturbed[0], tmp_path)
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    train_segmenter(settings_of(), out, data=data)
    assert [row["step"] for row in rows(out)] == [4, 8]


# Losses that are no numbers


def test_a_loss_that_explodes_stops_and_names_the_samples(data: Path, tmp_path: Path) -> None:
    settings = settings_of(learning_rate=1e36, warmup_steps=0, validate_every=100)
    with pytest.raises(NotFiniteLossError, match=r"step \d+: the loss is not finite \(.*nuclei") as caught:
        train_segmenter(settings, tmp_path, data=data)
    text = str(caught.value)
    assert text.count("discs: p") == 2
    assert "lower train.learning_rate" in text
    assert "\n" not in text
    assert not (tmp_path / "weights.safetensors").exists()


def test_the_step_of_the_first_bad_loss_is_told(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, n_calls = train.losses, 0

    def bad(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal n_calls
        n_calls += 1
        found = good(outputs, targets)
        return found if n_calls < 4 else {name: value * torch.nan for name, value in found.items()}

    monkeypatch.setattr(train, "losses", bad)
    with pytest.raises(NotFiniteLossError, match=r"step 3: the loss is not finite \(nuclei nan, distance nan\)"):
        train_segmenter(settings_of(), tmp_path, data=data)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 2
    assert all(torch.isfinite(value).all() for value in state["network"].values())


# Partial labels


def test_what_a_data_set_does_not_label_is_no_background(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of tiles alone leave the decoder of nuclei as it is; losses are those of labelled tasks."""
    good, seen = train.losses, list[tuple[list[bool], set[str]]]()

    def spied(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        found = good(outputs, targets)
        labelled = targets["nuclei_weight"].flatten(1).any(1)
        seen.append((labelled.tolist(), set(found)))
        assert not targets["nuclei"][~labelled].any()
        return found

    monkeypatch.setattr(train, "losses", spied)
    settings = settings_of(tasks=(NUCLEI, TISSUES), datasets=(DISCS, TILES), batch_size=1, steps=6, holdout=0)
    train_segmenter(settings, tmp_path, data=data)
    assert {(tuple(labelled), tuple(sorted(found))) for labelled, found in seen} == {
        ((True,), ("distance", "nuclei")),
        ((False,), ("tissue_types",)),
    }


def test_tiles_alone_never_move_the_decoder_of_nuclei(data: Path, tmp_path: Path) -> None:
    """The disc set has next to no share, so that no sample is drawn from it."""
    rare = {**DISCS, "share": 1e-9}
    settings = settings_of(
        tasks=(NUCLEI, TISSUES), datasets=(rare, TILES), steps=2, holdout=0, weight_decay=0, ema=0, warmup_steps=0
    )
    train_segmenter(settings, tmp_path, data=data)
    torch.manual_seed(1)
    first = SegmentationNetwork(settings.network).state_dict()
    last = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["network"]
    learnt = [name for name, _ in SegmentationNetwork(settings.network).named_parameters()]
    for name in learnt:
        same = torch.equal(first[name], last[name])
        assert same == name.startswith("decoders.nuclei"), name


def test_the_mean_tells_what_is_not_labelled(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From ``teach_from`` on, and only where it is sure; with half the weight."""
    settings = settings_of(
        tasks=(NUCLEI, TISSUES),
        datasets=({**DISCS, "share": 1e-9}, {**TILES, "zoom": [1, 1]}),
        batch_size=2,
        steps=4,
        holdout=0,
        teach_from=2,
        teach_weight=0.25,
        learning_rate=1e-9,
    )
    good, seen = train.losses, list[tuple[dict[str, Tensor], set[str]]]()

    def spied(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        found = good(outputs, targets)
        seen.append((targets, set(found)))
        return found

    forward = SegmentationNetwork.forward

    def said(self: SegmentationNetwork, rgb: Tensor) -> dict[str, Tensor]:
        logits = forward(self, rgb)
        if not self.training:  # the mean: sure on the left, not on the right
            nuclei = torch.zeros_like(logits["nuclei"])
            nuclei[:, 0, :, :16], nuclei[:, 0, :, 16:32], nuclei[:, 0, :, 32:] = 3.0, -3.0, 0.5
            nuclei[:, 1] = 1.0
            logits["nuclei"] = nuclei
        return logits

    monkeypatch.setattr(train, "losses", spied)
    monkeypatch.setattr(SegmentationNetwork, "forward", said)
    train_segmenter(settings, tmp_path, data=data)
    assert ["nuclei" in found for _, found in seen] == [False, False, True, True]
    for targets, _ in seen[2:]:
        weight = targets["nuclei_weight"]
        assert set(weight.unique().tolist()) <= {0.0, 0.25}
        assert (weight[..., :32] == 0.25).float().mean() > 0.8  # beyond the image nothing is told
        assert not weight[..., 32:].any()
        assert (targets["nuclei"][:, 0, :, :16] == 1).all()
        assert not targets["nuclei"][:, 0, :, 16:32].any()
        assert torch.allclose(targets["nuclei"][:, 1, :, :16], torch.tensor(1.0).sigmoid())
        assert not targets["nuclei"][:, 1, :, 16:32].any()


# Ends and beginnings


def test_it_ends_when_nothing_gets_better(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.3, 0.5, 0.4, 0.5])
    monkeypatch.setattr(train, "validate", lambda *_, **__: Scores({"nuclei": {"discs": next(scores)}}))
    settings = settings_of(steps=50, validate_every=1, patience=2, checkpoint_every=40)
    ended = train_segmenter(settings, tmp_path, data=data)
    assert (ended.step, ended.steps, ended.stopped_early) == (2, 4, True)
    assert ended.scores.flat() == {"nuclei/discs": 0.5}
    # It stays ended.
    again = train_segmenter(settings, tmp_path, data=data, on_step=kill_at(5))
    assert (again.step, again.steps, again.stopped_early) == (2, 4, True)


def test_without_a_score_the_last_network_stays(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "validate", lambda *_, **__: Scores({}))
    ended = train_segmenter(settings_of(steps=3, validate_every=1, patience=1), tmp_path, data=data)
    assert (ended.step, ended.steps, ended.stopped_early) == (3, 3, False)


def test_without_anything_kept_back_the_last_network_stays(data: Path, tmp_path: Path) -> None:
    ended = train_segmenter(settings_of(holdout=0, steps=3, ema=0), tmp_path, data=data)
    assert (ended.step, ended.images, ended.cases) == (3, {"discs": (6, 0)}, ())
    assert ended.scores.flat() == {}
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    kept = weights_of(ended.weights)
    for name, value in state["network"].items():
        assert torch.allclose(kept[name].float(), value.float(), rtol=1e-3, atol=1e-3)


def test_an_image_without_nuclei_can_be_kept_back(data: Path, tmp_path: Path) -> None:
    """It has no score, rather than one of NaN that no other could beat; the last network is kept."""
    (tmp_path / "empty").mkdir()
    for number in range(2):
        Image.fromarray(np.full((64, 64, 3), 230, np.uint8)).save(tmp_path / "empty" / f"e{number}.png")
    empty = {
        "name": "empty",
        "kind": "tiles",
        "images": str(tmp_path / "empty"),
        "mpp": 0.5,
        "empty": ["nuclei"],
        "unlabelled": True,
        "holdout": 1,
    }
    settings = settings_of(datasets=({**DISCS, "holdout": 0}, empty), steps=2, learning_rate=1e-9)
    ended = train_segmenter(settings, tmp_path / "out", data=data)
    assert ended.weights.is_file()
    assert ended.scores.flat() == {}
    assert ended.step == 2


def test_a_backbone_that_is_left_alone_stays_the_same(data: Path, tmp_path: Path) -> None:
    from pathopipe.embeddings.torchvision_import import import_torchvision

    import_torchvision()
    import timm

    options = settings_of().network.backbone_options
    torch.manual_seed(9)
    state = timm.create_model("resnet18", **options).state_dict()
    torch.save(state, tmp_path / "backbone.pt")
    settings = settings_of(
        holdout=0, steps=2, ema=0, backbone_weights=tmp_path / "backbone.pt", freeze_backbone=True, warmup_steps=0
    )
    train_segmenter(settings, tmp_path / "out", data=data)
    trained = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["network"]
    encoder = {name.removeprefix("encoder.network."): value for name, value in trained.items() if "encoder" in name}
    assert len(encoder) > 100
    assert all(torch.equal(value, state[name]) for name, value in encoder.items())
    free = train_segmenter(
        settings_of(holdout=0, steps=2, ema=0, backbone_weights=tmp_path / "backbone.pt", warmup_steps=0),
        tmp_path / "free",
        data=data,
    )
    assert free.steps == 2
    moved = torch.load(tmp_path / "free" / "checkpoint.pt", weights_only=True)["network"]
    assert not torch.equal(moved["encoder.network.layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
    # What neither moves nor learns begins with the same weights.
    assert trained.keys() == moved.keys()


def test_the_kept_network_is_a_running_mean(data: Path, tmp_path: Path) -> None:
    """After one step: 1/11 of the first weights and 10/11 of those after it."""
    settings = settings_of(holdout=0, steps=1, warmup_steps=0, ema=0.999)
    train_segmenter(settings, tmp_path, data=data)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.manual_seed(1)
    first = SegmentationNetwork(settings.network).state_dict()
    name = "decoders.nuclei.out.weight"
    assert not torch.equal(first[name], state["network"][name])
    assert torch.allclose(state["mean"][name], first[name] / 11 + state["network"][name] * 10 / 11, atol=1e-7)


def test_learning_rates_rise_and_fall() -> None:
    rates = [train._learning_rate(step, 100, 10, 1.0) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.505)
    assert 0.01 <= rates[99] < 0.02
    assert (np.diff(rates[10:]) < 0).all()


# Tissue types alone


BOTH: dict[str, Any] = {"tasks": (NUCLEI, TISSUES), "datasets": (DISCS, TILES), "steps": 4, "teach_from": 2}


@pytest.fixture(scope="module")
def with_tissue_steps(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    """Four steps of everything, then five for tissue types alone."""
    out = tmp_path_factory.mktemp("tissue")
    return out, train_segmenter(settings_of(**BOTH, tissue_steps=5), out, data=data)


def test_steps_for_tissue_types_change_nothing_else(
    with_tissue_steps: tuple[Path, Trained], data: Path, tmp_path: Path
) -> None:
    """To the bit, statistics of batch norms too; and a training that ended without them goes on to the same file."""
    expected, ended = with_tissue_steps
    before = train_segmenter(settings_of(**BOTH), tmp_path, data=data)
    assert (before.steps, before.tissue_steps) == (4, 0)
    old, old_rows = load_file(before.weights), rows(tmp_path)
    taken: list[tuple[int, int]] = []
    after = train_segmenter(
        settings_of(**BOTH, tissue_steps=5),
        tmp_path,
        data=data,
        on_step=lambda step, steps, loss: taken.append((step, steps)),
    )
    assert taken == [(step, 9) for step in range(5, 10)]
    assert (after.step, after.steps, after.tissue_steps, after.stopped_early) == (before.step, 4, 5, False)
    new = load_file(after.weights)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.startswith("decoders.tissue_types.")}
    assert rows(tmp_path)[:-1] == old_rows
    assert rows(tmp_path)[-1]["step"] == 9
    assert rows(tmp_path)[-1]["scores"] == after.scores.flat()
    assert set(after.scores.by_task) == {"nuclei", "tissue_types"}
    assert after.weights.read_bytes() == (expected / "weights.safetensors").read_bytes()
    assert ended.scores == after.scores


@pytest.mark.parametrize("step", [5, 7, 9])
def test_killed_steps_for_tissue_types_go_on_to_the_same_weights(
    step: int, with_tissue_steps: tuple[Path, Trained], data: Path, tmp_path: Path
) -> None:
    """At the first of them, between checkpoints, and after the last."""
    whole, expected = with_tissue_steps
    settings = settings_of(**BOTH, tissue_steps=5)
    with pytest.raises(Killed):
        train_segmenter(settings, tmp_path, data=data, on_step=kill_at(step))
    again: list[int] = []
    ended = train_segmenter(settings, tmp_path, data=data, on_step=lambda step, steps, loss: again.append(step))
    assert again == list(range(step, 10))
    assert (tmp_path / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert (ended.scores, ended.tissue_steps) == (expected.scores, 5)
    assert rows(tmp_path) == rows(whole)
    # It stays ended.
    train_segmenter(settings, tmp_path, data=data, on_step=kill_at(10))
    assert rows(tmp_path) == rows(whole)


def test_a_kill_between_weights_and_checkpoint_does_no_harm(
    with_tissue_steps: tuple[Path, Trained], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head that was written must not be learnt from again."""
    whole, _ = with_tissue_steps
    settings = settings_of(**BOTH, tissue_steps=5)
    good = train.write_checkpoint

    def torn(*args: Any) -> None:
        if args[-1].tissue_step == 5:
            raise Killed
        good(*args)

    with monkeypatch.context() as patched:
        patched.setattr(train, "write_checkpoint", torn)
        with pytest.raises(Killed):
            train_segmenter(settings, tmp_path, data=data)
    assert (tmp_path / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    train_segmenter(settings, tmp_path, data=data)
    assert (tmp_path / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert rows(tmp_path) == rows(whole)


@pytest.mark.parametrize("other", [0, 6])
def test_another_number_of_steps_for_tissue_types_is_refused(
    other: int, with_tissue_steps: tuple[Path, Trained], data: Path, tmp_path: Path
) -> None:
    out = copied(with_tissue_steps[0], tmp_path)
    with pytest.raises(UsageError, match="holds a training with other settings"):
        train_segmenter(settings_of(**BOTH, tissue_steps=other), out, data=data)


def test_steps_for_tissue_types_teach_their_head(data: Path, tmp_path: Path) -> None:
    """Before them no tile was seen, and pink and white look alike to the head."""
    said = {**BOTH, "datasets": ({**DISCS, "share": 1}, {**TILES, "share": 1e-9}), "holdout": 0, "steps": 2, "ema": 0.9}
    losses: list[float] = []
    ended = train_segmenter(
        settings_of(**said, tissue_steps=30),
        tmp_path,
        data=data,
        on_step=lambda step, steps, loss: losses.append(loss),
    )
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[2:5])
    network = load_network(ended.weights)
    for label, kind in enumerate(("fat", "stroma")):
        rgb = np.asarray(Image.open(data / "tiles" / kind / f"{kind}0.png"))
        with torch.inference_mode():
            share = network(torch.from_numpy(rgb[None].copy()).permute(0, 3, 1, 2))["tissue_types"].softmax(1)
        assert share[0, label].mean() > 0.7, kind


def test_labels_count_by_the_root_of_their_sources(data: Path) -> None:
    """Images that tell no tissue type are left out; those labelled by pixel are one pool."""

    def example(name: str, source: str, kinds: set[int] | None, *, by_pixel: bool = False) -> Example:
        return Example(
            dataset=name,
            name=source,
            source=source,
            rgb=np.zeros((8, 8, 3), np.uint8),
            mpp=0.5,
            labels={},
            classes={},
            ignore={},
            tissue_types=None if kinds is None else frozenset(kinds),
            tissue_map=np.zeros((8, 8), np.uint8) if by_pixel else None,
        )

    examples = [
        *(example("tiles", f"a{at // 2}", {0}) for at in range(8)),
        example("tiles", "b", {1}),
        example("tiles", "c", None),
        *(example("discs", f"d{at}", None, by_pixel=True) for at in range(9)),
    ]
    settings = settings_of(**BOTH)
    pools = train._tissue_pools(settings, examples)
    assert [(pool.name, pool.share, len(pool.examples)) for pool in pools] == [
        ("discs", 3.0, 9),
        ("tiles", 2.0, 8),
        ("tiles", 1.0, 1),
    ]
    assert train._tissue_pools(settings_of(), examples) == []


def test_steps_for_tissue_types_need_such_labels(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.tissue_steps: no image to learn from tells tissue types"):
        train_segmenter(settings_of(tissue_steps=3), tmp_path, data=data)
    assert not (tmp_path / "checkpoint.pt").exists()


# Settings


RECIPE = """
name: tiny
network:
  tasks: [{name: nuclei, classes: [{name: Nucleus, color: [1, 2, 3]}]}]
train: {steps: 7}
datasets: [{name: discs, kind: label-images, images: images, labels: {nuclei: nuclei}, mpp: 0.5}]
"""


def test_settings_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(RECIPE)
    found = read_settings(path, ["train.seed=4", "network.mpp=0.25", "train.teach_from=null"])
    assert (found.train.steps, found.train.seed, found.network.mpp, found.train.teach_from) == (7, 4, 0.25, None)
    path.write_text(RECIPE.replace("train: {steps: 7}\n", ""))
    assert read_settings(path, ["train.steps=9"]).train.steps == 9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 7", "stepps: 7", "unknown key 'train.stepps'; did you mean 'steps'"),
        ("train:", "trian:", "unknown key 'trian'; did you mean 'train'"),
        ("  tasks:", "  backbon: x\n  tasks:", "unknown key 'network.backbon'; did you mean 'backbone"),
        ("{name: nuclei, cl", "{name: nuclei, size: 3, cl", "unknown key 'network.tasks.0.size'; known: classes, name"),
        ("color:", "colour:", "unknown key 'network.tasks.0.classes.0.colour'; did you mean 'color'"),
        ("name: nuclei,", "name: nucleus,", "network.tasks.0.name: unknown task 'nucleus'; did you mean 'nuclei'"),
        ("mpp: 0.5", "mpp: 0.5, zoon: [1, 2]", "data set 'discs': unknown key 'zoon'; did you mean 'zoom'"),
        ("label-images", "label-image", "data set 'discs': unknown kind 'label-image'; did you mean 'label-images'"),
        (
            "labels: {nuclei",
            "labels: {nucleii",
            "data set 'discs': labels.nucleii: unknown task; did you mean 'nuclei'",
        ),
        ("steps: 7", "steps: 0", "train.steps: input should be greater than or equal to 1, got 0"),
        ("steps: 7", "crop_px: 100", "train.crop_px: input should be a multiple of 64, got 100"),
        ("steps: 7", "learning_rate: .nan", "train.learning_rate: input should be a finite number, got nan"),
        ("name: tiny", "name: My model", r"name: string should match pattern .*got 'My model'"),
        ("name: tiny\n", "", "name is missing"),
        (RECIPE[RECIPE.index("datasets") :], "", "datasets is missing"),
        (RECIPE, "[1, 2]", "want name, network and datasets as a YAML mapping"),
        (RECIPE, "", "want name, network and datasets as a YAML mapping"),
        (RECIPE, "name: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_with_settings_is_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(UsageError, match=message) as caught:
        read_settings(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "--set train.steps: want KEY=VALUE"),
        ("name.short=a", "--set name.short=a: 'name' is no section"),
        ("datasets.0.share=2", "--set datasets.0.share=2: 'datasets' is no section"),
        ("train.steps=[1", r"--set train.steps=\[1: no YAML value"),
        ("train.step=5", "unknown key 'train.step'; did you mean 'steps'"),
        ("train.steps=many", "train.steps: input should be a valid integer.*got 'many'"),
    ],
)
def test_overrides_that_make_no_sense(override: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(RECIPE)
    with pytest.raises(UsageError, match=message) as caught:
        read_settings(tmp_path / "own.yaml", [override])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.yaml: config can't be read"):
        read_settings(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: settings_of(tasks=(GLANDS,)), "data set 'discs' is labelled for nuclei, but the network is to learn"),
        (lambda: settings_of(tasks=(NUCLEI, GLANDS)), r"no data set is labelled for glands \(discs\)"),
        (
            lambda: settings_of(
                tasks=(NUCLEI, TISSUES), datasets=(DISCS, {**TILES, "types": {"fat": "Fat", "stroma": "Fat"}})
            ),
            r"all tissue labels are of one class \(Fat\), which teaches nothing",
        ),
        (lambda: settings_of(datasets=({**DISCS, "holdout": 1},)), "every image is held out"),
        (lambda: settings_of(backbone_weights="absent.pt"), r"absent\.pt: no such file; backbone_weights"),
    ],
)
def test_trainings_that_cant_begin(settings: Callable[[], Any], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        train_segmenter(settings(), tmp_path, data=data)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"train\.device=cuda: torch sees no CUDA device"):
        train_segmenter(settings_of(device="cuda"), tmp_path, data=data)


def test_a_run_takes_the_threads_that_it_is_given(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    train_segmenter(settings_of(holdout=0, steps=1), tmp_path, data=data, threads=3)
    assert asked == [3]
    started = time.perf_counter()
    ended = train_segmenter(settings_of(holdout=0, steps=1), tmp_path, data=data)
    assert asked == [3]
    assert 0 < ended.seconds < time.perf_counter() - started + 0.1
