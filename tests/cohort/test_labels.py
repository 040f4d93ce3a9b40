"""Label tables: patients are never guessed in silence, and what doesn't match is named."""

from pathlib import Path

import pytest

from pathopipe.cohort import LabelTable, is_missing, join_labels, read_labels
from pathopipe.errors import UsageError


def put(folder: Path, text: str, name: str = "labels.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        read_labels(path, **options)  # type: ignore[arg-type]
    return str(caught.value)


TEXT = "slide_id,patient_id,site,split,grade,age\ns1,p1,A,train,high,60\ns2,p1,A,train,high,\ns3,p2,,test,NA,71\n"


def test_a_table_without_paths(tmp_path: Path) -> None:
    table = read_labels(put(tmp_path, TEXT))
    assert table.source == "labels.csv"
    assert table.slide_ids == ("s1", "s2", "s3")
    assert table.patient_ids == ("p1", "p1", "p2")
    assert table.sites == ("A", "A", "")
    assert table.split == ("train", "train", "test")
    assert table.columns == {"grade": ("high", "high", "NA"), "age": ("60", "", "71")}
    assert table.column("site") == table.sites
    assert len(table.take([2, 0])) == 2
    assert table.take([2, 0]).column("age") == ("71", "60")
    with pytest.raises(UsageError, match="no column 'grad'; did you mean 'grade'"):
        table.column("grad")


def test_a_manifest_is_a_label_table(tmp_path: Path) -> None:
    table = read_labels(put(tmp_path, "slide_id;path;patient_id;y\na;gone.svs;p;1\n"))
    assert table.columns == {"path": ("gone.svs",), "y": ("1",)}
    assert table.split is None
    assert table.sites == ("",)


def test_other_names_of_columns(tmp_path: Path) -> None:
    path = put(tmp_path, "slide,patient,hospital,part,y\na,p,H,train,1\nb,q,H,test,0\n")
    table = read_labels(path, id_column="slide", patient_column="patient", site_column="hospital", split_column="part")
    assert (table.patient_ids, table.sites, table.split) == (("p", "q"), ("H", "H"), ("train", "test"))
    assert "no column 'slide_id' (found: slide, patient, hospital, part, y); did you mean" in refused(path)
    assert "no column 'person'" in refused(path, id_column="slide", patient_column="person")


def test_without_patients_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = read_labels(put(tmp_path, "slide_id,y\na,1\nb,0\n"))
    assert table.patient_ids == ("a", "b")
    assert "each of the 2 slides counts as a patient of its own" in caplog.text
    assert "TCGA" not in caplog.text


def test_tcga_barcodes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two, other = "TCGA-AB-1234-01Z-00-DX1", "TCGA-AB-1234-01A-01-TS1.AAAA", "tcga-cd-9999-01Z-00-DX1"
    shared = put(tmp_path, f"slide_id,y\n{one},1\n{two},1\n{other},0\n")
    said = refused(shared)
    assert "1 TCGA patients have several slides (TCGA-AB-1234 has 2)" in said
    assert "first 12 characters" in said
    assert read_labels(shared, tcga_patients=True).patient_ids == ("TCGA-AB-1234", "TCGA-AB-1234", "TCGA-CD-9999")
    assert not caplog.records
    table = read_labels(put(tmp_path, f"slide_id,y\n{one},1\n{other},0\n"))
    assert table.patient_ids == (one, other)
    assert "they are TCGA barcodes, whose first 12 characters name the patient" in caplog.text
    assert "'mine' is no TCGA barcode" in refused(put(tmp_path, f"slide_id\n{one}\nmine\n"), tcga_patients=True)
    # Stated patients win.
    assert read_labels(put(tmp_path, f"slide_id,patient_id\n{one},x\n{two},x\n")).patient_ids == ("x", "x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slide_id,patient_id\na,p\na,q\n", "labels.csv rows 2 and 3: slide_id 'a' twice; write one row a slide"),
        ("slide_id,patient_id\na,p\nb,NA\n", "labels.csv row 3: patient_id is empty; name the patient"),
        ("slide_id,patient_id\n../a,p\n", "holds a path separator"),
        ("slide_id,patient_id\na\n", "1 cells under 2 columns, too few"),
        ("slide_id,patient_id\n", "no slide below the header"),
    ],
)
def test_wrong_tables(tmp_path: Path, text: str, says: str) -> None:
    assert says in refused(put(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "the label table can't be read (No such file or directory)" in refused(tmp_path / "none.csv")


@pytest.mark.parametrize("text", ["", " ", "NA", "n/a", "NaN", "None", "null", "?", "-", "#N/A"])
def test_missing(text: str) -> None:
    assert is_missing(text)


@pytest.mark.parametrize("text", ["0", "no", "unknown", "negative", "N0", "N"])
def test_not_missing(text: str) -> None:
    assert not is_missing(text)


def test_by_patient(tmp_path: Path) -> None:
    table = read_labels(put(tmp_path, TEXT)).by_patient(["grade"])
    assert table.slide_ids == table.patient_ids == ("p1", "p2")
    assert table.columns == {"grade": ("high", ""), "age": ("60", "71")}
    assert table.sites == ("A", "")
    assert table.split == ("train", "test")
    contradicting = put(tmp_path, "slide_id,patient_id,y,scanner\na,p,1,X\nb,p,0,Y\nc,q,1,X\n")
    with pytest.raises(UsageError, match=r"patient 'p' has slides of different y \('1', '0'\)"):
        read_labels(contradicting).by_patient(["y"])
    assert read_labels(contradicting).by_patient([]).columns == {"y": ("", "1"), "scanner": ("", "X")}


# --- the join ----------------------------------------------------------------------------------------------------


def table_of(*slide_ids: str, y: tuple[str, ...] | None = None) -> LabelTable:
    return LabelTable(
        source="t.csv",
        slide_ids=slide_ids,
        patient_ids=slide_ids,
        sites=("",) * len(slide_ids),
        split=None,
        columns={"y": y if y is not None else ("1",) * len(slide_ids)},
    )


def test_what_does_not_match_is_counted_and_named() -> None:
    join = join_labels(
        table_of("a", "b", "c", "d", y=("1", "", "0", "1")), {"z", "b", "d", "a"}, targets=["y"], where="F"
    )
    assert join.table.slide_ids == ("a", "d")
    assert (join.without_features, join.unlabelled, join.unlisted) == (("c",), ("b",), ("z",))
    assert join.lines() == [
        "1 slide labelled but without features, left out: 'c'",
        "1 slide with features but every target empty, left out: 'b'",
        "1 slide with features but not in t.csv, left out: 'z'",
    ]
    whole = join_labels(table_of("a", "b", y=("", "")), ["a", "b"], where="F")
    assert whole.table.slide_ids == ("a", "b")
    assert not whole.lines()


def test_several_targets_need_one_label() -> None:
    table = LabelTable(
        source="t.csv",
        slide_ids=("a", "b", "c"),
        patient_ids=("a", "b", "c"),
        sites=("",) * 3,
        split=None,
        columns={"x": ("1", "NA", ""), "y": ("", "2", "")},
    )
    assert join_labels(table, ["a", "b", "c"], targets=["x", "y"], where="F").table.slide_ids == ("a", "b")


@pytest.mark.parametrize(
    ("labels", "features", "says"),
    [
        (["a.svs", "b.svs"], ["a", "b"], "the ids of the labels end in a file extension: take it away"),
        (["a", "b"], ["a.tiff", "b.tiff"], "the ids of the features end in a file extension"),
        (["Slide1", "Slide2"], ["SLIDE1", "SLIDE2"], "differ in upper and lower case"),
        (["TCGA-AB-1234-01Z-00-DX1"], ["TCGA-AB-1234-01Z-00-DX1.9F-1"], "what follows the first dot"),
        (["TCGA-AB-1234"], ["TCGA-AB-1234-01Z-00-DX1"], "the ids of the labels are TCGA patients, not slides"),
        (["case17_HE"], ["case17"], "the ids of the features are only the beginnings of the other side's ids"),
        (["a1", "a2"], ["b1", "b2"], "the ids share nothing"),
    ],
)
def test_the_cause_is_guessed(labels: list[str], features: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        join_labels(table_of(*labels), features, where="F")
    assert says in str(caught.value)
    for slide_id in [*labels, *features]:
        assert repr(slide_id) in str(caught.value)


def test_three_ids_of_each_side_are_shown() -> None:
    with pytest.raises(
        UsageError, match=r"\(5 labels: 'a0', 'a1', 'a2' and 2 more; 4 features: 'b0', 'b1', 'b2' and 1"
    ):
        join_labels(table_of(*(f"a{n}" for n in range(5))), [f"b{n}" for n in range(4)], where="F")


def test_nothing_to_join() -> None:
    with pytest.raises(UsageError, match="F: no features here"):
        join_labels(table_of("a"), [], where="F")
    with pytest.raises(UsageError, match="column 'y' is empty in all 2 rows"):
        join_labels(table_of("a", "b", y=("", "NA")), ["a"], targets=["y"], where="F")
    with pytest.raises(UsageError, match="none of the 1 slides with features has a label in y"):
        join_labels(table_of("a", "b", y=("", "1")), ["a"], targets=["y"], where="F")
    with pytest.raises(UsageError, match="no column 'z'"):
        join_labels(table_of("a"), ["a"], targets=["z"], where="F")


@pytest.mark.shared_data
def test_real_tables(shared_data: Path) -> None:
    lung = read_labels(
        shared_data / "mil" / "tcga_labels" / "lung_labels.csv", id_column="slide", patient_column="patient"
    )
    assert len(lung) == 685
    assert set(lung.column("subtype")) == {"adenocarcinoma", "squamous"}
    bags = read_labels(shared_data / "mil" / "tcga_bags" / "labels.csv", id_column="file", patient_column="patient")
    with pytest.raises(UsageError, match="the ids of the labels end in a file extension"):
        join_labels(bags, ["TCGA-3X-AAVA-01Z-00-DX1", "TCGA-AD-6964-01Z-00-DX1"], where="F")
