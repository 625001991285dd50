"""`nodepint bench random-basis` on images that are made here: what is learned along directions."""

import numpy as np
import pytest
from click.testing import CliRunner

from nodepint_mpi.bench import random_basis as bench
from nodepint_mpi.cli.main import cli
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.comms import alone, make_comms

pytestmark = [pytest.mark.standard_promotion, pytest.mark.mpi(max_size=1)]


def images(n_rows, seed):
    """Ten patterns of 24 pixels, each with noise; the same patterns for any seed."""
    patterns = np.random.default_rng(0).uniform(40, 215, (10, 24))
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, n_rows)
    pixels = patterns[labels] + random.normal(0.0, 25.0, (n_rows, 24))
    return np.clip(pixels, 0, 255).astype(np.uint8), labels.astype(np.int32)


def test_redrawn_directions_learn_more_than_fixed_ones(monkeypatch):
    monkeypatch.setattr(bench, "_read", lambda source, split: images(400, split == "test"))
    usual = bench.Images(hidden=8, dims=8, batch=16, steps=300, rate=0.1)
    monkeypatch.setitem(bench.IMAGES, "digits", usual)
    told = []
    rows = bench.compare_on_images(make_comms(alone()), "digits", report=told.append)
    whole, fixed, redrawn, more = (row["accuracies"][0] for row in rows)
    assert fixed + 0.1 < redrawn < more <= 1 and whole > 0.95
    assert [row["directions"] for row in rows] == [None, 8, 8, 32]
    n_parameters = 24 * 8 + 8 + 8 * 10 + 10
    assert [row["numbers"] for row in rows] == [n_parameters, 16, 16, 64]
    assert len(told) == 4 and told[3].startswith("on redrawn directions of 4 ranks, seed 0: ")
    table = bench.format_random_basis(rows, 2)
    assert f"| on redrawn directions | 8 | {100 * redrawn:.2f} % | 16 |" in table


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["digits", "--set", "run.seed=1"], "`--set` changes a CONFIG"),
        (["configs/heat.toml", "--steps", "3"], "with a CONFIG take `--set run.n_steps"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, match):
    result = CliRunner().invoke(cli, ["bench", "random-basis", *words])
    assert result.exit_code != 0
    error = result.exception
    assert isinstance(error, ConfigError) and match in str(error)
