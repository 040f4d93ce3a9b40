"""Task files are strict, cells become labels, and what is no class is named."""

from pathlib import Path

import numpy as np
import pytest

from pathopipe.cohort import LabelTable, read_labels
from pathopipe.errors import UsageError
from pathopipe.metadata.tasks import TaskSpec, encode, read_tasks, settle

TEMPLATE = Path(__file__).parents[2] / "configs" / "metadata_tasks.yaml"


def a_table(folder: Path, column: str, cells: list[str], patients: list[str] | None = None) -> LabelTable:
    path = folder / "manifest.csv"
    of = patients or [f"p{number}" for number in range(len(cells))]
    rows = [f"s{number},{patient},{cell}" for number, (patient, cell) in enumerate(zip(of, cells, strict=True))]
    path.write_text("\n".join([f"slide_id,patient_id,{column}", *rows]) + "\n")
    return read_labels(path)


def read(folder: Path, text: str) -> tuple[TaskSpec, ...]:
    path = folder / "tasks.yaml"
    path.write_text(text)
    return read_tasks(path)


def test_the_template_reads() -> None:
    tasks = {task.name: task for task in read_tasks(TEMPLATE)}
    assert {"tissue", "fixation", "procedure", "stain", "site", "scanner", "sample-type", "stage"} <= set(tasks)
    assert {task.kind for task in tasks.values()} == {"multi-class", "multi-label", "ordinal", "continuous"}
    assert tasks["sample-type"].rename["01"] == "tumour"
    assert tasks["fixation"].codes["FFPE"] == "SNOMED CT 441652008"


def test_everything_is_the_text_that_stands_there(tmp_path: Path) -> None:
    (task,) = read(tmp_path, "tasks:\n  - {name: t, kind: multi-class, classes: [no, 01, 1.0], weight: 0.5}\n")
    assert task.classes == ("no", "01", "1.0")
    assert (task.column, task.weight) == ("t", 0.5)


def test_a_task_survives_json() -> None:
    for task in read_tasks(TEMPLATE):
        assert TaskSpec.from_json(task.to_json()) == task


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "one list under the key 'tasks'"),
        ("tasks: [", "not valid YAML"),
        ("tasks: []", "no task in it"),
        ("tasks: [word]", "task 1: not a mapping"),
        (
            "tasks:\n- {name: t, kind: multi-clas, classes: [a, b]}",
            "unknown kind 'multi-clas'; did you mean 'multi-class'",
        ),
        ("tasks:\n- {name: t, kind: continuous, clases: [a]}", "unknown key 'clases'; did you mean 'classes'"),
        ("tasks:\n- {kind: continuous}", "task 1: no 'name'"),
        ("tasks:\n- {name: T 1, kind: continuous}", "small letters"),
        ("tasks:\n- {name: t, kind: continuous}\n- {name: t, kind: continuous}", "'t' stands there 2 times"),
        ("tasks:\n- {name: t, kind: continuous, name: u}", "line 2: 'name' stands there twice"),
        ("tasks:\n- {name: t, kind: ordinal}", "an ordinal task names its classes"),
        ("tasks:\n- {name: t, kind: multi-class, classes: [a]}", "one class only"),
        ("tasks:\n- {name: t, kind: multi-class, classes: [a, A]}", "class 'a' stands there 2 times"),
        ("tasks:\n- {name: t, kind: multi-class, classes: [a, none]}", "'none' would read as a missing cell"),
        (
            "tasks:\n- {name: t, kind: multi-class, classes: [aaa, b], codes: {aab: X}}",
            "no class 'aab'; did you mean 'aaa'",
        ),
        ("tasks:\n- {name: t, kind: multi-class, classes: [a, b], rename: {x: c}}", "rename: no class 'c'"),
        ("tasks:\n- {name: t, kind: continuous, weight: 0}", "weight '0' is no number above 0"),
        ("tasks:\n- {name: t, kind: continuous, weight: much}", "weight 'much'"),
        ("tasks:\n- {name: t, kind: continuous, deny: {text: ['(']}}", "no regular expression"),
        ("tasks:\n- {name: t, kind: continuous, deny: {colums: [a]}}", "'deny.colums'; did you mean 'columns'"),
        ("tasks:\n- {name: t, column: patient_id, kind: continuous}", "names the slide or the patient"),
        ("tasks:\n- &a {name: t, kind: continuous}\n- *a", "references"),
        ("tasks: !!python/name:os.system", "tags"),
    ],
)
def test_a_wrong_task_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"2 problems\n.*task 'a'.*\n.*task 'b'"):
        read(tmp_path, "tasks:\n- {name: a, kind: ordinal}\n- {name: b, kind: numeric}\n")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.yaml: the task file can't be read"):
        read_tasks(tmp_path / "absent.yaml")


def test_cells_become_class_numbers(tmp_path: Path) -> None:
    task = TaskSpec(
        name="t",
        column="kind",
        kind="multi-class",
        classes=("normal", "tumour"),
        rename={"01": "tumour", "unknown": ""},
    )
    table = a_table(tmp_path, "kind", ["01", "Normal", "", "Unknown", "NA", "TUMOUR"])
    np.testing.assert_array_equal(encode(task, table)[:, 0], [1, 0, np.nan, np.nan, np.nan, 1])
    assert task.target.kind == "binary"


def test_several_labels_in_a_cell(tmp_path: Path) -> None:
    task = TaskSpec(name="t", column="stain", kind="multi-label", classes=("HE", "PAS", "IHC"), rename={"h&e": "HE"})
    truth = encode(task, a_table(tmp_path, "stain", ["H&E; PAS", "", "ihc"]))
    np.testing.assert_array_equal(truth, [[1, 1, 0], [np.nan] * 3, [0, 0, 1]])


def test_order_and_numbers(tmp_path: Path) -> None:
    ordinal = TaskSpec(name="t", column="c", kind="ordinal", classes=("low", "mid", "high"))
    np.testing.assert_array_equal(encode(ordinal, a_table(tmp_path, "c", ["high", "low", "?"]))[:, 0], [2, 0, np.nan])
    number = TaskSpec(name="t", column="c", kind="continuous")
    np.testing.assert_array_equal(encode(number, a_table(tmp_path, "c", ["1.5", "-", "7"]))[:, 0], [1.5, np.nan, 7])


def test_an_unknown_class_names_the_nearest_and_the_slides(tmp_path: Path) -> None:
    task = TaskSpec(name="fixation", column="c", kind="multi-class", classes=("FFPE", "frozen"))
    with pytest.raises(UsageError, match="column 'c': 'frosen' is no class.*did you mean 'frozen'.*2 slides: s1, s3"):
        encode(task, a_table(tmp_path, "c", ["FFPE", "frosen", "frozen", "frosen"]))
    with pytest.raises(UsageError, match=r"'2020-01-03' is no number.*\(slide s0\)"):
        encode(TaskSpec(name="age", column="c", kind="continuous"), a_table(tmp_path, "c", ["2020-01-03", "2"]))


def test_classes_of_the_column_where_none_are_given(tmp_path: Path) -> None:
    task = TaskSpec(name="site", column="c", kind="multi-class")
    cells = ["b", "a", "A", "b", "c", "c"]
    table = a_table(tmp_path, "c", cells, patients=["p0", "p1", "p2", "p3", "p4", "p4"])
    settled, note = settle(task, table)
    assert settled.classes == ("a", "b")
    assert "1 values of a single patient left out (c)" in note
    np.testing.assert_array_equal(encode(settled, table)[:, 0], [1, 0, 0, 1, np.nan, np.nan])
    assert settle(settled, table) == (settled, "")
