"""MNIST flow: straight lines from noise to handwritten digits, in coordinates on a basis."""

from pathlib import Path

import datasets
import numpy as np

from nodepint_mpi.data.datasets import open_split
from nodepint_mpi.errors import DataError


def prepare(
    folder: Path,
    *,
    n_modes: int = 64,
    n_edges: int = 11,
    n_noises: int = 1,
    n_train: int = 60_000,
    n_test: int = 1000,
    seed: int = 0,
    images: str = "../mnist/prepared",
) -> datasets.DatasetDict:
    """Make splits train and test with columns `t` and `u`, and a split `basis` of images.

    A row is the line (1 - t) noise + t coordinates of an image, then its label as ten constants.

    Args:
        folder: That of this file.
        n_modes: Directions of the basis, the leading ones of the training images.
        n_edges: Times of each line, equally spaced from 0 to 1, at least 2.
        n_noises: Lines that lead to each training image.
        n_train: Images in train, the first ones.
        n_test: Lines in test.
        seed: Of the noise, not negative.
        images: Where the images are, relative to `folder`.
    """
    source = {s: open_split(folder / images, s, ["image", "label"]) for s in ("train", "test")}
    most = {split: part.n_rows for split, part in source.items()}
    if not (
        1 <= n_train <= most["train"]
        and 1 <= n_test <= most["test"]
        and 1 <= n_modes < n_train
        and n_edges >= 2
        and n_noises >= 1
        and seed >= 0
    ):
        raise DataError(
            f"n_train must be 1 to {most['train']}, n_test 1 to {most['test']}, n_modes 1 to "
            f"n_train - 1, n_edges at least 2, n_noises at least 1 and seed not negative, given "
            f"{n_train}, {n_test}, {n_modes}, {n_edges}, {n_noises}, {seed}"
        )
    rows = {"train": np.arange(n_train), "test": np.arange(n_test)}
    pixels = {s: source[s].take("image", rows[s]).astype(np.float32) / 255 for s in source}
    labels = {s: source[s].take("label", rows[s]) for s in source}
    shape = pixels["train"].shape[1:]
    mean, scaled, to_coordinates = principal_directions(pixels["train"], n_modes)
    times = np.linspace(0.0, 1.0, n_edges)
    made = {}
    for number, split in enumerate(source):
        flat = pixels[split].reshape(len(pixels[split]), -1)
        repeats = n_noises if split == "train" else 1
        ends = np.tile((flat - mean) @ to_coordinates, (repeats, 1))
        noise = np.random.default_rng([seed, number]).standard_normal(ends.shape, np.float32)
        given = np.eye(10, dtype=np.float32)[np.tile(labels[split], repeats)]
        t = times.astype(np.float32)[:, None]
        lines = [(1 - t) * z + t * x for z, x in zip(noise, ends, strict=True)]
        constant = np.broadcast_to(given[:, None], (len(given), n_edges, 10))
        u = np.concatenate([np.asarray(lines, np.float32), constant], axis=2)
        features = datasets.Features(
            t=datasets.List(datasets.Value("float64"), length=n_edges),
            u=datasets.Array2D(u.shape[1:], "float32"),
        )
        columns = {"t": np.tile(times, (len(u), 1)), "u": u}
        made[split] = datasets.Dataset.from_dict(columns, features=features)
    pictures = np.concatenate([mean[None], scaled.T]).reshape(-1, *shape).astype(np.float32)
    features = datasets.Features(image=datasets.Array2D(shape, "float32"))
    made["basis"] = datasets.Dataset.from_dict({"image": pictures}, features=features)
    return datasets.DatasetDict(made)


def principal_directions(images: np.ndarray, n_modes: int) -> tuple[np.ndarray, ...]:
    """Mean, directions times their standard deviation, and the map to coordinates. Local.

    The coordinates of the images on (pixels, n_modes) have mean 0 and variance 1, as the noise.
    """
    flat = images.reshape(len(images), -1)
    mean = flat.mean(axis=0)
    centred = flat - mean
    variances, directions = np.linalg.eigh((centred.T @ centred / len(flat)).astype(float))
    directions = directions[:, ::-1][:, :n_modes]
    # The sign of an eigenvector is arbitrary: its largest entry is made positive.
    peaks = np.take_along_axis(directions, np.abs(directions).argmax(axis=0)[None], axis=0)
    directions = directions * np.sign(peaks)
    deviations = np.sqrt(variances[::-1][:n_modes])
    scaled, back = directions * deviations, directions / deviations
    return mean, scaled.astype(np.float32), back.astype(np.float32)
