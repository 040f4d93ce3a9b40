"""The manifest: read whatever spreadsheets write, refuse with one message that names every problem."""

import csv
import io
import os
import threading
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathopipe.cohort import check_refs, check_slide_id, read_manifest
from pathopipe.errors import UsageError
from pathopipe.records import SlideRef


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.svs", "b.svs", "c.svs", "ä b.svs"):
        (tmp_path / name).write_bytes(b"slide")
    return tmp_path


def put(folder: Path, text: str | bytes, name: str = "cohort.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read_manifest(path, **options)
    return str(caught.value)


# --- what is read ------------------------------------------------------------------------------------------------


def test_a_plain_table(folder: Path) -> None:
    path = put(folder, "slide_id,path,mpp,patient_id,label\na,a.svs,0.25,P1,tumor\nb,b.svs,,P2,\n")
    assert read_manifest(path) == [
        SlideRef("a", folder / "a.svs", 0.25, {"patient_id": "P1", "label": "tumor"}),
        SlideRef("b", folder / "b.svs", None, {"patient_id": "P2", "label": ""}),
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom", "utf-32"])
def test_delimiters_line_ends_and_encodings(folder: Path, delimiter: str, line_end: str, encoding: str) -> None:
    rows = [["path", "note", "slide_id"], ["ä b.svs", "größer", "ä 1"], ["b.svs", "", "b"]]
    text = line_end.join(delimiter.join(row) for row in rows) + line_end
    if encoding.endswith("-bom"):
        encoding = encoding.removesuffix("-bom")
        text = "\ufeff" + text
    first, second = read_manifest(put(folder, text.encode(encoding)))
    assert first == SlideRef("ä 1", folder / "ä b.svs", None, {"note": "größer"})
    assert second.slide_id == "b"


def test_quotes_blank_rows_and_stray_space(folder: Path) -> None:
    text = '\n slide_id ,"path", note \n\na,"a.svs","one, ""two""\nthree"\n,,\n   \nb, b.svs ,  spaced  \nc,c.svs,last'
    a, b, c = read_manifest(put(folder, text))
    assert a.columns == {"note": 'one, "two"\nthree'}
    assert (b.path, b.columns) == (folder / "b.svs", {"note": "spaced"})
    assert c.columns == {"note": "last"}


def test_empty_cells_beyond_the_last_column(folder: Path) -> None:
    (a,) = read_manifest(put(folder, "slide_id;path;;\na;a.svs;;\n;;;\n"))
    assert a == SlideRef("a", folder / "a.svs")


def test_the_delimiter_is_that_of_the_header(folder: Path) -> None:
    (a,) = read_manifest(put(folder, 'slide_id;path;"site, town, ward"\na;a.svs;x,y,z\n'))
    assert a.columns == {"site, town, ward": "x,y,z"}


@pytest.mark.parametrize(
    ("delimiter", "text", "mpp"),
    [
        (",", "0.25", 0.25),
        (";", "0,25", 0.25),
        (";", "0.25", 0.25),
        ("\t", " 0,5 ", 0.5),
        (",", "50", 50.0),
        (",", "", None),
    ],
)
def test_mpp(folder: Path, delimiter: str, text: str, mpp: float | None) -> None:
    path = put(
        folder,
        f"slide_id,path,mpp\na,a.svs,{text}\n".replace(",", delimiter, 4) if text else "slide_id,path,mpp\na,a.svs,\n",
    )
    (a,) = read_manifest(path)
    assert a.mpp == mpp


def test_paths_are_relative_to_the_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tables").mkdir()
    path = put(folder / "tables", f"slide_id,path\na,../a.svs\nb,{folder / 'b.svs'}\n")
    monkeypatch.chdir(folder / "tables")
    for manifest in (path, Path("cohort.csv")):
        a, b = read_manifest(manifest)
        assert a.path.samefile(folder / "a.svs")
        assert b.path == folder / "b.svs"


def test_a_folder_may_be_a_slide(folder: Path) -> None:
    (folder / "series").mkdir()
    (one,) = read_manifest(put(folder, "slide_id,path\none,series\n"))
    assert one.path == folder / "series"


def test_ids_are_composed(folder: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Präparat é")
    (a,) = read_manifest(put(folder, f"slide_id,path\n{decomposed},a.svs\n"))
    assert a.slide_id == "Präparat é" != decomposed


def test_missing_files_may_be_allowed(folder: Path) -> None:
    path = put(folder, "slide_id,path\na,a.svs\nz,none.svs\n")
    a, z = read_manifest(path, allow_missing=True)
    assert (a.path.exists(), z.path) == (True, folder / "none.svs")
    assert "cohort.csv row 3: file " in refused(path)


def test_one_file_twice_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "link.svs").symlink_to("b.svs")
    text = "slide_id,path\na,a.svs\nb,b.svs\na2,./a.svs\nb2,link.svs\nc,none.svs\nc2,x/../none.svs\n"
    assert len(read_manifest(put(folder, text), allow_missing=True)) == 6
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("pathopipe", "WARNING")
    said = record.getMessage()
    assert "rows 2 and 4: './a.svs'" in said
    assert "rows 3 and 5: 'link.svs'" in said
    assert "rows 6 and 7: 'x/../none.svs'" in said
    caplog.clear()
    read_manifest(put(folder, "slide_id,path\na,a.svs\nb,b.svs\n"))
    assert not caplog.records


def test_two_names_with_equal_content_are_two_files(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_manifest(put(folder, "slide_id,path\na,a.svs\nb,b.svs\nc,c.svs\n"))
    assert not caplog.records


safe_text = st.text(st.characters(codec="utf-8", categories=("L", "N", "Zs", "P", "S")), max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(safe_text, min_size=1, max_size=6),
    delimiter=st.sampled_from([",", ";", "\t"]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_what_a_program_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, labels: list[str], delimiter: str, line_end: str, encoding: str
) -> None:
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=delimiter, lineterminator=line_end)
    writer.writerow(["slide_id", "label", "path"])
    writer.writerows([f"s{number}", label, f"{number}.svs"] for number, label in enumerate(labels))
    path = put(tmp_path_factory.mktemp("law"), written.getvalue().encode(encoding))
    refs = read_manifest(path, allow_missing=True)
    assert [ref.slide_id for ref in refs] == [f"s{number}" for number in range(len(labels))]
    assert [ref.columns["label"] for ref in refs] == [label.strip() for label in labels]


# --- what is refused ---------------------------------------------------------------------------------------------


def test_one_problem_is_one_line(folder: Path) -> None:
    said = refused(put(folder, "slide_id,path\na,a.svs\n\nb,b.svs\n../x,c.svs\n"))
    assert said == "cohort.csv row 5: slide_id '../x' holds a path separator; use letters, digits, '.', '_' or '-'"


def test_every_problem_is_listed_with_its_row(folder: Path) -> None:
    text = "slide_id,path,mpp\na,a.svs,0\n,b.svs,\nA,none.svs,x\nb,,\na,c.svs,0.5\nc,c.svs\nd,c.svs,1,2\n"
    said = refused(put(folder, text))
    heading, *lines = said.splitlines()
    assert heading == f"cohort.csv: {len(lines)} problems"
    assert [line.split(":")[0].strip() for line in lines] == [
        "row 2",
        "row 3",
        "row 4",
        "row 4",
        "row 5",
        "row 7",
        "row 8",
        "rows 2 and 4",
        "rows 2 and 6",
    ]
    assert "mpp '0' is not from 0.05 to 50" in lines[0]
    assert "slide_id is empty" in lines[1]
    assert "mpp 'x' is not a number" in lines[2]
    assert "none.svs' can't be found (No such file or directory); correct the path, or pass --allow-missing" in lines[3]
    assert "path is empty" in lines[4]
    assert "2 cells under 3 columns, too few" in lines[5]
    assert "4 cells under 3 columns, too many" in lines[6]
    assert "'a' and 'A' differ only in case" in lines[7]
    assert "slide_id 'a' twice; give every slide an id of its own" in lines[8]


def test_many_problems_are_counted(folder: Path) -> None:
    said = refused(put(folder, "slide_id,path\n" + "".join(f"s{n},none{n}.svs\n" for n in range(25))))
    lines = said.splitlines()
    assert lines[0] == "cohort.csv: 25 problems"
    assert len(lines) == 12
    assert lines[-1].strip() == "and 15 more"


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("slide,path", "no column 'slide_id' (found: slide, path); did you mean 'slide'? rename it"),
        ("Slide_ID,path", "no column 'slide_id' (found: Slide_ID, path); did you mean 'Slide_ID'? rename it"),
        ("slide_id,file_path", "no column 'path' (found: slide_id, file_path); did you mean 'file_path'? rename it"),
        ("slide_id,where", "no column 'path' (found: slide_id, where); add it, or rename"),
        ("slide_id,path,path", "column 'path' stands there twice"),
        ("slide_id,path,label,label", "column 'label' stands there twice"),
        ("slide_id,,path", "column 2 has no name"),
        ("slide_id,path,MPP", "column 'MPP' would pass unseen; write 'mpp'"),
        ("slide_id:path", "no column 'slide_id' (found: slide_id:path)"),
        ("slide_id path", "no column 'path' (found: slide_id path)"),
    ],
)
def test_wrong_headers(folder: Path, header: str, says: str) -> None:
    assert says in refused(put(folder, f"{header}\na,a.svs\n"))


@pytest.mark.parametrize("text", ["slide_id,path\n", "slide_id,path\n\n , \n"])
def test_no_rows(folder: Path, text: str) -> None:
    assert "no slide below the header; write one row a slide" in refused(put(folder, text))


@pytest.mark.parametrize("text", ["", "\ufeff", "\n \r\n"])
def test_empty_files(folder: Path, text: str) -> None:
    assert "the file is empty; write a header with slide_id and path" in refused(put(folder, text))


@pytest.mark.parametrize(
    "data", [b"\x89PNG\r\n\x1a\n\0\0\0", b"PK\x03\x04rest", b"II*\0", "slide_id".encode("utf-16-le")]
)
def test_files_that_are_no_text(folder: Path, data: bytes) -> None:
    assert "cohort.csv: not a text file; a manifest is a CSV table" in refused(put(folder, data))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_other_code_pages_are_refused(folder: Path, encoding: str) -> None:
    said = refused(put(folder, "slide_id,path\na,a.svs\nä,a.svs\n".encode(encoding)))
    assert said == (
        "cohort.csv line 3: byte 0xe4 is not UTF-8 (as Latin-1 the line reads 'ä,a.svs'); save the table as 'CSV UTF-8'"
    )


def test_tables_of_two_encodings_put_together(folder: Path) -> None:
    data = "slide_id,path\nä,a.svs\nb,b.svs\nü,a.svs\n".encode() + "ö,a.svs\né,a.svs\n".encode("latin-1")
    said = refused(put(folder, data))
    assert said.startswith(
        "cohort.csv line 5: byte 0xf6 is not UTF-8 (as Latin-1 the line reads 'ö,a.svs'); 2 such lines"
    )
    assert "among 2 with letters in UTF-8" in said


def test_a_second_table_with_its_mark_and_header(folder: Path) -> None:
    table = "\ufeffslide_id,path\na,a.svs\n"
    said = refused(put(folder, table + table.replace("a,a", "b,b")))
    assert "row 3: slide_id '\\ufeffslide_id' holds the invisible character U+FEFF" in said


def test_files_are_looked_at_only_where_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(folder, "slide_id,path\na,a.svs\nz,none.svs\nz2,none.svs\n")
    assert [ref.slide_id for ref in read_manifest(path, check_files=False)] == ["a", "z", "z2"]
    monkeypatch.setattr("pathopipe.cohort.manifest._stat", lambda place: pytest.fail(place))
    read_manifest(path, check_files=False)


def test_a_slow_file_system_is_asked_many_things_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    known = (folder / "a.svs").stat()

    def slow(place: str) -> os.stat_result | OSError:
        asked.append(threading.get_ident())
        time.sleep(0.002)
        if place.endswith("150.svs"):
            return FileNotFoundError(2, "No such file or directory")
        return known

    monkeypatch.setattr("pathopipe.cohort.manifest._stat", slow)
    path = put(folder, "slide_id,path\n" + "".join(f"s{n},{n}.svs\n" for n in range(200)))
    said = refused(path)
    assert said.startswith("cohort.csv row 152: file ")
    assert len(asked) == 200
    assert len(set(asked)) > 1


def test_damaged_utf_16(folder: Path) -> None:
    assert "damaged UTF-16 text" in refused(put(folder, "slide_id,path\na,a.svs".encode("utf-16")[:-1]))


@pytest.mark.parametrize("row", ['a,"a.svs\n', 'a,"a"b.svs\n', "a," + "x" * 200_000 + "\n"])
def test_broken_csv(folder: Path, row: str) -> None:
    assert refused(put(folder, f"slide_id,path\nb,b.svs\n{row}")).startswith("cohort.csv row 3: not CSV (")


def test_files_that_cannot_be_read(folder: Path) -> None:
    assert "can't be read (No such file or directory); check the path" in refused(folder / "none.csv")
    assert "can't be read (Is a directory)" in refused(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_files_without_permission(folder: Path) -> None:
    path = put(folder, "slide_id,path\n")
    path.chmod(0)
    assert "can't be read (Permission denied)" in refused(path)


@pytest.mark.parametrize("file", ["x" * 300, "a.svs/inner", "loop", "nu\0ll.svs"])
def test_odd_paths(folder: Path, file: str) -> None:
    (folder / "loop").symlink_to("loop")
    # A null byte would not pass as text in UTF-8.
    assert "cohort.csv row 2: " in refused(put(folder, f"slide_id,path\na,{file}\n".encode("utf-16")))


def test_backslashes_are_explained(folder: Path) -> None:
    assert "write '/' in place of '\\'" in refused(put(folder, "slide_id,path\na,slides\\a.svs\n"))


@pytest.mark.parametrize("mpp", ["0.04", "50.1", "-1", "nan", "inf", "0,25", "0.25um", "1e-7"])
def test_wrong_mpp(folder: Path, mpp: str) -> None:
    said = refused(put(folder, f'slide_id,path,mpp\na,a.svs,"{mpp}"\n'))
    assert said.startswith(f"cohort.csv row 2: mpp '{mpp}' is not ")


@pytest.mark.parametrize(
    "slide_id",
    ["TCGA-V5-A7RE-11A-01-TS1", "a b", "ß", "日本", "a.b.c", "_", "-", "7", "x" * 200, "CONSOLE", "é", "a(1)+#%&'"],
)
def test_safe_ids(folder: Path, slide_id: str) -> None:
    check_slide_id(slide_id)
    check_refs([SlideRef(slide_id, folder / "a.svs")], where="here")
    (read,) = read_manifest(put(folder, f'slide_id,path\n"{slide_id}",a.svs\n'))
    assert read.slide_id == slide_id


UNSAFE = [
    ("", "is empty"),
    ("  ", "is empty"),
    ("a/b", "holds a path separator"),
    ("a\\b", "holds a path separator"),
    ("/etc/passwd", "holds a path separator"),
    ("..", "begins with a dot"),
    ("../x", "holds a path separator"),
    ("a..b", "holds '..'"),
    (".hidden", "begins with a dot"),
    ("a\tb", "holds the invisible character U+0009"),
    ("a\nb", "holds the invisible character U+000A"),
    ("a\0b", "holds the invisible character U+0000"),
    ("a\x7fb", "holds the invisible character U+007F"),
    ("a\u202eb", "holds the invisible character U+202E"),
    ("a\u200b", "holds the invisible character U+200B"),
    ("a:b", "holds ':', which Windows refuses"),
    ("a*", "holds '*', which Windows refuses"),
    ("what?", "holds '?', which Windows refuses"),
    ("<a>", "holds '<', which Windows refuses"),
    ("a|b", "holds '|', which Windows refuses"),
    ('a"b', "holds '\"', which Windows refuses"),
    ("a.", "ends with a dot"),
    ("a ", "begins or ends with a space"),
    (" a", "begins or ends with a space"),
    ("a\u00a0", "begins or ends with a space"),
    ("con", "Windows keeps for itself"),
    ("LPT1.old", "Windows keeps for itself"),
    ("x" * 201, "is 201 bytes long; use at most 200"),
    ("日" * 67, "is 201 bytes long"),
]


@pytest.mark.parametrize(("slide_id", "says"), UNSAFE)
def test_unsafe_ids(folder: Path, slide_id: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_slide_id(slide_id)
    assert says in str(caught.value)
    assert str(caught.value).isprintable()
    with pytest.raises(UsageError) as caught:
        check_refs([SlideRef("fine", folder / "a.svs"), SlideRef(slide_id, folder / "b.svs")], where="folder")
    assert str(caught.value).startswith("folder: b.svs: ")
    assert says in str(caught.value)
    quoted = slide_id.replace('"', '""')
    said = refused(put(folder, f'slide_id,path\na,a.svs\n"{quoted}",b.svs\n'.encode("utf-16")))
    assert said.startswith("cohort.csv row 3: slide_id ")
    assert says in said


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(UsageError, match=r"U\+D800"):
        check_slide_id("a\ud800")


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ("a", "a", "slide_id 'a' twice"),
        ("Slide", "sLIDE", "differ only in case"),
        ("Straße", "STRASSE", "differ only in case"),
        ("É", "é", "differ only in case"),
        ("É", unicodedata.normalize("NFD", "é"), "differ only in case"),
        ("é", unicodedata.normalize("NFD", "é"), "twice"),
    ],
)
def test_ids_that_some_file_system_confuses(folder: Path, one: str, other: str, says: str) -> None:
    said = refused(put(folder, f"slide_id,path\n{one},a.svs\nx,b.svs\n{other},c.svs\n"))
    assert said.startswith("cohort.csv rows 2 and 4: ")
    assert says in said
    refs = [SlideRef(one, folder / "a.svs"), SlideRef("x", folder / "b.svs"), SlideRef(other, folder / "c.svs")]
    if "case" in says:  # files that exist under both names
        check_refs(refs, where="the folder")
        return
    with pytest.raises(UsageError, match=says) as caught:
        check_refs(refs, where="the folder")
    assert str(caught.value).startswith("the folder: ")
    assert "a.svs" in str(caught.value)
    assert "c.svs" in str(caught.value)
    assert "\n" not in str(caught.value)
    check_refs(refs[:2], where="the folder")


def test_check_refs_says_how_accents_differ(folder: Path) -> None:
    refs = [SlideRef(unicodedata.normalize(form, "é"), folder / f"{form}.svs") for form in ("NFC", "NFD")]  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="accents encoded in two ways"):
        check_refs(refs, where="folder")


def test_check_refs_lists_all(folder: Path) -> None:
    check_refs([], where="folder")
    refs = [SlideRef("a", folder / "a.svs"), SlideRef("a", folder / "a.tif"), SlideRef(".b", folder / ".b.svs")]
    with pytest.raises(UsageError) as caught:
        check_refs(refs, where="folder")
    heading, unsafe, double = str(caught.value).splitlines()
    assert heading == "folder: 2 problems"
    assert "'.b' begins with a dot" in unsafe
    assert "'a' twice; rename one, or give a manifest with an id for each" in double


@settings(max_examples=200, deadline=None)
@given(slide_id=st.text(max_size=12))
def test_an_id_that_passes_names_a_file(tmp_path_factory: pytest.TempPathFactory, slide_id: str) -> None:
    try:
        check_slide_id(slide_id)
    except UsageError:
        return
    folder = tmp_path_factory.getbasetemp() / "ids"
    folder.mkdir(exist_ok=True)
    path = folder / f"{slide_id}.zarr"
    assert path.parent == folder
    path.touch()
    assert path.name in os.listdir(folder)
    path.unlink()


@pytest.mark.slow
def test_a_hundred_thousand_rows(folder: Path) -> None:
    for number in range(0, 100_000, 1000):
        (folder / f"{number}.svs").touch()
    rows = [f"s{number},{number // 1000 * 1000}.svs,0.25,P{number % 9}" for number in range(100_000)]
    text = "slide_id,path,mpp,patient_id\n" + "\n".join(rows) + "\n"
    refs = read_manifest(put(folder, text))
    assert len(refs) == 100_000
    assert refs[-1] == SlideRef("s99999", folder / "99000.svs", 0.25, {"patient_id": "P0"})
    said = refused(put(folder, text + "S5,0.svs,,\n"))
    assert said.startswith("cohort.csv rows 7 and 100002: ")
