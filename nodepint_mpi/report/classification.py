"""The section on true against predicted labels."""

import numpy as np
from matplotlib.figure import Figure

from nodepint_mpi.core.confusion import ClassScores, count_confusions, score_classes
from nodepint_mpi.pages.figures import draw_labels
from nodepint_mpi.pages.parts import Picture, Section, Table, number
from nodepint_mpi.report.trained import Model, Predicted
from nodepint_mpi.training.evaluate import N_SHOWN

MANY_CLASSES = 20
"""With more the counts are too small to be read."""


def labels(model: Model) -> Section | None:
    """Which classes are taken for which, scores of every class, and images to look at."""
    seen = model.predicted
    if seen is None or not seen.is_labels:
        return None
    wanted, logits = seen.targets[:, 0], seen.predictions[:, 0]
    guesses, n_classes = np.argmax(logits, axis=-1), logits.shape[-1]
    confusions = count_confusions(wanted, guesses, n_classes)
    scores = score_classes(confusions)
    n_samples = f"{len(wanted)} test samples, step {seen.step}."
    totals = [(name, number(value)) for name, value in seen.scores.items()]
    parts: list = [
        Table(("of the newest checkpoint", "value"), totals, n_samples),
        Picture("confusion", _draw_confusions(confusions), "Counts of " + n_samples),
        Picture("class_scores", _draw_scores(scores), "Scores of every class, " + n_samples),
        _score_table(confusions, scores),
        Picture("confidence", _draw_confidence(logits, guesses == wanted), _CONFIDENCE),
    ]
    if seen.inputs[0].ndim >= 2:
        parts += _images(seen, guesses, logits)
    return Section("Labels", parts)


_CONFIDENCE = (
    "Confidence of the predicted labels, and how often they are right at that confidence; on "
    "the diagonal it would be as sure as it is right."
)


def _images(seen: Predicted, guesses: np.ndarray, logits: np.ndarray) -> list[Picture]:
    """The first test images, and the mistakes the model was surest of."""
    wanted, first = seen.targets[:, 0], np.arange(min(N_SHOWN["labels"], len(guesses)))
    wrong = np.flatnonzero(guesses != wanted)
    surest = wrong[np.argsort(-_sureness(logits)[wrong], kind="stable")][: N_SHOWN["labels"]]
    kinds = {
        "images": ("The first test images.", first),
        "mistakes": ("The most confident mistakes.", surest),
    }
    return [
        Picture(name, draw_labels(seen.inputs[rows], wanted[rows], guesses[rows]), caption)
        for name, (caption, rows) in kinds.items()
        if len(rows)
    ]


def _score_table(confusions: np.ndarray, scores: ClassScores) -> Table:
    head = "class", "samples", "accuracy (recall)", "precision", "F1", "most often confused with"
    rows = []
    for i, row in enumerate(confusions):
        others = np.where(np.arange(len(row)) == i, 0, row)
        other = f"{np.argmax(others)} ({others.max()} times)" if others.any() else ""
        each = (f"{float(values[i]):.4f}" for values in scores)
        rows.append((str(i), str(row.sum()), *each, other))
    return Table(head, rows)


def _draw_confusions(confusions: np.ndarray) -> Figure:
    """Counts as text on shades of the share of the true class."""
    n = len(confusions)
    side = float(np.clip(0.55 * n + 1.5, 4.5, 10))
    figure = Figure(figsize=(side + 1.0, side), layout="constrained")
    panel = figure.subplots()
    shares = confusions / np.maximum(confusions.sum(axis=1, keepdims=True), 1)
    image = panel.imshow(shares, cmap="gray_r", vmin=0, vmax=1)
    if n <= MANY_CLASSES:
        for i, j in np.argwhere(confusions > 0):
            color = "white" if shares[i, j] > 0.5 else "black"
            panel.text(
                j, i, str(confusions[i, j]), ha="center", va="center", color=color,
                fontsize="small",
            )  # fmt: skip
        panel.set_xticks(range(n))
        panel.set_yticks(range(n))
    panel.set_xlabel("predicted class")
    panel.set_ylabel("true class")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    return figure


def _draw_scores(scores: ClassScores) -> Figure:
    """Recall and precision side by side, the axis cut where all are high."""
    n = len(scores.recall)
    figure = Figure(figsize=(max(7.5, 0.25 * n), 3.4), layout="constrained")
    panel = figure.subplots()
    places = np.arange(n)
    panel.bar(
        places - 0.2,
        scores.recall,
        0.38,
        color="0.35",
        edgecolor="black",
        label="accuracy (recall)",
    )
    panel.bar(
        places + 0.2, scores.precision, 0.38, color="white", edgecolor="black", hatch="///",
        label="precision",
    )  # fmt: skip
    lowest = np.nanmin([*scores.recall, *scores.precision, 1.0])
    bottom = np.floor(10 * max(0.0, lowest - 0.05)) / 10
    panel.set_ylim(bottom, 1.0 + 0.03 * (1.0 - bottom))
    if n <= MANY_CLASSES:
        panel.set_xticks(places)
    panel.set_xlabel("class")
    panel.set_ylabel("share" if bottom == 0 else f"share (axis from {bottom:g})")
    panel.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    return figure


def _draw_confidence(logits: np.ndarray, right: np.ndarray) -> Figure:
    """Histogram of the probability given to the predicted label, and the share right in it."""
    sure = _sureness(logits)
    edges = np.linspace(0, 1, 11)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    counts, shares = figure.subplots(1, 2)
    counts.hist(
        [sure[right], sure[~right]], edges, color=["0.75", "black"], edgecolor="black",
        label=["right", "wrong"],
    )  # fmt: skip
    counts.set_yscale("symlog", linthresh=1)
    counts.set_ylim(bottom=0)
    counts.set_ylabel("test samples")
    counts.legend(fontsize="small")
    places = np.clip(np.digitize(sure, edges) - 1, 0, len(edges) - 2)
    n_in = np.bincount(places, minlength=10)
    used = n_in > 0
    mean_sure = np.bincount(places, sure, minlength=10)[used] / n_in[used]
    mean_right = np.bincount(places, right, minlength=10)[used] / n_in[used]
    shares.plot([0, 1], [0, 1], ":", color="gray")
    shares.plot(mean_sure, mean_right, "o-", color="black", markerfacecolor="none")
    shares.set_ylabel("share that is right")
    for panel in (counts, shares):
        panel.set_xlabel("probability given to the predicted label")
        panel.grid(alpha=0.3)
    return figure


def _sureness(logits: np.ndarray) -> np.ndarray:
    """The softmax probability of the predicted label."""
    logits = np.asarray(logits, np.float64)
    return 1 / np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1)
