"""What is learnt: targets read from label columns, their losses with missing labels left out, and their predictions."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from pathopipe.cohort import LabelTable, is_missing
from pathopipe.errors import UsageError
from pathopipe.registry import nearest

__all__ = [
    "Kind",
    "TargetSpec",
    "class_labels",
    "cox_loss",
    "encode_targets",
    "fit_targets",
    "hazard_loss",
    "label_texts",
    "parse_targets",
    "predict_target",
    "scores_of",
    "slice_of",
    "strata_of",
    "target_loss",
]

Kind = Literal["binary", "multiclass", "multilabel", "ordinal", "regression", "survival_cox", "survival_discrete"]

_KINDS: Final[tuple[str, ...]] = get_args(Kind)
_EVENTS: Final = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "dead", "deceased", "event", "progressed", "recurred"), 1.0),
    **dict.fromkeys(("0", "0.0", "false", "no", "alive", "living", "censored"), 0.0),
}
_NEGATIVES: Final = re.compile(
    r"0|0\.0|no|false|neg|negative|normal|absent|benign|control|wild ?type|wt|mss|low|\w+[- ]?(neg|negative)",
    re.IGNORECASE,
)
# More distinct numbers than this are taken for a quantity, fewer for classes.
_MOST_CLASSES: Final = 10
_HUBER_DELTA: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """One target: its kind, its classes, and what of it was fitted on the training part."""

    name: str
    """The label column; the column of times for survival."""
    kind: Kind
    columns: tuple[str, ...]
    """The label column; for survival the columns of time and event."""
    classes: tuple[str, ...] = ()
    """Negative then positive for a binary target; in their order for an ordinal one."""
    mean: float = 0.0
    """Regression: mean of the training labels."""
    std: float = 1.0
    edges: tuple[float, ...] = ()
    """Discrete survival: times at which the intervals end, the last one open."""
    class_weights: tuple[float, ...] = ()
    """Weight of each class in the loss; all alike where empty. Multi-label: weight of each label's positives."""

    @property
    def outputs(self) -> int:
        """Logits of this target."""
        match self.kind:
            case "multiclass" | "multilabel":
                return len(self.classes)
            case "ordinal":
                return len(self.classes) - 1
            case "survival_discrete":
                return len(self.edges) + 1
            case _:
                return 1

    @property
    def width(self) -> int:
        """Columns of its encoded labels."""
        return len(self.classes) if self.kind == "multilabel" else 2 if self.kind.startswith("survival") else 1

    @property
    def output_names(self) -> tuple[str, ...]:
        """A name for each logit."""
        match self.kind:
            case "multiclass" | "multilabel":
                return tuple(f"{self.name}={name}" for name in self.classes)
            case "ordinal":
                return tuple(f"{self.name}>{name}" for name in self.classes[:-1])
            case "survival_discrete":
                return tuple(f"{self.name} interval {number}" for number in range(self.outputs))
            case _:
                return (self.name,)

    @property
    def prediction_names(self) -> tuple[str, ...]:
        """Column names of what :func:`predict_target` gives."""
        if self.kind == "regression":
            return (f"{self.name}_value",)
        if self.kind.startswith("survival"):
            return (f"{self.name}_risk",)
        return tuple(f"{self.name}_p_{name}" for name in self.classes)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "TargetSpec":
        """The reverse of :meth:`to_json`."""
        plain: dict[str, Any] = {key: tuple(of) if isinstance(of, list) else of for key, of in record.items()}
        return cls(**plain)


# --- reading columns ---------------------------------------------------------------------------------------------


def parse_targets(
    text: str, table: LabelTable, *, kind: str = "auto", classes: Mapping[str, Sequence[str]] | None = None
) -> tuple[TargetSpec, ...]:
    """The targets that ``--target`` names.

    Args:
        text: Columns separated by commas; a survival target is ``time:event``.
        table: The labels.
        kind: One kind for all targets or one each, separated by commas. ``auto``: ``time:event`` is Cox survival,
            cells with ``;`` are multi-label, two values are binary, many different numbers are regression, all else
            is multi-class.
        classes: Order of the classes of a column, where it is not to be the natural one.

    Raises:
        UsageError: No such column or kind, a cell that can't be read, or one class only.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--target names no column; give a label column of the manifest")
    kinds = [name.strip() for name in kind.split(",")]
    if len(kinds) not in (1, len(names)):
        raise UsageError(f"--kind {kind}: {len(kinds)} kinds for {len(names)} targets; give one, or one each")
    kinds = kinds * len(names) if len(kinds) == 1 else kinds
    if len({name.split(":")[0] for name in names}) < len(names):
        raise UsageError(f"--target {text}: a column stands there twice; name each once")
    return tuple(_parse_one(name, table, of, classes or {}) for name, of in zip(names, kinds, strict=True))


def _parse_one(text: str, table: LabelTable, kind: str, classes: Mapping[str, Sequence[str]]) -> TargetSpec:
    if kind != "auto" and kind not in _KINDS:
        raise UsageError(f"--kind {kind}: no such kind; {nearest(kind, (*_KINDS, 'auto'))}")
    columns = tuple(part.strip() for part in text.split(":"))
    name = columns[0]
    cells = [cell.strip() for cell in table.column(name) if not is_missing(cell)]
    if not cells:
        raise UsageError(f"{table.source}: column '{name}' is empty; fill in the labels")
    if len(columns) == 2 and kind in ("auto", "survival_cox", "survival_discrete"):
        return _parse_survival(name, columns, table, "survival_cox" if kind == "auto" else kind)
    if len(columns) > 1 or kind.startswith("survival"):
        raise UsageError(f"--target {text}: a survival target is two columns, time:event, and only such a one is")
    distinct = list(dict.fromkeys(cells))
    numeric = all(_number(cell) is not None for cell in distinct)
    if kind == "auto":
        if name in classes or len(distinct) <= 2:
            kind = "binary" if len(classes.get(name, distinct)) <= 2 else "multiclass"
        elif any(";" in cell for cell in distinct):
            kind = "multilabel"
        else:
            kind = "regression" if numeric and len(distinct) > _MOST_CLASSES else "multiclass"
    if kind == "regression":
        odd = [cell for cell in distinct if _number(cell) is None]
        if odd:
            raise UsageError(
                f"{table.source}: '{odd[0]}' in column '{name}' is no number; correct it, or leave it empty"
            )
        if len(distinct) < 2:
            raise UsageError(
                f"{table.source}: column '{name}' holds the one value {distinct[0]}; nothing can be learnt"
            )
        return TargetSpec(name=name, kind="regression", columns=columns)
    if kind == "multilabel":
        distinct = list(dict.fromkeys(part.strip() for cell in cells for part in cell.split(";") if part.strip()))
    order = _class_order(name, distinct, classes.get(name), table.source, by_number=numeric, binary=kind == "binary")
    if kind != "multilabel" and len(order) < 2:
        raise UsageError(
            f"{table.source}: column '{name}' holds one class only ({order[0]}), so there is nothing to tell apart; "
            "add slides of another class"
        )
    if kind == "binary" and len(order) > 2:
        raise UsageError(
            f"{table.source}: column '{name}' holds {len(order)} classes; use --kind multiclass or ordinal"
        )
    if len(order) > max(50, len(cells) // 2):
        raise UsageError(
            f"{table.source}: column '{name}' holds {len(order)} classes in {len(cells)} rows; is it a label?"
        )
    return TargetSpec(name=name, kind=kind, columns=columns, classes=order)  # type: ignore[arg-type]


def _parse_survival(name: str, columns: tuple[str, ...], table: LabelTable, kind: str) -> TargetSpec:
    events = set()
    for time_s, event in zip(table.column(columns[0]), table.column(columns[1]), strict=True):
        if is_missing(time_s) or is_missing(event):
            continue
        value = _number(time_s)
        if value is None or value < 0:
            raise UsageError(f"{table.source}: time '{time_s}' in column '{columns[0]}' is no number of 0 or more")
        if event.strip().casefold() not in _EVENTS:
            raise UsageError(
                f"{table.source}: '{event}' in column '{columns[1]}' is neither an event (1) nor censored (0); "
                "write 1 or 0"
            )
        events.add(_EVENTS[event.strip().casefold()])
    if 1.0 not in events:
        raise UsageError(f"{table.source}: column '{columns[1]}' has no event (1), so nothing can be learnt of times")
    return TargetSpec(name=name, kind=kind, columns=columns)  # type: ignore[arg-type]


def _class_order(
    name: str, distinct: Sequence[str], given: Sequence[str] | None, where: str, *, by_number: bool, binary: bool
) -> tuple[str, ...]:
    if given is not None:
        order = tuple(str(part) for part in given)
        unknown = [cell for cell in distinct if cell not in order]
        if unknown:
            raise UsageError(
                f"{where}: '{unknown[0]}' in column '{name}' is not among mil.classes; {nearest(unknown[0], order)}"
            )
        return order
    if by_number:
        return tuple(sorted(distinct, key=float))
    if binary and len(distinct) == 2:
        # The class that reads like the absence of something comes first, so that the other one is the positive.
        return tuple(sorted(distinct, key=lambda text: (not _NEGATIVES.fullmatch(text), text.casefold())))
    return tuple(sorted(distinct, key=str.casefold))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def encode_targets(specs: Sequence[TargetSpec], table: LabelTable) -> NDArray[np.float64]:
    """Labels as numbers, side by side: (rows, sum of widths), NaN where missing.

    Binary 0 or 1; class number; 0 or 1 for each label; the value; time and event.
    """
    columns: list[NDArray[np.float64]] = []
    for spec in specs:
        cells = [["" if is_missing(cell) else cell.strip() for cell in table.column(name)] for name in spec.columns]
        encoded = np.full((len(table), spec.width), np.nan)
        for row, parts in enumerate(zip(*cells, strict=True)):
            if all(parts):
                encoded[row] = _encode_cell(spec, parts)
        columns.append(encoded)
    return np.concatenate(columns, axis=1)


def _encode_cell(spec: TargetSpec, parts: tuple[str, ...]) -> Sequence[float]:
    match spec.kind:
        case "regression":
            return (float(parts[0]),)
        case "survival_cox" | "survival_discrete":
            return float(parts[0]), _EVENTS[parts[1].casefold()]
        case "multilabel":
            named = {part.strip() for part in parts[0].split(";")}
            return [float(name in named) for name in spec.classes]
        case _:
            if parts[0] not in spec.classes:
                raise UsageError(f"'{parts[0]}' is no class of '{spec.name}'; {nearest(parts[0], spec.classes)}")
            return (float(spec.classes.index(parts[0])),)


def label_texts(spec: TargetSpec, truth: NDArray[np.float64]) -> dict[str, list[str]]:
    """Encoded labels (n, width) as the cells of columns; empty where missing."""
    if spec.kind.startswith("survival"):
        return {
            f"{spec.name}_{what}": ["" if math.isnan(value) else f"{value:g}" for value in truth[:, number]]
            for number, what in enumerate(("time", "event"))
        }
    cells = []
    for row in truth:
        if math.isnan(row[0]):
            cells.append("")
        elif spec.kind == "regression":
            cells.append(repr(float(row[0])))
        elif spec.kind == "multilabel":
            cells.append(";".join(name for name, value in zip(spec.classes, row, strict=True) if value == 1))
        else:
            cells.append(spec.classes[int(row[0])])
    return {spec.name: cells}


def slice_of(specs: Sequence[TargetSpec], number: int, of: Literal["truth", "logits"]) -> slice:
    """Where a target's columns lie among those of all targets."""
    sizes = [spec.width if of == "truth" else spec.outputs for spec in specs]
    start = sum(sizes[:number])
    return slice(start, start + sizes[number])


def strata_of(spec: TargetSpec, truth: NDArray[np.float64]) -> list[str]:
    """A class for each bag, to spread evenly over folds: quarters of a number, events of survival."""
    if spec.kind == "multilabel":
        return [""] * len(truth)
    column = truth[:, 1] if spec.kind.startswith("survival") else truth[:, 0]
    known = np.isfinite(column)
    if spec.kind == "regression":
        quarters = np.quantile(column[known], (0.25, 0.5, 0.75))
        column = np.where(known, np.searchsorted(quarters, column), np.nan)
    return [f"{value:g}" if there else "" for value, there in zip(column, known, strict=True)]


def fit_targets(
    specs: Sequence[TargetSpec], truth: NDArray[np.float64], *, intervals: int = 4, balanced: bool = False
) -> tuple[TargetSpec, ...]:
    """Fit what a target takes from its training labels: scaling, survival intervals, class weights.

    Args:
        specs: The targets.
        truth: (n, W) encoded labels of the training part alone.
        intervals: Discrete survival: as many intervals with equally many events each.
        balanced: Weigh classes by the reverse of their frequency.
    """
    fitted = []
    for number, spec in enumerate(specs):
        part = truth[:, slice_of(specs, number, "truth")]
        known = part[np.isfinite(part[:, 0])]
        if spec.kind == "regression" and len(known):
            std = float(known.std())
            spec = replace(spec, mean=float(known.mean()), std=std if std > 0 else 1.0)
        elif spec.kind == "survival_discrete":
            times = known[known[:, 1] == 1, 0] if (known[:, 1] == 1).any() else known[:, 0]
            cuts = np.quantile(times, np.arange(1, intervals) / intervals) if len(times) else np.zeros(0)
            spec = replace(spec, edges=tuple(float(cut) for cut in np.unique(cuts)))
        elif balanced and spec.kind in ("binary", "multiclass"):
            counts = np.bincount(known[:, 0].astype(np.intp), minlength=len(spec.classes)).clip(1)
            spec = replace(spec, class_weights=tuple((len(known) / len(spec.classes) / counts).tolist()))
        elif balanced and spec.kind == "multilabel":
            positive = np.nansum(part, axis=0).clip(1)
            spec = replace(spec, class_weights=tuple(((len(known) - positive).clip(1) / positive).tolist()))
        fitted.append(spec)
    return tuple(fitted)


# --- losses ------------------------------------------------------------------------------------------------------


def target_loss(
    specs: Sequence[TargetSpec], logits: Tensor, truth: Tensor, others: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Mean loss over bags with a label, summed over targets; missing labels have no part in it.

    Args:
        specs: The targets.
        logits: (B, K) of all targets.
        truth: (B, W) encoded labels, NaN where missing.
        others: Logits (n, K) and labels (n, W) of bags beyond this batch, without gradient; they belong to the risk
            sets of Cox targets.
    """
    loss = logits.sum() * 0
    for number, spec in enumerate(specs):
        own_logits, own_truth = logits[:, slice_of(specs, number, "logits")], truth[:, slice_of(specs, number, "truth")]
        if spec.kind == "survival_cox":
            beyond = None
            if others is not None:
                beyond = (
                    others[0][:, slice_of(specs, number, "logits")],
                    others[1][:, slice_of(specs, number, "truth")],
                )
            loss = loss + _cox_of_batch(own_logits, own_truth, beyond)
            continue
        known = torch.isfinite(own_truth).all(dim=1)
        if bool(known.any()):
            loss = loss + _loss_of(spec, own_logits[known].float(), own_truth[known].float())
    return loss


def _loss_of(spec: TargetSpec, logits: Tensor, truth: Tensor) -> Tensor:
    weights = torch.tensor(spec.class_weights, device=logits.device) if spec.class_weights else None
    match spec.kind:
        case "binary":
            losses = F.binary_cross_entropy_with_logits(logits[:, 0], truth[:, 0], reduction="none")
            return losses.mean() if weights is None else (losses * weights[truth[:, 0].long()]).mean()
        case "multiclass":
            losses = F.cross_entropy(logits, truth[:, 0].long(), reduction="none")
            return losses.mean() if weights is None else (losses * weights[truth[:, 0].long()]).mean()
        case "multilabel":
            return F.binary_cross_entropy_with_logits(logits, truth, pos_weight=weights)
        case "ordinal":
            above = (truth > torch.arange(spec.outputs, device=truth.device)).float()
            return F.binary_cross_entropy_with_logits(_cumulative(logits), above)
        case "regression":
            return F.huber_loss(logits[:, 0], (truth[:, 0] - spec.mean) / spec.std, delta=_HUBER_DELTA)
        case _:
            edges = torch.tensor(spec.edges, device=truth.device)
            return hazard_loss(logits, torch.searchsorted(edges, truth[:, 0].contiguous()), truth[:, 1])


def _cumulative(logits: Tensor) -> Tensor:
    """Logits of "above class k" that can only fall with k, whatever the head gives.

    Source: the cumulative form of CORAL (Cao, Mirjalili and Raschka 2020, arXiv:1901.07884); the fall from class to
    class is the softplus of an output of its own where CORAL has one bias for all bags.
    """
    return torch.cat([logits[:, :1], -F.softplus(logits[:, 1:])], dim=1).cumsum(dim=1)


def cox_loss(risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Negative log partial likelihood, mean over events; ties by Breslow.

    Source: Cox 1972, J. R. Stat. Soc. B 34, 187; Breslow 1974, Biometrics 30, 89.

    Args:
        risk: (n,) log hazard.
        time: (n,) time of event or censoring.
        event: (n,) 1 where it was an event.
    """
    order = torch.argsort(time, descending=True, stable=True)
    risk, time, event = risk[order], time[order], event[order]
    log_sums = torch.logcumsumexp(risk, dim=0)
    # All of one time share the risk set of the last among them.
    last = torch.searchsorted(-time, -time, right=True) - 1
    return ((log_sums[last] - risk) * event).sum() / event.sum().clamp(min=1)


def _cox_of_batch(logits: Tensor, truth: Tensor, others: tuple[Tensor, Tensor] | None) -> Tensor:
    known = torch.isfinite(truth).all(dim=1)
    risk, labels = logits[known, 0].float(), truth[known].float()
    n_own = len(risk)
    if others is not None:
        there = torch.isfinite(others[1]).all(dim=1)
        risk = torch.cat([risk, others[0][there, 0].float()])
        labels = torch.cat([labels, others[1][there].float()])
    if not n_own or not bool(labels[:, 1].any()):
        return logits.sum() * 0
    loss = cox_loss(risk, labels[:, 0], labels[:, 1])
    # The batch's share of the gradient grows with its size; scaled up, a step is as long as that of other targets.
    scale = len(risk) / n_own
    return loss * scale - (loss * (scale - 1)).detach()


def hazard_loss(logits: Tensor, interval: Tensor, event: Tensor) -> Tensor:
    """Negative log likelihood of a discrete-time hazard model, mean over rows.

    Source: Zadeh and Schmid 2020, Bias in cross-entropy-based training of deep survival networks, IEEE TPAMI 43, 3126.

    Args:
        logits: (n, intervals); the hazard of an interval is their sigmoid.
        interval: (n,) in which the event or the censoring fell.
        event: (n,) 1 where it was an event; a censored one survived its interval.
    """
    numbers = torch.arange(logits.shape[1], device=logits.device)
    before = (numbers < interval[:, None]).float()
    at = (numbers == interval[:, None]).float()
    survived = F.logsigmoid(-logits)
    losses = -(survived * before).sum(dim=1) - torch.where(
        event > 0.5, (F.logsigmoid(logits) * at).sum(dim=1), (survived * at).sum(dim=1)
    )
    return losses.mean()


def class_labels(specs: Sequence[TargetSpec], truth: Tensor) -> Tensor:
    """Whether each output's class is the bag's, (B, K) 1, 0 or NaN, for heads with an instance loss."""
    parts = []
    for number, spec in enumerate(specs):
        own = truth[:, slice_of(specs, number, "truth")]
        numbers = torch.arange(spec.outputs, device=truth.device)
        unknown = torch.isnan(own[:, :1]).expand(-1, spec.outputs)
        match spec.kind:
            case "multiclass":
                labels = (own == numbers).to(truth.dtype)
            case "ordinal":
                labels = (own > numbers).to(truth.dtype)
            case "binary" | "multilabel":
                labels = own
            case _:
                labels = torch.full_like(unknown, torch.nan, dtype=truth.dtype)
        parts.append(labels.masked_fill(unknown, torch.nan))
    return torch.cat(parts, dim=1)


# --- predictions -------------------------------------------------------------------------------------------------


def predict_target(spec: TargetSpec, logits: NDArray[np.float64], *, temperature: float = 1.0) -> NDArray[np.float64]:
    """What logits mean.

    Args:
        spec: The target.
        logits: (n, outputs) of this target.
        temperature: By which the logits of classes are divided.

    Returns:
        (n, classes) probabilities, also both of a binary target; (n, 1) the value, or the risk (higher: earlier event).
    """
    values = torch.as_tensor(np.asarray(logits, np.float64))
    match spec.kind:
        case "binary":
            positive = torch.sigmoid(values / temperature)
            result = torch.cat([1 - positive, positive], dim=1)
        case "multiclass":
            result = torch.softmax(values / temperature, dim=1)
        case "multilabel":
            result = torch.sigmoid(values / temperature)
        case "ordinal":
            above = torch.sigmoid(_cumulative(values) / temperature)
            ends = torch.ones(len(values), 1, dtype=values.dtype)
            result = torch.cat([ends, above], dim=1) - torch.cat([above, ends * 0], dim=1)
        case "regression":
            result = values * spec.std + spec.mean
        case "survival_cox":
            result = values
        case "survival_discrete":
            # Minus the expected number of intervals survived.
            result = -torch.cumprod(1 - torch.sigmoid(values), dim=1).sum(dim=1, keepdim=True)
    return result.numpy()


def scores_of(spec: TargetSpec, predictions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Predictions (n, P) as figures take them: (n,) for binary, values and risks, else (n, classes)."""
    if spec.kind == "binary" or predictions.shape[1] == 1:
        return predictions[:, -1]
    return predictions
