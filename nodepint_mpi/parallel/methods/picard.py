"""Picard's method: C_n = 0. Every sweep moves information one slice on."""

import jax.numpy as jnp

from nodepint_mpi.core.sweeps import replace_ends
from nodepint_mpi.parallel.methods.base import (
    ENDS,
    LEFTS,
    AbstractMethod,
    Carry,
    Coswept,
    Swept,
    first_cotangents,
    first_states,
    no_counts,
    with_ends,
    with_lefts,
)


class Picard(AbstractMethod):
    """C_n = 0, without a coarse propagator."""

    @classmethod
    def of(cls, parts):
        del parts
        return cls()

    def init(self, line, initial, carry):
        states, counts = first_states(line, None, initial, carry)
        return Swept(states, None, counts)

    def sweep(self, line, initial, swept, fine_ends, front, slow=False):
        del slow
        ends, guarded = replace_ends(fine_ends, swept.states.ends, front, line.owned)
        counts = no_counts()._replace(guarded=guarded)
        return Swept(with_ends(line, initial, ends), None, counts)

    def adjoint_init(self, line, starts, memory, sources, carry):
        del memory
        return Coswept(first_cotangents(line, None, starts, sources, carry), None)

    def adjoint_sweep(self, line, starts, coswept, outs):
        del starts
        return Coswept(with_lefts(line, outs), coswept.linear)

    def carry(self, line, initial, swept, fine_ends, coswept, outs, known):
        """What the sweeps give; neighbors exchange it when the next step begins."""
        del initial, coswept, known
        ends, _ = replace_ends(fine_ends, swept.states.ends, jnp.array(-1), line.owned)
        return Carry({ENDS: ends, LEFTS: outs}, {})
