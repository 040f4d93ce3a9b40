"""What is planted is found, in every kind of file; what pathopipe writes by itself holds nothing private."""

import base64
import csv
import gzip
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import anndata
import cv2
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
import zarr
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from pathopipe.errors import UsageError
from pathopipe.privacy import Finding, search
from pathopipe.privacy import contents as contents_module

PLANTS = {
    "accession": "S12-12345",
    "barcode": "TCGA-V5-A7RE-01Z",
    "date": "2019-03-04",
    "person": "SMITHSON^JOHN",
    "email": "jane.doe@hospital.example.org",
    "phone": "+44 20 7946 0958",
    "home": "/home/jdoe/slides",
    "uid": "1.3.6.1.4.1.5962.99.1.1250461725.1389625145",
    "field": "PatientBirthDate",
}
ALL = ["nothing", *PLANTS.values(), "nothing else"]
PIXELS = np.random.default_rng(1).integers(0, 256, (64, 80, 3), dtype=np.uint8)


def private(where: Path) -> set[str]:
    return {finding.kind for finding in search(where).findings if finding.severity == "private"}


def write_text(path: Path) -> None:
    path.write_text("\n".join(ALL), encoding="utf-8")


def write_one_line(path: Path) -> None:
    path.write_text(" ".join(ALL), encoding="utf-8")


def write_utf16(path: Path) -> None:
    path.write_text("\n".join(ALL), encoding="utf-16")


def write_json(path: Path) -> None:
    path.write_text(json.dumps({"properties": {"metadata": {str(n): text for n, text in enumerate(ALL)}}}))


def write_escaped_json(path: Path) -> None:
    path.write_text(json.dumps({'a "quoted" key': ALL}).replace("/", "\\/"))


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["a", *ALL], range(12), [1.5] * 12])


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(json.dumps(ALL).encode()))


def write_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["coords"] = np.arange(10)
        file["coords"].attrs["source"] = ALL[:5]
        file["names"] = ALL[5:8]
        file.create_group("a").attrs["about"] = " ".join(ALL[8:])


def write_h5_record(path: Path) -> None:
    table = np.array([(text.encode(), 1.0) for text in ALL], [("text", "S60"), ("number", "f8")])
    with h5py.File(path, "w") as file:
        file["table"] = table


def write_h5ad(path: Path) -> None:
    names = pd.Index([str(number) for number in range(len(ALL))])
    made = anndata.AnnData(np.zeros((len(ALL), 2), np.float32), obs=pd.DataFrame({"text": ALL}, index=names))
    made.write_h5ad(path)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": ALL, "number": range(len(ALL))}), path)


def write_parquet_metadata(path: Path) -> None:
    pq.write_table(pa.table({"number": [1]}).replace_schema_metadata({"about": json.dumps(ALL)}), path)


def write_pt(path: Path) -> None:
    torch.save({"features": torch.zeros(1000, 8), "about": ALL}, path)


def write_old_pt(path: Path) -> None:
    torch.save({"features": torch.zeros(1000, 8), "about": ALL}, path, _use_new_zipfile_serialization=False)


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"about": ALL}))


def write_npz(path: Path) -> None:
    np.savez(path, numbers=np.arange(1000), text=np.array(ALL))


def write_npy_bytes(path: Path) -> None:
    np.save(path, np.array([text.encode() for text in ALL]))


def write_safetensors(path: Path) -> None:
    save_file({"a": np.zeros(4, np.float32)}, path, metadata={"about": " ".join(ALL)})


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inner/notes.txt", "\n".join(ALL))


def write_binary(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8).tobytes()
    path.write_bytes(noise + b"".join(b"\0\1" + text.encode() + b"\0" for text in ALL) + noise)


def write_png_text(path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", " ".join(ALL[:5]))
    info.add_itxt("More", " ".join(ALL[5:]))
    Image.fromarray(PIXELS).save(path, pnginfo=info)


def write_jpeg_comment(path: Path) -> None:
    Image.fromarray(PIXELS).save(path, comment=" ".join(ALL).encode())


def write_exif(path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = " ".join(ALL)
    Image.fromarray(PIXELS).save(path, exif=exif)


def write_tiff(path: Path) -> None:
    tifffile.imwrite(path, PIXELS, description=" ".join(ALL), metadata=None)


def write_tiff_bytes(path: Path) -> None:
    packet = " ".join(ALL).encode()
    tifffile.imwrite(path, PIXELS, metadata=None, extratags=[(700, 1, len(packet), packet, True)])


def write_html(path: Path) -> None:
    path.write_text(f"<html><body>{''.join(f'<td>{text}</td>' for text in ALL)}</body></html>")


def write_zarr_attributes(path: Path) -> None:
    zarr.create_group(path, attributes={"pathopipe": {"slide": {"about": ALL}}})


def write_zarr_strings(path: Path) -> None:
    array = zarr.create_array(path / "texts", shape=(len(ALL),), dtype="<U60", chunks=(3,))
    array[:] = np.array(ALL, dtype="<U60")


FILES: dict[str, Callable[[Path], None]] = {
    "notes.txt": write_text,
    "run.log": write_one_line,
    "excel.csv": write_utf16,
    "slide.geojson": write_json,
    "escaped.json": write_escaped_json,
    "broken.json": write_text,
    "summary2.csv": write_csv,
    "slide.geojson.gz": write_gzip,
    "slide.h5": write_h5,
    "record.h5": write_h5_record,
    "slide.h5ad": write_h5ad,
    "slide.parquet": write_parquet,
    "about.parquet": write_parquet_metadata,
    "slide.pt": write_pt,
    "old.pt": write_old_pt,
    "model.pkl": write_pickle,
    "bags.npz": write_npz,
    "names.npy": write_npy_bytes,
    "weights.safetensors": write_safetensors,
    "all.zip": write_zip,
    "unknown.bin": write_binary,
    "text.png": write_png_text,
    "comment.jpg": write_jpeg_comment,
    "exif.jpg": write_exif,
    "heat.tif": write_tiff,
    "xmp.tif": write_tiff_bytes,
    "report.html": write_html,
    "slides/a.zarr": write_zarr_attributes,
    "slides/b.zarr": write_zarr_strings,
}


@pytest.mark.parametrize("name", FILES)
def test_every_plant_is_found_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries say while they write is not our concern
        FILES[name](path)
    result = search(tmp_path)
    found = {finding.kind for finding in result.findings if finding.severity == "private"}
    assert found == set(PLANTS)
    told = json.dumps([str(finding) for finding in result.findings])
    for kind, text in PLANTS.items():
        assert kind == "field" or text not in told, f"{kind} is told in full"


def test_a_plant_beyond_the_first_block_is_found_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents_module, "_BLOCK_BYTES", 1 << 12)
    lines = ["1,2.5,3"] * 5000 + ["x,S12-12345,y"] + ["4,5,6"] * 5000
    (tmp_path / "table.csv").write_text("\n".join(lines))
    (finding,) = search(tmp_path).findings
    assert finding == Finding("table.csv", "accession", "private", ["x##-#####"], ["line 5001"], 1)


def test_a_line_beyond_all_measure_is_searched_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents_module, "_BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(contents_module, "_LINE_BYTES", 1 << 14)
    numbers = ",".join("[1234.5,678.9]" for _ in range(4000))
    (tmp_path / "one.geojson").write_text(f'{{"a":[{numbers}],"name":"S12-12345","b":[{numbers}]}}')
    assert private(tmp_path) == {"accession"}


def test_numbers_in_json_are_no_dates(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"size_bytes": 20190304, "list": [20190304, 19991231.5], "s": "x"}))
    assert not search(tmp_path).findings
    (tmp_path / "a.json").write_text(json.dumps({"day": "20190304"}))
    assert private(tmp_path) == {"date"}


def test_label_and_macro_images(tmp_path: Path) -> None:
    for name in ("label.png", "slide_macro.jpg"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    zarr.create_array(tmp_path / "slides" / "a.zarr" / "images" / "label", data=PIXELS)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["macro"] = PIXELS
        file["label"] = np.arange(5)  # a target is no picture
    with h5py.File(tmp_path / "mask.h5", "w") as file:
        file["label"] = np.zeros((64, 80), np.uint8)  # nor is a mask
    Image.fromarray(PIXELS).save(tmp_path / "labels.png")
    tifffile.imwrite(tmp_path / "c.svs", PIXELS, description="Aperio Image\r\nlabel 80x64", metadata=None)
    found = {f.file for f in search(tmp_path).findings if f.kind == "label image"}
    assert found == {"label.png", "slide_macro.jpg", "slides/a.zarr/images/label/zarr.json", "b.h5", "c.svs"}


def test_a_thumbnail_of_a_slide_called_label_is_none(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "slides" / "label.zarr")
    Image.fromarray(PIXELS).save(tmp_path / "label.png")
    assert not private(tmp_path)


def qr_code() -> np.ndarray:
    code = cv2.QRCodeEncoder.create().encode("S12-12345 A1")
    return np.pad(np.kron(code, np.ones((6, 6), np.uint8)), 40, constant_values=255)


@pytest.mark.parametrize("where", ["png", "tif", "html", "zarr", "h5", "npz"])
def test_a_barcode_in_a_picture_is_found_wherever_the_picture_is(tmp_path: Path, where: str) -> None:
    grey = qr_code()
    rgb = np.repeat(grey[..., None], 3, axis=2)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "png")
    if where == "png":
        (tmp_path / "a.png").write_bytes(buffer.getvalue())
    elif where == "tif":
        tifffile.imwrite(tmp_path / "a.tif", rgb, tile=(64, 64), compression="zlib")
    elif where == "html":
        encoded = base64.b64encode(buffer.getvalue()).decode()
        (tmp_path / "a.html").write_text(f'<p>\n<img src="data:image/png;base64,{encoded}">')
    elif where == "zarr":
        zarr.create_array(tmp_path / "a.zarr" / "picture", data=rgb)
    elif where == "h5":
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["picture"] = rgb
    else:
        np.savez(tmp_path / "a.npz", picture=rgb)
    (finding,) = search(tmp_path).findings
    assert (finding.kind, finding.severity) == ("barcode", "private")
    assert finding.excerpts == ["QR code, 12 characters"]
    if where == "html":
        assert finding.places == ["line 2"]


def test_tags_of_pictures(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0132], exif[0x013B], exif[0x013C] = "2019:03:04 10:11:12", "Jane", "PATHO-PC-7"
    exif.get_ifd(0x8769)[0xA431] = "SN12345"
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    tifffile.imwrite(tmp_path / "b.tif", PIXELS, datetime=True)
    found = {f.file: f.excerpts for f in search(tmp_path).findings}
    assert set(found) == {"a.jpg", "b.tif"}
    assert set(found["a.jpg"]) <= {"DateTime", "Artist", "HostComputer", "BodySerialNumber"}
    assert len(found["a.jpg"]) == 3
    assert found["b.tif"] == ["DateTime"]


def test_columns_with_dates_of_their_own_type(tmp_path: Path) -> None:
    days = pa.array([0, 1], pa.date32())
    pq.write_table(pa.table({"when": days, "x": [1, 2]}), tmp_path / "a.parquet")
    (finding,) = search(tmp_path).findings
    assert (finding.kind, finding.places) == ("date", ["column when"])


def test_ids_that_the_user_chose_are_notes(tmp_path: Path) -> None:
    slide_id = "TCGA-V5-A7RE-01Z-2019-03-04"
    zarr.create_group(tmp_path / "slides" / f"{slide_id}.zarr", attributes={"id": slide_id})
    (tmp_path / "scores.csv").write_text(f"slide_id,patient_id,score\n{slide_id},TCGA-V5-A7RE,0.5\n")
    result = search(tmp_path)
    assert result.is_clean
    assert {f.severity for f in result.findings} == {"note"}
    (tmp_path / "scores.csv").write_text(f"slide_id,patient_id,score\n{slide_id},TCGA-V5-B8SF,0.5\n")
    assert private(tmp_path) == {"barcode"}


def test_ids_of_exports_without_stores_are_notes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "S12-12345.h5", "w") as file:
        file.attrs["slide_id"] = "S12-12345"
    result = search(tmp_path)
    assert result.is_clean and result.findings


def test_the_day_of_writing_is_a_note(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("2019-03-04 10:00:00 started\n")
    assert private(tmp_path) == {"date"}
    os.utime(log, (1551693600, 1551693600))  # 4 March 2019
    result = search(tmp_path)
    assert result.is_clean and [f.severity for f in result.findings] == ["note"]


def test_private_names_of_files_are_found_and_masked(tmp_path: Path) -> None:
    (tmp_path / "SMITH^JOHN 2019-03-04").mkdir()
    (tmp_path / "SMITH^JOHN 2019-03-04" / "a SMITH^JOHN.txt").write_text("nothing")
    (finding,) = search(tmp_path).findings
    assert finding.kind == "person"
    assert finding.file == "xxxxx^xxxx ####-##-##/a xxxxx^xxxx.txt"


def test_links_to_folders_are_not_followed_but_their_targets_are_told(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.txt").write_text("S12-12345")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "folder").symlink_to(outside)
    assert not search(inside).findings
    (inside / "slide.svs").symlink_to("/home/jdoe/slide.svs")
    assert private(inside) == {"home"}
    (inside / "file.txt").symlink_to(outside / "a.txt")
    assert private(inside) == {"home", "accession"}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.h5", b"\x89HDF\r\n\x1a\n broken"),
        ("a.parquet", b"PAR1 broken"),
        ("a.gz", b"\x1f\x8b broken"),
        ("a.zip", b"PK\3\4 broken"),
        ("a.png", b"\x89PNG broken"),
        ("a.tif", b"II*\0 broken"),
    ],
)
def test_what_can_not_be_looked_into_is_no_clean_result(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert private(tmp_path) == {"unread"}


def test_pickles_are_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "a.pkl").write_bytes(pickle.dumps([Bomb(), "S12-12345"]))
    assert private(tmp_path) == {"accession"}
    assert not (tmp_path / "ran").exists()


def test_nothing_to_look_through_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        search(tmp_path / "missing")
    assert search(tmp_path).files == 0


@pytest.mark.shared_data
def test_real_slides_give_themselves_away(shared_data: Path) -> None:
    slides = shared_data / "slides"
    assert private(slides / "aperio") >= {"date", "field", "label image"}
    assert private(slides / "dicom" / "camelyon16-lowres-jpeg2000.dcm") >= {"date", "person", "uid"}
    assert private(slides / "hamamatsu") >= {"date", "picture tag"}
