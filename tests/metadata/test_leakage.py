"""What states a label is taken out, and what gives one away is named."""

import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pathopipe.cohort import LabelTable
from pathopipe.metadata.cases import Case, MetadataCohort
from pathopipe.metadata.leakage import deny, patterns_of, probe, refused_columns, without_ids
from pathopipe.metadata.tasks import TaskSpec

STAGE = TaskSpec(name="t-stage", column="ajcc_pathologic_t", kind="ordinal", classes=("1", "2", "3", "4"))
GROUP = TaskSpec(name="group", column="group", kind="multi-class", classes=("a", "b"))


def a_table(columns: dict[str, list[str]], slides: list[str] | None = None) -> LabelTable:
    n = len(next(iter(columns.values())))
    ids = tuple(slides or [f"slide-{number:03d}" for number in range(n)])
    patients = tuple(f"patient-{number:03d}" for number in range(n))
    return LabelTable(
        source="m.csv",
        slide_ids=ids,
        patient_ids=patients,
        sites=("",) * n,
        split=None,
        columns={name: tuple(cells) for name, cells in columns.items()},
    )


def a_cohort(
    labels: list[int], texts: list[str] | None = None, columns: dict[str, list[str]] | None = None, slides_each: int = 1
) -> MetadataCohort:
    """Each patient ``slides_each`` times, with one report and one row."""
    rows = [row for row in range(len(labels)) for _ in range(slides_each)]
    cases = tuple(
        Case(
            slide_id=f"s{number}",
            patient_id=f"p{row}",
            site="",
            text=texts[row] if texts else None,
            row={name: cells[row] for name, cells in (columns or {}).items()},
        )
        for number, row in enumerate(rows)
    )
    return MetadataCohort(
        cases=cases,
        tasks=(GROUP,),
        truth={"group": np.asarray([[labels[row]] for row in rows], np.float64)},
        patients=tuple(case.patient_id for case in cases),
        sites=("",) * len(cases),
        table_columns=tuple(columns or {}),
    )


@pytest.mark.parametrize(
    "statement",
    [
        "pT2b N0 MX",
        "Pathologic stage: see below",
        "ypT3",
        "T1.",
        "pTis",
        "TNM: T2N0M0",
        "pTlc",
        "pT 2",
        "AJCC 7th edition",
        "Final: pN1 (2/14)",
        "Dukes B",
        "the tumor is T3",
        "PT4",
    ],
)
def test_sentences_that_state_a_stage_go(statement: str) -> None:
    text = f"The colon holds a tumour. {statement}; Margins are free.\nTissue follows."
    kept, count = deny(text, patterns_of(STAGE))
    assert (kept, count) == ("The colon holds a tumour. Margins are free. Tissue follows.", 1)


@pytest.mark.parametrize(
    "finding",
    [
        "Tissue is pink",
        "Ten of 12 nodes (4 mm) at 10 cm",
        "THE TUMOR IS 2 CM",
        "Nottingham histology; T-shirt",
        "Multiple nodules, 3 x 2 cm",
        "T cells and NK cells are few",
        "Part 1: skin",
        "the patient at 3 months",
    ],
)
def test_findings_stay(finding: str) -> None:
    assert deny(finding, patterns_of(STAGE))[1] == 0


def test_only_stages_and_grades_are_known_beforehand() -> None:
    assert patterns_of(GROUP) == ()
    own = TaskSpec(name="fixation", column="c", kind="multi-class", classes=("a", "b"), deny_text=("(?i)ffpe",))
    assert deny("An FFPE block. Pink.", patterns_of(own)) == ("Pink.", 1)
    grade = TaskSpec(name="grade", column="g", kind="ordinal", classes=("1", "2"))
    assert deny("Moderately differentiated (G2). Pink.", patterns_of(grade)) == ("Pink.", 1)


def test_ids_are_cut_out() -> None:
    text = "Case of tcga-ab-1234-01Z-00-DX1, 1C6D5A40-0123-4abc-8def-0123456789ab: HX-77 of M7, HX-778."
    cleaned = without_ids(text, ("HX-77", "M7"))
    assert cleaned.split() == ["Case", "of", ",", ":", "of", "M7,", "HX-778."]


def test_columns_that_name_patients_slides_or_labels_are_refused() -> None:
    n = 40
    rng = np.random.default_rng(0)
    slides = [f"AB-{number:03d}-{'DX' if number % 2 else 'TS'}{number % 3}" for number in range(n)]
    columns = {
        "group": ["a"] * n,
        "grouped": ["a", "b"] * (n // 2),
        "Case ID": ["x", "y"] * (n // 2),
        "svs_bytes": ["1", "2"] * (n // 2),
        "cut": ["DX" if number % 2 else "TS" for number in range(n)],
        "owner": [f"see patient-{number:03d}" for number in range(n)],
        "taken": [f"{1 + number % 12}/3/2019" for number in range(n)],
        "read": [f"{number % 28 + 1} March 2020" for number in range(n)],
        "year": [str(2001 + number % 9) for number in range(n)],
        "number": [str(7000 + 13 * number) for number in range(n)],
        "remark": [f"free text {number % 30}" for number in range(n)],
        "same": ["x"] * n,
        "age": [str(30 + number % 25) for number in range(n)],
        "size_cm": [f"{value:.3f}" for value in rng.uniform(0, 9, n)],
        "sex": ["f", "m"] * (n // 2),
        "rank": [str(number % 5) for number in range(n)],
    }
    task = TaskSpec(name="group", column="group", kind="multi-class", classes=("a", "b"), deny_columns=("grouped",))
    refused = refused_columns(a_table(columns, slides), [task])
    assert set(columns) - set(refused) == {"age", "size_cm", "sex", "rank"}
    for name, reason in {
        "group": "records the task 'group'",
        "grouped": "denies it",
        "Case ID": "its name",
        "svs_bytes": "its name",
        "cut": "a part of the slide's id",
        "owner": r"names the patient \(slide AB-000-TS0\)",
        "taken": "dates",
        "read": "dates",
        "year": "years",
        "number": "40 values nearly name the 40 patients",
        "remark": "30 values nearly name",
        "same": "no more than one value",
    }.items():
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(refused[name])


def test_a_word_that_tells_all_is_named_and_one_that_tells_little_is_not() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 120).tolist()
    texts = [
        f"report {rng.choice(['pink', 'blue', 'grey'])} {'renal' if label else 'colic'} n{number}"
        for number, label in enumerate(labels)
    ]
    leaks = probe(a_cohort(labels, texts, slides_each=3))
    assert {leak.what for leak in leaks} == {"renal", "colic"}
    for leak in leaks:
        assert (leak.where, leak.auroc, leak.precision) == ("report", 1.0, 1.0)
        assert leak.support == sum(label == (leak.what == "renal") for label in labels)
        assert f"the word '{leak.what}' gives group = {leak.label} away" in leak.line()


def test_a_word_that_states_the_label_in_a_few_reports_is_named() -> None:
    rng = np.random.default_rng(2)
    labels = [number % 2 for number in range(200)]
    texts = [f"n{number} {'pt2' if number % 8 == 1 else 'none'}" for number in range(200)]
    (leak,) = [leak for leak in probe(a_cohort(labels, texts)) if leak.what == "pt2"]
    assert (leak.label, leak.precision, leak.support) == ("b", 1.0, 25)
    assert leak.auroc < 0.7
    shuffled = rng.permutation(labels).tolist()
    assert probe(a_cohort(shuffled, texts)) == []


def test_columns_are_probed_by_value_and_by_size() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 100)
    columns = {
        "code": [f"{'xyz'[value]}" for value in np.where(labels, 2, rng.integers(0, 2, 100))],
        "size": [f"{value:.4f}" for value in labels * 2 + rng.uniform(0, 1, 100)],
        "noise": [f"{value:.4f}" for value in rng.uniform(0, 1, 100)],
        "weak": [
            str(label if draw < 0.7 else 1 - label) for label, draw in zip(labels, rng.uniform(0, 1, 100), strict=True)
        ],
    }
    leaks = probe(a_cohort(labels.tolist(), columns=columns))
    assert {leak.what for leak in leaks} == {"code", "size"}
    assert all(leak.where == "table" and leak.auroc == 1 and leak.support == 100 for leak in leaks)
    assert "column 'code' alone tells group" in leaks[0].line()


def test_the_auroc_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 400)
    size = labels + rng.normal(0, 0.7, 400)
    (leak,) = probe(a_cohort(labels.tolist(), columns={"size": [f"{value}" for value in size]}), least_auroc=0)
    # Of two halves the lower one counts, so it lies near and not above the whole.
    whole = roc_auc_score(labels, size)
    assert whole - 0.05 < leak.auroc <= whole


def test_chance_finds_nothing() -> None:
    rng = np.random.default_rng(5)
    words = np.asarray([f"word{number}" for number in range(300)])
    texts = [" ".join(words[rng.random(300) < 0.15]) for _ in range(100)]
    assert probe(a_cohort(rng.integers(0, 2, 100).tolist(), texts)) == []


def test_too_few_patients_are_not_judged() -> None:
    assert probe(a_cohort([0, 1] * 6, [f"{'renal' if number % 2 else 'colic'} report" for number in range(12)])) == []


@pytest.mark.shared_data
def test_the_deny_list_leaves_no_stated_stage_in_real_reports(shared_data: Path, tmp_path: Path) -> None:
    import csv
    import gzip

    from pathopipe.metadata.cases import read_cohort

    with gzip.open(shared_data / "reports" / "tcga_reports.csv.gz", "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[::2]
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("slide_id", "patient_id", "t_stage"), *((f"{r['patient']}-1", r["patient"], r["t_stage"]) for r in rows)]
        )
    with (tmp_path / "reports.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("patient_id", "text"), *((r["patient"], r["text"]) for r in rows)])
    task = TaskSpec(name="t-stage", column="t_stage", kind="ordinal", classes=("1", "2", "3", "4"))
    open_text, denied = (
        read_cohort(tmp_path / "manifest.csv", [task], reports=tmp_path / "reports.csv", deny_stating=on)
        for on in (False, True)
    )
    assert len(denied) == 361
    assert {"pt2", "pt3"} <= {leak.what for leak in probe(open_text)}
    # Words of findings ("duodenal") may remain.
    assert not [leak.what for leak in probe(denied) if re.fullmatch(r"[a-z]{0,2}t[0-4x].*|stag.*", leak.what)]
    assert not any(case.patient_id in (case.text or "").upper() for case in denied.cases)
