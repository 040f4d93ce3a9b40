"""Whole-slide pathology: slides in; tissue, tiles, embeddings, objects and predictions out."""

__version__ = "0.1.0"
