"""Config sections to models and integrators, without MPI: what a reduced model is loaded by."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import numpy as np
import optimistix

from nodepint_mpi.build.imports import import_object, is_import_path
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.config.network import ConvNetwork, DenseNetwork, UserNetwork
from nodepint_mpi.config.time import StepsSection, Time
from nodepint_mpi.core.partition import check_edges
from nodepint_mpi.core.propagators import (
    AbstractIntegrator,
    AdaptiveSteps,
    AdjointKind,
    FixedSteps,
)
from nodepint_mpi.core.runge_kutta import RK4, chebyshev, explicit_runge_kutta
from nodepint_mpi.errors import ConfigError, ProblemError
from nodepint_mpi.models.networks import EncodeProcessDecode, Identity, make_conv, make_dense
from nodepint_mpi.names import hint

_EXPLICIT = "euler heun midpoint ralston bosh3 tsit5 dopri5 dopri8"
_IMPLICIT = "implicit_euler kvaerno3 kvaerno4 kvaerno5"
_CLASS_NAMES = {
    "implicit_euler": "ImplicitEuler",
    "euler_heun": "EulerHeun",
    "ito_milstein": "ItoMilstein",
    "stratonovich_milstein": "StratonovichMilstein",
    "sra1": "SRA1",
    "shark": "ShARK",
    "slow_rk": "SlowRK",
}
_STOCHASTIC = "euler_heun ito_milstein stratonovich_milstein sra1 shark slow_rk"
SOLVERS = sorted([*_EXPLICIT.split(), *_IMPLICIT.split(), *_STOCHASTIC.split(), "chebyshev", "rk4"])


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
        try:
            solver = solver() if isinstance(solver, type) else solver
        except Exception as error:  # anything that the user's code can raise
            raise ConfigError(
                f'`{key}.solver = "{name}"`: calling it without arguments failed: '
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(solver, diffrax.AbstractSolver):
            raise ConfigError(
                f'`{key}.solver = "{name}"` is of type {type(solver).__name__}; expected a diffrax '
                "solver, or a class that makes one without arguments."
            )
        return solver
    if name == "rk4":
        return RK4()
    if name == "chebyshev":
        assert section.n_stages is not None  # checked by the config
        return chebyshev(section.n_stages)
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
                "give `n_steps`, or use another solver such as 'tsit5'."
            )
        assert section.rtol is not None and section.atol is not None  # checked by the config
        return AdaptiveSteps(
            solver, section.rtol, section.atol, section.max_steps, adjoint, section.checkpoints
        )
    except ProblemError as error:
        raise ConfigError(f"`[{key}]`: {error}") from error


def build_edges(section: Time) -> np.ndarray:
    """Slice boundaries, equally long unless they are listed. Local.

    Raises:
        ProblemError: if double precision does not resolve them.
    """
    if section.edges is not None:
        return check_edges(section.edges)
    left, right = section.horizon
    return check_edges(np.linspace(left, right, section.n_slices + 1))


class Given(NamedTuple):
    """How many numbers a sample brings for the field: channels of its inputs, and features."""

    n_inputs: int = 0
    n_static: int = 0


NOTHING_GIVEN = Given()


def build_model(
    config: Config,
    *,
    input_shape: tuple[int, ...],
    output_size: int,
    given: Given = NOTHING_GIVEN,
    step: int = 0,
    make: Callable[..., Any] | None = None,
) -> EncodeProcessDecode:
    """Encoder, vector field and decoder with fresh weights, equal on all ranks. Local.

    Args:
        config: The experiment.
        input_shape: Shape of one input sample.
        output_size: Classes of a label, or components of an observation.
        given: What a sample brings for the field.
        step: The model's size is that with which this optimizer step is taken.
        make: Makes the user's own network; None imports what the config names.
    """
    key = jax.random.key(config.run.seed)
    network = config.network_at(step)
    shape: dict[str, Any] = dict(input_shape=input_shape, output_size=output_size)
    match network:
        case DenseNetwork():
            options = network.model_dump(exclude={"name"})
            model = make_dense(key, **shape, **options, n_given=sum(given))
        case ConvNetwork() if any(given):
            raise ConfigError(
                "The network 'conv' takes no `data.inputs` and no `data.static`: use 'mlp' or a "
                "network of your own."
            )
        case ConvNetwork():
            model = make_conv(key, **shape, **network.model_dump(exclude={"name"}))
        case UserNetwork():
            model = _own_model(network, key, shape, given, make)
        case None:
            raise ConfigError("Training needs a section `[network]`.")
    return _to_default_precision(model)


def unknown_name(key: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name, with what may have been meant. Local."""
    return f"Unknown `{key}` {name!r}{hint(name, known)}"


def _own_model(
    network: UserNetwork,
    key: Any,
    shape: dict[str, Any],
    given: Given,
    make: Callable[..., Any] | None,
) -> EncodeProcessDecode:
    """The user's model; a bare vector field evolves the observations themselves.

    It is told by name what samples bring, if it asks.
    """
    if not is_import_path(network.name):
        raise ConfigError(unknown_name("network.name", network.name, ["mlp", "conv"]))
    make = make if make is not None else import_object(network.name, "network.name")
    assert make is not None  # a name that stands for None fails below in words
    try:
        parameters = inspect.signature(make).parameters if callable(make) else {}
        asked = {
            name: count
            for name, count in given._asdict().items()
            if name in parameters and name not in network.options
        }
        model = make(key, **shape, **asked, **network.options)
    except (ConfigError, ProblemError):
        raise
    except Exception as error:  # anything that the user's code can raise
        raise ConfigError(
            f'`network.name = "{network.name}"` was called with a key, `input_shape`, '
            f"`output_size` and {sorted(network.options)}, and failed: {type(error).__name__}: "
            f"{next(iter(str(error).splitlines()), '')}"
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
