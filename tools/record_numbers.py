"""What solves and training compute, number by number, so that a rewrite can be held to it.

    mpirun -n R python -m mpi4py tools/record_numbers.py OUT.npz             record
    mpirun -n R python -m mpi4py tools/record_numbers.py --compare FILE.npz  compare; 1 if different

Everything goes through public calls: `nodepint_mpi.solve`, `jax.grad` of it, `nodepint_mpi.train`
and the metrics that a run writes. `--only TEXT` takes the cases whose names contain it. Set the
environment of tools/test.sh first: other compiler settings give other last bits.

Whole numbers, statuses and what is not finite must be equal. Other numbers may differ by `RTOL`
times the largest of their array; jumps and updates, which are differences of states, by that times
the largest state, since they inherit the round-off of states. `--bits` asks for equal bits: the
same program on the same machine gives them, another order of the same additions does not.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from mpi4py import MPI

import nodepint_mpi as nm

RTOL = 1e-13
SINGLE_RTOL = 1e-8
"""Where tangents are taken in single precision: the order of its roundings is the compiler's."""
Numbers = dict[str, np.ndarray]

EDGES = np.array([0.0, 0.1, 0.3, 0.45, 0.7, 0.8, 1.1, 1.3])
INITIAL = np.array([1.0, 2.0, 0.5, -1.0, 0.3])
STEPS: dict[str, Any] = dict(fine=nm.FixedSteps(nm.RK4(), 2), coarse=nm.FixedSteps(nm.RK4(), 1))
SMALL = nm.SharedBasis("pod", 3, 1)
OF_STATES = "jumps", "updates"
"""Differences of states, with the round-off of these."""
OF_ONE = "jump", "adjoint_residual", "gradient_error_estimate", "gradient_error"
"""The same in training, where states are of size one, or relative to what they belong to."""


def tolerance(name: str) -> float:
    """How far numbers of a case may be from those recorded. Local."""
    return SINGLE_RTOL if "float32" in name else RTOL


def tangent(basis: nm.SharedBasis, **options: Any) -> dict[str, Any]:
    """Options of a tangent solve. Local."""
    return dict(method="tangent", basis=basis) | options


METHODS: dict[str, dict[str, Any]] = {
    "parareal": dict(method="parareal"),
    "picard": dict(method="picard"),
    "serial": dict(method="serial"),
    "tangent": tangent(SMALL),
    "tangent-anew": tangent(SMALL, recycle=False),
    "tangent-complement": tangent(SMALL, complement=True),
    "tangent-float32": tangent(SMALL, precision="float32"),
    "tangent-jumps": tangent(nm.SharedBasis("jumps", 3, 2)),
    "tangent-random": tangent(nm.SharedBasis("random", 3, 1)),
    "tangent-identity": tangent(nm.SharedBasis("identity"), recycle=False),
    "tangent-blocks": tangent(nm.SharedBasis("pod", 3, 1, recurrence="blocks")),
    "tangent-scan": tangent(nm.SharedBasis("pod", 3, 1, recurrence="scan")),
    "reduced": dict(method="reduced", basis=SMALL),
    "reduced-complement": dict(method="reduced", basis=SMALL, complement=True),
}
RULES: dict[str, Any] = {f"sweeps{k}": nm.FixedSweeps(k) for k in range(4)} | {
    "jump": nm.JumpTolerance(1e-9),
    "freeze-end": nm.FreezeSlices(1e-6),
    "freeze-start": nm.FreezeSlices(1e-6, "start"),
}


class Case(NamedTuple):
    """One computation: its numbers by name.

    `n_ranks` are the rank counts it is recorded on.
    """

    run: Callable[[Path], Numbers]
    n_ranks: tuple[int, ...] = (1, 2, 3, 4)


def lorenz96(t, u, args):
    """u_i' = (u_{i+1} - u_{i-2}) u_{i-1} - damping u_i + forcing_i, on a ring."""
    left, two_left, right = (jnp.roll(u, n, axis=-1) for n in (1, 2, -1))
    return (right - two_left) * left - args["damping"] * u + args["forcing"]


def arguments() -> dict[str, Any]:
    """Of the field. Local."""
    return {"damping": jnp.array(1.0), "forcing": jnp.linspace(2.0, 4.0, 5)}


def numbers_of(solution: nm.Solution) -> Numbers:
    """Everything that a solution holds. Local."""
    counts = np.array([int(count) for count in solution.work])
    record = solution.record
    n_rare = [record.n_guarded, record.n_damped, record.n_fallbacks, record.broken]
    found = {
        "interface": np.asarray(solution.interface),
        "jumps": solution.jumps,
        "updates": solution.updates,
        "fronts": solution.fronts,
        "sweeps": np.array(solution.sweeps),
        "status": np.array(list(nm.Status).index(solution.status)),
        "work": counts,
        "rare": np.array([int(n) for n in (*n_rare, record.broken_entry)]),
    }
    samples = solution.sample_sweeps
    return found if samples is None else found | {"sample_sweeps": samples}


def solve(initial: Any = INITIAL, args: Any = None, **options: Any) -> nm.Solution:
    """The common problem. Collective over the world."""
    args = arguments() if args is None else args
    return nm.solve(lorenz96, jnp.asarray(initial), EDGES, args=args, **(STEPS | options))


def forward(**options: Any) -> Numbers:
    """A solve alone. Collective over the world."""
    return numbers_of(solve(**options))


def with_gradient(initial: Any = INITIAL, **options: Any) -> Numbers:
    """A solve with the gradient of a sum of sines of its states. Collective over the world."""
    shape = (len(EDGES), *np.shape(initial))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=shape))

    def loss(u0, args):
        solution = solve(u0, args, **options)
        return jnp.sum(jnp.sin(solution.interface) * weights), solution

    derivative = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, solution), (u0_bar, args_bar) = derivative(jnp.asarray(initial), arguments())
    args_bar = {f"args_bar.{name}": np.asarray(x) for name, x in args_bar.items()}
    own = {"loss": np.asarray(value), "u0_bar": np.asarray(u0_bar)}
    return numbers_of(solution) | own | args_bar


def from_guess() -> Numbers:
    """Parareal from what one sweep has left. Collective over the world."""
    guess = solve(stopping=nm.FixedSweeps(1)).interface
    return with_gradient(guess=guess, stopping=nm.JumpTolerance(1e-9))


def failed_slice(method: dict[str, Any]) -> Numbers:
    """A field that is infinite from t = 0.75 on, in slice 4. Collective over the world."""

    def field(t, u, args):
        return jnp.where(t > 0.75, jnp.inf, lorenz96(t, u, args))

    options = STEPS | method | dict(throw=False)
    return numbers_of(nm.solve(field, jnp.asarray(INITIAL), EDGES, args=arguments(), **options))


def fallen_back() -> Numbers:
    """One direction and Euler steps do not converge, and parareal takes over. Collective."""
    rough = dict(coarse=nm.FixedSteps(diffrax.Euler(), 1), stopping=nm.JumpTolerance(1e-11))
    small = tangent(nm.SharedBasis("jumps", 1, 1), trust=None)
    found = with_gradient(**small, **rough)
    if found["rare"][2] == 0:
        raise RuntimeError("No sweep fell back: the case does not do what it is for.")
    return found


SAMPLES = INITIAL * np.array([[1.0], [0.5], [-0.7]])


def batched(method: str, **options: Any) -> Numbers:
    """Three samples. Collective over the world."""
    rule = nm.JumpTolerance(1e-9)
    return with_gradient(SAMPLES, method=method, n_batch_axes=1, stopping=rule, **options)


CONFIG = """
[run]
name = "recorded"
precision = "float64"
n_steps = 20
hang_timeout_s = 600.0
[data]
source = "{folder}/set"
input = "u"
target = "u"
times = "t"
[network]
name = "mlp"
width = 4
depth = 1
[loss]
name = "mean_squared_error"
[optim]
learning_rate = 0.02
[time]
horizon = [0.0, 2.0]
n_slices = 7
fine = {{ solver = "rk4", n_steps = 2 }}
coarse = {{ solver = "euler", n_steps = 1 }}
basis = {{ kind = "pod", rank = 1, new = 1, complement = true }}
stopping = {{ tol = 1e-10 }}
adjoint = {{ tol = 1e-10 }}
[output]
log_every = 1
checkpoint_every = 1000
"""
RECORDED = (
    "loss", "grad_norm", "sweeps", "adjoint_sweeps", "jump", "adjoint_residual",
    "guarded", "damped", "fallbacks", "fine_solves", "tangents",
    "gradient_error_estimate", "gradient_error",
)  # fmt: skip
TRACKED = "time.tracking={bound=0.05,check_every=8}"
HALF = "data.batch_size=4"
RELAXED = "time.relaxation={steps=12,start=0.2}"


def write_inputs(folder: Path) -> None:
    """Eight damped rotations, and the config that trains on them. Local."""
    t = np.linspace(0.0, 2.0, 9)
    start = np.random.default_rng(0).uniform(0.5, 1.5, (8, 2))
    z = (start[:, :1] + 1j * start[:, 1:]) * np.exp((-0.2 + 2.0j) * t)
    rows = {"t": [t.tolist()] * 8, "u": np.stack([z.real, z.imag], axis=-1).tolist()}
    split = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(folder / "set"))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))


def training(*settings: str) -> Callable[[Path], Numbers]:
    """Twenty optimizer steps with these settings. Returns a function that is collective."""

    def run(folder: Path) -> Numbers:
        out = folder / re.sub(r"\W+", "-", " ".join(settings))
        result = nm.train(folder / "config.toml", settings=settings, out=out)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        columns = {name: np.array([row.get(name, np.nan) for row in rows]) for name in RECORDED}
        return columns | {"test_loss": np.array(result["test_loss"])}

    return run


BASE = "parareal", "picard", "tangent", "reduced"
BY_OWN_MESSAGES = "tangent-blocks", "tangent-scan"
ON_TWO = ("tangent-complement", "tangent-jumps", "reduced-complement")


def ranks_of(method: str, rule: str) -> tuple[int, ...]:
    """The rank counts that a method is recorded on with a stopping rule; none at all: not. Local.

    All rules on one rank; on more, where the same programs take several times as long to compile,
    one rule for each way of sending messages.
    """
    if method == "serial":
        return (1, 2, 3, 4) if rule == "sweeps2" else ()
    if method in BY_OWN_MESSAGES and rule == "jump":
        return (1, 2, 3, 4)
    if method not in BASE:
        two = (1, 2) if method in ON_TWO and rule == "jump" else (1,)
        return two if rule in ("sweeps2", "jump") else ()
    if rule == "sweeps2" or method == "parareal" and rule == "jump":
        return (1, 2, 3, 4)
    if rule == "jump" or method == "parareal" and rule.startswith("freeze"):
        return (1, 2)
    return () if rule == "freeze-start" else (1,)


def solve_cases() -> Iterator[tuple[str, Case]]:
    """Cases of `nodepint_mpi.solve`, by name. Local."""
    for name, method in METHODS.items():
        for rule, stopping in RULES.items():
            ranks = ranks_of(name, rule)
            run = with_gradient if rule in ("sweeps2", "jump") else forward
            options = method | dict(stopping=stopping)
            if ranks:
                yield f"solve/{name}/{rule}", Case(lambda _, o=options, r=run: r(**o), ranks)
    yield "solve/guess", Case(lambda _: from_guess())
    yield "solve/fallback", Case(lambda _: fallen_back(), (1, 2))
    yield "solve/failed/parareal", Case(lambda _: failed_slice({}))
    yield "solve/failed/tangent", Case(lambda _: failed_slice(tangent(SMALL)), (1,))
    yield "solve/failed/serial", Case(lambda _: failed_slice(dict(method="serial")), (1, 2))
    yield "solve/batched/parareal", Case(lambda _: batched("parareal"))
    shared = nm.SharedBasis("pod", 3, 1, n_batch_axes=1)
    yield "solve/batched/tangent", Case(lambda _: batched("tangent", basis=shared), (1, 2))


def training_cases() -> Iterator[tuple[str, Case]]:
    """Cases of `nodepint_mpi.train`, by name. Local."""
    for method in ("parareal", "picard", "tangent", "reduced", "serial"):
        chosen = f"time.method={method}"
        on_two = (1, 2) if method in ("parareal", "reduced") else (1,)
        yield f"train/{method}/anew", Case(training(chosen), on_two)
        if method != "serial":  # which passes over tracking
            tracked = {"parareal": (1, 2, 3, 4), "tangent": (1, 2)}.get(method, (1,))
            yield f"train/{method}/tracked", Case(training(chosen, TRACKED), tracked)
    yield "train/parareal/batch", Case(training(HALF), (1,))
    yield "train/parareal/batch-tracked", Case(training(HALF, TRACKED), (1,))
    yield "train/parareal/relaxed", Case(training(RELAXED), (1,))
    yield "train/parareal/relaxed-tracked", Case(training(RELAXED, TRACKED), (1, 2))
    yield "train/parareal/groups", Case(training("run.data_ranks=2"), (2,))
    grouped = "run.data_ranks=2", HALF, TRACKED
    yield "train/parareal/groups-tracked", Case(training(*grouped), (2, 4))


def all_cases(n_ranks: int, only: str = "") -> dict[str, Case]:
    """The cases for this number of ranks whose names contain a text, training first. Local.

    Training first: it places ranks on cores, which must be before JAX starts.
    """
    named = dict(training_cases()) | dict(solve_cases())
    return {k: case for k, case in named.items() if n_ranks in case.n_ranks and only in k}


def compute(cases: dict[str, Case], folder: Path) -> Iterator[tuple[str, Numbers]]:
    """The numbers of each case. Collective over the world.

    Args:
        cases: What to compute.
        folder: An empty one, the same on all ranks.
    """
    if MPI.COMM_WORLD.rank == 0:
        write_inputs(folder)
    MPI.COMM_WORLD.Barrier()
    for name, case in cases.items():
        yield name, case.run(folder)


def differences(found: Numbers, wanted: Numbers) -> dict[str, float]:
    """How far each array is from what it should be, relative to its scale. Local.

    Infinity where names, shapes, types, whole numbers or what is not finite differ.
    """
    far = {}
    states = np.max(np.abs(_finite(wanted.get("interface", np.ones(1)))), initial=0.0)
    for name in sorted({*found, *wanted}):
        one, other = found.get(name), wanted.get(name)
        if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
            far[name] = np.inf
        elif one.tobytes() == other.tobytes():
            far[name] = 0.0
        elif one.dtype.kind != "f" or not np.array_equal(np.isfinite(one), np.isfinite(other)):
            far[name] = np.inf
        else:
            scale = np.max(np.abs(_finite(other)), initial=0.0)
            scale = states if name in OF_STATES else 1.0 if name in OF_ONE else scale
            largest = np.max(np.abs(_finite(one) - _finite(other)), initial=0.0)
            far[name] = float(largest / scale) if scale > 0 else np.inf
    return far


def _finite(array: np.ndarray) -> np.ndarray:
    return array[np.isfinite(array)]


def save(path: Path, cases: dict[str, Numbers]) -> None:
    """Write recorded numbers. Local."""
    arrays = {f"{case}:{k}": x for case, numbers in cases.items() for k, x in numbers.items()}
    np.savez_compressed(path, allow_pickle=False, **arrays)


def load(path: Path) -> dict[str, Numbers]:
    """Read recorded numbers, by case. Local."""
    cases: dict[str, Numbers] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            case, _, name = key.partition(":")
            cases.setdefault(case, {})[name] = arrays[key]
    return cases


def report(name: str, far: dict[str, float], rtol: float) -> bool:
    """Print how far a case is off, and say if it is too far. Local."""
    worst = max(far, key=lambda key: far[key])
    wrong = [key for key in far if far[key] > rtol]
    verdict = "DIFFERS in " + ", ".join(wrong) if wrong else "equal"
    print(f"{name:32} {far[worst]:8.1e}  {verdict}", flush=True)
    return bool(wrong)


def main(arguments: list[str]) -> int:
    """Record or compare; 1 if something differs. Collective over the world."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, help="file to record to")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare with this file")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases that contain this")
    parser.add_argument("--bits", action="store_true", help="compare bit for bit")
    given = parser.parse_args(arguments)
    if (given.out is None) == (given.compare is None):
        parser.error("give either a file to record to, or --compare FILE")
    jax.config.update("jax_enable_x64", True)
    world = MPI.COMM_WORLD
    cases = all_cases(world.size, given.only)
    recorded = load(given.compare) if given.compare else {}
    n_wrong, computed = 0, {}
    with tempfile.TemporaryDirectory() as own:
        for name, numbers in compute(cases, Path(world.bcast(own))):
            computed[name] = numbers
            if world.rank > 0:
                continue
            if given.compare is None:
                print(name, flush=True)
            else:
                far = differences(numbers, recorded.get(name, {}))
                n_wrong += report(name, far, 0.0 if given.bits else tolerance(name))
        world.Barrier()
    if world.rank == 0 and given.out is not None:
        save(given.out, computed)
    lost = [name for name in recorded if given.only in name and name not in cases]
    if world.rank == 0 and given.compare is not None:
        print(f"{len(cases)} cases, {n_wrong} different; recorded but not computed: {lost or 0}")
    return world.bcast(1 if n_wrong or lost else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
