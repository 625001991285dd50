"""Cost and start of configs/control/cubed_force.toml."""

import nodepint_mpi as nm

HORIZON = 8.0


def cubed_cost(weight):
    """The mean of (4 - x)^2 + 2 x'^2 + weight c^2 over the horizon."""

    def running(t, u, c):
        return ((4 - u[0]) ** 2 + 2 * u[1] ** 2 + weight * c[0] ** 2) / HORIZON

    return nm.Cost(running=running)


def first_push(t):
    """First forward, then back."""
    return 1.5 - 2.5 * t / HORIZON
