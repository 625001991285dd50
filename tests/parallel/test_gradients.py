"""The transposed sweep against `jax.grad` of serial diffrax and against central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.bench.accuracy import gradient_error
from nodepint_mpi.bench.cases import GRADIENT_CASES, GradientCase
from nodepint_mpi.core.problems import PROBLEMS

LV = PROBLEMS["lotka_volterra"]
ARGS = {name: jnp.asarray(value) for name, value in LV.args.items()}
EDGES = np.linspace(0.0, 3.0, 8)
# `nodepint bench gradients` runs all twenty; compiling them takes longer than running them. On 3
# and 4 ranks every loss and every way of stepping, but not every pair.
FEW_RANKS = pytest.mark.mpi(max_size=2)
ON_ANY_RANKS = ("end state", "fixed", "parareal"), ("trajectory", "adaptive", "parareal")
TESTED = [
    pytest.param(case, marks=[FEW_RANKS] * (tuple(case) not in ON_ANY_RANKS), id="-".join(case))
    for case in GRADIENT_CASES
    if case.method == "parareal" or case[:2] == ("trajectory", "fixed")
]


@pytest.mark.timeout_s(300)
@pytest.mark.parametrize("case", TESTED)
def test_training_gradient_equals_serial_diffrax(comms, case: GradientCase):
    errors = gradient_error(comms, case)
    assert errors["gradient_error"] <= 1e-8 and errors["loss_error"] <= 1e-8
    assert case.method == "serial" or errors["adjoint_sweeps"] >= 1


@pytest.mark.timeout_s(240)
@pytest.mark.parametrize(
    "method",
    ["parareal", pytest.param("picard", marks=FEW_RANKS), pytest.param("serial", marks=FEW_RANKS)],
)
def test_gradient_through_solve(comms, method):
    """Every rank computes the same loss and gets the whole gradient."""

    def loss(args, u0):
        solution = nm.solve(
            LV.field, u0, EDGES, args=args, method=method, comm=comms.time,
            fine=nm.FixedSteps(nm.RK4(), 10), coarse=nm.FixedSteps(nm.RK4(), 2),
            stopping=nm.JumpTolerance(1e-13), adjoint_tol=1e-13,
        )  # fmt: skip
        return jnp.sum(jnp.sin(solution.interface))

    u0 = jnp.asarray(LV.initial)
    gradient = jax.grad(loss, (0, 1))(ARGS, u0)
    everywhere = comms.control.allgather(jax.tree.map(np.asarray, gradient))
    jax.tree.map(np.testing.assert_array_equal, everywhere[0], everywhere[-1])
    direction = jax.tree.map(jnp.ones_like, (ARGS, u0))
    slope = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(gradient))
    h = 1e-5
    ahead, behind = (
        loss(*jax.tree.map(lambda x, d, sign=sign: x + sign * h * d, (ARGS, u0), direction))
        for sign in (1, -1)
    )
    assert float(slope) == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-7)
