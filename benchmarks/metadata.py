"""How well fields of a catalogue are predicted, and whether wrong records are found: five small tables.

    python benchmarks/metadata.py [--only reports,together,ebhi,drawn,planted] [--data ../shared/data] [--seed 0]
        [--plantings 1]

- reports: cancer type (of 23) and T stage of 721 TCGA patients from their reports alone, one model for both; with the
  sentences that state a stage taken out, and with all sentences.
- together: the same tasks from report and table (what the slide table says of the patient: N and M stage, kinds of
  slides), against single-task models of the report, on the same folds.
- ebhi: tissue class and patient label of the 250 EBHI-SEG bags, from the image alone.
- drawn: frozen or FFPE and tumour or normal on drawn slides (ice holes, blur, a stain of its own for every patient;
  large dark nuclei in a third of the tumour tiles), handcrafted features; with drawn reports and tables that tell part
  of it, against single-task models of the image. No real image comes with a report, so only drawn ones can show this.
- planted: 5 % of the records made wrong before training; how many of the first k of the review list are among them,
  over several plantings, and how many could be at most by the AUROC of the evidence (see metadata_review.py for why).

Features of drawn slides are kept in --cache.
"""

import argparse
import csv
import gzip
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy.stats import beta
from sklearn.metrics import roc_auc_score

from pathopipe.embeddings.handcrafted import handcrafted_features
from pathopipe.metadata.calibration import interpret
from pathopipe.metadata.cases import MetadataCohort, read_cohort
from pathopipe.metadata.evaluate import ALL, MULTITASK, Evaluation, OutOfFold, evaluate
from pathopipe.metadata.fold import fold_data, train_model
from pathopipe.metadata.leakage import probe
from pathopipe.metadata.network import MODALITIES
from pathopipe.metadata.review import Quality, gaussian_precision, plant, quality, rank
from pathopipe.metadata.settings import MetadataConfig, load_metadata_config
from pathopipe.metadata.splits import deal_folds
from pathopipe.metadata.tasks import TaskSpec
from pathopipe.metadata.train import train
from pathopipe.mil.bags import array_bag
from pathopipe.synth import DrawnSlide, SynthSpec

SHARE = 0.05
"""Of the records that are planted wrong."""

CANCER = TaskSpec(name="cancer", column="cancer_type", kind="multi-class")
T_STAGE = TaskSpec(name="t_stage", column="t_stage", kind="ordinal", classes=("1", "2", "3", "4"))
EBHI_CLASS = TaskSpec(name="tissue", column="tissue", kind="multi-class")
EBHI_LABEL = TaskSpec(name="label", column="label", kind="multi-class", classes=("other", "adenocarcinoma"))
FIXATION = TaskSpec(name="fixation", column="fixation", kind="multi-class", classes=("FFPE", "frozen"))
SAMPLE = TaskSpec(name="sample", column="sample", kind="multi-class", classes=("normal", "tumour"))
PROCEDURE = TaskSpec(name="procedure", column="procedure", kind="multi-class", classes=("biopsy", "resection"))

TILE_PX, MPP, TILES = 224, 0.5, 10


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="reports,together,ebhi,drawn,planted")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "pathopipe-metadata-drawn")
    parser.add_argument("--patients", type=int, default=80, help="of the drawn cohort, two slides each")
    parser.add_argument("--of", default="reports,ebhi,drawn", help="cohorts of planted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plantings", type=int, default=1, help="of planted, with seeds from --seed on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="metadata.KEY=VALUE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = load_metadata_config(None, arguments.set)
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        for name in arguments.only.split(","):
            began = time.perf_counter()
            match name:
                case "reports":
                    reports(arguments.data, work, settings, arguments.seed)
                case "together":
                    together(arguments.data, work, settings, arguments.seed)
                case "ebhi":
                    cohort = ebhi_cohort(arguments.data, work)
                    print(f"EBHI-SEG bags, image alone: {described(cohort)}")
                    tell(*measured(cohort, settings, work / "ebhi-run", arguments.seed))
                case "drawn":
                    drawn(arguments.cache, arguments.patients, work, settings, arguments.seed)
                case "planted":
                    cohorts = {
                        "reports": lambda: report_cohort(arguments.data, work / "p-reports", columns=()),
                        "ebhi": lambda: ebhi_cohort(arguments.data, work / "p-ebhi"),
                        "drawn": lambda: drawn_cohort(arguments.cache, arguments.patients, work / "p-drawn"),
                    }
                    for of in arguments.of.split(","):
                        seeds = range(arguments.seed, arguments.seed + arguments.plantings)
                        planted(of, cohorts[of](), settings, seeds)
                case _:
                    parser.error(f"no table {name}")
            print(f"({time.perf_counter() - began:.0f} s)\n", flush=True)


def measured(cohort: MetadataCohort, settings: MetadataConfig, out: Path, seed: int) -> tuple[Evaluation, OutOfFold]:
    """Train over the folds, and the figures."""
    oof = train(cohort, settings, out, seed=seed)
    return evaluate(oof, draws=settings.draws, seed=seed), oof


def tell(evaluation: Evaluation, oof: OutOfFold) -> None:
    """A line for each task and view, then the gains."""
    names = ("auroc", "auprc", "balanced_accuracy", "ece")
    print(f"{'task':>10} {'model':>18} {'AUROC (95 %)':>24} {'AUPRC':>6} {'bal.acc':>7} {'ECE':>6} {'given':>10} right")
    single = {one.view for one in evaluation.figures if one.view[0] == MULTITASK and one.view[1] != ALL}
    passed_over = single if len(single) == 1 else set()
    for one in evaluation.figures:
        if one.view in passed_over:
            continue
        if one.table is None:
            print(f"{one.task:>10} {shown(one.view):>18} {one.why}")
            continue
        known = {figure.name: figure for figure in one.table.figures if not figure.label and not figure.site}
        interval = known["auroc"].text() if "auroc" in known else ""
        values = {name: known[name].value if name in known else None for name in names}
        numbers = " ".join(
            f"{'' if values[key] is None else format(values[key], '.3f'):>{width}}"
            for key, width in zip(names[1:], (6, 7, 6), strict=True)
        )
        right = "" if one.given_right is None else f"{one.given_right:.3f}"
        given = f"{one.n_given}/{one.n_slides}"
        print(f"{one.task:>10} {shown(one.view):>18} {interval:>24} {numbers} {given:>10} {right}")
    for gain in evaluation.gains:
        if gain.view in passed_over:
            continue
        if gain.difference is None:
            print(f"  gain, {gain.task or 'mean'}: {gain.note}")
            continue
        low, high = (np.nan if end is None else end for end in (gain.low, gain.high))
        print(
            f"  gain of {shown(gain.view)} over {shown(gain.over)}, {gain.task or 'mean of tasks'}: "
            f"{gain.value:.3f} - {gain.baseline:.3f} = {gain.difference:+.3f} ({low:+.3f} to {high:+.3f}), "
            f"{gain.n_patients} patients"
        )


def shown(view: tuple[str, str]) -> str:
    return f"{view[0]} {view[1]}"


def described(cohort: MetadataCohort) -> str:
    known = [f"{task.name} {int(np.isfinite(cohort.truth[task.name]).all(axis=1).sum())}" for task in cohort.tasks]
    return f"{len(cohort)} slides, {len(set(cohort.patients))} patients; records: {', '.join(known)}"


# --- reports -----------------------------------------------------------------------------------------------------


def report_cohort(data: Path, work: Path, *, columns: Sequence[str] | None, denied: bool = True) -> MetadataCohort:
    """The 721 reports, one row a patient, with what the slide table says of the patient."""
    work.mkdir(parents=True, exist_ok=True)
    with gzip.open(data / "reports" / "tcga_reports.csv.gz", "rt", encoding="utf-8", newline="") as file:
        told = list(csv.DictReader(file))
    slides: dict[str, list[dict[str, str]]] = defaultdict(list)
    with gzip.open(data / "mil" / "tcga_labels" / "tcga_slides.csv.gz", "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            slides[row["patient"]].append(row)
    rows, texts = [], []
    for report in told:
        own = slides[report["patient"]]
        kinds = Counter(f"{row['preservation']}_{row['tissue_type']}" for row in own)
        rows.append(
            {
                "slide_id": report["patient"],
                "patient_id": report["patient"],
                "cancer_type": report["cancer_type"],
                "t_stage": report["t_stage"],
                "n_stage": report["ajcc_pathologic_n"],
                "m_stage": report["ajcc_pathologic_m"],
                "ffpe_tumour_slides": kinds["FFPE_tumor"],
                "frozen_tumour_slides": kinds["frozen_tumor"],
                "normal_slides": kinds["FFPE_normal"] + kinds["frozen_normal"],
            }
        )
        texts.append({"patient_id": report["patient"], "text": report["text"]})
    write_table(work / "manifest.csv", rows)
    write_table(work / "reports.csv", texts)
    return read_cohort(
        work / "manifest.csv",
        (CANCER, T_STAGE),
        reports=work / "reports.csv",
        table_columns=columns,
        deny_stating=denied,
    )


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def reports(data: Path, work: Path, settings: MetadataConfig, seed: int) -> None:
    """Text alone, with and without the deny list."""
    for denied in (True, False):
        folder = work / f"reports-{denied}"
        cohort = report_cohort(data, folder, columns=(), denied=denied)
        print(f"reports, deny list {'in force' if denied else 'off'}: {described(cohort)}")
        for note in cohort.notes:
            print(f"  {note}")
        leaks = probe(cohort)
        of = Counter(leak.task for leak in leaks)
        print(f"  probe: {dict(of)}; first: {'; '.join(leak.line() for leak in leaks if leak.task == 't_stage')[:600]}")
        tell(*measured(cohort, settings, folder / "run", seed))


def together(data: Path, work: Path, settings: MetadataConfig, seed: int) -> None:
    """Report and table."""
    cohort = report_cohort(data, work / "together", columns=None)
    print(f"report and table: {described(cohort)}; columns {', '.join(cohort.table_columns)}")
    for note in cohort.notes:
        print(f"  {note}")
    tell(*measured(cohort, settings, work / "together" / "run", seed))


# --- bags --------------------------------------------------------------------------------------------------------


def ebhi_cohort(data: Path, work: Path) -> MetadataCohort:
    """The 250 patients of EBHI-SEG, one bag each."""
    features = work / "ebhi"
    features.mkdir(parents=True, exist_ok=True)
    rows = []
    with np.load(data / "mil" / "ebhi_bags.npz") as arrays:
        of_bag, values = arrays["bag"], arrays["X"].astype(np.float32)
        names = [str(name) for name in arrays["class_names"]]
        for number, bag_id in enumerate(map(str, arrays["bag_ids"])):
            np.savez(features / f"bag{number:03d}.npz", features=values[of_bag == number])
            worst = arrays["bag_worst_class"][number]
            rows.append(
                {
                    "slide_id": f"bag{number:03d}",
                    "patient_id": bag_id,
                    "tissue": str(worst) if str(worst) in names else names[int(worst)],
                    "label": ("other", "adenocarcinoma")[int(arrays["bag_label"][number])],
                }
            )
    write_table(work / "ebhi.csv", rows)
    return in_memory(read_cohort(work / "ebhi.csv", (EBHI_CLASS, EBHI_LABEL), features=features, table_columns=()))


def in_memory(cohort: MetadataCohort) -> MetadataCohort:
    """With the tiles of all slides read: they are few."""
    cases = []
    for case in cohort.cases:
        assert case.bag is not None
        bag = array_bag(case.slide_id, case.bag.read(), patient_id=case.patient_id, encoder=case.bag.encoder)
        cases.append(replace(case, bag=bag))
    return replace(cohort, cases=tuple(cases))


# --- drawn slides ------------------------------------------------------------------------------------------------


def drawn_cohort(cache: Path, patients: int, work: Path, *, told: bool = False) -> MetadataCohort:
    """Two slides a patient; with drawn reports and tables where ``told``."""
    work.mkdir(parents=True, exist_ok=True)
    rows, texts = [], []
    for patient in range(patients):
        rng = np.random.default_rng([7, patient])
        resected = bool(rng.random() < 0.5)
        # A patient's slides share stain and report; the second is of another kind as often as not.
        hue = rng.normal(0, 1, 4)
        samples = [bool(rng.random() < 0.5) for _ in range(2)]
        for number in range(2):
            frozen, tumour = bool(rng.random() < 0.4), samples[number]
            name = f"d{patient:03d}-{number}"
            path = cache / f"{name}-{int(frozen)}{int(tumour)}.npz"
            if not path.exists():
                cache.mkdir(parents=True, exist_ok=True)
                tiles, _ = drawn_tiles(patient * 2 + number, hue, frozen=frozen, tumour=tumour)
                np.savez(path, features=handcrafted_features(tiles, (MPP, MPP)))
            link = work / "features" / f"{name}.npz"
            link.parent.mkdir(exist_ok=True)
            if not link.exists():
                link.symlink_to(path)
            rows.append(
                {
                    "slide_id": name,
                    "patient_id": f"drawn{patient:03d}",
                    "fixation": "frozen" if frozen else "FFPE",
                    "sample": "tumour" if tumour else "normal",
                    "procedure": "resection" if resected else "biopsy",
                    "block": ("cassette", "chuck")[int(frozen)] if rng.random() < 0.5 else "",
                    "age": round(float(rng.normal(62, 9)), 1),
                }
            )
        texts.append({"patient_id": f"drawn{patient:03d}", "text": drawn_report(rng, resected, any(samples))})
    write_table(work / "drawn.csv", rows)
    write_table(work / "drawn-reports.csv", texts)
    cohort = read_cohort(
        work / "drawn.csv",
        (FIXATION, SAMPLE, PROCEDURE) if told else (FIXATION, SAMPLE),
        features=work / "features",
        reports=work / "drawn-reports.csv" if told else None,
        table_columns=("block", "age") if told else (),
    )
    return in_memory(cohort)


def drawn_tiles(
    seed: int, hue: np.ndarray, *, frozen: bool, tumour: bool, blank: bool = False
) -> tuple[np.ndarray, int]:
    """(n, height, width, 3) tiles of tissue, and how many of them show tumour; quickly where only that is wanted."""
    rng = np.random.default_rng([11, seed])
    strength = float(np.clip(1 + 0.12 * hue[3], 0.6, 1.5))
    slide = DrawnSlide(
        SynthSpec(width_px=2400, height_px=1800, mpp=MPP, seed=seed, stain_strength=strength, pen=False, dust=False)
    )
    mask = slide.tissue_mask(180, 240) > 0
    tiles: list[np.ndarray] = []
    n_tumour = 0
    for _ in range(400):
        x, y = int(rng.integers(0, 2400 - TILE_PX)), int(rng.integers(0, 1800 - TILE_PX))
        if mask[y // 10 : (y + TILE_PX) // 10, x // 10 : (x + TILE_PX) // 10].mean() < 0.7:
            continue
        tile = np.zeros((TILE_PX, TILE_PX, 3), np.uint8) if blank else slide.read(x, y, TILE_PX, TILE_PX).copy()
        if tumour and rng.random() < 1 / 3:
            tile = with_large_nuclei(tile, rng)
            n_tumour += 1
        if frozen:
            tile = with_ice(tile, rng)
        # The stain differs between patients whatever the fixation, and a little more in frozen sections.
        shift = 9 * hue[:3] + (rng.normal(0, 4, 3) if frozen else 0)
        tiles.append(np.clip(tile + shift, 0, 255).astype(np.uint8))
        if len(tiles) == TILES:
            break
    return np.stack(tiles), n_tumour


def with_large_nuclei(tile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    for _ in range(int(rng.integers(12, 30))):
        centre = tuple(int(v) for v in rng.integers(0, TILE_PX, 2))
        axes = tuple(int(v) for v in rng.integers(9, 16, 2))
        colour = tuple(int(v) for v in np.array([75, 45, 115]) + rng.integers(-15, 15, 3))
        cv2.ellipse(tile, centre, axes, float(rng.uniform(0, 180)), 0, 360, colour, cv2.FILLED, cv2.LINE_AA)
    return tile


def with_ice(tile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Small pale holes where ice stood, and softer edges."""
    tile = cv2.GaussianBlur(tile, (0, 0), float(rng.uniform(0.6, 1.4)))
    for _ in range(int(rng.integers(20, 70))):
        centre = tuple(int(v) for v in rng.integers(0, TILE_PX, 2))
        axes = (int(rng.integers(1, 4)), int(rng.integers(3, 9)))
        cv2.ellipse(tile, centre, axes, float(rng.uniform(0, 180)), 0, 360, (238, 230, 238), cv2.FILLED, cv2.LINE_AA)
    return tile


def drawn_report(rng: np.random.Generator, resected: bool, tumour: bool) -> str:
    """Sentences of which some tell; not every report has them."""
    sentences = ["The specimen was received in a labelled container.", "Sections were examined at several levels."]
    if rng.random() < 0.7:
        sentences.append(
            "The margins are inked and the segment is opened along its length."
            if resected
            else "Several small fragments, entirely submitted."
        )
    if rng.random() < 0.6:
        sentences.append("Atypical glands infiltrate the stroma." if tumour else "The architecture is preserved.")
    filler = ["Pale tissue.", "Firm on cut surface.", "The fat is unremarkable.", "Vessels are patent."]
    sentences += [str(text) for text in rng.choice(filler, 2, replace=False)]
    return " ".join(str(text) for text in rng.permutation(sentences))


def drawn(cache: Path, patients: int, work: Path, settings: MetadataConfig, seed: int) -> None:
    """Image alone, then everything."""
    cohort = drawn_cohort(cache, patients, work / "drawn")
    print(f"drawn slides, image alone: {described(cohort)}")
    tell(*measured(cohort, settings, work / "drawn" / "run", seed))
    cohort = drawn_cohort(cache, patients, work / "drawn-told", told=True)
    print(f"drawn slides with drawn reports and tables: {described(cohort)}")
    tell(*measured(cohort, settings, work / "drawn-told" / "run", seed))


# --- planted -----------------------------------------------------------------------------------------------------


def planted(name: str, cohort: MetadataCohort, settings: MetadataConfig, seeds: Sequence[int]) -> None:
    """Wrong records are in the cohort before anything is learnt; the models are those of ``metadata train``."""
    tables: dict[str, list[Planting]] = {task.name: [] for task in cohort.tasks}
    for seed in seeds:
        wrong = {task.name: plant(task, cohort.truth[task.name], share=SHARE, seed=seed + 100) for task in cohort.tasks}
        spoilt = replace(cohort, truth={task: truth for task, (truth, _) in wrong.items()})
        scores = judged(spoilt, settings, seed)
        for task in cohort.tasks:
            tables[task.name].append(
                Planting.of(task, spoilt, cohort.truth[task.name], wrong[task.name][1], scores[task.name])
            )
    print(f"planted, {name}: {SHARE:.0%} of the records of each task wrong, {len(seeds)} times; {described(cohort)}")
    print(
        f"{'task':>10} {'AUROC':>6} {'planted':>7} {'listed':>6}  precision at 5, 10, 20, 30; at planted (95 %); "
        "recall; AUROC of the evidence, at planted by that at most"
    )
    for task, found in tables.items():
        hits, total = sum(one.hits for one in found), sum(one.quality.planted for one in found)
        at = " ".join(f"{np.mean([one.quality.precision_at(k) or 0 for one in found]):.2f}" for k in (5, 10, 20, 30))
        low, high = beta.ppf(0.025, hits, total - hits + 1), beta.ppf(0.975, hits + 1, total - hits)
        evidence = float(np.mean([one.evidence_auroc for one in found]))
        print(
            f"{task:>10} {np.mean([one.auroc for one in found]):>6.3f} {total:>7} "
            f"{sum(one.quality.listed for one in found):>6}  {at}; {hits / total:.2f} "
            f"({0 if hits == 0 else low:.2f} to {1 if hits == total else high:.2f}); "
            f"{sum(one.quality.found for one in found) / total:.2f}; {evidence:.3f}, "
            f"{gaussian_precision(min(evidence, 0.9999), SHARE):.2f}",
            flush=True,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Planting:
    """One task of one planting."""

    quality: Quality
    hits: int
    """Planted records among as many first ones of the list."""
    auroc: float
    """Of the models that learnt from the wrong records, against the right ones; macro."""
    evidence_auroc: float
    """How well planted records are told from others by the log-odds against the record."""

    @classmethod
    def of(
        cls, task: TaskSpec, spoilt: MetadataCohort, truth: np.ndarray, wrong: np.ndarray, scores: np.ndarray
    ) -> "Planting":
        """Hold a ranking by ``scores`` against what was planted."""
        recorded = spoilt.truth[task.name]
        listed = rank(
            [(case.slide_id, case.patient_id) for case in spoilt.cases],
            [task.target],
            {task.name: recorded},
            {task.name: scores},
            {task.name: np.zeros(len(spoilt), bool)},
            [""] * len(spoilt),
        )
        found = quality(listed, {task.name: wrong})
        known = np.flatnonzero(np.isfinite(truth[:, 0]))
        of_record = scores[known, recorded[known, 0].astype(int)].clip(1e-12, 1 - 1e-12)
        return cls(
            quality=found,
            hits=int(found.hits[: found.planted].sum()),
            auroc=float(
                np.mean(
                    [
                        roc_auc_score(truth[known, 0] == number, scores[known, number])
                        for number in range(len(task.classes))
                    ]
                )
            ),
            evidence_auroc=float(roc_auc_score(wrong[known], np.log1p(-of_record) - np.log(of_record))),
        )


def judged(cohort: MetadataCohort, settings: MetadataConfig, seed: int) -> dict[str, np.ndarray]:
    """By task (n, P) what ``metadata train`` says of slides that it has not learnt from, without its baselines."""
    found = {task.name: np.full((len(cohort), len(task.classes)), np.nan) for task in cohort.tasks}
    for fold in deal_folds(cohort, settings, seed=seed):
        # The seeds of the networks follow from the name.
        data = fold_data(cohort, replace(fold, name=f"fold{fold.name}"), settings, seed=seed, device="cpu")
        model = train_model(data, MULTITASK, range(len(data.specs)), data.inputs, lambda epoch: None)
        logits = model.logits(data.inputs, fold.test, [MODALITIES])[MODALITIES]
        for name, values in interpret(model.card, logits, data.inputs.present[fold.test]).items():
            found[name][fold.test] = values
    return found


if __name__ == "__main__":
    main()
