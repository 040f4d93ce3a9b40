"""``mil evaluate``, ``predict`` and ``heatmap`` on a drawn slide and models with drawn weights."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from pathopipe.cohort import LabelTable
from pathopipe.config import load_config
from pathopipe.geojson import read_features
from pathopipe.mil.bags import open_bags
from pathopipe.mil.heads import HeadShape, build_head
from pathopipe.mil.model import MilModel, ModelCard
from pathopipe.mil.targets import TargetSpec
from pathopipe.pipeline import RunPlan, run_slide
from pathopipe.records import SlideRef
from pathopipe.report.mil_pictures import read_picture
from pathopipe.store import SlideStore, store_path

torch.set_num_threads(1)

TARGET = TargetSpec(name="outcome", kind="binary", columns=("outcome",), classes=("normal", "tumour"))
ROWS = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, drawn_slide: Path) -> Path:
    """The stores of one drawn slide under four ids."""
    out = tmp_path_factory.mktemp("results")
    run_slide(SlideRef(ROWS[0], drawn_slide), RunPlan(out=out, config=load_config(None, ["tiles.min_tissue=0.3"])))
    for name in ROWS[1:]:
        copy = shutil.copytree(store_path(out, ROWS[0]), store_path(out, name))
        metadata = json.loads((copy / "zarr.json").read_text())
        metadata["attributes"]["pathopipe"]["slide"]["id"] = name
        (copy / "zarr.json").write_text(json.dumps(metadata))
        shutil.copy(out / "thumbnails" / f"{ROWS[0]}.png", out / "thumbnails" / f"{name}.png")
    return out


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, results: Path) -> Path:
    return save_training(tmp_path_factory.mktemp("training"), results, "additive")


def save_training(root: Path, results: Path, head: str) -> Path:
    """Two folds; a and b were tested by fold 0, c by fold 1, d is new."""
    one = open_bags(results, LabelTable.of_slides(["a"]))[0]
    shape = HeadShape(features=one.features, outputs=1, hidden=8, attention=4)
    splits = [["bag_id", "patient_id", "site", "fold", "part"]]
    for fold in range(2):
        torch.manual_seed(fold)
        network = build_head(head, shape)
        with torch.no_grad():
            for weights in network.parameters():
                weights += 0.3 * torch.randn_like(weights)
        tiles = torch.from_numpy(one.read())
        network.standardise(tiles.mean(dim=0), tiles.std(dim=0))
        card = ModelCard(
            head=head,
            shape=shape,
            targets=(TARGET,),
            encoder=one.encoder,
            encoder_id=one.encoder_id,
            temperatures=(1.0,),
        )
        folder = root / "handcrafted" / head / f"fold{fold}"
        MilModel(card, [network]).save(folder)
        for name in ROWS[:3]:
            part = "test" if (name == "c") == bool(fold) else "train"
            splits.append([name, f"p{name}", "", str(fold), part])
        rng = np.random.default_rng(fold)
        table = [
            [
                "bag_id",
                "patient_id",
                "site",
                "part",
                "outcome",
                "outcome_logit_0",
                "outcome_p_normal",
                "outcome_p_tumour",
            ]
        ]
        for number in range(40):
            label = int(rng.random() < 0.5)
            p = float(1 / (1 + np.exp(-(rng.normal() + 2 * label - 1))))
            name = f"{fold}-{number}"
            site = "north" if number % 2 else "south"
            table.append(
                [name, name, site, "val" if number < 15 else "test", TARGET.classes[label], "0", str(1 - p), str(p)]
            )
        with (folder / "predictions.csv").open("w", newline="") as file:
            csv.writer(file).writerows(table)
    with (root / "splits.csv").open("w", newline="") as file:
        csv.writer(file).writerows(splits)
    (root / "config.json").write_text(json.dumps({"by": "slide"}))
    return root


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, drawn_slide: Path) -> Path:
    path = tmp_path_factory.mktemp("manifest") / "cohort.csv"
    rows = [f"{name},{drawn_slide},p{name},{label}" for name, label in zip(ROWS, ("normal", "tumour") * 2, strict=True)]
    path.write_text("slide_id,path,patient_id,outcome\n" + "\n".join(rows) + "\n")
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- evaluate


def test_evaluate_makes_figures_from_the_test_folds(cli, training: Path, tmp_path: Path) -> None:
    result = cli("mil", "evaluate", "--model", training, "--out", tmp_path, "--draws", 100, "--svg")
    assert result.code == 0, result.err
    rows = {(row["figure"], row["label"], row["site"]): row for row in read_csv(tmp_path / "figures.csv")}
    main = rows["auroc", "", ""]
    assert main["model"] == "handcrafted/additive"
    assert main["patients"] == "50"
    assert 0.7 < float(main["low"]) < float(main["value"]) < float(main["high"]) <= 1
    assert ("auroc", "", "north") in rows
    assert ("auroc_within_folds", "", "") in rows
    assert f"{float(main['value']):.3f}" in result.out
    assert "from validation" in result.out
    plots = {path.name for path in (tmp_path / "plots" / "handcrafted" / "additive" / "outcome").iterdir()}
    assert {"roc.png", "precision-recall.png", "calibration.png", "confusion.png", "sites.png", "roc.svg"} <= plots
    document = json.loads((tmp_path / "figures.json").read_text())
    assert len(document["figures"]) == len(rows)


def test_evaluate_on_another_cohort(cli, training: Path, results: Path, manifest: Path, tmp_path: Path) -> None:
    cohort = tmp_path / "cohort.csv"
    cohort.write_text(manifest.read_text().replace(",pd,", ",new,"))
    result = cli(
        *("mil", "evaluate", "--model", training, "--out", tmp_path, "--draws", 50),
        *("--manifest", cohort, "--features", results, "--faithfulness"),
    )
    assert result.code == 0, result.err
    assert "without as many at random" in result.out
    assert {row["seen"] for row in read_csv(tmp_path / "predictions.csv")} == {"test", "new"}
    assert "auroc_without_top" in json.loads((tmp_path / "figures.json").read_text())["faithfulness"]


# ---- predict


def test_predict_goes_into_tables_and_stores(
    cli, training: Path, results: Path, manifest: Path, tmp_path: Path
) -> None:
    result = cli(
        "mil", "predict", "--model", training, "--features", results, "--manifest", manifest, "--out", tmp_path
    )
    assert result.code == 0, result.err
    rows = {row["bag_id"]: row for row in read_csv(tmp_path / "predictions.csv")}
    assert {name: row["folds"] for name, row in rows.items()} == {
        "a": "fold0",
        "b": "fold0",
        "c": "fold1",
        "d": "fold0 fold1",
    }
    # The slides are one and the same: d is the mean of what the folds say of it.
    p = {name: float(row["outcome_p_tumour"]) for name, row in rows.items()}
    assert p["a"] == p["b"]
    assert p["d"] == pytest.approx((p["a"] + p["c"]) / 2, abs=1e-5)
    assert rows["d"]["seen"] == "new"
    assert rows["a"]["outcome"] == "normal"
    store = SlideStore.open(store_path(results, "c"))
    found = store.predictions("outcome.additive.handcrafted")
    assert found.attention is not None
    assert found.attention.shape == (len(store.read_grid(found.grid)), 2)
    # Without a manifest the cohort's slides are known by their ids all the same.
    again = cli("mil", "predict", "--model", training, "--features", results, "--no-store", "--out", tmp_path / "x")
    assert again.code == 0, again.err
    assert {row["bag_id"]: row["seen"] for row in read_csv(tmp_path / "x" / "predictions.csv")} == {
        **dict.fromkeys("abc", "test"),
        "d": "new",
    }


# ---- heatmap


def test_heatmap_writes_what_it_says(cli, training: Path, results: Path, manifest: Path, tmp_path: Path) -> None:
    result = cli(
        *("mil", "heatmap", "--model", training, "--features", results, "--manifest", manifest),
        *("--slide-id", "c", "--out", tmp_path, "--tiles", 3),
    )
    assert result.code == 0, result.err
    folder = tmp_path / "c"
    assert {path.name for path in folder.iterdir()} == {
        "c.attention.png",
        "c.attention.ome.tiff",
        "c.contribution-tumour.png",
        "c.contribution-tumour.ome.tiff",
        "c.maps.ome.tiff",
        "c.tiles.geojson",
        "c.extremes.png",
        "c.json",
    }
    document = json.loads((folder / "c.json").read_text())
    assert document["seen"] == "test"
    assert document["folds"] == ["fold1"]
    assert "without as many at random" in result.out
    measured = document["faithfulness"][0]
    assert len(measured["without_top"]) == len(measured["shares"]) > 2
    store = SlideStore.open(store_path(results, "c"))
    grid = store.read_grid(store.grids()[0])
    features = list(read_features(folder / "c.tiles.geojson"))
    assert len(features) == len(grid)
    assert set(features[0].measurements) == {"Attention", "Attention rank", "Contribution: tumour"}
    found = store.predictions("outcome.additive.handcrafted").attention
    assert found is not None
    ranks = np.array([one.measurements["Attention rank"] for one in features])
    assert np.argmax(ranks) == np.argmax(found[:, 0])
    with tifffile.TiffFile(folder / "c.maps.ome.tiff") as file:
        assert file.is_ome
        total = file.asarray()[0].sum()
    assert total == pytest.approx(1, abs=1e-3)  # no tile is lost or twice on the raster
    assert read_picture(folder / "c.attention.png") is not None


def test_heatmap_without_the_slide_and_without_attention(cli, results: Path, tmp_path: Path) -> None:
    """The mean head weighs all tiles alike: contributions are drawn, over the thumbnail of the run."""
    model = save_training(tmp_path, results, "mean")
    result = cli("mil", "heatmap", "--model", model, "--features", results, "--slide-id", "d", "--out", tmp_path)
    assert result.code == 0, result.err
    assert {path.name for path in (tmp_path / "d").iterdir()} == {
        "d.contribution-tumour.png",
        "d.contribution-tumour.ome.tiff",
        "d.maps.ome.tiff",
        "d.tiles.geojson",
        "d.json",
    }
    assert "attention is the same on all tiles and is not drawn" in result.out
    assert "give --slide FILE" in result.out
    assert json.loads((tmp_path / "d" / "d.json").read_text())["seen"] == "new"


# ---- wrong use


def test_wrong_use_is_one_line(cli, training: Path, results: Path, manifest: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("evaluate", "--model", tmp_path), "no trained model"),
        (("evaluate", "--model", training, "--manifest", manifest), "belong together"),
        (("evaluate", "--model", training, "--faithfulness"), "give --manifest and --features"),
        (("predict", "--model", training, "--features", tmp_path / "none"), "no such folder"),
        (("heatmap", "--model", training, "--features", results, "--slide-id", "e"), "no slide 'e'"),
        (
            (
                "heatmap",
                "--model",
                training,
                "--features",
                results,
                "--slide-id",
                "a",
                "--slide",
                tmp_path / "none.svs",
            ),
            "no such file",
        ),
        (
            (
                "heatmap",
                "--model",
                training,
                "--features",
                results,
                "--slide-id",
                "a",
                "--slide-id",
                "b",
                "--slide",
                manifest,
            ),
            "file of one slide",
        ),
    ):
        result = cli("mil", *arguments, "--out", tmp_path / "out")
        assert result.code == 2, (arguments, result.err)
        assert message in result.err
        assert result.err.count("\n") == 1


def test_another_slide_s_file_is_refused(cli, training: Path, results: Path, tmp_path: Path, drawn_slide: Path) -> None:
    other = tmp_path / "other.tiff"
    data = bytearray(drawn_slide.read_bytes())
    data[2000:2100] = bytes(100)
    other.write_bytes(data)
    result = cli(
        *("mil", "heatmap", "--model", training, "--features", results, "--slide-id", "d"),
        *("--slide", other, "--out", tmp_path),
    )
    assert result.code == 2
    assert "not the slide that the store of d was made from" in result.err


def test_help_shows_examples(cli) -> None:
    for name in ("evaluate", "predict", "heatmap"):
        result = cli("mil", name, "--help")
        assert result.code == 0
        assert f"pathopipe mil {name} --model training" in result.out
