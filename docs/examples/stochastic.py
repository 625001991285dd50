"""Paths of a stochastic equation, all at once and parallel in time, with statistics and a gradient.

mpirun -n 4 python -m mpi4py docs/examples/stochastic.py
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import nodepint_mpi as nm

jax.config.update("jax_enable_x64", True)
N_PATHS = 500


def drift(t, u, args):
    """A price that is drawn to its long-term level."""
    return args["rate"] * (args["level"] - u)


def diffusion(t, u, args):
    return args["volatility"] * u


def solve(args):
    return nm.solve(
        drift,
        jnp.array(2.0),
        np.linspace(0.0, 4.0, 17),  # 16 slices, dealt out to the ranks
        diffusion=diffusion,
        noise=nm.Noise(seed=7, paths=np.arange(N_PATHS), calculus="ito"),
        in_axes=(None, None),  # paths differ by their noise alone
        fine=nm.FixedSteps(diffrax.ItoMilstein(), 32),  # steps per slice
        coarse=nm.FixedSteps(diffrax.ItoMilstein(), 1),
        stopping=nm.JumpTolerance(1e-8),
        args=args,
    )


def mean_at_the_end(args):
    return jnp.mean(solve(args).interface[-1])


args = {"rate": jnp.array(1.0), "level": jnp.array(1.0), "volatility": jnp.array(0.4)}
solution = solve(args)
statistics = nm.path_statistics(solution.interface, quantiles=(0.05, 0.95))
slopes = jax.grad(mean_at_the_end)(args)

if nm.world_time_comm().rank == 0:
    low, high = statistics.quantiles[:, -1]
    print(solution.status)
    print(f"{solution.sweeps} sweeps, half of the paths by {np.median(solution.sample_sweeps):g}")
    print(f"at t = 4 the mean is {statistics.mean[-1]:.4f}, nine of ten in {low:.3f} to {high:.3f}")
    print(f"the mean changes by {slopes['level']:.4f} times a change of the level")
