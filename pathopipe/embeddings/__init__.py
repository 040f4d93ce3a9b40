"""Embeddings: the catalogue of encoders, how each is built, and the stage that runs one over a slide's tiles."""
