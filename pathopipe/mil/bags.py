"""Bags: the tiles of a slide or of a patient's slides, read on demand, padded with masks, capped afresh each epoch."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathopipe.cohort import LabelTable
from pathopipe.errors import UsageError
from pathopipe.files import durable_file
from pathopipe.layouts import FEATURE_SUFFIXES
from pathopipe.mil.sources import ArraySource, FileSource, StoreSource, TilePlaces, TileSource
from pathopipe.registry import nearest

__all__ = [
    "Bag",
    "BagLoader",
    "Batch",
    "TilePlaces",
    "TileSource",
    "array_bag",
    "bag_means",
    "check_bags",
    "find_features",
    "image_folder_bag",
    "open_bags",
    "part_empty",
    "read_images",
]

_IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
# What other programs keep beside their features.
_NOT_FEATURES: Final = ("patches", "masks", "stitches", "slides", "visualization", "contours", "thumbnails")
_NOT_FEATURES_START: Final = ("slide_features", "contours", ".")
_SHOWN: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Bag:
    """The good tiles of one slide, or of a patient's slides one after another; nothing is read before :meth:`read`."""

    bag_id: str
    """Slide id, or patient id where the slides of a patient are one bag."""
    patient_id: str
    site: str
    """``""`` where not known."""
    sources: tuple[TileSource, ...]
    """One a slide."""

    @property
    def n_tiles(self) -> int:
        """Good tiles: those that are bad or not finite are left out."""
        return sum(source.n_tiles for source in self.sources)

    @property
    def left_out(self) -> int:
        """Bad tiles."""
        return sum(source.n_rows - source.n_tiles for source in self.sources)

    @property
    def features(self) -> int:
        """Numbers a tile; 0 for an empty bag whose width is not stated."""
        return max((source.features for source in self.sources), default=0)

    @property
    def encoder(self) -> str:
        """Name of the encoder; ``""`` where not stated."""
        return next((source.encoder for source in self.sources if source.encoder), "")

    @property
    def encoder_id(self) -> str:
        """Name and weights, ``name@hash``; the bare name where weights are not known."""
        return next((source.encoder_id for source in self.sources if source.encoder_id), "")

    def read(self, rows: NDArray[np.intp] | None = None) -> NDArray[np.float32]:
        """Some tiles, in the order given, or all.

        Args:
            rows: (n,) numbers among the good tiles, 0 to ``n_tiles`` - 1; may repeat.

        Returns:
            (n, features).

        Raises:
            StoreError: A chunk of a store is missing or damaged.
            UsageError: A feature file can't be read.
            IndexError: A row beyond the last tile.
        """
        out = np.empty((self.n_tiles if rows is None else len(rows), self.features), np.float32)
        self.read_into(out, rows)
        return out

    def read_into(self, out: NDArray[np.float32], rows: NDArray[np.intp] | None = None) -> None:
        """As :meth:`read`, into an array that is there: (n, features)."""
        if rows is not None and len(rows) and (rows.min() < 0 or rows.max() >= self.n_tiles):
            raise IndexError(f"{self.bag_id}: rows {rows.min()} to {rows.max()} of {self.n_tiles} tiles")
        if len(self.sources) == 1:
            self.sources[0].read_into(out, rows)
            return
        start = 0
        for source in self.sources:
            end = start + source.n_tiles
            if rows is None:
                source.read_into(out[start:end], None)
            else:
                wanted = np.flatnonzero((rows >= start) & (rows < end))
                if len(wanted):
                    part = np.empty((len(wanted), self.features), np.float32)
                    source.read_into(part, rows[wanted] - start)
                    out[wanted] = part
            start = end

    def places(self) -> list[TilePlaces]:
        """Where the tiles lie, a slide at a time, in the order of :meth:`read`."""
        return [source.places() for source in self.sources]


def array_bag(
    bag_id: str,
    values: NDArray[Any],
    *,
    patient_id: str | None = None,
    site: str = "",
    encoder: str = "",
    xy_l0: NDArray[np.int64] | None = None,
) -> Bag:
    """A bag of tiles that are in memory; rows that are not finite are left out.

    Args:
        bag_id: Its name.
        values: (tiles, features).
        patient_id: The bag's own id where left out.
        site: Where the patient was seen.
        encoder: What made the features.
        xy_l0: (tiles, 2) top-left corners in level-0 pixels.

    Raises:
        UsageError: ``values`` is not (tiles, features).
    """
    source = ArraySource.of(bag_id, values, encoder=encoder, xy_l0=xy_l0)
    return Bag(bag_id=bag_id, patient_id=bag_id if patient_id is None else patient_id, site=site, sources=(source,))


# --- finding and opening -----------------------------------------------------------------------------------------


def find_features(features: Path, *, encoder: str | None = None) -> dict[str, Path]:
    """The stores or feature files of a folder, by slide id.

    Stores are looked for in ``DIR/slides`` and ``DIR``; where there are none, feature files (``.h5``, ``.pt``,
    ``.npz``) in ``DIR`` and below, as CLAM (``h5_files``, else ``pt_files``), TRIDENT (``features_<encoder>``) and
    STAMP (``<extractor>-<hash>``) lay them out.

    Args:
        features: The folder.
        encoder: Chooses among the folders of several encoders; stores are not looked into.

    Raises:
        UsageError: No such folder, nothing in it, features of several encoders and none chosen, or one id twice.
    """
    if not features.is_dir():
        raise UsageError(f"{features}: no such folder; give the folder that holds the features")
    for folder in (features / "slides", features):
        stores = sorted(folder.glob("*.zarr")) if folder.is_dir() else []
        if stores:
            return {path.name.removesuffix(".zarr"): path for path in stores}
    by_folder = _feature_files(features)
    if not by_folder:
        raise UsageError(
            f"{features}: no features here (neither slides/<id>.zarr nor {', '.join(FEATURE_SUFFIXES)} files); "
            "give the folder that 'pathopipe run --out' or another program wrote"
        )
    return by_folder[_choose_folder(features, list(by_folder), encoder)]


def _feature_files(features: Path) -> dict[str, dict[str, Path]]:
    """Feature files by the folder right below (``""`` for the folder itself) and by id."""
    found: dict[str, dict[str, Path]] = {}
    for folder, inner, names in os.walk(features):
        inner[:] = sorted(
            name
            for name in inner
            if name not in _NOT_FEATURES and not name.startswith(_NOT_FEATURES_START) and not name.endswith(".zarr")
        )
        place = Path(folder)
        parts = place.relative_to(features).parts
        top = parts[0] if parts else ""
        # CLAM writes every slide twice; HDF5 has the coordinates and gives single rows.
        top = "h5_files" if top == "pt_files" and (features / "h5_files").is_dir() else top
        slides = found.setdefault(top, {})
        for name in sorted(
            names,
            key=lambda name: (
                (FEATURE_SUFFIXES.index(Path(name).suffix), name)
                if Path(name).suffix in FEATURE_SUFFIXES
                else (99, name)
            ),
        ):
            path = place / name
            if path.suffix not in FEATURE_SUFFIXES or name.endswith("_patches.h5"):
                continue
            other = slides.setdefault(name.removesuffix(path.suffix), path)
            # The same slide in two types of file is one slide; two of one type are two.
            if other != path and other.suffix == path.suffix:
                raise UsageError(f"{other} and {path}: one slide id twice; keep one of them, or give its folder")
    return {top: slides for top, slides in found.items() if slides}


def _choose_folder(features: Path, folders: list[str], encoder: str | None) -> str:
    if encoder is not None:
        fitting = [
            name for name in folders if name in (encoder, f"features_{encoder}") or name.startswith(f"{encoder}-")
        ]
        if len(fitting) == 1:
            return fitting[0]
        if len(fitting) > 1:
            raise UsageError(f"{features}: {', '.join(fitting)} are all of '{encoder}'; give one of these folders")
    if len(folders) == 1:
        return folders[0]
    named = [name or "." for name in folders]
    if encoder is not None:
        raise UsageError(f"{features}: no folder of the encoder '{encoder}'; {nearest(f'features_{encoder}', named)}")
    raise UsageError(f"{features}: features in several folders ({', '.join(named)}); choose one with --encoder")


def open_bags(
    features: Path,
    table: LabelTable,
    *,
    encoder: str | None = None,
    grid: str | None = None,
    by: Literal["slide", "patient"] = "slide",
    allow_incomplete: bool = False,
) -> list[Bag]:
    """The bags of a table's slides.

    Empty bags are among them (see :func:`part_empty`), so that bags and rows of the table stay side by side.

    Args:
        features: Folder of stores or feature files, as :func:`find_features` takes it.
        table: The slides; all must have features (:func:`pathopipe.cohort.join_labels` keeps those that have).
        encoder: May be left out where there is one only.
        grid: Of stores; may be left out where there is one only.
        by: One bag a slide in the order of the table, or one a patient in order of first appearance.
        allow_incomplete: Take stores whose embeddings are not complete, as far as they are computed.

    Raises:
        UsageError: Slides without features; encoders, weights, grids or widths that differ between slides; a file that
            can't be read.
        StoreError: A store is damaged or not complete.
    """
    paths = find_features(features, encoder=encoder)
    absent = [slide_id for slide_id in table.slide_ids if slide_id not in paths]
    if absent:
        raise UsageError(
            f"{features}: no features of {len(absent)} of {len(table)} slides ({_some(absent)}); "
            "compute them, or leave these slides out"
        )
    sources: list[TileSource] = []
    for slide_id in table.slide_ids:
        path = paths[slide_id]
        if path.suffix == ".zarr":
            sources.append(
                StoreSource.open(path, slide_id=slide_id, encoder=encoder, grid=grid, allow_incomplete=allow_incomplete)
            )
        else:
            sources.append(FileSource.open(path, slide_id=slide_id, encoder=encoder))
    _check_alike(sources)
    if by == "slide":
        rows = zip(table.slide_ids, table.patient_ids, table.sites, sources, strict=True)
        return [
            Bag(bag_id=name, patient_id=patient, site=site, sources=(source,)) for name, patient, site, source in rows
        ]
    slides: dict[str, list[int]] = {}
    for row, patient in enumerate(table.patient_ids):
        slides.setdefault(patient, []).append(row)
    bags = []
    for patient, numbers in slides.items():
        sites = {table.sites[row] for row in numbers}
        site = sites.pop() if len(sites) == 1 else ""
        bags.append(Bag(bag_id=patient, patient_id=patient, site=site, sources=tuple(sources[row] for row in numbers)))
    return bags


def part_empty(bags: Sequence[Bag]) -> tuple[list[Bag], list[Bag]]:
    """Bags with tiles, and bags without any."""
    return [bag for bag in bags if bag.n_tiles], [bag for bag in bags if not bag.n_tiles]


def check_bags(bags: Sequence[Bag]) -> None:
    """Make sure that there are bags, that none is empty and that their features can be compared.

    Raises:
        UsageError: They are not so; names three bags or slides.
    """
    empty = [bag.bag_id for bag in bags if not bag.n_tiles]
    if empty:
        raise UsageError(f"{len(empty)} bags hold no tile ({_some(empty)}); leave them out")
    if not bags:
        raise UsageError("no bags to read; check labels and features")
    _check_alike([source for bag in bags for source in bag.sources])


def _check_alike(sources: Sequence[TileSource]) -> None:
    """Refuse slides whose features can't be compared.

    Raises:
        UsageError: Encoders, weights, grids or widths differ; names three slides of each.
    """
    for what, kinds in (
        ("encoders", [source.encoder for source in sources]),
        ("weights of the encoder", [source.encoder_id for source in sources]),
        ("grids", [source.grid for source in sources]),
        ("widths", [str(source.features or "") for source in sources]),
    ):
        # What isn't stated contradicts nothing.
        groups: dict[str, list[str]] = {}
        for source, kind in zip(sources, kinds, strict=True):
            if kind:
                groups.setdefault(kind, []).append(source.slide_id)
        if len(groups) > 1:
            listed = "; ".join(f"{kind}: {len(ids)} ({_some(ids)})" for kind, ids in sorted(groups.items()))
            raise UsageError(f"slides differ in the {what} of their features ({listed}); make them all alike")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


# --- batches -----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Bags side by side, filled up to the largest."""

    tiles: NDArray[np.float32]
    """(B, N, D); zeros where padded."""
    real: NDArray[np.bool_]
    """(B, N), False where padded."""
    bags: NDArray[np.intp]
    """(B,) numbers of the bags in the loader's list."""
    rows: tuple[NDArray[np.intp] | None, ...]
    """For each bag the numbers of the tiles read, ascending; None: all."""


class BagLoader:
    """Padded batches of bags; a thread reads ahead while the last batch is learnt from.

    After an epoch, ``waited_s`` says how long the consumer stood still for data, ``reading_s`` how long the thread
    read, ``epoch_s`` how long it all took.
    """

    def __init__(
        self,
        bags: Sequence[Bag],
        *,
        batch_size: int = 1,
        cap: int | None = None,
        seed: int = 0,
        shuffle: bool = False,
        prefetch: int = 2,
    ) -> None:
        """Choose what batches are like.

        Args:
            bags: None of them empty, all of one width.
            batch_size: Bags a batch.
            cap: Most tiles of a bag; larger bags give a random sample, another one in each epoch. None: all tiles.
            seed: For samples and order: the same seed and epoch give the same batches.
            shuffle: Another order in each epoch.
            prefetch: Batches read ahead; 0 reads in the consumer's thread. Each costs a batch's memory.

        Raises:
            UsageError: A bag is empty, widths differ, or a number is out of range.
        """
        check_bags(bags)
        if batch_size < 1 or prefetch < 0 or (cap is not None and cap < 1):
            raise UsageError(f"batch_size {batch_size}, cap {cap}, prefetch {prefetch}: must be at least 1, 1 and 0")
        self._bags = list(bags)
        self._batch_size, self._cap, self._seed = batch_size, cap, seed
        self._shuffle, self._prefetch = shuffle, prefetch
        self.waited_s = 0.0
        self.reading_s = 0.0
        self.epoch_s = 0.0

    def __len__(self) -> int:
        return -(-len(self._bags) // self._batch_size)

    @property
    def reading_share(self) -> float:
        """Share of the last epoch's time in which the consumer waited for data."""
        return self.waited_s / self.epoch_s if self.epoch_s else 0.0

    def epoch(self, epoch: int = 0, indices: Sequence[int] | NDArray[np.intp] | None = None) -> Iterator[Batch]:
        """The batches of one epoch.

        Args:
            epoch: Its number; decides samples and order.
            indices: The bags wanted, in this order unless shuffled; may repeat. None: all.
        """
        chosen = np.arange(len(self._bags)) if indices is None else np.asarray(indices, np.intp)
        if self._shuffle:
            chosen = np.random.default_rng([self._seed, epoch]).permutation(chosen)
        parts = [chosen[start : start + self._batch_size] for start in range(0, len(chosen), self._batch_size)]
        self.waited_s = self.reading_s = self.epoch_s = 0.0
        began = time.perf_counter()
        pool = ThreadPoolExecutor(1, "bag-reader")
        ahead: deque[Future[Batch]] = deque()
        try:
            for number, part in enumerate(parts):
                asked = time.perf_counter()
                if self._prefetch:
                    while len(ahead) < self._prefetch and number + len(ahead) < len(parts):
                        ahead.append(pool.submit(self._load, parts[number + len(ahead)], epoch))
                    batch = ahead.popleft().result()
                    # The place that became free is filled before the consumer goes to work.
                    following = number + len(ahead) + 1
                    if following < len(parts):
                        ahead.append(pool.submit(self._load, parts[following], epoch))
                else:
                    batch = self._load(part, epoch)
                self.waited_s += time.perf_counter() - asked
                yield batch
                del batch
        finally:
            pool.shutdown(cancel_futures=True)
            self.epoch_s = time.perf_counter() - began

    def _load(self, part: NDArray[np.intp], epoch: int) -> Batch:
        began = time.perf_counter()
        bags = [self._bags[number] for number in part]
        rows = tuple(self._sample(int(number), bag.n_tiles, epoch) for number, bag in zip(part, bags, strict=True))
        counts = [bag.n_tiles if row is None else len(row) for bag, row in zip(bags, rows, strict=True)]
        tiles = np.empty((len(bags), max(counts), bags[0].features), np.float32)
        real = np.arange(max(counts)) < np.asarray(counts)[:, None]
        for place, (bag, row, count) in enumerate(zip(bags, rows, counts, strict=True)):
            bag.read_into(tiles[place, :count], row)
            tiles[place, count:] = 0
        self.reading_s += time.perf_counter() - began
        return Batch(tiles, real, part, rows)

    def _sample(self, number: int, n_tiles: int, epoch: int) -> NDArray[np.intp] | None:
        if self._cap is None or n_tiles <= self._cap:
            return None
        rng = np.random.default_rng([self._seed, epoch, number])
        return np.sort(rng.choice(n_tiles, self._cap, replace=False, shuffle=False))


def bag_means(bags: Sequence[Bag], *, cap: int = 2048, seed: int = 0) -> NDArray[np.float64]:
    """(bags, features) mean of each bag's tiles, or of a random sample of ``cap`` of them."""
    loader = BagLoader(bags, cap=cap, seed=seed)
    return np.stack([batch.tiles[0].mean(axis=0, dtype=np.float64) for batch in loader.epoch()])


# --- images without a slide --------------------------------------------------------------------------------------


def read_images(folder: Path) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The images of a folder in the order of their names: name and (height, width, 3) RGB.

    Raises:
        UsageError: No such folder, no image in it, or one that can't be read.
    """
    for path in _image_files(folder):
        try:
            with Image.open(path) as image:
                rgb = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UsageError(f"{path}: can't be read as an image ({error}); replace it or take it away") from error
        yield path.name, rgb


def image_folder_bag(
    folder: Path,
    compute: Callable[[Iterator[tuple[str, NDArray[np.uint8]]]], NDArray[Any]],
    *,
    bag_id: str,
    encoder: str,
    cache: Path,
    patient_id: str | None = None,
    site: str = "",
) -> Bag:
    """A bag of single images (cells of a blood smear, for example), one row an image in the order of names.

    Args:
        folder: Holds the images of this bag.
        compute: Embeds them: takes :func:`read_images` of the folder, gives (images, features).
        bag_id: Its name.
        encoder: Name of what ``compute`` applies.
        cache: ``.npz`` file that keeps the features; made anew when images or encoder change.
        patient_id: The bag's own id where left out.
        site: Where the patient was seen.

    Raises:
        UsageError: No image, one that can't be read, or another number of rows than of images.
    """
    files = _image_files(folder)
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = sha256(repr((encoder, states)).encode()).hexdigest()
    values = _cached(cache, key)
    if values is None:
        values = np.asarray(compute(read_images(folder)))
        if values.ndim != 2 or len(values) != len(files):
            raise UsageError(
                f"{folder}: features of shape {values.shape} for {len(files)} images; give one row an image"
            )
        with durable_file(cache) as file:
            np.savez(file, features=values, key=np.asarray(key), encoder=np.asarray(encoder))
    names = tuple(path.name for path in files)
    source = ArraySource.of(bag_id, values, encoder=encoder, names=names)
    return Bag(bag_id=bag_id, patient_id=bag_id if patient_id is None else patient_id, site=site, sources=(source,))


def _cached(cache: Path, key: str) -> NDArray[Any] | None:
    if not cache.is_file():
        return None
    with np.load(cache, allow_pickle=False) as file:
        return np.asarray(file["features"]) if str(file["key"]) == key else None


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give a folder of images")
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not files:
        raise UsageError(f"{folder}: no image here ({', '.join(_IMAGE_SUFFIXES)}); give a folder of images")
    return files
