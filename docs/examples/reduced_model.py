"""Export the reduced model of a trained run, and use it.

mpirun -n 2 python -m mpi4py docs/examples/reduced_model.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import nodepint_mpi as nm

problem = Path(__file__).with_name("chain.py")
run, file = Path("runs/chain"), "chain.h5"
if not (run / "DONE").exists():
    nm.train(problem, out=run)
made = nm.export_rom(run, file, rank=8, trust=True)  # the run's config names code of chain.py

if nm.world_time_comm().rank == 0:
    # Needs no MPI and no run: take the file, and chain.py, anywhere.
    rom = nm.load_rom(file, allow=[f"{problem}:make_field"])
    print(rom)
    bead = jnp.arange(1, 13) / 13
    starts = jnp.outer(jnp.array([0.5, 1.0, 2.0]), jnp.sin(jnp.pi * bead))
    starts = jnp.concatenate([starts, jnp.zeros_like(starts)], axis=1)  # at rest
    times = np.linspace(0.0, 12.0, 49)  # twice as long as it was trained
    states = jax.vmap(rom.solve, in_axes=(0, None))(starts, times)
    slope = rom.field(0.0, rom.project(starts[0]), None)
    print(f"{states.shape[0]} solves of {slope.size} equations instead of {starts.shape[1]}")
    print("the sixth bead at the end:", *(f"{x:.2f}" for x in states[:, -1, 5]))
