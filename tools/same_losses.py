"""Do the example models train to the same losses on any number of ranks, and as plain diffrax does?

    mpirun -n 3 python -m mpi4py tools/same_losses.py
    mpirun -n 2 python -m mpi4py tools/same_losses.py docs/examples/cde.py --steps 100

Each model is trained in double precision with tight tolerances on all ranks, and on the first
rank alone; the first loss is also that of one diffrax solve. It ends with 1 if losses differ by
more than 1e-10, or the first one by more than 1e-8, of their size. Data must have been prepared
(`nodepint data prepare hare_lynx`); those that examples make go to data/made/.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from nodepint_mpi.config.experiment import Config, read_config
from nodepint_mpi.data.own import share_own_data
from nodepint_mpi.parallel.comms import Comms, alone, make_comms, world
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.plain import make_plain_loss
from nodepint_mpi.training.setup import fresh_state, set_up

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("pendulum", "spirals", "cde", "two_moons")
MODELS = [ROOT / "docs/examples" / f"{name}.py" for name in EXAMPLES] + [
    ROOT / "configs/hare_lynx_gap.toml"
]
EXACT = {
    "run.precision": "float64",
    "time.stopping": {"tol": 1e-12},
    "time.adjoint": {"tol": 1e-12},
}
SAME, PLAIN = 1e-10, 1e-8


def losses(config: Config, comms: Comms, n_steps: int) -> np.ndarray:
    """The loss of each step. Collective over `comms`."""
    experiment = set_up(config, comms)
    stepper, state, found = make_stepper(experiment), fresh_state(experiment), []
    for k in range(n_steps):
        taken = stepper.take(state, experiment.batch(k), k)
        state = taken.state
        found.append(float(taken.report.loss))
    return np.array(found)


def plain_loss(config: Config) -> float:
    """The first loss by one diffrax solve for each sample. Local."""
    experiment = set_up(config, make_comms(alone()))
    loss = jax.jit(make_plain_loss(experiment))
    return float(loss(fresh_state(experiment).params, experiment.whole_batch(0)))


def main() -> int:
    """Collective over the world."""
    parser = argparse.ArgumentParser(description="Compare losses over ranks.")
    parser.add_argument("configs", nargs="*", type=Path, default=MODELS)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    comms, worst = make_comms(world()), 0.0
    for path in options.configs:
        config = read_config(path, EXACT)
        if config.time.tracking is not None:
            config = config.model_copy(
                update={"time": config.time.model_copy(update={"tracking": None})}
            )
        config = share_own_data(comms.control, config)
        found = losses(config, comms, options.steps)
        if comms.control.rank == 0:
            one = losses(config, make_comms(alone()), options.steps)
            apart = float(np.max(np.abs(found / one - 1)))
            first, plain = 0.0, "plain diffrax has no steps that end where inputs jump"
            if config.data is None or config.data.interpolation != "constant":
                first = abs(found[0] / plain_loss(config) - 1)
                plain = f"the first by {first:.1e} from that of plain diffrax"
            print(
                f"{path.stem}: {options.steps} losses on {comms.control.size} ranks differ by "
                f"{apart:.1e} from those on one; {plain}",
                flush=True,
            )
            worst = max(worst, apart / SAME, first / PLAIN)
        comms.control.Barrier()
    return int(comms.control.bcast(worst) > 1)


if __name__ == "__main__":
    raise SystemExit(main())
