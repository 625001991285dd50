"""A reduced model beside the full one: errors on the test split, speed, size."""

import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from nodepint_mpi.build.imports import named_code, require_trust
from nodepint_mpi.core.batch import as_numbers
from nodepint_mpi.core.objective import SimulationFree
from nodepint_mpi.errors import ReducedModelError
from nodepint_mpi.io.directory import Which, read_run
from nodepint_mpi.models.networks import EncodeProcessDecode
from nodepint_mpi.pages.figures import draw_reduced, save_figure
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.rom.file import read_rom
from nodepint_mpi.rom.load import load_rom
from nodepint_mpi.rom.model import ReducedModel, Stepper
from nodepint_mpi.training.evaluate import BATCH, TrainedRun, open_run
from nodepint_mpi.training.setup import Experiment

REPEATS = 9

_log = logging.getLogger(__name__)


class FullModel(eqx.Module):
    """The trained model with the reduced one's steps and calls, for comparison."""

    model: EncodeProcessDecode
    stepper: Stepper
    dtype: Any = eqx.field(static=True)

    def states(self, x: Array, ts: np.ndarray) -> Array:
        """States at `ts` of one input. Local."""
        start, since = self.model.encoder(as_numbers(x, self.dtype)), self.stepper.since_start(ts)
        return self.stepper(lambda t, u, args: self.model.processor(t, u, args), start, since)

    def solve(self, x: Array, ts: np.ndarray) -> Array:
        """Predictions at `ts` for one input. Local."""
        return jax.vmap(self.model.decoder)(self.states(x, ts))


def evaluate_rom(
    file: Path, folder: Path, comms: Comms, *, checkpoint: Which = None, trust: bool = False
) -> dict[str, Any]:
    """Compare a reduced model with a checkpoint (see `open_run`) of the run it is from.

    Collective over `comms`; the solves are serial, on rank 0, which also draws a figure beside
    the file. Equal on all ranks.

    Raises:
        NodepintError: on all ranks, if file, run or data cannot be read or do not belong together.
    """
    control = comms.control
    with together(control):
        rom = load_rom_of(folder, file, trust=trust)
    trained = open_run(folder, comms, checkpoint=checkpoint, trust=trust)
    result: dict[str, Any] = {}
    with together(control):
        if control.rank == 0:
            result, figure = compare_models(rom, trained, file)
            result["figure"] = str(save_figure(figure, file.with_suffix(".png")))
    return control.bcast(result)


def load_rom_of(folder: Path, file: Path, *, trust: bool = False) -> ReducedModel:
    """Load a reduced model that was made from this run. Local.

    With `trust`, code is imported if the run's own config names it too.

    Raises:
        NodepintError: if it cannot be read or was made from another one.
    """
    config = read_run(folder)
    require_trust(config, folder, trust=trust)
    found, wanted = read_rom(file).meta["fingerprint"], config.fingerprint()
    if found != wanted:
        raise ReducedModelError(
            f"{file} was made from another run (fingerprint {found}) than {folder} ({wanted})."
        )
    return load_rom(file, allow=named_code(config).values())


def compare_models(
    rom: ReducedModel, trained: TrainedRun, file: Path
) -> tuple[dict[str, Any], Figure]:
    """Errors, speed and size of a reduced model and the full one, and a figure of both. Local."""
    if trained.step != rom.origin.optimizer_step:
        _log.warning(
            "%s is from optimizer step %d, the newest checkpoint from %d: export it again",
            file, rom.origin.optimizer_step, trained.step,
        )  # fmt: skip
    return _compare(full_model(trained, rom.stepper), rom, trained.experiment, file)


def full_model(trained: TrainedRun, stepper: Stepper) -> FullModel:
    """The trained model, solved serially by these steps. Local."""
    return FullModel(
        eqx.combine(trained.params, trained.experiment.test_problem.static),
        stepper,
        jnp.zeros(()).dtype,
    )


def format_comparison(result: dict[str, Any]) -> str:
    """The comparison as tables. Local."""
    per_100 = [
        ("reduced against full model", result["reduced_vs_full"]),
        ("  the worst trajectory", result["worst_reduced_vs_full"]),
        ("projection of the full model's states", result["projection"]),
    ]
    lines = [f"{'relative L2 error':40s} {'%':>10s}"]
    for name in ("full_vs_data", "reduced_vs_data"):
        if name in result:
            per_100.append((name.replace("_vs_data", " model against data"), result[name]))
    lines += [f"{name:40s} {100 * value:10.4g}" for name, value in per_100]
    lines += ["", f"{'':28s} {'full':>12s} {'reduced':>12s} {'ratio':>8s}"]
    rows = [
        ("state", "state_size", "d", 1),
        ("parameters", "n_parameters", "d", 1),
        ("bytes", "n_bytes", "d", 1),
        (f"{result['n_test']} solves at once, ms", "batch_s", ".2f", 1e3),
        ("one solve, ms", "single_s", ".3f", 1e3),
    ]
    for label, key, form, unit in rows:
        full, reduced = (result[kind][key] for kind in ("full", "reduced"))
        numbers = f"{full * unit:12{form}} {reduced * unit:12{form}}"
        lines.append(f"{label:28s} {numbers} {full / reduced:8.1f}")
    lines += [f"{name}: full {a:.4g}, reduced {b:.4g}" for name, (a, b) in result["scores"].items()]
    if "figure" in result:
        lines += ["", f"figure: {result['figure']}"]
    return "\n".join(lines)


def _compare(
    full: FullModel, rom: ReducedModel, experiment: Experiment, file: Path
) -> tuple[dict[str, Any], Figure]:
    samples, problem = experiment.test, experiment.test_problem
    batch = samples.take(np.arange(min(BATCH, samples.n_rows)))
    inputs, targets = np.asarray(batch.initial), np.asarray(batch.targets)
    ts = np.asarray(samples.times, dtype=float)
    states, reduced_states = (run_batch(model.states, inputs, ts) for model in (full, rom))
    predictions, reduced = (run_batch(model.solve, inputs, ts) for model in (full, rom))
    result: dict[str, Any] = {
        "file": str(file),
        "optimizer_step": rom.origin.optimizer_step,
        "n_test": len(inputs),
        "energy": rom.origin.energy,
        "reduced_vs_full": _relative(reduced_states, states),
        "worst_reduced_vs_full": max(map(_relative, reduced_states, states)),
        "projection": _relative(np.asarray(rom.lift(rom.project(jnp.asarray(states)))), states),
        "scores": {},
    }
    if samples.section.times is None:
        metrics = problem.metrics
        if not isinstance(problem.loss, SimulationFree):
            metrics = {"loss": problem.loss, **metrics}
        for name, metric in metrics.items():
            both = (jnp.asarray(np.moveaxis(p, 1, 0)) for p in (predictions, reduced))
            means = [metric(p, jnp.asarray(np.moveaxis(targets, 1, 0))) for p in both]
            result["scores"][name] = [mean.value() for mean in means]
    elif not samples.has_gaps:
        result["full_vs_data"] = _relative(predictions, targets)
        result["reduced_vs_data"] = _relative(reduced, targets)
    for kind, model in (("full", full), ("reduced", rom)):
        arrays = _parameters(model)
        result[kind] = {
            "state_size": states[0, 0].size if kind == "full" else len(rom.basis),
            "n_parameters": sum(array.size for array in arrays),
            "n_bytes": sum(array.nbytes for array in arrays),
            "batch_s": _median_s(model.solve, inputs, ts),
            "single_s": _median_s(model.solve, inputs[:1], ts),
        }
    result["reduced"]["n_bytes"] = file.stat().st_size
    truth = None if samples.section.times is None or samples.has_gaps else targets[0]
    return result, draw_reduced(samples.times, predictions, reduced, truth)


def run_batch(function: Callable, inputs: np.ndarray, ts: np.ndarray) -> np.ndarray:
    """`states` or `solve` of a full or reduced model for a batch of inputs. Local."""
    return np.asarray(_batched(function)(jnp.asarray(inputs), tuple(ts.tolist())))


def _batched(function: Callable) -> Callable:
    """A bound method over a batch, jitted, with the arrays of its module as arguments."""
    return eqx.Partial(_call_batched, function)


@eqx.filter_jit
def _call_batched(function: Callable, inputs: Array, ts: tuple[float, ...]) -> Array:
    return jax.vmap(lambda x: function(x, np.asarray(ts)))(inputs)


def _median_s(function: Callable, inputs: np.ndarray, ts: np.ndarray) -> float:
    """Median time of a solve that is compiled and has run before."""
    call, seconds = _batched(function), []
    x, times = jnp.asarray(inputs), tuple(ts.tolist())
    jax.block_until_ready(call(x, times))
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(call(x, times))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _parameters(model: eqx.Module) -> list[Array]:
    """All arrays a solve computes with, the basis among them."""
    return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative L2 distance over all that is given."""
    wanted = np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
