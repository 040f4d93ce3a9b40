"""The one layout of a slide's results on disk: Zarr v3, written so that a kill loses at most the chunk in hand."""

from pathopipe.store.embeddings import EmbeddingArray
from pathopipe.store.groups import Problem
from pathopipe.store.objects import ObjectArray
from pathopipe.store.parts import PartTable
from pathopipe.store.predictions import Predictions
from pathopipe.store.slide_store import SCHEMA_VERSION, SlideStore, digest, store_path

__all__ = [
    "SCHEMA_VERSION",
    "EmbeddingArray",
    "ObjectArray",
    "PartTable",
    "Predictions",
    "Problem",
    "SlideStore",
    "digest",
    "store_path",
]
