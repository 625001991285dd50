"""The training step of a config, recorded for ranks that are imagined.

A slice is integrated by an integrator that makes no step, since the operations of a step and their
order do not depend on what a slice costs. Local.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.bench.planning.lines import (
    Layout,
    Operations,
    RecordedLine,
    imagined_line,
    record_line,
    traced,
)
from nodepint_mpi.bench.planning.stages import Sweeps
from nodepint_mpi.build.model import Given, build_model
from nodepint_mpi.build.noise import build_noise
from nodepint_mpi.config.experiment import Config, parse_config
from nodepint_mpi.core.evaluations import evaluations
from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.propagators import AbstractIntegrator, AdjointKind, SliceResult
from nodepint_mpi.data.samples import Samples, count_outputs
from nodepint_mpi.io.directory import config_text
from nodepint_mpi.models.networks import EncodeProcessDecode
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import BASIS
from nodepint_mpi.parallel.solve import solve_interface
from nodepint_mpi.training.batch_model import split_model
from nodepint_mpi.training.check_model import check_model
from nodepint_mpi.training.encoder import deals_encoder
from nodepint_mpi.training.info import open_alone
from nodepint_mpi.training.line_problem import LineProblem
from nodepint_mpi.training.part import Part
from nodepint_mpi.training.rank_samples import for_rank, share_batch
from nodepint_mpi.training.setup import make_problem
from nodepint_mpi.training.step import choose_part, tracked_part
from nodepint_mpi.training.train_state import TrainState
from nodepint_mpi.training.update import make_update


class NoSteps(AbstractIntegrator):
    """The flow that leaves a state where it is; `adjoint` is what another integrator said."""

    adjoint: AdjointKind = eqx.field(static=True, default="discrete")

    def for_tangents(self):
        return self

    def integrate(self, field, params, start, t0, t1, ts, increments=None):
        return SliceResult(jnp.broadcast_to(start, (ts.size, *start.shape)), start)


def without_steps(solver: Any) -> Any:
    """The same solver, or any tree, with integrators that make no step. Local."""

    def replaced(part):
        if not isinstance(part, AbstractIntegrator):
            return part
        return NoSteps(getattr(part, "adjoint", "discrete"))

    return jax.tree.map(replaced, solver, is_leaf=lambda one: isinstance(one, AbstractIntegrator))


def record_solve(
    solver: TimeSolver, edges: np.ndarray, layout: Layout, state: Any = None
) -> RecordedLine:
    """What all ranks of a line do in a forward solve alone. Local.

    The `state` is an array or the shape of one, a single number unless given.

    Raises:
        LayoutError: for more ranks along time than slices.
    """
    solver = without_steps(solver)

    def operations(rank: int) -> Operations:
        line = Line(imagined_line(layout, rank), own_slices(edges, layout.n_time, rank), ())
        initial = jnp.zeros(1) if state is None else state
        return traced(lambda initial: solve_interface(line, solver, initial), initial)

    return record_line(len(edges) - 1, layout, operations)


class StepRecorder:
    """Records the training step of a config for ranks that are not there. Local.

    Lines of a layout are remembered.

    Args:
        config: The experiment.
        samples: Its split for training.
        model: Its network.
        shape: Of the state of a sample.
    """

    def __init__(
        self,
        config: Config,
        samples: Samples,
        model: EncodeProcessDecode,
        shape: tuple[int, ...],
    ):
        self.config = config
        self._samples, self._model, self._shape = samples, model, shape
        self._known: dict[tuple[Layout, int], RecordedLine] = {}
        self._others: dict[tuple[str, ...], StepRecorder] = {}

    @classmethod
    def of(cls, config: Config) -> "StepRecorder":
        """Open the data of a config and make its network. Local.

        Raises:
            NodepintError: for anything that would stop the run.
        """
        samples = open_alone(config).train
        sizes = {"input_shape": samples.input_shape, "output_size": count_outputs(samples)}
        given = Given(samples.n_inputs, samples.n_static)
        model = build_model(config, **sizes, given=given, step=0)
        return cls(config, samples, model, check_model(model, samples, build_noise(config)))

    def changed(self, *settings: str) -> "StepRecorder":
        """That of the same network and data with other settings of the section `time`. Local."""
        if not settings:
            return self
        if settings not in self._others:
            config = parse_config(config_text(self.config), settings)
            self._others[settings] = StepRecorder(config, self._samples, self._model, self._shape)
        return self._others[settings]

    def with_slices(self, n_slices: int) -> "StepRecorder":
        """The recorder of the same horizon in `n_slices` slices, whatever their steps. Local."""
        edges = self.config.time.edges
        if n_slices == self.config.time.n_slices:
            return self
        settings = [f"time.n_slices={n_slices}"]
        if edges is not None:
            edges = np.linspace(edges[0], edges[-1], n_slices + 1).tolist()
            settings.append(f"time.edges={edges}")
        return self.changed(*settings)

    def line(self, layout: Layout, n_samples: int | None = None) -> RecordedLine:
        """What all ranks of a line do in a step.

        `n_samples` is the number of samples of the line: a group's share unless given.

        Raises:
            LayoutError: for more ranks along time than slices.
        """
        if n_samples is None:
            n_samples = self.n_samples(layout)
        key = layout, n_samples
        if key not in self._known:
            n_slices = self.config.time.n_slices
            self._known[key] = record_line(
                n_slices, layout, lambda rank: self._operations(layout, rank, n_samples)
            )
        return self._known[key]

    def n_samples(self, layout: Layout) -> int:
        """A group's share of the samples of a step. Local."""
        return share_batch(self.config, self._samples.n_rows, layout.n_data)

    def sweeps(self, counted: Sequence[int | float]) -> Sweeps:
        """How a step with these counts of forward and adjoint sweeps sweeps. Local."""
        forward, back = (max(0, round(number)) for number in counted)
        if self._is_tracked:
            return Sweeps(n_updates=max(1, forward))
        stopping = self._solver.stopping
        limit = stopping.sweep_limit(self.config.time.n_slices)
        return Sweeps(forward, back, not stopping.freezes_by_update and forward < limit)

    def coarse_in_fine(self) -> float | None:
        """Field evaluations of a coarse step in those of a fine one. Local.

        None without a coarse propagator, and where evaluations are not known beforehand.
        """
        coarse = getattr(self._solver.method, "coarse", None)
        if coarse is None:
            return None
        few, many = evaluations(coarse.integrator), evaluations(self._solver.fine.integrator)
        return None if few is None or many is None else few / many

    @property
    def n_directions(self) -> int:
        """Tangents of a slice that ranks can share; 0 if the method has none to share. Local.

        Random directions of the parameters where there are such, and no tangents.
        """
        method, random = self._solver.method, self.config.optim.random_basis
        if not method.shares_tangents:
            return 0 if random is None else random.dims
        state = jax.ShapeDtypeStruct((1, *self._shape), np.dtype(self.config.run.precision))
        return len(method.carry_like(1, state).replicated[BASIS])

    @cached_property
    def _solver(self) -> TimeSolver:
        return self._problem(Layout(1), 0)[0].solver

    @property
    def _is_tracked(self) -> bool:
        return self.config.time.tracking is not None and self._solver.method.iterates

    def _problem(self, layout: Layout, rank: int) -> tuple[LineProblem, Samples]:
        """What one rank computes with, and the samples that it reads."""
        samples = for_rank(self._samples, self.config, layout.n_time, rank, relaxed=True)
        line = imagined_line(layout, rank)
        dealt = deals_encoder(self.config, line, self._model, samples)
        problem = make_problem(
            self.config, line, self._model, samples, relaxed=True, dealt_encoder=dealt
        )
        return problem, samples

    def _operations(self, layout: Layout, rank: int, n_samples: int) -> Operations:
        """Those of one rank."""
        config, (problem, samples) = self.config, self._problem(layout, rank)
        problem = problem._replace(solver=without_steps(problem.solver))
        batch = samples.take(np.resize(samples.batch_rows(config.run.seed, 0), n_samples), 0)
        params, _ = split_model(self._model)
        weight = None if config.time.relaxation is None else jnp.ones(())
        update = make_update(config, problem.comm, params)
        find_part = choose_part(problem, update)

        def take(params: Any, part: Part) -> Any:
            opt_state = update.held.cut(update.optimizer.init(params))
            return update.take(TrainState(params, opt_state), part.gradient, part.sums, part.step)

        if not self._is_tracked:

            def anew(params, batch):
                return take(params, find_part(params, batch, weight))

            return traced(anew, params, batch)
        state = jax.ShapeDtypeStruct((n_samples, *self._shape), np.dtype(config.run.precision))

        def tracked(params, carry, batch):
            part, carry = tracked_part(problem, params, carry, batch, weight)
            return take(params, part), carry

        return _traced_tracking(problem, state, tracked, params, batch)


def _traced_tracking(
    problem: LineProblem, state: jax.ShapeDtypeStruct, step: Callable, params: Any, batch: Any
) -> Operations:
    """A tracked step that starts from what another has left."""
    blank = problem.solver.method.carry_like(problem.observations.owned.n_owned, state)
    carry = blank._replace(replicated={})  # a basis is not known at first
    left = jax.eval_shape(step, params, carry, batch)[1]
    return traced(step, params, left, batch)
