"""Trains models over folds that are kept apart, keeps each as it is finished, and goes on where a run was stopped."""

import csv
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pathopipe.cohort import (
    Fold,
    LabelTable,
    check_folds,
    folds_from_column,
    is_missing,
    join_labels,
    nested_folds,
    read_labels,
)
from pathopipe.errors import UsageError
from pathopipe.files import durable_file, remove_leftovers
from pathopipe.mil.bags import Bag, find_features, open_bags
from pathopipe.mil.covariates import encode_covariates, fit_covariates, fit_size, standard_size
from pathopipe.mil.fit import Epoch, FittedNetwork, TrainingSet, find_temperature, fit_network, score_bags
from pathopipe.mil.heads import BASELINE, HEADS, check_head
from pathopipe.mil.model import MilModel, ModelCard
from pathopipe.mil.settings import MilConfig
from pathopipe.mil.targets import (
    TargetSpec,
    encode_targets,
    fit_targets,
    label_texts,
    parse_targets,
    slice_of,
    strata_of,
)

__all__ = [
    "Cohort",
    "FoldResult",
    "Job",
    "Spread",
    "TrainRequest",
    "check_output",
    "fold_folder",
    "one_by_one",
    "open_cohorts",
    "read_predictions",
    "train_all",
    "train_fold",
]

logger = logging.getLogger("pathopipe")

_CONFIG: Final = "config.json"
_SPLITS: Final = "splits.csv"
_PREDICTIONS: Final = "predictions.csv"
_HISTORY: Final = "history.csv"
_UNNAMED: Final = "features"
_SHOWN: Final = 5
_TILES_FOR_THREADS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """What is to be trained, on what."""

    manifest: Path
    features: Path
    target: str
    out: Path
    kind: str = "auto"
    heads: tuple[str, ...] = ("abmil",)
    encoders: tuple[str, ...] = ()
    """Empty where the features are of one encoder."""
    grid: str | None = None
    folds: int = 5
    by: Literal["slide", "patient"] = "slide"
    whole_sites: bool = False
    """Test on sites that were not trained on."""
    seed: int = 0
    covariates: tuple[str, ...] = ()
    settings: MilConfig = field(default_factory=MilConfig)
    device: str = "cpu"
    threads: int = 1
    """Of torch, in each worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """The bags of one encoder with their labels and folds."""

    encoder: str
    bags: tuple[Bag, ...]
    table: LabelTable
    """One row a bag."""
    specs: tuple[TargetSpec, ...]
    truth: NDArray[np.float64]
    """(n, W) encoded labels, NaN where missing."""
    folds: tuple[Fold, ...]
    strata: tuple[str, ...]
    covariates: tuple[str, ...] = ()

    @property
    def patients(self) -> list[str]:
        """Patient of each bag."""
        return [bag.patient_id for bag in self.bags]


@dataclass(frozen=True, slots=True)
class Job:
    """One model to train."""

    encoder: str
    head: str
    fold: int

    def __str__(self) -> str:
        return f"{self.encoder} {self.head} fold {self.fold}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldResult:
    """A trained model of one fold and what it says of bags that it has not learnt from."""

    model: MilModel
    test: NDArray[np.intp]
    test_logits: NDArray[np.float64]
    val: NDArray[np.intp]
    """Bags of the training side; each was scored by the members that did not learn from it."""
    val_logits: NDArray[np.float64]
    history: tuple[tuple[int, Epoch], ...]
    """Member and epoch."""


# --- opening -----------------------------------------------------------------------------------------------------


def open_cohorts(request: TrainRequest) -> tuple[list[Cohort], list[str]]:
    """Join labels with features, open the bags and deal out the folds; nothing is trained.

    Returns:
        One cohort for each encoder, all with the same bags and folds; and what was left out, a sentence each.

    Raises:
        UsageError: Whatever is wrong with labels, features or folds.
        StoreError: A store is damaged or not complete.
    """
    for head in request.heads:
        check_head(head)
    labels = read_labels(request.manifest)
    names: tuple[str | None, ...] = request.encoders or (None,)
    ids = [set(find_features(request.features, encoder=name)) for name in names]
    columns = [part.split(":")[0].strip() for part in request.target.split(",") if part.strip()]
    joined = join_labels(labels, set.intersection(*ids), targets=columns, where=str(request.features))
    notes = joined.lines()
    opened = [
        open_bags(request.features, joined.table, encoder=name, grid=request.grid, by=request.by) for name in names
    ]
    every_column = [column.strip() for part in request.target.split(",") for column in part.split(":")]
    table = joined.table.by_patient(every_column) if request.by == "patient" else joined.table
    filled = [row for row in range(len(table)) if all(bags[row].n_tiles for bags in opened)]
    if len(filled) < len(table):
        empty = [table.slide_ids[row] for row in range(len(table)) if row not in set(filled)]
        notes.append(f"{len(empty)} bags hold no tile, left out: {_some(empty)}")
    if not filled:
        raise UsageError(f"{request.features}: none of the {len(table)} bags holds a tile; nothing can be trained")
    table = table.take(filled)
    bad = sum(bag.left_out for row in filled for bag in (opened[0][row],))
    if bad:
        notes.append(f"{bad} tiles are quarantined or not finite, left out")
    specs = parse_targets(request.target, table, kind=request.kind, classes=request.settings.classes)
    truth = encode_targets(specs, table)
    patients = [opened[0][row].patient_id for row in filled]
    strata = strata_of(specs[0], truth)
    folds = _deal_folds(request, table, patients, strata)
    cohorts = []
    for name, bags in zip(names, opened, strict=True):
        kept = tuple(bags[row] for row in filled)
        cohorts.append(
            Cohort(
                encoder=name or kept[0].encoder or _UNNAMED,
                bags=kept,
                table=table,
                specs=specs,
                truth=truth,
                folds=tuple(folds),
                strata=tuple(strata),
                covariates=request.covariates,
            )
        )
    return cohorts, notes


def _deal_folds(request: TrainRequest, table: LabelTable, patients: list[str], strata: list[str]) -> list[Fold]:
    # Several members validate on parts of the training side in turn; one alone needs a part of its own.
    val_share = request.settings.val_share if request.settings.members == 1 else 0.0
    sites = table.sites if any(table.sites) else None
    if table.split is not None and any(not is_missing(cell) for cell in table.split):
        if request.whole_sites:
            raise UsageError(f"{table.source}: it has a split column, which --leave-sites-out would overrule; drop one")
        folds = folds_from_column(
            table.split, patients, strata, folds=request.folds, val_share=val_share, seed=request.seed, sites=sites
        )
    else:
        folds = nested_folds(
            patients,
            strata,
            folds=request.folds,
            val_share=val_share,
            seed=request.seed,
            sites=sites,
            by_site=request.whole_sites,
        )
    check_folds(folds, patients)
    return folds


# --- one fold ----------------------------------------------------------------------------------------------------


def train_fold(
    cohort: Cohort,
    head: str,
    fold: int,
    settings: MilConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    on_epoch: Callable[[int, Epoch], None] = lambda member, epoch: None,
) -> FoldResult:
    """Train one model; the fold's test bags are scored once, at the end.

    Args:
        cohort: Bags, labels and folds.
        head: Name of the head.
        fold: Number of the fold.
        settings: The recipe.
        seed: With the fold and the member it decides everything random.
        device: ``cpu`` or ``cuda``.
        on_epoch: Told of each member's epochs.
    """
    parts = cohort.folds[fold]
    fitted_on = parts.train
    specs = fit_targets(cohort.specs, cohort.truth[fitted_on], intervals=settings.intervals, balanced=settings.balanced)
    covariates = fit_covariates(cohort.covariates, cohort.table, fitted_on)
    encoded = encode_covariates(covariates, cohort.table)
    # The baseline's maximum sees the size of a bag in any case.
    size = fit_size([cohort.bags[int(row)] for row in fitted_on]) if settings.bag_size and head != BASELINE else None
    if size is not None:
        encoded = np.concatenate([encoded, standard_size(cohort.bags, size)], axis=1)
    data = TrainingSet(bags=cohort.bags, truth=cohort.truth, covariates=encoded)
    networks, history = [], []
    logits = np.zeros((len(cohort.bags), sum(spec.outputs for spec in specs)))
    scored = np.zeros(len(cohort.bags))
    test_logits = np.zeros((len(parts.test), logits.shape[1]))
    best_epochs = []
    for member, (train, val) in enumerate(_members(cohort, parts, settings.members, seed + fold)):
        fitted: FittedNetwork = fit_network(
            head,
            specs,
            data,
            train,
            val,
            settings,
            seed=int(np.random.SeedSequence([seed, fold, member]).generate_state(1)[0]),
            device=device,
            on_epoch=lambda epoch, member=member: on_epoch(member, epoch),  # type: ignore[misc]
        )
        networks.append(fitted.network)
        history += [(member, epoch) for epoch in fitted.history]
        best_epochs.append(fitted.best_epoch)
        if len(val):
            logits[val] += score_bags(fitted.network, data, val, device=device)
            scored[val] += 1
        test_logits += score_bags(fitted.network, data, parts.test, device=device)
    test_logits /= len(networks)
    seen = np.flatnonzero(scored)
    val_logits = logits[seen] / scored[seen, None]
    first = cohort.bags[0]
    card = ModelCard(
        head=head,
        shape=networks[0].shape,
        targets=specs,
        encoder=first.encoder,
        encoder_id=first.encoder_id,
        grid=first.sources[0].grid,
        covariates=covariates,
        bag_size=size,
        temperatures=tuple(
            find_temperature(specs, number, val_logits, cohort.truth[seen]) if len(seen) else 1.0
            for number in range(len(specs))
        ),
        members=len(networks),
        training={
            "paper": HEADS[head].paper,
            "fold": parts.name,
            "seed": seed,
            "bags": len(parts.train) + len(parts.val),
            "patients": len({cohort.bags[int(row)].patient_id for row in (*parts.train, *parts.val)}),
            "best_epochs": best_epochs,
            "settings": settings.model_dump(mode="json"),
        },
    )
    return FoldResult(
        model=MilModel(card, networks),
        test=parts.test,
        test_logits=test_logits,
        val=seen,
        val_logits=val_logits,
        history=tuple(history),
    )


def _members(
    cohort: Cohort, fold: Fold, members: int, seed: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """What each member learns from and what it stops on; a validation part that was given is everyone's."""
    if len(fold.val) or members == 1:
        yield from ((fold.train, fold.val) for _ in range(members))
        return
    patients = [cohort.bags[int(row)].patient_id for row in fold.train]
    members = min(members, len(set(patients)))
    if members < 2:
        yield fold.train, fold.val
        return
    strata = [cohort.strata[int(row)] for row in fold.train]
    level = logger.level
    # What is to be said of rare classes was said of the outer folds.
    logger.setLevel(logging.ERROR)
    try:
        inner = nested_folds(patients, strata, folds=members, val_share=0, seed=seed)
    finally:
        logger.setLevel(level)
    for part in inner:
        yield fold.train[part.train], fold.train[part.test]


# --- the output folder -------------------------------------------------------------------------------------------


def fold_folder(out: Path, cohort: Cohort, job: Job) -> Path:
    """Where a model and its predictions are kept."""
    return out / job.encoder / job.head / f"fold{cohort.folds[job.fold].name}"


def check_output(request: TrainRequest, cohorts: Sequence[Cohort]) -> None:
    """Write config and splits into a new output folder, or make sure that they are those of the present run.

    Raises:
        UsageError: The folder holds models of other settings, labels or features.
        StoreWriteError: It can't be written.
    """
    found = json.loads(json.dumps(_describe(request, cohorts)))
    path = request.out / _CONFIG
    remove_leftovers(request.out)
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: can't be read ({error}); choose another --out") from None
        known_encoders = known.pop("inputs", {})
        encoders = found.pop("inputs")
        differing = [key for key in found if known.get(key) != found[key]]
        changed = [name for name in encoders if name in known_encoders and known_encoders[name] != encoders[name]]
        if differing or changed:
            what = ", ".join(_difference(key, known.get(key), found[key]) for key in differing)
            what = what or f"features of {', '.join(changed)}"
            raise UsageError(
                f"{request.out}: holds models of another run ({what}); choose another --out, delete this folder, "
                "or repeat its settings"
            )
        if set(encoders) <= set(known_encoders):
            return
        found["inputs"] = {**known_encoders, **encoders}
    _write_text(path, json.dumps(found, indent=1))
    _write_text(request.out / _SPLITS, _splits_csv(cohorts[0]))


def _describe(request: TrainRequest, cohorts: Sequence[Cohort]) -> dict[str, Any]:
    """What must be the same for models to stand beside each other; heads and encoders may be added later."""
    first = cohorts[0]
    labels = sha256()
    labels.update(first.truth.tobytes())
    for bag in first.bags:
        labels.update(f"{bag.bag_id}\0{bag.patient_id}\0{bag.site}\0".encode())
    for fold in first.folds:
        for part in (fold.train, fold.val, fold.test):
            labels.update(np.asarray(part, np.int64).tobytes() + b"|")
    for name in first.covariates:
        labels.update("\0".join(first.table.column(name)).encode())
    return {
        "manifest": _place(request.manifest, request.out),
        "features": _place(request.features, request.out),
        "grid": request.grid,
        "target": request.target,
        "kind": request.kind,
        "by": request.by,
        "whole_sites": request.whole_sites,
        "folds": request.folds,
        "seed": request.seed,
        "covariates": list(request.covariates),
        "settings": request.settings.model_dump(mode="json"),
        "targets": [spec.to_json() for spec in first.specs],
        "labels": labels.hexdigest()[:16],
        "inputs": {cohort.encoder: _bags_digest(cohort.bags) for cohort in cohorts},
    }


def _place(path: Path, out: Path) -> str:
    """Where something lies, seen from ``out``; of what lies neither below nor beside it the name alone.

    Folders further up may name people, and nothing reads this but the next run, which compares it.
    """
    whole = path.absolute()
    beside = out.absolute().parent
    return Path(os.path.relpath(whole, out)).as_posix() if whole.is_relative_to(beside) else whole.name


def _bags_digest(bags: Sequence[Bag]) -> str:
    text = "\n".join(f"{bag.bag_id} {bag.n_tiles} {bag.features} {bag.encoder_id}" for bag in bags)
    return sha256(text.encode()).hexdigest()[:16]


def _difference(key: str, known: Any, found: Any) -> str:
    if isinstance(known, dict) and isinstance(found, dict):
        inner = next((name for name in found if known.get(name) != found[name]), None)
        if inner is not None:
            return _difference(f"{key}.{inner}", known.get(inner), found[inner])
    if isinstance(found, (dict, list)) or key == "labels":
        return f"other {key}"
    return f"{key} was {known}, now {found}"


def _splits_csv(cohort: Cohort) -> str:
    rows = []
    for fold in cohort.folds:
        for part in ("train", "val", "test"):
            for row in getattr(fold, part):
                bag = cohort.bags[int(row)]
                rows.append([bag.bag_id, bag.patient_id, bag.site, fold.name, part])
    return _csv(["bag_id", "patient_id", "site", "fold", "part"], rows)


def _save_fold(folder: Path, cohort: Cohort, result: FoldResult) -> None:
    """Write a model with its predictions; the folder appears whole or not at all."""
    partial = folder.parent / f".{folder.name}.unfinished"
    shutil.rmtree(partial, ignore_errors=True)
    result.model.save(partial)
    epochs = [[member, *asdict(epoch).values()] for member, epoch in result.history]
    _write_text(partial / _HISTORY, _csv(["member", *Epoch.__dataclass_fields__], epochs))
    _write_text(partial / _PREDICTIONS, _predictions_csv(cohort, result))
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _predictions_csv(cohort: Cohort, result: FoldResult) -> str:
    specs = result.model.card.targets
    rows = np.concatenate([result.test, result.val])
    logits = np.concatenate([result.test_logits, result.val_logits])
    columns: dict[str, Sequence[Any]] = {
        "bag_id": [cohort.bags[int(row)].bag_id for row in rows],
        "patient_id": [cohort.bags[int(row)].patient_id for row in rows],
        "site": [cohort.bags[int(row)].site for row in rows],
        "part": ["test"] * len(result.test) + ["val"] * len(result.val),
    }
    predicted = result.model.interpret(logits)
    for number, spec in enumerate(specs):
        columns.update(label_texts(spec, cohort.truth[rows][:, slice_of(specs, number, "truth")]))
        own = logits[:, slice_of(specs, number, "logits")]
        columns.update({f"{spec.name}_logit_{k}": own[:, k].tolist() for k in range(spec.outputs)})
        columns.update({name: predicted[spec.name][:, k].tolist() for k, name in enumerate(spec.prediction_names)})
    return _csv(list(columns), zip(*columns.values(), strict=True))


def read_predictions(
    path: Path, specs: Sequence[TargetSpec]
) -> tuple[list[dict[str, str]], dict[str, NDArray[np.float64]]]:
    """Rows of a predictions file as text, and for each target its (n, P) predictions.

    Raises:
        UsageError: The file can't be read, or lacks a column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        found = {
            spec.name: np.asarray([[float(row[name]) for name in spec.prediction_names] for row in rows]).reshape(
                len(rows), len(spec.prediction_names)
            )
            for spec in specs
        }
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(
            f"{path}: not the predictions of this run ({error}); delete its folder and train again"
        ) from None
    return rows, found


def _csv(header: Sequence[str], rows: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _write_text(path: Path, text: str) -> None:
    with durable_file(path) as file:
        file.write(text.encode())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


# --- all of it ---------------------------------------------------------------------------------------------------


Spread = Callable[[Callable[..., str], Sequence[tuple[Any, ...]]], Iterator[tuple[int, str]]]
"""Calls a function with each of some arguments, and gives number and result of each as it ends."""


def one_by_one(work: Callable[..., str], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, str]]:
    """In this process, in order."""
    for number, arguments in enumerate(calls):
        yield number, work(*arguments)


def train_all(
    request: TrainRequest,
    cohorts: Sequence[Cohort],
    on_line: Callable[[str], None] = lambda line: None,
    spread: Spread = one_by_one,
) -> list[Job]:
    """Train every encoder, head and fold that isn't there yet; the baseline is always among the heads.

    Args:
        request: What to train.
        cohorts: As :func:`open_cohorts` gives them, after :func:`check_output`.
        on_line: Told what happens, a line each.
        spread: Who trains: this process, or workers elsewhere.

    Returns:
        All jobs, also those that were finished before.
    """
    heads = tuple(dict.fromkeys((*request.heads, BASELINE)))
    by_name = {cohort.encoder: cohort for cohort in cohorts}
    jobs = [
        Job(cohort.encoder, head, fold) for cohort in cohorts for head in heads for fold in range(len(cohort.folds))
    ]
    # The card of a model is written before its folder gets its name, so the folder alone tells.
    pending = [job for job in jobs if not fold_folder(request.out, by_name[job.encoder], job).exists()]
    if len(pending) < len(jobs):
        on_line(f"{len(jobs) - len(pending)} of {len(jobs)} models were there already")
    calls = [(request, by_name[job.encoder], job) for job in pending]
    for ended, (number, summary) in enumerate(spread(_do_job, calls), 1):
        on_line(f"[{ended}/{len(pending)}] {pending[number]}: {summary}")
    return jobs


def _do_job(request: TrainRequest, cohort: Cohort, job: Job) -> str:
    began = time.perf_counter()
    # Threads pay for large bags; in small ones they wait for each other.
    mean_tiles = sum(bag.n_tiles for bag in cohort.bags) / len(cohort.bags)
    torch.set_num_threads(request.threads if mean_tiles >= _TILES_FOR_THREADS else 1)
    result = train_fold(cohort, job.head, job.fold, request.settings, seed=request.seed, device=request.device)
    _save_fold(fold_folder(request.out, cohort, job), cohort, result)
    seconds = time.perf_counter() - began
    if not result.history:
        return f"fitted in {seconds:.1f} s"
    epochs = len(result.history)
    reading = sum(epoch.seconds * epoch.reading_share for _, epoch in result.history)
    members = result.model.card.members
    best = result.model.card.training["best_epochs"] if result.model.card.training else []
    word = "best" if request.settings.early_stop else "last"
    return (
        f"{members} networks, {epochs} epochs ({word} {', '.join(str(epoch) for epoch in best)}) in {seconds:.1f} s, "
        f"{reading / max(seconds, 1e-9):.0%} of it waiting for tiles"
    )
