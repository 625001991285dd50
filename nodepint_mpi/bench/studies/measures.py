"""What rows of points say: speed-up, efficiency, shares, break-even. Local; pure.

Times of ranks that had to share cores are times of something else, so they are never asked for;
what such a run counted is as good as any.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nodepint_mpi.bench.studies.scaling import describe
from nodepint_mpi.core.scopes import (
    COARSE,
    ENCODER,
    FACTOR,
    FINE_ADJOINT,
    FINE_FORWARD,
    LOSS,
    MESSAGES,
    SNAPSHOTS,
    SWEEP,
    TANGENTS,
    UPDATE,
)
from nodepint_mpi.profiling.trace import OTHER
from nodepint_mpi.profiling.waits import WAIT

Row = Mapping[str, Any]

SHARES = {
    "fine": (FINE_FORWARD, FINE_ADJOINT, TANGENTS),
    "coarse": (COARSE,),
    "messages": MESSAGES,
    "idle": (WAIT,),
    "other": (ENCODER, LOSS, SNAPSHOTS, FACTOR, UPDATE, SWEEP, OTHER),
}
"""Parts of a step and the phases that make them up."""
COUNTED = {
    FINE_FORWARD: ("fine",), FINE_ADJOINT: ("fine_pulled",), TANGENTS: ("tangent_passes",),
    SWEEP: ("fine",), SNAPSHOTS: ("fine",),
}  # fmt: skip
"""What is counted of the phases whose work ranks share."""
WALKED = ("coarse", "coarse_pulled", "reduced", "reduced_pulled")
"""What is counted of the coarse phase, which goes from slice to slice."""


class Predicted(NamedTuple):
    """A step as a model has it: seconds, and the mean share over the ranks of each part."""

    step_s: float
    shares: dict[str, float]


Model = Callable[[Row], Predicted]
"""Of a point, which may have more ranks than any that was run."""


class Judged(NamedTuple):
    """A finished point beside the others of its curve; None where that cannot be said.

    `speed_up` (of a weak curve, in work done) and `efficiency` are against the curve's first point,
    `to_serial` is against plain serial training of the same problem. `counted` is the efficiency
    that counts of work promise, if messages cost nothing and nobody waits for anything but the
    coarse walk. `model_error` is relative to what was measured.
    """

    row: Row
    step_s: float | None
    speed_up: float | None
    efficiency: float | None
    to_serial: float | None
    counted: float | None
    shares: dict[str, float] | None
    model: Predicted | None
    model_efficiency: float | None
    model_error: float | None


class Curve(NamedTuple):
    """Finished points of a study that differ in ranks alone, the fewest first.

    `label` may be empty; `serial` are the plain ones beside them, by name.
    """

    study: str
    kind: str
    label: str
    rows: list[Row]
    serial: dict[str, Row]

    @property
    def first(self) -> Row | None:
        """The point that the others are measured by: with the fewest ranks of those with times."""
        return next((row for row in self.rows if seconds(row) is not None), None)


class BreakEven(NamedTuple):
    """The fewest ranks whose step is shorter than plain serial training's of the same problem.

    As measured, and as a model has it; None if there are none.
    """

    curve: Curve
    serial_s: float
    measured: int | None
    model: int | None


def seconds(row: Row | None) -> float | None:
    """Of a step, of the slowest rank; None where it was not measured. Local."""
    if row is None or row["state"] != "finished" or row["oversubscribed"]:
        return None
    return row["step_s"] and row["step_s"]["max"]


def make_curves(rows: Sequence[Row]) -> list[Curve]:
    """Finished points by study and the values of the keys it goes over, in order. Local."""
    curves: dict[tuple[str, str], Curve] = {}
    plain = {r["point"]: r for r in rows if r["is_plain"] and r["state"] == "finished"}
    for row in (row for row in rows if not row["is_plain"]):
        label = ", ".join(describe(row["over"]))
        where = row["study"], label
        curve = curves.setdefault(where, Curve(row["study"], row["kind"], label, [], {}))
        if row["state"] == "finished":
            curve.rows.append(row)
        if row["serial"] in plain:
            curve.serial[row["serial"]] = plain[row["serial"]]
    for curve in curves.values():
        curve.rows.sort(key=lambda row: (row["n_ranks"], row["data_ranks"], row["basis_ranks"]))
    return list(curves.values())


def judge(curve: Curve, model: Model | None = None) -> list[Judged]:
    """Every finished point of a curve. Local."""
    first, judged = curve.first, []
    promised = None if model is None or not curve.rows else model(curve.rows[0])
    for row in curve.rows:
        step_s, base_s = seconds(row), seconds(first)
        gain = None if step_s is None or base_s is None else base_s / step_s
        assert first is not None or gain is None
        ranks = row["n_ranks"] / (first or row)["n_ranks"]
        efficiency = gain and (gain if curve.kind == "weak" else gain / ranks)
        serial_s = seconds(curve.serial.get(row["serial"]))
        predicted = None if model is None else model(row)
        model_efficiency = None
        if predicted is not None and promised is not None:
            model_efficiency = promised.step_s / predicted.step_s
            if curve.kind == "strong":
                model_efficiency *= curve.rows[0]["n_ranks"] / row["n_ranks"]
        judged.append(
            Judged(
                row=row,
                step_s=step_s,
                speed_up=gain and gain * (ranks if curve.kind == "weak" else 1.0),
                efficiency=efficiency,
                to_serial=serial_s / step_s if serial_s and step_s else None,
                counted=_counted_efficiency(first, row),
                shares=shares_of(row) if step_s else None,
                model=predicted,
                model_efficiency=model_efficiency,
                model_error=predicted.step_s / step_s - 1 if predicted and step_s else None,
            )
        )
    return judged


def shares_of(row: Row) -> dict[str, float] | None:
    """The mean over the ranks of each part of a step; None where none was profiled. Local."""
    phases = row["phases_s"]
    if phases is None:
        return None
    whole = sum(phase["mean"] for phase in phases.values())
    return {
        part: sum(_seconds(phases, name, "mean") for name in names) / whole
        for part, names in SHARES.items()
    }


def _seconds(phases: Mapping[str, Any], name: str, of_ranks: str) -> float:
    """Of a phase; none where the record was made before it was told apart from others."""
    return phases[name][of_ranks] if name in phases else 0.0


def counted_s(first: Row, row: Row) -> float | None:
    """A step by what is counted, each piece of work as dear as it was on the first point. Local.

    The busiest rank's fine solves, pull-backs and tangents; the coarse steps of a whole line, which
    one rank does after the other; all else as on the first point. None if no step was profiled.
    """
    phases = first["phases_s"]
    if phases is None or row["profiled"] is None:
        return None
    share = samples_of_a_line(row) / samples_of_a_line(first)
    total = sum(_seconds(phases, name, "max") for name in (ENCODER, LOSS, FACTOR, UPDATE, OTHER))
    for phase, names in COUNTED.items():
        done, base = (_done(one, names, "max") for one in (row, first))
        spent = _seconds(phases, phase, "max")
        total += spent * share * (done / base if base else 0.0)
    walked, base = (_done(one, WALKED, "mean") * _line_ranks(one) for one in (row, first))
    ratio = walked / base if base else row["n_slices"] / first["n_slices"]
    return total + phases[COARSE]["mean"] * _line_ranks(first) * share * ratio


def break_even(curve: Curve, model: Model | None = None) -> BreakEven | None:
    """Where it begins to pay; None if plain serial training was not measured. Local.

    Of a strong curve's problem the model is asked about 1, 2, 4 ... ranks along time.
    """
    paired = [(row, seconds(curve.serial.get(row["serial"]))) for row in curve.rows]
    known = [(row, serial_s) for row, serial_s in paired if serial_s is not None]
    if not known:
        return None
    pays = [
        row["n_ranks"]
        for row, serial_s in known
        if (step_s := seconds(row)) is not None and step_s < serial_s
    ]
    first, serial_s = known[0]
    asked = known if curve.kind == "weak" else [(row, serial_s) for row in more_ranks(first)]
    by_model = (r["n_ranks"] for r, plain_s in asked if model and model(r).step_s < plain_s)
    return BreakEven(curve, serial_s, min(pays, default=None), next(by_model, None))


def more_ranks(row: Row) -> list[Row]:
    """The same point on 1, 2, 4 ... ranks along time, as many as it has slices. Local."""
    counts = (2**k for k in range(row["n_slices"].bit_length()))
    return [{**row, "n_ranks": n * _n_lines(row)} for n in counts]


def samples_of_a_line(row: Row) -> float:
    """Samples of a step in each line of ranks, where all data count as one. Local."""
    return (row["batch_size"] or 1) / row["data_ranks"]


def _counted_efficiency(first: Row | None, row: Row) -> float | None:
    """Of a point by its counts, against the first one."""
    if first is None:
        return None
    base, now = counted_s(first, first), counted_s(first, row)
    if base is None or now is None:
        return None
    ideal = first["n_ranks"] / row["n_ranks"] if row["kind"] == "strong" else 1.0
    return base / now * ideal


def _line_ranks(row: Row) -> int:
    return row["n_ranks"] // _n_lines(row)


def _n_lines(row: Row) -> int:
    """Of equal length, that do not share time."""
    return row["data_ranks"] * row["basis_ranks"]


def _done(row: Row, names: Sequence[str], which: str) -> float:
    """In a profiled step."""
    return sum(row["profiled"]["counts"][name][which] for name in names)
