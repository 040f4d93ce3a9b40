"""``pathopipe segmenter evaluate`` as a user types it: tables, documents, rows, and how it ends."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Cli = Callable[..., Any]

LABELS = np.zeros((40, 60), np.uint16)
LABELS[5:15, 5:15] = 1
LABELS[5:15, 15:25] = 2
LABELS[25:35, 30:50] = 300


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three images: a found perfectly, b moved by 2 px, c empty on both sides."""
    truth, found = tmp_path / "truth", tmp_path / "found"
    for folder in (truth, found):
        folder.mkdir()
        Image.fromarray(LABELS).save(folder / "a.png")
        Image.fromarray(np.roll(LABELS, 0 if folder == truth else 2, axis=1)).save(folder / "b.png")
        Image.fromarray(np.zeros_like(LABELS)).save(folder / "c.png")
    (tmp_path / "index.csv").write_text("name,stain\na,pink\nb,white\nc,white\n")
    return truth, found


def save_geojson(path: Path, boxes: list[tuple[int, int, int, int, str]]) -> Path:
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]]]},
            "properties": {"objectType": "detection", "classification": {"name": name, "color": [1, 2, 3]}},
        }
        for x, y, w, h, name in boxes
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def table(text: str, title: str) -> dict[str, dict[str, str]]:
    """One of the tables that were printed, by the first cell of its rows."""
    lines = text.split(title)[1].splitlines()[1:]
    header = lines[0].replace("count R2", "count_R2").replace("F1 3 um", "F1").split()
    rows = {}
    for line in lines[1:]:
        cells = line.split()
        if len(cells) != len(header):
            break
        rows[cells[0]] = dict(zip(header, cells, strict=True))
    return rows


def test_tables_of_a_folder(cli: Cli, folders: tuple[Path, Path], tmp_path: Path) -> None:
    truth, found = folders
    options = ("--group", tmp_path / "index.csv", "--group-by", "stain", "--mpp", 0.5)
    ended = cli("segmenter", "evaluate", "--truth", truth, "--predicted", found, *options)
    assert ended.code == 0, ended.err
    assert "3 images: 6 true objects, 6 found" in ended.out
    means, pooled = table(ended.out, "mean over images"), table(ended.out, "pooled")
    assert list(means) == list(pooled) == ["pink", "white", "all"]
    assert set(means["pink"].values()) == {"pink", "1", "1.000"}
    # b: squares of 10 px moved by 2 share 80 of 120 px, the bar of 20 px shares 180 of 220; c is left out.
    sq = (2 * 80 / 120 + 180 / 220) / 3
    assert means["white"]["SQ"] == pooled["white"]["SQ"] == f"{sq:.3f}"
    assert means["all"]["SQ"] == f"{(1 + sq) / 2:.3f}"
    assert pooled["all"]["PQ"] == f"{(3 + 3 * sq) / 6:.3f}"
    # Square 2 has two found objects to choose from; it shares 80 with its own: AJI (80 + 80 + 180) / (120 + 120 + 220).
    assert pooled["white"]["AJI"] == f"{340 / 460:.3f}"
    assert means["white"]["F1"] == "1.000"
    assert pooled["all"]["count_R2"] == "1.000"
    assert "left out there: Dice 1, AJI 1" in ended.out
    assert "[3/3] images" in ended.err


def test_protocols_one_by_one(cli: Cli, folders: tuple[Path, Path]) -> None:
    command = ("segmenter", "evaluate", "--truth", folders[0], "--predicted", folders[1])
    per_image, pooled = cli(*command, "--protocol", "per-image"), cli(*command, "--protocol", "pooled")
    assert "mean over images" in per_image.out
    assert "pooled" not in per_image.out
    assert "pooled" in pooled.out
    assert "mean over images" not in pooled.out


def test_the_document(cli: Cli, folders: tuple[Path, Path]) -> None:
    command = ("segmenter", "evaluate", "--truth", folders[0], "--predicted", folders[1], "--glands", "--json")
    ended = cli(*command)

    def refuse(token: str) -> None:
        raise AssertionError(token)

    document = json.loads(ended.out, parse_constant=refuse)
    assert document["n_images"] == 3
    assert document["all"]["per_image"]["pq"]["n"] == 2
    assert document["all"]["pooled"]["object_hausdorff"] == 1.0  # px: 0 on a, 2 on b, of equal area
    assert document["all"]["pooled"]["f1_distance"] is None
    assert [row["image"] for row in document["images"]] == ["a", "b", "c"]
    assert document["images"][2]["pq"] is None
    assert document["failed"] == {}


def test_rows_of_images(cli: Cli, folders: tuple[Path, Path], tmp_path: Path) -> None:
    truth, found = folders
    (found / "b.png").write_bytes(b"broken")
    out = tmp_path / "new" / "scores.csv"
    ended = cli("segmenter", "evaluate", "--truth", truth, "--predicted", found, "--out", out)
    assert ended.code == 1
    assert f"failed: b: {found / 'b.png'}: can't be read" in ended.out
    assert "2 images: 3 true objects" in ended.out
    with out.open(newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert [row["status"] for row in rows.values()] == ["done", "failed", "done"]
    assert (rows["a"]["pq"], rows["a"]["n_truth"], rows["c"]["pq"]) == ("1", "3", "")
    assert "can't be read" in rows["b"]["reason"]
    assert "f1_distance" not in rows["a"]


def test_when_all_images_fail(cli: Cli, folders: tuple[Path, Path]) -> None:
    truth, found = folders
    for name in "abc":
        (found / f"{name}.png").write_bytes(b"broken")
    ended = cli("segmenter", "evaluate", "--truth", truth, "--predicted", found)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.count("failed: ") == 3


def test_classes_of_drawings(cli: Cli, tmp_path: Path) -> None:
    truth = save_geojson(
        tmp_path / "t.geojson", [(0, 0, 8, 8, "Tumor"), (10, 0, 8, 8, "Stroma"), (0, 10, 8, 8, "Tumor")]
    )
    found = save_geojson(tmp_path / "f.geojson", [(0, 0, 8, 8, "Tumor"), (10, 0, 8, 8, "Tumor"), (4, 4, 8, 8, "Tumor")])
    command = ("segmenter", "evaluate", "--truth", truth, "--predicted", found, "--size", "20x20", "--mpp", "0.5")
    ended = cli(*command, "--classes", "all")
    assert ended.code == 0, ended.err
    rows = table(ended.out.replace("PQ by image", "PQ_by_image").replace("F1 of class", "F1_of_class"), "by class")
    # Tumor: one hit, two found too many, one missed: 1 / (1 + 1 + 0.5). Stroma was found, but as tumour.
    assert (rows["Tumor"]["truth"], rows["Tumor"]["found"], rows["Tumor"]["PQ"]) == ("2", "3", "0.400")
    assert rows["Stroma"]["PQ"] == "0.000"
    assert "mPQ (PanNuke: by image, classes absent from the truth left out): 0.200" in ended.out
    # No. 3 shares 4 x 4 px with the first and 2 x 4 px with the second.
    assert "24 px of 1 object (no. 3) are covered by an object that comes earlier" in ended.out
    some = cli(*command, "--classes", "Tumour", "--protocol", "pooled")
    assert "class 'Tumour': no object has it; did you mean 'Tumor'?" in some.out
    assert "mPQ+ (CoNIC: pooled): -" in some.out
    assert "PanNuke" not in some.out


def test_a_config_file(cli: Cli, folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text(f"truth: {folders[0]}\npredicted: {folders[1]}\nprotocol: pooled\nmpp: 0.5\nradius_um: 0.5\n")
    pooled = table(cli("segmenter", "evaluate", "--config", config).out.replace("F1 0.5 um", "F1"), "pooled")
    assert pooled["all"]["F1"] == "0.500"  # 2 px are 1 um: only a is found
    wider = cli("segmenter", "evaluate", "--config", config, "--radius-um", 1).out.replace("F1 1 um", "F1")
    assert table(wider, "pooled")["all"]["F1"] == "1.000"


def test_files_without_a_partner_are_passed_over_when_allowed(cli: Cli, folders: tuple[Path, Path]) -> None:
    truth, found = folders
    (found / "c.png").rename(found / "d.png")
    command = ("segmenter", "evaluate", "--truth", truth, "--predicted", found)
    refused = cli(*command)
    assert (refused.code, refused.out) == (2, "")
    assert "files without a partner: 1 in" in refused.err
    assert "--allow-missing" in refused.err
    passed = cli(*command, "--allow-missing")
    assert passed.code == 0
    assert "without a partner, passed over (truth): c.png" in passed.out
    assert "without a partner, passed over (predicted): d.png" in passed.out


def test_a_mask_that_was_not_called_one(cli: Cli, folders: tuple[Path, Path]) -> None:
    truth, found = folders
    for name in "abc":
        mask = (np.asarray(Image.open(truth / f"{name}.png")) > 0).astype(np.uint8) * 255
        Image.fromarray(mask).save(truth / f"{name}.png")
    ended = cli("segmenter", "evaluate", "--truth", truth, "--predicted", found)
    assert "a.png and 1 more file: one label in several pieces counts as one object" in ended.out
    labelled = cli("segmenter", "evaluate", "--truth", truth, "--predicted", found, "--components", "truth")
    assert "3 images: 4 true objects, 6 found" in labelled.out  # two squares that touch are one region
    assert "one label" not in labelled.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "truth is missing"),
        (["--truth", "TRUTH"], "give either predicted"),
        (["--truth", "TRUTH", "--images", "FOUND"], "give mpp"),
        (["--truth", "absent", "--predicted", "FOUND"], "absent: no such file or folder"),
        (["--truth", "TRUTH", "--predicted", "FOUND", "--mpp", "900"], "mpp"),
        (["--truth", "TRUTH", "--predicted", "FOUND", "--size", "big"], "write 'big' as WIDTHxHEIGHT"),
        (["--truth", "TRUTH", "--predicted", "FOUND", "--group", "INDEX"], "go together"),
        (
            ["--truth", "TRUTH", "--predicted", "FOUND", "--group", "INDEX", "--group-by", "stian"],
            "did you mean 'stain'",
        ),
        (["--truth", "TRUTH", "--predicted", "FOUND", "--protocol", "mean"], "--protocol"),
        (["--truth", "TRUTH", "--predicted", "FOUND", "--config", "absent.yaml"], "absent.yaml"),
        (["--truth", "TRUTH", "--predicted", "FOUND", "--out", "FOUND"], "is a folder; name a file"),
        (["--truth", "TRUTH/a.png", "--predicted", "SMALL"], "has 60 x 40 px, small.png has 5 x 5 px"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_clear_line(
    cli: Cli, folders: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    Image.fromarray(LABELS[:5, :5]).save(tmp_path / "small.png")
    places = {"TRUTH": folders[0], "TRUTH/a.png": folders[0] / "a.png", "FOUND": folders[1]}
    places |= {"INDEX": tmp_path / "index.csv", "SMALL": tmp_path / "small.png"}
    ended = cli("segmenter", "evaluate", *(places.get(argument, argument) for argument in arguments))
    assert ended.code == 2, ended
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""


def test_objects_found_on_images(cli: Cli, tmp_path: Path) -> None:
    """Dark discs on a pale ground are nuclei to the classical finder."""
    y, x = np.mgrid[:128, :128]
    labels = np.zeros((128, 128), np.uint8)
    for number, (x_px, y_px) in enumerate([(30, 30), (90, 40), (60, 95)], 1):
        labels[(x - x_px) ** 2 + (y - y_px) ** 2 <= 13**2] = number
    rgb = np.where(labels[..., None] > 0, (90, 60, 140), (235, 205, 225)).astype(np.uint8)
    (tmp_path / "labels").mkdir()
    (tmp_path / "images").mkdir()
    Image.fromarray(labels).save(tmp_path / "labels" / "a.png")
    Image.fromarray(rgb).save(tmp_path / "images" / "a.tif")
    command = ("segmenter", "evaluate", "--truth", tmp_path / "labels", "--images", tmp_path / "images", "--mpp", 0.25)
    ended = cli(*command, "--model", "classical", "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document["all"]["n_predicted"] == 3
    assert document["all"]["pooled"]["f1_distance"] == 1.0
    assert document["all"]["pooled"]["pq"] > 0.6


def test_help_shows_examples(cli: Cli) -> None:
    ended = cli("segmenter", "evaluate", "--help")
    assert ended.code == 0
    assert "pathopipe segmenter evaluate --truth labels/ --predicted found/" in ended.out
    assert "--allow-missing" in ended.out


@pytest.mark.shared_data
def test_stain_groups_of_real_nuclei(cli: Cli, shared_data: Path) -> None:
    folder = shared_data / "nuclei" / "dsb2018"
    options = ("--group", folder / "index.csv", "--group-by", "stain_group", "--protocol", "pooled")
    ended = cli("segmenter", "evaluate", "--truth", folder / "labels", "--predicted", folder / "labels", *options)
    rows = table(ended.out, "pooled")
    assert {name: row["truth"] for name, row in rows.items()} == {
        "lilac-large": "441",
        "lilac-small": "1265",
        "pink": "48",
        "white": "1184",
        "all": "2938",
    }
    assert {row["PQ"] for row in rows.values()} == {"1.000"}
