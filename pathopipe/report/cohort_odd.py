"""Which slides of a cohort stand apart, in what, and a map of all by their mean embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from pathopipe.report.cohort_collect import Fact

__all__ = [
    "LEAST_SLIDES",
    "MEASURES",
    "MOST_TSNE",
    "ODD_FROM",
    "EmbeddingMap",
    "Oddity",
    "find_oddities",
    "map_slides",
    "measure_of",
    "robust_z",
]

Floats = NDArray[np.float64]

ODD_FROM: Final = 3.5
"""Least robust z-score of an outlier, as Iglewicz & Hoaglin 1993 advise."""
LEAST_SLIDES: Final = 8
"""Fewer slides have no middle to be far from."""
_LEAST_TSNE: Final = 30
MOST_TSNE: Final = 5000
_COMPONENTS: Final = 20
_NEIGHBOURS: Final = 5
_MAD_TO_SD: Final = 1.4826
_MEAN_DEVIATION_TO_SD: Final = 1.2533


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of a slide that is compared over the cohort."""

    name: str
    title: str
    unit: str
    log: bool
    """Compared on a logarithmic scale: areas and counts of slides lie decades apart."""
    upper_only: bool = False


MEASURES: Final = (
    Measure("tissue_mm2", "tissue area", "mm²", log=True),
    Measure("tiles", "tiles", "", log=True),
    Measure("focus", "focus", "", log=False),
    Measure("haematoxylin", "haematoxylin", "OD", log=False),
    Measure("eosin", "eosin", "OD", log=False),
    Measure("distance", "distance of its embedding from the nearest slides", "", log=True, upper_only=True),
)


@dataclass(frozen=True, slots=True)
class Oddity:
    """One way in which a slide stands apart."""

    measure: str
    z: float
    says: str


@dataclass(frozen=True, slots=True)
class EmbeddingMap:
    """The slides of a cohort in the plane, near each other where their mean embeddings are."""

    encoder: str
    method: Literal["t-SNE", "PCA"]
    xy: Mapping[str, tuple[float, float]]
    """By slide id."""
    distance: Mapping[str, float]
    """Mean distance from the nearest five slides, in standard deviations of the features; by slide id."""
    note: str = ""


def robust_z(values: Floats) -> Floats:
    """How many standard deviations each value lies from the median, the deviation told by the median one.

    Source: Iglewicz & Hoaglin 1993, "How to detect and handle outliers". Where more than half of the values are
    equal, the mean deviation from the median takes the place of the median one.

    Args:
        values: (n,), NaN where not known.

    Returns:
        (n,) z-scores, NaN where not known; 0 where all values are equal.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return np.full(len(values), np.nan)
    middle = np.median(known)
    away = np.abs(known - middle)
    deviation = _MAD_TO_SD * np.median(away) or _MEAN_DEVIATION_TO_SD * away.mean()
    return np.where(np.isfinite(values), 0.0, np.nan) if deviation == 0 else (values - middle) / deviation


def measure_of(fact: Fact, name: str, distance: Mapping[str, float]) -> float:
    """The number of a slide that a measure is about; NaN where it is not known."""
    value: float | None
    if name == "distance":
        value = distance.get(fact.slide_id)
    elif name in ("haematoxylin", "eosin"):
        value = None if fact.stain is None else fact.stain[name == "eosin"]
    else:
        value = getattr(fact, name)
    return float("nan") if value is None else float(value)


def find_oddities(facts: Sequence[Fact], distance: Mapping[str, float]) -> dict[str, list[Oddity]]:
    """What is odd about each slide, the oddest first; slides that are like the others are not named.

    Args:
        facts: The slides.
        distance: Distance of their embeddings from the nearest, by slide id.
    """
    found: dict[str, list[Oddity]] = {}
    for measure in MEASURES:
        values = np.array([measure_of(fact, measure.name, distance) for fact in facts], np.float64)
        known = values[np.isfinite(values)]
        if len(known) < LEAST_SLIDES:
            continue
        z = robust_z(np.log10(values + _offset(known)) if measure.log else values)
        for fact, value, score in zip(facts, values, z, strict=True):
            if (score if measure.upper_only else abs(score)) >= ODD_FROM:
                says = _say(measure, float(value), float(np.median(known)), above=score > 0)
                found.setdefault(fact.slide_id, []).append(Oddity(measure.name, float(score), says))
    for oddities in found.values():
        oddities.sort(key=lambda one: -abs(one.z))
    return found


def _offset(known: Floats) -> float:
    """What keeps the logarithm of nothing finite, without moving what there is."""
    positive = known[known > 0]
    return 0.0 if len(positive) == len(known) else float(positive.min()) / 10 if len(positive) else 1.0


def _say(measure: Measure, value: float, middle: float, *, above: bool) -> str:
    unit = f" {measure.unit}" if measure.unit else ""
    way = "far above" if above else "far below"
    return f"{measure.title} {_number(value)}{unit}, {way} the middle of {_number(middle)}{unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def map_slides(encoder: str, vectors: Mapping[str, NDArray[np.float32]], note: str = "") -> EmbeddingMap | None:
    """Lay slides out by their mean embeddings: each feature scaled, the first principal components, then t-SNE.

    The same on every machine with the same libraries: one thread, a fixed seed, started from the components. Fewer
    than 30 slides, and more than 5,000, are shown by their first two components.

    Source: van der Maaten & Hinton 2008, JMLR 9.

    Args:
        encoder: Its name.
        vectors: (features,) by slide id.
        note: What to say beside.

    Returns:
        The map; None for fewer than three slides, or where all are alike.
    """
    ids = sorted(vectors)
    if len(ids) < 3:
        return None
    features = np.stack([vectors[slide_id] for slide_id in ids]).astype(np.float32)
    varied = features[:, np.ptp(features, axis=0) > 0]
    features = (varied - varied.mean(axis=0)) / varied.std(axis=0)
    n_components = min(_COMPONENTS, len(ids) - 1, features.shape[1])
    if n_components < 2:
        return None
    # Sums over several threads come out in another order, and t-SNE makes much of the last digit.
    with threadpool_limits(1):
        components = PCA(n_components, svd_solver="randomized", random_state=0).fit_transform(features)
        n_neighbours = min(_NEIGHBOURS, len(ids) - 1)
        away, _ = NearestNeighbors(n_neighbors=n_neighbours, n_jobs=1).fit(components).kneighbors()
        uses_tsne = _LEAST_TSNE <= len(ids) <= MOST_TSNE
        plane = components[:, :2]
        if uses_tsne:
            perplexity = min(30.0, (len(ids) - 1) / 3)
            plane = TSNE(perplexity=perplexity, init="pca", random_state=0, n_jobs=1).fit_transform(components)
    return EmbeddingMap(
        encoder=encoder,
        method="t-SNE" if uses_tsne else "PCA",
        xy={slide_id: (float(x), float(y)) for slide_id, (x, y) in zip(ids, plane, strict=True)},
        distance=dict(zip(ids, away.mean(axis=1).astype(float).tolist(), strict=True)),
        note=note,
    )
