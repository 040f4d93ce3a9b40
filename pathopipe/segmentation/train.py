"""Trains a segmentation network on data sets with different labels; goes on after any kill."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from pathopipe.embeddings.precision import cpu_has_bf16
from pathopipe.errors import PathopipeError, UsageError
from pathopipe.segmentation.batches import Batch, Pool, iterate_batches
from pathopipe.segmentation.checkpoint import (
    Progress,
    cut_log,
    digest_images,
    forget_checkpoint,
    log_row,
    read_checkpoint,
    write_checkpoint,
)
from pathopipe.segmentation.datasets import OBJECT_TASKS, DatasetSettings
from pathopipe.segmentation.examples import Example, read_datasets, split_by_source
from pathopipe.segmentation.losses import TASK_WEIGHT, losses
from pathopipe.segmentation.network import NetworkSpec, SegmentationNetwork, load_network, save_network
from pathopipe.segmentation.settings import SegmenterSettings, TrainSettings
from pathopipe.segmentation.validate import Case, Scores, examine, validate

__all__ = ["NotFiniteLossError", "Trained", "train_segmenter"]

_WEIGHTS: Final = "weights.safetensors"
_CASES: Final = 3
"""Images of each data set that are kept as good cases, and as bad ones."""


class NotFiniteLossError(PathopipeError, ArithmeticError):
    """The loss of a training step is not a finite number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """How a training ended."""

    weights: Path
    step: int
    """Step of the network that was kept."""
    steps: int
    """Steps that were taken for all tasks together."""
    tissue_steps: int = 0
    """Steps that followed for tissue types alone."""
    seconds: float
    """Of this run alone."""
    scores: Scores
    stopped_early: bool
    images: Mapping[str, tuple[int, int]]
    """By data set: images learnt from, and kept back."""
    cases: tuple[Case, ...]
    """The best and the worst images of each data set that were kept back, the best first."""


def train_segmenter(
    settings: SegmenterSettings,
    out: Path,
    *,
    data: Path = Path(),
    fresh: bool = False,
    threads: int | None = None,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    on_scores: Callable[[int, Scores], None] = lambda step, scores: None,
) -> Trained:
    """Train a network and write its weights.

    The same settings give the same batches; a run that was killed goes on from its last checkpoint.

    Args:
        settings: What to learn from, and how.
        out: Folder for ``weights.safetensors``, the checkpoint and the log.
        data: Folder that paths of data sets and of ``backbone_weights`` are relative to.
        fresh: Forget what is there.
        threads: Of torch on a CPU; its own choice where None.
        on_step: Told of each step, how many there are, and its loss.
        on_scores: Told of each validation.

    Raises:
        UsageError: Data sets or settings are wrong, or ``out`` holds the training of other settings or on
            other images.
        NotFiniteLossError: A loss is not finite; the samples of that step are named.
    """
    started = time.perf_counter()
    spec, train = settings.network, settings.train
    device = _device(train.device)
    out.mkdir(parents=True, exist_ok=True)
    state = None if fresh else read_checkpoint(out, settings)
    tasks = {task.name: tuple(one.name for one in task.classes) for task in spec.tasks}
    examples = read_datasets([_placed(dataset, data) for dataset in settings.datasets], tasks)
    images = digest_images(examples)
    if state is not None and state.get("images") != images:
        raise UsageError(
            f"{out}: holds a training on other images or labels than those in this folder of data; give another "
            "--out, or start anew with --fresh"
        )
    learnt, kept_back = _split(settings, examples)
    if train.tissue_steps and not _tissue_pools(settings, learnt):
        raise UsageError(
            "train.tissue_steps: no image to learn from tells tissue types of this network; leave them out, or add "
            "such a data set"
        )
    progress = Progress() if state is None else Progress(**state["progress"])
    if threads is not None:
        torch.set_num_threads(threads)
    if fresh:
        # Stopped before its first checkpoint, the new training must not go on from the old one's.
        forget_checkpoint(out)
    cut_log(out, train.steps + progress.tissue_step if progress.tissue_steps else progress.step)
    run = _Run(
        settings=settings,
        out=out,
        images=images,
        device=device,
        autocast=_autocast(device, train.precision),
        learnt=learnt,
        kept_back=kept_back,
        on_step=on_step,
        on_scores=on_scores,
    )
    if not progress.tissue_steps:
        backbone = None if train.backbone_weights is None else data / train.backbone_weights
        _train_all(run, progress, state, backbone)
        state = None
    if train.tissue_steps:
        _train_tissue_types(run, progress, state)
    final = _placed_on(load_network(out / _WEIGHTS), device)
    count = {
        dataset.name: (
            sum(one.dataset == dataset.name for one in learnt),
            sum(one.dataset == dataset.name for one in kept_back),
        )
        for dataset in settings.datasets
    }
    return Trained(
        images=count,
        cases=_telling(examine(final, example, device=device, autocast=run.autocast) for example in kept_back),
        weights=out / _WEIGHTS,
        step=progress.best_step,
        steps=progress.step,
        tissue_steps=progress.tissue_step,
        seconds=time.perf_counter() - started,
        scores=Scores.from_flat(progress.scores),
        stopped_early=progress.step < train.steps,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What both parts of a training need."""

    settings: SegmenterSettings
    out: Path
    images: str
    """Digest of all images."""
    device: torch.device
    autocast: bool
    learnt: Sequence[Example]
    kept_back: Sequence[Example]
    on_step: Callable[[int, int, float], None]
    on_scores: Callable[[int, Scores], None]

    def batches(self, pools: Sequence[Pool], spec: NetworkSpec, first_step: int, last_step: int) -> Iterator[Batch]:
        train = self.settings.train
        return iterate_batches(
            pools,
            spec,
            first_step=first_step,
            last_step=last_step,
            batch_size=train.batch_size,
            crop_px=train.crop_px,
            seed=train.seed,
            strength=train.stain,
            threads=train.threads,
        )

    def learn(
        self,
        network: SegmentationNetwork,
        mean: SegmentationNetwork,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        learning_rate: float,
    ) -> tuple[float, dict[str, float]]:
        """Take one step; returns its loss and the parts of it."""
        train = self.settings.train
        # Dropout too must not depend on where a run was cut.
        torch.manual_seed(train.seed * 1_000_003 + batch.step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss, parts = _step_loss(network, mean, batch, train, self.device, self.autocast)
        if not math.isfinite(loss.item()):
            raise NotFiniteLossError(
                f"step {batch.step}: the loss is not finite ({_listed(parts)}); its samples: {'; '.join(batch.names)}; "
                "look at these images and labels, or lower train.learning_rate and start with --fresh"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        return loss.item(), parts

    def keep(
        self,
        network: SegmentationNetwork,
        mean: SegmentationNetwork,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
    ) -> None:
        """Write a checkpoint."""
        write_checkpoint(self.out, self.settings, self.images, network, mean, optimizer, progress)


def _train_all(run: _Run, progress: Progress, state: Mapping[str, Any] | None, backbone: Path | None) -> None:
    """Train all that the network has, and write the best."""
    spec, train, kept_back = run.settings.network, run.settings.train, run.kept_back
    torch.manual_seed(train.seed)
    network = SegmentationNetwork(spec)
    if backbone is not None:
        network.load_backbone(backbone)
    network = _placed_on(network, run.device)
    network.encoder.requires_grad_(not train.freeze_backbone)
    mean = _placed_on(SegmentationNetwork(spec), run.device)
    mean.load_state_dict(network.state_dict())
    mean.eval()
    optimizer = torch.optim.AdamW(_parameter_groups(network, train.weight_decay), lr=train.learning_rate)
    if state is not None:
        network.load_state_dict(state["network"])
        mean.load_state_dict(state["mean"])
        optimizer.load_state_dict(state["optimizer"])
    last_step = train.steps if not progress.ended else progress.step
    batches = run.batches(_pools(run.settings, run.learnt), spec, progress.step, last_step)
    for batch in batches:
        network.train()
        if train.freeze_backbone:
            network.encoder.eval()
        rate = _learning_rate(batch.step, train.steps, train.warmup_steps, train.learning_rate)
        loss, parts = run.learn(network, mean, optimizer, batch, rate)
        progress.step = batch.step + 1
        _move_mean(mean, network, min(train.ema, progress.step / (progress.step + 10)))
        run.on_step(progress.step, train.steps + train.tissue_steps, loss)
        is_last = progress.step == train.steps
        if kept_back and (progress.step % train.validate_every == 0 or is_last):
            scores = validate(mean, kept_back, device=run.device, autocast=run.autocast)
            run.on_scores(progress.step, scores)
            log_row(run.out, {"step": progress.step, "loss": round(loss, 5), "scores": scores.flat()})
            # Where what is kept back has no score (drawn tissue alone, say), the last network is as good as any.
            if scores.mean > progress.best or not scores.by_task:
                progress.best, progress.best_step, progress.worse = scores.mean, progress.step, 0
                progress.scores = scores.flat()
                _write(mean, run.settings, run.out, progress)
            else:
                progress.worse += 1
                progress.ended = progress.worse >= train.patience
        elif progress.step % 50 == 0:
            log_row(run.out, {"step": progress.step, "loss": round(loss, 5), "losses": parts})
        if progress.step % train.checkpoint_every == 0 or is_last or progress.ended:
            run.keep(network, mean, optimizer, progress)
        if progress.ended:
            break
    batches.close()  # type: ignore[attr-defined]
    if not kept_back:
        progress.best_step = progress.step
        _write(mean, run.settings, run.out, progress)


def _train_tissue_types(run: _Run, progress: Progress, state: Mapping[str, Any] | None) -> None:
    """Train the head of tissue types on the network that was written, and write it with that head.

    Nuclei take most of the crops of a training, and tissue types a small part of its loss, so their head is behind when
    it ends. All else stays as it is, to the bit: statistics of batch norms, and the rounding to float16. Nothing is
    chosen by what was kept back: the last mean is kept.
    """
    train = run.settings.train
    whole = _placed_on(load_network(run.out / _WEIGHTS), run.device)
    network, mean = _tissue_network(whole), _tissue_network(whole)
    mean.eval()
    network.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(_parameter_groups(network, train.weight_decay), lr=train.learning_rate)
    if state is None:
        progress.tissue_steps = train.tissue_steps
        # Before the weights are written over, for a run that is killed must not begin with a head that has learnt.
        run.keep(network, mean, optimizer, progress)
    else:
        network.load_state_dict(state["network"])
        mean.load_state_dict(state["mean"])
        optimizer.load_state_dict(state["optimizer"])
    # Other numbers than those of the steps before: other crops.
    last_step = train.steps + train.tissue_steps
    pools = _tissue_pools(run.settings, run.learnt)
    for batch in run.batches(pools, network.spec, train.steps + progress.tissue_step, last_step):
        network.train()
        network.encoder.eval()
        rate = _learning_rate(
            progress.tissue_step,
            train.tissue_steps,
            min(train.warmup_steps, train.tissue_steps // 10),
            train.learning_rate,
        )
        loss, parts = run.learn(network, mean, optimizer, batch, rate)
        progress.tissue_step += 1
        _move_mean(mean, network, min(train.ema, progress.tissue_step / (progress.tissue_step + 10)))
        step = batch.step + 1
        run.on_step(step, last_step, loss)
        is_last = step == last_step
        if is_last:
            whole.decoders["tissue_types"].load_state_dict(mean.decoders["tissue_types"].state_dict())
            if run.kept_back:
                scores = validate(whole, run.kept_back, device=run.device, autocast=run.autocast)
                run.on_scores(step, scores)
                log_row(run.out, {"step": step, "loss": round(loss, 5), "scores": scores.flat()})
                progress.scores = scores.flat()
            _write(whole, run.settings, run.out, progress)
        elif step % 50 == 0:
            log_row(run.out, {"step": step, "loss": round(loss, 5), "losses": parts})
        if progress.tissue_step % train.checkpoint_every == 0 or is_last:
            run.keep(network, mean, optimizer, progress)


def _tissue_network(whole: SegmentationNetwork) -> SegmentationNetwork:
    """A copy of a network's encoder and head of tissue types."""
    network = copy.deepcopy(whole)
    network.spec = whole.spec.model_copy(update={"tasks": (whole.spec.task("tissue_types"),)})
    network.decoders = nn.ModuleDict({"tissue_types": network.decoders["tissue_types"]})
    return network


def _device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("train.device=cuda: torch sees no CUDA device here; use auto or cpu")
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def _placed_on(network: SegmentationNetwork, device: torch.device) -> SegmentationNetwork:
    placed: SegmentationNetwork = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return placed


def _autocast(device: torch.device, asked: str) -> bool:
    if asked != "auto":
        return asked == "bf16"
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()


def _split(settings: SegmenterSettings, examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    shares = {one.name: one.holdout for one in settings.datasets if one.holdout is not None}
    learnt, kept_back = split_by_source(examples, settings.train.holdout, settings.train.seed, shares=shares)
    if not learnt:
        raise UsageError("datasets: every image is held out, so there is nothing to learn from; lower holdout")
    return learnt, kept_back


def _placed(dataset: DatasetSettings, folder: Path) -> DatasetSettings:
    """The data set with its paths below a folder; absolute ones stay."""
    changed: dict[str, Any] = {}
    for name in ("images", "labels", "masks", "tissues", "table"):
        value = getattr(dataset, name, None)
        if isinstance(value, Path):
            changed[name] = folder / value
        elif isinstance(value, Mapping):
            changed[name] = {task: folder / path for task, path in value.items()}
    return dataset.model_copy(update=changed)


def _telling(cases: Iterable[Case]) -> tuple[Case, ...]:
    """The best and the worst of each data set, by the first task that is labelled."""
    ranked: dict[str, list[tuple[float, Case]]] = {}
    for case in cases:
        scores = [case.score(task) for task in OBJECT_TASKS]
        score = next((one for one in scores if one is not None and math.isfinite(one)), None)
        if score is None:
            continue
        kept = ranked.setdefault(case.dataset, [])
        kept.append((score, case))
        kept.sort(key=lambda pair: (-pair[0], pair[1].name))
        del kept[_CASES:-_CASES]
    return tuple(case for kept in ranked.values() for _, case in kept)


def _pools(settings: SegmenterSettings, examples: Sequence[Example]) -> list[Pool]:
    pools = []
    for dataset in settings.datasets:
        own = [example for example in examples if example.dataset == dataset.name]
        if own:
            pools.append(Pool(name=dataset.name, share=dataset.share, zoom=dataset.zoom, examples=own))
    return pools


def _tissue_pools(settings: SegmenterSettings, examples: Sequence[Example]) -> list[Pool]:
    """A pool for each label of a data set, and one for its images that are labelled pixel by pixel.

    A pool's share is the root of the number of its sources: rare labels are seen more often than they occur, and those
    of a handful of patients still less often than others.
    """
    if settings.network.task("tissue_types") is None:
        return []
    pools = []
    for dataset in settings.datasets:
        labelled: dict[frozenset[int] | None, list[Example]] = {}
        for example in examples:
            if example.dataset == dataset.name and (example.tissue_types or example.tissue_map is not None):
                # Without objects, whose targets cost more than the network does.
                bare = replace(example, labels={}, classes={}, ignore={})
                labelled.setdefault(example.tissue_types, []).append(bare)
        for own in labelled.values():
            share = math.sqrt(len({example.source for example in own}))
            pools.append(Pool(name=dataset.name, share=share, zoom=dataset.zoom, examples=own))
    return pools


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    # Scales and offsets are not drawn to zero.
    learnt = [value for value in network.parameters() if value.requires_grad]
    kernels = [value for value in learnt if value.ndim > 1]
    others = [value for value in learnt if value.ndim <= 1]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _learning_rate(step: int, steps: int, warmup_steps: int, highest: float) -> float:
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return highest * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def _step_loss(
    network: SegmentationNetwork,
    mean: SegmentationNetwork,
    batch: Batch,
    train: TrainSettings,
    device: torch.device,
    autocast: bool,
) -> tuple[Tensor, dict[str, float]]:
    rgb = batch.rgb.to(device, non_blocking=True)
    targets = {name: value.to(device, non_blocking=True) for name, value in batch.targets.items()}
    is_taught = train.teach_from is not None and batch.step >= train.teach_from and bool(batch.untold.any())
    if is_taught and "nuclei" in mean.decoders:
        taught = torch.nonzero(batch.untold).flatten()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            told = mean(batch.plain[taught].to(device))["nuclei"].float().sigmoid()
        # Only what the teacher is sure of.
        sure = ((told[:, 0] > 0.8) | (told[:, 0] < 0.1)) & (batch.inside[taught].to(device) > 0)
        targets["nuclei"][taught, 0] = (told[:, 0] > 0.5).float()
        targets["nuclei"][taught, 1] = told[:, 1] * (told[:, 0] > 0.5)
        targets["nuclei_weight"][taught] = train.teach_weight * sure.float()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        outputs = network(rgb)
    found = losses(outputs, targets)
    if not found:
        # Nothing is labelled in this batch; weight decay alone moves the network.
        return torch.stack([value.float().sum() * 0 for value in outputs.values()]).sum(), {}
    total = torch.stack([TASK_WEIGHT[name] * value for name, value in found.items()]).sum()
    return total, {name: round(value.item(), 5) for name, value in found.items()}


def _move_mean(mean: nn.Module, network: nn.Module, keep: float) -> None:
    with torch.no_grad():
        for own, new in zip(mean.state_dict().values(), network.state_dict().values(), strict=True):
            if own.is_floating_point():
                own.lerp_(new, 1 - keep)
            else:
                own.copy_(new)


def _listed(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in parts.items())


def _write(network: SegmentationNetwork, settings: SegmenterSettings, out: Path, progress: Progress) -> None:
    about = {"name": settings.name, "step": str(progress.best_step), "scores": json.dumps(progress.scores)}
    save_network(network, out / _WEIGHTS, extra=about)
