"""What a model could learn instead of the disease: site, scanner, batch, and slides that are there twice.

Looked at before any result, from the same features that the model gets.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from pathopipe.cohort import Fold, SplitError, check_folds, is_missing, nested_folds
from pathopipe.mil.bags import Bag, check_bags

__all__ = ["ColumnFinding", "ConfoundReport", "DuplicatePair", "confound_report", "cramers_v", "near_duplicates"]

_CAP: Final = 2048
_COMPONENTS: Final = 64
_BOOTSTRAPS: Final = 500
# Pairs are looked at tile by tile where their means are among each other's nearest and point the same way.
_NEAREST: Final = 5
_LEAST_COSINE: Final = 0.25
_PROBES: Final = 128
_FIRST_PROBES: Final = 24
# Tiles are compared by their coordinates along the axes in which tiles of a bag differ most: 40 kB a thousand tiles.
_AXES: Final = 32
_AXES_FROM_TILES: Final = 8192
_BLOCK_TILES: Final = 8192
_SKETCHES_KEPT: Final = 256
# A tile is found again where its nearest tile over there is this much closer than the nearest other tile at home
# (squared distances): the ratio of Lowe 2004 (IJCV 60, 91), which chance hardly reaches among many numbers a tile.
_FOUND_RATIO: Final = 0.5
# In how many dimensions tiles vary at the least; more would be more forgiving.
_DIMENSIONS: Final = 6
_LEAST_AGREEMENT: Final = 0.5
# Equal numbers differ by rounding alone.
_SAME_RATIO: Final = 1e-6
_STRONG_V: Final = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnFinding:
    """How one column (site, scanner, batch) shows in the features, and how it goes with the label."""

    name: str
    classes: dict[str, int]
    """Patients of each value that was looked at."""
    left_out: dict[str, int]
    """Patients of values too rare to be predicted (fewer than 2)."""
    n_bags: int
    n_patients: int
    folds: int
    """0 where nothing could be predicted."""
    balanced_accuracy: float | None
    """Mean recall over the values, each patient predicted by a model that has not seen the patient."""
    low: float | None
    """2.5th percentile over patients drawn with replacement."""
    high: float | None
    """97.5th percentile."""
    chance: float | None
    """Mean balanced accuracy with the column's values shuffled among patients."""
    chance_high: float | None
    """Largest balanced accuracy with shuffled values."""
    p_value: float | None
    """Share of shufflings, this one among them, that do as well."""
    auroc: float | None
    """Macro average of one value against the others."""
    label_v: float | None
    """Cramér's V with the label, bias-corrected: 0 none, 1 one tells the other."""
    note: str
    """Why something is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicatePair:
    """Two bags of different patients that look like one slide."""

    first: str
    second: str
    first_patient: str
    second_patient: str
    cosine: float
    """Of the standardised means."""
    agreement: float
    """Share of tiles that are found again in the other slide."""
    exact: bool
    """Tiles are equal number for number."""
    crosses: tuple[str, ...]
    """Folds in which the two stand on different sides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfoundReport:
    """What was found before training."""

    n_bags: int
    n_patients: int
    columns: tuple[ColumnFinding, ...]
    duplicates: tuple[DuplicatePair, ...]
    shared_patients: str
    """What is wrong with the folds; ``""`` where every patient lies on one side, or no folds were given."""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and texts."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What it means, a few plain sentences."""
        said = [self._column_line(finding) for finding in self.columns]
        if not self.columns:
            said.append("No site, scanner or batch column was given, so nothing is known of confounding by them.")
        across = [pair for pair in self.duplicates if pair.crosses]
        if self.duplicates:
            named = "; ".join(
                f"{pair.first} and {pair.second} ({pair.agreement:.0%} of tiles{', number for number' * pair.exact})"
                for pair in self.duplicates[:3]
            )
            more = f"; and {len(self.duplicates) - 3} more" if len(self.duplicates) > 3 else ""
            sides = f"{_count(len(across), 'pair')} stand on two sides of a fold: " if across else ""
            said.append(
                f"{_count(len(self.duplicates), 'pair')} of bags of different patients look like one slide: "
                f"{named}{more}. {sides}{'g' if sides else 'G'}ive them one patient id, or leave one out."
            )
        else:
            said.append("No two bags of different patients look like one slide.")
        if self.shared_patients:
            said.append(self.shared_patients)
        return said

    @staticmethod
    def _column_line(finding: ColumnFinding) -> str:
        tied = ""
        if finding.label_v is not None:
            strength = "strongly" if finding.label_v >= _STRONG_V else "weakly" if finding.label_v >= 0.1 else "not"
            tied = f"{strength} tied to the label (Cramér's V {finding.label_v:.2f})"
        if finding.balanced_accuracy is None:
            return f"{finding.name}: {finding.note}{'; ' + tied if tied else ''}."
        assert finding.p_value is not None
        shows = finding.p_value <= 0.05
        line = (
            f"{finding.name}: {'can' if shows else 'can not'} be told from the features "
            f"(balanced accuracy {finding.balanced_accuracy:.2f}, 95 % {finding.low:.2f} to {finding.high:.2f}, "
            f"{finding.chance:.2f} with shuffled values; AUROC {finding.auroc:.2f}; {finding.n_patients} patients)"
        )
        if tied:
            line += f", {tied}"
        if shows and finding.label_v is not None and finding.label_v >= _STRONG_V:
            line += (
                f"; a model may read the {finding.name} instead of the disease: leave whole {finding.name}s out when "
                "testing, and look at figures within each"
            )
        return f"{line}.{' ' + finding.note if finding.note else ''}"


def confound_report(
    bags: Sequence[Bag],
    label: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    *,
    folds: Sequence[Fold] | None = None,
    seed: int = 0,
    permutations: int = 20,
) -> ConfoundReport:
    """Look for what a model could learn instead of the label.

    Args:
        bags: None of them empty.
        label: Class of each bag as text, ``""`` where missing; of a number, the text of its bin.
        columns: Site, scanner, batch and the like: name to the value of each bag, ``""`` where missing.
        folds: To say which duplicates stand on two sides.
        seed: Of folds, shufflings and draws.
        permutations: How often values are shuffled among patients; the least p value is 1 / (permutations + 1).

    Raises:
        UsageError: A bag is empty, or widths differ.
        StoreError: A store is damaged.
    """
    patients = [bag.patient_id for bag in bags]
    shared = ""
    if folds is not None:
        try:
            check_folds(folds, patients)
        except SplitError as error:
            shared = str(error)
    of_label = [_value(cell) for cell in label]
    # Hundreds of small fits: threads would cost many times what they give.
    with threadpool_limits(1):
        pool = _pooled(bags)
        components = _components(pool.means)
        return ConfoundReport(
            n_bags=len(bags),
            n_patients=len(set(patients)),
            columns=tuple(
                _look_at(name, [_value(cell) for cell in cells], of_label, patients, components, seed, permutations)
                for name, cells in columns.items()
            ),
            duplicates=tuple(_find_duplicates(bags, pool, folds or (), seed)),
            shared_patients=shared,
        )


def cramers_v(first: Sequence[str], second: Sequence[str]) -> float | None:
    """How strongly two columns are tied: 0 not at all, 1 one tells the other.

    Source: Bergsma 2013, J. Korean Stat. Soc. 42, 323: Cramér's V corrected for its bias in small samples.

    Args:
        first: One value a case; cases with ``""`` in either column are passed over.
        second: The other column.

    Returns:
        None where a column has one value only, or there are fewer than 3 cases.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a and b]
    rows, columns = sorted({a for a, _ in pairs}), sorted({b for _, b in pairs})
    n = len(pairs)
    if len(rows) < 2 or len(columns) < 2 or n < 3:
        return None
    table = np.zeros((len(rows), len(columns)))
    for a, b in pairs:
        table[rows.index(a), columns.index(b)] += 1
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / n
    phi2 = float(((table - expected) ** 2 / expected).sum()) / n
    r, k = len(rows), len(columns)
    corrected = max(0.0, phi2 - (r - 1) * (k - 1) / (n - 1))
    least = min(r - (r - 1) ** 2 / (n - 1), k - (k - 1) ** 2 / (n - 1)) - 1
    # More values than cases allow leave nothing to correct by.
    return float(min(1.0, np.sqrt(corrected / least))) if least > 0 else None


# --- how well a column is predicted ------------------------------------------------------------------------------


def _value(cell: str) -> str:
    return "" if is_missing(cell) else cell.strip()


class _Pool(NamedTuple):
    """What one pass over a sample of each bag's tiles gives."""

    means: NDArray[np.float64]
    """(bags, features)."""
    axes: NDArray[np.float32]
    """(features, at most 32): turns tiles into coordinates along the axes in which tiles of a bag differ most."""


def _pooled(bags: Sequence[Bag]) -> _Pool:
    check_bags(bags)
    a_bag = max(4, _AXES_FROM_TILES // max(len(bags), 1))
    means, squares, samples = [], [], []
    for bag in bags:
        # Equal steps: copies of a slide must give the very same mean.
        rows = np.linspace(0, bag.n_tiles - 1, _CAP).astype(np.intp) if bag.n_tiles > _CAP else None
        tiles = bag.read(rows)
        means.append(tiles.mean(axis=0, dtype=np.float64))
        squares.append(tiles.var(axis=0, dtype=np.float64))
        samples.append(tiles[:: max(1, len(tiles) // a_bag)][:a_bag] - means[-1].astype(np.float32))
    spread = np.sqrt(np.mean(squares, axis=0))
    scale = np.where(spread > 1e-9 * max(float(spread.max(initial=0)), 1e-30), spread, np.inf)
    sample = np.concatenate(samples) / scale
    _, axes = np.linalg.eigh(sample.T @ sample)
    return _Pool(np.stack(means), (axes[:, ::-1][:, :_AXES] / scale[:, None]).astype(np.float32))


def _components(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """(bags, at most 64) principal components of the standardised means, for speed; mean square of a row is 1."""
    standard = _standardised(means)
    left, strength, _ = np.linalg.svd(standard, full_matrices=False)
    scores = left[:, :_COMPONENTS] * strength[:_COMPONENTS]
    size = np.sqrt((scores**2).sum(axis=1).mean())
    return np.asarray(scores / (size if size > 0 else 1.0) * np.sqrt(scores.shape[1]))


def _standardised(means: NDArray[np.float64]) -> NDArray[np.float64]:
    spread = means.std(axis=0)
    # Numbers that hardly differ would be blown-up rounding.
    varies = spread > 1e-6 * np.maximum(np.abs(means).max(axis=0), 1e-30)
    return np.asarray((means - means.mean(axis=0))[:, varies] / spread[varies])


def _look_at(
    name: str,
    values: Sequence[str],
    label: Sequence[str],
    patients: Sequence[str],
    components: NDArray[np.float64],
    seed: int,
    permutations: int,
) -> ColumnFinding:
    # Patients with many slides must not count many times.
    cases = sorted({(patient, value, of) for patient, value, of in zip(patients, values, label, strict=True)})
    label_v = cramers_v([value for _, value, _ in cases], [of for _, _, of in cases])
    sizes = Counter(
        value for _, value in {(patient, value) for patient, value in zip(patients, values, strict=True) if value}
    )
    classes = {value: count for value, count in sorted(sizes.items()) if count >= 2}
    rare = {value: count for value, count in sorted(sizes.items()) if count < 2}
    rows = np.asarray([row for row, value in enumerate(values) if value in classes], np.intp)
    of_rows = [patients[row] for row in rows]
    scores: tuple[float, float] | None = None
    note = ""
    if not sizes:
        note = "empty throughout, so nothing can be said"
    elif len(classes) < 2:
        note = (
            f"one value only ({next(iter(sizes))})"
            if len(sizes) == 1
            else "fewer than two values with 2 patients or more"
        ) + ", so there is nothing to predict"
    n_folds = min(5, *classes.values()) if len(classes) >= 2 else 0
    low = high = chance = chance_high = p_value = None
    if n_folds:
        truth = np.asarray([values[row] for row in rows])
        inputs = components[rows]
        parts = nested_folds(of_rows, list(truth), folds=n_folds, val_share=0, seed=seed)
        probability = _predict(inputs, truth, parts)
        names = np.asarray(sorted(classes))
        scores = _score(truth, probability, names)
        low, high = _interval(truth, names[probability.argmax(axis=1)], of_rows, names, seed)
        shuffled = []
        for number in range(permutations):
            other = _shuffled(truth, of_rows, np.random.default_rng([seed, number]))
            shuffled.append(_score(other, _predict(inputs, other, parts), names)[0])
        if shuffled:
            chance, chance_high = float(np.mean(shuffled)), float(np.max(shuffled))
            p_value = (1 + sum(score >= scores[0] for score in shuffled)) / (permutations + 1)
        if rare:
            note = f"{_count(len(rare), 'value')} with a single patient left out."
    return ColumnFinding(
        name=name,
        classes=classes,
        left_out=rare,
        n_bags=len(rows),
        n_patients=len(set(of_rows)),
        folds=n_folds,
        balanced_accuracy=None if scores is None else scores[0],
        low=low,
        high=high,
        chance=chance,
        chance_high=chance_high,
        p_value=p_value,
        auroc=None if scores is None else scores[1],
        label_v=label_v,
        note=note,
    )


def _predict(inputs: NDArray[np.float64], truth: NDArray[np.str_], parts: Sequence[Fold]) -> NDArray[np.float64]:
    """(rows, values) probability of each value (in sorted order), from models that have not seen the patient."""
    names = np.unique(truth)
    probability = np.zeros((len(truth), len(names)))
    for part in parts:
        seen = np.unique(truth[part.train])
        if len(seen) < 2:
            probability[part.test, np.searchsorted(names, seen)] = 1
            continue
        model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=200, tol=1e-3)
        with warnings.catch_warnings():
            # Good enough for a warning sign; more steps change the third digit.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(inputs[part.train], truth[part.train])
        probability[np.ix_(part.test, np.searchsorted(names, model.classes_))] = model.predict_proba(inputs[part.test])
    return probability


def _score(truth: NDArray[np.str_], probability: NDArray[np.float64], names: NDArray[np.str_]) -> tuple[float, float]:
    """Balanced accuracy, and macro AUROC of each value against the others."""
    guess = names[probability.argmax(axis=1)]
    recall = [float((guess[truth == name] == name).mean()) for name in names]
    auroc = [float(roc_auc_score(truth == name, probability[:, column])) for column, name in enumerate(names)]
    return float(np.mean(recall)), float(np.mean(auroc))


def _shuffled(truth: NDArray[np.str_], patients: Sequence[str], rng: np.random.Generator) -> NDArray[np.str_]:
    """The values dealt out anew: whole patients change places where each has one value, else bags."""
    of: dict[str, set[str]] = {}
    for patient, value in zip(patients, truth, strict=True):
        of.setdefault(patient, set()).add(str(value))
    if any(len(values) > 1 for values in of.values()):
        return rng.permutation(truth)
    names = sorted(of)
    dealt = dict(zip(names, rng.permutation([next(iter(of[name])) for name in names]), strict=True))
    return np.asarray([dealt[patient] for patient in patients])


def _interval(
    truth: NDArray[np.str_], guess: NDArray[np.str_], patients: Sequence[str], names: NDArray[np.str_], seed: int
) -> tuple[float, float]:
    """95 % of the balanced accuracy over patients drawn with replacement."""
    drawn_names, number = np.unique(np.asarray(patients), return_inverse=True)
    # (patients, values) bags and hits, so that a draw is a matter of counts.
    of_value = truth[:, None] == names
    bags, hits = (np.zeros((len(drawn_names), len(names))) for _ in range(2))
    np.add.at(bags, number, of_value)
    np.add.at(hits, number, of_value & (guess == truth)[:, None])
    weight = np.random.default_rng([seed, 1]).multinomial(
        len(drawn_names), np.full(len(drawn_names), 1 / len(drawn_names)), size=_BOOTSTRAPS
    )
    there = weight @ bags
    recall = np.divide(weight @ hits, there, out=np.full(there.shape, np.nan), where=there > 0)
    low, high = np.percentile(np.nanmean(recall, axis=1), [2.5, 97.5])
    return float(low), float(high)


# --- slides that are there twice ---------------------------------------------------------------------------------


def near_duplicates(bags: Sequence[Bag], *, folds: Sequence[Fold] = (), seed: int = 0) -> list[DuplicatePair]:
    """Pairs of bags of different patients that are one slide, copied or scanned again.

    Pairs whose standardised means are among each other's nearest (over all bags, and over bags with the mean of their
    site taken out) are compared tile by tile: a tile counts as found again where its nearest tile in the other bag is
    far closer than the nearest other tile of its own bag, as it is or with each bag's mean taken out (a scanner shifts
    all tiles alike). Slides that are merely of one kind have no such tiles.

    Args:
        bags: None of them empty.
        folds: To say which pairs stand on two sides.
        seed: For the tiles that are looked at.

    Returns:
        Pairs in which at least half the tiles of the smaller bag are found again, most alike first.
    """
    with threadpool_limits(1):
        return _find_duplicates(bags, _pooled(bags), folds, seed)


def _find_duplicates(bags: Sequence[Bag], pool: _Pool, folds: Sequence[Fold], seed: int) -> list[DuplicatePair]:
    @functools.lru_cache(maxsize=_SKETCHES_KEPT)
    def sketch(number: int) -> NDArray[np.float32]:
        return _sketch(bags[number], pool.axes)

    patients = [bag.patient_id for bag in bags]
    found = []
    for first, second, cosine in _candidates(pool.means, patients, [bag.site for bag in bags]):
        agreement, exact = _agreement(sketch(first), sketch(second), seed)
        if agreement < _LEAST_AGREEMENT:
            continue
        found.append(
            DuplicatePair(
                first=bags[first].bag_id,
                second=bags[second].bag_id,
                first_patient=patients[first],
                second_patient=patients[second],
                cosine=cosine,
                agreement=agreement,
                exact=exact,
                crosses=tuple(fold.name for fold in folds if _side(fold, first) != _side(fold, second)),
            )
        )
    return sorted(found, key=lambda pair: (-pair.agreement, -pair.cosine, pair.first))


def _side(fold: Fold, row: int) -> str:
    return next((part for part in ("train", "val", "test") if row in getattr(fold, part)), "")


def _candidates(
    means: NDArray[np.float64], patients: Sequence[str], sites: Sequence[str]
) -> list[tuple[int, int, float]]:
    """Pairs across patients where one is among the nearest of the other, and the cosine of their means."""
    within = means.copy()
    names = np.asarray(sites)
    for site in set(sites):
        within[names == site] -= means[names == site].mean(axis=0)
    plain = _cosines(means, patients)
    pairs = {pair for cosine in (plain, _cosines(within, patients)) for pair in _nearest_pairs(cosine)}
    return [(first, second, float(plain[first, second])) for first, second in sorted(pairs)]


def _cosines(means: NDArray[np.float64], patients: Sequence[str]) -> NDArray[np.float64]:
    """(bags, bags) cosine of standardised means; -1 within a patient."""
    standard = _standardised(means)
    length = np.linalg.norm(standard, axis=1, keepdims=True)
    unit = standard / np.where(length > 0, length, 1)
    names = np.asarray(patients)
    return np.where(names[:, None] == names, -1, unit @ unit.T)


def _nearest_pairs(cosine: NDArray[np.float64]) -> set[tuple[int, int]]:
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :_NEAREST]
    return {
        (min(row, int(other)), max(row, int(other)))
        for row, others in enumerate(nearest)
        for other in others
        if cosine[row, other] >= _LEAST_COSINE
    }


def _sketch(bag: Bag, axes: NDArray[np.float32]) -> NDArray[np.float32]:
    """(tiles, axes) of a bag, read in blocks."""
    if bag.n_tiles <= _BLOCK_TILES:
        return np.asarray(bag.read() @ axes)
    starts = range(0, bag.n_tiles, _BLOCK_TILES)
    return np.concatenate([bag.read(np.arange(at, min(at + _BLOCK_TILES, bag.n_tiles))) @ axes for at in starts])


def _agreement(first: NDArray[np.float32], second: NDArray[np.float32], seed: int) -> tuple[float, bool]:
    """Share of the smaller bag's tiles that are found again in the larger, and whether they are equal."""
    home, away = sorted((first, second), key=len)
    if len(home) < 3:
        return 0.0, False
    probes = np.random.default_rng([seed, 2]).choice(len(home), min(_PROBES, len(home)), replace=False)
    # Most pairs are no copies, and a few tiles tell.
    first_few = probes[:_FIRST_PROBES]
    if _found_again(home, away, first_few)[0].mean() < _LEAST_AGREEMENT / 2:
        return 0.0, False
    found, same = _found_again(home, away, probes)
    return float(found.mean()), bool(same.all() and found.any())


def _found_again(
    home: NDArray[np.float32], away: NDArray[np.float32], probes: NDArray[np.intp]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For some tiles of ``home`` whether they are found again in ``away``, and whether they are equal there."""
    here = _least_distance(home[probes], home, probes)
    as_it_is = _least_distance(home[probes], away, None)
    shifted = _least_distance(home[probes] - home.mean(axis=0), away - away.mean(axis=0), None)
    # Among more tiles the nearest is nearer by chance alone: squared distances fall with their number to the 2 / m.
    fewer = (len(home) / len(away)) ** (2 / _DIMENSIONS)
    return np.minimum(as_it_is, shifted) < _FOUND_RATIO * fewer * here, as_it_is <= _SAME_RATIO * here


def _least_distance(
    probes: NDArray[np.float32], tiles: NDArray[np.float32], themselves: NDArray[np.intp] | None
) -> NDArray[np.float64]:
    """Squared distance from each probe to its nearest tile, itself aside."""
    at, of = probes.astype(np.float64), tiles.astype(np.float64)
    squared = (at**2).sum(axis=1)[:, None] + (of**2).sum(axis=1) - 2 * (at @ of.T)
    if themselves is not None:
        squared[np.arange(len(probes)), themselves] = np.inf
    return np.asarray(np.maximum(squared.min(axis=1), 0))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
