"""The training step that a user of diffrax and optax writes, for comparison.

The same model, data, loss, optimizer, solver and steps as a config asks of us, by one `diffeqsolve`
over the whole horizon and `jax.grad`.
"""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike

from nodepint_mpi.build.model import build_edges
from nodepint_mpi.core.objective import per_sample
from nodepint_mpi.core.observations import place_observations
from nodepint_mpi.core.propagators import AdaptiveSteps, FixedSteps
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.models.networks import as_numbers
from nodepint_mpi.parallel.counters import Tally
from nodepint_mpi.training.error_control import Anew
from nodepint_mpi.training.setup import Experiment
from nodepint_mpi.training.step import Stepped, StepReport, TrainState, batched_field


def plain_report(loss: ArrayLike, grad_norm: ArrayLike) -> StepReport:
    """Loss and gradient's norm of a step without sweeps. Local."""
    loss, grad_norm, none = jnp.asarray(loss), jnp.asarray(grad_norm), jnp.array(0)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    report = StepReport(*(none for _ in StepReport._fields))
    return report._replace(loss=loss, grad_norm=grad_norm, finite=finite)


def make_plain_loss(experiment: Experiment) -> Callable:
    """Make `(params, inputs, targets) -> loss`, by plain diffrax. Local.

    Fixed steps keep a checkpoint each, which is fastest; where all observations fall on steps
    nothing is interpolated.

    Raises:
        ConfigError: for steps that are not diffrax's own.
    """
    problem, section = experiment.train_problem, experiment.config.time
    integrator, edges = problem.solver.fine.integrator, build_edges(section)
    seen = np.asarray(place_observations(experiment.train.times, edges, 1, 0).indices)
    # Counted from the first edge in double precision, as the slices count theirs.
    t0, edges = edges[0], edges - edges[0]
    times = np.asarray(experiment.train.times)[seen] - t0  # the very first is the input
    match integrator:
        case FixedSteps(solver=solver, n_steps=n_steps):
            grid = np.concatenate(
                [
                    np.linspace(a, b, n_steps + 1)[:-1]
                    for a, b in zip(edges, edges[1:], strict=False)
                ]
                + [edges[-1:]]
            )
            n_total = len(grid) - 1
            adjoint = diffrax.RecursiveCheckpointAdjoint(checkpoints=n_total)
            controller, max_steps = diffrax.StepTo(jnp.asarray(grid)), n_total
            where = np.searchsorted(grid, times - 1e-9 * (edges[-1] - edges[0]))
            on_steps = bool(np.allclose(grid[where], times, rtol=0, atol=1e-9 * grid[-1]))
        case AdaptiveSteps(solver=solver, rtol=rtol, atol=atol, max_steps=limit):
            adjoint = diffrax.RecursiveCheckpointAdjoint()
            controller = diffrax.PIDController(rtol=rtol, atol=atol)
            max_steps, where, on_steps = limit * section.n_slices, None, False
        case _:
            raise ConfigError("Plain diffrax needs steps that are fixed or chosen by tolerances.")
    ends_only = len(times) == 1 and np.isclose(times[0], edges[-1])
    if ends_only:
        saveat = diffrax.SaveAt(t1=True)
    elif on_steps:
        saveat = diffrax.SaveAt(t0=True, steps=True)
    else:
        saveat = diffrax.SaveAt(ts=jnp.asarray(times))
    static, function = problem.static, problem.loss
    field = batched_field(static.processor)

    def loss(params, inputs, targets):
        model = eqx.combine(params, static)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda since, u, params: field(t0 + since, u, params)),
            solver,
            t0=edges[0],
            t1=edges[-1],
            dt0=None,
            y0=jax.vmap(model.encoder)(as_numbers(inputs)),
            args=params.processor,
            saveat=saveat,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=max_steps,
        )
        states = solution.ys
        assert states is not None  # something is saved
        if on_steps and not ends_only:
            states = states[where]
        predictions = per_sample(model.decoder)(states)
        mean = function(predictions, jnp.moveaxis(jnp.asarray(targets)[:, seen], 1, 0))
        return mean.sum / mean.count

    return loss


def make_plain_stepper(experiment: Experiment) -> Anew:
    """Steps by plain diffrax and optax, as those of `training.error_control`. Local."""
    loss, optimiser = make_plain_loss(experiment), experiment.optimiser

    nothing = Tally().as_array()  # of what time-parallel code counts

    def step(state: TrainState, inputs: Array, targets: Array, weight: None) -> Stepped:
        del weight
        value, gradient = jax.value_and_grad(loss)(state.params, inputs, targets)
        updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
        updated = TrainState(optax.apply_updates(state.params, updates), opt_state)
        return Stepped(updated, None, plain_report(value, optax.tree.norm(gradient)), nothing)

    return Anew(jax.jit(step), None)
