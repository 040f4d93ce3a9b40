"""Covariates beside the tiles: age, sex, site as numbers, with missing values and scaling from the training part."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pathopipe.cohort import LabelTable, is_missing
from pathopipe.errors import UsageError
from pathopipe.mil.bags import Bag

__all__ = ["CovariateSpec", "encode_covariates", "fit_covariates", "fit_size", "standard_size"]

_MOST_VALUES: Final = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class CovariateSpec:
    """One column, and what was fitted on its training values."""

    name: str
    values: tuple[str, ...] = ()
    """Categories, each with a column of its own; empty for a number. An unknown category is zero in all."""
    mean: float = 0.0
    std: float = 1.0
    has_missing: bool = False
    """A further column says where the value is missing; a number then is the mean."""

    @property
    def width(self) -> int:
        """Encoded columns."""
        return (len(self.values) or 1) + self.has_missing

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "CovariateSpec":
        """The reverse of :meth:`to_json`."""
        plain: dict[str, Any] = {key: tuple(of) if isinstance(of, list) else of for key, of in record.items()}
        return cls(**plain)


def fit_covariates(names: Sequence[str], table: LabelTable, rows: NDArray[np.intp]) -> tuple[CovariateSpec, ...]:
    """Categories, means and scales of columns, from the training rows alone.

    Raises:
        UsageError: No such column, no value in the training rows, or so many different ones that it looks like an id.
    """
    fitted = []
    for name in names:
        column = table.column(name)
        cells = [column[row].strip() for row in rows]
        stated = [cell for cell in cells if not is_missing(cell)]
        if not stated:
            raise UsageError(f"{table.source}: covariate '{name}' is empty in the training part; leave it out")
        has_missing = len(stated) < len(cells)
        numbers = [_number(cell) for cell in column if not is_missing(cell)]
        if all(number is not None for number in numbers):
            values = np.asarray(stated, np.float64)
            std = float(values.std())
            spec = CovariateSpec(
                name=name, mean=float(values.mean()), std=std if std > 0 else 1.0, has_missing=has_missing
            )
        else:
            categories = tuple(sorted(set(stated)))
            if len(categories) > _MOST_VALUES:
                raise UsageError(
                    f"{table.source}: covariate '{name}' holds {len(categories)} different texts; "
                    f"at most {_MOST_VALUES} can be categories"
                )
            spec = CovariateSpec(name=name, values=categories, has_missing=has_missing)
        fitted.append(spec)
    return tuple(fitted)


def encode_covariates(specs: Sequence[CovariateSpec], table: LabelTable) -> NDArray[np.float32]:
    """Columns as numbers, (rows, sum of widths).

    Raises:
        UsageError: No such column, or a cell that is no number where training had numbers.
    """
    parts = [np.zeros((len(table), 0), np.float32)]
    for spec in specs:
        encoded = np.zeros((len(table), spec.width), np.float32)
        for row, cell in enumerate(table.column(spec.name)):
            if is_missing(cell):
                encoded[row, -1] = spec.has_missing
            elif spec.values:
                if cell.strip() in spec.values:
                    encoded[row, spec.values.index(cell.strip())] = 1
            else:
                value = _number(cell.strip())
                if value is None:
                    raise UsageError(f"{table.source}: '{cell}' in covariate '{spec.name}' is no number")
                encoded[row, 0] = (value - spec.mean) / spec.std
        parts.append(encoded)
    return np.concatenate(parts, axis=1)


def fit_size(bags: Sequence[Bag]) -> tuple[float, float]:
    """Mean and spread of the logarithm of the number of tiles, over training bags."""
    sizes = np.log([bag.n_tiles for bag in bags])
    std = float(sizes.std())
    return float(sizes.mean()), std if std > 1e-6 else 1.0


def standard_size(bags: Sequence[Bag], fitted: tuple[float, float]) -> NDArray[np.float32]:
    """(bags, 1) the logarithm of the number of tiles, by the mean and spread of training."""
    sizes = np.log([bag.n_tiles for bag in bags])
    return ((sizes - fitted[0]) / fitted[1])[:, None].astype(np.float32)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
