"""The sections of a config to a control problem: field, control, cost, optimizer, learning."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nodepint_mpi.build.imports import import_function, is_import_path
from nodepint_mpi.build.model import build_edges, build_integrator, build_model, unknown_name
from nodepint_mpi.build.noise import build_path_noise
from nodepint_mpi.build.optimizers import build_optimizer
from nodepint_mpi.build.sections import ADJOINT_TOL, build_basis, build_problem, build_stopping
from nodepint_mpi.build.trained import load_model
from nodepint_mpi.config.control import RUN, ControlSection, CostSection
from nodepint_mpi.config.experiment import Config, ProblemSection
from nodepint_mpi.config.time import StepsSection
from nodepint_mpi.core.controlled import CONTROLLED, Additive, synchrony_cost
from nodepint_mpi.core.controls import (
    Bounded,
    Control,
    NetworkControl,
    PiecewiseConstant,
    PiecewiseLinear,
    roughened,
)
from nodepint_mpi.core.costs import Cost, quadratic_cost
from nodepint_mpi.core.problems import PROBLEMS
from nodepint_mpi.data.own import share_own_data
from nodepint_mpi.data.samples import Samples, open_splits
from nodepint_mpi.errors import ConfigError, ProblemError
from nodepint_mpi.models.networks import EncodeProcessDecode, Identity
from nodepint_mpi.optimal_control.control import Task, prepare
from nodepint_mpi.optimal_control.gradients import ADJOINTS
from nodepint_mpi.optimal_control.iterations import Plan
from nodepint_mpi.optimal_control.learning import Learning, trajectory_loss
from nodepint_mpi.optimal_control.paraopt_options import ParaOpt
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.ranks.agreement import together


class Equation(NamedTuple):
    """`field(t, u, c, args)`, its `args`, the initial state, and the number of controls, None if
    the field takes as many as there are."""

    field: Any
    args: PyTree
    initial: np.ndarray
    n_controls: int | None


def build_task(config: Config, comms: Comms, *, trust: bool) -> Task:
    """The control problem of a config, checked. Collective over `comms`.

    Args:
        config: With a section `[control]`.
        comms: The run's communicators, one line of ranks.
        trust: Import the code that the config of a learned field's run names.

    Raises:
        NodepintError: on all ranks, with what does not fit.
    """
    section, time = config.control, config.time
    if section is None:
        raise ConfigError("`nodepint control` needs a section `[control]`; see docs/control.md.")
    samples = None
    if section.learning is not None:
        config = share_own_data(comms.control, config)
        samples = open_splits(comms.control, config).train
    with together(comms.control):
        equation = _equation(config, section, samples, trust=trust)
        control = build_control(section, config, equation)
        plan = _plan(config, section, control, equation, samples, comms)
        options = _options(config, section, equation)
        fine = build_integrator(time.fine, "time.fine")
        cost = build_cost(section.cost)
    gradient = next(name for name, kind in ADJOINTS.items() if kind == time.adjoint.kind)
    return prepare(
        equation.field, jnp.asarray(equation.initial, float), build_edges(time), control=control,
        cost=cost, fine=fine, gradient=gradient, plan=plan, args=equation.args, comm=comms.time,
        options=options,
    )  # fmt: skip


# ---- The field -----------------------------------------------------------------------------------


class LearnedField(eqx.Module):
    """model(t, u, None) + B c, with the model among the arguments."""

    matrix: tuple[tuple[float, ...], ...] | None = eqx.field(static=True)

    def __call__(self, t: Array, u: Array, c: Array, args: Any) -> Array:
        if self.matrix is None:
            return args(t, u, c)
        return Additive(lambda t, u, args: args(t, u, None), self.matrix)(t, u, c, args)


def _equation(
    config: Config, section: ControlSection, samples: Samples | None, *, trust: bool
) -> Equation:
    problem = config.problem
    assert problem is not None  # the config says so
    matrix = None if section.matrix is None else tuple(map(tuple, section.matrix))
    if samples is not None:
        return _learned(problem, matrix, _processor(build_fresh(config, samples)))
    if problem.field.startswith(RUN):
        model = load_model(problem.field.removeprefix(RUN), trust=trust)
        return _learned(problem, matrix, _processor(model))
    if problem.field in CONTROLLED and matrix is None:
        known = CONTROLLED[problem.field]
        for name in problem.args:
            if name not in known.args:
                raise ConfigError(unknown_name("problem.args", name, known.args))
        initial = known.initial if problem.initial is None else np.asarray(problem.initial)
        args = _as_arrays(known.args | problem.args)
        return Equation(known.field, args, initial, known.n_controls)
    if not is_import_path(problem.field):
        if problem.field in PROBLEMS and matrix is None:
            raise ConfigError(
                f"`problem.field = {problem.field!r}` takes no control: give `control.matrix`, "
                "which adds one to it, a row for each number of the state."
            )
        if problem.field not in PROBLEMS:
            known = CONTROLLED if matrix is None else {}
            raise ConfigError(unknown_name("problem.field", problem.field, [*known, *PROBLEMS]))
    built = build_problem(problem, config.time.horizon)
    field = built.field if matrix is None else Additive(built.field, matrix)
    n_controls = None if matrix is None else len(matrix[0])
    return Equation(field, _as_arrays(built.args), np.asarray(built.initial, float), n_controls)


def _learned(problem: ProblemSection, matrix: Any, model: Any) -> Equation:
    if problem.initial is None:
        raise ConfigError("`problem.initial` is missing: a learned field needs it.")
    n_controls = None if matrix is None else len(matrix[0])
    return Equation(LearnedField(matrix), model, np.asarray(problem.initial, float), n_controls)


def build_fresh(config: Config, samples: Samples) -> EncodeProcessDecode:
    """The network that is to be learned, with its first weights. Local."""
    batch = samples.take(np.arange(1))
    shape = tuple(np.shape(batch.initial)[1:])
    return build_model(config, input_shape=shape, output_size=int(batch.targets.shape[-1]))


def _processor(model: EncodeProcessDecode) -> Any:
    """The vector field of a model whose states are what is observed."""
    if not isinstance(model.encoder, Identity) or not isinstance(model.decoder, Identity):
        raise ConfigError(
            "A field that is steered evolves the observations themselves: take a network without "
            "`latent` and without `positive`, or one of your own that returns a vector field."
        )
    return model.processor


def _as_arrays(args: dict[str, float]) -> dict[str, Array]:
    return {name: jnp.asarray(value, float) for name, value in args.items()}


# ---- Control and cost ----------------------------------------------------------------------------


def build_control(section: ControlSection, config: Config, equation: Equation) -> Control:
    """The control, as it is before the first iteration. Local.

    Raises:
        ConfigError: if keys do not fit together.
    """
    n_controls = section.n_controls or equation.n_controls
    if n_controls is None:
        raise ConfigError(
            "`control.n_controls` is missing: how many numbers the control has that "
            "`problem.field` takes."
        )
    if equation.n_controls not in (None, n_controls):
        raise ConfigError(
            f"`control.n_controls` is {n_controls}, and `problem.field` takes "
            f"{equation.n_controls}."
        )
    span, key = config.time.horizon, jax.random.key(config.run.seed)
    n_states = int(np.prod(equation.initial.shape[-1:]))
    match section.kind:
        case "network":
            control: Any = NetworkControl(
                span, n_controls, n_states=n_states if section.feedback else None,
                width=section.width, depth=section.depth, pace=section.pace, key=key,
            )  # fmt: skip
        case "constant" | "linear":
            control = _nodes(section, config, n_controls)
            if section.roughness:
                control = roughened(control, section.roughness, key)
        case own:
            make = import_function(own, "control.kind")
            try:
                control = make(key, span=tuple(span), n_controls=n_controls, n_states=n_states)
            except Exception as error:
                raise ConfigError(
                    f'`control.kind = "{own}"` was called with a key, `span`, `n_controls` and '
                    f"`n_states`, and failed: {type(error).__name__}: {error}"
                ) from error
            if not callable(control):
                raise ConfigError(
                    f'`control.kind = "{own}"` returned a {type(control).__name__}; expected a '
                    "module that is called as `control(t, u)`."
                )
    dtype = jnp.zeros(()).dtype
    control = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, control)
    if section.low is None:
        return control
    try:
        return Bounded(control, section.low, section.high)
    except ProblemError as error:
        raise ConfigError(f"`control.low` and `control.high`: {error}") from error


def _nodes(section: ControlSection, config: Config, n_controls: int) -> Control:
    constant = section.kind == "constant"
    n_nodes = section.n_nodes or config.time.n_slices + (not constant)
    begin, end = config.time.horizon
    times = np.linspace(begin, end, n_nodes + constant)[:n_nodes]
    if isinstance(section.initial, str):
        if not is_import_path(section.initial):
            raise ConfigError(
                f"`control.initial = {section.initial!r}`: expected numbers, or a function of the "
                "time, 'file.py:function'."
            )
        function = import_function(section.initial, "control.initial")
        try:
            first = np.stack([np.atleast_1d(np.asarray(function(t), float)) for t in times])
        except Exception as error:
            raise ConfigError(
                f'`control.initial = "{section.initial}"` was called with each node\'s time, and '
                f"failed: {type(error).__name__}: {error}"
            ) from error
    else:
        first = np.asarray(section.initial, dtype=float)
    try:
        values = np.broadcast_to(first, (n_nodes, n_controls))
    except ValueError:
        raise ConfigError(
            f"`control.initial` has shape {first.shape}; expected a number, one for each of the "
            f"{n_controls} controls, or a list of these for each of the {n_nodes} nodes."
        ) from None
    if not np.all(np.isfinite(values)):
        raise ConfigError("`control.initial` must be finite.")
    made = PiecewiseConstant if constant else PiecewiseLinear
    return made(times, jnp.asarray(values))


def build_cost(section: CostSection) -> Cost:
    """What is minimized. Local.

    Raises:
        ConfigError: if it is the user's own and no cost.
    """
    weights: dict[str, Any] = {
        name: getattr(section, name) for name in ("terminal", "running", "energy")
    }
    if is_import_path(section.name):
        make = import_function(section.name, "control.cost.name")
        try:
            cost = make(**section.options)
        except Exception as error:
            raise ConfigError(
                f'`control.cost.name = "{section.name}"` was called with '
                f"{sorted(section.options)}, and failed: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(cost, Cost):
            raise ConfigError(
                f'`control.cost.name = "{section.name}"` returned a {type(cost).__name__}; '
                "expected a `nodepint_mpi.Cost`."
            )
        return cost
    if section.name == "synchrony":
        return synchrony_cost(**weights)
    if section.name != "quadratic":
        raise ConfigError(unknown_name("control.cost.name", section.name, _COSTS))
    return quadratic_cost(target=section.target, reach=section.reach, of=section.of, **weights)


_COSTS = "quadratic", "synchrony"


# ---- How -----------------------------------------------------------------------------------------


def _plan(
    config: Config,
    section: ControlSection,
    control: Control,
    equation: Equation,
    samples: Samples | None,
    comms: Comms,
) -> Plan:
    optimizer: Any = "lbfgs"
    if section.optim is not None:
        optimizer = build_optimizer(section.optim, eqx.filter(control, eqx.is_inexact_array))
    learning = None
    if section.learning is not None:
        assert samples is not None  # they were opened for it
        learning = _learning(config, section, equation, samples, comms)
    tracking = config.time.tracking is not None and config.time.method != "serial"
    assert config.run.n_steps is not None  # the config says so
    return Plan(
        optimizer, config.run.n_steps, section.tol, section.constraint_tol, tracking, learning
    )


def _learning(
    config: Config, section: ControlSection, equation: Equation, samples: Samples, comms: Comms
) -> Learning:
    stated, time = section.learning, config.time
    assert stated is not None  # asked for
    if samples.differ or samples.has_gaps or samples.section.weights is not None:
        raise ConfigError(
            "`[control.learning]` takes trajectories that are all observed at the same times: no "
            "`inputs`, `static`, `mask`, `missing` or `weights` in `[data]`."
        )
    batch, times = samples.take(np.arange(samples.n_rows)), np.asarray(samples.times, float)
    starts, states = np.asarray(batch.initial), np.asarray(batch.targets)
    begin = time.horizon[0] if samples.section.initial is not None else float(times[0])
    after = times > begin
    n_controls = section.n_controls or equation.n_controls
    assert n_controls is not None  # the control was made
    share = (times[-1] - begin) / (time.horizon[1] - time.horizon[0])
    coarse: dict[str, Any] = {}
    if time.coarse is not None:
        coarse["coarse"] = build_integrator(_as_long(time.coarse, share), "time.coarse")
    loss = trajectory_loss(
        equation.field, starts, times[after], states[:, after],
        edges=np.linspace(begin, times[-1], time.n_slices + 1), n_controls=n_controls,
        fine=build_integrator(_as_long(time.fine, share), "time.fine"), gradient=stated.gradient,
        method="serial" if time.coarse is None else "parareal", comm=comms.time, **coarse,
        stopping=build_stopping(time.stopping, config.run.precision),
    )  # fmt: skip
    optimizer = build_optimizer(config.optim, eqx.filter(equation.args, eqx.is_inexact_array))
    n_steps = config.run.n_steps if stated.schedule == "joint" else stated.n_steps
    assert n_steps is not None  # the config says so
    return Learning(loss, optimizer, n_steps, stated.schedule, stated.rounds, stated.weight)


def _as_long(steps: StepsSection, share: float) -> StepsSection:
    """As many steps as keep their length, in slices of a `share` of the length."""
    if steps.n_steps is None:
        return steps
    return steps.model_copy(update={"n_steps": max(1, math.ceil(share * steps.n_steps - 1e-9))})


def _coarse(config: Config) -> dict[str, Any]:
    coarse = config.time.coarse
    return {} if coarse is None else {"coarse": build_integrator(coarse, "time.coarse")}


def _options(config: Config, section: ControlSection, equation: Equation) -> dict[str, Any]:
    """Those of `solve`."""
    time, precision = config.time, config.run.precision
    adjoint_tol = ADJOINT_TOL[precision] if time.adjoint.tol is None else time.adjoint.tol
    options: dict[str, Any] = {"method": time.method, "adjoint_tol": adjoint_tol}
    options |= _coarse(config) | {"slices_at_once": time.slices_at_once}
    if time.tracking is None or time.method == "serial":
        options["stopping"] = build_stopping(time.stopping, precision)
    if time.tangents is not None:
        options["tangents"] = build_integrator(time.tangents, "time.tangents")
    if time.basis is not None:
        basis = time.basis
        options["basis"] = build_basis(basis, n_batch_axes=0, seed=config.run.seed)
        options |= {"complement": basis.complement, "recycle": basis.recycle}
        options |= {"precision": basis.precision, "trust": basis.trust or None}
    if equation.initial.ndim > 1:
        options["in_axes"] = (0, None)
    own = equation.field.field if isinstance(equation.field, Additive) else equation.field
    noise, diffusion = build_path_noise(config), getattr(own, "diffusion", None)
    if noise is not None:
        if not callable(diffusion):
            raise ConfigError(
                "`[noise]` needs a `problem.field` with a method `diffusion(t, u, args)`: what "
                "the noise is multiplied with."
            )
        options |= {"noise": noise, "diffusion": diffusion}
    if section.method == "paraopt":
        given = section.paraopt.model_dump(exclude={"n_steps"})
        n_steps = section.paraopt.n_steps or time.fine.n_steps
        if n_steps is None:
            raise ConfigError(
                "`control.method = 'paraopt'` needs a number of steps: `time.fine.n_steps`, or "
                "`control.paraopt.n_steps`."
            )
        options["method"] = ParaOpt(n_steps, **given)
    return options
