"""Settings are strict, and a wrong one names the right one."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from pathopipe.config import Config, load_config
from pathopipe.errors import UsageError
from pathopipe.mil.settings import load_mil_config


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("tiles:\n  mpp: 1.0\n  side_px: 512\nembed:\n")
    config = load_config(path, ["tiles.mpp=0.25", "embed.encoder=handcrafted, timm.resnet18"])
    assert (config.tiles.mpp, config.tiles.side_px) == (0.25, 512)
    assert config.embed.encoder == ("handcrafted", "timm.resnet18")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tiles.mp=1", "unknown config key 'tiles.mp'; did you mean 'mpp'"),
        ("tile.mpp=1", "unknown config key 'tile'; did you mean 'tiles'"),
        ("tiles.mpp=fine", "tiles.mpp: .* got 'fine'"),
        ("tiles.mpp=100", "less than or equal to 50, got 100"),
        ("embed.device=tpu", "got 'tpu'"),
        ("mpp=1", "write it as section.key=value"),
        ("tiles.mpp", "write it as section.key=value"),
        ("slide.mpp=0", "greater than or equal to 0.05"),
    ],
)
def test_a_wrong_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiles: [1, 2", "not valid YAML"),
        ("- 1\n", "mapping of sections"),
        ("tiles:\n  mpp: !!python/name:os.system\n", "YAML"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"broken.yaml.*{message}"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.yaml: config can't be read"):
        load_config(tmp_path / "absent.yaml")


def test_every_setting_is_documented() -> None:
    sections = [field.annotation for field in Config.model_fields.values()]
    assert all(isinstance(section, type) and issubclass(section, BaseModel) for section in sections)
    for section in sections:
        for name, field in section.model_fields.items():  # type: ignore[union-attr]
            assert field.description, f"{section}.{name}"


def test_an_overlap_is_less_than_the_tile_of_each_encoder() -> None:
    with pytest.raises(UsageError, match="tiles: overlap_px=64 must be less than side_px=64"):
        load_config(None, ["tiles.side_px=64", "tiles.overlap_px=64"])
    tiles = load_config(None, ["tiles.overlap_px=256"]).tiles
    assert tiles.settled(side_px=512, mpp=0.5).overlap_px == 256
    with pytest.raises(UsageError, match="tiles: overlap_px=256 must be less than side_px=256"):
        tiles.settled(side_px=256, mpp=0.5)


def test_the_default_file_states_the_defaults() -> None:
    assert load_config(Path(__file__).parents[1] / "configs" / "default.yaml") == Config()


def test_one_file_may_serve_mil_too(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("tiles: {mpp: 1.0}\nmil: {epochs: 40}\n")
    assert load_config(path).tiles.mpp == 1.0
    assert load_mil_config(path).epochs == 40
