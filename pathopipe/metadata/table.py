"""Case data as vectors: numbers standardised, classes one column each, missing cells said."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pathopipe.cohort import is_missing
from pathopipe.errors import UsageError
from pathopipe.registry import nearest

__all__ = ["TableColumn", "TableEncoder", "as_number"]

# Numbers with fewer distinct values than this may be codes (grades, TCGA's sample types), so classes serve them better.
_FEW_NUMBERS: Final = 5
_MOST_CLASSES: Final = 50
# A value farther out than this many standard deviations is more likely a slip of the pen than news.
_FARTHEST: Final = 10.0


def as_number(text: str) -> float | None:
    """The number that a cell holds; None where it is none or not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableColumn:
    """One column and what was learnt of it."""

    name: str
    classes: tuple[str, ...] = ()
    """In small letters, each with a number of its own, and one more for all others; empty: a quantity."""
    mean: float = 0.0
    std: float = 1.0

    @property
    def width(self) -> int:
        """Numbers, the one that says "missing" among them."""
        return len(self.classes) + 2 if self.classes else 2


class TableEncoder:
    """Columns of a table as numbers, typed and imputed by the training rows.

    A column is a quantity where all its cells are numbers and at least five differ; a missing one is the mean. All else
    are classes, small and capital letters alike; those of fewer than ``least_rows`` training rows, and those never
    seen, are one class "other". The last number of each column is 1 where the cell is missing.
    """

    def __init__(self, *, least_rows: int = 3) -> None:
        self.least_rows = least_rows
        self.columns: tuple[TableColumn, ...] = ()

    @property
    def width(self) -> int:
        """Numbers a row."""
        return sum(column.width for column in self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """What each number says, ``column=value`` for classes."""
        found: list[str] = []
        for column in self.columns:
            found += [f"{column.name}={of}" for of in (*column.classes, "other")] if column.classes else [column.name]
            found.append(f"{column.name} is missing")
        return tuple(found)

    def fit(self, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> "TableEncoder":
        """Learn types, means and classes from the training rows alone; columns that are empty there are left out.

        Raises:
            UsageError: A column is in no row.
        """
        known = dict.fromkeys(name for row in rows for name in row)
        fitted = []
        for name in columns:
            if name not in known:
                raise UsageError(f"no column '{name}' in the table; {nearest(name, known)}")
            stated = [cell.strip() for row in rows if not is_missing(cell := row.get(name, ""))]
            if stated:
                fitted.append(self._fit_column(name, stated))
        self.columns = tuple(fitted)
        return self

    def _fit_column(self, name: str, stated: Sequence[str]) -> TableColumn:
        numbers = [as_number(cell) for cell in stated]
        if None not in numbers and len(set(numbers)) >= _FEW_NUMBERS:
            values = np.asarray(numbers, np.float64)
            std = float(values.std())
            return TableColumn(name=name, mean=float(values.mean()), std=std if std > 0 else 1.0)
        counts = Counter(cell.casefold() for cell in stated).most_common(_MOST_CLASSES)
        frequent = sorted(of for of, count in counts if count >= self.least_rows)
        # Without a frequent class "other" alone would say no more than "not missing".
        return TableColumn(name=name, classes=tuple(frequent or sorted(of for of, _ in counts)))

    def transform(self, rows: Sequence[Mapping[str, str]]) -> NDArray[np.float32]:
        """Rows as numbers, (n, width); a column that a row lacks is missing, and so is a text where numbers are due."""
        out = np.zeros((len(rows), self.width), np.float32)
        start = 0
        for column in self.columns:
            places = {of: start + place for place, of in enumerate(column.classes)}
            last = start + column.width - 1
            for number, row in enumerate(rows):
                cell = row.get(column.name, "").strip()
                if is_missing(cell):
                    out[number, last] = 1
                elif column.classes:
                    out[number, places.get(cell.casefold(), last - 1)] = 1
                elif (value := as_number(cell)) is None:
                    out[number, last] = 1
                else:
                    out[number, start] = np.clip((value - column.mean) / column.std, -_FARTHEST, _FARTHEST)
            start += column.width
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"least_rows": self.least_rows, "columns": [asdict(column) for column in self.columns]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "TableEncoder":
        """The reverse of :meth:`to_json`."""
        encoder = cls(least_rows=record["least_rows"])
        encoder.columns = tuple(
            TableColumn(**{**column, "classes": tuple(column["classes"])}) for column in record["columns"]
        )
        return encoder
