"""`nodepint sample`: samples of a trained velocity field, drawn parallel in time."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.core.gaussian_paths import gaussian_path_of
from nodepint_mpi.core.sample_params import SampleArgs
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.io.directory import Which
from nodepint_mpi.pages.figures import save_figure
from nodepint_mpi.pages.generated import draw_generated
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.generate import Drawn, sample
from nodepint_mpi.parallel.sampling import Sampling
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.training.batch_model import decode, encode, slope_of
from nodepint_mpi.training.evaluate import TrainedRun, open_run
from nodepint_mpi.training.setup import Experiment

SAMPLES, PICTURES = "samples", "pictures"
MOST_ROWS = 20_000
"""Training samples whose classes are looked at."""
ANY_CLASS = -1

log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """What to draw: how many samples, of which classes in turn, by how much more of their class
    (1 is as trained), and whether to compare the result with that of the serial sampler."""

    n: int
    classes: tuple[int, ...] = ()
    compare: bool = False
    guidance: float = 1.0


class RunField:
    """The velocity field of a run, for one sample: `args` are its arrays and the sample's own.

    With a guidance other than 1 it is extrapolated from that of no class through that of the
    sample's, for twice the work.

    Reference:
        Ho, Salimans (2022), Classifier-free diffusion guidance, equation (6).
    """

    def __init__(self, static: Any, guidance: float):
        self._static, self._guidance = static, guidance

    def __call__(self, t: Any, u: Any, args: Any) -> Any:
        params, own = args
        field = eqx.combine(params, self._static)
        velocity = slope_of(field, t, u, own, None)
        if self._guidance == 1:
            return velocity
        of_any = SampleArgs(None, jnp.full_like(own.static, ANY_CLASS))
        unguided = slope_of(field, t, u, of_any, None)
        return unguided + self._guidance * (velocity - unguided)


def sample_run(
    folder: Path,
    comms: Comms,
    wanted: Wanted,
    options: Sequence[Sampling],
    *,
    checkpoint: Which = None,
    trust: bool = False,
) -> list[dict[str, Any]]:
    """Draw samples of a run by one or more methods. Collective over `comms`.

    Writes `samples/NAME.npz` with states, what the decoder makes of them, noise and classes, and
    `samples/NAME.json` with what it cost; and `pictures/samples.png` of the last method.

    Args:
        folder: The run directory.
        comms: The run's communicators.
        wanted: What to draw.
        options: How; `end` is that of the run's horizon.
        checkpoint: As of `open_run`.
        trust: Import the code that the run's config names.

    Returns:
        One summary for each of the options, equal on all ranks but for seconds.

    Raises:
        NodepintError: on all ranks, if the run cannot be read, has no velocity field, or does not
            know a class; if options do not fit.
    """
    trained = open_run(folder, comms, checkpoint=checkpoint, trust=trust)
    experiment = trained.experiment
    with together(comms.control):
        require_velocity(experiment)
        static = _static_of(experiment, wanted)
    model = eqx.combine(trained.params, experiment.test_problem.static)
    shape = _shape_of_state(experiment, model)
    end = float(experiment.config.time.horizon[1])
    chosen = [replace(one, end=end).checked(int(np.prod(shape))) for one in options]
    params, rest = eqx.partition(model.processor, eqx.is_inexact_array)
    own = None if static is None else SampleArgs(None, jnp.asarray(static))
    field, path = RunField(rest, wanted.guidance), gaussian_path_of(model.processor)

    def draw(one: Sampling) -> tuple[Drawn, float]:
        def once() -> Drawn:
            drawn = sample(
                field, shape, wanted.n, one, args=(params, own), args_axes=(None, 0), path=path,
                comm=comms.time,
            )  # fmt: skip
            return drawn._replace(samples=jax.block_until_ready(drawn.samples))

        if wanted.compare:
            once()  # compiles
        began = time.perf_counter()
        return once(), time.perf_counter() - began

    serial: dict[tuple[Any, ...], tuple[Drawn, float]] = {}
    rows = []
    for one in chosen:
        drawn, seconds = draw(one)
        row = _summary(trained, one, drawn, seconds) | {
            "ranks": comms.time.size, "guidance": wanted.guidance,
        }  # fmt: skip
        if wanted.compare:
            key = (one.sampler, one.n_steps, one.seed, type(one.solver))
            if one.method == "serial":
                serial[key] = drawn, seconds
            elif key not in serial:
                serial[key] = draw(replace(one, method="serial", n_slices=one.slices, rank=None))
            row |= _difference(drawn, serial[key])
        rows.append(row)
        with together(comms.control):
            if comms.control.rank == 0:
                _write(folder, experiment, model, drawn, static, row)
    return rows


def require_velocity(experiment: Experiment) -> None:
    """Refuse a run whose field does not carry noise to data. Local.

    Raises:
        ConfigError: with what it is instead.
    """
    config = experiment.config
    begin, end = config.time.horizon
    if experiment.test_problem.noise is not None:
        raise ConfigError(
            "The run is of a stochastic equation: expected one without `[noise]`, whose field was "
            'fitted as a velocity from noise to data, such as by `loss.name = "flow_matching"`. '
            "Its stochastic sampler is `--sampler sde`."
        )
    if begin != 0 or not 0 < end <= 1:
        raise ConfigError(
            f"The run's `time.horizon` is [{begin:g}, {end:g}]; expected [0, 1], from noise to "
            "data, as that of a velocity field. A run of another kind has no samples to draw."
        )
    if config.data is not None and config.data.inputs is not None:
        raise ConfigError("The run's field is driven by `data.inputs`: no velocity field.")
    loss = None if config.loss is None else config.loss.name
    if loss not in ("flow_matching", "denoising_score_matching"):
        log.info("The run's loss, %s, is not known to fit a velocity from noise to data.", loss)


def _static_of(experiment: Experiment, wanted: Wanted) -> np.ndarray | None:
    """The features of every sample, (samples, features): its class, if that is what they are."""
    samples, dtype = experiment.train, np.zeros(()).dtype
    column = samples.section.static
    if column is None:
        _refuse_guidance(wanted, "the run has no `data.static`")
        if wanted.classes:
            raise ConfigError(
                "`--classes` were given, but the run has no `data.static`: its field knows none."
            )
        return None
    values = samples.split.take(column, np.arange(min(samples.n_rows, MOST_ROWS)))
    values = values.reshape(len(values), -1).astype(dtype)
    whole = values.shape[1] == 1 and np.all(values == np.round(values))
    if not whole:
        _refuse_guidance(wanted, f"`data.static`, {column!r}, holds none")
        if wanted.classes:
            raise ConfigError(
                f"`--classes` were given, but `data.static`, {column!r}, holds no classes: samples "
                "take these numbers from the training data in turn."
            )
        return values[np.arange(wanted.n) % len(values)]
    known = np.unique(values).astype(int)
    for name in wanted.classes:
        if name not in known and name != ANY_CLASS:
            listing = ", ".join(map(str, known[:20]))
            raise ConfigError(
                f"Class {name} is not one of the training data: choose from {listing}, or "
                f"{ANY_CLASS} for none."
            )
    chosen = np.array(wanted.classes or known)
    return chosen[np.arange(wanted.n) % len(chosen), None].astype(dtype)


def _refuse_guidance(wanted: Wanted, why: str) -> None:
    if wanted.guidance != 1:
        raise ConfigError(
            f"`--guidance` is away from no class towards one, but {why}: leave it out."
        )


def _shape_of_state(experiment: Experiment, model: Any) -> tuple[int, ...]:
    batch = experiment.test.take(np.arange(1))
    seed = experiment.test_problem.seed
    return eqx.filter_eval_shape(lambda: encode(model, batch, seed)).shape[1:]


def _summary(trained: TrainedRun, one: Sampling, drawn: Drawn, seconds: float) -> dict[str, Any]:
    name = f"{one.sampler}-{one.method}" + (f"-rank{one.rank}" if one.rank is not None else "")
    return {
        "name": name, "step": trained.step, "method": one.method, "rank": one.rank,
        "sampler": one.sampler, "n_steps": one.n_steps, "n_slices": one.slices, "seed": one.seed,
        "n_samples": len(drawn.numbers), "shape": list(drawn.samples.shape),
        "tolerance": one.tolerance, **drawn.counts._asdict(),
        "largest_jump": drawn.largest_jump, "status": drawn.solution.status.name.lower(),
        "seconds": seconds,
    }  # fmt: skip


def _difference(drawn: Drawn, serial: tuple[Drawn, float]) -> dict[str, float]:
    difference = np.asarray(drawn.samples) - np.asarray(serial[0].samples)
    return {
        "error_rms": float(np.sqrt(np.mean(np.square(difference)))),
        "error_max": float(np.max(np.abs(difference))),
        "serial_seconds": serial[1],
    }


def _write(
    folder: Path,
    experiment: Experiment,
    model: Any,
    drawn: Drawn,
    static: np.ndarray | None,
    row: dict[str, Any],
) -> None:
    """Files of one drawing. Local, on the first rank."""
    batch = SampleBatch(np.asarray(drawn.noise), None, static=static)
    data = np.asarray(decode(model, drawn.samples[None], batch, experiment.test_problem.seed))[0]
    classes = None if static is None or static.shape[1] != 1 else static[:, 0]
    for name in (SAMPLES, PICTURES):
        (folder / name).mkdir(exist_ok=True)
    arrays = {"states": np.asarray(drawn.samples), "samples": data, "numbers": drawn.numbers}
    if static is not None:
        arrays["static"] = static
    target = folder / SAMPLES / f"{row['name']}.npz"
    partial = target.with_suffix(".partial.npz")
    np.savez(partial, noise=np.asarray(drawn.noise), **arrays)
    partial.replace(target)
    record = {key: None if value != value else value for key, value in row.items()}  # NaN
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    save_figure(draw_generated(data, classes), folder / PICTURES / "samples.png")


def format_samples(rows: list[dict[str, Any]]) -> str:
    """One line for each drawing. Local."""
    lines = []
    for row in rows:
        rank = "" if row["rank"] is None else f" of rank {row['rank']}"
        line = (
            f"{row['n_samples']} samples, {row['sampler']}, {row['n_steps']} steps: {row['method']}"
            f"{rank}, {row['sweeps']} sweeps of {row['n_slices']} slices, "
        )
        if row["evaluations"] is not None:
            line += (
                f"{row['evaluations']} evaluations ({row['equivalents']:.3g} serial solutions), "
                f"{row['serial_steps']} in sequence ({row['serial_steps_pipelined']} pipelined), "
            )
        line += f"largest jump {row['largest_jump']:.1e}, {row['status']}, {row['seconds']:.2f} s"
        if "error_rms" in row:
            line += (
                f"; serial {row['serial_seconds']:.2f} s, difference {row['error_rms']:.1e} rms, "
                f"{row['error_max']:.1e} at most"
            )
        else:
            line += " with compilation"
        lines.append(line)
    return "\n".join(lines)
