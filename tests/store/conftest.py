"""The two kinds of places that results go to: a folder on a disk and one in a bucket."""

import uuid
from pathlib import Path

import pytest

from pathopipe.remote import location


@pytest.fixture(params=["disk", "bucket"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An empty output folder; the bucket is in memory."""
    return tmp_path if request.param == "disk" else location(f"memory://{uuid.uuid4().hex}/study")
