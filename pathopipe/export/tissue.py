"""Tissue outlines as GeoJSON that QuPath imports."""

from pathlib import Path

from pathopipe.geojson import WriteReport, feature, stable_id, write_features
from pathopipe.geometry import BoxL0
from pathopipe.records import Tissue

__all__ = ["write_tissue_outline"]

_COLOUR = (0, 160, 80)


def write_tissue_outline(
    path: Path, slide_id: str, tissue: Tissue, bounds_l0: BoxL0 | None, *, provenance: str
) -> WriteReport:
    """Write each tissue region as a locked annotation with its area.

    Args:
        path: A ``.geojson`` or ``.geojson.gz`` file.
        slide_id: Goes into the ids of the annotations, which stay the same when this is run again.
        tissue: The regions.
        bounds_l0: The scanned part, where the slide states one; QuPath's frame starts at its corner.
        provenance: Hash of what the tissue was computed from, as the store's ``inputs`` give it.
    """
    offset_l0 = (float(bounds_l0.x_l0), float(bounds_l0.y_l0)) if bounds_l0 is not None else (0.0, 0.0)
    regions = zip(tissue.polygons, tissue.areas_mm2, strict=True)
    return write_features(
        path,
        (
            feature(
                polygon,
                object_type="annotation",
                id=stable_id(slide_id, "tissue", number),
                name=f"Tissue {number + 1}",
                classification=("Tissue", _COLOUR),
                measurements={"Area mm^2": area_mm2},
                locked=True,
                metadata={"pathopipe.tissue": provenance},
                offset_l0=offset_l0,
            )
            for number, (polygon, area_mm2) in enumerate(regions)
        ),
    )
