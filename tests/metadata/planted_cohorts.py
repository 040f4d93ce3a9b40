"""Cohorts whose labels are planted where a test wants them (in tiles, reports, a table), and a quick recipe."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from pathopipe.metadata.cases import Case, MetadataCohort
from pathopipe.metadata.settings import MetadataConfig
from pathopipe.metadata.tasks import TaskSpec
from pathopipe.mil.bags import array_bag

__all__ = ["QUICK", "planted"]

QUICK: Final = MetadataConfig(
    folds=2,
    members=1,
    epochs=15,
    batch_slides=8,
    width=16,
    hidden=16,
    attention=8,
    dropout=0.1,
    learning_rate=1e-2,
    text_features=16,
    draws=100,
)
"""Small networks that learn quickly what is planted."""

_FILLER = ["the", "specimen", "was", "received", "in", "a", "container", "and", "consists", "of", "pale", "tissue"]
_TILES, _FEATURES = 12, 8


def planted(
    n: int,
    where: Mapping[str, Sequence[str]],
    *,
    classes: int = 2,
    seed: int = 0,
    slides_a_patient: int = 1,
    give: Sequence[str] = ("image", "text", "table"),
    missing: float = 0.0,
    unlabelled: float = 0.0,
    strength: float = 2.0,
) -> MetadataCohort:
    """A drawn cohort: ``planted(60, {"fixation": ("image",), "procedure": ("text", "table")})``.

    Args:
        n: Slides.
        where: Of each task the modalities that tell its class.
        classes: Of every task.
        seed: Of everything.
        slides_a_patient: They share report, table and labels.
        give: Modalities that slides have.
        missing: Chance of each modality of a slide to be absent; one always stays.
        unlabelled: Chance of each label to be missing.
        strength: How far a class moves its tile features; below 1 the classes overlap, and words are left out too.
    """
    rng = np.random.default_rng(seed)
    names = tuple("abcdefgh"[:classes])
    tasks = tuple(TaskSpec(name=name, column=name, kind="multi-class", classes=names) for name in where)
    n_patients = -(-n // slides_a_patient)
    labels = {name: rng.integers(0, classes, n_patients) for name in where}
    cases = []
    for number in range(n):
        patient = number // slides_a_patient
        own = np.random.default_rng([seed, patient])
        tiles = rng.standard_normal((_TILES, _FEATURES))
        words, row = list(own.choice(_FILLER, 12)), {"age": f"{own.normal(60, 10):.1f}"}
        for place, (name, sources) in enumerate(where.items()):
            label = int(labels[name][patient])
            if "image" in sources:
                # Some tiles tell, the others don't.
                tiles[: _TILES // 3, (2 * place + label) % _FEATURES] += strength
            if "text" in sources and own.random() < strength:
                words.insert(int(own.integers(len(words))), f"{name}word{names[label]}")
            if "table" in sources:
                row[f"{name}_note"] = f"code{names[label]}"
        there = {modality for modality in give if rng.random() >= missing} or {give[number % len(give)]}
        bag = array_bag(f"s{number}", tiles.astype(np.float32), patient_id=f"p{patient}", encoder="drawn")
        cases.append(
            Case(
                slide_id=f"s{number}",
                patient_id=f"p{patient}",
                site="",
                bag=bag if "image" in there else None,
                text=" ".join(words) if "text" in there else None,
                row=row if "table" in there else {},
            )
        )
    truth = {}
    for name in where:
        values = labels[name][np.arange(n) // slides_a_patient].astype(np.float64)[:, None]
        values[rng.random(n) < unlabelled] = np.nan
        truth[name] = values
    columns = ("age", *(f"{name}_note" for name, sources in where.items() if "table" in sources))
    return MetadataCohort(
        cases=tuple(cases),
        tasks=tasks,
        truth=truth,
        patients=tuple(case.patient_id for case in cases),
        sites=("",) * n,
        table_columns=columns if "table" in give else (),
    )
