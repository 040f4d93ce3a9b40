"""The groups of a store: attributes, whole tables, damage; each object on disk is whole before it bears its name."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from pathopipe.errors import StoreError
from pathopipe.files import durable_file, listing, remove_tree
from pathopipe.remote import RemotePath, location
from pathopipe.store.object_store import RemoteStore

__all__ = ["Groups", "Problem"]

_TABLE_ROWS = 65_536

_COMMANDS = {"objects": "segment", "predictions": "mil predict"}

_MENDS = {
    "tissue": "compute it anew with 'pathopipe run --fresh tissue'",
    "tiles": "compute it anew with 'pathopipe run --fresh tiles'",
    "embeddings": "compute the chunks concerned with --retry-bad",
    "objects": "compute the layer anew with 'pathopipe segment --fresh', or import it again",
    "predictions": "predict anew with 'pathopipe mil predict'",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that :meth:`SlideStore.problems` found wrong."""

    where: str
    """Group or array inside the store."""
    what: str


class _DurableStore(LocalStore):
    """A local store whose objects are on disk, whole, before they bear their name."""

    async def _set(self, key: str, value: Buffer, exclusive: bool = False) -> None:
        # Zarr asks for "only if absent" when it makes sure that parent groups exist.
        if not (exclusive and (self.root / key).exists()):
            self.set_sync(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        with durable_file(self.root / key) as file:
            file.write(value.as_buffer_like())


class Groups:
    """A Zarr hierarchy in which a stage counts as done when the attributes of its group hold ``inputs``.

    Args:
        path: Its folder, on disk or in a bucket.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = location(path)
        self.zarr_store = RemoteStore(self.path) if isinstance(self.path, RemotePath) else _DurableStore(self.path)

    def inputs(self, group: str) -> dict[str, Any] | None:
        """What a stage's group was computed from, or None where the stage is not finished."""
        inputs: dict[str, Any] | None = self.attributes(group).get("inputs")
        return inputs

    def damaged(self, names: Iterable[str]) -> Iterator[Problem]:
        """Those of some arrays that can't be read."""
        for name in names:
            problem = self.damage(name)
            if problem is not None:
                yield Problem(name, problem)

    def attributes(self, group: str) -> dict[str, Any]:
        """The attributes of a group; empty where there is no such group."""
        try:
            metadata = json.loads((self.path / group / "zarr.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise StoreError(
                f"{self.path / group}: can't be read ({error.strerror or error}); run the same command again when that "
                "is mended",
                slide_id=self.path.stem,
            ) from error
        except ValueError as error:
            raise StoreError(
                f"{self.path / group / 'zarr.json'}: not valid JSON ({error}); delete {self.path / group} and run "
                "again",
                slide_id=self.path.stem,
            ) from error
        attributes: dict[str, Any] = metadata.get("attributes", {})
        return attributes

    def write_attributes(self, group: str, attributes: Mapping[str, Any]) -> None:
        """Replace the attributes of a group, making it and the groups above it where they are missing."""
        parts = group.split("/") if group else []
        # A plain Zarr reader walks down from the root, so every group on the way needs its own metadata.
        for depth in range(1 if parts else 0, len(parts)):
            self._ensure_group("/".join(parts[:depth]))
        self._write_group(group, attributes)

    def _ensure_group(self, group: str) -> None:
        if not (self.path / group / "zarr.json").is_file():
            self._write_group(group, {})

    def _write_group(self, group: str, attributes: Mapping[str, Any]) -> None:
        metadata = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        with durable_file(self.path / group / "zarr.json") as file:
            file.write(json.dumps(metadata, indent=2, allow_nan=False).encode())

    def finished(self, group: str) -> dict[str, Any]:
        """The attributes of a finished stage; StoreError where it is not finished."""
        attributes = self.attributes(group)
        if "inputs" not in attributes:
            command = _COMMANDS.get(group.partition("/")[0], "run")
            raise StoreError(
                f"{self.path.stem}: {group} is not there; 'pathopipe {command}' computes it", slide_id=self.path.stem
            )
        return attributes

    def children(self, group: str) -> list[str]:
        """Names of the groups and arrays in a group."""
        return listing(self.path / group)[0]

    def clear(self, group: str) -> None:
        """Delete a group and all in it."""
        # The metadata goes first: whatever interrupts the rest, the group no longer counts as done.
        if isinstance(self.zarr_store, RemoteStore):
            self.zarr_store.forget()
        remove_tree(self.path / group, first="zarr.json")

    def write_table(self, name: str, array: NDArray[Any]) -> None:
        """Store one array whole."""
        # Bytes of masks and outlines repeat, so they are compressed; zstd alone would miss a flipped bit.
        chunks = (max(1, min(len(array), _TABLE_ROWS)), *(max(1, side) for side in array.shape[1:]))
        stored = zarr.create_array(
            self.zarr_store,
            name=name,
            shape=array.shape,
            chunks=chunks,
            dtype=array.dtype,
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            # A chunk of zeros must be there too: one that is missing is damage.
            config={"write_empty_chunks": True},
        )
        if array.size:
            stored[...] = array

    def read_array(self, name: str) -> NDArray[Any]:
        """One array; StoreError where it is damaged."""
        found = self._read(name, keep=True)
        if isinstance(found, str):
            raise StoreError(f"{self.path.stem}: {name} {found}", slide_id=self.path.stem)
        return found

    def damage(self, name: str) -> str | None:
        """What is wrong with an array, and what mends it; None where it can be read."""
        found = self._read(name, keep=False)
        return found if isinstance(found, str) else None

    def _read(self, name: str, *, keep: bool) -> NDArray[Any] | str:
        """An array, or what is wrong with it; without ``keep`` nothing of it, but all of it was read."""
        room = name.partition("/")[0]
        stage = room != "embeddings"
        mend = _MENDS.get(room, "compute it anew")
        try:
            array = zarr.open_array(self.zarr_store, path=name, mode="r", zarr_format=3)
            # Zarr reads a missing chunk as zeros.
            if stage and array.size and array.nchunks_initialized != array.nchunks:
                return f"lacks {array.nchunks - array.nchunks_initialized} of {array.nchunks} chunks; {mend}"
            if keep:
                return np.asarray(array[...])
            for start in range(0, max(1, array.shape[0]), array.chunks[0]):
                array[start : start + array.chunks[0]]
        except FileNotFoundError:
            return f"is missing; {mend if stage else 'compute it anew with --fresh embed'}"
        except StoreError:  # the way there is broken, not the array
            raise
        except Exception as error:  # damage shows in a dozen ways
            kind = "fails its checksum" if "checksum" in str(error) else f"can't be read ({type(error).__name__})"
            return f"{kind}; {mend}"
        return np.empty(0)
