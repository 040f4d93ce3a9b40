"""What counts as private in a text, what does not, and that a masked value gives nothing away."""

import datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathopipe.privacy.patterns import KINDS, find_private, mask, mask_private

PRIVATE = [
    ("date", "scanned 2019-03-04 at noon"),
    ("date", "2019/03/04"),
    ("date", '"DateTime": "2019:03:04 10:11:12"'),
    ("date", "|3/14/2019|"),
    ("date", "Date 12/29/09"),
    ("date", "am 14.3.2019 gescannt"),
    ("date", '"20190304"'),
    ("date", "slide_20190304.svs"),
    ("date", "20190304101112"),
    ("date", "14-Mar-2019"),
    ("date", "14 March 2019"),
    ("date", "Mon Mar  4 10:11:12 2019"),
    ("date", "March 4th, 2019"),
    ("date", "04-MAR-19"),
    ("barcode", "TCGA-V5-A7RE-11A-01-TS1"),
    ("barcode", "id=TCGA-V5-A7RE;"),
    ("barcode", "C3L-00016-21"),
    ("accession", "S12-12345"),
    ("accession", "case SP19-1234 A2"),
    ("accession", "H-2019-012345"),
    ("accession", "E/2019/012345"),
    ("accession", "19-SP-01234"),
    ("person", "SMITH^JOHN"),
    ("person", "Müller^Anna^^Dr"),
    ("person", "Van der Berg^Piet"),
    ("email", "ask jane.doe@hospital.example.org today"),
    ("phone", "+44 20 7946 0958"),
    ("phone", "(555) 123-4567"),
    ("phone", "555-123-4567"),
    ("phone", "Tel.: 030 1234567"),
    ("home", "/home/jdoe/slides/a.svs"),
    ("home", "file:///Users/jdoe/a.svs"),
    ("home", r"C:\Users\jdoe\a.svs"),
    ("home", r'"C:\\Users\\jdoe\\a.svs"'),
    ("uid", "1.3.6.1.4.1.5962.99.1.1250461725.1389625145.1637430012345.2.0"),
    ("field", "aperio.User"),
    ("field", "aperio.ScanScope ID"),
    ("field", "|ScanScope ID = CPAPERIOCS|"),
    ("field", "x|Filename = CMU-1|"),
    ("field", "hamamatsu.Reference"),
    ("field", '<Attribute Name="DICOM_DEVICE_SERIAL_NUMBER"'),
    ("field", "PIM_DP_UFS_BARCODE"),
    ("field", "PatientName"),
    ("field", '"patient_birth_date": 1'),
    ("field", "slide_id,date_of_birth,label"),
    ("field", "MRN"),
    ("field", "Patient ID: 12"),
    ("field", "tiff.DateTime"),
    ("field", "associated_images"),
]

HARMLESS = [
    "pathopipe 0.1.0, torch 2.13.0, dask 2026.8.0, types-psutil==7.2.2.20261111, regex==2026.11.15",
    "numpy-typing-compat==20251206.2.4",
    "fingerprint 20190304a91be02c5f",
    "sha256:19990101199901011999010119990101",
    "cf13dee0-77f1-54f3-af1b-7f52c126a2f6 20190304-77f1-54f3-af1b-7f52c126a2f6",
    "3F2504E0-4F89-ED12-1234-0305E82C3301",
    "1.2.840.10008.5.1.4.1.1.77.1.6",
    "openslide.mpp-x tiff.XResolution aperio.MPP aperio.AppMag",
    "https://example.org/2019/03/04/weights and https://example.org/home/page",
    "Area µm^2, Nuclei per mm^2, x^y",
    "256px-0.5um 1/2 3/4 16/16/32 +1.25 -3.5e+10 10.5.3",
    "icon@2x.png git@github.com",
    "patient_id,site,label,split,name,title,date_column",
    "fold 1 of 5, seed 19 may be 20",
    "arXiv:1802.04712, CC BY-NC-ND 4.0, ISO 15417",
    "/data/cohort/slide.svs ./home/x",
    "#20190304",
    "99991399",
]


def kinds(text: str) -> set[str]:
    return {match.kind for match in find_private(text.encode())}


@pytest.mark.parametrize(("kind", "text"), PRIVATE)
def test_private_text_is_found(kind: str, text: str) -> None:
    assert kind in kinds(text)
    assert kind in KINDS


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_is_not(text: str) -> None:
    assert not kinds(text)


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, text in PRIVATE if kind != "field"])
def test_a_mask_shows_the_form_only(kind: str, text: str) -> None:
    raw = text.encode()
    for match in find_private(raw):
        if match.kind == "field":
            continue
        shown = mask(match.kind, raw[match.start : match.end])
        rest = shown.removeprefix("/home/").removeprefix("/Users/")
        assert not [c for c in rest if c.isalnum() and c != "x"]
    assert not {"jdoe", "SMITH", "2019", "12345", "jane"} & set(mask_private(text).replace("/", " ").split())


def test_what_a_mask_looks_like() -> None:
    assert mask("accession", b"S12-12345") == "x##-#####"
    assert mask("home", b"/home/jdoe") == "/home/xxxx"
    assert mask("field", b"PatientName") == "PatientName"
    assert mask_private("a SMITH^JOHN 2019-03-04.png") == "a xxxxx^xxxx ####-##-##.png"


def test_binary_data_is_held_to_more() -> None:
    assert not list(find_private(b"uW^Fyg\nq@Z.Xr\nSsn", in_binary=True))
    assert {m.kind for m in find_private(b"SMITH^JOHN\njane@hospital.org\n2019-03-04", in_binary=True)} == {
        "person",
        "email",
        "date",
    }


@given(st.dates(datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)))
def test_every_date_is_found_in_every_form(day: datetime.date) -> None:
    for form in ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%Y%m%d", "%d %B %Y", "%d-%b-%Y"):
        assert "date" in kinds(f"on {day:{form}} there"), form


@given(st.integers(0, 2**128 - 1), st.integers(0, 2**256 - 1))
def test_hashes_and_uuids_are_never_private(number: int, digest: int) -> None:
    assert not kinds(f"{UUID(int=number)}\n{str(UUID(int=number)).upper()}\n{digest:064x}\n{digest >> 192:016x}")


@given(st.lists(st.floats(-1e7, 1e7), min_size=5, max_size=50))
def test_numbers_are_never_private(numbers: list[float]) -> None:
    assert not kinds(",".join(map(repr, numbers)) + "\n" + " ".join(f"{n:.2f}" for n in numbers))
