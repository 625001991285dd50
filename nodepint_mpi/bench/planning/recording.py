"""What every rank of a line does in a step: the step itself, traced on ranks that are imagined.

Nothing is computed and nothing is sent. A slice is integrated by an integrator that makes no step,
since the operations of a step and their order do not depend on what a slice costs.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from mpi4py import MPI

from nodepint_mpi.build.model import Given, build_model
from nodepint_mpi.config.experiment import Config, parse_config
from nodepint_mpi.core.partition import check_layout, owned_range
from nodepint_mpi.core.propagators import AbstractIntegrator, AdjointKind, SliceResult
from nodepint_mpi.data.samples import Samples, count_outputs
from nodepint_mpi.io.directory import config_text
from nodepint_mpi.models.networks import EncodeProcessDecode
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.operations import Operation, recording
from nodepint_mpi.training.batch_model import split_model
from nodepint_mpi.training.check_model import check_model
from nodepint_mpi.training.info import open_alone
from nodepint_mpi.training.rank_samples import for_rank
from nodepint_mpi.training.setup import make_problem, share_batch
from nodepint_mpi.training.step import LineProblem, loss_and_gradient, tracked_gradient

Operations = tuple[Operation, ...]


class Layout(NamedTuple):
    """Ranks of a line, and lines that share the samples."""

    n_time: int
    n_data: int = 1

    @property
    def n_ranks(self) -> int:
        """All ranks."""
        return self.n_time * self.n_data


class Run(NamedTuple):
    """Ranks from `start` to before `stop` that do the same."""

    start: int
    stop: int
    operations: Operations


class RecordedLine(NamedTuple):
    """What all ranks of a line do in one step, in runs of ranks that are alike."""

    n_slices: int
    layout: Layout
    runs: tuple[Run, ...]


class NoSteps(AbstractIntegrator):
    """The flow that leaves a state where it is; `adjoint` is what another integrator said."""

    adjoint: AdjointKind = eqx.field(static=True, default="discrete")

    def for_tangents(self):
        return self

    def integrate(self, field, params, start, t0, t1, ts):
        return SliceResult(jnp.broadcast_to(start, (ts.size, *start.shape)), start)


def without_steps(solver: Any) -> Any:
    """The same solver, or any tree, with integrators that make no step. Local."""

    def replaced(part):
        if not isinstance(part, AbstractIntegrator):
            return part
        return NoSteps(getattr(part, "adjoint", "discrete"))

    return jax.tree.map(replaced, solver, is_leaf=lambda one: isinstance(one, AbstractIntegrator))


class _Imagined(MPI.Intracomm):
    """A communicator that knows its rank and size, for code that is traced and never run."""

    def __new__(cls, rank: int, size: int):
        del rank, size
        return super().__new__(cls)

    def __init__(self, rank: int, size: int):
        self._rank, self._size = rank, size

    def Get_rank(self) -> int:
        return self._rank

    def Get_size(self) -> int:
        return self._size


def imagined_line(layout: Layout, rank: int) -> TimeComm:
    """A rank of the first line of a layout, to trace with. Local."""
    line = _Imagined(rank, layout.n_time)
    grid = line if layout.n_data == 1 else _Imagined(rank, layout.n_ranks)
    return TimeComm(line, rank, layout.n_time, grid, line, 0, layout.n_data)


class StepRecorder:
    """Records the training step of a config for ranks that are not there. Local.

    Lines of a layout are remembered.

    Args:
        config: The experiment.
        samples: Its split for training.
        model: Its network.
    """

    def __init__(self, config: Config, samples: Samples, model: EncodeProcessDecode):
        self._config, self._samples, self._model = config, samples, model
        self._known: dict[Any, RecordedLine] = {}
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
        return cls(config, samples, build_model(config, **sizes, given=given, step=0))

    def changed(self, *settings: str) -> "StepRecorder":
        """That of the same network and data with other settings of the section `time`. Local."""
        if not settings:
            return self
        if settings not in self._others:
            config = parse_config(config_text(self._config), settings)
            self._others[settings] = StepRecorder(config, self._samples, self._model)
        return self._others[settings]

    def with_slices(self, n_slices: int) -> "StepRecorder":
        """That of the same horizon in so many slices, whatever their steps. Local."""
        section, key = self._config.time, (f"n_slices={n_slices}",)
        if n_slices == section.n_slices:
            return self
        if key not in self._others:
            edges = section.edges
            if edges is not None:
                edges = np.linspace(edges[0], edges[-1], n_slices + 1).tolist()
            time = section.model_copy(update={"n_slices": n_slices, "edges": edges})
            config = self._config.model_copy(update={"time": time})
            self._others[key] = StepRecorder(config, self._samples, self._model)
        return self._others[key]

    def line(self, layout: Layout, n_samples: int | None = None) -> RecordedLine:
        """What all ranks of a line do in a step, of a group's share of the samples or so many.

        Raises:
            LayoutError: for more ranks along time than slices.
        """
        if n_samples is None:
            n_samples = share_batch(self._config, self._samples.n_rows, layout.n_data)
        key = layout, n_samples
        if key not in self._known:
            n_slices = self._config.time.n_slices
            self._known[key] = record_line(
                n_slices, layout, lambda rank: self._operations(layout, rank, n_samples)
            )
        return self._known[key]

    def _operations(self, layout: Layout, rank: int, n_samples: int) -> Operations:
        """Those of one rank."""
        config, model = self._config, self._model
        samples = for_rank(self._samples, config, layout.n_time, rank, relaxed=True)
        line = imagined_line(layout, rank)
        problem = make_problem(config, line, model, samples, relaxed=True)
        problem = problem._replace(solver=without_steps(problem.solver))
        batch = samples.take(np.resize(samples.batch_rows(config.run.seed, 0), n_samples), 0)
        params, _ = split_model(model)
        weight = None if config.time.relaxation is None else jnp.ones(())
        if config.time.tracking is None or not problem.solver.method.iterates:
            return traced(
                lambda params, batch: loss_and_gradient(problem, params, batch, weight),
                params, batch,
            )  # fmt: skip
        state = jax.ShapeDtypeStruct(
            (n_samples, *check_model(model, self._samples)), np.dtype(config.run.precision)
        )
        return _traced_tracking(problem, state, params, batch, weight)


def _traced_tracking(
    problem: LineProblem, state: jax.ShapeDtypeStruct, params: Any, batch: Any, weight: Any
) -> Operations:
    """A tracked step that starts from what another has left."""

    def step(params, carry, batch):
        return tracked_gradient(problem, params, carry, batch, weight)

    blank = problem.solver.method.carry_like(problem.observations.owned.n_owned, state)
    carry = blank._replace(replicated={})  # a basis is not known at first
    left = jax.eval_shape(step, params, carry, batch)[2]
    return traced(step, params, left, batch)


def traced(function: Callable, *args: Any) -> Operations:
    """What a function does that would be jitted, on arrays or their shapes. Local."""
    with recording() as operations:
        jax.eval_shape(lambda *args: function(*args), *args)  # new each time: JAX remembers others
    return tuple(operations)


def record_line(
    n_slices: int, layout: Layout, operations: Callable[[int], Operations]
) -> RecordedLine:
    """The operations of all ranks of a line from those of as few as are needed. Local.

    Where the first and the last of ranks with equally many slices do the same, those between them
    do. What depends on a rank's place changes at powers of two from either end.

    Args:
        n_slices: How many slices the line deals out.
        layout: The line, and how many there are.
        operations: What one rank does.

    Raises:
        LayoutError: for more ranks along time than slices.
    """
    n_time = layout.n_time
    check_layout(n_slices, n_time)
    powers = [2**k for k in range(n_time.bit_length())]
    cuts = {*powers, *(n_time - power for power in powers), n_slices % n_time}
    known: dict[int, Operations] = {}

    def of(rank: int) -> Operations:
        if rank not in known:
            known[rank] = operations(rank)
        return known[rank]

    def runs(first: int, last: int) -> Iterator[Run]:
        widths = {len(owned_range(n_slices, n_time, rank)) for rank in (first, last)}
        if len(widths) == 1 and of(first) == of(last):
            yield Run(first, last + 1, of(first))
            return
        middle = (first + last + 1) // 2
        inside = [cut for cut in cuts if first < cut <= last]
        if len(widths) > 1:
            inside = [n_slices % n_time]
        cut = min(inside, key=lambda cut: abs(cut - middle), default=middle)
        yield from runs(first, cut - 1)
        yield from runs(cut, last)

    found = [Run(0, 1, of(0))]  # the ends of a line are mostly unlike all others
    if n_time > 2:
        found += runs(1, n_time - 2)
    if n_time > 1:
        found.append(Run(n_time - 1, n_time, of(n_time - 1)))
    return RecordedLine(n_slices, layout, tuple(_merged(found)))


def _merged(runs: Iterable[Run]) -> Iterator[Run]:
    """Neighbors that do the same as one run."""
    before: Run | None = None
    for run in runs:
        if before is not None and before.operations == run.operations:
            before = before._replace(stop=run.stop)
            continue
        if before is not None:
            yield before
        before = run
    if before is not None:
        yield before
