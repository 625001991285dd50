"""Quantities as people read them, and lines that are smoothed."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from nodepint_mpi.pages.lines import draw_steps, smooth
from nodepint_mpi.pages.units import show_bytes, show_quantity, show_seconds

pytestmark = pytest.mark.mpi(max_size=1)


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0.0, "0 s"), (0.0431463, "43.1 ms"), (0.99, "990 ms"), (51.8487, "51.8 s"),
        (59.99, "60 s"), (725.2, "12 min 5 s"), (12030.0, "3 h 20 min"), (float("nan"), "nan s"),
    ],
)  # fmt: skip
def test_seconds(seconds, shown):
    assert show_seconds(seconds) == shown


@pytest.mark.parametrize(
    "n_bytes, shown",
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (750825472, "751 MB"), (1.4e9, "1.4 GB")],
)
def test_bytes(n_bytes, shown):
    assert show_bytes(n_bytes) == shown


def test_a_quantity_says_its_unit_in_words():
    assert show_quantity("peak_bytes", [750_825_472, 1_400_000_000]) == (
        "peak memory, each rank", "751 MB, 1.4 GB",
    )  # fmt: skip
    assert show_quantity("n_parameters", 148641) == ("parameters", "148,641")
    assert show_quantity("test_relative_error", 0.07715322) == ("test relative error", "0.0771532")
    assert show_quantity("pause_s", 2.5) == ("pause", "2.5 s")
    assert show_quantity("is_best", True) == ("is best", "yes")


def test_smoothing_is_the_mean_of_what_is_there():
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 1.5, 3.0, 6.5, 6.5])
    np.testing.assert_allclose(smooth(np.full(7, 2.5), 100), 2.5)


def test_many_steps_are_drawn_with_their_mean():
    panel = Figure().subplots()
    steps = np.arange(1, 1001)
    noise = np.where(steps % 2 == 0, 10.0, 0.1)
    draw_steps(panel, steps, np.exp(-steps / 100) * noise, "loss")
    raw, mean = (np.asarray(line.get_ydata()) for line in panel.lines)
    np.testing.assert_allclose(raw, np.exp(-steps / 100) * noise)
    inside = slice(20, -20)
    np.testing.assert_allclose(mean[inside], np.exp(-steps[inside] / 100), rtol=0.02)
    assert panel.get_yscale() == "log"
