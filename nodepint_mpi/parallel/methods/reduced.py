"""The reduced method: the flow g_n of the Galerkin field on a shared basis, solved on rank 0.

    U[n+1] <- F(U_old[n]) + V g_n(V^T U[n]) - V g_n(V^T U_old[n])

The first rank walks through c[n+1] = V^T F(U_old[n]) + g_n(c[n]) - g_n(V^T U_old[n]) in r
coordinates; every rank forms its states from its own fine ends. The adjoint's recurrence is linear,
and solved as `parallel.recurrence` tells.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from nodepint_mpi.core.basis import in_complement, lift, project
from nodepint_mpi.core.galerkin import AbstractReduction, Galerkin
from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.scopes import COARSE, TANGENTS
from nodepint_mpi.core.sweeps import (
    coarse_block,
    end_times,
    every_sample,
    finite_coarse_end,
    samples_finite,
)
from nodepint_mpi.core.transposed import BlockCotangents
from nodepint_mpi.core.types import Block
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.counters import Tally, unsolved, work
from nodepint_mpi.parallel.exchange import gather_to_first, scatter_from_first
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import (
    BASIS,
    BASIS_SWEEPS,
    ENDS,
    LEFTS,
    AbstractMethod,
    Carry,
    Coswept,
    Swept,
    by_slice,
    first_cotangents,
    first_states,
    leave_swept,
    needs_basis,
    needs_coarse,
    no_counts,
    with_ends,
    with_lefts,
)
from nodepint_mpi.parallel.methods.parareal import Parareal
from nodepint_mpi.parallel.recurrence import solve_adjoint_coordinates
from nodepint_mpi.parallel.shared_basis import SharedBasis

COMPLETED = "coarse", "reduced"
"""What a slice is counted as that both flows pass."""


class ReducedMemory(NamedTuple):
    """The basis, replicated, and sweeps done with it."""

    basis: Inexact[Array, "rank *sample"]
    n_sweeps: Int[Array, ""]


class ReducedLinear(NamedTuple):
    """The basis with the derivatives of the reduced flow on the owned slices."""

    basis: Inexact[Array, "rank *sample"]
    transfers: Inexact[Array, "owned *batch rank rank"]


class _Completed(Propagator):
    """V g(V^T u) + (I - V V^T) G(u): the reduced flow, completed by the coarse propagator."""

    coarse: Propagator
    basis: Inexact[Array, "rank *sample"]
    reduced_params: Any
    reduced: Propagator

    @property
    def n_sample_axes(self) -> int:
        """Those of the coarse propagator."""
        return self.coarse.n_sample_axes

    def __call__(self, params, start, t0, length, ts, index=None):
        coarse = self.coarse(params, start, t0, length, ts, index)
        within = self.reduced(
            self.reduced_params, project(self.basis, start), t0, length, ts, index
        )
        return jax.tree.map(
            lambda whole, part: in_complement(self.basis, whole) + lift(self.basis, part),
            coarse,
            within,
        )


class Reduced(AbstractMethod):
    """C_n = V g_n(V^T .), g_n the flow of the Galerkin field V^T f(t, V c).

    Args:
        basis: The basis, and how it turns.
        coarse: A classical propagator for iteration 0, for the complement, and to fall back to. The
            reduced flow takes its steps.
        reduction: How field and basis become the reduced field; Galerkin's way unless given.
        use_complement: Whether `coarse` acts on what lies outside the basis. The walk is then one
            of whole states, as in parareal, with C = V g(V^T .) + (I - V V^T) G.
    """

    basis: SharedBasis
    coarse: Propagator
    reduction: AbstractReduction | None = None
    use_complement: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        if self.basis.kind == "jumps":
            raise ProblemError(
                "A reduced field needs a basis that holds states; one of jumps is empty at first: "
                "take 'pod', 'random' or 'identity'."
            )

    @classmethod
    def of(cls, parts):
        if parts.basis is None:
            raise needs_basis("reduced")
        if parts.coarse is None:
            raise needs_coarse("reduced")
        return cls(parts.basis, parts.coarse, parts.reduction, parts.complement)

    def init(self, line, initial, carry):
        states, counts = first_states(line, self.coarse, initial, carry)
        if BASIS in carry.replicated:
            memory = ReducedMemory(carry.replicated[BASIS], carry.replicated[BASIS_SWEEPS])
        else:
            memory = ReducedMemory(self.basis.first(line, states.starts), jnp.array(0))
        return Swept(states, memory, counts)

    def sweep(self, line, initial, swept, fine_ends, front, slow=False):
        del slow
        if not self.use_complement:
            ends, memory, guarded = self._corrected(line, swept, fine_ends, front)
            counts = no_counts()._replace(guarded=guarded)
            return Swept(with_ends(line, initial, ends), memory, counts)
        old = swept.states
        memory, fine_ends, _ = self._turned(line, swept, fine_ends, front)
        both, n_owned = self._completed(line, memory.basis), line.owned.n_owned
        with work(COARSE, Tally(coarse=n_owned, reduced=n_owned)):
            coarse_ends = coarse_block(both, line.params, old.starts, line.owned)
        begun = swept._replace(memory=coarse_ends)
        corrected = Parareal(both, COMPLETED).sweep(line, initial, begun, fine_ends, front)
        return corrected._replace(memory=memory)

    def adjoint_init(self, line, starts, memory, sources, carry):
        basis = self.basis.first(line, starts) if memory is None else memory.basis
        linear = (
            self._completed(line, basis)
            if self.use_complement
            else self._linearized(line, starts, basis)
        )
        return Coswept(first_cotangents(line, self.coarse, starts, sources, carry), linear)

    def adjoint_sweep(self, line, starts, coswept, outs):
        old, linear = coswept
        if self.use_complement:
            return Parareal(linear, COMPLETED).adjoint_sweep(line, starts, coswept, outs)
        pulled = with_lefts(line, outs)
        misfits = project(linear.basis, pulled.rights - old.rights)
        along = jnp.einsum("...ij,...j->...i", linear.transfers, misfits)
        solved = solve_adjoint_coordinates(
            line.comm, linear.transfers, along, line.owned, self.basis.recurrence
        )
        cotangents = BlockCotangents(
            pulled.lefts + lift(linear.basis, solved.at_lefts),
            pulled.rights + lift(linear.basis, solved.at_rights),
        )
        return Coswept(cotangents, linear)

    def carry(self, line, initial, swept, fine_ends, coswept, outs, known):
        del known
        if self.use_complement:
            left, memory = leave_swept(self, line, initial, swept, fine_ends, coswept, outs)
            rows = left.rows
        else:  # what neighbors would exchange after the sweep waits for the next step
            ends, memory, _ = self._corrected(line, swept, fine_ends, jnp.array(-1))
            back = self.adjoint_sweep(line, swept.states.starts, coswept, outs)
            rows = {ENDS: ends, LEFTS: back.cotangents.lefts}
        return Carry(rows, {BASIS: memory.basis, BASIS_SWEEPS: memory.n_sweeps})

    def carry_like(self, n_owned, state):
        return Carry({}, {BASIS: self.basis.blank(state), BASIS_SWEEPS: jnp.array(0)})

    def fallback(self):
        return Parareal(self.coarse)

    def _turned(
        self, line: Line, swept: Swept, fine_ends: Block, front
    ) -> tuple[ReducedMemory, Block, Array]:
        """The basis with new directions, fine ends kept finite, and where they were."""
        old, (basis, k), _ = swept
        finite = samples_finite(fine_ends, 1 + self.coarse.n_sample_axes)
        fine_ends = jnp.where(finite, fine_ends, old.ends)
        if self.basis.n_new:
            index = jnp.asarray(line.owned.indices)
            key = jax.random.fold_in(jax.random.key(self.basis.seed), k)
            jumps = jnp.where(by_slice(index >= front, old.ends), fine_ends - old.ends, 0.0)
            basis, _ = self.basis.turn(self.basis.new_directions(line, key, jumps, old.ends), basis)
        return ReducedMemory(basis, k + 1), fine_ends, finite

    def _corrected(
        self, line: Line, swept: Swept, fine_ends: Block, front
    ) -> tuple[Block, ReducedMemory, Array]:
        """Ends after a sweep in coordinates alone, what it has learned, and slices guarded."""
        memory, fine_ends, finite = self._turned(line, swept, fine_ends, front)
        old, index = swept.states, jnp.asarray(line.owned.indices)
        targets = jnp.where(by_slice(index < front, old.ends), old.ends, fine_ends)
        changes, guarded = self._walk(line, memory.basis, old.starts, targets, front)
        ends = targets + lift(memory.basis, changes)
        sane = samples_finite(ends, 1 + self.coarse.n_sample_axes)
        ends = jnp.where(sane & by_slice(index > front, ends), ends, targets)
        guarded = guarded + jnp.sum((index > front) & ~every_sample(finite & sane))
        return ends, memory, guarded

    def _linearized(self, line: Line, starts: Block, basis: Array) -> ReducedLinear:
        """Derivatives of the reduced flow on the owned slices. Local."""
        reduced = self._propagator()
        params = self._reduction.reduce(line.params, basis)
        rank, axis = basis.shape[0], self.basis.n_batch_axes

        def one(c, *times):
            def push(direction):
                tangent = jnp.broadcast_to(direction, c.shape)
                return jax.jvp(lambda c: reduced(params, c, *times).end, (c,), (tangent,))[1]

            return jax.vmap(push, out_axes=axis)(jnp.eye(rank, dtype=c.dtype))

        with work(TANGENTS, Tally(reduced=line.owned.n_owned * (1 + rank))):
            matrices = jax.vmap(one)(project(basis, starts), *end_times(line.owned, starts))
        return ReducedLinear(basis, jnp.where(jnp.isfinite(matrices), matrices, 0.0))

    @property
    def _reduction(self) -> AbstractReduction:
        return Galerkin(self.coarse.field) if self.reduction is None else self.reduction

    def _propagator(self) -> Propagator:
        return self._reduction.propagator(self.coarse.integrator).for_tangents()

    def _completed(self, line: Line, basis: Array) -> "_Completed":
        return _Completed(
            self.coarse.field, self.coarse.integrator, self.coarse, basis,
            self._reduction.reduce(line.params, basis),
            self._reduction.propagator(self.coarse.integrator),
        )  # fmt: skip

    def _walk(self, line: Line, basis: Array, starts: Block, targets: Block, front):
        """g_n(c[n]) - g_n(V^T U_old[n]) on the owned slices, from a walk on the first rank."""
        owned, reduced = line.owned, self._propagator()
        params = self._reduction.reduce(line.params, basis)
        old = project(basis, starts)
        with work(COARSE, Tally(reduced=owned.n_owned)):
            old_ends = coarse_block(reduced, params, old, owned)
        given = project(basis, targets) - old_ends
        pairs = gather_to_first(line.comm, jnp.stack([old, given], axis=1), owned.n_slices)
        every, guarded = None, jnp.array(0)
        if pairs is not None:
            all_old, all_given = pairs[:, 0], pairs[:, 1]

            def advance(c, row):
                number, times, start, vector = row
                c = jnp.where(number <= front, start, c)
                end, broken = jax.lax.cond(
                    number >= front,
                    lambda: finite_coarse_end(reduced, params, c, times),
                    lambda: (c, jnp.array(False)),  # nothing is to be corrected there
                )
                return vector + end, (end, broken)

            whole = own_slices(owned.all_edges, 1, 0)
            times = end_times(whole, old)
            rows = (jnp.arange(owned.n_slices), times, all_old, all_given)
            with work(COARSE, Tally(reduced=unsolved(front, whole, at_once=1))):
                _, (every, broken) = jax.lax.scan(advance, all_old[0], rows)
            guarded = jnp.sum(broken)
        ends = scatter_from_first(line.comm, every, old_ends, owned.n_slices)
        return ends - old_ends, guarded
