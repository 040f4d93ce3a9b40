"""Table cells as numbers: types, missing cells, rare classes, and a round trip."""

import json

import numpy as np
import pytest
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from pathopipe.errors import UsageError
from pathopipe.metadata.table import TableEncoder

ROWS = [{"age": str(age), "sex": sex} for age, sex in zip(range(40, 52), "MFMFMFMFMFMF", strict=True)]


def test_numbers_and_classes_are_those_of_scikit_learn() -> None:
    encoded = TableEncoder().fit(ROWS, ["age", "sex"]).transform(ROWS)
    age = StandardScaler().fit_transform(np.arange(40.0, 52)[:, None])
    sex = OneHotEncoder(sparse_output=False).fit_transform([[row["sex"].lower()] for row in ROWS])
    np.testing.assert_allclose(encoded[:, :1], age, rtol=1e-6)
    np.testing.assert_array_equal(encoded[:, 2:4], sex)
    assert not encoded[:, [1, 4, 5]].any()


def test_a_missing_cell_is_the_mean_and_says_so() -> None:
    encoder = TableEncoder().fit(ROWS, ["age", "sex"])
    assert encoder.names == ("age", "age is missing", "sex=f", "sex=m", "sex=other", "sex is missing")
    encoded = encoder.transform([{"age": "NA", "sex": ""}, {}, {"age": "old", "sex": "?"}])
    np.testing.assert_array_equal(encoded, [[0, 1, 0, 0, 0, 1]] * 3)


def test_rare_and_new_classes_are_one() -> None:
    rows = [{"organ": organ} for organ in ["lung"] * 5 + ["liver"] * 4 + ["skin"]]
    encoder = TableEncoder(least_rows=3).fit(rows, ["organ"])
    assert encoder.columns[0].classes == ("liver", "lung")
    np.testing.assert_array_equal(
        encoder.transform([{"organ": "skin"}, {"organ": "spleen"}, {"organ": " LUNG "}]),
        [[0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]],
    )


def test_few_numbers_are_classes_and_outliers_are_bounded() -> None:
    assert TableEncoder().fit([{"grade": str(n % 3)} for n in range(30)], ["grade"]).columns[0].classes == (
        "0",
        "1",
        "2",
    )
    assert abs(TableEncoder().fit(ROWS, ["age"]).transform([{"age": "1e9"}])[0, 0]) == 10


def test_an_empty_column_is_left_out_and_an_absent_one_named() -> None:
    assert TableEncoder().fit([{"a": "", "b": "1"}, {"a": "NA", "b": "2"}], ["a", "b"]).columns[0].name == "b"
    with pytest.raises(UsageError, match="no column 'aeg' in the table; did you mean 'age'"):
        TableEncoder().fit(ROWS, ["aeg"])


def test_what_was_learnt_survives_json() -> None:
    encoder = TableEncoder().fit(ROWS, ["age", "sex"])
    other = TableEncoder.from_json(json.loads(json.dumps(encoder.to_json())))
    np.testing.assert_array_equal(other.transform(ROWS), encoder.transform(ROWS))
