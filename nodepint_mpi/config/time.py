"""The section `[time]`: the horizon, its slices, how they are solved and tied together."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from nodepint_mpi.config.section import NonNegativeFloat, NonNegativeInt, Section

METHODS = ("parareal", "tangent", "reduced", "picard", "serial")
"""Names of methods; one of the user's own is named `file.py:function`."""


class TableauSection(Section):
    """A Butcher tableau of an explicit Runge-Kutta method."""

    a: list[list[float]]
    b: list[float]
    order: PositiveInt
    b_embedded: list[float] | None = None


class StepsSection(Section):
    """How one slice is stepped through: `n_steps` equal steps, or `rtol` and `atol`.

    `n_stages` belongs to the solver "chebyshev": a step is stable up to about 0.7 n_stages^2 over
    the largest rate of decay.
    """

    solver: str | None = None
    tableau: TableauSection | None = None
    n_stages: int | None = Field(default=None, ge=2)
    n_steps: PositiveInt | None = None
    rtol: PositiveFloat | None = None
    atol: PositiveFloat | None = None
    max_steps: PositiveInt = 4096
    checkpoints: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_way_of_stepping(self):
        adaptive = self.rtol is not None and self.atol is not None
        if (self.n_steps is None) != adaptive or (self.rtol is None) != (self.atol is None):
            raise ValueError("needs either `n_steps`, or both `rtol` and `atol`")
        if (self.solver is None) == (self.tableau is None):
            raise ValueError("needs either `solver` or `tableau`")
        if (self.solver == "chebyshev") != (self.n_stages is not None):
            raise ValueError("takes `n_stages` with `solver = 'chebyshev'`, which needs it")
        return self


class StoppingSection(Section):
    """`jump`: every jump at most `tol`. `sweeps`: just so many. `freeze_*`: published rules."""

    rule: Literal["jump", "sweeps", "freeze_end", "freeze_start"] = "jump"
    tol: PositiveFloat | None = None
    sweeps: NonNegativeInt | None = None
    max_sweeps: PositiveInt | None = None

    @model_validator(mode="after")
    def _keys_of_the_rule(self):
        if self.rule == "sweeps":
            if self.sweeps is None or self.tol is not None or self.max_sweeps is not None:
                raise ValueError("with `rule = 'sweeps'` takes `sweeps` and nothing else")
        elif self.sweeps is not None:
            raise ValueError(f"with `rule = '{self.rule}'` takes `tol`, not `sweeps`")
        return self


class AdjointSection(Section):
    """How the gradient is computed.

    `discrete` differentiates the discrete solve, `continuous` solves the adjoint equation.
    `tol` bounds the residual relative to the largest cotangent; `sweeps` fixes their number.
    """

    kind: Literal["discrete", "continuous"] = "discrete"
    tol: PositiveFloat | None = None
    sweeps: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _one_rule(self):
        if self.tol is not None and self.sweeps is not None:
            raise ValueError("takes `tol` or `sweeps`, not both")
        return self


class BasisSection(Section):
    """The basis that `tangent` and `reduced` share between slices, samples and ranks.

    It begins with `kind` and takes in `new` directions of the jumps in each sweep (all of `rank`
    for "jumps", else none, unless given). Directions below `drop` of the largest singular value
    are left out. `complement` lets `[time.coarse]` act on what lies outside the basis.

    `recurrence` is how coordinates are tied together from slice to slice, with the same numbers to
    round-off: rank 0 walks through all slices ("slices"), or from rank to rank through blocks of
    them ("blocks"), or the ranks do it among themselves ("scan"). "auto" takes the way that should
    take least on these ranks, by counts of operations and bytes; `nodepint info` says which.

    For `tangent` alone: with `recycle` tangents of earlier sweeps are kept and only new ones taken,
    unless the last sweep was slow;
    `precision` is the type they are computed in, `trust` the longest correction along the basis
    relative to the longest state (0 for no bound).
    """

    kind: Literal["identity", "random", "pod", "jumps", "learned"]
    rank: PositiveInt | None = None
    new: NonNegativeInt | None = None
    drop: NonNegativeFloat = 1e-4
    complement: bool = False
    recycle: bool = True
    precision: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    trust: NonNegativeFloat = 0.5
    recurrence: Literal["auto", "slices", "blocks", "scan"] = "auto"

    @model_validator(mode="after")
    def _rank_of_the_kind(self):
        whole = self.kind in ("identity", "learned")
        if whole and self.rank is not None:
            raise ValueError(f"with `kind = '{self.kind}'` has the state's size: leave out `rank`")
        if not whole and self.rank is None:
            raise ValueError(f"with `kind = '{self.kind}'` needs a `rank`")
        if self.rank is not None and self.new is not None and self.new > self.rank:
            raise ValueError("takes in at most `rank` directions a sweep: lower `new`")
        if self.kind == "jumps" and self.new == 0:
            raise ValueError("with `kind = 'jumps'` grows by `new` directions a sweep: at least 1")
        return self


class LevelsSection(Section):
    """Parareal's coarse walks in levels: for many slices, whose coarse steps follow one another.

    Groups of `coarsening` slices are walked through at once; `cycles` times in a sweep, their first
    states are corrected by a walk from group to group, which takes one step `coarsest` over each
    (the steps of `[time.coarse]` unless given, as many times longer). `number` of levels is 1, 2,
    or "auto": two where `coarsening` is given or where a sweep is then less than half as deep, by
    the number of slices alone. Iterates depend on it, and never on the number of ranks.
    """

    number: Literal[1, 2, "auto"] = "auto"
    coarsening: int | None = Field(default=None, ge=2)
    cycles: PositiveInt = 1
    coarsest: StepsSection | None = None


class TrackingSection(Section):
    """Training steps that start from what the last one left: one sweep each way does.

    A step whose gradient is expected to be wrong by more than `bound` (relative) sweeps again, at
    most `max_sweeps` times, and then takes the serial gradient. Every `check_every` steps (never
    if 0) the gradient is compared with the serial one. With mini-batches all ranks together keep
    `store_mb` megabytes of samples' tracks.
    """

    bound: PositiveFloat = 1e-2
    max_sweeps: PositiveInt = 4
    check_every: NonNegativeInt = 100
    store_mb: NonNegativeFloat = 1024.0


class RelaxationSection(Section):
    """Training whose slices start between the last one's end and the data, for `steps` steps.

    The weight of continuity goes linearly from `start` to `end`, where it stays; see
    `core.relaxation`. For trajectories. With both 0 every slice begins at what was observed in all
    steps: slices do not depend on each other; the field is trained, not a trajectory.
    """

    steps: PositiveInt
    start: NonNegativeFloat = Field(default=0.0, lt=1)
    end: NonNegativeFloat = Field(default=1.0, le=1)

    def weight_at(self, step: int) -> float:
        """Of continuity in an optimizer step. Local."""
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.steps


class _AnyTimeSection(Section):
    """The horizon, its slices, and what every method takes.

    `slices_at_once` is the number of slices a rank propagates as one batch, all its own unless
    given.
    """

    horizon: list[float] = Field(min_length=2, max_length=2)
    n_slices: PositiveInt
    edges: list[float] | None = None
    tracking: TrackingSection | None = None
    relaxation: RelaxationSection | None = None
    levels: LevelsSection | None = None
    slices_at_once: PositiveInt | None = None
    fine: StepsSection
    tangents: StepsSection | None = None
    stopping: StoppingSection = StoppingSection()
    adjoint: AdjointSection = AdjointSection()

    @model_validator(mode="after")
    def _consistent(self):
        if not self.horizon[0] < self.horizon[1]:
            raise ValueError(f"`horizon` must run forward, not from {self.horizon}")
        if self.edges is not None:
            ends = [self.edges[0], self.edges[-1]] if self.edges else []
            if len(self.edges) != self.n_slices + 1 or ends != self.horizon:
                raise ValueError("`edges` needs n_slices + 1 times, from end to end of `horizon`")
            if any(b <= a for a, b in zip(self.edges, self.edges[1:], strict=False)):
                raise ValueError("`edges` must be strictly increasing")
        return self


class PararealSection(_AnyTimeSection):
    """`method = "parareal"`: a coarse propagator corrects the interface states."""

    method: Literal["parareal"] = "parareal"
    coarse: StepsSection
    basis: BasisSection | None = None


class TangentSection(_AnyTimeSection):
    """`method = "tangent"`: derivatives of the fine propagator along a basis correct them."""

    method: Literal["tangent"] = "tangent"
    coarse: StepsSection | None = None
    basis: BasisSection

    @model_validator(mode="after")
    def _coarse_of_the_complement(self):
        if self.basis.complement and self.coarse is None:
            raise ValueError("`basis.complement` needs a section `[time.coarse]`")
        return self


class ReducedSection(_AnyTimeSection):
    """`method = "reduced"`: a coarse propagator of the field on a basis corrects them."""

    method: Literal["reduced"] = "reduced"
    coarse: StepsSection
    basis: BasisSection

    @model_validator(mode="after")
    def _basis_of_states(self):
        if self.basis.kind == "jumps":
            raise ValueError(
                "`method = 'reduced'` needs a basis that holds states: 'pod', 'random', "
                "'identity' or 'learned', not 'jumps'"
            )
        return self


class PlainSection(_AnyTimeSection):
    """`method = "picard"` or `"serial"`: nothing but the fine propagator."""

    method: Literal["picard", "serial"]
    coarse: StepsSection | None = None
    basis: BasisSection | None = None


class TimeSection(_AnyTimeSection):
    """The horizon, its slices, and how they are solved and tied together.

    `method` is a name, or `file.py:function` for a function of `nodepint_mpi.Parts` that makes one.
    It passes over sections that it has no use for, and `serial` over `tracking`, so that methods
    can be compared by changing one key. `slices_at_once` is the number of slices that a rank
    propagates as one batch, all its own unless given.
    """

    method: str = "parareal"
    coarse: StepsSection | None = None
    basis: BasisSection | None = None


def _time_tag(value: Any) -> str:
    """The section of `Time` for a method; the name of the method where there is none."""
    of = value.get if isinstance(value, Mapping) else partial(getattr, value)
    given = of("method", "parareal")
    if not isinstance(given, str) or ":" in given:
        return "own"
    return "plain" if given in ("picard", "serial") else given


def _of_the_method(value: Any) -> Any:
    if not isinstance(value, TimeSection):
        return value
    return {key: getattr(value, key) for key in value.model_fields_set}


Time = Annotated[
    Annotated[PararealSection, Tag("parareal")]
    | Annotated[TangentSection, Tag("tangent")]
    | Annotated[ReducedSection, Tag("reduced")]
    | Annotated[PlainSection, Tag("plain")]
    | Annotated[TimeSection, Tag("own")],
    Discriminator(_time_tag),
    BeforeValidator(_of_the_method),
]
"""The section `[time]`, a union by `method`: what a method needs is not optional in it.

A method passes over the sections it has no use for, and `serial` over `tracking`, so that methods
can be compared by changing one key.
"""
