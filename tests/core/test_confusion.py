"""Counts and scores of classes: by hand, and against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics

from nodepint_mpi.core.confusion import count_confusions, score_classes


def test_a_table_counted_by_hand():
    wanted, guesses = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 0, 2, 1, 2, 1])
    confusions = count_confusions(wanted, guesses, 3)
    np.testing.assert_array_equal(confusions, [[2, 0, 1], [0, 1, 0], [0, 1, 1]])
    scores = score_classes(confusions)
    np.testing.assert_allclose(scores.recall, [2 / 3, 1, 1 / 2])
    np.testing.assert_allclose(scores.precision, [1, 1 / 2, 1 / 2])
    np.testing.assert_allclose(scores.f1, [4 / 5, 2 / 3, 1 / 2])


@pytest.mark.filterwarnings("error")
def test_a_class_without_samples_has_no_scores():
    scores = score_classes(count_confusions(np.array([0, 1]), np.array([0, 0]), 3))
    np.testing.assert_array_equal(scores.recall, [1, 0, np.nan])
    np.testing.assert_array_equal(scores.precision, [0.5, np.nan, np.nan])


def test_many_samples_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    wanted = rng.integers(10, size=500).astype(np.uint8)
    guesses = np.where(rng.random(500) < 0.7, wanted, rng.integers(10, size=500))
    confusions = count_confusions(wanted, guesses, 10)
    np.testing.assert_array_equal(confusions, metrics.confusion_matrix(wanted, guesses))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(wanted, guesses)
    for found, expected in zip(score_classes(confusions), (recall, precision, f1), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
