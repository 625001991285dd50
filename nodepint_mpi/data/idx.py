"""IDX files of gray images and their labels, the format of MNIST and of sets made like it."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from nodepint_mpi.errors import DataError


def read_labelled_images(images: Path, labels: Path, names: Sequence[str]) -> datasets.Dataset:
    """A dataset with columns `image` (uint8) and `label`. Local.

    Args:
        images: IDX file of three axes.
        labels: IDX file of one axis, one byte an image.
        names: Of the classes, in the order of their numbers.

    Raises:
        DataError: if a file is damaged, or they do not go together.
    """
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or classes.shape != pixels.shape[:1]:
        raise DataError(
            f"{images.name}: images {pixels.shape} do not go with labels {classes.shape}"
        )
    if classes.size and classes.max() >= len(names):
        raise DataError(f"{labels} has a label {classes.max()}: expected 0 to {len(names) - 1}")
    features = datasets.Features(
        image=datasets.Array2D(pixels.shape[1:], "uint8"),
        label=datasets.ClassLabel(names=list(names)),
    )
    columns = {"image": pixels, "label": classes.astype(np.int64)}
    return datasets.Dataset.from_dict(columns, features=features)


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file of bytes, packed by gzip if its name says so. Local.

    It begins with two zeros, the type (8: uint8), the number of axes, and their sizes.

    Raises:
        DataError: if it is something else, or damaged.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is damaged ({error}): replace it") from error
    n_axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * n_axes], ">u4").tolist())
    body = content[4 + 4 * n_axes :]
    if not n_axes or len(shape) != n_axes or len(body) != np.prod(shape):
        raise DataError(f"{path} is not an IDX file of bytes, or damaged: replace it")
    return np.frombuffer(body, np.uint8).reshape(shape)
