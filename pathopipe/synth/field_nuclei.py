"""Nuclei of training fields: their shapes, chromatin, nucleoli, figures of mitosis and halos."""

from dataclasses import dataclass, fields, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.synth.field_canvas import FIXED_BITS, Canvas, Floats, Plane, polygon_fixed, smooth_noise, soft

__all__ = [
    "LOOKS",
    "NUCLEUS_CLASSES",
    "Nuclei",
    "PaintedNuclei",
    "joined_nuclei",
    "make_nuclei",
    "paint_nuclei",
    "with_figures",
]

NUCLEUS_CLASSES = (
    "Epithelial",
    "Lymphocyte",
    "Plasma cell",
    "Granulocyte",
    "Fibroblast",
    "Endothelial",
    "Muscle",
    "Mitotic",
    "Apoptotic",
)
_POINTS = 24
_PLAIN, _PLATE, _PAIR, _STAR = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How the chromatin of one kind of nucleus may lie; each pair is the range a field chooses from.

    ``density`` is the haematoxylin at the rim; ``pale`` the share of it that the middle has; ``rim_um`` how fast it
    falls; ``clump`` and ``fine`` the strength of coarse and fine grain; ``nucleoli`` their mean number.
    """

    density: tuple[float, float]
    pale: tuple[float, float]
    rim_um: tuple[float, float] = (0.4, 1.2)
    clump: tuple[float, float] = (0.0, 0.2)
    fine: tuple[float, float] = (0.02, 0.12)
    nucleoli: tuple[float, float] = (0.0, 0.0)


LOOKS = {
    "dense": Look(density=(0.85, 1.5), pale=(0.85, 1.05), clump=(0.02, 0.15)),
    "clumped": Look(density=(0.75, 1.3), pale=(0.55, 0.9), clump=(0.2, 0.45)),
    "granular": Look(density=(0.45, 0.95), pale=(0.55, 0.95), clump=(0.12, 0.35), nucleoli=(0.0, 0.8)),
    "vesicular": Look(
        density=(0.45, 0.95), pale=(0.18, 0.5), rim_um=(0.3, 0.6), clump=(0.04, 0.22), nucleoli=(0.2, 1.8)
    ),
    "washed": Look(density=(0.13, 0.35), pale=(0.6, 1.0), clump=(0.05, 0.25), nucleoli=(0.0, 0.6)),
    "smudged": Look(density=(0.35, 0.85), pale=(0.75, 1.0), rim_um=(0.8, 2.0), clump=(0.0, 0.1)),
    "hollow": Look(density=(0.5, 1.0), pale=(0.05, 0.2), rim_um=(0.35, 0.8), clump=(0.02, 0.1), nucleoli=(0.0, 0.5)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Nuclei:
    """Nuclei as columns, all (n,). Lengths in canvas pixels, angles in radians."""

    x: Floats
    y: Floats
    long: Floats
    """Half the longer axis."""
    short: Floats
    angle: Floats
    rough: Floats
    """Strength of the waves of the outline, 0 for an ellipse."""
    lobes: Floats
    """Strength of the third wave alone, for lobed nuclei."""
    bend: Floats
    """Sagitta of the bent long axis in short half axes."""
    blunt: Floats
    """Exponent of the superellipse: 1 is an ellipse, below 1 the ends are blunt."""
    kind: NDArray[np.uint8]
    figure: NDArray[np.uint8]
    density: Floats
    pale: Floats
    rim: Floats
    clump: Floats
    fine: Floats
    nucleoli: Floats
    defocus: Floats
    """1 where it lies out of the focal plane, else 0."""
    halo: Floats
    """Width of the clear ring around it in pixels."""
    eosin: Floats
    """Density that the second stain adds: a reddish nucleus, or one that a brown marker takes."""

    def take(self, keep: NDArray[np.generic]) -> "Nuclei":
        """The nuclei of a mask or of indices."""
        return Nuclei(**{column.name: getattr(self, column.name)[keep] for column in fields(self)})

    def __len__(self) -> int:
        """Number of nuclei."""
        return len(self.x)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaintedNuclei:
    """What painting leaves: labels on the canvas, 0 or the row of the nucleus plus one."""

    labels: NDArray[np.int32]
    full_px: NDArray[np.float64]
    """Area that each outline encloses, whether seen or covered, in canvas pixels."""


def joined_nuclei(groups: list[Nuclei]) -> Nuclei:
    """One table from several; an empty one from none."""
    columns: dict[str, NDArray[Any]] = {}
    for column in fields(Nuclei):
        whole = column.name in ("kind", "figure")
        start = np.zeros(0, np.uint8 if whole else np.float64)
        columns[column.name] = np.concatenate([start, *(getattr(group, column.name) for group in groups)])
    return Nuclei(**columns)


def make_nuclei(
    canvas: Canvas,
    x: Floats,
    y: Floats,
    *,
    kind: str,
    look: str,
    diameter_um: float,
    aspect: float = 1.2,
    angle: Floats | None = None,
    spread: float = 0.12,
    rough: float = 0.04,
    lobes: float = 0.0,
    bend: float = 0.0,
    blunt: float = 1.0,
    halo_um: float = 0.0,
    defocus: float = 0.0,
    density: float | None = None,
) -> Nuclei:
    """Nuclei of one kind at the points, with a look drawn for the group and jittered for each.

    Args:
        canvas: The field.
        x: (n,) px.
        y: (n,) px.
        kind: One of ``NUCLEUS_CLASSES``.
        look: A key of ``LOOKS``.
        diameter_um: Diameter of a disc of the mean area.
        aspect: Mean ratio of the axes, from 1.
        angle: (n,) direction of the long axis, at random where not given.
        spread: Standard deviation of the logarithm of the diameter.
        rough: Waviness of the outline.
        lobes: Strength of lobes.
        bend: Largest bend.
        blunt: Exponent of the superellipse.
        halo_um: Mean width of the clear ring.
        defocus: Share out of focus.
        density: Density at the rim, else drawn from the look.
    """
    rng, n, scale = canvas.rng, len(x), canvas.px_per_um
    chosen = LOOKS[look]
    size = diameter_um * np.exp(rng.normal(0, spread, n))
    ratio = 1 + (aspect - 1) * rng.gamma(4.0, 0.25, n) if aspect > 1 else np.ones(n)
    ratio = np.clip(ratio, 1.0, max(1.6 * aspect, 1.3))

    def each(limits: tuple[float, float], jitter: float = 0.15) -> Floats:
        return np.asarray(rng.uniform(*limits) * np.exp(rng.normal(0, jitter, n)))

    base = np.full(n, density) * np.exp(rng.normal(0, 0.15, n)) if density is not None else each(chosen.density)
    return Nuclei(
        x=x.astype(np.float64),
        y=y.astype(np.float64),
        long=size / 2 * np.sqrt(ratio) * scale,
        short=size / 2 / np.sqrt(ratio) * scale,
        angle=rng.uniform(0, np.pi, n) if angle is None else angle + np.zeros(n),
        rough=rough * rng.uniform(0.3, 1.8, n),
        lobes=lobes * rng.uniform(0.4, 1.4, n),
        bend=bend * rng.uniform(-1, 1, n),
        blunt=np.full(n, blunt),
        kind=np.full(n, NUCLEUS_CLASSES.index(kind), np.uint8),
        figure=np.full(n, _PLAIN, np.uint8),
        density=base,
        pale=each(chosen.pale, 0.12),
        rim=each(chosen.rim_um) * scale,
        clump=each(chosen.clump),
        fine=each(chosen.fine),
        nucleoli=rng.poisson(rng.uniform(*chosen.nucleoli), n).astype(np.float64),
        defocus=(rng.random(n) < defocus).astype(np.float64),
        halo=np.maximum(halo_um * rng.normal(1, 0.4, n), 0) * scale,
        eosin=np.maximum(rng.uniform(-0.15, 0.25) * rng.normal(1, 0.4, n), 0),
    )


def with_figures(canvas: Canvas, nuclei: Nuclei, mitotic: float, apoptotic: float) -> Nuclei:
    """Turn a share of the nuclei into figures of mitosis (plates, pairs of plates, stars) and into dying ones."""
    rng, n = canvas.rng, len(nuclei)
    luck = rng.random(n)
    dividing, dying = luck < mitotic, luck > 1 - apoptotic
    columns = {c.name: getattr(nuclei, c.name).copy() for c in fields(nuclei)}
    size = np.sqrt(nuclei.long * nuclei.short)
    figure = np.where(dividing, rng.integers(_PLATE, _STAR + 1, n), _PLAIN)
    plate, pair, star = figure == _PLATE, figure == _PAIR, figure == _STAR
    columns["figure"] = figure.astype(np.uint8)
    columns["long"] = np.select([plate, pair, star, dying], [1.15 * size, 1.15 * size, size, 0.5 * size], nuclei.long)
    columns["short"] = np.select(
        [plate, pair, star, dying], [0.36 * size, 0.85 * size, 0.8 * size, 0.45 * size], nuclei.short
    )
    columns["rough"] = np.select([plate, pair, star, dying], [0.14, 0.08, 0.2, 0.05], nuclei.rough)
    columns["density"] = np.where(dividing | dying, rng.uniform(1.2, 1.9, n), nuclei.density)
    columns["pale"] = np.where(dividing | dying, 1.0, nuclei.pale)
    columns["nucleoli"] = np.where(dividing | dying, 0.0, nuclei.nucleoli)
    columns["clump"] = np.where(dividing, 0.25, np.where(dying, 0.02, nuclei.clump))
    clear = rng.uniform(0.5, 3.0, n) * canvas.px_per_um
    columns["halo"] = np.where(dividing | dying, clear, nuclei.halo)
    columns["kind"] = np.select(
        [dividing, dying],
        [NUCLEUS_CLASSES.index("Mitotic"), NUCLEUS_CLASSES.index("Apoptotic")],
        nuclei.kind.astype(int),
    ).astype(np.uint8)
    return Nuclei(**columns)


def outlines(rng: np.random.Generator, nuclei: Nuclei) -> Floats:
    """Rings (n, points, 2) in px, as x and y."""
    n = len(nuclei)
    theta = np.linspace(0, 2 * np.pi, _POINTS, endpoint=False)
    radius = np.ones((n, _POINTS))
    for wave in (2, 3, 4, 5, 7):
        strength = nuclei.rough * rng.normal(0, 1.0 / np.sqrt(wave - 1), n)
        if wave == 7:
            strength = np.where(nuclei.figure != _PLAIN, strength, 0.3 * strength)
        radius += strength[:, None] * np.cos(wave * theta + rng.uniform(0, 2 * np.pi, n)[:, None])
    if nuclei.lobes.any():
        turn = rng.uniform(0, 2 * np.pi, n)[:, None]
        wave_of = rng.integers(2, 4, n)[:, None]
        radius += nuclei.lobes[:, None] * np.cos(wave_of * theta + turn)
    radius = np.maximum(radius, 0.35)
    cos, sin = np.cos(theta), np.sin(theta)
    power = nuclei.blunt[:, None]
    along = radius * np.sign(cos) * np.abs(cos) ** power
    over = radius * np.sign(sin) * np.abs(sin) ** power
    over += nuclei.bend[:, None] * (along**2 - 0.4)
    u, v = along * nuclei.long[:, None], over * nuclei.short[:, None]
    turn_cos, turn_sin = np.cos(nuclei.angle)[:, None], np.sin(nuclei.angle)[:, None]
    ring = np.empty((n, _POINTS, 2))
    ring[..., 0] = u * turn_cos - v * turn_sin + nuclei.x[:, None]
    ring[..., 1] = u * turn_sin + v * turn_cos + nuclei.y[:, None]
    return ring


def paint_nuclei(canvas: Canvas, nuclei: Nuclei, *, finer: int, see_through: float, defocus_um: float) -> PaintedNuclei:
    """Add the nuclei to the canvas, later ones over earlier ones.

    Args:
        canvas: The field.
        nuclei: What to paint; the order is the order of painting.
        finer: Nuclei are drawn on a grid that is this many times finer, and averaged.
        see_through: Share of the density of a covered nucleus that shows through the one above it.
        defocus_um: Blur of the nuclei that are out of focus.
    """
    rings = outlines(canvas.rng, nuclei)
    _clear_halos(canvas, nuclei, rings)
    # From here on in pixels of the finer grid.
    off = (finer - 1) / 2
    nuclei = replace(
        nuclei,
        x=nuclei.x * finer + off,
        y=nuclei.y * finer + off,
        long=nuclei.long * finer,
        short=nuclei.short * finer,
        rim=nuclei.rim * finer,
    )
    rings = rings * finer + off
    fixed = polygon_fixed(rings)
    shape = (canvas.side * finer, canvas.side * finer)
    labels, under = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row in range(len(nuclei)):
        cv2.fillPoly(labels, [fixed[row]], row + 1, cv2.LINE_8, FIXED_BITS)
    if see_through > 0:
        for row in range(len(nuclei) - 1, -1, -1):
            cv2.fillPoly(under, [fixed[row]], row + 1, cv2.LINE_8, FIXED_BITS)
    x, y = rings[..., 0], rings[..., 1]
    full = np.abs(np.sum(x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1), axis=1)) / 2
    where = np.flatnonzero(labels)
    if len(where):
        owner = labels.ravel()[where] - 1
        value = _chromatin(canvas, nuclei, labels, where, owner, finer)
        if see_through > 0:
            below = under.ravel()[where] - 1
            value += (below != owner) * (see_through * nuclei.density * nuclei.pale).astype(np.float32)[below]
        _stain(canvas, nuclei, where, owner, value, finer, defocus_um)
    return PaintedNuclei(labels=np.ascontiguousarray(labels[::finer, ::finer]), full_px=full / finer**2)


def _stain(
    canvas: Canvas,
    nuclei: Nuclei,
    where: NDArray[np.intp],
    row: NDArray[np.int32],
    value: Plane,
    finer: int,
    defocus_um: float,
) -> None:
    """Put the densities at ``where`` of the finer grid on the canvas; what lay there shines through in part."""
    rng, side = canvas.rng, canvas.side

    def averaged(values: Plane | float) -> Plane:
        plane = np.zeros((side * finer, side * finer), np.float32)
        plane.ravel()[where] = values
        return plane if finer == 1 else cv2.resize(plane, (side, side), interpolation=cv2.INTER_AREA)

    plane, inside = averaged(value), averaged(1.0)
    if nuclei.defocus.any():
        dim = nuclei.defocus.astype(np.float32)[row]
        sigma = defocus_um * canvas.px_per_um
        for sharp, part in ((plane, averaged(value * dim)), (inside, averaged(dim))):
            sharp += soft(part, sigma) - part
    inside = soft(inside, 0.25 * canvas.px_per_um)
    canvas.eosin *= 1 - np.float32(rng.uniform(0.3, 0.8)) * inside
    canvas.haem *= 1 - np.float32(rng.uniform(0.3, 0.8)) * inside
    canvas.haem += plane
    if nuclei.eosin.any():
        canvas.eosin += averaged(nuclei.eosin.astype(np.float32)[row])


def _clear_halos(canvas: Canvas, nuclei: Nuclei, rings: Floats) -> None:
    rows = np.flatnonzero(nuclei.halo > 0.5)
    if not len(rows):
        return
    fixed = polygon_fixed(rings)
    clear = np.zeros((canvas.side, canvas.side), np.uint8)
    for row in rows:
        cv2.polylines(
            clear, [fixed[row]], True, 255, max(1, round(2 * float(nuclei.halo[row]))), cv2.LINE_8, FIXED_BITS
        )
    mask = soft(clear, 0.3 * canvas.px_per_um) * np.float32(canvas.rng.uniform(0.5, 1.0) / 255)
    canvas.haem *= 1 - mask
    canvas.eosin *= 1 - mask


def _chromatin(
    canvas: Canvas,
    nuclei: Nuclei,
    labels: NDArray[np.int32],
    where: NDArray[np.intp],
    row: NDArray[np.int32],
    finer: int,
) -> Plane:
    """Density (pixels,) at ``where``: rim, middle, grain, nucleoli and the plates of mitosis."""
    rng = canvas.rng
    alone = np.ones(labels.shape, np.uint8)
    alone[:, 1:] &= labels[:, 1:] == labels[:, :-1]
    alone[1:] &= labels[1:] == labels[:-1]
    depth = cv2.distanceTransform(alone, cv2.DIST_L2, 3).ravel()[where]

    def of(column: Floats) -> Plane:
        return column.astype(np.float32)[row]

    pale = of(nuclei.pale)
    value = pale + (1 - pale) * np.exp(-((depth / of(nuclei.rim)) ** 2))
    px_per_um = canvas.px_per_um * finer
    coarse, fine = (
        smooth_noise(rng, len(labels), rng.uniform(*um) * px_per_um).ravel()[where] for um in ((0.7, 1.5), (0.25, 0.5))
    )
    value += of(nuclei.clump) * coarse + of(nuclei.fine) * fine
    value = np.maximum(value, 0.04)
    pairs = nuclei.figure == _PAIR
    if pairs.any():
        local = pairs[row]
        number = row[local]
        y, x = np.divmod(where[local], labels.shape[1])
        over = (y - nuclei.y[number]) * np.cos(nuclei.angle[number]) - (x - nuclei.x[number]) * np.sin(
            nuclei.angle[number]
        )
        value[local] *= np.where(np.abs(over) > 0.45 * nuclei.short[number], 1.0, 0.18)
    value *= of(nuclei.density)
    spots = _nucleoli(rng, nuclei, len(labels), px_per_um)
    if spots is not None:
        value += spots.ravel()[where] * np.float32(rng.uniform(0.2, 0.8))
    density: Plane = value.astype(np.float32)
    return density


def _nucleoli(rng: np.random.Generator, nuclei: Nuclei, side: int, px_per_um: float) -> Plane | None:
    count = nuclei.nucleoli.astype(int)
    if not count.any():
        return None
    owner = np.repeat(np.arange(len(nuclei)), np.minimum(count, 4))
    reach, turn = 0.55 * np.sqrt(rng.random(len(owner))), rng.uniform(0, 2 * np.pi, len(owner))
    u, v = reach * np.cos(turn) * nuclei.long[owner], reach * np.sin(turn) * nuclei.short[owner]
    cos, sin = np.cos(nuclei.angle[owner]), np.sin(nuclei.angle[owner])
    x, y = nuclei.x[owner] + u * cos - v * sin, nuclei.y[owner] + u * sin + v * cos
    share = rng.uniform(0.1, 0.28) * np.exp(rng.normal(0, 0.25, len(owner)))
    radius = np.clip(share * np.sqrt(nuclei.long * nuclei.short)[owner], 0.6, None)
    spots = np.zeros((side, side), np.uint8)
    scale = 1 << FIXED_BITS
    for centre_x, centre_y, r in zip(x, y, radius, strict=True):
        cv2.circle(
            spots,
            (round(centre_x * scale), round(centre_y * scale)),
            round(r * scale),
            255,
            -1,
            cv2.LINE_AA,
            FIXED_BITS,
        )
    return soft(spots, 0.15 * px_per_um) * np.float32(1 / 255)
