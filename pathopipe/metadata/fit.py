"""Trains one network, and nothing but its training and validation slides is looked at."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathopipe.errors import UsageError
from pathopipe.metadata.inputs import Inputs, slide_batches, whole_batches
from pathopipe.metadata.network import MODALITIES, MetadataNetwork, alignment_loss, as_mask, drop_modalities
from pathopipe.metadata.settings import MetadataConfig
from pathopipe.mil.targets import TargetSpec, slice_of, target_loss

__all__ = ["fit_network", "weighted_loss"]

_WARMUP: Final = 0.1
_TEMPERATURES: Final = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)

Floats = NDArray[np.float64]


def fit_network(
    network: MetadataNetwork,
    specs: Sequence[TargetSpec],
    weights: Sequence[float],
    inputs: Inputs,
    truth: Floats,
    train: NDArray[np.intp],
    val: NDArray[np.intp],
    settings: MetadataConfig,
    *,
    seed: int,
    device: str = "cpu",
    where: str = "",
    on_epoch: Callable[[int, float, float], None] = lambda epoch, train_loss, val_loss: None,
) -> MetadataNetwork:
    """Train a network in place; nothing but ``train`` and ``val`` is looked at.

    Slides without a label, or without any modality, are passed over. The validation loss is the mean of that from all
    modalities and that from the image alone, where there is an image branch beside others: both are asked for at
    prediction.

    Args:
        network: With standardisation set.
        specs: Targets, fitted on the training part.
        weights: Of each target in the loss.
        inputs: All slides.
        truth: (n, W) encoded labels, NaN where missing.
        train: Rows to learn from.
        val: Rows whose loss decides when to stop and which epoch is kept.
        settings: The recipe.
        seed: Decides order, samples and dropout. Torch's own generators are left as they were.
        device: ``cpu`` or ``cuda``.
        where: What is trained, for messages.
        on_epoch: Told of each epoch.

    Raises:
        UsageError: The loss is not finite.
    """
    labelled = np.asarray(np.isfinite(truth).any(axis=1) & inputs.present.any(axis=1))
    train, val = train[labelled[train]], val[labelled[val]]
    if not len(train):
        return network.eval()
    network.to(device)
    labels = torch.from_numpy(truth).float().to(device)
    branches = network.shape.branches
    hides = sum(branches) > 1 and settings.modality_dropout > 0
    aligns = branches[0] and branches[1] and settings.alignment > 0
    # Biases, norms and the weights of modalities are not pulled to zero.
    matrices = [weight for name, weight in network.named_parameters() if weight.ndim > 1 and name != "weights"]
    others = [weight for name, weight in network.named_parameters() if weight.ndim <= 1 or name == "weights"]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        fused=True,
    )
    steps = settings.epochs * -(-len(train) // settings.batch_slides)
    rise = max(1, round(_WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * min(1, max(0, step - rise) / max(1, steps - rise)))
        ),
    )
    chance = torch.Generator().manual_seed(seed)
    best_loss, best_epoch, best = math.inf, 0, copy.deepcopy(network.state_dict())
    with torch.random.fork_rng(devices=["cuda"] if device == "cuda" else []):
        torch.manual_seed(seed)
        for epoch in range(settings.epochs):
            network.train()
            losses = []
            for rows, batch in slide_batches(
                inputs,
                train,
                size=settings.batch_slides,
                cap=settings.cap,
                seed=seed,
                epoch=epoch,
                shuffle=True,
                device=device,
            ):
                vectors, _ = network.encode(batch)
                seen = drop_modalities(batch.present, settings.modality_dropout, chance) if hides else batch.present
                own = torch.from_numpy(rows).to(device)
                loss = weighted_loss(specs, weights, network.decide(vectors, seen), labels[own])
                if aligns:
                    both = batch.present[:, 0] & batch.present[:, 1]
                    patients = torch.from_numpy(inputs.patient[rows]).to(device)[both]
                    loss = loss + settings.alignment * alignment_loss(vectors[both, 0], vectors[both, 1], patients)
                if not bool(torch.isfinite(loss)):
                    raise UsageError(
                        f"{where}: the loss is {loss.item()} in epoch {epoch}; lower metadata.learning_rate (now "
                        f"{settings.learning_rate:g}), or look for huge values among the features"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_clip)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            train_loss = float(np.mean(losses))
            val_loss = _validate(network, specs, weights, inputs, labels, val, device) if len(val) else train_loss
            on_epoch(epoch, train_loss, val_loss)
            if val_loss < best_loss:
                best_loss, best_epoch, best = val_loss, epoch, copy.deepcopy(network.state_dict())
            elif epoch - best_epoch >= settings.patience:
                break
    network.load_state_dict(best)
    return network.cpu().eval()


def weighted_loss(specs: Sequence[TargetSpec], weights: Sequence[float], logits: Tensor, truth: Tensor) -> Tensor:
    """Sum over tasks of weight times mean loss over the slides with a label."""
    loss = logits.sum() * 0
    for number, (spec, weight) in enumerate(zip(specs, weights, strict=True)):
        own_logits, own_truth = slice_of(specs, number, "logits"), slice_of(specs, number, "truth")
        loss = loss + weight * target_loss([spec], logits[:, own_logits], truth[:, own_truth])
    return loss


def _validate(
    network: MetadataNetwork,
    specs: Sequence[TargetSpec],
    weights: Sequence[float],
    inputs: Inputs,
    labels: Tensor,
    val: NDArray[np.intp],
    device: str,
) -> float:
    """Mean of the losses from all modalities and from the image alone."""
    network.eval()
    views = [as_mask(MODALITIES)]
    if network.shape.branches[0] and sum(network.shape.branches) > 1:
        views.append(as_mask(("image",)))
    with torch.inference_mode():
        parts = [
            (rows, network.encode(batch)[0], batch.present) for rows, batch in whole_batches(inputs, val, device=device)
        ]
        truth = labels[torch.from_numpy(np.concatenate([rows for rows, _, _ in parts])).to(device)]
        vectors, present = torch.cat([part for _, part, _ in parts]), torch.cat([part for _, _, part in parts])
        losses = []
        for view in views:
            seen = present & torch.from_numpy(view).to(device)
            some = seen.any(dim=1)
            if bool(some.any()):
                losses.append(_tempered_loss(specs, weights, network.decide(vectors[some], seen[some]), truth[some]))
    return float(np.mean(losses))


def _tempered_loss(specs: Sequence[TargetSpec], weights: Sequence[float], logits: Tensor, truth: Tensor) -> float:
    """As :func:`weighted_loss`, each task at the temperature that suits it best.

    Networks grow too sure long before they order slides any worse, and temperatures are found afterwards in any case:
    without this, training would stop at the first task that grows too sure.
    """
    total = 0.0
    for number, (spec, weight) in enumerate(zip(specs, weights, strict=True)):
        own_logits = logits[:, slice_of(specs, number, "logits")]
        own_truth = truth[:, slice_of(specs, number, "truth")]
        temperatures = _TEMPERATURES if spec.classes else (1.0,)
        losses = [float(target_loss([spec], own_logits / temperature, own_truth)) for temperature in temperatures]
        # The least of some numbers passes over NaN; a network that has gone astray must not.
        total += weight * (min(losses) if all(map(math.isfinite, losses)) else math.inf)
    return total
