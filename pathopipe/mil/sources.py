"""Where the tiles of one slide come from: a store, another program's feature file, or an array; rows read on demand."""

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import StoreError, UsageError
from pathopipe.layouts import FeatureFile, open_features
from pathopipe.records import STATUS_OK
from pathopipe.registry import nearest
from pathopipe.remote import RemotePath
from pathopipe.store import SlideStore, digest

__all__ = ["ArraySource", "FileSource", "StoreSource", "TilePlaces", "TileSource", "good_rows"]

# 4 million numbers a block, 16 MB as float32.
_BLOCK_NUMBERS: Final = 1 << 22
_CHECKSUM_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlaces:
    """Where the good tiles of one slide lie, in the order in which they are read."""

    slide_id: str
    path: Path | None
    """The store or file; None for an array."""
    grid: str | None
    """Grid of the store; None for other sources."""
    xy_l0: NDArray[np.int64] | None
    """(n, 2) top-left corners in level-0 pixels, x then y; None where not known."""
    side_l0: tuple[int, int] | None
    """Width and height of a tile in level-0 pixels; None where not known."""
    rows: NDArray[np.intp]
    """(n,) row of each good tile in its source."""
    n_rows: int
    """Rows of the source, bad ones too."""


class TileSource(Protocol):
    """The good tiles of one slide; nothing is read before it is asked for."""

    @property
    def slide_id(self) -> str:
        """Of the slide the tiles are from."""

    @property
    def path(self) -> Path | None:
        """The store or file; None for an array."""

    @property
    def encoder(self) -> str:
        """Name of the encoder; ``""`` where not known."""

    @property
    def encoder_id(self) -> str:
        """Name and weights: ``name@hash``; the bare name where weights are not known."""

    @property
    def grid(self) -> str:
        """Name of the grid; ``""`` where not known."""

    @property
    def n_rows(self) -> int:
        """Rows of the source, bad ones too."""

    @property
    def n_tiles(self) -> int:
        """Good rows."""

    @property
    def features(self) -> int:
        """Numbers a tile; 0 for an empty slide whose width is not stated."""

    def read_into(self, out: NDArray[np.float32], rows: NDArray[np.intp] | None) -> None:
        """Fill ``out`` (n, D) with the chosen good rows, in the order given; all where ``rows`` is None."""

    def places(self) -> TilePlaces:
        """Where the tiles lie."""


def good_rows(good: NDArray[np.bool_]) -> NDArray[np.intp] | None:
    """Numbers of the good rows; None where all are, which spares memory."""
    return None if good.all() else np.flatnonzero(good)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What all sources share: which rows are good."""

    slide_id: str
    path: Path | None
    encoder: str
    encoder_id: str
    grid: str
    n_rows: int
    features: int
    good: NDArray[np.intp] | None
    """Numbers of the good rows, ascending; None: all."""

    @property
    def n_tiles(self) -> int:
        return self.n_rows if self.good is None else len(self.good)

    def in_source(self, rows: NDArray[np.intp] | None) -> NDArray[np.intp] | None:
        """Numbers in the source of some good rows; None: all rows of the source."""
        if self.good is None:
            return rows
        return self.good if rows is None else self.good[rows]

    def _placed(self, xy_l0: NDArray[np.int64] | None, side_l0: tuple[int, int] | None) -> TilePlaces:
        rows = np.arange(self.n_rows) if self.good is None else self.good
        return TilePlaces(
            slide_id=self.slide_id,
            path=self.path,
            grid=self.grid or None,
            xy_l0=None if xy_l0 is None else xy_l0[rows],
            side_l0=side_l0,
            rows=rows,
            n_rows=self.n_rows,
        )


# --- an array ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySource(_Rows):
    """Tiles in memory."""

    values: NDArray[Any]
    """(rows, features)."""
    xy_l0: NDArray[np.int64] | None = None
    names: tuple[str, ...] = ()
    """Of the images that the rows came from, if any."""

    @classmethod
    def of(
        cls,
        slide_id: str,
        values: NDArray[Any],
        *,
        encoder: str = "",
        xy_l0: NDArray[np.int64] | None = None,
        names: tuple[str, ...] = (),
    ) -> "ArraySource":
        """Take an array of tiles; rows that are not finite are left out.

        Raises:
            UsageError: It is not (tiles, numbers).
        """
        if values.ndim != 2 or values.dtype.kind not in "fiu":
            raise UsageError(
                f"{slide_id}: features of shape {values.shape} and type {values.dtype}; "
                "they must be numbers, (tiles, features)"
            )
        return cls(
            slide_id=slide_id,
            path=None,
            encoder=encoder,
            encoder_id=encoder,
            grid="",
            n_rows=len(values),
            features=values.shape[1],
            good=good_rows(np.isfinite(values).all(axis=1)),
            values=values,
            xy_l0=xy_l0,
            names=names,
        )

    def read_into(self, out: NDArray[np.float32], rows: NDArray[np.intp] | None) -> None:
        """See :class:`TileSource`."""
        chosen = self.in_source(rows)
        out[:] = self.values if chosen is None else self.values[chosen]

    def places(self) -> TilePlaces:
        """See :class:`TileSource`."""
        return self._placed(self.xy_l0, None)


# --- another program's file --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource(_Rows):
    """Tiles in a feature file of another program."""

    file: FeatureFile

    @classmethod
    def open(cls, path: Path, *, slide_id: str | None = None, encoder: str | None = None) -> "FileSource":
        """Open a feature file; it is read through once for rows that are not finite, which are left out.

        Raises:
            UsageError: It can't be read, or states another encoder than the one asked for.
        """
        file = open_features(path, slide_id=slide_id)
        if encoder and file.encoder and encoder != file.encoder:
            raise UsageError(
                f"{path}: made with the encoder {file.encoder}, not {encoder}; give the folder of {encoder}"
            )
        name = file.encoder or encoder or ""
        return cls(
            slide_id=file.slide_id,
            path=path,
            encoder=name,
            encoder_id=name,
            grid="",
            n_rows=file.n_rows,
            features=file.features,
            good=good_rows(_finite(file)),
            file=file,
        )

    def read_into(self, out: NDArray[np.float32], rows: NDArray[np.intp] | None) -> None:
        """See :class:`TileSource`."""
        chosen = self.in_source(rows)
        if len(out):
            out[:] = self.file.read(chosen)

    def places(self) -> TilePlaces:
        """See :class:`TileSource`."""
        # Micrometres can't be turned into level-0 pixels without the slide's own resolution.
        known = self.file.coord_unit == "px_l0"
        xy = self.file.coordinates() if known else None
        side = round(self.file.patch_side) if known and self.file.patch_side is not None else None
        return self._placed(
            None if xy is None else np.rint(xy).astype(np.int64), None if side is None else (side, side)
        )


def _finite(file: FeatureFile) -> NDArray[np.bool_]:
    good = np.ones(file.n_rows, np.bool_)
    # Only HDF5 gives parts of a file; the others would be read whole for each block.
    parts = file.layout not in ("pt", "npz")
    step = max(1, _BLOCK_NUMBERS // max(file.features, 1)) if parts else max(file.n_rows, 1)
    for start in range(0, file.n_rows, step):
        rows = np.arange(start, min(start + step, file.n_rows))
        good[rows] = np.isfinite(file.read(rows if parts else None)).all(axis=1)
    return good


# --- a store -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSource(_Rows):
    """Tiles in a pathopipe store, read straight from its chunk files; rows whose status is not ok are left out.

    A chunk file is ``chunk_rows`` x ``features`` little-endian numbers, the last chunk filled up, and a CRC-32C.
    """

    path: Path
    chunk_rows: int
    dtype: str
    raw: bool
    """Whether chunk files are as above; else the store's own reader is used."""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        slide_id: str | None = None,
        encoder: str | None = None,
        grid: str | None = None,
        allow_incomplete: bool = False,
    ) -> "StoreSource":
        """Open the embeddings of one store.

        Args:
            path: ``DIR/slides/<slide_id>.zarr``.
            slide_id: Where it is not the folder's name.
            encoder: May be left out where the store has one only, like ``grid``.
            grid: Name of the grid.
            allow_incomplete: Take what was computed so far.

        Raises:
            StoreError: No store, no such embeddings, or they are not complete.
            UsageError: Encoder or grid must be chosen, or a name is unknown.
        """
        store = SlideStore.open(path)
        slide_id = slide_id if slide_id is not None else path.name.removesuffix(".zarr")
        grid = _choose(slide_id, "grid", grid, [name for name in store.grids() if store.encoders(name)])
        encoder = _choose(slide_id, "encoder", encoder, store.encoders(grid))
        array = store.embeddings(grid, encoder)
        about = array.attributes
        if not about.get("complete") and not allow_incomplete:
            raise StoreError(
                f"{slide_id}: {encoder} on {grid} is not complete ({len(array.done_chunks())} of {array.n_chunks} "
                f"chunks); 'pathopipe run MANIFEST --out {path.parent.parent} --encoder {encoder}' completes it",
                slide_id=slide_id,
            )
        good = array.read_status() == STATUS_OK
        if not about.get("complete"):
            done = np.zeros(array.n_chunks, np.bool_)
            done[array.done_chunks()] = True
            # The status of a chunk is there before its values are.
            good &= np.repeat(done, array.chunk_rows)[: array.rows]
        group = path / "embeddings" / grid / encoder / "values"
        identity = {key: value for key, value in _identity(about).items() if key != "precision"}
        return cls(
            slide_id=slide_id,
            path=path,
            encoder=encoder,
            encoder_id=f"{encoder}@{digest(identity)[:8]}" if identity else encoder,
            grid=grid,
            n_rows=array.rows,
            features=array.features,
            good=good_rows(good),
            chunk_rows=array.chunk_rows,
            dtype=array.dtype,
            raw=_is_raw(group),
        )

    def read_into(self, out: NDArray[np.float32], rows: NDArray[np.intp] | None) -> None:
        """See :class:`TileSource`.

        Raises:
            StoreError: A chunk is missing or has another length than it should, or holds what is not finite in good
                rows.
        """
        chosen = self.in_source(rows)
        if chosen is None:
            for chunk in range(-(-self.n_rows // self.chunk_rows)):
                start = chunk * self.chunk_rows
                part = out[start : start + self.chunk_rows]
                part[:] = self._chunk(chunk)[: len(part)]
        else:
            chunk_of = chosen // self.chunk_rows
            for chunk in np.unique(chunk_of):
                wanted = np.flatnonzero(chunk_of == chunk)
                taken = self._chunk(int(chunk))[chosen[wanted] - chunk * self.chunk_rows]
                if wanted[-1] - wanted[0] + 1 == len(wanted):
                    out[wanted[0] : wanted[-1] + 1] = taken
                else:
                    out[wanted] = taken
        # The checksum is not looked at (pathopipe verify does), but a flipped bit must not turn a training into NaN.
        if not np.isfinite(out).all():
            raise StoreError(
                f"{self.slide_id}: {self.encoder} on {self.grid} holds what is not finite in rows marked as good; "
                f"'pathopipe verify {self.path}' finds the damage",
                slide_id=self.slide_id,
            )

    def _chunk(self, chunk: int) -> NDArray[Any]:
        """(rows, features) of one chunk as stored; rows beyond the last tile may be there."""
        if not self.raw:
            rows = slice(chunk * self.chunk_rows, (chunk + 1) * self.chunk_rows)
            return SlideStore.open(self.path).embeddings(self.grid, self.encoder).read_values(rows)
        file = self.path / "embeddings" / self.grid / self.encoder / "values" / "c" / str(chunk) / "0"
        numbers = np.empty((self.chunk_rows, self.features), np.dtype(self.dtype).newbyteorder("<"))
        wanted = numbers.nbytes + _CHECKSUM_BYTES
        try:
            with (
                io.BytesIO(file.read_bytes())
                if isinstance(file, RemotePath)
                else file.open("rb", buffering=0) as handle
            ):
                length = handle.seek(0, os.SEEK_END)
                handle.seek(0)
                got = handle.readinto(numbers.view(np.uint8).data) if length == wanted else 0
        except OSError as error:
            raise StoreError(
                f"{file}: can't be read ({error.strerror}); run 'pathopipe run' again to compute this chunk",
                slide_id=self.slide_id,
            ) from error
        if got != numbers.nbytes:
            raise StoreError(
                f"{file}: {length} bytes long, {wanted} expected; delete it and run 'pathopipe run' again",
                slide_id=self.slide_id,
            )
        return numbers

    def places(self) -> TilePlaces:
        """See :class:`TileSource`."""
        grid = SlideStore.open(self.path).read_grid(self.grid)
        if len(grid) != self.n_rows:
            raise StoreError(
                f"{self.slide_id}: {len(grid)} tiles on {self.grid} beside {self.n_rows} rows of {self.encoder}; "
                "compute the embeddings anew with --fresh embed",
                slide_id=self.slide_id,
            )
        return self._placed(grid.xy_l0, grid.side_l0)


def _choose(slide_id: str, what: str, wanted: str | None, known: list[str]) -> str:
    if wanted is None and len(known) == 1:
        return known[0]
    if not known:
        raise StoreError(f"{slide_id}: no embeddings; 'pathopipe run SLIDE --out DIR' computes them", slide_id=slide_id)
    if wanted is None:
        raise UsageError(f"{slide_id}: has the {what}s {', '.join(known)}; choose one with --{what}")
    if wanted not in known:
        raise UsageError(f"{slide_id}: no {what} '{wanted}'; {nearest(wanted, known)}")
    return wanted


def _identity(about: dict[str, Any]) -> dict[str, Any]:
    """What the store says of the encoder: recipe and hash of the weights."""
    identity = about.get("inputs", {}).get("encoder", {})
    return identity if isinstance(identity, dict) else {"name": identity}


def _is_raw(group: Path) -> bool:
    """Whether an array's chunks are plain little-endian numbers with a checksum behind them."""
    metadata = json.loads((group / "zarr.json").read_bytes())
    codecs = [(codec["name"], codec.get("configuration", {})) for codec in metadata["codecs"]]
    keys = metadata.get("chunk_key_encoding", {})
    return (
        [name for name, _ in codecs] == ["bytes", "crc32c"]
        and codecs[0][1].get("endian") == "little"
        and keys.get("name") == "default"
        and keys.get("configuration", {}).get("separator", "/") == "/"
    )
