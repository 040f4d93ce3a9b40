"""Settings of ``metadata``: frozen, documented, strict; an unknown key names the nearest known one."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pathopipe.config import read_section, settle_section

__all__ = ["MetadataConfig", "load_metadata_config"]


class MetadataConfig(BaseModel):
    """How models of slide metadata are trained; section ``metadata`` of a config file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    folds: int = Field(default=5, ge=2, le=50)
    """Parts of the cohort that are tested in turn."""
    val_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of a fold's training side to stop on, with one member; with more it is 1 / members."""
    leave_sites_out: bool = False
    """Test each site by models that have not seen it."""
    members: int = Field(default=5, ge=1, le=50)
    """Networks in a model; their logits are averaged. Each keeps another part of the training side back to stop on and
    to find temperatures and thresholds on, so that together they have learnt from all of it; with 1, the validation
    part is used by none to learn from."""
    head: str = "abmil"
    """Head of ``mil`` that pools the tiles of a slide."""
    width: int = Field(default=128, ge=4, le=4096)
    """Width of the representation that all branches share."""
    hidden: int = Field(default=128, ge=4, le=4096)
    """Width inside a branch."""
    attention: int = Field(default=64, ge=2, le=4096)
    """Width of the attention network."""
    dropout: float = Field(default=0.25, ge=0, lt=1)
    """Share of hidden values dropped while training."""
    modality_dropout: float = Field(default=0.3, ge=0, lt=1)
    """Chance of each modality of a slide to be hidden in a step; one always stays."""
    alignment: float = Field(default=0.1, ge=0)
    """Weight of the loss that draws the image vector to the vector of the patient's report."""
    text_encoder: str = Field(default="ngrams", min_length=1)
    """``ngrams`` (words and letters, no download), or the name or folder of a transformers encoder."""
    text_features: int = Field(default=256, ge=2, le=4096)
    """Width of the report's vector, for ``ngrams``."""
    balanced: bool = False
    """Weigh classes by the reverse of their frequency while learning; probabilities follow the frequency all the same,
    for the weights are taken out of them again."""
    epochs: int = Field(default=40, ge=1)
    """Most epochs a network is trained."""
    patience: int = Field(default=10, ge=1)
    """Epochs without a better validation loss after which training stops; the best epoch's weights are kept."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Highest learning rate of AdamW; it rises over a tenth of the steps and falls along a cosine."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Pull of AdamW on weights towards zero."""
    bag_size: bool = True
    """Show the image branch the number of tiles (its logarithm). Poolings with a maximum see it in any case. Turn it
    off where it stands for how the tissue was taken."""
    gradient_clip: float = Field(default=5.0, gt=0)
    """Longest gradient of a step."""
    batch_slides: int = Field(default=32, ge=2)
    """Slides a step."""
    cap: int | None = Field(default=1024, ge=1)
    """Most tiles of a slide while training, drawn afresh each epoch; null takes all. Evaluation always takes all."""
    precision: float = Field(default=0.9, gt=0, lt=1)
    """Where fewer predictions than this share would be right, the model abstains."""
    draws: int = Field(default=1000, ge=100)
    """Bootstrap samples of every interval."""


def load_metadata_config(path: Path | None = None, overrides: Sequence[str] = ()) -> MetadataConfig:
    """Defaults, then the section ``metadata`` of a YAML file, then ``metadata.key=value`` overrides.

    Other sections of the file are left to the commands they are for.

    Raises:
        UsageError: The file can't be read, a key is unknown (the nearest is named), or a value is out of range.
    """
    settings = read_section(path, overrides, "metadata", example="metadata.epochs=80")
    return settle_section(MetadataConfig, settings, "metadata", path)
