"""Solve an ODE of one's own parallel in time, and differentiate through the solve.

mpirun -n 4 python -m mpi4py docs/examples/solve_ode.py
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import nodepint_mpi as nm

jax.config.update("jax_enable_x64", True)


def pendulum(t, u, args):
    """With friction, pushed by a motor: angle and angular velocity."""
    push = args["strength"] * jnp.cos(args["frequency"] * t)
    return jnp.stack([u[1], push - 0.3 * u[1] - jnp.sin(u[0])])


def solve(u0, args):
    return nm.solve(
        pendulum,
        u0,
        np.linspace(0.0, 20.0, 17),  # 16 slices, dealt out to the ranks
        fine=nm.FixedSteps(diffrax.Tsit5(), 100),  # steps per slice
        coarse=nm.FixedSteps(nm.RK4(), 4),
        stopping=nm.JumpTolerance(1e-9),
        args=args,
    )


def last_angle(u0, args):
    return solve(u0, args).interface[-1, 0]


u0, args = jnp.array([1.0, 0.0]), {"strength": jnp.array(0.5), "frequency": jnp.array(0.7)}
solution = solve(u0, args)
slope = jax.grad(last_angle, argnums=1)(u0, args)

if nm.world_time_comm().rank == 0:
    print(solution.status)
    print(f"{solution.sweeps} sweeps, jumps", *(f"{jump:.0e}" for jump in solution.jumps))
    print(f"angle at t = 20: {solution.interface[-1, 0]:.9f}")
    print(f"it changes by {slope['strength']:.6f} times a change of the motor's strength")
