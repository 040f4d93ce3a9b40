"""The groups of a store: attributes, whole tables, damage; each object on disk is whole before it bears its name."""

import contextlib
import json
import shutil
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
from pathopipe.files import durable_file

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
    """A Zarr hierarchy on disk in which a stage counts as done when the attributes of its group hold ``inputs``."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.zarr_store = _DurableStore(self.path)

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
        if not (self.path / group / "zarr.json").exists():
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
        folder = self.path / group
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []

    def clear(self, group: str) -> None:
        """Delete a group and all in it."""
        # The metadata goes first: whatever interrupts the rest, the group no longer counts as done.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (self.path / group / "zarr.json").unlink()
        shutil.rmtree(self.path / group, ignore_errors=True)

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
        problem = self.damage(name)
        if problem is not None:
            raise StoreError(f"{self.path.stem}: {name} {problem}", slide_id=self.path.stem)
        return np.asarray(zarr.open_array(self.zarr_store, path=name, mode="r")[...])

    def damage(self, name: str) -> str | None:
        """What is wrong with an array, and what mends it; None where it can be read."""
        room = name.partition("/")[0]
        stage = room != "embeddings"
        mend = _MENDS.get(room, "compute it anew")
        try:
            array = zarr.open_array(self.zarr_store, path=name, mode="r")
            # Zarr reads a missing chunk as zeros.
            if stage and array.size and array.nchunks_initialized != array.nchunks:
                return f"lacks {array.nchunks - array.nchunks_initialized} of {array.nchunks} chunks; {mend}"
            for start in range(0, max(1, array.shape[0]), array.chunks[0]):
                array[start : start + array.chunks[0]]
        except FileNotFoundError:
            return f"is missing; {mend if stage else 'compute it anew with --fresh embed'}"
        except Exception as error:  # damage shows in a dozen ways
            kind = "fails its checksum" if "checksum" in str(error) else f"can't be read ({type(error).__name__})"
            return f"{kind}; {mend}"
        return None
