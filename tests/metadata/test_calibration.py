"""Thresholds hold the precision that was asked for, and nothing is promised that few slides can not prove."""

import numpy as np

from pathopipe.metadata.calibration import find_threshold


def test_threshold_reaches_the_precision_asked_for_on_fresh_slides() -> None:
    reached, given = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        surety = rng.uniform(0.5, 1, 5000)
        right = (rng.random(5000) < surety).astype(float)
        cut = find_threshold(surety[:400], right[:400], 0.9)
        assert cut is not None
        above = surety[400:] >= cut
        reached.append(right[400:][above].mean())
        given.append(above.mean())
    # By theory 0.8 is the cut above which nine in ten are right.
    assert np.mean(np.asarray(reached) >= 0.9) > 0.85
    assert 0.15 < np.mean(given) < 0.4


def test_few_or_wrong_predictions_prove_no_precision() -> None:
    assert find_threshold(np.full(10, 0.99), np.ones(10), 0.9) is None
    # 0.9 ** 22 is the first power below a tenth.
    assert find_threshold(np.full(21, 0.99), np.ones(21), 0.9) is None
    assert find_threshold(np.full(22, 0.99), np.ones(22), 0.9) == 0.99
    assert find_threshold(np.linspace(0.5, 1, 50), np.zeros(50), 0.9) is None
    unknown = np.r_[np.ones(22), np.full(50, np.nan)]
    assert find_threshold(np.r_[np.full(22, 0.7), np.full(50, 0.2)], unknown, 0.9) == 0.7
