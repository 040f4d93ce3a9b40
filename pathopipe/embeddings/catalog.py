"""The encoders that are known by name, each a row of data."""

from dataclasses import dataclass

from pathopipe.errors import UsageError
from pathopipe.registry import nearest

__all__ = ["CATALOG", "TIMM_PREFIX", "EncoderSpec", "find_encoder"]

TIMM_PREFIX = "timm."


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """What is known of an encoder before it is built."""

    name: str
    loader: str
    """``handcrafted``, or ``timm`` for an architecture of that library."""
    dtype: str
    """Type of the stored numbers."""
    license: str
    summary: str


CATALOG = {
    spec.name: spec
    for spec in (
        EncoderSpec(
            name="handcrafted",
            loader="handcrafted",
            dtype="float32",
            license="Apache-2.0",
            summary="colour, stain, texture and nucleus statistics; no weights, no GPU, the default",
        ),
    )
}


def find_encoder(name: str) -> EncoderSpec:
    """The row of an encoder; ``timm.<architecture>`` stands for any architecture of timm.

    Raises:
        UsageError: No such name; the nearest known one is suggested.
    """
    if name in CATALOG:
        return CATALOG[name]
    if name.startswith(TIMM_PREFIX) and len(name) > len(TIMM_PREFIX):
        return EncoderSpec(
            name=name,
            loader="timm",
            dtype="float16",
            license="that of the weights file",
            summary="any timm architecture with local weights, or random ones marked as such",
        )
    raise UsageError(f"unknown encoder '{name}'; {nearest(name, [*CATALOG, TIMM_PREFIX + 'ARCHITECTURE'])}")
