"""Run the scripts of docs/examples one after the other and note what they found: saves imports.

    mpirun -n 2 python -m mpi4py run_examples.py RESULT_STEM [all]

Each rank writes `RESULT_STEM.RANK.npz`. Without `all`, only a solve and a training loop are run.
"""

import runpy
import sys
from pathlib import Path

import equinox as eqx
import numpy as np
from jax.flatten_util import ravel_pytree

import nodepint_mpi as nm

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def tracked_gradient(names):
    """What the script's last model has for a gradient once its sweeps have come to rest."""
    sweep, carry = eqx.filter_jit(nm.value_and_grad(names["loss"])), names["carry"]
    for _ in range(8):
        _, _, carry = sweep(names["model"], carry)
    return sweep(names["model"], carry)[1]


def run(name: str) -> dict:
    """The names that a script has defined in the end."""
    return runpy.run_path(str(EXAMPLES / name))


def solve_and_train() -> dict:
    """By the two scripts that show these alone. Collective over the world."""
    from nodepint_mpi.parallel.comms import world

    solved, trained = run("solve_ode.py"), run("own_field.py")
    found = {
        "interface": solved["solution"].interface,
        "converged": solved["solution"].status.name == "CONVERGED",
        "slope": solved["slope"]["strength"],
        "loss": trained["value"],
        "params": ravel_pytree(eqx.filter(trained["model"], eqx.is_array))[0],
    }
    if world().Get_size() > 1:
        gradient = eqx.filter_jit(eqx.filter_grad(trained["loss"]))(trained["model"])
        found["gradient"] = ravel_pytree(gradient)[0]
    return found


def the_others() -> dict:
    """What the longer scripts found. Collective over the world."""
    from nodepint_mpi.parallel.comms import world

    given, tracked = run("objects.py"), run("tracked_loop.py")
    reduced = run("reduced_model.py")
    found = {
        "test_error": given["result"]["test_relative_error"],
        "predicted": given["predicted"].values,
        "tracked_loss": tracked["value"],
        "tracked_misfit": tracked["misfit"],
        "tracked_params": ravel_pytree(eqx.filter(tracked["model"], eqx.is_array))[0],
        "tracked_gradient": ravel_pytree(tracked_gradient(tracked))[0],
        "rank": reduced["made"]["rank"],
    }
    if world().Get_rank() == 0:
        found |= {name: reduced[name] for name in ("starts", "times", "states")}
    return found


def main(stem: str, *which: str) -> None:
    """Collective over the world."""
    from nodepint_mpi.parallel.comms import world

    found = solve_and_train()
    if "all" in which:
        found |= the_others()
    np.savez(f"{stem}.{world().Get_rank()}.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
