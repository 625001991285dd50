#!/usr/bin/env python
"""Do generated digits look like what they were asked to be? A classifier of real digits says.

    nodepint sample runs/mnist_flow --n 1000 --method tangent --rank 32 --trust
    tools/judge_digits.py runs/mnist runs/mnist_flow/samples/ode-tangent-rank32.npz

The run (`configs/mnist.toml`) classifies the images of the first file. Prints the share that it
labels with the class they were generated for, and how far the samples of further files are from
these; writes `pictures/digits.png` into the run they are of, which `nodepint report` shows.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure

from nodepint_mpi.core.batch import SampleBatch
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


def read_samples(
    files: list[Path],
) -> tuple[UInt8[np.ndarray, "samples rows columns"], Int[np.ndarray, " samples"]]:
    """Images of the first file, with gray levels 0 to 255, and their classes. Local.

    Prints the difference of the states of the others, which must be of the same noise.

    Raises:
        DataError: if a file holds no images of classes, or other noise than the first.
    """
    for file in files:
        if not file.is_file():
            raise DataError(f"There is no file {file}: expected one that `nodepint sample` wrote.")
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
    gray = np.round(255 * np.clip(first["samples"], 0, 1)).astype(np.uint8)
    return gray, first["static"][:, 0].astype(int)


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


def judge(classifier_folder: Path, files: list[Path], comms: Comms) -> float:
    """The share of own classes; prints it and draws. Local: `comms` is of one rank."""
    images, classes = read_samples(files)
    guesses = np.argmax(predict(open_run(classifier_folder, comms, trust=True), images), axis=-1)
    right = guesses == classes
    print(f"own class: {right.mean():.1%} of {len(right)} generated digits")
    shares = [f"{d}: {right[classes == d].mean():.0%}" for d in np.unique(classes)]
    print("by class:  " + ", ".join(shares))
    file = files[0].absolute().parents[1] / "pictures" / "digits.png"
    file.parent.mkdir(exist_ok=True)
    draw(images, classes, guesses).savefig(file, dpi=120)
    print(file)
    return float(right.mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("classifier", type=Path, help="of configs/mnist.toml")
    parser.add_argument("files", type=Path, nargs="+", help="of `nodepint sample`")
    given = parser.parse_args()
    try:
        judge(given.classifier, given.files, make_comms(alone()))
    except NodepintError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
