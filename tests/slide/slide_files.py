"""Small slide files for the tests: drawn TIFFs, Aperio-like slides, DICOM headers, and ways to damage them."""

import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "slides"


@cache
def picture(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """Draw smooth colours with some noise, (height, width, 3), read-only; no two places look the same."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack(
        [128 + 90 * np.sin(x / 17 + y / 31), 128 + 90 * np.cos(x / 23), 128 + 90 * np.sin(y / 13 + x / 57)], -1
    )
    drawn = np.clip(waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)
    drawn.setflags(write=False)
    return drawn


def pyramid(width: int, height: int, levels: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Draw a picture and its halvings by plain subsampling, finest first."""
    finest = picture(width, height, seed)
    return [finest[:: 2**n, :: 2**n] for n in range(levels)]


def write_tiff(
    path: Path,
    levels: list[NDArray[Any]],
    *,
    tile: int | None = 256,
    mpp: float | None = 0.25,
    ome: str | None = None,
    subifds: bool = False,
    bigtiff: bool = False,
    **options: Any,
) -> Path:
    """Write a tiled TIFF (in strips with ``tile=None``); a pyramid as following pages, or as SubIFDs.

    ``ome`` is attached as OME-XML description of the first page.
    """
    options.setdefault("photometric", "rgb")
    if options.get("compression") == "jpeg":
        # tifffile turns RGB into YCbCr unless told otherwise.
        keep_rgb = {"outcolorspace": "rgb"} if options["photometric"] == "rgb" else {}
        options.setdefault("compressionargs", {"level": 85, **keep_rgb})
    if tile is not None:
        options["tile"] = (tile, tile)
    with tifffile.TiffWriter(path, bigtiff=bigtiff, ome=False) as writer:
        for number, level in enumerate(levels):
            extra: dict[str, Any] = {}
            if mpp is not None:
                extra = {"resolution": (1e4 / mpp / 2**number,) * 2, "resolutionunit": "CENTIMETER"}
            else:
                extra = {"resolution": (1, 1), "resolutionunit": "NONE"}
            if number == 0:
                extra |= {"description": ome and ome.encode(), "subifds": len(levels) - 1 if subifds else None}
            writer.write(level, subfiletype=1 if number else 0, metadata=None, **extra, **options)
    return path


def write_svs(
    path: Path, levels: list[NDArray[np.uint8]], *, mpp: str = "0.2500", power: str = "40", **options: Any
) -> Path:
    """Write a TIFF that OpenSlide takes for an Aperio slide."""
    height, width = levels[0].shape[:2]
    description = (
        f"Aperio Image Library v11.2.1 \r\n{width}x{height} [0,0 {width}x{height}] (240x240) JPEG/RGB Q=30"
        f"|AppMag = {power}|MPP = {mpp}|User = someone|Date = 12/29/09|Barcode = P-123"
    )
    return write_tiff(path, levels, tile=240, mpp=None, ome=description, compression="jpeg", **options)


def write_tiles(path: Path, stream: bytes, photometric: str) -> Path:
    """Write a TIFF of 2 x 2 JPEG tiles of 256 px, each this very stream."""
    tifffile.imwrite(
        path,
        iter([stream] * 4),
        shape=(512, 512, 3),
        dtype=np.uint8,
        tile=(256, 256),
        compression="jpeg",
        compressionargs={"outcolorspace": photometric},
        photometric=photometric,
        subsampling=(1, 1),
        metadata=None,
    )
    with tifffile.TiffFile(path) as tif:
        assert tif.pages[0].aspage().photometric == {"rgb": 2, "ycbcr": 6}[photometric]
    return path


def ome_xml(
    width: int, height: int, physical: str = 'PhysicalSizeX="0.25" PhysicalSizeY="0.25"', name: str = ""
) -> str:
    """OME-XML of one RGB image."""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Image ID="Image:0" Name="{name}"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" '
        f'SizeX="{width}" SizeY="{height}" SizeC="3" SizeZ="1" SizeT="1" Interleaved="true" {physical}>'
        '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
    )


def write_ome(path: Path, levels: list[NDArray[np.uint8]], physical: str | None = None, **options: Any) -> Path:
    """Write an OME-TIFF, its pyramid in SubIFDs."""
    height, width = levels[0].shape[:2]
    xml = ome_xml(width, height) if physical is None else ome_xml(width, height, physical)
    options.setdefault("mpp", None)
    return write_tiff(path, levels, ome=xml, subifds=True, **options)


def block_place(path: Path, page: int, index: int) -> tuple[int, int]:
    """Offset and byte count of one tile or strip."""
    with tifffile.TiffFile(path) as tif:
        found = tif.pages[page].aspage()
        return found.dataoffsets[index], found.databytecounts[index]


def damage_block(path: Path, page: int, index: int) -> None:
    """Overwrite the second half of a tile with zeros."""
    offset, count = block_place(path, page, index)
    with path.open("r+b") as file:
        file.seek(offset + count // 2)
        file.write(bytes(count - count // 2))


def forget_block(path: Path, page: int, index: int) -> None:
    """Set a tile's byte count to zero, as a scanner does that leaves out empty glass."""
    with tifffile.TiffFile(path) as tif:
        found = tif.pages[page].aspage()
        tag = found.tags["TileByteCounts" if found.is_tiled else "StripByteCounts"]
        assert tag.count > 1
        size = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
        place = tag.valueoffset + size * index
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(size))


def set_tag(path: Path, page: int, name: str, value: Any) -> None:
    """Change one tag in place."""
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[page].aspage().tags[name].overwrite(value)


def expect(whole: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
    """Crop a whole level, white outside it: what any read must equal."""
    canvas = np.full((height, width, 3), 255, np.uint8)
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, whole.shape[1]), min(y + height, whole.shape[0])
    if left < right and top < bottom:
        canvas[top - y : bottom - y, left - x : right - x] = whole[top:bottom, left:right]
    return canvas


def write_dicom(
    path: Path,
    *,
    series: str = "1.2.3",
    image_type: str = "ORIGINAL\\PRIMARY\\VOLUME\\NONE",
    photometric: str = "RGB",
    frame: bytes = b"",
    sop_class: str = "1.2.840.10008.5.1.4.1.1.77.1.6",
    syntax: str = "1.2.840.10008.1.2.4.50",
) -> Path:
    """Write the header of a whole-slide DICOM file with one encapsulated frame, and a nested sequence to step over."""
    explicit = syntax != "1.2.840.10008.1.2"
    inner = b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + _element(0x0008, 0x0100, "SH", "X", explicit)
    inner += b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    sequence = struct.pack("<HH", 0x0008, 0x1032) + (b"SQ\0\0" if explicit else b"") + b"\xff\xff\xff\xff" + inner
    body = (
        _element(0x0008, 0x0008, "CS", image_type, explicit)
        + _element(0x0008, 0x0016, "UI", sop_class, explicit)
        + sequence
        + _element(0x0010, 0x0010, "PN", "Doe^Jane", explicit)
        + _element(0x0020, 0x000E, "UI", series, explicit)
        + _element(0x0028, 0x0004, "CS", photometric, explicit)
        + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
        + b"\xfe\xff\x00\xe0\0\0\0\0"
        + b"\xfe\xff\x00\xe0"
        + struct.pack("<I", len(frame))
        + frame
        + b"\xfe\xff\xdd\xe0\0\0\0\0"
    )
    path.write_bytes(bytes(128) + b"DICM" + _element(0x0002, 0x0010, "UI", syntax, True) + body)
    return path


def _element(group: int, number: int, vr: str, text: str, explicit: bool) -> bytes:
    value = text.encode() + (b"\0" if vr == "UI" else b" ") * (len(text) % 2)
    length = struct.pack("<2sH", vr.encode(), len(value)) if explicit else struct.pack("<I", len(value))
    return struct.pack("<HH", group, number) + length + value
