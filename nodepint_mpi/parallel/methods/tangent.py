"""The tangent method: exact or approximate derivatives of F on a shared basis.

    U[n+1] <- F(U_old[n]) + (dF_n V) V^T (U[n] - U_old[n])

With V the identity it is Newton's method (multiple shooting), with an empty V Picard's. The ranks
solve c[n+1] = A_n c[n] + V^T b[n] with A_n = V^T dF_n V, as `parallel.recurrence` tells; every rank
forms its corrections from the tangents of its own slices. Where B ranks have the same slices, each
pushes its part of the r directions through them, and they gather all tangents: a sweep then takes
1 + r / B fine solves one after the other in the place of 1 + r.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from nodepint_mpi.core.basis import project, transfers
from nodepint_mpi.core.complement import Split, walk_cocorrections, walk_corrections
from nodepint_mpi.core.partition import owned_range
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.scopes import COARSE, TANGENTS, scope
from nodepint_mpi.core.sensitivity import propagate_directions, tangent_passes
from nodepint_mpi.core.sweeps import BlockStates, every_sample, samples_finite
from nodepint_mpi.core.transposed import BlockCotangents
from nodepint_mpi.core.types import Block
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.corrections import (
    Found,
    correct_adjoint,
    corrections_from,
    pose_adjoint,
)
from nodepint_mpi.parallel.counters import Tally, cond, unsolved, usually, work
from nodepint_mpi.parallel.exchange import (
    gather_directions,
    max_over_ranks,
    recv_left,
    recv_right,
    send_left,
    send_right,
)
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import (
    BASIS,
    BASIS_SWEEPS,
    ENDS,
    LEFTS,
    AbstractMethod,
    Carry,
    Coswept,
    Counts,
    Swept,
    by_slice,
    first_cotangents,
    first_states,
    leave_swept,
    needs_basis,
    with_ends,
)
from nodepint_mpi.parallel.methods.parareal import Parareal
from nodepint_mpi.parallel.recurrence import (
    solve_adjoint_coordinates,
    solve_both,
    solve_coordinates,
)
from nodepint_mpi.parallel.shared_basis import SharedBasis, count_in_use

TANGENT_ROWS = "tangents"


class TangentMemory(NamedTuple):
    """The basis, replicated; its tangents on the owned slices; sweeps done with them."""

    basis: Inexact[Array, "rank *sample"]
    tangents: Inexact[Array, "owned rank *state"]
    n_sweeps: Int[Array, ""]


class _Posed(NamedTuple):
    """What a sweep has to put right: fine ends, which are finite, jumps that count, the radius."""

    fine_ends: Block
    finite: Array
    jumps: Block
    radius: Array | None


class Tangent(AbstractMethod):
    """C_n = (dF_n V) V^T on a shared basis V.

    Args:
        basis: The basis, and how it turns.
        propagator: Whose derivative is taken: the fine propagator or a cheaper one.
        coarse: A classical propagator for iteration 0, for the complement, and to fall back to.
        use_complement: Whether `coarse` acts on what lies outside the basis.
        recycle: Whether tangents of earlier sweeps are kept while these bring the jumps down fast
            enough; else all are taken anew in every sweep.
        precision: Type to compute tangents in, such as "float32".
        trust: Longest correction along the basis, relative to the longest state; no bound if None.
        falls_back: Whether parareal takes over where jumps do not go down. The largest of all
            samples may stay while all others are solved: then Newton's sweeps are the better ones,
            and no more than the number of slices are needed in any case.
    """

    basis: SharedBasis
    propagator: Propagator
    coarse: Propagator | None = None
    use_complement: bool = eqx.field(static=True, default=False)
    recycle: bool = eqx.field(static=True, default=True)
    precision: str | None = eqx.field(static=True, default=None)
    trust: float | None = eqx.field(static=True, default=0.5)
    falls_back: bool = eqx.field(static=True, default=True)

    shares_tangents: ClassVar[bool] = True

    def __check_init__(self):
        if self.use_complement and self.coarse is None:
            raise ProblemError("The complement of the basis needs a coarse propagator.")

    @classmethod
    def of(cls, parts):
        if parts.basis is None:
            raise needs_basis("tangent")
        return cls(
            basis=parts.basis,
            propagator=parts.tangents or parts.fine,
            coarse=parts.coarse,
            use_complement=parts.complement,
            recycle=parts.recycle,
            precision=parts.precision,
            trust=parts.trust,
        )

    def init(self, line, initial, carry):
        states, counts = first_states(line, self.coarse, initial, carry)
        if BASIS in carry.replicated:
            return Swept(states, self._recalled(line, states.starts, carry), counts)
        basis = self.basis.first(line, states.starts)
        tangents = self._none(line, states.starts, basis)
        if self.recycle and self.basis.kind != "jumps":
            tangents = self._tangents(line, states.starts, basis)
        return Swept(states, TangentMemory(basis, tangents, jnp.array(0)), counts)

    def sweep(self, line, initial, swept, fine_ends, front, slow=False):
        posed = self._posed(line, swept, fine_ends, front)
        predicted = None
        if self.basis.n_new:
            predicted = self._corrections(line, swept.states, posed, front, swept.memory)
        ends, memory, counts = self._corrected(line, swept, posed, front, predicted, slow)
        return Swept(with_ends(line, initial, ends), memory, counts)

    def adjoint_init(self, line, starts, memory, sources, carry):
        if memory is not None and self.recycle:
            linear = Split(memory.basis, memory.tangents)
        else:
            basis = self.basis.first(line, starts) if memory is None else memory.basis
            linear = Split(basis, self._tangents(line, starts, basis))
        return Coswept(first_cotangents(line, self.coarse, starts, sources, carry), linear)

    def adjoint_sweep(self, line, starts, coswept, outs):
        old, linear = coswept
        if self.use_complement:
            assert self.coarse is not None  # checked when made
            incoming = recv_right(line.comm, jnp.zeros_like(outs[-1]))
            with work(COARSE, Tally(coarse_pulled=line.owned.n_owned)):
                lefts, rights = walk_cocorrections(
                    self.coarse, line.params, starts, outs - old.lefts, linear, incoming, line.owned
                )
            send_left(line.comm, lefts[0])
            return Coswept(BlockCotangents(old.lefts + lefts, old.rights + rights), linear)
        pulled, matrices, misfits = pose_adjoint(line, coswept, outs)
        solved = solve_adjoint_coordinates(
            line.comm, matrices, misfits, line.owned, self.basis.recurrence
        )
        return Coswept(correct_adjoint(linear, pulled, solved), linear)

    def carry(self, line, initial, swept, fine_ends, coswept, outs, known):
        del known
        if self.recycle and not self.use_complement:
            ends, lefts, memory = self._swept_both_ways(line, swept, fine_ends, coswept, outs)
            rows = {ENDS: ends, LEFTS: lefts}
        else:
            left, memory = leave_swept(self, line, initial, swept, fine_ends, coswept, outs)
            rows = left.rows
        if self.recycle:
            rows = rows | {TANGENT_ROWS: jnp.moveaxis(memory.tangents, 1, self._last_batch_axis)}
        return Carry(rows, {BASIS: memory.basis, BASIS_SWEEPS: memory.n_sweeps})

    def carry_like(self, n_owned, state):
        return Carry({}, {BASIS: self.basis.blank(state), BASIS_SWEEPS: jnp.array(0)})

    def fallback(self):
        """Parareal; without a coarse propagator none, since Picard's sweeps gain no more."""
        return Parareal(self.coarse) if self.coarse is not None and self.falls_back else None

    def _swept_both_ways(
        self, line: Line, swept: Swept, fine_ends: Block, coswept: Coswept, outs: Block
    ) -> tuple[Block, Block, TangentMemory]:
        """A sweep each way through the tangents that both begin with: ends, lefts, and memory.

        Both coarse problems are solved together. What neighbors would exchange after the sweeps
        waits for the next step, which begins with it.
        """
        nothing_solved = jnp.array(-1)
        posed = self._posed(line, swept, fine_ends, nothing_solved)
        pulled, matrices, misfits = pose_adjoint(line, coswept, outs)
        with scope(TANGENTS):
            vectors = project(coswept.linear.basis, posed.jumps)
        forward, back = solve_both(
            line.comm, matrices, vectors, misfits, posed.radius, line.owned, self.basis.recurrence
        )
        found = corrections_from(swept.memory.tangents, posed.jumps, forward)
        ends, memory, _ = self._corrected(line, swept, posed, nothing_solved, found, slow=False)
        return ends, correct_adjoint(coswept.linear, pulled, back).lefts, memory

    def _posed(self, line: Line, swept: Swept, fine_ends: Block, front) -> _Posed:
        """Jumps that count, and how far to trust what follows from them."""
        old, index = swept.states, jnp.asarray(line.owned.indices)
        finite = samples_finite(fine_ends, 1 + self.propagator.n_sample_axes)
        usable = by_slice(index >= front, fine_ends) & finite
        jumps = jnp.where(usable, fine_ends - old.ends, 0.0)
        return _Posed(fine_ends, finite, jumps, self._radius(line, old))

    def _corrected(
        self, line: Line, swept: Swept, posed: _Posed, front, predicted: Found | None, slow
    ) -> tuple[Block, TangentMemory, Counts]:
        """Ends after a sweep. `predicted` is what follows from the tangents in hand, if known."""
        old, index = swept.states, jnp.asarray(line.owned.indices)
        n_lead = 1 + self.propagator.n_sample_axes
        memory = self._turn(line, old, posed.jumps, front, swept.memory, predicted, slow)
        found = predicted
        if found is None or memory.tangents is not swept.memory.tangents:
            found = self._corrections(line, old, posed, front, memory)
        ends = old.ends + found.changes
        ends = jnp.where(by_slice(index == front, ends), posed.fine_ends, ends)
        ends = jnp.where(by_slice(index < front, ends), old.ends, ends)
        sane = samples_finite(ends, n_lead) | by_slice(index <= front, ends)
        ends = jnp.where(sane, ends, old.ends)
        guarded = jnp.sum((index > front) & ~every_sample(posed.finite & sane))
        memory = memory._replace(n_sweeps=memory.n_sweeps + 1)
        return ends, memory, Counts(found.guarded + guarded, found.damped)

    def _recalled(self, line: Line, starts: Block, carry: Carry) -> "TangentMemory":
        """What an earlier solve has left; tangents that are not recycled are taken when needed."""
        basis, tangents = carry.replicated[BASIS], carry.rows.get(TANGENT_ROWS)
        if tangents is None:
            tangents = self._none(line, starts, basis)
        else:
            tangents = jnp.moveaxis(tangents, self._last_batch_axis, 1)
        return TangentMemory(basis, tangents, carry.replicated[BASIS_SWEEPS])

    @property
    def _last_batch_axis(self) -> int:
        """Where the directions go in a row that begins with slice and samples."""
        return 1 + self.basis.n_batch_axes

    def _none(self, line: Line, starts: Block, basis: Array) -> Array:
        """Tangents before any was taken."""
        return jnp.zeros((line.owned.n_owned, basis.shape[0], *starts.shape[1:]), starts.dtype)

    def _tangents(self, line: Line, starts: Block, directions: Array) -> Array:
        """Tangents of all directions, of which this rank takes its part."""
        comm, n_owned = line.comm, line.owned.n_owned
        part = owned_range(len(directions), comm.n_basis, comm.basis_rank)
        if not part:  # more ranks than new directions
            return gather_directions(
                comm, self._none(line, starts, directions[:0]), len(directions)
            )
        own = directions[part.start : part.stop]
        n = usually(count_in_use(own), len(own))
        pushed = Tally(tangents=n * n_owned, tangent_passes=tangent_passes(n) * n_owned)
        with work(TANGENTS, pushed):
            tangents = propagate_directions(
                self.propagator.for_tangents(),
                line.params,
                starts,
                own,
                line.owned,
                precision=self.precision,
            )
        return gather_directions(comm, tangents, len(directions))

    def _radius(self, line: Line, old: BlockStates) -> Array | None:
        """The longest correction to be trusted: a share of the longest state."""
        if self.trust is None:
            return None
        axes = tuple(range(1 + self.basis.n_batch_axes, old.starts.ndim))
        longest = jnp.sqrt(jnp.max(jnp.sum(old.starts**2, axis=axes)))
        return self.trust * max_over_ranks(line.comm, longest)

    def _turn(
        self,
        line: Line,
        old: BlockStates,
        jumps: Block,
        front,
        memory: TangentMemory,
        predicted: Found | None,
        slow,
    ) -> TangentMemory:
        """New directions for what the tangents in hand do not put right; tangents for all of them.

        What they put right is `predicted`, where directions are to be found. Recycled tangents are
        taken anew where the last sweep was slow.
        """
        basis, tangents, k = memory
        kept = tangents

        def anew():
            return self._tangents(line, old.starts, basis)

        def recycled() -> Array:
            return kept

        if self.basis.n_new:
            assert predicted is not None  # by who lets directions turn
            key = jax.random.fold_in(jax.random.key(self.basis.seed), k)
            new = self.basis.new_directions(line, key, jumps, predicted.changes)
            basis, mix = self.basis.turn(new, basis)

            def recycled() -> Array:
                fresh = self._tangents(line, old.starts, new)
                with scope(TANGENTS):
                    both = jnp.concatenate([fresh, kept], axis=1)
                    return jnp.moveaxis(jnp.tensordot(mix, both, axes=(1, 1)), 0, 1)

        if not self.recycle:
            tangents = anew()
        elif slow is False:  # outside of the iteration
            tangents = recycled()
        else:
            tangents = cond(slow, anew, recycled, usual=False)
        return TangentMemory(basis, tangents, k)

    def _corrections(
        self, line: Line, old: BlockStates, posed: _Posed, front, memory: TangentMemory
    ) -> Found:
        """What follows from some tangents."""
        (basis, tangents, _), jumps = memory, posed.jumps
        if self.use_complement:
            assert self.coarse is not None  # checked when made
            incoming = recv_left(line.comm, jnp.zeros_like(jumps[0]))
            # All slices before the change, and those that change after it.
            walked = unsolved(front, line.owned, at_once=1, more=line.owned.n_owned)
            with work(COARSE, Tally(coarse=walked)):
                changes, guarded = walk_corrections(
                    self.coarse,
                    line.params,
                    old.starts,
                    jumps,
                    Split(basis, tangents),
                    incoming,
                    front,
                    line.owned,
                )
            send_right(line.comm, changes[-1])
            return Found(changes, jnp.array(0), guarded)
        with scope(TANGENTS):
            matrices, vectors = transfers(basis, tangents), project(basis, jumps)
        solved = solve_coordinates(
            line.comm, matrices, vectors, posed.radius, line.owned, self.basis.recurrence
        )
        return corrections_from(tangents, jumps, solved)
