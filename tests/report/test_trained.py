"""Sections about predictions, made of predictions whose scores are known."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from nodepint_mpi.pages.parts import Picture, Table
from nodepint_mpi.report.classification import labels
from nodepint_mpi.report.energy import basis_energy, energy_left
from nodepint_mpi.report.paths import relative_errors, trajectories
from nodepint_mpi.report.spread import measure_spread, path_energy
from nodepint_mpi.report.trained import Model, Predicted

pytestmark = pytest.mark.mpi(max_size=1)


def model_of(predicted: Predicted) -> Model:
    """Without the run: these sections look at predictions alone."""
    no_run: Any = None
    return Model(no_run, predicted.scores, predicted, None)


def labeled(wanted, guesses, inputs):
    """Logits that give these labels, the first ones most surely."""
    sure = np.linspace(9, 1, len(guesses))
    logits = sure[:, None] * (np.arange(3) == np.array(guesses)[:, None])
    return Predicted(
        step=7, is_labels=True, inputs=inputs, targets=np.array(wanted)[:, None],
        predictions=logits[:, None], times=np.array([1.0]), trained_until=1.0,
        scores={"loss": 0.25, "accuracy": 2 / 3}, snapshots=np.zeros((1, 2)), bases={},
    )  # fmt: skip


def moving(targets, predictions, trained_until=1.0):
    """Trajectories (samples, times, components)."""
    times = np.linspace(0.5, 1.5, targets.shape[1])
    return Predicted(
        step=7, is_labels=False, inputs=targets[:, 0], targets=targets, predictions=predictions,
        times=times, trained_until=trained_until, scores={"loss": 0.25},
        snapshots=targets.reshape(-1, targets.shape[-1]), bases={},
    )  # fmt: skip


def parts_of(section, kind) -> list[Any]:
    return [part for part in section.parts if isinstance(part, kind)]


def test_the_energy_of_normal_paths_has_its_closed_form():
    """Paths N(0.3, 0.5^2) about one observation, and about observations that are as they are."""
    draw, mean, spread = np.random.default_rng(0), 0.3, 0.5
    paths = mean + spread * draw.normal(size=(500, 4, 64, 1))
    paths[:, 0] = mean  # where they have not parted yet
    targets = mean + spread * draw.normal(size=(500, 4, 1))
    targets[:, 1] = y = 1.1
    targets[:250, 3] = np.nan
    found = measure_spread(paths, targets)
    z = (y - mean) / spread
    exact = spread * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    assert abs(np.mean(found.score[:, 1]) - exact) < 0.02 * exact
    np.testing.assert_allclose(found.score[:, 0], np.abs(targets[:, 0, 0] - mean), rtol=1e-12)
    for share, tolerance in ((50, 0.07), (90, 0.05)):
        assert np.all(np.isnan(found.inside[share][:, 0]))
        assert abs(np.mean(found.inside[share][:, 2]) - share / 100) < tolerance
        assert np.sum(np.isfinite(found.inside[share][:, 3])) == 250
    seen = moving(targets, paths[:, :, 0])
    section = path_energy(model_of(seen._replace(paths=paths)))
    assert section is not None and path_energy(model_of(seen)) is None
    assert [part.name for part in parts_of(section, Picture)] == ["path_energy"]
    (table,) = parts_of(section, Table)
    assert float(dict(table.rows)["energy score"]) == pytest.approx(
        np.nanmean(found.score), rel=1e-4
    )
    first = seen._replace(paths=paths[:, :1], targets=targets[:, :1], times=seen.times[:1])
    apart = path_energy(model_of(first))
    assert apart is not None
    (table,) = parts_of(apart, Table)
    assert dict(table.rows)["observations within the 90 % band"] == "the paths do not part"


def test_labels_are_counted_class_by_class():
    seen = labeled([0, 0, 0, 1, 2, 2], [0, 0, 2, 1, 2, 1], np.zeros((6, 4, 4)))
    section = labels(model_of(seen))
    assert section is not None
    totals, classes = parts_of(section, Table)
    assert dict(totals.rows) == {"loss": "0.25", "accuracy": "0.666667"}
    assert classes.rows == [
        ("0", "3", "0.6667", "1.0000", "0.8000", "2 (1 times)"),
        ("1", "1", "1.0000", "0.5000", "0.6667", ""),
        ("2", "2", "0.5000", "0.5000", "0.5000", "1 (1 times)"),
    ]
    pictures = {part.name: part.figure for part in parts_of(section, Picture)}
    assert set(pictures) == {"confusion", "class_scores", "confidence", "images", "mistakes"}
    texts = {(text.get_position(), text.get_text()) for text in pictures["confusion"].axes[0].texts}
    assert texts == {((0, 0), "2"), ((2, 0), "1"), ((1, 1), "1"), ((1, 2), "1"), ((2, 2), "1")}
    wrong = [panel.get_title() for panel in pictures["mistakes"].axes if panel.images]
    assert wrong == ["2, is 0", "1, is 2"]  # the surest first


def test_labels_without_images_or_mistakes():
    section = labels(model_of(labeled([0, 1, 2], [0, 1, 2], np.zeros((3, 5)))))
    assert section is not None
    names = [part.name for part in parts_of(section, Picture)]
    assert names == ["confusion", "class_scores", "confidence"]
    seen = labeled([0, 1, 2], [0, 1, 2], np.zeros((3, 4, 4)))
    section = labels(model_of(seen))
    assert section is not None
    assert [part.name for part in parts_of(section, Picture)][3:] == ["images"]


@pytest.mark.parametrize("n_components", [2, 3, 20])
def test_trajectories_and_their_errors(n_components):
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(3, 6, n_components))
    factors = np.array([1.1, 1.0, 0.5])  # relative errors 0.1, 0 and 0.5 at every time
    seen = moving(targets, targets * factors[:, None, None])
    np.testing.assert_allclose(relative_errors(seen), [0.1, 0.0, 0.5], atol=1e-12)
    section = trajectories(model_of(seen))
    assert section is not None
    (table,) = parts_of(section, Table)
    rows = dict(table.rows)
    assert rows["relative L2 error, median sample"] == "0.1"
    assert rows["relative L2 error, worst sample (2)"] == "0.5"
    pictures = {part.name: part.figure for part in parts_of(section, Picture)}
    portrait = {"phase_portrait"} if n_components <= 3 else set()
    assert set(pictures) == {"trajectories", "error_along_time"} | portrait
    if n_components == 2:
        observed, predicted = pictures["phase_portrait"].axes[0].lines[2:4]  # of the second sample
        np.testing.assert_array_equal(observed.get_xydata(), targets[1])
        np.testing.assert_array_equal(predicted.get_xydata(), targets[1] * factors[1])
    (along,) = pictures["error_along_time"].axes
    sizes = np.linalg.norm(targets, axis=2)
    errors = abs(factors - 1)[:, None] * sizes / np.sqrt(np.mean(sizes**2, axis=1, keepdims=True))
    np.testing.assert_allclose(along.lines[1].get_ydata(), errors.max(axis=0))
    labels_of = [line.get_label() for line in along.lines]
    assert labels_of == ["median sample", "worst sample", "trained until here"]
    assert labels(model_of(seen)) is None


def test_energy_left_out_by_bases():
    snapshots = np.diag([3.0, 2.0, 1.0])
    np.testing.assert_allclose(energy_left(snapshots, None), [1, 5 / 14, 1 / 14, 0], atol=1e-12)
    last_two = np.eye(3)[1:]
    np.testing.assert_allclose(energy_left(snapshots, last_two), [1, 10 / 14, 9 / 14])


def test_the_energy_section_shows_the_bases_there_are():
    snapshots = np.diag([4.0, 3.0, 2.0, 1.0])
    seen = moving(np.ones((1, 2, 4)), np.ones((1, 2, 4)))._replace(snapshots=snapshots)
    section = basis_energy(model_of(seen._replace(bases={"mine": np.eye(4)[1:2]})))
    assert section is not None
    (picture,) = parts_of(section, Picture)
    best, mine = picture.figure.axes[0].lines
    np.testing.assert_allclose(best.get_ydata(), [1, 14 / 30, 5 / 30, 1 / 30])  # 0 is not drawn
    np.testing.assert_allclose(mine.get_ydata(), [1, 21 / 30])
    assert (best.get_label(), mine.get_label()) == ("best possible for these states", "mine")
    assert best.get_linestyle() != mine.get_linestyle()  # told apart in black and white
    small = seen._replace(snapshots=np.ones((5, 2)))
    assert basis_energy(model_of(small)) is None
