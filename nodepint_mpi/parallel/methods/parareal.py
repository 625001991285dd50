"""Parareal: C_n = G_n, a classical coarse propagator.

    U[n+1] <- G(U[n]) + F(U_old[n]) - G(U_old[n])

What it leaves for the next parameters are the defects F_n(U[n]) - G_n(U[n]) and those of the
transpose, which change little: new parameters enter by G at once. This is the tau correction of
full approximation schemes, applied along training. The walks through G may be done in two levels,
see `parallel.levels`; then it leaves the same of these.

Reference:
    Lions, Maday, Turinici (2001), C. R. Acad. Sci. 332, 661-668; Brandt (1977), Math. Comp. 31,
    333-390, section 4.2, for the tau correction.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.scopes import COARSE
from nodepint_mpi.core.stochastic import StochasticField
from nodepint_mpi.core.sweeps import (
    advance_coarse,
    advance_corrected,
    coarse_block,
    coarse_chain_block,
    correct_block,
    end_times,
    slice_times,
)
from nodepint_mpi.core.transposed import (
    BlockCotangents,
    correct_cotangents,
    retreat_coarse,
    retreat_corrected,
)
from nodepint_mpi.core.types import Block, State
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.counters import Tally, unsolved, work
from nodepint_mpi.parallel.exchange import in_order, recv_left, recv_right, send_left, send_right
from nodepint_mpi.parallel.levels import Levels, TwoLevels, two_levels
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import (
    ENDS,
    LEFTS,
    AbstractMethod,
    Carry,
    Coswept,
    Swept,
    coarse_cotangents,
    first_cotangents,
    first_states,
    needs_coarse,
    no_counts,
)

DEFECTS, CODEFECTS = "defects", "codefects"
GROUP_DEFECTS, GROUP_LEFTS = "group_defects", "group_lefts"
"""In two levels: what first states of groups have more than H gives, and cotangents at their left
edges; in the rows of their first slices."""


class Parareal(AbstractMethod):
    """C_n = G_n. The coarse propagator may use fewer or larger steps, lower order, another field.

    Args:
        coarse: The coarse propagator G.
        counted_as: What a slice is counted as that G passes; see `counters.Tally`.
        levels: How the walks through G are done in two levels; in one if None.
    """

    coarse: Propagator
    counted_as: tuple[str, ...] = eqx.field(static=True, default=("coarse",))
    levels: Levels | None = None

    def __check_init__(self):
        parts = [self.coarse, getattr(self.levels, "coarsest", None)]
        if self.levels and any(isinstance(_field(part), StochasticField) for part in parts):
            raise ProblemError(
                "The coarse walk of a stochastic equation is one through all slices: a step over "
                "a group of slices would need the increments of all of them. Leave `levels` out."
            )

    @classmethod
    def of(cls, parts):
        if parts.coarse is None:
            raise needs_coarse("parareal")
        return cls(parts.coarse, levels=parts.levels)

    def init(self, line, initial, carry):
        grouped = two_levels(line, self.levels, self.coarse)
        if ENDS in carry.rows:
            states, counts = first_states(line, self.coarse, initial, carry)
            with work(COARSE, Tally(coarse=line.owned.n_owned)):
                coarse_ends = coarse_block(self.coarse, line.params, states.starts, line.owned)
            memory = coarse_ends if grouped is None else grouped.know(states, coarse_ends)
            return Swept(states, memory, counts)
        if grouped is not None:
            return self._init_in_levels(grouped, initial, carry)
        if DEFECTS not in carry.rows:
            states, counts = first_states(line, self.coarse, initial, carry)
            return Swept(states, states.ends, counts)
        incoming = recv_left(line.comm, initial)
        with work(COARSE, Tally(coarse=line.owned.n_owned)):
            states, coarse_ends, guarded = coarse_chain_block(
                self.coarse, line.params, incoming, line.owned, carry.rows[DEFECTS]
            )
        send_right(line.comm, states.ends[-1])
        states = states._replace(starts=in_order(line.comm, states.starts))
        return Swept(states, coarse_ends, no_counts()._replace(guarded=guarded))

    def sweep(self, line, initial, swept, fine_ends, front, slow=False):
        del slow
        grouped = two_levels(line, self.levels, self.coarse)
        if grouped is not None:
            return self._sweep_in_levels(grouped, initial, swept, fine_ends, front)
        incoming = recv_left(line.comm, initial)
        changed = unsolved(front, line.owned, at_once=1, beyond=1)
        with work(COARSE, Tally(**{name: changed for name in self.counted_as})):
            states, coarse_ends, guarded = correct_block(
                self.coarse,
                line.params,
                incoming,
                fine_ends=fine_ends,
                old=swept.states,
                coarse_ends=swept.memory,
                front=front,
                owned=line.owned,
            )
        send_right(line.comm, states.ends[-1])
        return Swept(states, coarse_ends, no_counts()._replace(guarded=guarded))

    def adjoint_init(self, line, starts, memory, sources, carry):
        del memory
        grouped = two_levels(line, self.levels, self.coarse)
        if grouped is not None and LEFTS not in carry.rows:
            return self._adjoint_init_in_levels(grouped, starts, sources, carry)
        if CODEFECTS not in carry.rows:
            return Coswept(first_cotangents(line, self.coarse, starts, sources, carry), None)
        cotangents = coarse_cotangents(line, self.coarse, starts, sources, carry.rows[CODEFECTS])
        return Coswept(cotangents._replace(rights=in_order(line.comm, cotangents.rights)), None)

    def adjoint_sweep(self, line, starts, coswept, outs):
        grouped = two_levels(line, self.levels, self.coarse)
        if grouped is not None:
            rows = (starts, end_times(line.owned, starts), outs, coswept.cotangents.rights)
            retreat, tally = retreat_corrected(self.coarse, line.params), self._pulled(line)
            back = grouped.walk_back(retreat, rows, starts, coswept.cotangents, tally)
            return Coswept(back.cotangents, coswept.linear)
        incoming = recv_right(line.comm, jnp.zeros_like(outs[-1]))
        with work(COARSE, self._pulled(line)):
            cotangents = correct_cotangents(
                self.coarse,
                line.params,
                starts,
                outs=outs,
                old=coswept.cotangents,
                incoming=incoming,
                owned=line.owned,
            )
        send_left(line.comm, cotangents.lefts[0])
        return Coswept(cotangents, coswept.linear)

    def carry(self, line, initial, swept, fine_ends, coswept, outs, known):
        del initial
        before = known.rows.get(CODEFECTS, jnp.zeros_like(outs))
        coarse_ends, lefts = swept.memory, coswept.cotangents.lefts
        grouped_rows: dict[str, Array] = {}
        grouped = two_levels(line, self.levels, self.coarse)
        if grouped is not None:
            coarse_ends, group_lefts = swept.memory.coarse_ends, lefts
            lefts = group_lefts if coswept.linear is None else coswept.linear
            grouped_rows = {
                GROUP_DEFECTS: _finite_or_zero(grouped.by_slice(swept.memory.defects)),
                GROUP_LEFTS: _finite_or_zero(group_lefts),
            }
        elif self.levels is not None:
            grouped_rows = dict.fromkeys((GROUP_DEFECTS, GROUP_LEFTS), jnp.zeros_like(outs))
        return Carry(
            {
                DEFECTS: _finite_or_zero(fine_ends - coarse_ends),
                CODEFECTS: _finite_or_zero(before + outs - lefts),
                **grouped_rows,
            },
            {},
        )

    def carry_like(self, n_owned, state):
        nothing = jnp.zeros((n_owned, *state.shape), state.dtype)
        names = DEFECTS, CODEFECTS
        if self.levels is not None:
            names = *names, GROUP_DEFECTS, GROUP_LEFTS
        return Carry(dict.fromkeys(names, nothing), {})

    def _init_in_levels(self, grouped: TwoLevels, initial: State, carry: Carry) -> Swept:
        """Iteration 0, from what the last parameters left if there is any."""
        line, rows = grouped.line, carry.rows
        defects = rows.get(DEFECTS)
        of_groups = None if defects is None else rows[GROUP_DEFECTS][grouped.own.starts]
        advance = advance_coarse(self.coarse, line.params)
        walked = grouped.begin(
            initial, advance, (end_times(line.owned, initial), defects), of_groups
        )
        states = walked.states
        if defects is not None:
            states = states._replace(starts=in_order(line.comm, states.starts))
        return Swept(states, walked.memory, no_counts()._replace(guarded=walked.n_guarded))

    def _sweep_in_levels(
        self, grouped: TwoLevels, initial: State, swept: Swept, fine_ends: Block, front: Array
    ) -> Swept:
        line, old, memory = grouped.line, swept.states, swept.memory
        times, indices = end_times(line.owned, initial), jnp.asarray(line.owned.indices)
        rows = (times, indices, fine_ends, old.ends, memory.coarse_ends)
        changed = unsolved(front, line.owned, at_once=1, beyond=1)
        tally = Tally(**{name: changed for name in self.counted_as})
        advance = advance_corrected(self.coarse, line.params, front)
        walked = grouped.sweep(initial, advance, rows, old, memory, front, tally)
        counts = no_counts()._replace(guarded=walked.n_guarded)
        return Swept(walked.states, walked.memory, counts)

    def _adjoint_init_in_levels(
        self, grouped: TwoLevels, starts: Block, sources: SliceResult, carry: Carry
    ) -> Coswept:
        """From the cotangents of the last parameters at the edges of groups, or from zero."""
        line, rows, zeros = grouped.line, carry.rows, jnp.zeros_like(starts)
        defects = rows.get(CODEFECTS)
        old = BlockCotangents(zeros, zeros)
        if defects is not None:
            old = grouped.back_from(rows[GROUP_LEFTS])
        retreat = retreat_coarse(self.coarse, line.params)
        of_slices = (starts, slice_times(line.owned, starts), sources, defects)
        back = grouped.walk_back(retreat, of_slices, starts, old, self._pulled(line))
        if defects is None:
            return Coswept(back.cotangents, None)
        rights = in_order(line.comm, back.cotangents.rights)
        return Coswept(back.cotangents._replace(rights=rights), back.within)

    def _pulled(self, line: Line) -> Tally:
        """Of a walk back through the owned slices."""
        return Tally(**{f"{name}_pulled": line.owned.n_owned for name in self.counted_as})


def _field(part: Propagator | None) -> Any:
    return getattr(part, "field", None)


def _finite_or_zero(values: Array) -> Array:
    return jnp.where(jnp.isfinite(values), values, 0.0)
