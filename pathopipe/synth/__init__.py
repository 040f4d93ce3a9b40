"""Draw H&E slides of any size with known nuclei, glands, lumina and tissue, the same from the same seed.

``outline`` plans the slide (pieces, pen, dust), ``layout`` places cells in micrometres, ``sprites`` and ``textures``
hold what is rendered once, ``draw`` makes pixels and truth of any region, ``write`` makes the file. ``field`` draws
small fields of many tissues, stains and cameras to train on.
"""

from pathopipe.synth.draw import DrawnSlide
from pathopipe.synth.spec import SynthSpec, TruthObject
from pathopipe.synth.write import write_slide

__all__ = ["DrawnSlide", "SynthSpec", "TruthObject", "write_slide"]
