"""The section `[control]`: what steers the field of `[problem]`, and what that is to cost."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from nodepint_mpi.config.optim import OptimSection
from nodepint_mpi.config.section import NonNegativeFloat, Section

RUN = "run:"
"""`problem.field = "run:DIRECTORY"` is the field that a training run has learned."""
OWN = ":"
"""In what names code of the user's own, `file.py:function`."""


class CostSection(Section):
    """What the control is to minimize.

    The sum of `terminal`/2 |u(T) - target|^2 and the integral of `running`/2 |u - target|^2 +
    `energy`/2 |c|^2, over the states listed in `of`; with `reach` u(T) = target is a constraint.
    Or `name`: "synchrony", which takes `terminal`, `running` and `energy`, or an import path of a
    function that returns a `nodepint_mpi.Cost`, called with `options`.
    """

    name: str = "quadratic"
    target: float | list[float] = 0.0
    terminal: NonNegativeFloat = 0.0
    running: NonNegativeFloat = 0.0
    energy: NonNegativeFloat = 0.0
    reach: bool = False
    of: list[int] | None = Field(default=None, min_length=1)
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _keys_of_the_name(self):
        given = self.changed() - {"name"}
        own = OWN in self.name
        if own and given - {"options"}:
            raise ValueError("with a `name` of your own takes `options` and nothing else")
        if not own and self.options:
            raise ValueError("takes `options` with a `name` of your own alone")
        if self.name == "synchrony" and given & {"target", "reach", "of"}:
            raise ValueError(
                "with `name = 'synchrony'` takes `terminal`, `running` and `energy`, no target"
            )
        if not own and not (self.terminal or self.running or self.energy):
            raise ValueError("needs a weight above zero: `terminal`, `running` or `energy`")
        return self


class ParaOptSection(Section):
    """Options of `control.method = "paraopt"`; see `nodepint_mpi.ParaOpt`.

    `n_steps` fine steps of a slice, those of `[time.fine]` unless given; Newton's matrix is taken
    from `ratio` of them, or from `coarse_steps`, along all directions or along `basis` of them.
    """

    n_steps: PositiveInt | None = None
    ratio: float | None = Field(default=None, gt=0, le=1)
    coarse_steps: PositiveInt | None = None
    scheme: Literal["implicit_euler", "implicit_midpoint"] = "implicit_euler"
    linearize: Literal["coarse", "fine"] = "coarse"
    start: Literal["line", "coarse"] = "line"
    basis: PositiveInt | None = None
    tol: PositiveFloat = 1e-9
    max_sweeps: PositiveInt = 50

    @model_validator(mode="after")
    def _one_ratio(self):
        if self.ratio is not None and self.coarse_steps is not None:
            raise ValueError("takes `ratio` or `coarse_steps`, not both")
        return self


class LearningSection(Section):
    """How the field is learned from the trajectories of `[data]` by `[network]` and `[optim]`.

    `schedule`: "before", all `n_steps` of `[optim]` and then the control; "alternating", a share of
    them and the control in turns, `rounds` times; "joint", both in each iteration by the gradient
    of loss + `weight` * cost, as many as `run.n_steps`. `gradient` is that of learning: "dp", of
    the discrete solve, or "dal", by the adjoint equation. The time of the trajectories is cut into
    as many slices as that of the control, with steps of the same length.
    """

    n_steps: PositiveInt = 1000
    schedule: Literal["before", "alternating", "joint"] = "before"
    rounds: PositiveInt = 1
    weight: PositiveFloat = 1.0
    gradient: Literal["dp", "dal"] = "dp"

    @model_validator(mode="after")
    def _keys_of_the_schedule(self):
        if self.schedule != "alternating" and "rounds" in self.changed():
            raise ValueError("takes `rounds` with `schedule = 'alternating'` alone")
        if self.schedule != "joint" and "weight" in self.changed():
            raise ValueError("takes `weight` with `schedule = 'joint'` alone")
        if self.rounds > self.n_steps:
            raise ValueError("has more `rounds` than `n_steps`")
        if self.schedule == "joint" and "n_steps" in self.changed():
            raise ValueError("with `schedule = 'joint'` learns in each of `run.n_steps` iterations")
        return self


class ControlSection(Section):
    """What steers the field of `[problem]`.

    `kind`: values at `n_nodes` equally spaced times, "constant" between them (the number of slices
    unless given) or "linear" (one more); a "network" of the time, with `feedback` of time and
    state, `depth` hidden layers of `width`; or an import path of a function `(key, span=,
    n_controls=, n_states=)` that makes an Equinox module. `initial` are the first values at nodes,
    one number or one for each control, a list of them for each node, or an import path of a
    function of the time; `roughness` is the standard deviation of noise on them, drawn by
    `run.seed`, and `pace` how much faster than the horizon a network begins to vary: other starts
    where there are several minima. `low` and `high` are bounds.

    With a `matrix` B the field is that of `[problem]` plus B c, and `n_controls` its number of
    columns; without, the field takes the control, `field(t, u, c, args)`.

    The gradient is that of `time.adjoint.kind`: "discrete" for differentiable programming,
    "continuous" for direct adjoint looping. Without `[control.optim]` the optimizer is L-BFGS,
    which is done when the largest entry of the gradient is `tol` of the first one; with it, one of
    optax's, by `[time.tracking]` from sweep to sweep. Either takes `run.n_steps` iterations at
    most.
    """

    kind: str = "linear"
    n_controls: PositiveInt | None = None
    n_nodes: PositiveInt | None = None
    initial: float | list[float] | list[list[float]] | str = 0.0
    roughness: NonNegativeFloat = 0.0
    width: PositiveInt = 32
    depth: PositiveInt = 2
    feedback: bool = False
    pace: PositiveFloat = 1.0
    low: float | list[float] | None = None
    high: float | list[float] | None = None
    matrix: list[list[float]] | None = Field(default=None, min_length=1)
    method: Literal["adjoint", "paraopt"] = "adjoint"
    paraopt: ParaOptSection = ParaOptSection()
    tol: PositiveFloat = 1e-7
    constraint_tol: PositiveFloat = 1e-6
    cost: CostSection
    optim: OptimSection | None = None
    learning: LearningSection | None = None

    @model_validator(mode="after")
    def _keys_of_the_kind(self):
        given = self.changed()
        nodes = {"n_nodes", "initial", "roughness"}
        network = {"width", "depth", "feedback", "pace"}
        known = {"constant": nodes, "linear": nodes, "network": network}
        if OWN not in self.kind and self.kind not in known:
            raise ValueError(
                f"has no `kind = {self.kind!r}`: choose 'constant', 'linear', 'network', or name "
                "a function of your own, 'file.py:function'"
            )
        foreign = sorted(given & (nodes | network) - known.get(self.kind, set()))
        if foreign:
            keys = ", ".join(f"`{key}`" for key in foreign)
            raise ValueError(f"with `kind = {self.kind!r}` takes no {keys}")
        if (self.low is None) != (self.high is None):
            raise ValueError("needs both bounds, `low` and `high`, or neither")
        if self.matrix is not None:
            width = len(self.matrix[0])
            if width == 0 or any(len(row) != width for row in self.matrix):
                raise ValueError("`matrix` needs a row for each state, all of one length")
            if self.n_controls not in (None, width):
                raise ValueError(
                    f"has {self.n_controls} `n_controls` and a `matrix` of {width} columns"
                )
        return self

    @model_validator(mode="after")
    def _method(self):
        if self.method != "paraopt":
            if "paraopt" in self.changed():
                raise ValueError("takes `[control.paraopt]` with `method = 'paraopt'` alone")
            return self
        if self.kind != "constant":
            raise ValueError(
                "with `method = 'paraopt'` needs `kind = 'constant'`: ParaOpt finds a value for "
                "each fine step, and falls back to `n_nodes` of them"
            )
        if self.low is not None or self.learning is not None:
            raise ValueError("with `method = 'paraopt'` takes no bounds and no `learning`")
        if self.cost.reach:
            raise ValueError(
                "with `method = 'paraopt'` takes no constraint: give `cost.terminal`, no `reach`"
            )
        return self


def check_control(config: Any) -> None:
    """Refuse what does not go with the section `[control]` of a whole `Config`. Local.

    Raises:
        ValueError: in the config's words.
    """
    control, time = config.control, config.time
    assert control is not None  # why this is asked
    learning = control.learning is not None
    if config.problem is None:
        raise ValueError("`[control]` needs a section `[problem]`: the field and `initial`")
    if config.problem.box is not None:
        raise ValueError("`problem.box` does not go with `[control]`")
    if config.run.n_epochs is not None:
        raise ValueError("`[control]` takes `run.n_steps`, the most iterations, not `n_epochs`")
    if config.run.data_ranks > 1:
        raise ValueError("`[control]` needs `run.data_ranks = 1`: all ranks share the time slices")
    if config.run.basis_ranks > 1:
        raise ValueError("`[control]` needs `run.basis_ranks = 1`: all ranks share the time slices")
    unfit = {"growth": config.growth, "time.relaxation": time.relaxation}
    unfit["time.levels"] = time.levels
    for name in [name for name, value in unfit.items() if value is not None]:
        raise ValueError(f"`[{name}]` does not go with `[control]`")
    if time.method == "reduced" or ":" in time.method:
        raise ValueError(
            "`[control]` takes `time.method` 'parareal', 'tangent', 'picard' or 'serial'"
        )
    if time.adjoint.sweeps is not None:
        raise ValueError("`[control]` takes `time.adjoint.tol`, not `time.adjoint.sweeps`")
    if time.basis is not None and time.basis.kind == "learned":
        raise ValueError("`time.basis.kind = 'learned'` does not go with `[control]`")
    if time.tracking is not None and time.method != "serial" and control.optim is None:
        raise ValueError(
            "`[time.tracking]` does one sweep a step, and L-BFGS needs solves that converge: add "
            "`[control.optim]`, an optimizer of optax, or remove `[time.tracking]`"
        )
    for name in ("data", "network"):
        if (getattr(config, name) is not None) != learning:
            raise ValueError(
                f"`[{name}]` is what `[control.learning]` learns a field from: give both or neither"
            )
    if not learning:
        if config.optim != OptimSection():
            raise ValueError(
                "`[optim]` is for learning; the optimizer of the control is `[control.optim]`"
            )
        return
    if config.problem.field != "learned":
        raise ValueError("`[control.learning]` goes with `problem.field = 'learned'`")
    if config.data is not None and (config.data.times is None or config.data.batch_size):
        raise ValueError(
            "`[control.learning]` takes all trajectories in each step: `[data]` needs `times`, and "
            "no `batch_size`"
        )
    if config.loss is not None and config.loss.name != "mean_squared_error":
        raise ValueError("`[control.learning]` has the loss 'mean_squared_error'")
    joint = control.learning is not None and control.learning.schedule == "joint"
    if joint and control.optim is None:
        raise ValueError(
            "`control.learning.schedule = 'joint'` needs `[control.optim]`, an optimizer of optax"
        )
