"""What `nodepint bench methods`, `sweeps`, `published` and `gradients` compare with serial solves.

Problems with the methods for them and what was tuned for each; runs that others have published; and
small networks to train.
"""

from typing import Any, Literal, NamedTuple

import diffrax
import jax
import lineax
import numpy as np
import optimistix
from jaxtyping import Array

from nodepint_mpi.build.sections import make_own_method
from nodepint_mpi.core.objective import mean_squared_error
from nodepint_mpi.core.observations import place_observations
from nodepint_mpi.core.problems import PROBLEMS, Problem, burgers_problem
from nodepint_mpi.core.propagators import (
    AbstractIntegrator,
    AdaptiveSteps,
    FixedSteps,
    Propagator,
)
from nodepint_mpi.core.runge_kutta import RK4, chebyshev
from nodepint_mpi.core.stopping import JumpTolerance
from nodepint_mpi.models.networks import EncodeProcessDecode, make_dense
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.methods.base import AbstractMethod, Parts
from nodepint_mpi.parallel.methods.parareal import Parareal
from nodepint_mpi.parallel.methods.picard import Picard
from nodepint_mpi.parallel.methods.reduced import Reduced
from nodepint_mpi.parallel.methods.serial import Serial
from nodepint_mpi.parallel.methods.tangent import Tangent
from nodepint_mpi.parallel.shared_basis import SharedBasis
from nodepint_mpi.training.batch_model import BatchedField
from nodepint_mpi.training.line_problem import LineProblem
from nodepint_mpi.training.setup import reduction_of

SMALL = 8
"""Largest state for which all coordinates make a basis."""

_DIRECT = lineax.AutoLinearSolver(well_posed=None)
_KRYLOV = lineax.GMRES(rtol=1e-6, atol=1e-9, restart=60)


class SweepCase(NamedTuple):
    """A problem with its propagators; steps are per slice.

    `coarse` is what parareal takes by habit. `cheap` is a stable propagator of fewer evaluations
    than `fine`, which tangents are taken of. Bases have `rank` directions, `n_new` of them new in
    a sweep.
    """

    problem: Problem
    n_slices: int
    n_sweeps: int
    fine: FixedSteps
    coarse: FixedSteps
    cheap: FixedSteps
    rank: int
    n_new: int


def _implicit_euler(
    n_steps: int, linear_solver: lineax.AbstractLinearSolver = _DIRECT
) -> FixedSteps:
    newton = optimistix.Newton(rtol=1e-10, atol=1e-12, linear_solver=linear_solver)
    return FixedSteps(diffrax.ImplicitEuler(root_finder=newton), n_steps)


def _midpoint(n_steps: int) -> FixedSteps:
    return FixedSteps(diffrax.Midpoint(), n_steps)


def _rk4(n_steps: int) -> FixedSteps:
    return FixedSteps(RK4(), n_steps)


SWEEP_CASES: dict[str, SweepCase] = {
    "burgers": SweepCase(
        burgers_problem(128, 0.02, (0.0, 2.0)), 32, 12,
        _rk4(40), _implicit_euler(1), _rk4(8), rank=48, n_new=8,
    ),
    "burgers_1024": SweepCase(
        PROBLEMS["burgers_1024"], 32, 12,
        _rk4(200), _implicit_euler(1, _KRYLOV), _rk4(50), rank=48, n_new=8,
    ),
    "heat": SweepCase(
        PROBLEMS["heat"], 32, 12,
        _rk4(100), _implicit_euler(1), FixedSteps(chebyshev(13), 2), rank=48, n_new=8,
    ),
    "kuramoto": SweepCase(
        PROBLEMS["kuramoto"], 32, 12,
        _rk4(40), _midpoint(2), _rk4(2), rank=64, n_new=16,
    ),
    "image_field": SweepCase(
        PROBLEMS["image_field"], 16, 12,
        _rk4(20), _midpoint(1), _rk4(2), rank=16, n_new=8,
    ),
    "fitzhugh_nagumo": SweepCase(
        PROBLEMS["fitzhugh_nagumo"], 40, 14,
        _rk4(400), _midpoint(4), _rk4(10), rank=2, n_new=2,
    ),
    "lorenz": SweepCase(
        PROBLEMS["lorenz"]._replace(span=(0.0, 5.0)), 50, 20,
        _rk4(125), _rk4(2), _rk4(8), rank=3, n_new=3,
    ),
    "lotka_volterra": SweepCase(
        PROBLEMS["lotka_volterra"], 32, 14,
        _rk4(100), _rk4(2), _rk4(10), rank=2, n_new=2,
    ),
}  # fmt: skip
"""By name; Burgers is more viscous and shorter, Lorenz shorter than in the published runs."""


def make_methods(case: SweepCase) -> dict[str, AbstractMethod]:
    """The methods to compare, by name. Local."""
    field, size = case.problem.field, case.problem.initial.size
    fine, coarse, cheap = (
        Propagator(field, steps) for steps in (case.fine, case.coarse, case.cheap)
    )
    jumps = SharedBasis("jumps", case.rank, case.n_new)
    pod = SharedBasis("pod", case.rank, case.n_new)
    methods: dict[str, AbstractMethod] = {
        "parareal": Parareal(coarse),
        "parareal, cheap": Parareal(cheap),
    }
    if size <= SMALL:
        identity = SharedBasis("identity", size, 0)
        methods |= {
            "tangent, identity": Tangent(identity, fine, cheap, recycle=False),
            "tangent, identity, cheap": Tangent(identity, cheap, cheap, recycle=False),
        }
    methods |= {
        "tangent, jumps": Tangent(jumps, fine, cheap),
        "tangent, jumps, cheap": Tangent(jumps, cheap, cheap),
        "tangent, jumps, cheap, float32": Tangent(jumps, cheap, cheap, precision="float32"),
        "tangent, jumps, complement": Tangent(jumps, fine, cheap, use_complement=True),
        "reduced, pod": Reduced(pod, cheap),
        "reduced, pod, complement": Reduced(pod, cheap, use_complement=True),
    }
    return methods


def own_method(case: SweepCase, path: str, key: str) -> AbstractMethod:
    """A method of the user's own, from what the others are made of. Local.

    Args:
        case: The problem, and what was tuned for it.
        path: Where its function of `Parts` is, `file.py:function`.
        key: What names it, for errors.

    Raises:
        ConfigError: if the function does not exist or does not return a method.
    """
    field = case.problem.field
    fine, coarse, cheap = (
        Propagator(field, steps) for steps in (case.fine, case.coarse, case.cheap)
    )
    basis = SharedBasis("pod", case.rank, case.n_new)
    return make_own_method(path, key, Parts(fine, coarse, tangents=cheap, basis=basis))


# ---- Published runs ----------------------------------------------------------------------------


class PublishedRun(NamedTuple):
    """One row of a published table: the problem, its propagators, its rule, its count.

    Steps are per slice. With a box the system is scaled to [-1, 1]^d, and so is `eps`. `learned`
    are the counts of parareal with learned corrections: by a Gaussian process on all data, and on
    nearest neighbors. `tangents` and `basis` are what our own method takes instead of learning,
    with `tangents` for coarse propagator too.
    """

    problem: str
    n_slices: int
    coarse: AbstractIntegrator
    fine: AbstractIntegrator
    rule: Literal["start", "end"]
    eps: float
    sweeps: int
    learned: tuple[int, ...]
    tangents: AbstractIntegrator
    basis: SharedBasis
    box: tuple[Any, Any] | None = None


_FHN: dict[str, Any] = dict(
    problem="fitzhugh_nagumo", n_slices=40,
    coarse=_midpoint(4), fine=_rk4(4000),
    tangents=_rk4(10), basis=SharedBasis("identity"),
)  # fmt: skip
_ROSSLER: dict[str, Any] = dict(
    problem="rossler", n_slices=40,
    coarse=FixedSteps(diffrax.Euler(), 2250), fine=_rk4(112500),
    tangents=_rk4(1000), basis=SharedBasis("identity"),
)  # fmt: skip
_LORENZ: dict[str, Any] = dict(
    problem="lorenz", n_slices=50,
    coarse=_rk4(6), fine=_rk4(450),
    tangents=_rk4(45), basis=SharedBasis("identity"),
)  # fmt: skip
_BURGERS: dict[str, Any] = dict(
    problem="burgers", n_slices=128,
    coarse=FixedSteps(diffrax.Euler(), 4), fine=FixedSteps(diffrax.Dopri8(), 40),
    tangents=_rk4(4), basis=SharedBasis("jumps", 64, 32),
)  # fmt: skip
_FHN_BOX = ((-2.0, -1.0), (2.1, 1.2))
_ROSSLER_BOX = ((-10.0, -11.0, 0.0), (12.0, 8.0, 23.0))
_LORENZ_BOX = ((-17.1, -23.0, 6.0), (18.1, 25.0, 45.0))

PUBLISHED_RUNS: dict[str, PublishedRun] = {
    "fitzhugh_nagumo": PublishedRun(
        **_FHN, rule="end", eps=5e-7, sweeps=11, learned=(5, 5), box=_FHN_BOX
    ),
    "fitzhugh_nagumo_5e-9": PublishedRun(
        **_FHN, rule="end", eps=5e-9, sweeps=14, learned=(6, 6), box=_FHN_BOX
    ),
    "fitzhugh_nagumo_start": PublishedRun(**_FHN, rule="start", eps=1e-6, sweeps=11, learned=(5,)),
    "lorenz": PublishedRun(
        **_LORENZ, rule="end", eps=5e-7, sweeps=15, learned=(11, 9), box=_LORENZ_BOX
    ),
    "lorenz_5e-9": PublishedRun(
        **_LORENZ, rule="end", eps=5e-9, sweeps=17, learned=(12, 10), box=_LORENZ_BOX
    ),
    "burgers": PublishedRun(
        **_BURGERS, rule="end", eps=5e-7, sweeps=10, learned=(6, 9), box=(0.0, 1.0)
    ),
    "rossler": PublishedRun(
        **_ROSSLER, rule="end", eps=5e-7, sweeps=18, learned=(13, 12), box=_ROSSLER_BOX
    ),
    "rossler_start": PublishedRun(**_ROSSLER, rule="start", eps=1e-6, sweeps=19, learned=(13,)),
}
"""Rule `end` is of Gattiglio et al., arXiv:2405.12182 and arXiv:2411.06225; rule `start` of
Pentland et al., Statistics and Computing 33:20 (2023)."""

# ---- A small network to train ------------------------------------------------------------------

HORIZON, N_SLICES, STEPS_PER_SLICE = 3.0, 7, 6
GRADIENT_TOL = 1e-12
TIMES = {
    "end state": np.array([HORIZON]),
    "trajectory": np.array([0.13, 0.4, HORIZON / 7, 1.0, 1.71, 2.2, 2.9, HORIZON]),
}


class GradientCase(NamedTuple):
    """What the loss reads, and how slices are stepped and swept."""

    loss: str
    steps: str
    method: str


GRADIENT_CASES = [
    GradientCase(loss, steps, method)
    for loss in TIMES
    for steps in ("fixed", "adaptive")
    for method in ("parareal", "tangent", "reduced", "picard", "serial")
]


def make_gradient_case(
    comms: Comms, case: GradientCase, static: EncodeProcessDecode
) -> LineProblem:
    """One case as a training problem with tight tolerances. Local."""
    field = BatchedField(static.processor)
    fine = FixedSteps(diffrax.Tsit5(), STEPS_PER_SLICE)
    if case.steps == "adaptive":
        fine = AdaptiveSteps(diffrax.Tsit5(), rtol=GRADIENT_TOL, atol=GRADIENT_TOL)
    coarse = Propagator(field, _midpoint(2))
    methods: dict[str, AbstractMethod] = {
        "parareal": Parareal(coarse),
        "tangent": Tangent(SharedBasis("jumps", rank=2, n_new=1, n_batch_axes=1), coarse),
        "reduced": Reduced(
            SharedBasis("pod", rank=1, n_batch_axes=1),
            coarse,
            reduction_of(static.processor, field),
        ),
        "picard": Picard(),
        "serial": Serial(),
    }
    solver = TimeSolver(
        Propagator(field, fine),
        methods[case.method],
        JumpTolerance(GRADIENT_TOL),
        adjoint_tol=GRADIENT_TOL,
    )
    edges = np.linspace(0.0, HORIZON, N_SLICES + 1)
    observations = place_observations(TIMES[case.loss], edges, comms.time.size, comms.time.rank)
    return LineProblem(comms.time, static, solver, observations, mean_squared_error, {})


def make_model_and_data(times: np.ndarray) -> tuple[EncodeProcessDecode, Array, Array]:
    """A small network in logarithmic coordinates, and four trajectories to miss. Local."""
    keys = jax.random.split(jax.random.key(0), 3)
    model = make_dense(
        keys[0], input_shape=(2,), output_size=2, width=16, depth=2,
        activation="tanh", time_dependent=True, positive=True,
    )  # fmt: skip
    inputs = jax.random.uniform(keys[1], (4, 2), minval=0.5, maxval=2.0)
    targets = jax.random.uniform(keys[2], (4, len(times), 2), minval=0.5, maxval=2.0)
    return model, inputs, targets
