"""What networks are fed with: bags, reports as vectors and table rows of slides, side by side, in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray

from pathopipe.cohort import is_missing
from pathopipe.errors import UsageError
from pathopipe.metadata.cases import Case, MetadataCohort
from pathopipe.metadata.network import MODALITIES, SlideBatch
from pathopipe.metadata.table import TableEncoder
from pathopipe.metadata.text import TextEncoder
from pathopipe.mil.bags import Bag, BagLoader

__all__ = ["Inputs", "Preparation", "slide_batches", "whole_batches"]

_TILES_AT_ONCE: Final = 65536
_SLIDES_AT_ONCE: Final = 64
_NUMBERS_READ_AHEAD: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a network is fed with: n slides, side by side."""

    bags: tuple[Bag | None, ...]
    text: NDArray[np.float32]
    """(n, T); zeros without a report; T is 0 without a text branch."""
    table: NDArray[np.float32]
    """(n, C)."""
    present: NDArray[np.bool_]
    """(n, 3): image, text, table."""
    patient: NDArray[np.intp]
    """(n,) number of the patient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What turns a cohort into inputs, fitted on training slides alone."""

    tile_features: int
    """Width of a tile; 0 for no image branch."""
    text: TextEncoder | None
    table: TableEncoder | None
    table_columns: tuple[str, ...]

    @classmethod
    def fit(cls, cohort: MetadataCohort, rows: NDArray[np.intp], text: TextEncoder) -> "Preparation":
        """Learn vocabulary, columns and scales from the slides ``rows``, and from no other.

        Args:
            cohort: All slides.
            rows: Those of the training part.
            text: What turns reports into vectors, not fitted yet.
        """
        cases = [cohort.cases[int(row)] for row in rows]
        bags = [case.bag for case in cases if case.bag is not None]
        # Slides of a patient share a report; it counts once.
        texts = list(dict.fromkeys(case.text for case in cases if case.text))
        tabled = [case.row for case in cases if _has_table(case, cohort.table_columns)]
        return cls(
            tile_features=bags[0].features if bags else 0,
            text=text.fit(texts) if len(texts) > 1 else None,
            table=TableEncoder().fit(tabled, cohort.table_columns) if tabled else None,
            table_columns=cohort.table_columns,
        )

    def inputs(self, cohort: MetadataCohort) -> Inputs:
        """The slides of a cohort as a network takes them; what the model has no branch for counts as absent.

        Raises:
            UsageError: A report or a table row gives numbers that are not finite.
        """
        n = len(cohort.cases)
        present = np.zeros((n, len(MODALITIES)), bool)
        text = np.zeros((n, self.text.width if self.text else 0), np.float32)
        table = np.zeros((n, self.table.width if self.table else 0), np.float32)
        bags = tuple(case.bag if self.tile_features else None for case in cohort.cases)
        present[:, 0] = [bag is not None and bag.n_tiles > 0 for bag in bags]
        if self.text is not None:
            rows = [row for row, case in enumerate(cohort.cases) if case.text]
            distinct = {words: number for number, words in enumerate(dict.fromkeys(cohort.cases[r].text for r in rows))}
            if distinct:
                vectors = self.text.transform(cast("list[str]", list(distinct)))
                text[rows] = vectors[[distinct[cohort.cases[row].text] for row in rows]]
            present[rows, 1] = True
        if self.table is not None:
            rows = [row for row, case in enumerate(cohort.cases) if _has_table(case, self.table_columns)]
            if rows:
                table[rows] = self.table.transform([cohort.cases[row].row for row in rows])
            present[rows, 2] = True
        for values, what in ((text, "report"), (table, "table row")):
            odd = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(odd):
                raise UsageError(
                    f"{cohort.cases[int(odd[0])].slide_id}: its {what} gives numbers that are not finite "
                    f"({len(odd)} such slides); correct it, or leave it out"
                )
        patient = np.unique(np.asarray([case.patient_id for case in cohort.cases]), return_inverse=True)[1]
        return Inputs(bags=bags, text=text, table=table, present=present, patient=patient.astype(np.intp))


def _has_table(case: Case, columns: Sequence[str]) -> bool:
    return any(not is_missing(case.row.get(name, "")) for name in columns)


def slide_batches(
    inputs: Inputs,
    rows: NDArray[np.intp],
    *,
    size: int,
    cap: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[NDArray[np.intp], SlideBatch]]:
    """Batches of about ``size`` slides, those with an image spread evenly over them; tiles are read ahead.

    Args:
        inputs: All slides.
        rows: Those wanted; each has a modality.
        size: Slides a batch, at most.
        cap: Most tiles of a slide, drawn afresh each epoch; None: all.
        seed: With the epoch it decides order and samples.
        epoch: Its number.
        shuffle: Another order in each epoch.
        device: Where the tensors go.

    Yields:
        The rows of the batch, those with an image first, and what the network takes.
    """
    if shuffle:
        rows = np.random.default_rng([seed, epoch]).permutation(rows)
    there = inputs.present[rows, 0]
    with_image, rest = rows[there], rows[~there]
    n_batches = -(-len(rows) // size)
    if not n_batches:
        return
    images: Iterator[Any] = iter(())
    bags: list[Bag] = []
    if len(with_image):
        bags = [cast(Bag, inputs.bags[int(row)]) for row in with_image]
        at_once = -(-len(with_image) // n_batches)
        largest = max(bag.n_tiles for bag in bags)
        # Small batches are read sooner than handed from thread to thread.
        ahead = 2 if at_once * min(largest, cap or largest) * bags[0].features > _NUMBERS_READ_AHEAD else 0
        images = BagLoader(bags, batch_size=at_once, cap=cap, seed=seed, prefetch=ahead).epoch(epoch)
    for batch, others in zip_longest(images, np.array_split(rest, n_batches)):
        own = others if batch is None else np.concatenate([with_image[batch.bags], others])
        if not len(own):
            continue
        yield (
            own,
            SlideBatch(
                present=torch.from_numpy(inputs.present[own]).to(device),
                tiles=None if batch is None else torch.from_numpy(batch.tiles).to(device),
                real=None if batch is None else torch.from_numpy(batch.real).to(device),
                text=torch.from_numpy(inputs.text[own]).to(device) if inputs.text.shape[1] else None,
                table=torch.from_numpy(inputs.table[own]).to(device) if inputs.table.shape[1] else None,
                sizes=None if batch is None else torch.tensor([bags[n].n_tiles for n in batch.bags], device=device),
            ),
        )


def whole_batches(
    inputs: Inputs, rows: NDArray[np.intp], *, device: torch.device | str = "cpu"
) -> Iterator[tuple[NDArray[np.intp], SlideBatch]]:
    """Batches with all tiles of each slide, as many slides as fit; as :func:`slide_batches`, in an order of its own."""
    sizes = np.asarray([bag.n_tiles if (bag := inputs.bags[int(row)]) is not None else 0 for row in rows])
    # Slides of like size side by side need little padding.
    rows, largest = rows[np.argsort(sizes, kind="stable")], max(1, int(sizes.max()))
    size = int(max(1, min(_SLIDES_AT_ONCE, _TILES_AT_ONCE // largest)))
    yield from slide_batches(inputs, rows, size=size, device=device)
