"""Parareal: C_n = G_n, a classical coarse propagator.

    U[n+1] <- G(U[n]) + F(U_old[n]) - G(U_old[n])

What it leaves for the next parameters are the defects F_n(U[n]) - G_n(U[n]) and those of the
transpose, which change little: new parameters enter by G at once. This is the tau correction of
full approximation schemes, applied along training.

Reference:
    Lions, Maday, Turinici (2001), C. R. Acad. Sci. 332, 661-668; Brandt (1977), Math. Comp. 31,
    333-390, section 4.2, for the tau correction.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.scopes import COARSE
from nodepint_mpi.core.sweeps import (
    coarse_block,
    coarse_chain_block,
    correct_block,
)
from nodepint_mpi.core.transposed import correct_cotangents
from nodepint_mpi.parallel.counters import Tally, unsolved, work
from nodepint_mpi.parallel.exchange import in_order, recv_left, recv_right, send_left, send_right
from nodepint_mpi.parallel.methods.base import (
    ENDS,
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


class Parareal(AbstractMethod):
    """C_n = G_n. The coarse propagator may use fewer or larger steps, lower order, another field.

    Args:
        coarse: The coarse propagator G.
        counted_as: What a slice is counted as that G passes; see `counters.Tally`.
    """

    coarse: Propagator
    counted_as: tuple[str, ...] = eqx.field(static=True, default=("coarse",))

    @classmethod
    def of(cls, parts):
        if parts.coarse is None:
            raise needs_coarse("parareal")
        return cls(parts.coarse)

    def init(self, line, initial, carry):
        if ENDS in carry.rows:
            states, counts = first_states(line, self.coarse, initial, carry)
            with work(COARSE, Tally(coarse=line.owned.n_owned)):
                coarse_ends = coarse_block(self.coarse, line.params, states.starts, line.owned)
            return Swept(states, coarse_ends, counts)
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
        if CODEFECTS not in carry.rows:
            return Coswept(first_cotangents(line, self.coarse, starts, sources, carry), None)
        cotangents = coarse_cotangents(line, self.coarse, starts, sources, carry.rows[CODEFECTS])
        return Coswept(cotangents._replace(rights=in_order(line.comm, cotangents.rights)), None)

    def adjoint_sweep(self, line, starts, coswept, outs):
        incoming = recv_right(line.comm, jnp.zeros_like(outs[-1]))
        pulled = {f"{name}_pulled": line.owned.n_owned for name in self.counted_as}
        with work(COARSE, Tally(**pulled)):
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
        del line, initial
        before = known.rows.get(CODEFECTS, jnp.zeros_like(outs))
        return Carry(
            {
                DEFECTS: _finite_or_zero(fine_ends - swept.memory),
                CODEFECTS: _finite_or_zero(before + outs - coswept.cotangents.lefts),
            },
            {},
        )

    def carry_like(self, n_owned, state):
        nothing = jnp.zeros((n_owned, *state.shape), state.dtype)
        return Carry({DEFECTS: nothing, CODEFECTS: nothing}, {})


def _finite_or_zero(values: Array) -> Array:
    return jnp.where(jnp.isfinite(values), values, 0.0)
