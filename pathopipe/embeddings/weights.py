"""Weights of networks: found on disk or on the hub, read without running code, and loaded strictly."""

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final, Literal, NoReturn

import torch
from torch import Tensor, nn

from pathopipe.embeddings.catalog import catalog
from pathopipe.embeddings.recipe import EncoderSpec
from pathopipe.errors import EncoderError

__all__ = [
    "FoundWeights",
    "find_repository",
    "find_weights",
    "hash_parameters",
    "load_weights",
    "locate_weights",
    "note_download",
    "weights_help",
]

logger = logging.getLogger("pathopipe")

_SUFFIXES: Final = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_INDEX = ".index.json"
_USUAL_FILES: Final = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin")
_OPEN_CLIP_FILES: Final = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_KEYS_SHOWN = 3
_ROWS_SHOWN = 3
_SAME_SIZE = 1e-3
"""Two networks whose numbers of parameters differ by less than this share are taken for the same."""

WeightsOption = Path | Mapping[str, Path] | None
"""``embed.weights``: one file, or a file by the name of an encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundWeights:
    """Where the weights of an encoder are."""

    path: Path
    """A file of tensors, or the index of one that comes in shards."""
    source: Literal["file", "mirror", "hub"]
    """Named by the user, found in ``embed.weights_dir``, or from the hub or what it left on this machine."""
    revision: str = ""
    """Commit of the hub repository, where it is known."""


def find_weights(spec: EncoderSpec, *, weights: WeightsOption, weights_dir: Path | None) -> FoundWeights | None:
    """Look for weights on this machine: the user's file, the mirror folder, what the hub left here.

    Raises:
        EncoderError: The file or the mirror folder that was named is not there.
    """
    if isinstance(weights, Mapping):
        weights = weights.get(spec.name, weights.get(spec.base_name))
    if weights is not None:
        return FoundWeights(path=_named_file(spec, weights), source="file")
    if weights_dir is not None:
        if not weights_dir.is_dir():
            raise EncoderError(f"{weights_dir}: no such folder; check embed.weights_dir")
        found = next((path for path in _mirror_paths(spec, weights_dir) if path.is_file()), None)
        if found is not None:
            return FoundWeights(path=found, source="mirror")
    return _find_in_cache(spec)


def find_repository(spec: EncoderSpec, *, weights: WeightsOption, weights_dir: Path | None) -> Path | None:
    """A folder with a copy of an encoder's hub repository, for those that bring their own code; None: ask the hub.

    Raises:
        EncoderError: What was named is not such a folder, or the mirror folder holds none.
    """
    if isinstance(weights, Mapping):
        weights = weights.get(spec.name, weights.get(spec.base_name))
    looked = [weights] if weights is not None else []
    if weights is None and weights_dir is not None:
        looked = [weights_dir / spec.base_name, weights_dir / spec.weights.hub]
    if not looked:
        return None
    for folder in looked:
        if (folder / "config.json").is_file():
            return folder
    raise EncoderError(
        f"{spec.name}: its code comes with its weights, so a folder with a copy of the hub repository "
        f"{spec.weights.hub} is needed; there is none at {' or '.join(map(str, looked))}"
    )


def locate_weights(
    spec: EncoderSpec, *, weights: WeightsOption, weights_dir: Path | None, download: bool = True
) -> FoundWeights:
    """Find weights on this machine, or fetch them from the hub where nothing forbids it.

    What is fetched, its licence and its gate are logged before the download starts. The hub's own login is used.

    Args:
        spec: The encoder; nothing is ever fetched for another one.
        weights: The user's file, or files by name.
        weights_dir: Mirror folder; where it is given, nothing is fetched.
        download: Whether the hub may be asked.

    Raises:
        EncoderError: There are none; the message tells the ways to get them.
    """
    found = find_weights(spec, weights=weights, weights_dir=weights_dir)
    if found is not None:
        return found
    if weights_dir is not None:
        looked = ", ".join(str(path) for path in _mirror_paths(spec, weights_dir))
        raise EncoderError(f"{spec.name}: no weights in the mirror folder; looked for {looked}\n{weights_help(spec)}")
    if not spec.weights.hub:
        raise EncoderError(f"{spec.name}: no weights, and they are not on the hub\n{weights_help(spec)}")
    if not download:
        raise EncoderError(f"{spec.name}: no weights on this machine\n{weights_help(spec)}")
    return _download(spec)


def note_download(spec: EncoderSpec, what: str, size_bytes: int | None = None) -> None:
    """Log what is about to be fetched, and on which terms."""
    size = f" ({size_bytes / 1e9:.2f} GB)" if size_bytes else ""
    terms = f"licence {spec.license or 'not stated'}, gated: {spec.gated}, commercial use: {spec.commercial}"
    logger.warning("%s: fetching %s%s; %s", spec.name, what, size, terms)


def weights_help(spec: EncoderSpec) -> str:
    """Lines that tell how to get the weights of an encoder: from the hub, as a file, from a mirror folder."""
    hub, base = spec.weights.hub, spec.base_name
    terms = f"licence {spec.license or 'not stated'}, commercial use: {spec.commercial}"
    if hub:
        gate = {"yes": "accept the terms there", "unclear": "accept the terms there if asked to", "no": ""}[spec.gated]
        steps = f"{gate}, log in by 'hf auth login', and run again" if gate else "it is open; run again with a network"
        first = f"from the hub: https://huggingface.co/{hub} ({terms}): {steps}"
    else:
        first = f"from the authors ({terms}): {spec.access or spec.paper or 'see the paper'}"
    inside = f" or {hub}/{_file_names(spec)[0]}" if hub else ""
    return "\n".join(
        (
            f"1. {first}",
            f"2. a file that you have: --set embed.weights=FILE, or --set 'embed.weights={{{base}: FILE}}'",
            f"3. a mirror folder: --set embed.weights_dir=DIR with {base}.safetensors{inside} in it",
        )
    )


def _file_names(spec: EncoderSpec) -> tuple[str, ...]:
    """Names that the weights may have in their repository, likeliest first."""
    return (spec.weights.file,) if spec.weights.file else _usual_files(spec)


def _usual_files(spec: EncoderSpec) -> tuple[str, ...]:
    return (*_OPEN_CLIP_FILES, *_USUAL_FILES) if spec.loader == "open_clip" else _USUAL_FILES


def _names_in_copy(spec: EncoderSpec) -> tuple[str, ...]:
    """Names in a copy of the repository that somebody made; it may be without the row's own file."""
    return tuple(dict.fromkeys((*_file_names(spec), *_usual_files(spec))))


def _named_file(spec: EncoderSpec, path: Path) -> Path:
    if path.is_dir():
        for name in _names_in_copy(spec):
            if (path / name).is_file():
                return path / name
        raise EncoderError(f"{path}: is a folder without {' or '.join(_names_in_copy(spec))}; name the weights file")
    if not path.is_file():
        raise EncoderError(f"{path}: no such weights file; check embed.weights")
    return path


def _mirror_paths(spec: EncoderSpec, folder: Path) -> Iterator[Path]:
    """Where weights may lie in a mirror folder, in the order they are looked for."""
    for name in dict.fromkeys((spec.name, spec.base_name)):
        for suffix in _SUFFIXES:
            yield folder / f"{name}{suffix}"
    if spec.weights.hub:
        for name in _names_in_copy(spec):
            yield folder / spec.weights.hub / name


def _find_in_cache(spec: EncoderSpec) -> FoundWeights | None:
    """What the hub's client keeps on this machine from an earlier download; no network."""
    if not spec.weights.hub:
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for name in _file_names(spec):
        kept = try_to_load_from_cache(spec.weights.hub, name, revision=spec.weights.revision or None)
        if not isinstance(kept, str):
            continue
        if name.endswith(_INDEX) and not all(path.is_file() for path in _shards(Path(kept))):
            continue  # an interrupted download
        return FoundWeights(path=Path(kept), source="hub", revision=_commit_of(Path(kept)))
    return None


def _commit_of(path: Path) -> str:
    """The commit in a path of the hub's cache: ``.../snapshots/<commit>/<file>``."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else ""


def _download(spec: EncoderSpec) -> FoundWeights:
    try:
        import huggingface_hub as hub
    except ImportError:
        raise EncoderError(
            f"{spec.name}: its weights are on the hub, and huggingface_hub is not installed: "
            f"pip install huggingface_hub\n{weights_help(spec)}"
        ) from None
    repository = spec.weights.hub
    try:
        info = hub.model_info(repository, revision=spec.weights.revision or None, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
        name = next((name for name in _file_names(spec) if name in sizes), None)
        if name is None:
            listed = ", ".join(sorted(sizes)) or "nothing"
            raise EncoderError(
                f"{spec.name}: {repository} on the hub has no {' or '.join(_file_names(spec))} (it lists {listed})\n"
                f"{weights_help(spec)}"
            )
        size = sizes[name]
        note_download(spec, f"{name} of {repository}", size if not name.endswith(_INDEX) else None)
        # By commit, so that shards are of one version even if the repository changes meanwhile.
        commit = info.sha or spec.weights.revision or None
        path = Path(hub.hf_hub_download(repository, name, revision=commit))
        if name.endswith(_INDEX):
            for shard in _shards(path):
                hub.hf_hub_download(repository, shard.relative_to(path.parent).as_posix(), revision=commit)
    except EncoderError:
        raise
    except Exception as error:  # the client's errors are of many kinds, and so are those of the network below it
        _explain_failed_download(spec, error)
    return FoundWeights(path=path, source="hub", revision=commit or _commit_of(path))


def _explain_failed_download(spec: EncoderSpec, error: Exception) -> NoReturn:
    kind = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if kind == "GatedRepoError" or status in (401, 403):
        why = "the hub lets only accounts in that have accepted the terms, and are logged in"
    elif kind in {"RepositoryNotFoundError", "RevisionNotFoundError", "RemoteEntryNotFoundError"} or status == 404:
        what = f"{spec.weights.hub} {spec.weights.revision}".strip()
        why = f"the hub has no such repository, revision or file ({what})"
    else:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        why = f"the hub can't be reached ({kind}: {first})"
    raise EncoderError(f"{spec.name}: its weights were not fetched: {why}\n{weights_help(spec)}") from error


def load_weights(network: nn.Module, spec: EncoderSpec, path: Path) -> str:
    """Load a file into a network, all keys or none; return the file's sha256.

    The row's rules are applied in this order: entry, keep, drop, strip, rename, convert. A network on the meta device
    gets tensors of its own; other networks are written to. Numbers become those of the network's own types.
    Keys of a classification head that the network does not have are passed over, for embeddings end before it; so are
    buffers that it computes by itself, and counters of batches.

    ``convert: dinov2`` renames a DINOv2 checkpoint for timm; a position grid or a patch of another size is resampled
    as timm does (bicubic with antialias). ``convert: swin-downsample`` moves each downsampling of a Swin of timm 0.5 to
    the start of the next stage and drops the tables that are computed since.

    Returns:
        Of weights in shards, the sha256 of the shards one behind the other, in the order of their names.

    Raises:
        EncoderError: The file can't be read safely, or is not of this network; the message names the keys.
    """
    state = _apply_rules(_read_tensors(path, spec.weights.entry), spec)
    if spec.weights.convert == "dinov2":
        state = _convert_dinov2(state, network, path)
    elif spec.weights.convert == "swin-downsample":
        state = _shift_downsample(state)
    wanted = network.state_dict()
    if wanted.keys() - state.keys() and type(network).__module__.startswith("transformers."):
        state = _convert_by_transformers(state, network)
    state = _without_needless(state, network, wanted)
    _check_fit(state, wanted, spec, path)
    broken = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise EncoderError(
            f"{path}: {len(broken)} of {len(state)} tensors hold numbers that are not finite ({', '.join(broken[:3])}"
            f"{', ...' if len(broken) > 3 else ''}); the file is damaged: get it again"
        )
    on_meta = any(value.is_meta for value in wanted.values())
    if on_meta:
        # Copies: a tensor of a safetensors file is the file itself, which someone may write to.
        state = {key: state.pop(key).to(wanted[key].dtype, copy=True) for key in wanted}
    network.load_state_dict(state, strict=True, assign=on_meta)
    return _hash_files(_shards(path) if path.name.endswith(_INDEX) else [path])


def hash_parameters(network: nn.Module) -> str:
    """The sha256 of all tensors of a network, with their names."""
    hasher = hashlib.sha256()
    for name, value in network.state_dict().items():
        hasher.update(name.encode())
        hasher.update(value.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _read_tensors(path: Path, entry: str) -> dict[str, Tensor]:
    """The table of tensors in a file; ``entry`` names the part of a checkpoint that holds it."""
    if path.name.endswith(_INDEX):
        return {key: value for shard in _shards(path) for key, value in _read_file(shard).items()}
    checkpoint = _read_file(path)
    if isinstance(checkpoint, dict) and not _is_table(checkpoint):
        if entry and entry not in checkpoint:
            raise EncoderError(
                f"{path}: the checkpoint has no '{entry}'; it has {', '.join(map(str, list(checkpoint)[:8]))}"
            )
        names = (entry,) if entry else ("state_dict", "model")
        checkpoint = next((checkpoint[name] for name in names if name in checkpoint), checkpoint)
    if not _is_table(checkpoint):
        raise EncoderError(f"{path}: holds no table of tensors; save model.state_dict() as .safetensors")
    return dict(checkpoint)


def _is_table(checkpoint: object) -> bool:
    return isinstance(checkpoint, dict) and all(isinstance(value, Tensor) for value in checkpoint.values())


def _read_file(path: Path) -> Any:
    """What is in a file: a table of tensors, or of a pickle whatever it holds that is no code."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, before it refuses the file
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise EncoderError(f"{path}: no such weights file; check its path") from None
    except UnpicklingError as error:
        if "weights only" not in str(error).lower():
            raise EncoderError(f"{path}: damaged ({_first_line(error)}); get it again") from error
        raise EncoderError(
            f"{path}: holds Python objects, which could run code when they are loaded, and is not opened; "
            "save its state_dict() as .safetensors where you trust it"
        ) from error
    except Exception as error:  # damaged files fail in a dozen ways, code in a pickle in one more
        raise EncoderError(
            f"{path}: damaged, or no weights file ({type(error).__name__}: {_first_line(error)}); "
            "get it again, or give .safetensors or a .pt that holds nothing but tensors"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:120]


def _shards(index: Path) -> list[Path]:
    """The files that an index names, beside it, in the order of their names."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(table.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(f"{index}: not the index of weights in shards") from error
    paths = [index.parent / name for name in names]
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise EncoderError(f"{index}: names files of other folders; shards lie beside their index")
    return paths


def _apply_rules(state: Mapping[str, Tensor], spec: EncoderSpec) -> dict[str, Tensor]:
    rules, renamed = spec.weights, {}
    for key, value in state.items():
        if (rules.keep and not key.startswith(rules.keep)) or (rules.drop and key.startswith(rules.drop)):
            continue
        name = key
        for beginning in rules.strip:
            name = name.removeprefix(beginning)
        for pattern, replacement in rules.rename.items():
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise EncoderError(f"{spec.name}: its rules make '{name}' out of two keys, '{key}' is the second one")
        renamed[name] = value
    return renamed


def _convert_dinov2(state: dict[str, Tensor], network: nn.Module, path: Path) -> dict[str, Tensor]:
    from timm.models.vision_transformer import checkpoint_filter_fn

    # timm takes a checkpoint for one of DINOv2 by its mask token, which some files leave out.
    state.setdefault("mask_token", torch.zeros(1))
    try:
        return dict(checkpoint_filter_fn(state, network))
    except (KeyError, RuntimeError, AttributeError, ValueError, IndexError) as error:
        raise EncoderError(
            f"{path}: not a DINOv2 checkpoint that timm can convert ({type(error).__name__}: {error})"
        ) from error


def _shift_downsample(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The first stage has a downsampling only where it still comes at the end of a stage.
    old = any(key.startswith("layers.0.downsample.") for key in state)
    shifted = {}
    for key, value in state.items():
        if key.endswith(("relative_position_index", "attn_mask")):
            continue
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
        shifted[name if old else key] = value
    return shifted


def _convert_by_transformers(state: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Keys as the installed transformers has them: it renames layers from version to version, and knows how."""
    from transformers.utils import logging as transformers_logging

    loud, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded, info = type(network).from_pretrained(
            None,
            config=network.config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        transformers_logging.set_verbosity(loud)
        if bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    missing = set(info["missing_keys"])
    converted = {key: value for key, value in loaded.state_dict().items() if key not in missing}
    # Filled with random numbers by now; their own shapes are what is to be told.
    converted |= {key: torch.empty(shape, device="meta") for key, shape, _ in info["mismatched_keys"]}
    return converted | {key: state[key] for key in info["unexpected_keys"] if key in state}


def _without_needless(
    state: Mapping[str, Tensor], network: nn.Module, wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    heads = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    computed = {name for name, _ in network.named_buffers()} - wanted.keys()
    kept = {
        key: value
        for key, value in state.items()
        if key in wanted or not (key in computed or (heads and key.startswith(heads)))
    }
    counters = {key for key in wanted.keys() - kept.keys() if key.endswith(".num_batches_tracked")}
    return kept | {key: torch.zeros(wanted[key].shape, dtype=wanted[key].dtype) for key in counters}


def _check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], spec: EncoderSpec, path: Path) -> None:
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    resized = [
        f"{key}: {_shape(state[key])}, not {_shape(wanted[key])}"
        for key in sorted(wanted.keys() & state.keys())
        if wanted[key].shape != state[key].shape
    ]
    if not (missing or unexpected or resized):
        return
    found = [
        f"{what} {len(keys)} ({', '.join(keys[:_KEYS_SHOWN])}{', ...' if len(keys) > _KEYS_SHOWN else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", resized))
        if keys
    ]
    alike = _rows_of_size(state, spec)
    hint = f"; it has as many parameters as {' and '.join(alike)}" if alike else ""
    raise EncoderError(f"{path}: the weights are not of this architecture ({spec.name}): keys {'; '.join(found)}{hint}")


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "one number"


def _rows_of_size(state: Mapping[str, Tensor], spec: EncoderSpec) -> list[str]:
    """Other encoders with as many parameters as a file has, nearest first."""
    n_millions = sum(value.numel() for value in state.values()) / 1e6
    apart = {
        row.name: abs(row.params_m / n_millions - 1)
        for row in catalog().values()
        if row.params_m and n_millions and row.name != spec.base_name
    }
    near = sorted((share, name) for name, share in apart.items() if share < _SAME_SIZE)
    return [name for _, name in near[:_ROWS_SHOWN]]


def _hash_files(paths: Iterable[Path]) -> str:
    hasher = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hasher.update(block)
    return hasher.hexdigest()
