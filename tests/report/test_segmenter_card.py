"""The card of a trained network: what it learnt from, its scores, its settings, and pictures of both ends."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from pathopipe.report.segmenter import draw_cases, write_card
from pathopipe.segmentation.metrics import overlap, panoptic
from pathopipe.segmentation.settings import SegmenterSettings
from pathopipe.segmentation.train import Trained
from pathopipe.segmentation.validate import Case, Scores

TRUTH, FOUND = (0, 190, 70), (255, 215, 0)


def settings_of() -> SegmenterSettings:
    color = [1, 2, 3]
    return SegmenterSettings.model_validate(
        {
            "name": "own-network",
            "network": {
                "mpp": 0.25,
                "tasks": [
                    {"name": "nuclei", "classes": [{"name": "Nucleus", "color": color}]},
                    {"name": "glands", "classes": [{"name": "Gland", "color": color}]},
                ],
            },
            "train": {"steps": 500, "learning_rate": 0.004},
            "datasets": [
                {"name": "ours", "kind": "label-images", "images": "i", "labels": {"nuclei": "n"}, "mpp": 0.25},
                {"name": "drawn", "kind": "drawn", "share": 2.5, "fields": 40},
            ],
        }
    )


def box(height: int, width: int, top: int, left: int, side: int) -> NDArray[np.int32]:
    labels = np.zeros((height, width), np.int32)
    labels[top : top + side, left : left + side] = 1
    return labels


def case_of(dataset: str, name: str, *, shift: int = 0, side: int = 160, task: str = "nuclei", **said: Any) -> Case:
    truth, found = box(side, side, 40, 40, 60), box(side, side, 40, 40 + shift, 60)
    both = int(((truth > 0) & (found > 0)).sum())
    everything: dict[str, Any] = {
        "dataset": dataset,
        "name": name,
        "rgb": np.full((side, side, 3), 128, np.uint8),
        "truth": {task: truth},
        "found": {task: found},
        "nuclei": panoptic(overlap(truth, found)) if task == "nuclei" else None,
        "overlap_px": {} if task == "nuclei" else {task: (2 * both, 7200)},
        "tissue_types": np.zeros(0, np.float32),
        "allowed": None,
    }
    return Case(**(everything | said))


def trained_of(folder: Path, **said: Any) -> Trained:
    everything: dict[str, Any] = {
        "weights": folder / "weights.safetensors",
        "step": 300,
        "steps": 500,
        "seconds": 1.0,
        "scores": Scores({"nuclei": {"ours": 0.61234, "drawn": 0.8}, "glands": {"drawn": 0.7}}),
        "stopped_early": False,
        "images": {"ours": (70, 13), "drawn": (38, 2)},
        "cases": (case_of("ours", "good"), case_of("ours", "bad", shift=30), case_of("drawn", "one", task="glands")),
    }
    return Trained(**(everything | said))


def test_what_a_card_says(tmp_path: Path) -> None:
    path = write_card(settings_of(), trained_of(tmp_path), tmp_path)
    assert path == tmp_path / "model_card.md"
    text = path.read_text()
    assert text.startswith("# own-network\n")
    for line in (
        "A segmentation network for nuclei, glands at 0.25 um/px; resnet18 encoder",
        "| ours | label-images | 1 | 70 | 13 |",
        "| drawn | drawn | 2.5 | 38 | 2 |",
        "| nuclei | ours | 0.612 | PQ, objects pooled |",
        "| nuclei | drawn | 0.800 | PQ, objects pooled |",
        "| glands | drawn | 0.700 | Dice, pixels pooled |",
        "The network of step 300 of 500",
        "no source is on both sides",
        "![cases](cases.png)",
    ):
        assert line in text
    assert (tmp_path / "cases.png").is_file()


def test_the_settings_can_be_trained_again_from_the_card(tmp_path: Path) -> None:
    text = write_card(settings_of(), trained_of(tmp_path), tmp_path).read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert SegmenterSettings.model_validate(yaml.safe_load(block)) == settings_of()


def test_without_anything_kept_back_there_are_no_scores_and_no_picture(tmp_path: Path) -> None:
    trained = trained_of(tmp_path, scores=Scores({}), cases=(), images={"ours": (83, 0), "drawn": (40, 0)})
    text = write_card(settings_of(), trained, tmp_path).read_text()
    assert "On what was kept back" not in text
    assert "cases.png" not in text
    assert not (tmp_path / "cases.png").exists()
    assert "| ours | label-images | 1 | 83 | 0 |" in text


def test_a_column_a_data_set(tmp_path: Path) -> None:
    write_card(settings_of(), trained_of(tmp_path), tmp_path)
    picture = np.asarray(Image.open(tmp_path / "cases.png"))
    assert picture.shape == (720, 720, 3)
    assert (picture[500:, 400:] == 255).all()  # the second data set has one image
    assert draw_cases([]) is None


def rows_and_columns(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> list[int]:
    """First and last row, first and last column of a colour, of 160 for a picture of 360 px; words are left out."""
    y, x = np.nonzero((picture[30:] == colour).all(-1))
    scale = 160 / 360
    return [round(value * scale) for value in (y.min() + 30, y.max() + 30, x.min(), x.max())]


def test_outlines_lie_on_their_objects() -> None:
    picture = draw_cases([case_of("ours", "bad", shift=30)])
    assert picture is not None
    assert picture.shape == (360, 360, 3)
    assert rows_and_columns(picture, TRUTH) == pytest.approx([40, 100, 40, 100], abs=1)
    assert rows_and_columns(picture, FOUND) == pytest.approx([40, 100, 70, 130], abs=1)
    alike = draw_cases([case_of("ours", "good")])
    assert alike is not None
    assert not (alike == TRUTH).all(-1).any()  # yellow lies over green


def test_words_tell_the_score() -> None:
    """Another score draws other words."""
    heads = []
    for shift in (0, 10, 55):
        picture = draw_cases([case_of("ours", "x", shift=shift)])
        assert picture is not None
        heads.append(picture[:24])
    assert (heads[0] != 128).any()
    assert not (heads[0] == heads[1]).all()
    assert not (heads[1] == heads[2]).all()


def test_large_images_are_drawn_small() -> None:
    picture = draw_cases([case_of("ours", "large", side=1000), case_of("ours", "small", side=64)])
    assert picture is not None
    assert picture.shape == (720, 360, 3)
