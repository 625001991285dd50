"""The script of docs/stochastic.md, against a loop written out by hand and exact moments."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.noise import draw_increments, path_key

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "stochastic.py"
pytestmark = [pytest.mark.mpi(2, 2), pytest.mark.standard_promotion]


@jax.jit
def by_hand(level):
    """Milstein's method over 512 steps: the states of all paths at the end."""
    width, args = 4.0 / 512, {"rate": 1.0, "volatility": 0.4}

    def one(path):
        def step(u, dw):
            g = args["volatility"] * u
            milstein = args["volatility"] * g * (dw**2 - width) / 2
            return u + width * args["rate"] * (level - u) + g * dw + milstein, None

        steps = draw_increments(path_key(7, path), 0, 512, jnp.asarray(width), ()).w
        return jax.lax.scan(step, jnp.array(2.0), steps)[0]

    return jax.vmap(one)(jnp.arange(500))


def test_the_script_finds_paths_statistics_and_slope(capsys):
    found = runpy.run_path(str(SCRIPT))
    wanted = by_hand(1.0)
    np.testing.assert_allclose(found["solution"].interface[-1], wanted, rtol=0, atol=1e-7)
    statistics = found["statistics"]
    np.testing.assert_allclose(statistics.mean[-1], np.mean(wanted), rtol=1e-7)
    np.testing.assert_allclose(
        statistics.quantiles[:, -1], np.quantile(wanted, (0.05, 0.95)), rtol=1e-6
    )
    slope = jax.grad(lambda level: jnp.mean(by_hand(level)))(1.0)
    np.testing.assert_allclose(found["slopes"]["level"], slope, rtol=1e-7)
    # E X = level + (start - level) exp(-rate t), within four standard errors.
    spread = float(np.sqrt(statistics.variance[-1] / 500))
    assert abs(statistics.mean[-1] - (1 + np.exp(-4.0))) < 4 * spread
    said = capsys.readouterr().out
    assert said == "" or said.startswith("converged: every slice is solved\n")
