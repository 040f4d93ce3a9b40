"""Settings of ``mil``: frozen, documented, strict; an unknown key names the nearest known one."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pathopipe.config import read_section, settle_section

__all__ = ["MilConfig", "load_mil_config"]


class MilConfig(BaseModel):
    """How multiple-instance models are trained; section ``mil`` of a config file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    hidden: int = Field(default=128, ge=4, le=4096)
    """Width of a tile inside a head."""
    attention: int = Field(default=64, ge=2, le=4096)
    """Width of the attention network."""
    dropout: float = Field(default=0.25, ge=0, lt=1)
    """Share of hidden values dropped while training."""
    input_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of tile features dropped while training."""
    instance_tiles: int = Field(default=8, ge=1)
    """CLAM: tiles with most and with least attention that get pseudo-labels."""
    instance_share: float = Field(default=0.3, ge=0, le=1)
    """CLAM: share of the tile loss in the whole loss."""
    members: int = Field(default=5, ge=1, le=50)
    """Networks in a model; their logits are averaged. Each keeps another part of the training side back to stop on, so
    that together they have learnt from all of it; with 1, the validation part is used by none to learn from."""
    val_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of a fold's training side to stop on, with one member; with more it is 1 / members."""
    epochs: int = Field(default=30, ge=1)
    """Most epochs a network is trained."""
    patience: int = Field(default=10, ge=1)
    """Epochs without a better validation loss after which training stops; the best epoch's weights are kept."""
    early_stop: bool = True
    """Stop on the validation loss, as above. Off, all epochs are trained and the last one's weights are kept: where a
    handful of validation bags can't tell epochs apart, the falling learning rate ends training better. Validation bags
    then only calibrate."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Highest learning rate of Adam; it rises over ``warmup`` and falls along a cosine."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    centre: bool = False
    """Show network heads each tile relative to the middle of its bag. What stain and scanner add to all tiles is gone
    then, and so is what slides' averages truly tell: for few positive tiles among thousands."""
    bag_shift: float = Field(default=0.0, ge=0)
    """Shift all tiles of a bag alike by a random vector, anew each step, this many spreads of a feature wide: what sets
    whole slides apart (stain, scanner) can then not be learnt by heart, nor can what slides' means truly tell."""
    join: float = Field(default=0.0, ge=0, le=1)
    """Share of bags that, while training, are shown with the tiles of a negative bag of the same step added. Where one
    positive tile makes a bag positive, labels stay as they are, and attention has to find that tile among more others.
    Only for targets of which that is true: binary and multi-label ones."""
    penalty: float = Field(default=1e-2, ge=0)
    """Weight of the squared weights in the loss: small cohorts need much, and attention finds its tiles better."""
    bag_size: bool = True
    """Give the model the number of tiles (its logarithm). Poolings with a maximum see it in any case, means don't; the
    report before training says how much it tells alone. Turn it off where it stands for how the tissue was taken."""
    gradient_clip: float = Field(default=5.0, gt=0)
    """Longest gradient of a step."""
    batch_bags: int = Field(default=16, ge=1)
    """Bags a step; where they don't fit in ``batch_tiles`` at once, gradients are added up."""
    batch_tiles: int = Field(default=16384, ge=1)
    """Tiles held at once, padding included."""
    cap: int | None = Field(default=4096, ge=1)
    """Most tiles of a bag while training, drawn afresh each epoch; null takes all. Evaluation always takes all."""
    balanced: bool = False
    """Weigh classes by the reverse of their frequency; probabilities then no longer follow it."""
    intervals: int = Field(default=4, ge=2, le=100)
    """Discrete survival: intervals of time, each with as many training events."""
    logistic_c: float = Field(default=0.05, gt=0)
    """Logistic baseline: the reverse of the penalty, as in scikit-learn."""
    amp: bool = True
    """Mixed precision on a CUDA device."""
    draws: int = Field(default=1000, ge=100)
    """Bootstrap samples of every interval and test."""
    classes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Order of the classes of a label column: the positive last where it is binary, low to high where ordinal."""


def load_mil_config(path: Path | None = None, overrides: Sequence[str] = ()) -> MilConfig:
    """Defaults, then the section ``mil`` of a YAML file, then ``mil.key=value`` overrides.

    Other sections of the file are left to the commands they are for.

    Raises:
        UsageError: The file can't be read, a key is unknown (the nearest is named), or a value is out of range.
    """
    settings = read_section(path, overrides, "mil", example="mil.epochs=80")
    for column, order in dict(settings.get("classes") or {}).items():
        if isinstance(order, list):
            # YAML reads 0, 1 and yes as numbers and truth values; classes are texts.
            settings["classes"] = {**settings["classes"], column: [str(name) for name in order]}
    return settle_section(MilConfig, settings, "mil", path)
