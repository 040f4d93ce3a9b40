"""The slide protocol that every reader keeps."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pathopipe.geometry import Region
from pathopipe.records import SlideInfo

__all__ = ["Slide"]


class Slide(Protocol):
    """An open slide. Reads are safe from several threads at once; a slide does not cross process borders."""

    @property
    def info(self) -> SlideInfo:
        """What is known without reading pixels."""
        ...

    def read(self, region: Region) -> NDArray[np.uint8]:
        """Read one region as RGB, as OpenSlide's ``read_region`` shows it over white.

        Returns:
            (height_px, width_px, 3) uint8; white outside the slide and where nothing was scanned.

        Raises:
            TileReadError: A block under the region can't be read. The slide stays usable for other regions.
        """
        ...

    def close(self) -> None:
        """Free file handles and caches."""
        ...
