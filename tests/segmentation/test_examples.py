"""Training examples: partial labels stay partial, classes meet the network's, and no source is on both sides."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import shapely
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter

from pathopipe.errors import UsageError
from pathopipe.segmentation.datasets import DatasetSettings
from pathopipe.segmentation.examples import UNKNOWN, Example, read_datasets, read_examples, split_by_source
from pathopipe.synth.field import NUCLEUS_CLASSES, TISSUE_CLASSES, draw_field

RGB = np.random.default_rng(1).integers(0, 256, (3, 4, 3), dtype=np.uint8)
MAP = np.array([[0, 3, 3, 0], [900, 900, 0, 0], [900, 0, 4, 4]], np.uint16)
NUCLEI = ("Epithelial", "Lymphocyte")
TISSUES = ("Fat", "Stroma", "Normal glands", "Carcinoma")
NO_CLASSES: tuple[str, ...] = ()


def made(kind: str, **keys: Any) -> Any:
    return TypeAdapter[Any](DatasetSettings).validate_python({"kind": kind, "name": "own", "mpp": 0.5, **keys})


def save(path: Path, array: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def label_images(folder: Path, *names: str, **keys: Any) -> Any:
    for name in names or ("a",):
        save(folder / "images" / f"{name}.png", RGB)
        save(folder / "nuclei" / f"{name}.png", MAP)
    return made("label-images", images=folder / "images", labels={"nuclei": folder / "nuclei"}, **keys)


def tiles(folder: Path, *names: str, **keys: Any) -> Any:
    for name in names:
        save(folder / "tiles" / f"{name}.png", RGB)
    return made("tiles", images=folder / "tiles", **keys)


def table(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text.replace(" ", "\n"))
    return path


# What is known, and what is not


def test_labels_are_numbered_without_gaps_and_the_rest_is_unknown(tmp_path: Path) -> None:
    settings = label_images(tmp_path, empty=["glands"])
    (example,) = read_examples(settings, {"nuclei": NO_CLASSES, "glands": NO_CLASSES, "lumina": NO_CLASSES})
    assert (example.name, example.dataset, example.source, example.mpp) == ("a", "own", "own/a", 0.5)
    assert np.array_equal(example.rgb, RGB)
    assert example.labels["nuclei"].tolist() == [[0, 1, 1, 0], [3, 3, 0, 0], [3, 0, 2, 2]]
    assert {labels.dtype for labels in example.labels.values()} == {np.dtype(np.int32)}
    assert not example.labels["glands"].any()
    assert "lumina" not in example.labels
    assert example.classes == {}
    assert example.ignore == {}
    assert example.tissue_types is None
    assert example.tissue_map is None


def test_tasks_that_are_not_learnt_are_left_out(tmp_path: Path) -> None:
    settings = label_images(tmp_path, empty=["glands"])
    (example,) = read_examples(settings, {"glands": NO_CLASSES})
    assert list(example.labels) == ["glands"]


def test_an_object_that_fills_the_picture_is_object_one(tmp_path: Path) -> None:
    settings = label_images(tmp_path)
    save(tmp_path / "nuclei" / "a.png", np.full((3, 4), 700, np.uint16))
    (example,) = read_examples(settings, {"nuclei": NO_CLASSES})
    assert example.labels["nuclei"].tolist() == [[1] * 4] * 3


def test_merged_tasks_are_marked(tmp_path: Path) -> None:
    settings = label_images(tmp_path)
    settings = made(
        "label-images", images=settings.images, labels={"glands": settings.labels["nuclei"]}, merged=["glands"]
    )
    (example,) = read_examples(settings, {"glands": NO_CLASSES})
    assert example.merged == {"glands"}


def test_labels_of_another_size_are_refused(tmp_path: Path) -> None:
    settings = label_images(tmp_path)
    save(tmp_path / "nuclei" / "a.png", MAP.T)
    with pytest.raises(UsageError, match=r"nuclei/a\.png: labels of 3 x 4 px for a picture of 4 x 3 px"):
        read_examples(settings, {"nuclei": NO_CLASSES})


def test_masks_are_not_taken_for_label_images(tmp_path: Path) -> None:
    settings = label_images(tmp_path, "a", "b")
    for name in ("a", "b"):
        save(tmp_path / "nuclei" / f"{name}.png", np.array([[1, 0, 1, 0]] * 3, np.uint8))
    with pytest.raises(UsageError, match="masks, with 4 regions in 2 images .* say components: true"):
        read_examples(settings, {"nuclei": NO_CLASSES})
    # One image of several objects is proof that these are numbers of objects.
    save(tmp_path / "nuclei" / "b.png", np.array([[1, 0, 2, 0]] * 3, np.uint8))
    assert len(read_examples(settings, {"nuclei": NO_CLASSES})) == 2


def test_a_data_set_without_the_asked_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'own' is labelled for nuclei, but the network is to learn glands, lumina"):
        read_examples(label_images(tmp_path), {"glands": NO_CLASSES, "lumina": NO_CLASSES})
    with pytest.raises(UsageError, match="unknown task 'nucleus'; did you mean 'nuclei'"):
        read_examples(label_images(tmp_path), {"nucleus": NO_CLASSES})


# Classes of objects


def hovernet(folder: Path, types: list[int], **keys: Any) -> Any:
    save(folder / "images" / "a.png", RGB)
    (folder / "mats").mkdir(exist_ok=True)
    scipy.io.savemat(folder / "mats" / "a.mat", {"inst_map": MAP, "inst_type": np.reshape(types, (-1, 1))})
    return made("hovernet-mat", images=folder / "images", labels=folder / "mats", **keys)


def test_classes_are_the_networks(tmp_path: Path) -> None:
    settings = hovernet(tmp_path, [2, 1, 7], classes={"nuclei": {1: "Epithelial", 2: "Lymphocyte", 7: None}})
    (example,) = read_examples(settings, {"nuclei": NUCLEI})
    assert example.classes["nuclei"].tolist() == [1, 0, UNKNOWN]
    assert example.classes["nuclei"].dtype == np.uint8


def test_classes_are_left_alone_where_the_network_learns_none(tmp_path: Path) -> None:
    settings = hovernet(tmp_path, [2, 1, 7], classes={"nuclei": {1: "Mystery"}})
    (example,) = read_examples(settings, {"nuclei": ("Nucleus",)})
    assert example.classes == {}


def test_unknown_classes_are_refused_with_the_nearest(tmp_path: Path) -> None:
    settings = hovernet(tmp_path, [2, 1, 7], classes={"nuclei": {1: "Epithelial", 2: "Lymphocytes"}})
    with pytest.raises(UsageError, match=r"classes\.nuclei names 'Lymphocytes', .* did you mean 'Lymphocyte'"):
        read_examples(settings, {"nuclei": NUCLEI})
    settings = hovernet(tmp_path, [2, 1, 7], classes={"nuclei": {1: "Epithelial", 2: None}})
    with pytest.raises(UsageError, match=r"a\.mat: nuclei of class '7', which is no class of the network"):
        read_examples(settings, {"nuclei": NUCLEI})


def test_outside_the_labelled_region_nothing_is_known(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", RGB)
    (tmp_path / "labels").mkdir()
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(shapely.box(*corners)),
            "properties": {"classification": {"name": name}},
        }
        for corners, name in (((0, 0, 3, 3), "Region"), ((1, 1, 2, 2), "Lymphocyte"), ((0, 2, 1, 3), "Tumor"))
    ]
    (tmp_path / "labels" / "a.geojson").write_text(json.dumps(features))
    settings = made(
        "geojson",
        images=tmp_path / "images",
        labels=tmp_path / "labels",
        classes={"nuclei": {"Lymphocyte": "Lymphocyte", "Tumor": "Epithelial"}},
        region_class="Region",
    )
    (example,) = read_examples(settings, {"nuclei": NUCLEI, "glands": NO_CLASSES})
    assert example.labels["nuclei"].tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0]]
    assert example.classes["nuclei"].tolist() == [1, 0]
    assert example.ignore["nuclei"].tolist() == [[False, False, False, True]] * 3
    assert list(example.ignore) == ["nuclei"]


# Tables


def test_the_table_says_source_resolution_and_what_to_take(tmp_path: Path) -> None:
    settings = label_images(
        tmp_path,
        *("a", "b", "c", "d"),
        table=table(tmp_path, "name,group,slide a.png,small,s1 b.png,large,s1 c.png,other,s2 d.png,small,s3"),
        source_column="slide",
        mpp={"group": {"small": 0.5, "large": 0.25}},
        only={"group": ["small", "large"]},
        skip={"name": ["d.png"]},
    )
    found = read_examples(settings, {"nuclei": NO_CLASSES})
    assert [(one.name, one.source, one.mpp) for one in found] == [("a", "s1", 0.5), ("b", "s1", 0.25)]


def test_sources_are_found_in_names(tmp_path: Path) -> None:
    settings = tiles(
        tmp_path, "normal/p1_x", "normal/p1_y", "tumour/p2_x", source_pattern=r"(p\d)_", types={"*": ["Fat", "Stroma"]}
    )
    found = read_examples(settings, {"tissue_types": TISSUES})
    assert [one.source for one in found] == ["p1", "p1", "p2"]
    save(tmp_path / "tiles" / "normal" / "odd.png", RGB)
    with pytest.raises(UsageError, match="source_pattern finds no source in 'normal/odd'"):
        read_examples(settings, {"tissue_types": TISSUES})


@pytest.mark.parametrize(
    ("text", "keys", "said"),
    [
        ("name,slide a,1", {}, r"1 images without a row in .*table\.csv \(b\)"),
        ("name,slide a,1 b,2 c,3", {}, r"1 rows without an image in .*table\.csv \(c\)"),
        ("name,slide a,1 a.png,2 b,2", {}, "row 3: 'a' has a row already"),
        ("name,slide a,1 b,2", {"source_column": "slides"}, "source_column: no column 'slides' .* mean 'slide'"),
        ("name,slide a,1 b,2", {"only": {"slide": ["11"]}}, r"only\.slide: no image has '11' there"),
        ("name,slide a,1 b,2", {"skip": {"slide": ["1", "2"]}}, "nothing is left of 2 images"),
        ("name,slide a,1 b,", {"source_column": "slide"}, "'b' has no slide"),
        ("name,slide a,1 b,2", {"mpp": {"slide": {"1": 0.5}}}, r"'b' has slide '2', of which mpp\.slide says nothing"),
        ("name,slide a,1 b,2", {"name_column": "nam"}, "no column 'nam'"),
    ],
)
def test_tables_that_do_not_fit_are_named(tmp_path: Path, text: str, keys: dict[str, Any], said: str) -> None:
    settings = label_images(tmp_path, "a", "b", table=table(tmp_path, text), **keys)
    with pytest.raises(UsageError, match=said):
        read_examples(settings, {"nuclei": NO_CLASSES})


# Tissue types


def test_tissue_labels_become_allowed_classes(tmp_path: Path) -> None:
    types = {"normal": ["Stroma", "Fat"], "tumour": "Carcinoma", "*": None}
    settings = tiles(tmp_path, "normal/a", "tumour/b", "mucus/c", types=types)
    found = read_examples(settings, {"tissue_types": TISSUES, "nuclei": NO_CLASSES})
    assert {one.name: one.tissue_types for one in found} == {
        "normal/a": frozenset({0, 1}),
        "tumour/b": frozenset({3}),
    }
    assert all(one.labels == {} for one in found)


def test_images_without_labels_are_kept_on_wish(tmp_path: Path) -> None:
    settings = tiles(tmp_path, "normal/a", "mucus/c", types={"normal": "Fat", "*": None}, unlabelled=True)
    found = read_examples(settings, {"tissue_types": TISSUES, "nuclei": NO_CLASSES})
    assert {one.name: one.tissue_types for one in found} == {"mucus/c": None, "normal/a": frozenset({0})}
    settings = tiles(tmp_path, "normal/a", unlabelled=True)
    assert [one.name for one in read_examples(settings, {"nuclei": NO_CLASSES})] == ["mucus/c", "normal/a"]


def test_tissue_labels_come_from_the_table(tmp_path: Path) -> None:
    settings = tiles(
        tmp_path,
        *("x/a", "x/b"),
        table=table(tmp_path, "file,tumour x/a.png,0 x/b.png,1"),
        label_column="tumour",
        types={0: "Fat", 1: "Carcinoma"},
    )
    found = read_examples(settings, {"tissue_types": TISSUES})
    assert [one.tissue_types for one in found] == [frozenset({0}), frozenset({3})]


def test_unknown_tissue_labels_are_refused(tmp_path: Path) -> None:
    settings = tiles(tmp_path, "normal/a", "tumour/b", types={"norml": ["Fat"], "tumour": ["Carcinoma"]})
    with pytest.raises(UsageError, match="'normal/a' has the label 'normal', .* did you mean 'norml'"):
        read_examples(settings, {"tissue_types": TISSUES})
    settings = tiles(tmp_path, "normal/a", types={"normal": ["Fatt"]})
    with pytest.raises(UsageError, match="types names 'Fatt', no class of the network; did you mean 'Fat'"):
        read_examples(settings, {"tissue_types": TISSUES})


# All data sets together


def test_data_sets_must_teach_every_task(tmp_path: Path) -> None:
    nuclei = label_images(tmp_path)
    with pytest.raises(UsageError, match="two data sets are named 'own'"):
        read_datasets([nuclei, nuclei], {"nuclei": NO_CLASSES})
    with pytest.raises(UsageError, match=r"no data set is labelled for glands \(own\)"):
        read_datasets([nuclei], {"nuclei": NO_CLASSES, "glands": NO_CLASSES})
    with pytest.raises(UsageError, match="no data set is labelled for tissue_types"):
        read_datasets([nuclei], {"nuclei": NO_CLASSES, "tissue_types": TISSUES})
    assert len(read_datasets([nuclei], {"nuclei": NO_CLASSES})) == 1


def test_tissue_labels_of_one_class_are_refused(tmp_path: Path) -> None:
    one = tiles(tmp_path, "a/a", "b/b", types={"a": "Fat", "b": "Fat"})
    with pytest.raises(UsageError, match=r"all tissue labels are of one class \(Fat\), which teaches nothing"):
        read_datasets([one], {"tissue_types": TISSUES})
    vague = tiles(tmp_path, "a/a", "b/b", types={"a": ["Fat", "Stroma"], "b": ["Stroma", "Fat"]})
    with pytest.raises(UsageError, match="teaches nothing"):
        read_datasets([vague], {"tissue_types": TISSUES})
    two = tiles(tmp_path, "a/a", "b/b", types={"a": ["Fat", "Stroma"], "b": "Stroma"})
    assert len(read_datasets([two], {"tissue_types": TISSUES})) == 2


# Drawn fields


def test_drawn_fields_know_everything(tmp_path: Path) -> None:
    settings = made("drawn", fields=2, side_px=96, mpp=[0.5, 1.0], types={"Muscle": "Stroma", "Fat": None})
    tasks = {"nuclei": (*NUCLEUS_CLASSES[1:], "other"), "glands": (), "lumina": (), "tissue_types": TISSUES}
    first, second = read_examples(settings, tasks)
    assert (first.mpp, second.mpp) == (0.5, 1.0)
    assert first.source != second.source
    assert set(first.labels) == {"nuclei", "glands", "lumina"}
    assert first.rgb.shape == (96, 96, 3)
    assert not np.array_equal(first.rgb, second.rgb)
    assert len(first.classes["nuclei"]) == first.labels["nuclei"].max()
    again = read_examples(settings, tasks)
    assert np.array_equal(again[1].rgb, second.rgb)
    other = read_examples(made("drawn", fields=2, side_px=96, mpp=[0.5, 1.0], seed=1), tasks)
    assert not np.array_equal(other[1].rgb, second.rgb)


def test_drawn_classes_meet_the_networks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    field = next(one for seed in range(20) if (one := draw_field(seed, side_px=64, mpp=0.5)).nuclei.max() > 3)
    monkeypatch.setattr("pathopipe.synth.field.draw_field", lambda seed, *, side_px, mpp: field)
    network = ("nothing like it", *reversed(NUCLEUS_CLASSES))
    settings = made("drawn", fields=2, types={TISSUE_CLASSES[0]: None, TISSUE_CLASSES[1]: "Carcinoma"})
    example, _ = read_examples(settings, {"nuclei": network, "tissue_types": TISSUES})
    named = [network[index] for index in example.classes["nuclei"].tolist()]
    assert named == [NUCLEUS_CLASSES[index] for index in field.nucleus_class.tolist()]
    assert named
    assert example.tissue_map is not None
    for index, drawn in enumerate(TISSUE_CLASSES):
        known = {TISSUE_CLASSES[0]: UNKNOWN, TISSUE_CLASSES[1]: 3}
        wanted = known.get(drawn, TISSUES.index(drawn) if drawn in TISSUES else UNKNOWN)
        assert set(np.unique(example.tissue_map[field.tissue_map == index]).tolist()) <= {wanted}


def test_classes_that_are_not_drawn_are_refused() -> None:
    settings = made("drawn", fields=2, types={"Musle": "Stroma"})
    with pytest.raises(UsageError, match="types: nothing is drawn as 'Musle'; did you mean 'Muscle'"):
        read_examples(settings, {"tissue_types": TISSUES})


# Splitting


def example_of(dataset: str, source: str, number: int = 0) -> Example:
    return Example(
        name=f"{source}-{number}", dataset=dataset, source=source, rgb=RGB, mpp=0.5, labels={}, classes={}, ignore={}
    )


sources = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), min_size=1, max_size=60)


@given(drawn=sources, share=st.floats(0.05, 0.6), seed=st.integers(0, 5))
def test_no_source_is_on_both_sides(drawn: list[tuple[str, int]], share: float, seed: int) -> None:
    examples = [example_of(dataset, f"s{number}", place) for place, (dataset, number) in enumerate(drawn)]
    train, held = split_by_source(examples, share, seed)
    assert not {one.source for one in train} & {one.source for one in held}
    assert sorted(one.name for one in train + held) == sorted(one.name for one in examples)
    again = split_by_source(examples[::-1], share, seed)
    assert {one.source for one in again[1]} == {one.source for one in held}


@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=4), share=st.floats(0.01, 0.99))
def test_each_data_set_is_on_both_sides_by_its_share(counts: list[int], share: float) -> None:
    examples = [example_of(f"d{d}", f"d{d}/{n}") for d, count in enumerate(counts) for n in range(count)]
    _, held = split_by_source(examples, share, 0)
    n_held = Counter(one.dataset for one in held)
    for d, count in enumerate(counts):
        if count == 1:
            assert n_held[f"d{d}"] == 0
        else:
            assert 1 <= n_held[f"d{d}"] <= count - 1
            assert abs(n_held[f"d{d}"] - share * count) <= 1


def test_data_sets_with_the_same_patients_are_split_alike() -> None:
    small = [example_of("small", f"p{number}") for number in range(10)]
    large = [example_of("large", f"p{number}") for number in range(50)]
    train, held = split_by_source(large + small, 0.2, 3)
    held_of = {name: {one.source for one in held if one.dataset == name} for name in ("small", "large")}
    assert len(held_of["small"]) == 2
    assert len(held_of["large"]) == 10
    assert held_of["small"] < held_of["large"]
    assert {one.source for one in train} == {f"p{number}" for number in range(50)} - held_of["large"]


def test_a_data_set_may_be_kept_back_whole_or_not_at_all() -> None:
    examples = [example_of(name, f"{name}/{number}") for name in "abc" for number in range(5)]
    train, held = split_by_source(examples, 0.4, 0, shares={"a": 1.0, "b": 0.0})
    assert Counter(one.dataset for one in held) == {"a": 5, "c": 2}
    assert Counter(one.dataset for one in train) == {"b": 5, "c": 3}


def test_another_seed_keeps_others_back() -> None:
    examples = [example_of("a", f"s{number}") for number in range(40)]
    held = [{one.source for one in split_by_source(examples, 0.25, seed)[1]} for seed in (0, 1)]
    assert held[0] != held[1]


# Real data


@pytest.mark.shared_data
def test_real_nuclei_are_all_there(shared_data: Path) -> None:
    folder = shared_data / "nuclei" / "dsb2018"
    settings = made(
        "label-images",
        images=folder / "images",
        labels={"nuclei": folder / "labels"},
        table=folder / "index.csv",
        source_column="mosaic",
        only={"stain_group": ["pink", "white"]},
        mpp={"stain_group": {"pink": 0.22, "white": 0.33}},
    )
    found = read_examples(settings, {"nuclei": NO_CLASSES})
    assert Counter(one.mpp for one in found) == {0.33: 26, 0.22: 4}
    assert sum(int(one.labels["nuclei"].max()) for one in found) == 1184 + 48


@pytest.mark.shared_data
def test_real_tiles_are_read_from_their_archive(shared_data: Path) -> None:
    folder = shared_data / "tissue" / "ebhi_tiles"
    settings = made(
        "tiles",
        images=folder / "tiles.zip",
        table=folder / "labels.csv",
        label_column="class",
        source_column="patient",
        types={"Normal": "Normal glands", "*": None},
    )
    found = read_examples(settings, {"tissue_types": TISSUES})
    assert len(found) == 30
    assert {one.tissue_types for one in found} == {frozenset({2})}
    assert len({one.source for one in found}) < 30
