"""Records that contradict their prediction: ranked by how surely they are wrong, each with evidence, for a curator."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from pathopipe.cohort import read_labels
from pathopipe.errors import StoreError, UsageError
from pathopipe.files import durable_file
from pathopipe.metadata.cases import MetadataCohort
from pathopipe.metadata.evaluate import ALL, MULTITASK, OutOfFold, View
from pathopipe.metadata.inputs import Inputs
from pathopipe.metadata.model import MetadataModel
from pathopipe.metadata.predict import FOLDS_FILE, MetadataEnsemble
from pathopipe.metadata.probabilities import value_of
from pathopipe.metadata.tasks import TaskSpec, encode
from pathopipe.mil.bags import Bag
from pathopipe.mil.scored import write_rows
from pathopipe.mil.targets import TargetSpec, label_texts

__all__ = [
    "WRONG_SHARE",
    "Contradiction",
    "Evidence",
    "NearSlide",
    "Quality",
    "TopTile",
    "check_patients",
    "explain",
    "gaussian_precision",
    "plant",
    "quality",
    "rank",
    "rank_cohort",
    "rank_out_of_fold",
    "review_rows",
    "with_records",
    "write_review",
]

WRONG_SHARE: Final = 0.05
"""Share of records that are taken to be wrong before anything is seen."""

_COLUMNS: Final = (
    *("rank", "slide_id", "patient_id", "task", "recorded", "predicted", "label", "surety", "p_recorded"),
    *("p_predicted", "abstained", "modalities", "tiles_l0", "words", "near_slides", "neighbours"),
    *("neighbours_as_predicted", "neighbours_as_recorded"),
)
_LEAST_P: Final = 1e-12
_NEIGHBOURS: Final = 10

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contradiction:
    """A record that the models, which have not learnt from its patient, do not believe."""

    row: int
    """Of the cohort."""
    slide_id: str
    patient_id: str
    task: str
    recorded: str
    predicted: str
    label: str = ""
    """Of several labels, the one that contradicts most."""
    p_recorded: float | None
    """Calibrated probability of what is recorded; None for numbers."""
    p_predicted: float | None
    surety: float
    """Probability that the record is wrong."""
    log_odds: float
    """The same as a logarithm of odds, by which the list is ordered: it does not end at one."""
    abstained: bool
    """The models would not have filled the field in: the prediction is less sure than the precision asked for."""
    modalities: str
    """What the prediction rests on: ``image+text``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopTile:
    """One of the tiles that count most in the slide's vector."""

    times_mean: float
    """Its attention over that of the average tile of the slide."""
    x_l0: int | None
    """Left edge in level-0 pixels; None where the features state no coordinates."""
    y_l0: int | None
    width_l0: int | None
    height_l0: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NearSlide:
    """A slide of another patient that lies near."""

    slide_id: str
    recorded: str
    similarity: float
    """Cosine of the two vectors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What speaks for the prediction."""

    tiles: tuple[TopTile, ...] = ()
    words: tuple[tuple[str, float], ...] = ()
    """Words of the report that speak for the prediction against the record, with their shares."""
    near: tuple[NearSlide, ...] = ()
    """Nearest slides whose record is what is predicted here, nearest first."""
    n_neighbours: int = 0
    """How many nearest slides of other patients were counted."""
    as_predicted: int = 0
    """How many of these are recorded as is predicted here."""
    as_recorded: int = 0


# --- ranking -----------------------------------------------------------------------------------------------------


def rank(
    slides: Sequence[tuple[str, str]],
    targets: Sequence[TargetSpec],
    truth: Mapping[str, Floats],
    scores: Mapping[str, Floats],
    abstained: Mapping[str, NDArray[np.bool_]],
    used: Sequence[str],
    *,
    wrong_share: float = WRONG_SHARE,
) -> list[Contradiction]:
    """Records whose prediction is something else, the surest to be wrong first.

    The probability that a record is wrong follows from Bayes' theorem: a right record occurs as often as its class is
    predicted, a wrong one is any of the other classes alike, and a share ``wrong_share`` is wrong beforehand. The order
    within a task does not depend on that share. A number is right where it lies near its prediction (a Laplace
    distribution as wide as the differences are at the median), wrong anywhere in the range of the records alike; it is
    listed where it is more likely wrong than right.

    Source: uniform label noise as in Angluin and Laird 1988, Learning from noisy examples, Machine Learning 2, 343.
    Ranking by out-of-sample probabilities as in Northcutt et al. 2021, Confident learning, arXiv:1911.00068.

    Args:
        slides: n ids of slide and patient.
        targets: The tasks, with their classes.
        truth: By task (n, width) what is recorded, NaN where nothing is.
        scores: By task (n, P) predictions by models that have not seen the patient.
        abstained: By task (n,).
        used: n names of the modalities.
        wrong_share: Between 0 and 1.

    Raises:
        UsageError: ``wrong_share`` is no share.
    """
    if not 0 < wrong_share < 1:
        raise UsageError(f"the share of wrong records is {wrong_share:g}; give a number between 0 and 1")
    found: list[Contradiction] = []
    for spec in targets:
        records, values = truth[spec.name], scores[spec.name]
        texts = label_texts(spec, records)[spec.name]
        for suspect in _suspects(spec, records, values, math.log(wrong_share / (1 - wrong_share))):
            row = suspect.row
            found.append(
                Contradiction(
                    row=row,
                    slide_id=slides[row][0],
                    patient_id=slides[row][1],
                    task=spec.name,
                    recorded=texts[row],
                    predicted=value_of(spec, values[row]),
                    label=suspect.label,
                    p_recorded=suspect.p_recorded,
                    p_predicted=suspect.p_predicted,
                    surety=1 / (1 + math.exp(-min(suspect.log_odds, 700))),
                    log_odds=suspect.log_odds,
                    abstained=bool(abstained[spec.name][row]),
                    modalities=used[row],
                )
            )
    return sorted(found, key=lambda one: (-one.log_odds, -(one.p_predicted or 0), one.task, one.slide_id))


def rank_out_of_fold(
    oof: OutOfFold, *, view: View = (MULTITASK, ALL), wrong_share: float = WRONG_SHARE
) -> list[Contradiction]:
    """Contradictions among the records that a training was given, from its out-of-fold predictions."""
    return rank(
        list(zip(oof.slide_ids, oof.patients, strict=True)),
        [task.target for task in oof.tasks],
        oof.truth,
        oof.scores[view],
        oof.abstained[view],
        oof.used[view],
        wrong_share=wrong_share,
    )


def rank_cohort(
    ensemble: MetadataEnsemble, cohort: MetadataCohort, *, wrong_share: float = WRONG_SHARE
) -> list[Contradiction]:
    """Contradictions among the records of a cohort, which may be that of the training, another, or both.

    Patients of the training are judged by the models of the folds that kept them back.

    Raises:
        EncoderError: Embeddings are of another encoder.
    """
    scores, abstained, used = ensemble.predict(cohort)
    slides = [(case.slide_id, case.patient_id) for case in cohort.cases]
    return rank(slides, ensemble.targets, cohort.truth, scores, abstained, used, wrong_share=wrong_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Suspect:
    row: int
    log_odds: float
    p_recorded: float | None = None
    p_predicted: float | None = None
    label: str = ""


def _suspects(spec: TargetSpec, truth: Floats, values: Floats, prior: float) -> list[_Suspect]:
    known = np.flatnonzero(np.isfinite(truth).any(axis=1) & np.isfinite(values).all(axis=1))
    if not len(known):
        return []
    if not spec.classes:
        return _suspect_numbers(known, truth[known, 0], values[known, 0], prior)
    found = []
    if spec.kind == "multilabel":
        # A label is right or wrong by itself; what is not recorded contradicts nothing.
        recorded = np.where(truth[known] == 1, values[known], 1 - values[known])
        recorded[np.isnan(truth[known])] = np.inf
        for row, chances in zip(known.tolist(), recorded, strict=True):
            label = int(chances.argmin())
            if (values[row, label] >= 0.5) != (truth[row, label] == 1):
                own, other = float(chances[label]), 1 - float(chances[label])
                odds = prior + _log_odds(other, own)
                found.append(
                    _Suspect(row=row, log_odds=odds, p_recorded=own, p_predicted=other, label=spec.classes[label])
                )
        return found
    others = math.log(max(1, len(spec.classes) - 1))
    for row in known.tolist():
        recorded_class, predicted_class = int(truth[row, 0]), int(values[row].argmax())
        if recorded_class != predicted_class:
            own = float(values[row, recorded_class])
            odds = prior - others + _log_odds(1 - own, own)
            found.append(
                _Suspect(row=row, log_odds=odds, p_recorded=own, p_predicted=float(values[row, predicted_class]))
            )
    return found


def _log_odds(wrong: float, right: float) -> float:
    return math.log(max(wrong, _LEAST_P)) - math.log(max(right, _LEAST_P))


def _suspect_numbers(rows: NDArray[np.intp], recorded: Floats, predicted: Floats, prior: float) -> list[_Suspect]:
    span = float(np.ptp(recorded))
    if span == 0:
        return []
    off = np.abs(recorded - predicted)
    # Half of a Laplace distribution lies within its scale times ln 2. The median takes no notice of wrong records.
    scale = max(float(np.median(off)) / math.log(2), 1e-6 * span)
    log_odds = prior - math.log(span) + math.log(2 * scale) + off / scale
    return [
        _Suspect(row=row, log_odds=odds) for row, odds in zip(rows.tolist(), log_odds.tolist(), strict=True) if odds > 0
    ]


# --- whose records -----------------------------------------------------------------------------------------------


def with_records(cohort: MetadataCohort, manifest: Path, tasks: Sequence[TaskSpec]) -> MetadataCohort:
    """The cohort with what the manifest records of a model's tasks; a task whose column is not there has no record.

    Raises:
        UsageError: The manifest can't be read, a cell is no class of its task, or no task has a column.
    """
    table = read_labels(manifest)
    place = {slide_id: row for row, slide_id in enumerate(table.slide_ids)}
    rows = [place[case.slide_id] for case in cohort.cases]
    truth, found = {}, False
    for task in tasks:
        if task.column in table.columns or (task.column == "site" and any(table.sites)):
            truth[task.name] = encode(task, table)[rows]
            found = True
        else:
            truth[task.name] = np.full((len(rows), len(task.classes) if task.kind == "multi-label" else 1), np.nan)
    if not found:
        wanted = ", ".join(task.column for task in tasks)
        raise UsageError(
            f"{manifest.name}: none of the columns that the model predicts ({wanted}); add those to review"
        )
    return replace(cohort, tasks=tuple(tasks), truth=truth)


def check_patients(model_folder: Path, cohort: MetadataCohort) -> None:
    """Make sure that slides of the training bear the patient they had there, or a model that saw them might judge them.

    Raises:
        UsageError: A slide is another patient's now.
        StoreError: The training's folds can't be read.
    """
    try:
        with (model_folder / FOLDS_FILE).open(encoding="utf-8", newline="") as file:
            known = {row["slide_id"]: row["patient_id"] for row in csv.DictReader(file)}
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise StoreError(f"{model_folder / FOLDS_FILE}: can't be read ({error}); train again") from None
    moved = [case for case in cohort.cases if known.get(case.slide_id, case.patient_id) != case.patient_id]
    if moved:
        one = moved[0]
        raise UsageError(
            f"slide {one.slide_id}: patient {one.patient_id} here, {known[one.slide_id]} in training "
            f"({len(moved)} such slides); models that have learnt from it would judge it: correct patient_id, or train "
            "again"
        )


# --- evidence ----------------------------------------------------------------------------------------------------


def explain(
    contradictions: Sequence[Contradiction],
    ensemble: MetadataEnsemble,
    cohort: MetadataCohort,
    *,
    tiles: int = 6,
    words: int = 8,
    near: int = 3,
) -> list[Evidence]:
    """Evidence for each contradiction, from models that have not seen its patient.

    Tiles are those that the attention of the image branch marks; it is the same for all tasks. Near slides are looked
    for among the slides that the same model has not learnt from, and are of other patients.

    Args:
        contradictions: Of this cohort.
        ensemble: The models that predicted.
        cohort: With its records.
        tiles: Most of a slide.
        words: Most of a report.
        near: Most slides named.
    """
    found: list[Evidence] = [Evidence()] * len(contradictions)
    judge = [ensemble.choose(case.patient_id) for case in cohort.cases]
    specs = {spec.name: spec for spec in ensemble.targets}
    top: dict[int, tuple[TopTile, ...]] = {}
    for number, model in enumerate(ensemble.models):
        own = [place for place, one in enumerate(contradictions) if judge[one.row][0] == number]
        if not own:
            continue
        rows = np.flatnonzero([chosen[0] == number for chosen in judge])
        part = cohort.take(rows)
        inputs = model.preparation.inputs(part)
        vectors = model.vectors(inputs, np.arange(len(rows))).astype(np.float64)
        place_of = {int(row): at for at, row in enumerate(rows)}
        for place in own:
            one = contradictions[place]
            at = place_of[one.row]
            bag = cohort.cases[one.row].bag
            if one.row not in top:
                judges = [ensemble.models[chosen] for chosen in judge[one.row]]
                top[one.row] = _top_tiles(judges, bag, tiles) if bag is not None else ()
            found[place] = replace(
                _neighbours(one, specs[one.task], part, vectors, at, near),
                tiles=top[one.row],
                words=_words(one, specs[one.task], model, inputs, part, at, words),
            )
    return found


def _top_tiles(judges: Sequence[MetadataModel], bag: Bag, count: int) -> tuple[TopTile, ...]:
    given = [attention for model in judges if (attention := model.attention(bag)) is not None]
    if not given:
        return ()
    attention = np.mean(given, axis=0)
    spots: list[tuple[int | None, int | None, int | None, int | None]] = []
    for places in bag.places():
        side = (None, None) if places.side_l0 is None else (int(places.side_l0[0]), int(places.side_l0[1]))
        if places.xy_l0 is None:
            spots += [(None, None, *side)] * len(places.rows)
        else:
            spots += [(int(x), int(y), *side) for x, y in places.xy_l0.tolist()]
    tiles = []
    for row in np.argsort(-attention, kind="stable")[:count].tolist():
        x_l0, y_l0, width_l0, height_l0 = spots[row]
        times = float(attention[row]) * len(attention)
        tiles.append(TopTile(times_mean=times, x_l0=x_l0, y_l0=y_l0, width_l0=width_l0, height_l0=height_l0))
    return tuple(tiles)


def _words(
    one: Contradiction,
    spec: TargetSpec,
    model: MetadataModel,
    inputs: Inputs,
    part: MetadataCohort,
    at: int,
    count: int,
) -> tuple[tuple[str, float], ...]:
    text = part.cases[at].text
    encoder = model.preparation.text
    if not text or encoder is None:
        return ()
    if spec.kind == "multilabel":
        towards = model.text_direction(inputs, at, one.task, one.label)
        sign = 1 if one.label in one.predicted.split(";") else -1
        direction = None if towards is None else sign * towards
    elif not spec.classes:
        towards = model.text_direction(inputs, at, one.task, "")
        direction = None if towards is None else towards * (1 if float(one.predicted) > float(one.recorded) else -1)
    else:
        towards = model.text_direction(inputs, at, one.task, one.predicted)
        away = model.text_direction(inputs, at, one.task, one.recorded)
        direction = None if towards is None or away is None else towards - away
    return () if direction is None else tuple(encoder.words_behind(text, direction, count=count))


def _neighbours(
    one: Contradiction, spec: TargetSpec, part: MetadataCohort, vectors: Floats, at: int, count: int
) -> Evidence:
    truth = part.truth[one.task]
    other = np.asarray([patient != one.patient_id for patient in part.patients])
    length = np.linalg.norm(vectors, axis=1)
    candidates = np.flatnonzero(other & (length > 0) & np.isfinite(truth).any(axis=1))
    if not len(candidates) or length[at] == 0:
        return Evidence()
    similarity = vectors[candidates] @ vectors[at] / (length[candidates] * length[at])
    order = np.argsort(-similarity, kind="stable")
    candidates, similarity = candidates[order], similarity[order]
    texts = label_texts(spec, truth[candidates])[spec.name]
    if not spec.classes:
        chosen = list(range(min(count, len(candidates))))
        alike = against = np.zeros(len(candidates), bool)
    else:
        if spec.kind == "multilabel":
            state = truth[candidates, spec.classes.index(one.label)]
            wanted = float(one.label in one.predicted.split(";"))
            alike, against = state == wanted, state == 1 - wanted
        else:
            alike, against = (np.asarray([text == of for text in texts]) for of in (one.predicted, one.recorded))
        chosen = np.flatnonzero(alike)[:count].tolist()
    counted = slice(min(_NEIGHBOURS, len(candidates)))
    return Evidence(
        near=tuple(
            NearSlide(
                slide_id=part.cases[int(candidates[place])].slide_id,
                recorded=texts[place],
                similarity=float(similarity[place]),
            )
            for place in chosen
        ),
        n_neighbours=len(candidates[counted]) if spec.classes else 0,
        as_predicted=int(alike[counted].sum()),
        as_recorded=int(against[counted].sum()),
    )


# --- the table ---------------------------------------------------------------------------------------------------


def review_rows(contradictions: Sequence[Contradiction], evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """One flat record a contradiction, in order; evidence may be of the first ones only."""
    rows = []
    for number, one in enumerate(contradictions, 1):
        shown = evidence[number - 1] if number <= len(evidence) else Evidence()
        rows.append(
            {
                "rank": number,
                "slide_id": one.slide_id,
                "patient_id": one.patient_id,
                "task": one.task,
                "recorded": one.recorded,
                "predicted": one.predicted,
                "label": one.label,
                "surety": f"{one.surety:.6f}",
                "p_recorded": None if one.p_recorded is None else f"{one.p_recorded:.6g}",
                "p_predicted": None if one.p_predicted is None else f"{one.p_predicted:.6g}",
                "abstained": str(one.abstained).lower(),
                "modalities": one.modalities,
                "tiles_l0": " ".join(f"{tile.x_l0},{tile.y_l0}" for tile in shown.tiles if tile.x_l0 is not None),
                "words": "; ".join(word for word, _ in shown.words),
                "near_slides": " ".join(slide.slide_id for slide in shown.near),
                "neighbours": shown.n_neighbours or None,
                "neighbours_as_predicted": shown.as_predicted if shown.n_neighbours else None,
                "neighbours_as_recorded": shown.as_recorded if shown.n_neighbours else None,
            }
        )
    return rows


def write_review(path: Path, contradictions: Sequence[Contradiction], evidence: Sequence[Evidence]) -> None:
    """Write the list as CSV, whole or not at all; cells that a spreadsheet would run are escaped."""
    rows = review_rows(contradictions, evidence)
    if rows:
        write_rows(path, rows)
        return
    with durable_file(path) as file:
        file.write((",".join(_COLUMNS) + "\n").encode())


# --- how good the list is ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How a list finds records that are known to be wrong."""

    planted: int
    listed: int
    found: int
    """Planted records in the list, wherever."""
    hits: NDArray[np.bool_]
    """(listed,) whether each entry was planted."""

    def precision_at(self, k: int) -> float | None:
        """Share of planted records among the first ``k`` entries, or all where there are fewer; None for no entry."""
        first = self.hits[:k]
        return float(first.mean()) if len(first) else None

    def recall_at(self, k: int) -> float | None:
        """Share of the planted records that are among the first ``k`` entries; None where none was planted."""
        return float(self.hits[:k].sum() / self.planted) if self.planted else None

    @property
    def recall(self) -> float | None:
        """Share of the planted records that are in the list."""
        return self.recall_at(self.listed)


def plant(task: TaskSpec, truth: Floats, *, share: float, seed: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Make some records wrong, to see whether they are found.

    A class becomes any other class alike, of several labels one is turned round, a number becomes that of another
    slide that differs.

    Args:
        task: What is recorded.
        truth: (n, width) encoded records; NaN where nothing is, which stays.
        share: Of the records.
        seed: Which, and what they become.

    Returns:
        The records, and (n,) which are wrong now.

    Raises:
        UsageError: The share asks for no record at all, or all records are alike.
    """
    rng = np.random.default_rng(seed)
    known = np.flatnonzero(np.isfinite(truth).all(axis=1))
    count = round(share * len(known))
    if not 0 < count <= len(known):
        raise UsageError(f"task '{task.name}': {share:g} of {len(known)} records is {count}; plant one or more")
    rows = np.sort(rng.choice(known, count, replace=False))
    wrong = truth.copy()
    for row in rows:
        if task.kind == "multi-label":
            label = int(rng.integers(truth.shape[1]))
            wrong[row, label] = 1 - truth[row, label]
            continue
        pool = np.arange(len(task.classes), dtype=np.float64) if task.classes else np.unique(truth[known, 0])
        pool = pool[pool != truth[row, 0]]
        if not len(pool):
            raise UsageError(f"task '{task.name}': all records are alike, so none can be made wrong")
        wrong[row, 0] = rng.choice(pool)
    planted = np.zeros(len(truth), bool)
    planted[rows] = True
    return wrong, planted


def gaussian_precision(auroc: float, share: float) -> float:
    """Precision of a list at the number of wrong records, by how well wrong and right records are told apart.

    Where evidence against records is normally distributed with one spread, for wrong records by d higher in the mean
    than for right ones, its AUROC is Phi(d / sqrt 2) (Green and Swets 1966, Signal detection theory and psychophysics),
    and no order of the records is better than that by the evidence. As many are taken as are wrong, so precision is
    recall. For a task of two classes the AUROC is that of the task itself.

    Args:
        auroc: 0.5 to below 1.
        share: Of the records that are wrong, between 0 and 1.
    """
    between = math.sqrt(2) * float(norm.ppf(auroc))

    def excess(cut: float) -> float:
        return share * float(norm.sf(cut - between)) + (1 - share) * float(norm.sf(cut)) - share

    return float(norm.sf(brentq(excess, -10, 10 + between) - between))


def quality(contradictions: Sequence[Contradiction], planted: Mapping[str, NDArray[np.bool_]]) -> Quality:
    """Hold a list against the records that were planted, by task (n,); entries of other tasks are passed over."""
    hits = np.asarray([bool(planted[one.task][one.row]) for one in contradictions if one.task in planted], bool)
    return Quality(
        planted=sum(int(of.sum()) for of in planted.values()), listed=len(hits), found=int(hits.sum()), hits=hits
    )
