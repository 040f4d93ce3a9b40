"""The one layout of a slide's results on disk: Zarr v3, written so that a kill loses at most the chunk in hand.

Small stages (tissue, tiles) are whole or absent: the attributes of their group are written last. Chunked stages
(embeddings) grow by whole chunks: ``status`` first, ``values`` last, each through a temporary name, fsync and rename.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from pathopipe.errors import StoreChangedError, StoreError
from pathopipe.files import remove_leftovers
from pathopipe.geometry import Ragged, polygons_from_ragged, polygons_to_ragged
from pathopipe.records import ObjectTable, SlideInfo, TileGrid, Tissue
from pathopipe.store.claims import one_writer
from pathopipe.store.embeddings import EmbeddingArray
from pathopipe.store.groups import Groups, Problem
from pathopipe.store.objects import ObjectArray, write_objects
from pathopipe.store.parts import PartTable
from pathopipe.store.predictions import Predictions, read_predictions, write_predictions

__all__ = ["SCHEMA_VERSION", "SlideStore", "digest", "store_path"]

SCHEMA_VERSION = 1


def store_path(out: Path, slide_id: str) -> Path:
    """Where the store of one slide is in an output folder."""
    return out / "slides" / f"{slide_id}.zarr"


def digest(inputs: Mapping[str, Any]) -> str:
    """A short hash of a stage's inputs, for the inputs of the stages behind it."""
    return sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


class SlideStore(Groups):
    """The results of one slide."""

    @classmethod
    def open(cls, path: Path | str) -> "SlideStore":
        """Open a store that exists.

        Raises:
            StoreError: There is none, it is not pathopipe's, or a newer release wrote it.
        """
        store = cls(path)
        path = store.path
        about = store.attributes("").get("pathopipe")
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
        if not store.attributes("").get("pathopipe"):
            about = {"schema_version": SCHEMA_VERSION, "created_by": created_by, "slide": described}
            store.write_attributes("", {"pathopipe": about})
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
                    f"{path}: {change}; start this slide anew with 'pathopipe run SLIDE --fresh tissue', or choose "
                    "another --out",
                    slide_id=info.slide_id,
                )
        return store

    @property
    def slide(self) -> dict[str, Any]:
        """What the root says of the slide: id, size, mpp and its evidence, levels, bounds."""
        slide: dict[str, Any] = self.attributes("")["pathopipe"]["slide"]
        return slide

    # ---- tissue and tiles: whole or absent

    def require_inputs(self, group: str, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the stage was already computed from these very inputs.

        Raises:
            StoreChangedError: It was computed from others; the message names what differs and the ways out.
        """
        known = self.inputs(group)
        if known is None:
            return False
        self._require_same(known, inputs, group, stage)
        return True

    def _require_same(self, known: Mapping[str, Any], inputs: Mapping[str, Any], group: str, stage: str) -> None:
        if "imported" in known and not group.startswith("objects/"):
            what = "tiles of features that were" if group.startswith("tiles/") else "features that were"
            raise StoreChangedError(
                f"{self.path.stem}: {group} holds {what} imported; 'pathopipe run --fresh {stage}' forgets them and "
                "computes its own, another --out keeps both",
                slide_id=self.path.stem,
            )
        if "imported" in known:
            raise StoreChangedError(
                f"{self.path.stem}: {group} holds objects that were imported; 'pathopipe {stage} --fresh' finds them "
                "anew and forgets the corrections, another --out keeps both",
                slide_id=self.path.stem,
            )
        wanted = json.loads(json.dumps(inputs))
        if known != wanted:
            fresh = "'pathopipe segment --fresh'" if stage == "segment" else f"'pathopipe run --fresh {stage}'"
            raise StoreChangedError(
                f"{self.path.stem}: {group} was made from other inputs ({_first_difference(known, wanted)}); "
                f"compute it anew with {fresh}, or choose another --out",
                slide_id=self.path.stem,
            )

    def write_tissue(self, tissue: Tissue, inputs: Mapping[str, Any]) -> None:
        """Store mask and outlines; the attributes come last and make the stage count as done."""
        self.clear("tissue")
        ragged = polygons_to_ragged(tissue.polygons)
        self.write_table("tissue/mask", tissue.mask)
        for name, array in ragged._asdict().items():
            self.write_table(f"tissue/{name}", array)
        self.write_attributes(
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
        attributes = self.finished("tissue")
        ragged = Ragged(*(self.read_array(f"tissue/{name}") for name in Ragged._fields))
        return Tissue(
            mask=self.read_array("tissue/mask"),
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
        self.clear(group)
        self.write_table(f"{group}/xy_l0", grid.xy_l0)
        self.write_table(f"{group}/tissue_fraction", grid.tissue_fraction)
        if grid.cellularity is not None:
            self.write_table(f"{group}/cellularity", grid.cellularity)
        arrays = ("xy_l0", "tissue_fraction", "cellularity")
        scalars = {name: getattr(grid, name) for name in TileGrid.__slots__ if name not in ("name", *arrays)}
        if grid.around is None:
            del scalars["around"]
        if grid.cellularity is not None:
            # Says that the array belongs here: without it, one that was lost would not be missed.
            scalars["has_cellularity"] = True
        self.write_attributes(group, {**scalars, "inputs": inputs})

    def read_grid(self, name: str) -> TileGrid:
        """The tiles of one grid.

        Raises:
            StoreError: There is no such grid, or it is not finished.
        """
        group = f"tiles/{name}"
        attributes = self.finished(group)
        del attributes["inputs"]
        has_cellularity = attributes.pop("has_cellularity", False)
        scalars: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in attributes.items()
        }
        return TileGrid(
            name=name,
            xy_l0=self.read_array(f"{group}/xy_l0"),
            tissue_fraction=self.read_array(f"{group}/tissue_fraction"),
            cellularity=self.read_array(f"{group}/cellularity") if has_cellularity else None,
            **scalars,
        )

    def grids(self) -> list[str]:
        """Names of the finished grids."""
        return [name for name in self.children("tiles") if self.inputs(f"tiles/{name}") is not None]

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
        self.clear(group)
        chunk_rows = max(1, min(chunk_rows, rows))
        for name, shape, kind, fill in (
            ("status", (rows,), "uint8", 0),
            ("values", (rows, features), dtype, float("nan")),
        ):
            zarr.create_array(
                self.zarr_store,
                name=f"{group}/{name}",
                shape=shape,
                chunks=(chunk_rows, *shape[1:]),
                dtype=kind,
                fill_value=fill,
                # Embeddings hardly compress; the checksum finds flipped bits.
                compressors=[Crc32cCodec()],
            )
        self.write_attributes(group, {**about, "complete": False})
        return self.embeddings(grid, encoder)

    def embeddings(self, grid: str, encoder: str) -> "EmbeddingArray":
        """One encoder's embeddings on one grid.

        Raises:
            StoreError: They were not begun.
        """
        group = f"embeddings/{grid}/{encoder}"
        self.finished(group)
        return EmbeddingArray(self, group)

    def encoders(self, grid: str) -> list[str]:
        """Names of the encoders that were begun on one grid."""
        names = self.children(f"embeddings/{grid}")
        return [name for name in names if self.inputs(f"embeddings/{grid}/{name}") is not None]

    # ---- objects: parts by region, then merged; and predictions

    def layers(self) -> list[str]:
        """Names of the finished layers of objects."""
        return [name for name in self.children("objects") if self.inputs(f"objects/{name}") is not None]

    def objects(self, layer: str) -> ObjectArray:
        """The objects of one layer.

        Raises:
            StoreError: There is no such layer, or it is not finished.
        """
        return ObjectArray(self, layer)

    @contextlib.contextmanager
    def writing_objects(self) -> Iterator[None]:
        """Hold what only one process may do at a time: to write layers of objects.

        Raises:
            StoreBusyError: Another process is at it.
        """
        with one_writer(self.path.parent / f".{self.path.stem}.objects.lock", f"the objects of {self.path.stem}"):
            yield

    def imported_layers(self) -> list[str]:
        """Names of the layers that were not computed but brought in by hand."""
        return [name for name in self.layers() if "imported" in (self.inputs(f"objects/{name}") or {})]

    def imported_features(self) -> list[str]:
        """Encoders and grids of the embeddings that were not computed but brought in."""
        return [
            f"{encoder} on {grid}"
            for grid in self.grids()
            for encoder in self.encoders(grid)
            if "imported" in (self.inputs(f"embeddings/{grid}/{encoder}") or {})
        ]

    def begin_objects(self, layer: str, inputs: Mapping[str, Any], *, regions: str) -> None:
        """Make room for the parts of a layer; keeps those of an earlier try from the same inputs and regions.

        Args:
            layer: Its name.
            inputs: What it is computed from.
            regions: How the slide is cut into regions; another cut starts anew.

        Raises:
            StoreChangedError: Parts from other inputs are there.
        """
        group = f"objects/{layer}"
        begun = self.attributes(group).get("begun")
        if begun is not None:
            self._require_same(begun["inputs"], inputs, group, "segment")
            if begun["regions"] != regions:
                self.clear(group)
        self.write_attributes(group, {"begun": {"inputs": inputs, "regions": regions}})

    def parts(self, layer: str) -> PartTable:
        """What single regions found, before it is merged."""
        return PartTable(self.path / "objects" / layer / "parts")

    def write_objects(self, layer: str, tables: Iterable[ObjectTable], *, about: Mapping[str, Any]) -> int:
        """Store a layer of objects, streamed; the attributes come last and make it count as done. Parts are removed.

        Args:
            layer: Its name: ``nuclei``, ``cells``, ``glands``, ``lumina``, ``tissue_types``, or one of the user's.
            tables: Consecutive rows, with the same classes, measurements and parent layer; at least one table.
            about: ``inputs`` and what else is worth keeping; goes into the attributes.

        Returns:
            The number of objects.
        """
        return write_objects(self, layer, tables, about=about)

    def clear_objects(self, layer: str) -> None:
        """Forget a layer, finished or begun."""
        self.clear(f"objects/{layer}")

    def write_predictions(
        self,
        model: str,
        logits: NDArray[np.float32],
        attention: NDArray[np.float32] | None,
        *,
        grid: str,
        about: Mapping[str, Any],
    ) -> None:
        """Store what a model says of the slide.

        Args:
            model: Name of the model.
            logits: (K,).
            attention: (N, A), one row a tile of the grid, NaN for tiles that the model did not see; None where the
                model has none.
            grid: Name of the grid.
            about: Targets, classes, encoder, where the model came from; goes into the attributes.
        """
        write_predictions(self, model, logits, attention, grid=grid, about=about)

    def predictions(self, model: str) -> Predictions:
        """What :meth:`write_predictions` stored.

        Raises:
            StoreError: There is nothing of that model.
        """
        return read_predictions(self, model)

    def prediction_models(self) -> list[str]:
        """Names of the models whose predictions are there."""
        return [name for name in self.children("predictions") if self.inputs(f"predictions/{name}") is not None]

    # ---- housekeeping

    def clear_stage(self, stage: str, *, grid: str | None = None, encoders: tuple[str, ...] = ()) -> None:
        """Forget a stage and what depends on it: ``tissue`` everything, ``tiles`` one grid, ``embed`` its encoders."""
        if stage == "tissue":
            kept = self.imported_layers() + self.imported_features()
            if kept:
                raise StoreChangedError(
                    f"{self.path.stem}: its store holds what was imported ({', '.join(kept)}), which --fresh tissue "
                    "would throw away; choose another --out, or export them and delete the store",
                    slide_id=self.path.stem,
                )
            self.clear("")
        elif stage == "tiles":
            self.clear(f"embeddings/{grid}")
            self.clear(f"tiles/{grid}")
        else:
            for encoder in encoders:
                self.clear(f"embeddings/{grid}/{encoder}")

    def remove_leftovers(self) -> int:
        """Delete temporary files that killed processes left behind."""
        return remove_leftovers(self.path)

    def problems(self) -> Iterator[Problem]:
        """Read every array and name what is missing, damaged or contradictory; nothing where all is sound."""
        if self.inputs("tissue") is None:
            # Imported features stand on no tissue of ours.
            if self.children("tissue") or not any(
                "imported" in (self.inputs(f"tiles/{grid}") or {}) for grid in self.grids()
            ):
                yield Problem("tissue", "not finished; 'pathopipe run' computes it")
        else:
            yield from self.damaged(f"tissue/{name}" for name in ("mask", *Ragged._fields))
        layers = self.children("objects")
        for layer in layers:
            yield from self._object_problems(layer)
        for model in self.children("predictions"):
            yield from self.damaged(f"predictions/{model}/{name}" for name in self.children(f"predictions/{model}"))
        grids = self.children("tiles")
        if not grids and not layers:
            yield Problem("tiles", "none; 'pathopipe run' computes them")
        for grid in grids:
            if self.inputs(f"tiles/{grid}") is None:
                yield Problem(f"tiles/{grid}", "not finished; 'pathopipe run' computes it")
                continue
            has_cellularity = self.attributes(f"tiles/{grid}").get("has_cellularity", False)
            arrays = ("xy_l0", "tissue_fraction", *(("cellularity",) if has_cellularity else ()))
            damaged = list(self.damaged(f"tiles/{grid}/{name}" for name in arrays))
            yield from damaged
            encoders = self.children(f"embeddings/{grid}")
            if not encoders:
                yield Problem(f"embeddings/{grid}", "none; 'pathopipe run' computes them")
            for encoder in encoders:
                yield from self._embedding_problems(grid, encoder, None if damaged else len(self.read_grid(grid)))

    def _object_problems(self, layer: str) -> Iterator[Problem]:
        group = f"objects/{layer}"
        if self.inputs(group) is None:
            yield Problem(group, "not finished; 'pathopipe segment' goes on where it stopped")
            return
        damaged = list(self.damaged(f"{group}/{name}" for name in ObjectArray.COLUMNS))
        yield from damaged
        if not damaged:
            yield from self.objects(layer).problems()

    def _embedding_problems(self, grid: str, encoder: str, n_tiles: int | None) -> Iterator[Problem]:
        group = f"embeddings/{grid}/{encoder}"
        if self.inputs(group) is None:
            yield Problem(group, "not finished; 'pathopipe run' computes it")
            return
        damaged = list(self.damaged(f"{group}/{name}" for name in ("values", "status")))
        yield from damaged
        if not damaged:
            yield from self.embeddings(grid, encoder).problems(n_tiles)


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
