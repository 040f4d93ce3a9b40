"""Networks of the catalogue's rows: built without weights, and what is taken from them."""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pathopipe.embeddings.custom import OWN_NETWORKS
from pathopipe.embeddings.outputs import take
from pathopipe.embeddings.recipe import EncoderSpec, Output, Transform
from pathopipe.embeddings.torchvision_import import import_torchvision
from pathopipe.errors import EncoderError
from pathopipe.registry import nearest

__all__ = ["EncoderNetwork", "Measured", "build_network", "input_px", "load_remote", "measure", "timm_recipe"]

_HUB_LINE: Final = "pip install 'pathopipe[hub]'"

_ELSEWHERE: Final = (
    "encode tiles with the code of its authors, and bring the features in with `pathopipe import features`"
)

_Read = Callable[[nn.Module, Tensor], Tensor]

# Classes that stand as text in a row; nothing else is looked up, let alone run.
_CLASSES: Final = frozenset(
    {
        "timm.layers.GluMlp",
        "timm.layers.Mlp",
        "timm.layers.SwiGLU",
        "timm.layers.SwiGLUPacked",
        "torch.nn.GELU",
        "torch.nn.LayerNorm",
        "torch.nn.ReLU",
        "torch.nn.SiLU",
    }
)


class EncoderNetwork(nn.Module):
    """A network and the rule for what is taken from it."""

    network: nn.Module
    """What the weights file fills."""

    def __init__(
        self, network: nn.Module, *, output: Output, prefix_tokens: int, pooled: _Read, tokens: _Read | None
    ) -> None:
        super().__init__()
        self.network = network
        self.output: Output = output
        self.prefix_tokens = prefix_tokens
        self._pooled = pooled
        self._tokens = tokens

    @property
    def has_tokens(self) -> bool:
        """Whether ``tokens`` can be called."""
        return self._tokens is not None

    def tokens(self, batch: Tensor) -> Tensor:
        """(n, 3, H, W) normalised -> (n, T, d), in the order class token, registers, patches row by row.

        Raises:
            EncoderError: The network has no tokens.
        """
        if self._tokens is None:
            raise EncoderError(f"{type(self.network).__name__} has no tokens; the one output is 'pooled'")
        return self._tokens(self.network, batch)

    def taken(self, batch: Tensor, output: Output, tokens: Tensor | None = None) -> Tensor:
        """(n, 3, H, W) normalised -> (n, features) of any output; ``tokens`` are computed where they are not given."""
        if output == "pooled":
            return self._pooled(self.network, batch)
        return take(self.tokens(batch) if tokens is None else tokens, output, self.prefix_tokens)

    def forward(self, batch: Tensor) -> Tensor:
        """(n, 3, H, W) normalised -> (n, features) of the row's output."""
        return self.taken(batch, self.output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a network has, as it was built."""

    params_m: float
    """Millions of parameters."""
    tokens: int | None
    """Tokens of a tile of the recipe's size, prefix and patches; None where it has none."""
    features: dict[Output, int]
    """Numbers a tile, of every output that the row offers."""


def build_network(spec: EncoderSpec, *, seed: int = 0, device: str = "cpu") -> EncoderNetwork:
    """A row's network with random weights.

    On ``meta`` it takes no memory. Buffers that are not part of the state (tables of positions) are then on ``meta``
    too, so a network that is to compute must be built on a CPU.

    Raises:
        EncoderError: The row has no such architecture, needs an extra or a package that is not installed, or runs code
            of its hub repository.
    """
    with contextlib.ExitStack() as stack:
        if device != "cpu":
            stack.enter_context(torch.device(device))
        if device == "meta":
            stack.enter_context(_NoNumbers())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(seed)
        return _BUILDERS[spec.loader](spec)


class _NoNumbers(TorchFunctionMode):
    """Passes over what only fills tensors: on meta there is nothing to fill, and to find that out takes seconds."""

    _FILLS = frozenset(
        {"add_", "clamp_", "constant_", "copy_", "erfinv_", "fill_", "kaiming_normal_", "kaiming_uniform_", "mul_"}
        | {"normal_", "ones_", "trunc_normal_", "uniform_", "xavier_uniform_", "zero_", "zeros_"}
    )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        filled = args[0] if args else (kwargs or {}).get("tensor")
        if getattr(func, "__name__", "") in self._FILLS and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        return func(*args, **(kwargs or {}))


def measure(spec: EncoderSpec) -> Measured:
    """Build a row on the meta device and count, with a tile of the recipe's size.

    Raises:
        EncoderError: As ``build_network``.
    """
    encoder = build_network(spec, device="meta").eval()
    transform = spec.transform or timm_recipe(encoder.network)
    side_px = input_px(spec.model_copy(update={"transform": transform}))
    features: dict[Output, int] = {}
    with torch.inference_mode():
        tile = torch.empty(1, 3, side_px, side_px, device="meta")
        tokens = encoder.tokens(tile) if encoder.has_tokens else None
        for output in spec.outputs:
            features[output] = encoder.taken(tile, output, tokens).shape[1]
    parameters = sum(parameter.numel() for parameter in encoder.network.parameters())
    return Measured(
        params_m=parameters / 1e6, tokens=tokens.shape[1] if tokens is not None else None, features=features
    )


def input_px(spec: EncoderSpec) -> int:
    """Side of a network's input, where tiles are squares of the recipe's size.

    Raises:
        EncoderError: The row has no transform; ``timm_recipe`` tells it of a network that is built.
    """
    if spec.transform is None:
        raise EncoderError(f"{spec.name}: its row has no transform; only the network that is built tells it")
    return spec.transform.crop_px or spec.transform.resize_px or spec.tile_px


def timm_recipe(network: nn.Module) -> Transform:
    """What timm says of a network's input: plain bicubic resize to its exact size, mean and std.

    Raises:
        EncoderError: The input is not a square.
    """
    cfg: Mapping[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    _, height, width = cfg["input_size"]
    if height != width:
        raise EncoderError(f"{cfg['architecture']}: wants input of {width} x {height} px; only squares are supported")
    return Transform(resize="exact", resize_px=height, filter="bicubic", mean=cfg["mean"], std=cfg["std"])


def load_remote(spec: EncoderSpec, source: str | Path, revision: str = "") -> EncoderNetwork:
    """A network whose hub repository brings its own code, which is run here; weights and all.

    Args:
        spec: Row with ``remote_code``; of its arguments, ``call`` names the method that turns tiles into vectors.
        source: Name on the hub, or a folder with a copy of that repository.
        revision: Commit or tag; the newest where empty.

    Raises:
        EncoderError: transformers is not installed, or the code or the weights can't be loaded.
    """
    transformers = _import_extra(spec, "transformers")
    try:
        network: nn.Module = transformers.AutoModel.from_pretrained(
            # Autocast wants fp32 weights, whatever type they were stored in.
            str(source),
            revision=revision or None,
            trust_remote_code=True,
            dtype=torch.float32,
        )
    except Exception as error:  # the repository's own code may fail in any way
        raise EncoderError(
            f"{spec.name}: the code of {source} can't be loaded ({type(error).__name__}: {_one_line(error)})"
        ) from error
    call = spec.arguments.get("call")
    return EncoderNetwork(
        network,
        output=spec.output,
        prefix_tokens=spec.prefix_tokens,
        pooled=lambda model, batch: _vectors(getattr(model, call)(batch) if call else model(batch)),
        tokens=lambda model, batch: model(batch).last_hidden_state,
    )


def _vectors(result: Any) -> Tensor:
    """The vectors in what a network of transformers returns: itself, or in a field."""
    if isinstance(result, Tensor):
        return result
    for name in ("image_features", "image_embeds", "pooler_output"):
        value = result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    raise EncoderError(f"no vector of the tile in what the network returns ({type(result).__name__})")


def _offers_tokens(spec: EncoderSpec) -> bool:
    return set(spec.outputs) != {"pooled"}


def _check_prefix(spec: EncoderSpec, prefix_tokens: int) -> None:
    """That registers can't get into a mean of patches by a number in a row."""
    if _offers_tokens(spec) and prefix_tokens != spec.prefix_tokens:
        raise EncoderError(
            f"{spec.name}: {spec.architecture} has {prefix_tokens} tokens before the patches, the row says "
            f"{spec.prefix_tokens}; correct prefix_tokens, or the number of registers in its arguments"
        )


def _of_row(spec: EncoderSpec, network: nn.Module, pooled: _Read, tokens: _Read | None) -> EncoderNetwork:
    if tokens is None and _offers_tokens(spec):
        raise EncoderError(f"{spec.name}: {spec.architecture} has no tokens; its one output is 'pooled'")
    return EncoderNetwork(network, output=spec.output, prefix_tokens=spec.prefix_tokens, pooled=pooled, tokens=tokens)


def _forward(network: nn.Module, batch: Tensor) -> Tensor:
    features: Tensor = network(batch)
    return features


# timm


def _build_timm(spec: EncoderSpec) -> EncoderNetwork:
    import_torchvision()
    import timm

    if not timm.is_model(spec.architecture):
        raise EncoderError(
            f"timm has no architecture '{spec.architecture}'; {nearest(spec.architecture, timm.list_models())}"
        )
    arguments = {key: _class_of_text(spec, value) for key, value in spec.arguments.items()}
    try:
        network: nn.Module = timm.create_model(spec.architecture, pretrained=False, **{"num_classes": 0, **arguments})
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise EncoderError(
            f"{spec.name}: timm can't build {spec.architecture} with {spec.arguments} ({_one_line(error)})"
        ) from error
    if spec.arguments.get("features_only"):
        return _of_row(spec, network, _last_map, None)
    return _of_timm(spec, network)


def _of_timm(spec: EncoderSpec, network: nn.Module) -> EncoderNetwork:
    """A network of timm, or of the same make; that its tokens are what the row says."""
    if not hasattr(network, "num_prefix_tokens"):
        return _of_row(spec, network, _forward, None)
    _check_prefix(spec, int(network.num_prefix_tokens))  # type: ignore[arg-type]
    if _offers_tokens(spec) and not isinstance(getattr(network, "fc_norm", nn.Identity()), nn.Identity):
        raise EncoderError(
            f"{spec.name}: {spec.architecture} normalises after pooling, so its tokens are not ready to be taken; "
            'add global_pool: "token" to its arguments, or offer only output pooled'
        )
    return _of_row(spec, network, _forward, _timm_tokens)


def _timm_tokens(network: nn.Module, batch: Tensor) -> Tensor:
    tokens: Tensor = network.forward_features(batch)  # type: ignore[operator]
    return tokens


def _last_map(network: nn.Module, batch: Tensor) -> Tensor:
    last: Tensor = network(batch)[-1]
    return last.float().mean(dim=(2, 3))


def _class_of_text(spec: EncoderSpec, value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(("timm.", "torch.")):
        return value
    if value not in _CLASSES:
        raise EncoderError(f"{spec.name}: '{value}' is not a class that a row may name; {nearest(value, _CLASSES)}")
    module, _, name = value.rpartition(".")
    return getattr(importlib.import_module(module), name)


# transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transformer:
    config: str
    pooled: str
    """Field of what the class returns."""
    class_tokens: int = 1
    last_norm: str = ""
    """What its last hidden state has still to go through."""
    keywords: Mapping[str, Any] = field(default_factory=dict)


_TRANSFORMERS: Final = {
    "CLIPVisionModelWithProjection": _Transformer(
        config="CLIPVisionConfig", pooled="image_embeds", last_norm="vision_model.post_layernorm"
    ),
    "Dinov2Model": _Transformer(config="Dinov2Config", pooled="pooler_output"),
    "Dinov2WithRegistersModel": _Transformer(config="Dinov2WithRegistersConfig", pooled="pooler_output"),
    "SiglipVisionModel": _Transformer(config="SiglipVisionConfig", pooled="pooler_output", class_tokens=0),
    # Its pooling layer is a random one in most checkpoints, and nothing here reads it.
    "ViTModel": _Transformer(config="ViTConfig", pooled="pooler_output", keywords={"add_pooling_layer": False}),
}


def _build_transformers(spec: EncoderSpec) -> EncoderNetwork:
    if spec.remote_code:
        raise EncoderError(
            f"{spec.name}: its network is code in the hub repository {spec.weights.hub}, which comes with the weights; "
            "read that code, then allow it with --set embed.trust_remote_code=true"
        )
    transformers = _import_extra(spec, "transformers")
    if spec.architecture not in _TRANSFORMERS:
        raise EncoderError(
            f"{spec.name}: '{spec.architecture}' is not a class that a row may name; "
            f"{nearest(spec.architecture, _TRANSFORMERS)}"
        )
    kind = _TRANSFORMERS[spec.architecture]
    config_class = getattr(transformers, kind.config)
    # A configuration keeps words that it does not know, and goes on with its defaults.
    unknown = spec.arguments.keys() - config_class().to_dict().keys()
    if unknown:
        raise EncoderError(f"{spec.name}: {kind.config} has no {', '.join(sorted(unknown))}; correct its arguments")
    config = config_class(**spec.arguments)
    _check_prefix(spec, kind.class_tokens + getattr(config, "num_register_tokens", 0))
    network: nn.Module = getattr(transformers, spec.architecture)(config, **kind.keywords)

    def pooled(model: nn.Module, batch: Tensor) -> Tensor:
        return _vectors(getattr(model(batch), kind.pooled))

    def tokens(model: nn.Module, batch: Tensor) -> Tensor:
        hidden: Tensor = model(batch).last_hidden_state
        return model.get_submodule(kind.last_norm)(hidden) if kind.last_norm else hidden

    return _of_row(spec, network, pooled, tokens)


def _import_extra(spec: EncoderSpec, module: str) -> Any:
    import_torchvision()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EncoderError(f"{spec.name}: needs {module}, which can't be imported ({error}); {_HUB_LINE}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# open_clip


def _build_open_clip(spec: EncoderSpec) -> EncoderNetwork:
    module = _import_extra(spec, "open_clip.model")
    arguments = dict(spec.arguments)
    normalize = arguments.pop("normalize", False)
    try:
        # Nothing is fetched, whatever a row says.
        vision = {**arguments.pop("vision_cfg"), "timm_model_pretrained": False}
        # What open_clip itself builds the picture side with; its public functions build the text side too, and for
        # some rows ask the hub for its settings.
        network: nn.Module = module._build_vision_tower(vision_cfg=vision, **arguments)
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise EncoderError(
            f"{spec.name}: open_clip can't build a picture side from {spec.arguments} "
            f"({type(error).__name__}: {_one_line(error)}); give embed_dim and vision_cfg"
        ) from error

    def pooled(model: nn.Module, batch: Tensor) -> Tensor:
        result = model(batch)
        vectors: Tensor = result[0] if isinstance(result, tuple) else result
        return functional.normalize(vectors.float(), dim=-1) if normalize else vectors

    if vision.get("attentional_pool"):
        return _of_row(spec, network, pooled, None)
    _check_prefix(spec, getattr(getattr(network, "trunk", None), "num_prefix_tokens", 1))
    return _of_row(spec, network, pooled, _open_clip_tokens)


def _open_clip_tokens(network: nn.Module, batch: Tensor) -> Tensor:
    if hasattr(network, "trunk"):
        return _timm_tokens(network.trunk, batch)  # type: ignore[arg-type]
    found = network.forward_intermediates(  # type: ignore[operator]
        batch,
        indices=1,
        normalize_intermediates=True,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    return torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)


# Networks of our own, and of their authors


def _build_torch(spec: EncoderSpec) -> EncoderNetwork:
    if spec.architecture not in OWN_NETWORKS:
        return _build_timm(spec)
    try:
        network = OWN_NETWORKS[spec.architecture](**spec.arguments)
    except TypeError as error:
        raise EncoderError(
            f"{spec.name}: {spec.architecture} can't be built with {spec.arguments} ({_one_line(error)})"
        ) from error
    return _of_timm(spec, network)


def _build_custom(spec: EncoderSpec) -> EncoderNetwork:
    if spec.architecture in OWN_NETWORKS:
        return _build_torch(spec)
    if spec.package not in _PACKAGES:
        raise EncoderError(
            f"{spec.name}: pathopipe can't build its network; {_ELSEWHERE}. {_flat(spec.access)}".rstrip()
        )
    if importlib.util.find_spec(spec.package) is None:
        raise EncoderError(
            f"{spec.name}: needs its authors' package '{spec.package}', which is not installed. {_flat(spec.access)}"
        )
    return _PACKAGES[spec.package](spec)


def _build_musk(spec: EncoderSpec) -> EncoderNetwork:
    import_torchvision()
    import timm

    importlib.import_module(f"{spec.package}.modeling")  # makes its architectures known to timm
    network: nn.Module = timm.create_model(spec.architecture)

    def pooled(model: nn.Module, batch: Tensor) -> Tensor:
        vectors: Tensor = model(image=batch, **spec.arguments)[0]
        return vectors

    return _of_row(spec, network, pooled, None)


_PACKAGES: Final[Mapping[str, Callable[[EncoderSpec], EncoderNetwork]]] = {"musk": _build_musk}


def _refuse_keras(spec: EncoderSpec) -> EncoderNetwork:
    raise EncoderError(
        f"{spec.name}: its weights are a program for TensorFlow, which can't run here; {_ELSEWHERE}. "
        f"{_flat(spec.access)}".rstrip()
    )


def _refuse_handcrafted(spec: EncoderSpec) -> EncoderNetwork:
    raise EncoderError(f"{spec.name}: is computed without a network; there is nothing to build")


def _flat(text: str) -> str:
    return " ".join(text.split())


_BUILDERS: Final[Mapping[str, Callable[[EncoderSpec], EncoderNetwork]]] = {
    "custom": _build_custom,
    "handcrafted": _refuse_handcrafted,
    "keras": _refuse_keras,
    "open_clip": _build_open_clip,
    "timm": _build_timm,
    "torch": _build_torch,
    "transformers": _build_transformers,
}
