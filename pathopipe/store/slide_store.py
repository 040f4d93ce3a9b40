"""The one layout of a slide's results on disk: Zarr v3, written so that a kill loses at most the chunk in hand.

Small stages (tissue, tiles) are whole or absent: the attributes of their group are written last. Chunked stages
(embeddings) grow by whole chunks: ``status`` first, ``values`` last, each through a temporary name, fsync and rename.
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from pathopipe.errors import StoreChangedError, StoreError
from pathopipe.files import durable_file, remove_leftovers
from pathopipe.geometry import Ragged, polygons_from_ragged, polygons_to_ragged
from pathopipe.records import SlideInfo, TileGrid, Tissue

__all__ = ["SCHEMA_VERSION", "STAGES", "EmbeddingArray", "Problem", "SlideStore", "digest", "store_path"]

SCHEMA_VERSION = 1
STAGES = ("tissue", "tiles", "embed")
"""The stages of a slide in the order in which they depend on one another."""

_CHECKSUM_BYTES = 4
_TABLE_ROWS = 65_536


def store_path(out: Path, slide_id: str) -> Path:
    """Where the store of one slide is in an output folder."""
    return out / "slides" / f"{slide_id}.zarr"


def digest(inputs: Mapping[str, Any]) -> str:
    """A short hash of a stage's inputs, for the inputs of the stages behind it."""
    return sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


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


class SlideStore:
    """The results of one slide."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._zarr = _DurableStore(self.path)

    @classmethod
    def open(cls, path: Path | str) -> "SlideStore":
        """Open a store that exists.

        Raises:
            StoreError: There is none, it is not pathopipe's, or a newer release wrote it.
        """
        store = cls(path)
        path = store.path
        about = store._attributes("").get("pathopipe")
        if about is None:
            what = (
                "no pathopipe store here" if not path.exists() else "not a pathopipe store (no 'pathopipe' attribute)"
            )
            raise StoreError(f"{path}: {what}; run 'pathopipe run SLIDE --out DIR' first", slide_id=path.stem)
        if about["schema_version"] > SCHEMA_VERSION:
            raise StoreError(
                f"{path}: written in layout {about['schema_version']}, this release reads up to {SCHEMA_VERSION}; "
                "install a newer pathopipe",
                slide_id=path.stem,
            )
        return store

    @classmethod
    def create_or_open(cls, path: Path, info: SlideInfo, *, created_by: str) -> "SlideStore":
        """Open the store of a slide, making it where there is none.

        Raises:
            StoreChangedError: The store was made from another file, or with another resolution.
        """
        described = _describe_slide(info)
        store = cls(path)
        if not store._attributes("").get("pathopipe"):
            about = {"schema_version": SCHEMA_VERSION, "created_by": created_by, "slide": described}
            store._write_attributes("", {"pathopipe": about})
            return store
        store = cls.open(path)
        known = store.slide
        changes = (
            ("fingerprint", "made from another file than the present one"),
            ("mpp", f"made at {known['mpp']} um/px, the slide is now taken for {described['mpp']}"),
        )
        for key, change in changes:
            if known[key] != described[key]:
                raise StoreChangedError(
                    f"{path}: {change}; start this slide anew with --fresh tissue, or choose another --out",
                    slide_id=info.slide_id,
                )
        return store

    @property
    def slide(self) -> dict[str, Any]:
        """What the root says of the slide: id, size, mpp and its evidence, levels, bounds."""
        slide: dict[str, Any] = self._attributes("")["pathopipe"]["slide"]
        return slide

    # ---- tissue and tiles: whole or absent

    def inputs(self, group: str) -> dict[str, Any] | None:
        """What a stage's group was computed from, or None where the stage is not finished."""
        inputs: dict[str, Any] | None = self._attributes(group).get("inputs")
        return inputs

    def require_inputs(self, group: str, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the stage was already computed from these very inputs.

        Raises:
            StoreChangedError: It was computed from others; the message names what differs and the ways out.
        """
        known = self.inputs(group)
        if known is None:
            return False
        wanted = json.loads(json.dumps(inputs))
        if known != wanted:
            raise StoreChangedError(
                f"{self.path.stem}: {group} was made from other inputs ({_first_difference(known, wanted)}); "
                f"compute it anew with --fresh {stage}, or choose another --out",
                slide_id=self.path.stem,
            )
        return True

    def write_tissue(self, tissue: Tissue, inputs: Mapping[str, Any]) -> None:
        """Store mask and outlines; the attributes come last and make the stage count as done."""
        self._clear("tissue")
        ragged = polygons_to_ragged(tissue.polygons)
        self._write_table("tissue/mask", tissue.mask)
        for name, array in ragged._asdict().items():
            self._write_table(f"tissue/{name}", array)
        self._write_attributes(
            "tissue",
            {
                "mpp": tissue.mpp,
                "areas_mm2": tissue.areas_mm2,
                "flags": tissue.flags,
                "method": tissue.method,
                "unreadable_share": tissue.unreadable_share,
                "inputs": inputs,
            },
        )

    def read_tissue(self) -> Tissue:
        """The tissue as it was stored.

        Raises:
            StoreError: The stage is not finished.
        """
        attributes = self._finished("tissue")
        ragged = Ragged(*(self._read(f"tissue/{name}") for name in Ragged._fields))
        return Tissue(
            mask=self._read("tissue/mask"),
            mpp=(attributes["mpp"][0], attributes["mpp"][1]),
            polygons=tuple(polygons_from_ragged(ragged)),
            areas_mm2=tuple(attributes["areas_mm2"]),
            flags=tuple(attributes["flags"]),
            method=attributes["method"],
            unreadable_share=attributes.get("unreadable_share", 0.0),
        )

    def write_grid(self, grid: TileGrid, inputs: Mapping[str, Any]) -> None:
        """Store the tiles of one grid under ``tiles/<name>``."""
        group = f"tiles/{grid.name}"
        self._clear(group)
        self._write_table(f"{group}/xy_l0", grid.xy_l0)
        self._write_table(f"{group}/tissue_fraction", grid.tissue_fraction)
        scalars = {
            name: getattr(grid, name) for name in TileGrid.__slots__ if name not in ("name", "xy_l0", "tissue_fraction")
        }
        self._write_attributes(group, {**scalars, "inputs": inputs})

    def read_grid(self, name: str) -> TileGrid:
        """The tiles of one grid.

        Raises:
            StoreError: There is no such grid, or it is not finished.
        """
        group = f"tiles/{name}"
        attributes = self._finished(group)
        del attributes["inputs"]
        scalars: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in attributes.items()
        }
        return TileGrid(
            name=name,
            xy_l0=self._read(f"{group}/xy_l0"),
            tissue_fraction=self._read(f"{group}/tissue_fraction"),
            **scalars,
        )

    def grids(self) -> list[str]:
        """Names of the finished grids."""
        return [name for name in self._children("tiles") if self.inputs(f"tiles/{name}") is not None]

    # ---- embeddings: chunk by chunk

    def create_embeddings(
        self,
        grid: str,
        encoder: str,
        *,
        rows: int,
        features: int,
        dtype: str,
        chunk_rows: int,
        about: Mapping[str, Any],
    ) -> "EmbeddingArray":
        """Make the empty arrays of one encoder on one grid; ``about`` holds its inputs and its recipe."""
        group = f"embeddings/{grid}/{encoder}"
        self._clear(group)
        chunk_rows = max(1, min(chunk_rows, rows))
        for name, shape, kind, fill in (
            ("status", (rows,), "uint8", 0),
            ("values", (rows, features), dtype, float("nan")),
        ):
            zarr.create_array(
                self._zarr,
                name=f"{group}/{name}",
                shape=shape,
                chunks=(chunk_rows, *shape[1:]),
                dtype=kind,
                fill_value=fill,
                # Embeddings hardly compress; the checksum finds flipped bits.
                compressors=[Crc32cCodec()],
            )
        self._write_attributes(group, {**about, "complete": False})
        return self.embeddings(grid, encoder)

    def embeddings(self, grid: str, encoder: str) -> "EmbeddingArray":
        """One encoder's embeddings on one grid.

        Raises:
            StoreError: They were not begun.
        """
        group = f"embeddings/{grid}/{encoder}"
        self._finished(group)
        return EmbeddingArray(self, group)

    def encoders(self, grid: str) -> list[str]:
        """Names of the encoders that were begun on one grid."""
        names = self._children(f"embeddings/{grid}")
        return [name for name in names if self.inputs(f"embeddings/{grid}/{name}") is not None]

    # ---- housekeeping

    def clear_stage(self, stage: str, *, grid: str | None = None, encoders: tuple[str, ...] = ()) -> None:
        """Forget a stage and what depends on it: ``tissue`` everything, ``tiles`` one grid, ``embed`` its encoders."""
        if stage == "tissue":
            self._clear("")
        elif stage == "tiles":
            self._clear(f"embeddings/{grid}")
            self._clear(f"tiles/{grid}")
        else:
            for encoder in encoders:
                self._clear(f"embeddings/{grid}/{encoder}")

    def remove_leftovers(self) -> int:
        """Delete temporary files that killed processes left behind."""
        return remove_leftovers(self.path)

    def problems(self) -> Iterator[Problem]:
        """Read every array and name what is missing, damaged or contradictory; nothing where all is sound."""
        if self.inputs("tissue") is None:
            yield Problem("tissue", "not finished; 'pathopipe run' computes it")
        else:
            yield from self._damaged(f"tissue/{name}" for name in ("mask", *Ragged._fields))
        grids = self._children("tiles")
        if not grids:
            yield Problem("tiles", "none; 'pathopipe run' computes them")
        for grid in grids:
            if self.inputs(f"tiles/{grid}") is None:
                yield Problem(f"tiles/{grid}", "not finished; 'pathopipe run' computes it")
                continue
            damaged = list(self._damaged(f"tiles/{grid}/{name}" for name in ("xy_l0", "tissue_fraction")))
            yield from damaged
            encoders = self._children(f"embeddings/{grid}")
            if not encoders:
                yield Problem(f"embeddings/{grid}", "none; 'pathopipe run' computes them")
            for encoder in encoders:
                yield from self._embedding_problems(grid, encoder, None if damaged else len(self.read_grid(grid)))

    def _damaged(self, names: Iterable[str]) -> Iterator[Problem]:
        for name in names:
            problem = self._damage(name)
            if problem is not None:
                yield Problem(name, problem)

    def _embedding_problems(self, grid: str, encoder: str, n_tiles: int | None) -> Iterator[Problem]:
        group = f"embeddings/{grid}/{encoder}"
        if self.inputs(group) is None:
            yield Problem(group, "not finished; 'pathopipe run' computes it")
            return
        damaged = list(self._damaged(f"{group}/{name}" for name in ("values", "status")))
        yield from damaged
        if not damaged:
            yield from self.embeddings(grid, encoder).problems(n_tiles)

    def _attributes(self, group: str) -> dict[str, Any]:
        try:
            metadata = json.loads((self.path / group / "zarr.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except ValueError as error:
            raise StoreError(
                f"{self.path / group / 'zarr.json'}: not valid JSON ({error}); delete this store and run again",
                slide_id=self.path.stem,
            ) from error
        attributes: dict[str, Any] = metadata.get("attributes", {})
        return attributes

    def _write_attributes(self, group: str, attributes: Mapping[str, Any]) -> None:
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

    def _finished(self, group: str) -> dict[str, Any]:
        attributes = self._attributes(group)
        if "inputs" not in attributes:
            raise StoreError(
                f"{self.path.stem}: {group} is not there; 'pathopipe run' computes it", slide_id=self.path.stem
            )
        return attributes

    def _children(self, group: str) -> list[str]:
        folder = self.path / group
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []

    def _clear(self, group: str) -> None:
        # The metadata goes first: whatever interrupts the rest, the group no longer counts as done.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (self.path / group / "zarr.json").unlink()
        shutil.rmtree(self.path / group, ignore_errors=True)

    def _write_table(self, name: str, array: NDArray[Any]) -> None:
        # Bytes of masks and outlines repeat, so they are compressed; zstd alone would miss a flipped bit.
        chunks = (max(1, min(len(array), _TABLE_ROWS)), *(max(1, side) for side in array.shape[1:]))
        stored = zarr.create_array(
            self._zarr,
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

    def _read(self, name: str) -> NDArray[Any]:
        problem = self._damage(name)
        if problem is not None:
            raise StoreError(f"{self.path.stem}: {name} {problem}", slide_id=self.path.stem)
        return np.asarray(zarr.open_array(self._zarr, path=name, mode="r")[...])

    def _damage(self, name: str) -> str | None:
        """What is wrong with an array, and what mends it; None where it can be read."""
        stage = {"tissue": "tissue", "tiles": "tiles"}.get(name.partition("/")[0])
        mend = f"compute it anew with --fresh {stage}" if stage else "compute the chunks concerned with --retry-bad"
        try:
            array = zarr.open_array(self._zarr, path=name, mode="r")
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


class EmbeddingArray:
    """The embeddings of one encoder on one grid: rows in grid order, complete chunk by chunk."""

    def __init__(self, store: SlideStore, group: str) -> None:
        self._group = group
        self._store = store
        for name in ("values", "status"):
            if not (store.path / group / name / "zarr.json").exists():
                raise StoreError(f"{store.path.stem}: {group}/{name} is missing; compute it anew with --fresh embed")
        # Zarr keeps this setting in memory only: without it a chunk of nothing but NaN would never be there.
        with zarr.config.set({"array.write_empty_chunks": True}):
            self._values = zarr.open_array(store._zarr, path=f"{group}/values", mode="r+")
            self._status = zarr.open_array(store._zarr, path=f"{group}/status", mode="r+")

    @property
    def rows(self) -> int:
        """Number of tiles."""
        return int(self._values.shape[0])

    @property
    def features(self) -> int:
        """Numbers a tile."""
        return int(self._values.shape[1])

    @property
    def dtype(self) -> str:
        """Type of the stored numbers."""
        return str(self._values.dtype)

    @property
    def chunk_rows(self) -> int:
        """Tiles a chunk; the last chunk may hold fewer."""
        return int(self._values.chunks[0])

    @property
    def n_chunks(self) -> int:
        """Number of chunks."""
        return -(-self.rows // self.chunk_rows)

    @property
    def attributes(self) -> dict[str, Any]:
        """Inputs, recipe, and after the end ``complete``, bad tiles and timings."""
        return self._store._attributes(self._group)

    def chunk_slice(self, chunk: int) -> slice:
        """The rows of one chunk."""
        return slice(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.rows))

    def done_chunks(self) -> list[int]:
        """The chunks whose ``values`` object is there with its exact length; nothing else says so."""
        length = self.chunk_rows * self.features * self._values.dtype.itemsize + _CHECKSUM_BYTES
        folder = self._store.path / self._group / "values" / "c"
        return [chunk for chunk in range(self.n_chunks) if _size_bytes(folder / str(chunk) / "0") == length]

    def bad_chunks(self) -> list[int]:
        """Done chunks that hold a row whose status is not ok, or that can't be read back."""
        return [chunk for chunk in self.done_chunks() if not self._is_good(chunk)]

    def _is_good(self, chunk: int) -> bool:
        rows = self.chunk_slice(chunk)
        try:
            np.asarray(self._values[rows])
            return bool((np.asarray(self._status[rows]) == 1).all())
        except (ValueError, OSError):
            return False

    def write_chunk(self, chunk: int, values: NDArray[Any], status: NDArray[np.uint8]) -> None:
        """Store one chunk. ``values`` goes last, for its presence means that the chunk is done.

        Args:
            chunk: Its index.
            values: (rows of the chunk, features), NaN in rows whose status is not ok.
            status: (rows of the chunk,) as in ``records``.
        """
        rows = self.chunk_slice(chunk)
        folder = self._store.path / self._group / "values" / "c"
        # A chunk that is computed again must not look done while its new status stands beside its old values.
        (folder / str(chunk) / "0").unlink(missing_ok=True)
        self._status[rows] = status
        self._values[rows] = values

    def read_values(self, rows: slice = slice(None)) -> NDArray[Any]:
        """(rows, features) float; NaN where a tile is bad or not computed."""
        return np.asarray(self._values[rows])

    def read_status(self) -> NDArray[np.uint8]:
        """(N,) status of every tile: 0 not computed, 1 ok, 2 unreadable, 3 not finite, 4 overflow."""
        return np.asarray(self._status[:])

    def finish(self, **report: Any) -> None:
        """Write ``complete`` and the report (bad tiles, seconds) into the group's attributes.

        Raises:
            StoreError: A chunk is missing.
        """
        missing = self.n_chunks - len(self.done_chunks())
        if missing:
            raise StoreError(
                f"{self._store.path.stem}: {self._group} lacks {missing} of {self.n_chunks} chunks; run again"
            )
        self._store._write_attributes(self._group, {**self.attributes, **report, "complete": True})

    def problems(self, rows_expected: int | None) -> Iterator[Problem]:
        """What is missing or contradictory; unreadable chunks are found by :meth:`SlideStore.problems`."""
        if rows_expected is not None and self.rows != rows_expected:
            yield Problem(self._group, f"has {self.rows} rows for {rows_expected} tiles")
        missing = sorted(set(range(self.n_chunks)) - set(self.done_chunks()))
        if missing:
            named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            yield Problem(
                self._group, f"lacks {len(missing)} of {self.n_chunks} chunks ({named}); run again to compute them"
            )
            return
        if not self.attributes.get("complete"):
            yield Problem(self._group, "all chunks are there, but the stage was not closed; run again to close it")
        for chunk in range(self.n_chunks):
            with contextlib.suppress(ValueError, OSError):
                rows = self.chunk_slice(chunk)
                finite = np.isfinite(np.asarray(self._values[rows])).all(axis=1)
                ok = np.asarray(self._status[rows]) == 1
                if (finite != ok).any():
                    yield Problem(
                        self._group,
                        f"chunk {chunk}: status and values contradict each other; compute it again with --retry-bad",
                    )


def _describe_slide(info: SlideInfo) -> dict[str, Any]:
    described = {
        "id": info.slide_id,
        "size_bytes": info.size_bytes,
        "fingerprint": info.fingerprint,
        "dims_l0": info.dims_l0,
        "mpp": info.mpp,
        "mpp_evidence": [asdict(evidence) for evidence in info.mpp_evidence],
        "vendor": info.vendor,
        "reader": info.reader,
        "bounds_l0": info.bounds_l0,
        "levels": [asdict(level) for level in info.levels],
        "problems": info.problems,
    }
    # As it reads back: tuples become lists.
    reread: dict[str, Any] = json.loads(json.dumps(described))
    return reread


def _first_difference(known: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    for key in sorted({*known, *wanted}):
        old, new = known.get(key), wanted.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            return _first_difference(old, new, f"{prefix}{key}.")
        return f"{prefix}{key} was {old}, now {new}"
    return "no difference found"


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1
