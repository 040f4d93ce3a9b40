"""``pathopipe import features`` as a user types it, and what verify, run, mil and export make of such stores."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pathopipe.store import SlideStore, store_path
from pathopipe.synth import SynthSpec, write_slide

Cli = Callable[..., Any]
XY = np.stack([np.arange(30) % 8 * 128, np.arange(30) // 8 * 128], axis=1)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small drawn slides of 1,100 x 700 px at 0.5 um/px."""
    folder = tmp_path_factory.mktemp("slides")
    for number, name in enumerate("ab"):
        write_slide(folder / f"{name}.tiff", SynthSpec(width_px=1100, height_px=700, mpp=0.5, seed=number))
    return folder


def values(seed: int, features: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((30, features)).astype(np.float32)


def put(root: Path, slide_id: str, numbers: np.ndarray, *, encoder: str = "enc", **stated: Any) -> Path:
    """One slide as TRIDENT leaves it."""
    path = root / f"features_{encoder}" / f"{slide_id}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = numbers
        file["coords"] = XY[: len(numbers)]
        file["coords"].attrs.update({"patch_size": 128, "patch_size_level0": 128, "target_magnification": 20, **stated})
    return path


@pytest.fixture
def trident(tmp_path: Path) -> Path:
    for number, name in enumerate("ab"):
        put(tmp_path / "trident", name, values(number))
    return tmp_path / "trident"


def test_a_folder_with_its_slides(cli: Cli, trident: Path, slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = cli("import", "features", trident, "--slides", slides, "--out", out)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [f"{name}: 30 tiles of enc (6 numbers) on 128px-0.5um imported" for name in "ab"]
    verified = cli("verify", out)
    assert (verified.code, verified.out) == (0, "a: sound\nb: sound\n")
    again = cli("import", "features", trident, "--slides", slides, "--out", out)
    assert (again.code, again.out.count("already there")) == (0, 2)
    assert SlideStore.open(store_path(out, "a")).slide["dims_l0"] == [1100, 700]


def test_a_manifest_states_slides_and_resolution(cli: Cli, trident: Path, slides: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "cohort.csv"
    with manifest.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["slide_id", "path", "mpp"])
        rows.writerows([[name, slides / f"{name}.tiff", "0.48"] for name in "ab"])
    ended = cli("import", "features", trident, "--manifest", manifest, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    slide = SlideStore.open(store_path(tmp_path / "out", "b")).slide
    assert (slide["mpp"], slide["mpp_evidence"][0]["source"]) == ([0.48, 0.48], "manifest")


def test_single_files_and_a_single_slide(cli: Cli, trident: Path, slides: Path, tmp_path: Path) -> None:
    file = trident / "features_enc" / "a.h5"
    ended = cli("import", "features", file, "--slide", slides / "a.tiff", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert SlideStore.open(store_path(tmp_path / "out", "a")).slide["dims_l0"] == [1100, 700]
    two = cli("import", "features", trident, "--slide", slides / "a.tiff", "--out", tmp_path / "o2")
    assert (two.code, "--slide is the file of one slide, but there are 2" in two.err) == (2, True)


def test_one_slide_that_fails_stops_no_other(cli: Cli, trident: Path, slides: Path, tmp_path: Path) -> None:
    put(trident, "c", values(3))
    put(trident, "b", values(1), level0_width=5000, level0_height=5000)
    ended = cli("import", "features", trident, "--slides", slides, "--out", tmp_path / "out")
    assert ended.code == 1
    assert ended.out == "a: 30 tiles of enc (6 numbers) on 128px-0.5um imported\n"
    assert "failed: b: " in ended.err
    assert "made from a slide of 5000 x 5000 px" in ended.err
    assert f"failed: c: c: no slide of that name in {slides}" in ended.err
    assert ended.err.endswith("2 of 3 slides failed\n")
    assert not store_path(tmp_path / "out", "b").exists()


def test_two_encoders(cli: Cli, trident: Path, slides: Path, tmp_path: Path) -> None:
    put(trident, "a", values(5, 9), encoder="other")
    ambiguous = cli("import", "features", trident, "--mpp", "0.5", "--out", tmp_path / "out")
    assert ambiguous.code == 2
    assert "features in several folders (features_enc, features_other); choose one with --encoder" in ambiguous.err
    for name in ("enc", "other"):
        ended = cli("import", "features", trident, "--encoder", name, "--mpp", "0.5", "--out", tmp_path / "out")
        assert ended.code == 0, ended.err
    store = SlideStore.open(store_path(tmp_path / "out", "a"))
    assert store.encoders("128px-0.5um") == ["enc", "other"]
    assert np.array_equal(store.embeddings("128px-0.5um", "other").read_values(), values(5, 9))


def test_what_is_odd_is_told(cli: Cli, tmp_path: Path) -> None:
    numbers = values(0)
    numbers[3, 0] = np.nan
    path = put(tmp_path, "a", numbers)
    with h5py.File(path, "r+") as file:
        file["coords"][9] = file["coords"][8]
    ended = cli("import", "features", path, "--mpp", "0.5", "--encoder", "mine", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert ended.err.splitlines() == [
        "note: a: 1 of 30 tiles lie exactly on another one; they are kept, and count twice",
        "note: a: the file says enc; stored as mine",
        "note: a: 1 row holds numbers that can't be stored, and are quarantined",
    ]


def test_an_empty_slide_takes_its_width_from_the_others(cli: Cli, trident: Path, tmp_path: Path) -> None:
    put(trident, "empty", np.zeros((0,), np.float32))
    ended = cli("import", "features", trident, "--mpp", "0.5", "--out", tmp_path / "out")
    assert (ended.code, "empty: 0 tiles of enc (6 numbers) on 128px-0.5um imported" in ended.out) == (0, True)
    assert cli("verify", tmp_path / "out").code == 0
    exported = cli("export", "h5", tmp_path / "out", "--layout", "trident", "--out", tmp_path / "x")
    assert (exported.code, "empty.h5: 0 tiles of enc" in exported.out) == (0, True)


def test_run_does_not_mix(cli: Cli, trident: Path, slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cli("import", "features", trident, "--slides", slides, "--out", out)
    settings = ("--set", "tiles.side_px=128", "--set", "tiles.min_tissue=0.1")
    ended = cli("run", slides / "a.tiff", "--out", out, *settings)
    assert ended.code == 1
    assert "tiles/128px-0.5um holds tiles of features that were imported; 'pathopipe run --fresh tiles'" in ended.err
    other = cli("run", slides / "a.tiff", "--out", out, "--set", "tiles.side_px=64", "--set", "tiles.min_tissue=0.1")
    assert other.code == 0, other.err
    assert SlideStore.open(store_path(out, "a")).grids() == ["128px-0.5um", "64px-0.5um"]
    assert cli("verify", out).code == 0


def test_features_on_computed_tiles(cli: Cli, slides: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", ("--set", "tiles.side_px=128", "--set", "tiles.min_tissue=0.1")
    assert cli("run", slides / "a.tiff", "--out", out, *settings).code == 0
    assert cli("export", "pt", out, "--out", tmp_path / "clam").code == 0
    back = cli("import", "features", tmp_path / "clam", "--encoder", "mine", "--out", out)
    assert back.code == 0, back.err
    store = SlideStore.open(store_path(out, "a"))
    own, imported = (store.embeddings("128px-0.5um", name).read_values() for name in ("handcrafted", "mine"))
    assert np.array_equal(own, imported)
    taken = cli("import", "features", tmp_path / "clam", "--encoder", "handcrafted", "--out", out)
    assert (taken.code, "computed by 'pathopipe run'; --replace puts these in their place" in taken.err) == (2, True)


@pytest.mark.slow
def test_train_predict_and_show_imported_features(cli: Cli, slides: Path, tmp_path: Path) -> None:
    """A model is trained on what another program computed, and its maps are drawn on the slide."""
    rows = [["slide_id", "path", "outcome"]]
    for number in range(8):
        name, label = f"s{number:02}", number % 2
        (tmp_path / "wsi").mkdir(exist_ok=True)
        (tmp_path / "wsi" / f"{name}.tiff").symlink_to(slides / "a.tiff")
        put(tmp_path / "trident", name, values(number) + 3 * label)
        rows.append([name, f"wsi/{name}.tiff", ("normal", "tumour")[label]])
    manifest = tmp_path / "cohort.csv"
    manifest.write_text("\n".join(",".join(row) for row in rows))
    out, training = tmp_path / "out", tmp_path / "training"
    ended = cli("import", "features", tmp_path / "trident", "--slides", tmp_path / "wsi", "--out", out)
    assert ended.code == 0, ended.err
    torch.set_num_threads(1)
    settings = ["--folds", "2", "--head", "abmil"]
    settings += [f"--set=mil.{quick}" for quick in ("epochs=2", "members=1", "draws=100", "intervals=100", "hidden=8")]
    trained = cli(
        "mil", "train", "--manifest", manifest, "--features", out, "--target", "outcome", "--out", training, *settings
    )
    assert trained.code == 0, trained.err
    shown = cli(
        *("mil", "heatmap", "--model", training / "enc" / "abmil", "--features", out, "--manifest", manifest),
        *("--slide-id", "s03", "--out", tmp_path / "maps"),
    )
    assert shown.code == 0, shown.err
    document = json.loads((tmp_path / "maps" / "s03" / "s03.json").read_text())
    assert (document["encoder"].partition("@")[0], document["tiles"]) == ("enc", 30)
    assert (tmp_path / "maps" / "s03" / "s03.extremes.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TRIDENT"], "Missing option '--out'"),
        (["TRIDENT/nothing", "--out", "OUT"], "no feature file by its ending"),
        (["EMPTY", "--out", "OUT"], "no features here"),
        (["TRIDENT", "TRIDENT/features_enc/a.h5", "--out", "OUT"], "one slide id twice; import one of them"),
        (["TRIDENT", "--out", "OUT", "--slides", "EMPTY"], "no slides here"),
        (["TRIDENT", "--out", "OUT", "--slides", "EMPTY", "--slide", "a"], "say the same thing; give one of them"),
        (["TRIDENT", "--out", "OUT", "--tile-um", "-3"], "--tile-um -3: give micrometres above 0"),
        (["TRIDENT/features_enc/a.h5", "--out", "OUT"], "micrometres per pixel of slide a are not known"),
        (["TRIDENT", "--out", "OUT", "--mpp", "0.5", "--encoder", "handcrafted"], "gives 198; give these features"),
        (["WIDTHS", "--out", "OUT", "--mpp", "0.5"], "differ in their number of features (6 in a.h5, 9 in b.h5)"),
    ],
)
def test_wrong_use_is_told(cli: Cli, trident: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path / "widths", "a", values(0))
    put(tmp_path / "widths", "b", values(0, 9))
    for word, path in (("TRIDENT", trident), ("OUT", "new"), ("EMPTY", "empty"), ("WIDTHS", "widths")):
        arguments = [each.replace(word, str(tmp_path / path)) for each in arguments]
    ended = cli("import", "features", *arguments)
    assert (ended.code, message in " ".join(ended.err.split())) == (2, True), ended.err
    assert not (tmp_path / "new").exists()


def test_stores_need_no_import(cli: Cli, trident: Path, tmp_path: Path) -> None:
    cli("import", "features", trident, "--mpp", "0.5", "--out", tmp_path / "out")
    ended = cli("import", "features", tmp_path / "out", "--out", tmp_path / "o2")
    assert (ended.code, "holds stores of pathopipe, which need no import" in ended.err) == (2, True)
