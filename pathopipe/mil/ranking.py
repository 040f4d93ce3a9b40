"""Results of a training: figures of every encoder and head on the test folds, the nested choice, and paired tests."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import UsageError
from pathopipe.files import durable_file
from pathopipe.mil import weighted
from pathopipe.mil.cases import Cases, gather_cases
from pathopipe.mil.compare import Comparison, compare_models, describe_ranking, main_value
from pathopipe.mil.evaluate import FigureTable, figures_of
from pathopipe.mil.targets import TargetSpec, scores_of, slice_of
from pathopipe.mil.train import Cohort, Job, TrainRequest, fold_folder, read_predictions

__all__ = ["NESTED", "Ranking", "TargetRanking", "rank_models", "size_line", "write_results"]

NESTED: Final = "nested choice"
"""The row of the model that was chosen by validation inside each fold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRanking:
    """All models on one target, best first."""

    target: str
    tables: dict[str, FigureTable]
    """Figures by ``encoder head``."""
    comparisons: tuple[Comparison, ...]
    chosen: tuple[str, ...]
    """The nested choice of each fold; empty where there was one model only."""

    def lines(self) -> list[str]:
        """What the tests and the nested choice say."""
        said = describe_ranking(self.comparisons)
        if self.chosen:
            said.append(
                f"{NESTED}: {', '.join(self.chosen)}, by validation inside each fold; "
                "the figure to publish where the model was chosen here."
            )
        return said


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Every target of a training."""

    targets: tuple[TargetRanking, ...]


def rank_models(request: TrainRequest, cohorts: Sequence[Cohort], jobs: Sequence[Job]) -> Ranking:
    """Figures over the test parts of all folds together, with 95 % intervals over patients.

    The nested choice takes, in each fold, the model with the best main figure on that fold's validation predictions.

    Raises:
        UsageError: Predictions are missing or damaged.
    """
    by_name = {cohort.encoder: cohort for cohort in cohorts}
    first = cohorts[0]
    models = list(dict.fromkeys((job.encoder, job.head) for job in jobs))
    parts: dict[str, dict[int, _Part]] = {f"{encoder} {head}": {} for encoder, head in models}
    for job in jobs:
        cohort = by_name[job.encoder]
        path = fold_folder(request.out, cohort, job) / "predictions.csv"
        parts[f"{job.encoder} {job.head}"][job.fold] = _Part.read(path, cohort)
    rankings = []
    for number, spec in enumerate(first.specs):
        rankings.append(_rank_target(request, first, number, spec, parts))
    return Ranking(targets=tuple(rankings))


@dataclass(frozen=True, slots=True)
class _Part:
    """Predictions of one fold."""

    test: NDArray[np.intp]
    """Numbers of the bags."""
    val: NDArray[np.intp]
    test_values: dict[str, NDArray[np.float64]]
    val_values: dict[str, NDArray[np.float64]]

    @classmethod
    def read(cls, path: Path, cohort: Cohort) -> "_Part":
        rows, values = read_predictions(path, cohort.specs)
        place = {bag.bag_id: number for number, bag in enumerate(cohort.bags)}
        try:
            bags = np.asarray([place[row["bag_id"]] for row in rows], np.intp)
        except KeyError as error:
            raise UsageError(f"{path}: bag {error} is not in the cohort; delete its folder and train again") from None
        is_test = np.asarray([row["part"] == "test" for row in rows], bool)
        return cls(
            bags[is_test],
            bags[~is_test],
            {name: of[is_test] for name, of in values.items()},
            {name: of[~is_test] for name, of in values.items()},
        )


def _rank_target(
    request: TrainRequest, cohort: Cohort, number: int, spec: TargetSpec, parts: dict[str, dict[int, _Part]]
) -> TargetRanking:
    cases = {name: _test_cases(cohort, number, spec, of) for name, of in parts.items()}
    comparisons = compare_models(cases, draws=request.settings.draws, seed=request.seed) if len(cases) > 1 else []
    chosen: list[str] = []
    if len(cases) > 1:
        picked: dict[int, _Part] = {}
        for fold in range(len(cohort.folds)):
            scored = {name: _val_value(cohort, number, spec, of[fold]) for name, of in parts.items()}
            known = {name: value for name, value in scored.items() if np.isfinite(value)}
            if not known:
                break
            best = max(known, key=lambda name: known[name])
            chosen.append(best)
            picked[fold] = parts[best][fold]
        else:
            cases[NESTED] = _test_cases(cohort, number, spec, picked)
    tables = {name: figures_of(one, seed=request.seed, draws=request.settings.draws) for name, one in cases.items()}
    order = sorted(tables, key=lambda name: -_or_lowest(tables[name].main.value))
    return TargetRanking(
        target=spec.name,
        tables={name: tables[name] for name in order},
        comparisons=tuple(comparisons),
        chosen=tuple(chosen) if NESTED in cases else (),
    )


def _or_lowest(value: float | None) -> float:
    return -np.inf if value is None else value


def _test_cases(cohort: Cohort, number: int, spec: TargetSpec, parts: dict[int, _Part]) -> Cases:
    bags = np.concatenate([part.test for part in parts.values()])
    values = np.concatenate([part.test_values[spec.name] for part in parts.values()])
    folds = np.concatenate([np.full(len(part.test), fold) for fold, part in parts.items()])
    return _cases(cohort, number, spec, bags, values, folds.tolist() if len(parts) > 1 else None)


def _val_value(cohort: Cohort, number: int, spec: TargetSpec, part: _Part) -> float:
    known = np.isfinite(cohort.truth[part.val][:, slice_of(cohort.specs, number, "truth")]).any(axis=1)
    if not known.any():
        return float("nan")
    return main_value(_cases(cohort, number, spec, part.val, part.val_values[spec.name], None))


def _cases(
    cohort: Cohort,
    number: int,
    spec: TargetSpec,
    bags: NDArray[np.intp],
    values: NDArray[np.float64],
    folds: list[int] | None,
) -> Cases:
    truth = cohort.truth[bags][:, slice_of(cohort.specs, number, "truth")]
    return gather_cases(
        spec.kind,
        truth if spec.width > 1 else truth[:, 0],
        scores_of(spec, values),
        [cohort.bags[int(row)].patient_id for row in bags],
        [cohort.bags[int(row)].site for row in bags],
        spec.classes or None,
        folds=folds,
    )


def size_line(cohort: Cohort) -> str:
    """What the number of tiles alone says of the first target: models can learn it in place of what tiles show."""
    spec = cohort.specs[0]
    truth = cohort.truth[:, slice_of(cohort.specs, 0, "truth")]
    sizes = np.asarray([bag.n_tiles for bag in cohort.bags], np.float64)
    known = np.isfinite(truth).all(axis=1)
    if spec.kind == "binary":
        one = np.ones((1, int(known.sum())))
        value = float(weighted.auroc(truth[known, 0] == 1, sizes[known])(one)[0])
        return f"The number of tiles alone gives AUROC {value:.3f} for {spec.name}."
    column = truth[known, 0]
    if spec.kind in ("multiclass", "multilabel") or len(set(column)) < 2 or len(set(sizes[known])) < 2:
        return f"Bags hold {sizes.min():.0f} to {sizes.max():.0f} tiles, median {np.median(sizes):.0f}."
    value = float(weighted.spearman(column, sizes[known])(np.ones((1, len(column))))[0])
    return f"The number of tiles alone has Spearman correlation {value:.3f} with {spec.name}."


def write_results(out: Path, ranking: Ranking) -> None:
    """Write ``results.csv`` (a row a figure) and ``results.json`` (the tests beside)."""
    rows: list[dict[str, Any]] = []
    for target in ranking.targets:
        for model, table in target.tables.items():
            encoder, _, head = model.partition(" ") if model != NESTED else ("", "", NESTED)
            rows += [{"target": target.target, "encoder": encoder, "head": head, **row} for row in table.rows()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    record = [
        {
            "target": target.target,
            "models": {
                name: {
                    "patients": table.n_patients,
                    "bags": table.n_bags,
                    "notes": table.notes,
                    "figures": table.rows(),
                }
                for name, table in target.tables.items()
            },
            "tests": [asdict(one) for one in target.comparisons],
            "nested_choice": list(target.chosen),
            "says": target.lines(),
        }
        for target in ranking.targets
    ]
    for name, content in (("results.csv", text.getvalue()), ("results.json", json.dumps(record, indent=1))):
        with durable_file(out / name) as file:
            file.write(content.encode())
