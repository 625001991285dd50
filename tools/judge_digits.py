#!/usr/bin/env python
"""Do generated digits look like what they were asked to be? A classifier of real digits says.

    tools/judge_digits.py runs/mnist_flow runs/mnist

The first run carries the noise of its test split to images (`configs/mnist_flow.toml`); the second
classifies them (`configs/mnist.toml`). Prints the share that it labels with the class they were
generated for, and writes `pictures/digits.png` into the first run, which `nodepint report` shows.

    tools/judge_digits.py RUN runs/mnist --samples RUN/samples/{sde-tangent,sde-serial}.npz

judges images that `nodepint sample` has written instead, and prints how far the others are from the
first ones.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.data.datasets import open_split
from nodepint_mpi.errors import DataError, NodepintError
from nodepint_mpi.parallel.comms import Comms, alone, make_comms
from nodepint_mpi.training.evaluate import BATCH, TrainedRun, open_run
from nodepint_mpi.training.forward import make_prediction

N_CLASSES = 10
N_SHOWN = 12
"""Images of each class in the picture."""


def predict(run: TrainedRun, inputs: np.ndarray) -> np.ndarray:
    """The run's predictions at the end of its horizon. Local: the run is opened on one rank."""
    function = make_prediction(run.experiment.test_problem)
    batches = [inputs[i : i + BATCH] for i in range(0, len(inputs), BATCH)]
    return np.concatenate(
        [np.asarray(function(run.params, SampleBatch(x, None)))[-1] for x in batches]
    )


def generate(
    run: TrainedRun,
) -> tuple[Float[np.ndarray, "samples rows columns"], Int[np.ndarray, " samples"]]:
    """Images with gray levels 0 to 255 from the noise of the test split, and their classes.

    Local.

    Raises:
        DataError: if the run is of other data.
    """
    samples = run.experiment.test
    basis = open_split(samples.section.source, "basis", ["image"])
    pictures = basis.take("image", np.arange(basis.n_rows))
    start = np.asarray(samples.take(np.arange(samples.n_rows)).initial)
    if start.shape[1] != len(pictures) - 1 + N_CLASSES:
        raise DataError(
            f"States have {start.shape[1]} entries, but the basis of {samples.section.source} has "
            f"{len(pictures) - 1} directions: expected those and {N_CLASSES} classes; give a run "
            "of `configs/mnist_flow.toml`."
        )
    made = predict(run, start)
    gray = pictures[0] + np.tensordot(made[:, :-N_CLASSES], pictures[1:], axes=1)
    return 255 * np.clip(gray, 0, 1), np.argmax(start[:, -N_CLASSES:], axis=1)


def read_samples(
    files: list[Path],
) -> tuple[Float[np.ndarray, "samples rows columns"], Int[np.ndarray, " samples"]]:
    """Images of the first file, with gray levels 0 to 255, and their classes. Local.

    Prints the difference of the states of the others, which must be of the same noise.

    Raises:
        DataError: if a file holds no images of classes, or other noise than the first.
    """
    first = np.load(files[0])
    if "static" not in first or first["samples"].ndim != 3 or first["static"].shape[1] != 1:
        raise DataError(f"{files[0]}: expected images (samples, rows, columns) of classes.")
    for file in files[1:]:
        other = np.load(file)
        if not np.array_equal(other["noise"], first["noise"]):
            raise DataError(f"{file} began with other noise than {files[0]}.")
        difference = other["states"] - first["states"]
        rms, most = np.sqrt(np.mean(difference**2)), np.max(np.abs(difference))
        print(f"{file}: differs by {rms:.1e} rms, {most:.1e} at most")
    return 255 * np.clip(first["samples"], 0, 1), first["static"][:, 0].astype(int)


def draw(images: np.ndarray, classes: np.ndarray, guesses: np.ndarray) -> Figure:
    """A row for each class, the first images of it; what is taken for another is framed."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    panels = figure.subplots(N_CLASSES, N_SHOWN)
    for panel in panels.ravel():
        panel.set_axis_off()
    for digit, row in enumerate(panels):
        here = np.flatnonzero(classes == digit)[:N_SHOWN]
        for panel, i in zip(row, here, strict=False):
            panel.imshow(images[i], cmap="gray_r", vmin=0, vmax=255)
            if guesses[i] != digit:
                panel.set_axis_on()
                panel.set(xticks=[], yticks=[])
                panel.set_xlabel(f"seen as {guesses[i]}", fontsize="x-small", labelpad=1)
    figure.suptitle("generated, a row for each class (framed: the classifier sees another)")
    return figure


def judge(
    run_folder: Path, classifier_folder: Path, comms: Comms, files: list[Path] | None = None
) -> float:
    """The share of own classes; prints it and draws. Local: `comms` is of one rank."""
    if files:
        images, classes = read_samples(files)
    else:
        images, classes = generate(open_run(run_folder, comms, trust=True))
    guesses = np.argmax(predict(open_run(classifier_folder, comms, trust=True), images), axis=-1)
    right = guesses == classes
    print(f"own class: {right.mean():.1%} of {len(right)} generated digits")
    shares = [f"{d}: {right[classes == d].mean():.0%}" for d in np.unique(classes)]
    print("by class:  " + ", ".join(shares))
    file = run_folder / "pictures" / "digits.png"
    file.parent.mkdir(exist_ok=True)
    draw(images, classes, guesses).savefig(file, dpi=120)
    print(file)
    return float(right.mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="of configs/mnist_flow.toml")
    parser.add_argument("classifier", type=Path, help="of configs/mnist.toml")
    parser.add_argument("--samples", type=Path, nargs="+", help="files of `nodepint sample`")
    given = parser.parse_args()
    try:
        judge(given.run, given.classifier, make_comms(alone()), given.samples)
    except NodepintError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
