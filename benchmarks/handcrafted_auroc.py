"""How well handcrafted numbers tell tissue classes apart: AUROC of a linear model, folds by patient.

python benchmarks/handcrafted_auroc.py [FOLDER]

FOLDER (default ../shared/data beside the repository) holds tissue/ebhi_tiles (tiles.zip, labels.csv), tissue/pcam
(the same) and mil/ebhi_bags.npz; what is absent is skipped. The linear model is an L2 logistic regression on
standardised features (C = 0.05, both fixed beforehand), five folds, five draws of the folds; AUROC is taken over the
out-of-fold scores of a draw, macro over classes, then averaged over the draws.
"""

import csv
import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from scipy.stats import rankdata

from pathopipe.embeddings.handcrafted import FEATURE_NAMES, handcrafted_features

C = 0.05
DRAWS = 5
# Neither set states its resolution in the files. PatchCamelyon is 10x (0.97); EBHI's fields were reduced to 224 px,
# and crypts and nuclei have their usual size at about 1 um per pixel.
EBHI_MPP, PCAM_MPP = 1.0, 0.97

Floats = NDArray[np.float64]


def logistic_regression(x: Floats, y: NDArray[np.int64], n_classes: int) -> Callable[[Floats], Floats]:
    """Multinomial, L2 penalty of 1 / (2 C) on the weights, standardised with the training rows."""
    mean, sd = x.mean(axis=0), x.std(axis=0)
    sd = np.where(sd > 1e-9, sd, 1.0)
    z = (x - mean) / sd
    onehot = np.eye(n_classes)[y]

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights, bias = flat[:-n_classes].reshape(-1, n_classes), flat[-n_classes:]
        log_p = log_softmax(z @ weights + bias, axis=1)
        error = np.exp(log_p) - onehot
        penalty = (weights**2).sum() / (2 * C)
        gradient = np.concatenate([(z.T @ error + weights / C).ravel(), error.sum(axis=0)])
        return float(-(onehot * log_p).sum() + penalty), gradient

    start = np.zeros((x.shape[1] + 1) * n_classes)
    flat = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    weights, bias = flat[:-n_classes].reshape(-1, n_classes), flat[-n_classes:]
    return lambda new: (new - mean) / sd @ weights + bias


def auroc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    n = int(positive.sum())
    rank = rankdata(scores)
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def cross_validated(x: Floats, y: NDArray[np.int64], groups: NDArray[np.str_]) -> tuple[float, float]:
    """Macro AUROC out of fold, whole groups in a fold: mean and standard deviation over draws."""
    n_classes = int(y.max()) + 1
    names, index = np.unique(groups, return_inverse=True)
    found = []
    for draw in range(DRAWS):
        fold = np.random.default_rng(draw).permutation(len(names)) % 5
        log_p = np.zeros((len(y), n_classes))
        for k in range(5):
            test = fold[index] == k
            log_p[test] = log_softmax(logistic_regression(x[~test], y[~test], n_classes)(x[test]), axis=1)
        classes = range(1, 2) if n_classes == 2 else range(n_classes)
        found.append(np.mean([auroc(log_p[:, c], y == c) for c in classes]))
    return float(np.mean(found)), float(np.std(found))


def colour_histogram(images: NDArray[np.uint8]) -> Floats:
    """The plain baseline: shares of 4 x 4 x 4 cells of RGB."""
    cells = (images[..., 0] >> 6).astype(np.int64) * 16 + (images[..., 1] >> 6) * 4 + (images[..., 2] >> 6)
    return np.stack([np.bincount(tile.ravel(), minlength=64) / tile.size for tile in cells])


def read_tiles(folder: Path) -> tuple[NDArray[np.uint8], list[dict[str, str]]]:
    rows = list(csv.DictReader(io.StringIO((folder / "labels.csv").read_text(encoding="utf-8"))))
    with zipfile.ZipFile(folder / "tiles.zip") as tiles:
        encoded = [np.frombuffer(tiles.read(row["file"]), np.uint8) for row in rows]
    return np.stack([cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1] for data in encoded]), rows


def pooled(x: Floats, groups: NDArray[np.str_]) -> Floats:
    """(patients, 2 * features) mean and maximum over each patient's tiles, patients in sorted order."""
    parts = [x[groups == group] for group in np.unique(groups)]
    return np.stack([np.concatenate([part.mean(axis=0), part.max(axis=0)]) for part in parts])


def report(task: str, sets: dict[str, Floats], y: NDArray[np.int64], groups: NDArray[np.str_]) -> None:
    for name, x in sets.items():
        mean, sd = cross_validated(x, y, groups)
        print(f"| {task} | {name} ({x.shape[1]}) | {mean:.3f} ± {sd:.3f} |", flush=True)


def ebhi(folder: Path, bags: Path) -> None:
    images, rows = read_tiles(folder)
    patients = np.asarray([row["patient"] for row in rows])
    classes = sorted({row["class"] for row in rows})
    y = np.asarray([classes.index(row["class"]) for row in rows])
    sets = {
        "colour histogram": colour_histogram(images),
        "handcrafted": handcrafted_features(images, (EBHI_MPP, EBHI_MPP), threads=2).astype(np.float64),
    }
    if bags.exists():
        stored = np.load(bags, allow_pickle=False)
        row_of = {name: row for row, name in enumerate(stored["tile"].tolist())}
        found = [row_of.get(Path(row["file"]).stem) for row in rows]
        if None not in found:
            sets["46 simple features"] = stored["X"][found].astype(np.float64)
    report(f"EBHI tiles, {len(classes)} classes", sets, y, patients)
    names = np.unique(patients)
    has = {row["patient"]: int(row["patient_has_adenocarcinoma"]) for row in rows}
    bags_of = {name: pooled(x, patients) for name, x in sets.items()}
    report("EBHI patients, adenocarcinoma", bags_of, np.asarray([has[name] for name in names]), names)


def pcam(folder: Path) -> None:
    images, rows = read_tiles(folder)
    y = np.asarray([int(row["tumor_in_center_32px"]) for row in rows])
    sets = {
        "colour histogram": colour_histogram(images),
        "handcrafted": handcrafted_features(images, (PCAM_MPP, PCAM_MPP), threads=2).astype(np.float64),
    }
    report("PatchCamelyon, tumour", sets, y, np.asarray([row["file"] for row in rows]))


def main() -> None:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else beside
    print(f"{len(FEATURE_NAMES)} numbers\n\n| task | features | AUROC |\n| --- | --- | --- |")
    for folder, run in (
        (data / "tissue" / "ebhi_tiles", lambda f: ebhi(f, data / "mil" / "ebhi_bags.npz")),
        (data / "tissue" / "pcam", pcam),
    ):
        if (folder / "labels.csv").exists():
            run(folder)
        else:
            print(f"skipped: no {folder}")


if __name__ == "__main__":
    main()
