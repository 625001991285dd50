"""A method of a user's own: parareal that takes only a share of the coarse change.

    U[n+1] <- F(U_old[n]) + w (G(U[n]) - G(U_old[n]))

With w = 1 it is parareal, with w = 0 Picard's method.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import nodepint_mpi as nm
from nodepint_mpi.core.sweeps import BlockStates, coarse_block, end_times
from nodepint_mpi.core.transposed import BlockCotangents
from nodepint_mpi.parallel.exchange import recv_left, recv_right, send_left, send_right
from nodepint_mpi.parallel.methods.base import (
    Coswept,
    Swept,
    first_cotangents,
    first_states,
    no_counts,
)


class Relaxed(nm.AbstractMethod):
    coarse: nm.Propagator
    weight: float = eqx.field(static=True, default=0.9)

    @classmethod
    def of(cls, parts):
        return cls(parts.coarse)

    def init(self, line, initial, carry):
        states, counts = first_states(line, self.coarse, initial, carry)
        return Swept(
            states, coarse_block(self.coarse, line.params, states.starts, line.owned), counts
        )

    def sweep(self, line, initial, swept, fine_ends, front, slow=False):
        del slow

        def advance(state, row):
            n, times, fine_end, old_start, old_end, old_coarse_end = row
            start = jnp.where(n <= front, old_start, state)
            coarse_end = self.coarse(line.params, start, *times).end
            end = fine_end + jnp.where(n > front, self.weight * (coarse_end - old_coarse_end), 0.0)
            end = jnp.where(n < front, old_end, end)
            return end, (BlockStates(start, end), coarse_end)

        times = end_times(line.owned, fine_ends)
        rows = (jnp.asarray(line.owned.indices), times, fine_ends, *swept.states, swept.memory)
        last, (states, coarse_ends) = jax.lax.scan(advance, recv_left(line.comm, initial), rows)
        send_right(line.comm, last)
        return Swept(states, coarse_ends, no_counts())

    def adjoint_init(self, line, starts, memory, sources, carry):
        return Coswept(first_cotangents(line, self.coarse, starts, sources, carry), None)

    def adjoint_sweep(self, line, starts, coswept, outs):
        def retreat(right, row):
            start, times, out, old_right = row
            _, pull_back = jax.vjp(lambda u: self.coarse(line.params, u, *times).end, start)
            left = out + self.weight * pull_back(right - old_right)[0]
            return left, BlockCotangents(left, right)

        rows = (starts, end_times(line.owned, starts), outs, coswept.cotangents.rights)
        incoming = recv_right(line.comm, jnp.zeros_like(outs[-1]))
        first, cotangents = jax.lax.scan(retreat, incoming, rows, reverse=True)
        send_left(line.comm, first)
        return Coswept(cotangents, None)


make_method = Relaxed.of
