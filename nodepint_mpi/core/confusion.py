"""Counts of true against predicted classes, and the scores of every class that follow from them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer


class ClassScores(NamedTuple):
    """Scores of every class, in [0, 1]; NaN where nothing was counted that they could be made of.

    `recall` is the class's own accuracy: the share of its samples that were found. `precision` is
    the share of samples given this label that are of the class. `f1` is their harmonic mean.
    """

    recall: Float[np.ndarray, " classes"]
    precision: Float[np.ndarray, " classes"]
    f1: Float[np.ndarray, " classes"]


def count_confusions(
    labels: Integer[np.ndarray, " samples"],
    guesses: Integer[np.ndarray, " samples"],
    n_classes: int,
) -> Int[np.ndarray, "classes classes"]:
    """How many samples of class i (row) were taken for class j (column). Local.

    Args:
        labels: True classes, 0 to `n_classes` - 1.
        guesses: Predicted ones.
        n_classes: Rows and columns of the table.
    """
    pairs = np.asarray(labels, np.int64) * n_classes + np.asarray(guesses, np.int64)
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def score_classes(confusions: Integer[np.ndarray, "classes classes"]) -> ClassScores:
    """Scores of every class from its counts. Local."""
    found = np.diag(confusions).astype(float)
    of_class, with_label = confusions.sum(axis=1), confusions.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return ClassScores(
            found / of_class, found / with_label, 2 * found / (of_class + with_label)
        )
