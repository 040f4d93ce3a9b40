"""The cohort: what is joined, what is left out, and what is refused with one clear line."""

from pathlib import Path

import numpy as np
import pytest

from pathopipe.errors import UsageError
from pathopipe.metadata.cases import MetadataCohort, check_tasks, read_cohort, read_reports
from pathopipe.metadata.tasks import TaskSpec

KIND = TaskSpec(name="kind", column="kind", kind="multi-class", classes=("normal", "tumour"))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Twelve slides of six patients; the last slide states nothing."""
    rows = [
        f"s{number},patient-{number // 2},{site},{('normal', 'tumour')[number % 2]},{40 + number}"
        for number, site in enumerate(["north"] * 6 + ["south"] * 5)
    ]
    path = tmp_path / "manifest.csv"
    path.write_text("\n".join(["slide_id,patient_id,site,kind,age", *rows, "s11,patient-5,,NA,"]) + "\n")
    return path


def write_features(folder: Path, slides: list[str], tiles: int = 4) -> Path:
    folder.mkdir()
    for slide in slides:
        np.savez(folder / f"{slide}.npz", features=np.full((tiles, 3), len(slide), np.float32))
    return folder


def test_slides_meet_their_images_reports_and_rows(manifest: Path, tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", ["s0", "s1", "s99"])
    reports = tmp_path / "reports.csv"
    reports.write_text('patient_id,text\npatient-1,"Colon of patient-1, pink."\npatient-9,Lung.\n')
    cohort = read_cohort(manifest, [KIND], features=features, reports=reports)
    assert [case.modalities for case in cohort.cases[:5]] == [("image", "table")] * 2 + [("text", "table")] * 2 + [
        ("table",)
    ]
    assert cohort.cases[2].text == cohort.cases[3].text == "Colon of  , pink."
    assert cohort.cases[0].bag is not None
    assert cohort.cases[0].bag.n_tiles == 4
    assert cohort.cases[0].row == {"age": "40"}
    assert cohort.table_columns == ("age",)
    np.testing.assert_array_equal(cohort.truth["kind"][:, 0], [0, 1] * 5 + [0])
    said = "\n".join(cohort.notes)
    for part in ("10 slides without features", "1 slide with features but not in", "1 report of no slide", "'s11'"):
        assert part in said
    assert len(cohort) == 11


def test_rows_are_taken_in_order(manifest: Path) -> None:
    taken = read_cohort(manifest, [KIND]).take(np.asarray([7, 2]))
    assert [case.slide_id for case in taken.cases] == ["s7", "s2"]
    assert (taken.patients, taken.sites) == (("patient-3", "patient-1"), ("south", "north"))
    np.testing.assert_array_equal(taken.truth["kind"], [[1], [0]])


def test_no_column_is_an_input_that_names_or_states(manifest: Path) -> None:
    with pytest.raises(UsageError, match=r"column 'kind' can't be an input: it records the task 'kind'"):
        read_cohort(manifest, [KIND], table_columns=["kind"])
    with pytest.raises(UsageError, match=r"no column 'aeg'; did you mean 'age'"):
        read_cohort(manifest, [KIND], table_columns=["aeg"])


def test_prediction_looks_at_no_label(manifest: Path) -> None:
    odd = TaskSpec(name="kind", column="kind", kind="multi-class", classes=("a", "b"))
    cohort = read_cohort(manifest, [odd], table_columns=["age", "gone"], labels=False)
    assert np.isnan(cohort.truth["kind"]).all()
    assert cohort.table_columns == ("age",)
    with pytest.raises(UsageError, match="'normal' is no class"):
        read_cohort(manifest, [odd])


def test_nothing_to_learn_from_is_said(manifest: Path) -> None:
    with pytest.raises(UsageError, match="none of 12 slides has an image, a report or a column"):
        read_cohort(manifest, [KIND], table_columns=())


def test_a_task_without_its_column_has_no_label(manifest: Path) -> None:
    task = TaskSpec(name="stain", column="kinds", kind="multi-label", classes=("HE", "PAS"))
    cohort = read_cohort(manifest, [KIND, task])
    assert cohort.truth["stain"].shape == (11, 2)
    assert np.isnan(cohort.truth["stain"]).all()
    assert any("task 'stain': no column 'kinds' in manifest.csv; did you mean 'kind'?" in note for note in cohort.notes)


def test_sites_are_a_task_like_any_other(manifest: Path) -> None:
    cohort = read_cohort(manifest, [TaskSpec(name="site", column="site", kind="multi-class")])
    assert cohort.tasks[0].classes == ("north", "south")
    np.testing.assert_array_equal(cohort.truth["site"][:, 0], [0] * 6 + [1] * 5)


# --- tasks that can't be learnt ----------------------------------------------------------------------------------


def labelled(manifest: Path, cells: list[str], task: TaskSpec) -> MetadataCohort:
    rows = [f"s{number},p{number},{cell},{number % 4}" for number, cell in enumerate(cells)]
    manifest.write_text("\n".join(["slide_id,patient_id,c,age", *rows]) + "\n")
    return read_cohort(manifest, [task])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["a"] * 12, "column 'c' holds 'a' only"),
        (["NA"] * 12, "no slide has a label in column 'c'"),
        (["a", "b"] * 4 + [""] * 9, "8 patients with a label, 10 are the least"),
        (["a"] * 12 + ["b"], "no two classes have two patients each ('a': 12, 'b': 1)"),
    ],
)
def test_what_cannot_be_learnt_is_one_clear_line(tmp_path: Path, cells: list[str], message: str) -> None:
    task = TaskSpec(name="t", column="c", kind="multi-class", classes=("a", "b"))
    with pytest.raises(UsageError) as caught:
        check_tasks(labelled(tmp_path / "m.csv", cells, task))
    assert f"task 't': {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_can_be_learnt_passes(tmp_path: Path) -> None:
    check_tasks(
        labelled(tmp_path / "m.csv", ["a", "b"] * 5, TaskSpec(name="t", column="c", kind="ordinal", classes=("a", "b")))
    )
    check_tasks(
        labelled(
            tmp_path / "m.csv",
            ["HE", "HE;PAS"] * 5,
            TaskSpec(name="t", column="c", kind="multi-label", classes=("HE", "PAS")),
        )
    )
    number = TaskSpec(name="t", column="c", kind="continuous")
    check_tasks(labelled(tmp_path / "m.csv", [f"{n}.5" for n in range(10)], number))
    with pytest.raises(UsageError, match="holds '2' only"):
        check_tasks(labelled(tmp_path / "m.csv", ["2"] * 10, number))


# --- reports -----------------------------------------------------------------------------------------------------

TEXT = "Größe 3 µm – “pink” naïve tissue.\r\nSecond line"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_reports_in_any_encoding(tmp_path: Path, encoding: str, as_folder: bool) -> None:
    if as_folder:
        path = tmp_path / "reports"
        path.mkdir()
        (path / "p1.txt").write_bytes(TEXT.encode(encoding))
    else:
        path = tmp_path / "reports.csv"
        path.write_bytes(f'patient_id;text\r\np1;"{TEXT}"\r\n'.encode(encoding))
    reports = read_reports(path)
    assert reports.by_id == {"p1": TEXT.replace("\r\n", "\n")}
    assert bool(reports.notes) == (encoding == "cp1252")


def test_bytes_that_are_nowhere_are_dropped_and_said(tmp_path: Path) -> None:
    (tmp_path / "p1.txt").write_bytes(b"Pink\x81 tissue \xe9. " * 20)
    reports = read_reports(tmp_path)
    assert reports.by_id["p1"].startswith("Pink tissue é.")
    assert "1 file of reports is not in Unicode" in reports.notes[0]


def test_several_reports_of_a_patient_are_one(tmp_path: Path) -> None:
    path = tmp_path / "reports.csv"
    path.write_text("Patient_ID,Text,day\np1,One.,1\np2,,1\np1,Two.,2\n")
    assert read_reports(path).by_id == {"p1": "One.\nTwo."}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("slide,text\na,b\n", r"has the columns 'text' and 'slide_id' or 'patient_id' \(found: slide, text\)"),
        ("", "found: nothing"),
        ("slide_id,text\na\n", "row 2: 1 cells under 2 columns"),
        ("slide_id,text\n,b\n", "row 2: slide_id is empty"),
        ("slide_id,text\na,\n", "all reports are empty"),
        (f"slide_id,text\na,{'x' * 200_000}\n", "give a folder of .txt files"),
        ("\x01\x02\x03%PDF" * 50, "not a text file"),
    ],
)
def test_a_wrong_report_table_is_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "reports.csv"
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_reports(path)
    assert "\n" not in str(caught.value)


def test_reports_that_are_not_there_or_of_nobody(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.csv: the reports can't be read"):
        read_reports(tmp_path / "absent.csv")
    with pytest.raises(UsageError, match=r"no \.txt files here"):
        read_reports(tmp_path)
    reports = tmp_path / "reports.csv"
    reports.write_text("slide_id,text\nother,Pink.\n")
    with pytest.raises(UsageError, match=r"no report of reports\.csv is of a slide or patient of manifest\.csv"):
        read_cohort(manifest, [KIND], reports=reports)


def test_sentences_that_state_the_label_are_taken_out_and_counted(manifest: Path, tmp_path: Path) -> None:
    reports = tmp_path / "reports.csv"
    reports.write_text("patient_id,text\npatient-0,Pink. Stage pT2. Free.\n")
    task = TaskSpec(name="stage", column="kind", kind="multi-class", classes=("normal", "tumour"))
    cohort = read_cohort(manifest, [task], reports=reports)
    assert cohort.cases[0].text == "Pink. Free."
    assert "1 sentence that may state a label taken out of 1 report of 1" in cohort.notes
    open_text = read_cohort(manifest, [task], reports=reports, deny_stating=False)
    assert open_text.cases[0].text == "Pink. Stage pT2. Free."


@pytest.mark.shared_data
def test_real_bags_are_tasks_too(shared_data: Path, tmp_path: Path) -> None:
    arrays = np.load(shared_data / "mil" / "ebhi_bags.npz", allow_pickle=False)
    ids = [str(name).replace(" ", "-") for name in arrays["bag_ids"]]
    features = tmp_path / "features"
    features.mkdir()
    rows = []
    for number, name in enumerate(ids):
        np.savez(features / f"bag{number}.npz", features=arrays["X"][arrays["bag"] == number].astype(np.float32))
        rows.append(f"bag{number},{name},{arrays['bag_label'][number]},{arrays['bag_worst_class'][number]}")
    manifest = tmp_path / "m.csv"
    manifest.write_text("\n".join(["slide_id,patient_id,cancer,worst", *rows]) + "\n")
    tasks = [TaskSpec(name=name, column=name, kind="multi-class") for name in ("cancer", "worst")]
    cohort = read_cohort(manifest, tasks, features=features)
    check_tasks(cohort)
    assert len(cohort) == 250
    assert all(case.modalities == ("image",) for case in cohort.cases)
    assert np.isclose(np.nanmean(cohort.truth["cancer"]), 0.3, atol=0.01)
    assert sum(case.bag.n_tiles for case in cohort.cases if case.bag) == 1601
