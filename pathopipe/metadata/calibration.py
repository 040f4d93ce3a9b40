"""Temperatures and thresholds of a model, found on slides that it did not learn from, and what it says by them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from pathopipe.metadata.model import ModelCard
from pathopipe.metadata.network import as_mask, set_name
from pathopipe.metadata.probabilities import right_of, surety_of
from pathopipe.mil.fit import find_temperature
from pathopipe.mil.targets import predict_target, slice_of

__all__ = ["abstentions", "calibrate", "find_threshold", "interpret", "thresholds_of"]

# Chance at most that the true precision lies below the bound.
_RISK: Final = 0.1

Floats = NDArray[np.float64]


def interpret(card: ModelCard, logits: Floats, used: NDArray[np.bool_]) -> dict[str, Floats]:
    """Calibrated predictions of each task.

    Args:
        card: Of the model; it holds the temperatures.
        logits: (n, K) of all tasks, as :meth:`MetadataModel.logits` gives them.
        used: (n, 3) what each slide was predicted from; it decides the temperature.

    Returns:
        By task (n, P): probabilities of its classes, or (n, 1) the value; NaN where logits are.
    """
    names = np.asarray([set_name(row) for row in used], dtype=object)
    found = {}
    for number, spec in enumerate(card.targets):
        own = logits[:, slice_of(card.targets, number, "logits")]
        values = np.full((len(logits), len(spec.prediction_names)), np.nan)
        for name in sorted(set(names)):
            rows = np.flatnonzero((names == name) & np.isfinite(own).all(axis=1))
            if len(rows):
                temperature = card.temperatures[spec.name].get(name, 1.0)
                values[rows] = predict_target(spec, own[rows], temperature=temperature)
        found[spec.name] = values
    return found


def thresholds_of(card: ModelCard, task: str, used: NDArray[np.bool_]) -> Floats:
    """(n,) the surety below which a task's prediction is not given, by what each slide is predicted from (n, 3).

    Infinite: never given; minus infinite for numbers, which have no surety.
    """
    if not next(spec for spec in card.targets if spec.name == task).classes:
        return np.full(len(used), -np.inf)
    cuts = [card.thresholds[task].get(set_name(row)) for row in used]
    return np.asarray([np.inf if cut is None else cut for cut in cuts], np.float64)


def abstentions(card: ModelCard, scores: Mapping[str, Floats], used: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """By task (n,) whether the model abstains; also where there is no prediction."""
    found = {}
    for spec in card.targets:
        values = scores[spec.name]
        unsure = surety_of(spec, values) < thresholds_of(card, spec.name, used) if spec.classes else False
        found[spec.name] = np.asarray(unsure | ~np.isfinite(values).all(axis=1))
    return found


def find_threshold(surety: Floats, right: Floats, precision: float) -> float | None:
    """The lowest surety above which at least this share of predictions is right, as far as the slides can prove it.

    Proven: the lower end of the one-sided 90 % interval of the share (Clopper and Pearson 1934, Biometrika 26, 404) is
    not below what is asked for; few slides prove little. Source of the bound's use: Geifman and El-Yaniv 2017,
    Selective classification for deep neural networks, arXiv:1705.08500.

    Args:
        surety: (n,) of validation slides.
        right: (n,) 1 or 0; NaN where nothing is recorded.
        precision: Share asked for.

    Returns:
        None where no threshold reaches it.
    """
    known = np.isfinite(right) & np.isfinite(surety)
    order = np.argsort(-surety[known], kind="stable")
    surety, right = surety[known][order], right[known][order]
    if not len(surety):
        return None
    # Slides of one surety stand or fall together: a cut is after the last of them.
    last = np.flatnonzero(np.append(surety[1:] < surety[:-1], True))
    n, n_right = last + 1.0, np.cumsum(right)[last]
    bound = np.where(n_right > 0, beta.ppf(_RISK, np.maximum(n_right, 1), n - n_right + 1), 0)
    reached = last[bound >= precision]
    return float(surety[reached[-1]]) if len(reached) else None


def calibrate(
    card: ModelCard, logits: Mapping[tuple[str, ...], Floats], present: NDArray[np.bool_], truth: Floats
) -> ModelCard:
    """The card with temperatures and thresholds of every task for every choice of modalities.

    Args:
        card: Of the model.
        logits: By modalities (n, K), of slides that were not learnt from.
        present: (n, 3) what they have.
        truth: (n, W).
    """
    temperatures: dict[str, dict[str, float]] = {spec.name: {} for spec in card.targets}
    thresholds: dict[str, dict[str, float | None]] = {spec.name: {} for spec in card.targets}
    for chosen, values_of_set in logits.items():
        mask = as_mask(chosen)
        name = set_name(mask)
        rows = np.flatnonzero((present | ~mask).all(axis=1))
        own_logits, own_truth = values_of_set[rows], truth[rows]
        for number, spec in enumerate(card.targets):
            temperatures[spec.name][name] = find_temperature(card.targets, number, own_logits, own_truth)
        calibrated = replace(card, temperatures=temperatures)
        scores = interpret(calibrated, own_logits, np.tile(mask, (len(rows), 1)))
        for number, spec in enumerate(card.targets):
            known = own_truth[:, slice_of(card.targets, number, "truth")]
            values = scores[spec.name]
            # A number is neither right nor wrong, so there is nothing to abstain from.
            if spec.classes:
                right = right_of(spec, values, known)
                thresholds[spec.name][name] = find_threshold(surety_of(spec, values), right, card.precision)
    return replace(card, temperatures=temperatures, thresholds=thresholds)
