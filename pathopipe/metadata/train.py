"""Trains over folds kept apart: in each the model of all tasks and sources, and baselines beside it."""

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pathopipe.cohort import Fold
from pathopipe.errors import UsageError
from pathopipe.files import durable_file, one_at_a_time, remove_leftovers
from pathopipe.metadata.baseline import train_baselines
from pathopipe.metadata.calibration import abstentions, interpret
from pathopipe.metadata.cases import MetadataCohort, check_tasks
from pathopipe.metadata.evaluate import (
    ALL,
    BASELINE,
    MULTITASK,
    OOF_FILE,
    OutOfFold,
    View,
    oof_rows,
    read_oof,
    unescape,
)
from pathopipe.metadata.fold import Epoch, FoldData, fold_data, train_model
from pathopipe.metadata.model import MetadataModel
from pathopipe.metadata.network import MODALITIES, as_mask, set_name
from pathopipe.metadata.predict import FOLDS_FILE, FOLDS_FOLDER
from pathopipe.metadata.settings import MetadataConfig
from pathopipe.metadata.splits import deal_folds
from pathopipe.mil.scored import write_rows

__all__ = ["train", "train_fold"]

_CONFIG: Final = "config.json"
_HISTORY: Final = "history.csv"

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldResult:
    """A trained model, and what it and the baseline say of slides that they have not learnt from."""

    model: MetadataModel
    rows: list[dict[str, Any]]
    """Out-of-fold predictions, as :func:`pathopipe.metadata.evaluate.oof_rows` gives them."""
    history: tuple[Epoch, ...]


def train_fold(
    cohort: MetadataCohort,
    fold: Fold,
    settings: MetadataConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> FoldResult:
    """Train the model and the baselines of one fold; its test slides are scored once, at the end.

    Vocabulary, table columns, scales and class weights come from the training side alone; when to stop, temperatures
    and thresholds from the part of it that a network did not learn from.

    The baseline is one model a task from one modality. That is the image, by what ``mil train`` would make of it with
    the recipe that is its own; where no slide has an image the report, else the table, by the same branch trained as
    here.

    Args:
        cohort: Slides and tasks.
        fold: Its parts.
        settings: The recipe.
        seed: With the fold and the member it decides everything random.
        device: ``cpu`` or ``cuda``.
        on_epoch: Told of each epoch.

    Raises:
        UsageError: No training slide has a modality, or none a record of some task, or a loss is not finite.
    """
    data = fold_data(cohort, fold, settings, seed=seed, device=device)
    inputs = data.inputs
    history: list[Epoch] = []

    def note(epoch: Epoch) -> None:
        history.append(epoch)
        on_epoch(epoch)

    model = train_model(data, MULTITASK, range(len(data.specs)), inputs, note)
    rows: list[dict[str, Any]] = []
    names = (ALL, *model.card.shape.modalities)
    asked = {name: MODALITIES if name == ALL else (name,) for name in names}
    logits = model.logits(inputs, fold.test, list(asked.values()))
    for name, chosen in asked.items():
        used = inputs.present[fold.test] & as_mask(chosen)
        scores = interpret(model.card, logits[chosen], used)
        rows += _rows_of(data, (MULTITASK, name), used, scores, abstentions(model.card, scores, used))
    modality = model.card.shape.modalities[0]
    used = inputs.present[fold.test] & as_mask((modality,))
    rows += _rows_of(data, (BASELINE, modality), used, *train_baselines(data, modality, note))
    return FoldResult(model=model, rows=rows, history=tuple(history))


def _rows_of(
    data: FoldData,
    view: View,
    used: NDArray[np.bool_],
    scores: Mapping[str, Floats],
    abstained: Mapping[str, NDArray[np.bool_]],
) -> list[dict[str, Any]]:
    cases = [data.cohort.cases[int(row)] for row in data.fold.test]
    return oof_rows(
        [(case.slide_id, case.patient_id, case.site) for case in cases],
        data.fold.name,
        view,
        [set_name(row) for row in used],
        data.specs,
        {task.name: data.cohort.truth[task.name][data.fold.test] for task in data.cohort.tasks},
        scores,
        abstained,
    )


def train(
    cohort: MetadataCohort,
    settings: MetadataConfig,
    out: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    on_line: Callable[[str], None] = lambda line: None,
) -> OutOfFold:
    """Train every fold that isn't there yet, and write what each says of the slides it has not learnt from.

    In ``out``: ``config.json`` (settings, tasks, what was trained on), ``folds.csv``, ``folds/<name>/`` with weights,
    card, history and predictions, and ``oof.csv`` with those of all folds. The same call gives the same bytes, whether
    or not it was stopped in between, on the same machine with as many threads.

    Args:
        cohort: Slides and tasks.
        settings: The recipe.
        out: The folder; a training of the same cohort and settings is gone on with.
        seed: Decides folds, weights, order, samples and dropout.
        device: ``cpu`` or ``cuda``.
        on_line: Told what happens, a line each.

    Returns:
        The out-of-fold predictions, as :func:`pathopipe.metadata.evaluate.read_oof` reads them.

    Raises:
        UsageError: A task can't be learnt, ``out`` holds another training, or a loss is not finite.
        StoreBusyError: Another process is training there.
        StoreWriteError: ``out`` can't be written.
    """
    check_tasks(cohort)
    folds = [replace(fold, name=f"fold{fold.name}") for fold in deal_folds(cohort, settings, seed=seed)]
    with one_at_a_time(out / ".lock", f"{out}"):
        _check_output(cohort, settings, folds, out, seed)
        for number, fold in enumerate(folds, 1):
            folder = out / FOLDS_FOLDER / fold.name
            if folder.exists():
                on_line(f"[{number}/{len(folds)}] {fold.name}: was there already")
                continue
            result = train_fold(cohort, fold, settings, seed=seed, device=device)
            _save_fold(folder, result)
            epochs = sum(1 for epoch in result.history if epoch.model == MULTITASK)
            on_line(
                f"[{number}/{len(folds)}] {fold.name}: {len(fold.train)} slides, {settings.members} networks, "
                f"{epochs} epochs"
            )
        _join_folds(cohort, folds, out)
    return read_oof(out)


def _check_output(
    cohort: MetadataCohort, settings: MetadataConfig, folds: Sequence[Fold], out: Path, seed: int
) -> None:
    """Write config and folds into a new output folder, or make sure that they are those of the present call."""
    found = {
        "seed": seed,
        "settings": settings.model_dump(mode="json"),
        "tasks": [task.to_json() for task in cohort.tasks],
        "table_columns": list(cohort.table_columns),
        "slides": _digest(cohort),
    }
    found = json.loads(json.dumps(found))
    path = out / _CONFIG
    remove_leftovers(out)
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: can't be read ({error}); choose another --out") from None
        differing = [key for key in found if known.get(key) != found[key]]
        if differing:
            old, new = known.get("settings", {}), found["settings"]
            inner = [f"{name} was {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]
            if differing[0] == "seed":
                what = f"seed was {known.get('seed')}, now {seed}"
            elif differing[0] == "settings":
                what = inner[0]
            else:
                what = f"other {differing[0]}"
            raise UsageError(
                f"{out}: holds models of another training ({what}); choose another --out, delete this folder, "
                "or repeat its settings"
            )
        return
    rows = []
    for fold in folds:
        for part in ("train", "val", "test"):
            for row in getattr(fold, part):
                case = cohort.cases[int(row)]
                rows.append([case.slide_id, case.patient_id, case.site, fold.name, part])
    _write_csv(out / FOLDS_FILE, ["slide_id", "patient_id", "site", "fold", "part"], rows)
    with durable_file(path) as file:
        file.write(json.dumps(found, indent=1).encode())


def _digest(cohort: MetadataCohort) -> str:
    """Changes with anything that models learn from or are tested on."""
    digest = sha256()
    for case in cohort.cases:
        bag = case.bag
        tiles = "" if bag is None else f"{bag.n_tiles} {bag.features} {bag.encoder_id}"
        record = [case.slide_id, case.patient_id, case.site, tiles, case.text, sorted(case.row.items())]
        digest.update(json.dumps(record).encode())
    for task in cohort.tasks:
        digest.update(np.ascontiguousarray(cohort.truth[task.name]).tobytes())
    return digest.hexdigest()[:16]


def _save_fold(folder: Path, result: FoldResult) -> None:
    """Write a model with its predictions; the folder appears whole or not at all."""
    partial = folder.parent / f".{folder.name}.unfinished"
    shutil.rmtree(partial, ignore_errors=True)
    result.model.save(partial)
    _write_csv(
        partial / _HISTORY, list(Epoch.__dataclass_fields__), [list(asdict(epoch).values()) for epoch in result.history]
    )
    write_rows(partial / OOF_FILE, result.rows)
    partial.replace(folder)


def _join_folds(cohort: MetadataCohort, folds: Sequence[Fold], out: Path) -> None:
    """Write the predictions of all folds as one table, view by view in the order of the cohort."""
    place = {case.slide_id: number for number, case in enumerate(cohort.cases)}
    rows: list[dict[str, str]] = []
    for fold in folds:
        with (out / FOLDS_FOLDER / fold.name / OOF_FILE).open(encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    views = list(dict.fromkeys((row["model"], row["shown"]) for row in rows))
    rows.sort(key=lambda row: (views.index((row["model"], row["shown"])), place[unescape(row["slide_id"])]))
    write_rows(out / OOF_FILE, rows)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with durable_file(path) as file:
        file.write(text.getvalue().encode())
