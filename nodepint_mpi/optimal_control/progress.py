"""Where the iterations of a control problem are: what a checkpoint holds of them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nodepint_mpi.optimal_control.objective import Penalty
from nodepint_mpi.parallel.methods.base import Carry

LEARNING, STEERING = "learning", "control"
"""The two stages of a turn."""
_MAY_LACK = "state", "learner", "penalty", "guess", "carry"


class Place(NamedTuple):
    """What is under way: the turn of learning and control, the stage of the turn, the round of the
    constraint's multiplier, and how many iterations of that are done."""

    turn: int = 0
    stage: str = STEERING
    round: int = 0
    done: int = 0


class Progress(NamedTuple):
    """What the iterations go on with.

    Equal on all ranks but for `carry`, which has the rows of this rank's slices. `control` and
    `args` are whole modules. `state` and `learner` are the states of the optimizers of control and
    model, `slope` the largest entry of the gradient that a minimization by L-BFGS began with, `gap`
    what the last round left of the constraint, `guess` the trajectory that the next solve starts
    from, (edges, *samples, numbers), and `carry` what a tracked step left. None is what there is
    not yet, or never. `n_total` counts the iterations of all stages.
    """

    place: Place
    control: Any
    args: PyTree
    state: PyTree = None
    learner: PyTree = None
    penalty: Penalty | None = None
    slope: float = math.nan
    gap: float = math.inf
    guess: Array | None = None
    carry: Carry | None = None
    n_total: int = 0
    n_evaluations: int = 0

    def meta(self) -> dict[str, Any]:
        """What is not an array, for the metadata of a checkpoint. Local."""
        return {
            "place": list(self.place),
            "known": [name for name in _MAY_LACK if getattr(self, name) is not None],
            "n_evaluations": self.n_evaluations,
        }

    def arrays(self, blank: "Progress") -> tuple[dict[str, Any], dict[str, Any]]:
        """Trees that are equal on all ranks, and rows by slice of this one, by name. Local.

        What is not known is that of `blank`, so that all checkpoints of a run are alike.
        """
        known = {name: getattr(self, name) for name in _MAY_LACK}
        known = {k: getattr(blank, k) if tree is None else tree for k, tree in known.items()}
        carry, penalty = known.pop("carry"), known.pop("penalty")
        held = {"control": self.control, "args": self.args, **known}
        held["numbers"] = np.array([self.slope, self.gap])
        held["penalty"] = None if penalty is None else penalty._asdict()
        held["carry"] = None if carry is None else carry.replicated
        return held, {} if carry is None else {k: np.asarray(v) for k, v in carry.rows.items()}

    def resumed(
        self, held: dict[str, Any], rows: dict[str, np.ndarray], meta: dict[str, Any], n_total: int
    ) -> "Progress":
        """With what a checkpoint holds in the place of what is in this one. Local."""
        held = jax.tree.map(lambda leaf: jnp.asarray(leaf) if _is_array(leaf) else leaf, held)
        known: dict[str, Any] = {name: held.get(name) for name in meta["known"]}
        if "penalty" in known:
            known["penalty"] = Penalty(**held["penalty"])
        if "carry" in known:
            known["carry"] = Carry({k: jnp.asarray(v) for k, v in rows.items()}, held["carry"])
        turn, stage, number, done = meta["place"]
        slope, gap = (float(x) for x in held["numbers"])
        return Progress(
            Place(int(turn), str(stage), int(number), int(done)), held["control"], held["args"],
            slope=slope, gap=gap, n_total=n_total, n_evaluations=int(meta["n_evaluations"]),
            **known,
        )  # fmt: skip


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (np.ndarray, np.generic))
