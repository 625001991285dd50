"""From a config to everything a run computes with. Shared by training and evaluation."""

import socket
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from mpi4py import MPI

from nodepint_mpi.build.model import Given, build_edges, build_integrator, build_model
from nodepint_mpi.build.noise import build_noise
from nodepint_mpi.build.optimizers import averaged_of
from nodepint_mpi.build.sections import build_loss, build_terms, build_time_solver
from nodepint_mpi.build.user_code import load_code
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.config.run import N_STEPS
from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.core.by_name import asked_for
from nodepint_mpi.core.galerkin import AbstractReduction, Galerkin, ProjectedProcessor
from nodepint_mpi.core.objective import SimulationFree, mean_squared_error
from nodepint_mpi.core.partition import check_layout, own_slices
from nodepint_mpi.core.relaxation import RelaxedPropagator, edge_weights, with_propagators
from nodepint_mpi.core.resolution import check_field_resolution
from nodepint_mpi.core.sample_params import FieldArgs, SamplePropagator, SampleReduction
from nodepint_mpi.core.types import Field
from nodepint_mpi.data.samples import (
    Samples,
    Splits,
    check_first,
    count_outputs,
    open_splits,
)
from nodepint_mpi.errors import ConfigError, ProblemError
from nodepint_mpi.models.networks import EncodeProcessDecode, FlatLinear
from nodepint_mpi.parallel.comms import Comms, TimeComm
from nodepint_mpi.parallel.dealing import own_part
from nodepint_mpi.parallel.method_options import check_basis_ranks
from nodepint_mpi.parallel.methods.base import AbstractMethod
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.training.batch_model import (
    ENCODER_TAKES,
    BatchedField,
    decode_paths,
    sample_keys,
    split_model,
    takes_key,
)
from nodepint_mpi.training.check_model import (
    args_of,
    check_gradient,
    check_losses,
    check_model,
    check_simulation_free,
    check_terms,
    require_taken,
)
from nodepint_mpi.training.encoder import deals_encoder
from nodepint_mpi.training.line_problem import LineProblem
from nodepint_mpi.training.memory import (
    plan_parameters,
    plan_samples,
    plan_slices,
    require_memory,
    require_network_fits,
)
from nodepint_mpi.training.rank_samples import for_rank, place_samples, share_batch
from nodepint_mpi.training.sameness import require_same_code, require_same_shapes
from nodepint_mpi.training.simulation_free import check_sections
from nodepint_mpi.training.train_state import TrainState
from nodepint_mpi.training.update import Update, make_update
from nodepint_mpi.training.watch import require_watched


class Batch(NamedTuple):
    """The samples of an optimizer step: all their numbers, and what this rank has of its group's
    own part."""

    rows: np.ndarray
    data: SampleBatch


class Experiment(NamedTuple):
    """A config made ready on this rank."""

    config: Config
    model: EncodeProcessDecode
    train: Samples
    test: Samples
    train_problem: LineProblem
    test_problem: LineProblem
    update: Update
    state: jax.ShapeDtypeStruct
    """Shape of the states of this group's part of a batch, (samples, *state)."""
    comms: Comms
    valid: Samples | None = None
    valid_problem: LineProblem | None = None

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run. Local."""
        return count_steps(self.config, self.train)

    @property
    def method(self) -> AbstractMethod:
        """The sweep in use."""
        return self.train_problem.solver.method

    @property
    def predicts(self) -> bool:
        """Whether its predictions are of what was observed: a field that makes samples out of
        noise predicts no label."""
        free = isinstance(self.train_problem.loss, SimulationFree)
        return not free or self.train.section.times is not None

    def batch(self, step: int) -> Batch:
        """The samples of optimizer step `step`. Local."""
        rows = self.train.batch_rows(self.config.run.seed, step)
        return Batch(rows, self._own(self.train, rows, step))

    def whole_batch(self, step: int) -> SampleBatch:
        """The same samples for a solve over the whole horizon, as one slice. Local."""
        rows = self.train.batch_rows(self.config.run.seed, step)
        if not self.train.differ:
            return self._own(self.train, rows, step)
        return self._own(for_rank(self.train, self.config, 1, 0, whole=True), rows, step)

    def _own(self, samples: Samples, rows: np.ndarray, step: int) -> SampleBatch:
        """This group's part of the rows."""
        return samples.take(rows[own_part(self.comms.time, len(rows))], step)


def count_steps(config: Config, train: Samples) -> int:
    """Optimizer steps of a whole run. Local."""
    run = config.run
    if run.n_epochs is not None:
        return run.n_epochs * train.epoch_steps
    return N_STEPS if run.n_steps is None else run.n_steps


def set_up(config: Config, comms: Comms) -> Experiment:
    """Open the data and build model, solver and optimizer. Collective over `comms.control`.

    Data that a function of the user's own makes are made before (`data.own.share_own_data`).

    Raises:
        NodepintError: on all ranks, for anything in the config that does not fit, and if code, data
            or model differ between ranks.
    """
    if config.control is not None:
        raise ConfigError("The config has a section `[control]`: start it by `nodepint control`.")
    check_layout(config.time.n_slices, comms.time.size)
    require_same_code(comms.control, load_code(config))
    train, valid, test = open_splits(comms.control, config)
    n_here = count_here(comms.control)
    place = (comms.time.size, comms.time.rank)
    with together(comms.control):
        train = for_rank(train, config, *place, relaxed=True)
        test = for_rank(test, config, *place)
        valid = None if valid is None else for_rank(valid, config, *place)
        splits = Splits(train, valid, test)
        largest = 0 if config.growth is None else config.growth.steps[-1]
        sizes = {"input_shape": train.input_shape, "output_size": count_outputs(train)}
        require_network_fits(config, **sizes, step=largest, n_here=n_here)
        if config.growth is not None:  # says early if it cannot become so large
            _build(config, train, largest)
        experiment = _assemble(config, comms, splits, step=0)
        require_memory(needed_memory(experiment), n_here)
    require_same_shapes(comms.control, experiment.update.shapes(), experiment.state)
    return experiment


def count_here(control: MPI.Intracomm) -> int:
    """How many of the ranks are on this machine. Collective over `control`."""
    hosts = control.allgather(socket.gethostname())
    return hosts.count(hosts[control.rank])


def needed_memory(experiment: Experiment) -> dict[str, int]:
    """The least bytes that this rank takes, by what they are for. Local."""
    config, time = experiment.config, experiment.comms.time
    params, _ = split_model(experiment.model)
    slices = plan_slices(config.time, experiment.state, slice_rows(config, time)[1])
    samples = plan_samples(experiment.train, experiment.state.shape[0])
    return plan_parameters(params, experiment.update) | slices | samples


def at_step(experiment: Experiment, step: int) -> Experiment:
    """The experiment with the network, freshly made, that optimizer step `step` is taken with.

    Local. The same experiment unless its network grows.
    """
    config = experiment.config
    if config.growth is None:
        return experiment
    splits = Splits(experiment.train, experiment.valid, experiment.test)
    return _assemble(config, experiment.comms, splits, step=step)


def _assemble(config: Config, comms: Comms, splits: Splits, *, step: int) -> Experiment:
    """Everything that depends on the network. Local."""
    train, valid, test = splits
    model = _build(config, train, step)
    dealt = deals_encoder(config, comms.time, model, train)
    problem_of = partial(make_problem, config, comms.time, model, dealt_encoder=dealt)
    train_problem = problem_of(train, relaxed=True)
    test_problem = problem_of(test, relaxed=False)
    valid_problem = None
    if valid is not None:
        valid_problem = problem_of(valid, relaxed=False)
    n_samples = share_batch(config, train.n_rows, comms.time.n_groups)
    shape = (n_samples, *check_model(model, train, train_problem.noise))
    check_times(config, model, shape, args_of(train, 0))
    check_encoded(config, model, train)
    check_encoded(config, model, test)
    if valid is not None:
        check_encoded(config, model, valid)
    require_watched(config, train_problem.metrics)
    check_scores(config, model, train, shape)
    state = jax.ShapeDtypeStruct(shape, config.run.precision)
    train_problem.solver.method.carry_like(1, state)  # says if a basis does not fit the state
    shared = config.optim.random_basis is not None
    check_basis_ranks(comms.time, train_problem.solver.method, state, have_others=shared)
    params, _ = split_model(model)
    update = make_update(config, comms.time, params)
    return Experiment(
        config, model, train, test, train_problem, test_problem, update, state, comms,
        valid, valid_problem,
    )  # fmt: skip


def check_scores(
    config: Config, model: EncodeProcessDecode, samples: Samples, state: tuple[int, ...]
) -> None:
    """Check loss and metrics on the shapes of a step, (samples, *state). Local.

    As if all observations were on this rank.
    """
    loss, metrics = build_loss(config)
    batch = _like_a_step(samples, state[0])
    check_terms(build_terms(config), model, batch, state[0])
    if isinstance(loss, SimulationFree):
        check_sections(config, samples, metrics)
        check_simulation_free(loss, model, batch, state[0])
        return
    n_times = max(1, batch.targets.shape[1])
    states = jax.ShapeDtypeStruct((n_times, *state), jnp.zeros(()).dtype)
    noise = build_noise(config)
    n_paths = None if noise is None else noise.n_paths
    prediction = eqx.filter_eval_shape(
        lambda u, b: decode_paths(model, u, b, 0, n_paths), states, batch
    )

    def by_time(array):
        """From (samples, times, ...) to (times, samples, ...)."""
        return jax.ShapeDtypeStruct((n_times, *array.shape[:1], *array.shape[2:]), array.dtype)

    offered = {
        "mask": None if batch.mask is None else by_time(batch.mask),
        "weights": None if batch.weights is None else by_time(batch.weights),
        "times": None if batch.times is None else by_time(batch.times),
        "model": model, "batch": batch, "key": jax.eval_shape(lambda b: sample_keys(0, b), batch),
    }  # fmt: skip
    if batch.mask is None and samples.series is not None:
        offered["mask"] = jax.ShapeDtypeStruct(by_time(batch.targets).shape, bool)
    names = {"The loss": loss} | {f"The metric {name!r}": own for name, own in metrics.items()}
    if samples.has_gaps:
        require_taken(names, "mask", "observations are missing, or differ in number")
    if samples.section.weights is not None:
        require_taken(names, "weights", "`data.weights` are given")
    check_losses(names, prediction, by_time(batch.targets), offered)
    check_gradient(loss, prediction, by_time(batch.targets), offered)


def check_encoded(config: Config, model: EncodeProcessDecode, samples: Samples) -> None:
    """Refuse to encode observations that were not made, or not alone. Local."""
    asks = asked_for(model.encoder, 1, ENCODER_TAKES)
    if not {"times", "mask"} & set(asks):
        check_first(samples, config.time.horizon[0])
    if config.time.relaxation is not None and asks:
        raise ProblemError(
            f"`[time.relaxation]` encodes single observations at slice edges, but the encoder also "
            f"takes {', '.join(map(repr, asks))}."
        )


def _like_a_step(samples: Samples, n_samples: int) -> SampleBatch:
    """Shapes of what a step has of its samples, but for what depends on the rank."""
    one = samples.take(np.array([0]), 0)._replace(
        reads=None, signal=None, at_edges=None, known=None
    )

    def many(array):
        array = jnp.asarray(array)
        return jax.ShapeDtypeStruct((n_samples, *array.shape[1:]), array.dtype)

    step = jax.ShapeDtypeStruct((), jnp.zeros((), int).dtype)
    return jax.tree.map(many, one._replace(step=None))._replace(step=step)


def _build(config: Config, train: Samples, step: int) -> EncodeProcessDecode:
    shape, size = train.input_shape, count_outputs(train)
    given = Given(train.n_inputs, train.n_static)
    model = build_model(config, input_shape=shape, output_size=size, given=given, step=step)
    if config.growth is not None and isinstance(model.encoder, FlatLinear):
        raise ProblemError(
            "`[growth]` adds directions of trajectories; a network 'mlp' of labeled samples does "
            "not grow: leave it out, or use 'conv'."
        )
    return model


def make_problem(
    config: Config,
    comm: TimeComm,
    model: EncodeProcessDecode,
    samples: Samples,
    *,
    relaxed: bool,
    scored: bool = True,
    dealt_encoder: bool = False,
) -> LineProblem:
    """What a line of ranks computes with for one split. Local.

    Continuity is as `relaxed` as the config says, or not at all: a split is scored as whole
    trajectories. With `scored=False` only predictions are wanted: the loss of the config, which is
    not called then, is not looked up. With a `dealt_encoder` the line encodes together.
    """
    _, static = split_model(model)
    field = BatchedField(static.processor)
    loss, metrics = build_loss(config) if scored else (mean_squared_error, {})
    terms = build_terms(config) if scored else ()
    relaxed = relaxed and config.time.relaxation is not None
    observations = place_samples(samples, comm.size, comm.rank)
    reduction = reduction_of(static.processor, field)
    noise = build_noise(config)
    one_by_one = samples.differ or takes_key(static.processor) or noise is not None
    if one_by_one:
        reduction = SampleReduction(reduction)
    solver = build_time_solver(config, field, reduction, n_batch_axes=1)
    if relaxed or one_by_one:
        kind = RelaxedPropagator if relaxed else SamplePropagator
        solver = with_propagators(solver, partial(kind, noise=noise))
    weights = None
    if relaxed and not samples.has_gaps:
        weights = edge_weights(samples.times, build_edges(config.time))
    return LineProblem(
        comm, static, solver, observations, loss, metrics, weights,
        samples.section.interpolation, terms, config.run.seed, noise, dealt_encoder,
    )  # fmt: skip


def check_times(
    config: Config, model: EncodeProcessDecode, shape: tuple[int, ...], args: Any = None
) -> None:
    """Refuse a network of t where the precision of the run does not resolve t. Local."""
    params, static = split_model(model)
    section = config.time
    named = {name: getattr(section, name) for name in ("fine", "coarse", "tangents")}
    steps = [build_integrator(part, f"time.{name}") for name, part in named.items() if part]
    state = jax.ShapeDtypeStruct(shape, jnp.zeros(()).dtype)
    field, of_field = BatchedField(static.processor), params.processor
    if args is None:
        check_field_resolution(field, of_field, state, build_edges(section), steps)
    else:
        one = jax.ShapeDtypeStruct(shape[1:], state.dtype)
        of_field = FieldArgs(of_field, args)
        check_field_resolution(field.of_sample, of_field, one, build_edges(section), steps)


def reduction_of(static: PyTree, field: Field) -> AbstractReduction:
    """How a processor becomes a field of coordinates: in its own way if it has one. Local."""
    return ProjectedProcessor(static) if hasattr(static, "on_basis") else Galerkin(field)


def fresh_state(experiment: Experiment) -> TrainState:
    """Parameters and optimizer state before the first step. Local."""
    params, _ = split_model(experiment.model)
    return TrainState(params, experiment.update.init(params))


def evaluated_params(experiment: Experiment, state: TrainState) -> PyTree:
    """The parameters that are evaluated: the average of `optim.average`, or the newest.

    Collective over the grid.
    """
    if experiment.config.optim.average is None:
        return state.params
    pieces = averaged_of(experiment.config.optim, state.params, state.opt_state)
    return experiment.update.whole_params(pieces)


def slice_rows(config: Config, comm: TimeComm) -> tuple[int, int]:
    """Global index of this rank's first slice, and how many it owns. Local."""
    owned = own_slices(build_edges(config.time), comm.size, comm.rank)
    return owned.first, owned.n_owned
