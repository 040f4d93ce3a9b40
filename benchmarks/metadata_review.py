"""What limits the review of a catalogue, and what would help: levers tried on many plantings.

    python benchmarks/metadata_review.py [--of drawn,reports] [--data ../shared/data] [--patients 200] [--plantings 6]

Networks are too slow for so many plantings, so ridge regressions stand in for them (of means, spreads and extremes of a
slide's tiles; of reports as vectors), judged as networks are: five folds by patient, five members a fold, calibrated by
a temperature. 5 % of the records are made wrong, and each lever is tried on the same plantings:

- as it is: the order of ``metadata review``;
- three dealings: the mean over three dealings of folds and members;
- class offsets: calibrated by an offset for each class beside the temperature;
- refitted: records whose log-odds of being wrong are above 1 are left out and all models fitted again (Northcutt et al.
  2021, Confident learning, arXiv:1911.00068);
- with neighbours: half the log-odds of the recorded class among the ten nearest slides of other patients are added;
- by margin: ordered by the log-odds of the likeliest other class against the recorded one;
- learnt from right records: what any training that takes no notice of wrong records could reach at best.

For drawn slides it then tells how many of their ten tiles show tumour in the right records that outrank planted ones.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from metadata import SHARE, drawn_cohort, drawn_tiles, report_cohort
from scipy.optimize import minimize
from scipy.special import log_softmax
from scipy.stats import t as students_t
from sklearn.metrics import roc_auc_score

from pathopipe.metadata.cases import MetadataCohort
from pathopipe.metadata.review import gaussian_precision
from pathopipe.metadata.text import TextVectorizer

FOLDS = MEMBERS = 5
PULL = 0.3
"""Ridge penalty over the mean square of a vector."""
SUSPECT = 1.0
NEIGHBOURS = 10


def main() -> None:
    """Print a table for each cohort."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default="drawn,reports")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "pathopipe-metadata-drawn")
    parser.add_argument("--patients", type=int, default=200, help="of the drawn cohort, two slides each")
    parser.add_argument("--plantings", type=int, default=6)
    parser.add_argument("--seed", type=int, default=100)
    arguments = parser.parse_args()
    print("AUROC of the evidence, and the precision at the number planted that it allows:")
    print(
        "  " + ", ".join(f"{a:g}: {gaussian_precision(a, SHARE):.2f}" for a in (0.9, 0.95, 0.964, 0.975, 0.987, 0.99))
    )
    with tempfile.TemporaryDirectory() as made:
        for of in arguments.of.split(","):
            began = time.perf_counter()
            if of == "drawn":
                cohort = drawn_cohort(arguments.cache, arguments.patients, Path(made))
                vectors, task = described_tiles(cohort), "sample"
            else:
                cohort = report_cohort(arguments.data, Path(made), columns=())
                texts = [case.text or "" for case in cohort.cases]
                vectors, task = np.asarray(TextVectorizer().fit(texts).transform(texts), np.float64), "cancer"
            known = np.isfinite(cohort.truth[task][:, 0])
            patients = np.unique(np.asarray(cohort.patients)[known], return_inverse=True)[1]
            truth = cohort.truth[task][known, 0].astype(int)
            problem = Problem.of(vectors[known], patients, truth.max() + 1)
            print(f"{of}, {task}: {len(truth)} slides")
            ahead = levers(problem, truth, range(arguments.seed, arguments.seed + arguments.plantings))
            if of == "drawn":
                slides = [case.slide_id for case, there in zip(cohort.cases, known, strict=True) if there]
                frozen = cohort.truth["fixation"][known, 0] == 1
                tell_tumour_tiles(slides, truth == 1, frozen, ahead)
            print(f"({time.perf_counter() - began:.0f} s)\n", flush=True)


def described_tiles(cohort: MetadataCohort) -> np.ndarray:
    """(n, 4 D) mean, spread, maximum and minimum of each feature over a slide's tiles, standardised."""
    tiles = [case.bag.read().astype(np.float64) for case in cohort.cases if case.bag is not None]
    rows = np.stack([np.concatenate([of.mean(0), of.std(0), of.max(0), of.min(0)]) for of in tiles])
    return (rows - rows.mean(axis=0)) / np.maximum(rows.std(axis=0), 1e-9)


# --- judges ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Slides as judges see them."""

    products: np.ndarray
    """(n, n) scalar products of the vectors."""
    nearest: np.ndarray
    """(n, 10) slides of other patients, by cosine."""
    patients: np.ndarray
    classes: int

    @classmethod
    def of(cls, vectors: np.ndarray, patients: np.ndarray, classes: int) -> "Problem":
        """From vectors (n, d)."""
        products = vectors @ vectors.T
        length = np.sqrt(np.maximum(np.diag(products), 1e-12))
        cosine = products / length / length[:, None]
        cosine[patients[:, None] == patients] = -np.inf
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :NEIGHBOURS]
        return cls(products=products, nearest=nearest, patients=patients, classes=classes)


def parts_of(patients: np.ndarray, parts: int, rng: np.random.Generator) -> np.ndarray:
    names, number = np.unique(patients, return_inverse=True)
    return (rng.permutation(len(names)) % parts)[number]


def judge(
    problem: Problem, labels: np.ndarray, seed: Sequence[int], *, keep: np.ndarray | None = None, offsets: bool = False
) -> np.ndarray:
    """(n, classes) log-probabilities of slides by models that have not learnt from their patient."""
    rng = np.random.default_rng(seed)
    keep = np.ones(len(labels), bool) if keep is None else keep
    wanted, pull = np.eye(problem.classes)[labels], PULL * np.trace(problem.products) / len(labels)
    fold = parts_of(problem.patients, FOLDS, rng)
    out = np.zeros((len(labels), problem.classes))
    for number in range(FOLDS):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        part = parts_of(problem.patients[train], MEMBERS, rng)
        of_val, of_test = np.zeros((len(train), problem.classes)), np.zeros((len(test), problem.classes))
        for member in range(MEMBERS):
            own, val = train[(part != member) & keep[train]], train[part == member]
            mean = wanted[own].mean(axis=0)
            matrix = problem.products[np.ix_(own, own)] + pull * np.eye(len(own))
            weights = np.linalg.solve(matrix, wanted[own] - mean)
            of_val[part == member] = problem.products[np.ix_(val, own)] @ weights + mean
            of_test += (problem.products[np.ix_(test, own)] @ weights + mean) / MEMBERS
        kept = keep[train]
        scale, shift = calibrated(of_val[kept], labels[train][kept], offsets)
        out[test] = log_softmax(scale * of_test + shift, axis=1)
    return out


def calibrated(scores: np.ndarray, labels: np.ndarray, offsets: bool) -> tuple[float, np.ndarray]:
    """The factor, and if wanted an offset a class (pulled to zero), under which the labels are likeliest."""
    classes = scores.shape[1]
    own = np.eye(classes)[labels]

    def loss(of: np.ndarray) -> tuple[float, np.ndarray]:
        scale, shift = np.exp(of[0]), of[1:] if offsets else np.zeros(classes)
        logs = log_softmax(scale * scores + shift, axis=1)
        slope = np.exp(logs) - own
        gradient = np.concatenate(
            [[scale * (slope * scores).sum()], slope.sum(axis=0) + 5 * shift if offsets else shift]
        )
        return float(-(logs * own).sum() + 2.5 * (shift**2).sum()), gradient

    found = minimize(loss, np.concatenate([[1.5], np.zeros(classes)]), jac=True, method="L-BFGS-B").x
    return float(np.exp(found[0])), found[1:] if offsets else np.zeros(classes)


def against(logs: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """(n,) log-odds against each record; what is predicted as recorded stands behind all others."""
    own = np.exp(logs[np.arange(len(recorded)), recorded]).clip(1e-12, 1 - 1e-12)
    odds = np.log1p(-own) - np.log(own)
    return np.where(logs.argmax(axis=1) == recorded, odds - 1000, odds)


# --- levers ------------------------------------------------------------------------------------------------------


def levers(problem: Problem, truth: np.ndarray, seeds: Sequence[int]) -> dict[int, int]:
    """Print the table; how often each right record outranked planted ones, by row."""
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    ahead: dict[int, int] = defaultdict(int)
    n, rows = len(truth), np.arange(len(truth))
    for seed in seeds:
        rng = np.random.default_rng(seed)
        wrong = np.zeros(n, bool)
        wrong[rng.choice(n, round(SHARE * n), replace=False)] = True
        recorded = np.where(wrong, (truth + rng.integers(1, problem.classes, n)) % problem.classes, truth)

        def note(
            name: str, logs: np.ndarray, odds: np.ndarray, *, recorded: np.ndarray = recorded, wrong: np.ndarray = wrong
        ) -> None:
            first = np.argsort(-odds, kind="stable")[: wrong.sum()]
            area = np.mean([roc_auc_score(truth == of, logs[:, of]) for of in range(problem.classes)])
            found[name].append((wrong[first].mean(), area, roc_auc_score(wrong, odds)))

        one = judge(problem, recorded, [seed, 0])
        odds = against(one, recorded)
        note("as it is", one, odds)
        for row in np.argsort(-odds, kind="stable")[: wrong.sum()]:
            ahead[int(row)] += not wrong[row]
        three = log_softmax(
            (one + judge(problem, recorded, [seed, 1]) + judge(problem, recorded, [seed, 2])) / 3, axis=1
        )
        note("three dealings", three, against(three, recorded))
        shifted = judge(problem, recorded, [seed, 0], offsets=True)
        note("class offsets", shifted, against(shifted, recorded))
        again = judge(problem, recorded, [seed, 0], keep=odds < SUSPECT)
        note("refitted", again, against(again, recorded))
        share = (np.eye(problem.classes)[recorded][problem.nearest].sum(axis=1) + 1) / (NEIGHBOURS + problem.classes)
        near = share[rows, recorded]
        note("with neighbours", one, odds + 0.5 * (np.log1p(-near) - np.log(near)))
        others = np.where(np.eye(problem.classes)[recorded] == 1, -np.inf, one).max(axis=1)
        note("by margin", one, others - one[rows, recorded])
        right = judge(problem, truth, [seed, 0])
        note("learnt from right records", right, against(right, recorded))
    print(f"{'':>26} {'precision at planted':>22} {'difference':>24} {'AUROC':>6} {'evidence':>8} {'at most':>7}")
    first = np.asarray(found["as it is"])[:, 0]
    for name, figures in found.items():
        of = np.asarray(figures)
        area = min(float(of[:, 2].mean()), 0.9999)
        print(
            f"{name:>26} {interval(of[:, 0]):>22} {interval(of[:, 0] - first, sign='+'):>24} {of[:, 1].mean():>6.3f} "
            f"{area:>8.3f} {gaussian_precision(area, SHARE):>7.2f}"
        )
    return {row: times for row, times in ahead.items() if times}


def interval(values: np.ndarray, *, sign: str = "") -> str:
    """Mean over plantings, with its 95 % interval by Student's t."""
    half = (
        students_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        if len(values) > 1
        else np.nan
    )
    return f"{values.mean():{sign}.3f} ({values.mean() - half:{sign}.3f} to {values.mean() + half:{sign}.3f})"


def tell_tumour_tiles(slides: Sequence[str], tumour: np.ndarray, frozen: np.ndarray, ahead: dict[int, int]) -> None:
    """Of right records that outranked planted ones, what was drawn."""
    print("right records among as many first ones as were planted, most often first:")
    for row, times in sorted(ahead.items(), key=lambda of: -of[1])[:8]:
        number = int(slides[row][1:4]) * 2 + int(slides[row][-1])
        _, shown = drawn_tiles(number, np.zeros(4), frozen=bool(frozen[row]), tumour=bool(tumour[row]), blank=True)
        kind = "tumour" if tumour[row] else "normal"
        print(f"  {slides[row]}, {kind}: {times} times; {shown} of its 10 tiles show tumour")


if __name__ == "__main__":
    main()
