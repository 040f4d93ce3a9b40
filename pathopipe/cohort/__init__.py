"""A cohort: its manifest, its labels, and splits of its patients that can't leak."""

from pathopipe.cohort.labels import LabelJoin, LabelTable, is_missing, join_labels, read_labels
from pathopipe.cohort.manifest import check_refs, check_slide_id, read_manifest
from pathopipe.cohort.splits import Fold, SplitError, check_folds, folds_from_column, nested_folds, patient_strata

__all__ = [
    "Fold",
    "LabelJoin",
    "LabelTable",
    "SplitError",
    "check_folds",
    "check_refs",
    "check_slide_id",
    "folds_from_column",
    "is_missing",
    "join_labels",
    "nested_folds",
    "patient_strata",
    "read_labels",
    "read_manifest",
]
