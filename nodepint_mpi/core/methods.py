"""The sweeps on offer. What the correction C_n is makes the method."""

import equinox as eqx

from nodepint_mpi.core.propagators import Propagator


class AbstractMethod(eqx.Module):
    """How information travels between slices."""


class Serial(AbstractMethod):
    """No iteration: slice after slice, rank after rank. The baseline, by the same code."""


class Picard(AbstractMethod):
    """C_n = 0: every sweep moves information one slice on. No coarse propagator."""


class Parareal(AbstractMethod):
    """C_n = G_n, a classical coarse propagator.

    The coarse propagator may use fewer or larger steps, lower order, or another field.
    """

    coarse: Propagator
