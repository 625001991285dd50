"""The training step that a user of diffrax and optax writes, for comparison.

The same model, data, loss, optimizer, solver and steps as a config asks of us, by one `diffeqsolve`
over the whole horizon and `jax.grad`.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike

from nodepint_mpi.build.model import build_edges
from nodepint_mpi.core.batch import SampleBatch, as_numbers
from nodepint_mpi.core.by_name import call
from nodepint_mpi.core.exogenous import Inputs, path_of
from nodepint_mpi.core.keys import numbers_as_keys
from nodepint_mpi.core.objective import SimulationFree
from nodepint_mpi.core.observations import place_observations
from nodepint_mpi.core.propagators import AdaptiveSteps, FixedSteps
from nodepint_mpi.core.sample_params import FieldArgs, SampleArgs
from nodepint_mpi.core.stochastic import NoisyArgs, terms_on_grid
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.counters import Tally
from nodepint_mpi.training.batch_model import (
    BatchedField,
    decode_paths,
    encode,
    offered_to_loss,
    sample_keys,
    takes_key,
    terms_of_loss,
)
from nodepint_mpi.training.error_control import Anew
from nodepint_mpi.training.line_problem import LineProblem
from nodepint_mpi.training.rank_samples import for_rank
from nodepint_mpi.training.setup import Batch, Experiment
from nodepint_mpi.training.simulation_free import mean_of_samples
from nodepint_mpi.training.step import Stepped, StepReport
from nodepint_mpi.training.train_state import TrainState, apply_gradient


def plain_report(loss: ArrayLike, grad_norm: ArrayLike) -> StepReport:
    """Loss and gradient's norm of a step without sweeps. Local."""
    loss, grad_norm, none = jnp.asarray(loss), jnp.asarray(grad_norm), jnp.array(0)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    report = StepReport(*(none for _ in StepReport._fields))
    return report._replace(loss=loss, grad_norm=grad_norm, finite=finite)


def make_plain_loss(experiment: Experiment) -> Callable:
    """Make `(params, batch) -> loss`, by plain diffrax. Local.

    Fixed steps keep a checkpoint each, which is fastest; where all observations fall on steps
    nothing is interpolated. Of samples that bring inputs, or have times of their own, the batch is
    that of `Experiment.whole_batch`.

    Raises:
        ConfigError: for steps that are not diffrax's own.
    """
    problem, section = experiment.train_problem, experiment.config.time
    integrator, edges = problem.solver.fine.integrator, build_edges(section)
    # Counted from the first edge in double precision, as the slices count theirs.
    t0, edges = edges[0], edges - edges[0]
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
        case AdaptiveSteps(solver=solver, rtol=rtol, atol=atol, max_steps=limit):
            adjoint, grid = diffrax.RecursiveCheckpointAdjoint(), None
            controller = diffrax.PIDController(rtol=rtol, atol=atol)
            max_steps = limit * section.n_slices
        case _:
            raise ConfigError("Plain diffrax needs steps that are fixed or chosen by tolerances.")
    if problem.interpolation == "constant":
        raise ConfigError(
            "Plain diffrax does not end its steps where a sample's inputs jump: take `data."
            "interpolation` 'linear' or 'cubic' to compare with it."
        )
    field = BatchedField(problem.static.processor)

    def diffeqsolve(terms, initial, args, saveat):
        states = diffrax.diffeqsolve(
            terms, solver, t0=edges[0], t1=edges[-1], dt0=None, y0=initial,
            args=args, saveat=saveat, stepsize_controller=controller, adjoint=adjoint,
            max_steps=max_steps,
        ).ys  # fmt: skip
        assert states is not None  # something is saved
        return states

    noise = problem.noise
    if experiment.train.differ or takes_key(problem.static.processor) or noise is not None:
        columns = None if experiment.train.differ else _columns_read(experiment)
        solve = _one_by_one(field, diffeqsolve, problem, t0, edges[-1], grid, columns)
    else:
        solve = _all_at_once(field, diffeqsolve, experiment, t0, edges, grid)

    def loss(params, batch):
        model = eqx.combine(params, problem.static)
        if isinstance(problem.loss, SimulationFree):
            mean = mean_of_samples(problem, params, batch)
            added = terms_of_loss(problem.terms, model, batch, problem.seed)
            return mean.sum / mean.count + added
        initial = encode(model, batch, problem.seed)
        states, seen, mask = solve(params.processor, initial, batch)
        n_paths = noise and noise.n_paths
        predictions = decode_paths(model, states, batch, problem.seed, n_paths)
        offered = offered_to_loss(model, batch, seen, mask, problem.seed)
        mean = call(problem.loss, predictions, seen(jnp.asarray(batch.targets)), offered=offered)
        return mean.sum / mean.count + terms_of_loss(problem.terms, model, batch, problem.seed)

    return loss


def _all_at_once(field, diffeqsolve, experiment: Experiment, t0, edges, grid):
    """The states of a batch at common times by one solve, (times, samples, *state)."""
    columns = _columns_read(experiment)
    times = np.asarray(experiment.train.times)[columns] - t0  # the very first is the input
    where, on_steps = None, False
    if grid is not None:
        where = np.searchsorted(grid, times - 1e-9 * edges[-1])
        on_steps = bool(np.allclose(grid[where], times, rtol=0, atol=1e-9 * grid[-1]))
    ends_only = len(times) == 1 and np.isclose(times[0], edges[-1])
    if ends_only:
        saveat = diffrax.SaveAt(t1=True)
    elif on_steps:
        saveat = diffrax.SaveAt(t0=True, steps=True)
    else:
        saveat = diffrax.SaveAt(ts=jnp.asarray(times))

    def seen(array):
        return jnp.moveaxis(jnp.asarray(array)[:, columns], 1, 0)

    def solve(params, initial, batch):
        term = diffrax.ODETerm(lambda t, u, params: field(t0 + t, u, params))
        states = diffeqsolve(term, initial, params, saveat)
        if on_steps and not ends_only:
            states = states[where]
        return states, seen, None if batch.mask is None else seen(batch.mask)

    return solve


def _columns_read(experiment: Experiment) -> np.ndarray:
    """Which of the times that all samples have in common are read. Local."""
    whole = build_edges(experiment.config.time)
    return np.asarray(place_observations(experiment.train.times, whole, 1, 0).indices)


def _one_by_one(field, diffeqsolve, problem: LineProblem, t0, length, grid, columns):
    """The same by a solve for each sample, with its own times, inputs and features.

    Of times in common only `columns` are read; of a sample's own, a mask says which count.
    """

    noise = problem.noise

    def solve(params, initial, batch):
        common = batch.times is None  # a label, at the end
        first = jnp.full((len(initial), 1), t0 + length) if common else jnp.asarray(batch.times)
        real = jnp.ones(first.shape, bool) if batch.reads is None else _real(batch)
        # Rows are filled up at the end: with times that are read in vain.
        column = jnp.arange(real.shape[1])[None]
        last = jnp.max(jnp.where(real, column, -1), axis=1, keepdims=True)
        ts = jnp.where(column <= last, first - t0, length)
        if columns is not None and not common:
            ts = ts[:, columns]

        def one(start, ts, signal, static, key, path):
            own = SampleArgs(None, static)
            if signal is not None:
                known = path_of(problem.interpolation, signal.knots, signal.values)
                own = SampleArgs(Inputs(known, jnp.asarray(t0), signal.until), static)

            def of_sample(t, u, args):
                return field.of_sample(t0 + t, u, args)

            def diffusion(t, u, args):
                return field.diffusion_of_sample(t0 + t, u, args)

            args, saveat = FieldArgs(params, own, key), diffrax.SaveAt(ts=ts)
            if noise is None:
                return diffeqsolve(diffrax.ODETerm(of_sample), start, args, saveat)

            random = noise.field(of_sample, diffusion, start.shape)

            def along(path: Any):
                terms = terms_on_grid(random, numbers_as_keys(path), jnp.asarray(grid))
                return diffeqsolve(terms, start, NoisyArgs(args, path), saveat)

            return along(path) if path.ndim == 1 else jax.vmap(along, out_axes=1)(path)

        signal = None
        if batch.signal is not None:
            signal = jax.tree.map(lambda x: jnp.asarray(x)[0], batch.signal)
        static = None if batch.static is None else as_numbers(jnp.asarray(batch.static))
        wanted = takes_key(problem.static.processor)
        keys = sample_keys(problem.seed, batch) if wanted else None
        paths = None
        if noise is not None:
            paths = noise.keys(jnp.asarray(batch.rows), batch.step)
        states = jax.vmap(one, out_axes=1)(initial, ts, signal, static, keys, paths)

        def seen(array):
            array = jnp.asarray(array)
            return jnp.moveaxis(array if columns is None else array[:, columns], 1, 0)

        if columns is not None:
            return states, seen, None if batch.mask is None else seen(batch.mask)
        # The first edge is not read: there the state is what was encoded.
        counted = real & (ts > 0)
        shape = jnp.shape(batch.targets)
        there = jnp.broadcast_to(counted.reshape(*counted.shape, *[1] * (len(shape) - 2)), shape)
        return states, seen, seen(there if batch.mask is None else there & batch.mask)

    return solve


def _real(batch) -> Array:
    """Which entries of the padded times are observations: those that one of the reads takes."""
    real = jnp.zeros(jnp.shape(batch.times), bool)
    samples = jnp.arange(real.shape[0])[None]
    return real.at[samples, batch.reads.columns].max(jnp.asarray(batch.reads.valid))


def make_plain_stepper(experiment: Experiment) -> Anew:
    """Steps by plain diffrax and optax, as those of `training.error_control`. Local."""
    loss, optimizer = make_plain_loss(experiment), experiment.update.optimizer
    descent = experiment.update.descent

    nothing = Tally().as_array()  # of what time-parallel code counts

    def step(state: TrainState, batch: SampleBatch, weight: None) -> Stepped:
        del weight
        value, gradient = jax.value_and_grad(loss)(state.params, batch)
        if descent is not None:
            gradient = descent.project(gradient, jnp.asarray(batch.step))
        updated = apply_gradient(optimizer, state, gradient)
        return Stepped(updated, gradient, plain_report(value, optax.tree.norm(gradient)), nothing)

    return _Plain(jax.jit(step), experiment)


class _Plain(Anew):
    """Steps that solve the whole horizon at once. On one rank."""

    def __init__(self, step, experiment: Experiment):
        super().__init__(step, None)
        train = experiment.train
        self._whole = None  # the batch of a step is of use as it is
        if train.differ:
            self._whole = for_rank(train, experiment.config, 1, 0, whole=True)

    def take(self, state, batch, step):
        if self._whole is not None:
            batch = Batch(batch.rows, self._whole.take(batch.rows, step))
        return super().take(state, batch, step)
