"""A user's own method works wherever one of the package does; see docs/examples."""

from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.build.imports import import_file
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.errors import ConfigError, ProblemError
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.saving import resume_run, save_run
from nodepint_mpi.training.setup import fresh_state, set_up
from tests.by_hand import slice_ends
from tests.training.small_config import small_config

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "relaxed_parareal.py"
OWN = f"{SCRIPT}:make_method"
Relaxed = import_file(SCRIPT, "time.method").Relaxed
EDGES = np.array([0.0, 0.3, 0.5, 0.9, 1.2, 1.4, 1.9, 2.0])
U0 = np.array([1.0, 0.5])


def field(t, u, args):
    return jnp.stack([u[1], -args * jnp.sin(u[0]) - 0.1 * u[1]])


def exact(u0, args):
    """One slice after the other, written out."""
    return slice_ends(field, u0, EDGES, 8, args)


def swept(comm, method, stopping, u0=U0, args=2.0):
    return nm.solve(
        field, u0, EDGES, fine=nm.FixedSteps(nm.RK4(), 8), method=method, stopping=stopping,
        args=args, adjoint_tol=1e-12, comm=comm,
    )  # fmt: skip


def coarse():
    return nm.Propagator(field, nm.FixedSteps(diffrax.Midpoint(), 1))


@pytest.mark.mpi(2, 2)
def test_solution_and_gradient_are_those_of_a_serial_solve(comms):
    loose, tight = nm.JumpTolerance(1e-6), nm.JumpTolerance(1e-13)
    solution = swept(comms.time, Relaxed(coarse()), loose)
    assert solution.status is nm.Status.CONVERGED and 2 < solution.sweeps < 7
    np.testing.assert_allclose(solution.interface, exact(U0, 2.0), atol=1e-5)
    solution = swept(comms.time, Relaxed(coarse()), tight)
    np.testing.assert_allclose(solution.interface, exact(U0, 2.0), rtol=1e-11)

    def loss(solve):
        return lambda u0, args: jnp.sum(solve(u0, args) ** 2)

    def ours(u0, args):
        return swept(comms.time, Relaxed(coarse()), tight, u0, args).interface

    at = jnp.asarray(U0), jnp.asarray(2.0)
    found_bars, bars = (jax.grad(loss(solve), (0, 1))(*at) for solve in (ours, exact))
    for found, right in zip(found_bars, bars, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-9)


@pytest.mark.mpi(max_size=1)
def test_its_limits_are_parareal_and_picard(comms):
    """w = 1, and w = 0 from the same iteration 0."""
    some = nm.FixedSweeps(3)
    relaxed = swept(comms.time, Relaxed(coarse(), 1.0), some)
    parareal = swept(comms.time, nm.Parareal(coarse()), some)
    np.testing.assert_allclose(relaxed.interface, parareal.interface, rtol=1e-13)
    other = swept(comms.time, Relaxed(coarse(), 0.5), some)
    assert np.max(np.abs(np.asarray(other.interface - parareal.interface))) > 1e-6


@pytest.mark.mpi(max_size=1)
def test_options_of_named_methods_are_refused(comms):
    with pytest.raises(ProblemError, match=r"`coarse` is an option .* `Relaxed`"):
        nm.solve(
            field, U0, EDGES, fine=nm.FixedSteps(nm.RK4(), 8), method=Relaxed(coarse()),
            coarse=nm.FixedSteps(diffrax.Euler(), 1), args=2.0, comm=comms.time,
        )  # fmt: skip


@pytest.mark.mpi(max_size=1)
def test_steps_that_time_does_not_resolve_are_refused_in_a_method_too(comms):
    def forced(t, u, args):
        return -args * u + jnp.cos(t)

    coarse = nm.Propagator(forced, nm.FixedSteps(nm.RK4(), 400))
    with pytest.raises(ProblemError, match="count time from a later origin"):
        nm.solve(
            lambda t, u, args: -args * u, jnp.ones(1, "float32"), 1e5 + EDGES,
            fine=nm.FixedSteps(nm.RK4(), 2), method=nm.Parareal(coarse), args=jnp.float32(1.0),
            comm=comms.time,
        )  # fmt: skip


@pytest.mark.parametrize(
    "tracking",
    [
        pytest.param("", marks=pytest.mark.mpi(1, 1)),
        pytest.param("tracking = {}\n", marks=pytest.mark.mpi(2, 2)),
    ],
)
def test_it_trains_and_goes_on_from_a_checkpoint(comms, source, shared_tmp_path, tracking):
    tight = "stopping = { tol = 1e-12 }\nadjoint = { tol = 1e-12 }\n" + tracking
    losses = {}
    for method in (OWN, "serial"):
        config = parse_config(small_config(source, f'method = "{method}"\n{tight}'))
        experiment = set_up(config, comms)
        assert experiment.method.iterates is (method == OWN)
        state, stepper = fresh_state(experiment), make_stepper(experiment)
        losses[method] = []
        for step in range(8):
            taken = stepper.take(state, experiment.batch(step), step)
            losses[method].append(float(taken.report.loss))
            state = taken.state
            if method == OWN and step == 3:
                (shared_tmp_path / "ckpt").mkdir(parents=True, exist_ok=True)
                save_run(experiment, shared_tmp_path, state, stepper, 4)
        if method == OWN:
            resumed = resume_run(set_up(config, comms), shared_tmp_path, "auto")
            state, stepper = resumed.state, resumed.stepper
            again = []
            for step in range(4, 8):
                taken = stepper.take(state, experiment.batch(step), step)
                again.append(float(taken.report.loss))
                state = taken.state
            assert again == losses[method][4:]
    rtol = 1e-2 if tracking else 1e-9  # the bound of a tracked gradient
    np.testing.assert_allclose(losses[OWN], losses["serial"], rtol=rtol)


@pytest.mark.mpi(max_size=1)
def test_what_makes_no_method_is_said(comms, source, tmp_path):
    (tmp_path / "odd.py").write_text("def none(parts):\n    return parts.coarse\n")
    config = parse_config(small_config(source, f'method = "{tmp_path}/odd.py:none"\n'))
    with pytest.raises(ConfigError, match="returned a Propagator; it takes `parts`"):
        set_up(config, comms)
