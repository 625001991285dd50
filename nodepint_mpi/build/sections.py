"""Config sections to objects: solvers, propagators, networks, losses; see `build.optimizers`.

The only place that turns names into things; the numerics never see the config.
"""

from collections.abc import Callable

import numpy as np

from nodepint_mpi.build.imports import import_function, import_object, is_import_path
from nodepint_mpi.build.model import build_integrator, unknown_name
from nodepint_mpi.config.experiment import Config, ProblemSection
from nodepint_mpi.config.network import DenseNetwork
from nodepint_mpi.config.time import BasisSection, StepsSection, StoppingSection, Time
from nodepint_mpi.core.galerkin import AbstractReduction
from nodepint_mpi.core.named_losses import LOSSES, METRICS
from nodepint_mpi.core.objective import Loss, SimulationFree, Term
from nodepint_mpi.core.problems import PROBLEMS, Problem, scale_to_box
from nodepint_mpi.core.propagators import (
    Propagator,
)
from nodepint_mpi.core.stopping import AbstractStopping, FixedSweeps, FreezeSlices, JumpTolerance
from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.levels import Levels
from nodepint_mpi.parallel.methods import METHODS
from nodepint_mpi.parallel.methods.base import AbstractMethod, Parts
from nodepint_mpi.parallel.shared_basis import SharedBasis

JUMP_TOL = {"float32": 1e-5, "float64": 1e-8}
ADJOINT_TOL = {"float32": 1e-4, "float64": 1e-8}


def build_stopping(section: StoppingSection, precision: str) -> AbstractStopping:
    """The rule that moves the frozen front. Local."""
    if section.rule == "sweeps":
        assert section.sweeps is not None  # checked by the config
        return FixedSweeps(section.sweeps)
    tol = JUMP_TOL[precision] if section.tol is None else section.tol
    if section.rule == "jump":
        return JumpTolerance(tol, section.max_sweeps)
    where = "end" if section.rule == "freeze_end" else "start"
    return FreezeSlices(tol, where, section.max_sweeps)


def build_basis(
    section: BasisSection, *, n_batch_axes: int, seed: int, latent: bool = False
) -> SharedBasis:
    """The basis that slices, samples and ranks share. Local.

    With `latent` the encoder gives coordinates on a learned basis, all of which are used.
    """
    if section.kind == "learned" and not latent:
        raise ConfigError(
            '`time.basis.kind = "learned"` takes the encoder for the basis: give '
            "`network.latent`, the rank of the basis that is learned."
        )
    kind = "identity" if section.kind == "learned" else section.kind
    n_new = section.new
    if n_new is None:
        n_new = section.rank if section.kind == "jumps" and section.rank is not None else 0
    return SharedBasis(
        kind, section.rank, n_new, n_batch_axes, section.drop, seed, section.recurrence
    )


def build_method(
    section: Time,
    field: Field,
    reduction: AbstractReduction | None = None,
    *,
    n_batch_axes: int,
    seed: int,
    latent: bool = False,
) -> AbstractMethod:
    """The method by its name, or by the user's own function of `Parts`. Local.

    Args:
        section: The section `[time]`.
        field: The vector field of states.
        reduction: How it becomes a field of coordinates; Galerkin's way unless given.
        n_batch_axes: Leading axes of a state that count samples.
        seed: For random directions.
        latent: Whether the states are coordinates on a learned basis.

    Raises:
        ConfigError: if the user's function fails or returns something else.
    """

    def propagator(steps: StepsSection | None, key: str) -> Propagator | None:
        return None if steps is None else Propagator(field, build_integrator(steps, key))

    options = BasisSection(kind="identity") if section.basis is None else section.basis
    basis = None
    if section.basis is not None:
        basis = build_basis(section.basis, n_batch_axes=n_batch_axes, seed=seed, latent=latent)
    parts = Parts(
        fine=Propagator(field, build_integrator(section.fine, "time.fine")),
        coarse=propagator(section.coarse, "time.coarse"),
        tangents=propagator(section.tangents, "time.tangents"),
        basis=basis,
        reduction=reduction,
        complement=options.complement,
        recycle=options.recycle,
        precision=options.precision,
        trust=options.trust or None,
        levels=_build_levels(section, propagator),
    )
    if not is_import_path(section.method):
        return METHODS[section.method].of(parts)
    return make_own_method(section.method, "time.method", parts)


def _build_levels(section: Time, propagator: Callable) -> Levels | None:
    """How coarse walks are done in levels; None if in one."""
    stated = section.levels
    if stated is None:
        return None
    levels = Levels(
        stated.coarsening,
        stated.cycles,
        propagator(stated.coarsest, "time.levels.coarsest"),
        None if stated.number == "auto" else stated.number,
    )
    return None if levels.grouping(section.n_slices) is None else levels


def make_own_method(path: str, key: str, parts: Parts) -> AbstractMethod:
    """A method by the user's own function of `Parts`. Local.

    Raises:
        ConfigError: in the name of `key`, if the function fails or returns something else.
    """
    make = import_object(path, key)
    try:
        method = make(parts)
    except Exception as error:
        raise ConfigError(f'`{key} = "{path}"` failed: {type(error).__name__}: {error}') from error
    if not isinstance(method, AbstractMethod):
        raise ConfigError(
            f'`{key} = "{path}"` returned a {type(method).__name__}; it takes `parts` (see '
            "`nodepint_mpi.Parts`) and returns an `AbstractMethod`."
        )
    return method


def build_time_solver(
    config: Config, field: Field, reduction: AbstractReduction, *, n_batch_axes: int
) -> TimeSolver:
    """Everything that fixes a time-parallel solve. Local."""
    section, adjoint = config.time, config.time.adjoint
    tol = ADJOINT_TOL[config.run.precision] if adjoint.tol is None else adjoint.tol
    latent = isinstance(config.network, DenseNetwork) and config.network.latent is not None
    return TimeSolver(
        fine=Propagator(field, build_integrator(section.fine, "time.fine", adjoint.kind)),
        method=build_method(
            section,
            field,
            reduction,
            n_batch_axes=n_batch_axes,
            seed=config.run.seed,
            latent=latent,
        ),
        stopping=build_stopping(section.stopping, config.run.precision),
        adjoint_tol=tol if adjoint.sweeps is None else 0.0,
        adjoint_max_sweeps=adjoint.sweeps,
        slices_at_once=section.slices_at_once,
    )


def build_loss(config: Config) -> tuple[Loss | SimulationFree, dict[str, Loss]]:
    """The loss, and what is reported beside it. Local."""
    if config.loss is None:
        raise ConfigError("Training needs a section `[loss]`.")
    name = config.loss.name
    own = dict(map(_own_metric, config.loss.metrics))
    if is_import_path(name):
        return import_function(name, "loss.name"), own
    if name not in LOSSES:
        raise ConfigError(unknown_name("loss.name", name, LOSSES))
    return LOSSES[name], METRICS[name] | own


def build_terms(config: Config) -> tuple[Term, ...]:
    """What is added to the loss. Local."""
    if config.loss is None:
        return ()
    for term in config.loss.terms:
        if not is_import_path(term.name):
            raise ConfigError(
                f"`loss.terms` holds {term.name!r}; it takes functions of your own, named "
                "`file.py:function`."
            )
    return tuple(
        Term(import_function(term.name, "loss.terms"), term.weight) for term in config.loss.terms
    )


def _own_metric(path: str) -> tuple[str, Loss]:
    """A metric by the name of its function."""
    name = path.rpartition(":")[2]
    if not is_import_path(path) or name in ("loss", "step"):
        raise ConfigError(
            f"`loss.metrics` holds {path!r}; it takes metrics of your own, named "
            "`file.py:function`, and none of the name 'loss' or 'step'."
        )
    return name, import_function(path, "loss.metrics")


def build_problem(section: ProblemSection, horizon: list[float]) -> Problem:
    """One initial-value problem on the config's horizon. Local."""
    if is_import_path(section.field):
        if section.initial is None:
            raise ConfigError("`problem.initial` is missing: a field of your own needs it.")
        field = import_function(section.field, "problem.field")
        problem = Problem(field, section.args, np.asarray(section.initial), (0.0, 1.0))
    elif section.field in PROBLEMS:
        problem = PROBLEMS[section.field]
        for name in section.args:
            if name not in problem.args:
                raise ConfigError(unknown_name("problem.args", name, problem.args))
        problem = problem._replace(args=problem.args | section.args)
        if section.initial is not None:
            problem = problem._replace(initial=np.asarray(section.initial))
    else:
        raise ConfigError(unknown_name("problem.field", section.field, PROBLEMS))
    if section.box is not None:
        problem = scale_to_box(problem, *section.box)
    return problem._replace(span=(horizon[0], horizon[1]))
