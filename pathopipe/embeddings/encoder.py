"""Networks as encoders: built, filled with weights, fed uint8 tiles that are made ready on their own device."""

import json
import logging
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathopipe.config import EmbedConfig
from pathopipe.embeddings.networks import EncoderNetwork, build_network, input_px, load_remote, timm_recipe
from pathopipe.embeddings.openvino import CompiledNetwork
from pathopipe.embeddings.precision import (
    LEAST_COSINE,
    Precision,
    check_tiles,
    choose_precision,
    least_cosine,
    with_bf16_weights,
)
from pathopipe.embeddings.recipe import EncoderSpec
from pathopipe.embeddings.transform import TileTransform
from pathopipe.embeddings.weights import (
    find_repository,
    find_weights,
    hash_parameters,
    load_weights,
    locate_weights,
    note_download,
    weights_help,
)
from pathopipe.errors import EncoderError, UsageError

__all__ = ["NetworkEncoder"]

logger = logging.getLogger("pathopipe")

_AUTOCAST = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}
_MOST_WORKERS = 4
"""Each goes through all of the network's weights, which many at a time would have to fetch from memory again."""
_LEAST_TILES = 4
"""Of a worker's part; matrices of fewer are too small to be quick."""


class NetworkEncoder:
    """A network of the catalogue, or any architecture of timm, that turns tiles into vectors.

    Tiles go through the recipe's transform, and what the recipe says is taken from the network. Of a bare architecture
    of timm (``timm.<name>``) the transform is timm's own for it, and what it returns is taken.

    A tile's vector does not depend on its neighbours: in fp32, other batches or another order move it by no more than
    1e-5 of its length, by rounding (on the CPU that it was measured on, not at all). On a CUDA device batches overlap:
    while one is computed, the next one is copied.
    """

    ahead: int
    """Batches that may be started before the result of the first is fetched: 1 on a GPU, none on a CPU."""

    def __init__(self, spec: EncoderSpec, config: EmbedConfig, *, download: bool = True) -> None:
        """Build the network and load its weights.

        Where ``auto`` means bf16 weights, they are tried on a few drawn tiles first: unless every vector's cosine to
        that of fp32 is above 0.999, the network stays in fp32 and a warning is logged. What OpenVINO computes is
        tried in the same way.

        Args:
            spec: Its row. A bare architecture of timm gets random weights where the config names none.
            config: Weights, device, precision, seed.
            download: Whether the hub may be asked for weights that are not on this machine.

        Raises:
            UsageError: There is no CUDA device where one is asked for.
            EncoderError: It can't be built here, there are no weights, or they don't fit; the message names the keys.
        """
        self._name = spec.name
        self.device = _choose_device(config.device if config.engine == "torch" else _device_of_openvino(config))
        # OpenVINO shares out its work itself, and what the code of others does beside other threads nobody knows.
        workers = 1 if config.engine == "openvino" or spec.remote_code else _workers_of(torch.get_num_threads())
        self._lane: _Lane = _CudaLane(self.device) if self.device.type == "cuda" else _HostLane(workers)
        self.ahead = self._lane.ahead
        is_bare = spec.transform is None
        loaded = _load(spec, config, download=download)
        transform = spec.transform or timm_recipe(loaded.model.network)
        spec = spec.model_copy(update={"transform": transform})
        model = loaded.model.eval().requires_grad_(False).to(self.device)
        self._model: Callable[[Tensor], Tensor] = model
        self._transform = TileTransform(transform, self.device)
        # Most networks take tiles of any size; those that don't resize are tried on their own.
        self._check_px = spec.tile_px if transform.resize == "none" else 256
        self._largest_batch: int | None = None
        chosen = choose_precision(config.precision, self.device, None if is_bare else spec.precision)
        cosine: float | None = None
        if config.engine == "openvino":
            self.precision: Precision = "fp32"
            cosine = self._compile(model, bf16=chosen != "fp32")
        elif chosen == "bf16 weights":
            self.precision = "fp32"
            cosine = self._try(lambda: with_bf16_weights(model), "bf16 weights")
        else:
            self.precision = chosen
        side_px = input_px(spec)
        self.features = self.encode(np.zeros((1, side_px, side_px, 3), np.uint8)).shape[1]
        if not is_bare and self.features != spec.features:
            raise EncoderError(
                f"{spec.name}: output '{spec.output}' has {self.features} numbers, its row says {spec.features}"
            )
        self.identity: dict[str, Any] = {
            "name": spec.name,
            "weights": "file" if loaded.file else f"random (seed {config.seed})",
            "weights_sha256": loaded.sha256,
            "network": _network_digest(spec),
            "output": spec.output,
            "transform": transform.model_dump(mode="json"),
            "precision": self.precision,
        }
        self.about: dict[str, Any] = {
            "title": spec.title,
            "license": spec.license,
            "commercial": spec.commercial,
            "gated": spec.gated,
            "hub": spec.weights.hub,
            "revision": loaded.revision or spec.weights.revision,
            "weights_file": loaded.file,
            "weights_from": loaded.source,
            # Of a bare architecture nobody says which tiles it wants.
            "recipe_tile_px": None if is_bare else spec.tile_px,
            "recipe_mpp": None if is_bare else spec.mpp,
            "device": self.device.type,
            "torch": torch.__version__,
            "versions": _versions(),
            # Of bf16 weights, also where they were turned down, and of OpenVINO; None where neither was tried.
            "least_cosine_to_fp32": round(cosine, 6) if cosine is not None else None,
            "warning": None if loaded.file else "random weights: for timing and tests, not for science",
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

    def _submit(self, images: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        return self._lane.run(images, self._forward)

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Tensor:
        """(n, height, width, 3) uint8 -> (n, features) float32, both on the device."""
        batch = self._transform(images)
        if self.precision == "bf16 weights":
            batch = batch.to(torch.bfloat16, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=_AUTOCAST.get(self.precision), enabled=self.precision in _AUTOCAST):
            features: Tensor = self._model(batch)
        return features.float()

    def _compile(self, model: nn.Module, *, bf16: bool) -> float | None:
        """Go over to OpenVINO; the least cosine to torch in fp32, None where there is no number."""

        def compiled(*, bf16: bool) -> CompiledNetwork:
            return CompiledNetwork(model, name=self._name, bf16=bf16, threads=torch.get_num_threads())

        cosine = self._try(lambda: compiled(bf16=True), "openvino bf16") if bf16 else None
        if self.precision != "openvino bf16":
            cosine = self._try(lambda: compiled(bf16=False), "openvino fp32")
        if self.precision == "fp32":
            raise EncoderError(
                f"{self._name}: OpenVINO's vectors are not those of torch, see the warning above; "
                "use embed.engine=torch"
            )
        return cosine

    def _try(self, make: Callable[[], Callable[[Tensor], Tensor]], precision: Precision) -> float | None:
        """Go over to another way of computing if it agrees with fp32; the least cosine, None where it is no number."""
        tiles = check_tiles(self._check_px)
        full_model, full = self._model, self.encode(tiles)
        self._model, self.precision = make(), precision
        try:
            cosine = least_cosine(full, self.encode(tiles))
            reason = f"the least cosine to fp32 is {cosine:.6f}, not above {LEAST_COSINE:g}"
        except RuntimeError as error:  # torch has no bf16 kernel for one of its operations
            cosine, reason = math.nan, " ".join(str(error).split())[:200]
        if not cosine > LEAST_COSINE:
            self._model, self.precision = full_model, "fp32"
            logger.warning("%s: runs in fp32, for %s won't do here (%s)", self._name, precision, reason)
        return cosine if math.isfinite(cosine) else None


class _Lane(Protocol):
    """The way through the device and back."""

    ahead: int

    def run(self, images: NDArray[np.uint8], forward: Callable[[Tensor], Tensor]) -> Callable[[], NDArray[np.float32]]:
        """Begin to compute; the function that is returned waits for the (n, features) vectors."""
        ...

    def wait_for_copies(self) -> None:
        """Until everything that was sent has left the buffers it came from."""
        ...


class _HostLane:
    """The CPU: nothing is copied, all is done at once, a part of the batch by each worker.

    Threads that share one operation wait for each other after every one of them, and longest for the one whose core a
    reading thread, or another program, has just taken. Workers with parts of their own don't: where cores are contested
    batches take up to a third less time, and hardly more where they are not (benchmarks/workers.py).
    """

    ahead = 0

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._threads_each = max(1, torch.get_num_threads() // workers)
        self._pool: ThreadPoolExecutor | None = None

    def run(self, images: NDArray[np.uint8], forward: Callable[[Tensor], Tensor]) -> Callable[[], NDArray[np.float32]]:
        n_parts = min(self._workers, max(1, len(images) // _LEAST_TILES))
        if n_parts == 1:
            features = [forward(torch.from_numpy(images))]
        else:
            if self._pool is None:
                # The number of threads is a thread's own, so that of the caller stays as it is.
                self._pool = ThreadPoolExecutor(
                    self._workers, "encode", initializer=torch.set_num_threads, initargs=(self._threads_each,)
                )
            features = list(self._pool.map(forward, torch.from_numpy(images).tensor_split(n_parts)))
        computed = np.concatenate([part.numpy() for part in features])
        return lambda: computed

    def wait_for_copies(self) -> None:
        pass


def _workers_of(threads: int) -> int:
    """Into how many workers of equally many threads some threads are best divided: few left over, not too many."""
    return max(range(1, min(threads, _MOST_WORKERS) + 1), key=lambda workers: (threads // workers * workers, workers))


class _CudaLane:
    """A GPU: tiles cross on a stream of their own, so that a copy runs while the batch before it is computed."""

    ahead = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, images: NDArray[np.uint8], forward: Callable[[Tensor], Tensor]) -> Callable[[], NDArray[np.float32]]:
        return self._fetch(forward(self._send(images)))

    def wait_for_copies(self) -> None:
        self._copies.synchronize()

    def _send(self, images: NDArray[np.uint8]) -> Tensor:
        with torch.cuda.stream(self._copies):
            sent = torch.from_numpy(images).to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        # Else its memory would be free for the next copy while the model still reads it.
        sent.record_stream(computing)
        return sent

    def _fetch(self, features: Tensor) -> Callable[[], NDArray[np.float32]]:
        values = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        values.copy_(features, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self._device))

        def wait() -> NDArray[np.float32]:
            arrived.synchronize()
            return np.asarray(values.numpy())

        return wait


def _device_of_openvino(config: EmbedConfig) -> str:
    if config.device == "cuda":
        raise UsageError("embed.engine=openvino is for CPUs; leave embed.device=cuda out, or use embed.engine=torch")
    if config.precision == "fp16":
        raise UsageError("embed.engine=openvino computes in bf16 or fp32; leave embed.precision=fp16 out")
    return "cpu"


def _choose_device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("embed.device=cuda, but torch finds no CUDA device here; use --set embed.device=cpu or auto")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """A network with its weights, on the CPU."""

    model: EncoderNetwork
    sha256: str
    file: str = ""
    """Name of the weights file, without its folder; empty where the weights are random."""
    source: str = ""
    revision: str = ""


def _load(spec: EncoderSpec, config: EmbedConfig, *, download: bool) -> _Loaded:
    if spec.remote_code:
        return _load_remote(spec, config, download=download)
    if spec.transform is None:  # a bare architecture of timm
        found = find_weights(spec, weights=config.weights, weights_dir=config.weights_dir)
        if found is None:
            model = build_network(spec, seed=config.seed)
            return _Loaded(model=model, sha256=hash_parameters(model.network))
        model = _build_empty(spec)
    else:
        model = _build_empty(spec)  # first, so that nothing is fetched for what can't be built here
        found = locate_weights(spec, weights=config.weights, weights_dir=config.weights_dir, download=download)
    sha256 = load_weights(model.network, spec, found.path)
    return _Loaded(model=model, sha256=sha256, file=found.path.name, source=found.source, revision=found.revision)


def _build_empty(spec: EncoderSpec) -> EncoderNetwork:
    """A network to be filled: without memory or random numbers where its state is all that it holds."""
    model = build_network(spec, device="meta")
    kept = model.network.state_dict().keys()
    computed = any(name not in kept for name, _ in model.network.named_buffers())
    loose = any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())
    return build_network(spec) if computed or loose else model


def _load_remote(spec: EncoderSpec, config: EmbedConfig, *, download: bool) -> _Loaded:
    if not config.trust_remote_code:
        raise EncoderError(
            f"{spec.name}: its network is code in the hub repository {spec.weights.hub}, which comes with the weights; "
            "read that code, then allow it with --set embed.trust_remote_code=true"
        )
    folder = find_repository(spec, weights=config.weights, weights_dir=config.weights_dir)
    if folder is None and not download:
        raise EncoderError(f"{spec.name}: no copy of its repository was named\n{weights_help(spec)}")
    if folder is None:
        note_download(spec, f"code and weights of {spec.weights.hub}, where they are not on this machine yet")
    try:
        model = load_remote(spec, folder or spec.weights.hub, revision=spec.weights.revision if folder is None else "")
    except EncoderError as error:
        raise EncoderError(f"{error}\n{weights_help(spec)}") from error
    return _Loaded(
        model=model,
        sha256=hash_parameters(model.network),
        file=folder.name if folder is not None else spec.weights.hub,
        source="hub" if folder is None else "mirror" if config.weights is None else "file",
    )


def _network_digest(spec: EncoderSpec) -> str:
    """What decides the function that is computed, beside weights: architecture, arguments, which keys go where."""
    rules = spec.weights.model_dump(mode="json", include={"entry", "keep", "strip", "rename", "convert"})
    what = spec.model_dump(mode="json", include={"loader", "architecture", "arguments", "package", "prefix_tokens"})
    if spec.remote_code:
        rules["revision"] = spec.weights.revision
    text = json.dumps(what | rules, sort_keys=True)
    return f"{spec.loader} {spec.architecture} {sha256(text.encode()).hexdigest()[:16]}"


def _versions() -> dict[str, str]:
    """Of the libraries that networks are made of, those that are in use."""
    found = {
        name: getattr(sys.modules.get(name), "__version__", "")
        for name in ("timm", "transformers", "open_clip", "openvino")
    }
    return {name: version for name, version in found.items() if version}
