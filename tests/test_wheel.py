"""What is installed from a wheel works without the repository."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_runs_the_demo_in_an_empty_environment(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True
    )
    wheel = next(tmp_path.glob("pathopipe-*.whl"))
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, cwd=tmp_path)
    demo = subprocess.run(
        [tmp_path / "empty" / "bin" / "pathopipe", "demo", "--out", tmp_path / "demo"],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "1 of 1 slides done" in demo.stdout
    assert (tmp_path / "demo" / "thumbnails" / "drawn.png").exists()
