"""Multiple-instance learning: bags of tile features in, models, honest figures and heatmaps out."""
