"""Where the tissue of a slide is, and what is odd about the slide.

``detect`` runs the stage; ``light`` measures absorption against the glass, ``marks`` knows borders and pens,
``brightfield`` and ``darkfield`` segment, ``outline`` turns masks into polygons and back, ``focus`` judges sharpness,
``given`` takes a mask from the user.
"""

from pathopipe.tissue.detect import detect_tissue, find_tissue
from pathopipe.tissue.given import given_tissue

__all__ = ["TISSUE_VERSION", "detect_tissue", "find_tissue", "given_tissue"]

TISSUE_VERSION = 1
"""Raise when the tissue found on any slide changes; it is part of the hash of the stage's inputs."""
