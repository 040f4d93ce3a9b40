"""What private data looks like in text: names of vendor fields, dates, barcodes, people, addresses, home folders.

Text is bytes, so that a file of gigabytes needs no decoding. Most text holds nothing, so each pattern has a test that
costs next to nothing: a word that must be there, or a shape (the text with every digit as 0 and every letter as a or
A) that must be. Only where it is there does the regular expression run.
"""

import datetime
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["KINDS", "Match", "find_private", "mask", "mask_private"]

KINDS = {
    "field": "a field that names people, devices or dates (DICOM, Aperio, Hamamatsu, Philips, TIFF, or a column)",
    "barcode": "a barcode, or the number that stands under one (TCGA and the like)",
    "accession": "a case number such as S12-12345",
    "date": "a calendar date",
    "person": "a name in the form that DICOM gives it, FAMILY^GIVEN",
    "email": "an e-mail address",
    "phone": "a telephone number",
    "home": "a path into somebody's home folder",
    "uid": "a unique identifier of DICOM, which leads back to the study",
    "label image": "a label or macro image, or what bears the name of one",
    "picture tag": "a tag of a picture (EXIF, TIFF) that says when, where, by whom or with which device",
    "unread": "something that could not be looked into",
}
"""Kinds of findings, and what each means."""

_SHAPE = bytes.maketrans(
    bytes(range(256)),
    bytes(
        0x30 if 0x30 <= b <= 0x39 else 0x41 if 0x41 <= b <= 0x5A else 0x61 if 0x61 <= b <= 0x7A or b >= 0x80 else b
        for b in range(256)
    ),
)
_LETTERS = rb"A-Za-z\x80-\xff"
_UUID = re.compile(rb"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}")
_UUID_LENGTH = 36
_TOKEN_LENGTH = 300
_SPACE = re.compile(rb"[\s\"'<>]")
_MONTH = (
    rb"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|"
    rb"oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
)
_DICOM_KEYWORDS = (  # PS3.6
    "PatientName PatientID PatientBirthDate PatientBirthTime PatientBirthName PatientAge PatientAddress "
    "PatientComments PatientTelephoneNumbers PatientMotherBirthName OtherPatientIDs OtherPatientNames "
    "IssuerOfPatientID AccessionNumber StudyID StudyDate SeriesDate AcquisitionDate AcquisitionDateTime "
    "ContentDate InstanceCreationDate InstitutionName InstitutionAddress InstitutionalDepartmentName StationName "
    "DeviceSerialNumber ReferringPhysicianName PerformingPhysicianName RequestingPhysician PhysiciansOfRecord "
    "OperatorsName ContainerIdentifier SpecimenIdentifier SpecimenUID BarcodeValue LabelText StudyInstanceUID "
    "SeriesInstanceUID SOPInstanceUID FrameOfReferenceUID "
)
_COLUMNS = (  # as people name them
    "patientname birthdate patientbirthdate dateofbirth dob mrn medicalrecordnumber medicalrecordno ssn "
    "socialsecurity socialsecuritynumber accessionnumber accessionno accessionid studydate scandate "
    "acquisitiondate firstname lastname familyname givenname surname "
)
# Pictures beside the slide, as OpenSlide and converters to Zarr call them.
_PICTURE_GROUPS = "associatedimage associatedimages"
# All of them in small letters and without underscores.
_NAMES = frozenset(f"{_DICOM_KEYWORDS} {_COLUMNS} {_PICTURE_GROUPS}".lower().split())
_VENDOR_FIELD = re.compile(
    rb"aperio\.(?!MPP\b|AppMag\b)[A-Z][A-Za-z]{2,24}(?: ID| Zone)?|hamamatsu\.[A-Z][\w./\[\]-]*|"
    rb"leica\.(?:barcode|creation-date|device-model|device-version)|mirax\.[A-Z]\w+(?:\.\w+)?|ventana\.[A-Z]\w+|"
    rb"(?:DICOM|PII?M)_[A-Z]{2}[A-Z_]+|tiff\.(?:ImageDescription|DateTime|Artist|HostComputer|DocumentName|Copyright)|"
    rb"openslide\.associated\.\w+|ScanScope ID|\|(?:User|Filename|Date|Time|Title)\s?="
)
_VENDOR_WORDS = (
    b"aperio.", b"hamamatsu.", b"leica.", b"mirax.", b"ventana.", b"DICOM_", b"PIM_", b"PIIM_", b"tiff.",
    b"associated.", b"ScanScope", b"|User", b"|Filename", b"|Date", b"|Time", b"|Title",
)  # fmt: skip
_WORDS = re.compile(rb"[A-Za-z][A-Za-z_]{2,}")
_SPOKEN = re.compile(
    rb"(?i)\bpatient(?:'s)? (?:name|id|no|number)\.? ?[:=]|\bdate of birth ?[:=]|"
    rb"\bmedical record (?:number|no)\.? ?[:=]|\bnhs (?:number|no)\.? ?[:=]"
)
_LEAST_LIKELY = 8
_LIKELY = {
    "person": re.compile(rb"(?=.{8})(?:[A-Z]{2,}|[A-Z][a-z]+)\^(?:[A-Z]{2,}|[A-Z][a-z]+)"),
    "email": re.compile(rb"[0-9A-Za-z._-]{3,}@(?:[0-9a-z-]{2,}\.)+[a-z]{2,}$"),
}
_SPOKEN_WORDS = (b"atient", b"ATIENT", b"irth", b"IRTH", b"edical", b"EDICAL", b"nhs", b"NHS")


@dataclass(frozen=True, slots=True)
class Match:
    """One place of a text that looks private."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Pattern:
    kind: str
    regex: re.Pattern[bytes]
    words: tuple[tuple[bytes, bytes], ...] = ()
    """One of them stands in every text that matches; each with its shape."""
    shapes: tuple[bytes, ...] = ()
    """Or one of these in the text's shape."""
    roots: tuple[bytes, ...] = ()
    """Besides, one of these in the text in small letters, where there are any."""
    holds: Callable[[re.Match[bytes]], bool] = bool


def find_private(text: bytes, *, in_binary: bool = False) -> Iterator[Match]:
    """What looks private in a text.

    Args:
        text: UTF-8, or anything whose ASCII part is readable.
        in_binary: The text is what looks readable in binary data, where short names and addresses arise by chance.
    """
    yield from _find_names(text, _LEAST_LIKELY if in_binary else 1)
    # Rows of a table and lines of a log differ in their digits only: few shapes stand for very many lines.
    shapes = b"\n" + b"\n".join(set(text.translate(_SHAPE).split(b"\n")))
    for pattern in _PATTERNS:
        if _may_match(pattern, text, shapes):
            likely = _LIKELY.get(pattern.kind) if in_binary else None
            for match in pattern.regex.finditer(text):
                if pattern.holds(match) and (likely is None or likely.search(match[0])):
                    yield Match(pattern.kind, match.start(), match.end())


def _may_match(pattern: "_Pattern", text: bytes, shapes: bytes) -> bool:
    if pattern.roots:
        small = text.lower()
        if not any(root in small for root in pattern.roots):
            return False
    return any(shape in shapes for shape in pattern.shapes) or any(
        shape in shapes and word in text for word, shape in pattern.words
    )


def _find_names(text: bytes, least_letters: int) -> Iterator[Match]:
    """Names of fields that are words of their own; each word is judged once, however often it stands there."""
    # The manifest's own column: to keep the slides of a patient together takes some id, and the user chose it.
    for word in set(_WORDS.findall(text)) - {b"patient_id"}:
        if len(word) >= least_letters and word.replace(b"_", b"").lower().decode("ascii") in _NAMES:
            for match in re.finditer(rb"(?<![\w.])" + word + rb"(?!\w)", text):
                yield Match("field", match.start(), match.end())


def mask(kind: str, value: bytes) -> str:
    """The form of a private value without the value: letters become x, digits become #.

    The name of a field is not private, nor is the part of a path that every home folder has.
    """
    text = value.decode("utf-8", "replace")
    if kind == "field":
        return text
    head = ""
    if kind == "home":
        head = next((part for part in ("/home/", "/Users/") if text.startswith(part)), "")
    return head + "".join("#" if c.isdigit() else "x" if c.isalpha() else c for c in text[len(head) :])


def mask_private(text: str) -> str:
    """A text, such as the name of a file, with everything in it masked that looks private."""
    raw = text.encode("utf-8", "surrogateescape")
    for match in sorted(find_private(raw), key=lambda match: match.start, reverse=True):
        masked = mask(match.kind, raw[match.start : match.end]).encode()
        raw = raw[: match.start] + masked + raw[match.end :]
    return raw.decode("utf-8", "replace")


def _not_in_uuid(match: re.Match[bytes]) -> bool:
    start = max(0, match.start() - _UUID_LENGTH)
    for found in _UUID.finditer(match.string, start, match.end() + _UUID_LENGTH):
        if found.start() < match.end() and match.start() < found.end():
            return False
    return True


def _not_in_url(match: re.Match[bytes]) -> bool:
    # The day that a page was published stands in many an address; it is nobody's.
    before = match.string[max(0, match.start() - _TOKEN_LENGTH) : match.start()]
    return b"://" not in _SPACE.split(before)[-1]


def _plain_date(match: re.Match[bytes]) -> bool:
    return _not_in_uuid(match) and _not_in_url(match)


def _day_and_month(match: re.Match[bytes]) -> bool:
    """Whether 3/14/2019 and 14/3/2019, and 03/14/19 with all zeros, can be dates."""
    first, second, year = match[1], match[2], match[3]
    if len(year) == 2 and (len(first) < 2 or len(second) < 2):
        return False
    low, high = sorted((int(first), int(second)))
    return 1 <= low <= 12 and high <= 31 and _not_in_url(match)


def _compact_date(match: re.Match[bytes]) -> bool:
    try:
        datetime.date(int(match[0][:4]), int(match[0][4:6]), int(match[0][6:8]))
    except ValueError:
        return False
    return _plain_date(match)


def _phone(match: re.Match[bytes]) -> bool:
    return 9 <= sum(48 <= c <= 57 for c in match[0]) <= 15 and _not_in_uuid(match)


def _email(match: re.Match[bytes]) -> bool:
    ending = match[0].rpartition(b".")[2].lower()
    return ending not in (b"png", b"jpg", b"svg", b"py", b"js", b"css") and not match[0].startswith(b"git@")


def _uid(match: re.Match[bytes]) -> bool:
    # Those below 1.2.840.10008 are the standard's own: kinds of objects, not objects.
    return len(match[0]) >= 20 and not match[0].startswith(b"1.2.840.10008.")


def _with_shapes(*words: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((word, word.translate(_SHAPE)) for word in words)


_PATTERNS = (
    _Pattern("field", _VENDOR_FIELD, words=_with_shapes(*_VENDOR_WORDS)),
    _Pattern("field", _SPOKEN, words=_with_shapes(*_SPOKEN_WORDS)),
    _Pattern(
        "barcode",
        re.compile(
            rb"(?<![0-9A-Za-z])(?:TCGA-[0-9A-Z]{2}-[0-9A-Z]{4}(?:-[0-9A-Z]{2,4})*|C3[LN]-\d{5}(?:-\d{2})?|"
            rb"GTEX-[0-9A-Z]{4,5}(?:-\d{4})?)(?![0-9A-Za-z])"
        ),
        words=_with_shapes(b"TCGA-", b"C3L-", b"C3N-", b"GTEX-"),
    ),
    _Pattern(
        "accession",
        re.compile(
            rb"(?<![0-9A-Za-z])(?:[A-Z]{1,3}-?\d\d[-/]\d{4,7}|[A-Z]{1,3}[-/](?:19|20)\d\d[-/]\d{3,7}|"
            rb"\d\d-[A-Z]{1,2}-\d{4,6})(?![0-9A-Za-z])"
        ),
        shapes=(
            b"A00-0000",
            b"A00/0000",
            b"A-00-0000",
            b"A-00/0000",
            b"A-0000-000",
            b"A/0000/000",
            b"00-A-0000",
            b"00-AA-0000",
        ),
        holds=_not_in_uuid,
    ),
    _Pattern(
        "date",
        re.compile(rb"(?<![0-9A-Za-z])(?:19|20)\d\d([-/:])(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])(?!\d)"),
        shapes=(b"0000-00-00", b"0000/00/00", b"0000:00:00"),
        holds=_plain_date,
    ),
    _Pattern(
        "date",
        re.compile(rb"(?<![0-9A-Za-z./])(\d\d?)/(\d\d?)/((?:19|20)\d\d|\d\d)(?![0-9A-Za-z/]|\.\d)"),
        shapes=(b"0/00/00", b"0/0/0000"),
        holds=_day_and_month,
    ),
    _Pattern(
        "date",
        re.compile(
            rb"(?<![0-9A-Za-z.])(?:0?[1-9]|[12]\d|3[01])\.(?:0?[1-9]|1[0-2])\.(?:19|20)\d\d(?![0-9A-Za-z]|\.\d)"
        ),
        shapes=(b"0.00.0000", b"0.0.0000"),
        holds=_plain_date,
    ),
    _Pattern(
        "date",
        re.compile(
            rb"(?i)(?<![0-9A-Za-z])(?:\d\d?(?:st|nd|rd|th)?(?:\. ?|[ /-])" + _MONTH + rb"(?:\.?,? |[./-])(?:19|20)\d\d|"
            rb"\d\d?-" + _MONTH + rb"-\d\d|" + _MONTH + rb"\.? {1,2}\d\d?(?:st|nd|rd|th)?,? (?:(?:19|20)\d\d|"
            rb"[0-2]\d:[0-5]\d:[0-5]\d(?: [A-Z]{3,4})? (?:19|20)\d\d))(?!\d)"
        ),
        shapes=(
            b"0 Aaa",
            b"0-Aaa",
            b"0/Aaa",
            b"0.Aaa",
            b". Aaa",
            b"0 AAA",
            b"0-AAA",
            b"0/AAA",
            b"0.AAA",
            b"0 aaa",
            b"0-aaa",
            b"a Aaa",
            b"Aa 0",
            b"aa 0",
            b"aa  0",
            b"AA 0",
            b"AA  0",
            b"a. 0",
            b"A. 0",
        ),
        roots=(b"jan", b"feb", b"mar", b"apr", b"may", b"jun", b"jul", b"aug", b"sep", b"oct", b"nov", b"dec"),
        holds=_plain_date,
    ),
    _Pattern(
        "date",
        re.compile(
            rb"(?<![0-9A-Za-z.#+])(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
            rb"(?:[01]\d[0-5]\d[0-5]\d)?(?![0-9A-Za-z]|\.\d+\.)"
        ),
        shapes=tuple(
            before + b"00000000"
            for before in (
                b" ",
                b'"',
                b"'",
                b"_",
                b"-",
                b"/",
                b",",
                b";",
                b"\n",
                b"\t",
                b">",
                b"=",
                b":",
                b"[",
                b"(",
                b"|",
            )
        ),
        holds=_compact_date,
    ),
    _Pattern(
        "person",
        re.compile(
            rb"(?<![0-9" + _LETTERS + rb"])[A-Z\xc3-\xd0][" + _LETTERS + rb"'-]+(?: [" + _LETTERS + rb"'-]+)*\^+"
            rb"[A-Z\xc3-\xd0][" + _LETTERS + rb"'^ -]*"
        ),
        words=_with_shapes(b"^"),
    ),
    _Pattern(
        "email",
        re.compile(
            rb"(?<![0-9A-Za-z._%+-])[0-9A-Za-z._%+-]{1,64}@(?:[0-9A-Za-z-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![0-9A-Za-z])"
        ),
        words=_with_shapes(b"@"),
        holds=_email,
    ),
    _Pattern(
        "phone",
        re.compile(
            rb"(?<![0-9A-Za-z.+])\+\d{1,3}[ /-]?(?:\(0?\d{1,4}\)[ /-]?)?\d{1,5}(?:[ /-]\d{2,5}){2,4}(?![0-9.])|"
            rb"(?<![0-9A-Za-z])\(\d{3}\) ?\d{3}[-. ]\d{4}(?!\d)|(?<![0-9A-Za-z.-])\d{3}[-. ]\d{3}-\d{4}(?![0-9-])|"
            rb"(?i:\b(?:tel|phone|fax|mobile)\b[.:= ]{1,3}[+(]?\d[\d ()/.-]{7,}\d)"
        ),
        words=_with_shapes(b"tel", b"Tel", b"TEL", b"hone", b"HONE", b"fax", b"Fax", b"FAX", b"obile"),
        shapes=(b"+0", b"(000)", b"000-000-0000", b"000.000-0000", b"000 000-0000"),
        holds=_phone,
    ),
    _Pattern(
        "home",
        re.compile(
            rb"(?<![\w.:~-])\\?/(?:home|Users)\\?/[^\s\"'<>/\\:,;|?*]{1,64}|"
            rb"\b[A-Za-z]:[\\/]{1,2}(?:Users|Documents and Settings)[\\/]{1,2}[^\s\"'<>/\\:,;|?*]{1,64}"
        ),
        words=_with_shapes(b"home/", b"home\\/", b"Users/", b"Users\\", b"Settings\\"),
    ),
    _Pattern(
        "uid",
        re.compile(rb"(?<![0-9.])(?:1\.[0-3]|2\.25|2\.16)(?:\.\d{1,39}){1,16}(?![0-9.])"),
        shapes=(b"0.0.0", b"0.00.0"),
        holds=_uid,
    ),
)
