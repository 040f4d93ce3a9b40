"""Splits that can't leak: patients stay whole, classes are spread evenly, and nothing hangs on the order of rows."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import UsageError

__all__ = ["Fold", "SplitError", "check_folds", "folds_from_column", "nested_folds", "patient_strata"]

logger = logging.getLogger("pathopipe")

_PARTS: Final = {
    **dict.fromkeys(("train", "training", "fit"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "tune", "tuning", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "holdout", "held-out", "external"), "test"),
}
_SHOWN: Final = 5


class SplitError(UsageError):
    """Patients can't be parted as asked, or stand on both sides."""


@dataclass(frozen=True, slots=True)
class Fold:
    """One way to part a cohort. Arrays hold row numbers, ascending."""

    name: str
    train: NDArray[np.intp]
    val: NDArray[np.intp]
    """For early stopping and calibration; empty where none was asked for."""
    test: NDArray[np.intp]


def nested_folds(
    patients: Sequence[str],
    strata: Sequence[str],
    *,
    folds: int = 5,
    val_share: float = 0.2,
    seed: int = 0,
    sites: Sequence[str] | None = None,
    by_site: bool = False,
) -> list[Fold]:
    """Part a cohort into test folds by patient, and take a validation part out of what remains of each.

    Patients of one class are dealt out in rounds, one to each fold, so that folds differ by at most one patient in
    every class; within a round the patient with most bags goes to the fold with fewest. The result depends on patients,
    strata, sites and seed, not on the order of rows.

    Args:
        patients: Patient of each bag.
        strata: Class of each bag as text; ``""`` for all where there is nothing to balance. A patient whose bags are of
            several classes counts for the rarest of them.
        folds: Number of test folds, 2 or more.
        val_share: Share of the remaining patients of each class to validate on; 0 for none.
        seed: Another seed, another split.
        sites: Site of each bag; sites are spread evenly over the folds too.
        by_site: Leave whole sites out instead: all patients of a site are tested in one fold. Validation patients come
            from the sites trained on.

    Returns:
        One fold for each test part; each bag is in exactly one test part.

    Raises:
        SplitError: Fewer patients (or sites) than folds, one class only (also in the training part of a fold), or a
            patient at several sites with ``by_site``.
    """
    cohort = _Cohort.of(patients, strata, sites)
    if folds < 2:
        raise SplitError(f"{folds} folds: at least 2 are needed; set folds to 2 or more")
    if not 0 <= val_share < 1:
        raise SplitError(f"val_share {val_share:g} is not from 0 to below 1; 0.2 is usual")
    cohort.check_classes()
    rng = np.random.default_rng([seed, folds])
    if by_site:
        fold_of = _deal_sites(cohort, sites, patients, folds, rng)
    else:
        if len(cohort.names) < folds:
            raise SplitError(
                f"{len(cohort.names)} patients for {folds} folds; take fewer folds, or more patients"
                + (" (several bags of one patient count once)" if len(patients) > len(cohort.names) else "")
            )
        cohort.warn_rare(folds)
        fold_of = _deal(cohort, range(len(cohort.names)), folds, rng)
    found = []
    for fold in range(folds):
        rest = [patient for patient in range(len(cohort.names)) if fold_of[patient] != fold]
        val = _take_share(cohort, rest, val_share, np.random.default_rng([seed, folds, fold]))
        part = np.where(fold_of == fold, 2, 0)
        part[val] = 1
        cohort.check_training(str(fold), part)
        found.append(cohort.fold(str(fold), part))
    check_folds(found, patients)
    return found


def folds_from_column(
    split: Sequence[str],
    patients: Sequence[str],
    strata: Sequence[str],
    *,
    folds: int = 5,
    val_share: float = 0.2,
    seed: int = 0,
    sites: Sequence[str] | None = None,
) -> list[Fold]:
    """Folds from a ``split`` column.

    * ``train``, ``val`` and ``test`` (also ``valid``, ``validation``, ``tune``, ``dev``): one fold, as given;
    * ``train`` and ``test``: one fold, the validation part taken out of ``train``;
    * ``test`` and empty cells: ``folds`` folds inside the rest, whose parts serve for validation in turn; all are
      tested on the same given test part;
    * whole numbers: test fold of each row, the validation part taken out of the others.

    Args:
        split: Cells of the column, one a bag.
        patients: As for :func:`nested_folds`, like the further arguments.
        strata: Class of each bag.
        folds: Folds inside the rest, where only ``test`` is given.
        val_share: Share of the training patients to validate on, where no ``val`` is given.
        seed: For the parts that are not given.
        sites: Site of each bag, to spread sites evenly.

    Raises:
        SplitError: Cells are of no known kind or kinds are mixed, a part is missing, or a patient stands on both sides.
    """
    cohort = _Cohort.of(patients, strata, sites)
    if len(split) != len(patients):
        raise SplitError(f"{len(split)} cells of split for {len(patients)} bags; give one a bag")
    cohort.check_classes()
    cells = [cell.strip().casefold() for cell in split]
    if all(_is_number(cell) for cell in cells):
        return _numbered(cohort, [int(float(cell)) for cell in cells], patients, val_share, seed)
    odd = sorted({cell for cell in cells if cell and cell not in _PARTS})
    if odd:
        raise SplitError(f"split holds {_some(odd)}; write train, val and test, or whole numbers of folds in every row")
    parts = [_PARTS.get(cell, "") for cell in cells]
    present = set(parts)
    if "test" not in present:
        raise SplitError("split names no test row, so nothing could be measured; mark some rows as test")
    if present == {"test"}:
        raise SplitError("split marks every row as test, so nothing could be trained; mark some rows as train")
    if "" in present and present != {"", "test"}:
        raise SplitError(
            f"split is empty in {parts.count('')} rows and filled in others; fill in all, or leave those rows out"
        )
    code = {"train": 0, "": 0, "val": 1, "test": 2}
    part_of = _patient_parts(cohort, [code[part] for part in parts], [part or "no part" for part in parts])
    rest = [int(patient) for patient in np.flatnonzero(part_of == 0)]
    if present == {"", "test"}:
        return _inside(cohort, part_of, rest, patients, folds, seed)
    if "train" not in present:
        raise SplitError("split names no train row; mark some rows as train")
    if "val" not in present:
        part_of[_take_share(cohort, rest, val_share, np.random.default_rng([seed, 1]))] = 1
    cohort.check_training("given", part_of)
    found = [cohort.fold("given", part_of)]
    check_folds(found, patients)
    return found


def check_folds(folds: Sequence[Fold], patients: Sequence[str]) -> None:
    """Make sure that no patient stands on two sides of any fold, and that none lacks what it needs.

    Raises:
        SplitError: A patient is on both sides, a bag is in two parts, or there is nothing to train or test on.
    """
    for fold in folds:
        side: dict[str, str] = {}
        both: dict[str, str] = {}
        for part in ("train", "val", "test"):
            for row in getattr(fold, part):
                patient = patients[row]
                if side.setdefault(patient, part) != part:
                    both[patient] = f"{side[patient]} and {part}"
        if both:
            patient, where = next(iter(both.items()))
            more = f", {len(both) - 1} more patients like it" if len(both) > 1 else ""
            raise SplitError(
                f"fold {fold.name}: patient {patient!r} is in {where}{more}; a patient's bags must lie on one side: "
                "correct the split, or the patient ids"
            )
        every = np.concatenate([fold.train, fold.val, fold.test])
        if len(np.unique(every)) < len(every):
            raise SplitError(f"fold {fold.name}: a bag is in one part twice; correct the split")
        for part in ("train", "test"):
            if not len(getattr(fold, part)):
                raise SplitError(f"fold {fold.name}: its {part} part is empty; take fewer folds or correct the split")


def patient_strata(patients: Sequence[str], labels: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """One class a patient: the rarest of its bags' classes, counted by patients over the cohort.

    A missing class (``""``) is taken only where a patient has no other.

    Returns:
        The class of each bag's patient, and the patients whose bags are of several classes.
    """
    cohort = _Cohort.of(patients, labels, None)
    return [cohort.classes[number] for number in cohort.of_bag], cohort.mixed


# --- patients ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cohort:
    """Patients in the order of their names, with what the dealing looks at."""

    names: list[str]
    of_bag: NDArray[np.intp]
    """Number of each bag's patient."""
    n_bags: NDArray[np.intp]
    classes: list[str]
    sites: list[str]
    mixed: tuple[str, ...]
    """Patients whose bags are of several classes."""

    @classmethod
    def of(cls, patients: Sequence[str], strata: Sequence[str], sites: Sequence[str] | None) -> "_Cohort":
        lengths = {len(patients), len(strata), len(patients if sites is None else sites)}
        if len(lengths) > 1:
            raise SplitError(f"patients, strata and sites differ in length ({sorted(lengths)}); give one of each a bag")
        if not len(patients):
            raise SplitError("no bag to split; check that labels and features belong together")
        if not all(patients):
            raise SplitError(f"bag {list(patients).index('')} has no patient id; every bag needs one to be split")
        names, of_bag = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)
        stated: list[set[str]] = [set() for _ in names]
        at: list[set[str]] = [set() for _ in names]
        for bag, patient in enumerate(of_bag):
            stated[patient].add(strata[bag])
            at[patient].add("" if sites is None else sites[bag])
        for classes in stated:
            if len(classes) > 1:
                classes.discard("")
        frequency = Counter(name for classes in stated for name in classes)
        mixed = tuple(str(name) for name, classes in zip(names, stated, strict=True) if len(classes) > 1)
        if mixed:
            logger.info("patients with several classes, dealt out by the rarest: %s", _some(mixed))
        return cls(
            names=[str(name) for name in names],
            of_bag=of_bag.astype(np.intp),
            n_bags=np.bincount(of_bag).astype(np.intp),
            classes=[min(classes, key=lambda name: (frequency[name], name)) for classes in stated],
            sites=[min(places) for places in at],
            mixed=mixed,
        )

    def check_classes(self) -> None:
        present = set(self.classes)
        if len(present) == 1 and present != {""}:
            (only,) = present
            raise SplitError(
                f"one class only: all {len(self.names)} patients are {only!r}, so there is nothing to tell apart; "
                "add patients of another class"
            )

    def warn_rare(self, folds: int) -> None:
        for name, count in sorted(Counter(self.classes).items()):
            if name and count < folds:
                logger.warning(
                    "class %r has %d patient%s for %d folds: %d test fold%s lack it; figures that need it there can't "
                    "be given",
                    *(name, count, "" if count == 1 else "s", folds, folds - count, "" if folds - count == 1 else "s"),
                )

    def check_training(self, fold: str, part: NDArray[np.intp]) -> None:
        present = set(self.classes)
        trained = {self.classes[int(patient)] for patient in np.flatnonzero(part == 0)}
        if len(present) == 1 or trained == present:
            return
        absent = sorted(present - trained)
        if len(trained) < 2:
            raise SplitError(
                f"fold {fold}: nothing but {_some(sorted(trained))} is left to train on (all of {_some(absent)} is "
                "held out); take fewer folds, or add patients of the rarer classes"
            )
        logger.warning("fold %s: class %s is not among what is trained on", fold, _some(absent))

    def fold(self, name: str, part: NDArray[np.intp]) -> Fold:
        """Rows by the part of their patient: 0 train, 1 val, 2 test, anything else nowhere."""
        of_row = part[self.of_bag]
        train, val, test = (np.flatnonzero(of_row == number) for number in range(3))
        return Fold(name, train, val, test)

    def by_class(self, chosen: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
        """The patients of each class, shuffled, then in the order of their sites; the rarest class first."""
        # From the order of names, so that the order of rows has no say.
        shuffled = [chosen[place] for place in rng.permutation(len(chosen))]
        site_rank = dict(zip(sorted(set(self.sites)), rng.permutation(len(set(self.sites))), strict=True))
        groups: dict[str, list[int]] = {}
        for patient in sorted(shuffled, key=lambda patient: site_rank[self.sites[patient]]):
            groups.setdefault(self.classes[patient], []).append(patient)
        return [groups[name] for name in sorted(groups, key=lambda name: (len(groups[name]), name))]


def _deal(cohort: _Cohort, chosen: Sequence[int], folds: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """The fold of each patient (-1 for those not chosen), class by class in rounds of one patient a fold."""
    fold_of = np.full(len(cohort.names), -1, np.intp)
    bags = np.zeros(folds, np.intp)
    for group in cohort.by_class(list(chosen), rng):
        class_bags = np.zeros(folds, np.intp)
        for start in range(0, len(group), folds):
            free = [int(fold) for fold in rng.permutation(folds)]
            for patient in sorted(group[start : start + folds], key=lambda patient: -cohort.n_bags[patient]):
                fold = min(free, key=lambda fold: (class_bags[fold], bags[fold]))
                free.remove(fold)
                fold_of[patient] = fold
                class_bags[fold] += cohort.n_bags[patient]
                bags[fold] += cohort.n_bags[patient]
    return fold_of


def _take_share(cohort: _Cohort, chosen: Sequence[int], share: float, rng: np.random.Generator) -> list[int]:
    """About this share of the patients of each class; at least one, and never all, of a class of two or more."""
    taken: list[int] = []
    if share == 0:
        return taken
    for group in cohort.by_class(chosen, rng):
        if len(group) < 2:
            continue
        wanted = min(max(round(share * len(group)), 1), len(group) - 1)
        # Equal steps through a list in the order of sites take the same share of every site.
        steps = (np.arange(wanted) + rng.random()) * len(group) / wanted
        taken += [group[int(step)] for step in steps]
    if not taken and len(chosen) > 1:
        taken.append(chosen[int(rng.integers(len(chosen)))])
    return taken


def _deal_sites(
    cohort: _Cohort,
    sites: Sequence[str] | None,
    patients: Sequence[str],
    folds: int,
    rng: np.random.Generator,
) -> NDArray[np.intp]:
    """The fold of each patient when sites stay whole: large sites first, each to where classes are missing most."""
    if sites is None or not all(sites):
        missing = len(patients) if sites is None else sum(not site for site in sites)
        raise SplitError(f"{missing} bags have no site; leaving whole sites out needs a site for every bag")
    at: dict[str, set[str]] = {}
    for patient, site in zip(patients, sites, strict=True):
        at.setdefault(patient, set()).add(site)
    moved = [patient for patient, places in at.items() if len(places) > 1]
    if moved:
        raise SplitError(
            f"{len(moved)} patients are at several sites ({_some(sorted(moved))}), so sites can't be left out whole; "
            "give each patient one site"
        )
    names = sorted(set(cohort.sites))
    if len(names) < folds:
        raise SplitError(f"{len(names)} sites for {folds} folds; take at most {len(names)} folds, or split by patient")
    classes = sorted(set(cohort.classes))
    counts = np.zeros((len(names), len(classes)))
    for place, label in zip(cohort.sites, cohort.classes, strict=True):
        counts[names.index(place), classes.index(label)] += 1
    # Shares, so that a rare class weighs as much as a frequent one.
    shares = counts / counts.sum(axis=0)
    filled = np.zeros((folds, len(classes)))
    fold_of_site = np.full(len(names), -1, np.intp)
    order = rng.permutation(len(names))
    for rank, site in enumerate(order[np.argsort(-counts[order].sum(axis=1), kind="stable")]):
        empty = np.flatnonzero(~filled.any(axis=1))
        # The last sites must go where there is none yet.
        open_folds = empty if len(names) - rank <= len(empty) else np.arange(folds)
        excess = ((filled[open_folds] + shares[site]) ** 2).sum(axis=1) - (filled[open_folds] ** 2).sum(axis=1)
        fold_of_site[site] = open_folds[int(np.argmin(excess))]
        filled[fold_of_site[site]] += shares[site]
    return np.asarray([fold_of_site[names.index(place)] for place in cohort.sites], np.intp)


# --- the split column --------------------------------------------------------------------------------------------


def _is_number(cell: str) -> bool:
    # Spreadsheets write whole numbers of a column with gaps as 1.0.
    return cell.removesuffix(".0").isdecimal()


def _patient_parts(cohort: _Cohort, parts: Sequence[int], names: Sequence[str]) -> NDArray[np.intp]:
    """The part of each patient, by whatever its bags are given; ``names`` says what a part is called.

    Raises:
        SplitError: Its bags are given several.
    """
    given: dict[int, dict[int, str]] = {}
    for patient, part, name in zip(cohort.of_bag, parts, names, strict=True):
        given.setdefault(int(patient), {})[part] = name
    both = sorted(patient for patient, of in given.items() if len(of) > 1)
    if both:
        sides = " and ".join(name for _, name in sorted(given[both[0]].items()))
        more = f", {len(both) - 1} more patients like it" if len(both) > 1 else ""
        raise SplitError(
            f"patient {cohort.names[both[0]]!r} is in {sides}{more}; a patient's bags must lie on one side: "
            "correct the split column, or the patient ids"
        )
    return np.asarray([next(iter(given[patient])) for patient in range(len(cohort.names))], np.intp)


def _inside(
    cohort: _Cohort, part_of: NDArray[np.intp], rest: list[int], patients: Sequence[str], folds: int, seed: int
) -> list[Fold]:
    if len(rest) < folds:
        raise SplitError(f"{len(rest)} patients beside the test part for {folds} folds; take fewer folds")
    val_of = _deal(cohort, rest, folds, np.random.default_rng([seed, folds]))
    found = [cohort.fold(str(fold), np.where(val_of == fold, 1, part_of)) for fold in range(folds)]
    check_folds(found, patients)
    return found


def _numbered(cohort: _Cohort, numbers: list[int], patients: Sequence[str], val_share: float, seed: int) -> list[Fold]:
    fold_of = _patient_parts(cohort, numbers, [f"fold {number}" for number in numbers])
    chosen = sorted(set(numbers))
    if len(chosen) < 2:
        raise SplitError(f"split holds the one fold {chosen[0]}; number two or more folds")
    found = []
    for fold in chosen:
        part = np.where(fold_of == fold, 2, 0)
        rest = [int(patient) for patient in np.flatnonzero(part == 0)]
        part[_take_share(cohort, rest, val_share, np.random.default_rng([seed, len(chosen), fold]))] = 1
        cohort.check_training(str(fold), part)
        found.append(cohort.fold(str(fold), part))
    check_folds(found, patients)
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
