"""Tiles: equal squares of a physical size; where they are, and how their pixels are streamed."""
