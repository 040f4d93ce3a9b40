"""Networks as encoders: built by timm, fed uint8 tiles, normalised on their own device."""

import logging
import math
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pathopipe.embeddings.catalog import TIMM_PREFIX, EncoderSpec
from pathopipe.embeddings.precision import (
    LEAST_COSINE,
    Asked,
    Precision,
    check_tiles,
    choose_precision,
    least_cosine,
    with_bf16_weights,
)
from pathopipe.embeddings.torchvision_import import import_torchvision
from pathopipe.errors import EncoderError, UsageError
from pathopipe.registry import nearest

__all__ = ["NetworkEncoder"]

logger = logging.getLogger("pathopipe")

_AUTOCAST = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}


class NetworkEncoder:
    """A timm architecture that turns tiles into vectors.

    Tiles are resized to the network's input (bicubic with antialias), scaled and normalised as timm's recipe for the
    architecture says, and pooled as it pools by default.

    On a CUDA device batches overlap: while one is computed, the next one is copied.
    """

    ahead: int
    """Batches that may be started before the result of the first is fetched: 1 on a GPU, none on a CPU."""

    def __init__(
        self,
        spec: EncoderSpec,
        *,
        weights: Path | None,
        seed: int = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Asked = "auto",
    ) -> None:
        """Build the network and load its weights.

        Where ``auto`` means bf16 weights, they are tried on a few drawn tiles first: unless every vector's cosine to
        that of fp32 is above 0.999, the network stays in fp32 and a warning is logged.

        Raises:
            UsageError: timm has no such architecture, or there is no CUDA device where one is asked for.
            EncoderError: The weights don't fit; the message names the keys.
        """
        self._name = spec.name
        self.device = _choose_device(device)
        self._lane: _Lane = _CudaLane(self.device) if self.device.type == "cuda" else _HostLane()
        self.ahead = self._lane.ahead
        model = _build(spec.name.removeprefix(TIMM_PREFIX), seed)
        recipe = _recipe(model)
        weights_sha256 = _load_weights(model, weights) if weights is not None else _hash_parameters(model)
        self._model = model.eval().requires_grad_(False).to(self.device)
        _, self._input_height, self._input_width = recipe["input_size"]
        self._mean = torch.tensor(recipe["mean"], device=self.device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(recipe["std"], device=self.device).view(1, 3, 1, 1) * 255
        self._largest_batch: int | None = None
        chosen = choose_precision(precision, self.device)
        self.precision: Precision = "fp32" if chosen == "bf16 weights" else chosen
        cosine = self._try_bf16_weights() if chosen == "bf16 weights" else None
        self.features = self.encode(np.zeros((1, self._input_height, self._input_width, 3), np.uint8)).shape[1]
        self.identity: dict[str, Any] = {
            "name": spec.name,
            "weights": "file" if weights is not None else f"random (seed {seed})",
            "weights_sha256": weights_sha256,
            "precision": self.precision,
            "input_px": [self._input_width, self._input_height],
            "resize": "bicubic with antialias to the input size",
            "mean": list(recipe["mean"]),
            "std": list(recipe["std"]),
            "output": "pooled features of timm's default head",
        }
        self.about: dict[str, Any] = {
            "license": spec.license,
            "device": self.device.type,
            "torch": torch.__version__,
            # Of bf16 weights, also where they were turned down; None where they were not tried.
            "least_cosine_to_fp32": round(cosine, 6) if cosine is not None else None,
            "warning": None if weights is not None else "random weights: for timing and tests, not for science",
        }

    def allocate(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """A buffer for tiles; pinned where a GPU copies from it."""
        buffer = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return np.asarray(buffer.numpy())

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, height, width, 3) uint8 tiles -> (n, features) float32.

        Raises:
            EncoderError: Not even one tile fits into the device's memory.
        """
        return self.start(images)()

    def start(self, images: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        """Begin to encode tiles; what is returned waits for the vectors, in the order of the starts.

        When this returns, ``images`` has been copied and may be written to. Where the device's memory does not hold
        the batch, it is halved until it does, for this and all later batches.

        Raises:
            EncoderError: Not even one tile fits.
        """
        step = min(self._largest_batch or len(images), len(images))
        while True:
            try:
                parts = [self._submit(images[first : first + step]) for first in range(0, len(images), step)]
                return lambda: np.concatenate([part() for part in parts])
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                if step == 1:
                    raise EncoderError(
                        f"{self._name}: the {self.device.type} device has no memory for one tile; "
                        "use --set embed.device=cpu or a smaller encoder"
                    ) from None
                step = self._largest_batch = step // 2
            finally:
                self._lane.wait_for_copies()

    @torch.inference_mode()
    def _submit(self, images: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        return self._lane.fetch(self._forward(self._lane.send(images)))

    def _forward(self, images: Tensor) -> Tensor:
        """(n, height, width, 3) uint8 -> (n, features) float32, both on the device."""
        batch = images.permute(0, 3, 1, 2).float()
        if batch.shape[2:] != (self._input_height, self._input_width):
            size = (self._input_height, self._input_width)
            batch = functional.interpolate(batch, size=size, mode="bicubic", antialias=True).clamp_(0, 255)
        batch = (batch - self._mean) / self._std
        if self.precision == "bf16 weights":
            batch = batch.to(torch.bfloat16, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=_AUTOCAST.get(self.precision), enabled=self.precision in _AUTOCAST):
            features: Tensor = self._model(batch)
        return features.float()

    def _try_bf16_weights(self) -> float | None:
        """Go over to bf16 weights if they agree with fp32; the least cosine, None where there is no number."""
        full_model, full = self._model, self.encode(check_tiles())
        self._model, self.precision = with_bf16_weights(full_model), "bf16 weights"
        try:
            cosine = least_cosine(full, self.encode(check_tiles()))
            reason = f"the least cosine to fp32 is {cosine:.6f}, not above {LEAST_COSINE:g}"
        except RuntimeError as error:  # torch has no bf16 kernel for one of its operations
            cosine, reason = math.nan, " ".join(str(error).split())[:200]
        if not cosine > LEAST_COSINE:
            self._model, self.precision = full_model, "fp32"
            logger.warning("%s: runs in fp32, for bf16 weights won't do here (%s)", self._name, reason)
        return cosine if math.isfinite(cosine) else None


class _Lane(Protocol):
    """The way to the device and back."""

    ahead: int

    def send(self, images: NDArray[np.uint8]) -> Tensor:
        """Bring tiles to the device."""
        ...

    def wait_for_copies(self) -> None:
        """Until everything that was sent has left the buffers it came from."""
        ...

    def fetch(self, features: Tensor) -> Callable[[], NDArray[np.float32]]:
        """Begin to bring (n, features) float32 back; the function waits for them."""
        ...


class _HostLane:
    """The CPU: nothing is copied, all is done at once."""

    ahead = 0

    def send(self, images: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(images)

    def wait_for_copies(self) -> None:
        pass

    def fetch(self, features: Tensor) -> Callable[[], NDArray[np.float32]]:
        computed = np.asarray(features.numpy())
        return lambda: computed


class _CudaLane:
    """A GPU: tiles cross on a stream of their own, so that a copy runs while the batch before it is computed."""

    ahead = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, images: NDArray[np.uint8]) -> Tensor:
        with torch.cuda.stream(self._copies):
            sent = torch.from_numpy(images).to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        # Else its memory would be free for the next copy while the model still reads it.
        sent.record_stream(computing)
        return sent

    def wait_for_copies(self) -> None:
        self._copies.synchronize()

    def fetch(self, features: Tensor) -> Callable[[], NDArray[np.float32]]:
        values = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        values.copy_(features, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self._device))

        def wait() -> NDArray[np.float32]:
            arrived.synchronize()
            return np.asarray(values.numpy())

        return wait


def _choose_device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("embed.device=cuda, but torch finds no CUDA device here; use --set embed.device=cpu or auto")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def _build(architecture: str, seed: int) -> nn.Module:
    import_torchvision()
    import timm

    if not timm.is_model(architecture):
        raise UsageError(f"timm has no architecture '{architecture}'; {nearest(architecture, timm.list_models())}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=0)
    return model


def _recipe(model: nn.Module) -> dict[str, Any]:
    """What timm says of an architecture: input size, mean, std, name of the head."""
    return cast(dict[str, Any], model.pretrained_cfg)


def _load_weights(model: nn.Module, path: Path) -> str:
    """Load strictly, a classification head aside; return the file's sha256."""
    state = _read_weights(path)
    head = _recipe(model).get("classifier") or ()
    heads = (head,) if isinstance(head, str) else tuple(head)
    wanted = model.state_dict()
    # The head maps to the classes of some other task; embeddings end before it.
    state = {key: value for key, value in state.items() if key in wanted or not key.startswith(heads)}
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    resized = [key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape]
    if missing or unexpected or resized:
        found = [
            f"{what} {len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(resized)))
            if keys
        ]
        raise EncoderError(f"{path}: the weights are not of this architecture: keys " + "; ".join(found))
    model.load_state_dict(state, strict=True)
    return _hash_file(path)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise EncoderError(f"{path}: no such weights file; check embed.weights") from None
    except Exception as error:  # damaged files fail in a dozen ways, code in a pickle in one more
        raise EncoderError(
            f"{path}: not a weights file that can be read safely ({type(error).__name__}); "
            "give .safetensors, or a .pt that holds nothing but tensors"
        ) from error
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise EncoderError(f"{path}: holds no table of tensors; save model.state_dict() as .safetensors")
    return state


def _hash_file(path: Path) -> str:
    hasher = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _hash_parameters(model: nn.Module) -> str:
    hasher = sha256()
    for name, value in model.state_dict().items():
        hasher.update(name.encode())
        hasher.update(value.contiguous().numpy().tobytes())
    return hasher.hexdigest()
