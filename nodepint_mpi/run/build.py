"""Config sections to objects: solvers, propagators, networks, losses, optimisers.

The only place that turns names into things; the numerics never see the config.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import diffrax
import equinox as eqx
import jax
import numpy as np
import optax
import optimistix

from nodepint_mpi.config import (
    BasisSection,
    Config,
    ConvNetwork,
    DenseNetwork,
    OptimSection,
    ProblemSection,
    StepsSection,
    StoppingSection,
    TimeSection,
    UserNetwork,
)
from nodepint_mpi.core.galerkin import AbstractReduction
from nodepint_mpi.core.networks import EncodeProcessDecode, Identity, make_conv, make_dense
from nodepint_mpi.core.objective import LOSSES, METRICS, Loss
from nodepint_mpi.core.problems import PROBLEMS, Problem, scale_to_box
from nodepint_mpi.core.propagators import (
    AbstractIntegrator,
    AdaptiveSteps,
    AdjointKind,
    FixedSteps,
    Propagator,
)
from nodepint_mpi.core.runge_kutta import RK4, explicit_runge_kutta
from nodepint_mpi.core.stopping import AbstractStopping, FixedSweeps, FreezeSlices, JumpTolerance
from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import ConfigError, ProblemError
from nodepint_mpi.parallel.differentiate import TimeSolver
from nodepint_mpi.parallel.methods import AbstractMethod, Parareal, Picard, Serial
from nodepint_mpi.parallel.reduced import Reduced
from nodepint_mpi.parallel.shared_basis import SharedBasis
from nodepint_mpi.parallel.tangent import Tangent
from nodepint_mpi.run.imports import import_object, is_import_path

JUMP_TOL = {"float32": 1e-5, "float64": 1e-8}
ADJOINT_TOL = {"float32": 1e-4, "float64": 1e-8}

_EXPLICIT = "euler heun midpoint ralston bosh3 tsit5 dopri5 dopri8"
_IMPLICIT = "implicit_euler kvaerno3 kvaerno4 kvaerno5"
_CLASS_NAMES = {"implicit_euler": "ImplicitEuler"}
SOLVERS = sorted([*_EXPLICIT.split(), *_IMPLICIT.split(), "rk4"])


def build_solver(section: StepsSection, key: str) -> diffrax.AbstractSolver:
    """A diffrax solver from its name, an import path or a tableau. Local."""
    if section.tableau is not None:
        tableau = section.tableau
        return explicit_runge_kutta(
            tableau.a, tableau.b, order=tableau.order, b_embedded=tableau.b_embedded
        )
    name = section.solver
    assert name is not None  # checked by the config
    if is_import_path(name):
        solver = import_object(name, f"{key}.solver")
        solver = solver() if isinstance(solver, type) else solver
        if not isinstance(solver, diffrax.AbstractSolver):
            raise ConfigError(f'`{key}.solver = "{name}"` is no diffrax solver.')
        return solver
    if name == "rk4":
        return RK4()
    if name not in SOLVERS:
        raise ConfigError(unknown_name(f"{key}.solver", name, SOLVERS))
    solver_class = getattr(diffrax, _CLASS_NAMES.get(name, name.capitalize()))
    if name in _IMPLICIT.split() and section.n_steps is not None:
        # Newton and not diffrax's cheaper chord: a coarse step is long, and the chord fails there.
        root_finder = optimistix.Newton(rtol=1e-10, atol=1e-12, norm=optimistix.max_norm)
        return solver_class(root_finder=root_finder)
    return solver_class()


def build_integrator(
    section: StepsSection, key: str, adjoint: AdjointKind = "discrete"
) -> AbstractIntegrator:
    """The steps over one slice. Local."""
    solver = build_solver(section, key)
    try:
        if section.n_steps is not None:
            return FixedSteps(solver, section.n_steps, adjoint, section.checkpoints)
        if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
            raise ConfigError(
                f"`{key}.solver` = {section.solver!r} has no error estimate to choose steps by: "
                "give `n_steps`, or take another solver such as 'tsit5'."
            )
        assert section.rtol is not None and section.atol is not None  # checked by the config
        return AdaptiveSteps(
            solver, section.rtol, section.atol, section.max_steps, adjoint, section.checkpoints
        )
    except ProblemError as error:
        raise ConfigError(f"`[{key}]`: {error}") from error


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


def build_edges(section: TimeSection) -> np.ndarray:
    """Slice boundaries, equally long unless they are listed. Local."""
    if section.edges is not None:
        return np.asarray(section.edges)
    left, right = section.horizon
    return np.linspace(left, right, section.n_slices + 1)


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
    return SharedBasis(kind, section.rank, n_new, n_batch_axes, section.drop, seed)


def build_method(
    section: TimeSection,
    field: Field,
    reduction: AbstractReduction,
    *,
    n_batch_axes: int,
    seed: int,
    latent: bool = False,
) -> AbstractMethod:
    """The sweep. Local.

    Args:
        section: The section `[time]`.
        field: The vector field of states.
        reduction: How it becomes a field of coordinates.
        n_batch_axes: Leading axes of a state that count samples.
        seed: For random directions.
        latent: Whether the states are coordinates on a learned basis.
    """
    if section.method == "serial":
        return Serial()
    if section.method == "picard":
        return Picard()
    steps = section.coarse
    coarse = None
    if steps is not None:
        coarse = Propagator(field, build_integrator(steps, "time.coarse"))
    if section.method == "parareal":
        assert coarse is not None  # checked by the config
        return Parareal(coarse)
    options = section.basis
    assert options is not None  # checked by the config
    basis = build_basis(options, n_batch_axes=n_batch_axes, seed=seed, latent=latent)
    if section.method == "reduced":
        assert coarse is not None  # checked by the config
        return Reduced(basis, reduction, coarse.integrator, coarse, options.complement)
    tangents, key = section.tangents or section.fine, "time.tangents"
    return Tangent(
        basis=basis,
        propagator=Propagator(field, build_integrator(tangents, key)),
        coarse=coarse,
        use_complement=options.complement,
        recycle=options.recycle,
        precision=options.precision,
        trust=options.trust or None,
    )


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


def build_model(
    config: Config, *, input_shape: tuple[int, ...], output_size: int
) -> EncodeProcessDecode:
    """Encoder, vector field and decoder with fresh weights, equal on all ranks. Local.

    Args:
        config: The experiment.
        input_shape: Shape of one input sample.
        output_size: Classes of a label, or components of an observation.
    """
    key = jax.random.key(config.run.seed)
    network = config.network
    shape: dict[str, Any] = dict(input_shape=input_shape, output_size=output_size)
    match network:
        case DenseNetwork():
            options = network.model_dump(exclude={"name"})
            model = make_dense(key, **shape, **options)
        case ConvNetwork():
            model = make_conv(key, **shape, channels=network.channels)
        case UserNetwork():
            model = _own_model(network, key, shape)
        case None:
            raise ConfigError("Training needs a section `[network]`.")
    return _to_default_precision(model)


def build_loss(config: Config) -> tuple[Loss, dict[str, Loss]]:
    """The loss, and what is reported beside it. Local."""
    if config.loss is None:
        raise ConfigError("Training needs a section `[loss]`.")
    name = config.loss.name
    if is_import_path(name):
        return import_object(name, "loss.name"), {}
    if name not in LOSSES:
        raise ConfigError(unknown_name("loss.name", name, LOSSES))
    return LOSSES[name], METRICS[name]


def build_optimiser(section: OptimSection) -> optax.GradientTransformation:
    """An optax optimiser with its schedule. Local."""
    make = getattr(optax, section.name, None)
    if make is None or section.name.startswith("_"):
        known = [name for name in dir(optax) if callable(getattr(optax, name))]
        raise ConfigError(unknown_name("optim.name", section.name, known))
    try:
        optimiser = make(learning_rate=_build_schedule(section), **section.options)
        assert isinstance(optimiser, optax.GradientTransformation)
    except (TypeError, AssertionError) as error:
        raise ConfigError(
            f'`optim.name = "{section.name}"` does not take a learning rate and the options '
            f"{section.options}: {error}"
        ) from error
    if section.clip_norm is None:
        return optimiser
    return optax.chain(optax.clip_by_global_norm(section.clip_norm), optimiser)


def build_problem(section: ProblemSection, horizon: list[float]) -> Problem:
    """One initial-value problem on the config's horizon. Local."""
    if is_import_path(section.field):
        if section.initial is None:
            raise ConfigError("`problem.initial` is missing: a field of your own needs it.")
        field = import_object(section.field, "problem.field")
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


def unknown_name(key: str, name: str, known: Iterable[str]) -> str:
    """The message for a name nobody knows, with the nearest ones. Local."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    hint = f"; nearest are {', '.join(map(repr, close))}" if close else ""
    return f"`{key}` knows no {name!r}{hint}."


def _build_schedule(section: OptimSection) -> Callable | float:
    peak, warmup, decay = section.learning_rate, section.warmup_steps, section.decay_steps
    if section.schedule == "constant":
        if not warmup:
            return peak
        return optax.linear_schedule(0.0, peak, warmup)
    assert decay is not None  # checked by the config
    if section.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup else peak, peak, warmup, decay, peak * section.end_factor
        )
    return optax.warmup_exponential_decay_schedule(
        0.0 if warmup else peak,
        peak,
        warmup,
        decay - warmup,
        section.end_factor,
        end_value=peak * section.end_factor,
    )


def _own_model(network: UserNetwork, key: Any, shape: dict[str, Any]) -> EncodeProcessDecode:
    """The user's model; a bare vector field evolves the observations themselves."""
    if not is_import_path(network.name):
        raise ConfigError(unknown_name("network.name", network.name, ["mlp", "conv"]))
    make = import_object(network.name, "network.name")
    try:
        model = make(key, **shape, **network.options)
    except TypeError as error:
        raise ConfigError(
            f'`network.name = "{network.name}"` was called with a key, `input_shape`, '
            f"`output_size` and {sorted(network.options)}, and failed: {error}"
        ) from error
    if all(callable(getattr(model, part, None)) for part in ("encoder", "processor", "decoder")):
        return EncodeProcessDecode(model.encoder, model.processor, model.decoder)
    if not callable(model):
        raise ConfigError(
            f'`network.name = "{network.name}"` must return a vector field f(t, u, args), or a '
            "module with `encoder`, `processor` and `decoder`."
        )
    return EncodeProcessDecode(Identity(), model, Identity())


def _to_default_precision(tree: Any) -> Any:
    """Weights in the precision of the run, whatever the user's code made."""
    dtype = jax.numpy.zeros(()).dtype
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)
