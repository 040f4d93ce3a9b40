"""The house: imports run down, heavy libraries have few homes, private data stays out."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pathopipe"

FLOORS = (
    ("errors", "registry"),
    ("remote",),
    ("files",),
    ("geometry", "config", "stain", "geojson"),
    ("records",),
    ("store", "layouts", "cohort", "slide"),
    ("synth", "tissue", "tiles"),
    ("embeddings", "mil"),
    ("segmentation", "metadata"),
    ("export", "privacy", "report"),
    ("pipeline",),
    ("cluster",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

HOMES = {
    "openslide": {"slide/openslide.py", "cli/doctor.py"},
    "zarr": {"store/"},
    "timm": {"embeddings/", "segmentation/network.py"},
    "torch": {
        "embeddings/",
        "layouts/",
        "mil/",
        "metadata/",
        "segmentation/",
        "cli/doctor.py",
    },
    "distributed": {"cluster/"},
    "dask": {"cluster/", "tiles/lazy.py"},
    "h5py": {"layouts/", "export/tables.py", "privacy/"},
    "sklearn": {"mil/", "metadata/", "report/"},
    "transformers": {"embeddings/", "metadata/"},
    "matplotlib": {"report/"},
    "pyarrow": {"export/tables.py", "privacy/"},
    "anndata": {"export/tables.py"},
    "huggingface_hub": {"embeddings/"},
    "open_clip": {"embeddings/"},
    "openvino": {"embeddings/openvino.py"},
    "obstore": {"remote/", "store/"},
}


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found |= {node.module or ""}
    return frozenset(found)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))
ARROWS = sorted(
    {
        (room_of(path), name.split(".")[1])
        for path in FILES
        for name in imports(path)
        if name.startswith("pathopipe.") and room_of(path) != "__init__"
    }
)


@pytest.mark.parametrize(("room", "below"), [(a, b) for a, b in ARROWS if a != b])
def test_imports_run_down(room: str, below: str) -> None:
    assert FLOOR[below] < FLOOR[room], f"{room} must not import {below}"


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("library", sorted(HOMES))
def test_heavy_libraries_have_few_homes(library: str) -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(name.split(".")[0] == library for name in imports(path))
    }
    rooms = tuple(home for home in HOMES[library] if home.endswith("/"))
    assert {user for user in users if not user.startswith(rooms)} <= HOMES[library]


def test_only_the_command_line_prints_or_exits() -> None:
    for path in FILES:
        if room_of(path) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"print", "sys.exit", "exit", "quit"}, path


def test_every_file_says_what_it_is_for() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_label_and_macro_images_are_never_opened() -> None:
    assert not [path for path in FILES if "associated_images" in path.read_text(encoding="utf-8")]


def test_import_stays_light() -> None:
    code = "import sys, pathopipe; sys.exit(any(m in sys.modules for m in ('torch', 'zarr', 'openslide', 'cv2')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_handcrafted_needs_no_torch() -> None:
    code = "import sys, pathopipe.pipeline, pathopipe.cluster; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_command_line_imports_nothing_heavy_for_help() -> None:
    code = (
        "import sys, pathopipe.cli.app; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'zarr', 'openslide', 'cv2', 'dask', 'scipy', 'shapely')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
