"""The scripts and the problem that the docs show: on two ranks, two of them also alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

from tests.cli.run_examples import EXAMPLES
from tests.cli.small_case import QUICK, read_json

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(400)]

DRIVER = Path(__file__).with_name("run_examples.py")
TWO = ["two.0", "two.1"]
RANKS = [*TWO, "alone.0"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def found(folder, mpirun):
    """What each rank found, by job and rank."""
    if not (folder / "alone.0.npz").exists():
        command = sys.executable, "-m", "mpi4py", DRIVER, "two", "all"
        done = mpirun(2, *command, cwd=folder, env=QUICK, timeout_s=280)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "two.txt").write_text(done.stdout)
        own = ("OMPI_", "PMIX_", "PMI_")  # of the MPI that pytest itself has started
        clean = {name: v for name, v in os.environ.items() if not name.startswith(own)}
        path = {"PYTHONPATH": str(EXAMPLES.parents[1])}
        done = subprocess.run(
            [sys.executable, DRIVER, "alone"], cwd=folder, env=clean | QUICK | path,
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "alone.txt").write_text(done.stdout)
    read = {}
    for name in RANKS:
        with np.load(folder / f"{name}.npz") as file:
            read[name] = dict(file)
    return read


def test_rank_0_alone_speaks_and_says_the_same_on_any_number_of_ranks(found, folder):
    two, alone = ((folder / f"{name}.txt").read_text() for name in ("two", "alone"))
    assert two.startswith(alone) and len(alone.splitlines()) >= 2
    assert alone.startswith("converged: every slice is solved\n")
    assert len(two.splitlines()) == 17


def test_the_solution_and_its_slope_are_those_of_scipy(found):
    def last_angle(strength):
        def pendulum(t, u):
            push = strength * np.cos(0.7 * t)
            return [u[1], push - 0.3 * u[1] - np.sin(u[0])]

        solved = solve_ivp(pendulum, (0, 20), [1.0, 0.0], "DOP853", rtol=1e-12, atol=1e-12)
        return solved.y[0, -1]

    slope = (last_angle(0.5 + 1e-4) - last_angle(0.5 - 1e-4)) / 2e-4
    for rank in found.values():
        assert rank["converged"]
        np.testing.assert_allclose(rank["interface"][-1, 0], last_angle(0.5), rtol=1e-7)
        np.testing.assert_allclose(rank["slope"], slope, rtol=1e-5)


def test_a_program_without_config_learns_the_swings(found):
    for name in TWO:
        assert found[name]["test_error"] < 0.05
        np.testing.assert_allclose(found[name]["predicted"], found["two.0"]["predicted"], atol=1e-3)
    times = np.linspace(0.0, 6.0, 25)
    decay = np.exp(-0.1 * times)  # of a swing that starts at rest at 1
    angle = decay * (np.cos(times) + 0.1 * np.sin(times))
    np.testing.assert_allclose(found["two.0"]["predicted"][0, :, 0], angle, atol=0.03)


@pytest.fixture
def defaults():
    """Scripts run with JAX's defaults; elsewhere the tests forbid broadcasting."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("defaults")
def test_the_field_is_trained_with_the_gradient_of_a_plain_solve(found):
    script = (EXAMPLES / "own_field.py").read_text()
    names: dict[str, Any] = {}  # those of the script, without its training loop
    exec(compile(script[: script.index("optimizer = ")], "own_field.py", "exec"), names)
    params, static = eqx.partition(names["model"], eqx.is_array)
    flat, unravel = ravel_pytree(params)

    def loss(flat):
        model = eqx.combine(unravel(flat), static)

        def step(u, _):  # classic RK4, eight steps between observations
            h = 0.5 / 8
            k1 = names["field"](0, u, model)
            k2 = names["field"](0, u + h / 2 * k1, model)
            k3 = names["field"](0, u + h / 2 * k2, model)
            k4 = names["field"](0, u + h * k3, model)
            u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            return u, u

        _, states = jax.lax.scan(step, names["observed"][0], None, length=96)
        seen = jnp.concatenate([names["observed"][:1], states[7::8]])
        return jnp.mean((seen - names["observed"]) ** 2)

    exact = jax.jit(jax.grad(loss))(jnp.asarray(found["two.0"]["params"]))
    assert flat.shape == exact.shape
    for name in TWO:
        atol = 1e-5 * np.abs(exact).max()
        np.testing.assert_allclose(found[name]["gradient"], exact, rtol=0, atol=atol)
        np.testing.assert_array_equal(found[name]["params"], found["two.0"]["params"])
    for rank in found.values():
        assert rank["loss"] < 5e-3
        np.testing.assert_allclose(rank["loss"], found["two.0"]["loss"], rtol=1e-6)


@pytest.mark.usefixtures("defaults")
def test_the_tracked_loop_learns_with_the_gradient_of_a_plain_solve(found):
    script = (EXAMPLES / "tracked_loop.py").read_text()
    names: dict[str, Any] = {}  # those of the script, without its training loop
    exec(compile(script[: script.index("optimizer = ")], "tracked_loop.py", "exec"), names)
    params, static = eqx.partition(names["model"], eqx.is_array)
    _, unravel = ravel_pytree(params)

    def loss(flat):
        model = eqx.combine(unravel(flat), static)

        def step(u, _):  # classic RK4, eight steps between observations
            h = 0.25 / 8
            field = jax.vmap(model)
            k1 = field(u)
            k2 = field(u + h / 2 * k1)
            k3 = field(u + h / 2 * k2)
            k4 = field(u + h * k3)
            u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            return u, u

        _, states = jax.lax.scan(step, names["start"], None, length=192)
        return jnp.mean((states[7::8] - names["observed"]) ** 2)

    exact = jax.jit(jax.grad(loss))(jnp.asarray(found["two.0"]["tracked_params"]))
    for name in TWO:
        atol = 1e-9 * np.abs(exact).max()
        np.testing.assert_allclose(found[name]["tracked_gradient"], exact, rtol=0, atol=atol)
        rank = found[name]
        assert rank["tracked_loss"] < 5e-3 and rank["tracked_misfit"] < 1e-2
        np.testing.assert_allclose(rank["tracked_loss"], found["two.0"]["tracked_loss"], rtol=1e-6)


def test_the_reduced_model_of_a_problem_in_one_file(found, folder):
    done = read_json(folder / "runs" / "chain" / "DONE")
    assert done["test_accuracy"] > 0.9
    rank = found["two.0"]
    assert rank["rank"] == 8
    for start, states in zip(rank["starts"], rank["states"], strict=True):
        truth = solve_ivp(chain, (0, 6), start, "DOP853", rank["times"][:25], rtol=1e-9).y.T
        error = np.linalg.norm(states[:25] - truth) / np.linalg.norm(truth)
        assert error < 0.2


def chain(t, u):
    """The motion that the data are made with, written down once more."""
    stretch = np.diff(np.concatenate([[0.0], u[:12], [0.0]]))
    return np.concatenate([u[12:], np.diff(stretch / np.sqrt(1 + stretch**2))])
