"""The front door: small, sorted, documented; and errors that cross process borders."""

import inspect
import pickle

import pytest

import pathopipe
from pathopipe import errors


def test_names_are_sorted_and_there() -> None:
    assert pathopipe.__all__ == sorted(pathopipe.__all__)
    assert set(pathopipe._HOMES) == set(pathopipe.__all__)
    for name in pathopipe.__all__:
        assert inspect.getdoc(getattr(pathopipe, name)), name
        assert name in dir(pathopipe)


def test_unknown_names_fail_as_ever() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pathopipe.nothing


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_cross_process_borders(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.PathopipeError)
    sent = kind("what, where, what to do", slide_id="s1")
    got = pickle.loads(pickle.dumps(sent))
    assert (type(got), str(got), got.slide_id) == (kind, "what, where, what to do", "s1")
