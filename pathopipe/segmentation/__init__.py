"""Objects of a slide: models, post-processing, stitching, measurements and metrics."""
