"""Settings of data sets: what is wrong is said in words, with the data set's name and the nearest known key."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from pathopipe.segmentation.datasets import DatasetSettings, DrawnDataset, LabelImageDataset, TileDataset

SETTINGS: TypeAdapter[Any] = TypeAdapter(DatasetSettings)

LABELS = {"kind": "label-images", "name": "own", "images": "i", "labels": {"nuclei": "l"}, "mpp": 0.5}
TILES = {"kind": "tiles", "name": "own", "images": "i", "types": {"a": "Fat"}, "mpp": 0.5}
GEOJSON = {"kind": "geojson", "name": "own", "images": "i", "labels": "l", "mpp": 0.5}
DRAWN = {"kind": "drawn", "name": "own"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**LABELS, "imges": "q"}, "data set 'own': unknown key 'imges'; did you mean 'images'?"),
        ({**LABELS, "kind": "label-image"}, "unknown kind 'label-image'; did you mean 'label-images'?"),
        ({"name": "own"}, "kind is missing; known: drawn, geojson"),
        ({**LABELS, "kind": ["tiles"]}, "unknown kind"),
        ("own", "a data set is a mapping of keys, got 'own'"),
        ({key: LABELS[key] for key in LABELS if key != "mpp"}, "mpp is missing; give it: how many micrometres"),
        ({**LABELS, "mpp": None}, "mpp: input should be a valid number, got None"),
        ({**LABELS, "mpp": 0.01}, "mpp: input should be greater than or equal to 0.05, got 0.01"),
        ({**LABELS, "mpp": float("nan")}, "mpp: input should be a finite number, got nan"),
        ({**LABELS, "mpp": {"group": {"a": "x"}}}, "mpp.group.a: input should be a valid number"),
        ({**LABELS, "mpp": {"a": {"b": 0.5}, "c": {}}}, "mpp is a number, or one column"),
        ({**LABELS, "labels": {"nucleus": "l"}}, "labels.nucleus: unknown task; did you mean 'nuclei'?"),
        ({**LABELS, "labels": {}}, "labels: dictionary should have at least 1 item"),
        ({**LABELS, "merged": ["glands"]}, "merged names glands, but labels has no folder for it"),
        ({**LABELS, "suffixes": {"lumina": "_l"}}, "suffixes names lumina"),
        ({**LABELS, "empty": ["nuclei"]}, "nuclei has labels, so it can't be in empty"),
        ({**LABELS, "share": 0}, "share: input should be greater than 0, got 0"),
        ({**LABELS, "holdout": 1.5}, "holdout: input should be less than or equal to 1"),
        ({**LABELS, "zoom": [2, 0.5]}, "zoom: the least enlargement comes first, got [2.0, 0.5]"),
        ({**LABELS, "source_pattern": "("}, "'(' is no regular expression"),
        ({**LABELS, "source_pattern": "a+"}, "'a+' has no group"),
        ({**LABELS, "source_pattern": "(a)", "source_column": "b"}, "either source_column or source_pattern"),
        ({**LABELS, "label_column": "b"}, "label_column needs types"),
        ({**LABELS, "name_column": "b"}, "name_column needs table"),
        ({**TILES, "table": "t.csv"}, "say in label_column"),
        ({**TILES, "types": {}}, "say in types which tissue types the labels stand for, or set unlabelled"),
        ({**GEOJSON}, "say in classes which objects are nuclei, glands or lumina"),
        ({**GEOJSON, "classes": {"nuclei": {"a": None}, "glands": {"a": None}}}, "'a' is of nuclei and of glands"),
        ({**DRAWN, "mpp": [0.5, 99]}, "mpp.1: input should be less than or equal to 50, got 99"),
        ({**DRAWN, "types": {"Fat": ["Fat", "Glass"]}}, "a drawn pixel is of one class, but 'Fat' has 2"),
    ],
)
def test_wrong_settings_are_said_in_one_line(settings: Any, said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        SETTINGS.validate_python(settings)
    (error,) = raised.value.errors()
    assert error["type"] == "value_error"
    message = str(error["ctx"]["error"])
    assert said in message
    assert "\n" not in message


def test_single_values_and_numbers_stand_for_lists_of_text() -> None:
    made = SETTINGS.validate_python({**TILES, "types": {0: "Fat", 1: None}, "only": {"group": 3}, "skip": {"g": ["a"]}})
    assert isinstance(made, TileDataset)
    assert made.types == {"0": ("Fat",), "1": ()}
    assert made.only == {"group": ("3",)}
    assert made.skip == {"g": ("a",)}
    drawn = SETTINGS.validate_python({**DRAWN, "mpp": 0.25})
    assert isinstance(drawn, DrawnDataset)
    assert drawn.mpp == (0.25,)


def test_settings_are_frozen_and_stay_what_they_are() -> None:
    made = SETTINGS.validate_python(LABELS)
    assert isinstance(made, LabelImageDataset)
    assert SETTINGS.validate_python(made) == made
    assert SETTINGS.validate_python(made.model_dump()) == made
    with pytest.raises(ValidationError, match="frozen"):
        made.share = 2.0  # type: ignore[misc]


def test_the_documented_data_sets_are_valid() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training_data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    kinds = [SETTINGS.validate_python(one).kind for block in blocks for one in yaml.safe_load(block)["datasets"]]
    assert set(kinds) == {"label-images", "geojson", "hovernet-mat", "pannuke", "monuseg-xml", "tiles", "drawn"}
