"""``segment`` with a network: every layer, who lies in which gland, tissue types by tile, what is said of weights."""

import csv
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
import tifffile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pathopipe.config import load_config
from pathopipe.errors import UsageError
from pathopipe.geometry import outlines_to_shapes
from pathopipe.pipeline import RunPlan, run_slide
from pathopipe.pipeline.segment import SegmentOutcome, fields_picture_path, segment_slide, tile_types_path
from pathopipe.records import SlideRef
from pathopipe.segmentation import learned
from pathopipe.segmentation.network import ClassSpec, NetworkSpec, SegmentationNetwork, TaskSpec
from pathopipe.store import SlideStore, store_path
from pathopipe.synth import SynthSpec, write_slide

CLASSES = {"nuclei": ("Round", "Long"), "glands": ("Gland",), "lumina": ("Lumen",), "tissue_types": ("Left", "Right")}
SIDE_PX = (1500, 800)
SPOT = np.hypot(*np.mgrid[-9:10, -9:10]) < 9


class PixelNetwork(SegmentationNetwork):
    """Says what the colours say, all the less so the nearer the window's edge is: red below 130 is a nucleus, green a
    gland, blue a lumen; tissue is of the type Right where more than half of a cell is blue."""

    def forward(self, rgb: Tensor) -> dict[str, Tensor]:
        red, green, blue = ((130 - rgb[:, channel].float()) / 60 for channel in range(3))
        deep = functional.avg_pool2d((red > 0).float()[:, None], 41, stride=1, padding=20)[:, 0]
        nothing = torch.full_like(red, -9)
        bluish = functional.avg_pool2d((rgb[:, 2:] < 255).float(), 32) - 0.5
        said = {
            "nuclei": torch.stack([red, deep * 6 - 3, green, -green], 1),
            "glands": torch.stack([green, nothing], 1),
            "lumina": blue[:, None],
            "tissue_types": torch.cat([-bluish, bluish], 1) * 9,
        }
        return {task.name: said[task.name] for task in self.spec.tasks}


def network_for(*tasks: str) -> PixelNetwork:
    torch.set_num_threads(1)
    specs = tuple(
        TaskSpec(
            name=task,
            classes=tuple(ClassSpec(name=name, color=(0, 200 - 90 * k, 90)) for k, name in enumerate(CLASSES[task])),
        )
        for task in tasks or CLASSES
    )
    return PixelNetwork(NetworkSpec(backbone="test_resnet", mpp=0.5, tasks=specs))


@functools.cache
def painted() -> tuple[NDArray[np.uint8], int, int]:
    """A slide in code, the number of its nuclei, and how many of these lie in its six glands."""
    rgb = np.full((SIDE_PX[1], SIDE_PX[0], 3), 255, np.uint8)
    rgb[:, 768:, 2] = 250  # the right half
    y, x = np.mgrid[: SIDE_PX[1], : SIDE_PX[0]]
    for cy in (180, 560):
        for cx in (250, 720, 1200):  # the middle ones lie across the border of windows
            distance = np.hypot(x - cx, y - cy)
            rgb[distance < 110, 1] = 20
            rgb[distance < 40, 2] = 20
    n_nuclei = n_inside = 0
    for cy in range(30, SIDE_PX[1] - 20, 48):
        for cx in range(30, SIDE_PX[0] - 20, 48):
            around = rgb[cy - 9 : cy + 10, cx - 9 : cx + 10]
            in_gland, in_lumen = (around[..., 1] < 128), (around[..., 2] < 128)
            if in_gland.any() != in_gland.all() or in_lumen.any():
                continue  # neither across a border nor in a lumen
            around[SPOT, 0] = 20
            n_nuclei += 1
            n_inside += int(rgb[cy, cx, 1] < 128)
    return rgb, n_nuclei, n_inside


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A painted slide at 0.5 um/px, a mask that calls all of it tissue, and a file for weights."""
    folder = tmp_path_factory.mktemp("painted")
    cm = 1e4 / 0.5
    tifffile.imwrite(
        folder / "s.tiff", painted()[0], tile=(256, 256), resolution=(cm, cm), resolutionunit=3, photometric="rgb"
    )
    cv2.imwrite(str(folder / "mask.png"), np.ones((80, 150), np.uint8))
    (folder / "weights.safetensors").write_bytes(b"of the painted slide")
    return folder


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "load_network", lambda path: network_for())


def plan_for(folder: Path, out: Path, *settings: str) -> RunPlan:
    given = (f"tissue.mask={folder / 'mask.png'}", f"segment.weights={folder / 'weights.safetensors'}")
    device = ("segment.device=cpu", "segment.precision=fp32")
    return RunPlan(out=out, config=load_config(None, (*given, *device, *settings)), threads=1)


def segmented(folder: Path, out: Path, *settings: str) -> SegmentOutcome:
    return segment_slide(SlideRef("s", folder / "s.tiff"), plan_for(folder, out, *settings))


def content(out: Path) -> dict[str, list[bytes]]:
    store, layers = SlideStore.open(store_path(out, "s")), {}
    for layer in store.layers():
        table = store.objects(layer).read()
        if layer == "tissue_types":
            continue  # where two cells touch at a corner alone, see the test of region sizes
        columns = [table.centroid_l0, table.class_id, table.measurements, table.id, table.parent, *table.outlines]
        # That of large objects is the mean over their parts in the regions, each seen with its halo.
        columns += [table.class_probability] if layer == "nuclei" else [np.round(table.class_probability, 1)]
        layers[layer] = [column.tobytes() for column in columns]
    return layers


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SegmentOutcome]:
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned, "load_network", lambda path: network_for())
        run_slide(SlideRef("s", folder / "s.tiff"), plan_for(folder, out, "tiles.min_tissue=0"))
        outcome = segmented(folder, out, "segment.region_px=100000")
    return out, outcome


def test_all_layers_are_found(whole: tuple[Path, SegmentOutcome]) -> None:
    out, outcome = whole
    _, n_nuclei, n_inside = painted()
    assert outcome.objects == {"nuclei": n_nuclei, "glands": 6, "lumina": 6, "tissue_types": 2}
    store = SlideStore.open(store_path(out, "s"))
    nuclei, glands, lumina = (store.objects(layer).read() for layer in ("nuclei", "glands", "lumina"))
    assert (nuclei.parent >= 0).sum() == n_inside > 20
    assert sorted(lumina.parent.tolist()) == [0, 1, 2, 3, 4, 5]
    counts = glands.measurements[:, glands.measurement_names.index("Nucleus count")]
    assert counts.tolist() == np.bincount(nuclei.parent[nuclei.parent >= 0], minlength=6).tolist()
    assert ((nuclei.class_id == 0) == (nuclei.parent >= 0)).all()  # classes follow the green channel
    area_um2 = glands.measurements[:, glands.measurement_names.index("Area µm^2")]
    assert area_um2 == pytest.approx(np.pi * 110**2 * 0.25, rel=0.01)
    attributes = store.objects("glands").attributes
    assert attributes["inputs"]["model"]["name"] == "network"
    assert (attributes["device"], attributes["weights_file"]) == ("cpu", "weights.safetensors")


def test_region_size_changes_no_byte(
    folder: Path, whole: tuple[Path, SegmentOutcome], tmp_path: Path, loaded: None
) -> None:
    outcome = segmented(folder, tmp_path, "segment.region_px=256")
    assert outcome.report.regions == 6  # regions are whole windows
    assert content(tmp_path) == content(whole[0])
    # A bay that is closed by a corner alone is a hole or none, as the cut falls.
    areas = [
        outlines_to_shapes(SlideStore.open(store_path(out, "s")).objects("tissue_types").read().outlines)
        for out in (tmp_path, whole[0])
    ]
    shared, either = (shapely.area(join(*areas)) for join in (shapely.intersection, shapely.union))
    assert (shared / either > 0.999).all()


def test_glands_that_come_later_know_their_nuclei(
    folder: Path, whole: tuple[Path, SegmentOutcome], tmp_path: Path, loaded: None
) -> None:
    first = segmented(folder, tmp_path, "segment.tasks=nuclei")
    assert first.did == ("nuclei",)
    assert (SlideStore.open(store_path(tmp_path, "s")).objects("nuclei").column("parent") == -1).all()
    second = segmented(folder, tmp_path, "segment.tasks=glands,lumina")
    assert second.did == ("glands", "lumina")
    third = segmented(folder, tmp_path)
    assert third.did == ("tissue_types",)
    assert content(tmp_path) == content(whole[0])


def test_tissue_types_by_tile(whole: tuple[Path, SegmentOutcome]) -> None:
    out, outcome = whole
    path = tile_types_path(out, "s", "256px-0.5um")
    assert outcome.tables == (path,)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    grid = SlideStore.open(store_path(out, "s")).read_grid("256px-0.5um")
    assert [(int(row["x_l0"]), int(row["y_l0"])) for row in rows] == [tuple(xy) for xy in grid.xy_l0.tolist()]
    assert len(rows) == 6 * 4
    for row in rows:
        # Right begins at 768, at the border of tiles and of cells, and takes in a piece of the lumina beside it.
        assert row["tissue_type"] == ("Left" if int(row["x_l0"]) < 768 else "Right"), row
        width, height = min(SIDE_PX[0] - int(row["x_l0"]), 256), min(SIDE_PX[1] - int(row["y_l0"]), 256)
        assert float(row["share"]) == pytest.approx(width * height / 256**2, abs=0.1), row
        assert float(row["share"]) == float(row[row["tissue_type"]])


def test_fields_are_drawn_with_a_legend(whole: tuple[Path, SegmentOutcome]) -> None:
    picture = cv2.imread(str(fields_picture_path(whole[0], "s")))[..., ::-1]
    assert picture.shape[1] > 1600
    for color in ((0, 200, 90), (0, 110, 90)):
        assert (np.abs(picture.astype(int) - color).sum(axis=-1) < 12).sum() > 100


def test_shipped_weights_are_called_a_starting_point(
    folder: Path, tmp_path: Path, loaded: None, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    monkeypatch.setattr(learned, "default_weights", lambda: folder / "weights.safetensors")
    command = ("segment", folder / "s.tiff", "--out", tmp_path, "--model", "network", "--tasks", "nuclei")
    settings = ("--set", f"tissue.mask={folder / 'mask.png'}", "--device", "cpu", "--no-geojson")
    first = cli(*command, *settings)
    assert first.code == 0, first.err
    assert first.out.count("the shipped weights are a starting point") == 1
    assert "segmenter train" in first.out
    assert "starting point" not in cli(*command, *settings).out  # said once, when they are used
    own = cli("segment", folder / "s.tiff", "--out", tmp_path, "--weights", folder / "weights.safetensors", *settings)
    assert "starting point" not in own.out


def test_dark_field_slides_fall_to_the_classical_finder_and_it_says_so(
    tmp_path: Path, loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"any")
    monkeypatch.setattr(learned, "default_weights", lambda: weights)
    spec = SynthSpec(width_px=1200, height_px=1000, mpp=0.25, seed=2, dark_field=True, pen=False, dust=False)
    write_slide(tmp_path / "dark.tiff", spec)
    ref = SlideRef("dark", tmp_path / "dark.tiff")

    def run(*settings: str) -> SegmentOutcome:
        return segment_slide(ref, RunPlan(out=tmp_path / "out", config=load_config(None, settings), threads=1))

    outcome = run("segment.model=network")
    assert "dark-field" in outcome.flags
    assert list(outcome.objects) == ["nuclei"]
    assert outcome.objects["nuclei"] > 20
    assert any("dark-field" in note and "'classical'" in note for note in outcome.notes)
    with pytest.raises(UsageError, match="'classical' does not find 'glands'"):
        run("segment.model=network", "segment.tasks=glands")


def test_wrong_weights_and_tasks_are_one_clear_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    command = ("segment", folder / "s.tiff", "--out", tmp_path)
    for options, message in (
        (("--weights", folder / "none.safetensors"), "none.safetensors"),
        (("--weights", folder / "weights.safetensors"), "weights.safetensors"),  # bytes that are no safetensors
        (("--weights", folder / "weights.safetensors", "--model", "classical"), "weights are those of the model"),
        (("--model", "cellpose"), "segment.model"),
    ):
        result = cli(*command, *options)
        assert result.code == 2
        assert message in result.err
        assert "Traceback" not in result.err
        assert len(result.err.strip().splitlines()) == 1
    monkeypatch.setattr(learned, "load_network", lambda path: network_for("nuclei", "tissue_types"))
    result = cli(*command, "--weights", folder / "weights.safetensors", "--tasks", "nuclei,glands")
    assert result.code == 2
    assert "does not find 'glands'; it finds nuclei, tissue_types and cells" in result.err
    assert not store_path(tmp_path, "s").exists()


def test_the_classical_model_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathopipe.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    options = ["segment", str(folder / "s.tiff"), "--out", str(tmp_path), "--model", "classical", "--no-geojson"]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
