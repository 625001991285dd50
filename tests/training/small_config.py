"""The config that tests of training have in common: a small network, a few slices."""

from pathlib import Path

MLP = 'name = "mlp"\nwidth = 8'
STEPS = 'fine = { solver = "rk4", n_steps = 4 }\ncoarse = { solver = "euler", n_steps = 2 }'
EXACT = "stopping = { tol = 1e-12 }\nadjoint = { tol = 1e-12 }\n"


def small_config(
    source: Path,
    options: str = "",
    *,
    n_slices: int = 7,
    horizon: float = 2.0,
    steps: str = STEPS,
    run: str = "",
    data: str = "",
    network: str = MLP,
    sections: str = "",
) -> str:
    """The text of a config file, with `options` in its section `time` and whole `sections`."""
    return f"""
[run]
name = "test"
precision = "float64"
{run}
[data]
source = "{source}"
input = "u"
target = "u"
times = "t"
{data}
[network]
{network}
[loss]
name = "mean_squared_error"
[optim]
learning_rate = 0.02
[time]
horizon = [0.0, {horizon}]
n_slices = {n_slices}
{steps}
{options}
{sections}
"""
