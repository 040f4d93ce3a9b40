"""What predictions of a task say: how sure they are, whether they are right, and the value for a cell."""

import numpy as np
from numpy.typing import NDArray

from pathopipe.mil.targets import TargetSpec

__all__ = ["right_of", "surety_of", "value_of", "without_class_weights"]

Floats = NDArray[np.float64]


def surety_of(spec: TargetSpec, probabilities: Floats) -> Floats:
    """(n,) how sure a prediction is: the probability of what is predicted; of the least sure label of several.

    NaN for continuous tasks, and where there is no prediction.
    """
    if not spec.classes:
        return np.full(len(probabilities), np.nan)
    if spec.kind == "multilabel":
        return np.asarray(np.maximum(probabilities, 1 - probabilities).min(axis=1))
    return np.asarray(probabilities.max(axis=1))


def right_of(spec: TargetSpec, probabilities: Floats, truth: Floats) -> Floats:
    """(n,) 1 where the prediction is what is recorded, 0 where not, NaN where nothing is or the task is continuous.

    Of several labels all that are known must be right.
    """
    right = np.full(len(probabilities), np.nan)
    known = np.isfinite(truth).any(axis=1) & np.isfinite(probabilities).all(axis=1)
    if not spec.classes or not known.any():
        return right
    if spec.kind == "multilabel":
        wrong = np.isfinite(truth[known]) & ((probabilities[known] >= 0.5) != (truth[known] == 1))
        right[known] = ~wrong.any(axis=1)
    else:
        right[known] = probabilities[known].argmax(axis=1) == truth[known, 0]
    return right


def value_of(spec: TargetSpec, probabilities: Floats) -> str:
    """What a row of probabilities (P,) predicts, as a catalogue's cell; ``""`` where there is no prediction."""
    if not np.isfinite(probabilities).all():
        return ""
    if not spec.classes:
        return f"{probabilities[0]:.6g}"
    if spec.kind == "multilabel":
        return ";".join(name for name, share in zip(spec.classes, probabilities, strict=True) if share >= 0.5)
    return spec.classes[int(probabilities.argmax())]


def without_class_weights(spec: TargetSpec, logits: Floats) -> Floats:
    """Logits as they would be without the class weights of the loss, so that probabilities follow the frequencies.

    A weighted loss multiplies each class's odds by its weight (Elkan 2001, The foundations of cost-sensitive learning).
    """
    if not spec.class_weights:
        return logits
    logs = np.log(np.asarray(spec.class_weights, np.float64))
    return np.asarray(logits - (logs[1] - logs[0] if spec.kind == "binary" else logs))
