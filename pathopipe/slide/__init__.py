"""Slides: one protocol over OpenSlide, TIFF and arrays; resolution by evidence."""
