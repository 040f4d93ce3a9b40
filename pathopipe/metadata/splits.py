"""Folds of a cohort and parts of a fold: patients stay whole, classes are spread evenly."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pathopipe.cohort import Fold, nested_folds
from pathopipe.metadata.cases import MetadataCohort
from pathopipe.metadata.settings import MetadataConfig
from pathopipe.mil.targets import label_texts, strata_of

__all__ = ["deal_folds", "member_parts", "spread_strata"]


def deal_folds(cohort: MetadataCohort, settings: MetadataConfig, *, seed: int) -> list[Fold]:
    """Part the patients into test folds, and take a validation part out of what remains of each.

    Classes are spread evenly for the task that has most of them, whose rare ones need it most.

    Raises:
        SplitError: Too few patients or sites.
    """
    return nested_folds(
        cohort.patients,
        _strata(cohort),
        folds=settings.folds,
        # Several members validate on parts of the training side in turn; one alone needs a part of its own.
        val_share=settings.val_share if settings.members == 1 else 0.0,
        seed=seed,
        sites=cohort.sites if any(cohort.sites) else None,
        by_site=settings.leave_sites_out,
    )


def member_parts(
    cohort: MetadataCohort, fold: Fold, members: int, *, seed: int
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Rows that each member learns from, and rows that it stops on and is calibrated on; patients stay whole.

    Several members keep parts of the training side back in turn; one alone has the fold's own validation part. There
    are fewer members where there are fewer patients.
    """
    patients = [cohort.patients[int(row)] for row in fold.train]
    members = min(members, len(set(patients)))
    if members < 2:
        return [(fold.train, fold.val)]
    strata = _strata(cohort)
    parts = nested_folds(
        patients,
        spread_strata(patients, [strata[int(row)] for row in fold.train], members),
        folds=members,
        val_share=0,
        seed=seed,
    )
    return [(fold.train[part.train], fold.train[part.test]) for part in parts]


def spread_strata(patients: Sequence[str], strata: Sequence[str], parts: int) -> list[str]:
    """The strata, without those of fewer patients than parts, and none where but one is left."""
    counts = Counter(stratum for _, stratum in set(zip(patients, strata, strict=True)))
    kept = {stratum for stratum, n in counts.items() if stratum and n >= parts}
    return [stratum if stratum in kept and len(kept) > 1 else "" for stratum in strata]


def _strata(cohort: MetadataCohort) -> list[str]:
    """Classes of the task that has most of them, by name, for messages; numbers by quarters."""
    specs = sorted(
        (spec for task in cohort.tasks if (spec := task.target).kind != "multilabel"),
        key=lambda spec: -len(spec.classes),
    )
    if not specs:
        return [""] * len(cohort)
    truth = cohort.truth[specs[0].name]
    return label_texts(specs[0], truth)[specs[0].name] if specs[0].classes else strata_of(specs[0], truth)
