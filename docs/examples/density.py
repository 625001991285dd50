"""Draw the density that `two_moons.py` has learned.

mpirun -n 2 python -m mpi4py docs/examples/density.py runs/two_moons density.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

import nodepint_mpi as nm

run, file = sys.argv[1:]
x, y = np.meshgrid(np.linspace(-1.5, 2.5, 121), np.linspace(-1.0, 1.5, 76))
points = np.stack([x.ravel(), y.ravel()], axis=1)
rows = np.concatenate([points, np.ones_like(points)], axis=1)  # each with a vector for the trace
log_density = nm.predict(run, {"point": rows}, trust=True).values.reshape(x.shape)
density = np.exp(log_density)
cell = (x[0, 1] - x[0, 0]) * (y[1, 0] - y[0, 0])
mass = density.sum() * cell
if nm.world_time_comm().rank == 0:
    print(f"The density integrates to {mass:.3f}.")
    figure, axes = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
    image = axes.pcolormesh(x, y, density, cmap="Greys", rasterized=True)
    figure.colorbar(image, label="density", shrink=0.7)
    axes.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    figure.savefig(file, dpi=150)
