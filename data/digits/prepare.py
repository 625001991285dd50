"""Digits: 1,797 handwritten digits of 8 x 8 pixels, from scikit-learn; no download."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np

from nodepint_mpi.errors import DataError


def prepare(folder: Path, *, n_test: int = 360, seed: int = 0) -> datasets.DatasetDict:
    """Make splits train and test with columns `image` (uint8, 0 to 255) and `label`.

    Args:
        folder: Not used.
        n_test: Images in the test split, 1 to 1,796; all others are in train.
        seed: Of the draw of the test images; not negative.
    """
    from sklearn.datasets import load_digits

    source: Any = load_digits()
    n_rows = len(source.target)
    if not 1 <= n_test < n_rows or seed < 0:
        raise DataError(
            f"n_test must be 1 to {n_rows - 1} and seed not negative, given {n_test} and {seed}"
        )
    # The raw output of Philox is the same in all versions of NumPy; so is the split.
    order = np.argsort(np.random.Philox(key=seed).random_raw(n_rows), kind="stable")
    rows = {"train": np.sort(order[n_test:]), "test": np.sort(order[:n_test])}
    # 0..16 stretched to 0..255, one to one, so that images mean the same as in other sets.
    images = np.rint(source.images * (255 / 16)).astype(np.uint8)
    labels = source.target.astype(np.int64)
    features = datasets.Features(
        image=datasets.Array2D((8, 8), "uint8"),
        label=datasets.ClassLabel(names=[str(digit) for digit in range(10)]),
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": images[here], "label": labels[here]}, features=features
            )
            for split, here in rows.items()
        }
    )
