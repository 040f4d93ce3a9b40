"""The segmentation network: one shared encoder, one decoder a task; and its weights files.

One encoder for data sets with different labels follows Cerberus (Graham et al. 2023, Medical Image Analysis 83:102685);
decoders are U-Net's (Ronneberger et al. 2015, arXiv:1505.04597).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from pathopipe.embeddings.torchvision_import import import_torchvision
from pathopipe.errors import UsageError
from pathopipe.files import durable_file
from pathopipe.records import ObjectClass
from pathopipe.registry import nearest
from pathopipe.segmentation.datasets import TASKS

__all__ = [
    "STRIDE_PX",
    "ClassSpec",
    "NetworkSpec",
    "SegmentationNetwork",
    "TaskSpec",
    "default_weights",
    "load_network",
    "save_network",
    "weights_sha256",
]

STRIDE_PX: Final = 32
"""Sides of what the network is given are multiples of this: the pixel of its coarsest features."""

_FORMAT: Final = "pathopipe segmentation network 1"

_FEATURE_STRIDE: Final = {"nuclei": 2, "glands": 4, "lumina": 4}
_LOGIT_STRIDE: Final = {"nuclei": 1, "glands": 4, "lumina": 2}
"""Where a decoder stops, and the resolution of its logits: outlines of glands are no sharper than 2 um, those of nuclei
want every pixel. Logits finer than features are so many channels, laid side by side: layers at full resolution would
take half of all time."""

# What the values of a pixel are brought to: roughly -2 to 2 for stained tissue.
_MEAN, _SPREAD = 0.65 * 255, 0.25 * 255


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassSpec(_Frozen):
    """A class of a task."""

    name: str = Field(min_length=1)
    color: tuple[int, int, int]
    """RGB, 0 to 255."""

    @property
    def record(self) -> ObjectClass:
        """As the stages hand it on."""
        return ObjectClass(name=self.name, color=self.color)


class TaskSpec(_Frozen):
    """What one decoder finds."""

    name: str
    classes: tuple[ClassSpec, ...] = Field(min_length=1)
    """With one class there is nothing to tell apart."""

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in TASKS:
            raise ValueError(f"unknown task '{name}'; {nearest(name, TASKS)}")
        return name


class NetworkSpec(_Frozen):
    """All that decides the shape of a network; it travels in the weights file."""

    backbone: str = "resnet18"
    """A timm architecture with feature maps: a pyramid (ResNet, ConvNeXt, ...) or a token grid (ViT)."""
    backbone_options: dict[str, Any] = {}
    """Keyword arguments of its constructor."""
    decoder_channels: tuple[int, ...] = Field(default=(96, 64, 48, 32), min_length=4, max_length=4)
    """Channels at strides of 16, 8, 4 and 2 pixels."""
    mpp: float = Field(default=0.5, ge=0.05, le=4)
    """Micrometres per pixel of what the network is given."""
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)

    @field_validator("tasks")
    @classmethod
    def _are_distinct(cls, tasks: tuple[TaskSpec, ...]) -> tuple[TaskSpec, ...]:
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"a task stands there twice: {', '.join(names)}")
        return tasks

    def task(self, name: str) -> TaskSpec | None:
        """A task by its name, None where the network does not do it."""
        return next((task for task in self.tasks if task.name == name), None)


class SegmentationNetwork(nn.Module):
    """Maps of every task from pixels.

    Args:
        spec: Its shape.

    Raises:
        UsageError: timm has no such backbone, or it takes no such options.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = _build_encoder(spec)
        channels = self.encoder.channels
        self.decoders = nn.ModuleDict()
        for task in spec.tasks:
            if task.name == "tissue_types":
                # The last but one stride too: fat and glass are told by texture, grades by structure.
                self.decoders[task.name] = _TissueHead(channels[-2], channels[-1], len(task.classes))
            else:
                self.decoders[task.name] = _Decoder(
                    channels,
                    spec.decoder_channels,
                    n_out=_n_out(task),
                    feature_stride=_FEATURE_STRIDE[task.name],
                    logit_stride=_LOGIT_STRIDE[task.name],
                )

    def forward(self, rgb: Tensor) -> dict[str, Tensor]:
        """(n, 3, height, width) uint8 RGB -> logits by task; height and width are multiples of ``STRIDE_PX``.

        - ``nuclei`` (n, 2 or 2 + classes, height, width): inside; distance from the edge (its sigmoid is 0 at the edge
          and 1 where the nucleus is deepest); one logit a class where there are several;
        - ``glands`` (n, 2, height, width): inside; border between or around glands;
        - ``lumina`` (n, 1, height, width): inside;
        - ``tissue_types`` (n, classes, height / 32, width / 32).
        """
        features = self.encoder((rgb.float() - _MEAN) / _SPREAD)
        logits: dict[str, Tensor] = {name: decoder(features) for name, decoder in self.decoders.items()}
        return logits

    def load_backbone(self, path: Path) -> None:
        """Fill the backbone from a state of the whole timm model; what it has beyond feature maps is left out.

        Raises:
            UsageError: The file can't be read, or lacks weights of the backbone.
        """
        if not path.is_file():
            raise UsageError(f"{path}: no such file; backbone_weights names a .safetensors or .pt file")
        state: Any
        try:
            if path.suffix == ".safetensors":
                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, UnpicklingError) as error:
            reason = " ".join(str(error).split())[:160] or "it is empty"
            raise UsageError(
                f"{path}: can't be read as weights ({reason}); give the model's state_dict() as .safetensors or .pt"
            ) from None
        inner = getattr(self.encoder.network, "model", self.encoder.network)
        own = inner.state_dict()
        if not isinstance(state, Mapping):
            raise UsageError(f"{path}: holds a {type(state).__name__}, not weights by name; give a state_dict()")
        # timm names the steps of some pyramids stages_0 that are stages.0 in the whole model.
        given = {str(name).replace(".", "_"): value for name, value in state.items() if isinstance(value, Tensor)}
        state = {name: given[name.replace(".", "_")] for name in own if name.replace(".", "_") in given}
        missing = [name for name, value in own.items() if name not in state or state[name].shape != value.shape]
        if missing:
            raise UsageError(
                f"{path}: lacks {len(missing)} of {len(own)} weights of {self.spec.backbone}, or has them in another "
                f"shape: {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}"
            )
        inner.load_state_dict(state)


def _n_out(task: TaskSpec) -> int:
    if task.name == "nuclei":
        return 2 + (len(task.classes) if len(task.classes) > 1 else 0)
    return 2 if task.name == "glands" else 1


def _conv(n_in: int, n_out: int, kernel_px: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, kernel_px, padding=kernel_px // 2, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(inplace=True),
    )


class _Decoder(nn.Module):
    """Up from the coarsest features, taking in those of each stride on the way."""

    def __init__(
        self, channels: Sequence[int], widths: Sequence[int], *, n_out: int, feature_stride: int, logit_stride: int
    ) -> None:
        super().__init__()
        self.logit_stride = logit_stride
        self.steps = nn.ModuleList()
        n_below = channels[-1]
        for step, width in enumerate(widths):
            if STRIDE_PX >> (step + 1) < feature_stride:
                break
            self.steps.append(nn.Sequential(_conv(n_below + channels[-2 - step], width), _conv(width, width)))
            n_below = width
        self.finer = feature_stride // logit_stride
        self.out = nn.Conv2d(n_below, n_out * self.finer**2, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = features[-1]
        for step, block in enumerate(self.steps):
            x = functional.interpolate(x, scale_factor=2, mode="nearest")
            x = block(torch.cat([x, features[-2 - step]], dim=1))
        logits: Tensor = functional.pixel_shuffle(self.out(x), self.finer)
        if self.logit_stride > 1:
            logits = functional.interpolate(
                logits, scale_factor=self.logit_stride, mode="bilinear", align_corners=False
            )
        return logits


class _TissueHead(nn.Module):
    """Classes of tissue at the coarsest stride, from what lies within a few of its pixels."""

    def __init__(self, n_fine: int, n_coarse: int, n_classes: int) -> None:
        super().__init__()
        self.mix = _conv(n_fine + n_coarse, 128)
        self.drop = nn.Dropout2d(0.2)
        self.out = nn.Conv2d(128, n_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        fine = functional.avg_pool2d(features[-2], 2)
        logits: Tensor = self.out(self.drop(self.mix(torch.cat([fine, features[-1]], dim=1))))
        return logits


class _Pyramid(nn.Module):
    """A timm backbone whose maps halve from step to step: strides of 2 to 32, those it lacks by resampling."""

    def __init__(self, network: nn.Module, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.channels: list[int] = []
        self.take: list[tuple[int, int]] = []  # index of the map, how often it is to be halved or (negative) doubled
        for wanted in (2, 4, 8, 16, 32):
            nearest_at = min(
                range(len(strides)), key=lambda at: (abs(strides[at].bit_length() - wanted.bit_length()), at)
            )
            self.take.append((nearest_at, wanted.bit_length() - strides[nearest_at].bit_length()))
            self.channels.append(channels[nearest_at])

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps = self.network(pixels)
        side_px = pixels.shape[-2:]
        found = []
        for stride, (at, steps) in zip((2, 4, 8, 16, 32), self.take, strict=True):
            x = maps[at]
            size = (side_px[0] // stride, side_px[1] // stride)
            if steps > 0:
                x = functional.adaptive_avg_pool2d(x, size)
            elif x.shape[-2:] != size:
                x = functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
            found.append(x)
        return found


def _build_encoder(spec: NetworkSpec) -> _Pyramid:
    import_torchvision()
    import timm

    if not timm.is_model(spec.backbone):
        known = timm.list_models(module=None)
        raise UsageError(f"network.backbone: timm has no '{spec.backbone}'; {nearest(spec.backbone, known)}")
    options = dict(spec.backbone_options)
    if "vit" in spec.backbone:
        options.setdefault("dynamic_img_size", True)
    try:
        network = timm.create_model(spec.backbone, pretrained=False, features_only=True, **options)
    except (TypeError, RuntimeError, AttributeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"network.backbone: '{spec.backbone}' can't be built with {spec.backbone_options or 'no options'} "
            f"as a pyramid of features ({' '.join(str(error).split())})"
        ) from None
    side_px = 2 * STRIDE_PX
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, side_px, side_px))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"network.backbone: '{spec.backbone}' with {spec.backbone_options or 'no options'} can't see RGB of "
            f"{side_px} x {side_px} px ({' '.join(str(error).split())[:160]}); it must take any multiple of "
            f"{STRIDE_PX} px, so patches of 8, 16 or 32 px"
        ) from None
    network.train()
    return _Pyramid(network, network.feature_info.channels(), network.feature_info.reduction())


# -- weights files ---------------------------------------------------------------------------------------------------


def default_weights() -> Path:
    """The weights that are shipped; see the model card beside them."""
    return Path(__file__).parent / "weights" / "starter.safetensors"


def save_network(network: SegmentationNetwork, path: Path, *, extra: Mapping[str, str] | None = None) -> None:
    """Write weights in float16, with the network's shape beside them, whole or not at all.

    Args:
        network: What to write; a value beyond float16's range is refused.
        path: A ``.safetensors`` file.
        extra: What else the file should tell.

    Raises:
        UsageError: A weight is not finite in float16.
    """
    tensors = {}
    for name, value in network.state_dict().items():
        small = value.detach().cpu().to(torch.float16) if value.is_floating_point() else value.detach().cpu()
        if small.is_floating_point() and not torch.isfinite(small).all():
            raise UsageError(f"{path}: weight '{name}' is not finite in float16, so the network is not written")
        tensors[name] = small.contiguous()
    about = {"format": _FORMAT, "network": json.dumps(network.spec.model_dump(mode="json")), **(extra or {})}
    with durable_file(path) as file:
        file.write(_sorted(save(tensors, metadata=about)))


def _sorted(data: bytes) -> bytes:
    """The same file with its header in order: safetensors shuffles metadata, and equal weights shall be equal files."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def load_network(path: Path, *, expected: NetworkSpec | None = None) -> SegmentationNetwork:
    """Read a network, ready to compute in float32 on the CPU.

    Args:
        path: What :func:`save_network` wrote.
        expected: The shape that it must have; any where None.

    Raises:
        UsageError: No such file, not a network of pathopipe, another shape or task list, or keys that don't fit.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such weights file; name one that 'pathopipe segmenter train' wrote")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: can't be read as safetensors ({error}); the file may be cut short") from None
    if about.get("format") != _FORMAT:
        raise UsageError(
            f"{path}: these are not weights of a pathopipe segmentation network "
            f"(format '{about.get('format', 'not stated')}'); train one with 'pathopipe segmenter train'"
        )
    try:
        spec = NetworkSpec.model_validate_json(about["network"])
    except (KeyError, ValidationError) as error:
        raise UsageError(f"{path}: does not state its network ({' '.join(str(error).split())})") from None
    if expected is not None and spec != expected:
        raise UsageError(f"{path}: {_differences(spec, expected)}")
    network = SegmentationNetwork(spec)
    own = network.state_dict()
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    shapes = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if missing or unknown or shapes:
        parts = [
            f"{what}: {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("not of this network", unknown), ("of another shape", shapes))
            if names
        ]
        raise UsageError(f"{path}: weights don't fit the network that the file states; {'; '.join(parts)}")
    network.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})
    return network.eval()


def _differences(found: NetworkSpec, expected: NetworkSpec) -> str:
    if [task.name for task in found.tasks] != [task.name for task in expected.tasks]:
        return (
            f"weights of a network for {', '.join(task.name for task in found.tasks)}; "
            f"asked for is one for {', '.join(task.name for task in expected.tasks)}"
        )
    there, wanted = found.model_dump(mode="json"), expected.model_dump(mode="json")
    differing = [f"{key} is {there[key]!r}, not {wanted[key]!r}" for key in wanted if there[key] != wanted[key]]
    return "weights of another network: " + "; ".join(differing)


def weights_sha256(path: Path) -> str:
    """What tells these weights from others."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
