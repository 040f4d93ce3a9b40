"""Training fields: small drawn pictures of many tissues, stains and cameras, with all nuclei, glands and lumina known.

Where ``DrawnSlide`` draws one kind of slide at any place, a field has a tissue, stain and camera of its own, from
ranges far wider than one laboratory's. A field is the same from the same seed, size and resolution.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from skimage.measure import label as numbered_parts

from pathopipe.synth.field_canvas import Canvas, Floats, soft
from pathopipe.synth.field_glands import choose_style, draw_glands, draw_vessels
from pathopipe.synth.field_grounds import draw_ground, red_cells
from pathopipe.synth.field_nuclei import NUCLEUS_CLASSES, Nuclei, joined_nuclei, paint_nuclei
from pathopipe.synth.field_optics import Optics, choose_optics, expose

__all__ = ["NUCLEUS_CLASSES", "TISSUE_CLASSES", "UNKNOWN", "Field", "draw_field"]

TISSUE_CLASSES = (
    "Glass",
    "Fat",
    "Stroma",
    "Muscle",
    "Lymphoid",
    "Normal glands",
    "Carcinoma",
    "Blood",
    "Mucin",
    "Necrosis",
)
"""Tissue types that a field can show. Sheets of cells of no certain origin are ``UNKNOWN``."""
UNKNOWN = 255
"""Value of ``Field.tissue_map`` where the tissue has no class."""

_GROUND_SHARES = {
    "stroma": 0.22, "mucosa": 0.06, "sheet": 0.26, "lymphoid": 0.11, "muscle": 0.06, "fat": 0.04, "squamous": 0.05,
    "smear": 0.09, "blood": 0.02, "mucin": 0.02, "necrosis": 0.04, "glass": 0.03,
}  # fmt: skip
_TISSUE_OF = {
    "stroma": "Stroma", "mucosa": "Stroma", "lymphoid": "Lymphoid", "muscle": "Muscle", "fat": "Fat", "blood": "Blood",
    "mucin": "Mucin", "necrosis": "Necrosis", "glass": "Glass",
}  # fmt: skip
_LEAST_UM2 = 2.5
"""Nuclei of which less is seen are not labelled."""
_LEAST_CONTRAST = 9.0
"""Nuclei whose rim differs less from the ring around it, in levels of the band that differs most, are not labelled."""
_LEAST_LUMEN_UM2 = 8.0


@dataclass(frozen=True, slots=True)
class Field:
    """A drawn field and all that is known of it.

    Objects are numbered from 1 without gaps, in raster order of their first pixel; each is one connected part (of four
    neighbours). Lumina lie inside glands.
    """

    rgb: NDArray[np.uint8]
    """(side, side, 3)."""
    nuclei: NDArray[np.int32]
    """(side, side), 0 where there is none."""
    nucleus_class: NDArray[np.uint8]
    """(n,) index in ``NUCLEUS_CLASSES`` of nucleus 1 to n."""
    glands: NDArray[np.int32]
    """(side, side): epithelium and lumen."""
    lumina: NDArray[np.int32]
    """(side, side)."""
    tissue_map: NDArray[np.uint8]
    """(side, side) index in ``TISSUE_CLASSES``, or ``UNKNOWN``."""
    mpp: float

    @property
    def nucleus_classes(self) -> tuple[str, ...]:
        """Names that ``nucleus_class`` counts."""
        return NUCLEUS_CLASSES

    @property
    def tissue_classes(self) -> tuple[str, ...]:
        """Names that ``tissue_map`` counts."""
        return TISSUE_CLASSES


def draw_field(seed: int, *, side_px: int, mpp: float) -> Field:
    """Draw one field.

    Args:
        seed: Chooses everything but size and resolution.
        side_px: Side of the field in pixels.
        mpp: Micrometres per pixel; sizes are true to it.
    """
    rng = np.random.default_rng([9, seed])
    optics = choose_optics(rng)
    canvas = Canvas(rng=rng, side=side_px, px_per_um=1 / mpp, red_cell=optics.red_cell)
    nuclei = _tissues(canvas, optics)
    nuclei = nuclei.take(_near(canvas, nuclei))
    nuclei = nuclei.take(rng.permutation(len(nuclei)))
    nuclei = nuclei.take(_apart(nuclei, float(rng.choice([rng.uniform(0.3, 0.7), rng.uniform(0.7, 0.95)]))))
    # However faded the stain, nuclei stay a little darker than the ground.
    faintest = 0.11 / float(np.linalg.norm(optics.haematoxylin))
    nuclei = replace(nuclei, density=np.maximum(nuclei.density, faintest * rng.uniform(0.8, 1.6)))
    _grain(canvas)
    _lookalikes_below(canvas)
    _cell_bodies(canvas, nuclei)
    painted = paint_nuclei(
        canvas,
        nuclei,
        finer=1 if mpp <= 0.3 else 2,
        see_through=float(rng.choice([0.0, rng.uniform(0.1, 0.6)])),
        defocus_um=float(rng.uniform(0.3, 0.75)),
    )
    _lookalikes_above(canvas)
    rgb = expose(canvas, optics)
    labels = np.where(_visible(painted.labels, rgb, len(nuclei))[painted.labels], painted.labels, 0)
    labels, kinds = _seen(labels, nuclei, painted.full_px, _LEAST_UM2 / mpp**2)
    glands = _numbered(canvas.glands, _LEAST_LUMEN_UM2 / mpp**2)
    hollow = canvas.lumina & (glands > 0) & (labels == 0)
    lumina = _numbered(np.where(hollow, glands, 0), _LEAST_LUMEN_UM2 / mpp**2)
    return Field(rgb, labels, kinds, glands, lumina, canvas.tissue, mpp)


def _near(canvas: Canvas, nuclei: Nuclei) -> NDArray[np.bool_]:
    reach = nuclei.long
    x, y = nuclei.x, nuclei.y
    return np.asarray((x > -reach) & (x < canvas.side + reach) & (y > -reach) & (y < canvas.side + reach))


def _tissues(canvas: Canvas, optics: Optics) -> Nuclei:
    """One to three grounds with curved borders, glands and vessels over them; returns the nuclei to paint."""
    rng = canvas.rng
    names, shares = list(_GROUND_SHARES), np.array(list(_GROUND_SHARES.values()))
    glandular = rng.random() < 0.42
    count = int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1]))
    chosen = [str(name) for name in rng.choice(names, count, replace=False, p=shares)]
    if optics.stain == "pale":
        chosen[0] = str(rng.choice(["smear", "lymphoid", chosen[0]], p=[0.6, 0.2, 0.2]))
    if glandular:
        around = ["mucosa", "stroma", "lymphoid", "muscle", "smear"]
        chosen[0] = str(rng.choice(around, p=[0.45, 0.33, 0.1, 0.05, 0.07]))
    if rng.random() < 0.1:  # the edge of the tissue
        chosen.append("glass")
    parts = _parts(canvas, len(chosen))
    groups: list[Nuclei] = []
    for number, name in enumerate(chosen):
        ground = draw_ground(canvas, name)
        inside = parts == number
        mask = soft(inside, 0.5 * canvas.px_per_um)
        canvas.mix(mask, haem=ground.haem, eosin=ground.eosin)
        if ground.other is not None:
            canvas.other += ground.other * mask[..., None]
        groups += [group.take(canvas.at(inside, group.x, group.y).astype(bool)) for group in ground.nuclei]
        canvas.tissue[inside] = TISSUE_CLASSES.index(_TISSUE_OF[name]) if name in _TISSUE_OF else UNKNOWN
    outside = joined_nuclei(groups)
    if glandular:
        style = choose_style(rng)
        if optics.stain in ("pale", "lilac"):  # without eosin only an orderly wall can be told
            form = style.form if style.form in ("round", "tubes", "ribbon") else "round"
            style = replace(
                style, form=form, rows=0.05, spacing=max(style.spacing, 1.1), crowding=min(style.crowding, 1)
            )
        kind = "Carcinoma" if style.atypical and style.form != "ribbon" else "Normal glands"
        walls = draw_glands(canvas, parts == 0, style, TISSUE_CLASSES.index(kind))
        canvas.tissue[canvas.void & (canvas.glands == 0)] = TISSUE_CLASSES.index("Glass")
        groups = [_outside_glands(canvas, outside), walls]
        outside = joined_nuclei(groups)
    if rng.random() < 0.35:
        held = np.isin(canvas.tissue, [TISSUE_CLASSES.index(name) for name in ("Stroma", "Muscle", "Lymphoid", "Fat")])
        vessels = draw_vessels(canvas, held & (canvas.glands == 0), int(rng.integers(1, 6)))
        free = ~canvas.at(canvas.void, outside.x, outside.y).astype(bool)
        outside = joined_nuclei([outside.take(free), vessels])
    if rng.random() < 0.35:
        _rifts(canvas)
        outside = outside.take(~canvas.at(canvas.void, outside.x, outside.y).astype(bool))
    if optics.stain == "dab":
        outside = _with_dab(canvas, outside)
    return outside


def _rifts(canvas: Canvas) -> None:
    """Clefts and holes of the section, empty or with a little fluid: never glands, though they are white and edged."""
    rng, scale = canvas.rng, canvas.px_per_um
    if rng.random() < 0.5:  # clefts along level lines, wider here and narrower there
        line = np.abs(canvas.noise(rng.uniform(25, 90))) - np.float32(rng.uniform(0.03, 0.25))
        torn = line + np.float32(0.15) * canvas.noise(rng.uniform(6, 20)) < 0
        torn &= canvas.noise(rng.uniform(40, 120)) > rng.uniform(-0.5, 0.8)
    else:  # rounded holes, from those of oedema to burst fat
        height = canvas.noise(rng.uniform(6, 45)) + np.float32(rng.uniform(0, 0.2)) * canvas.noise(4)
        torn = height > rng.uniform(0.5, 1.6)
    wanted = ("Stroma", "Muscle", "Lymphoid", "Fat", "Necrosis", "Mucin")
    held = np.isin(canvas.tissue, [TISSUE_CLASSES.index(name) for name in wanted]) | (canvas.tissue == UNKNOWN)
    torn &= held & (canvas.glands == 0) & ~canvas.void
    hole = soft(torn, rng.uniform(0.2, 0.8) * scale)
    rim = np.clip(soft(torn, 1.5 * scale) - hole, 0, 1) * np.float32(rng.choice([0.0, rng.uniform(0.2, 1.0)]))
    canvas.eosin *= 1 + rim  # tissue draws together at an edge
    fluid = rng.choice([0.0, rng.uniform(0.01, 0.12)])
    canvas.mix(hole, haem=0.0, eosin=np.float32(fluid) * np.clip(1 + 0.3 * canvas.noise(3), 0, 2))
    canvas.other *= 1 - hole[..., None]
    canvas.void |= hole > 0.4
    # What a cell of the tissue map is called does not hang on a crack; a wide hole is nothing.
    wide = cv2.erode(torn.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=max(round(5 * scale), 1))
    canvas.tissue[cv2.dilate(wide, np.ones((3, 3), np.uint8), iterations=max(round(5 * scale), 1)) > 0] = UNKNOWN


def _outside_glands(canvas: Canvas, nuclei: Nuclei) -> Nuclei:
    """The nuclei that lie beside the glands, not on their walls; a few immune cells wander into the epithelium."""
    rng = canvas.rng
    away = cv2.distanceTransform((canvas.glands == 0).astype(np.uint8), cv2.DIST_L2, 3)
    apart = rng.uniform(0.0, 2.5) * canvas.px_per_um
    free = canvas.at(away, nuclei.x, nuclei.y) > np.minimum(nuclei.short, nuclei.long) + apart
    immune = (nuclei.kind >= NUCLEUS_CLASSES.index("Lymphocyte")) & (
        nuclei.kind <= NUCLEUS_CLASSES.index("Granulocyte")
    )
    free |= immune & (rng.random(len(nuclei)) < 0.02) & ~canvas.at(canvas.lumina, nuclei.x, nuclei.y).astype(bool)
    return nuclei.take(free & ~canvas.at(canvas.void, nuclei.x, nuclei.y).astype(bool))


def _parts(canvas: Canvas, count: int) -> NDArray[np.int32]:
    """Number of the ground of each pixel; borders are level lines of smooth noise."""
    part = np.zeros((canvas.side, canvas.side), np.int32)
    for number in range(1, count):
        height = canvas.noise(canvas.rng.uniform(25, 120)) + canvas.rng.uniform(0, 0.15) * canvas.noise(4)
        part[height > canvas.rng.uniform(-0.4, 0.9)] = number
    return part


def _with_dab(canvas: Canvas, nuclei: Nuclei) -> Nuclei:
    """Brown cytoplasm, or brown nuclei among blue ones. Eosin stands for diaminobenzidine in such fields."""
    rng = canvas.rng
    canvas.eosin *= np.float32(rng.uniform(0.0, 0.6))
    if rng.random() < 0.4:
        patches = np.clip(canvas.noise(rng.uniform(8, 30)), 0, 2)
        canvas.eosin += patches * np.float32(rng.uniform(0.3, 1.5)) * (0.1 + canvas.haem + canvas.eosin)
    n = len(nuclei)
    positive = rng.random(n) < rng.choice([0.0, rng.uniform(0.05, 0.9)], p=[0.3, 0.7])
    brown = np.where(positive, rng.uniform(0.3, 2.5) * np.exp(rng.normal(0, 0.4, n)), 0.0)
    return replace(nuclei, eosin=brown)


def _grain(canvas: Canvas) -> None:
    """Unevenness that all tissue has: fine, and broad."""
    rng = canvas.rng
    fine = canvas.noise(rng.uniform(0.4, 1.0)) * np.float32(rng.uniform(0.02, 0.2))
    broad = canvas.noise(rng.uniform(20, 60))
    canvas.eosin *= np.exp(fine + broad * np.float32(rng.uniform(0, 0.2)))
    canvas.haem *= np.exp(fine - broad * np.float32(rng.uniform(0, 0.2)))


def _cell_bodies(canvas: Canvas, nuclei: Nuclei) -> None:
    """Plasma cells lie at one side of a purple body; granulocytes in a pink or red one."""
    rng = canvas.rng
    for kind, purple, pink in (("Plasma cell", (0.1, 0.45), (0.05, 0.3)), ("Granulocyte", (0.0, 0.05), (0.1, 0.9))):
        rows = np.flatnonzero(nuclei.kind == NUCLEUS_CLASSES.index(kind))
        if not len(rows):
            continue
        mask = np.zeros((canvas.side, canvas.side), np.uint8)
        for row in rows:
            half = float(nuclei.long[row])
            turn, away = rng.uniform(0, 2 * np.pi), half * rng.uniform(0.1, 0.8)
            x, y = nuclei.x[row] + away * np.cos(turn), nuclei.y[row] + away * np.sin(turn)
            axes = (2 * half * rng.uniform(1.3, 1.9), 2 * half * rng.uniform(1.1, 1.6))
            cv2.ellipse(mask, ((float(x), float(y)), axes, float(np.degrees(turn))), 255, -1)
        shows = soft(mask, 0.4 * canvas.px_per_um) * np.float32(rng.uniform(0.5, 1.0) / 255)
        grain = np.exp(np.float32(rng.uniform(0.05, 0.4)) * canvas.noise(0.6))
        canvas.mix(shows, haem=float(rng.uniform(*purple)) * grain, eosin=float(rng.uniform(*pink)) * grain)


def _visible(labels: NDArray[np.int32], rgb: NDArray[np.uint8], n: int) -> NDArray[np.bool_]:
    """Which of ``n`` nuclei (and the ground before them) can be told from what is around them in the finished picture.

    The rim and the whole nucleus are held against the pixels just outside; a nucleus that is pale within and dark at
    its rim may be as bright as the ground on the whole.
    """
    ring = cv2.dilate(labels.astype(np.float32), np.ones((5, 5), np.uint8)).astype(np.int32)
    ring[labels > 0] = 0
    rim = labels.copy()
    rim[cv2.erode((labels > 0).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0] = 0
    outside, around = _means(ring, rgb, n)
    contrast = np.zeros(n + 1)
    for part in (labels, rim):
        mean, _ = _means(part, rgb, n)
        contrast = np.maximum(contrast, np.abs(mean - outside).max(1))
    # Where all around are other nuclei there is no ring to compare with.
    seen: NDArray[np.bool_] = (contrast >= _LEAST_CONTRAST) | (around < 6)
    return seen


def _means(labels: NDArray[np.int32], rgb: NDArray[np.uint8], n: int) -> tuple[Floats, NDArray[np.intp]]:
    """Mean colour (n + 1, 3) and number of pixels (n + 1,) of each label."""
    where = np.flatnonzero(labels)
    number, pixels = labels.ravel()[where], rgb.reshape(-1, 3)[where]
    count = np.bincount(number, minlength=n + 1)
    sums = np.stack([np.bincount(number, pixels[:, band], minlength=n + 1) for band in range(3)], axis=1)
    return sums / np.maximum(count, 1)[:, None], count


def _apart(nuclei: Nuclei, closest: float) -> NDArray[np.bool_]:
    """Which nuclei to keep so that few centres are nearer than ``closest`` times the sum of the short half axes."""
    tree = cKDTree(np.column_stack([nuclei.x, nuclei.y]))
    pairs = tree.query_pairs(2 * closest * float(nuclei.short.max(initial=0.0)), output_type="ndarray")
    first, second = pairs[:, 0], pairs[:, 1]
    distance = np.hypot(nuclei.x[first] - nuclei.x[second], nuclei.y[first] - nuclei.y[second])
    near = distance < closest * (nuclei.short[first] + nuclei.short[second])
    keep = np.ones(len(nuclei), np.bool_)
    for one, other in pairs[near]:
        keep[other] &= ~keep[one]
    return keep


def _lookalikes_below(canvas: Canvas) -> None:
    """What lies in the tissue and is no nucleus: stray red cells, elastic fibres, wisps, folds."""
    rng, scale, side = canvas.rng, canvas.px_per_um, canvas.side
    if rng.random() < 0.12:  # stray red cells
        n = int(rng.integers(3, 30))
        centre = rng.uniform(0, side, 2)
        x, y = (np.asarray(centre[k] + rng.normal(0, 15 * scale, n)) for k in (0, 1))
        canvas.absorb(red_cells(canvas, x, y), canvas.red_cell)
    if rng.random() < 0.2:  # nuclei far out of focus, which nobody would outline
        n = int(rng.integers(1, 12))
        ghosts = np.zeros((side, side), np.uint8)
        radius = rng.uniform(2.5, 7) * scale
        for x, y in rng.uniform(0, side, (n, 2)):
            axes = (2 * radius * float(rng.uniform(0.7, 1.3)), 2 * radius * float(rng.uniform(0.7, 1.3)))
            cv2.ellipse(
                ghosts, ((float(x), float(y)), axes, float(rng.uniform(0, 180))), int(rng.integers(90, 255)), -1
            )
        canvas.haem += soft(ghosts, rng.uniform(1.2, 2.5) * scale) * np.float32(rng.uniform(0.1, 0.6) / 255)
    if rng.random() < 0.08:
        paths = []
        for _ in range(int(rng.integers(2, 10))):
            t = np.linspace(-1, 1, 40) * side
            turn, off = rng.uniform(0, np.pi), rng.uniform(0, side, 2)
            v = rng.uniform(1, 5) * scale * np.sin(t / (rng.uniform(3, 10) * scale))
            paths.append(
                np.stack(
                    [off[0] + t * np.cos(turn) - v * np.sin(turn), off[1] + t * np.sin(turn) + v * np.cos(turn)], 1
                )
            )
        canvas.eosin += canvas.lines(paths, rng.uniform(0.5, 1.5), 0.2) * np.float32(rng.uniform(0.1, 0.6))


def _lookalikes_above(canvas: Canvas) -> None:
    """What lies over the tissue: pigment, ink, dust out of focus, folds."""
    rng, scale, side = canvas.rng, canvas.px_per_um, canvas.side
    if rng.random() < 0.1:  # melanin, haemosiderin, carbon
        n = int(rng.integers(5, 80))
        centre, spread = rng.uniform(0, side, 2), rng.uniform(3, 40) * scale
        spots = np.zeros((side, side), np.uint8)
        for x, y, r in zip(
            rng.normal(centre[0], spread, n), rng.normal(centre[1], spread, n), rng.uniform(0.3, 1.6, n), strict=True
        ):
            cv2.circle(spots, (round(x * 16), round(y * 16)), round(r * scale * 16), 255, -1, cv2.LINE_AA, 4)
        brown = ((0.35, 0.6, 0.9), (0.8, 0.9, 1.0), (0.25, 0.45, 0.8))[int(rng.integers(3))]
        strength = float(rng.uniform(0.4, 1.3))
        canvas.absorb(soft(spots, 0.3 * scale) * np.float32(strength / 255), brown)
    if rng.random() < 0.03:  # marking ink
        stroke = np.clip((canvas.noise(rng.uniform(40, 120)) - rng.uniform(0.3, 1.5)) * rng.uniform(2, 10), 0, 1)
        colour = rng.uniform(0.05, 1.2, 3)
        colour[rng.integers(3)] *= 0.2  # never so dark that nothing is seen through it
        canvas.absorb(stroke.astype(np.float32), (float(colour[0]), float(colour[1]), float(colour[2])))
    if rng.random() < 0.08:  # dust far out of focus
        spots = np.zeros((side, side), np.uint8)
        for _ in range(int(rng.integers(1, 6))):
            x, y = rng.uniform(0, side, 2)
            cv2.circle(spots, (int(x), int(y)), max(int(rng.uniform(1, 8) * scale), 1), 255, -1)
        grey = float(rng.uniform(0.1, 0.5))
        canvas.absorb(soft(spots, rng.uniform(1.0, 3.5) * scale) * np.float32(1 / 255), (grey, grey, grey * 0.9))
    if rng.random() < 0.05:  # a fold: tissue lies double
        ridge = np.exp(-((canvas.noise(rng.uniform(50, 120)) / np.float32(rng.uniform(0.1, 0.3))) ** 2))
        for plane in (canvas.haem, canvas.eosin):
            plane *= 1 + ridge * np.float32(rng.uniform(0.5, 1.2))


def _seen(
    labels: NDArray[np.int32], nuclei: Nuclei, full_px: NDArray[np.float64], least_px: float
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Labels of the nuclei that can be told, each its largest part, numbered anew; and their classes.

    A nucleus of which less than a third is seen, for being covered by others, is left to what covers it. Those cut by
    the border of the field stay as long as enough is in it.
    """
    parts = numbered_parts(labels, background=0, connectivity=1)
    area = np.bincount(parts.ravel())
    first = np.zeros(len(area), np.int64)
    first[parts.ravel()] = labels.ravel()
    largest = np.zeros(len(nuclei) + 1, np.int64)
    order = np.argsort(area[1:], kind="stable") + 1
    largest[first[order]] = order
    rows = np.flatnonzero(largest[1:])
    part = largest[rows + 1]
    border = np.zeros(len(area), np.bool_)
    for line in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        border[line] = True
    enough = (area[part] >= np.minimum(least_px, 0.6 * full_px[rows])) & (area[part] >= 4)
    enough &= (area[part] >= 0.33 * full_px[rows]) | border[part]
    rows, part = rows[enough], part[enough]
    number = np.zeros(len(area), np.int32)
    number[part] = 1
    kept = np.flatnonzero(number)
    number[kept] = np.arange(1, len(kept) + 1)
    kinds = np.zeros(len(kept), np.uint8)
    kinds[number[part] - 1] = nuclei.kind[rows]
    return number[parts].astype(np.int32), kinds


def _numbered(labels: NDArray[np.int32], least_px: float) -> NDArray[np.int32]:
    """Each connected part of a label numbered anew; parts that are too small are left out."""
    parts = numbered_parts(labels, background=0, connectivity=1)
    area = np.bincount(parts.ravel())
    number = np.zeros(len(area), np.int32)
    kept = np.flatnonzero(area >= least_px)
    kept = kept[kept > 0]
    number[kept] = np.arange(1, len(kept) + 1)
    numbered: NDArray[np.int32] = number[parts]
    return numbered
