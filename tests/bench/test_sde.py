"""`nodepint bench sde` against Euler-Maruyama and parareal in NumPy with the same increments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.bench.sde import N_SLICES as N_SLICES_OF_ERRORS
from nodepint_mpi.bench.sde import SEED, format_sde, run_sde
from nodepint_mpi.bench.sde_cases import SDE_CASES
from nodepint_mpi.bench.sde_sweeps import N_FINE, N_PATHS, N_SLICES, TOL, count_sweeps
from nodepint_mpi.core.noise import draw_increments, path_key

pytestmark = [
    pytest.mark.mpi(max_size=1),
    pytest.mark.timeout_s(300),
    pytest.mark.standard_promotion,
]


def increments(n_paths, n_steps, horizon):
    """(steps, paths)."""

    def one(path):
        width = jnp.asarray(horizon / n_steps)
        return draw_increments(path_key(SEED, path), 0, n_steps, width, ()).w

    return np.asarray(jax.vmap(one, out_axes=1)(jnp.arange(n_paths)))


def test_sweeps_are_those_of_parareal_in_numpy(comms):
    """dX = -X dt + X dW: from U to the end of every slice, 64 steps or one with their sum."""
    width = 1 / (N_SLICES * N_FINE)
    dw = increments(N_PATHS, N_SLICES * N_FINE, 1.0).reshape(N_SLICES, N_FINE, N_PATHS)

    def fine(n, u):
        for step in dw[n]:
            u = u * (1 - width + step)
        return u

    def coarse(n, u):
        return u * (1 - N_FINE * width + dw[n].sum(axis=0))

    old = [np.ones(N_PATHS)]
    for n in range(N_SLICES):
        old.append(coarse(n, old[-1]))
    sweeps, errors = np.zeros(N_PATHS, int), []
    serial = [np.ones(N_PATHS)]
    for n in range(N_SLICES):
        serial.append(fine(n, serial[-1]))
    for k in range(1, N_SLICES + 1):
        errors.append(np.max(np.abs(np.array(old) - serial)))
        new = [old[0]]
        for n in range(N_SLICES):
            new.append(fine(n, old[n]) + coarse(n, new[n]) - coarse(n, old[n]))
        change = np.max(np.abs(np.array(new) - old), axis=0)
        sweeps = np.where((change < TOL) & (sweeps == 0), k, sweeps)
        old = new
    found = count_sweeps(comms, SDE_CASES["geometric"], "1 Euler")
    assert (found["median"], found["largest"]) == (np.median(sweeps), np.max(sweeps))
    assert found["status"] == "converged" and found["guarded"] == 0 and found["error"] < TOL
    np.testing.assert_allclose(found["errors"], errors[: len(found["errors"])], rtol=1e-6)


def test_weak_errors_are_those_of_euler_in_numpy(comms):
    said = []
    result = run_sde(comms, ("weak",), n_paths=4, repeats=3, report=said.append)
    (row,) = result["weak"]
    assert said == ["weak: done"] and row["steps"][0] == N_SLICES_OF_ERRORS
    errors = []
    for n_steps in row["steps"]:
        dw, u = increments(40, n_steps, 1.0), np.ones(40)
        for step in dw:
            u = u * (1 - 1 / n_steps + step)
        errors.append(abs(np.mean(u - np.exp(-1.5 + dw.sum(axis=0)))))
    np.testing.assert_allclose(row["errors"]["mean of X"], errors, rtol=1e-8)
    slope = np.polyfit(np.log(row["steps"]), np.log(errors), 1)[0]
    assert row["orders"]["mean of X"] == pytest.approx(-slope)
    assert f"| {-slope:.2f} |" in format_sde(result)
