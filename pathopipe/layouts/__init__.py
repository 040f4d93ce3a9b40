"""Feature files of other programs, in and out: CLAM, TRIDENT and STAMP HDF5, ``.pt`` and ``.npz``."""

from pathopipe.layouts.read import FEATURE_SUFFIXES, CoordUnit, FeatureFile, open_features
from pathopipe.layouts.write import HDF5_LAYOUTS, PT_LAYOUTS, Layout, TileFeatures, stream_hdf5, write_hdf5, write_pt

__all__ = [
    "FEATURE_SUFFIXES",
    "HDF5_LAYOUTS",
    "PT_LAYOUTS",
    "CoordUnit",
    "FeatureFile",
    "Layout",
    "TileFeatures",
    "open_features",
    "stream_hdf5",
    "write_hdf5",
    "write_pt",
]
