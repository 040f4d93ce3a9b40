"""Trains one network on some bags, stopping on others; and the linear baseline, to its optimum."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathopipe.errors import UsageError
from pathopipe.mil.bags import Bag, BagLoader
from pathopipe.mil.heads import BASELINE, Head, HeadShape, build_head
from pathopipe.mil.heads.logistic import LogisticHead, pool_mean_max
from pathopipe.mil.settings import MilConfig
from pathopipe.mil.targets import TargetSpec, class_labels, predict_target, slice_of, target_loss

__all__ = [
    "Epoch",
    "FittedNetwork",
    "TrainingSet",
    "choose_device",
    "find_temperature",
    "fit_network",
    "join_negative",
    "score_bags",
]

_STANDARD_TILES: Final = 256
_LONGEST_EVALUATION: Final = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """Bags with what is to be learnt of them, side by side."""

    bags: Sequence[Bag]
    truth: NDArray[np.float64]
    """(n, W) encoded labels, NaN where missing."""
    covariates: NDArray[np.float32]
    """(n, C); C may be 0."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of a training's history."""

    epoch: int
    train_loss: float
    val_loss: float
    learning_rate: float
    seconds: float
    reading_share: float
    """Share of the training time in which it waited for tiles."""


@dataclass(frozen=True, slots=True)
class FittedNetwork:
    """A trained network with the weights of its best epoch, or of its last where it was not stopped early."""

    network: Head
    best_epoch: int
    history: tuple[Epoch, ...]


def choose_device(device: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes a CUDA device where there is one.

    Raises:
        UsageError: CUDA was asked for and there is none, or no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; choose cpu, or auto")
    return device


def fit_network(
    head: str,
    specs: Sequence[TargetSpec],
    data: TrainingSet,
    train: NDArray[np.intp],
    val: NDArray[np.intp],
    settings: MilConfig,
    *,
    seed: int,
    device: str = "cpu",
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> FittedNetwork:
    """Train a head; nothing but ``train`` and ``val`` is looked at.

    Args:
        head: Its name.
        specs: Targets, fitted on the training part.
        data: All bags.
        train: Numbers of the bags to learn from.
        val: Numbers of the bags whose loss decides when to stop and which epoch is kept.
        settings: The recipe.
        seed: Decides weights, order, samples and dropout. Torch's own generators are left as they were.
        device: ``cpu`` or ``cuda``.
        on_epoch: Told of each epoch.

    Raises:
        UsageError: A bag is empty, or bags can't be joined for these targets and settings.
    """
    if settings.join:
        _check_join(specs, settings)
    shape = HeadShape(
        features=data.bags[int(train[0])].features,
        outputs=sum(spec.outputs for spec in specs),
        covariates=data.covariates.shape[1],
        hidden=settings.hidden,
        attention=settings.attention,
        dropout=settings.dropout,
        input_dropout=settings.input_dropout,
        instance_tiles=settings.instance_tiles,
        centre=settings.centre and head != BASELINE,
    )
    with torch.random.fork_rng(devices=["cuda"] if device == "cuda" else []):
        torch.manual_seed(seed)
        network = build_head(head, shape)
        if isinstance(network, LogisticHead):
            _fit_linear(network, specs, data, train, settings.logistic_c)
            return FittedNetwork(network, 0, ())
        return _Training(network, specs, data, train, val, settings, seed, device).run(on_epoch)


def _check_join(specs: Sequence[TargetSpec], settings: MilConfig) -> None:
    other = next((spec for spec in specs if spec.kind not in ("binary", "multilabel")), None)
    if other is not None:
        raise UsageError(
            f"mil.join {settings.join}: a bag joined with a negative one keeps its label only where the target is "
            f"binary or multilabel; {other.name} is {other.kind}; set mil.join=0"
        )
    if settings.centre:
        raise UsageError(
            f"mil.join {settings.join} with mil.centre: joined bags have no middle of their own; turn one off"
        )


class _Training:
    """One run: epochs over batches, with the best epoch kept, or the last."""

    def __init__(
        self,
        network: Head,
        specs: Sequence[TargetSpec],
        data: TrainingSet,
        train: NDArray[np.intp],
        val: NDArray[np.intp],
        settings: MilConfig,
        seed: int,
        device: str,
    ) -> None:
        self.specs, self.data, self.train, self.val = specs, data, train, val
        self.settings, self.device = settings, torch.device(device)
        network.standardise(*_tile_statistics([data.bags[int(row)] for row in train], seed))
        self.network = network.to(self.device)
        longest = max(min(data.bags[int(row)].n_tiles, settings.cap or math.inf) for row in train)
        if settings.join:
            longest *= 2
        # A bag can only be joined with another one.
        at_once = int(max(2 if settings.join else 1, min(settings.batch_bags, settings.batch_tiles // longest)))
        self.accumulate = -(-settings.batch_bags // at_once)
        self.loader = BagLoader(data.bags, batch_size=at_once, cap=settings.cap, seed=seed, shuffle=True)
        self.n_batches = -(-len(train) // at_once)
        steps = settings.epochs * -(-self.n_batches // self.accumulate)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
        # Biases, norms and tokens are vectors; what is penalised are the matrices.
        self.matrices = [weight for weight in network.parameters() if weight.ndim > 1]
        rise = max(1, round(settings.warmup * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(
                (step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * min(1, max(0, step - rise) / max(1, steps - rise)))
            ),
        )
        self.amp = settings.amp and self.device.type == "cuda"
        self.half = torch.bfloat16 if self.amp and torch.cuda.is_bf16_supported() else torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp and self.half == torch.float16)
        self.truth = torch.from_numpy(data.truth).float().to(self.device)
        self.covariates = torch.from_numpy(data.covariates).to(self.device)
        # What each bag was last scored: the risk sets of Cox targets reach beyond the batch.
        self.last_logits = torch.full((len(data.bags), network.shape.outputs), torch.nan, device=self.device)
        self.has_cox = any(spec.kind == "survival_cox" for spec in specs)

    def run(self, on_epoch: Callable[[Epoch], None]) -> FittedNetwork:
        best_loss, best_epoch, best_weights = math.inf, 0, copy.deepcopy(self.network.state_dict())
        history = []
        for number in range(self.settings.epochs):
            began = time.perf_counter()
            train_loss = self._learn(number)
            val_loss = self._validate() if len(self.val) else train_loss
            epoch = Epoch(
                number,
                train_loss,
                val_loss,
                self.optimizer.param_groups[0]["lr"],
                time.perf_counter() - began,
                self.loader.reading_share,
            )
            history.append(epoch)
            on_epoch(epoch)
            if not self.settings.early_stop:
                best_epoch = number
            elif val_loss < best_loss:
                best_loss, best_epoch, best_weights = val_loss, number, copy.deepcopy(self.network.state_dict())
            elif number - best_epoch >= self.settings.patience:
                break
        if self.settings.early_stop:
            self.network.load_state_dict(best_weights)
        return FittedNetwork(self.network.cpu().eval(), best_epoch, tuple(history))

    def _learn(self, number: int) -> float:
        """One epoch; the mean loss of its steps."""
        self.network.train()
        losses: list[Tensor] = []
        for place, batch in enumerate(self.loader.epoch(number, self.train)):
            rows = torch.from_numpy(batch.bags).to(self.device)
            tiles = torch.from_numpy(batch.tiles).to(self.device, non_blocking=True)
            real = torch.from_numpy(batch.real).to(self.device, non_blocking=True)
            if self.settings.bag_shift:
                shift = torch.randn(len(tiles), 1, tiles.shape[2], device=self.device) / self.network.scale
                tiles = tiles + self.settings.bag_shift * shift
            truth = self.truth[rows]
            if self.settings.join:
                tiles, real = join_negative(tiles, real, truth, self.settings.join)
            with torch.autocast(self.device.type, dtype=self.half, enabled=self.amp):
                output = self.network(tiles, real, self._covariates_of(rows), class_labels(self.specs, truth))
            loss = target_loss(self.specs, output.logits, truth, self._beyond(rows))
            if output.instance_loss is not None:
                share = self.settings.instance_share
                loss = (1 - share) * loss + share * output.instance_loss
            losses.append(loss.detach())
            loss = loss + self.settings.penalty * torch.stack([(weight**2).sum() for weight in self.matrices]).sum()
            # The last step of an epoch may hold fewer batches.
            in_step = min(self.accumulate, self.n_batches - place // self.accumulate * self.accumulate)
            self.scaler.scale(loss / in_step).backward()  # type: ignore[no-untyped-call]
            if self.has_cox:
                self.last_logits[rows] = output.logits.detach().float()
            if (place + 1) % self.accumulate == 0 or place + 1 == self.n_batches:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.gradient_clip)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad(set_to_none=True)
                self.schedule.step()
        return float(torch.stack(losses).mean())

    def _validate(self) -> float:
        logits = _score(self.network, self.data, self.val, self.device)
        truth = torch.from_numpy(self.data.truth[self.val]).float()
        return float(target_loss(self.specs, logits, truth))

    def _covariates_of(self, rows: Tensor) -> Tensor | None:
        return self.covariates[rows] if self.covariates.shape[1] else None

    def _beyond(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """Logits and labels of training bags that were scored before and are not in this batch."""
        if not self.has_cox:
            return None
        others = torch.isfinite(self.last_logits).all(dim=1)
        others[rows] = False
        return self.last_logits[others], self.truth[others]


def join_negative(tiles: Tensor, real: Tensor, truth: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Add to a share of the bags of a batch the tiles of another, which is negative in everything, drawn from it.

    Args:
        tiles: (B, N, D).
        real: (B, N), False where padded.
        truth: (B, W) 0 or 1, NaN where missing.
        share: Probability of each bag to be joined.

    Returns:
        (B, 2 N, D) and (B, 2 N); unchanged where the batch has no negative bag.
    """
    negative = torch.nonzero((truth == 0).all(dim=1))[:, 0]
    if not len(negative):
        return tiles, real
    partner = negative[torch.randint(len(negative), (len(tiles),)).to(negative.device)]
    joins = (torch.rand(len(tiles)) < share).to(real.device) & (partner != torch.arange(len(tiles), device=real.device))
    return torch.cat([tiles, tiles[partner]], dim=1), torch.cat([real, real[partner] & joins[:, None]], dim=1)


def _tile_statistics(bags: Sequence[Bag], seed: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of features over a sample of tiles; every bag weighs by what it gives of 256."""
    total, count = 0.0, 0
    squares: Any = 0.0
    for batch in BagLoader(bags, cap=_STANDARD_TILES, seed=seed).epoch():
        tiles = batch.tiles[0].astype(np.float64)
        total = total + tiles.sum(axis=0)
        squares = squares + (tiles**2).sum(axis=0)
        count += len(tiles)
    mean = np.asarray(total / count)
    variance = np.asarray(squares / count - mean**2)
    # Below what float32 features can tell, a feature is constant and the difference rounding.
    std = np.sqrt(np.where(variance > 1e-12 * (mean**2 + 1e-30), variance, 0))
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def score_bags(network: Head, data: TrainingSet, rows: NDArray[np.intp], *, device: str = "cpu") -> NDArray[np.float64]:
    """(rows, K) logits of bags from all their tiles."""
    placed = network.to(device)
    logits = _score(placed, data, rows, torch.device(device)).double().numpy()
    network.cpu()
    return logits


def _score(network: Head, data: TrainingSet, rows: NDArray[np.intp], device: torch.device) -> Tensor:
    network.eval()
    # Small bags side by side save time; sorted by size they need little padding.
    order = rows[np.argsort([data.bags[int(row)].n_tiles for row in rows], kind="stable")]
    largest = max(data.bags[int(row)].n_tiles for row in rows)
    at_once = int(max(1, min(32, _LONGEST_EVALUATION // largest)))
    logits = torch.zeros(len(data.bags), network.shape.outputs)
    with torch.inference_mode():
        for batch in BagLoader(data.bags, batch_size=at_once).epoch(indices=order):
            covariates = torch.from_numpy(data.covariates[batch.bags]).to(device) if data.covariates.shape[1] else None
            tiles, real = torch.from_numpy(batch.tiles).to(device), torch.from_numpy(batch.real).to(device)
            logits[torch.from_numpy(batch.bags)] = network(tiles, real, covariates).logits.float().cpu()
    return logits[torch.from_numpy(rows)]


# --- the baseline ------------------------------------------------------------------------------------------------


def _fit_linear(
    network: LogisticHead, specs: Sequence[TargetSpec], data: TrainingSet, train: NDArray[np.intp], c: float
) -> None:
    """Minimise mean loss + |w|^2 / (2 C n), which is scikit-learn's logistic regression for a class target."""
    pooled = []
    for batch in BagLoader(data.bags).epoch(indices=train):
        real = torch.from_numpy(batch.real)
        pooled.append(pool_mean_max(torch.from_numpy(batch.tiles), real)[0])
    inputs = torch.stack(pooled).double()
    std, mean = torch.std_mean(inputs, dim=0, correction=0)
    scale = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-30), 1 / std, torch.ones_like(std))
    network.pooled_shift.copy_(mean)
    network.pooled_scale.copy_(scale)
    inputs = torch.cat([(inputs - mean) * scale, torch.from_numpy(data.covariates[train]).double()], dim=1)
    truth = torch.from_numpy(data.truth[train])
    weight = torch.zeros(network.shape.outputs, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(network.shape.outputs, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss_of_step() -> Tensor:
        optimizer.zero_grad()
        loss = target_loss(specs, inputs @ weight.T + bias, truth) + (weight**2).sum() / (2 * c * len(train))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(loss_of_step)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        n_pooled = 2 * network.shape.features
        network.classify.weight.copy_(weight[:, :n_pooled])
        network.classify.bias.copy_(bias)
        if network.covariates is not None:
            network.covariates.weight.copy_(weight[:, n_pooled:])


# --- calibration -------------------------------------------------------------------------------------------------


def find_temperature(
    specs: Sequence[TargetSpec], number: int, logits: NDArray[np.float64], truth: NDArray[np.float64]
) -> float:
    """The temperature that gives validation labels the highest likelihood; 1 for targets without probabilities.

    Source: Guo et al. 2017, On calibration of modern neural networks, arXiv:1706.04599.

    Args:
        specs: The targets.
        number: Which of them.
        logits: (n, K) of all targets, of bags that were not trained on.
        truth: (n, W).
    """
    spec = specs[number]
    own_logits = logits[:, slice_of(specs, number, "logits")]
    own_truth = truth[:, slice_of(specs, number, "truth")]
    known = np.isfinite(own_truth).all(axis=1)
    if not spec.classes or known.sum() < 2:
        return 1.0
    own_logits, own_truth = own_logits[known], own_truth[known]

    def loss(temperature: float) -> float:
        predicted = np.clip(predict_target(spec, own_logits, temperature=temperature), 1e-12, 1)
        if spec.kind == "multilabel":
            absent = np.clip(1 - predicted, 1e-12, 1)
            return float(-(own_truth * np.log(predicted) + (1 - own_truth) * np.log(absent)).mean())
        return float(-np.log(predicted[np.arange(len(predicted)), own_truth[:, 0].astype(np.intp)]).mean())

    # A separable validation part has no best temperature; the ends keep probabilities believable.
    grid = np.geomspace(0.25, 8, 61)
    return float(grid[int(np.argmin([loss(float(temperature)) for temperature in grid]))])
